"""A record that cannot be read while training: the run ends at once and says which, and goes on when it is mended."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path

import pytest
from training import build_data, leaves, losses

from unimed_jax import config
from unimed_jax.cli.train import load_config
from unimed_jax.data import open_files, pipeline, shards
from unimed_jax.data.text import load_tokenizer
from unimed_jax.errors import DataError
from unimed_jax.train import loop, saved_states

pytestmark = pytest.mark.usefixtures("compilation_cache")

BATCH, STEPS = 16, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root")


def make(root: Path, workers: int = 0) -> config.Train:
    fields = {
        "data.root": str(root),
        "data.workers": str(workers),
        "duration.steps": str(STEPS),
        "checkpoint.every.steps": "2",
        "writers": "('jsonl',)",
    }
    return load_config("phantom_tiny", fields)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    loop.run(make(data), workdir)
    return workdir


def stream(root: Path) -> pipeline.Pipeline:
    return pipeline.make(make(root), tokenizer=load_tokenizer(root / "tokenizer.json"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_ends_the_run_and_mended_it_goes_on(data, undisturbed, tmp_path, workers):
    root = Path(shutil.copytree(data, tmp_path / "root"))
    p = stream(root)
    (records,) = p.blocks.sources
    assert isinstance(records, shards.Shards)
    before = {p.mixture.locate(i).record for i in range(4 * BATCH)}
    number = p.mixture.locate(4 * BATCH + 3).record  # of the fifth step
    assert number not in before
    file = Path(records.where(number).rsplit(" record ", 1)[0])
    good = file.read_bytes()
    at = good.index(records[number].image) + 100
    file.write_bytes(good[:at] + bytes(b ^ 0x55 for b in good[at : at + 8]) + good[at + 8 :])

    workdir = tmp_path / "run"
    with pytest.raises(DataError, match=rf"source phantom record {number}\b.*{file.name}") as e:
        loop.run(make(root, workers), workdir)
    assert e.value.exit_code == 3
    assert "\n" not in e.value.line()
    assert "data check" in e.value.line()
    done = losses(workdir)
    assert done == losses(undisturbed)[: len(done)]  # nothing was left out on the way
    assert len(done) <= 4
    assert saved_states.load_params(workdir)[1]["step"] in (2, 4)

    file.write_bytes(good)
    result = loop.run(make(root, 1 - workers), workdir)
    assert (result.status, result.step) == ("finished", STEPS)
    assert losses(workdir) == losses(undisturbed)
    assert leaves(workdir) == leaves(undisturbed)


def test_a_shard_that_vanishes_is_named(data, tmp_path, monkeypatch):
    root = Path(shutil.copytree(data, tmp_path / "root"))
    monkeypatch.setattr(shards, "_OPEN", open_files.OpenFiles(lambda: 1))
    p = stream(root)
    (records,) = p.blocks.sources
    assert isinstance(records, shards.Shards)
    gone = records.folder / records.shards[1].file
    with contextlib.closing(p.batches()) as batches:
        next(batches)
        gone.unlink()
        # Whichever thread comes first finds it gone when opening it, or when asking for its size.
        words = rf"source phantom record \d+ in .*{gone.name}.*cannot be (read|opened)"
        with pytest.raises(DataError, match=words):
            list(itertools.islice(batches, p.steps_per_epoch))
    with pytest.raises(DataError, match=rf"{gone.name} cannot be read \(No such file"):
        stream(root)
