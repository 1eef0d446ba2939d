"""Alternating rounds of several sides, which all benchmarks compare by."""

from __future__ import annotations

import time
from collections.abc import Callable


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, alternating; every side is warmed up first."""
    for once in sides.values():
        once()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, once in sides.items():
            start = time.perf_counter()
            once()
            times[name].append(time.perf_counter() - start)
    return times
