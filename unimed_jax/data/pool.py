"""Spawned worker processes that end with their parent, whatever happens to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from unimed_jax.errors import Fault

_shared: tuple[Any, ...] = ()


def run(
    work: Callable[..., Any], shared: tuple[Any, ...], jobs: Iterable[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yields (job, work(*shared, job)) for every job, in the order in which they end.

    Args:
        work: a module-level function.
        shared: its first arguments, sent once to each worker.
        jobs: picklable; the last argument.
        workers: processes; 1 works in this one, in the order of the jobs.

    Raises:
        Fault: when a worker dies.
        Exception: whatever `work` raises; the workers are stopped first.
    """
    jobs = list(jobs)
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, work(*shared, job)
        return
    context = multiprocessing.get_context("spawn")  # a fork after array_record was used is not safe
    alive, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (alive, shared))
    try:
        futures = {pool.submit(_call, work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as e:
        raise Fault(
            "a worker process died (killed, or out of memory)", "run it again, with fewer --workers"
        ) from e
    finally:
        parent_end.close()  # the workers see it and exit, in the middle of a job, too
        alive.close()
        pool.shutdown(wait=True, cancel_futures=True)  # the first call is the only one that waits


def _start(alive: Any, shared: tuple[Any, ...]) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()


def _exit_with_parent(alive: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()  # nothing is ever sent: it returns when the parent has closed its end or died
    os._exit(1)


def _call(work: Callable[..., Any], job: Any) -> Any:
    return work(*_shared, job)
