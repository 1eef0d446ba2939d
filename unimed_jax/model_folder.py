"""Model folders on disk: written whole or not at all, read strictly; and training runs read in their place.

A model folder describes itself: `config.json` (architecture, preprocessing, digests), `model.safetensors` (keys are
parameter paths joined by "/") and `tokenizer.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimed_jax import __version__, config
from unimed_jax.convert.hf import read_with_metadata
from unimed_jax.data.images import NORMALIZE
from unimed_jax.data.text import Tokenizer
from unimed_jax.data.writer import file_sha256
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.models import clip, zoo
from unimed_jax.train import checkpoint

FORMAT, VERSION = "unimed_jax.model", 1
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
_MAX_HEADER = 100 * 2**20  # bytes of a safetensors header
Parts = tuple[config.Model, clip.Params, Tokenizer]


def read(path: str | Path) -> Parts:
    """Architecture, weights and tokenizer of a model folder or a training run.

    A run gives its `model` folder, else its newest checkpoint; `RUN@STEP` gives one checkpoint.

    Raises:
        UsageError: when there is no such folder.
        DataError: for missing, unexpected, mis-shaped or non-finite weights, a tokenizer that is not the model's, or a
            damaged file; everything that is wrong is listed.
    """
    text, _, step = str(path).rpartition("@")
    if text and step.isdigit() and not Path(path).exists():
        return _from_run(Path(text), int(step))
    if (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file():
        return _from_folder(Path(path))
    if (Path(path) / "model" / WEIGHTS).is_file():
        return _from_folder(Path(path) / "model")
    if Path(path).is_dir():
        return _from_run(Path(path), None)
    raise _no_model(str(path))


def _no_model(path: str) -> UsageError:
    if path in zoo.MODELS:
        return UsageError(
            f"{path!r} names an architecture, not weights", "give a model folder or a run folder"
        )
    if Path(path).is_file():
        return UsageError(
            f"{path} is a file, not a model folder", "give the folder, or convert the file first"
        )
    return UsageError(f"no model folder or run at {path!r}.{did_you_mean(path, zoo.MODELS)}", "give a folder")


def _read_config(folder: Path) -> tuple[config.Model, str]:
    """The architecture and the tokenizer's digest."""
    try:
        spec = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{folder / CONFIG} is no readable JSON: {e}", "restore the folder") from e
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise DataError(
            f"{folder} is no unimed_jax model folder", "convert it first, or give the right folder"
        )
    if spec.get("version") != VERSION:
        raise DataError(
            f"{folder} has version {spec.get('version')!r}, this program reads {VERSION}", "update it"
        )
    try:
        cfg = config.from_dict(config.Model, spec.get("model", {}), where=f"{folder / CONFIG}: model")
        return config.validate_model(cfg), str(spec.get("tokenizer", {}).get("digest", ""))
    except UsageError as e:  # the folder is wrong, not the request
        raise DataError(e.cause, e.remedy or "restore the folder, or update the program") from e


def _from_folder(folder: Path) -> Parts:
    cfg, digest = _read_config(folder)
    _refuse_duplicates(folder / WEIGHTS)
    leaves, _ = read_with_metadata(folder / WEIGHTS)
    check(leaves, cfg, str(folder / WEIGHTS))
    return cfg, clip.unflatten(leaves), _open_tokenizer(folder / TOKENIZER, cfg, digest, folder)


def _from_run(folder: Path, step: int | None) -> Parts:
    try:
        params, meta = checkpoint.load_params(folder, step=step)
    except DataError as e:
        raise DataError(
            f"{folder} holds neither a model nor a run: {e.cause}", "give a model or run folder"
        ) from e
    run = config.from_dict(config.Train, meta["config"], where=f"{folder}: config")
    check(clip.flatten(params), run.model, str(folder))
    candidates = [folder / TOKENIZER, Path(run.data.tokenizer), Path(run.data.root) / TOKENIZER]
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise DataError(f"{folder} holds no tokenizer", f"copy the run's tokenizer to {folder / TOKENIZER}")
    saved = meta.get("tokenizer", "")
    digest = str(saved.get("digest", "") if isinstance(saved, dict) else saved or "")
    return run.model, params, _open_tokenizer(found, run.model, digest, folder)


def read_tokenizer(path: str | Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a model folder or run, and its context length in tokens; reads no weights.

    Raises:
        UsageError: for a named architecture, which has no vocabulary of its own, or a missing folder.
        DataError: for a damaged folder.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / CONFIG).is_file() and (folder / TOKENIZER).is_file():
            cfg, digest = _read_config(folder)
            return _open_tokenizer(folder / TOKENIZER, cfg, digest, folder), cfg.text.context_length
    cfg, _, tokenizer = read(path)
    return tokenizer, cfg.text.context_length


