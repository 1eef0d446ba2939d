"""One line of progress on a terminal, a few plain lines elsewhere; on stderr, process 0 only."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Called with (done, all); `with` closes the line.

    Args:
        title: what is going on.
        unit: what is counted.
    """

    def __init__(self, title: str, unit: str):
        self.title, self.unit = title, unit
        self.shown = time.monotonic()
        self.bar: Any = None
        self.first: tuple[float, int] | None = None  # when it was called first, and what was done by then

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                "{task.description:<7}",
                progress.BarColumn(),
                "{task.completed}/{task.total} {task.fields[speed]}",
            )
            self.bar = progress.Progress(*columns, progress.TimeElapsedColumn(), console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=None, speed="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows how far it is."""
        now = time.monotonic()
        begin, before = self.first = self.first or (now, done)
        # The first report comes after the compilation, which says nothing about the speed of the rest.
        speed = (
            f"{(done - before) / (now - begin):.0f} {self.unit}/s" if done > before and now > begin else ""
        )
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, speed=speed)
        elif done >= total or now - self.shown > 30:
            self.shown = now
            print(f"{self.title:<7} {done}/{total}  {speed}".rstrip(), file=sys.stderr, flush=True)
