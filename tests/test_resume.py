"""A run that is stopped and continued is the run that was never stopped: bit for bit, whatever stopped it.

Real processes of the command line, on one CPU device; every segment may have another number of reader workers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training import build_data, command, environment, leaves, losses, train

from unimed_jax.train import saved_states, writers

STEPS = 20
OFTEN = ("--config.checkpoint.every.steps=2",)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Path:
    """The run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train(data, workdir, *OFTEN)
    assert [line["step"] for line in losses(workdir)] == list(range(1, STEPS + 1))
    return workdir


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert losses(workdir) == losses(reference)
    assert leaves(workdir) == leaves(reference)
    ours, theirs = (saved_states.load_params(w / "checkpoints")[1] for w in (workdir, reference))
    assert ours["step"] == theirs["step"] == STEPS
    weights = [(w / "model" / "model.safetensors").read_bytes() for w in (workdir, reference)]
    assert weights[0] == weights[1]


def start(data: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(data, workdir, *OFTEN, *flags),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_line(p: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Until the log has this step, or the run is over."""
    end = time.monotonic() + 300
    while p.poll() is None and time.monotonic() < end:
        lines = writers.read_metrics(workdir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_at_any_moment(data, reference, tmp_path):
    rng = random.Random(time.time_ns())
    restored = 0
    for trial in range(3):
        workdir = tmp_path / str(trial)
        for step in (rng.randint(4, 9), rng.randint(11, 17)):
            p = start(data, workdir, f"--config.data.workers={rng.randint(0, 1)}")
            try:
                wait_for_line(p, workdir, step)
                time.sleep(rng.random() * 0.05)
            finally:
                p.kill()
                err = p.communicate()[1]
            restored += "continuing after step" in err
        err = train(data, workdir, *OFTEN, f"--config.data.workers={rng.randint(0, 1)}")
        restored += "continuing after step" in err
        assert_same_run(workdir, reference)
        assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert restored >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_signal_saves_exits_75_and_continues(data, reference, tmp_path, sent, workers):
    workdir = tmp_path / "run"
    p = start(data, workdir, f"--config.data.workers={workers}", "--config.checkpoint.every.steps=1000")
    try:
        wait_for_line(p, workdir, 6)
        os.killpg(p.pid, sent)  # as a cluster and a terminal do: the readers get it, too
        err = p.communicate(timeout=120)[1]
    finally:
        p.kill()
    assert p.returncode == 75, err
    assert "run the same command again" in err.splitlines()[-1]
    assert "Traceback" not in err
    stopped = saved_states.load_params(workdir)[1]["step"]
    assert 6 <= stopped < STEPS
    assert f"stopped after step {stopped} of {STEPS}" in err
    assert [line["step"] for line in losses(workdir)] == list(
        range(1, stopped + 1)
    )  # nothing lost, nothing twice
    again = train(data, workdir, *OFTEN, f"--config.data.workers={1 - workers}")
    assert f"continuing after step {stopped} of {STEPS}" in again
    assert_same_run(workdir, reference)


def test_damaged_newest_state_falls_back(data, reference, tmp_path):
    """Bit rot in the newest step: the older one is used, and the result is the same."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for name in ("finished.json", "model"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in (workdir / "checkpoints" / "20" / "params").rglob("d/*"):
        flipped = bytearray(file.read_bytes())
        flipped[len(flipped) // 2] ^= 4
        file.write_bytes(flipped)
    err = train(data, workdir, *OFTEN)
    assert "trying an older step" in err
    assert "continuing after step 18 of 20" in err
    assert (workdir / "checkpoints" / "damaged" / "20").is_dir()
    assert_same_run(workdir, reference)


def test_finished_run_again_is_a_no_op(data, reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file() and p.name != ".lock"}
    done = subprocess.run(
        command(data, reference, *OFTEN), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "already finished: 20 steps" in done.stdout
    assert {
        p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file() and p.name != ".lock"
    } == before


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one_and_read_each_others_states(data, reference, tmp_path):
    workdir = tmp_path / "run"
    err = train(data, workdir, *OFTEN, "--config.mesh.fsdp=2", "--config.mesh.min_size=64", devices=8)
    one, eight = losses(reference), losses(workdir)
    assert [line["step"] for line in eight] == [line["step"] for line in one]
    for a, b in zip(one, eight, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    meta = saved_states.load_params(workdir)[1]
    assert meta["versions"]["devices"] == "8"
    # Back to step 18, then one device finishes what eight began.
    (workdir / "finished.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "20")
    err = train(data, workdir, *OFTEN)
    assert "continuing after step 18 of 20; mesh" in err
    for a, b in zip(one, losses(workdir), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_settings_are_written_down(data, reference):
    written = json.loads((reference / "config.json").read_text())
    assert written["data"]["root"] == str(data)
    facts = json.loads((reference / "environment.json").read_text())
    assert set(facts) == {"git", "versions", "tokenizer", "manifests"}
    assert list(facts["manifests"]) == ["phantom"]
