"""A fingerprint of arrays that does not depend on how they are sharded.

Orbax restores flipped bits silently. Each leaf therefore gets 64 bits: its elements, bit-cast to unsigned integers,
are summed modulo 2^32 under two sets of odd pseudo-random weights, one per position. Integer addition is exact and
commutes, so every mesh and every process count gives the same value; odd weights are invertible modulo 2^32, so a
change of any single element always shows. It is a check against accidents, not against an adversary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from unimed_jax.errors import DataError
from unimed_jax.parallel import leaf_path

_SALTS = (0x9E3779B9, 0x85EBCA6B)


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, names joined with "/"; None and empty containers vanish.

    Example:
        >>> leaf_paths({"a": {"b": 1}, "c": (2, 3)})
        {'a/b': 1, 'c/0': 2, 'c/1': 3}
    """
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _words(x: Any) -> UInt32[Array, "..."]:
    """The bits of an array as uint32; 64-bit elements give two words each, in a last axis of two."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(i: UInt32[Array, "..."], salt: int) -> UInt32[Array, "..."]:
    """An odd weight for each position: a multiply-xor-shift hash with its last bit set."""
    h = (i ^ jnp.uint32(salt)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return (h ^ (h >> 16)) | jnp.uint32(1)


@jax.jit  # one program per shape and sharding: moments share those of their parameters
def _sums(x: Any) -> UInt32[Array, "2"]:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # no reshape: it would gather a sharded array
        position = position + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= words.shape[axis]
    return jnp.stack([jnp.sum(words * _mix(position, salt), dtype=jnp.uint32) for salt in _SALTS])


def fingerprint(tree: Any) -> dict[str, str]:
    """One fingerprint per leaf: "dtype[shape]:16 hex digits", the same for every sharding of the same values.

    Example:
        >>> fingerprint({"w": jnp.arange(3.0)}) == fingerprint({"w": np.arange(3, dtype=np.float32)})
        True
    """
    leaves = leaf_paths(tree)
    # One after the other: each may hold a collective, and CPU devices deadlock with several of them in flight.
    sums = [jax.device_get(_sums(x)) for x in leaves.values()]
    return {
        path: f"{describe(leaf)}:{int(a):08x}{int(b):08x}"
        for (path, leaf), (a, b) in zip(leaves.items(), sums, strict=True)
    }


def describe(leaf: Any) -> str:
    """The type and shape of an array in one word.

    Example:
        >>> describe(np.zeros((2, 3), np.float32))
        'float32[2,3]'
    """
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def require_same_tree(saved: dict[str, str], wanted: dict[str, str], where: str) -> None:
    """Compares two descriptions by path (`describe`, or a fingerprint whose sum is ignored).

    Raises:
        DataError: with the four lists missing, unexpected, mis-shaped and mis-typed.
    """
    saved, wanted = ({p: d.split(":")[0] for p, d in t.items()} for t in (saved, wanted))
    both = saved.keys() & wanted.keys()
    lists = {
        "missing": sorted(wanted.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - wanted.keys()),
        "mis-shaped": [
            f"{p} {_pair(saved[p], wanted[p])}" for p in sorted(both) if _shape(saved[p], wanted[p])
        ],
        "mis-typed": [
            f"{p} {_pair(saved[p], wanted[p])}" for p in sorted(both) if _dtype(saved[p], wanted[p])
        ],
    }
    if any(lists.values()):
        text = "; ".join(f"{name} {len(v)}: {', '.join(v[:6])}{' ...' if len(v) > 6 else ''}"
                         for name, v in lists.items() if v)  # fmt: skip
        raise DataError(
            f"{where} holds another architecture or optimizer: {text}",
            "use the config that made it (config.json in its run folder), or another workdir",
        )


def _pair(saved: str, wanted: str) -> str:
    return f"(is {saved}, must be {wanted})"


def _shape(a: str, b: str) -> bool:
    return a.split("[")[1] != b.split("[")[1]


def _dtype(a: str, b: str) -> bool:
    return a.split("[")[0] != b.split("[")[0]
