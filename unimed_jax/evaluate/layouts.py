"""Data sets on the disk to rows: one small reader for each kind of layout that `suites` describes.

Nothing is guessed: a label outside the table refuses the set and lists all of them; a picture that is missing, or whose
name leaves the set's folder, is counted and listed; repeated rows are counted. The order of the rows is the file's, or
sorted by name where there is only a folder.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unimed_jax.data import medical, medmnist, tables
from unimed_jax.data.files import file_sha256
from unimed_jax.errors import DataError, UnimedError, did_you_mean
from unimed_jax.evaluate import findings_truth
from unimed_jax.evaluate.suites import DataSet, Layout

_SHOWN = 5  # of a list, in a message


class Missing(UnimedError):
    """The set is not there: a folder or annotation file does not exist."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a set."""

    key: str  # its name within the set
    label: int
    group: str  # who was pictured, else the picture itself
    path: Path
    frame: int = -1  # of the table's array, for .npz
    findings: tuple[int, ...] = ()  # of a multi-label set: 1, 0 or -1 each; then `label` means nothing


@dataclass(slots=True)
class Table:
    """What a set holds, and what was left out of it and why."""

    rows: list[Row] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)  # file, reason
    notes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # known labels that are no class here
    repeated: int = 0  # rows that name a picture again
    sha256: str = ""  # of the annotation file
    array: np.ndarray | None = None  # .npz: u8[n h w] or u8[n h w 3]


@dataclass(slots=True)
class _Found:
    """A picture with its label as written."""

    name: str
    label: str
    path: Path | None  # None: its name leaves the folder
    where: str
    group: str = ""
    frame: int = -1
    findings: tuple[int, ...] = ()


def read(s: DataSet, root: Path | None, data_root: Path | None, annotations: Path | None = None) -> Table:
    """The rows of a set.

    Args:
        s: which set.
        root: its own folder, when it is not below the data root.
        data_root: the folder of all sets.
        annotations: where the lists are that the original's repository holds.

    Raises:
        Missing: when the folder or the annotation file does not exist, with what to fetch.
        DataError: for a file that cannot be read, labels outside the table (all of them), a picture with two labels, or
            no picture at all.
    """
    roots = [root] if root else [p for p in (data_root and data_root / s.layout.folder, data_root) if p]
    try:
        return _READERS[s.layout.kind](s, roots, annotations)
    except OSError as e:
        raise DataError(f"{s.name}: {e.filename} cannot be read ({e.strerror or type(e).__name__})") from e


def _anchored(s: DataSet, roots: Sequence[Path], names: Sequence[str]) -> Path:
    """The first root that holds one of the names."""
    for root in roots:
        if any((root / n).exists() for n in names):
            return root
    tried = ", ".join(str(r / names[0]) for r in dict.fromkeys(roots)) or names[0]
    raise Missing(f"{s.name}: not found (tried {tried})", s.fetch or "check the path")


# ---- csv


def _csv(s: DataSet, roots: Sequence[Path], annotations: Path | None) -> Table:
    y = s.layout
    file, root = _csv_file(s, roots, annotations)
    out = Table()
    table = tables.read(file)
    out.sha256, header, lines = table.sha256, table.header, table.rows
    out.notes += table.notes
    images, labels = _column(y.image, header, file), _label_columns(y, header, file)
    where = {_column(k, header, file): set(v) for k, v in y.where.items()}
    group = next((header.index(c) for c in y.group_columns if c in header), None)
    needed = max(images, *labels, *where) + 1
    found, blank = [], 0
    strange: dict[str, list[str]] = {}
    for number, cells in lines:
        place = f"{file.name} line {number}"
        if len(cells) < needed:
            out.bad.append({"file": place, "reason": f"{len(cells)} columns, {needed} are needed"})
            continue
        if not all(cells[k].strip() in v for k, v in where.items()):
            continue
        try:
            name = _first(cells[images]) if y.image_list else cells[images].strip()
            mine = [cells[k] for k in labels]
            several = _findings(s, mine, place, strange) if s.multilabel else ()
            label = "" if s.multilabel else _label(y, mine, [header[k] for k in labels])
        except ValueError as e:
            out.bad.append({"file": place, "reason": str(e)})
            continue
        who = cells[group].strip() if group is not None and group < len(cells) else ""
        path = _inside(root, y.images.replace("{label}", label), name)
        blank += sum(not c.strip() for c in mine) if s.multilabel else 0
        found.append(_Found(name, label, path, place, who, findings=several))
    if strange:
        raise DataError(_unknown(s, strange), "add them to the classes, or to none of the suite's layout")
    if blank:
        out.notes.append(f"{blank} blank cells count as {y.blank}")
    if not found and not out.bad:
        asked = ", ".join(f"{k} in {list(v)}" for k, v in y.where.items())
        raise DataError(f"{s.name}: {file} has no rows{f' with {asked}' if asked else ''}")
    return _table(s, found, out)


