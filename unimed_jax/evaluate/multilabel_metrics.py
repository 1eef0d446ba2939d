"""Metrics of findings that do not exclude each other, with 95 % bootstrap intervals by subject.

Every finding is judged on the records where it is known. All findings share the draws of the bootstrap, so that the
interval of a mean over them is that of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import delong, tallies
from unimed_jax.evaluate.metrics import Value, interval
from unimed_jax.evaluate.multilabel import probability

AT_HALF = 0.5  # the threshold that needs no validation data
BASIC = ("auroc", "average_precision", "f1", "sensitivity", "specificity", "ece", "brier")
CHOSEN = ("f1_chosen", "sensitivity_chosen", "specificity_chosen")  # at thresholds from validation data
_REASONS = {
    "auroc": "only one class occurs",
    "average_precision": "only one class occurs",
    "f1": "neither occurs nor is predicted",
    "sensitivity": "no record has it",
    "specificity": "every record has it",
    "ece": "no records",
    "brier": "no records",
}


@dataclass(slots=True, kw_only=True)
class Finding:
    """What a model reached on one finding."""

    n: int  # records where it is known
    positives: int
    unknown: int
    values: dict[str, Value]
    threshold: float | None = None  # chosen on validation data, of the probability
    delong: Value | None = None  # AUROC with DeLong's interval, where every subject is single

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "n": self.n,
            "positives": self.positives,
            "unknown": self.unknown,
            "values": {k: v.json() for k, v in self.values.items()},
            **({"threshold": self.threshold} if self.threshold is not None else {}),
            **({"auroc_delong": self.delong.json()} if self.delong else {}),
        }


@dataclass(slots=True, kw_only=True)
class Findings:
    """All findings of one task, and their means."""

    n: int
    subjects: int
    values: dict[str, Value]  # unweighted means over the findings that have a value
    findings: dict[str, Finding]
    notes: list[str] = field(default_factory=list)


def findings(
    probabilities: Float[np.ndarray, "n f"],
    truth: Int[np.ndarray, "n f"],
    names: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    margins: Float[np.ndarray, "n f"] | None = None,
    thresholds: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Findings:
    """AUROC, average precision, F1, sensitivity, specificity, ECE and Brier score of each finding, and their means.

    F1, sensitivity and specificity are those at a probability of 0.5 and above, and, ending in `_chosen`, at the given
    thresholds. ECE compares the probability of the finding with how often it is there (15 bins of equal width); the
    Brier score is the mean squared distance of the two, 0 to 1. AUROC counts ties one half.

    Args:
        probabilities: of each finding, by itself.
        truth: 1 present, 0 absent, -1 unknown (the record does not count for this finding).
        names: of the findings.
        groups: subject of each record; None = every record is its own subject.
        margins: what ranks, where probabilities saturate; default: the probabilities.
        thresholds: of the probability, chosen on other data, for findings that have one.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of the resampling.

    Raises:
        DataError: for shapes that do not fit, or probabilities outside 0 to 1.

    Example:
        >>> p = np.array([[0.9], [0.2], [0.6], [0.4]])
        >>> m = findings(p, np.array([[1], [0], [-1], [0]]), ["effusion"])
        >>> m.findings["effusion"].n, m.values["auroc"].value, m.values["sensitivity"].value
        (3, 1.0, 1.0)
    """
    p, truth = np.asarray(probabilities, np.float64), np.asarray(truth)
    ranks = p if margins is None else np.asarray(margins, np.float64)
    n = _check(p, ranks, truth, names, groups)
    subject = np.arange(n) if groups is None else tallies.codes(groups)
    subjects = int(subject.max()) + 1 if n else 0
    cuts = [(thresholds or {}).get(k) for k in names]
    columns = [_Column(p[:, j], ranks[:, j], truth[:, j], cut) for j, cut in enumerate(cuts)]
    point = [c.weighted(np.ones((1, n))) for c in columns]
    boot = _resampled(columns, subject, resamples, seed)
    single = subjects == n
    each = {
        name: _finding(c, once, draw, single)
        for name, c, once, draw in zip(names, columns, point, boot, strict=True)
    }
    known = (*BASIC, *CHOSEN) if any(c is not None for c in cuts) else BASIC
    values = {k: _mean(k, point, boot) for k in known}
    return Findings(n=n, subjects=subjects, values=values, findings=each, notes=_notes(each))


def paired(
    margins: Sequence[Float[np.ndarray, "n f"]],
    truth: Int[np.ndarray, "n f"],
    groups: Sequence[Any],
    *,
    resamples: int,
    seed: int,
) -> dict[str, tuple[Value, Value, Value]]:
    """The mean over findings of each metric for two sets of logits, and their difference with an interval.

    Each draw takes the same subjects for both.

    Raises:
        DataError: for shapes that do not fit.

    Example:
        >>> truth = np.array([[1], [0], [1], [0]])
        >>> found = paired([truth - 0.5, 0.5 - truth], truth, range(4), resamples=0, seed=0)
        >>> [v.value for v in found["auroc"]]
        [1.0, 0.0, 1.0]
    """
    sides = []
    for m in margins:
        p = probability(m)
        _check(p, m, truth, range(truth.shape[1]), groups)
        sides.append([_Column(p[:, j], m[:, j], truth[:, j], None) for j in range(truth.shape[1])])
    once = [[c.weighted(np.ones((1, len(truth)))) for c in side] for side in sides]
    subject = tallies.codes(groups)
    drawn = [_resampled(side, subject, resamples, seed) for side in sides]
    out = {}
    for k in BASIC:
        first, second = (_mean(k, x, [{}] * len(x)) for x in once)
        if first.value is None or second.value is None:
            out[k] = (first, second, Value(None, reason=first.reason or second.reason))
            continue
        gaps = None
        if drawn[0][0]:
            means = [tallies.mean_defined(np.stack([d[k] for d in side], 1)) for side in drawn]
            gaps = means[0] - means[1]
        out[k] = (first, second, interval(first.value - second.value, gaps, ""))
    return out


def _resampled(
    columns: Sequence[_Column], subject: Int[np.ndarray, "n"], resamples: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Every metric of every resample of each finding, on the same draws; empty with fewer than two subjects."""
    subjects = int(subject.max()) + 1 if len(subject) else 0
    draws: list[list[dict[str, np.ndarray]]] = [[] for _ in columns]
    for w in tallies.subject_weights(subjects if subjects > 1 else 0, len(subject), resamples, seed):
        records = w[:, subject].astype(np.float64)
        for found, c in zip(draws, columns, strict=True):
            found.append(c.weighted(records))
    return [{k: np.concatenate([d[k] for d in found]) for k in found[0]} if found else {} for found in draws]


