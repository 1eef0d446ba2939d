"""The files that transformers wants beside weights: configs, picture preprocessing, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimed_jax import config
from unimed_jax.data.images import NORMALIZE
from unimed_jax.data.text import Tokenizer


def clip_vision(m: config.Model) -> dict[str, Any]:
    """The config.json of a CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "dtype": "float32",
        **_vision(m),
    }


def _vision(m: config.Model) -> dict[str, Any]:
    v = m.vision
    return {
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "num_channels": 3,
        "hidden_act": v.act,
        "layer_norm_eps": v.ln_eps,
        "attention_dropout": 0.0,
        "projection_dim": m.embed_dim,
    }


def clip(m: config.Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The config.json of a CLIPModel."""
    t = m.text
    text = {
        "model_type": "clip_text_model",
        "vocab_size": t.vocab_size,
        "hidden_size": t.width,
        "intermediate_size": t.mlp_dim,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "max_position_embeddings": t.max_positions,
        "hidden_act": t.act,
        "layer_norm_eps": t.ln_eps,
        "attention_dropout": 0.0,
        "projection_dim": m.embed_dim,
        "bos_token_id": tokenizer.first_id if tokenizer else 0,
        # 2 makes transformers pool at the largest id, as OpenAI's model does.
        "eos_token_id": 2 if t.eot_id < 0 else t.eot_id,
        "pad_token_id": 1,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": m.embed_dim,
        "logit_scale_init_value": m.init_logit_scale,
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **_vision(m)},
    }


def bert(t: config.Text) -> dict[str, Any]:
    """The config.json of the BERT inside a text tower."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "vocab_size": t.vocab_size,
        "hidden_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "intermediate_size": t.mlp_dim,
        "hidden_act": t.act,
        "hidden_dropout_prob": t.dropout,
        "attention_probs_dropout_prob": t.dropout,
        "max_position_embeddings": t.max_positions,
        "type_vocab_size": 2,
        "layer_norm_eps": t.ln_eps,
        "pad_token_id": t.pad_id,
        "position_embedding_type": "absolute",
    }


def pictures(v: config.Vision) -> dict[str, Any]:
    """The preprocessor_config.json of our evaluation pictures."""
    mean, std = NORMALIZE[v.normalize]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": v.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> list[str]:
    """Writes what AutoTokenizer needs for the ids that our tokenizer gives, special tokens included.

    Args:
        folder: must exist.
        tokenizer: bert or clip.
        context_length: tokens.

    Returns:
        The names of the files.
    """
    path = tokenizer.save(folder)
    spec = json.loads(path.read_text("utf-8"))
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    words = {i: w for w, i in vocabulary.items()} | {a["id"]: a["content"] for a in spec["added_tokens"]}
    first, last = words[tokenizer.first_id], words[tokenizer.last_id]
    ids = {first: tokenizer.first_id, last: tokenizer.last_id}
    single = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    end = {"SpecialToken": {"id": last, "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*single, end],
        "pair": [*single, end, {"Sequence": {"id": "B", "type_id": 1}}, end | {}],
        "special_tokens": {w: {"id": w, "ids": [i], "tokens": [w]} for w, i in ids.items()},
    }
    path.write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    if tokenizer.kind == "bert":
        special = {"cls_token": first, "sep_token": last, "unk_token": "[UNK]", "mask_token": "[MASK]"}
    else:
        special = {"bos_token": first, "eos_token": last, "unk_token": last}
    special["pad_token"] = words[tokenizer.pad_id]
    special = {k: w for k, w in special.items() if w in words.values()}
    options = special | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
    files = {
        "tokenizer_config.json": json.dumps(options, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }
    if tokenizer.kind == "bert":
        files["vocab.txt"] = "".join(f"{words.get(i, '')}\n" for i in range(max(words) + 1))
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return ["tokenizer.json", *files]
