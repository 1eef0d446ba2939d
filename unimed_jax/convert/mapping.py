"""Applies a table to weights: their state dict to our leaves and back, strictly; one table serves both directions.

A row says: our leaf, the key or keys that hold it elsewhere, and how the array is moved. `{i}` counts layers, which are
stacked on our leading axis. Several keys in one row are concatenated on our last axis (fused qkv). The tables
themselves are in convert/tables.py.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy; comes with jax
import numpy as np

from unimed_jax import config
from unimed_jax.convert.names import some
from unimed_jax.errors import DataError
from unimed_jax.models import clip

State = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Faults = dict[str, list[str]]  # kind: names
_BLOCK = 16  # columns of a transposed copy at a time: a cache line of float32; 5x as fast as a plain copy

# name: (their array -> ours, our array -> theirs), exact inverses of each other
MOVES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda a: a, lambda a: a),
    "transpose": (lambda a: a.T, lambda a: a.T),  # Linear: [out in] <-> [in out]
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    "lead1": (lambda a: a[0], lambda a: a[None]),  # [1 ...] <-> [...]
    "lead2": (lambda a: a[0, 0], lambda a: a[None, None]),  # [1 1 d] <-> [d]
}
# Axes that a move needs on their side; "same" takes any.
_AXES = {"transpose": 2, "conv": 4, "lead1": 3, "lead2": 3}


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

    def keys(self, i: int | None) -> list[str]:
        """Their keys for one layer (None for a row without layers), LayerScale's last."""
        patterns = (*self.theirs, self.scale) if self.scale else self.theirs
        return [k.format(i=i) for k in patterns]


@dataclass(frozen=True, slots=True)
class Table:
    """One format of one tower."""

    name: str
    tower: str  # vision | text
    rows: tuple[Row, ...]
    marks: str = ""  # regex: a key that it matches shows that a file holds this tower in this format
    owns: str = ".*"  # regex: keys that belong to this tower, once it is there
    ignore: tuple[tuple[str, str], ...] = ()  # (regex of keys without weights of this tower, why)
    rename: tuple[tuple[str, str], ...] = ()  # (regex, replacement) for older spellings, before matching
    absent: tuple[str, ...] = ()  # regexes of our leaves that the format does not have
    proj: tuple[str, ...] = ("none",)  # kinds of head that the format can have
    # Fields of the tower's config that the format's reader takes when nothing else is said.
    implies: Mapping[str, Any] = field(default_factory=dict)
    firm: bool = True  # whether it has no other choice; kind of tower always is

    def spelled(self, key: str) -> str:
        """The key in the table's own spelling."""
        for pattern, new in self.rename:
            key = re.sub(pattern, new, key)
        return key

    def lacks(self, ours: str) -> bool:
        """Whether the format does not have one of our leaves, named by its path below the tower."""
        return any(re.fullmatch(pattern, ours) for pattern in self.absent)

    def ignored(self, key: str) -> str | None:
        """Why a key carries no weights of this tower; None when it may carry some."""
        return next((why for pattern, why in self.ignore if re.fullmatch(pattern, key)), None)


