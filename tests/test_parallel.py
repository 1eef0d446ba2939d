"""Mesh sizes, sharding rules and batches; several devices in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unimed_jax import config
from unimed_jax.errors import UsageError
from unimed_jax.models import clip, zoo
from unimed_jax.parallel import batch_sharding, check_batch, leaf_path, leaf_spec, make_mesh, put, shardings


def grid(data, fsdp):
    return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("vision/blocks/mlp/up/kernel", (12, 768, 3072), (None, None, "fsdp")),  # the largest axis
        ("vision/blocks/mlp/down/kernel", (12, 3072, 768), (None, "fsdp")),
        ("text/blocks/attn/out/kernel", (12, 768, 768), (None, None, "fsdp")),  # equal: the last
        ("vision/blocks/odd/kernel", (4096, 255, 257), ()),  # axis 0 counts layers and is never split
        ("text/word", (30522, 768), (None, "fsdp")),  # 30522 is no multiple of 4
        ("text/word", (30524, 768), ("fsdp",)),
        ("vision/blocks/ln1/scale", (12, 768), ()),  # small
        ("logit_scale", (), ()),
        ("opt/0/mu/vision/blocks/mlp/up/kernel", (12, 768, 3072), (None, None, "fsdp")),  # like its parameter
        ("opt/0/count", (), ()),
        ("elsewhere/kernel", (4096, 4096), ()),  # no rule names it
    ],
)
def test_rules(path, shape, spec):
    assert leaf_spec(path, shape, grid(2, 4)) == PartitionSpec(*spec)


def test_one_fsdp_device_keeps_everything_whole():
    assert leaf_spec("text/word", (30524, 768), grid(8, 1)) == PartitionSpec()


@pytest.mark.parametrize("name", ["unimed-clip-vit-b16", "unimed-clip-vit-l14-336-large-text"])
def test_fsdp_shards_nearly_all_of_a_real_model(name):
    """8-fold FSDP leaves each device about an eighth of the parameters, and never splits the layer axis."""
    params = clip.skeleton(zoo.get(name))[1]
    specs = {
        leaf_path(p): (leaf_spec(leaf_path(p), x.shape, grid(1, 8)), x)
        for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    held = sum(x.size // (8 if "fsdp" in spec else 1) for spec, x in specs.values())
    assert held < 1.03 * clip.count(params) / 8
    assert all(spec[:1] != ("fsdp",) for path, (spec, _) in specs.items() if "/blocks/" in path)


def test_mesh_takes_what_is_left():
    mesh = make_mesh(config.Mesh(data=-1, fsdp=1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3), (-1, 2), (3, -1)])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(UsageError, match=r"does not fit 1 devices.*-1 takes what is left"):
        make_mesh(config.Mesh(data=sizes[0], fsdp=sizes[1]), jax.devices()[:1])


def test_batch_that_does_not_divide():
    check_batch(1024, grid(8, 4))
    with pytest.raises(UsageError) as e:
        check_batch(1000, grid(8, 4))
    assert e.value.line() == (
        "global batch 1000 does not divide over 32 devices. Nearest: 992 or 1024. Fix: change batch_size"
    )
    with pytest.raises(UsageError, match=r"32 devices in 2 micro-batches. Nearest: 960 or 1024"):
        check_batch(992, grid(8, 4), accum_steps=2)
    with pytest.raises(UsageError, match="Smallest: 32"):
        check_batch(20, grid(8, 4))


def device_report():
    """Runs in the child with 8 devices."""
    mesh = make_mesh(config.Mesh(data=2, fsdp=-1))
    rows = np.arange(16, dtype=np.int32)
    x = put({"tokens": rows}, mesh)["tokens"]
    tree = {"vision": {"blocks": {"mlp": {"kernel": np.zeros((4, 64, 8), np.float32)}}}}
    placed = jax.device_put(tree, shardings(tree, mesh, min_size=0))
    try:
        put({"tokens": rows[:12]}, mesh)
        refused = ""
    except UsageError as e:
        refused = e.line()
    return {
        "shape": dict(mesh.shape),
        "rows": [np.asarray(s.data).tolist() for s in x.addressable_shards],
        "same": x.sharding == batch_sharding(mesh),
        "kernel": jax.tree.leaves(placed)[0].addressable_shards[0].data.shape,
        "refused": refused,
    }


def test_on_eight_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, __file__], env=env, check=True, timeout=120, capture_output=True, text=True
    )
    report = json.loads(run.stdout)
    assert report["shape"] == {"data": 2, "fsdp": 4}
    assert report["rows"] == [[2 * i, 2 * i + 1] for i in range(8)]  # each row on one device, in order
    assert report["same"]
    assert report["kernel"] == [4, 16, 8]
    assert "12 rows do not divide over 8 devices" in report["refused"]


if __name__ == "__main__":
    print(json.dumps(device_report()))
