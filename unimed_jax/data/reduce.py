"""Pictures that are larger than a training needs, made smaller once at export (`--max-side`).

Written rule. A picture whose longer side exceeds the limit is decoded in full and resized with Pillow's Lanczos filter,
so that its longer side is the limit and the other `round(short x limit / long)`, at least 1. What was JPEG becomes JPEG
(quality 95, 4:4:4), anything else PNG, which loses nothing more. Gray stays gray; palettes, CMYK and alpha become what
`images.decode` makes of them, before they are resized. 16-bit gray stays 16-bit: it is filtered as float32 and clipped
to the picture's own range of values, so that nothing reaches beyond it. Gray of 32 bits or of floating point has no
smaller form that says the same, and is kept as it is. Pictures within the limit keep their bytes.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from unimed_jax.data import images, limits
from unimed_jax.data.record import Example
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError

SMALLEST = 32  # pixels: a limit below this is a slip
JPEG_QUALITY = 95
KEPT = "larger, kept"
_FILTER = Image.Resampling.LANCZOS


def check(max_side: int) -> None:
    """Refuses an impossible limit; 0 is none.

    Raises:
        UsageError: naming it.
    """
    if max_side and max_side < SMALLEST:
        raise UsageError(f"max_side is {max_side}", f"at least {SMALLEST} pixels, or leave it out")


def settings(max_side: int) -> dict[str, Any]:
    """What the manifest says about the rule; nothing for 0."""
    if not max_side:
        return {}
    return {"max_side": max_side, "filter": "lanczos", "jpeg_quality": JPEG_QUALITY, "jpeg_sampling": "4:4:4"}


def apply(example: Example, max_side: int) -> tuple[Example, str]:
    """An example within the limit, and what was done: "reduced jpeg", "reduced png", KEPT, or nothing.

    A picture that cannot be decoded stays as it is, for `validate.finish` to reject.

    Raises:
        Reject: too_slow.
    """
    try:
        with limits.processor_time(limits.MAX_DECODE_SECONDS):
            data, what = fit(example.image, max_side) if max_side else (example.image, "")
    except limits.TooSlow as e:
        raise Reject("too_slow", f"decoding took {e}") from e
    except DataError:
        return example, ""
    if data is not example.image:
        original = hashlib.sha256(example.image).hexdigest()
        return replace(example, image=data, original_sha256=original), what
    return example, what


def fit(data: bytes, max_side: int) -> tuple[bytes, str]:
    """The bytes of a picture within the limit; the same object where nothing is to be done.

    Returns:
        (bytes, what was done: see `apply`).

    Raises:
        DataError: for bytes that are no complete picture.

    Example:
        >>> out = io.BytesIO()
        >>> Image.new("L", (300, 200)).save(out, "PNG")
        >>> small, what = fit(out.getvalue(), 150)
        >>> images.decode(small).shape, what, fit(small, 150)[0] is small
        ((100, 150), 'reduced png', True)
    """
    if max(images.size_of(data)) <= max_side:
        return data, ""
    image = images.load_image(data)
    is_jpeg = image.format in ("JPEG", "MPO")
    size = _size(*image.size, max_side)
    if image.mode.startswith(("I", "F")):
        small = _wide(image, size)
        if small is None:
            return data, KEPT
    else:
        small = images.plain(image).resize(size, _FILTER)
    out = io.BytesIO()
    if is_jpeg:
        small.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        small.save(out, "PNG")
    return out.getvalue(), f"reduced {'jpeg' if is_jpeg else 'png'}"


def _size(width: int, height: int, max_side: int) -> tuple[int, int]:
    longer = max(width, height)
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


def _wide(image: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """16-bit gray, smaller; None for values that 16 bits do not hold."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("F") or low < 0 or high > 65535:
        return None
    small = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, _FILTER))
    return Image.fromarray(np.rint(np.clip(small, low, high)).astype(np.uint16))
