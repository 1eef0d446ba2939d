"""How other libraries name and lay out the weights of a tower, as data; one table serves both directions.

A row says: our leaf, the key or keys that hold it elsewhere, and how the array is moved. `{i}` counts layers, which
are stacked on our leading axis. Several keys in one row are concatenated on our last axis (fused qkv).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from unimed_jax import config
from unimed_jax.errors import DataError
from unimed_jax.models import clip

State = Mapping[str, np.ndarray]

# name: (their array -> ours, our array -> theirs), exact inverses of each other
MOVES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda a: a, lambda a: a),
    "transpose": (lambda a: a.T, lambda a: a.T),  # Linear: [out in] <-> [in out]
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    "lead1": (lambda a: a[0], lambda a: a[None]),  # [1 ...] <-> [...]
    "lead2": (lambda a: a[0, 0], lambda a: a[None, None]),  # [1 1 d] <-> [d]
}


@dataclass(frozen=True, slots=True)
class Row:
    """One of our leaves and where it comes from."""

    ours: str  # path below the tower, e.g. "blocks/attn/qkv/kernel"
    theirs: tuple[str, ...]  # key patterns
    move: str = "same"  # key of MOVES
    scale: str = ""  # LayerScale key: folded into our last axis, written back as ones

    @property
    def layered(self) -> bool:
        """Whether the row holds one tensor per layer."""
        return "{i}" in self.theirs[0]


@dataclass(frozen=True, slots=True)
class Table:
    """One format of one tower."""

    name: str
    tower: str  # vision | text
    rows: tuple[Row, ...]
    ignore: tuple[str, ...] = ()  # regexes of their keys that carry no weights of this tower
    rename: tuple[tuple[str, str], ...] = ()  # (regex, replacement) for older spellings, before matching
    absent: tuple[str, ...] = ()  # regexes of our leaves that the format does not have


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
    ignore=(r"vision_model\.embeddings\.position_ids",),
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
    ignore=(r"text_model\.embeddings\.position_ids",),
)

_BERT_LAYER = "encoder.layer.{i}"
_BERT_SELF = f"{_BERT_LAYER}.attention.self"
HF_BERT = Table(
    name="BertModel",
    tower="text",
    rows=(
        Row("word", ("embeddings.word_embeddings.weight",)),
        Row("pos", ("embeddings.position_embeddings.weight",)),
        Row("type", ("embeddings.token_type_embeddings.weight",)),
        *_norm("ln_embed", "embeddings.LayerNorm"),
        *_dense("blocks/attn/qkv", f"{_BERT_SELF}.query", f"{_BERT_SELF}.key", f"{_BERT_SELF}.value"),
        *_dense("blocks/attn/out", f"{_BERT_LAYER}.attention.output.dense"),
        *_norm("blocks/ln1", f"{_BERT_LAYER}.attention.output.LayerNorm"),
        *_dense("blocks/mlp/up", f"{_BERT_LAYER}.intermediate.dense"),
        *_dense("blocks/mlp/down", f"{_BERT_LAYER}.output.dense"),
        *_norm("blocks/ln2", f"{_BERT_LAYER}.output.LayerNorm"),
    ),
    # The pooler and the pre-training heads are not part of the encoder.
    ignore=(r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"pooler\..*", r"cls\..*"),
    rename=(
        (r"^bert\.", ""),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    absent=(r"proj/.*",),
)

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
    # The mask token serves DINOv2's own training only.
    ignore=(r"embeddings\.mask_token",),
    rename=((r"^dinov2\.", ""),),
    absent=(r"proj/.*",),
)

TABLES: dict[str, Table] = {
    "hf_clip_vision": HF_CLIP_VISION,
    "hf_clip_text": HF_CLIP_TEXT,
    "hf_bert": HF_BERT,
    "hf_dinov2": HF_DINOV2,
}


def to_params(state: State, table: Table, m: config.Model, *, where: str = "") -> clip.Params:
    """Their state dict as the parameters of one of our towers (nested dict of float32 arrays).

    Leaves that the format does not have (`table.absent`, e.g. a projection) are left out.

    Args:
        state: arrays by key.
        table: the format.
        m: our architecture; only the table's tower is looked at.
        where: file name for messages.

    Raises:
        DataError: listing every missing, unexpected, mis-shaped and non-finite key.
    """
    want = _leaves(table, m)
    state = _renamed(state, table)
    shapes = _their_shapes(table, want)
    missing = sorted(shapes.keys() - state.keys())
    unexpected = [
        k for k in sorted(state.keys() - shapes.keys()) if not any(re.fullmatch(p, k) for p in table.ignore)
    ]
    both = sorted(shapes.keys() & state.keys())
    shaped = [
        f"{k} {list(state[k].shape)} instead of {list(shapes[k])}"
        for k in both
        if state[k].shape != shapes[k]
    ]
    broken = [k for k in both if not np.isfinite(np.asarray(state[k], np.float32)).all()]
    _refuse(
        table,
        where,
        {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped, "not finite": broken},
    )
    return clip.unflatten({row.ours: _take(state, row, want[row.ours]) for row in _rows(table, want)})


def from_params(params: clip.Params, table: Table, m: config.Model) -> dict[str, np.ndarray]:
    """One of our towers as their state dict (float32, C order); inverse of `to_params`, LayerScale becomes ones.

    Raises:
        DataError: when the parameters do not have the architecture's leaves and shapes, or the format cannot
            hold them.
    """
    want, have = _leaves(table, m), clip.flatten(params)
    have = {k: v for k, v in have.items() if not any(re.fullmatch(p, k) for p in table.absent)}
    _refuse(
        table,
        "parameters",
        {
            "missing": sorted(want.keys() - have.keys()),
            "unexpected": sorted(have.keys() - want.keys()),
            "mis-shaped": [
                f"{k} {list(have[k].shape)} instead of {list(want[k])}"
                for k in sorted(want.keys() & have.keys())
                if tuple(have[k].shape) != want[k]
            ],
        },
    )
    out: dict[str, np.ndarray] = {}
    for row in _rows(table, want):
        leaf = np.asarray(have[row.ours], np.float32)
        for i in range(len(leaf)) if row.layered else [None]:
            parts = np.split(leaf if i is None else leaf[i], len(row.theirs), axis=-1)
            for key, part in zip(row.theirs, parts, strict=True):
                out[key.format(i=i)] = np.ascontiguousarray(MOVES[row.move][1](part))
            if row.scale:
                out[row.scale.format(i=i)] = np.ones(leaf.shape[-1], np.float32)
    return out


def _leaves(table: Table, m: config.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of our leaves that the format must hold."""
    tower = clip.flatten(clip.skeleton(m)[1][table.tower])
    want = {k: tuple(v.shape) for k, v in tower.items() if not any(re.fullmatch(p, k) for p in table.absent)}
    if lost := sorted(want.keys() - {row.ours for row in table.rows}):
        raise DataError(
            f"{table.name} has no place for {_some(lost)} of model {m.name!r}",
            "choose a format whose architecture is the same",
        )
    return want


