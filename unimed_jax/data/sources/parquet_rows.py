"""Parquet files: rows in sequence, a few at a time, in the memory of a page; and what columns hold."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

_ROWS = 16  # read at once
_BUFFER = 1 << 20  # bytes of a column that are read from the disk at once
_reading = threading.local()  # the rows that this thread reads: those of a shard lie side by side


def open_file(file: Path) -> Any:
    """The file as pyarrow reads it in sequence.

    Raises:
        DataError: for a file that is none, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise unreadable(file, e) from e


def unreadable(file: Path, e: Exception) -> DataError:
    """The refusal of a file."""
    return DataError(f"{file} cannot be read as Parquet ({type(e).__name__})", "download it again")


def footer(file: Path) -> str:
    """A digest of what the end of the file says about all its pieces: where they lie, how large they are."""
    with file.open("rb") as f:
        size = f.seek(0, 2)
        f.seek(max(0, size - 8))
        length = int.from_bytes(f.read(4), "little")
        f.seek(max(0, size - 8 - length))
        return hashlib.sha256(f.read() + size.to_bytes(8, "little")).hexdigest()[:16]


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this type may hold pictures: bytes, or {bytes, ...}."""
    import pyarrow.types as t

    if t.is_struct(kind):
        return any(
            kind.field(i).name == "bytes" and holds_bytes(kind.field(i).type) for i in range(kind.num_fields)
        )
    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of classes that Hugging Face's `datasets` leaves in a file, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {}
        for column, kind in features.items():
            inner = kind[0] if isinstance(kind, list) and kind else kind
            inner = inner.get("feature", inner) if isinstance(inner, dict) else {}
            names = inner.get("names") if isinstance(inner, dict) else None
            if isinstance(names, list) and inner.get("_type", "ClassLabel") == "ClassLabel":
                found[column] = tuple(map(str, names))
        return found
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing that was promised: numbers stay numbers


def values(table: Any, group: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The values of a few short columns of a row group, row by row; without columns as many empty ones."""
    if not wanted:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(batch_size=4096, row_groups=[group], columns=wanted, use_threads=False):
        yield from batch.to_pylist()


def row(file: Path, made: str, group: int, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """The values of one row: cheap in ascending order within a row group.

    Args:
        file: the table.
        made: stands for its content.
        group: number of the row group.
        index: of the row in it.
        columns: whose values are read.

    Raises:
        Reject: unreadable, caption_not_utf8 or annotation.
        DataError: for a file that has become unreadable.
    """
    cursor: _Cursor | None = getattr(_reading, "cursor", None)
    place = (file, group, made, columns)
    if cursor is None or cursor.place != place or index < cursor.start:
        cursor = _reading.cursor = _Cursor(place)
    return cursor[index]


class _Cursor:
    """The rows of one row group in order."""

    def __init__(self, place: tuple[Path, int, str, tuple[str, ...]]):
        file, group, _, columns = self.place = place
        self.start, self.batch = 0, None
        self._batches = open_file(file).iter_batches(
            batch_size=_ROWS, row_groups=[group], columns=list(columns), use_threads=False
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow as pa

        try:
            while self.batch is None or index >= self.start + len(self.batch):
                self.start += len(self.batch) if self.batch is not None else 0
                self.batch = next(self._batches)
        except StopIteration:
            raise Reject("unreadable", "the row group ends before this row") from None
        except (pa.ArrowException, OSError) as e:
            # The rest of the group is lost, and is not read again for every row.
            self._batches, self.batch = iter(()), None
            raise Reject("unreadable", f"the row group is damaged ({type(e).__name__})") from None
        try:
            return {name: self.batch.column(name)[index - self.start].as_py() for name in self.place[3]}
        except UnicodeDecodeError:
            raise Reject("caption_not_utf8", "it has bytes that are not UTF-8") from None
        except (ValueError, OverflowError) as e:  # a time beyond the years that Python knows
            raise Reject("annotation", f"a cell has no value that can be read ({type(e).__name__})") from None
