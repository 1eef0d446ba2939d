"""Our models in the formats of others: refused when a format cannot hold one, read back before they appear.

Each writer is a row of `WRITERS`. Weights are written beside their place, compared bit for bit with what a reader finds
there, opened again by `convert.source`, which must see the same architecture, and only then renamed.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from unimed_jax import config
from unimed_jax.convert import architecture, hf_configs, mapping, openclip_config, tables
from unimed_jax.convert.mapping import Row, Table
from unimed_jax.convert.source import open_source
from unimed_jax.convert.tensor_writer import write_safetensors
from unimed_jax.data import files
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.models import clip

_NO_DUAL = (
    "VisionTextDualEncoderModel takes BERT's pooler (dense layer and tanh) and one matrix as its text features, this"
    " model the [CLS] state and its own head"
)
REFUSED = {
    "hf-dual": _NO_DUAL,
    "vision-text-dual-encoder": _NO_DUAL,
    "VisionTextDualEncoderModel": _NO_DUAL,
}
Weights = clip.Params | Iterable[tuple[str, np.ndarray]]  # nested, or leaves one at a time
Rule = tuple[Callable[[config.Model], bool], str]  # (what must not be, why)

_LINEAR: Rule = (lambda m: m.vision.proj != "linear", "its image head is one matrix")
_CLS: Rule = (lambda m: m.vision.pool != "cls", "its image features are the class token")
_LN_PRE: Rule = (lambda m: not m.vision.ln_pre, "its vision tower has a norm before the blocks")
_PATCH: Rule = (lambda m: m.vision.patch_bias, "its patch embedding has no bias")
_NO_BIAS: Rule = (lambda m: m.logit_bias, "it has no logit_bias")
_CLIP_HEAD: Rule = (lambda m: m.text.proj != "linear", "the head of its text tower is one matrix")
_CLIP_CONTEXT: Rule = (
    lambda m: m.text.context_length != m.text.max_positions,
    "its context length is its number of text positions",
)
_CLIP_KIND: Rule = (
    lambda m: m.text.kind != "clip",
    "its text tower is OpenAI's causal transformer, this one is BERT",
)


def _vit(rule: Rule) -> Rule:
    """A rule for OpenCLIP's own vision tower, which towers of timm need not keep."""
    return (lambda m: not openclip_config.timm_name(m.vision) and rule[0](m), rule[1])


def _with_clip(rule: Rule) -> Rule:
    return (lambda m: m.text.kind == "clip" and rule[0](m), rule[1])


@dataclass(frozen=True, slots=True)
class Writer:
    """One format that is written."""

    name: str
    is_file: bool
    weights: str  # file name in the folder
    rules: tuple[Rule, ...]
    towers: tuple[str, ...] = ("vision", "text")


WRITERS: dict[str, Writer] = {
    w.name: w
    for w in (
        Writer(
            "openclip",
            False,
            "open_clip_model.safetensors",
            (
                _LINEAR,
                _vit(_PATCH),
                _with_clip(_CLIP_HEAD),
                _with_clip(_CLIP_CONTEXT),
                _with_clip(
                    (
                        lambda m: not openclip_config.timm_name(m.vision) and m.vision.act != m.text.act,
                        "one setting gives both towers their activation",
                    )
                ),
            ),
        ),
        Writer(
            "unimed",
            True,
            "",
            (
                (lambda m: m.text.kind != "bert", "its text tower is BERT"),
                (lambda m: m.text.proj != "mlp", "the head of its text tower is a two-layer MLP"),
                (lambda m: m.text.pool != "cls", "its text features are the [CLS] token"),
                (lambda m: m.text.act != "gelu", "its BERT uses GELU"),
                (lambda m: m.text.ln_eps != 1e-12, "its BERT's norms have epsilon 1e-12"),
                (lambda m: m.text.pad_id != 0, "its padding is token 0"),
                (lambda m: m.vision.act != "quick_gelu", "its vision tower uses QuickGELU"),
                (lambda m: m.vision.heads * 64 != m.vision.width, "its vision tower has heads of 64"),
                (lambda m: m.vision.ln_eps != 1e-5, "its vision tower's norms have epsilon 1e-5"),
                (lambda m: m.vision.normalize != "openai", "its pictures are normalised with OpenAI's mean"),
                *(_LINEAR, _CLS, _LN_PRE, _PATCH, _NO_BIAS),
            ),
        ),
        Writer("hf-vision", False, "model.safetensors", (_LINEAR, _CLS, _LN_PRE, _PATCH), ("vision",)),
        Writer(
            "hf-clip",
            False,
            "model.safetensors",
            (_CLIP_KIND, _CLIP_HEAD, _CLIP_CONTEXT, _LINEAR, _CLS, _LN_PRE, _PATCH, _NO_BIAS),
        ),
    )
}


