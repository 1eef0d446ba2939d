"""Alternating rounds of several sides, which all benchmarks compare by."""

from __future__ import annotations

import time
from collections.abc import Callable


def measure(
    sides: dict[str, Callable[[], object]], rounds: int, cpu: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each side, alternating; every side is warmed up first.

    Args:
        sides: what to compare.
        rounds: of each.
        cpu: gets the CPU seconds of this process, which others on the machine move less.
    """
    for once in sides.values():
        once()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, once in sides.items():
            start, busy = time.perf_counter(), time.process_time()
            once()
            times[name].append(time.perf_counter() - start)
            if cpu is not None:
                cpu.setdefault(name, []).append(time.process_time() - busy)
    return times
