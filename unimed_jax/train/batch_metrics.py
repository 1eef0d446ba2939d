"""What a training step says about its batch: false negatives, padding, sources. Computed on the devices.

All are functions of the global batch, so they are the same on any mesh and number of processes; none enters the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from unimed_jax import config, parallel
from unimed_jax.models import text


def same_captions(
    ids: Int[Array, " b"], mask: Bool[Array, " b"] | None = None
) -> dict[str, Float[Array, ""]]:
    """How many pairs of a batch are false negatives because their captions are equal.

    Args:
        ids: a number at least 0 per caption, equal for equal captions.
        mask: rows that count; default all.

    Returns:
        `same_caption_rate`, the share of rows whose caption another row has too, and `same_caption_pairs`, the share
        of equal captions among all pairs of different rows.

    Example:
        >>> {k: float(v) for k, v in same_captions(jnp.array([5, 5, 7, 9])).items()}
        {'same_caption_rate': 0.5, 'same_caption_pairs': 0.1666666716337204}
    """
    b = ids.shape[0]
    rows = jnp.arange(b, dtype=jnp.int32)
    valid = jnp.ones(b, bool) if mask is None else mask
    ordered = jnp.sort(jnp.where(valid, ids.astype(jnp.int32), -1 - rows))  # others: numbers of their own
    group = jnp.cumsum(jnp.diff(ordered, prepend=ordered[:1]) != 0)
    sizes = jax.ops.segment_sum(jnp.ones(b, jnp.int32), group, b, indices_are_sorted=True)
    n = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    # Shares before products: the square of a batch's rows may exceed 32 bits.
    pairs = jnp.sum(sizes / n * (jnp.maximum(sizes - 1, 0) / jnp.maximum(n - 1, 1)))
    return {
        "same_caption_rate": jnp.sum(jnp.where(sizes > 1, sizes, 0)) / n,
        "same_caption_pairs": pairs,
    }


def text_padding(lengths: Int[Array, "parts shards n"], m: config.Model, width: int) -> Float[Array, ""]:
    """The share of padding among the token positions that the text tower computes.

    Args:
        lengths: tokens of each caption, by micro-batch and device: each decides for itself which widths it can take.
        m: the model; its `text_groups` count.
        width: of the batch's tokens.
    """
    positions = jax.vmap(lambda part: text.positions(part, m.text_groups, width))(lengths)
    return 1 - lengths.sum() / positions.sum()


def of_batch(
    batch: Mapping[str, Array], model: text.Text, cfg: config.Train, mesh: Mesh, sources: int
) -> dict[str, Array]:
    """All metrics that the columns of a batch allow.

    Args:
        batch: as the step gets it; features in the place of tokens have no padding.
        model: the text tower, for what counts as a token.
        cfg: the experiment.
        mesh: devices that the rows are split over.
        sources: sources of the mixture, numbered by the column `source`; 0 = they are not counted.

    Returns:
        `same_caption_rate`, `same_caption_pairs`, `text_padding` f32[] and `examples` i32[sources], the rows read of
        each source.
    """
    out: dict[str, Array] = {}
    everywhere = lambda name: lax.with_sharding_constraint(batch[name], parallel.replicated(mesh))
    mask = everywhere("mask") if "mask" in batch else None
    if "caption_id" in batch:
        out |= same_captions(everywhere("caption_id"), mask)
    tokens = batch["tokens"]
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        lengths = model.lengths(tokens)
        # A micro-batch has an equal share of every device's rows (train/step.py).
        by_part = lengths.reshape(mesh.size, cfg.optim.accum_steps, -1).swapaxes(0, 1)
        out["text_padding"] = text_padding(by_part, cfg.model, tokens.shape[1])
    if sources and "source" in batch:
        rows = jnp.ones(tokens.shape[0], jnp.int32) if mask is None else mask.astype(jnp.int32)
        out["examples"] = jax.ops.segment_sum(rows, everywhere("source"), sources)
    return out
