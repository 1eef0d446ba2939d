"""Records on disk: the manifest of a source, and random access to the records of one of its splits.

    <root>/<source>/1.0.0/unimed-train.array_record-00000-of-00004   group_size:1, uncompressed
                          unimed-train.array_record-00000-of-00004.json   count, bytes, sha256, rejects of the shard
                          manifest.json        written last: a folder without it is not finished
                          dataset_info.json, features.json   for tensorflow-datasets
                          README.md            data card
                          rejects.jsonl        what was left out, and why
    <root>/tokenizer.json

array_record opens a truncated file as one of no records, so sizes and counts are compared with the manifest.
Written by data/export.py, verified by data/verify.py.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from unimed_jax.data import record
from unimed_jax.data.open_files import OpenFiles
from unimed_jax.data.record import Example
from unimed_jax.data.validate import Reject as Reject
from unimed_jax.errors import DataError, did_you_mean

FORMAT = "unimed_jax.records"
VERSION = "1.0.0"
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OPEN = OpenFiles()


@dataclass(slots=True, frozen=True)
class Item:
    """An example still to be read, as `RecordSource.items` lists it; a source may use a type of its own instead."""

    key: str  # unique; `source/` is put before it if it is missing
    split: str = "train"
    where: str = ""  # the place to name in errors, e.g. "list.csv line 12"


class RecordSource(Protocol):
    """Anything that examples come from. Must be picklable: `example` runs in worker processes.

    It may have a `fingerprint`: text that changes when its examples do. Without it, its repr and those of its items
    must show everything that the examples depend on; a rerun skips what is unchanged.
    """

    @property
    def name(self) -> str:
        """The name of the source: lower case letters, digits, - and _."""
        ...

    @property
    def licence(self) -> str:
        """A note on the licence of the data."""
        ...

    @property
    def description(self) -> str:
        """What the data are, in a few sentences, for the data card."""
        ...

    def items(self) -> Sequence[Any]:
        """Every item, cheap and deterministic; each has `key` and `split`, and may have `where` and `run`.

        Items with the same `run`, a text, are written side by side in their order, for a source that reads in sequence.
        """
        ...

    def example(self, item: Any) -> Example:
        """Reads one item, or raises `Reject`. Captions are not yet validated; sizes and digests need not be set."""
        ...


@dataclass(slots=True, frozen=True, kw_only=True)
class ShardInfo:
    """One file of records."""

    file: str
    count: int  # records
    bytes: int
    sha256: str


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What a source's folder must hold. Equal input gives equal manifests: no dates, no host names."""

    source: str
    version: str = VERSION
    schema_version: int = record.SCHEMA_VERSION
    licence: str = ""
    description: str = ""
    splits: dict[str, list[ShardInfo]] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)  # reason: count
    tokenizer: str = ""  # digest of the tokenizer that counted the tokens
    plan: str = ""  # digest of the source's items and options
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # split: {what: count}
    reduction: dict[str, Any] = field(
        default_factory=dict
    )  # how large pictures were made smaller (data/reduce.py)

    def examples(self, split: str) -> int:
        """The number of records in a split."""
        return sum(s.count for s in self.splits.get(split, []))

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = asdict(self)
        values["splits"] = {
            name: {"examples": self.examples(name), "shards": shards}
            for name, shards in values["splits"].items()
        }
        return json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Reads the manifest of a finished export.

        Raises:
            DataError: if there is none, it cannot be read, is damaged, or of another schema version.
        """
        path = Path(folder) / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            version = values["schema_version"]
            if version != record.SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {version}; this program reads {record.SCHEMA_VERSION}",
                    "export the source again, or use the version of unimed_jax that wrote it",
                )
            values["splits"] = {
                name: [ShardInfo(**s) for s in split["shards"]] for name, split in values["splits"].items()
            }
            return cls(**values)
        except FileNotFoundError as e:
            raise DataError(
                f"{folder} has no {MANIFEST}", "unimed-jax data build writes (or finishes) it"
            ) from e
        except OSError as e:
            raise DataError(
                f"{path} cannot be read ({e.strerror})", "permit it, or export the source again"
            ) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{path} is damaged: {type(e).__name__}: {e}", "export the source again") from e


def resolve(folder: str | os.PathLike[str]) -> Path:
    """The folder with the manifest: the given one, or its newest version.

    Raises:
        DataError: if there is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    versions = [
        p.parent for p in folder.glob(f"*/{MANIFEST}") if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)
    ]
    if not versions:
        raise DataError(
            f"no records at {folder}: it has no {MANIFEST}", "unimed-jax data build SOURCE --out DIR"
        )
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))))


