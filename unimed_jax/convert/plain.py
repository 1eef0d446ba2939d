"""What a checkpoint may hold beside its tensors: plain values, in containers of bounded depth and size."""

from __future__ import annotations

from typing import Any

import numpy as np

from unimed_jax.convert.mapped import shown

MAX_DEPTH = 64  # of nested containers
MAX_VALUES = 500_000  # shared ones counted each time
KEYS = {str, int, float, bool, type(None)}  # others can be costly to hash
LEAVES = KEYS | {bytes, np.ndarray}


class Invalid(Exception):
    """Something in a file makes no sense; the words say what. Whoever knows the file's name makes a DataError of it."""


def bare(name: str) -> str:
    """A dotted name as it is when it looks like one, else quoted and escaped."""
    plain = len(name) <= 100 and all(part.isidentifier() for part in name.split("."))
    return name if plain else shown(name)


def check_plain(value: Any) -> None:
    """Refuses what is not plain, holds itself, is nested deeply, or is large once shared parts are written out.

    Raises:
        Invalid: saying what is wrong.
    """
    known: dict[int, tuple[int, int]] = {}
    open_now: set[int] = set()

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Number of values and levels."""
        kind = type(value)
        if kind in LEAVES:
            return 1, 0
        if kind not in (dict, list, tuple):
            raise Invalid(f"it holds {bare(getattr(value, 'name', kind.__name__))} as a value")
        if id(value) in known:
            return known[id(value)]
        if id(value) in open_now:
            raise Invalid("a value holds itself")
        n, levels = 1, 0
        if depth <= MAX_DEPTH:
            open_now.add(id(value))
            for v in value.values() if kind is dict else value:
                inner = measure(v, depth + 1)
                n, levels = n + inner[0], max(levels, inner[1])
            open_now.discard(id(value))
        if depth > MAX_DEPTH or levels >= MAX_DEPTH:  # the second by parts that were measured before
            raise Invalid(f"it is nested more than {MAX_DEPTH} deep")
        if n > MAX_VALUES:
            raise Invalid(f"it has more than {MAX_VALUES} values")
        known[id(value)] = n, levels + 1
        return known[id(value)]

    measure(value, 0)
