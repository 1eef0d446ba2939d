"""Where arrays live: the device mesh, an ordered table of sharding rules, and batches put onto the mesh.

The mesh has two axes. Batch rows are split over both (`data`, `fsdp`); parameters and optimizer moments are split
over `fsdp` only, each leaf along one axis, and are the same on every row of `data` (as ZeRO, arXiv 1910.02054).
Which axis is decided by the leaf's path and shape, outside the model: a model never knows how it is sharded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimed_jax import config
from unimed_jax.errors import UsageError

AXES = ("data", "fsdp")

# The first rule that matches the whole path, or the end of it after a "/", wins. The number is the first axis
# that may be split; None keeps the leaf whole on every device.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"logit_(scale|bias)", None),
    (r"(vision|text)/blocks/.*", 1),  # axis 0 counts layers: the scan over them slices it
    (r"(vision|text)/.*", 0),
    (r".*", None),  # steps and counters
)


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices as a grid of `data` x `fsdp`; -1 in the config takes what the other axis leaves.

    Raises:
        UsageError: when the sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh(config.Mesh(), jax.devices()[:1]).shape["data"]
        1
    """
    devices = list(jax.devices() if devices is None else devices)
    n, data, fsdp = len(devices), mesh.data, mesh.fsdp
    if data == -1 and fsdp > 0:
        data = n // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = n // data
    if min(data, fsdp) < 1 or data * fsdp != n:
        raise UsageError(
            f"mesh.data {mesh.data} x mesh.fsdp {mesh.fsdp} does not fit {n} devices",
            f"their product must be {n}; -1 takes what is left",
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(batch_size: int, mesh: Mesh, *, accum_steps: int = 1) -> None:
    """Refuses a global batch that the devices cannot share evenly, in every micro-batch.

    Raises:
        UsageError: naming the nearest sizes that fit.

    Example:
        >>> check_batch(8, make_mesh(config.Mesh(), jax.devices()[:1]))
    """
    unit = mesh.size * accum_steps
    if batch_size % unit:
        low, high = batch_size // unit * unit, -(-batch_size // unit) * unit
        micro = f" in {accum_steps} micro-batches" if accum_steps > 1 else ""
        raise UsageError(
            f"global batch {batch_size} does not divide over {mesh.size} devices{micro}. "
            + (f"Nearest: {low} or {high}" if low else f"Smallest: {high}"),
            "change batch_size",
        )


def leaf_path(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as names joined by "/".

    Example:
        >>> [leaf_path(p) for p, _ in jax.tree_util.tree_leaves_with_path({"text": {"word": 0}})]
        ['text/word']
    """
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def leaf_spec(
    path: str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    rules: Sequence[tuple[str, int | None]] = RULES,
    min_size: int = 2**18,
) -> PartitionSpec:
    """How one leaf is split: its largest axis that `fsdp` divides, unless a rule or its small size keeps it whole.

    Args:
        path: names joined by "/"; what stands before the parameter's own path (an optimizer's state) is ignored,
            so that moments are split like their parameter.
        shape: of the leaf.
        mesh: with an axis `fsdp`.
        rules: ordered (regex, first axis that may be split or None).
        min_size: leaves with fewer elements stay whole: gathering them costs more than it saves.
    """
    first = next((axis for pattern, axis in rules if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path)), None)
    size = mesh.shape["fsdp"]
    if first is None or size == 1 or np.prod(shape) < min_size:
        return PartitionSpec()
    axes = [i for i in range(first, len(shape)) if shape[i] and shape[i] % size == 0]
    if not axes:
        return PartitionSpec()
    best = max(axes, key=lambda i: (shape[i], i))  # equal sizes: the last, which is contiguous
    return PartitionSpec(*[None] * best, "fsdp")


def shardings(
    tree: Any,
    mesh: Mesh,
    *,
    rules: Sequence[tuple[str, int | None]] = RULES,
    min_size: int = 2**18,
) -> Any:
    """A `NamedSharding` for each leaf of parameters, optimizer state or a whole training state.

    Example:
        >>> mesh = make_mesh(config.Mesh(), jax.devices()[:1])
        >>> shardings({"logit_scale": np.float32(0)}, mesh)["logit_scale"].is_fully_replicated
        True
    """

    def place(path, x):
        return NamedSharding(
            mesh, leaf_spec(leaf_path(path), np.shape(x), mesh, rules=rules, min_size=min_size)
        )

    return jax.tree_util.tree_map_with_path(place, tree)


def whole(tree: Any, mesh: Mesh, *, min_size: int = 2**18) -> Any:
    """Parameters made whole for use inside jit; their gradients come back split as the parameters are stored.

    Without this the compiler may split activations by features to suit the weights, at many times the traffic.

    Args:
        tree: parameters whose leaves lie as `shardings` says, as traced in jit.
        mesh: with an axis `fsdp`.
        min_size: as it was given to `shardings`.
    """
    everywhere = replicated(mesh)

    def gather(x, stored):
        if stored.is_fully_replicated:
            return x
        use = jax.custom_vjp(lambda x: jax.lax.with_sharding_constraint(x, everywhere))
        # The transpose of a plain constraint would sum whole gradients on every device: twice the traffic.
        use.defvjp(
            lambda x: (jax.lax.with_sharding_constraint(x, everywhere), None),
            lambda _, g: (jax.lax.with_sharding_constraint(g, stored),),
        )
        return use(x)

    return jax.tree.map(gather, tree, shardings(tree, mesh, min_size=min_size))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays out of this process's rows.

    Args:
        batch: arrays with this process's rows first, `[global rows / processes, ...]`.
        mesh: over all processes' devices.

    Returns:
        The same names with arrays of all processes' rows, each row on one device only.

    Raises:
        UsageError: when the rows do not divide over this process's devices.

    Example:
        >>> put({"tokens": np.ones((2, 3), np.int32)}, make_mesh(config.Mesh(), jax.devices()[:1]))["tokens"].shape
        (2, 3)
    """
    sharding = batch_sharding(mesh)
    here = len(mesh.local_devices)
    for name, x in batch.items():
        if len(x) % here:
            raise UsageError(
                f"batch {name}: {len(x)} rows do not divide over {here} devices", "change batch_size"
            )
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}
