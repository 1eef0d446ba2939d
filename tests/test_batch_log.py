"""What a run logs about its batches: sources as planned, also after a cut; padding and equal captions as read."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_batch_metrics import brute_force
from training import build_data, leaves, losses

from unimed_jax import config
from unimed_jax.cli.train import load_config
from unimed_jax.data import pipeline, text
from unimed_jax.errors import Preempted
from unimed_jax.train import hygiene, loop, plan

pytestmark = pytest.mark.usefixtures("compilation_cache")

SOURCES = {"first": 40, "second": 24}  # draws an epoch: four steps of 16


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two sources with the same records."""
    root = tmp_path_factory.mktemp("data")
    text.load_tokenizer(build_data(root / "first", n=120)).save(root)
    build_data(root / "second", n=120)
    return root


@pytest.fixture(scope="module")
def cfg(root) -> config.Train:
    """Three epochs, a line after each second step."""
    c = load_config("phantom_tiny", {"data.root": str(root), "log_every": "2", "writers": "('jsonl',)"})
    c.duration, c.checkpoint.every = config.Duration(epochs=3), config.Duration(epochs=10)
    sources = tuple(config.Source(name=name, path=f"{name}/phantom") for name in SOURCES)
    c.data.sources = sources
    c.data.mixture = "size"
    records = [s["records"] for s in pipeline.plan(c)["sources"]]
    for source, size, draws in zip(sources, records, SOURCES.values(), strict=True):
        source.weight = draws / size
    return c


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.run(cfg, workdir)
    return workdir


def test_the_plan_prints_the_draws_of_each_source(cfg):
    title, *lines = plan._mixture(pipeline.plan(cfg))
    assert "64 examples an epoch from 2 sources, mixture size" in title
    for line, (name, draws) in zip(lines, SOURCES.items(), strict=True):
        assert re.search(
            rf"{name} +{draws} an epoch \( ?{draws / 64:.2%}\) of +\d+ records, weight 0\.\d+: ", line
        )
        assert line.endswith("captions uniform")


def test_realised_counts_are_the_planned_ones_after_every_epoch(cfg, whole):
    planned = {s["name"]: s["draws_per_epoch"] for s in pipeline.plan(cfg)["sources"]}
    assert planned == SOURCES
    lines = {line["step"]: line for line in losses(whole)}
    assert sorted(lines) == [2, 4, 6, 8, 10, 12]
    for epoch in (1, 2, 3):
        assert {n: lines[4 * epoch][f"examples/{n}"] for n in SOURCES} == {
            n: epoch * d for n, d in SOURCES.items()
        }
    mix = pipeline.make_mixture(cfg, cfg.data.sources, [s["records"] for s in pipeline.plan(cfg)["sources"]])
    for step, line in lines.items():
        assert tuple(line[f"examples/{n}"] for n in SOURCES) == mix.counts(16 * step)


def test_a_cut_run_logs_the_same_counts(cfg, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(hygiene.StopSignals, "requested", lambda self, now: now == 5)
    with pytest.raises(Preempted):
        loop.run(cfg, tmp_path / "run")
    monkeypatch.setattr(hygiene.StopSignals, "requested", lambda self, now: False)
    loop.run(cfg, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    assert leaves(tmp_path / "run") == leaves(whole)


def test_padding_and_equal_captions_are_those_of_the_batch(cfg, whole):
    tokenizer = text.load_tokenizer(Path(cfg.data.root) / "tokenizer.json")
    batches = pipeline.make(cfg, tokenizer=tokenizer).batches()
    read = {step: next(batches) for step in range(1, 13)}
    batches.close()
    for line in losses(whole):
        b = read[line["step"]]
        want = brute_force(b["caption_id"].tolist(), b["mask"])
        want["text_padding"] = (b["tokens"] == tokenizer.pad_id).mean()
        assert {k: line[k] for k in want} == pytest.approx(want, abs=1e-6)
    assert any(line["same_caption_rate"] > 0 for line in losses(whole))
    assert jax.device_count() == 1
    drawn = np.mean([(b["tokens"] == tokenizer.pad_id).mean() for b in read.values()])
    assert pipeline.plan(cfg, steps=12)["tokens"]["padding"] == pytest.approx(drawn)
