"""Random models and the checkpoints that other libraries would write of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from unimed_jax import config
from unimed_jax.convert import tables
from unimed_jax.models import clip

# format: tables of vision and text
TOWERS = {
    "unimed": ("openclip_vision", "unimed_text"),
    "openclip-bert": ("openclip_vision", "openclip_hf_text"),
    "openclip-clip": ("openclip_vision", "openclip_clip_text"),
    "openclip-custom": ("openclip_vision", "openclip_custom_clip_text"),
    "openclip-timm": ("timm_vision", "openclip_hf_text"),
    "hf-clip": ("hf_clip_vision", "hf_clip_text"),
    "hf-vision": ("hf_clip_vision", ""),
    "hf-bert": ("", "hf_bert"),
    "hf-dinov2": ("hf_dinov2", ""),
    "native": ("native_vision", "native_text"),
}


def params(m: config.Model, seed: int = 0) -> clip.Params:
    """Random weights; nothing is compiled and nothing traced twice."""
    rng = np.random.default_rng(seed)
    shapes = _shapes(json.dumps(config.to_dict(m)))
    return clip.unflatten({k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()})


@functools.lru_cache(maxsize=64)
def _shapes(settings: str) -> dict[str, tuple[int, ...]]:
    m = config.from_dict(config.Model, json.loads(settings))
    return {k: v.shape for k, v in clip.flatten(clip.skeleton(m)[1]).items()}


def state(m: config.Model, form: str, p: clip.Params) -> dict[str, np.ndarray]:
    """The state dict of a format."""
    out: dict[str, np.ndarray] = {}
    for tower, name in zip(("vision", "text"), TOWERS[form], strict=True):
        if name:
            out |= tables.from_params(p[tower], tables.TABLES[name], m)
    if all(TOWERS[form]):
        out |= {k: np.asarray(p[k], np.float32) for k in ("logit_scale", "logit_bias") if k in p}
    return out


def random_model(rng: np.random.Generator, form: str) -> config.Model:
    """A small architecture that the format can hold, every size drawn."""
    pick = lambda *values: values[rng.integers(len(values))]
    v_heads, t_heads = (int(rng.integers(1, 4)) for _ in range(2))
    patch = pick(4, 6, 8)
    v_width, t_width = (heads * pick(4, 8, 12) for heads in (v_heads, t_heads))
    embed = int(rng.integers(3, 20))
    vision = config.Vision(
        image_size=patch * int(rng.integers(1, 5)),
        patch_size=patch,
        width=v_width,
        depth=int(rng.integers(1, 4)),
        heads=v_heads,
        mlp_dim=int(rng.integers(5, 40)),
        act=pick("gelu", "quick_gelu"),
    )
    text = config.Text(
        vocab_size=int(rng.integers(5, 40)),
        max_positions=int(rng.integers(4, 12)),
        width=t_width,
        depth=int(rng.integers(1, 4)),
        heads=t_heads,
        mlp_dim=int(rng.integers(5, 40)),
        proj=pick("mlp", "linear"),
    )
    text.context_length = text.max_positions
    if form == "unimed":
        vision.act, text.proj = "quick_gelu", "mlp"
    if form in ("openclip-timm", "hf-dinov2"):
        vision = dataclasses.replace(vision, ln_pre=False, patch_bias=True, act="gelu", ln_eps=1e-6)
    if form == "hf-dinov2":
        vision = dataclasses.replace(vision, proj="none", normalize="imagenet", mlp_dim=v_width * 3)
        embed = v_width
    if form == "hf-bert":
        text.proj, embed = "none", t_width
    if form in ("openclip-clip", "openclip-custom", "hf-clip"):
        text = dataclasses.replace(
            text, kind="clip", pool="eot", proj="linear", act=vision.act, ln_eps=1e-5, dropout=0.0
        )
        text.eot_id = pick(-1, text.vocab_size - 1)
    return config.Model(name="random", embed_dim=embed, vision=vision, text=text)


def golden() -> dict[str, tuple[str, dict[str, tuple[int, ...]]]]:
    """(format, shape by name) of released files and of open_clip's own module, from tests/golden."""
    file = Path(__file__).parent / "golden" / "state_dicts.json"
    out = {}
    for name, entry in json.loads(file.read_text()).items():
        shapes: dict[str, tuple[int, ...]] = {}
        for key, value in entry["tensors"].items():
            if isinstance(value, dict):
                shapes |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in range(value["layers"])}
            else:
                shapes[key] = tuple(value)
        assert len(shapes) == entry["count"]
        out[name] = (entry["format"], shapes)
    return out
