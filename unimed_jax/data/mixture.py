"""The order of the training data as a function: position in the stream -> (source, record, epoch).

Nothing is drawn from a running generator, so there is no state to save: the position is the step times the batch
size. Within an epoch of the mixture every source appears a fixed number of times, in an order shuffled over all
sources. Each source also counts its own epochs and goes through all of its records, freshly shuffled, before any
of them comes again, whatever its weight.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from unimed_jax.errors import UsageError

_CHUNK = 1 << 18  # positions counted at a time: a few megabytes


class Draw(NamedTuple):
    """One element of the stream."""

    source: int  # index into Mixture.names
    record: int  # index within the source's split
    epoch: int  # how often the source was read completely before


@dataclass(slots=True, frozen=True, kw_only=True)
class Mixture:
    """Several sources as one endless shuffled stream.

    Attributes:
        names: of the sources.
        sizes: records of each source.
        draws: how often each source is drawn in one epoch of the mixture.
        seed: of the shuffle.

    Example:
        >>> mix = Mixture(names=("a", "b"), sizes=(3, 2), draws=(3, 4), seed=0)
        >>> sorted(mix.locate(i)[:2] for i in range(mix.epoch_examples))
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 0), (1, 1), (1, 1)]
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int

    @property
    def epoch_examples(self) -> int:
        """Elements in one epoch of the mixture."""
        return sum(self.draws)

    def locate(self, position: int) -> Draw:
        """Returns what stands at a position of the stream (0-based, over all epochs)."""
        epoch, offset = divmod(position, self.epoch_examples)
        slot = permute(offset, self.epoch_examples, keys_of(self.seed, "mixture", epoch))
        ends = _ends(self.draws)
        source = bisect.bisect_right(ends, slot)
        nth = epoch * self.draws[source] + slot - (ends[source] - self.draws[source])
        source_epoch, place = divmod(nth, self.sizes[source])
        keys = keys_of(self.seed, f"source/{self.names[source]}", source_epoch)
        return Draw(source, permute(place, self.sizes[source], keys), source_epoch)

    def counts(self, position: int) -> tuple[int, ...]:
        """Returns how often each source stands before a position of the stream: `draws` for a whole epoch.

        Example:
            >>> mix = Mixture(names=("a", "b"), sizes=(3, 2), draws=(3, 4), seed=0)
            >>> mix.counts(14), sum(mix.counts(17))
            ((6, 8), 17)
        """
        epoch, rest = divmod(position, self.epoch_examples)
        counts = np.array(self.draws) * epoch
        keys, ends = keys_of(self.seed, "mixture", epoch), np.array(_ends(self.draws), np.uint64)
        for start in range(0, rest, _CHUNK):
            offsets = np.arange(start, min(start + _CHUNK, rest), dtype=np.uint64)
            slots = permute_all(offsets, self.epoch_examples, keys)
            sources = np.searchsorted(ends, slots, side="right")
            counts += np.bincount(sources, minlength=len(self.draws))
        return tuple(counts.tolist())


def draws_per_epoch(
    sizes: Sequence[int], weights: Sequence[float], mode: str, temperature: float = 1.0
) -> tuple[int, ...]:
    """Returns how often each source is drawn in one epoch of the mixture, at least once each.

    Args:
        sizes: records of each source.
        weights: relative, above 0.
        mode: "size": weight x records, so weights of 1 read every record exactly once an epoch; "weight": the
            weights alone give the shares, and an epoch is as long as all records together; "temperature": so it is,
            and the shares are those of weight x records^(1/temperature), which lifts small sources (mT5, arXiv
            2010.11934, section 3.2).
        temperature: 1 for the shares of the sizes; the larger, the more equal the sources.

    Raises:
        UsageError: for an unknown mode.

    Example:
        >>> draws_per_epoch([100, 10], [1, 2], "size"), draws_per_epoch([100, 10], [1, 1], "weight")
        ((100, 20), (55, 55))
        >>> draws_per_epoch([10_000, 100], [1, 1], "temperature", 2)
        (9182, 918)
    """
    if mode == "size":
        return tuple(max(1, round(w * n)) for w, n in zip(weights, sizes, strict=True))
    if mode not in ("weight", "temperature"):
        raise UsageError(f"config: data.mixture is {mode!r}", "size, weight or temperature")
    power = 1 / temperature if mode == "temperature" else 0
    masses = [w * n**power for w, n in zip(weights, sizes, strict=True)]
    return tuple(max(1, round(sum(sizes) * m / sum(masses))) for m in masses)


