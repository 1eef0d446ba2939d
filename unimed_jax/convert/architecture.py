"""Which model a state dict is, from its names and shapes; what they cannot show is asked for, never guessed.

Visible: sizes, depth, patches, positions, vocabulary, norms, kind of head. Not visible: the activation, the number of
heads, epsilon, pooling, normalisation of pixels. Those come from the files beside the weights (`hints`), from the
format itself when its own reader leaves no choice, or from a model that the user names.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unimed_jax import config
from unimed_jax.convert import mapping
from unimed_jax.convert.formats import SCALARS, find_tables, format_of, ignored, split
from unimed_jax.convert.mapping import Shapes, Table
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import zoo

__all__ = [
    "SCALARS",
    "Inferred",
    "describe",
    "find_tables",
    "flat",
    "format_of",
    "ignored",
    "infer",
    "nearest",
    "rank",
    "same",
    "split",
]

# The original passes force_quick_gelu, and OpenAI's archives hold no other activation.
_FORMAT_IMPLIES: dict[str, dict[str, Any]] = {
    "unimed": {"vision.act": "quick_gelu"},
    "openai": {"vision.act": "quick_gelu", "text.act": "quick_gelu"},
}
_HEAD_WIDTH = 64  # of OpenAI's, OpenCLIP's and timm's transformers, where nothing says otherwise
_BY_WIDTH = ("unimed", "openclip", "openai")  # formats whose readers compute heads so
_BERT_WIDTHS = (768, 1024)  # BERT base and large have heads of 64; smaller ones (MiniLM: 384 / 12) do not
# A format's value of these is a habit of training, not a part of the function.
_SOFT = ("dropout", "context_length", "normalize", "pad_id")
_HIDDEN = {
    "vision": ("heads", "act", "ln_eps", "pool", "normalize"),
    "text": ("heads", "act", "ln_eps", "pool", "pad_id", "eot_id", "dropout", "context_length"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """What names and shapes say."""

    format: str  # unimed | openclip | openai | hf-clip | hf-vision | hf-bert | hf-dinov2 | native
    tables: dict[str, Table]  # by tower; only towers that are there
    model: config.Model
    certain: dict[str, Any]  # visible or said, by dotted field
    assumed: dict[str, Any]  # what the format's own reader would take
    fits: tuple[str, ...]  # named models of these shapes

    @property
    def towers(self) -> tuple[str, ...]:
        """Those of vision and text that are there."""
        return tuple(t for t in ("vision", "text") if t in self.tables)


def infer(
    state: Shapes,
    *,
    hints: Mapping[str, Any] | None = None,
    model: config.Model | None = None,
    fallback: config.Model | None = None,
    where: str = "",
) -> Inferred:
    """The architecture of a state dict.

    Args:
        state: shape by key, wrappers' prefixes taken off.
        hints: what the files beside the weights say, by dotted field of `config.Model` ("vision.act"); and "format".
        model: an architecture that was named; then only what contradicts it is looked for, and the shapes are left
            to `mapping.compare`, which lists tensors.
        fallback: gives what nothing else says.
        where: file name for messages.

    Raises:
        DataError: for unknown names, or hints that contradict the shapes or the named model.
        UsageError: when something that changes the function cannot be known, with the named models that fit.
    """
    said = dict(hints or {})
    found = find_tables(state)
    format_ = said.pop("format", "") or format_of(found)
    visible = _visible(state, found)
    grid = visible.pop("vision.grid", 0)
    implied = {
        f"{tower}.{k}": v for tower, table in found.items() for k, v in table.implies.items()
    } | _FORMAT_IMPLIES.get(format_, {})
    implied = {k: v for k, v in implied.items() if k.split(".")[0] in found}
    said = {k: v for k, v in said.items() if "." not in k or k.split(".")[0] in found}
    _refuse_contradictions(where, visible, said, "the tensors", "the config beside them")
    ranked = rank(visible, found)
    fits = tuple(name for name, diff in ranked if not diff)
    known = implied | visible | said
    if known.get("text.context_length", 0) > known.get("text.max_positions", math.inf):
        known["text.context_length"] = known["text.max_positions"]
    if model is not None:
        firm = {
            k: v
            for k, v in implied.items()
            if found[k.split(".")[0]].firm or k == "text.kind" or k in _FORMAT_IMPLIES.get(format_, {})
        }
        hard = {k: v for k, v in (firm | said).items() if k.rpartition(".")[2] not in _SOFT}
        theirs = {k: v for k, v in flat(model).items() if k in hard}
        _refuse_contradictions(where, hard, theirs, "the file", f"model {model.name!r}")
        return Inferred(
            format=format_, tables=found, model=copy.deepcopy(model), certain=known, assumed={}, fits=fits
        )
    assumed = _heads(known, found, fits) if format_ in _BY_WIDTH else {}
    if fallback is not None:
        assumed |= _fall_back(flat(fallback), known, assumed, found)
    asked = [
        f"{t}.{f}"
        for t in found
        for f in _HIDDEN[t]
        if f"{t}.{f}" not in known | assumed and not (f == "eot_id" and known.get("text.kind") == "bert")
    ]
    if asked:
        raise _ask(where, asked, known, fits)
    # For what a damaged file does not show; it is listed as missing then.
    closest = {
        k: v for k, v in flat(zoo.MODELS[ranked[0][0]]).items() if k.split(".")[0] in (*found, "embed_dim")
    }
    fields = closest | known | assumed
    if "vision" in found and "vision.image_size" not in known:
        side = grid or closest["vision.image_size"] // closest["vision.patch_size"]
        fields["vision.image_size"] = side * fields["vision.patch_size"]
    return Inferred(
        format=format_,
        tables=found,
        model=_build(fields, found, ranked, format_),
        certain=known,
        assumed=assumed,
        fits=fits,
    )


def nearest(state: Shapes) -> list[str]:
    """Named models whose shapes a state dict has; else the closest and what differs.

    Example:
        >>> nearest({"visual.class_embedding": (768,)})[0].split(" ")[0]
        'unimed-clip-vit-b32'

    Raises:
        DataError: when no tower is known by its names.
    """
    found = find_tables(state)
    ranked = rank(_visible(state, found), found)  # grids are no field of a model and are not compared
    fits = [name for name, diff in ranked if not diff]
    if fits:
        return fits
    name, diff = ranked[0]
    words = ", ".join(f"{field} {have} instead of {want}" for field, (have, want) in diff.items())
    return [f"{name} ({words})"]


def rank(
    visible: Mapping[str, Any], found: Mapping[str, Table]
) -> list[tuple[str, dict[str, tuple[Any, Any]]]]:
    """Named models from the closest on: (name, {field: (in the tensors, in the model)})."""
    out = []
    for name, m in zoo.MODELS.items():
        ours = flat(m)
        diff = {k: (v, ours[k]) for k, v in visible.items() if k in ours and ours[k] != v}
        if found.keys() != {"vision", "text"} or any(table.absent for table in found.values()):
            # One tower alone, or one without its head, says nothing of the head.
            diff = {k: v for k, v in diff.items() if k not in ("embed_dim", "vision.proj", "text.proj")}
        out.append((name, diff))
    return sorted(out, key=lambda item: len(item[1]))


def flat(m: config.Model) -> dict[str, Any]:
    """The fields of an architecture by dotted name, without those of training and of computing it."""
    plain = {"embed_dim": m.embed_dim, "logit_bias": m.logit_bias}
    for tower in ("vision", "text"):
        part = getattr(m, tower)
        plain |= {f"{tower}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(part)}
    return plain


def same(a: config.Model, b: config.Model) -> bool:
    """Whether two models are one architecture, whatever their names and ways of computing."""
    return flat(a) == flat(b)


def _visible(state: Shapes, found: Mapping[str, Table]) -> dict[str, Any]:
    """Fields that shapes show, by dotted name; a damaged file shows fewer."""
    parts, rest = split(state, found)
    out: dict[str, Any] = {}
    embed: list[int] = []
    for tower, table in found.items():
        shapes = {table.spelled(k): state[k] for k in parts[tower]}
        fields, width = (_see_vision if tower == "vision" else _see_text)(shapes, table)
        out |= {f"{tower}.{k}": v for k, v in fields.items() if v is not None}
        embed += [width] if width else []
    if embed:
        out["embed_dim"] = embed[0]
    if len(found) == 2:
        out["logit_bias"] = "logit_bias" in rest
    return out


def _see_common(shapes: Shapes, table: Table, norms: tuple[str, ...]) -> tuple[dict[str, Any], int | None]:
    """Fields that both towers have, and the width of the embedding."""
    see = lambda ours: mapping.our_shape(shapes, table, ours)
    widths = Counter(s[-1] for name in norms if (s := see(name)))
    width = widths.most_common(1)[0][0] if widths else None
    up = see("blocks/mlp/up/bias") or see("blocks/mlp/up/kernel")
    linear, mlp = see("proj/kernel"), see("proj/down/kernel")
    kind = "linear" if linear else "mlp" if mlp or see("proj/up/kernel") else None
    if kind not in table.proj:
        kind = "none" if "none" in table.proj else table.proj[0]
    head = linear or mlp or (None,)
    if kind == "linear" and width and head[0] != width:  # damaged: the other tower knows better
        head = (None,)
    embed = head[-1] if kind != "none" else width
    fields = {
        "width": width,
        "depth": mapping.depth(shapes, table) or None,
        "mlp_dim": up[-1] if up else None,
        "proj": kind,
    }
    return fields, embed


def _see_vision(shapes: Shapes, table: Table) -> tuple[dict[str, Any], int | None]:
    fields, embed = _see_common(shapes, table, ("cls", "pos", "ln_post/scale", "blocks/ln1/scale"))
    kernel, pos = (mapping.our_shape(shapes, table, name) for name in ("patch/kernel", "pos"))
    fields["patch_size"] = patch = kernel[0] if kernel else None
    if pos and len(pos) == 2 and pos[0] > 1:
        # A table that is no class token and a square is listed as mis-shaped afterwards.
        fields["grid"] = side = math.isqrt(pos[0] - 1)
        fields["image_size"] = side * patch if patch else None
    has = lambda prefix: any(
        mapping.our_shape(shapes, table, row.ours) is not None
        for row in table.rows
        if row.ours.startswith(prefix)
    )
    return fields | {"ln_pre": has("ln_pre"), "patch_bias": has("patch/bias")}, embed


def _see_text(shapes: Shapes, table: Table) -> tuple[dict[str, Any], int | None]:
    fields, embed = _see_common(shapes, table, ("word", "pos", "ln_embed/scale", "blocks/ln1/scale"))
    word, pos = (mapping.our_shape(shapes, table, name) for name in ("word", "pos"))
    fields["vocab_size"] = word[0] if word else None
    fields["max_positions"] = pos[0] if pos else None
    kind = table.implies.get("kind") or ("bert" if "text/type" in shapes else "clip")
    if kind == "clip" and pos:
        fields["context_length"] = pos[0]
    return fields | {"kind": kind}, embed


def _heads(known: Mapping[str, Any], found: Mapping[str, Table], fits: tuple[str, ...]) -> dict[str, int]:
    """Heads of 64, as the formats' own readers take them; unless a named model of these shapes has others."""
    out = {}
    for tower in found:
        field, width = f"{tower}.heads", known.get(f"{tower}.width")
        if field in known or not width or width % _HEAD_WIDTH:
            continue
        if known.get("text.kind") == "bert" and tower == "text" and width not in _BERT_WIDTHS:
            continue
        heads = width // _HEAD_WIDTH
        if all(flat(zoo.MODELS[name])[field] == heads for name in fits):
            out[field] = heads
    return out


