"""Evaluations by several processes: all compute, the first one speaks and writes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from unimed_jax.errors import DataError, UnimedError

T = TypeVar("T")


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Joins the other processes that a launcher started (see `hygiene.initialize_distributed`), if it started several.

    Yields:
        Whether this process writes; what the others print goes nowhere.
    """
    from unimed_jax.train import hygiene

    if not hygiene.initialize_distributed():
        yield True
        return
    import jax
    from jax.experimental import multihost_utils

    # The connections between the devices are made by the first exchange, which waits no longer than half a minute:
    # here the processes are together, later one may load its model more slowly.
    with _output_to_stderr():
        multihost_utils.sync_global_devices("joined")
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if not first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield first


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """The runtime reports a connection on stdout, where --json prints."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def by_the_first(work: Callable[[], T]) -> T | None:
    """Does what one process of a job does for all, as writing; the others wait for it, and fail if it fails.

    Returns:
        What `work` returns, on the first process.

    Raises:
        UnimedError: what `work` raises.
        DataError: the same, on the other processes.
    """
    import jax

    from unimed_jax.evaluate import batches

    out, fault = None, None
    if jax.process_index() == 0:
        try:
            out = work()
        except UnimedError as e:
            fault = e
    said = json.loads(batches.gather(json.dumps([fault.cause, fault.remedy] if fault else []).encode())[0])
    if fault or said:
        raise fault or DataError(*said)
    return out
