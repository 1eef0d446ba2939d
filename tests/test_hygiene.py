"""Every way in and out of a training process: launchers, signals, the watchdog, faults of one host, caches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from unimed_jax.errors import UsageError
from unimed_jax.train import hygiene


def python(code: str, *, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, ""),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "jax"),
        ({"SLURM_JOB_ID": "1"}, ""),  # an interactive shell on a cluster
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "openmpi"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
    ],
)
def test_only_a_launcher_starts_the_distributed_runtime(env, name):
    assert hygiene.cluster(env) == name
    if not name:
        assert hygiene.initialize_distributed(env) == ""


WATCHED = """
import sys, time
from unimed_jax.train import hygiene
with hygiene.Watchdog(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0) as dog:
    for _ in range(4):
        time.sleep(0.4)
        dog.beat()
    with dog.paused():
        time.sleep(1.6)
    def stuck_in_input():
        time.sleep(30)
    stuck_in_input()
"""


def test_watchdog_dumps_stacks_and_exits_71():
    start = time.monotonic()
    done = python(WATCHED)
    assert done.returncode == 71
    assert 3.2 + 1.0 <= time.monotonic() - start < 20  # not before, not while paused
    assert "stuck_in_input" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("unimed-jax: no step for 1 s")


SIGNALLED = """
import time
from unimed_jax.train import hygiene
with hygiene.StopSignals() as stop:
    print("ready", flush=True)
    while not stop.requested(0):
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_leaves_at_once(first):
    p = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert p.stdout is not None
        assert p.stdout.readline() == "ready\n"
        p.send_signal(first)
        assert p.stdout.readline() == "saving\n"
        p.send_signal(signal.SIGTERM)
        _, err = p.communicate(timeout=10)
    finally:
        p.kill()
    assert p.returncode == 128 + signal.SIGTERM
    assert "second signal" in err


def test_words_in_the_middle_of_another_write(monkeypatch):
    """A signal handler may run inside a write to the same stream, which Python refuses with RuntimeError."""

    class Busy:
        def write(self, text=""):
            raise RuntimeError("reentrant call")

        flush = write

    said, left = [], []
    monkeypatch.setattr(hygiene.sys, "stderr", Busy())
    monkeypatch.setattr(hygiene.sys, "stdout", Busy())
    monkeypatch.setattr(hygiene.os, "write", lambda fd, text: said.append((fd, text)))
    monkeypatch.setattr(hygiene.os, "_exit", left.append)
    hygiene.say("leaving")
    hygiene.leave(143)
    assert said == [(2, b"unimed-jax: leaving\n")]
    assert left == [143]


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with hygiene.StopSignals() as stop:
        assert not stop.requested(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_exception_in_a_multi_process_run_ends_at_once():
    code = "from unimed_jax.train import hygiene; hygiene.die_alone(True)\n"
    done = python(code + "raise ValueError('broken\\nhere')")
    assert done.returncode == 70
    assert done.stderr.splitlines()[-1] == "unimed-jax: ValueError on process 0: broken here"
    done = python(
        code + "from unimed_jax.errors import DataError; raise DataError('shard a is cut', 'export')"
    )
    assert (done.returncode, done.stderr) == (3, "unimed-jax: shard a is cut. Fix: export\n")
    thread = "import threading, time\nthreading.Thread(target=lambda: 1 / 0).start(); time.sleep(20)"
    done = python(code + thread, timeout=15)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


HOST = """
import sys, time, jax
from unimed_jax.train import hygiene
assert hygiene.initialize_distributed() == "jax"
hygiene.die_alone(True)
import numpy as np
from jax.experimental import multihost_utils as mh
mh.sync_global_devices("start")
print("together", flush=True)
if jax.process_index() == 1:
    {fault}
for step in range(10_000):
    mh.process_allgather(np.int32(step))
    time.sleep(0.01)
"""


def hosts(code: str, n: int = 2) -> list[tuple[int, str, float]]:
    """Runs processes that find each other; returns (exit code, stderr, seconds) of each."""
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    procs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(n),
                "JAX_PROCESS_ID": str(i),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    out = []
    try:
        for p in procs:
            err = p.communicate(timeout=90)[1]
            out.append((p.returncode, err, time.monotonic() - begin))
    finally:
        for p in procs:
            p.kill()
    return out


def test_a_fault_on_one_host_ends_all():
    (code_0, _, seconds), (code_1, err_1, _) = hosts(HOST.format(fault="raise RuntimeError('disk on fire')"))
    assert code_1 == 70
    assert "RuntimeError on process 1: disk on fire" in err_1
    assert code_0 != 0
    assert seconds < 30


@pytest.mark.parametrize("who", [0, 1])
def test_a_missing_peer_is_said_in_one_line(who):
    done = python(
        "from unimed_jax.train import hygiene; hygiene.initialize_distributed()",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(who),
        UNIMED_JAX_INIT_TIMEOUT="2",
    )
    assert done.returncode == 70
    said = f"unimed-jax: process {who} of 2: the processes of this jax job did not come together within 2 s"
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", ["two", "²", "", "-1"])
@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "UNIMED_JAX_INIT_TIMEOUT"])
def test_a_number_in_the_environment_that_is_none_is_a_usage_error(variable, value):
    env = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    with pytest.raises(UsageError, match=f"{variable} is '{value}'"):
        hygiene.initialize_distributed(env | {variable: value})


def test_compilation_cache_is_private(tmp_path):
    old = jax.config.jax_compilation_cache_dir
    try:
        folder = hygiene.compilation_cache({"UNIMED_JAX_CACHE": str(tmp_path)})
        assert folder == tmp_path / "xla"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert hygiene.compilation_cache({"JAX_COMPILATION_CACHE_DIR": ""}) is None
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        assert hygiene.compilation_cache({"JAX_COMPILATION_CACHE_DIR": str(shared)}) is None
        (tmp_path / "file").write_text("")
        assert hygiene.compilation_cache({"UNIMED_JAX_CACHE": str(tmp_path / "file")}) is None
    finally:
        jax.config.update("jax_compilation_cache_dir", old)
