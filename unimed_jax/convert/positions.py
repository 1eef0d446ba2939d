"""Position tables of vision transformers at another grid size; numpy only.

Three rules are in use, and they differ (by 24 % of the norm on random tables from 16 x 16 to 24 x 24), so a rule is
always named. Text tables are never resized: their rows are words' places, and no model here was trained with
interpolated ones.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from unimed_jax.errors import DataError

# name: (corner samples keep their values, antialiased when shrinking, Keys' parameter a)
RULES: dict[str, tuple[bool, bool, float]] = {
    "bicubic": (True, False, -0.75),  # UniMed-CLIP, OpenCLIP until 2.x
    "antialias": (False, True, -0.5),  # OpenCLIP today
    "half_pixel": (False, False, -0.75),  # DINOv2
}


def resize_positions(
    pos: Float[np.ndarray, "t d"], grid: int, rule: str = "half_pixel", *, where: str = "a position table"
) -> Float[np.ndarray, "u d"]:
    """Resamples the patch rows of a position table to `grid` x `grid`; row 0 (class token) stays.

    Bicubic (Keys 1981), equal to PyTorch's `interpolate(mode="bicubic")` with `align_corners` and `antialias` as
    `RULES` says.

    Args:
        pos: 1 + n*n rows.
        grid: patches a side wanted.
        rule: name in `RULES`.
        where: what the table is, for messages.

    Raises:
        DataError: when the rows are not one class token and a square.

    Example:
        >>> resize_positions(np.ones((1 + 9, 4), np.float32), 5, "antialias").shape
        (26, 4)
    """
    side = math.isqrt(max(len(pos) - 1, 0))
    if side * side + 1 != len(pos) or side == 0:
        raise DataError(f"{where} of {len(pos)} rows is not a class token and a square grid")
    if side == grid:
        return pos
    weights = cubic_weights(side, grid, rule)
    patches = pos[1:].astype(np.float64).reshape(side, side, -1)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, patches, optimize=True)
    return np.concatenate([pos[:1], patches.reshape(grid * grid, -1)]).astype(np.float32)


def refuse_other_text_length(rows: int, wanted: int, *, where: str = "the text tower") -> None:
    """Refuses a text position table of another length: it is not resized.

    Raises:
        DataError: naming both lengths.

    Example:
        >>> refuse_other_text_length(512, 512)
    """
    if rows != wanted:
        raise DataError(
            f"{where} has {rows} text positions, the model {wanted}: text positions are not resized",
            f"set model.text.max_positions to {rows}, and model.text.context_length to at most that",
        )


def cubic_weights(n: int, m: int, rule: str = "half_pixel") -> Float[np.ndarray, "m n"]:
    """The matrix of 1-D bicubic interpolation from n to m samples; rows add up to 1."""
    align_corners, antialias, a = RULES[rule]
    return _antialiased(n, m, a) if antialias else _clamped(n, m, a, align_corners=align_corners)


def _clamped(n: int, m: int, a: float, *, align_corners: bool) -> np.ndarray:
    """Four taps; those beyond a border read the border."""
    out = np.zeros((m, n))
    for row in range(m):
        x = row * (n - 1) / max(m - 1, 1) if align_corners else (row + 0.5) * n / m - 0.5
        first = math.floor(x)
        for tap in range(first - 1, first + 3):
            out[row, min(max(tap, 0), n - 1)] += _keys(abs(x - tap), a)
    return out


def _antialiased(n: int, m: int, a: float) -> np.ndarray:
    """The kernel is widened by the factor of shrinking; taps beyond a border are left out, rows scaled to 1."""
    scale = n / m
    wide = max(scale, 1.0)
    out = np.zeros((m, n))
    for row in range(m):
        center = scale * (row + 0.5)
        first, last = max(int(center - 2 * wide + 0.5), 0), min(int(center + 2 * wide + 0.5), n)
        out[row, first:last] = [_keys(abs(tap + 0.5 - center) / wide, a) for tap in range(first, last)]
    return out / out.sum(1, keepdims=True)


def _keys(d: float, a: float) -> float:
    """Keys' cubic kernel at distance d >= 0."""
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0
