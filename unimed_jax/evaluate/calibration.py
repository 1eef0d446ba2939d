"""Scores to probabilities that mean what they say: fitted on validation predictions, applied to other records.

Classes that exclude each other share one temperature (C. Guo et al., "On calibration of modern neural networks", ICML
2017). Findings get a scale and an offset each (J. Platt, "Probabilistic outputs for support vector machines", 1999,
with his smoothed targets), and a threshold. A calibration belongs to one model and one set of prompts, by hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate.metrics import Value
from unimed_jax.vectors import log_softmax

FORMAT, VERSION = "unimed_jax.calibration", 1
RANGE = (0.01, 100.0)  # of a temperature
SAME_SHARE = 0.05  # of the evaluated records may have been fitted on

_BOUND = (  # what of a model decides its scores, and what to do where it differs
    ("sha256", "the model", "unimed-jax calibrate with this model"),
    ("normalize", "pixels normalised as", "unimed-jax calibrate with this model"),
    ("dtype", "scores computed in", "the same --dtype, or calibrate with this one"),
)
BOUND = tuple(key for key, *_ in _BOUND)

Figures = dict[str, dict[str, Value]]  # figure -> before, after, change


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """The calibration of classes that exclude each other."""

    name: str
    prompts_sha256: str
    temperature: float
    n: int
    subjects: int
    records: tuple[str, ...] = ()  # short hashes, to notice when they are evaluated again
    figures: Figures = dataclasses.field(default_factory=dict)  # out of fold; none of a single subject

    def undo(self, log_p: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """What `apply` was given."""
        return log_softmax(log_p * self.temperature)

    def apply(self, log_p: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Logarithms of the calibrated probabilities, from those of the model's scores.

        Example:
            >>> t = Temperature(name="x", prompts_sha256="", temperature=2.0, n=30, subjects=30)
            >>> np.exp(t.apply(np.log([[0.8, 0.2]]))).round(3).tolist()
            [[0.667, 0.333]]
        """
        return log_softmax(log_p / self.temperature)

    def text(self) -> str:
        """One line."""
        limit = ", at its limit: the scores say almost nothing about the labels" if self.at_limit else ""
        return f"temperature {self.temperature:.3f} from {_basis(self)}{limit}"

    @property
    def at_limit(self) -> bool:
        """Whether an even larger temperature would fit better."""
        return self.temperature > 0.999 * RANGE[1]

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {"kind": "temperature", **_plain(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platt:
    """The calibration of findings: logit = scale x margin + offset."""

    name: str
    prompts_sha256: str
    findings: dict[str, dict[str, float]]  # finding -> scale, offset, threshold (of the probability)
    left: dict[str, str]  # finding -> why it is not calibrated
    n: int
    subjects: int
    records: tuple[str, ...] = ()
    figures: Figures = dataclasses.field(default_factory=dict)

    def apply(self, margins: Float[np.ndarray, "n f"], names: Sequence[str]) -> Float[np.ndarray, "n f"]:
        """Calibrated logits; a finding that could not be calibrated stays as it is."""
        scale, offset = self._lines(names)
        return margins * scale + offset

    def undo(self, margins: Float[np.ndarray, "n f"], names: Sequence[str]) -> Float[np.ndarray, "n f"]:
        """What `apply` was given."""
        scale, offset = self._lines(names)
        return (margins - offset) / scale

    def _lines(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        one = {"scale": 1.0, "offset": 0.0}
        fits = [self.findings.get(k, one) for k in names]
        return np.array([f["scale"] for f in fits]), np.array([f["offset"] for f in fits])

    @property
    def thresholds(self) -> dict[str, float]:
        """Finding -> probability that maximises F1 on the validation records."""
        return {k: f["threshold"] for k, f in self.findings.items()}

    def text(self) -> str:
        """One line."""
        left = f", {len(self.left)} left as they are" if self.left else ""
        return f"{len(self.findings)} findings calibrated{left}, from {_basis(self)}"

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {"kind": "platt", **_plain(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one file holds."""

    model: dict[str, Any]  # name, sha256, normalize, dtype
    tasks: tuple[Temperature | Platt, ...]
    sha256: str = ""  # of the file

    def require(self, model: Mapping[str, Any]) -> None:
        """Makes sure that it was fitted on the scores of a model as it computes now.

        Raises:
            UsageError: for other weights, other normalised pixels or another precision.
        """
        for key, what, fix in _BOUND:
            if model[key] != self.model[key]:
                raise UsageError(
                    f"the calibration was fitted for {what} {self.model[key][:12]}, here it is {model[key][:12]}",
                    fix,
                )

    def for_task(self, name: str, prompts_sha256: str, model: Mapping[str, Any]) -> Temperature | Platt:
        """The one that belongs to a model (`Loaded.about`) and its question.

        Raises:
            UsageError: when the file was fitted for another model or other prompts.
        """
        self.require(model)
        for t in self.tasks:
            if t.prompts_sha256 == prompts_sha256:
                return t
        known = ", ".join(f"{t.name} {t.prompts_sha256[:8]}" for t in self.tasks)
        raise UsageError(
            f"the calibration has nothing for {name} with prompts {prompts_sha256[:8]} (it has: {known})",
            "unimed-jax calibrate with these prompts",
        )

    def json(self) -> dict[str, Any]:
        """The content of the file."""
        tasks = [t.json() for t in self.tasks]
        return {"format": FORMAT, "version": VERSION, "model": self.model, "tasks": tasks}


def load(path: str | Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UsageError: when the file does not exist.
        DataError: when it is no calibration, or holds figures that are none.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no calibration {path}", "unimed-jax calibrate writes one")
    data = path.read_bytes()
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ValueError("format")
        tasks = tuple(_one(t) for t in raw["tasks"])
        model = {k: str(raw["model"][k]) for k in ("name", *BOUND)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} holds no calibration that this program reads", "calibrate again") from e
    return Calibration(model=model, tasks=tasks, sha256=hashlib.sha256(data).hexdigest())


def _one(raw: dict[str, Any]) -> Temperature | Platt:
    head: dict[str, Any] = {k: str(raw[k]) for k in ("name", "prompts_sha256")}
    head |= {k: int(raw[k]) for k in ("n", "subjects")}
    head["records"] = tuple(map(str, raw["records"]))
    head["figures"] = {
        k: {s: Value(v["value"], v["low"], v["high"], v.get("reason", "")) for s, v in sides.items()}
        for k, sides in raw["figures"].items()
    }
    if raw["kind"] == "temperature":
        found = Temperature(temperature=float(raw["temperature"]), **head)
        numbers, positive = [found.temperature], [found.temperature]
    elif raw["kind"] == "platt":
        fits = {
            k: {n: float(v[n]) for n in ("scale", "offset", "threshold")} for k, v in raw["findings"].items()
        }
        found = Platt(findings=fits, left={k: str(v) for k, v in raw["left"].items()}, **head)
        numbers = [x for f in fits.values() for x in f.values()]
        positive = [f["scale"] for f in fits.values()]
    else:
        raise ValueError(raw["kind"])
    if not np.isfinite(numbers).all() or min(positive, default=1) <= 0:
        raise ValueError("figures")
    return found


def _basis(t: Temperature | Platt) -> str:
    return f"{t.n} records of {t.subjects} subject{'s' if t.subjects != 1 else ''}"


def _plain(t: Temperature | Platt) -> dict[str, Any]:
    out = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    out["figures"] = {k: {s: v.json() for s, v in sides.items()} for k, sides in t.figures.items()}
    return out


# ---- which records


def fingerprints(keys: Sequence[str], scores: Float[np.ndarray, "n k"]) -> tuple[str, ...]:
    """A short hash of each record's name and rounded scores: what is equal is the same picture, not only its name."""
    # Folders may be named in several ways; + 0 makes the sign of zero one.
    rows = (np.round(scores, 3) + 0.0).tolist()
    text = (f"{key.rpartition('/')[2]} {row}" for key, row in zip(keys, rows, strict=True))
    return tuple(hashlib.sha256(t.encode(errors="backslashreplace")).hexdigest()[:12] for t in text)


def fitted_on(
    t: Temperature | Platt, keys: Sequence[str], scores: Float[np.ndarray, "n k"], allowed: bool
) -> int:
    """How many of the records the calibration was fitted on.

    Args:
        t: the calibration of the task.
        keys: names of the records.
        scores: uncalibrated, as they were when it was fitted.
        allowed: whether they may be.

    Raises:
        DataError: when they are more than one in twenty, and may not be.
    """
    same = len(set(t.records) & set(fingerprints(keys, scores)))
    if same > SAME_SHARE * len(keys) and not allowed:
        raise DataError(
            f"{t.name}: {same} of {len(keys)} records were used to fit the calibration, its figures would flatter",
            "evaluate other records, or say so with --in-sample",
        )
    return same


def applied(t: Temperature | Platt, figures: Figures, same: int) -> dict[str, Any]:
    """What results say about a calibration: its numbers, the figures before and after, and records it was fitted on."""
    kind = (
        {"temperature": t.temperature}
        if isinstance(t, Temperature)
        else {"findings": t.findings, "left": t.left}
    )
    shown = {k: {s: v.json() for s, v in sides.items()} for k, sides in figures.items()}
    return {**kind, "fitted_on": {"n": t.n, "subjects": t.subjects}, "fitted_here": same, "figures": shown}
