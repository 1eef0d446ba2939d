"""Plots for the report as inline SVG that follows the page's colours, light or dark (extra `report`)."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.errors import DataError

PIP = 'pip install "unimed-jax[report]"'
# Placeholders drawn by matplotlib, then replaced by the page's variables.
_INK, _GRID = "#010203", "#040506"
_LINES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
# title, y label, pattern of the keys in metrics.jsonl, logarithmic
PANELS = (
    ("Training loss", "nats", r"loss", False),
    ("Zero-shot during training", "score", r"eval/.+", False),
    ("Logit scale", "factor on cosines", r"logit_scale", False),
    ("Learning rate", "", r"lr|learning_rate", False),
    ("Speed", "images / s", r"images_per_s", False),
)
MAX_POINTS = 600  # of a curve; longer ones are thinned to means, or the page grows with the run


@contextlib.contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("the report needs matplotlib, which is not installed", PIP) from None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # same input, same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK
        ),
        "grid.color": _GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = (
        re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text)
        if "width=" in text[:600]
        else text
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font: \1px system-ui, sans-serif", text)
    for colour, name in [(_INK, "ink"), (_GRID, "grid"), *((c, f"line{i}") for i, c in enumerate(_LINES))]:
        text = text.replace(colour, f"var(--{name})")
    return text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; half a line at the end of a running training is left out."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def series(lines: Sequence[Mapping[str, Any]], pattern: str) -> dict[str, tuple[list[float], list[float]]]:
    """The finite values of every metric whose whole name matches: name -> (steps, values), thinned to means.

    Example:
        >>> series([{"step": 1, "loss": 3.0}, {"step": 2, "loss": "nan"}], "loss")
        {'loss': ([1.0], [3.0])}
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if re.fullmatch(pattern, name) and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(line["step"]))
                values.append(float(value))
    return {name: (_thin(steps), _thin(values)) for name, (steps, values) in found.items()}


def _thin(values: list[float]) -> list[float]:
    size = -(-len(values) // MAX_POINTS)
    return [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]


def curves(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of every panel that has data.

    Raises:
        DataError: without matplotlib.
    """
    out = []
    for title, unit, pattern, log in PANELS:
        found = series(lines, pattern)
        if not any(len(steps) > 1 for steps, _ in found.values()):
            continue
        with _figure(title, 4.6, 2.7) as (figure, axes):
            for i, (name, (steps, values)) in enumerate(sorted(found.items())):
                style = {"color": _LINES[i % len(_LINES)], "marker": "o" if len(steps) < 30 else "", "ms": 3}
                axes.plot(steps, values, lw=1.6, label=name.removeprefix("eval/"), **style)
            axes.set_xlabel("step")
            axes.set_ylabel(unit)
            axes.set_yscale("log" if log else "linear")
            if len(found) > 1:
                axes.legend(frameon=False, fontsize=8)
            out.append((title, _svg(figure)))
    return out


def intervals(task: Mapping[str, Any]) -> str:
    """The task's metric with its interval, above the references and chance, as one SVG.

    Args:
        task: as in results.json.

    Raises:
        DataError: without matplotlib.
    """
    metric = task["metric"]
    rows = [("this model", task["values"][metric])]
    rows += [(name, r["values"][metric]) for name, r in task["references"].items()]
    rows = [(name, v) for name, v in rows if v["value"] is not None]
    with _figure(task["name"], 6.4, 0.75 + 0.32 * max(len(rows), 1)) as (figure, axes):
        for y, (name, v) in enumerate(reversed(rows)):
            colour = _LINES[0] if name == "this model" else _LINES[1]
            if v["low"] is not None:
                axes.plot([v["low"], v["high"]], [y, y], color=colour, lw=2.4, solid_capstyle="round")
            axes.plot([v["value"]], [y], "o", color=colour, ms=7)
        axes.axvline(task["chance"], color=_INK, lw=1, ls=(0, (3, 3)), alpha=0.6)
        axes.text(task["chance"], len(rows) - 0.45, " chance", fontsize=8, va="bottom")
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.6, len(rows) - 0.1)
        axes.set_xlabel(metric.replace("_", " "))
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        return _svg(figure)