def _csv_file(s: DataSet, roots: Sequence[Path], annotations: Path | None) -> tuple[Path, Path]:
    """The annotation file and the set's folder."""
    name = s.layout.file
    if not s.layout.shipped:
        root = _anchored(s, roots, [name])
        return root / name, root
    tried = [p / name for p in (annotations, *roots) if p] + [r / "local_data" / name for r in roots]
    file = next((p for p in tried if p.is_file()), None)
    root = next((r for r in roots if r.is_dir()), None)
    if file is None or root is None:
        lacks = " and ".join([name] * (file is None) + ["the folder of its pictures"] * (root is None))
        raise Missing(
            f"{s.name}: {lacks} not found (tried {', '.join(str(p) for p in dict.fromkeys(tried))})", s.fetch
        )
    return file, root


def _column(name: int | str, header: Sequence[str], file: Path) -> int:
    if isinstance(name, int):
        if not 0 <= name < len(header):
            raise DataError(f"{file} has {len(header)} columns, column {name} (from 0) is needed")
        return name
    if name not in header:
        raise DataError(
            f"{file} has no column {name!r}.{did_you_mean(name, header)}", f"there are: {', '.join(header)}"
        )
    return header.index(name)


def _label_columns(y: Layout, header: Sequence[str], file: Path) -> list[int]:
    wanted = y.label if isinstance(y.label, tuple) else (y.label,)
    return [_column(c, header, file) for c in wanted]


def _findings(s: DataSet, cells: Sequence[str], place: str, strange: dict[str, list[str]]) -> tuple[int, ...]:
    """What the cells say about each finding; names that are none are collected.

    Raises:
        ValueError: for a cell that says nothing known.
    """
    y = s.layout
    if not y.separator:
        return tuple(findings_truth.of_cell(c, y.blank) for c in cells)
    found, others = findings_truth.of_list(cells[0], y.separator, s.labels, len(s.classes), y.none, y.blank)
    for name in others:
        if name not in y.ignore:
            strange.setdefault(name, []).append(place)
    return tuple(found)


def _label(y: Layout, cells: Sequence[str], names: Sequence[str]) -> str:
    """The label as written; of one-hot columns the name of the one that is 1.

    Raises:
        ValueError: for a cell that is no list, or no or several ones.
    """
    if isinstance(y.label, tuple):
        try:
            values = [float(c) if c.strip() else 0.0 for c in cells]
        except ValueError:
            raise ValueError(f"label columns hold {list(cells)}, not numbers") from None
        ones = [n for n, v in zip(names, values, strict=True) if v == 1]
        if len(ones) != 1:
            raise ValueError(f"{len(ones)} of the label columns are 1, one must be")
        return ones[0]
    text = _first(cells[0]) if y.label_list else cells[0].strip()
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)  # integers that pandas wrote as floats


def _first(cell: str) -> str:
    """The first element of a list in Python's notation, read without executing anything.

    Raises:
        ValueError: for anything else.

    Example:
        >>> _first("['glaucoma']")
        'glaucoma'
    """
    try:
        value = ast.literal_eval(cell.strip()) if len(cell) < 10_000 else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ValueError(f"{cell[:40]!r} is no list of texts")
    return value[0].strip()


def _inside(root: Path, folder: str, name: str) -> Path | None:
    """The picture's path, or None when its name leaves the set's folder (links are the user's own and followed)."""
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, folder, name)) if name and "\0" not in name else base
    return Path(path) if path.startswith(base.rstrip(os.sep) + os.sep) else None


# ---- folders and names


def _folders(s: DataSet, roots: Sequence[Path], annotations: Path | None) -> Table:
    base = [r / s.layout.images for r in roots]
    root = _anchored(s, base, list(s.labels))
    found = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in _pictures(folder):
            found.append(_Found(path.relative_to(root).as_posix(), folder.name, path, folder.name))
    return _table(s, found, Table())


def _names(s: DataSet, roots: Sequence[Path], annotations: Path | None) -> Table:
    root = roots[0] / s.layout.images
    if not root.is_dir():
        raise Missing(f"{s.name}: not found (tried {root})", s.fetch or "check the path")
    found, out = [], Table()
    for path in _pictures(root):
        match = re.match(r"[^_]*_(\d+)[_.]", path.name)
        if match:
            found.append(_Found(path.relative_to(root).as_posix(), match[1], path, path.name))
        else:
            out.bad.append({"file": path.name, "reason": "no label after the first underscore of the name"})
    return _table(s, found, out)


def _pictures(folder: Path) -> Iterator[Path]:
    """Pictures below a folder, sorted, whatever order the file system has; OSError where one cannot be listed."""

    def refuse(e: OSError) -> None:
        raise e

    for base, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in medical.SUFFIXES:
                yield Path(base, name)


# ---- npz


