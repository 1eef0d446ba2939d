"""Embeddings on disk: Parquet files of unit vectors with what each stands for, and the weights that made them by hash.

Columns: `id` (unique), `file`, `frame`, `modality`, `key`, `text`, `embedding` (a list of fixed size, float16 or
float32, uncompressed: it does not compress, and reading is a copy). What an index is about stands as JSON in the
schema's metadata. Equal rows give equal bytes: no dates, no host names.
"""

from __future__ import annotations

import bisect
import dataclasses
import glob
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from unimed_jax.data import files
from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "unimed_jax.embeddings", 1
DTYPES = ("float16", "float32")
TEXTS = ("id", "file", "modality", "key", "text")  # columns of strings; `frame` is a number
GROUP = 8192  # rows of a row group
_SHARE = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rows of an index have in common."""

    content: str  # image | text
    dim: int
    dtype: str  # of the stored numbers
    model: dict[str, str]  # name, sha256 of the weights, dtype of the computation
    normalised: bool = True  # scaled to unit length
    settings: dict[str, str] = field(default_factory=dict)  # window and slices
    code: str = ""  # version of this program

    def json(self) -> str:
        """The text in the file's metadata."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)


def schema(facts: Facts) -> pa.Schema:
    """The columns, with the facts."""
    import pyarrow as pa

    number = pa.float16() if facts.dtype == "float16" else pa.float32()
    columns = [pa.field(name, pa.string(), nullable=False) for name in TEXTS]
    columns.insert(2, pa.field("frame", pa.int32(), nullable=False))
    columns.append(pa.field("embedding", pa.list_(pa.field("element", number, nullable=False), facts.dim)))
    return pa.schema(columns, metadata={FORMAT: facts.json()})


def table(facts: Facts, rows: Sequence[Mapping[str, Any]], vectors: Float[np.ndarray, "n d"]) -> pa.Table:
    """Rows with the named columns (those that are missing are empty) and their vectors."""
    import pyarrow as pa

    plan = schema(facts)
    said = lambda r, name: r.get(name, 0) if name == "frame" else files.encodable(r.get(name, ""))
    arrays = [pa.array([said(r, f.name) for r in rows], f.type) for f in plan if f.name != "embedding"]
    flat = pa.array(np.ascontiguousarray(vectors, facts.dtype).reshape(-1))
    arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=plan.field("embedding").type))
    return pa.Table.from_arrays(arrays, schema=plan)


class Writer:
    """Writes tables one after the other, each a row group or more; closes with `with`.

    Raises:
        OSError: when the file cannot be written.
    """

    def __init__(self, path: Path, facts: Facts):
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(
            path,
            schema(facts),
            compression="none",
            use_dictionary=["modality"],  # pyright: ignore[reportArgumentType]
            write_statistics=False,
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, rows: pa.Table) -> None:
        """Appends; row groups end with the table."""
        self._writer.write_table(rows, row_group_size=GROUP)


def merge(parts: Sequence[Path], target: Path, facts: Facts) -> int:
    """Writes the rows of finished parts, in order, into one file; returns their number."""
    import pyarrow.parquet as pq

    count = 0
    with Writer(target, facts) as out:
        for part in parts:
            with pq.ParquetFile(part) as f:
                for group in range(f.num_row_groups):
                    rows = f.read_row_group(group)
                    out.write(rows.replace_schema_metadata(schema(facts).metadata))
                    count += len(rows)
    return count


