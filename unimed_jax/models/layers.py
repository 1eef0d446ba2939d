"""The parts that every tower is made of: dense, layer norm, attention, the transformer block and its scan.

Dimension letters: b batch, t tokens, s attended tokens, k head width, h heads, d width. Parameters are float32;
matrix products run in the compute dtype; layer norm and softmax run in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Init = Callable[..., Array]

# What a block keeps for its backward pass, by config word; "none" (no recomputation) keeps everything.
REMAT: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True, slots=True)
class Compute:
    """How a tower is computed; hashable, so that graph definitions can be compared and cached."""

    dtype: str = "bfloat16"
    remat: str = "none"  # none, or a key of REMAT
    unroll: int = 1  # blocks per iteration of the scan
    cls_only_last: bool = True

    @property
    def precision(self) -> lax.Precision:
        """Float32 means float32 on every device: GPUs and TPUs would take fewer bits by default."""
        return lax.Precision.HIGHEST if self.dtype == "float32" else lax.Precision.DEFAULT


def quick_gelu(x: Array) -> Array:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU of BERT and DINOv2; `jax.nn.gelu` defaults to the tanh form."""
    return jax.nn.gelu(x, approximate=False)


ACT: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def normal(std: float) -> Init:
    """Initialiser N(0, std^2)."""
    return nnx.initializers.normal(std)


def torch_linear(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for Linear and Conv2d kernels."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nnx.Module):
    """`x @ kernel + bias` in the compute dtype; kernel [in out]."""

    def __init__(
        self, n_in: int, n_out: int, init: Init, *, compute: Compute, rngs: nnx.Rngs, bias: bool = True
    ):
        self.compute = compute
        self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32))

    def __call__(self, x: Float[Array, "... i"], columns: slice = slice(None)) -> Float[Array, "... o"]:
        """Applies the layer; `columns` computes only these outputs."""
        dtype = self.compute.dtype
        kernel = self.kernel[...][:, columns].astype(dtype)
        y = jnp.matmul(x.astype(dtype), kernel, precision=self.compute.precision)
        return y + self.bias[...][columns].astype(dtype) if hasattr(self, "bias") else y


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32; the result has the dtype of the input."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises; `eps` is added to the biased variance, as PyTorch does."""
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        var = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * lax.rsqrt(var + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Inverted dropout; the identity without a key."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split(key: PRNGKeyArray | None, n: int) -> list[PRNGKeyArray] | list[None]:
    """`n` independent keys, or `n` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def fused_attention(dtype: Any, queries: int, *, random: bool) -> bool:
    """Whether cuDNN's fused kernel computes this attention: bfloat16 on a GPU, more than one query, no dropout."""
    return jax.default_backend() == "gpu" and dtype == jnp.bfloat16 and queries > 1 and not random


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    *,
    valid: Bool[Array, "b s"] | None = None,
    causal: bool = False,
    rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
) -> Float[Array, "b t h k"]:
    """Softmax attention, scaled by 1/sqrt(k), with float32 scores.

    Args:
        q: queries.
        k: keys.
        v: values.
        valid: keys that may be attended, a prefix of each row (padding is at the end); default all.
        causal: whether query i sees keys 0..i only.
        rate: dropout on the probabilities, active with a key.
        key: randomness of the dropout.
        precision: of the two products.
    """
    if fused_attention(q.dtype, q.shape[1], random=key is not None and rate > 0):
        # Lengths, because cuDNN turns a mask into a bias and refuses odd lengths (197, 577) with it.
        lengths = None if valid is None else jnp.maximum(valid.sum(-1, dtype=jnp.int32), 1)
        full = None if valid is None else jnp.full(q.shape[:1], q.shape[1], jnp.int32)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            query_seq_lengths=full,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    p = dropout(probabilities(q, k, valid=valid, causal=causal, precision=precision), rate, key)
    return weigh(p, v, precision)


