"""Continuing a run: every setting of a config is either permitted to change by name, or its change is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from unimed_jax import config
from unimed_jax.errors import DataError
from unimed_jax.train import run_folder


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for k, v in tree.items() for leaf in leaves(v, f"{prefix}.{k}" if prefix else k)]
    return [(prefix, tree)]


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if value and isinstance(value[0], float):
        return [v / 2 for v in value]
    if value:
        return value[1:]
    raise AssertionError(f"the default config must have an entry to change: {value!r}")


FULL = config.Train(
    model=config.Model(text_groups=((64, 0.5), (256, 0.5))),
    data=config.Data(root="r", sources=(config.Source(name="a"), config.Source(name="b"))),
    optim=config.Optim(freeze=("vision/.*",), lr_multipliers=(("text/.*", 0.5),)),
    eval=config.Eval(tasks=("modality",)),
)
LEAVES = leaves(config.to_dict(FULL))


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[p for p, _ in LEAVES])
def test_every_field_is_permitted_by_name_or_refused(path, value):
    saved = config.to_dict(FULL)
    changed = copy.deepcopy(saved)
    *parents, name = path.split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[name] = other(value)
    cfg = config.from_dict(config.Train, changed)
    permitted = any(path == a or path.startswith(f"{a}.") for a in run_folder.MAY_CHANGE)
    if permitted:
        assert any(c.startswith(path) for c in run_folder.refuse_drift(saved, cfg, extend=False, where="it"))
        return
    with pytest.raises(DataError, match="made with other settings") as e:
        run_folder.refuse_drift(saved, cfg, extend=False, where="it")
    assert path in str(e.value)
    if path.startswith("duration"):
        assert run_folder.refuse_drift(saved, cfg, extend=True, where="it")


def test_what_decides_the_numbers_is_not_on_the_permitted_list():
    """The list itself, so that adding to it shows in review."""
    for path in (
        "seed",
        "batch_size",
        "model",
        "loss",
        "optim",
        "init",
        "data.sources",
        "data.split",
        "data.mixture",
        "data.temperature",
    ):
        assert not any(a == path or a.startswith(f"{path}.") for a in run_folder.MAY_CHANGE)
    for path in ("data.views", "data.crop_scale", "data.crop_ratio", "data.hflip", "data.color_jitter"):
        assert path not in run_folder.MAY_CHANGE
