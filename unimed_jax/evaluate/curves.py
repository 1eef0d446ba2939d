"""What the report draws of the predictions: ROC curves and reliability, thinned so that a page stays small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import multilabel, stored, tallies

GRID = np.linspace(0, 1, 101)  # false positive rates at which curves are drawn
MANY = 6  # more curves than these are drawn as their mean and spread


@dataclass(frozen=True, slots=True)
class Roc:
    """One ROC curve."""

    name: str
    rate: Float[np.ndarray, "k"]  # false positive rates
    sensitivity: Float[np.ndarray, "k"]


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often what is said with some confidence is true, in bins of equal width; empty bins are left out."""

    confidence: Float[np.ndarray, "k"]  # mean in the bin
    frequency: Float[np.ndarray, "k"]
    share: Float[np.ndarray, "k"]  # of the records


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of one task."""

    roc: list[Roc]
    reliability: Reliability
    what: str  # the reliability is about


def roc(name: str, scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> Roc:
    """The ROC curve, a point for each distinct score; longer ones are read off at `GRID`.

    Example:
        >>> r = roc("x", np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
        >>> r.rate.tolist(), r.sensitivity.tolist()
        ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) < 0, True))
    hits, called = np.cumsum(positive[order])[ends], ends + 1
    rate = np.concatenate([[0.0], (called - hits) / max((~positive).sum(), 1)])
    sensitivity = np.concatenate([[0.0], hits / max(positive.sum(), 1)])
    if len(rate) > len(GRID):
        # Between two points a curve is a straight line; of a vertical step, its top counts.
        top = np.append(np.diff(rate) > 0, True)
        rate, sensitivity = np.append(0.0, GRID), np.append(0.0, np.interp(GRID, rate[top], sensitivity[top]))
    return Roc(name, rate, sensitivity)


def reliability(confidence: Float[np.ndarray, "n"], true: Bool[np.ndarray, "n"]) -> Reliability:
    """The bins of the calibration error (`tallies.BINS`).

    Example:
        >>> r = reliability(np.array([0.9, 0.9, 0.3]), np.array([True, False, False]))
        >>> r.confidence.round(3).tolist(), r.frequency.tolist(), r.share.round(3).tolist()
        ([0.3, 0.9], [0.0, 0.5], [0.333, 0.667])
    """
    place = tallies.bins(confidence)
    count = np.bincount(place, minlength=tallies.BINS)
    full = count > 0
    mean = lambda x: np.bincount(place, x, tallies.BINS)[full] / count[full]
    return Reliability(mean(confidence), mean(true.astype(float)), count[full] / max(len(confidence), 1))


def of_folder(folder: Path, results: Mapping[str, Any]) -> dict[str, Curves]:
    """The curves of every task of a results folder whose predictions can be read.

    Args:
        folder: with predictions.csv and findings.csv.
        results: the content of its results.json.
    """
    out: dict[str, Curves] = {}
    for read, key, make in (
        (stored.predictions, "tasks", _stored_classes),
        (stored.findings, "findings", _stored_findings),
    ):
        if not results.get(key):
            continue
        try:
            rows = read(folder)
        except DataError:  # a page without curves is better than none
            continue
        for t in results[key]:
            try:
                out[t["name"]] = make(t, rows.get(t["name"], []))
            except DataError:
                continue
    return out


def _stored_classes(t: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> Curves:
    s = stored.scored(t["name"], rows, t["classes"])
    return of_classes(t["classes"], s.log_scores, s.labels)


def _stored_findings(t: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> Curves:
    f = stored.scored_findings(t["name"], rows, list(t["findings"]))
    return of_findings(list(t["findings"]), f.margins, f.truth)


def of_classes(
    names: Sequence[str], log_scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]
) -> Curves:
    """The curves of classes that exclude each other."""
    if len(names) == 2:
        problems = [(names[1], tallies.binary_score(log_scores), labels == 1)]
    else:
        problems = [(c, log_scores[:, k], labels == k) for k, c in enumerate(names)]
    chosen = log_scores.argmax(1)
    confidence = np.exp(log_scores[np.arange(len(chosen)), chosen])
    return Curves(_all(problems), reliability(confidence, chosen == labels), "of the predicted class")


def of_findings(
    names: Sequence[str], margins: Float[np.ndarray, "n f"], truth: Int[np.ndarray, "n f"]
) -> Curves:
    """The curves of findings, each on the records where it is known (1 or 0, else -1)."""
    known = truth >= 0
    problems = [(name, margins[known[:, j], j], truth[known[:, j], j] == 1) for j, name in enumerate(names)]
    p = multilabel.probability(margins)
    return Curves(_all(problems), reliability(p[known], truth[known] == 1), "over all findings")


def _all(problems: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> list[Roc]:
    """The curve of each problem that has both sides."""
    return [roc(name, s, y) for name, s, y in problems if 0 < y.sum() < len(y)]
