"""Contrastive losses over the global batch, exact on any number of devices.

Two layouts give the same value. `ring` (default): every device keeps its rows of image embeddings while the blocks
of text embeddings travel round the devices; a block is compared in tiles, which the backward pass computes again.
The column statistics travel with their block, so both directions come from one pass and temporary memory is
O(rows x tile). `gathered`: own rows against all columns at once, O(rows x batch); simple, and the check on the ring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from unimed_jax.errors import UsageError

AXES = ("data", "fsdp")  # the batch rows are split over both
_FAR = -1e30  # a finite stand-in for minus infinity: differences stay free of NaN
_TIE = 1e-5  # cosine similarities nearer than this count as equal in the top-1 metrics

_ROWS, _ALL = P(AXES), P()

Stat = tuple[Array, Array]
Block = dict[str, Array]  # what is known of some rows: z [n d]; weight w, pos, sometimes id [n]


def contrastive_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Float[Array, ""],
    *,
    bias: Float[Array, ""] | None = None,
    ids: Int[Array, " b"] | None = None,
    mask: Bool[Array, " b"] | None = None,
    mesh: Mesh | None = None,
    kind: str = "clip",
    impl: str = "ring",
    tile: int = 2048,
    dedup: str = "off",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a global batch of pairs, and cheap metrics.

    `clip` is the symmetric InfoNCE: the mean of two cross-entropies over `scale * image @ text.T` with the diagonal
    as targets (arXiv 2103.00020). `sigmoid` is SigLIP's: minus the mean over rows of the summed log-sigmoids of
    `+-(scale * image @ text.T + bias)` (arXiv 2303.15343, equation 2). Everything is float32 at full matmul
    precision, whatever the embeddings' type.

    Args:
        image: unit image embeddings; row i belongs to row i of `text`.
        text: unit text embeddings.
        scale: the factor on cosine similarities (already exponentiated).
        bias: added to every logit; sigmoid only.
        ids: a number per caption; with `dedup="mask"`, different rows of the same number are no negatives.
        mask: rows that count (default all); the others are neither positives nor negatives.
        mesh: devices with axes `data` and `fsdp`, which split the rows; None = this device alone.
        kind: `clip` or `sigmoid`.
        impl: `ring` or `gathered`.
        tile: columns compared at a time (ring); need not divide the rows.
        dedup: `off` or `mask`.

    Returns:
        The loss and `{"i2t_top1", "t2i_top1", "pos_sim"}`: retrieval accuracy within the batch (ties count as
        found) and the mean cosine similarity of the pairs. Metrics carry no gradient.

    Raises:
        UsageError: for an unknown word, ids that are missing, or rows that do not divide over the devices.

    Example:
        >>> eye = jnp.eye(4)
        >>> loss, metrics = contrastive_loss(eye, eye, jnp.float32(100.0))
        >>> round(float(loss), 6), float(metrics["i2t_top1"])
        (0.0, 1.0)
    """
    _check(image.shape[0], kind=kind, impl=impl, dedup=dedup, ids=ids, mesh=mesh)
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    n = image.shape[0]
    valid = jnp.ones(n, jnp.float32) if mask is None else f32(mask)
    pos = jnp.arange(n, dtype=jnp.int32)
    rows: Block = {"w": valid / jnp.maximum(valid.sum(), 1.0), "pos": pos}
    if mask is not None or dedup == "mask":
        rows["id"] = pos if dedup == "off" or ids is None else ids.astype(jnp.int32)
    axes = AXES if mesh is not None and mesh.size > 1 else ()
    compute = _FORMS[impl](_KINDS[kind], mesh if axes else None, axes, tile)
    return compute(f32(image), f32(text), f32(scale), f32(0.0 if bias is None else bias), rows)


def _check(n: int, *, kind: str, impl: str, dedup: str, ids: Any, mesh: Mesh | None) -> None:
    words = {"kind": (kind, _KINDS), "impl": (impl, _FORMS), "dedup": (dedup, ("off", "mask"))}
    for name, (word, known) in words.items():
        if word not in known:
            raise UsageError(f"loss.{name} is {word!r}", f"one of {', '.join(known)}")
    if dedup == "mask" and ids is None:
        raise UsageError("loss.dedup is mask but the batch has no caption ids", 'set loss.dedup="off"')
    if mesh is not None and n % mesh.size:
        raise UsageError(f"{n} rows do not divide over {mesh.size} devices", "change batch_size or mesh")


# --- pieces that both losses and both layouts share -----------------------------------------------------------


def _matmul(a: Array, b: Array) -> Array:
    # The default precision is TF32 on GPUs and bfloat16 on TPUs: too coarse for logits of up to 100.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _negatives(rows: Block, cols: Block) -> Array:
    """bool[n m]: the pairs that count as negatives."""
    other = rows["pos"][:, None] != cols["pos"][None]
    if "id" not in rows:
        return other
    real = (rows["w"] > 0)[:, None] & (cols["w"] > 0)[None]
    return other & real & (rows["id"][:, None] != cols["id"][None])


