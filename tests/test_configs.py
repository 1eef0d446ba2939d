"""Every shipped experiment builds, validates, has an abstract model, and equals its committed snapshot.

After an intended change: `UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py`, and read the diff.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from unimed_jax import config, config_rules
from unimed_jax.errors import UsageError

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden" / "configs"


def get_config(path: Path, arg: str = "") -> config.Train:
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_builds_and_equals_its_snapshot(path):
    built = get_config(path)
    config_rules.validate(built)
    found = config.to_dict(built)
    golden = GOLDEN / f"{path.stem}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(json.dumps(found, indent=1) + "\n")
    assert golden.exists(), "commit a snapshot: UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py"
    assert config.diff(json.loads(golden.read_text()), found) == {}
    assert config.to_dict(config.from_dict(config.Train, found)) == found


def test_no_snapshot_is_left_over():
    assert sorted(p.stem for p in GOLDEN.glob("*.json")) == [p.stem for p in FILES]


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("unimed_")], ids=lambda p: p.stem)
def test_reference_recipe(path):
    """What the paper's training code does (its AdamW, schedule and mixture)."""
    c = get_config(path)
    o = c.optim
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.warmup.steps, o.clip_norm) == (
        0.9,
        0.98,
        1e-6,
        0.2,
        2000,
        0.0,
    )
    assert o.lr == (4e-4 if "l14" in path.stem else 5e-4)
    assert (c.batch_size, c.duration.epochs, c.model.text.context_length) == (2048, 10, 256)
    assert c.model.name == path.stem.replace("unimed_", "unimed-clip-vit-").replace("_", "-")
    assert [s.name for s in c.data.sources] == list(config.UNIMED_SOURCES)
    assert len(set(config.UNIMED_SOURCES)) == 13
    assert get_config(path, "all").data.sources == ()
    with pytest.raises(UsageError, match="variant"):
        get_config(path, "nonsense")


def test_the_small_experiment_takes_other_records():
    path = ROOT / "configs" / "quickstart_scratch.py"
    assert [s.name for s in get_config(path).data.sources] == ["minimed"]
    assert get_config(path, "all").data.sources == ()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_model_has_an_abstract_form(path):
    from unimed_jax.models import clip

    params = clip.skeleton(get_config(path).model)[1]
    assert "vision" in params
    assert "text" in params
