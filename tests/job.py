"""Several processes of one JAX job on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def started(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process a command, all of one job; none outlives the block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    procs: list[subprocess.Popen[str]] = []
    try:
        for i, command in enumerate(commands):
            launcher = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
            env = os.environ | launcher | {"JAX_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu"}
            pipe = subprocess.PIPE
            procs.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))
        yield procs
    finally:
        for p in procs:
            p.kill()
            p.wait()


def finished(commands: Sequence[Sequence[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each process."""
    with started(commands) as procs:
        said = [p.communicate(timeout=timeout) for p in procs]
        return [(p.returncode, *texts) for p, texts in zip(procs, said, strict=True)]
