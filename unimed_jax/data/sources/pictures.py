"""The bytes that a record stores of a picture file: an ordinary image as it is, a slice of a study as PNG."""

from __future__ import annotations

import io
import stat
from pathlib import Path

from PIL import Image

from unimed_jax.data import limits, medical
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

# Of DICOM's defined terms those that say one of config.MODALITIES.
_MODALITIES = {
    "CR": "X-ray",
    "DX": "X-ray",
    "MG": "X-ray",
    "IO": "X-ray",
    "PX": "X-ray",
    "CT": "CT",
    "MR": "MRI",
    "US": "Ultrasound",
    "SM": "Histopathology",
    "OP": "Fundus",
}


def check(path: Path) -> None:
    """Refuses what must not be read: large files, and pipes and devices, which may never end.

    Raises:
        Reject: too_large or unreadable.
        OSError: for a missing file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Reject("unreadable", "it is no file")
    if found.st_size > limits.MAX_FILE_BYTES:
        raise Reject("too_large", f"the file has more than {limits.MAX_FILE_BYTES} bytes")


def stored(path: Path, window: tuple[float, float] | None = None) -> tuple[bytes, str]:
    """What is stored of a file, and the modality that its header says, empty for none.

    Args:
        path: any image, DICOM or NIfTI; of several frames the middle one.
        window: (centre, width) for gray values of DICOM and NIfTI, instead of the file's own.

    Returns:
        (the file's own bytes, or PNG of what the window shows; modality). Nothing else of a header is kept.

    Raises:
        Reject: see `check`; also decode_error for a study that cannot be read; without the file's name.
        OSError: for a missing file.
    """
    check(path)
    with path.open("rb") as f:
        head = f.read(352)
    if not medical.is_study(path, head):
        return path.read_bytes(), ""
    try:
        (picture,) = medical.read(path, window=window)
    except DataError as e:
        raise Reject("decode_error", e.cause.removeprefix(f"{path.name}: ")) from None
    if isinstance(picture.data, bytes):
        return picture.data, ""
    out = io.BytesIO()
    Image.fromarray(picture.data).save(out, "PNG")
    return out.getvalue(), _MODALITIES.get(picture.modality, "")
