"""Hugging Face checkpoints: safetensors files and their config.json, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config
from unimed_jax.convert import tables
from unimed_jax.convert.mapped import shown
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
        raise DataError(f"{path} describes no plain BERT (model_type {shown(c.get('model_type'))})")
    if c.get("hidden_act", "gelu") not in _ACT:
        raise DataError(
            f"{path}: hidden_act {shown(c['hidden_act'])} is not supported", f"one of {', '.join(_ACT)}"
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
    m = config.Model(name="BERT", embed_dim=text.width, text=text)
    return {"text": tables.to_params(read_safetensors(path), tables.HF_BERT, m, where=str(path))}
