"""Opens every kind of checkpoint that is read here: what it is, its tensors, and our leaves made of them.

A file is a state dict or a training checkpoint; a folder adds the configs beside it. Nothing is copied until the leaves
are asked for, nothing is skipped silently, and nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config, config_rules
from unimed_jax.convert import architecture, configs, locate, mapping, own_files
from unimed_jax.convert.architecture import SCALARS
from unimed_jax.convert.mapped import Mapped, shown
from unimed_jax.convert.mapping import Table
from unimed_jax.convert.tensor_file import open_safetensors, open_sharded
from unimed_jax.convert.torch_zip import TorchFile, open_torch
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.models import clip, zoo

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # of DDP and torch.compile, in any order
# Below which key a training checkpoint holds the weights, and what else is known in one.
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_FACTS = ("epoch", "name", "epoch_step", "step", "global_step", "arch")


@dataclass(slots=True, kw_only=True)
class Source:
    """An opened checkpoint."""

    path: Path
    format: str  # unimed | openclip | openai | hf-clip | hf-vision | hf-bert | hf-dinov2 | native
    model: config.Model  # inferred, or named; of a tower that is not there, defaults
    towers: tuple[str, ...]  # ("vision", "text"), or one of them
    state: Mapping[str, np.ndarray]  # views in the file's own types; wrappers' prefixes taken off
    tokenizer: Path | None  # found in the folder of the weights
    ignored: dict[str, str]  # key -> why it carries no weights of the model
    facts: dict[
        str, Any
    ]  # what a training checkpoint says of itself, and settings that were assumed; JSON values
    # State of torch's optimizer as read, when the file is a training checkpoint.
    optimizer: Mapping[str, Any] | None
    weights: Path = Path()  # the file that holds the tensors, or their index
    files: tuple[Path, ...] = ()  # those that hold the tensors
    tables: dict[str, Table] = field(default_factory=dict)  # by tower
    release: Callable[[], None] = lambda: None  # gives the pages read so far back to the system

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our leaves, float32, in the order of their names; the file's pages are released on the way.

        Raises:
            DataError: at the end, listing every key with a value that is not finite (or is float64 and not exact in
                float32): what was made of the leaves must not be kept then.
        """
        parts, rest = architecture.split(self.state, self.tables)
        broken: list[str] = []
        for key in sorted(rest):
            if key in SCALARS and key not in self.ignored:
                value = np.asarray(self.state[key], np.float32).reshape(())
                broken += [] if math.isfinite(value) else [key]
                yield key, value
        for tower in sorted(self.tables):
            part = {k: self.state[k] for k in parts[tower]}
            for name, leaf in mapping.leaves(part, self.tables[tower], self.model, broken=broken):
                yield f"{tower}/{name}", leaf
                self.release()
        mapping.refuse(str(self.path), f"{self.format} checkpoint", {"not finite": broken}, "save it again")

    def params(self) -> clip.Params:
        """All leaves as a nested dict.

        Raises:
            DataError: as `leaves`.
        """
        return clip.unflatten(dict(self.leaves()))

    def report(self) -> str:
        """One line: how many tensors were loaded, ignored and why, and initialised (none ever is)."""
        reasons = Counter(self.ignored.values())
        why = ", ".join(f"{n} {reason}" if len(reasons) > 1 else reason for reason, n in reasons.items())
        loaded = len(self.state) - len(self.ignored)
        return (
            f"{len(self.state)} tensors: {loaded} loaded, {len(self.ignored)} ignored"
            f"{f' ({why})' if why else ''}, 0 initialised"
        )


def open_source(
    path: str | Path,
    *,
    model: str | config.Model = "",
    prefer: str = "",
    fallback: config.Model | None = None,
) -> Source:
    """Opens a checkpoint, finds out its architecture and compares every name and shape with it; reads no values.

    Args:
        path: a .pt, .pth, .bin or .safetensors file; or a folder of OpenCLIP, of transformers, or a model folder.
        model: a named model, or an architecture, when it is known; the tensors must fit it.
        prefer: which to open when a folder holds several: "native", "openclip" or "hf".
        fallback: where settings come from that neither the file nor its folder says (heads, activation); their towers
            count one by one.

    Raises:
        UsageError: for a path that is not there, an unknown name, or settings that nothing says.
        DataError: listing missing, unexpected and mis-shaped tensors, with the named model whose shapes do fit; and for
            damaged files.
    """
    path = Path(path)
    if path.is_dir():
        found = locate.in_folder(path, prefer)
    elif path.is_file():
        found = locate.beside_file(path)
    else:
        raise UsageError(
            f"no checkpoint at {str(path)!r}.{did_you_mean(str(path), zoo.MODELS)}", "give a file or folder"
        )
    named = zoo.get(model) if isinstance(model, str) and model else model
    return _build(found, named if isinstance(named, config.Model) else None, fallback)


