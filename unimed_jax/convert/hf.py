"""Hugging Face checkpoints: safetensors files and their config.json, read without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config
from unimed_jax.convert import tables
from unimed_jax.convert.tensor_file import open_safetensors
from unimed_jax.errors import DataError
from unimed_jax.models import clip

_ACT = {"gelu": "gelu", "quick_gelu": "quick_gelu"}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; half-precision ones become float32.

    Raises:
        DataError: when the file is missing or is no complete safetensors file.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and the header's string metadata.

    Raises:
        DataError: as `read_safetensors`.
    """
    mapped = open_safetensors(path)
    halves = ("float16", "bfloat16")
    # Copies: whoever holds them outlives the file, which may be cut or overwritten in place.
    state = {k: np.array(v, np.float32 if v.dtype.name in halves else v.dtype) for k, v in mapped.items()}
    mapped.release()
    return state, mapped.metadata


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: when it is missing, no JSON or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} is no readable JSON: {e}") from e
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def bert_config(path: str | Path) -> config.Text:
    """The `config.Text` of a BertModel's config.json, without projection and with CLS pooling.

    Raises:
        DataError: when it is no BERT config or names an activation or position scheme that we do not have.
    """
    c = read_json(Path(path))
    if c.get("model_type") != "bert" or c.get("position_embedding_type", "absolute") != "absolute":
        raise DataError(f"{path} describes no plain BERT (model_type {c.get('model_type')!r})")
    if c.get("hidden_act", "gelu") not in _ACT:
        raise DataError(
            f"{path}: hidden_act {c['hidden_act']!r} is not supported", f"one of {', '.join(_ACT)}"
        )
    try:
        return config.Text(
            vocab_size=c["vocab_size"],
            context_length=min(256, c["max_position_embeddings"]),
            max_positions=c["max_position_embeddings"],
            width=c["hidden_size"],
            depth=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            mlp_dim=c["intermediate_size"],
            act=_ACT[c.get("hidden_act", "gelu")],
            ln_eps=c.get("layer_norm_eps", 1e-12),
            dropout=c.get("hidden_dropout_prob", 0.1),
            pad_id=c.get("pad_token_id") or 0,
            proj="none",
        )
    except KeyError as e:
        raise DataError(f"{path} has no field {e.args[0]!r}") from e


def text_from_bert_safetensors(path: str | Path) -> clip.Params:
    """A BertModel checkpoint as our text tower without projection.

    Args:
        path: model.safetensors; its config.json must lie beside it.

    Returns:
        {"text": {...}}, float32.

    Raises:
        DataError: when the file, its config or their agreement is wrong.
    """
    text = bert_config(Path(path).parent / "config.json")
    m = config.Model(name=f"BERT of {path}", embed_dim=text.width, text=text)
    return {"text": tables.to_params(read_safetensors(path), tables.HF_BERT, m, where=str(path))}


def clip_to_params(state: Mapping[str, np.ndarray], m: config.Model, *, where: str = "") -> clip.Params:
    """A whole CLIPModel state dict (both towers and the temperature) as our parameters.

    Raises:
        DataError: listing every missing, unexpected, mis-shaped and non-finite key.
    """
    heads = {
        "vision": ("vision_model.", "visual_projection."),
        "text": ("text_model.", "text_projection."),
    }
    parts = {tower: {k: v for k, v in state.items() if k.startswith(p)} for tower, p in heads.items()}
    rest = state.keys() - {"logit_scale"} - parts["vision"].keys() - parts["text"].keys()
    if rest or "logit_scale" not in state:
        raise DataError(
            f"{where or 'state dict'} is no CLIPModel: unexpected {sorted(rest)[:6]}, or no logit_scale"
        )
    scale = np.asarray(state["logit_scale"], np.float32).reshape(())
    if not math.isfinite(scale):
        raise DataError(f"{where or 'state dict'}: logit_scale is {scale}")
    return {
        "vision": tables.to_params(parts["vision"], tables.HF_CLIP_VISION, m, where=where),
        "text": tables.to_params(parts["text"], tables.HF_CLIP_TEXT, m, where=where),
        "logit_scale": scale,
    }


def clip_from_params(params: clip.Params, m: config.Model) -> dict[str, np.ndarray]:
    """The inverse of `clip_to_params`.

    Raises:
        DataError: when CLIPModel cannot hold this model.
    """
    if "logit_bias" in params:
        raise DataError(f"CLIPModel has no place for the logit_bias of model {m.name!r}")
    return {
        **tables.from_params(params["vision"], tables.HF_CLIP_VISION, m),
        **tables.from_params(params["text"], tables.HF_CLIP_TEXT, m),
        "logit_scale": np.asarray(params["logit_scale"], np.float32),
    }
