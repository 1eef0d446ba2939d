"""Our own weight files: safetensors whose keys are parameter paths; and starting a run from them.

A tower file holds one or both towers ("vision/pos", ...); `config.Init` names such files, model folders, or any
other framework's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimed_jax import config
from unimed_jax.convert import architecture, optimizer, own_files, positions, source, tensor_file
from unimed_jax.convert.configs import read_json
from unimed_jax.convert.mapped import shown
from unimed_jax.convert.names import plain, some
from unimed_jax.convert.tensor_file import read_with_metadata
from unimed_jax.convert.tensor_writer import write_safetensors
from unimed_jax.data import files
from unimed_jax.data.text import FILES, Tokenizer
from unimed_jax.errors import DataError, UnimedError
from unimed_jax.models import clip, zoo

# Weight files that belong to the tokenizer in their folder; a file by another name may lie there by chance.
_FOLDER_FILES = re.compile(r".*\.safetensors|(open_clip_)?pytorch_model(-\d+-of-\d+)?\.bin|.*\.index\.json")
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

    Raises:
        DataError: when it cannot be written.
    """
    leaves = {k: np.asarray(v, np.float32) for k, v in sorted(clip.flatten(params).items())}
    header = {"format": own_files.TOWER, "version": "1", "meta": json.dumps(meta or {}, sort_keys=True)}
    with files.swapped(Path(file)) as beside:
        write_safetensors(beside, {k: v.shape for k, v in leaves.items()}, leaves.items(), header)


def load_tower(file: str | Path) -> tuple[clip.Params, dict[str, Any]]:
    """Reads a file of `save_tower`: (nested params, meta).

    Raises:
        DataError: when the file is missing, cut short or of another format or version.
    """
    leaves, header = read_with_metadata(file)
    if header.get("format") != own_files.TOWER or header.get("version") != "1":
        raise DataError(
            f"{file} is no tower file (format {shown(header.get('format'))}, version {shown(header.get('version'))})",
            "convert it first: unimed-jax convert",
        )
    return clip.unflatten(leaves), source.tower_meta(header, str(file))


def names_weights(i: config.Init) -> bool:
    """Whether anything but random numbers is asked for."""
    return bool(i.model or i.vision or i.text or i.logit_scale)


def init_from(
    cfg: config.Train, params: clip.Params, *, report: Callable[[str], None] | None = None
) -> clip.Params:
    """Overlays the weights that `cfg.init` names on initialised parameters; each leaf keeps its sharding.

    `cfg.init.model` comes first, then the towers, so that a tower may replace that of a whole model, then the
    temperature. Each may be a native folder or file, a run (`RUN`, `RUN@STEP`), the name of a model that was fetched,
    or anything that `source.open_source` reads. Only heads (`*/proj/*`, `logit_scale`, `logit_bias`) may be absent;
    vision positions of another grid are resized by the rule `cfg.init.resize`, text positions never.

    Args:
        cfg: the experiment.
        params: initialised parameters, or abstract ones: then the files are read and compared, nothing is kept.
        report: called once a leaf with "name shape: loaded from FILE", "...: resized from ... of FILE" or
            "...: initialised", once for what is left out of a file for one reason, and once for a setting that a
            file does not say.

    Raises:
        UsageError: when a file does not say what its weights compute, and the config's model cannot be it; for a
            named model that was not fetched.
        DataError: when a file lacks a leaf, has one too many, one of another shape or a value that is not finite,
            or was made for another architecture.
    """
    leaves, origin, more = clip.flatten(params), {}, []
    for file, parts in _wanted(cfg.init):
        part = _open_part(file, parts, cfg)
        _check(part.leaves, leaves, parts, file)
        for name, value in part.leaves.items():
            leaves[name] = _place(value, leaves[name])
            origin[name] = f"{part.how.get(name, 'loaded from')} {file}"
        more += [f"{file}: {name}: left out ({why})" for name, why in part.left.items()] + part.notes
    if report:
        for name, leaf in leaves.items():
            report(f"{name} {list(leaf.shape)}: {origin.get(name, 'initialised')}")
        for line in more:
            report(line)
    return clip.unflatten(leaves)