def _build(found: locate.Found, named: config.Model | None, fallback: config.Model | None) -> Source:
    state, optimizer, mapped = _open(found)
    where = str(found.path)
    if not state:
        raise DataError(f"{where} holds no tensors", "give the weights")
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    try:
        info = _infer(found, shapes, named, fallback)
    except DataError as e:
        raise DataError(e.cause if where in e.cause else f"{where}: {e.cause}", e.remedy) from e
    try:
        _possible(info.model)
    except UsageError as e:  # the file is wrong, not the request
        raise DataError(f"{where}: {e.cause.removeprefix('config: ')}", "use the weights' own config") from e
    ignored, faults = _sort(state, info)
    if any(faults.values()):
        _refuse(found.path, state, info, faults, named)
    assumed = {"assumed": info.assumed} if info.assumed else {}
    return Source(
        path=found.path,
        format=info.format,
        model=info.model,
        towers=info.towers,
        state=state,
        tokenizer=found.tokenizer,
        ignored=ignored,
        facts=found.facts | assumed,
        optimizer=optimizer,
        weights=found.weights,
        files=tuple(m.path for m in mapped.maps),
        tables=info.tables,
        release=mapped.release,
    )


def _possible(m: config.Model) -> None:
    config_rules.validate_model(m)
    for name in ("pad_id", "eot_id"):
        if getattr(m.text, name) >= m.text.vocab_size:
            raise UsageError(f"text.{name} is {getattr(m.text, name)} of {m.text.vocab_size} words")


def _infer(
    found: locate.Found,
    shapes: mapping.Shapes,
    named: config.Model | None,
    fallback: config.Model | None,
) -> architecture.Inferred:
    where = str(found.path)
    if found.model is not None and named is None:
        named = found.model
    elif found.model is not None and named is not None and not architecture.same(found.model, named):
        raise DataError(f"{where} is {found.model.name!r}, not {named.name!r}", "leave the name out")
    return architecture.infer(shapes, hints=found.hints, model=named, fallback=fallback, where=where)


def _open(found: locate.Found) -> tuple[dict[str, np.ndarray], Mapping[str, Any] | None, Mapped]:
    """The state dict without wrappers' prefixes, the optimizer's state, and the files below."""
    file = found.weights
    optimizer = None
    if file.name.endswith(".index.json"):
        mapped = open_sharded(file)
        _leave_out(found, mapped.left_out)
    elif is_safetensors(file):
        mapped = open_safetensors(file)
        if mapped.metadata.get("format") == own_files.TOWER and mapped.metadata.get("version") == "1":
            meta = tower_meta(mapped.metadata, str(found.path))
            for tower in ("vision", "text"):
                found.hints |= {f"{tower}.{k}": v for k, v in meta.get(tower, {}).items()}
    else:
        opened = open_torch(file)
        tree, optimizer = _unwrap(found, opened)
        mapped = opened.tensors(tree)
        _leave_out(found, mapped.left_out)
        if opened.kind == "torchscript":
            found.hints = {"format": "openai"} | found.hints
    state: dict[str, np.ndarray] = {}
    for key in mapped:
        name = _WRAPPERS.sub("", key).replace("._orig_mod.", ".")
        if name in state:
            raise DataError(
                f"{found.path} holds {shown(name)} twice, with and without a wrapper's prefix",
                "save it again",
            )
        state[name] = mapped[key]
    return state, optimizer, mapped


