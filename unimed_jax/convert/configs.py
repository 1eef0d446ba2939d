"""The config files that OpenCLIP and transformers put beside weights, in our words.

Each reader turns one file into hints: dotted fields of `config.Model`. A setting that our modules cannot compute is
refused by its name, never dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimed_jax.convert.mapped import shown
from unimed_jax.data.images import NORMALIZE
from unimed_jax.errors import DataError

_ACTS = ("gelu", "quick_gelu")
_HF_VISION = {  # what transformers takes where an old config.json is silent
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HF_TEXT = _HF_VISION | {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_HF_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_HF_DINOV2 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "use_swiglu_ffn": False,
    "qkv_bias": True,
}
_BICUBIC = 3  # Pillow's number

Hints = dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: when it is missing, no JSON or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} is no readable JSON: {e}", "download or save it again") from e
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object", "download or save it again")
    return value


def hf(spec: Mapping[str, Any], where: str) -> Hints:
    """Hints of a transformers config.json, by its model_type.

    Raises:
        DataError: for a model type or a setting that we do not have.
    """
    kind = spec.get("model_type")
    if kind == "clip":
        return _hf_clip(spec, where)
    if kind == "clip_vision_model":
        vision = _typed(spec.get("vision_config") or spec, _HF_VISION, where)
        return _hf_vision(vision, where, vision["intermediate_size"], "openai")
    if kind == "bert":
        return _hf_bert(spec, where)
    if kind == "dinov2":
        return _hf_dinov2(spec, where)
    if kind == "vision-text-dual-encoder":
        raise DataError(
            f"{where} is a VisionTextDualEncoder: its text features come from BERT's pooler and one matrix",
            "convert the folders of its two towers, or an OpenCLIP folder",
        )
    raise DataError(
        f"{where}: model_type {shown(kind)} is not read", "clip, clip_vision_model, bert and dinov2 are"
    )


def _typed(spec: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that we know, with transformers' defaults; numbers where numbers belong."""
    if not isinstance(spec, Mapping):
        raise DataError(f"{where} holds no settings where it should", "download or save it again")
    out = {k: spec.get(k) if spec.get(k) is not None else v for k, v in defaults.items()}
    for k, v in out.items():
        want = (int, float) if isinstance(defaults[k], float) else type(defaults[k])
        if not isinstance(v, want) or (isinstance(v, bool) and want is not bool):
            raise DataError(f"{where}: {k} is {shown(v)}", "download or save it again")
    return out


def _act(value: str, where: str) -> str:
    if value not in _ACTS:
        raise DataError(f"{where}: hidden_act {shown(value)} is not supported", f"one of {', '.join(_ACTS)}")
    return value


def _hf_clip(spec: Mapping[str, Any], where: str) -> Hints:
    text = _typed(spec.get("text_config") or {}, _HF_TEXT, where)
    vision = _typed(spec.get("vision_config") or {}, _HF_VISION, where)
    eos = text["eos_token_id"]
    return {
        **_hf_vision(vision, where, vision["intermediate_size"], "openai"),
        "text.vocab_size": text["vocab_size"],
        "text.max_positions": text["max_position_embeddings"],
        "text.width": text["hidden_size"],
        "text.depth": text["num_hidden_layers"],
        "text.heads": text["num_attention_heads"],
        "text.mlp_dim": text["intermediate_size"],
        "text.act": _act(text["hidden_act"], where),
        "text.ln_eps": text["layer_norm_eps"],
        # transformers pools at the largest id where a config says 2, its mark of files before 4.30.
        "text.eot_id": -1 if eos == 2 else eos,
    }


def _hf_vision(c: Mapping[str, Any], where: str, mlp_dim: int, normalize: str) -> Hints:
    return {
        "vision.image_size": c["image_size"],
        "vision.patch_size": c["patch_size"],
        "vision.width": c["hidden_size"],
        "vision.depth": c["num_hidden_layers"],
        "vision.heads": c["num_attention_heads"],
        "vision.mlp_dim": mlp_dim,
        "vision.act": _act(c["hidden_act"], where),
        "vision.ln_eps": c["layer_norm_eps"],
        "vision.normalize": normalize,
    }