def whole(path: Path) -> bool:
    """Whether a file is there with all of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
        return True
    except (OSError, pa.ArrowException):
        return False


def count(path: Path) -> int:
    """The rows of a finished file."""
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


class Index:
    """The rows of one or several files as one sequence; vectors are read in slabs, never all at once.

    Args:
        place: a file, a folder of them, a pattern such as `emb/*.parquet`, or the name that several processes were
            given as `--out`.

    Raises:
        UsageError: when nothing is there.
        DataError: for a file that is no index, files of different models or contents, or a missing share.
    """

    def __init__(self, place: str | Path):
        self.files = _find(place)
        found = [_head(path) for path in self.files]
        self.facts = found[0][0]
        for path, (facts, _) in zip(self.files, found, strict=True):
            if _kind(facts) != _kind(self.facts):
                raise DataError(
                    f"{path.name} and {self.files[0].name} are of different models or contents",
                    "name files of one model",
                )
        self._groups = [(p, g, n) for p, (_, sizes) in zip(self.files, found, strict=True) for g, n in sizes]
        self._ends = list(itertools.accumulate(n for _, _, n in self._groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def slabs(self, rows: int = GROUP) -> Iterator[np.ndarray]:
        """The vectors in order, as arrays [rows, dim] of the stored type; the last may be shorter.

        Raises:
            DataError: for a damaged file.
        """
        held: list[np.ndarray] = []
        for path, groups in itertools.groupby(self._groups, lambda g: g[0]):
            with _reading(path) as f:
                for _, group, _ in groups:
                    held.append(_vectors(f.read_row_group(group, ["embedding"]), self.facts.dim))
                    while sum(map(len, held)) >= rows:
                        whole = np.concatenate(held) if len(held) > 1 else held[0]
                        yield whole[:rows]
                        held = [whole[rows:]] if len(whole) > rows else []
        if held:
            yield np.concatenate(held)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """What is said about some rows: id, file, frame, modality, key, text.

        Raises:
            DataError: for a damaged file.
        """
        places = [(bisect.bisect_right(self._ends, n), n) for n in numbers]
        out: dict[int, dict[str, Any]] = {}
        for group, mine in itertools.groupby(sorted(places), lambda x: x[0]):
            path, k, size = self._groups[group]
            begin = self._ends[group] - size
            wanted = [n for _, n in mine]
            with _reading(path) as f:
                found = f.read_row_group(k, [*TEXTS, "frame"]).take([n - begin for n in wanted]).to_pylist()
            out |= dict(zip(wanted, found, strict=True))
        return [out[n] for n in numbers]

    def find(self, wanted: str) -> int:
        """The number of the row with an id.

        Raises:
            UsageError: when there is none.
        """
        import pyarrow.compute as pc

        for (path, k, size), end in zip(self._groups, self._ends, strict=True):
            with _reading(path) as f:
                at = pc.index(f.read_row_group(k, ["id"])["id"], wanted).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            if at >= 0:
                return end - size + at
        raise UsageError(f"the index has no row with the id {wanted!r}", "ids are in its column id")

    def vector(self, number: int) -> Float[np.ndarray, "d"]:
        """The vector of one row, as float32."""
        group = bisect.bisect_right(self._ends, number)
        path, k, size = self._groups[group]
        with _reading(path) as f:
            found = _vectors(f.read_row_group(k, ["embedding"]), self.facts.dim)
        return found[number - self._ends[group] + size].astype(np.float32)


def read(place: str | Path) -> tuple[list[dict[str, Any]], np.ndarray, Facts]:
    """A whole index at once: what is said about its rows, their vectors [n, dim], and what they have in common.

    Raises:
        UsageError, DataError: see `Index`.
    """
    index = Index(place)
    vectors = [*index.slabs()] or [np.zeros((0, index.facts.dim), index.facts.dtype)]
    return index.rows(range(len(index))), np.concatenate(vectors), index.facts


def _kind(facts: Facts) -> tuple[Any, ...]:
    return facts.model["sha256"], facts.content, facts.dim


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as f:
            yield f
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{path} cannot be read ({type(e).__name__})", "embed again") from None


def _head(path: Path) -> tuple[Facts, list[tuple[int, int]]]:
    """The facts of a file, and (number, rows) of its row groups."""
    with _reading(path) as f:
        text = (f.schema_arrow.metadata or {}).get(FORMAT.encode())
        sizes = [(g, f.metadata.row_group(g).num_rows) for g in range(f.num_row_groups)]
        columns = {c.name: str(c.type) for c in f.schema_arrow}
    try:
        values = json.loads(text or b"")
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another version")
        facts = Facts(**values)
        words = [
            facts.content,
            *facts.settings.values(),
            *(facts.model[k] for k in ("name", "sha256", "dtype")),
        ]
        if facts.dtype not in DTYPES or not all(isinstance(w, str) for w in words):
            raise ValueError("other facts")
        if columns != {c.name: str(c.type) for c in schema(facts)}:
            raise ValueError("other columns")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise DataError(
            f"{path} is no index that this program reads", "unimed-jax embed writes one"
        ) from None
    return facts, sizes


def _vectors(rows: Any, dim: int) -> np.ndarray:
    flat = rows["embedding"].combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(-1, dim)


def _find(place: str | Path) -> list[Path]:
    """The files of an index, in order.

    Raises:
        UsageError: when there is none.
        DataError: when a share of several is missing.
    """
    path = Path(place)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.glob("*.parquet") if not p.name.startswith("."))
    else:
        found = sorted(Path(p) for p in glob.glob(str(place)) if Path(p).is_file())
        stem = glob.escape(str(path.with_suffix("")))
        found = found or sorted(Path(p) for p in glob.glob(f"{stem}-?????-of-?????.parquet"))
    if not found:
        raise UsageError(f"no index {place}", "a file, a folder or a pattern; unimed-jax embed writes one")
    if path.is_file():
        return found
    there: dict[tuple[str, int], set[int]] = {}
    for p in found:
        if match := _SHARE.fullmatch(str(p)):
            there.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in there.items():
        if missing := sorted(set(range(count)) - numbers):
            raise DataError(
                f"share {missing[0]} of {count} of {Path(stem).name} is missing",
                "finish unimed-jax embed, or name one file",
            )
    return found