def probabilities(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    *,
    valid: Bool[Array, "b s"] | None = None,
    causal: bool = False,
    precision: lax.Precision = lax.Precision.DEFAULT,
) -> Float[Array, "b h t s"]:
    """The weights of `attention` before dropout, float32: each row sums to 1."""
    # [b h t k] is the layout with the fastest products on CPU.
    q, k = (x.transpose(0, 2, 1, 3) for x in (q, k))
    scores = jnp.matmul(q, k.swapaxes(-1, -2), precision=precision, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    low = jnp.finfo(jnp.float32).min  # finite: a row of padding alone stays free of NaN
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, low)
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool), scores, low)
    return jax.nn.softmax(scores, axis=-1)


def weigh(
    p: Float[Array, "b h t s"], v: Float[Array, "b s h k"], precision: lax.Precision
) -> Float[Array, "b t h k"]:
    """The values, weighted by the probabilities."""
    return jnp.matmul(p.astype(v.dtype), v.transpose(0, 2, 1, 3), precision=precision).transpose(0, 2, 1, 3)


Rows = Int[Array, " b"] | int


def pick(x: Float[Array, "b t d"], rows: Rows) -> Float[Array, "b 1 d"]:
    """Token `rows` of each row: one index for all, or one each."""
    if isinstance(rows, int):
        return x[:, rows : rows + 1]
    return jnp.take_along_axis(x, rows[:, None, None], axis=1)


