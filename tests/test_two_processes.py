"""Training over two processes of one JAX job on this machine: the same losses, a peer's death, and back to one."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return training.build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> list[dict]:
    """The log of the same run in one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    training.train(data, workdir)
    return training.losses(workdir)


@contextmanager
def both(data: Path, workdir: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one job; none outlives the block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    procs = []
    try:
        for i in range(2):
            job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
            log = (workdir.parent / f"process-{i}.log").open("w+")
            procs.append(
                subprocess.Popen(
                    training.command(data, workdir),
                    env=training.environment(**job),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield procs
    finally:
        for p in procs:
            p.kill()
            p.wait()


def wait_for_step(workdir: Path, step: int, procs: list[subprocess.Popen[str]]) -> None:
    """Returns when the log has reached a step."""
    log = workdir / "metrics.jsonl"
    for _ in range(3000):
        assert all(p.poll() is None for p in procs), "a process ended before the step"
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} within 300 s")


def same_losses(one: list[dict], other: list[dict]) -> None:
    assert [x["step"] for x in one] == [x["step"] for x in other] == list(range(1, 21))
    for x, y in zip(one, other, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5), f"step {x['step']}"
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4), f"step {x['step']}"
        batch = ("same_caption_rate", "same_caption_pairs", "text_padding", "examples/phantom")
        assert {k: x[k] for k in batch} == {k: y[k] for k in batch}, (
            f"step {x['step']}"
        )  # of the global batch


def test_two_processes_train_as_one(data, alone, tmp_path):
    with both(data, tmp_path / "run") as procs:
        assert [p.wait(300) for p in procs] == [0, 0]
    same_losses(training.losses(tmp_path / "run"), alone)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_killed_peer_ends_the_other_and_one_process_goes_on(data, alone, tmp_path):
    with both(data, tmp_path / "run") as procs:
        wait_for_step(tmp_path / "run", 8, procs)  # a checkpoint was written at step 5
        procs[1].kill()
        begin = time.monotonic()
        assert procs[0].wait(60) != 0
        assert time.monotonic() - begin < 45  # the heartbeat's time-out is 30 s
    assert not (tmp_path / "run" / "model").exists()
    said = training.train(data, tmp_path / "run")
    assert "Traceback" not in said
    same_losses(training.losses(tmp_path / "run"), alone)


def test_sigterm_to_one_process_saves_on_both(data, alone, tmp_path):
    with both(data, tmp_path / "run") as procs:
        wait_for_step(tmp_path / "run", 3, procs)
        procs[1].send_signal(signal.SIGTERM)
        assert [p.wait(120) for p in procs] == [75, 75]
    with both(data, tmp_path / "run") as procs:
        assert [p.wait(300) for p in procs] == [0, 0]
    same_losses(training.losses(tmp_path / "run"), alone)
