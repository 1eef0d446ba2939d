"""Where a score comes from: maps of a picture by gradients or by attention, and their overlays.

A map shows what moved a score of this model. It is no evidence that the score is right, and it is no segmentation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from unimed_jax import config, parallel
from unimed_jax.data.images import eval_crop
from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.infer import Loaded
from unimed_jax.models import clip
from unimed_jax.models.vision import Vision, normalize

NOTE = "Saliency shows what moved the score. It is no evidence that the score is right, and no segmentation."
SAMPLES = 16  # SmoothGrad's noisy copies
NOISE = 0.15  # their standard deviation, as a share of the picture's range of values
_STRONG = 99.0  # percentile of a pixel map that is shown as 1: single pixels would leave the rest black
_TAP_BYTES = 256 * 2**20  # of attention gradients at once
# Positions and colours between which a heat map is interpolated: dark to bright, so that it reads in gray, too.
_HEAT = ((0.0, (28, 16, 68)), (0.35, (150, 44, 128)), (0.7, (240, 96, 70)), (1.0, (252, 236, 120)))


def directions(
    embeddings: Float[np.ndarray, "b d"],
    bank: Float[np.ndarray, "c d"],
    targets: Int[np.ndarray, "b"] | None = None,
    *,
    margin: bool = True,
) -> Float[np.ndarray, "b d"]:
    """What is explained, as one vector a picture: the score is the unit image embedding times it.

    Args:
        embeddings: unit image embeddings.
        bank: one unit vector a class.
        targets: the class that is explained; default: the best.
        margin: the class's cosine minus that of the best other class; else the cosine alone, most of which all
            classes share.

    Example:
        >>> directions(np.float32([[1, 0]]), np.float32([[1, 0], [0.6, 0.8]])).round(1).tolist()
        [[0.4000000059604645, -0.800000011920929]]
    """
    cosines = embeddings @ bank.T
    rows = np.arange(len(cosines))
    best = cosines.argmax(1) if targets is None else np.asarray(targets)
    if not margin or bank.shape[0] < 2:
        return bank[best]
    cosines[rows, best] = -np.inf
    return bank[best] - bank[cosines.argmax(1)]


def maps(
    loaded: Loaded,
    images: UInt8[np.ndarray, "b h w 3"],
    toward: Float[np.ndarray, "b d"],
    method: str = "attention",
) -> Float[np.ndarray, "b h w"]:
    """Saliency maps of pictures, each from 0 to 1; a map that is the same everywhere is 0.

    Args:
        loaded: the model; the computation is that of `encode_image`, in its precision.
        images: at the model's size.
        toward: from `directions`.
        method: a key of `METHODS`.

    Raises:
        UsageError: for an unknown method, or images that the model does not take.
    """
    if method not in METHODS:
        raise UsageError(f"no saliency method {method!r}.{did_you_mean(method, METHODS)}", ", ".join(METHODS))
    images = loaded.checked(np.asarray(images))
    v = loaded.cfg.vision
    taps = v.depth * v.heads * ((v.image_size // v.patch_size) ** 2 + 1) ** 2 * 4
    n = loaded.mesh.size * max(1, min(8, _TAP_BYTES // taps))
    plain = replace(loaded.cfg, dtype=loaded.dtype, remat="none", text_groups=())
    fn = _compiled(json.dumps(config.to_dict(plain)), loaded.mesh, method)
    found = [np.zeros((0, v.image_size, v.image_size), np.float32)]
    for i in range(0, len(images), n):
        part, aim = images[i : i + n], np.asarray(toward[i : i + n], np.float32)
        more = n - len(part)  # the last rows again: one shape, one compilation
        rows = (np.concatenate([x, np.repeat(x[-1:], more, 0)]) for x in (part, aim))
        raw = fn(loaded.params, *(_put(x, loaded.mesh) for x in rows))
        found.append(np.stack([_scaled(m, v.image_size) for m in np.asarray(raw)[: len(part)]]))
    return np.concatenate(found)


def encode_with_weights(
    vision: Vision, images: Float[Array, "b h w 3"], taps: Float[Array, "L b k t t"] | None = None
) -> tuple[Float[Array, "b d"], Float[Array, "L b k t t"]]:
    """The image embedding by a path that shows its attention weights; inside jit.

    Args:
        vision: the bound tower.
        images: normalised pixels.
        taps: added to the weights of each layer (zeros, to differentiate with respect to the weights).
    """

    def step(x: Array, layer: Any) -> tuple[Array, Array]:
        block, tap = layer
        return block.with_weights(x, 0.0 if tap is None else tap)

    x, weights = lax.scan(step, vision.tokens(images), (vision.blocks, taps))
    return vision(vision.pooled(x)), weights


def _gradient(vision: Vision, images: Array, toward: Array) -> Array:
    """|d score / d pixel|, the largest of the three channels (Simonyan et al. 2014, section 3)."""
    return jnp.abs(_pixel_gradient(vision, images.astype(jnp.float32), toward)).max(-1)


def _smoothgrad(vision: Vision, images: Array, toward: Array) -> Array:
    """The gradient averaged over noisy copies of the picture (Smilkov et al. 2017).

    All pictures get the same fixed noise, scaled to their own range, so that a map depends on its picture alone.
    """
    pixels = images.astype(jnp.float32)
    spread = NOISE * (pixels.max((1, 2, 3), keepdims=True) - pixels.min((1, 2, 3), keepdims=True))

    def step(total: Array, key: Array) -> tuple[Array, None]:
        noise = jax.random.normal(key, pixels.shape[1:])
        return total + _pixel_gradient(vision, pixels + spread * noise, toward), None

    total, _ = lax.scan(step, jnp.zeros_like(pixels), jax.random.split(jax.random.key(0), SAMPLES))
    return jnp.abs(total / SAMPLES).max(-1)


def _pixel_gradient(vision: Vision, pixels: Array, toward: Array) -> Array:
    return jax.grad(lambda x: _score(vision(normalize(x, vision.normalize)), toward))(pixels)


def _score(z: Array, toward: Array) -> Array:
    """The sum over the batch: rows do not touch each other, so one gradient serves all."""
    return (clip.unit(z) * toward).sum()


def _rollout(vision: Vision, images: Array, toward: Array) -> Array:
    """Attention roll-out (Abnar and Zuidema 2020): the product of all layers' 0.5 A + 0.5 I, A the mean of the heads.

    It knows no class: whatever is asked, the map is the same.
    """
    x = vision.tokens(normalize(images, vision.normalize))
    one = jnp.eye(x.shape[1])

    def step(carry: tuple[Array, Array], block: Any) -> tuple[tuple[Array, Array], None]:
        x, rolled = carry
        x, weights = block.with_weights(x)
        mixed = 0.5 * weights.mean(1) + 0.5 * one
        return (x, jnp.matmul(mixed, rolled, precision=lax.Precision.HIGHEST)), None

    start = jnp.broadcast_to(one, (len(x), *one.shape))
    (_, rolled), _ = lax.scan(step, (x, start), vision.blocks)
    return _patches(vision, rolled)


def _attention(vision: Vision, images: Array, toward: Array) -> Array:
    """Gradient-weighted attention (Chefer et al. 2021, equations 5 and 6 for self-attention).

    Layer by layer R <- R + A' R, with A' the mean over the heads of the positive part of A dscore/dA.
    """
    x = normalize(images, vision.normalize)
    tokens, heads = (vision.image_size // vision.patch_size) ** 2 + 1, vision.blocks.attn.heads
    taps = jnp.zeros((vision.depth, len(x), heads, tokens, tokens))

    def score(taps: Array) -> tuple[Array, Array]:
        z, weights = encode_with_weights(vision, x, taps)
        return _score(z, toward), weights

    slopes, weights = jax.grad(score, has_aux=True)(taps)
    relevant = jnp.maximum(slopes * weights, 0).mean(2)  # [L b t t]
    start = jnp.broadcast_to(jnp.eye(tokens), relevant.shape[1:])
    step = lambda r, a: (r + jnp.matmul(a, r, precision=lax.Precision.HIGHEST), None)
    return _patches(vision, lax.scan(step, start, relevant)[0])


def _patches(vision: Vision, relevance: Float[Array, "b t t"]) -> Float[Array, "b g g"]:
    """How much each patch goes into the pooled token: the row of the class token, or the mean of the patches' rows."""
    row = relevance[:, 0] if vision.pool == "cls" else relevance[:, 1:].mean(1)
    side = vision.image_size // vision.patch_size
    return row[:, 1:].reshape(-1, side, side)