def _fall_back(
    theirs: Mapping[str, Any],
    known: Mapping[str, Any],
    assumed: Mapping[str, Any],
    found: Mapping[str, Table],
) -> dict[str, Any]:
    """What nothing else says, from another model; its tower may be quite another, and then only has to be possible."""
    out = {f"{t}.{f}": theirs[f"{t}.{f}"] for t in found for f in _HIDDEN[t] if f"{t}.{f}" not in known}
    for tower in found:
        field = f"{tower}.heads"
        if field in out and known.get(f"{tower}.width", 0) % out[field]:
            out[field] = assumed.get(field, 1)
    if out.get("text.pool") == "eot" and known.get("text.kind") == "bert":
        out["text.pool"] = "cls"
    return out


def _refuse_contradictions(
    where: str, a: Mapping[str, Any], b: Mapping[str, Any], a_name: str, b_name: str
) -> None:
    words = [
        f"{k} is {a[k]} by {a_name}, {b[k]} by {b_name}" for k in sorted(a.keys() & b.keys()) if a[k] != b[k]
    ]
    if words:
        raise DataError(
            f"{where or 'state dict'} contradicts itself or the name: {'; '.join(words)}",
            "use the config that belongs to the weights, or name the right model",
        )


def _ask(where: str, asked: list[str], known: Mapping[str, Any], fits: tuple[str, ...]) -> UsageError:
    usable = [
        name
        for name in fits
        if all(
            flat(zoo.MODELS[name]).get(k) == v
            for k, v in known.items()
            if "." in k and k.rpartition(".")[2] not in (*_SOFT, "proj")
        )
    ]
    remedy = (
        f"--model NAME says it: {', '.join(usable)}"
        if usable
        else "no named model has these shapes: give the folder with the weights' own config"
    )
    return UsageError(f"{where or 'the state dict'} does not say {', '.join(asked)}", remedy)


