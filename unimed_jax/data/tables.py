"""CSV files from elsewhere: lists of pictures with what is known about them.

The file column is `file`, `path`, `image` or `filename`; optional are the truth (`label`, `truth` or `class`) and who
was pictured (`group`, `patient`, `patient_id` or `subject`), in any case of letters. Files lie relative to the list.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unimed_jax.data import limits
from unimed_jax.errors import DataError, did_you_mean

_FILE = ("file", "path", "image", "filename")
_LABEL = ("label", "truth", "class")
_GROUP = ("group", "patient", "patient_id", "subject")
csv.field_size_limit(1 << 20)


@dataclass(slots=True)
class Table:
    """A CSV file as text."""

    file: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]  # line number, cells; lines without any text are left out
    sha256: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a list."""

    line: int
    name: str  # as written
    label: str = ""
    group: str = ""  # may identify a person: for counting only
    cells: tuple[str, ...] = ()  # of all columns


@dataclass(slots=True)
class Listing:
    """A list of pictures."""

    file: Path
    header: list[str]
    entries: list[Entry]
    has_label: bool
    has_group: bool
    sha256: str
    notes: list[str]

    def path(self, entry: Entry) -> Path:
        """Where the picture of a row lies."""
        return self.file.parent / entry.name


def read(file: Path) -> Table:
    """A CSV file with a header; a text that is not UTF-8 is read as Latin-1, and a note says so.

    Raises:
        DataError: for a file that cannot be read, is too large, empty, or no CSV.
    """
    try:
        if file.stat().st_size > limits.MAX_FILE_BYTES:
            raise DataError(f"{file} is too large", f"at most {limits.MAX_FILE_BYTES} bytes")
        data = file.read_bytes()
    except OSError as e:
        what = f"{file} cannot be read ({e.strerror or type(e).__name__})"
        raise DataError(what, "check its name and permissions") from e
    notes = []
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is UTF-16", "save it as CSV UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        notes.append(f"{file.name} is not UTF-8 and was read as Latin-1")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(c.strip() for c in cells)]
    except csv.Error as e:
        raise DataError(f"{file} line {reader.line_num} is no CSV: {e}") from e
    if not rows:
        raise DataError(f"{file} is empty", "the first line names the columns")
    header = [c.strip() for c in rows[0][1]]
    return Table(file, header, rows[1:], hashlib.sha256(data).hexdigest(), notes)


def read_list(file: Path) -> Listing:
    """A list of pictures.

    Raises:
        DataError: see `read`; also without a file column, with two columns of a kind, without rows, or for rows that
            name no file (the first of them).
    """
    table = read(file)
    name = _column(table, _FILE, needed=True)
    label, group = _column(table, _LABEL, needed=False), _column(table, _GROUP, needed=False)
    if not table.rows:
        raise DataError(f"{file} names no pictures", "one row each, below the line with the columns")
    cell = lambda cells, k: cells[k].strip() if k is not None and k < len(cells) else ""
    entries = [Entry(n, cell(c, name), cell(c, label), cell(c, group), tuple(c)) for n, c in table.rows]
    nameless = [e.line for e in entries if not e.name]
    if nameless:
        more = f" and {len(nameless) - 1} more lines name" if len(nameless) > 1 else " names"
        raise DataError(
            f"{file} line {nameless[0]}{more} no file", f"the column is {table.header[name or 0]!r}"
        )
    return Listing(
        file, table.header, entries, label is not None, group is not None, table.sha256, table.notes
    )


def _column(table: Table, names: Sequence[str], *, needed: bool) -> int | None:
    found = [k for k, title in enumerate(table.header) if title.casefold() in names]
    if len(found) > 1:
        titles = " and ".join(repr(table.header[k]) for k in found)
        raise DataError(f"{table.file} has the columns {titles}, which mean the same", "keep one of them")
    if not found and needed:
        between = next((s for s in (";", "\t") if s in table.header[0]), "")
        if between and len(table.header) == 1:
            raise DataError(f"{table.file} has {between!r} between its columns", "save it with commas")
        hint = did_you_mean(names[0], table.header)
        titles = ", ".join(t[:40] for t in table.header[:12])
        raise DataError(f"{table.file} has no column {names[0]!r}.{hint}", f"there are: {titles}")
    return found[0] if found else None
