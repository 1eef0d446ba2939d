"""Position tables of vision transformers at another grid size; numpy only."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from unimed_jax.errors import DataError


def resize_positions(
    pos: Float[np.ndarray, "t d"], grid: int, *, align_corners: bool = False
) -> Float[np.ndarray, "u d"]:
    """Resamples the patch rows of a position table to `grid` x `grid`; row 0 (class token) stays.

    Bicubic (Keys 1981, a = -0.75), clamped borders, no antialias: PyTorch's `interpolate(mode="bicubic")`. The
    default is DINOv2's rule; `align_corners=True` is UniMed-CLIP's.

    Args:
        pos: 1 + n*n rows.
        grid: patches a side wanted.
        align_corners: whether the corner samples keep their values.

    Raises:
        DataError: when the rows are not one class token and a square.

    Example:
        >>> resize_positions(np.ones((1 + 9, 4), np.float32), 5).shape
        (26, 4)
    """
    side = math.isqrt(max(len(pos) - 1, 0))
    if side * side + 1 != len(pos) or side == 0:
        raise DataError(f"a position table of {len(pos)} rows is not a class token and a square grid")
    if side == grid:
        return pos
    weights = cubic_weights(side, grid, align_corners=align_corners)
    patches = pos[1:].astype(np.float64).reshape(side, side, -1)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, patches, optimize=True)
    return np.concatenate([pos[:1], patches.reshape(grid * grid, -1)]).astype(np.float32)


def cubic_weights(
    n: int, m: int, *, align_corners: bool = False, a: float = -0.75
) -> Float[np.ndarray, "m n"]:
    """The matrix of 1-D bicubic interpolation from n to m samples; rows add up to 1."""
    out = np.zeros((m, n))
    for row in range(m):
        x = row * (n - 1) / max(m - 1, 1) if align_corners else (row + 0.5) * n / m - 0.5
        first = math.floor(x)
        for tap in range(first - 1, first + 3):
            d = abs(x - tap)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * (d**3 - 5 * d**2 + 8 * d - 4)
            out[row, min(max(tap, 0), n - 1)] += w
    return out
