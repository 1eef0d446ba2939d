"""Precomputed features of frozen towers: the same losses as with pixels and tokens, and clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests import training
from unimed_jax import config
from unimed_jax.errors import UsageError
from unimed_jax.models import clip, zoo
from unimed_jax.train import features, loop, writers

LIT = (r"vision/(?!proj).*", r"text/(?!proj).*")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return training.build_data(tmp_path_factory.mktemp("records"), n=60)


def experiment(data: Path, **settings) -> config.Train:
    model = zoo.get("tiny")
    model.text.dropout = 0.0
    return config.Train(
        batch_size=8,
        duration=config.Duration(steps=6),
        model=model,
        data=config.Data(root=str(data), threads=1, views=2, **settings),
        optim=config.Optim(lr=1e-2, warmup=config.Duration(steps=1), freeze=LIT),
        checkpoint=config.Checkpoint(every=config.Duration(steps=3)),
        log_every=1,
        writers=("jsonl",),
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in writers.read_metrics(folder / "metrics.jsonl")]


def test_the_losses_are_those_of_pixels_and_tokens(data, tmp_path):
    loop.run(experiment(data), tmp_path / "pixels")
    loop.run(experiment(data, features=str(tmp_path / "features")), tmp_path / "cached")
    a, b = losses(tmp_path / "pixels"), losses(tmp_path / "cached")
    assert len(a) == 6
    assert a[-1] < a[0]
    np.testing.assert_allclose(a, b, rtol=2e-5)

    # A second run reads the files; another seed shares the pictures, as views do not depend on it.
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
    assert len(files) == 2
    again = dataclasses.replace(experiment(data, features=str(tmp_path / "features")), seed=1)
    loop.run(again, tmp_path / "again")
    now = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
    assert {p for p in files if p.name.startswith("image")} != {
        p for p in now if p.name.startswith("image")
    }, "seed 1 starts from other random towers, so it must not read seed 0's features"
    assert losses(tmp_path / "again")[0] != b[0]


def test_one_frozen_tower(data, tmp_path):
    cfg = experiment(data, features=str(tmp_path / "f"))
    cfg.optim.freeze = LIT[:1]
    assert features.frozen_towers(cfg, clip.skeleton(cfg.model)[1]) == ("vision",)
    pixels = experiment(data)
    pixels.optim.freeze = LIT[:1]
    loop.run(cfg, tmp_path / "cached")
    loop.run(pixels, tmp_path / "pixels")
    np.testing.assert_allclose(losses(tmp_path / "pixels"), losses(tmp_path / "cached"), rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: setattr(c.optim, "freeze", ()), "no tower is frozen"),
        (lambda c: setattr(c.data, "views", 0), "fresh crops"),
        (lambda c: setattr(c.model.text, "dropout", 0.1), "dropout"),
    ],
)
def test_refusals(data, tmp_path, change, word):
    cfg = experiment(data, features=str(tmp_path / "f"))
    change(cfg)
    with pytest.raises(UsageError, match=word):
        loop.run(cfg, tmp_path / "run")
