"""Classification metrics with 95 % bootstrap intervals by subject, in numpy.

Every metric is a function of weighted records: the value uses weight one, a bootstrap resample uses the number of
times that a record's subject was drawn. All resamples are evaluated together, in slabs of bounded memory. A metric
that is undefined (no records, one class, one subject) is None with the reason; NaN never leaves this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import delong, tallies

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
)  # what a task may be judged by: their chance is a constant
ALL = (*METRICS, "average_precision", "f1", "precision", "recall", "kappa", "ece", "brier")
TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "kappa": "Cohen's kappa",
    "ece": "ECE",
    "brier": "Brier score",
}
LOWER_IS_BETTER = ("ece", "brier")
_MIN_DEFINED = 0.9  # share of resamples in which a metric must exist for its interval to be reported


@dataclass(frozen=True, slots=True)
class Value:
    """A number with its interval, or None with the reason.

    Example:
        >>> Value(0.8312, 0.7, 0.9).text()
        '0.831 [0.700, 0.900]'
        >>> Value(None, reason="no records").text()
        'undefined (no records)'
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def text(self, digits: int = 3) -> str:
        """The value and its interval in words."""
        if self.value is None:
            return f"undefined ({self.reason})"
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def json(self) -> dict[str, Any]:
        """A plain dict; the reason only where there is one."""
        out = {"value": self.value, "low": self.low, "high": self.high}
        return out | {"reason": self.reason} if self.reason else out


@dataclass(slots=True, kw_only=True)
class Metrics:
    """All metrics of one task."""

    n: int
    subjects: int
    values: dict[str, Value]  # by the names in ALL
    recall: dict[str, Value]
    confusion: Int[np.ndarray, "c c"]  # rows: true class, columns: predicted
    support: dict[str, int]
    auroc: dict[str, Value] = field(
        default_factory=dict
    )  # each class against the rest; of more than two classes
    delong: Value | None = (
        None  # AUROC with DeLong's interval; None unless two classes and every subject is single
    )
    notes: list[str] = field(default_factory=list)

    def per_class(self) -> dict[str, Any]:
        """JSON-ready: `auroc_per_class`; nothing of two classes, where it would say the AUROC twice."""
        return {"auroc_per_class": {k: v.json() for k, v in self.auroc.items()}} if self.auroc else {}

    def chance(self, metric: str) -> float | None:
        """What guessing reaches on these records; None where it depends on how one guesses."""
        return chance(metric, list(self.support.values()))


def chance(metric: str, support: Sequence[int]) -> float | None:
    """What guessing without looking reaches, from the number of records of each class.

    Example:
        >>> chance("auroc", [30, 10]), chance("average_precision", [30, 10]), chance("f1", [30, 10])
        (0.5, 0.25, None)
    """
    n, present = sum(support), sum(s > 0 for s in support)
    if metric == "average_precision" and n:
        return support[1] / n if len(support) == 2 else 1 / present
    return {
        "accuracy": 1 / len(support),
        "balanced_accuracy": 1 / len(support),
        "auroc": 0.5,
        "kappa": 0.0,
    }.get(metric)