class _Column:
    """One finding, sorted once for all resamples."""

    def __init__(self, p: np.ndarray, ranks: np.ndarray, truth: np.ndarray, threshold: float | None):
        self.rows = np.flatnonzero(truth >= 0)
        self.n, self.threshold = len(truth), threshold
        self.there, self.ranks = truth[self.rows] == 1, ranks[self.rows]
        order, starts, positive = tallies.ranking(self.ranks, self.there)
        self.ranking = (self.rows[order], starts, positive)
        self.adds = self._adds(p, truth)

    def _adds(self, p: np.ndarray, truth: np.ndarray) -> Float[np.ndarray, "n k"]:
        """What each record adds to the sums; nothing where the truth is unknown."""
        known, there = truth >= 0, truth == 1
        calls = [p >= t for t in (AT_HALF, self.threshold) if t is not None]
        sums = [known, there, (p - there) ** 2]
        sums += [x for said in calls for x in (said, said & there)]
        gaps = np.zeros((len(p), tallies.BINS))
        gaps[np.arange(len(p)), tallies.bins(p)] = p - there
        return np.concatenate([np.stack(sums, 1), gaps], 1) * known[:, None]

    def weighted(self, w: Float[np.ndarray, "r n"]) -> dict[str, np.ndarray]:
        """Every metric for each row of weights; NaN where it does not exist."""
        auroc, precision = tallies.ranked(w, *self.ranking)
        sums = (w @ self.adds).T
        (total, there, brier), rest = sums[:3], sums[3:]
        out = {"auroc": auroc, "average_precision": np.where(np.isnan(auroc), np.nan, precision)}
        for ending in ("", "_chosen") if self.threshold is not None else ("",):
            (called, hits), rest = rest[:2], rest[2:]
            out |= _at(total, there, called, hits, ending)
        out["ece"] = tallies.share(np.abs(rest).sum(0), total)
        out["brier"] = tallies.share(brier, total)
        return out


