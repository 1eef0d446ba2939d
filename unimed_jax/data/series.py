"""DICOM files that are slices of one volume, found by their headers (extra `medical`).

A scanner writes a file for each slice. Files of one folder and series (and study, patient and frame of reference) with
the same size and orientation are a volume when their positions differ, or, for sectional modalities without positions,
when they are numbered. Radiographs, which share a series without being slices, stay pictures of their own. Header
values are compared and forgotten: none leaves this module.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unimed_jax.data import dicom, medical

_SECTIONAL = frozenset(["CT", "MR", "PT", "NM"])
_AT_ONCE = 256  # files
_TURN = 0.01  # between the direction cosines of slices of one volume
_HEAD = 1 << 16  # bytes in which a header ends, nearly always
_TAGS = [
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "NumberOfFrames",
    "InstanceNumber",
    "Rows",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
]


@dataclass(frozen=True, slots=True)
class _Slice:
    key: tuple[Any, ...]  # equal for the slices of one volume
    turned: tuple[float, ...]  # direction cosines of the rows and columns
    sectional: bool
    position: float | None  # mm along the normal of the slice
    number: int | None


def volumes(files: Sequence[Path], *, threads: int = 4) -> list[tuple[Path, ...]]:
    """The files, those of one volume together and from its first slice to its last.

    Ordered by position along the normal of the slices, then by instance number, then by name.

    Args:
        files: any files; all but single-frame DICOM stay alone, also those whose header cannot be read.
        threads: headers read in parallel.

    Returns:
        Tuples of files, in the order of the first file of each.
    """
    found: list[_Slice | None] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="series") as pool:
        for first in range(0, len(files), _AT_ONCE):
            part = files[first : first + _AT_ONCE]
            # Parsing holds the interpreter: threads only wait for the disk.
            found += [_slice(p, head) for p, head in zip(part, pool.map(_head, part), strict=True)]
    out: list[tuple[int, tuple[Path, ...]]] = []
    for members in _together(found):
        order = _order([(i, found[i]) for i in members]) if len(members) > 1 else None
        if order:
            out.append((members[0], tuple(files[i] for i in order)))
        else:
            out += [(i, (files[i],)) for i in members]
    return [v for _, v in sorted(out, key=lambda v: v[0])]


def _together(found: Sequence[_Slice | None]) -> list[list[int]]:
    """Numbers of the files of one key and orientation, which may differ by as much as scanners round."""
    groups: dict[Any, list[list[int]]] = {}
    turned: dict[int, tuple[float, ...]] = {}  # of the first file of a group
    for i, s in enumerate(found):
        same = groups.setdefault(i if s is None else s.key, [])
        mine = turned[i] = s.turned if s else ()
        near = next((g for g in same if _near(turned[g[0]], mine)), None)
        if near is None:
            same.append([i])
        else:
            near.append(i)
    return [g for same in groups.values() for g in same]


def _near(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= _TURN for x, y in zip(a, b, strict=True))


def _order(members: Sequence[tuple[int, Any]]) -> list[int] | None:
    """The slices in anatomical order; None when they are no volume."""
    placed = all(s.position is not None for _, s in members)
    if placed and len({s.position for _, s in members}) > 1:
        key = lambda m: (m[1].position, m[1].number or 0, m[0])
    elif all(s.sectional and s.number is not None for _, s in members) and len(
        {s.number for _, s in members}
    ) == len(members):
        key = lambda m: m[1].number
    else:
        return None
    return [i for i, _ in sorted(members, key=key)]


def _head(path: Path) -> bytes:
    """The beginning of a DICOM file; empty for anything else."""
    try:
        if not path.is_file():  # a pipe or device may never end
            return b""
        with path.open("rb") as f:
            head = f.read(132)
            return head + f.read(_HEAD - len(head)) if medical.is_dicom(path, head) else b""
    except (OSError, ValueError):
        return b""


def _slice(path: Path, head: bytes) -> _Slice | None:
    """What the header says about the place of a single frame; None for anything else."""
    if not head:
        return None
    try:
        return _parsed(io.BytesIO(head), path)
    except Exception:  # no pydicom, a damaged header: reading the picture will say so
        if len(head) < _HEAD:
            return None
    try:
        with path.open("rb") as f:
            return _parsed(f, path)
    except Exception:  # as above
        return None


def _parsed(file: BinaryIO, path: Path) -> _Slice | None:
    """As `_slice`; raises anything for a header that does not reach to the size of a picture."""
    pydicom = dicom.need("pydicom")
    with dicom.no_identifiers():
        if dicom.inflated_bytes(file, path.name, pydicom):
            return None  # reading its header would inflate it whole
        file.seek(0)
        ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
        if "Columns" not in ds:  # the last of the tags, in their order
            raise EOFError
        return _place(ds, path.parent)


def _place(ds: Any, folder: Path) -> _Slice | None:
    series = str(ds.get("SeriesInstanceUID") or "")
    if not series or int(ds.get("NumberOfFrames", 1) or 1) != 1:
        return None
    turned = [float(v) for v in ds.get("ImageOrientationPatient") or ()]
    corner = [float(v) for v in ds.get("ImagePositionPatient") or ()]
    position = None
    if len(turned) == 6 and len(corner) == 3 and all(map(math.isfinite, turned + corner)):
        (a, b, c), (d, e, f) = turned[:3], turned[3:]
        normal = (b * f - c * e, c * d - a * f, a * e - b * d)
        position = round(sum(n * x for n, x in zip(normal, corner, strict=True)), 3)
    number = ds.get("InstanceNumber")
    ids = (str(ds.get(k) or "") for k in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"))
    key = (folder, series, *ids, ds.get("Rows"), ds.get("Columns"))
    modality = str(ds.get("Modality", ""))
    numbered = None if number in (None, "") else int(number)
    return _Slice(key, tuple(turned), modality in _SECTIONAL, position, numbered)