def is_safetensors(file: Path) -> bool:
    """Whether a file is, or by its name should be, a safetensors file; else it is PyTorch's."""
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as f:
        head = f.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def tower_meta(header: Mapping[str, str], where: str) -> dict[str, Any]:
    """What a native tower file says in its header: under "vision" and "text" settings of these towers, all known.

    Raises:
        DataError: when it cannot be read, or names a setting that is not ours.
    """
    try:
        meta = json.loads(header.get("meta", "{}"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} has a header that says nothing readable: {e}", "save it again") from e
    if not isinstance(meta, dict):
        raise DataError(f"{where} has a header that is no table: {shown(meta)}", "save it again")
    for tower, kind in (("vision", config.Vision), ("text", config.Text)):
        if tower in meta:
            part = settings(kind, meta[tower], f"{where}: {tower}")
            meta[tower] = {k: getattr(part, k) for k in meta[tower]}
    return meta


def _unwrap(found: locate.Found, opened: TorchFile) -> tuple[Any, Mapping[str, Any] | None]:
    """The state dict inside a training checkpoint; what else it says becomes facts."""
    tree = opened.tree
    if opened.kind == "torchscript" or not isinstance(tree, dict):
        return tree, None
    inner = next((k for k in _STATE_KEYS if isinstance(tree.get(k), dict)), None)
    if inner is None:
        return tree, None
    found.facts |= {k: tree[k] for k in _FACTS if _is_fact(tree.get(k))}
    others = sorted(str(k) for k in tree.keys() - {inner, "optimizer", "unimed_jax", *_FACTS})
    _leave_out(found, [shown(k).strip("'") for k in others])  # scaler, arguments: nothing of the model
    ours = tree.get("unimed_jax")
    if isinstance(ours, dict) and isinstance(ours.get("model"), dict):
        found.hints |= _embedded(ours["model"], str(found.path))
    optimizer = tree.get("optimizer")
    return tree[inner], optimizer if isinstance(optimizer, dict) else None


def _leave_out(found: locate.Found, names: Sequence[str]) -> None:
    """Notes what of a file is not taken; names are safe to print."""
    if names:
        before = found.facts.get("left_out", [])
        found.facts["left_out"] = [*before, *names[:100]] + [f"{len(names) - 100} more"] * (len(names) > 100)


def _is_fact(value: Any) -> bool:
    """Whether a value of a file may stand in our reports and configs."""
    if isinstance(value, str):
        return value.isprintable() and len(value) <= 200
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _embedded(spec: dict[str, Any], where: str) -> configs.Hints:
    """The architecture that our own `.pt` files carry beside the state dict."""
    return architecture.flat(settings(config.Model, spec, f"{where}: unimed_jax.model"))


def settings(kind: type, spec: Any, where: str) -> Any:
    """A part of an architecture from a file, every field known and of its type.

    Raises:
        DataError: for any other.
    """
    try:
        return config.from_dict(kind, spec, where=where)
    except UsageError as e:  # the file is wrong, not the request
        raise DataError(e.cause, e.remedy or "save it again, or update the program") from e


def _sort(
    state: Mapping[str, np.ndarray], info: architecture.Inferred
) -> tuple[dict[str, str], mapping.Faults]:
    """Keys that are ignored, with the reason; and everything that is wrong with names, shapes and types."""
    parts, rest = architecture.split(state, info.tables)
    ignored: dict[str, str] = {}
    total: mapping.Faults = {}
    for tower, table in info.tables.items():
        part = {k: state[k] for k in parts[tower]}
        ignored |= {k: why for k in part if (why := table.ignored(table.spelled(k))) is not None}
        for kind, names in mapping.compare(part, table, info.model).items():
            total.setdefault(kind, []).extend(names)
    both = len(info.tables) == 2
    for key in rest:
        if key in SCALARS and not both:
            ignored[key] = "temperature of two towers"
        elif key in SCALARS and (key != "logit_bias" or info.model.logit_bias):
            if state[key].size != 1:
                total["mis-shaped"].append(f"{key} {list(state[key].shape)} instead of []")
        elif key not in SCALARS and (why := architecture.ignored(key)):
            ignored[key] = why
        else:
            total["unexpected"].append(key)
    need = [] if not both else ["logit_scale"] + ["logit_bias"] * info.model.logit_bias
    total["missing"] += [k for k in need if k not in state]
    return ignored, total


def _refuse(
    path: Path,
    state: Mapping[str, np.ndarray],
    info: architecture.Inferred,
    faults: mapping.Faults,
    named: config.Model | None,
) -> None:
    parts, _ = architecture.split(state, info.tables)
    faults["not finite"] = [
        k
        for tower, table in info.tables.items()
        for k in mapping.not_finite({k: state[k] for k in parts[tower]}, table, info.model)
    ]
    near = architecture.nearest({k: tuple(v.shape) for k, v in state.items()})
    remedy = f"the named model closest to its shapes: {', '.join(near)}"
    if named is not None and info.fits and named.name not in info.fits:
        remedy = f"its shapes are those of {', '.join(info.fits)}"
    mapping.refuse(str(path), f"{info.format} checkpoint of {info.model.name}", faults, remedy)
