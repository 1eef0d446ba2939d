"""A tiny model with a real tokenizer, for tests of inference and evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unimed_jax import config, infer
from unimed_jax.data import text
from unimed_jax.models import clip, zoo

# fmt: off
WORDS = [
    "an", "x-ray", "radiograph", "ct", "slice", "of", "the", "chest", "head", "abdomen", "magnetic",
    "resonance", "image", "ultrasound", "sonogram", "tissue", "section", "stained", "with", "haematoxylin",
    "and", "eosin", "retinal", "fundus", "photograph", "axial", "coronal", "sagittal", "plane", "a", "b", "c",
    "red", "green", "blue", "picture", "bright", "dark", "left", "right", "normal", "pneumonia", "effusion",
]
# fmt: on


def tokenizer(folder: Path) -> text.Tokenizer:
    """A WordPiece vocabulary of a few medical words."""
    return text.train_wordpiece(WORDS, 200, folder)


def model(**changes) -> config.Model:
    """The zoo's `tiny`, with fields of model, vision__ and text__ changed."""
    m = zoo.get("tiny")
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(m, part) if part else m, field, value)
    return m


def clip_text(tokens: int, **sizes: int) -> config.Text:
    """OpenAI's kind of text tower for captions of so many tokens; sizes are the further fields."""
    return config.Text(
        kind="clip",
        context_length=tokens,
        max_positions=tokens,
        act="quick_gelu",
        ln_eps=1e-5,
        dropout=0.0,
        pool="eot",
        proj="linear",
        **sizes,
    )


def params(m: config.Model, seed: int = 0) -> clip.Params:
    """Random parameters without compiling anything: wide enough that different inputs embed differently."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, leaf in clip.flatten(clip.skeleton(m)[1]).items():
        leaves[name] = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            leaves[name] = np.full(leaf.shape, m.init_logit_scale if name == "logit_scale" else 1, np.float32)
    return clip.unflatten(leaves)


def loaded(folder: Path, *, seed: int = 0, cfg: config.Model | None = None, **options) -> infer.Loaded:
    """A tiny model with random weights."""
    cfg = cfg or model()
    return infer.Loaded(cfg, params(cfg, seed), tokenizer(folder), **options)


def pictures(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Random uint8 pictures [n size size 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
