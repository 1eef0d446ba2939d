"""What a user names, as what is scored: files, folders, CSV lists; DICOM slices of one series are one volume.

A folder is read with everything below it, and slices that lie in it are put together (data/series.py). A file that is
named itself, on the command line or in a list, is always scored by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from unimed_jax.data import medical, series, slides, tables
from unimed_jax.data.dicom import Frame, Hold, Picture
from unimed_jax.errors import DataError

SUFFIXES = medical.SUFFIXES | slides.SUFFIXES


@dataclass(frozen=True, slots=True)
class Input:
    """What is scored as one: a file, or the single-frame files of a volume from its first slice to its last."""

    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A file without pictures, and why."""

    file: Path
    error: DataError


@dataclass(slots=True)
class Found:
    """Everything that was named."""

    inputs: list[Input] = field(default_factory=list)
    lists: list[tables.Listing] = field(default_factory=list)
    repeated: int = 0  # files that were named again
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        """How many files."""
        return sum(len(i.files) for i in self.inputs)

    @property
    def volumes(self) -> int:
        """How many inputs are several files."""
        return sum(len(i.files) > 1 for i in self.inputs)


def find(paths: Sequence[str | Path], lists: Sequence[str | Path] = (), *, threads: int = 4) -> Found:
    """Everything that is to be scored, in the order in which it was named, lists last; folders sorted by name.

    A file of a list that does not exist is an input, too: reading it says what is wrong.

    Args:
        paths: files, folders, and lists that end in .csv.
        lists: further CSV lists.
        threads: headers of DICOM files in folders that are read in parallel.

    Raises:
        DataError: for a path that does not exist, a list that cannot be read, or when nothing is found.
    """
    out = Found()
    named: list[tuple[Path, ...]] = []
    is_list = lambda p: p.suffix.lower() == ".csv" and p.is_file()
    for path in map(Path, paths):
        if not is_list(path):
            named += _volumes(path, threads)
    for name in [*(p for p in map(Path, paths) if is_list(p)), *map(Path, lists)]:
        listing = tables.read_list(name)
        out.lists.append(listing)
        out.notes += listing.notes
        for path in map(listing.path, listing.entries):
            named += _volumes(path, threads) if path.is_dir() else [(path,)]
    seen: set[str] = set()
    for files in named:
        keys = [os.path.abspath(f) for f in files]
        fresh = tuple(f for f, k in zip(files, keys, strict=True) if k not in seen)
        out.repeated += len(files) - len(fresh)
        seen.update(keys)
        if fresh:
            out.inputs.append(Input(fresh))
    if not out.inputs:
        raise _nothing([*paths, *lists], SUFFIXES)
    if out.repeated:
        out.notes.append(f"{_several(out.repeated, 'file')} named again, scored once")
    if out.volumes:
        slices = sum(len(i.files) for i in out.inputs if len(i.files) > 1)
        out.notes.append(f"{slices} DICOM files are the slices of {_several(out.volumes, 'volume')}")
    return out


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _volumes(path: Path, threads: int) -> list[tuple[Path, ...]]:
    """A file by itself, or what lies in a folder."""
    if not path.is_dir():
        return [(f,) for f in find_files([path])]
    return series.volumes(find_files([path], suffixes=SUFFIXES, empty=True), threads=threads)


def find_files(
    paths: Sequence[str | Path], *, suffixes: Collection[str] = medical.SUFFIXES, empty: bool = False
) -> list[Path]:
    """Named files as they are, and everything in folders that looks like a picture, in a fixed order.

    In folders, files with a known suffix or none (as scanners write them) count; hidden ones do not. A folder that
    cannot be listed is found itself: reading it says what is wrong.

    Args:
        paths: files and folders.
        suffixes: that count in folders.
        empty: whether nothing may be found.

    Raises:
        DataError: for a path that does not exist, or when nothing is found, with the suffixes tried.
    """
    found: dict[Path, None] = {}
    closed = lambda e: found.setdefault(Path(e.filename))
    for path in map(Path, paths):
        if path.is_dir():
            for folder, folders, names in os.walk(path, onerror=closed):
                folders[:] = sorted(f for f in folders if not _inside_a_slide(f, names))
                found |= dict.fromkeys(Path(folder, n) for n in sorted(names) if _counts(n, suffixes))
        elif path.exists():
            found[path] = None
        else:
            raise DataError(f"no file or folder {path}", "check the spelling")
    if not found and not empty:
        raise _nothing(paths, suffixes)
    return list(found)


def _nothing(paths: Sequence[str | Path], suffixes: Collection[str]) -> DataError:
    tried = " ".join(sorted(suffixes))
    return DataError(
        f"no pictures in {', '.join(map(str, paths))}", f"files without suffix or with {tried} are read"
    )


def _inside_a_slide(folder: str, names: Sequence[str]) -> bool:
    """Hidden folders, and those where MIRAX slides keep their parts: `x` beside `x.mrxs`."""
    return folder.startswith(".") or f"{folder}.mrxs" in names


def _counts(name: str, suffixes: Collection[str]) -> bool:
    suffix = Path(name).suffix.lower()
    known = suffix in suffixes and (suffix != ".gz" or name.lower().endswith(".nii.gz"))
    return not name.startswith(".") and name != "DICOMDIR" and (known or not suffix or suffix[1:].isdigit())


def frames(
    item: Input,
    *,
    window: tuple[float, float] | None = None,
    slices: medical.Slices | None = None,
    tiles: slides.Tiles | None = None,
    hold: Hold = nullcontext,
) -> Iterator[Frame | Failed]:
    """The chosen pictures of an input, to be decoded by their `read`, and files that cannot be opened.

    Args:
        item: from `find`.
        window: (centre, width) for gray values, instead of the file's own.
        slices: of a volume; default: the middle one.
        tiles: of a whole-slide image.
        hold: see `dicom.frames`.
    """
    slices, tiles = slices or medical.Slices(), tiles or slides.Tiles()
    count = len(item.files)
    if count == 1:
        yield from _file(item.files[0], window, slices, tiles, hold)
        return
    for k in slices.pick(count):
        for found in _file(item.files[k], window, medical.Slices(), tiles, hold):
            yield replace(found, read=_numbered(found.read, k, count)) if isinstance(found, Frame) else found


def _numbered(read: Callable[[], Picture], k: int, count: int) -> Callable[[], Picture]:
    """The picture of a file as the slice of a volume."""
    return lambda: replace(read(), frame=k, frames=count)


def _file(path: Path, window, slices, tiles: slides.Tiles, hold: Hold) -> Iterator[Frame | Failed]:
    try:
        if slides.is_slide(path, tiles):
            yield from slides.frames(path, tiles, hold)
        else:
            yield from medical.frames(path, window=window, slices=slices, hold=hold)
    except DataError as e:
        yield Failed(path, e)
