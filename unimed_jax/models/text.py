"""Text transformers: BERT (post-norm, bidirectional) and CLIP's (pre-norm, causal), by `config.Text`.

BERT: Devlin et al. 2018; CLIP's: Radford et al. 2021, section 2.4. Tokens are padded at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unimed_jax import config
from unimed_jax.errors import UsageError
from unimed_jax.models import layers
from unimed_jax.models.layers import Compute
from unimed_jax.models.vision import clip_stds, projection

Groups = tuple[tuple[int, float], ...]  # (width in tokens, share of the batch)


class Text(nnx.Module):
    """A text transformer with its projection."""

    def __init__(
        self, c: config.Text, embed_dim: int, *, groups: Groups = (), compute: Compute, rngs: nnx.Rngs
    ):
        self.kind, self.depth, self.max_positions = c.kind, c.depth, c.max_positions
        self.pool, self.pad_id, self.eot_id, self.dropout = c.pool, c.pad_id, c.eot_id, c.dropout
        self.groups, self.compute = tuple((int(w), float(share)) for w, share in groups), compute
        bert = c.kind == "bert"
        shape = layers.BlockShape(
            c.width,
            c.heads,
            c.mlp_dim,
            c.act,
            c.ln_eps,
            post_norm=bert,
            causal=not bert,
            dropout=c.dropout,
            stds=(0.02, 0.02, 0.02, 0.02) if bert else clip_stds(c.width, c.depth),
        )
        self.word = _table(c.vocab_size, c.width, 0.02, rngs)
        self.pos = _table(c.max_positions, c.width, 0.02 if bert else 0.01, rngs)
        if bert:
            self.type = _table(2, c.width, 0.02, rngs)
            self.ln_embed = layers.LayerNorm(c.width, c.ln_eps)
        self.blocks = layers.make_blocks(c.depth, shape, compute=compute, rngs=rngs)
        if not bert:
            self.ln_final = layers.LayerNorm(c.width, c.ln_eps)
        if head := projection(c.proj, c.width, embed_dim, compute=compute, rngs=rngs):
            self.proj = head

    def __call__(
        self,
        tokens: Int[Array, "b t"] | Float[Array, "b w"],
        *,
        key: PRNGKeyArray | None = None,
        shards: int = 1,
    ) -> Float[Array, "b d"]:
        """Text embeddings, not normalised: the projection of `features`, or of features computed before."""
        floats = jnp.issubdtype(tokens.dtype, jnp.floating)
        x = tokens if floats else self.features(tokens, key=key, shards=shards)
        return (self.proj(x) if hasattr(self, "proj") else x).astype(jnp.float32)

    def features(
        self, tokens: Int[Array, "b t"], *, key: PRNGKeyArray | None = None, shards: int = 1
    ) -> Float[Array, "b w"]:
        """The pooled token before the projection.

        Args:
            tokens: ids, padded at the end; t may be any width up to the position table.
            key: dropout; None is deterministic.
            shards: data shards that the batch is split over; rows are grouped by length within each.

        Raises:
            UsageError: when t exceeds the position table or b does not divide into the shards.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.max_positions:
            raise UsageError(
                f"tokens have shape {tokens.shape}", f"(batch, at most {self.max_positions}) for this model"
            )
        if any(width < tokens.shape[1] for width, _ in self.groups):
            return self._grouped(tokens, key, shards)
        return self._at_width(tokens, key, self.compute)

    def _at_width(
        self, tokens: Int[Array, "b t"], key: PRNGKeyArray | None, compute: Compute
    ) -> Float[Array, "b w"]:
        """Pooled features before the projection, every row at the width of `tokens`."""
        k_embed, k_blocks = layers.split(key, 2)
        x = self.word[...][tokens] + self.pos[...][: tokens.shape[1]]
        if self.kind == "bert":
            x = layers.dropout(self.ln_embed(x + self.type[...][0]), self.dropout, k_embed)
        valid = self._valid(tokens) if self.kind == "bert" else None
        rows = {"cls": 0, "mean": None, "eot": None}[self.pool]
        if self.pool == "eot":
            rows = self._eot(tokens)
        x = layers.run_blocks(
            self.blocks,
            x.astype(compute.dtype),
            depth=self.depth,
            compute=compute,
            valid=valid,
            rows=rows,
            key=k_blocks,
        )
        if valid is not None and self.pool == "mean":
            n = jnp.maximum(valid.sum(1, keepdims=True), 1)
            return (x.astype(jnp.float32) * valid[..., None]).sum(1) / n
        return self.ln_final(x[:, 0]) if self.kind == "clip" else x[:, 0]

    def _valid(self, tokens: Int[Array, "b t"]) -> Bool[Array, "b t"]:
        return tokens != self.pad_id

    def _eot(self, tokens: Int[Array, "b t"]) -> Int[Array, " b"]:
        # OpenAI's model pools at the largest id; a checkpoint with added tokens names its end token.
        return jnp.argmax(tokens if self.eot_id < 0 else tokens == self.eot_id, axis=1)

    def lengths(self, tokens: Int[Array, "b t"]) -> Int[Array, " b"]:
        """How many leading tokens of each row can change its embedding."""
        if self.kind == "clip":
            return self._eot(tokens) + 1  # causal: later tokens are never seen by the pooled one
        position = jnp.arange(1, tokens.shape[1] + 1)
        return jnp.max(jnp.where(self._valid(tokens), position, 0), axis=1)

    def _grouped(
        self, tokens: Int[Array, "b t"], key: PRNGKeyArray | None, shards: int
    ) -> Float[Array, "b w"]:
        """Encodes each row at the narrowest width that its rank by length allows; equal to `_at_width`.

        Rows are sorted within each shard, so that nothing but one predicate crosses devices. If some row does not
        fit its group's width, the whole batch takes the plain path: static shapes, one compilation, always exact.
        """
        b, t = tokens.shape
        if b % shards:
            raise UsageError(f"a batch of {b} captions does not divide over {shards} data shards")
        by_shard = tokens.reshape(shards, b // shards, t)
        lengths = self.lengths(tokens).reshape(shards, -1)
        order = jnp.argsort(lengths, axis=1)
        lengths = jnp.take_along_axis(lengths, order, axis=1)
        parts = quotas(self.groups, b // shards)
        fits = _fit(lengths, parts)

        def narrow(tokens: Array, order: Array) -> Array:
            sorted_tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
            out = []
            for (width, i, j), k in zip(parts, layers.split(key, len(parts)), strict=True):
                part = sorted_tokens[:, i:j, :width].reshape(-1, min(width, t))
                out.append(self._at_width(part, k, self.compute).reshape(shards, j - i, -1))
            x = jnp.concatenate(out, axis=1)
            return jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1).reshape(b, -1)

        # The rare path recomputes in the backward pass: its activations would otherwise be allocated in every step.
        full_compute = dataclasses.replace(self.compute, remat="full")
        whole = jax.checkpoint(lambda tokens, _: self._at_width(tokens.reshape(b, t), key, full_compute))
        return jax.lax.cond(fits, narrow, whole, by_shard, order)


def _table(rows: int, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(layers.normal(std)(rngs.params(), (rows, width), jnp.float32))


def quotas(groups: Groups, rows: int) -> list[tuple[int, int, int]]:
    """Splits sorted rows into groups: (width, first row, end), without empty groups.

    Example:
        >>> quotas(((64, 0.75), (256, 0.25)), 10)
        [(64, 0, 7), (256, 7, 10)]
    """
    out, start, total = [], 0, 0.0
    for n, (width, share) in enumerate(groups):
        total += share
        # Rounded down: a row too many in a narrow group would send the whole batch down the plain path.
        end = rows if n == len(groups) - 1 else int(total * rows + 1e-6)
        if end > start:
            out.append((width, start, end))
        start = end
    return out


def _fit(ordered: Int[Array, "shards n"], parts: Sequence[tuple[int, int, int]]) -> Bool[Array, ""]:
    """Whether every shard's captions, by rising length, are no longer than the widths of their groups."""
    return jnp.all(jnp.stack([jnp.all(ordered[:, i:j] <= width) for width, i, j in parts]))


def positions(lengths: Int[Array, "shards n"], groups: Groups, width: int) -> Float[Array, ""]:
    """Token positions that captions of these lengths are encoded at: padding counts.

    Args:
        lengths: tokens of each caption, by data shard.
        groups: of the model.
        width: of the tokens, the context length.

    Example:
        >>> lengths = jnp.array([[3, 16, 4, 7]])
        >>> float(positions(lengths, ((6, 0.5), (16, 0.5)), 16)), float(positions(lengths, (), 16))
        (44.0, 64.0)
    """
    shards, n = lengths.shape
    plain = jnp.float32(shards * n * width)
    if not any(w < width for w, _ in groups):
        return plain
    parts = quotas(groups, n)
    narrow = jnp.float32(shards * sum(min(w, width) * (j - i) for w, i, j in parts))
    return jnp.where(_fit(jnp.sort(lengths, axis=1), parts), narrow, plain)
