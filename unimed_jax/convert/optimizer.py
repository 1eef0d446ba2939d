"""The moments of PyTorch's AdamW and ours: a run of the original goes on here, and one of ours there.

PyTorch numbers parameters instead of naming them: group by group, in the order of `named_parameters()`. UniMed-CLIP
and OpenCLIP make two groups, the parameters without weight decay first. A state dict lists its keys in that same
order (buffers aside), so a training checkpoint says itself which moment belongs to which weight; for the original's
own modules the order is data here as well (`ORDER`), and both must agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config
from unimed_jax.convert.hf import read_with_metadata
from unimed_jax.convert.tensor_writer import write_safetensors
from unimed_jax.errors import DataError
from unimed_jax.models import clip

FILE, FORMAT = "optimizer.safetensors", "unimed_jax.optimizer"
Arrays = Mapping[str, np.ndarray]
Leaves = Callable[[], Iterable[tuple[str, np.ndarray]]]  # our paths and float32 arrays, one at a time

_CLASS = ("class_embedding", "positional_embedding", "proj", "conv1.weight")
_ATTN = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_BLOCK = ("ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
_LAYER = (
    *(f"attention.self.{x}" for x in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"),
    *("output.dense", "output.LayerNorm"),
)


def _affine(*names: str) -> tuple[str, ...]:
    return tuple(f"{n}.{part}" for n in names for part in ("weight", "bias"))


# The original's parameters as its modules were made: a module's own parameters, then its children's. `{i}` counts
# layers; a run of patterns with it is repeated layer by layer.
ORDER: tuple[str, ...] = (
    "logit_scale",
    *(f"visual.{n}" for n in _CLASS),
    *_affine("visual.ln_pre"),
    *(f"visual.transformer.resblocks.{{i}}.attn.{n}" for n in _ATTN),
    *_affine(*(f"visual.transformer.resblocks.{{i}}.{n}" for n in _BLOCK)),
    *_affine("visual.ln_post"),
    *(
        f"text_encoder.transformer.embeddings.{n}_embeddings.weight"
        for n in ("word", "position", "token_type")
    ),
    *_affine("text_encoder.transformer.embeddings.LayerNorm"),
    *_affine(*(f"text_encoder.transformer.encoder.layer.{{i}}.{n}" for n in _LAYER)),
    "text_encoder.proj.0.weight",
    "text_encoder.proj.2.weight",
)
# Tensors of a state dict that are no parameters.
_BUFFERS = r"(.*\.)?(position_ids|token_type_ids|attn_mask|input_resolution|context_length|vocab_size)"
_UNDECAYED = ("bn", "ln", "bias", "logit_scale")  # parts of names


@dataclass(slots=True, kw_only=True)
class Moments:
    """Adam's state after so many updates.

    Attributes:
        first: running mean of the gradients, by our paths.
        second: running mean of their squares.
        step: updates made; PyTorch leaves out those that loss scaling skipped.
        settings: lr, b1, b2, eps and weight_decay at that time.
        dropped: parameters of the file that our model does not have.
    """

    first: Leaves
    second: Leaves
    step: int
    settings: dict[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def trees(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Both moments in memory, flat, by path."""
        return dict(self.first()), dict(self.second())


def module_order(names: Iterable[str]) -> list[str]:
    """The original's parameter names in the order of `named_parameters()`.

    Raises:
        DataError: for a name that the original does not have.

    Example:
        >>> module_order(["visual.ln_post.bias", "logit_scale", "visual.proj"])
        ['logit_scale', 'visual.proj', 'visual.ln_post.bias']
    """
    place, run = {}, 0
    for i, pattern in enumerate(ORDER):
        if i == 0 or "{i}" not in pattern or "{i}" not in ORDER[i - 1]:
            run = i
        place[pattern] = (run, i)
    keys: dict[str, tuple[int, int, int]] = {}
    for name in names:
        pattern = re.sub(r"\.(resblocks|layer)\.\d+\.", r".\1.{i}.", name)
        layer = re.search(r"\.(?:resblocks|layer)\.(\d+)\.", name)
        if pattern not in place:
            raise DataError(f"{name} is no parameter of UniMed-CLIP", "convert the weights only")
        keys[name] = (place[pattern][0], int(layer[1]) if layer else 0, place[pattern][1])
    return sorted(keys, key=keys.__getitem__)