def wanted(table: Table, m: config.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of our leaves that the format must hold, by path below the tower.

    Raises:
        DataError: when the format has no place for one of the architecture's leaves.
    """
    tower = _leaf_shapes(json.dumps(config.to_dict(m)))[table.tower]
    want = {k: v for k, v in tower.items() if not any(re.fullmatch(p, k) for p in table.absent)}
    if lost := sorted(want.keys() - {row.ours for row in table.rows}):
        raise DataError(
            f"{table.name} has no place for {some(lost)} of model {m.name!r}",
            "choose a format whose architecture is the same",
        )
    return want


@functools.lru_cache(maxsize=32)
def _leaf_shapes(settings: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tracing a model takes a third of a second; every step of a conversion asks for its shapes."""
    abstract = clip.skeleton(config.from_dict(config.Model, json.loads(settings)))[1]
    return {
        tower: {k: tuple(v.shape) for k, v in clip.flatten(abstract[tower]).items()}
        for tower in ("vision", "text")
    }


def rows_of(table: Table, m: config.Model) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """The rows that the architecture uses, with the shape of our leaf.

    Raises:
        DataError: as `wanted`.
    """
    want = wanted(table, m)
    return ((row, want[row.ours]) for row in table.rows if row.ours in want)


def their_shapes(table: Table, m: config.Model) -> dict[str, tuple[int, ...]]:
    """The shape of every key that the format must have for our architecture.

    Raises:
        DataError: as `wanted`.
    """
    out: dict[str, tuple[int, ...]] = {}
    for row, whole in rows_of(table, m):
        shape = whole[1:] if row.layered else whole
        part = (*shape[:-1], shape[-1] // len(row.theirs)) if shape else shape
        moved = MOVES[row.move][1](np.broadcast_to(np.float32(0), part)).shape  # no memory behind it
        for i in _layers(row, whole):
            out |= {key.format(i=i): moved for key in row.theirs}
            if row.scale:
                out[row.scale.format(i=i)] = shape[-1:]
    return out


def our_shape(shapes: Shapes, table: Table, ours: str) -> tuple[int, ...] | None:
    """The shape of one of our leaves (a single layer of a stacked one) that their shapes speak for.

    Most layers decide, so that one damaged tensor does not change the architecture.

    Args:
        shapes: by key in the table's spelling.
        table: the format.
        ours: path below the tower.

    Returns:
        None when no key of the row is there in a usable shape.
    """
    row = next((r for r in table.rows if r.ours == ours), None)
    if row is None:
        return None
    pattern = "|".join(re.escape(k).replace(r"\{i\}", r"\d+") for k in row.theirs)
    seen = Counter(v for k, v in shapes.items() if re.fullmatch(pattern, k))
    axes = _AXES.get(row.move, 0)
    usable = [s for s, _ in seen.most_common() if (not axes or len(s) == axes) and 0 not in s]
    if not usable:
        return None
    shape = MOVES[row.move][0](np.broadcast_to(np.float32(0), usable[0])).shape
    if ours.startswith("blocks/") and not row.layered:  # stacked there too
        shape = shape[1:]
    return (*shape[:-1], shape[-1] * len(row.theirs)) if shape else shape


def depth(shapes: Shapes, table: Table) -> int:
    """The number of layers: one more than the highest number in any key of a layered row; 0 without any."""
    found = 0
    for row in table.rows:
        if row.layered:
            pattern = re.compile(re.escape(row.theirs[0]).replace(r"\{i\}", r"(\d{1,3})"))
            found = max(found, *(int(m[1]) + 1 for k in shapes if (m := pattern.fullmatch(k))), 0)
        elif row.ours.startswith("blocks/") and (shape := shapes.get(row.theirs[0])):
            found = max(found, shape[0])
    return found


def compare(state: State, table: Table, m: config.Model) -> Faults:
    """What a state dict lacks, has too many, has in another shape or in another type than numbers; reads no values.

    Raises:
        DataError: as `wanted`.
    """
    state = {table.spelled(k): v for k, v in state.items()}
    shapes = their_shapes(table, m)
    both = sorted(shapes.keys() & state.keys())
    return {
        "missing": sorted(shapes.keys() - state.keys()),
        "unexpected": [k for k in sorted(state.keys() - shapes.keys()) if table.ignored(k) is None],
        "mis-shaped": [
            f"{k} {list(state[k].shape)} instead of {list(shapes[k])}"
            for k in both
            if tuple(state[k].shape) != shapes[k]
        ],
        "not floating point": [k for k in both if not _is_float(state[k].dtype)],
    }


def leaves(
    state: State, table: Table, m: config.Model, *, where: str = "", broken: list[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Our leaves of one tower, float32, one at a time; names and shapes are compared first.

    Half precision is widened exactly; float64 must be exact in float32. Leaves that the format does not have
    (`table.absent`, e.g. a projection) are left out.

    Args:
        state: arrays by key.
        table: the format.
        m: our architecture; only the table's tower is looked at.
        where: file name for messages.
        broken: when given, gets the keys whose values are not finite or not exact in float32, and nothing is raised
            for faults: the caller has compared and will refuse.

    Yields:
        (path below the tower, array).

    Raises:
        DataError: listing every missing, unexpected, mis-shaped and non-finite key; the values are known at the end
            only, so what was made of the leaves before must not be kept.
    """
    bad = [] if broken is None else broken
    if broken is None:
        faults = compare(state, table, m)
        if any(faults.values()):
            faults["not finite"] = not_finite(state, table, m)
        refuse(where, table.name, faults)
    state = {table.spelled(k): v for k, v in state.items()}
    # In the order of the names: that of a native file.
    for row, shape in sorted(rows_of(table, m), key=lambda pair: pair[0].ours):
        yield row.ours, _take(state, row, shape, bad)
    if broken is None:
        refuse(where, table.name, {"not finite": bad})


def not_finite(state: State, table: Table, m: config.Model) -> list[str]:
    """The keys of the tower, among those of the right shape, whose values are not finite; reads all of them."""
    shapes = their_shapes(table, m)
    found = {table.spelled(k): v for k, v in state.items()}
    usable = (k for k in sorted(shapes.keys() & found.keys()) if tuple(found[k].shape) == shapes[k])
    return [k for k in usable if _is_float(found[k].dtype) and not finite(np.asarray(found[k], np.float32))]


def to_params(state: State, table: Table, m: config.Model, *, where: str = "") -> clip.Params:
    """Their state dict as the parameters of one of our towers (nested dict of float32 arrays): `leaves` at once.

    Raises:
        DataError: as `leaves`.
    """
    return clip.unflatten(dict(leaves(state, table, m, where=where)))


def to_state(params: clip.Params, table: Table, m: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """One of our towers as their tensors, one at a time (float32, C order); inverse of `leaves`.

    LayerScale, which was folded, becomes ones.

    Raises:
        DataError: when the parameters do not have the architecture's leaves and shapes, or the format cannot
            hold them.
    """
    leaves = fitting(params, table, m)
    for row, _ in rows_of(table, m):
        yield from given(leaves[row.ours], row)


def fitting(params: clip.Params, table: Table, m: config.Model) -> dict[str, Any]:
    """The leaves of one of our towers that a format holds, by path below the tower; all must fit the architecture.

    Raises:
        DataError: listing every leaf that is missing, unexpected or mis-shaped.
    """
    want = wanted(table, m)
    have = {k: v for k, v in clip.flatten(params).items() if not table.lacks(k)}
    faults = {
        "missing": sorted(want.keys() - have.keys()),
        "unexpected": sorted(have.keys() - want.keys()),
        "mis-shaped": [
            f"{k} {list(have[k].shape)} instead of {list(want[k])}"
            for k in sorted(want.keys() & have.keys())
            if tuple(have[k].shape) != want[k]
        ],
    }
    refuse("parameters", table.name, faults)
    return have


def given(leaf: Any, row: Row) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that one of our leaves of the right shape is elsewhere (float32, C order), one at a time."""
    leaf = np.asarray(leaf, np.float32)
    for i in _layers(row, leaf.shape):
        layer = leaf if i is None else leaf[i]
        parts = np.split(layer, len(row.theirs), axis=-1) if leaf.ndim else [layer]
        for key, part in zip(row.theirs, parts, strict=True):
            moved = MOVES[row.move][1](part)
            out = np.empty(moved.shape, np.float32)
            _copy(moved, out)
            yield key.format(i=i), out
        if row.scale:
            yield row.scale.format(i=i), np.ones(leaf.shape[-1], np.float32)


def from_params(params: clip.Params, table: Table, m: config.Model) -> dict[str, np.ndarray]:
    """`to_state`, all at once.

    Raises:
        DataError: as `to_state`.
    """
    return dict(to_state(params, table, m))


def refuse(where: str, what: str, faults: Faults, remedy: str = "") -> None:
    """Raises one DataError that lists every fault; does nothing when there is none.

    Args:
        where: the file.
        what: the format or architecture that it should have been.
        faults: names by kind; layers of one name are drawn together.
        remedy: what to do.

    Raises:
        DataError: when some kind has a name.
    """
    words = [f"{len(names)} {kind}: {some(names, 200)}" for kind, names in faults.items() if names]
    if words:
        raise DataError(
            f"{where or 'state dict'} is no {what} of this architecture: {'; '.join(words)}",
            remedy or "compare the architecture with the file's own config",
        )


def _layers(row: Row, shape: tuple[int, ...]) -> range | list[None]:
    return range(shape[0]) if row.layered else [None]


def _take(state: State, row: Row, shape: tuple[int, ...], broken: list[str]) -> np.ndarray:
    """Our leaf, filled layer by layer and part by part without copies in between."""
    out = np.empty(shape, np.float32)
    for i in _layers(row, shape):
        layer = out[...] if i is None else out[i]
        width = layer.shape[-1] // len(row.theirs) if layer.ndim else 0
        for n, pattern in enumerate(row.theirs):
            key = pattern.format(i=i)
            part = layer[..., n * width : (n + 1) * width] if layer.ndim else layer
            _fill(state[key], row.move, part, key, broken)
        if row.scale:
            key = row.scale.format(i=i)
            scale = np.empty(layer.shape[-1], np.float32)
            _fill(state[key], "same", scale, key, broken)
            layer *= scale
    return out


def _fill(theirs: np.ndarray, move: str, part: np.ndarray, key: str, broken: list[str]) -> None:
    moved = MOVES[move][0](theirs)
    with np.errstate(over="ignore"):
        _copy(moved, part)
    exact = theirs.dtype.itemsize <= 4 or np.array_equal(part.astype(theirs.dtype), moved)
    if not exact or not finite(part):
        broken.append(key)


def _copy(moved: np.ndarray, out: np.ndarray) -> None:
    if moved.ndim == 2 and moved.strides[0] < moved.strides[1]:
        for j in range(0, moved.shape[1], _BLOCK):
            out[:, j : j + _BLOCK] = moved[:, j : j + _BLOCK]
    else:
        out[...] = moved


def finite(a: np.ndarray) -> bool:
    """Whether every value is finite: minimum and maximum carry NaN and need no array of flags."""
    return a.size == 0 or (math.isfinite(a.min()) and math.isfinite(a.max()))


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float16", "bfloat16", "float32", "float64")
