"""`data bench`: what it measures is what training reads, and its arithmetic holds."""

from __future__ import annotations

import json

import pytest
import small_model

from unimed_jax import config
from unimed_jax.cli import main
from unimed_jax.data import bench, export, text
from unimed_jax.data.bench import LIMIT, Rate
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    tokenizer = small_model.tokenizer(folder / "words")
    export.export(Phantom(n=40, size=64), folder, shards=2, tokenizer=tokenizer)
    return folder


def call(*argv: object) -> int:
    with pytest.raises(SystemExit) as end:
        main.main(["data", "bench", *map(str, argv)])
    return end.value.code


def test_every_stage_has_rates_that_fit_together(root, capsys):
    assert (
        call(root, "--images", 20, "--rounds", 1, "--threads", 2, "--size", 32, "--rate", 100, "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert list(found["sources"]) == ["phantom"]
    assert found["pictures"] == 20
    stages = {r["stage"]: r for r in found["stages"]}
    assert list(stages) == ["read", "decode", LIMIT, "pipeline, 1 thread", "pipeline, 2 threads"]
    for r in stages.values():
        assert r["wall_per_s"] > 0
        assert r["core_over_limit"] == pytest.approx(
            r["core_per_s"] / stages[LIMIT]["core_per_s"], abs=2e-3, rel=2e-2
        )
        assert r["mb_per_s"] == pytest.approx(r["wall_per_s"] * found["mean_bytes"] / 1e6, rel=0.05, abs=0.1)
    assert stages["read"]["core_per_s"] > stages[LIMIT]["core_per_s"]
    assert found["cores_for_rate"] >= 1


def test_the_table_says_what_a_chip_needs(root, capsys):
    assert call(root, "--images", 8, "--rounds", 1, "--threads", 1, "--size", 32, "--rate", 100000) == 0
    out = capsys.readouterr().out
    assert "pipeline, 1 thread" in out
    assert "100000 pictures a second need " in out


def test_worker_processes_are_measured_and_end(root):
    cfg = config.Train()
    cfg.model.vision.image_size = 32
    cfg.data = config.Data(root=str(root))
    tokenizer = text.load_tokenizer(root / "tokenizer.json")
    found = bench.measure(cfg, tokenizer, n=8, rounds=1, workers=1)
    assert found["stages"][-1]["stage"] == "pipeline, 1 process"
    assert found["stages"][-1]["core_per_s"] > 0
    assert "cores_for_rate" not in found


def test_cores_follow_from_the_rate_of_the_widest_pipeline():
    found = {LIMIT: Rate(1, 1), "pipeline, 1 thread": Rate(200, 190), "pipeline, 8 threads": Rate(1400, 180)}
    assert [bench.cores_for(r, found) for r in (1, 180, 181, 3572)] == [1, 1, 2, 20]


def test_the_best_of_several_rounds_counts():
    rates = iter([Rate(1, 9), Rate(5, 6), Rate(3, 7)])
    assert bench.best({"a": lambda: next(rates)}, 3) == {"a": Rate(5, 9)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", 0], "--rounds and --threads must be at least 1"),
        (["--rate", -1], "--rate at least 0"),
        (["--split", "tset"], 'did you mean "test"'),
        (["--tokenizer", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_line(root, capsys, flags, words):
    assert call(root, *flags) in (2, 3)
    err = capsys.readouterr().err
    assert words.lower() in err.lower()
    assert err.count("\n") == 1


def test_records_without_a_tokenizer_or_no_records(tmp_path, capsys):
    export.export(Phantom(n=6, size=64), tmp_path / "r", shards=1)
    assert call(tmp_path / "r") == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert call(tmp_path / "nowhere") == 3
    assert "no folder" in capsys.readouterr().err


def test_numbers_below_one_are_refused(root):
    with pytest.raises(UsageError, match="at least 1"):
        bench.measure(config.Train(), small_model.tokenizer(root / "words"), n=0)
