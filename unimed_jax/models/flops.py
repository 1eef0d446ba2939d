"""Floating-point operations by formula (2 per multiply-add), for the model FLOPs utilisation of a run.

Formulas, because XLA's cost analysis counts a scanned block once. They count the work asked for: every token in every
block, whatever shortcuts (CLS-only last block, length groups, remat) the program takes.
"""

from __future__ import annotations

from unimed_jax import config


def image_flops(m: config.Model) -> float:
    """Forward FLOPs of one image.

    Example:
        >>> round(image_flops(config.Model()) / 1e9, 2)  # ViT-B/16
        35.13
    """
    v = m.vision
    patches = (v.image_size // v.patch_size) ** 2
    embed = 2 * patches * 3 * v.patch_size**2 * v.width
    return embed + _blocks(v, patches + 1) + _head(v.proj, v.width, m.embed_dim)


def text_flops(m: config.Model, length: int | None = None) -> float:
    """Forward FLOPs of one caption of `length` tokens (default: the context length).

    Example:
        >>> round(text_flops(config.Model()) / 1e9, 2)  # BERT-base, 256 tokens
        45.9
    """
    t = m.text
    return _blocks(t, length or t.context_length) + _head(t.proj, t.width, m.embed_dim)


def train_flops(m: config.Model, length: int | None = None) -> float:
    """Forward and backward FLOPs of one image-caption pair: three times the forward pass, without the loss.

    Frozen towers cost less than this; the figure is that of full training.
    """
    return 3 * (image_flops(m) + text_flops(m, length))


def _blocks(c: config.Vision | config.Text, tokens: int) -> float:
    dense = 2 * tokens * (4 * c.width**2 + 2 * c.width * c.mlp_dim)
    scores_and_values = 2 * 2 * tokens**2 * c.width
    return c.depth * (dense + scores_and_values)


def _head(kind: str, width: int, embed_dim: int) -> float:
    hidden = (width + embed_dim) // 2
    return {"none": 0, "linear": 2 * width * embed_dim, "mlp": 2 * hidden * (width + embed_dim)}[kind]