class Attention(nnx.Module):
    """Multi-head self-attention with a fused qkv kernel (columns in the order q, k, v)."""

    def __init__(
        self, width: int, heads: int, init: Init, out_init: Init, *, compute: Compute, rngs: nnx.Rngs
    ):
        self.heads = heads
        self.qkv = Dense(width, 3 * width, init, compute=compute, rngs=rngs)
        self.out = Dense(width, width, out_init, compute=compute, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        *,
        valid: Bool[Array, "b s"] | None,
        causal: bool,
        rows: Rows | None = None,
        rate: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b t d"]:
        """Attends; with `rows`, from that one token of each row only."""
        b, s, d = x.shape
        if rows is None:
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        else:
            q = self.qkv(pick(x, rows), slice(0, d))
            k, v = jnp.split(self.qkv(x, slice(d, None)), 2, axis=-1)
            if causal:
                last = jnp.broadcast_to(jnp.asarray(rows), (b,))[:, None]
                seen = jnp.arange(s)[None] <= last
                valid, causal = (seen if valid is None else valid & seen), False
        q, k, v = (a.reshape(b, -1, self.heads, d // self.heads) for a in (q, k, v))
        precision = self.qkv.compute.precision
        y = attention(q, k, v, valid=valid, causal=causal, rate=rate, key=key, precision=precision)
        return self.out(y.reshape(b, -1, d))

    def with_weights(
        self, x: Float[Array, "b t d"], tap: Float[Array, "b h t t"] | float = 0.0
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t t"]]:
        """What `__call__` returns for every row, never by a fused kernel, and the attention weights.

        `tap` is added to the weights: the gradient with respect to it is that with respect to them.
        """
        b, _, d = x.shape
        q, k, v = (a.reshape(b, -1, self.heads, d // self.heads) for a in jnp.split(self.qkv(x), 3, axis=-1))
        precision = self.qkv.compute.precision
        p = probabilities(q, k, precision=precision)
        return self.out(weigh(p + tap, v, precision).reshape(b, -1, d)), p


class MLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        act: str,
        init: Init,
        down_init: Init,
        *,
        compute: Compute,
        rngs: nnx.Rngs,
        bias: bool = True,
    ):
        self.act = act
        self.up = Dense(sizes[0], sizes[1], init, compute=compute, rngs=rngs, bias=bias)
        self.down = Dense(sizes[1], sizes[2], down_init, compute=compute, rngs=rngs, bias=bias)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Applies both layers."""
        return self.down(ACT[self.act](self.up(x)))


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The architecture of one transformer block."""

    width: int
    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    post_norm: bool = False  # BERT normalises after each residual sum, CLIP before each branch
    causal: bool = False
    dropout: float = 0.0
    stds: tuple[float, float, float, float] = (0.02, 0.02, 0.02, 0.02)  # init of qkv, out, up, down


class Block(nnx.Module):
    """One transformer block: attention and MLP, each with a residual sum and a layer norm."""

    def __init__(self, shape: BlockShape, *, compute: Compute, rngs: nnx.Rngs):
        self.shape = shape
        qkv, out, up, down = map(normal, shape.stds)
        sizes = (shape.width, shape.mlp_dim, shape.width)
        self.ln1 = LayerNorm(shape.width, shape.ln_eps)
        self.attn = Attention(shape.width, shape.heads, qkv, out, compute=compute, rngs=rngs)
        self.ln2 = LayerNorm(shape.width, shape.ln_eps)
        self.mlp = MLP(sizes, shape.act, up, down, compute=compute, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        *,
        valid: Bool[Array, "b s"] | None = None,
        rows: Rows | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b t d"]:
        """Applies the block; with `rows`, the result is that one token of each row (exact, t = 1)."""
        c = self.shape
        k_probs, k_attn, k_mlp = split(key, 3)
        h = x if c.post_norm else self.ln1(x)
        a = self.attn(h, valid=valid, causal=c.causal, rows=rows, rate=c.dropout, key=k_probs)
        if rows is not None:
            x = pick(x, rows)
        x = x + dropout(a, c.dropout, k_attn)
        if c.post_norm:
            x = self.ln1(x)
            return self.ln2(x + dropout(self.mlp(x), c.dropout, k_mlp))
        return x + dropout(self.mlp(self.ln2(x)), c.dropout, k_mlp)

    def with_weights(
        self, x: Float[Array, "b t d"], tap: Float[Array, "b h t t"] | float = 0.0
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t t"]]:
        """A pre-norm block without dropout or mask, and its attention weights; see `Attention.with_weights`."""
        a, p = self.attn.with_weights(self.ln1(x), tap)
        x = x + a
        return x + self.mlp(self.ln2(x)), p


def make_blocks(depth: int, shape: BlockShape, *, compute: Compute, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one module whose parameters have a leading layer axis."""
    make = lambda key: Block(shape, compute=compute, rngs=nnx.Rngs(key))
    return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def run_blocks(
    blocks: Block,
    x: Float[Array, "b t d"],
    *,
    depth: int,
    compute: Compute,
    valid: Bool[Array, "b t"] | None = None,
    rows: Rows | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b u d"]:
    """Scans over stacked blocks.

    Args:
        blocks: from `make_blocks`.
        x: token states.
        depth: number of blocks.
        compute: remat policy and unroll.
        valid: keys that may be attended.
        rows: the one token of each row that is wanted (u = 1); None keeps all (u = t).
        key: dropout; None is deterministic.
    """
    keys = None if key is None else jax.random.split(key, depth)

    def step(rows: Rows | None) -> Callable[..., Array]:
        apply = lambda x, block, key: block(x, valid=valid, rows=rows, key=key)
        # Inside a scan the loop itself keeps XLA from merging the recomputation away.
        return (
            jax.checkpoint(apply, policy=REMAT[compute.remat], prevent_cse=False)
            if compute.remat in REMAT
            else apply
        )

    short = rows is not None and compute.cls_only_last
    n = depth - 1 if short else depth
    every = step(None)
    if n:
        stacked = jax.tree.map(lambda a: a[:n], (blocks, keys)) if short else (blocks, keys)
        x, _ = lax.scan(lambda x, bk: (every(x, *bk), None), x, stacked, unroll=min(compute.unroll, n))
    if short:
        return step(rows)(x, *jax.tree.map(lambda a: a[n], (blocks, keys)))
    return x if rows is None else pick(x, rows)
