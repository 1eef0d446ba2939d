"""Perceptual hashes: 64 bits that survive re-encoding, resizing, small crops and changes of brightness.

The picture in gray is reduced to 32 x 32; bit k says whether coefficient k of its lowest 8 x 8 frequencies (of the
two-dimensional DCT-II, without those that are constant along an axis) is above their median (the idea is that of
Zauner's pHash, 2010). A small band above the median counts as below: coefficients of a mirror-symmetric picture are
zero there, and noise would decide. Flips, rotations
and larger crops change the hash.
"""

from __future__ import annotations

import functools
import hashlib
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64
from PIL import Image

from unimed_jax.errors import DataError, UsageError

DISTANCE = 10  # bits in which two hashes of one picture may differ; docs/data.md says what this finds
FURTHEST = 15  # above this, hashes of unrelated pictures are too often as near
_SIDE, _FREQUENCIES = 32, 8
_BAND = 1e-3  # of the length of all coefficients
_FLAT = 2.0  # gray levels: a standard deviation below this is no picture that could be recognised
_SQUARE = 1.02  # long side over short side, below which a picture is a square
_BANDS, _BITS = 4, 16
_AT_ONCE = 1 << 22  # candidates
_MOST = 20_000_000  # pairs


@functools.cache
def _cosines() -> Float[np.ndarray, "8 32"]:
    """Rows 1 to 8 of the orthonormal DCT-II of 32 points."""
    k, n = np.arange(1, _FREQUENCIES + 1)[:, None], np.arange(_SIDE)[None]
    return np.sqrt(2 / _SIDE) * np.cos(np.pi * (2 * n + 1) * k / (2 * _SIDE))


def phash(pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> int | None:
    """The 64 bits of a picture; None for one that is nearly of one gray.

    Example:
        >>> gradient = np.add.outer(np.arange(64), 3 * np.arange(80)).astype(np.uint8)
        >>> a, b = phash(gradient), phash(gradient[::2, ::2])
        >>> a is not None and b is not None and (a ^ b).bit_count() <= DISTANCE, phash(gradient * 0)
        (True, None)
    """
    gray = Image.fromarray(pixels).convert("L")
    small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    if small.std() < _FLAT:
        return None
    found = (_cosines() @ small @ _cosines().T).ravel()
    bits = found > np.median(found) + _BAND * np.linalg.norm(found)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def phashes(pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> tuple[int, ...]:
    """The hashes of a picture and, unless it is a square, of its middle square, which is what many copies keep.

    Example:
        >>> gradient = np.add.outer(np.arange(64), 3 * np.arange(80)).astype(np.uint8)
        >>> len(phashes(gradient)), len(phashes(gradient[:, :64])), phashes(gradient * 0)
        (2, 1, ())
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    found = [phash(pixels)]
    if max(height, width) > _SQUARE * side:
        top, left = (height - side) // 2, (width - side) // 2
        found.append(phash(np.ascontiguousarray(pixels[top : top + side, left : left + side])))
    return tuple(h for h in found if h is not None)


def prints(pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> tuple[bytes, tuple[int, ...]]:
    """What identifies a decoded picture: 16 bytes of a digest of shape and values, and its hashes."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()[:16], phashes(pixels)


def near(
    a: UInt64[np.ndarray, "n"], b: UInt64[np.ndarray, "m"], distance: int = DISTANCE
) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"], Int[np.ndarray, "p"]]:
    """All pairs of hashes that differ in at most `distance` bits, exactly.

    Of four bands of 16 bits at least one differs in at most a quarter of them: every value of a band of `b` so close
    is looked up in a table of `a` (multi-index hashing, Norouzi et al., arXiv 1307.2982), and only what is found there
    is compared in full.

    Returns:
        Positions in `a`, positions in `b`, and bits, ordered by position in `b`, then bits, then position in `a`.

    Raises:
        UsageError: for a distance outside 0 to `FURTHEST`.
        DataError: for more than 20 million pairs.

    Example:
        >>> a, b, bits = near(np.array([0, 7, 255], np.uint64), np.array([3], np.uint64), 2)
        >>> a.tolist(), b.tolist(), bits.tolist()
        ([1, 0], [0, 0], [1, 2])
    """
    if not 0 <= distance <= FURTHEST:
        raise UsageError(f"distance is {distance}", f"0 to {FURTHEST} bits")
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    codes: list[np.ndarray] = []  # position in b, bits, position in a, as one number
    for band in range(_BANDS):
        keys = _band(a, band)
        order = np.argsort(keys, kind="stable")
        table, starts = a[order], np.searchsorted(keys[order], np.arange((1 << _BITS) + 1))
        asked = _band(b, band)
        for mask in _masks(distance // _BANDS):
            first = starts[asked ^ mask]
            count = starts[(asked ^ mask) + 1] - first
            for rows, places in _candidates(first, count):
                bits = np.bitwise_count(table[places] ^ b[rows])
                hit = bits <= distance
                codes.append((rows[hit] * 64 + bits[hit]) * len(a) + order[places[hit]])
            if sum(map(len, codes)) > _MOST:
                codes = [_unique(codes, distance)]
    found = _unique(codes, distance)
    rest, at = np.divmod(found, max(len(a), 1))
    return at, rest // 64, rest % 64


def _unique(codes: list[np.ndarray], distance: int) -> np.ndarray:
    """Pairs, each once: several bands find the same."""
    found = np.unique(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
    if len(found) > _MOST:
        raise DataError(
            f"more than {_MOST} pairs of pictures differ in at most {distance} bits", "a smaller distance"
        )
    return found


def _band(hashes: UInt64[np.ndarray, "n"], band: int) -> Int[np.ndarray, "n"]:
    return ((hashes >> np.uint64(band * _BITS)) & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def _masks(radius: int) -> list[int]:
    """All numbers of 16 bits with at most `radius` ones."""
    return [sum(1 << k for k in c) for r in range(radius + 1) for c in combinations(range(_BITS), r)]


def _candidates(first: Int[np.ndarray, "m"], count: Int[np.ndarray, "m"]):
    """(rows, places) of the runs `first[i] : first[i] + count[i]`, about `_AT_ONCE` places at a time."""
    ends = np.cumsum(count)
    start = 0
    while start < len(count):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _AT_ONCE)))
        n = count[start:stop]
        rows = np.repeat(np.arange(start, stop), n)
        offsets = np.arange(len(rows)) - np.repeat(ends[start:stop] - n - done, n)
        yield rows, np.repeat(first[start:stop], n) + offsets
        start = stop
