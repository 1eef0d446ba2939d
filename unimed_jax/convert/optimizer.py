"""The moments of PyTorch's AdamW as ours: a run of the original goes on here.

PyTorch numbers parameters instead of naming them: group by group, in the order of `named_parameters()`. UniMed-CLIP
and OpenCLIP make two groups, the parameters without weight decay first. A state dict lists its keys in that same
order (buffers aside) as long as nobody sorted it; a wrong order would exchange moments of one shape silently. So the
orders of the modules that are read are data here (`ORDERS`), and a file must agree with one of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config
from unimed_jax.convert.mapped import shown
from unimed_jax.convert.mapping import finite
from unimed_jax.convert.names import plain, some
from unimed_jax.convert.tensor_file import read_with_metadata
from unimed_jax.convert.tensor_writer import write_safetensors
from unimed_jax.data import files
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
_NORM_FIRST = ("ln_1", "attn", "ln_2", "mlp")  # OpenCLIP's blocks; OpenAI's have attn, ln_1, mlp, ln_2


def _blocks(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of a residual block, part by part."""
    names = {
        "attn": tuple(f"attn.{n}" for n in _ATTN),
        "mlp": _affine("mlp.c_fc", "mlp.c_proj"),
        "ln_1": _affine("ln_1"),
        "ln_2": _affine("ln_2"),
    }
    return tuple(f"{prefix}transformer.resblocks.{{i}}.{n}" for part in parts for n in names[part])


def _tower(parts: tuple[str, ...]) -> tuple[str, ...]:
    ends = (_affine("visual.ln_pre"), _affine("visual.ln_post"))
    return (*(f"visual.{n}" for n in _CLASS), *ends[0], *_blocks("visual.", parts), *ends[1])


def _whole(parts: tuple[str, ...]) -> tuple[str, ...]:
    """OpenAI's CLIP, whose text tower has no prefix."""
    top = ("positional_embedding", "text_projection", "logit_scale", "logit_bias")
    return (
        *(*top, *_tower(parts), *_blocks("", parts)),
        *("token_embedding.weight", *_affine("ln_final")),
    )


_BERT = tuple(n for n in ORDER if n.startswith("text_encoder.transformer."))
_HEADS = ("proj.weight", "proj.0.weight", "proj.2.weight")
# As `ORDER`, of every implementation that is read; of a text tower's two prefixes the longer one stands for both.
ORDERS: dict[str, tuple[str, ...]] = {
    "UniMed-CLIP": ORDER,
    "OpenCLIP with a BERT": (
        *("logit_scale", "logit_bias", *_tower(_NORM_FIRST), *_BERT),
        *_affine("text_encoder.transformer.pooler.dense"),
        *(f"text_encoder.{n}" for n in _HEADS),
    ),
    "OpenCLIP": _whole(_NORM_FIRST),
    "OpenAI's CLIP": _whole(("attn", "ln_1", "mlp", "ln_2")),
}
# Tensors of a state dict that are no parameters.
_BUFFERS = r"(.*\.)?(position_ids|token_type_ids|attn_mask|input_resolution|context_length|vocab_size)"
_MAX_STEPS = 2**31  # the optimizer counts in 32 bits
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


def module_order(names: Iterable[str], order: Sequence[str] = ORDER) -> list[str]:
    """Parameter names in the order of `named_parameters()` of one implementation, the original by default.

    Raises:
        DataError: for a name that it does not have.

    Example:
        >>> module_order(["visual.ln_post.bias", "logit_scale", "visual.proj"])
        ['logit_scale', 'visual.proj', 'visual.ln_post.bias']
    """
    place, run = {}, 0
    for i, pattern in enumerate(order):
        if i == 0 or "{i}" not in pattern or "{i}" not in order[i - 1]:
            run = i
        place[pattern] = (run, i)
    keys: dict[str, tuple[int, int, int]] = {}
    for name in names:
        pattern = re.sub(r"(^|\.)(resblocks|layer)\.[0-9]{1,4}\.", r"\1\2.{i}.", name)
        layer = re.search(r"\.(?:resblocks|layer)\.([0-9]{1,4})\.", name)
        if pattern not in place:
            raise DataError(
                f"{plain(name)} is no parameter that its modules have", "convert the weights only"
            )
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
    _require_known_order(list(shapes), where)
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
            f"({type(e).__name__}: {shown(str(e))})",
            "convert the weights only",
        ) from e
    _refuse_others(groups, first, second, shapes, steps, where)
    return first, second, steps.pop(), settings