METHODS: dict[str, Callable[[Vision, Array, Array], Array]] = {
    "attention": _attention,
    "gradient": _gradient,
    "smoothgrad": _smoothgrad,
    "rollout": _rollout,
}


@functools.lru_cache(maxsize=16)
def _compiled(spec: str, mesh: jax.sharding.Mesh, method: str) -> Callable[..., Array]:
    """One compilation for an architecture and a method."""
    graphdef, _ = clip.skeleton(config.from_dict(config.Model, json.loads(spec)))

    def run(params: clip.Params, images: Array, toward: Array) -> Array:
        return METHODS[method](clip.bind(graphdef, params).vision, images, toward)

    return jax.jit(run, out_shardings=parallel.replicated(mesh))


def _put(rows: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    return jax.make_array_from_callback(rows.shape, parallel.batch_sharding(mesh), lambda index: rows[index])


def _scaled(raw: Float[np.ndarray, "g g"], size: int) -> Float[np.ndarray, "size size"]:
    """From 0 to 1, at the model's size; patch maps are interpolated, pixel maps clipped at their strongest percent."""
    pixels = raw.shape[0] == size
    raw = raw if pixels else _resize(raw, (size, size))
    low, high = float(raw.min()), float(np.percentile(raw, _STRONG) if pixels else raw.max())
    if high <= low * (1 + 1e-6):
        return np.zeros_like(raw)
    return np.clip((raw - low) / (high - low), 0, 1).astype(np.float32)


def _resize(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2"]:
    """Bilinear; `size` is (width, height)."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def place(
    shown: Float[np.ndarray, "size size"], height: int, width: int
) -> tuple[Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """A map on the picture that it was made from, and which of its pixels the model saw.

    Args:
        shown: from `maps`, of the evaluation picture (`data.images.eval_image`: resized, centre crop).
        height: of the picture, pixels.
        width: of the picture, pixels.
    """
    size = shown.shape[0]
    new, (left, top) = eval_crop(width, height, size)
    x0, x1 = _span(left, size, width, new[0])
    y0, y1 = _span(top, size, height, new[1])
    heat, seen = np.zeros((height, width), np.float32), np.zeros((height, width), bool)
    heat[y0:y1, x0:x1] = _resize(shown, (x1 - x0, y1 - y0))
    seen[y0:y1, x0:x1] = True
    return heat, seen


def _span(start: int, length: int, side: int, resized: int) -> tuple[int, int]:
    """Where a stretch of the resized side lies on the side itself: one pixel at least.

    Example:
        >>> _span(16, 32, 128, 64), _span(15984, 32, 1000, 32000)
        ((32, 96), (500, 501))
    """
    first, last = (round(x * side / resized) for x in (start, start + length))
    return (first, last) if first < last else (min(first, side - 1), min(first, side - 1) + 1)


def overlay(
    pixels: UInt8[np.ndarray, "h w 3"],
    heat: Float[np.ndarray, "h w"],
    seen: Bool[np.ndarray, "h w"] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in gray with the map over it: the stronger, the less of the picture is seen.

    Args:
        pixels: the picture.
        heat: from 0 to 1, of the same size; another size is interpolated.
        seen: what the model saw; the rest is darkened.
    """
    height, width = pixels.shape[:2]
    if heat.shape != (height, width):
        heat = _resize(heat, (width, height))
    at, colours = [p for p, _ in _HEAT], np.array([c for _, c in _HEAT], np.float32)
    colour = np.stack([np.interp(heat, at, colours[:, c]) for c in range(3)], axis=-1)
    gray = pixels.astype(np.float32).mean(-1, keepdims=True)
    opaque = (0.75 * np.clip(heat, 0, 1))[:, :, None]
    mixed = (1 - opaque) * gray + opaque * colour
    if seen is not None:
        mixed = np.where(seen[:, :, None], mixed, 0.4 * gray)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def explain(
    loaded: Loaded,
    images: UInt8[np.ndarray, "b h w 3"],
    classes: Mapping[str, Sequence[str]],
    method: str = "attention",
) -> Float[np.ndarray, "b h w"]:
    """Maps of each picture's best class against the next: `directions` and `maps` in one call.

    Args:
        loaded: the model.
        images: at the model's size.
        classes: class -> prompts.
        method: a key of `METHODS`.

    Raises:
        UsageError: see `maps`, and for a class without prompts.
    """
    z = loaded.encode_image(images)
    return maps(loaded, images, directions(z, loaded.text_bank(classes)), method)
