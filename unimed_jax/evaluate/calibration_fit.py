"""Fits calibrations (`calibration`) and judges them: ECE, negative log-likelihood and Brier score before and after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import multilabel, tallies
from unimed_jax.evaluate.calibration import RANGE, Figures, Platt, Temperature, fingerprints
from unimed_jax.evaluate.metrics import interval
from unimed_jax.vectors import log_softmax

MIN_RECORDS = 30  # to fit a temperature
MIN_SIDE = 10  # records with and without a finding, to fit its scale and offset
FOLDS = 5
FIGURES = ("ece", "nll", "brier")


def fit_temperature(
    name: str,
    prompts_sha256: str,
    log_p: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    subject: Int[np.ndarray, "n"],
    keys: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Temperature:
    """The temperature of the least negative log-likelihood.

    Its figures before and after are out of fold: each of five parts by subject is scaled by the temperature of the
    others, so that they are not about the records that were fitted. Of a single subject there are none.

    Args:
        name: of the task.
        prompts_sha256: of its classes and prompts.
        log_p: logarithms of the model's scores.
        labels: class indices.
        subject: number of each record's subject.
        keys: names of the records.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of folds and resampling.

    Raises:
        DataError: for too few records or a single class.
    """
    n, present = len(labels), len(np.unique(labels))
    if n < MIN_RECORDS:
        raise DataError(
            f"{name}: {n} records are too few to fit a temperature", f"give at least {MIN_RECORDS}"
        )
    if present < 2:
        raise DataError(f"{name}: only one class occurs, there is nothing to fit", "give records of others")
    fit = lambda rows: _temperature(log_p[rows], labels[rows])
    after = _out_of_fold(subject, seed, lambda rows, part: log_softmax(log_p[part] / fit(rows)), log_p)
    before, folded = ([_judge_classes(x, labels)] for x in (log_p, after))
    return Temperature(
        name=name,
        prompts_sha256=prompts_sha256,
        temperature=fit(slice(None)),
        n=n,
        subjects=int(subject.max()) + 1,
        records=fingerprints(keys, log_p),
        figures=_figures(before, folded, subject, resamples, seed) if subject.max() > 0 else {},
    )


def _temperature(log_p: np.ndarray, labels: np.ndarray) -> float:
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(labels))
    loss = lambda t: -log_softmax(log_p / np.exp(t))[rows, labels].mean()
    found: Any = minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fit_findings(
    name: str,
    prompts_sha256: str,
    findings: Sequence[str],
    margins: Float[np.ndarray, "n f"],
    truth: Int[np.ndarray, "n f"],
    subject: Int[np.ndarray, "n"],
    keys: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Platt:
    """Scale, offset and threshold of every finding with enough records; the others are named with the reason.

    Args:
        name: of the task.
        prompts_sha256: of its findings and prompts.
        findings: their names.
        margins: logits.
        truth: 1, 0 or -1 (unknown, not used).
        subject: number of each record's subject.
        keys: names of the records.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of folds and resampling.

    Raises:
        DataError: when no finding can be calibrated.
    """
    fits: dict[str, dict[str, float]] = {}
    left: dict[str, str] = {}
    before, after = [], []
    for j, finding in enumerate(findings):
        known = truth[:, j] >= 0
        x, y = margins[known, j], truth[known, j]
        fewest = int(min(y.sum(), len(y) - y.sum()))
        if fewest < MIN_SIDE:
            left[finding] = f"{fewest} records on one side, {MIN_SIDE} are needed"
            continue
        scale, offset = _platt(x, y)
        if scale <= 0:
            left[finding] = "its scores rank the wrong way round"
            continue
        p = multilabel.probability(scale * x + offset)
        fits[finding] = {"scale": scale, "offset": offset, "threshold": best_threshold(p, y)}
        own = tallies.codes(subject[known].tolist())
        if own.max() < 1:
            continue  # no fold is left out
        folded = _out_of_fold(own, seed, functools.partial(_refit, x, y), x)
        whole = np.zeros(len(truth))
        for judged, values in ((before, x), (after, folded)):
            whole[known] = values
            judged.append(_judge_finding(whole.copy(), truth[:, j]))
    if not fits:
        first = next(iter(left.items()), ("none", "no findings"))
        raise DataError(f"{name}: no finding can be calibrated ({first[0]}: {first[1]})", "give more records")
    return Platt(
        name=name,
        prompts_sha256=prompts_sha256,
        findings=fits,
        left=left,
        n=len(truth),
        subjects=int(subject.max()) + 1,
        records=fingerprints(keys, margins),
        figures=_figures(before, after, subject, resamples, seed) if before else {},
    )


def _refit(x: np.ndarray, y: np.ndarray, rows: np.ndarray, part: np.ndarray) -> np.ndarray:
    if min(y[rows].sum(), (1 - y[rows]).sum()) < 1:
        return x[part]
    scale, offset = _platt(x[rows], y[rows])
    return scale * x[part] + offset


def _platt(x: Float[np.ndarray, "n"], y: Int[np.ndarray, "n"]) -> tuple[float, float]:
    """Scale and offset of the least log loss against smoothed targets."""
    from scipy.optimize import minimize

    positives, negatives = y.sum(), len(y) - y.sum()
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    spread = float(x.std()) or 1.0
    design = np.stack([x / spread, np.ones_like(x)], 1)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        logit = design @ w
        value = np.logaddexp(0, logit) - target * logit
        return float(value.mean()), design.T @ (multilabel.probability(logit) - target) / len(x)

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9})
    return float(found.x[0]) / spread, float(found.x[1])


def best_threshold(p: Float[np.ndarray, "n"], truth: Int[np.ndarray, "n"]) -> float:
    """The probability at and above which calling a finding gives the largest F1; between two records' probabilities.

    Example:
        >>> best_threshold(np.array([0.1, 0.2, 0.4, 0.9]), np.array([0, 1, 0, 1]))
        0.15000000000000002
    """
    order = np.argsort(-p, kind="stable")
    ranked, there = p[order], truth[order] == 1
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))  # all equal ones are called together
    f1 = 2 * np.cumsum(there)[ends] / (ends + 1 + there.sum())
    best = int(ends[f1.argmax()])
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    between = (ranked[best] + below) / 2  # of neighbouring floats the lower one
    return float(between if between > below else ranked[best])


def _out_of_fold(
    subject: np.ndarray, seed: int, refit: Callable[[np.ndarray, np.ndarray], np.ndarray], like: np.ndarray
) -> np.ndarray:
    """What `refit(other rows, rows)` gives for each fold of subjects, in the order of the rows."""
    fold = np.random.default_rng(seed).permutation(int(subject.max()) + 1)[subject] % FOLDS
    out = np.array(like, np.float64)
    for k in np.unique(fold):
        part, rows = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        if len(rows):
            out[part] = refit(rows, part)
    return out


# ---- judging


@dataclass(frozen=True, slots=True)
class _Judged:
    """What each record adds to the figures; 0 where the truth is unknown."""

    known: np.ndarray
    gaps: np.ndarray
    brier: np.ndarray
    nll: np.ndarray

    def weighted(self, w: np.ndarray) -> dict[str, np.ndarray]:
        total = w @ self.known
        parts = {"ece": np.abs(w @ self.gaps).sum(1), "nll": w @ self.nll, "brier": w @ self.brier}
        return {k: tallies.share(v, total) for k, v in parts.items()}


def _judge_classes(log_p: np.ndarray, labels: np.ndarray) -> _Judged:
    p = tallies.prepare(log_p, labels, np.exp(log_p))
    assert p.gaps is not None
    assert p.brier is not None
    nll = -log_p[np.arange(len(labels)), labels]
    return _Judged(np.ones(len(labels)), p.gaps, p.brier, nll)


def _judge_finding(margin: np.ndarray, truth: np.ndarray) -> _Judged:
    known, p = (truth >= 0).astype(np.float64), multilabel.probability(margin)
    gaps = np.zeros((len(p), tallies.BINS))
    gaps[np.arange(len(p)), tallies.bins(p)] = (p - truth) * known
    nll = np.logaddexp(0, np.where(truth == 1, -margin, margin))
    return _Judged(known, gaps, (p - truth) ** 2 * known, nll * known)


def of_classes(
    before: Float[np.ndarray, "n c"],
    after: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    groups: Sequence[Any],
    *,
    resamples: int,
    seed: int,
) -> Figures:
    """ECE, negative log-likelihood and Brier score before and after, and the paired change, from log scores."""
    first, second = ([_judge_classes(x, labels)] for x in (before, after))
    return _figures(first, second, tallies.codes(groups), resamples, seed)


def of_findings(
    before: Float[np.ndarray, "n f"],
    after: Float[np.ndarray, "n f"],
    truth: Int[np.ndarray, "n f"],
    groups: Sequence[Any],
    *,
    resamples: int,
    seed: int,
) -> Figures:
    """The same of findings, from margins: means over the findings."""
    columns = range(truth.shape[1])
    first, second = ([_judge_finding(x[:, j], truth[:, j]) for j in columns] for x in (before, after))
    return _figures(first, second, tallies.codes(groups), resamples, seed)


def _figures(
    before: Sequence[_Judged], after: Sequence[_Judged], subject: np.ndarray, resamples: int, seed: int
) -> Figures:
    n = len(subject)
    subjects = int(subject.max()) + 1 if n else 0
    sides = {"before": before, "after": after}
    once = {k: _means(v, np.ones((1, n))) for k, v in sides.items()}
    draws: dict[str, list[dict[str, np.ndarray]]] = {k: [] for k in sides}
    for w in tallies.subject_weights(subjects if subjects > 1 else 0, n, resamples, seed):
        for k, v in sides.items():
            draws[k].append(_means(v, w[:, subject].astype(np.float64)))
    out: Figures = {}
    for figure in FIGURES:
        points = {k: float(v[figure][0]) for k, v in once.items()}
        drawn = {k: np.concatenate([d[figure] for d in v]) for k, v in draws.items() if v}
        points["change"] = points["after"] - points["before"]
        if drawn:
            drawn["change"] = drawn["after"] - drawn["before"]
        out[figure] = {k: interval(v, drawn.get(k), "no records") for k, v in points.items()}
    return out


def _means(judged: Sequence[_Judged], w: np.ndarray) -> dict[str, np.ndarray]:
    each = [j.weighted(w) for j in judged]
    return {k: tallies.mean_defined(np.stack([e[k] for e in each], 1)) for k in FIGURES}
