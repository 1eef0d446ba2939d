"""Grain's reader threads and processes, made safe: workers end with their parent, and a dead one is a clear fault.

Workers are spawned, never forked (array_record and XLA hold threads and locks that do not survive a fork). They
ignore SIGTERM and Ctrl-C, which a cluster sends to the whole process group: only the trainer decides when to stop,
and it still needs batches until it has saved. They may not see an accelerator.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

from unimed_jax.errors import Fault, UsageError

# Elements are addressed by a global number; the end of the stream is far away.
ENDLESS = 1 << 60

ORPHAN_EXIT = 77
_CLOSE_S = 1.0  # for the clean-up after a dead worker
_WORKER_NAME = "grain-process-prefetch"
# mallopt's (parameter, value): keep the memory of decoded images instead of returning it to the kernel and faulting
# it in again for every image; how much this gains depends on the kernel (nothing up to a third was seen).
_MALLOC = ((-3, 1 << 30), (-1, (1 << 31) - 1))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; bytes


class Elements(Protocol):
    """What is read: picklable, any element at random."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def read(
    elements: Elements, *, start: int, threads: int, workers: int, ahead: int, nbytes: int = 0
) -> Generator[Any, None, None]:
    """Yields elements start, start + 1, ... in order, prepared ahead by threads or by worker processes.

    Args:
        elements: picklable when there are workers.
        start: first element.
        threads: reader threads a process.
        workers: reader processes; 0 reads in this process.
        ahead: elements kept ready, at least.
        nbytes: size of one element, to check that shared memory can hold those on their way; 0 = no check.

    Raises:
        Fault: when a worker process dies, with its exit code, at the next element or within about a second.
        UsageError: when shared memory is too small for the workers.
        Exception: whatever reading the element raised.
    """
    import grain

    mark_flags_parsed()
    per_worker = max(1, -(-ahead // max(1, workers)))
    buffer = max(threads, ahead if not workers else 1)
    dataset = grain.MapDataset.source(elements)[start:]
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
    if not workers:
        reader = iter(stream)
        try:
            yield from reader
        finally:
            reader.close()
        return
    _check_shared_memory(nbytes * workers * (per_worker + 2), workers)
    # A shared-memory segment for every small array would cost more than sending the array.
    options = grain.experimental.DatasetOptions(min_shm_size=1 << 16)
    stream = grain.experimental.WithOptionsIterDataset(stream, options)
    stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=per_worker), prepare_worker
    )
    yield from _read_from_workers(stream, workers)


def _read_from_workers(stream: Any, workers: int) -> Iterator[Any]:
    before = set(_children())
    reader = iter(stream)
    mine: list[Any] = []
    try:
        with _spawning():
            element = next(reader)
            while len(mine) < workers and not any(p.exitcode for p in mine):  # Grain starts them in threads
                mine = [p for p in _children() if p not in before]
                time.sleep(0.005)
        while True:
            yield element
            del element  # a copy in shared memory: free it before the next one is waited for
            _refuse_dead(mine)
            element = next(reader)
    except (RuntimeError, EOFError, ConnectionError) as e:
        _refuse_dead(mine)
        if found := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(e)):
            raise _fault(int(found[1])) from e  # it died before it could be counted
        raise
    finally:
        if any(p.exitcode for p in mine):
            for p in mine:  # the others would be waited for, one after the other
                p.kill()
            # A worker that was killed while it wrote leaves half a message; Grain's clean-up waits for the rest.
            closing = threading.Thread(target=reader.close, daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
        else:
            reader.close()


def _children() -> list[Any]:
    return [p for p in multiprocessing.active_children() if p.name.startswith(_WORKER_NAME)]


def _refuse_dead(workers: list[Any]) -> None:
    """Raises Fault if a worker has ended."""
    for p in workers:
        if p.exitcode is not None:
            raise _fault(p.exitcode)


def _fault(code: int) -> Fault:
    return Fault(f"a data worker process ended with exit code {code}{_meaning(code)}", _remedy(code))


def _meaning(code: int) -> str:
    with contextlib.suppress(ValueError):
        if code < 0:
            return f" ({signal.Signals(-code).name})"
    return ""


def _remedy(code: int) -> str:
    return {
        -signal.SIGKILL: "probably out of memory: fewer data.workers, or data.workers=0; the same command resumes",
        -signal.SIGBUS: "/dev/shm is full: docker run --shm-size=8g, or data.workers=0; the same command resumes",
        1: 'a script that trains needs `if __name__ == "__main__":` around its code; or set data.workers=0',
    }.get(
        code, "look above for its last words; data.workers=0 reads in this process; the same command resumes"
    )


def _check_shared_memory(need: int, workers: int) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    free = shutil.disk_usage(shm).free
    if need > free:
        raise UsageError(
            f"{workers} data workers need {need >> 20} MiB of shared memory, /dev/shm has {free >> 20} MiB free",
            "docker run --shm-size=8g, fewer data.workers, or data.workers=0",
        )


def mark_flags_parsed() -> None:
    """Lets Grain read its absl flags in a program that has not run absl's parser."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Children started inside have SIGTERM and SIGINT blocked from their first instant.

    Blocking, not ignoring, here: a signal that arrives meanwhile is still delivered to this process afterwards. The
    environment is left alone: other threads read it, and C's setenv under their getenv crashes the process.
    """
    # Python's tracker of shared memory unblocks both signals when it starts, so it must be there before.
    resource_tracker.ensure_running()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def prepare_worker(index: int = 0, count: int = 1) -> None:
    """Runs first in every worker: it ends with the parent, leaves stopping to the parent, and sees no accelerator."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="parent-guard", daemon=True).start()
    if (
        "jax" in sys.modules
    ):  # Grain imports it; an array made by accident must not claim the trainer's device
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        for parameter, value in _MALLOC:
            mallopt(parameter, value)


def _end_with(parent: Any) -> None:
    # Waits on a pipe that the kernel closes with the parent, however it dies, also when it is already dead.
    parent.join()
    os._exit(ORPHAN_EXIT)