def groups_of(shapes: Mapping[str, Sequence[int]]) -> tuple[list[str], list[str]]:
    """Parameter names without and with weight decay, each in the given order: the original's rule.

    Example:
        >>> groups_of({"logit_scale": (), "visual.proj": (2, 3), "visual.ln_pre.bias": (2,)})
        (['logit_scale', 'visual.ln_pre.bias'], ['visual.proj'])
    """
    plain = [n for n, s in shapes.items() if len(s) < 2 or any(part in n for part in _UNDECAYED)]
    return plain, [n for n in shapes if n not in set(plain)]


def from_torch(
    optimizer: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, where: str = "optimizer"
) -> tuple[Arrays, Arrays, int, dict[str, float]]:
    """A state dict of torch.optim.AdamW by name: (first moments, second moments, updates, settings).

    Args:
        optimizer: {"state": {index: {"exp_avg", "exp_avg_sq", "step"}}, "param_groups": [...]}, arrays as numpy.
        shapes: the model's state dict, names in its own order; buffers are passed over.
        where: file name for messages.

    Returns:
        Parameters that never had a gradient (a pooler that nothing reads) have no moments and are left out.

    Raises:
        DataError: for another optimizer, other groups than the original's, or moments of other shapes.
    """
    shapes = {n: tuple(s) for n, s in shapes.items() if not re.fullmatch(_BUFFERS, n)}
    if any(n.startswith("text_encoder.") for n in shapes) and module_order(shapes) != list(shapes):
        raise DataError(
            f"{where}: the state dict is not in the order of its modules, so the moments have no names",
            "convert the weights only, or use the file that training wrote",
        )
    try:
        state, groups = optimizer["state"], optimizer["param_groups"]
        names = [list(shapes)] if len(groups) == 1 else list(groups_of(shapes))
        index = {}
        for group, members in zip(groups, names, strict=True):
            index |= dict(zip(members, (int(i) for i in group["params"]), strict=True))
        if len(set(index.values())) != len(index):
            raise ValueError("a parameter is in two groups")
        index = {n: i for n, i in index.items() if i in state}  # the others never had a gradient
        first, second = ({n: state[i][k] for n, i in index.items()} for k in ("exp_avg", "exp_avg_sq"))
        steps = {int(state[i]["step"]) for i in index.values()}
        settings = _settings(groups[-1])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        raise DataError(
            f"{where} holds no AdamW of {len(shapes)} parameters in the original's groups "
            f"({type(e).__name__}: {str(e)[:80]})",
            "convert the weights only",
        ) from e
    _refuse_others(groups, first, second, shapes, steps, where)
    return first, second, steps.pop(), settings


def _settings(group: Mapping[str, Any]) -> dict[str, float]:
    b1, b2 = group["betas"]
    rest = {k: float(group[k]) for k in ("lr", "eps", "weight_decay")}
    return {**rest, "b1": float(b1), "b2": float(b2)}


def _refuse_others(
    groups: Sequence[Mapping[str, Any]],
    first: Arrays,
    second: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    steps: set[int],
    where: str,
) -> None:
    if any(g.get("amsgrad") or g.get("maximize") for g in groups):
        raise DataError(f"{where} is AdamW with amsgrad or maximize", "convert the weights only")
    is_float = lambda x: x.dtype.kind == "f" or x.dtype.name == "bfloat16"
    fits = lambda x, shape: isinstance(x, np.ndarray) and x.shape == shape and is_float(x)
    wrong = [n for n in first if not (fits(first[n], shapes[n]) and fits(second[n], shapes[n]))]
    if wrong:
        raise DataError(
            f"{where}: the moments of {wrong[0]} are no floating point numbers of the weight's shape "
            f"{list(shapes[wrong[0]])} ({len(wrong)} such)",
            "convert the weights only",
        )
    if len(steps) != 1 or min(steps) < 0:
        times = f"{min(steps)} to {max(steps)}" if steps else "0"
        raise DataError(f"{where}: parameters were updated {times} times", "convert the weights only")