def _hf_bert(spec: Mapping[str, Any], where: str) -> Hints:
    if spec.get("position_embedding_type", "absolute") != "absolute":
        raise DataError(
            f"{where}: position_embedding_type {shown(spec['position_embedding_type'])} is not ours"
        )
    if spec.get("is_decoder") or spec.get("add_cross_attention"):
        raise DataError(f"{where} describes a decoder", "an encoder is read")
    c = _typed(spec, _HF_BERT, where)
    return {
        "text.vocab_size": c["vocab_size"],
        "text.max_positions": c["max_position_embeddings"],
        "text.context_length": min(256, c["max_position_embeddings"]),
        "text.width": c["hidden_size"],
        "text.depth": c["num_hidden_layers"],
        "text.heads": c["num_attention_heads"],
        "text.mlp_dim": c["intermediate_size"],
        "text.act": _act(c["hidden_act"], where),
        "text.ln_eps": c["layer_norm_eps"],
        "text.dropout": c["hidden_dropout_prob"],
        "text.pad_id": c["pad_token_id"],
    }


def _hf_dinov2(spec: Mapping[str, Any], where: str) -> Hints:
    c = _typed(spec, _HF_DINOV2, where)
    if c["use_swiglu_ffn"] or not c["qkv_bias"]:
        raise DataError(
            f"{where}: a gated MLP or attention without biases is not ours", "S, B and L are read"
        )
    return _hf_vision(c, where, int(c["hidden_size"] * c["mlp_ratio"]), "imagenet")


def preprocessor(spec: Mapping[str, Any], where: str, *, strict: bool = True) -> Hints:
    """Hints of a transformers preprocessor_config.json.

    Args:
        spec: its content.
        where: file name for messages.
        strict: whether the model will be used with its own preprocessing; False for a tower that only starts a
            training, whose pictures are cropped as the run says.

    Raises:
        DataError: for a mean, standard deviation or resize rule that we do not have.
    """
    hints = {"vision.normalize": normalization(spec.get("image_mean"), spec.get("image_std"), where)}
    if spec.get("do_normalize", True) is not True:
        raise DataError(
            f"{where}: do_normalize is {shown(spec['do_normalize'])}", "pixels are always normalised"
        )
    if not strict:
        return hints
    size, crop = _side(spec.get("size"), where, crop=False), _side(spec.get("crop_size"), where, crop=True)
    wrong = {
        "do_resize": spec.get("do_resize", True) is not True,
        "resample": spec.get("resample", _BICUBIC) != _BICUBIC,
        "do_center_crop": spec.get("do_center_crop", True) is not True,
        "do_rescale": spec.get("do_rescale", True) is not True,
        "rescale_factor": not math.isclose(spec.get("rescale_factor", 1 / 255), 1 / 255),
        "size": size is not None and crop is not None and size != crop,
    }
    if bad := [k for k, v in wrong.items() if v]:
        raise DataError(
            f"{where}: {', '.join(f'{k} {shown(spec.get(k))}' for k in bad)} is not our preprocessing",
            "ours: shorter side to the image size, bicubic, centre crop, divide by 255",
        )
    return hints | ({"vision.image_size": crop or size} if crop or size else {})


def _side(value: Any, where: str, *, crop: bool) -> int | None:
    """Pixels of a square, of transformers' several spellings."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    # Resizing to height and width distorts; only one number means the shorter side.
    names = ("height", "width") if crop else ("shortest_edge",)
    sides = [value.get(k) for k in names] if isinstance(value, Mapping) else [None]
    if isinstance(sides[0], int) and len(set(sides)) == 1:
        return sides[0]
    raise DataError(
        f"{where}: {'crop_size' if crop else 'size'} {shown(value)} is not our preprocessing",
        "ours: shorter side to the image size, then a square from the centre",
    )


def normalization(mean: Any, std: Any, where: str) -> str:
    """The name in data/images.py of a mean and standard deviation; OpenAI's when both are None.

    Raises:
        DataError: when they are none of ours.
    """
    if mean is None and std is None:
        return "openai"
    for name, (a, b) in NORMALIZE.items():
        if _close(mean, a) and _close(std, b):
            return name
    raise DataError(
        f"{where}: mean {shown(mean)} and std {shown(std)} are none of ours",
        f"known: {', '.join(sorted(NORMALIZE))}",
    )


def _close(theirs: Any, ours: tuple[float, float, float]) -> bool:
    if not isinstance(theirs, (list, tuple)) or len(theirs) != 3:
        return False
    return all(
        isinstance(x, (int, float)) and math.isclose(x, y, abs_tol=1e-6)
        for x, y in zip(theirs, ours, strict=True)
    )
