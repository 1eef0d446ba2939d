"""The dual encoder. Flax NNX gives structure and names; parameters cross as a plain nested dict.

graphdef, abstract = skeleton(cfg)          # allocates nothing
params = init(cfg, jax.random.key(0))       # {"vision": {...}, "text": {...}, "logit_scale": ...}
embed = jax.jit(lambda params, images: bind(graphdef, params).encode_image(images))
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from unimed_jax import config, config_rules
from unimed_jax.models.layers import Compute
from unimed_jax.models.text import Text
from unimed_jax.models.vision import Vision

Params = dict[str, Any]  # nested; leaves are float32 arrays


class Embeddings(NamedTuple):
    """What the loss needs of one batch."""

    image: Float[Array, "b d"]  # unit norm
    text: Float[Array, "b d"]  # unit norm
    logit_scale: Float[Array, ""]  # factor on the cosines, > 0
    logit_bias: Float[Array, ""]  # 0 without cfg.logit_bias


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Scales to unit length; the zero vector stays zero (PyTorch's `F.normalize`, eps 1e-12).

    Example:
        >>> unit(jnp.asarray([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    # The maximum sits under the root: the gradient at the zero vector is 0, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class CLIP(nnx.Module):
    """Two towers, a temperature and, for the sigmoid loss, a bias."""

    def __init__(self, m: config.Model, *, rngs: nnx.Rngs):
        compute = Compute(dtype=m.dtype, remat=m.remat, unroll=m.unroll, cls_only_last=m.cls_only_last)
        self.vision = Vision(m.vision, m.embed_dim, compute=compute, rngs=rngs)
        self.text = Text(m.text, m.embed_dim, groups=m.text_groups, compute=compute, rngs=rngs)
        # Strongly typed: a weakly typed scalar costs two more compilations of the train step.
        self.logit_scale = nnx.Param(jnp.asarray(m.init_logit_scale, jnp.float32))
        if m.logit_bias:
            self.logit_bias = nnx.Param(jnp.asarray(m.init_logit_bias, jnp.float32))

    def encode_image(self, images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Image embeddings, float32, not normalised; see `Vision.__call__`."""
        return self.vision(images)

    def encode_text(
        self, tokens: Int[Array, "b t"], *, key: PRNGKeyArray | None = None, shards: int = 1
    ) -> Float[Array, "b d"]:
        """Text embeddings, float32, not normalised; see `Text.__call__`."""
        return self.text(tokens, key=key, shards=shards)

    def __call__(
        self,
        images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
        tokens: Int[Array, "b t"],
        *,
        key: PRNGKeyArray | None = None,
        shards: int = 1,
    ) -> Embeddings:
        """Both embeddings with unit norm, the temperature as a factor, and the bias."""
        bias = self.logit_bias[...] if hasattr(self, "logit_bias") else jnp.zeros((), jnp.float32)
        return Embeddings(
            image=unit(self.encode_image(images)),
            text=unit(self.encode_text(tokens, key=key, shards=shards)),
            logit_scale=jnp.exp(self.logit_scale[...]),
            logit_bias=bias,
        )


def skeleton(m: config.Model) -> tuple[nnx.GraphDef, Params]:
    """The structure and the abstract parameters (`jax.ShapeDtypeStruct` leaves) of a model; allocates nothing.

    Raises:
        UsageError: for an impossible architecture.
    """
    config_rules.validate_model(m)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CLIP(m, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def init(m: config.Model, key: PRNGKeyArray) -> Params:
    """Random parameters, float32; jit it with `out_shardings` to create them in place.

    Raises:
        UsageError: for an impossible architecture.
    """
    config_rules.validate_model(m)
    return _initializer(json.dumps(config.to_dict(m)))(key)


@functools.lru_cache(maxsize=8)
def _initializer(settings: str) -> Callable[[PRNGKeyArray], Params]:
    """One compilation a config: the random draws of a model take seconds to compile."""
    m = config.from_dict(config.Model, json.loads(settings))
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(CLIP(m, rngs=nnx.Rngs(key)))))


def bind(graphdef: nnx.GraphDef, params: Params) -> CLIP:
    """The callable model; only inside jit."""
    return nnx.merge(graphdef, params)


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by path, e.g. "vision/blocks/attn/qkv/kernel"."""
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflatten(leaves: dict[str, Any]) -> Params:
    """The inverse of `flatten`.

    Example:
        >>> unflatten({"text/word": 1, "logit_scale": 2})
        {'text': {'word': 1}, 'logit_scale': 2}
    """
    out: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out


def count(params: Params) -> int:
    """Number of parameters, concrete or abstract."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
