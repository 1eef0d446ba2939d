"""How other libraries name and lay out the weights of a tower, as data; one table serves both directions.

`convert/mapping.py` applies them. Names and layouts are those of the checkpoints that OpenCLIP, timm and transformers
write.
"""

from __future__ import annotations

import re
from typing import Any

from unimed_jax.convert.mapping import MOVES, Row, State, Table, from_params, leaves, to_params, to_state

__all__ = ["MOVES", "TABLES", "Row", "State", "Table", "from_params", "leaves", "to_params", "to_state"]

# What a key is for when it holds no weights of a tower.
_IDS = "position_ids buffer"
_POOLER = "pooler, not part of the encoder"
_HEAD = "pre-training head, not part of the encoder"


def _dense(ours: str, *theirs: str, scale: str = "") -> tuple[Row, Row]:
    kernel = Row(f"{ours}/kernel", tuple(f"{k}.weight" for k in theirs), "transpose", scale)
    return kernel, Row(f"{ours}/bias", tuple(f"{k}.bias" for k in theirs), "same", scale)


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}/scale", (f"{theirs}.weight",)), Row(f"{ours}/bias", (f"{theirs}.bias",))


def _clip_layers(prefix: str) -> tuple[Row, ...]:
    attn = f"{prefix}.self_attn"
    return (
        *_norm("blocks/ln1", f"{prefix}.layer_norm1"),
        *_dense("blocks/attn/qkv", f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
        *_dense("blocks/attn/out", f"{attn}.out_proj"),
        *_norm("blocks/ln2", f"{prefix}.layer_norm2"),
        *_dense("blocks/mlp/up", f"{prefix}.mlp.fc1"),
        *_dense("blocks/mlp/down", f"{prefix}.mlp.fc2"),
    )


HF_CLIP_VISION = Table(
    name="CLIPVisionModelWithProjection",
    tower="vision",
    rows=(
        Row("cls", ("vision_model.embeddings.class_embedding",)),
        Row("patch/kernel", ("vision_model.embeddings.patch_embedding.weight",), "conv"),
        Row("pos", ("vision_model.embeddings.position_embedding.weight",)),
        *_norm("ln_pre", "vision_model.pre_layrnorm"),  # spelled so in the checkpoints
        *_clip_layers("vision_model.encoder.layers.{i}"),
        *_norm("ln_post", "vision_model.post_layernorm"),
        Row("proj/kernel", ("visual_projection.weight",), "transpose"),
    ),
    marks=r"vision_model\..*|embeddings\.(class_embedding|patch_embedding\.weight)",
    owns=r"vision_model\..*|visual_projection\..*|(embeddings|encoder|pre_layrnorm|post_layernorm)\..*",
    ignore=((r"vision_model\.embeddings\.position_ids", _IDS),),
    # transformers 5 saves a CLIPVisionModel without the prefix.
    rename=((r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),),
    proj=("linear", "none"),
    implies={"pool": "cls"},
)

HF_CLIP_TEXT = Table(
    name="CLIPTextModelWithProjection",
    tower="text",
    rows=(
        Row("word", ("text_model.embeddings.token_embedding.weight",)),
        Row("pos", ("text_model.embeddings.position_embedding.weight",)),
        *_clip_layers("text_model.encoder.layers.{i}"),
        *_norm("ln_final", "text_model.final_layer_norm"),
        Row("proj/kernel", ("text_projection.weight",), "transpose"),
    ),
    marks=r"text_model\..*",
    owns=r"text_model\..*|text_projection\..*",
    ignore=((r"text_model\.embeddings\.position_ids", _IDS),),
    proj=("linear",),
    implies={"kind": "clip", "pool": "eot", "dropout": 0.0, "pad_id": 0},
)


def _bert_rows(prefix: str) -> tuple[Row, ...]:
    layer = f"{prefix}encoder.layer.{{i}}"
    attn = f"{layer}.attention"
    return (
        Row("word", (f"{prefix}embeddings.word_embeddings.weight",)),
        Row("pos", (f"{prefix}embeddings.position_embeddings.weight",)),
        Row("type", (f"{prefix}embeddings.token_type_embeddings.weight",)),
        *_norm("ln_embed", f"{prefix}embeddings.LayerNorm"),
        *_dense("blocks/attn/qkv", f"{attn}.self.query", f"{attn}.self.key", f"{attn}.self.value"),
        *_dense("blocks/attn/out", f"{attn}.output.dense"),
        *_norm("blocks/ln1", f"{attn}.output.LayerNorm"),
        *_dense("blocks/mlp/up", f"{layer}.intermediate.dense"),
        *_dense("blocks/mlp/down", f"{layer}.output.dense"),
        *_norm("blocks/ln2", f"{layer}.output.LayerNorm"),
    )


_OLD_NORMS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

HF_BERT = Table(
    name="BertModel",
    tower="text",
    rows=_bert_rows(""),
    marks=r"(bert\.)?(embeddings\.(word|token_type)_embeddings\.weight|encoder\.layer\.\d+\.intermediate\..*)",
    ignore=(
        (r"embeddings\.(position|token_type)_ids", _IDS),
        (r"pooler\..*", _POOLER),
        (r"cls\..*", _HEAD),
    ),
    rename=((r"^bert\.", ""), *_OLD_NORMS),
    absent=(r"proj/.*",),
    implies={"kind": "bert", "pool": "cls"},
)


def _hf_text(name: str, prefix: str, **more: Any) -> Table:
    """A BERT inside OpenCLIP's text tower: `prefix` differs between today's OpenCLIP and UniMed-CLIP's fork of it."""
    dotted = re.escape(prefix)
    return Table(
        name=name,
        tower="text",
        rows=(
            *_bert_rows(f"{prefix}transformer."),
            Row("proj/kernel", (f"{prefix}proj.weight",), "transpose"),
            Row("proj/up/kernel", (f"{prefix}proj.0.weight",), "transpose"),
            Row("proj/down/kernel", (f"{prefix}proj.2.weight",), "transpose"),
        ),
        marks=rf"{dotted}transformer\.(embeddings|encoder\.layer)\..*",
        owns=rf"{dotted}.*",
        # A pooler is no buffer: whether the features come from it is said by the config only.
        ignore=((rf"{dotted}transformer\.embeddings\.(position|token_type)_ids", _IDS),),
        rename=_OLD_NORMS,
        **more,
    )


_BERT_IMPLIES = {
    "kind": "bert",
    "act": "gelu",
    "ln_eps": 1e-12,
    "dropout": 0.1,
    "pad_id": 0,
    "context_length": 256,
}
OPENCLIP_HF_TEXT = _hf_text(
    "OpenCLIP text tower (Hugging Face BERT)",
    "text.",
    proj=("mlp", "linear", "none"),
    implies=_BERT_IMPLIES,
    firm=False,
)
UNIMED_TEXT = _hf_text(
    "UniMed-CLIP text tower",
    "text_encoder.",
    proj=("mlp",),
    implies={**_BERT_IMPLIES, "pool": "cls"},
)


def _resblocks(prefix: str) -> tuple[Row, ...]:
    """OpenAI's transformer block: torch's attention with its fused input matrix, rows in the order q, k, v."""
    block = f"{prefix}transformer.resblocks.{{i}}"
    return (
        *_norm("blocks/ln1", f"{block}.ln_1"),
        Row("blocks/attn/qkv/kernel", (f"{block}.attn.in_proj_weight",), "transpose"),
        Row("blocks/attn/qkv/bias", (f"{block}.attn.in_proj_bias",)),
        *_dense("blocks/attn/out", f"{block}.attn.out_proj"),
        *_norm("blocks/ln2", f"{block}.ln_2"),
        *_dense("blocks/mlp/up", f"{block}.mlp.c_fc"),
        *_dense("blocks/mlp/down", f"{block}.mlp.c_proj"),
    )


OPENCLIP_VISION = Table(
    name="OpenCLIP vision tower",
    tower="vision",
    rows=(
        Row("cls", ("visual.class_embedding",)),
        Row("patch/kernel", ("visual.conv1.weight",), "conv"),
        Row("pos", ("visual.positional_embedding",)),
        *_norm("ln_pre", "visual.ln_pre"),
        *_resblocks("visual."),
        *_norm("ln_post", "visual.ln_post"),
        Row("proj/kernel", ("visual.proj",)),
    ),
    marks=r"visual\.(class_embedding|positional_embedding|ln_post\..*|transformer\.resblocks\..*)",
    owns=r"visual\..*",
    proj=("linear",),
    implies={"ln_eps": 1e-5, "pool": "cls", "normalize": "openai"},
    firm=False,
)

_TIMM_BLOCK = "visual.trunk.blocks.{i}"
TIMM_VISION = Table(
    name="timm vision tower",
    tower="vision",
    rows=(
        Row("cls", ("visual.trunk.cls_token",), "lead2"),
        Row("pos", ("visual.trunk.pos_embed",), "lead1"),
        Row("patch/kernel", ("visual.trunk.patch_embed.proj.weight",), "conv"),
        Row("patch/bias", ("visual.trunk.patch_embed.proj.bias",)),
        *_norm("blocks/ln1", f"{_TIMM_BLOCK}.norm1"),
        *_dense("blocks/attn/qkv", f"{_TIMM_BLOCK}.attn.qkv"),
        *_dense("blocks/attn/out", f"{_TIMM_BLOCK}.attn.proj"),
        *_norm("blocks/ln2", f"{_TIMM_BLOCK}.norm2"),
        *_dense("blocks/mlp/up", f"{_TIMM_BLOCK}.mlp.fc1"),
        *_dense("blocks/mlp/down", f"{_TIMM_BLOCK}.mlp.fc2"),
        *_norm("ln_post", "visual.trunk.norm"),
        Row("proj/kernel", ("visual.head.proj.weight",), "transpose"),
    ),
    marks=r"visual\.trunk\..*",
    owns=r"visual\..*",
    proj=("linear", "none"),
    implies={"act": "gelu", "ln_eps": 1e-6, "ln_pre": False, "pool": "cls", "normalize": "openai"},
)


def _clip_text(name: str, prefix: str) -> Table:
    """OpenAI's text tower: at the top of a CLIP, below `text.` in a CustomTextCLIP."""
    dotted = re.escape(prefix)
    return Table(
        name=name,
        tower="text",
        rows=(
            Row("word", (f"{prefix}token_embedding.weight",)),
            Row("pos", (f"{prefix}positional_embedding",)),
            *_resblocks(prefix),
            *_norm("ln_final", f"{prefix}ln_final"),
            Row("proj/kernel", (f"{prefix}text_projection",)),
        ),
        marks=rf"{dotted}(token_embedding\.weight|positional_embedding|ln_final\..*|transformer\.resblocks\..*)",
        owns=rf"{dotted}(token_embedding\..*|positional_embedding|ln_final\..*|transformer\..*|text_projection.*|attn_mask)",
        ignore=((rf"{dotted}attn_mask", "attention mask buffer"),),
        proj=("linear",),
        implies={"kind": "clip", "ln_eps": 1e-5, "pool": "eot", "eot_id": -1, "dropout": 0.0, "pad_id": 0},
        firm=False,
    )


OPENCLIP_CLIP_TEXT = _clip_text("CLIP text tower", "")
OPENCLIP_CUSTOM_CLIP_TEXT = _clip_text("OpenCLIP text tower", "text.")

_DINO_LAYER = "encoder.layer.{i}"
_DINO_SELF = f"{_DINO_LAYER}.attention.attention"
HF_DINOV2 = Table(
    name="Dinov2Model",
    tower="vision",
    rows=(
        Row("cls", ("embeddings.cls_token",), "lead2"),
        Row("pos", ("embeddings.position_embeddings",), "lead1"),
        Row("patch/kernel", ("embeddings.patch_embeddings.projection.weight",), "conv"),
        Row("patch/bias", ("embeddings.patch_embeddings.projection.bias",)),
        *_norm("blocks/ln1", f"{_DINO_LAYER}.norm1"),
        *_dense("blocks/attn/qkv", f"{_DINO_SELF}.query", f"{_DINO_SELF}.key", f"{_DINO_SELF}.value"),
        *_dense(
            "blocks/attn/out",
            f"{_DINO_LAYER}.attention.output.dense",
            scale=f"{_DINO_LAYER}.layer_scale1.lambda1",
        ),
        *_norm("blocks/ln2", f"{_DINO_LAYER}.norm2"),
        *_dense("blocks/mlp/up", f"{_DINO_LAYER}.mlp.fc1"),
        *_dense("blocks/mlp/down", f"{_DINO_LAYER}.mlp.fc2", scale=f"{_DINO_LAYER}.layer_scale2.lambda1"),
        *_norm("ln_post", "layernorm"),
    ),
    marks=r"(dinov2\.)?(embeddings\.(cls_token|patch_embeddings\..*)|encoder\.layer\.\d+\.layer_scale1\..*)",
    ignore=(
        (r"embeddings\.mask_token", "mask token, serves DINOv2's own training only"),
        (r"classifier\..*", "classifier, not part of the encoder"),
    ),
    rename=(
        (r"^dinov2\.", ""),
        # transformers 5 has other names inside its module than in its files.
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    absent=(r"proj/.*",),
    implies={"ln_pre": False, "pool": "cls"},
)


def _native(tower: str, *same: Table) -> Table:
    """Our own files: paths as keys, layers stacked; every leaf that some table knows."""
    leaves_ = dict.fromkeys(row.ours for table in same for row in table.rows)
    leaves_ |= dict.fromkeys(("proj/kernel", "proj/up/kernel", "proj/down/kernel"))
    return Table(
        name=f"unimed_jax {tower} tower",
        tower=tower,
        rows=tuple(Row(leaf, (f"{tower}/{leaf}",)) for leaf in leaves_),
        marks=rf"{tower}/.*",
        owns=rf"{tower}/.*",
        proj=("linear", "mlp", "none"),
    )


NATIVE_VISION = _native("vision", OPENCLIP_VISION, TIMM_VISION)
NATIVE_TEXT = _native("text", OPENCLIP_CLIP_TEXT, HF_BERT)

TABLES: dict[str, Table] = {
    "openclip_vision": OPENCLIP_VISION,
    "timm_vision": TIMM_VISION,
    "hf_clip_vision": HF_CLIP_VISION,
    "hf_dinov2": HF_DINOV2,
    "openclip_clip_text": OPENCLIP_CLIP_TEXT,
    "openclip_custom_clip_text": OPENCLIP_CUSTOM_CLIP_TEXT,
    "openclip_hf_text": OPENCLIP_HF_TEXT,
    "unimed_text": UNIMED_TEXT,
    "hf_clip_text": HF_CLIP_TEXT,
    "hf_bert": HF_BERT,
    "native_vision": NATIVE_VISION,
    "native_text": NATIVE_TEXT,
}
