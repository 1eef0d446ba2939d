"""Named models: architecture and preprocessing; where published weights come from is in models/origins.py."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

from unimed_jax.config import Model, Text, Vision
from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.models.origins import ORIGINS

_B32 = Vision(patch_size=32)
_B16 = Vision(patch_size=16)
_L14 = Vision(patch_size=14, width=1024, depth=24, heads=16, mlp_dim=4096)
_L14_336 = Vision(image_size=336, patch_size=14, width=1024, depth=24, heads=16, mlp_dim=4096)
_BERT_LARGE = Text(width=1024, depth=24, heads=16, mlp_dim=4096)


def _clip_text(width: int, heads: int) -> Text:
    return Text(
        kind="clip",
        vocab_size=49408,
        context_length=77,
        max_positions=77,
        width=width,
        depth=12,
        heads=heads,
        mlp_dim=4 * width,
        act="quick_gelu",
        ln_eps=1e-5,
        dropout=0.0,
        pool="eot",
        proj="linear",
    )


_CLIP_TEXT, _CLIP_TEXT_L = _clip_text(512, 8), _clip_text(768, 12)
# timm's ViT-B/16 as BiomedCLIP uses it.
_TIMM_B16 = Vision(act="gelu", ln_pre=False, ln_eps=1e-6, patch_bias=True)
# DINOv2 (Oquab et al. 2023) with its LayerScale folded away is a plain pre-norm ViT without ln_pre.
_DINOV2_S14 = Vision(
    patch_size=14,
    width=384,
    heads=6,
    mlp_dim=1536,
    act="gelu",
    ln_pre=False,
    ln_eps=1e-6,
    patch_bias=True,
    normalize="imagenet",
)
_MINILM = Text(width=384, depth=6, heads=12, mlp_dim=1536, context_length=128, pool="mean", proj="linear")

# Released UniMed-CLIP variants are b16, l14-336 and l14-336-large-text; all use BiomedBERT's shapes.
_MODELS = (
    Model(name="unimed-clip-vit-b32", vision=_B32),
    Model(name="unimed-clip-vit-b16", vision=_B16),
    Model(name="unimed-clip-vit-l14", embed_dim=768, vision=_L14),
    Model(name="unimed-clip-vit-l14-336", embed_dim=768, vision=_L14_336),
    Model(name="unimed-clip-vit-l14-336-large-text", embed_dim=768, vision=_L14_336, text=_BERT_LARGE),
    Model(name="biomedclip", vision=_TIMM_B16),
    # MetaCLIP took over OpenAI's architecture.
    Model(name="metaclip-b32-400m", vision=_B32, text=_CLIP_TEXT),
    Model(name="metaclip-b16-400m", vision=_B16, text=_CLIP_TEXT),
    Model(name="metaclip-l14-400m", embed_dim=768, vision=_L14, text=_CLIP_TEXT_L),
    Model(name="openai-b32", vision=_B32, text=_CLIP_TEXT),
    Model(name="openai-b16", vision=_B16, text=_CLIP_TEXT),
    Model(name="openai-l14", embed_dim=768, vision=_L14, text=_CLIP_TEXT_L),
    Model(name="openai-l14-336", embed_dim=768, vision=_L14_336, text=_CLIP_TEXT_L),
    Model(name="dinov2-s14-minilm", embed_dim=256, dtype="float32", vision=_DINOV2_S14, text=_MINILM),
    Model(
        name="small",
        embed_dim=256,
        dtype="float32",
        vision=Vision(image_size=128, width=256, depth=6, heads=4, mlp_dim=1024, act="gelu"),
        text=Text(
            vocab_size=30522,
            context_length=64,
            max_positions=64,
            width=256,
            depth=4,
            heads=4,
            mlp_dim=1024,
            proj="linear",
        ),
    ),
    Model(
        name="tiny",
        embed_dim=32,
        dtype="float32",
        vision=Vision(image_size=32, patch_size=8, width=64, depth=2, heads=4, mlp_dim=128),
        text=Text(
            vocab_size=256, context_length=32, max_positions=32, width=64, depth=2, heads=4, mlp_dim=128
        ),
    ),
)
MODELS: dict[str, Model] = {m.name: m for m in _MODELS}
# Single towers with published weights; the other tower of the entry means nothing.
PARTS: dict[str, Model] = {
    m.name: m
    for m in (
        Model(
            name="dinov2-s14",
            embed_dim=384,
            vision=dataclasses.replace(_DINOV2_S14, image_size=518, proj="none"),
        ),
        Model(name="biomedbert-base", embed_dim=768, text=Text(proj="none")),
        Model(name="biomedbert-large", embed_dim=1024, text=dataclasses.replace(_BERT_LARGE, proj="none")),
    )
}


def get(name: str) -> Model:
    """A fresh copy of a named model's configuration, free to be changed.

    Raises:
        UsageError: for an unknown name, with the closest known one.

    Example:
        >>> get("unimed-clip-vit-b16").vision.width
        768
    """
    if name not in MODELS:
        raise UsageError(f"no model {name!r}.{did_you_mean(name, MODELS)}", "unimed-jax models list")
    return copy.deepcopy(MODELS[name])


def models_dir() -> Path:
    """Where fetched models lie: `$UNIMED_JAX_MODELS`, else `models` in the cache folder."""
    cache = os.environ.get("UNIMED_JAX_CACHE") or Path.home() / ".cache" / "unimed_jax"
    return Path(os.environ.get("UNIMED_JAX_MODELS") or Path(cache) / "models").expanduser()


def local(name: str) -> Path | None:
    """The folder of a named model's weights, when they are on this machine; None for anything else.

    A file or folder of that name in the working directory comes first: then this is None, too.

    Example:
        >>> local("some/folder") is None
        True
    """
    folder = models_dir() / name
    known = name in MODELS and not Path(name).exists()
    return folder if known and (folder / "config.json").is_file() else None


def absent(name: str) -> UsageError:
    """What to say of a named model whose weights are not on this machine, with the command that fetches them.

    Example:
        >>> absent("tiny").cause
        "'tiny' names an architecture, not weights"
    """
    if name not in ORIGINS:
        return UsageError(
            f"{name!r} names an architecture, not weights", "give a model folder or a run folder"
        )
    folder = models_dir() / name
    return UsageError(
        f"the weights of {name!r} are not on this machine: {folder} is no model folder",
        f"unimed-jax models fetch {name} --out {folder}",
    )
