"""Model folders on disk: written whole or not at all, read strictly; and training runs read in their place.

A model folder describes itself: `config.json` (architecture, preprocessing, digests), `model.safetensors` (keys are
parameter paths joined by "/"), `tokenizer.json` (absent when the weights came without one: then only images can be
encoded) and `README.md`, the model card. Files and folders of other libraries are read in its place, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from unimed_jax import __version__, config
from unimed_jax.convert import card, optimizer, own_files
from unimed_jax.convert.configs import read_json
from unimed_jax.convert.mapped import shown
from unimed_jax.convert.mapping import finite
from unimed_jax.convert.names import plain, some
from unimed_jax.convert.tensor_file import read_with_metadata
from unimed_jax.convert.tensor_writer import write_safetensors
from unimed_jax.data import files
from unimed_jax.data.images import NORMALIZE
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.models import clip, zoo

WEIGHTS, TOKENIZER, CONFIG, CARD = own_files.WEIGHTS, "tokenizer.json", own_files.CONFIG, "README.md"
OWN_FILES = frozenset({WEIGHTS, TOKENIZER, CONFIG, CARD, optimizer.FILE})
NO_TOKENIZER = "add the model's own: unimed-jax convert MODEL NEW --tokenizer DIR|FILE"
_WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".index.json")
Parts = tuple[config.Model, clip.Params, Tokenizer | None]


def read(path: str | Path, *, ema: bool | None = None, tokenizer: str | Path = "") -> Parts:
    """Architecture, weights and tokenizer of a model folder, a training run, or another library's file or folder.

    A run gives its `model` folder, else its newest checkpoint; `RUN@STEP` gives one checkpoint.

    Args:
        path: the folder or file.
        ema: of a run, the averaged weights (True) or the plain ones (False) of its newest checkpoint.
        tokenizer: of the model, where it has none; one that a run was trained with must be that one.

    Raises:
        UsageError: when there is no such folder, or a file's architecture cannot be told from its names and shapes.
        DataError: for missing, unexpected, mis-shaped or non-finite weights, a tokenizer that is not the model's, or a
            damaged file; everything that is wrong is listed.
    """
    path = _named(path)
    text, _, step = str(path).rpartition("@")
    if text and step.isdigit() and not Path(path).exists():
        return _from_run(Path(text), int(step), ema, tokenizer)
    if _is_folder(Path(path)):
        if ema is not None:
            raise UsageError(f"{path} is no run, its weights are one kind", "leave --ema and --no-ema out")
        return _from_folder(Path(path))
    if ema is None and _is_folder(Path(path) / "model"):
        return _from_folder(Path(path) / "model")
    if is_foreign(path):
        return _from_elsewhere(Path(path))
    if Path(path).is_dir():
        return _from_run(Path(path), None, ema, tokenizer)
    raise _no_model(str(path))


def _is_folder(path: Path) -> bool:
    """Whether it is one of our model folders, sound or not; other libraries' config.json names a model_type."""
    if not (path / WEIGHTS).is_file() or not (path / CONFIG).is_file():
        return False
    try:
        return "model_type" not in read_json(path / CONFIG)
    except DataError:
        return True


def is_foreign(path: str | Path) -> bool:
    """Whether a path is a weight file, or a folder, of another library; neither a model folder of ours nor a run."""
    path = Path(path)
    if path.is_file():
        return True
    if not path.is_dir() or _is_folder(path) or _is_folder(path / "model") or (path / "checkpoints").is_dir():
        return False
    return any(p.name.endswith(_WEIGHT_FILES) for p in path.iterdir() if p.is_file())


def _from_elsewhere(path: Path) -> Parts:
    from unimed_jax.convert import source  # only here: a model folder of ours needs no converter

    found = source.open_source(path)
    if missing := [tower for tower in ("vision", "text") if tower not in found.towers]:
        raise UsageError(
            f"{path} holds no {missing[0]} tower, so it is no model by itself",
            f"start a training from it: --config.init.{found.towers[0]}={path}",
        )
    tokenizer = open_tokenizer(found.tokenizer, found.model) if found.tokenizer else None
    return found.model, found.params(), tokenizer


