"""Our own weight files: safetensors whose keys are parameter paths; and starting a run from them.

A tower file holds one or both towers ("vision/pos", ...); `config.Init.vision` and `.text` point to such files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimed_jax import config
from unimed_jax.convert.hf import read_json, read_with_metadata
from unimed_jax.errors import DataError
from unimed_jax.models import clip

FORMAT = "unimed_jax.tower"
# Settings that shapes do not show, but that change what the weights compute.
_SEMANTIC = {
    "vision": ("patch_size", "heads", "act", "ln_pre", "ln_eps", "normalize"),
    "text": ("kind", "heads", "act", "ln_eps", "pad_id", "eot_id"),
}


def save_tower(params: clip.Params, file: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Writes parameters as native safetensors, atomically.

    Args:
        params: nested dict such as {"vision": {...}}.
        file: target.
        meta: JSON values kept in the header: where the weights come from, and under "vision" or "text" the
            architecture (`config.to_dict`), which `init_from` compares.
    """
    from safetensors.numpy import save_file

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = {k: np.asarray(v, order="C") for k, v in clip.flatten(params).items()}
    header = {"format": FORMAT, "version": "1", "meta": json.dumps(meta or {}, sort_keys=True)}
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(leaves, str(beside), metadata=header)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def load_tower(file: str | Path) -> tuple[clip.Params, dict[str, Any]]:
    """Reads a file of `save_tower`: (nested params, meta).

    Raises:
        DataError: when the file is missing, cut short or of another format or version.
    """
    leaves, header = read_with_metadata(file)
    if header.get("format") != FORMAT or header.get("version") != "1":
        raise DataError(
            f"{file} is no tower file (format {header.get('format')!r}, version {header.get('version')!r})",
            "convert it first: unimed-jax convert",
        )
    return clip.unflatten(leaves), json.loads(header.get("meta", "{}"))


def init_from(
    cfg: config.Train, params: clip.Params, *, report: Callable[[str], None] | None = None
) -> clip.Params:
    """Overlays the weights that `cfg.init` names on initialised parameters; each leaf keeps its sharding.

    `cfg.init.model` comes first, then the towers, so that a tower may replace that of a whole model. Only heads
    (`*/proj/*`, `logit_scale`, `logit_bias`) may be absent from a file.

    Args:
        cfg: the experiment.
        params: initialised parameters.
        report: called once a leaf with "name shape: loaded from FILE" or "...: initialised".

    Raises:
        DataError: when a file lacks a leaf, has one too many, one of another shape or a value that is not finite,
            or was made for another architecture.
    """
    wanted = [(cfg.init.model, ("vision", "text", "logit_scale", "logit_bias"))]
    wanted += [(cfg.init.vision, ("vision",)), (cfg.init.text, ("text",))]
    leaves, origin = clip.flatten(params), {}
    for file, parts in wanted:
        if not file:
            continue
        loaded = (
            _read_model(file, cfg.model)
            if parts[-1] == "logit_bias"
            else _read_part(file, parts[0], cfg.model)
        )
        _check(loaded, leaves, parts, file)
        for name, value in loaded.items():
            leaves[name] = _place(value, leaves[name])
            origin[name] = file
    if report:
        for name, leaf in leaves.items():
            how = f"loaded from {origin[name]}" if name in origin else "initialised"
            report(f"{name} {list(leaf.shape)}: {how}")
    return clip.unflatten(leaves)


def _read_part(file: str, tower: str, m: config.Model) -> dict[str, np.ndarray]:
    params, meta = load_tower(file)
    if tower not in params:
        raise DataError(f"{file} holds no {tower} tower, only {', '.join(sorted(params))}")
    _refuse_other_meaning(file, tower, meta.get(tower, {}), m, _SEMANTIC[tower])
    return clip.flatten({tower: params[tower]})


def _refuse_other_meaning(
    file: str, tower: str, theirs: dict[str, Any], m: config.Model, fields: tuple[str, ...]
) -> None:
    ours = config.to_dict(getattr(m, tower))
    for field in fields:
        if field in theirs and theirs[field] != ours[field]:
            raise DataError(
                f"{file} was made for {tower}.{field} {theirs[field]!r}, the model has {ours[field]!r}",
                f"set model.{tower}.{field} to {theirs[field]!r}",
            )


def _read_model(file: str, m: config.Model) -> dict[str, np.ndarray]:
    theirs = folder_settings(file).get("model", {})
    for tower, fields in _SEMANTIC.items():
        _refuse_other_meaning(file, tower, theirs.get(tower, {}), m, (*fields, "pool"))
    path = Path(file)
    return read_with_metadata(path / "model.safetensors" if path.is_dir() else path)[0]


def folder_settings(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder; empty for a file of weights alone.

    Raises:
        DataError: when it cannot be read.
    """
    path = Path(folder) / "config.json"
    return read_json(path) if path.is_file() else {}


def refuse_other_tokenizer(cfg: config.Train, digest: str) -> None:
    """Refuses to start from a model whose words have other numbers than those of the run's tokenizer.

    Args:
        cfg: the experiment; `init.model` is looked at.
        digest: of the run's tokenizer.

    Raises:
        DataError: when the model folder names another tokenizer.
    """
    theirs = folder_settings(cfg.init.model).get("tokenizer", {}).get("digest", "") if cfg.init.model else ""
    if theirs not in ("", digest):
        raise DataError(
            f"{cfg.init.model} was trained with another tokenizer (sha256 {theirs[:12]}, now {digest[:12]})",
            f"--config.data.tokenizer={cfg.init.model}, and records exported with it",
        )


def _check(loaded: dict[str, np.ndarray], leaves: dict[str, Any], parts: tuple[str, ...], file: str) -> None:
    own = {k for k in leaves if k.split("/")[0] in parts}
    heads = {k for k in own if "/proj/" in k or "/" not in k}
    missing, unexpected = sorted(own - heads - loaded.keys()), sorted(loaded.keys() - own)
    shaped = [
        f"{k} {list(v.shape)} instead of {list(leaves[k].shape)}"
        for k, v in loaded.items()
        if k in own and tuple(v.shape) != tuple(leaves[k].shape)
    ]
    broken = [k for k, v in loaded.items() if k in own and not np.isfinite(v).all()]
    faults = {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped, "not finite": broken}
    words = [f"{len(v)} {kind}: {', '.join(v[:6])}" for kind, v in faults.items() if v]
    if words:
        raise DataError(
            f"{file} does not fit the model: {'; '.join(words)}", "choose the architecture of the file"
        )


def _place(value: np.ndarray, like: Any) -> Any:
    value = value.astype(like.dtype)
    return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value
