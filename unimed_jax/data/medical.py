"""Any file of a study to pictures: DICOM (data/dicom.py), NIfTI, and ordinary images (data/images.py)."""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimed_jax.data import dicom, images, limits, windows
from unimed_jax.data.dicom import Frame, Hold, Picture, need
from unimed_jax.errors import DataError, UsageError

KINDS = ("DICOM", "NIfTI", *images.FORMATS)
SUFFIXES = frozenset(
    [".dcm", ".dicom", ".nii", ".gz", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"]
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files begin, BigTIFF too
_BYTES_A_PIXEL = (
    12  # while an ordinary image is decoded and resized, besides the file; measured: up to 12 (32-bit)
)
_BYTES_A_VOXEL = 24  # while a slice is computed in float64, with a copy for its percentiles


@dataclass(frozen=True, slots=True)
class Slices:
    """Which frames of a file are read: the middle one, all, or every n-th."""

    every: int = 0  # 0 = the middle one

    @classmethod
    def parse(cls, text: str) -> Slices:
        """Reads `middle`, `all` or `every:N`.

        Raises:
            UsageError: for anything else.

        Example:
            >>> list(Slices.parse("every:3").pick(8))
            [0, 3, 6]
        """
        if text == "middle":
            return cls(0)
        if text == "all":
            return cls(1)
        match = re.fullmatch(r"every:([1-9]\d{0,5})", text)
        if not match:
            raise UsageError(f"slices is {text!r}", "middle, all or every:N")
        return cls(int(match[1]))

    def pick(self, frames: int) -> range:
        """The chosen frame numbers of a file with that many."""
        return range(0, frames, self.every) if self.every else range(frames // 2, frames // 2 + 1)


def read(
    path: str | Path, *, window: tuple[float, float] | None = None, slices: Slices | None = None
) -> list[Picture]:
    """Reads the chosen pictures of one file; the content decides the format, not the suffix.

    Args:
        path: DICOM, NIfTI or any image that data/images.py reads.
        window: (centre, width) for gray values, instead of the file's own.
        slices: frames of a DICOM file or axial slices of a volume; default: the middle one.

    Raises:
        DataError: see `frames`; for a coding that needs another package, the remedy names it. The pixels of an
            ordinary image are decoded, and refused if they are damaged, by `Picture.square`.
    """
    return [f.read() for f in frames(path, window=window, slices=slices)]


def frames(
    path: str | Path,
    *,
    window: tuple[float, float] | None = None,
    slices: Slices | None = None,
    hold: Hold = nullcontext,
) -> list[Frame]:
    """Finds the chosen pictures of one file, which `Frame.read` decodes one at a time.

    Args:
        path: see `read`.
        window: see `read`.
        slices: see `read`.
        hold: see `dicom.frames`.

    Raises:
        DataError: for a file that is missing, empty, too large, of an unknown format, or holds no picture.
    """
    path, slices = Path(path), slices or Slices()
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe or device may never end
            raise DataError(f"{path.name}: is no file that can be read")
        with path.open("rb") as f:
            head = f.read(352)
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        raise DataError(f"{path.name}: cannot be read ({type(e).__name__})") from None
    if not size:
        raise DataError(f"{path.name}: the file is empty")
    if size > limits.MAX_FILE_BYTES:
        raise DataError(f"{path.name}: {size} bytes are too large", f"at most {limits.MAX_FILE_BYTES}")
    if is_dicom(path, head):
        return dicom.frames(path, window, slices.pick, hold)
    if _is_nifti(path, head):
        return _nifti(path, window, slices)
    return [_image(path, size)]


def is_dicom(path: Path, head: bytes) -> bool:
    """Whether the first bytes or the suffix say DICOM."""
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def is_study(path: Path, head: bytes) -> bool:
    """Whether a file is DICOM or NIfTI, by its first 352 bytes or its suffix."""
    return is_dicom(path, head) or _is_nifti(path, head)


def _is_nifti(path: Path, head: bytes) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz")) or head[344:348] in (b"n+1\0", b"ni1\0")


def _image(path: Path, size: int) -> Frame:
    """An ordinary image: its header is read, its bytes later."""
    try:
        with path.open("rb") as f:
            pixels = images.pixels_of(f)
    except images.TooLarge:
        tiled = "; of a tiled TIFF, --level 0 reads tiles" if path.suffix.lower() in (".tif", ".tiff") else ""
        raise DataError(
            f"{path.name}: too many pixels", f"at most {limits.MAX_IMAGE_PIXELS}{tiled}"
        ) from None
    except DataError:
        with path.open("rb") as f:
            is_tiff = f.read(4) in _TIFF
        raise DataError(
            *(f"{path.name}: is a TIFF of another form", "1, 3 or 4 channels of at most 16 bits can be read")
            if is_tiff
            else (f"{path.name}: is no picture of a known format", f"known: {', '.join(KINDS)}")
        ) from None
    read = lambda: Picture(data=path.read_bytes(), kind="image", where=path.name)
    return Frame(file=path, cost=size + pixels * _BYTES_A_PIXEL, read=read)


def _nifti(path: Path, window: tuple[float, float] | None, slices: Slices) -> list[Frame]:
    """Axial slices of the first volume, shown as a radiologist sees them: front up, patient's right on the left."""
    nibabel = need("nibabel")
    try:
        volume = nibabel.load(path)
        shape, axes = volume.shape, nibabel.io_orientation(volume.affine)
        if len(shape) < 3 or np.isnan(axes).any() or volume.get_data_dtype().names:
            raise ValueError("no gray volume with an orientation")
        if max(shape[0] * shape[1], shape[1] * shape[2], shape[0] * shape[2]) > limits.MAX_GRAY_PIXELS:
            raise images.TooLarge(
                f"{path.name}: slices of {' x '.join(map(str, shape[:3]))} voxels are too large",
                f"at most {limits.MAX_GRAY_PIXELS} pixels each",
            )
        up = int(np.flatnonzero(axes[:, 0] == 2)[0])  # the axis of the file that runs from foot to head
        chosen = slices.pick(shape[up])
        cost = int(np.prod(shape[:3])) // shape[up] * _BYTES_A_VOXEL
    except images.TooLarge:
        raise
    except Exception as e:
        raise DataError(f"{path.name}: cannot read the volume ({type(e).__name__})") from None
    if len(chosen) > limits.MAX_FRAMES:
        raise DataError(f"{path.name}: {len(chosen)} slices are too many", "--slices every:N")

    def read(k: int) -> Picture:
        try:
            place = tuple(k if a == up else slice(None) if a < 3 else 0 for a in range(len(shape)))
            plane = np.require(volume.dataobj[place], np.float64, "W")
            np.nan_to_num(plane, copy=False)
            gray = windows.apply(plane, *window) if window else windows.stretch(plane)
            gray = _face_up(gray, [axes[a] for a in range(3) if a != up])
        except Exception as e:
            raise DataError(f"{path.name}: cannot read the volume ({type(e).__name__})") from None
        rule = "option" if window else "percentile"
        return Picture(data=gray, kind="nifti", frame=k, frames=shape[up], window=rule, where=path.name)

    return [Frame(file=path, cost=cost, read=functools.partial(read, k)) for k in chosen]


def _face_up(gray: np.ndarray, axes: list[np.ndarray]) -> np.ndarray:
    """An axial plane with any in-plane orientation, front up and the patient's right on the left."""
    (first, first_sign), (_, second_sign) = axes
    gray = gray[
        :: int(first_sign), :: int(second_sign)
    ]  # both axes now grow towards the patient's left and front
    gray = gray if first == 0 else gray.T  # [left-right, back-front]
    return np.ascontiguousarray(gray.T[::-1, ::-1])
