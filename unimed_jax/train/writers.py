"""Where metrics go: metrics.jsonl, TensorBoard, the terminal. Only process 0 has any.

A line is a flat dict. Keys in `TIMING` depend on the machine's speed; all others are equal in a run that was cut and
continued and one that never stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.train import hygiene

TIMING = ("images_per_s", "step_s", "data_wait", "mfu")
Value = float | int | str | None


class Writer(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Adds one line."""
        ...

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        ...


class Jsonl:
    """metrics.jsonl: one JSON object a line, readable at any moment.

    Lines after `start_step` (of a run that was killed after its last saved state) are dropped, as is half a line.

    Raises:
        DataError: when the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int = 0):
        self.path = path
        try:
            keep = [json.dumps(line) for line in read_metrics(path) if line["step"] <= start_step]
            fresh = path.with_name(path.name + ".tmp")
            fresh.write_text("".join(f"{line}\n" for line in keep), encoding="utf-8")
            os.replace(fresh, path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as e:
            raise DataError(f"cannot write {path}: {e.strerror}", "choose another --workdir") from e

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Adds a line; numbers that are not finite become strings, since JSON has none.

        Raises:
            DataError: when the disk is full or gone.
        """
        line = {"step": step} | {k: _json_value(v) for k, v in metrics.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as e:
            raise DataError(
                f"cannot write {self.path}: {e.strerror}", "free some space, then run again"
            ) from e

    def close(self) -> None:
        """Syncs the file."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def _json_value(v: Value) -> Value:
    return str(v) if isinstance(v, float) and not math.isfinite(v) else v


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a last line that was cut off is left out.

    Example:
        >>> read_metrics("no/such/file")
        []
    """
    lines: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for raw in text.split("\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class TensorBoard:
    """TensorBoard events under <workdir>/tensorboard; needs the extra [train]."""

    def __init__(self, folder: Path, start_step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Adds one scalar per number."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class Plain:
    """One line of text per log entry, for files, pipes and cluster logs."""

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        self.total = total_steps
        self.stream = stream or sys.stdout

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Prints the line; a reader that went away (`| head`, a lost terminal) does not end the run."""
        with contextlib.suppress(OSError):
            print(f"step {step}/{self.total}  {describe(metrics)}", file=self.stream, flush=True)

    def advance(self, step: int) -> None:
        """Nothing moves between lines."""

    def close(self) -> None:
        """Nothing to free."""


class Bar:
    """A rich progress bar with the newest numbers, for terminals."""

    def __init__(self, total_steps: int, start_step: int = 0):
        from rich import progress as rp

        numbers = rp.TextColumn("{task.fields[numbers]}")
        self._progress = rp.Progress(
            rp.TextColumn("train"),
            rp.BarColumn(bar_width=24),
            rp.MofNCompleteColumn(),
            rp.TimeRemainingColumn(),
            numbers,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, numbers="")
        self._progress.start()

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Replaces the numbers."""
        self._progress.update(self._task, completed=step, numbers=describe(metrics))

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Gives the terminal back."""
        self._progress.stop()


_SHOWN = {
    "loss": "loss {:.4f}",
    "logit_scale": "scale {:.2f}",
    "lr": "lr {:.3g}",
    "images_per_s": "{:.0f} img/s",
    "mfu": "MFU {:.1%}",
    "data_wait": "wait {:.0%}",
}


def describe(metrics: Mapping[str, Value]) -> str:
    """The numbers that a person watches, in one line.

    Example:
        >>> describe({"loss": 2.5, "lr": 1e-4, "images_per_s": 812.3, "grad_norm": 1.0})
        'loss 2.5000  lr 0.0001  812 img/s'
    """
    shown = [
        text.format(metrics[k]) for k, text in _SHOWN.items() if isinstance(metrics.get(k), (int, float))
    ]
    scores = [f"{k} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/") and isinstance(v, float)]
    return "  ".join(shown + scores)


_WRITERS = {
    "jsonl": lambda folder, start: Jsonl(folder / "metrics.jsonl", start),
    "tensorboard": lambda folder, start: TensorBoard(folder / "tensorboard", start),
}


def open_writers(names: Sequence[str], workdir: Path, start_step: int) -> list[Writer]:
    """The writers of a config; TensorBoard is left out with a word when its package is missing.

    Raises:
        UsageError: for an unknown name.
    """
    out: list[Writer] = []
    for name in names:
        if name not in _WRITERS:
            raise UsageError(
                f"config: writers has {name!r}.{did_you_mean(name, _WRITERS)}",
                f"known: {', '.join(_WRITERS)}",
            )
        try:
            out.append(_WRITERS[name](workdir, start_step))
        except ImportError:
            hygiene.say(f'no {name} events: pip install "unimed-jax[train]"')
    return out


def open_console(total_steps: int, start_step: int) -> Plain | Bar:
    """A bar on a terminal, lines elsewhere."""
    return Bar(total_steps, start_step) if sys.stdout.isatty() else Plain(total_steps)