def _logits(rows: Block, cols: Block, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Similarities and logits f32[n m]; what is no negative has a logit of -1e30.

    The positives are left out, too: they are added at the end, so that nothing cancels when the loss is small.
    """
    sim = _matmul(rows["z"], cols["z"].T)
    return sim, jnp.where(_negatives(rows, cols), scale * sim + bias, _FAR)


def _metrics(
    w: Array, sim: Array, own: Array, best_row: Array, best_col: Array, scale: Array
) -> dict[str, Array]:
    own = own + scale * _TIE
    return {
        "i2t_top1": jnp.sum(w * (own >= best_row)),
        "t2i_top1": jnp.sum(w * (own >= best_col)),
        "pos_sim": jnp.sum(w * sim),
    }


def _psum(tree: Any, axes: tuple[str, ...]) -> Any:
    return lax.psum(tree, axes) if axes else tree


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    # Inside shard_map a constant is known to be the same everywhere; a scan's carry must not claim that.
    return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), tree) if axes else tree


def _shard(f: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    return f if mesh is None else jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


class _Kind(NamedTuple):
    """What tells the two losses apart; for both the loss is `sum_i w_i (cost(row i) + cost(column i)) / 2`.

    The level of a row or column sums up its negatives; `own` is the logit of its positive pair.
    """

    merge: Callable[[Stat, Array, int], Stat]  # takes in more logits along an axis; Stat = (maximum, sum)
    level: Callable[[Stat], Array]
    dense: Callable[[Array], Array]  # the level of whole rows, for JAX to differentiate
    cost: Callable[[Array, Array], Array]  # of (level, own)
    push: Callable[[Array, Array], Array]  # minus d cost / d own
    norm: Callable[[Array, Array], Array]  # of (level, own): what slope needs
    slope: Callable[[Array, Array], Array]  # d cost / d logit of a negative, from the logits and the norm


def _merge_lse(stat: Stat, out: Array, axis: int) -> Stat:
    high, total = stat
    new = jnp.maximum(high, out.max(axis))
    return new, total * jnp.exp(high - new) + jnp.exp(out - jnp.expand_dims(new, axis)).sum(axis)


def _merge_sum(stat: Stat, out: Array, axis: int) -> Stat:
    high, total = stat
    return jnp.maximum(high, out.max(axis)), total + jax.nn.softplus(out).sum(axis)


_KINDS = {
    "clip": _Kind(  # -log(e^own / (e^own + sum of e^negative))
        merge=_merge_lse,
        level=lambda stat: stat[0] + jnp.log(stat[1]),
        dense=lambda out: jax.nn.logsumexp(out, -1),
        cost=lambda level, own: jax.nn.softplus(level - own),
        push=lambda level, own: jax.nn.sigmoid(level - own),
        norm=jnp.logaddexp,
        slope=lambda out, norm: jnp.exp(out - norm),
    ),
    "sigmoid": _Kind(  # -log sigmoid(own) - sum of log sigmoid(-negative)
        merge=_merge_sum,
        level=lambda stat: stat[1],
        dense=lambda out: jax.nn.softplus(out).sum(-1),
        cost=lambda level, own: level + jax.nn.softplus(-own),
        push=lambda level, own: jax.nn.sigmoid(-own),
        norm=lambda level, own: level,
        slope=lambda out, norm: jax.nn.sigmoid(out),
    ),
}


# --- gathered -------------------------------------------------------------------------------------------------


def _gathered(kind: _Kind, mesh: Mesh | None, axes: tuple[str, ...], tile: int) -> Callable:
    """Own rows against all columns; differentiated by JAX, through the gather."""
    del tile

    def local(image, text, scale, bias, rows):
        a, b = {"z": image, **rows}, {"z": text, **rows}
        gather = lambda x: lax.all_gather(x, axes, tiled=True) if axes else x
        out = _logits(a, jax.tree.map(gather, b), scale, bias)[1]  # own images, all texts
        back = _logits(b, jax.tree.map(gather, a), scale, bias)[1]  # own texts, all images
        sim = jnp.sum(image * text, -1)
        own = scale * sim + bias
        loss = jnp.sum(rows["w"] * 0.5 * (kind.cost(kind.dense(out), own) + kind.cost(kind.dense(back), own)))
        metrics = _metrics(rows["w"], sim, own, out.max(-1), back.max(-1), scale)
        return _psum((loss, lax.stop_gradient(metrics)), axes)

    return _shard(local, mesh, (_ROWS, _ROWS, _ALL, _ALL, _ROWS), _ALL)


# --- ring -----------------------------------------------------------------------------------------------------


def _ring(kind: _Kind, mesh: Mesh | None, axes: tuple[str, ...], tile: int) -> Callable:
    """Text blocks visit all devices; a tile of logits exists only while it is looked at."""
    size = 1 if mesh is None else mesh.size
    forward = _shard(
        functools.partial(_forward, kind, axes, size, tile),
        mesh,
        (_ROWS, _ROWS, _ALL, _ALL, _ROWS),
        (_ALL, _ALL, (_ROWS, _ROWS)),
    )
    backward = _shard(
        functools.partial(_backward, kind, axes, size, tile),
        mesh,
        (_ROWS, _ROWS, _ALL, _ALL, _ROWS, (_ROWS, _ROWS), _ALL),
        (_ROWS, _ROWS, _ALL, _ALL),
    )

    @jax.custom_vjp
    def loss(image, text, scale, bias, rows):
        return forward(image, text, scale, bias, rows)[:2]

    def fwd(*args):
        value, metrics, levels = forward(*args)
        return (value, metrics), (*args, levels)

    def bwd(residuals, cotangents):
        return *backward(*residuals, cotangents[0]), None  # rows are numbers of the batch, not learned

    loss.defvjp(fwd, bwd)
    return loss


def _forward(kind, axes, size, tile, image, text, scale, bias, rows):
    """One device's part of the loss: (loss, metrics, (row levels, column levels))."""
    a, b = {"z": image, **rows}, {"z": text, **rows}

    def compare(stat, cols):
        block, col_stat = cols
        _, out = _logits(a, block, scale, bias)
        return kind.merge(stat, out, 1), kind.merge(col_stat, out, 0)

    def visit(stat, travel):
        stat, col_stat = _scan_tiles(compare, stat, travel, tile)
        return stat, (travel[0], col_stat)

    fresh = _varying((jnp.full(len(image), _FAR), jnp.zeros(len(image))), axes)
    row_stat, (_, col_stat) = _round(visit, fresh, (b, fresh), axes, size)
    levels = kind.level(row_stat), kind.level(col_stat)
    sim = jnp.sum(image * text, -1)
    own = scale * sim + bias
    loss = jnp.sum(rows["w"] * 0.5 * (kind.cost(levels[0], own) + kind.cost(levels[1], own)))
    metrics = _metrics(rows["w"], sim, own, row_stat[0], col_stat[0], scale)
    return *_psum((loss, metrics), axes), levels


def _backward(kind, axes, size, tile, image, text, scale, bias, rows, levels, g):
    """One device's gradients for image and text rows, and the global ones for scale and bias."""
    a, b = {"z": image, **rows}, {"z": text, **rows}
    sim_own = jnp.sum(image * text, -1)
    own = scale * sim_own + bias
    row_norm, col_norm = (kind.norm(level, own) for level in levels)

    def compare(grads, cols):
        d_image, d_scale, d_bias = grads
        block, norm, d_text = cols
        sim, out = _logits(a, block, scale, bias)
        by_row = a["w"][:, None] * kind.slope(out, row_norm[:, None])
        by_col = block["w"] * kind.slope(out, norm)
        p = 0.5 * g * (by_row + by_col)  # d loss / d logit
        d_image = d_image + scale * _matmul(p, block["z"])
        return (d_image, d_scale + jnp.sum(p * sim), d_bias + jnp.sum(p)), d_text + scale * _matmul(
            p.T, image
        )

    def visit(grads, travel):
        grads, d_text = _scan_tiles(compare, grads, travel, tile)
        return grads, (*travel[:2], d_text)

    zero = _varying(jnp.zeros(()), axes)
    stay, travel = (jnp.zeros_like(image), zero, zero), (b, col_norm, jnp.zeros_like(text))
    (d_image, d_scale, d_bias), (_, _, d_text) = _round(visit, stay, travel, axes, size)
    push = 0.5 * g * rows["w"] * (kind.push(levels[0], own) + kind.push(levels[1], own))
    d_image -= scale * push[:, None] * text
    d_text -= scale * push[:, None] * image
    d_scale, d_bias = _psum((d_scale - jnp.sum(push * sim_own), d_bias - jnp.sum(push)), axes)
    return d_image, d_text, d_scale, d_bias


def _round(visit: Callable, stay: Any, travel: Any, axes: tuple[str, ...], size: int) -> Any:
    """Calls `visit(stay, travel)` on every device for every block; each block ends where it began."""
    if size == 1:
        return visit(stay, travel)
    ahead = [(i, (i + 1) % size) for i in range(size)]

    def hop(carry, _):
        stay, travel = visit(*carry)
        return (stay, jax.tree.map(lambda x: lax.ppermute(x, axes, ahead), travel)), None

    return lax.scan(hop, (stay, travel), None, length=size)[0]


def _scan_tiles(f: Callable, carry: Any, xs: Any, tile: int) -> Any:
    """`lax.scan` over slices of `tile` rows of every leaf; a rest shorter than `tile` comes last."""
    n = jax.tree.leaves(xs)[0].shape[0]
    whole = n - n % tile
    parts = []
    if whole:
        tiles = jax.tree.map(lambda x: x[:whole].reshape(-1, tile, *x.shape[1:]), xs)
        carry, ys = lax.scan(f, carry, tiles)
        parts.append(jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys))
    if whole < n:
        carry, ys = f(carry, jax.tree.map(lambda x: x[whole:], xs))
        parts.append(ys)
    return carry, jax.tree.map(lambda y, *rest: jnp.concatenate((y, *rest)) if rest else y, *parts)


_FORMS = {"ring": _ring, "gathered": _gathered}
