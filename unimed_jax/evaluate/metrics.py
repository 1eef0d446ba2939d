"""Classification metrics with 95 % bootstrap intervals by subject, in numpy.

Every metric is a function of weighted records: the value uses weight one, a bootstrap resample uses the number of
times that a record's subject was drawn. All resamples are evaluated together, in slabs of bounded memory. A metric
that is undefined (no records, one class, one subject) is None with the reason; NaN never leaves this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError

METRICS = ("accuracy", "balanced_accuracy", "auroc")
_SLAB = 16_000_000  # weights held at once (64 MB in float32)
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
    values: dict[str, Value]
    recall: dict[str, Value]
    confusion: Int[np.ndarray, "c c"]  # rows: true class, columns: predicted
    support: dict[str, int]
    notes: list[str] = field(default_factory=list)


def classification(
    scores: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Accuracy, balanced accuracy, AUROC and recall a class, each with a 95 % percentile interval.

    Balanced accuracy is the mean recall over the classes that occur; AUROC of two classes ranks by the difference of
    their scores, of more classes it is the unweighted mean of one-vs-rest over the classes that occur, ties counting
    one half. Subjects, not records, are resampled: slices of one volume are one observation.

    Args:
        scores: higher is more likely; finite. The predicted class is the first maximum.
        labels: class indices below `len(classes)`.
        classes: their names.
        groups: subject of each record; None = every record is its own subject.
        resamples: bootstrap resamples; 0 = no intervals.
        seed: of the resampling.

    Raises:
        DataError: for shapes that do not fit, labels outside the classes, or scores that are not finite.

    Example:
        >>> scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> m = classification(scores, np.array([0, 1, 1, 1]), ["a", "b"])
        >>> m.values["accuracy"].value, m.confusion.tolist()
        (0.75, [[1, 0], [1, 2]])
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    n, c = _check(scores, labels, classes, groups)
    subject = np.arange(n) if groups is None else _codes(groups)
    subjects = int(subject.max()) + 1 if n else 0
    predicted = scores.argmax(1) if n else np.zeros(0, np.int64)
    ranks = _rankings(scores, labels, c)

    point = _weighted(np.ones((1, n)), labels, predicted, ranks, c)
    draws = [
        _weighted(w[:, subject], labels, predicted, ranks, c)
        for w in _subject_weights(subjects, n, resamples, seed)
        if n and subjects > 1
    ]
    boot = {k: np.concatenate([d[k] for d in draws]) for k in point} if draws else {}
    confusion = _tally(np.ones((1, n)), labels, predicted, c)[0].astype(np.int64)
    support = dict(zip(classes, (int(s) for s in confusion.sum(1)), strict=True))
    missing = [k for k, s in support.items() if not s]

    def value(name: str, reason: str) -> Value:
        return _interval(float(point[name][0]), boot.get(name), reason)

    none = "no records" if not n else "only one class occurs"
    values = {name: value(name, none) for name in METRICS}
    recall = {k: value(f"recall/{i}", "no records of this class") for i, k in enumerate(classes)}
    notes = [f"no records of: {', '.join(missing)}"] if missing and n else []
    if resamples and n and subjects < 2:
        notes.append("no intervals: all records belong to one subject")
    return Metrics(
        n=n,
        subjects=subjects,
        values=values,
        recall=recall,
        confusion=confusion,
        support=support,
        notes=notes,
    )


def _check(scores, labels, classes, groups) -> tuple[int, int]:
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
    return n, c


def _codes(groups: Sequence[Any]) -> np.ndarray:
    order: dict[Any, int] = {}
    return np.array([order.setdefault(g, len(order)) for g in groups], np.int64)


def _subject_weights(subjects: int, n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each subject is drawn, in slabs `[resamples, subjects]`; the slab size never changes the draws."""
    rng = np.random.default_rng(seed)
    rows = max(1, _SLAB // max(n, 1))
    for start in range(0, resamples if subjects else 0, rows):
        size = min(rows, resamples - start)
        yield np.stack(
            [np.bincount(rng.integers(subjects, size=subjects), minlength=subjects) for _ in range(size)]
        )


def _rankings(
    scores: np.ndarray, labels: np.ndarray, c: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each one-vs-rest problem: the order by score, where each run of equal scores starts, who is positive."""
    columns = [scores[:, 1] - scores[:, 0]] if c == 2 else [scores[:, k] for k in range(c)]
    out = []
    for k, s in enumerate(columns):
        order = np.argsort(s, kind="stable")
        starts = np.flatnonzero(np.diff(s[order], prepend=-np.inf))
        out.append((order, starts, (labels == (1 if c == 2 else k))[order]))
    return out


def _tally(w: np.ndarray, labels: np.ndarray, predicted: np.ndarray, c: int) -> np.ndarray:
    """Weighted confusion matrices `[resamples, true, predicted]`."""
    cell = np.zeros((len(labels), c * c))
    cell[np.arange(len(labels)), labels * c + predicted] = 1
    return (w @ cell).reshape(len(w), c, c)


def _weighted(w: np.ndarray, labels, predicted, ranks, c: int) -> dict[str, np.ndarray]:
    """Every metric for each row of weights; NaN where it does not exist (internal only)."""
    table = _tally(w, labels, predicted, c)
    hits, support = np.einsum("rkk->rk", table), table.sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / np.where(support > 0, support, np.nan)
        accuracy = hits.sum(1) / np.where(w.sum(1) > 0, w.sum(1), np.nan)
    several = (support > 0).sum(1) > 1
    return {
        "accuracy": accuracy,
        "balanced_accuracy": np.where(several, _mean_defined(recall), np.nan),
        "auroc": np.where(several, _mean_defined(np.stack([_auroc(w, *r) for r in ranks], 1)), np.nan),
        **{f"recall/{k}": recall[:, k] for k in range(c)},
    }


def _auroc(w: np.ndarray, order: np.ndarray, starts: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Weighted area under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2."""
    if not len(starts):
        return np.full(len(w), np.nan)
    w = w[:, order]
    pos = np.add.reduceat(w * positive, starts, axis=1)  # [resamples, distinct scores]
    neg = np.add.reduceat(w * ~positive, starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    pairs = pos.sum(1) * neg.sum(1)
    return (pos * (below + neg / 2)).sum(1) / np.where(pairs > 0, pairs, np.nan)


def _mean_defined(x: np.ndarray) -> np.ndarray:
    count = np.isfinite(x).sum(1)
    return np.where(count > 0, np.nansum(x, axis=1) / np.maximum(count, 1), np.nan)


def _interval(value: float, draws: np.ndarray | None, reason: str) -> Value:
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
