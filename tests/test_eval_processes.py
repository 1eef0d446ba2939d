"""The verb eval over two processes of one job: one result, that of one process, written once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import job
import pytest
import small_model
from training import build_data

pytestmark = pytest.mark.slow
TASK = "phantom_modality"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model and records."""
    folder = tmp_path_factory.mktemp("job")
    build_data(folder / "data", n=120)
    small_model.loaded(folder / "data").save(folder / "m")
    return folder


def command(place: Path, out: Path, *options: str) -> list[str]:
    verb = [
        sys.executable,
        "-m",
        "unimed_jax",
        "eval",
        "--model",
        str(place / "m"),
        "--data",
        str(place / "data"),
    ]
    return [*verb, "--out", str(out), "--ci", "20", "--batch-size", "8", *options]


def other(one, two, where: str = "") -> list[str]:
    """Where two results differ: but for the last digits of numbers, and for what tells when and how they were made."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = (one.keys() | two.keys()) - {"created", "code"}
        return [x for k in sorted(keys) for x in other(one.get(k), two.get(k), f"{where}/{k}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [x for i, pair in enumerate(zip(one, two, strict=True)) for x in other(*pair, f"{where}/{i}")]
    same = one == (pytest.approx(two, rel=1e-5, abs=1e-7) if isinstance(two, float) else two)
    return [] if same else [f"{where}: {one} {two}"]


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--tasks", TASK], "results.json"),
        (["--retrieval"], "retrieval.json"),
        (["--probe", TASK, "--shots", "2", "--fractions", "1", "--seeds", "1"], "probe.json"),
    ],
    ids=["zero-shot", "retrieval", "probe"],
)
def test_two_processes_write_what_one_writes(place, tmp_path, options, file):
    ((code, _, err),) = job.finished([command(place, tmp_path / "one", *options)])
    assert code == 0, err
    ends = job.finished([command(place, tmp_path / "two", *options)] * 2)
    assert [code for code, _, _ in ends] == [0, 0], [err[-300:] for _, _, err in ends]
    assert "wrote" in ends[0][1]
    assert not ends[1][1]  # one process speaks
    one, two = (json.loads((tmp_path / n / file).read_text()) for n in ("one", "two"))
    assert set(other(one, two)) <= {"/settings/devices: 1 2"}
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