def _at(
    total: np.ndarray, there: np.ndarray, called: np.ndarray, hits: np.ndarray, ending: str
) -> dict[str, np.ndarray]:
    """What a threshold gives."""
    absent = total - there
    return {
        f"f1{ending}": tallies.share(2 * hits, there + called),
        f"sensitivity{ending}": tallies.share(hits, there),
        f"specificity{ending}": tallies.share(absent - (called - hits), absent),
    }


def _finding(
    c: _Column, once: Mapping[str, np.ndarray], draw: Mapping[str, np.ndarray], single: bool
) -> Finding:
    reason = lambda k: _REASONS[k.removesuffix("_chosen")] if len(c.rows) else "no record where it is known"
    positives = int(c.there.sum())
    area = None
    if single and min(positives, len(c.rows) - positives) >= 2:
        value, low, high = delong.interval(c.ranks, c.there)
        area = Value(value, low, high, "" if low is not None else "no interval: DeLong's variance is 0")
    return Finding(
        n=len(c.rows),
        positives=positives,
        unknown=c.n - len(c.rows),
        values={k: interval(float(v[0]), draw.get(k), reason(k)) for k, v in once.items()},
        threshold=c.threshold,
        delong=area,
    )


def _mean(
    k: str, point: Sequence[Mapping[str, np.ndarray]], boot: Sequence[Mapping[str, np.ndarray]]
) -> Value:
    """The mean over the findings that have a value; a resample's mean is over those that have one in it."""
    once = np.stack([x[k] for x in point if k in x], 1)
    drawn = [x[k] for x in boot if k in x]
    draws = tallies.mean_defined(np.stack(drawn, 1)) if drawn else None
    return interval(float(tallies.mean_defined(once)[0]), draws, "undefined for every finding")


def _notes(each: Mapping[str, Finding]) -> list[str]:
    out = []
    unknown = {k: f.unknown for k, f in each.items() if f.unknown}
    if unknown:
        counts = ", ".join(f"{k} {n}" for k, n in unknown.items())
        out.append(f"unknown and left out, not counted as absent: {counts}")
    alone = [k for k, f in each.items() if f.positives in (0, f.n)]
    if alone:
        out.append(f"without AUROC, only one class occurs: {', '.join(alone)}")
    return out


def _check(p, ranks, truth, names, groups) -> int:
    n = len(p)
    shape = (n, len(names))
    if p.shape != shape or truth.shape != shape or ranks.shape != shape:
        raise DataError(f"metrics: shapes are {p.shape}, {ranks.shape} and {truth.shape}, not {shape}")
    if groups is not None and len(groups) != n:
        raise DataError(f"metrics: {len(groups)} subjects for {n} records")
    if not ((p >= 0) & (p <= 1)).all() or not np.isfinite(ranks).all():
        raise DataError("metrics: probabilities are not between 0 and 1", "check the model's weights")
    if not np.isin(truth, (-1, 0, 1)).all():
        raise DataError("metrics: truth holds other numbers than 1, 0 and -1")
    return n