def _named(path: str | Path) -> str | Path:
    """The folder of a named model's weights, where they were fetched; anything else as it is."""
    return zoo.local(str(path)) or path


def _no_model(path: str) -> UsageError:
    if path in zoo.MODELS:
        return zoo.absent(path)
    return UsageError(
        f"no model at {path!r}.{did_you_mean(path, zoo.MODELS)}",
        "give a model folder, a run, a checkpoint of another library, or a name of unimed-jax models list",
    )


def _read_config(folder: Path) -> tuple[config.Model, str]:
    """The architecture and the tokenizer's digest."""
    spec = read_json(folder / CONFIG)
    return own_files.architecture(spec, folder), _text(spec, "tokenizer", "digest", folder)


def _text(spec: Mapping[str, Any], part: str, name: str, folder: Path) -> str:
    """A text in one part of a config.json; "" when there is none."""
    table = spec.get(part) or {}
    value = table.get(name) or "" if isinstance(table, dict) else None
    if not isinstance(value, str):
        raise DataError(
            f"{folder / CONFIG}: {part} {shown(table)} has no readable {name}", "copy the folder again"
        )
    return value


def _from_folder(folder: Path) -> Parts:
    cfg, digest = _read_config(folder)
    leaves, _ = read_with_metadata(folder / WEIGHTS)
    check(leaves, cfg, str(folder / WEIGHTS))
    if not digest and not (folder / TOKENIZER).is_file():
        return cfg, clip.unflatten(leaves), None
    return cfg, clip.unflatten(leaves), open_tokenizer(folder / TOKENIZER, cfg, digest, folder)


def _from_run(folder: Path, step: int | None, ema: bool | None, given: str | Path) -> Parts:
    try:
        from unimed_jax.train import saved_states  # orbax is slow to import

        params, meta = saved_states.load_params(folder, step=step, ema=ema)
    except DataError as e:
        raise DataError(
            f"{folder} holds neither a model nor a run: {e.cause}", "give a model or run folder"
        ) from e
    run = config.from_dict(config.Train, meta["config"], where=f"{folder}: config")
    check(clip.flatten(params), run.model, str(folder))
    candidates = [folder / TOKENIZER, Path(run.data.tokenizer), Path(run.data.root) / TOKENIZER]
    found = Path(given) if given else next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise DataError(f"{folder} holds no tokenizer", f"copy the run's tokenizer to {folder / TOKENIZER}")
    saved = meta.get("tokenizer", "")
    digest = str(saved.get("digest", "") if isinstance(saved, dict) else saved or "")
    return run.model, params, open_tokenizer(found, run.model, digest, folder)