def _wanted(i: config.Init) -> list[tuple[str, tuple[str, ...]]]:
    """Files and the first parts of the paths that are taken from them."""
    wanted = [
        (i.model, ("vision", "text", "logit_scale", "logit_bias")),
        (i.vision, ("vision",)),
        (i.text, ("text",)),
        (i.logit_scale, ("logit_scale", "logit_bias")),
    ]
    return [(file, parts) for file, parts in wanted if file]


def _find(file: str) -> tuple[Path, Path | None]:
    """Where weights lie: their file or folder; and of a run without final model, its saved state.

    A run gives its `model` folder, else its newest state, as everywhere; `RUN@STEP` gives one state.
    """
    from unimed_jax.train import saved_states  # orbax is slow to import

    path = zoo.local(file) or Path(file)
    run, _, step = file.rpartition("@")
    if run and step.isdigit() and not path.exists():
        return Path(run), saved_states.find_step(run, int(step))
    if not path.exists() and file in (zoo.MODELS.keys() | zoo.PARTS.keys()):
        towers = sorted(
            (zoo.models_dir() / file).glob("*.safetensors")
        )  # of a part, which is no model folder
        if len(towers) != 1:
            raise zoo.absent(file)
        return towers[0], None
    if not path.is_dir() or (path / "model.safetensors").is_file():
        return path, None
    if (path / "model" / "model.safetensors").is_file():
        return path / "model", None
    return path, saved_states.find_step(path) if (path / "checkpoints").is_dir() else None


@dataclass(slots=True, kw_only=True)
class _Part:
    """What one file gives: flat leaves, how they were changed, and what stays in the file."""

    leaves: dict[str, np.ndarray]
    how: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _open_part(file: str, parts: tuple[str, ...], cfg: config.Train) -> _Part:
    path, state = _find(file)
    if state is not None:
        part = _run_part(file, state, parts, cfg.model)
    else:
        part = _native_part(file, path, parts, cfg.model) or _foreign_part(file, path, parts, cfg.model)
    held = {k.split("/")[0] for k in part.leaves}
    for tower in ("vision", "text"):
        if tower in parts and tower not in held:
            there = sorted((held | part.left.keys()) & {"vision", "text", "logit_scale"})
            raise DataError(f"{file} holds no {tower} tower, only {', '.join(there) or 'others'}")
    if parts[0] == "logit_scale" and parts[0] not in held:
        raise DataError(f"{file} holds no logit_scale", "leave init.logit_scale empty: it starts fresh")
    _fit_positions(part, cfg, file)
    return part


def _run_part(file: str, state: Path, parts: tuple[str, ...], m: config.Model) -> _Part:
    """The saved state of a run, its averaged parameters where it kept them."""
    from unimed_jax.train import saved_states

    params, meta = saved_states.load_params(state)
    for tower in parts:
        _refuse_other_meaning(file, tower, meta["config"]["model"].get(tower, {}), m, extra=("pool",))
    return _chosen(clip.flatten(params), parts)


def _native_part(file: str, path: Path, parts: tuple[str, ...], m: config.Model) -> _Part | None:
    """A tower file or a model folder of ours; None for anything else."""
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file() or not source.is_safetensors(weights):
        return None
    settings = folder_settings(path) if path.is_dir() else {}
    if settings.get("format", own_files.MODEL) != own_files.MODEL or "model_type" in settings:
        return None  # a config.json that names no format at all is asked what its model means
    leaves = tensor_file.open_safetensors(weights)
    if leaves.metadata.get("format") == own_files.TOWER:
        params, meta = load_tower(weights)
        for tower in parts:
            _refuse_other_meaning(file, tower, meta.get(tower, {}), m)
        return _chosen(clip.flatten(params), parts)
    if not any(k.startswith(("vision/", "text/")) for k in leaves):
        return None
    theirs = settings.get("model", {})
    source.settings(config.Model, theirs, f"{file}: model")
    for tower in parts:
        _refuse_other_meaning(file, tower, theirs.get(tower, {}), m, extra=("pool",))
    return _chosen(leaves, parts)


def _chosen(leaves: Mapping[str, np.ndarray], parts: tuple[str, ...]) -> _Part:
    kept = {k: v for k, v in leaves.items() if k.split("/")[0] in parts}
    rest = {plain(k.split("/")[0]) for k in leaves if k not in kept}
    return _Part(leaves=kept, left=dict.fromkeys(sorted(rest), "not asked for"))


