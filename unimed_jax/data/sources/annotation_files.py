"""Annotation files as their authors published them: positional CSV, cells that are Python literals, JSON, JSON lines.

A row that cannot be understood becomes a row with a fault, which the export rejects and lists; it never stops the rest.
Literals are parsed, never executed.
"""

from __future__ import annotations

import ast
import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unimed_jax.data import files
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

_MAX_CELL = 2**20  # characters


@dataclass(slots=True, frozen=True)
class Row:
    """One pair of an annotation file."""

    path: str  # of the picture, below the folder of pictures
    cells: tuple[str, ...] = ()  # texts that captions and labels are made of, as they are in the file
    suffix: str = ""  # of the key, where one picture has several rows of different kinds
    fault: str = ""  # why the row cannot be used
    where: str = field(default="", repr=False)  # not part of the content: rows may move


class _Lines:
    """Lines of a file, of which those read last can be given back."""

    def __init__(self, lines: Iterator[str]):
        self._lines, self._back, self._taken, self.number = lines, deque[str](), deque[str](), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self._taken.append(self._back.popleft() if self._back else next(self._lines))
        self.number += 1
        return self._taken[-1]

    def keep(self) -> None:
        """What was taken so far is used."""
        self._taken.clear()

    def give_back(self) -> None:
        """All lines since the last `keep`, but the first, are there again."""
        self._back.extendleft(list(self._taken)[:0:-1])
        self.number -= max(0, len(self._taken) - 1)
        self._taken.clear()


def csv_rows(
    file: Path, columns: Sequence[int | str], make: Callable[[list[str], str], Row]
) -> Iterator[Row]:
    """A row of every record below the header, made of (the wanted cells, place).

    A record that is no CSV (an open quote, a quote inside a cell), that lacks a wanted cell or has more cells than the
    header is a row with a fault; reading goes on with the line after its first.

    Args:
        file: CSV; bytes that are not UTF-8 become lone surrogates, which the export rejects.
        columns: by position or by name in the header.
        make: of what is found.

    Raises:
        DataError: when the file cannot be read, is no CSV or has no such column.
    """
    csv.field_size_limit(_MAX_CELL)  # also where an open quote ends
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
            lines = _Lines(f)
            reader = csv.reader(lines, strict=True)
            header = _header(reader, file)
            places = [_place(c, header, file) for c in columns]
            if header[places[0]].lstrip().startswith("["):  # a list is no title: there is no header
                yield make([header[p] for p in places], f"{file.name} line 1")
            while True:
                lines.keep()
                where, fault, cells = f"{file.name} line {lines.number + 1}", "", []
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    lines.give_back()
                    fault = f"it is no CSV ({e})"
                if cells and len(cells) <= max(places):
                    fault = "it has too few columns"
                elif any(cells[len(header) :]):
                    fault = "it has more columns than the header"
                if fault:
                    yield Row("", fault=fault, where=where)
                elif cells:
                    yield make([cells[p] for p in places], where)
    except OSError as e:
        raise DataError(
            f"{file} cannot be read ({e.strerror or type(e).__name__})", "--captions names it"
        ) from e


def _header(reader: Iterator[list[str]], file: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as e:
        raise DataError(f"{file} is no CSV: {e}", "download it again") from e
    if not header:
        raise DataError(f"{file} is empty", "download it again")
    if "\0" in "".join(header):
        raise DataError(f"{file} is not UTF-8", "save it as CSV UTF-8")
    return header


def _place(column: int | str, header: Sequence[str], file: Path) -> int:
    if isinstance(column, str) and column in header:
        return header.index(column)
    if isinstance(column, int) and column < len(header):
        return column
    raise DataError(
        f"{file} has no column {column!r}, only {', '.join(header)[:200]!r}",
        "give the annotation file as it was published",
    )


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of every line of a JSON lines file; a line that is none gives None.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        value = files.parse_json(line)
                    except (ValueError, RecursionError):
                        value = None
                    yield f"{file.name} line {number}", value
    except OSError as e:
        raise DataError(
            f"{file} cannot be read ({e.strerror or type(e).__name__})", "--captions names it"
        ) from e


def texts(cell: str, what: str) -> list[str]:
    """A cell that spells a Python list of texts, "['a', 'b']"; numbers become text.

    Raises:
        Reject: annotation, when it is no such list; nothing in it is executed.

    Example:
        >>> texts("['clear lungs', 'no effusion']", "captions")
        ['clear lungs', 'no effusion']
    """
    if len(cell) > _MAX_CELL:
        raise Reject("annotation", f"{what} has {len(cell)} characters, more than {_MAX_CELL}")
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as e:
        raise Reject("annotation", f"{what} is no Python list of texts ({type(e).__name__})") from None
    found = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(x, (str, int, float)) for x in found):
        raise Reject("annotation", f"{what} is no list of texts")
    return [str(x) for x in found]


def path_fault(path: str) -> str:
    """Why a path of an annotation file cannot be used; empty when it can.

    Example:
        >>> path_fault("a/b.png"), path_fault("../b.png")
        ('', 'it leaves the folder')
    """
    if not path:
        return "it is empty"
    if not path.isprintable():
        return "it is not UTF-8 or has control characters"
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        return "it leaves the folder"
    return ""
