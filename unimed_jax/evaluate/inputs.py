"""Pictures to be embedded or compared, wherever they lie: files, exported records, the data sets of a suite.

Each kind is a numbered sequence whose elements are read one by one, from several threads. An element holds no picture,
one, or the frames of a file; one that cannot be read raises, and the caller counts and lists it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unimed_jax.data import files, found, images, medical, shards, slides
from unimed_jax.data.dicom import Frame, Hold, Picture
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture, with what may be said about it in an output."""

    id: str  # unique within its inputs
    data: bytes | UInt8[np.ndarray, "..."]  # an image file as it is, else u8[h w] or u8[h w 3]
    sha256: str = ""  # of the stored bytes, or those that a record's picture was reduced from; when asked for
    file: str = ""  # as the user named it, or below what the user named
    frame: int = 0
    modality: str = ""
    key: str = ""  # of a record

    def square(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The evaluation picture of `images.eval_image`.

        Raises:
            DataError: for a damaged image file.
        """
        data = self.data if isinstance(self.data, bytes) else Image.fromarray(self.data)
        return images.eval_image(data, size, where=Path(self.file or self.key).name)

    def pixels(self) -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]:
        """The decoded picture; one channel when all three are the same.

        Raises:
            DataError: for a damaged image file.
        """
        where = Path(self.file or self.key).name
        return images.one_channel(
            images.decode(self.data, where=where) if isinstance(self.data, bytes) else self.data
        )


class Inputs(Protocol):
    """A numbered sequence of what holds pictures."""

    name: str

    def __len__(self) -> int:
        """How many files or records there are."""
        ...

    def title(self, number: int) -> str:
        """What to call one in a list of failures."""
        ...

    def read(self, number: int, *, hashed: bool = False) -> list[Item]:
        """Its pictures; `hashed` fills `Item.sha256`.

        Raises:
            DataError: when it cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """A digest that changes when the inputs do, found without reading them."""
        ...

    def sources(self) -> list[Path]:
        """The files that are read, which no output may replace."""
        ...


class Files:
    """What `unimed-jax predict` takes: files, folders, CSV lists; slices of a series as a volume, slides as tiles.

    Args:
        paths: files, folders, and lists that end in .csv.
        lists: further lists.
        window: (centre, width) for gray DICOM and NIfTI values; default: the file's own.
        slices: of a volume; default: the middle one.
        tiles: of whole-slide images.
        threads: headers of DICOM files that are read in parallel.

    Raises:
        DataError: for a path that does not exist, a list that cannot be read, or no picture at all.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        lists: Sequence[str | Path] = (),
        *,
        window: tuple[float, float] | None = None,
        slices: medical.Slices | None = None,
        tiles: slides.Tiles | None = None,
        threads: int = 4,
    ):
        named = found.find(paths, lists, threads=threads)
        self.inputs, self.notes = named.inputs, named.notes
        every = [*paths, *lists]
        self.name = str(every[0]) if len(every) == 1 else f"{len(every)} paths"
        self.window, self.slices, self.tiles = window, slices, tiles

    def __len__(self) -> int:
        return len(self.inputs)

    def sources(self) -> list[Path]:
        """All files that were found."""
        return [f for i in self.inputs for f in i.files]

    def title(self, number: int) -> str:
        """The path as it was given, of a volume that of its first slice."""
        return str(self.inputs[number].files[0])

    def frames(
        self, item: found.Input, size: int = 224, hold: Hold = nullcontext
    ) -> Iterator[Frame | found.Failed]:
        """The chosen pictures of one input, not decoded yet; tiles have so many pixels a side."""
        tiles = dataclasses.replace(self.tiles or slides.Tiles(), size=size)
        return found.frames(item, window=self.window, slices=self.slices, tiles=tiles, hold=hold)

    def read(self, number: int, *, hashed: bool = False) -> list[Item]:
        """The chosen pictures."""
        out: list[Item] = []
        digests: dict[Path, str] = {}
        for frame in self.frames(self.inputs[number]):
            if isinstance(frame, found.Failed):
                raise frame.error
            if hashed and frame.file not in digests:
                digests[frame.file] = files.file_sha256(frame.file)
            out.append(file_item(frame.file, frame.read(), digests.get(frame.file, "")))
        return out

    def fingerprint(self) -> str:
        """Names, sizes and times of change."""
        h = hashlib.sha256()
        for path in (f for i in self.inputs for f in i.files):
            try:
                facts = path.stat()
                h.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode(errors="surrogateescape"))
            except (OSError, ValueError):
                h.update(f"{path}\0gone\n".encode(errors="surrogateescape"))
        return h.hexdigest()


def file_item(path: Path, p: Picture, digest: str = "") -> Item:
    """A picture of a file; of several the id says which: its number, or the corner of a slide's tile."""
    place = ",".join(map(str, p.corner)) if p.corner else str(p.frame)
    one = p.frames == 1 and not p.corner
    return Item(
        id=str(path) if one else f"{path}#{place}",
        data=p.data,
        sha256=digest if one or not digest else f"{digest}#{place}",
        file=str(path),
        frame=p.frame,
        modality=p.modality,
    )


class Records:
    """Exported records.

    Args:
        root: of all sources, or of one; `ROOT@SPLIT` for one split.
        split: of every source that has it; default: all.

    Raises:
        DataError: for a folder without records, or a split that no source has.
    """

    def __init__(self, root: str | Path, split: str = ""):
        from unimed_jax.evaluate.zeroshot import Pool

        folder, at, named = str(root).rpartition("@")
        if at and not split and not Path(root).exists():
            root, split = folder, named
        places = shards.find_sources(root)
        parts = [
            shards.Shards(place, name)
            for place in places.values()
            for name in shards.Manifest.read(place).splits
            if split in ("", name)
        ]
        if not parts:
            what = f"no source in {root} has the split {split!r}" if places else f"no records in {root}"
            raise DataError(what, "unimed-jax data stats shows what there is")
        self.name = f"{'+'.join(dict.fromkeys(s.name for s in parts))}{f'@{split}' if split else ''}"
        self._pool: Any = Pool(parts)

    def __len__(self) -> int:
        return len(self._pool)

    def sources(self) -> list[Path]:
        """None: shards have names of their own."""
        return []

    def title(self, number: int) -> str:
        """The number of the record: its key may be what cannot be read."""
        return f"record {number} of {self.name}"

    def read(self, number: int, *, hashed: bool = False) -> list[Item]:
        """The record's picture."""
        e = self._pool[number]
        digest = (e.original_sha256 or hashlib.sha256(e.image).hexdigest()) if hashed else ""
        return [Item(id=e.key, data=e.image, sha256=digest, modality=e.modality, key=e.key)]

    def with_keys(self, keys: Collection[str]) -> dict[str, Item]:
        """The records with some keys; all are looked through until they are found."""
        left, out = set(keys), {}
        for number in range(len(self)):
            if not left:
                break
            item = self.read(number)[0]
            if item.key in left:
                left.discard(item.key)
                out[item.key] = item
        return out

    def fingerprint(self) -> str:
        """The digests of all shards."""
        h = hashlib.sha256()
        for part in self._pool.sources:
            h.update(f"{part.name} {part.split} {[s.sha256 for s in part.shards]}\n".encode())
        return h.hexdigest()


class SuiteSets:
    """The pictures of a suite's data sets, as their lists name them.

    Args:
        tables: set -> its rows.
    """

    def __init__(self, name: str, tables: dict[str, layouts.Table]):
        self.name = name
        self._tables = tables
        seen: dict[tuple[Path, int], tuple[str, layouts.Row]] = {}
        for set_name, table in tables.items():
            for row in table.rows:  # a picture that several sets or rows share counts once
                seen.setdefault((row.path, row.frame), (set_name, row))
        self._rows = list(seen.values())

    def __len__(self) -> int:
        return len(self._rows)

    def sources(self) -> list[Path]:
        """The pictures of all sets."""
        return [row.path for _, row in self._rows]

    def title(self, number: int) -> str:
        """The set and the picture's name in it."""
        set_name, row = self._rows[number]
        return f"{set_name}/{row.key}"

    def read(self, number: int, *, hashed: bool = False) -> list[Item]:
        """One picture."""
        set_name, row = self._rows[number]
        array = self._tables[set_name].array
        if array is not None:
            digest = hashlib.sha256(array[row.frame].tobytes()).hexdigest() if hashed else ""
            return [Item(id=self.title(number), data=array[row.frame], sha256=digest, frame=row.frame)]
        digest = files.file_sha256(row.path) if hashed and row.path.is_file() else ""
        item = file_item(row.path, medical.read(row.path)[0], digest)
        return [dataclasses.replace(item, id=self.title(number))]

    def fingerprint(self) -> str:
        """The names of the pictures and the digests of the lists."""
        lists = {k: t.sha256 for k, t in self._tables.items()}
        rows = [(name, str(r.path), r.frame) for name, r in self._rows]
        return hashlib.sha256(repr((lists, rows)).encode(errors="surrogateescape")).hexdigest()


class Texts:
    """The lines of a UTF-8 text file; blank ones are left out, ids are line numbers from 1.

    Raises:
        UsageError: when there is no such file.
        DataError: when it is no UTF-8, or has no text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"no text file {path}", "a file with one text a line")
        self._data = self.path.read_bytes()
        try:
            lines = self._data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as e:
            line = self._data[: e.start].count(b"\n") + 1
            raise DataError(f"{path} line {line} is no UTF-8 text", "save it as UTF-8") from None
        self.lines = [(n, text.strip()) for n, text in enumerate(lines, 1) if text.strip()]
        if not self.lines:
            raise DataError(f"{path} has no text", "one text a line")
        self.name = self.path.name

    def __len__(self) -> int:
        return len(self.lines)

    def fingerprint(self) -> str:
        """The digest of the file."""
        return hashlib.sha256(self._data).hexdigest()


def open_place(place: str | Path, **options: Any) -> Files | Records:
    """Records where there are some (`ROOT` or `ROOT@SPLIT`), else files.

    Args:
        place: a folder or file.
        options: `window` and `slices` of `Files`.

    Raises:
        UsageError: for a place that does not exist.
        DataError: when there is no picture.
    """
    folder, at, _ = str(place).rpartition("@")
    for root in (str(place), folder if at else ""):
        if root and Path(root).is_dir() and shards.find_sources(root):
            return Records(place)
    if not Path(place).exists():
        raise UsageError(f"no file or folder {place}", "records, ROOT@SPLIT, or a folder of pictures")
    return Files([place], **options)


def suite(
    name: str,
    data_root: str | Path,
    *,
    wanted: Sequence[str] = (),
    options: Sequence[str] = (),
    places: Mapping[str, Path] | None = None,
    annotations: str | Path = "",
) -> tuple[SuiteSets, list[dict[str, str]]]:
    """The pictures of the sets of a suite that are there, and what is wrong with the others.

    Args:
        name: of the suite, or its JSON file.
        data_root: the folder of its sets; "" where all have places.
        wanted: only these sets.
        options: variants of sets, "SET:OPTION".
        places: folders of single sets.
        annotations: lists that the original's repository holds.

    Returns:
        The inputs, and {set, reason, remedy} of each set that cannot be read.

    Raises:
        UsageError: for an unknown suite, set or option.
        DataError: when no set can be read.
    """
    from unimed_jax.errors import UnimedError
    from unimed_jax.evaluate import suites

    own = places or {}
    chosen = suites.load(name).choose(wanted, options)
    if unknown := sorted(own.keys() - {s.name for s in chosen.sets}):
        raise UsageError(f"a path is given for {unknown[0]}, which is not read", "see --sets")
    root, lists = Path(data_root) if data_root else None, Path(annotations) if annotations else None
    tables, failed = {}, []
    for s in chosen.sets:
        try:
            tables[s.name] = layouts.read(s, own.get(s.name), root, lists)
        except UnimedError as e:
            failed.append({"set": s.name, "reason": e.cause, "remedy": e.remedy})
    if not tables:
        raise DataError(f"none of the {len(failed)} data sets can be read, the first: {failed[0]['reason']}")
    return SuiteSets(f"suite {suites.load(name).name}", tables), failed