def _rows(table: Table, want: Mapping[str, tuple[int, ...]]) -> list[Row]:
    return [row for row in table.rows if row.ours in want]


def _their_shapes(table: Table, want: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every key that the format must have for our shapes."""
    out: dict[str, tuple[int, ...]] = {}
    for row in _rows(table, want):
        shape = want[row.ours][1:] if row.layered else want[row.ours]
        part = (*shape[:-1], shape[-1] // len(row.theirs))
        moved = MOVES[row.move][1](np.broadcast_to(np.float32(0), part)).shape  # no memory behind it
        for i in range(want[row.ours][0]) if row.layered else [None]:
            out |= {key.format(i=i): moved for key in row.theirs}
            if row.scale:
                out[row.scale.format(i=i)] = shape[-1:]
    return out


def _take(state: State, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    """Our leaf, filled layer by layer."""
    out = np.empty(shape, np.float32)
    for i in range(shape[0]) if row.layered else [None]:
        parts = [MOVES[row.move][0](np.asarray(state[k.format(i=i)], np.float32)) for k in row.theirs]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if row.scale:
            whole = whole * np.asarray(state[row.scale.format(i=i)], np.float32)
        out[... if i is None else i] = whole
    return out


def _renamed(state: State, table: Table) -> State:
    def name(key: str) -> str:
        for pattern, new in table.rename:
            key = re.sub(pattern, new, key)
        return key

    return {name(key): value for key, value in state.items()} if table.rename else state


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse(table: Table, where: str, faults: dict[str, list[str]]) -> None:
    words = [f"{len(names)} {kind}: {_some(names)}" for kind, names in faults.items() if names]
    if words:
        raise DataError(
            f"{where or 'state dict'} is no {table.name} of this architecture: {'; '.join(words)}",
            "compare the architecture with the file's own config",
        )