def _npz(s: DataSet, roots: Sequence[Path], annotations: Path | None) -> Table:
    root = _anchored(s, roots, [s.layout.file])
    file, split = root / s.layout.file, s.layout.split
    out = Table()
    array, labels = medmnist.load(file, split)
    out.array = array
    out.sha256 = file_sha256(file)
    if s.multilabel:
        return _table(s, _npz_findings(s, file, labels, len(array)), out)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(array),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{file}: labels are {labels.dtype}{list(labels.shape)} for {len(array)} pictures",
            "one integer a picture; sets with several labels a picture are multilabel",
        )
    found = [_Found(f"{split}/{i}", str(k), file, f"row {i}", frame=i) for i, k in enumerate(labels.tolist())]
    return _table(s, found, out)


def _npz_findings(s: DataSet, file: Path, labels: np.ndarray, pictures: int) -> list[_Found]:
    if labels.shape != (pictures, len(s.classes)) or not np.isin(labels, (-1, 0, 1)).all():
        raise DataError(
            f"{file}: labels are {labels.dtype}{list(labels.shape)} for {pictures} pictures",
            f"1, 0 or -1 for each of the {len(s.classes)} classes",
        )
    name = s.layout.split
    return [
        _Found(f"{name}/{i}", "", file, f"row {i}", frame=i, findings=tuple(row))
        for i, row in enumerate(labels.astype(int).tolist())
    ]


_READERS = {"csv": _csv, "folders": _folders, "names": _names, "npz": _npz}


# ---- rows


def _table(s: DataSet, found: Sequence[_Found], out: Table) -> Table:
    """Labels to classes; pictures counted as missing, repeated or left out."""
    y = s.layout
    unknown: dict[str, list[str]] = {}
    seen: dict[tuple[Path, int], _Found] = {}
    clash: list[str] = []
    exists: dict[Path, bool] = {}
    for f in found:
        if f.label in y.ignore and f.label not in s.labels:
            out.left_out[f.label] += 1
            continue
        if y.paths and not re.search(y.paths, f.name):
            continue
        if not s.multilabel and f.label not in s.labels:
            unknown.setdefault(f.label, []).append(f.where)
            continue
        path = _usable(f, exists)
        if isinstance(path, str):
            out.bad.append(
                {"file": f"{f.where}: {f.name}" if f.where not in f.name else f.name, "reason": path}
            )
            continue
        first = seen.setdefault((path, f.frame), f)
        if first is not f:
            out.repeated += 1
            if first.findings != f.findings or (
                not s.multilabel and s.labels[first.label] != s.labels[f.label]
            ):
                clash.append(f"{f.name} is {first.label!r} and {f.label!r}" if f.label else f.name)
            if y.once:
                continue
        match = re.search(y.group_pattern, f.name) if y.group_pattern else None
        group = f.group or (match[0] if match else "") or (f"{path}#{f.frame}")
        label = 0 if s.multilabel else s.labels[f.label]
        out.rows.append(Row(f.name, label, group, path, f.frame, f.findings))
    if unknown:
        raise DataError(_unknown(s, unknown), "add them to the labels or to ignore of the suite")
    if clash:
        raise DataError(f"{s.name}: pictures have two labels: {_some(clash)}", "correct the list")
    _check(s, found, out)
    return out


def _usable(f: _Found, exists: dict[Path, bool]) -> Path | str:
    """The picture's path, or why it cannot be used."""
    if f.path is None:
        return "the name leaves the folder of the set"
    if f.path not in exists:
        exists[f.path] = f.path.is_file()
    return f.path if exists[f.path] else "no such file"


def _check(s: DataSet, found: Sequence[_Found], out: Table) -> None:
    if not out.rows:
        first = f", the first: {out.bad[0]['file']}: {out.bad[0]['reason']}" if out.bad else ""
        what = f"none of {len(out.bad)} pictures can be used{first}" if out.bad else "there are no pictures"
        raise DataError(f"{s.name}: {what}", s.fetch or "check the path")
    support = Counter(r.label for r in out.rows)
    if len(support) == 1 and not s.multilabel:
        out.notes.append(f"only one class occurs: {s.classes[next(iter(support))]}")
    if out.repeated:
        kept = "left out" if s.layout.once else "kept"
        out.notes.append(f"{out.repeated} rows name a picture again ({kept})")
    for label, n in sorted(out.left_out.items()):
        out.notes.append(f"{n} pictures of {label} are left out, which is no class here")


def _unknown(s: DataSet, unknown: Mapping[str, Sequence[str]]) -> str:
    """All labels that are no class, with the first place of each, and classes that differ by case only."""
    folded = {k.casefold(): k for k in s.labels}
    parts = [f"{k!r} x{len(v)} ({v[0]})" for k, v in sorted(unknown.items())]
    case = [f"{k!r} is {folded[k.casefold()]!r} but for case" for k in unknown if k.casefold() in folded]
    return f"{s.name}: labels that are no class: {'; '.join([_some(parts, 20), *case])}"


def _some(items: Sequence[str], count: int = _SHOWN) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