def find_sources(root: str | os.PathLike[str]) -> dict[str, Path]:
    """The sources under a folder: name -> the folder with the manifest, by name.

    `root` may also be the folder of one source, or of one version of it. Unfinished exports are not found.

    Raises:
        DataError: if the folder is missing or a manifest is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}", "unimed-jax data build SOURCE --out DIR writes one")
    found = {}
    for pattern in (".", "*", "*/*"):
        parents = {
            p.parent.parent if pattern != "." else p.parent for p in root.glob(f"{pattern}/{MANIFEST}")
        }
        for parent in parents:
            folder = resolve(parent)
            found[Manifest.read(folder).source] = folder
        if found:
            break
    return dict(sorted(found.items()))


class Shards:
    """The records of one split of a source, at random.

    Picklable and usable from several threads; files are opened when first read, and again after a fork.

    Args:
        folder: of the source, or of one version of it.
        split: e.g. "train".

    Raises:
        DataError: for a missing manifest or split, or a shard that is missing or has another size; reading a record
            raises it for a shard of another count, and for a damaged record, naming shard and record.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str):
        self.folder = resolve(folder)
        self.split = split
        self.manifest = Manifest.read(self.folder)
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits) or "none"
            raise DataError(
                f"source {self.manifest.source} has no split {split!r}.{did_you_mean(split, self.manifest.splits)}",
                f"there are: {known}",
            )
        self.name = self.manifest.source
        self.shards = self.manifest.splits[split]
        self._ends = list(itertools.accumulate(s.count for s in self.shards))
        for shard in self.shards:
            check_size(self.folder, shard)
        self._owner = _OPEN.owner(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_owner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owner = _OPEN.owner(self)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return (
            f"Shards({str(self.folder)!r}, {self.split!r}): {len(self)} records in {len(self.shards)} shards"
        )

    def where(self, index: int) -> str:
        """Names the shard and the record in it, for messages."""
        shard, row = self._place(index)
        return f"{self.folder / self.shards[shard].file} record {row}"

    def raw(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
            DataError: if they cannot be read, naming shard and record.
            IndexError: beyond the last record.
        """
        shard, row = self._place(index)
        try:
            return self._reader(shard).read([row])[0]
        except DataError:
            raise
        except Exception as e:  # array_record raises plain RuntimeError and IndexError
            raise DataError(f"{self.where(index)} is damaged: {e}", _REMEDY) from e

    def __getitem__(self, index: int) -> Example:
        blob = self.raw(index)
        try:
            return record.decode(blob)
        except DataError as e:
            raise DataError(f"{self.where(index)}: {e.cause}", e.remedy or _REMEDY) from e

    def _place(self, index: int) -> tuple[int, int]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard: int) -> Any:
        return _OPEN.get(self._owner, shard, lambda: open_shard(self.folder, self.shards[shard]))


_REMEDY = "unimed-jax data check --full lists all damage; export the source again"


def check_size(folder: Path, shard: ShardInfo) -> None:
    """Compares a shard's size with the manifest.

    Raises:
        DataError: if the file is missing or of another size.
    """
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as e:
        raise DataError(f"shard {path} cannot be read ({e.strerror})", "export the source again") from e
    if size != shard.bytes:
        raise DataError(
            f"shard {path} has {size} bytes, the manifest says {shard.bytes}", "export the source again"
        )


def open_shard(folder: Path, shard: ShardInfo) -> Any:
    """Opens a shard for random access and compares its count with the manifest.

    Raises:
        DataError: if it cannot be opened or holds another number of records.
    """
    module = array_record_module()
    path = folder / shard.file
    check_size(folder, shard)
    try:
        # A read-ahead buffer costs more than the record at random access.
        reader = module.ArrayRecordReader(
            str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        count, options = reader.num_records(), reader.writer_options_string()
    except Exception as e:  # array_record raises plain RuntimeError
        raise DataError(f"shard {path} cannot be opened: {e}", "export the source again") from e
    if count != shard.count:
        refuse_unopened(path)  # which array_record takes for a file of no records
        raise DataError(
            f"shard {path} has {count} records, the manifest says {shard.count}", "export the source again"
        )
    if "uncompressed" not in (options or ""):
        # A few kilobytes can hold gigabytes of zeros, and array_record has no limit on what it unpacks.
        raise DataError(
            f"shard {path} is compressed ({options})", "export the source with unimed-jax data build"
        )
    return reader


def refuse_unopened(path: Path) -> None:
    """Raises DataError when a file cannot be opened at all, as when this process has too many open."""
    try:
        path.open("rb").close()
    except OSError as e:
        remedy = (
            "allow more open files: ulimit -n 16384" if e.errno == errno.EMFILE else "export the source again"
        )
        raise DataError(f"shard {path} cannot be opened: {e.strerror}", remedy) from e


def array_record_module() -> Any:
    """The array_record library.

    Raises:
        DataError: where it is not installed; it exists for Linux only.
    """
    try:
        import array_record.python.array_record_module as module
    except ImportError as e:
        raise DataError(
            "records need array_record, which cannot be imported here", "pip install array_record"
        ) from e
    return module
