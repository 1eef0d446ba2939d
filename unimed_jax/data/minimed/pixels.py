"""Readers and rules from stored values to displayed pixels: NRRD, NIfTI, DICOM, windows, orientation, size."""

from __future__ import annotations

import bz2
import functools
import gzip
import importlib
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.minimed.facts import PLANES
from unimed_jax.errors import DataError

MAX_SIDE = 512  # pixels of the longer side; larger pictures are reduced

_NRRD_TYPES = {
    "short": "i2",
    "int16": "i2",
    "signed short": "i2",
    "unsigned short": "u2",
    "ushort": "u2",
    "uint16": "u2",
    "unsigned char": "u1",
    "uchar": "u1",
    "uint8": "u1",
    "signed char": "i1",
    "int": "i4",
    "int32": "i4",
    "unsigned int": "u4",
    "float": "f4",
    "double": "f8",
}
_NRRD_DECODERS = {"raw": lambda b: b, "gzip": gzip.decompress, "gz": gzip.decompress, "bzip2": bz2.decompress}


def read_nrrd(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads an attached-header NRRD volume; returns it with its 4x4 voxel-to-RAS matrix (mm).

    Raises:
        DataError: the header lacks a field, names an unknown type or encoding, or the data are cut short.
    """
    head, _, body = path.read_bytes().partition(b"\n\n")
    fields = {}
    for line in head.decode("latin1").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            fields[name.strip()] = value.lstrip("=").strip()
    try:
        kind = ("<" if fields.get("endian", "little") == "little" else ">") + _NRRD_TYPES[fields["type"]]
        shape = tuple(int(n) for n in fields["sizes"].split())
        values = np.frombuffer(_NRRD_DECODERS[fields["encoding"]](body), kind, count=math.prod(shape))
        columns = [
            [float(x) for x in v.split(",")] for v in re.findall(r"\(([^)]*)\)", fields["space directions"])
        ]
        origin = [float(x) for x in fields.get("space origin", "(0,0,0)").strip("()").split(",")]
        to_ras = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}[
            fields["space"]
        ]
    except (KeyError, ValueError, EOFError, OSError) as e:
        raise DataError(f"{path.name} is no NRRD volume that can be read: {type(e).__name__}: {e}") from e
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = origin
    return values.reshape(shape, order="F"), np.diag([*to_ras, 1.0]) @ affine


@functools.lru_cache(maxsize=16)
def volume(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A NIfTI or NRRD volume turned to right-anterior-superior axes, and its spacing in mm.

    All stay in memory (about 250 MB together), because an export asks for slices in shuffled order.
    """
    nib: Any = importlib.import_module("nibabel")
    if path.suffix == ".nrrd":
        values, affine = read_nrrd(path)
        if values.dtype == np.int32:
            values = values.astype(np.int16)
        image = nib.Nifti1Image(values, affine)
    else:
        image = nib.load(path)
    image = nib.as_closest_canonical(image)
    values = np.asanyarray(image.dataobj)
    while values.ndim > 3:
        values = values[..., 0]
    if (
        values.dtype == np.float64
    ):  # a scale factor of 1 makes them so; all the volumes here hold whole numbers
        values = np.clip(np.rint(values), -32768, 32767).astype(np.int16)
    x, y, z = (float(s) for s in image.header.get_zooms()[:3])
    return values, (x, y, z)


def take(values: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice of a RAS volume, axes as stored."""
    axis = PLANES[plane]
    return values[(slice(None),) * axis + (index,)]


def display(plane_values: np.ndarray, plane: str, spacing: tuple[float, float, float]) -> np.ndarray:
    """Turns a RAS slice to the radiological display: superior or anterior up, patient's right on the left.

    Sagittal slices look to the left (anterior on the left). Unequal spacing is resampled, linearly, to the finer.
    """
    sx, sy, sz = spacing
    rows, columns = {"axial": (sy, sx), "coronal": (sz, sx), "sagittal": (sz, sy)}[plane]
    turned = plane_values.T[::-1, ::-1]
    fine = min(rows, columns)
    if max(rows, columns) / fine < 1.02:
        return turned
    from scipy.ndimage import zoom

    return np.asarray(zoom(turned.astype(np.float32), (rows / fine, columns / fine), order=1))


def window(values: Any, low: float, high: float) -> np.ndarray:
    """Maps [low, high] linearly to u8 [0, 255] and clips the rest."""
    scaled = (values.astype(np.float32) - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * 255 + 0.5).astype(np.uint8)


def foreground(values: np.ndarray, plane: str, threshold: float, least: float, step: int) -> Iterator[int]:
    """Every `step`-th slice index in which more than the share `least` of the pixels exceeds `threshold`."""
    axes = tuple(a for a in range(3) if a != PLANES[plane])
    share = (values > threshold).mean(axis=axes)
    yield from (int(i) for i in range(0, len(share), step) if share[i] > least)


def dicom(path: Path) -> tuple[Any, np.ndarray]:
    """A DICOM file's header and its raw stored frames, [frames rows columns ...]; no identifier is kept.

    Raises:
        DataError: the pixels cannot be decoded.
    """
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sample files break the standard in many small ways
        try:
            header = pydicom.dcmread(path, force=True)
            values = header.pixel_array
        except Exception as e:  # decoders raise their own kinds
            raise DataError(f"{path.name} cannot be decoded: {e}", 'pip install "unimed-jax[medical]"') from e
    return header, values if int(header.get("NumberOfFrames", 1) or 1) > 1 else values[None]


def rescaled(header: Any, values: np.ndarray) -> np.ndarray:
    """Stored values -> physical ones (Hounsfield units for CT), in float32."""
    slope, intercept = (
        float(header.get("RescaleSlope", 1) or 1),
        float(header.get("RescaleIntercept", 0) or 0),
    )
    return values.astype(np.float32) * slope + intercept


def percentile_window(values: np.ndarray, low: float, high: float, *, skip_least: bool = False) -> np.ndarray:
    """Windows between two percentiles (0-100); `skip_least` leaves out the smallest value, i.e. empty background."""
    used = values[values > values.min()] if skip_least else values
    a, b = np.percentile(used if used.size else values, (low, high))
    return window(values, float(a), float(b))


def fit(image: np.ndarray, side: int = MAX_SIDE) -> np.ndarray:
    """Reduces a u8 picture so that its longer side is at most `side`; smaller ones stay as they are."""
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return np.ascontiguousarray(image)
    from PIL import Image

    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


@functools.lru_cache(maxsize=4)
def photo(path: Path) -> np.ndarray:
    """A photograph or slide as u8[h w 3], whole; 16-bit gray stays one channel of u16."""
    from PIL import Image

    with Image.open(path) as opened:
        if opened.mode.startswith("I"):
            return np.asarray(opened, dtype=np.uint16)
        return np.asarray(opened.convert("RGB"))
