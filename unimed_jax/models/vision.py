"""The vision transformer: CLIP's and DINOv2's, by switches of `config.Vision`.

Order of operations: patches, class token, positions, [ln_pre], blocks, pooled token, ln_post, projection
(Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021, equations 1-4).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from unimed_jax import config
from unimed_jax.errors import UsageError
from unimed_jax.models import layers
from unimed_jax.models.layers import Compute


def projection(
    kind: str, width: int, embed_dim: int, *, compute: Compute, rngs: nnx.Rngs
) -> nnx.Module | None:
    """The head from a tower to the shared embedding, without biases; None for kind `none`.

    The MLP's hidden width is the mean of both sides and its init PyTorch's default, as in OpenCLIP's text towers.
    """
    if kind == "none":
        return None
    if kind == "linear":
        return layers.Dense(
            width, embed_dim, layers.normal(width**-0.5), compute=compute, rngs=rngs, bias=False
        )
    sizes = (width, (width + embed_dim) // 2, embed_dim)
    init = layers.torch_linear
    return layers.MLP(sizes, "gelu", init, init, compute=compute, rngs=rngs, bias=False)


def clip_stds(width: int, depth: int) -> tuple[float, float, float, float]:
    """CLIP's initialisation of qkv, out, up, down: residual branches shrink with depth."""
    branch = width**-0.5 * (2 * depth) ** -0.5
    return width**-0.5, branch, (2 * width) ** -0.5, branch


def normalize(images: UInt8[Array, "b h w 3"], name: str) -> Float[Array, "b h w 3"]:
    """`(image / 255 - mean) / std` in float32, with the constants of data/images.py."""
    from unimed_jax.data.images import NORMALIZE  # lazy: a host-side module

    mean, std = (jnp.asarray(x, jnp.float32) for x in NORMALIZE[name])
    return (images.astype(jnp.float32) / 255 - mean) / std


class Vision(nnx.Module):
    """A vision transformer with its projection."""

    def __init__(self, c: config.Vision, embed_dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.image_size, self.patch_size, self.depth = c.image_size, c.patch_size, c.depth
        self.pool, self.normalize, self.compute = c.pool, c.normalize, compute
        width, tokens = c.width, (c.image_size // c.patch_size) ** 2 + 1
        shape = layers.BlockShape(width, c.heads, c.mlp_dim, c.act, c.ln_eps, stds=clip_stds(width, c.depth))
        small = layers.normal(width**-0.5)
        self.patch = Patch(c.patch_size, width, bias=c.patch_bias, compute=compute, rngs=rngs)
        self.cls = nnx.Param(small(rngs.params(), (width,), jnp.float32))
        self.pos = nnx.Param(small(rngs.params(), (tokens, width), jnp.float32))
        if c.ln_pre:
            self.ln_pre = layers.LayerNorm(width, c.ln_eps)
        self.blocks = layers.make_blocks(c.depth, shape, compute=compute, rngs=rngs)
        self.ln_post = layers.LayerNorm(width, c.ln_eps)
        if head := projection(c.proj, width, embed_dim, compute=compute, rngs=rngs):
            self.proj = head

    def __call__(
        self, images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"] | Float[Array, "b w"]
    ) -> Float[Array, "b d"]:
        """Image embeddings, not normalised: the projection of `features`, or of features computed before."""
        x = images if images.ndim == 2 else self.features(images)
        return (self.proj(x) if hasattr(self, "proj") else x).astype(jnp.float32)

    def features(self, images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]) -> Float[Array, "b w"]:
        """The pooled token before the projection; uint8 pictures are normalised here, floats taken as they are.

        Raises:
            UsageError: for another shape than [b, image_size, image_size, 3] or another dtype.
        """
        want = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != want:
            raise UsageError(
                f"images have shape {images.shape}", f"this model takes (batch, {want[0]}, {want[1]}, 3)"
            )
        if images.dtype == jnp.uint8:
            images = normalize(images, self.normalize)
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise UsageError(
                f"images have dtype {images.dtype}", "uint8 pixels, or floats already normalised"
            )
        x = self.tokens(images)
        rows = 0 if self.pool == "cls" else None
        return self.pooled(
            layers.run_blocks(self.blocks, x, depth=self.depth, compute=self.compute, rows=rows)
        )

    def tokens(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """What the first block sees of normalised pictures: class token, then patches in row-major order."""
        x = self.patch(images)  # [b t d]
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos[...].astype(x.dtype)
        return self.ln_pre(x) if hasattr(self, "ln_pre") else x

    def pooled(self, x: Float[Array, "b t d"]) -> Float[Array, "b w"]:
        """The pooled token of what the last block returns; the class token alone is enough for pool "cls"."""
        x = x[:, 0] if self.pool == "cls" else x[:, 1:].astype(jnp.float32).mean(axis=1)
        return self.ln_post(x)


class Patch(nnx.Module):
    """The patch embedding; a convolution whose stride is its size, computed as one matrix product."""

    def __init__(self, patch: int, width: int, *, bias: bool, compute: Compute, rngs: nnx.Rngs):
        self.compute = compute
        self.kernel = nnx.Param(layers.torch_linear(rngs.params(), (patch, patch, 3, width)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Patches in row-major order."""
        p, _, _, width = self.kernel[...].shape
        b, h, w, _ = images.shape
        x = images.astype(self.compute.dtype).reshape(b, h // p, p, w // p, p, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * 3)
        kernel = self.kernel[...].reshape(-1, width).astype(x.dtype)
        x = jnp.matmul(x, kernel, precision=self.compute.precision)
        return x + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else x
