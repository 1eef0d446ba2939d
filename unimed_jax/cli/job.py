"""Evaluations by several processes: all compute, the first one speaks and writes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


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

    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if not first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield first