def _build(
    fields: Mapping[str, Any],
    found: Mapping[str, Table],
    ranked: list[tuple[str, dict[str, tuple[Any, Any]]]],
    format_: str,
) -> config.Model:
    """The model of the fields; a named one when it is the same, so that its name and dtype are kept."""
    if len(found) == 2:
        equal = [
            name
            for name, diff in ranked
            if not diff and all(flat(zoo.MODELS[name])[k] == v for k, v in fields.items())
        ]
        # Several names may share an architecture; then only the format tells whose weights these are.
        equal = [name for name in equal if name.startswith(format_)] or equal
        if len(equal) == 1:
            return zoo.get(equal[0])
    m = config.Model(name="")
    for path, value in fields.items():
        tower, _, field = path.rpartition(".")
        setattr(getattr(m, tower) if tower else m, field, value)
    if "vision" not in found:
        m.vision.proj = "linear"
    m.name = describe(m, tuple(found))
    return m


def describe(m: config.Model, towers: Iterable[str] = ("vision", "text")) -> str:
    """One short name of an architecture.

    Example:
        >>> describe(config.Model())
        'vit-768x12-16px-224+bert-768x12'
    """
    v, t = m.vision, m.text
    words = {
        "vision": f"vit-{v.width}x{v.depth}-{v.patch_size}px-{v.image_size}",
        "text": f"{t.kind}-{t.width}x{t.depth}",
    }
    return "+".join(words[tower] for tower in ("vision", "text") if tower in tuple(towers))
