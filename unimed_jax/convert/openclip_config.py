"""OpenCLIP's `open_clip_config.json`, read and written, with the settings of open_clip 3.3's models and transforms.

A setting that changes the function and that our modules do not have is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from unimed_jax import config
from unimed_jax.convert.configs import Hints, normalization
from unimed_jax.convert.mapped import shown
from unimed_jax.convert.names import some
from unimed_jax.data.images import NORMALIZE
from unimed_jax.errors import DataError

NAME = "open_clip_config.json"
# Settings that must have one of these values, its default first. Others are sizes, read below, or not known.
_BLOCK = {
    "ls_init_value": (None,),
    "act_kwargs": (None,),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        **_BLOCK,
        "attentional_pool": (False,),
        "pos_embed_type": ("learnable",),
        "timm_proj_bias": (False,),
    },
    "text_cfg": {**_BLOCK, "embed_cls": (False,), "no_causal_mask": (False,), "proj_bias": (False,)},
    "model_cfg": {"nonscalar_logit_scale": (False,), "multimodal_cfg": (None,)},
    "preprocess_cfg": {
        "interpolation": ("bicubic",),
        "resize_mode": ("shortest",),
        "mode": ("RGB",),
    },
}
_READ: dict[str, tuple[str, ...]] = {
    "vision_cfg": (
        *(
            "image_size",
            "patch_size",
            "width",
            "layers",
            "head_width",
            "mlp_ratio",
            "no_ln_pre",
            "norm_kwargs",
        ),
        *("pool_type", "final_ln_after_pool", "timm_model_name", "timm_pool", "timm_proj"),
        # Of no effect on the function.
        *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens"),
        *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "pad_id"),
        *("pool_type", "eos_id", "proj_type", "hf_model_name", "hf_proj_type", "hf_pooler_type"),
        *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "output_tokens"),
        "final_ln_after_pool",
    ),
    "model_cfg": (
        *("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"),
        *("init_logit_bias", "cast_dtype", "output_dict"),
    ),
    "preprocess_cfg": ("size", "mean", "std", "fill_color"),
}
# timm's plain ViTs: all with a class token, biases, exact GELU and epsilon 1e-6.
_TIMM = re.compile(r"vit_(tiny|small|base|large)_patch(\d+)_(\d+)(\..*)?")
_TIMM_SIZES = {"tiny": (192, 3, 12), "small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}
# Plain names that timm 1.0 has; OpenCLIP cannot pass it another picture size.
_TIMM_NAMES = {
    *(f"vit_{size}_patch16_{px}" for size in _TIMM_SIZES for px in (224, 384)),
    *(f"vit_{size}_patch32_{px}" for size in ("small", "base", "large") for px in (224, 384)),
    *("vit_base_patch8_224", "vit_small_patch8_224", "vit_large_patch14_224"),
}
_POOLERS = {"cls_last_hidden_state_pooler": "cls", "mean_pooler": "mean"}


def read(spec: Mapping[str, Any], where: str) -> Hints:
    """Hints (dotted fields of `config.Model`) of the content of an open_clip_config.json.

    Raises:
        DataError: for settings that are missing, of a wrong type, unknown or not ours.
    """
    m = _part(spec, "model_cfg", where)
    v, t = _part(m, "vision_cfg", where), _part(m, "text_cfg", where)
    pre = _part(spec, "preprocess_cfg", where) if "preprocess_cfg" in spec else {}
    act = "quick_gelu" if _value(m, "quick_gelu", False, bool, where) else "gelu"
    hints: Hints = {
        "embed_dim": _value(m, "embed_dim", None, int, where),
        "logit_bias": m.get("init_logit_bias") is not None,
        "vision.normalize": normalization(pre.get("mean"), pre.get("std"), where),
    }
    hints |= _timm(v, where) if v.get("timm_model_name") else _vit(v, act, where)
    return hints | (_hf_text(t, where) if t.get("hf_model_name") else _clip_text(t, act, where))


def _part(spec: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """One group of settings, all known and all ours."""
    part = spec.get(name)
    if not isinstance(part, Mapping):
        raise DataError(f"{where} holds no {name}", "download or save it again")
    fixed = _FIXED[name]
    bad = [k for k, v in part.items() if k in fixed and v not in fixed[k]]
    bad += [k for k, v in part.items() if k not in fixed and k not in _READ[name] and v not in (None, False)]
    if bad:
        raise DataError(
            f"{where}: {some([f'{name}.{k} {shown(part[k])}' for k in bad], 20)} is not what our models compute",
            "there is no conversion of this architecture",
        )
    return part


def _value(part: Mapping[str, Any], key: str, default: Any, kind: Any, where: str) -> Any:
    value = part.get(key)
    value = default if value is None else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{where}: {key} is {shown(value)}", "download or save it again")
    return value


def _eps(part: Mapping[str, Any], where: str) -> float:
    kwargs = part.get("norm_kwargs") or {}
    if not isinstance(kwargs, Mapping) or kwargs.keys() - {"eps"}:
        raise DataError(f"{where}: norm_kwargs {shown(kwargs)} is not ours", "only eps is read")
    return _value(kwargs, "eps", 1e-5, float, where)


def _image_size(v: Mapping[str, Any], where: str) -> int:
    size = v.get("image_size", 224)
    if isinstance(size, list) and len(set(map(str, size))) == 1:
        size = size[0]
    return _value({"image_size": size}, "image_size", None, int, where)


def _vit(v: Mapping[str, Any], act: str, where: str) -> Hints:
    if isinstance(v.get("layers"), list):
        raise DataError(f"{where} describes a ResNet", "vision transformers are read")
    width = _value(v, "width", 768, int, where)
    head = _value(v, "head_width", 64, int, where)
    if head < 1:
        raise DataError(f"{where}: vision_cfg.head_width is {shown(head)}", "at least 1")
    pool = v.get("pool_type", "tok")
    # Behind the mean, the norm must follow it, as ours does; of one token the order does not matter.
    if pool not in ("tok", "avg") or (pool == "avg" and not v.get("final_ln_after_pool", False)):
        raise DataError(
            f"{where}: vision_cfg.pool_type {shown(pool)} with final_ln_after_pool"
            f" {v.get('final_ln_after_pool', False)} is not ours",
            "the class token, or the mean before the last norm",
        )
    return {
        "vision.image_size": _image_size(v, where),
        "vision.patch_size": _value(v, "patch_size", 16, int, where),
        "vision.width": width,
        "vision.depth": _value(v, "layers", 12, int, where),
        "vision.heads": width // head,
        "vision.mlp_dim": int(width * _value(v, "mlp_ratio", 4.0, (int, float), where)),
        "vision.act": act,
        "vision.ln_eps": _eps(v, where),
        "vision.ln_pre": not v.get("no_ln_pre", False),
        "vision.pool": {"tok": "cls", "avg": "mean"}[pool],
    }


def _timm(v: Mapping[str, Any], where: str) -> Hints:
    name = str(v["timm_model_name"])
    found = _TIMM.fullmatch(name)
    if (
        not found
        or v.get("timm_pool", "avg") not in ("", "token")
        or v.get("timm_proj", "linear") != "linear"
    ):
        raise DataError(
            f"{where}: timm_model_name {shown(name)} with timm_pool {shown(v.get('timm_pool', 'avg'))} and timm_proj"
            f" {shown(v.get('timm_proj', 'linear'))} is not ours",
            "timm's plain ViTs with their class token and a linear projection are read",
        )
    width, heads, depth = _TIMM_SIZES[found[1]]
    return {
        "vision.image_size": int(found[3]),
        "vision.patch_size": int(found[2]),
        "vision.width": width,
        "vision.heads": heads,
        "vision.depth": depth,
    }


def _hf_text(t: Mapping[str, Any], where: str) -> Hints:
    pooler = t.get("hf_pooler_type", "mean_pooler")
    if pooler not in _POOLERS:
        why = (
            "it is a dense layer and tanh behind the encoder" if pooler == "cls_pooler" else "it is not ours"
        )
        raise DataError(
            f"{where}: text_cfg.hf_pooler_type {shown(pooler)}: {why}", f"read: {', '.join(_POOLERS)}"
        )
    proj = t.get("hf_proj_type", "mlp")
    if proj not in (None, "linear", "mlp"):
        raise DataError(f"{where}: text_cfg.hf_proj_type {shown(proj)} is not ours", "linear, mlp or none is")
    return {
        "text.kind": "bert",
        "text.context_length": _value(t, "context_length", 77, int, where),
        "text.pool": _POOLERS[pooler],
        "text.proj": proj or "none",
    }


def _clip_text(t: Mapping[str, Any], act: str, where: str) -> Hints:
    width = _value(t, "width", 512, int, where)
    pool, proj = t.get("pool_type", "argmax"), t.get("proj_type", "linear")
    if pool not in ("argmax", "eos") or proj != "linear":
        raise DataError(
            f"{where}: text_cfg.pool_type {shown(pool)} with proj_type {shown(proj)} is not ours",
            "the end token and a linear projection are",
        )
    return {
        "text.kind": "clip",
        "text.context_length": _value(t, "context_length", 77, int, where),
        "text.vocab_size": _value(t, "vocab_size", 49408, int, where),
        "text.width": width,
        "text.heads": _value(t, "heads", 8, int, where),
        "text.depth": _value(t, "layers", 12, int, where),
        "text.mlp_dim": int(width * _value(t, "mlp_ratio", 4.0, (int, float), where)),
        "text.act": act,
        "text.ln_eps": _eps(t, where),
        "text.eot_id": -1 if pool == "argmax" else _value(t, "eos_id", 2, int, where),
    }


def timm_name(v: config.Vision) -> str:
    """The name in timm of a vision tower; "" when it has none.

    Example:
        >>> timm_name(config.Vision(act="gelu", ln_pre=False, patch_bias=True, ln_eps=1e-6))
        'vit_base_patch16_224'
    """
    plain = (v.act, v.ln_pre, v.patch_bias, v.ln_eps, v.pool, v.proj)
    if plain != ("gelu", False, True, 1e-6, "cls", "linear"):
        return ""
    for size, shape in _TIMM_SIZES.items():
        name = f"vit_{size}_patch{v.patch_size}_{v.image_size}"
        if shape == (v.width, v.heads, v.depth) and v.mlp_dim == 4 * v.width and name in _TIMM_NAMES:
            return name
    return ""


def write(m: config.Model, *, text_name: str, tokenizer_name: str) -> dict[str, Any]:
    """The content of an open_clip_config.json for a model that OpenCLIP can hold (see convert/outputs.py).

    Args:
        m: the model.
        text_name: `hf_model_name` of a BERT text tower: a folder or a hub name with its config.
        tokenizer_name: `hf_tokenizer_name`; "" leaves OpenCLIP's own tokenizer.
    """
    v, t = m.vision, m.text
    mean, std = NORMALIZE[v.normalize]
    model: dict[str, Any] = {"embed_dim": m.embed_dim}
    name = timm_name(v)
    if v.act == "quick_gelu" and not name:
        model["quick_gelu"] = True
    if m.logit_bias:
        model["init_logit_bias"] = m.init_logit_bias
    if name:
        # An empty pool leaves timm's own: the class token.
        vision: dict[str, Any] = {
            "image_size": v.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        }
    else:
        vision = {
            "image_size": v.image_size,
            "layers": v.depth,
            "width": v.width,
            "patch_size": v.patch_size,
            "head_width": v.width // v.heads,
            "mlp_ratio": _ratio(v.mlp_dim, v.width),
        }
        vision |= {} if v.ln_pre else {"no_ln_pre": True}
        vision |= {} if v.pool == "cls" else {"pool_type": "avg", "final_ln_after_pool": True}
        vision |= {} if v.ln_eps == 1e-5 else {"norm_kwargs": {"eps": v.ln_eps}}
    text: dict[str, Any] = {"context_length": t.context_length, "vocab_size": t.vocab_size}
    if t.kind == "bert":
        text |= {
            "hf_model_name": text_name,
            "hf_tokenizer_name": tokenizer_name or text_name,
            "hf_model_pretrained": False,
            "hf_proj_type": None if t.proj == "none" else t.proj,
            "hf_pooler_type": {pool: name for name, pool in _POOLERS.items()}[t.pool],
        }
    else:
        text |= {
            "width": t.width,
            "heads": t.heads,
            "layers": t.depth,
            "mlp_ratio": _ratio(t.mlp_dim, t.width),
        }
        text |= {"hf_tokenizer_name": tokenizer_name} if tokenizer_name else {}
        text |= {} if t.eot_id < 0 else {"pool_type": "eos", "eos_id": t.eot_id}
        text |= {} if t.ln_eps == 1e-5 else {"norm_kwargs": {"eps": t.ln_eps}}
    return {
        "model_cfg": model | {"vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "size": v.image_size,
            "mode": "RGB",
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _ratio(mlp_dim: int, width: int) -> float:
    """A float that gives `mlp_dim` back when OpenCLIP multiplies it by the width and cuts the fraction off."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)