def _require_known_order(names: list[str], where: str) -> None:
    """Refuses names whose sequence is that of no implementation in `ORDERS`."""
    spelled = [re.sub(r"^text\.", "text_encoder.", n) for n in names]
    unknown = []
    for order in ORDERS.values():
        try:
            if module_order(spelled, order) == spelled:
                return
        except DataError as e:
            unknown.append(e.cause)
    if len(unknown) < len(ORDERS):
        why = "the state dict is not in the order of its modules"
    else:
        why = f"the order of its modules is not known ({unknown[0]})"
    raise DataError(
        f"{where}: {why}, so the moments have no names",
        "convert the weights only, or use the file that training wrote",
    )


def _settings(group: Mapping[str, Any]) -> dict[str, float]:
    b1, b2 = group["betas"]
    rest = {k: float(group[k]) for k in ("lr", "eps", "weight_decay")}
    found = {**rest, "b1": float(b1), "b2": float(b2)}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"settings are not finite: {found}")
    return found


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
            f"{where}: the moments of {plain(wrong[0])} are no floating point numbers of the weight's shape "
            f"{list(shapes[wrong[0]])} ({len(wrong)} such)",
            "convert the weights only",
        )
    if len(steps) != 1 or not 0 <= min(steps) < _MAX_STEPS:
        times = f"{min(steps)} to {max(steps)}" if steps else "0"
        raise DataError(f"{where}: parameters were updated {times} times", "convert the weights only")


def of_source(source: Any, *, where: str = "") -> Moments:
    """The moments of an opened training checkpoint (`convert.source.Source`), as our leaves.

    They are laid out like the weights, so the same table moves them.

    Raises:
        DataError: as `from_torch`; and listing weights without moments, and moments that no run leaves: not finite,
            or means of squares below zero.
    """
    where = where or str(source.path)
    shapes = {name: tuple(x.shape) for name, x in source.state.items()}
    first, second, step, settings = from_torch(source.optimizer, shapes, where=where)
    if frozen := [n for n in shapes if n not in first and n not in source.ignored]:
        raise DataError(
            f"{where}: {len(frozen)} weights were not trained and have no moments: {some(frozen, 40)}",
            "convert the weights only",
        )
    broken = []
    for kind, part in (("exp_avg", first), ("exp_avg_sq", second)):
        for name, x in part.items():
            x = np.asarray(x, np.float32)
            if not finite(x) or (part is second and x.size and x.min() < 0):
                broken.append(f"{kind} of {name}")
        source.release()
    if broken:
        raise DataError(
            f"{where}: {len(broken)} moments hold values that are not finite, or squares below zero: "
            f"{some(broken, 40)}",
            "convert the weights only, or take an earlier checkpoint",
        )
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

    broken: list[str] = []

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for kind, leaves in (("mu", moments.first), ("nu", moments.second)):
            for path, x in leaves():
                if not finite(x):
                    broken.append(f"{kind}/{path}")
                yield f"{kind}/{path}", x
        if broken:
            raise DataError(
                f"{file}: {len(broken)} moments are not finite: {some(broken, 40)}",
                "take an earlier checkpoint, or the weights only",
            )

    about = {"step": moments.step, "settings": moments.settings}
    meta = {"format": FORMAT, "version": "1", **{k: json.dumps(v, sort_keys=True) for k, v in about.items()}}
    with files.swapped(file) as beside:
        write_safetensors(beside, wanted, arrays(), meta)
    return file


def load(file: str | Path) -> Moments:
    """Reads a file of `save`.

    Raises:
        DataError: when it is missing, damaged or of another format.
    """
    leaves, meta = read_with_metadata(file)
    if (meta.get("format"), meta.get("version")) != (FORMAT, "1"):
        raise DataError(f"{file} holds no moments (format {shown(meta.get('format'))})", "convert it again")
    step, settings = _about(meta, str(file))
    part = lambda kind: {k[len(kind) :]: v for k, v in leaves.items() if k.startswith(kind)}
    return Moments(
        first=part("mu/").items,
        second=part("nu/").items,
        step=step,
        settings=settings,
    )


def _about(meta: Mapping[str, str], where: str) -> tuple[int, dict[str, float]]:
    """Updates and settings that a file's header tells."""
    step, settings = meta.get("step", ""), meta.get("settings", "{}")
    try:
        if re.fullmatch("[0-9]{1,10}", step) and int(step) < _MAX_STEPS:
            return int(step), {k: float(v) for k, v in json.loads(settings).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    raise DataError(
        f"{where} says nothing readable of its moments: step {shown(step)}, settings {shown(settings)}",
        "convert it again",
    )
