"""Exact nearest neighbours: every row of an index is compared with every query, slab by slab, on the device.

Products and sums are float32 at the highest precision, also where the index is float16. One program serves all slabs;
memory does not grow with the index. Of equal scores the row that comes first wins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from unimed_jax import parallel
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate.embedding_table import Index

SLAB = 32768  # rows on the device at once
_QUERIES = 256  # compared at once


def top_k(
    queries: Float[np.ndarray, "q d"],
    slabs: Iterable[Float[np.ndarray | jax.Array, "n d"]],
    k: int,
    *,
    slab: int = SLAB,
    rows: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k rows with the largest inner products, best first.

    Args:
        queries: vectors; unit ones give cosines.
        slabs: the rows, cut anywhere into arrays of at most `slab` rows.
        k: how many; all rows when there are fewer.
        slab: rows that the device gets at once.
        rows: how many there are, where the last slab is filled up with others (`on_device`).
        mesh: devices to share the rows of a slab over; default: one device.

    Returns:
        Scores and row numbers. A row that is not finite comes last, with the score -inf.

    Raises:
        UsageError: for k below 1, or vectors of another length.

    Example:
        >>> scores, rows = top_k(np.eye(2, dtype=np.float32)[:1], [np.array([[0, 1], [1, 0], [1, 0]], np.float16)], 2)
        >>> rows.tolist()
        [[1, 2]]
    """
    queries = np.asarray(queries, np.float32)
    if k < 1 or queries.ndim != 2:
        raise UsageError(f"k is {k}, queries are {list(queries.shape)}", "k >= 1, queries [q, d]")
    blocks = [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]
    size = min(_QUERIES, len(queries))
    asked = [jnp.asarray(_filled(b, size)) for b in blocks]
    best: list[Any] = [None] * len(blocks)
    total, height = 0, 0
    for part in slabs:
        if part.shape[1] != queries.shape[1]:
            raise UsageError(f"queries have {queries.shape[1]} numbers, the index {part.shape[1]}")
        if not height:  # a small index is compared as it is, every other in slabs of one shape
            height = len(part) if len(part) < slab else slab
            height = -(-height // (mesh.size if mesh else 1)) * (mesh.size if mesh else 1)
        for start in range(0, len(part), height):
            piece = part if height == len(part) else part[start : start + height]
            there = _place(_filled(piece, height), mesh)
            count = len(piece) if rows is None else min(len(piece), rows - total)
            for i, q in enumerate(asked):
                if best[i] is None:
                    best[i] = (
                        jnp.asarray(np.full((size, k), -np.inf, np.float32)),  # jnp.full is weakly typed
                        jnp.asarray(np.full((size, k), -1, np.int32)),
                    )
                best[i] = _step(*best[i], q, there, np.int32(total), np.int32(count))
            total += count
    k = min(k, total)
    if not total or not len(queries):
        return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
    scores = np.concatenate([np.asarray(s) for s, _ in best])[: len(queries), :k]
    numbers = np.concatenate([np.asarray(r) for _, r in best])[: len(queries), :k]
    return scores, numbers.astype(np.int64)


def _filled(rows: Any, height: int) -> Any:
    return rows if len(rows) == height else np.pad(np.asarray(rows), ((0, height - len(rows)), (0, 0)))


def _height(rows: int, slab: int) -> int:
    """Slabs of equal size, so that next to nothing is filled up.

    Example:
        >>> _height(100_000, 32_768)
        25000
    """
    return -(-rows // max(1, -(-rows // slab)))


def _place(rows: Any, mesh: Mesh | None) -> jax.Array:
    return jax.device_put(rows, parallel.batch_sharding(mesh)) if mesh else jnp.asarray(rows)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _step(
    best: Float[jax.Array, "q k"],
    numbers: Int[jax.Array, "q k"],
    queries: Float[jax.Array, "q d"],
    rows: Float[jax.Array, "n d"],
    first: Int[jax.Array, ""],
    count: Int[jax.Array, ""],
) -> tuple[jax.Array, jax.Array]:
    """The best so far and a slab to the new best; rows from `count` on are padding."""
    n, k = len(rows), best.shape[1]
    scores = jnp.einsum("qd,nd->qn", queries, rows.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where((jnp.arange(n) < count) & jnp.isfinite(scores), scores, -jnp.inf)
    found, at = jax.lax.top_k(scores, min(k, n))  # of equal ones the first
    at = jnp.where(at < count, at + first, -1)
    found, order = jax.lax.top_k(jnp.concatenate([best, found], 1), k)  # earlier rows stand first
    return found, jnp.take_along_axis(jnp.concatenate([numbers, at], 1), order, 1)


def search(
    index: Index, queries: Float[np.ndarray, "q d"], k: int = 10, *, mesh: Mesh | None = None
) -> list[list[dict[str, Any]]]:
    """For each query the k nearest rows of an index: rank, score, and what is said about the row.

    Args:
        index: the rows.
        queries: unit vectors of the same model (see `check_model`).
        k: how many.
        mesh: see `top_k`.

    Raises:
        UsageError: see `top_k`.
    """
    slabs = index.slabs(_height(len(index), SLAB))
    scores, numbers = top_k(queries, slabs, min(k, max(len(index), 1)), mesh=mesh)
    wanted = sorted(set(numbers.ravel().tolist()) - {-1})
    said = dict(zip(wanted, index.rows(wanted), strict=True))
    return [
        [
            {"rank": rank, "score": float(s), "row": n, **said[n]}
            for rank, (s, n) in enumerate(zip(line, at, strict=True), 1)
            if n >= 0
        ]
        for line, at in zip(scores.tolist(), numbers.tolist(), strict=True)
    ]


def on_device(index: Index, *, slab: int = SLAB) -> list[Float[jax.Array, "n d"]]:
    """A whole index as equal float32 slabs on one device (4 bytes a number), for many queries in turn.

    The last slab is filled up: search it with `top_k(queries, slabs, k, rows=len(index))`.
    """
    height = _height(len(index), slab)
    return [jnp.asarray(_filled(rows, height).astype(np.float32)) for rows in index.slabs(height)]


def check_model(index: Index, digest: str, name: str) -> None:
    """Refuses a model that did not make the index: its vectors mean nothing to each other.

    Raises:
        DataError: naming both by name and hash.
    """
    made = index.facts.model
    if made["sha256"] != digest:
        raise DataError(
            f"the index is of the model {made['name']} (sha256 {made['sha256'][:12]}), not of {name} ({digest[:12]})",
            "give that model, or embed again",
        )
