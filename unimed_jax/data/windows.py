"""Gray values of medical pictures to 0..255: windows by name, DICOM's window functions, percentiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Num, UInt8

from unimed_jax.errors import UsageError, did_you_mean

WINDOWS: dict[str, tuple[float, float]] = {  # name: (centre, width) in Hounsfield units
    "abdomen": (50, 400),
    "bone": (400, 1800),
    "brain": (40, 80),
    "liver": (30, 150),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft-tissue": (40, 400),
    "spine": (50, 250),
    "subdural": (75, 215),
}
_PERCENTILES = (0.5, 99.5)
_BAND = 256  # rows


def parse_window(text: str) -> tuple[float, float] | None:
    """A window by name or as `centre,width`; None for the file's own.

    Raises:
        UsageError: for an unknown name or a width below 1.

    Example:
        >>> parse_window("lung"), parse_window("40,80"), parse_window("")
        ((-600, 1500), (40.0, 80.0), None)
    """
    if not text:
        return None
    if text in WINDOWS:
        return WINDOWS[text]
    parts = text.split(",")
    try:
        centre, width = (float(p) for p in parts)
    except ValueError:
        raise UsageError(
            f"no window {text!r}.{did_you_mean(text, WINDOWS)}",
            f"centre,width or one of {', '.join(sorted(WINDOWS))}",
        ) from None
    if not (math.isfinite(centre) and math.isfinite(width) and width >= 1):
        raise UsageError(f"window {text!r} has no width of at least 1")
    return centre, width


def apply(
    x: Num[np.ndarray, "h w"], centre: float, width: float, function: str = "LINEAR"
) -> UInt8[np.ndarray, "h w"]:
    """A window to 0..255: DICOM PS3.3 C.11.2.1.2 (LINEAR, LINEAR_EXACT) and C.11.2.1.3.1 (SIGMOID).

    Example:
        >>> apply(np.array([[-1000, 40, 240, 3000]]), 40, 400).tolist()
        [[0, 128, 255, 255]]
    """
    if function == "SIGMOID":
        return _to_8_bits(x, lambda v: 1 / (1 + np.exp(np.clip(-4 * (v - centre) / width, -60, 60))))
    if function == "LINEAR_EXACT":
        return _to_8_bits(x, lambda v: (v - centre) / width + 0.5)
    if width <= 1:
        return _to_8_bits(x, lambda v: (v > centre - 0.5).astype(np.float64))
    return _to_8_bits(x, lambda v: (v - (centre - 0.5)) / (width - 1) + 0.5)


def _to_8_bits(
    x: Num[np.ndarray, "h w"], share: Callable[[np.ndarray], np.ndarray]
) -> UInt8[np.ndarray, "h w"]:
    """Shares of the range to 0..255, in bands of rows: a large picture would take gigabytes of intermediates."""
    out = np.empty(x.shape, np.uint8)
    for top in range(0, len(x), _BAND):
        out[top : top + _BAND] = np.clip(share(x[top : top + _BAND]), 0, 1) * 255 + 0.5
    return out


def stretch(x: Num[np.ndarray, "h w"], valid: np.ndarray | None = None) -> UInt8[np.ndarray, "h w"]:
    """The 0.5 to 99.5 percentile of the valid values to 0..255; minimum to maximum where those are equal.

    Example:
        >>> stretch(np.array([[0.0, 50.0, 100.0]])).tolist()
        [[0, 128, 255]]
    """
    inside = x[valid] if valid is not None and valid.any() else x.flatten()  # a copy, which may be reordered
    low, high = np.percentile(inside, _PERCENTILES, overwrite_input=True)
    if low == high:
        low, high = inside.min(), inside.max()
    del inside
    if not high > low:
        return np.zeros(x.shape, np.uint8)
    return _to_8_bits(x, lambda v: (v - low) / (high - low))


def upper_bits(x: Num[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, "..."]:
    """The upper 8 bits of unsigned values."""
    out = np.empty(x.shape, np.uint8)
    for top in range(0, len(x), _BAND):
        out[top : top + _BAND] = (x[top : top + _BAND].astype(np.uint64) >> max(bits - 8, 0)).clip(0, 255)
    return out