def _foreign_part(file: str, path: Path, parts: tuple[str, ...], m: config.Model) -> _Part:
    """Another framework's file; what it does not say of itself is taken from the config's model, and reported."""
    opened = source.open_source(path, fallback=m)
    for tower in set(parts) & set(opened.towers):
        _refuse_other_meaning(file, tower, config.to_dict(getattr(opened.model, tower)), m)
    wanted = replace(opened, tables={t: table for t, table in opened.tables.items() if t in parts})
    left: dict[str, str] = dict.fromkeys([t for t in opened.towers if t not in parts], "not asked for")
    for why in dict.fromkeys(opened.ignored.values()):
        left[some([k for k, reason in opened.ignored.items() if reason == why])] = why
    if others := opened.facts.get("left_out"):
        left[some(others)] = "no tensors of the model"
    leaves = dict(wanted.leaves())
    for name in architecture.SCALARS:
        if name in leaves and name not in parts:
            del leaves[name]
            left[name] = "not asked for"
    assumed = opened.facts.get("assumed", {})
    notes = [f"{file} does not say {k}: {v} taken from the config" for k, v in assumed.items()]
    return _Part(leaves=leaves, left=left, notes=notes)


def _refuse_other_meaning(
    file: str, tower: str, theirs: dict[str, Any], m: config.Model, *, extra: tuple[str, ...] = ()
) -> None:
    if tower not in _SEMANTIC:
        return
    ours = config.to_dict(getattr(m, tower))
    for name in (*_SEMANTIC[tower], *extra):
        if name in theirs and theirs[name] != ours[name]:
            raise DataError(
                f"{file} was made for {tower}.{name} {theirs[name]!r:.90}, the model has {ours[name]!r}",
                f"set model.{tower}.{name} to {theirs[name]!r:.90}",
            )


def _fit_positions(part: _Part, cfg: config.Train, file: str) -> None:
    """Resizes vision positions to the model's grid when the config names a rule; refuses everything else."""
    v, t = cfg.model.vision, cfg.model.text
    pos, rule = part.leaves.get("vision/pos"), cfg.init.resize
    grid = v.image_size // v.patch_size
    if pos is not None and len(pos) != grid * grid + 1:
        if not rule:
            raise DataError(
                f"{file} has {len(pos)} vision positions, the model {grid * grid + 1} ({grid} x {grid} and one)",
                "--config.init.resize=bicubic (UniMed-CLIP's rule) or antialias (OpenCLIP's)",
            )
        part.leaves["vision/pos"] = positions.resize_positions(pos, grid, rule, where=f"vision/pos of {file}")
        part.how["vision/pos"] = f"resized ({rule}) from {list(pos.shape)} of"
    if "text/pos" in part.leaves:
        positions.refuse_other_text_length(len(part.leaves["text/pos"]), t.max_positions, where=file)


def init_moments(cfg: config.Train, *, report: Callable[[str], None] | None = None) -> optimizer.Moments:
    """Adam's moments and the step of `cfg.init.model`: of a folder with optimizer.safetensors, or of a file that
    PyTorch training wrote.

    Raises:
        DataError: when there are none, or they are damaged or another model's.
    """
    file, state = _find(cfg.init.model)
    if state is not None:
        raise DataError(
            f"{cfg.init.model} is a run: its moments stay with it",
            "go on in its own --workdir, or init.optimizer=False",
        )
    if (file / optimizer.FILE).is_file():
        found = optimizer.load(file / optimizer.FILE)
    else:
        opened = source.open_source(file, fallback=cfg.model)
        if opened.optimizer is None:
            raise DataError(
                f"{file} holds weights only, no optimizer state",
                "unimed-jax convert TRAINING_CHECKPOINT DIR --with-optimizer, or init.optimizer=False",
            )
        found = optimizer.of_source(opened)
    wanted = {k: tuple(v.shape) for k, v in clip.flatten(clip.skeleton(cfg.model)[1]).items()}
    first, second = found.trees()
    for kind, leaves in (("first", first), ("second", second)):
        have = {k: tuple(v.shape) for k, v in leaves.items()}
        if have != wanted:
            wrong = sorted(k for k in wanted.keys() | have.keys() if have.get(k) != wanted.get(k))
            raise DataError(
                f"{file}: the {kind} moments of {', '.join(wrong[:4])} are not the model's",
                "use the model of the run that they come from",
            )
    if report:
        report(f"optimizer: Adam's moments after {found.step} updates, loaded from {file}")
        for name, made in found.settings.items():
            now = getattr(cfg.optim, name, made)
            if name != "lr" and now != made:
                report(f"optimizer: {name} was {made:g}, is {now:g}")
    return replace(found, first=first.items, second=second.items)