def read_tokenizer(path: str | Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a model folder or run, and its context length in tokens; reads no weights.

    Raises:
        UsageError: for a named architecture, which has no vocabulary of its own, or a missing folder.
        DataError: for a damaged folder.
    """
    path = _named(path)
    for folder in (Path(path), Path(path) / "model"):
        if (folder / CONFIG).is_file() and (folder / TOKENIZER).is_file():
            cfg, digest = _read_config(folder)
            return open_tokenizer(folder / TOKENIZER, cfg, digest, folder), cfg.text.context_length
    cfg, _, tokenizer = read(path)
    if tokenizer is None:
        raise DataError(f"{path} holds no tokenizer", NO_TOKENIZER)
    return tokenizer, cfg.text.context_length


def about(path: str | Path) -> dict[str, Any]:
    """What a model folder (or that of a run) says of its origin: see `save`, `extra`; empty for anything else."""
    path = Path(_named(path))
    folder = next((f for f in (path, path / "model") if _is_folder(f)), None)
    found = read_json(folder / CONFIG).get("extra") if folder else None
    return found if isinstance(found, dict) else {}


def describe_origin(path: str | Path) -> list[str]:
    """Where the weights of a model folder come from, as it says itself: "hub: REPO FILE at REVISION, sha256 ..."."""
    origin = about(path).get("origin")
    said = {k: v for k, v in origin.items() if v} if isinstance(origin, dict) else {}
    files = said["files"].values() if isinstance(said.get("files"), dict) else ()
    word = lambda table, k: plain(str(table.get(k, "not known")))
    lines = [
        f"hub: {word(f, 'repo')} {word(f, 'name')} at {word(f, 'revision')}, sha256 {word(f, 'sha256')}"
        for f in files
        if isinstance(f, dict)
    ]
    return lines + [f"{k}: {word(said, k)}" for k in ("licence", "use", "file", "sha256") if k in said]


def verify(path: str | Path) -> None:
    """Compares the files of a model folder, or of a run's, with the SHA-256 that its config.json holds.

    Raises:
        DataError: for a file that has changed since it was saved.
    """
    path = _named(path)
    for folder in (Path(path), Path(path) / "model"):
        if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
            continue
        _read_config(folder)
        spec = read_json(folder / CONFIG)
        for name, part in ((WEIGHTS, "weights"), (TOKENIZER, "tokenizer")):
            wanted = _text(spec, part, "sha256", folder)
            if wanted and (folder / name).is_file() and files.file_sha256(folder / name) != wanted:
                raise DataError(f"{folder / name} has changed since it was saved", "copy the folder again")


def check(leaves: Mapping[str, np.ndarray], cfg: config.Model, where: str) -> None:
    """Compares weights with an architecture.

    Raises:
        DataError: listing what is missing, unexpected, mis-shaped, of another type or not finite.
    """
    for _ in checked(leaves.items(), cfg, where):
        pass


def checked(
    leaves: Iterable[tuple[str, Any]], cfg: config.Model, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Passes the leaves of a model on, one at a time, those that are right; refuses at the end when any was not.

    Raises:
        DataError: as `check`.
    """
    wanted = clip.flatten(clip.skeleton(cfg)[1])
    faults: dict[str, list[str]] = {k: [] for k in ("unexpected", "mis-shaped", "no float32", "not finite")}
    seen = set()
    for name, leaf in leaves:
        seen.add(name)
        value = to_host(leaf)
        if name not in wanted:
            faults["unexpected"].append(name)
        elif value.shape != tuple(wanted[name].shape):
            faults["mis-shaped"].append(f"{name} {list(value.shape)} instead of {list(wanted[name].shape)}")
        elif value.dtype != np.float32:
            faults["no float32"].append(name)
        elif not finite(value):
            faults["not finite"].append(name)
        else:
            yield name, value
    faults = {"missing": sorted(wanted.keys() - seen), **faults}
    words = [f"{len(v)} {kind}: {some(v, 8)}" for kind, v in faults.items() if v]
    if words:
        raise DataError(
            f"{where} does not fit {cfg.name}: {'; '.join(words)}", "use the files that belong together"
        )


def open_tokenizer(path: Path, cfg: config.Model, digest: str = "", where: Path | str = "") -> Tokenizer:
    """A tokenizer that fits a model.

    Args:
        path: its file or folder.
        cfg: the model.
        digest: that it must have; "" for any.
        where: the model, for messages.

    Raises:
        DataError: when it is another one, has more words than the model, or is of another kind or padding.
    """
    tokenizer = Tokenizer(path)
    if digest and tokenizer.digest != digest:
        raise DataError(
            f"{tokenizer.path} is not the tokenizer of {where} (digest {tokenizer.digest[:12]}, "
            f"not {plain(digest[:12])})",
            "restore the tokenizer that the model was saved with",
        )
    if tokenizer.kind != cfg.text.kind or (tokenizer.kind == "bert" and tokenizer.pad_id != cfg.text.pad_id):
        raise DataError(
            f"{tokenizer.path} is a {tokenizer.kind} tokenizer with padding {tokenizer.pad_id}, the model's text tower "
            f"is {cfg.text.kind} with padding {cfg.text.pad_id}",
            "use the model's own tokenizer",
        )
    words = max(tokenizer.vocabulary().values()) + 1  # numbers may have gaps
    if words > cfg.text.vocab_size:
        raise DataError(
            f"{tokenizer.path} has {words} tokens, the model {cfg.text.vocab_size}",
            "use the model's own tokenizer",
        )
    return tokenizer


def save(
    folder: str | Path,
    cfg: config.Model,
    params: clip.Params | Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer | None,
    *,
    force: bool = False,
    extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Writes a model folder beside its place and then renames it: it is there whole, or not at all.

    Args:
        folder: target.
        cfg: the architecture.
        params: nested dict, numpy or jax arrays, float32; or its leaves, (path, array) one at a time, which then are
            never in memory together.
        tokenizer: goes into the folder; None leaves a model for images only, which says so.
        force: replace an existing model folder.
        extra: JSON values for config.json, or a function that gives them once the weights are written: the "run" and
            "steps" that they come from, or the "origin" of a conversion (fields of `card.Origin`) and what was
            "verified"; the model card says so, too.
        more: writes further files into the folder before it appears.

    Raises:
        UsageError: when the folder exists and `force` is not given.
        DataError: for weights that do not fit the architecture, and when the disk is full.
    """
    folder = Path(folder)
    refuse = functools.partial(files.refuse_folder, folder, OWN_FILES, force=force, what="model folder")
    refuse()
    good = checked(_leaves(params), cfg, str(folder))
    if jax.process_index() != 0:
        for _ in good:  # gathering a leaf is the work of all processes
            pass
        return folder
    shapes = {k: tuple(v.shape) for k, v in clip.flatten(clip.skeleton(cfg)[1]).items()}
    with files.swapped(folder, refuse) as beside:
        beside.mkdir()
        digest = write_safetensors(beside / WEIGHTS, shapes, good, {"format": own_files.MODEL}, hashed=True)
        if tokenizer is not None:
            tokenizer.save(beside)
        about = dict((extra() if callable(extra) else extra) or {})
        spec = {**_describe(cfg, tokenizer, beside, digest), "extra": about}
        (beside / CONFIG).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")
        (beside / CARD).write_text(_card(cfg, tokenizer, about, str(folder)), "utf-8")
        if more:
            more(beside)
        files.sync_all(beside)
    return folder


def _leaves(params: clip.Params | Iterable[tuple[str, np.ndarray]]) -> Iterable[tuple[str, np.ndarray]]:
    """In the order of their names; arrays that are spread over processes are gathered one at a time."""
    if not isinstance(params, dict):
        return params
    tree = cast(clip.Params, params)
    return ((k, np.asarray(to_host(v), np.float32)) for k, v in sorted(clip.flatten(tree).items()))


def _card(cfg: config.Model, tokenizer: Tokenizer | None, about: Mapping[str, Any], place: str) -> str:
    return card.card(
        cfg,
        "native",
        place=place,
        origin=card.origin_of(about),
        tokenizer=tokenizer is not None,
        verified=about.get("verified"),
    )


def _describe(cfg: config.Model, tokenizer: Tokenizer | None, folder: Path, weights: str) -> dict[str, Any]:
    mean, std = NORMALIZE[cfg.vision.normalize]
    return {
        "format": own_files.MODEL,
        "version": own_files.VERSION,
        "made_by": f"unimed_jax {__version__}",
        "model": config.to_dict(cfg),
        "preprocess": {
            "size": cfg.vision.image_size,
            "resize": "shorter side, bicubic, antialiased; centre crop; RGB",
            "mean": list(mean),
            "std": list(std),
        },
        "tokenizer": None
        if tokenizer is None
        else {"file": TOKENIZER, "digest": tokenizer.digest, "sha256": files.file_sha256(folder / TOKENIZER)},
        "weights": {"file": WEIGHTS, "sha256": weights},
        "use": "research only, not a medical device",
    }


def to_host(leaf: Any) -> np.ndarray:
    """The whole value of an array that may be spread over processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