def to_torch(first: Arrays, second: Arrays, *, step: int, settings: Mapping[str, float]) -> dict[str, Any]:
    """Moments under the original's names as a state dict of torch.optim.AdamW; inverse of `from_torch`.

    The arrays stay numpy: turn them into tensors before `load_state_dict`.

    Raises:
        DataError: for a name that the original does not have.
    """
    order = groups_of({n: first[n].shape for n in module_order(first)})
    shared = {
        "lr": settings["lr"],
        "betas": (settings["b1"], settings["b2"]),
        "eps": settings["eps"],
        **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
        **dict.fromkeys(("foreach", "fused")),
        "decoupled_weight_decay": True,
    }
    groups, state, n = [], {}, 0
    for names, decay in zip(order, (0.0, settings["weight_decay"]), strict=True):
        groups.append({**shared, "weight_decay": decay, "params": list(range(n, n + len(names)))})
        for name in names:
            values = {"step": np.float32(step), "exp_avg": first[name], "exp_avg_sq": second[name]}
            state[n], n = values, n + 1
    return {"state": state, "param_groups": groups}


def of_source(source: Any, *, where: str = "") -> Moments:
    """The moments of an opened training checkpoint (`convert.source.Source`), as our leaves.

    They are laid out like the weights, so the same table moves them.

    Raises:
        DataError: as `from_torch`.
    """
    where = where or str(source.path)
    shapes = {name: tuple(x.shape) for name, x in source.state.items()}
    first, second, step, settings = from_torch(source.optimizer, shapes, where=where)
    leaves = lambda state: dataclasses.replace(source, state=state).leaves()
    return Moments(
        first=lambda: leaves(first),
        second=lambda: leaves(second),
        step=step,
        settings=settings,
        dropped=tuple(n for n in shapes if n in source.ignored),
    )


# -- our file -----------------------------------------------------------------------------------------------------


def save(file: str | Path, moments: Moments, m: config.Model) -> Path:
    """Writes `mu/<path>`, `nu/<path>` and `step` as safetensors, one leaf at a time, and renames when complete.

    Raises:
        DataError: for moments that are not the model's, or not finite, or a full disk.
    """
    file = Path(file)
    shapes = {p: tuple(x.shape) for p, x in clip.flatten(clip.skeleton(m)[1]).items()}
    wanted = {f"{k}/{p}": s for k in ("mu", "nu") for p, s in shapes.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for kind, leaves in (("mu", moments.first), ("nu", moments.second)):
            for path, x in leaves():
                if not np.isfinite(x).all():
                    raise DataError(f"{kind}/{path} holds values that are not finite", "")
                yield f"{kind}/{path}", x

    about = {"step": moments.step, "settings": moments.settings}
    meta = {"format": FORMAT, "version": "1", **{k: json.dumps(v, sort_keys=True) for k, v in about.items()}}
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(beside, wanted, arrays(), meta)
        os.replace(beside, file)
    except OSError as e:
        raise DataError(f"{file} cannot be written: {e.strerror or e}", "free space or check rights") from e
    finally:
        beside.unlink(missing_ok=True)
    return file


def load(file: str | Path) -> Moments:
    """Reads a file of `save`.

    Raises:
        DataError: when it is missing, damaged or of another format.
    """
    leaves, meta = read_with_metadata(file)
    if (meta.get("format"), meta.get("version")) != (FORMAT, "1") or not meta.get("step", "").isdigit():
        raise DataError(f"{file} holds no moments (format {meta.get('format')!r})", "convert it again")
    part = lambda kind: {k[len(kind) :]: v for k, v in leaves.items() if k.startswith(kind)}
    return Moments(
        first=part("mu/").items,
        second=part("nu/").items,
        step=int(meta["step"]),
        settings=json.loads(meta.get("settings", "{}")),
    )