def summary(lines: Sequence[str]) -> list[str]:
    """The lines of a report, leaves of one tower and one origin drawn together.

    Example:
        >>> summary([f"text/{x} [9, 2]: loaded from F" for x in "abcd"] + ["F: x: left out (buffer)"])
        ['text: 4 leaves, 72 parameters: loaded from F', 'F: x: left out (buffer)']
    """
    groups: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        found = re.fullmatch(r"(\S+) \[([\d, ]*)\]: (.*)", line)
        if found is None:
            groups[line] = []
            continue
        name, shape, how = found.groups()
        size = math.prod(int(n) for n in re.findall(r"\d+", shape))
        groups.setdefault(f"{name.split('/')[0]}: {how}", []).append((name, size))
    out = []
    for key, members in groups.items():
        part, _, how = key.partition(": ")
        if len(members) > 3:
            out.append(f"{part}: {len(members)} leaves, {sum(n for _, n in members):,} parameters: {how}")
        else:
            out += [f"{', '.join(name for name, _ in members)}: {how}"] if members else [key]
    return out


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
        cfg: the experiment; `init.model` and `init.text` are looked at.
        digest: of the run's tokenizer.

    Raises:
        DataError: when the model folder or run names another tokenizer.
    """
    from unimed_jax.train import saved_states

    for file, path, state in _text_sources(cfg):
        if state is not None:
            theirs, give = str(saved_states.read_meta(state).get("tokenizer", "")), "TOKENIZER OF THAT RUN"
        else:
            said = folder_settings(path).get("tokenizer")
            theirs, give = str(said.get("digest", "") if isinstance(said, dict) else ""), str(path)
        if theirs not in ("", digest):
            raise DataError(
                f"{file} was trained with another tokenizer (sha256 {plain(theirs[:12])}, now {digest[:12]})",
                f"--config.data.tokenizer={give}, and records exported with it",
            )


def _text_sources(cfg: config.Train) -> list[tuple[str, Path, Path | None]]:
    """Where the text tower comes from: (as given, file or folder, saved state)."""
    found = []
    for file in filter(None, (cfg.init.model, cfg.init.text)):
        # A run that is continued needs its first weights no more; a start that does is refused when it reads them.
        with contextlib.suppress(UnimedError):
            found.append((file, *_find(file)))
    return found


def refuse_other_words(cfg: config.Train, tokenizer: Tokenizer) -> None:
    """Refuses a text tower beside whose weights lies a vocabulary with other numbers than the run's.

    Other frameworks' folders name no digest, and write the same vocabulary in several forms: numbers are compared.

    Raises:
        DataError: with a word whose number differs.
    """
    for file, path, state in _text_sources(cfg):
        folder = path.parent if _FOLDER_FILES.fullmatch(path.name) else path
        if state is not None or not any((folder / name).is_file() for name in FILES):
            continue
        theirs, ours = Tokenizer(folder).vocabulary(), tokenizer.vocabulary()
        other = sorted(w for w in theirs.keys() | ours.keys() if theirs.get(w) != ours.get(w))
        if other:
            word = next((w for w in other if w in theirs and w in ours), other[0])
            raise DataError(
                f"{file} was trained with another vocabulary: {word!r} is number {theirs.get(word, 'none')} there, "
                f"number {ours.get(word, 'none')} in this run ({len(other):,} words differ)",
                f"--config.data.tokenizer={folder}, and records exported with it",
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
    words = [f"{len(v)} {kind}: {some(v)}" for kind, v in faults.items() if v]
    if words:
        raise DataError(
            f"{file} does not fit the model: {'; '.join(words)}", "choose the architecture of the file"
        )


def _place(value: np.ndarray, like: Any) -> Any:
    if isinstance(like, jax.ShapeDtypeStruct):
        return like
    value = value.astype(like.dtype)
    return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value