def obstacles(to: str, m: config.Model) -> list[str]:
    """Why a format cannot hold a model; empty when it can.

    Example:
        >>> obstacles("hf-vision", config.Model(vision=config.Vision(pool="mean")))
        ['its image features are the class token']
    """
    return [why for wrong, why in WRITERS[to].rules if wrong(m)]


def possible(m: config.Model) -> list[str]:
    """The formats that can hold a model; native always can."""
    return ["native", *(to for to in WRITERS if not obstacles(to, m))]


def write(
    to: str,
    params: Weights,
    m: config.Model,
    dst: str | Path,
    *,
    tokenizer: Tokenizer | None,
    force: bool = False,
    hf_text_name: str = "",
    facts: Mapping[str, Any] | None = None,
    more: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Writes a model in another format: whole and read back, or not at all.

    Args:
        to: a key of `WRITERS`.
        params: our weights, as a nested dict, or as leaves, (path, array) one at a time, which then are never in memory
            together (but for unimed); for hf-vision the vision tower is enough.
        m: their architecture.
        dst: folder, or file for unimed; it must not exist unless `force` is given.
        tokenizer: goes into the folder; None leaves it out.
        force: replace what is there.
        hf_text_name: hub name that OpenCLIP takes the text tower's config and tokenizer from; default: the absolute
            path of the folder, which works offline and must be changed when the folder is moved.
        facts: "epoch" (int) and "name" (str) for a unimed file.
        more: called with the finished folder or file beside its place, before it appears: adds a model card, checks
            it; what it writes, it syncs.

    Returns:
        The files written.

    Raises:
        UsageError: for a format that cannot hold the model, with the reasons and the formats that can; when the
            target exists; without torch for unimed.
        DataError: for weights that do not fit the architecture, a full disk, or a file that does not read back equal.
    """
    writer, dst = writer_for(to, m), Path(dst)
    refuse = functools.partial(refuse_target, to, dst, force=force)
    refuse()
    with files.swapped(dst, refuse) as beside:
        if writer.is_file:
            _save_torch(beside, params, m, facts or {})
        else:
            beside.mkdir()
            _save_folder(writer, beside, dst, params, m, tokenizer, hf_text_name)
        _read_back(writer, beside, m)
        files.sync_all(beside)
        if more:
            more(beside)
    return [dst] if writer.is_file else sorted(dst.iterdir())


# What a folder of ours consists of, whatever the format; with `force`, a folder with anything else stays.
_OWN_FILES = frozenset(
    {
        *(
            "README.md",
            "config.json",
            "open_clip_config.json",
            "open_clip_model.safetensors",
            "model.safetensors",
        ),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("vocab.txt", "vocab.json", "merges.txt"),
    }
)


def refuse_target(to: str, dst: Path, *, force: bool) -> None:
    """Refuses a target before any work is done.

    Raises:
        UsageError: when it exists and `force` is not given, is a folder instead of a file or the other way round, or
            is a folder that holds anything that this program does not write.
    """
    if not WRITERS[to].is_file:
        files.refuse_folder(dst, _OWN_FILES, force=force, what=f"{to} folder")
    elif dst.is_dir():
        raise UsageError(f"{dst} is a folder, --to {to} writes a file", "choose another place")
    elif os.path.lexists(dst) and not force:
        raise UsageError(f"{dst} exists", "choose another place, or --force to replace it")


def writer_for(to: str, m: config.Model) -> Writer:
    """The writer of a format, when the format can hold the model.

    Raises:
        UsageError: with the reasons why not and the formats that can; or for an unknown format.
    """
    part = lambda name: " (vision tower only)" if name == "hf-vision" else ""
    can = ", ".join(f"--to {name}{part(name)}" for name in possible(m))
    if to in REFUSED:
        raise UsageError(f"{to} cannot hold {m.name}: {REFUSED[to]}", f"these can, exactly: {can}")
    if to not in WRITERS:
        raise UsageError(
            f"no format {to!r}.{did_you_mean(to, WRITERS)}", f"one of {', '.join(WRITERS)}, native"
        )
    if reasons := obstacles(to, m):
        raise UsageError(f"{to} cannot hold {m.name}: {'; '.join(reasons)}", f"these can, exactly: {can}")
    return WRITERS[to]


def _tables(to: str, m: config.Model) -> dict[str, Table]:
    """The tables of a format's towers for one model."""
    bert = m.text.kind == "bert"
    if to == "unimed":
        return {"vision": tables.OPENCLIP_VISION, "text": tables.UNIMED_TEXT}
    if to == "openclip":
        timm = openclip_config.timm_name(m.vision)
        return {
            "vision": tables.TIMM_VISION if timm else tables.OPENCLIP_VISION,
            "text": tables.OPENCLIP_HF_TEXT if bert else tables.OPENCLIP_CLIP_TEXT,
        }
    towers = {"vision": tables.HF_CLIP_VISION, "text": tables.HF_CLIP_TEXT}
    return {tower: towers[tower] for tower in WRITERS[to].towers}


def _scalars(to: str, m: config.Model) -> list[str]:
    return ["logit_scale", *["logit_bias"] * m.logit_bias] if len(WRITERS[to].towers) == 2 else []


def stay_out(to: str, m: config.Model) -> list[str]:
    """The parts of a whole model that a format has no place for.

    Example:
        >>> stay_out("openclip", config.Model()), stay_out("hf-vision", config.Model())
        ([], ['text', 'logit_scale'])
    """
    others = [tower for tower in ("vision", "text") if tower not in WRITERS[to].towers]
    return [*others, "logit_scale", *["logit_bias"] * m.logit_bias] if others else []


def tensors(to: str, params: Weights, m: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """A model as a format's tensors (float32, C order), one at a time.

    Args:
        to: a key of `WRITERS`.
        params: nested dict, or leaves, (path, array) one at a time; what belongs to a tower that the format does not
            have stays out.
        m: their architecture.

    Raises:
        DataError: when the parameters do not have the architecture's leaves and shapes, of a nested dict at once, of
            leaves at the end; and at the end, listing every tensor with a value that is not finite.
    """
    towers = _tables(to, m)
    rows = {k: (Row(k, (k,)), ()) for k in _scalars(to, m)}
    for tower, table in towers.items():
        rows |= {f"{tower}/{row.ours}": (row, shape) for row, shape in mapping.rows_of(table, m)}
    elsewhere = stay_out(to, m)
    leaves = _whole(to, cast(clip.Params, params), m) if isinstance(params, dict) else params
    faults: mapping.Faults = {kind: [] for kind in ("missing", "unexpected", "mis-shaped", "not finite")}
    for name, leaf in leaves:
        row, shape = rows.pop(name, (None, ()))
        tower, _, path = name.partition("/")
        if row is None:
            out = towers[tower].lacks(path) if tower in towers else tower in elsewhere
            faults["unexpected"] += [] if out else [name]
        elif tuple(leaf.shape) != shape:
            faults["mis-shaped"].append(f"{name} {list(leaf.shape)} instead of {list(shape)}")
        else:
            for key, tensor in mapping.given(leaf, row):
                faults["not finite"] += [] if mapping.finite(tensor) else [key]
                yield key, tensor
    faults["missing"] = sorted(rows)
    mapping.refuse("parameters", to, faults, "train it again, or from an earlier step")


def _whole(to: str, params: clip.Params, m: config.Model) -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict that a format holds; all that is missing or does not fit is refused first."""
    for name in _scalars(to, m):
        if name not in params:
            raise DataError(f"the parameters have no {name}", "give a whole model")
        yield name, np.asarray(params[name], np.float32).reshape(())
    for tower, table in _tables(to, m).items():
        if tower not in params:
            raise DataError(f"the parameters have no {tower} tower, which {to} holds", "give a whole model")
        for name, leaf in mapping.fitting(params[tower], table, m).items():
            yield f"{tower}/{name}", leaf


def shapes(to: str, m: config.Model) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a format's tensors for one model."""
    out: dict[str, tuple[int, ...]] = dict.fromkeys(_scalars(to, m), ())
    for table in _tables(to, m).values():
        out |= mapping.their_shapes(table, m)
    return out


def _save_torch(file: Path, params: Weights, m: config.Model, facts: Mapping[str, Any]) -> None:
    try:
        import torch
    except ImportError as e:
        raise UsageError(
            "writing .pt needs torch, which is not installed",
            "pip install 'unimed-jax[torch]', or --to openclip, which needs none",
        ) from e
    state = {k: torch.from_numpy(v.copy() if v.ndim == 0 else v) for k, v in tensors("unimed", params, m)}
    body = {
        "epoch": int(facts.get("epoch", 0)),
        "name": str(facts.get("name", m.name)),
        "state_dict": state,
        # The original looks at state_dict only; heads and context length stand nowhere else.
        "unimed_jax": {"model": config.to_dict(m)},
    }
    try:
        torch.save(body, file)
    except RuntimeError as e:  # what torch's own writer says of a full disk is about its source code
        raise OSError(errno.EIO, "PyTorch could not write all of it, the disk may be full") from e
    written = open_source(file).state
    for name, tensor in state.items():
        if name not in written or not np.array_equal(_bits(tensor.numpy()), _bits(written[name])):
            raise DataError(f"{name} does not read back bit for bit", "the disk or the memory is faulty")


def _save_folder(
    writer: Writer,
    folder: Path,
    dst: Path,
    params: Weights,
    m: config.Model,
    tokenizer: Tokenizer | None,
    hf_text_name: str,
) -> None:
    write_safetensors(
        folder / writer.weights, shapes(writer.name, m), tensors(writer.name, params, m), {"format": "pt"}
    )
    files: dict[str, dict[str, Any]] = {}
    if writer.name == "openclip":
        here = str(dst.resolve())
        # OpenCLIP brings OpenAI's tokenizer itself; every other one it must be told of.
        own = "" if tokenizer is None or _is_openai(tokenizer, m) else here
        files[openclip_config.NAME] = openclip_config.write(
            m, text_name=hf_text_name or here, tokenizer_name=hf_text_name or own
        )
        if m.text.kind == "bert":
            files["config.json"] = hf_configs.bert(m.text)
    else:
        files["config.json"] = (
            hf_configs.clip_vision(m) if writer.name == "hf-vision" else hf_configs.clip(m, tokenizer)
        )
        files["preprocessor_config.json"] = hf_configs.pictures(m.vision)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    if tokenizer is not None and "text" in writer.towers:
        hf_configs.write_tokenizer(folder, tokenizer, m.text.context_length)


def _is_openai(tokenizer: Tokenizer, m: config.Model) -> bool:
    return m.text.kind == "clip" and tokenizer.kind == "clip" and tokenizer.vocab_size == 49408


def _unsaid(m: config.Model) -> tuple[str, ...]:
    """What a format may leave out, because it does not change the function."""
    return ("text.dropout",) if m.text.kind == "bert" else ("text.dropout", "text.pad_id")


def _read_back(writer: Writer, path: Path, m: config.Model) -> None:
    """Opens what was written as any user would, and compares architecture and names; its bits were, when written."""
    source = open_source(path)
    want, got = architecture.flat(m), architecture.flat(source.model)
    towers = WRITERS[writer.name].towers
    lost = [
        k
        for k in want
        if k.split(".")[0] in (*towers, "embed_dim") and k not in _unsaid(m) and want[k] != got[k]
    ]
    if lost:
        words = "; ".join(f"{k} {want[k]!r} reads back as {got[k]!r}" for k in lost)
        raise DataError(f"{writer.name} does not keep this architecture: {words}", "please report it")
    if other := sorted(source.state.keys() ^ shapes(writer.name, m).keys()):
        raise DataError(f"{', '.join(other[:4])} should be there, or should not", "please report it")


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32)