def permute(index: int, n: int, keys: tuple[int, ...]) -> int:
    """Returns the place of `index` in a pseudo-random permutation of range(n): a bijection, without a table.

    A Feistel network over the rows and columns of the smallest rectangle that holds n (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): a number that falls outside is sent through again. It costs
    microseconds at any n, where ciphers on whole bits walk through thousands of numbers for a small one.

    Args:
        index: in range(n).
        n: length of the permutation.
        keys: which permutation, see `keys_of`.

    Example:
        >>> sorted(permute(i, 5, keys_of(0, "example", 0)) for i in range(5))
        [0, 1, 2, 3, 4]
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    while True:
        row, column = divmod(index, columns)
        for k in range(0, len(keys), 2):
            row = (row + _mix(column ^ keys[k])) % rows
            column = (column + _mix(row ^ keys[k + 1])) % columns
        index = row * columns + column
        if index < n:
            return index


def permute_all(indices: UInt64[np.ndarray, "m"], n: int, keys: tuple[int, ...]) -> UInt64[np.ndarray, "m"]:
    """`permute` of many numbers at once: millions a second, where a few are quicker one by one.

    Example:
        >>> keys = keys_of(0, "example", 0)
        >>> permute_all(np.arange(5, dtype=np.uint64), 5, keys).tolist() == [permute(i, 5, keys) for i in range(5)]
        True
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    out = np.array(indices, np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        row, column = np.divmod(out[outside], np.uint64(columns))
        for k in range(0, len(keys), 2):
            # The remainder comes before the sum, too: 64 bits wrap where Python's integers grow.
            row = (row + _mix_all(column ^ np.uint64(keys[k])) % np.uint64(rows)) % np.uint64(rows)
            column = (column + _mix_all(row ^ np.uint64(keys[k + 1])) % np.uint64(columns)) % np.uint64(
                columns
            )
        out[outside] = row * np.uint64(columns) + column
        outside = outside[out[outside] >= n]
    return out


def _mix_all(x: UInt64[np.ndarray, "m"]) -> UInt64[np.ndarray, "m"]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """Scrambles 64 bits (the finaliser of SplitMix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=4096)
def keys_of(seed: int, purpose: str, epoch: int) -> tuple[int, ...]:
    """Returns eight 64-bit keys that depend on all three; equal on every machine and Python."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=64).digest()
    return tuple(np.frombuffer(digest, "<u8").tolist())


# Numbers drawn for one purpose never move those of another.
STREAMS = {"caption": 0, "image": 1}


def generator(seed: int, source: str, draw: Draw, stream: str) -> np.random.Generator:
    """Returns the generator of one record in one epoch: a pure function of (seed, source name, epoch, record).

    Example:
        >>> one, two = (generator(0, "a", Draw(0, 5, 1), "image").integers(1000) for _ in range(2))
        >>> bool(one == two)
        True
    """
    counter = [0, STREAMS[stream], draw.record, draw.epoch]
    return np.random.Generator(np.random.Philox(key=_key(seed, source), counter=counter))


@functools.lru_cache(maxsize=4096)
def _key(seed: int, source: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=16).digest(), "little")


@functools.lru_cache(maxsize=64)
def _ends(draws: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(draws))