def verify(path: str | Path) -> None:
    """Compares the files of a model folder, or of a run's, with the SHA-256 that its config.json holds.

    Raises:
        DataError: for a file that has changed since it was saved.
    """
    for folder in (Path(path), Path(path) / "model"):
        if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
            continue
        _read_config(folder)
        spec = json.loads((folder / CONFIG).read_text("utf-8"))
        for name, part in ((WEIGHTS, "weights"), (TOKENIZER, "tokenizer")):
            wanted = spec.get(part, {}).get("sha256", "")
            if wanted and (folder / name).is_file() and file_sha256(folder / name) != wanted:
                raise DataError(f"{folder / name} has changed since it was saved", "copy the folder again")


def check(leaves: Mapping[str, np.ndarray], cfg: config.Model, where: str) -> None:
    """Compares weights with an architecture.

    Raises:
        DataError: listing what is missing, unexpected, mis-shaped, of another type or not finite.
    """
    wanted = clip.flatten(clip.skeleton(cfg)[1])
    known = [k for k in wanted if k in leaves]
    faults = {
        "missing": sorted(wanted.keys() - leaves.keys()),
        "unexpected": sorted(leaves.keys() - wanted.keys()),
        "mis-shaped": [
            f"{k} {list(leaves[k].shape)} instead of {list(wanted[k].shape)}"
            for k in known
            if tuple(leaves[k].shape) != tuple(wanted[k].shape)
        ],
        "no float32": [k for k in known if leaves[k].dtype != np.float32],
        "not finite": [k for k in known if not np.isfinite(leaves[k]).all()],
    }
    words = [
        f"{len(v)} {kind}: {', '.join(v[:8])}{', ...' if len(v) > 8 else ''}"
        for kind, v in faults.items()
        if v
    ]
    if words:
        raise DataError(
            f"{where} does not fit {cfg.name}: {'; '.join(words)}", "use the files that belong together"
        )


def _refuse_duplicates(file: Path) -> None:
    """The format forbids equal keys, its reader accepts them."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = f.read(size) if size <= _MAX_HEADER else b""
    try:
        pairs = json.loads(header, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError):
        return  # the reader says what is wrong
    names = [k for k, _ in pairs]
    twice = sorted({k for k in names if names.count(k) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{file} holds {twice[0]!r} twice", "save it again")


def _open_tokenizer(path: Path, cfg: config.Model, digest: str, where: Path) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if digest and tokenizer.digest != digest:
        raise DataError(
            f"{tokenizer.path} is not the tokenizer of {where} (digest {tokenizer.digest[:12]}, not {digest[:12]})",
            "restore the tokenizer that the model was saved with",
        )
    if tokenizer.vocab_size > cfg.text.vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model {cfg.text.vocab_size}",
            "use the model's own tokenizer",
        )
    return tokenizer


def save(
    folder: str | Path,
    cfg: config.Model,
    params: clip.Params,
    tokenizer: Tokenizer | None,
    *,
    force: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model folder beside its place and then renames it: it is there whole, or not at all.

    Args:
        folder: target.
        cfg: the architecture.
        params: nested dict, numpy or jax arrays.
        tokenizer: goes into the folder.
        force: replace an existing model folder.
        extra: JSON values for config.json, e.g. the step and the run that the weights come from.

    Raises:
        UsageError: when the folder exists and `force` is not given, or there is no tokenizer.
        DataError: for weights that do not fit the architecture, and when the disk is full.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if tokenizer is None:
        raise UsageError(f"model {cfg.name} has no tokenizer to save", "build it with one")
    if folder.exists() and not force:
        raise UsageError(f"{folder} exists", "choose another folder, or pass force to replace it")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} exists and is no model folder", "choose another folder")
    leaves = {k: np.array(to_host(v), np.float32, order="C") for k, v in clip.flatten(params).items()}
    check(leaves, cfg, str(folder))
    if jax.process_index() != 0:
        return folder
    beside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        beside.mkdir(parents=True)
        save_file(leaves, str(beside / WEIGHTS), metadata={"format": FORMAT})
        tokenizer.save(beside)
        spec = {**_describe(cfg, tokenizer, beside), "extra": dict(extra or {})}
        (beside / CONFIG).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
    except OSError as e:
        raise DataError(
            f"{folder} cannot be written: {e.strerror or e}", "free space or check permissions"
        ) from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _describe(cfg: config.Model, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    mean, std = NORMALIZE[cfg.vision.normalize]
    sha = lambda name: file_sha256(folder / name)
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"unimed_jax {__version__}",
        "model": config.to_dict(cfg),
        "preprocess": {
            "size": cfg.vision.image_size,
            "resize": "shorter side, bicubic, antialiased; centre crop; RGB",
            "mean": list(mean),
            "std": list(std),
        },
        "tokenizer": {"file": TOKENIZER, "digest": tokenizer.digest, "sha256": sha(TOKENIZER)},
        "weights": {"file": WEIGHTS, "sha256": sha(WEIGHTS)},
        "use": "research only, not a medical device",
    }


def to_host(leaf: Any) -> np.ndarray:
    """The whole value of an array that may be spread over processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
