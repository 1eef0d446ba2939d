"""Tars in the web-dataset layout: the members of one sample share their name up to the first dot of the file name.

A sample is one picture and one text: `000123.jpg` and `000123.txt` as in UniMed's own tars, whose joined captions are
taken apart at export (data/markers.py), or a `.json` with a caption. The tars are read where they lie: the index keeps
offsets, nothing is unpacked.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unimed_jax import config
from unimed_jax.data import files, limits
from unimed_jax.data.record import Caption, Example
from unimed_jax.data.sources.annotation_files import path_fault
from unimed_jax.data.sources.unimed import LAYOUTS
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError, did_you_mean

_PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
_TEXTS = ("txt", "caption", "text", "json")
_JSON_FIELDS = ("caption", "text", "captions")
_PIECE = 2**20  # bytes that are read at once


@dataclass(slots=True, frozen=True)
class Member:
    """Bytes inside a tar."""

    suffix: str
    offset: int
    size: int


@dataclass(slots=True, frozen=True, kw_only=True)
class Item:
    """One sample: its tar and its members; `fault` says why it cannot be used."""

    key: str
    tar: str  # below raw
    picture: Member | None = None
    text: Member | None = None
    fault: str = ""
    split: str = "train"
    file: Path = field(default=Path(), repr=False)  # where the tar lies: says nothing about the record

    @property
    def where(self) -> str:
        """Where the sample stands."""
        return f"{self.tar}: {self.key}"


@dataclass(slots=True, frozen=True, kw_only=True)
class Webdataset:
    """The record source `webdataset`.

    Args:
        raw: tars, and folders read with everything below them; one or several.
        name: of the source; with a name of UniMed's (config.UNIMED_SOURCES) its own marker joins the captions.
        modality: of all pictures, one of config.MODALITIES; empty for unknown, or what is known of a source of UniMed.
        licence: a note on the licence; empty for that of a source of UniMed.
        description: for the data card; empty as well.
    """

    raw: Path | Sequence[Path] = field(repr=False)
    name: str = "webdataset"
    modality: str = ""
    licence: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if self.modality and self.modality not in config.MODALITIES:
            hint = did_you_mean(self.modality, config.MODALITIES)
            raise UsageError(
                f"modality is {self.modality!r}.{hint}", f"one of {', '.join(config.MODALITIES)}"
            )
        if layout := LAYOUTS.get(self.name):
            object.__setattr__(self, "licence", self.licence or layout.licence)
            object.__setattr__(self, "description", self.description or layout.about)

    def items(self) -> Sequence[Item]:
        """Every sample of every tar, tars in the order of their names.

        Raises:
            DataError: without any tar, for one that is compressed or damaged, two of one name, or a folder that cannot
                be listed.
        """
        found: list[Item] = []
        for name, file in sorted(self._tars().items()):
            if fault := path_fault(name):
                raise DataError(f"the tar {name!a}: {fault}", "rename it")
            found += _index(file, name)
        return found

    def example(self, item: Item) -> Example:
        """Reads one sample; the picture's bytes are stored as they are.

        Raises:
            Reject: for a sample without picture or text, or a text that says nothing readable.
        """
        if item.fault or item.picture is None or item.text is None:
            raise Reject("annotation", item.fault or "the sample is not complete")
        with item.file.open("rb") as f:
            picture, text = _read(f, item.picture), _read(f, item.text, limits.MAX_RECORD_BYTES)
        captions = _captions(text, item.text.suffix)
        layout = LAYOUTS.get(self.name)
        return Example(
            key=item.key,
            image=picture,
            captions=captions,
            modality=self.modality or (layout.modality_of("", captions) if layout else ""),
            split=item.split,
        )

    def _tars(self) -> dict[str, Path]:
        """The tars by name: below its folder, or that of the file."""
        found: dict[str, Path] = {}
        for raw in [self.raw] if isinstance(self.raw, (str, Path)) else self.raw:
            for name, file in _below(Path(raw)):
                if found.setdefault(name, file) != file:
                    raise DataError(f"two tars are called {name!a}: {found[name]} and {file}", "rename one")
        return found


def _below(raw: Path) -> list[tuple[str, Path]]:
    if raw.is_file():
        return [(raw.name, raw)]
    if not raw.is_dir():
        raise DataError(f"no folder or tar {raw}", "name tars, or folders of tars")
    found = files.below(raw, lambda name: ".tar" in Path(name).suffixes)
    if not found:
        raise DataError(f"no .tar below {raw}", "name tars, or folders of tars")
    return [(file.relative_to(raw).as_posix(), file) for file in found]


def _index(file: Path, name: str) -> Iterator[Item]:
    """The samples of one tar, in its order."""
    samples: dict[str, dict[str, Member]] = {}
    faults: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, slash, last = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = last.partition(".")
                base, suffix = f"{folder}{slash}{stem}", suffix.lower()
                parts = samples.setdefault(base, {})
                if not member.isreg() or member.issparse():
                    faults[base] = f"{suffix or 'a member'} is no plain file"
                elif suffix in parts:
                    faults[base] = f"two members end in .{suffix}"
                parts[suffix] = Member(suffix, member.offset_data, member.size)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as e:
        raise DataError(
            f"{file} is no whole, uncompressed tar ({type(e).__name__}: {str(e)[:80]})",
            "unpack it with gunzip, or download it again",
        ) from e
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror or type(e).__name__})") from e
    prefix = name.removesuffix(".tar")
    for base, parts in samples.items():
        picture = next((parts[s] for s in _PICTURES if s in parts), None)
        text = next((parts[s] for s in _TEXTS if s in parts), None)
        fault = faults.get(base, "") or path_fault(base)
        if not fault and (picture is None or text is None):
            lacks = "picture" if picture is None else "text"
            fault = f"it has no {lacks}, only {', '.join(sorted(parts))[:80]}"
        key = f"{prefix}/{ascii(base) if path_fault(base) else base}"
        yield Item(key=key, tar=name, picture=picture, text=text, fault=fault, file=file)


def _check_end(file: Path, offset: int) -> None:
    """Refuses a tar whose members do not end at its end mark: tarfile takes a cut or a damaged header for the end.

    Raises:
        DataError: naming the byte from which on members would be lost.
    """
    with file.open("rb") as f:
        f.seek(offset)
        mark = f.read(tarfile.BLOCKSIZE)
        while (rest := f.read(_PIECE)) and not rest.strip(b"\0"):
            pass
    if len(mark) < tarfile.BLOCKSIZE:
        raise DataError(f"{file} is cut off at byte {offset}: it has no end mark", "download it again")
    if mark.strip(b"\0"):
        raise DataError(f"{file} is damaged at byte {offset}: no member begins there", "download it again")
    if rest:
        raise DataError(
            f"{file} goes on after its end mark at byte {offset}, as tars do that were put together with cat",
            "give the tars one by one",
        )


def _read(f, member: Member, limit: int = limits.MAX_FILE_BYTES) -> bytes:
    if member.size > limit:
        raise Reject("too_large", f"a member has more than {limit} bytes")
    f.seek(member.offset)
    data = f.read(member.size)
    if len(data) != member.size:
        raise Reject("unreadable", "the tar ends in the middle of the sample")
    return data


def _captions(data: bytes, suffix: str) -> tuple[Caption, ...]:
    text = data.decode("utf-8-sig", errors="surrogateescape")
    if suffix != "json":
        return (Caption(text=text),)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Reject("annotation", f"its .json is none ({type(e).__name__})") from None
    said = next((value[k] for k in _JSON_FIELDS if k in value), None) if isinstance(value, dict) else value
    found = said if isinstance(said, list) else [said]
    texts = [x for x in found if isinstance(x, str)]
    if not texts or len(texts) < len(found):
        raise Reject("annotation", f"its .json has no text under {', '.join(_JSON_FIELDS)}")
    return tuple(Caption(text=x) for x in texts)
