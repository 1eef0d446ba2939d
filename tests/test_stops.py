"""How a run ends before its time, in its less usual moments; test_loop.py and test_resume.py have the usual ones."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training import build_data, command, environment, losses

from unimed_jax import config
from unimed_jax.cli.train import load_config
from unimed_jax.errors import DataError, Preempted
from unimed_jax.train import assemble, hygiene, loop, saved_states, writers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root", n=60)


@pytest.fixture
def cfg(data, monkeypatch) -> config.Train:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    fields = {"data.root": str(data), "duration.steps": "4", "writers": "('jsonl',)"}
    return load_config("phantom_tiny", fields)


def test_a_signal_while_the_step_compiles(cfg, tmp_path, monkeypatch):
    """Compiling a large model takes minutes: a pre-emption meanwhile is one, too (75, not 143)."""
    unhandled = []
    old = signal.signal(signal.SIGTERM, lambda *_: unhandled.append(1))
    monkeypatch.setattr(assemble, "compiled_step", lambda parts: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Preempted, match="stopped after step 0 of 4") as e:
            loop.run(cfg, tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, old)
    assert e.value.exit_code == 75
    assert not unhandled
    assert saved_states.load_params(tmp_path / "run")[1]["step"] == 0


@pytest.mark.slow
def test_a_profile_across_a_stop(cfg, tmp_path, monkeypatch):
    """The same command again must continue also when it has a window of steps to trace."""
    workdir = tmp_path / "run"
    monkeypatch.setattr(hygiene.StopSignals, "requested", lambda self, now: now == 2)
    with pytest.raises(Preempted):
        loop.run(cfg, workdir, profile=(1, 3))
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    monkeypatch.undo()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    time.sleep(1)  # traces are named by the second
    assert loop.run(cfg, workdir, profile=(1, 9)).status == "finished"
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 2


def test_a_run_whose_states_are_all_damaged_never_starts_anew(cfg, tmp_path):
    """Not at the second try either, when the damaged states lie aside."""
    workdir = tmp_path / "run"
    step = workdir / "checkpoints" / "2" / "meta"
    step.mkdir(parents=True)
    (step / "metadata").write_text("{")
    for _ in range(2):
        with pytest.raises(DataError, match=r"all saved steps \(2\) are damaged") as e:
            loop.run(cfg, workdir)
        assert e.value.exit_code == 3
    assert not (workdir / "config.json").exists()


def test_a_reader_of_the_log_that_goes_away_does_not_end_the_run():
    """`unimed-jax train ... | head` would otherwise exit 0 in the middle."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    writers.Plain(2, stream).write(1, {"loss": 1.0})
    with pytest.raises(BrokenPipeError):  # the pipe really is broken
        stream.close()


@pytest.mark.slow
def test_a_stuck_reader_is_a_stall(data, tmp_path):
    """A reader that hangs without dying: exit 71, the stacks of all threads, and why."""
    flags = ("--config.data.workers=1", "--config.duration.steps=1000000", "--config.watchdog_s=15")
    p = subprocess.Popen(
        command(data, tmp_path / "run", *flags),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    stuck: list[int] = []
    try:
        end = time.monotonic() + 200
        while len(losses(tmp_path / "run")) < 3 and p.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        for task in Path(f"/proc/{p.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    stuck.append(int(child))
                    os.kill(int(child), signal.SIGSTOP)
        assert len(stuck) == 1
        p.wait(timeout=90)
    finally:
        for pid in (p.pid, *stuck):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    err = p.communicate(timeout=10)[1]
    assert p.returncode == 71, err
    assert "\nunimed-jax: no step for 15 s" in err  # Python's tracker of shared memory has the last word
    assert "most recent call first" in err


def test_no_reader_outlives_a_trainer_that_is_killed(data, tmp_path):
    """kill -9 of the trainer: five seconds later no process of its group is left, and no shared memory of theirs."""
    p = subprocess.Popen(
        command(data, tmp_path / "run", "--config.data.workers=2", "--config.duration.steps=1000000"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    group: dict[int, str] = {}
    try:
        end = time.monotonic() + 200
        while sum("spawn_main" in line for line in group.values()) < 2 and time.monotonic() < end:
            assert p.poll() is None
            time.sleep(0.1)
            group = _group(p.pid)
        time.sleep(1.5)  # the readers are at work
        memory = _shared_memory(*_group(p.pid))
        p.kill()
        p.wait(timeout=10)
        end = time.monotonic() + 5
        while (_group(p.pid) or _left(memory)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _group(p.pid)
        assert not _left(memory)
        assert len(group) >= 3  # the trainer and two readers were there
    finally:
        for pid in (p.pid, *_group(p.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        p.wait(timeout=10)


def _group(leader: int) -> dict[int, str]:
    """The living processes of a process group, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(group) == leader and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


def _shared_memory(*pids: int) -> set[str]:
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text()))
    return names


def _left(names: set[str]) -> set[str]:
    return {name for name in names if Path("/dev/shm", name).exists()}
