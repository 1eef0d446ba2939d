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

import numpy as np
from jaxtyping import Float

from unimed_jax.errors import DataError
from unimed_jax.evaluate.curves import GRID, MANY, Reliability, Roc

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
    """The task's metric with its interval, above the references and chance, as one SVG; empty without a value.

    Args:
        task: as in results.json.

    Raises:
        DataError: without matplotlib.
    """
    metric = task["metric"]
    rows = [("this model", task["values"][metric])]
    rows += [(name, r["values"][metric]) for name, r in task["references"].items()]
    rows = [(name, v) for name, v in rows if v["value"] is not None]
    if not rows:
        return ""
    with _figure(task["name"], 6.4, 0.75 + 0.32 * len(rows)) as (figure, axes):
        for y, (name, v) in enumerate(reversed(rows)):
            colour = _LINES[0] if name == "this model" else _LINES[1]
            if v["low"] is not None:
                axes.plot([v["low"], v["high"]], [y, y], color=colour, lw=2.4, solid_capstyle="round")
            axes.plot([v["value"]], [y], "o", color=colour, ms=7)
        axes.axvline(task["chance"], color=_INK, lw=1, ls=(0, (3, 3)), alpha=0.6)
        axes.text(task["chance"] + 0.008, len(rows) - 0.45, "chance", fontsize=8, va="bottom")
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.6, len(rows) - 0.1)
        axes.set_xlabel(metric.replace("_", " "))
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        return _svg(figure)


def roc(curves: Sequence[Roc], name: str) -> str:
    """ROC curves as one SVG: each by itself, or the mean and the middle 80 % of many.

    Raises:
        DataError: without matplotlib.
    """
    with _figure(f"roc {name}", 3.9, 3.7) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_INK, lw=1, ls=(0, (3, 3)), alpha=0.6)
        if len(curves) > MANY:
            # Read off at the top of vertical steps; all curves start at the origin.
            steps = [np.append(np.diff(c.rate) > 0, True) for c in curves]
            grid = np.stack(
                [np.interp(GRID, c.rate[s], c.sensitivity[s]) for c, s in zip(curves, steps, strict=True)]
            )
            low, high = np.percentile(grid, [10, 90], axis=0)
            axes.fill_between([0, *GRID], [0, *low], [0, *high], color=_LINES[0], alpha=0.18, lw=0)
            axes.plot([0, *GRID], [0, *grid.mean(0)], color=_LINES[0], lw=1.8)
            axes.text(0.98, 0.04, f"mean of {len(curves)}, band: middle 80 %", ha="right", fontsize=8)
        else:
            for i, c in enumerate(curves):
                axes.plot(c.rate, c.sensitivity, color=_LINES[i % len(_LINES)], lw=1.6, label=_short(c.name))
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        _square(axes, "1 - specificity", "sensitivity")
        return _svg(figure)


def reliability(found: Reliability, name: str) -> str:
    """A reliability diagram as one SVG; the area of a point is its share of the records.

    Raises:
        DataError: without matplotlib.
    """
    with _figure(f"reliability {name}", 3.9, 3.7) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_INK, lw=1, ls=(0, (3, 3)), alpha=0.6)
        axes.plot(found.confidence, found.frequency, color=_LINES[0], lw=1.2, alpha=0.7)
        area = 14 + 260 * found.share
        axes.scatter(found.confidence, found.frequency, s=area, color=_LINES[0], alpha=0.75, lw=0, zorder=3)
        _square(axes, "mean score of the bin", "how often it is true")
        return _svg(figure)


def heat(shares: Float[np.ndarray, "c c"]) -> str:
    """A large confusion matrix as a base64 PNG, one pixel a cell: an opaque one is the share 1.

    Only its opacity is used, as a mask, so that it takes the page's colour.
    """
    import base64

    from PIL import Image

    alpha = np.round(255 * np.sqrt(shares)).astype(np.uint8)  # small shares must be seen
    pixels = np.concatenate([np.zeros((*shares.shape, 3), np.uint8), alpha[:, :, None]], 2)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _square(axes: Any, x: str, y: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _short(name: str) -> str:
    """A class's name that leaves room for the curve."""
    plain = name.replace("$", r"\$")  # matplotlib would set what lies between two as mathematics
    return plain if len(name) <= 28 else f"{plain[:26]}…"
