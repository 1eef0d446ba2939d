"""Annotation files as their authors published them: positional CSV, cells that are Python literals, JSON, JSON lines.

A row that cannot be understood becomes a row with a fault, which the export rejects and lists; it never stops the rest.
Literals are parsed, never executed.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unimed_jax.data import limits
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

_MAX_LITERAL = 2**20  # characters of one cell


@dataclass(slots=True, frozen=True)
class Row:
    """One pair of an annotation file."""

    path: str  # of the picture, below the folder of pictures
    cells: tuple[str, ...] = ()  # texts that captions and labels are made of, as they are in the file
    suffix: str = ""  # of the key, where one picture has several rows of different kinds
    fault: str = ""  # why the row cannot be used
    where: str = field(default="", repr=False)  # not part of the content: rows may move


def csv_rows(file: Path, columns: Sequence[int | str]) -> Iterator[tuple[str, list[str] | None]]:
    """Yields (place, the wanted cells) of every row below the header, None for a row that lacks one of them.

    Args:
        file: CSV with a header; bytes that are not UTF-8 become lone surrogates, which the export rejects.
        columns: by position or by name in the header.

    Raises:
        DataError: when the file cannot be read, is malformed or has no such column.
    """
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
            reader = csv.reader(f)
            header = next(reader, [])
            if lacking := [
                c for c in columns if (c not in header if isinstance(c, str) else c >= len(header))
            ]:
                raise DataError(
                    f"{file} has no column {lacking[0]!r}, only {', '.join(header)[:200]!r}",
                    "give the annotation file as it was published",
                )
            places = [header.index(c) if isinstance(c, str) else c for c in columns]
            for cells in reader:
                if cells:
                    wanted = [cells[p] for p in places] if len(cells) > max(places) else None
                    yield f"{file.name} line {reader.line_num}", wanted
    except OSError as e:
        raise DataError(
            f"{file} cannot be read ({e.strerror or type(e).__name__})", "--captions names it"
        ) from e
    except csv.Error as e:
        raise DataError(f"{file} is no CSV: {e}", "download it again") from e


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of every line of a JSON lines file; a line that is none gives None.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        with file.open(encoding="utf-8", errors="surrogateescape") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
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
    if len(cell) > _MAX_LITERAL:
        raise Reject("annotation", f"{what} has {len(cell)} characters, more than {_MAX_LITERAL}")
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