def classification(
    scores: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    probabilities: Float[np.ndarray, "n c"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """All metrics in `ALL`, the recall of each class and, of three or more, its AUROC, each with a 95 % interval.

    Balanced accuracy is the mean recall over the classes that occur. AUROC and average precision rank two classes by
    the difference of their scores, class 1 being positive; of more classes they are the unweighted mean of one-vs-rest
    over the classes that occur. AUROC counts ties one half; average precision takes equal scores together. F1,
    precision and recall are those of class 1 of two; of more they are the unweighted mean over the classes that occur
    or are predicted, 0/0 counting 0 (as in scikit-learn). Kappa is Cohen's, unweighted.

    The calibration error `ece` (15 bins of equal width, confidence of the predicted class) and the Brier score (sum
    over all classes, so 0 to 2) judge the given probabilities. For zero-shot results these are the softmax of
    logit_scale x cosine: both figures are about the model's own scores, with no calibration in between. A plug-in ECE
    is biased upwards and its resamples more so: its interval may lie above the value.

    Subjects, not records, are resampled: slices of one volume are one observation. Where every subject is a single
    record, the AUROC of two classes has DeLong's interval, too.

    Args:
        scores: higher is more likely; finite. The predicted class is the first maximum.
        labels: class indices below `len(classes)`.
        classes: their names.
        groups: subject of each record; None = every record is its own subject.
        probabilities: of each class, rows adding up to 1; None = the scores are none, ECE and Brier are undefined.
        resamples: bootstrap resamples; 0 = no intervals.
        seed: of the resampling.

    Raises:
        DataError: for shapes that do not fit, labels outside the classes, scores that are not finite, or
            probabilities that are none.

    Example:
        >>> scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> m = classification(scores, np.array([0, 1, 1, 1]), ["a", "b"])
        >>> m.values["accuracy"].value, m.values["precision"].value, m.confusion.tolist()
        (0.75, 1.0, [[1, 0], [1, 2]])
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    if probabilities is not None:
        probabilities = np.asarray(probabilities, np.float64)
    n = _check(scores, labels, classes, groups, probabilities)
    subject = np.arange(n) if groups is None else tallies.codes(groups)
    subjects = int(subject.max()) + 1 if n else 0
    prepared = tallies.prepare(scores, labels, probabilities)
    once = np.ones((1, n))
    point, boot = tallies.weighted(prepared, once), tallies.resampled([prepared], subject, resamples, seed)[0]
    confusion = tallies.table(prepared, once)[0].astype(np.int64)
    support = dict(zip(classes, (int(s) for s in confusion.sum(1)), strict=True))
    reasons = _reasons(classes, confusion, probabilities is not None)
    single = len(classes) == 2 and subjects == n
    return Metrics(
        n=n,
        subjects=subjects,
        values={k: interval(float(point[k][0]), boot.get(k), reasons[k]) for k in ALL},
        recall={
            k: interval(float(point[f"recall/{i}"][0]), boot.get(f"recall/{i}"), "no records of this class")
            for i, k in enumerate(classes)
        },
        confusion=confusion,
        support=support,
        auroc={
            k: interval(
                float(point[f"auroc/{i}"][0]),
                boot.get(f"auroc/{i}"),
                "only this class occurs" if support[k] else "no records of this class",
            )
            for i, k in enumerate(classes if len(classes) > 2 else ())
        },
        delong=_delong(scores, labels) if single and min(support.values()) else None,
        notes=_notes(classes, confusion, resamples > 0 and subjects < 2),
    )


def _reasons(classes: Sequence[str], confusion: np.ndarray, probable: bool) -> Mapping[str, str]:
    """Why a metric of these records does not exist, if it does not."""
    empty = not confusion.sum()
    out: dict[str, str] = dict.fromkeys(ALL, "no records" if empty else "only one class occurs")
    if not probable:
        out |= dict.fromkeys(("ece", "brier"), "the scores are no probabilities")
    if len(classes) == 2 and not empty:
        out["precision"] = f"{classes[1]} is never predicted"
        out["recall"] = f"no records of {classes[1]}"
        out["f1"] = f"{classes[1]} neither occurs nor is predicted"
    return out


def _notes(classes: Sequence[str], confusion: np.ndarray, one_subject: bool) -> list[str]:
    if not confusion.sum():
        return []
    named = lambda where: ", ".join(k for k, yes in zip(classes, where, strict=True) if yes)
    occurs, said = confusion.sum(1) > 0, confusion.sum(0) > 0
    notes = [f"no records of: {named(~occurs)}"] if not occurs.all() else []
    if len(classes) > 2 and (occurs & ~said).any() and occurs.sum() > 1:
        notes.append(f"never predicted, counted as precision 0: {named(occurs & ~said)}")
    return notes + (["no intervals: all records belong to one subject"] if one_subject else [])


def _delong(scores: np.ndarray, labels: np.ndarray) -> Value:
    positive = labels == 1
    if min(positive.sum(), (~positive).sum()) < 2:
        return Value(None, reason="fewer than two records of a class")
    value, low, high = delong.interval(tallies.binary_score(scores), positive)
    return Value(value, low, high, "" if low is not None else "no interval: DeLong's variance is 0")


def _check(scores, labels, classes, groups, probabilities) -> int:
    n, c = len(labels), len(classes)
    if scores.shape != (n, c):
        raise DataError(
            f"metrics: scores have the shape {scores.shape}, not ({n}, {c}) for {n} labels, {c} classes"
        )
    if groups is not None and len(groups) != n:
        raise DataError(f"metrics: {len(groups)} subjects for {n} records")
    if n and (labels.min() < 0 or labels.max() >= c):
        raise DataError(
            f"metrics: labels reach from {labels.min()} to {labels.max()}, classes from 0 to {c - 1}"
        )
    if not np.isfinite(scores).all():
        row = int(np.argmax(~np.isfinite(scores).all(1)))
        raise DataError(f"metrics: record {row} has scores that are not finite", "check the model's weights")
    if probabilities is not None:
        if probabilities.shape != (n, c):
            raise DataError(f"metrics: probabilities have the shape {probabilities.shape}, not ({n}, {c})")
        wrong = ~((probabilities >= 0).all(1) & (np.abs(probabilities.sum(1) - 1) < 1e-3))
        if wrong.any():
            raise DataError(
                f"metrics: record {int(wrong.argmax())} has probabilities that do not add up to 1"
            )
    return n


def interval(value: float, draws: Float[np.ndarray, "r"] | None, reason: str) -> Value:
    """A value with the percentiles of its resamples.

    Args:
        value: NaN = undefined, for the reason given.
        draws: the value in each resample, NaN where it does not exist; None = no interval.
        reason: said where the value is undefined.
    """
    if not np.isfinite(value):
        return Value(None, reason=reason)
    if draws is None:
        return Value(value)
    defined = draws[np.isfinite(draws)]
    if len(defined) < _MIN_DEFINED * len(draws):
        share = 1 - len(defined) / len(draws)
        return Value(
            value, reason=f"no interval: undefined in {share:.0%} of the resamples (too few subjects)"
        )
    low, high = np.percentile(defined, [2.5, 97.5])
    return Value(value, float(low), float(high))
