"""Every classification metric as a function of weighted records, for all resamples of a bootstrap at once.

A row of weights is one resample: how often each record counts. NaN marks what does not exist; it stays inside
(`metrics.py` turns it into a reason).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

SLAB = 4_000_000  # weights held at once (32 MB in float64)
BINS = 15  # of the calibration error, of equal width
Ranking = tuple[np.ndarray, np.ndarray, np.ndarray]  # order, starts of equal scores, positive


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all resamples of one task share: orders and indicators, no weights."""

    classes: int
    labels: Int[np.ndarray, "n"]
    predicted: Int[np.ndarray, "n"]
    rankings: list[Ranking]  # of each one-vs-rest problem
    gaps: Float[np.ndarray, "n k"] | None  # confidence - hit, in the column of the record's bin
    brier: Float[np.ndarray, "n"] | None  # squared distance of the probabilities to the truth


def prepare(
    scores: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n c"] | None = None,
) -> Prepared:
    """Sorts once what every resample needs sorted."""
    n, c = scores.shape
    predicted = scores.argmax(1) if n else np.zeros(0, np.int64)
    gaps = brier = None
    if probabilities is not None:
        rows = np.arange(n)
        confidence = probabilities[rows, predicted]
        gaps = np.zeros((n, BINS))
        gaps[rows, bins(confidence)] = confidence - (predicted == labels)
        truth = np.zeros((n, c))
        truth[rows, labels] = 1
        brier = ((probabilities - truth) ** 2).sum(1)
    return Prepared(c, labels, predicted, _rankings(scores, labels), gaps, brier)


def binary_score(scores: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n"]:
    """What two classes are ranked by: the score of class 1 above that of class 0."""
    return scores[:, 1] - scores[:, 0]


def bins(confidence: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Number of the bin that each confidence falls into, of `BINS` of equal width, closed above.

    Example:
        >>> bins(np.array([0.0, 1 / 15, 0.5, 1.0])).tolist()
        [0, 0, 7, 14]
    """
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def ranking(scores: Float[np.ndarray, "n"], positive: Any) -> Ranking:
    """The order by score, where each run of equal scores starts, and who is positive in this order."""
    order = np.argsort(scores, kind="stable")
    return order, np.flatnonzero(np.diff(scores[order], prepend=-np.inf)), positive[order]


def _rankings(scores: np.ndarray, labels: np.ndarray) -> list[Ranking]:
    """The ranking of each one-vs-rest problem; of two classes there is one."""
    c = scores.shape[1]
    columns = [binary_score(scores)] if c == 2 else list(scores.T)
    return [ranking(s, labels == (1 if c == 2 else k)) for k, s in enumerate(columns)]


def codes(groups: Sequence[Any]) -> Int[np.ndarray, "n"]:
    """Numbers of the groups, by first occurrence.

    Example:
        >>> codes(["b", "a", "b"])
        array([0, 1, 0])
    """
    order: dict[Any, int] = {}
    return np.array([order.setdefault(g, len(order)) for g in groups], np.int64)


def subject_weights(subjects: int, width: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each subject is drawn, in slabs `[resamples, subjects]`; the slab size never changes the draws.

    Args:
        subjects: to draw from, with replacement.
        width: numbers that one resample needs, for the size of a slab.
        resamples: in all.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, SLAB // max(width, 1))
    for start in range(0, resamples if subjects else 0, rows):
        size = min(rows, resamples - start)
        yield np.stack(
            [np.bincount(rng.integers(subjects, size=subjects), minlength=subjects) for _ in range(size)]
        )


def resampled(
    prepared: Sequence[Prepared], subject: Int[np.ndarray, "n"], resamples: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Every metric of every resample by subject, for several sets of predictions on the same draws.

    Empty with fewer than two subjects.
    """
    subjects = int(subject.max()) + 1 if len(subject) else 0
    width = max(len(subject), *(p.classes**2 for p in prepared))
    draws: list[list[dict[str, np.ndarray]]] = [[] for _ in prepared]
    for w in subject_weights(subjects if subjects > 1 else 0, width, resamples, seed):
        records = w[:, subject].astype(np.float64)
        for found, p in zip(draws, prepared, strict=True):
            found.append(weighted(p, records))
    return [{k: np.concatenate([d[k] for d in found]) for k in found[0]} if found else {} for found in draws]


def table(p: Prepared, w: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "r c c"]:
    """Weighted confusion matrices: rows are the true class, columns the predicted."""
    from scipy import sparse

    n, c = len(p.labels), p.classes
    cells = sparse.csr_matrix((np.ones(n), (p.labels * c + p.predicted, np.arange(n))), (c * c, n))
    return np.asarray(cells @ w.T).T.reshape(len(w), c, c)


def weighted(p: Prepared, w: Float[np.ndarray, "r n"]) -> dict[str, Float[np.ndarray, "r"]]:
    """Every metric for each row of weights; NaN where it does not exist."""
    counts, total = table(p, w), w.sum(1)
    several = (counts.sum(2) > 0).sum(1) > 1
    only = lambda x: np.where(several, x, np.nan)
    areas = np.stack([ranked(w, *r) for r in p.rankings], 2)  # [2, resamples, problems]
    out = {k: only(mean_defined(x)) for k, x in zip(("auroc", "average_precision"), areas, strict=True)}
    if p.classes > 2:
        out |= {f"auroc/{k}": areas[0][:, k] for k in range(p.classes)}
    return _of_table(counts, several) | out | _calibration(p, w, total)


def _of_table(counts: np.ndarray, several: np.ndarray) -> dict[str, np.ndarray]:
    """What a confusion matrix alone tells."""
    hits, support, said = np.einsum("rkk->rk", counts), counts.sum(2), counts.sum(1)
    total = support.sum(1)
    recall = share(hits, support)
    accuracy = share(hits.sum(1), total)
    by_luck = share((support * said).sum(1), total**2)
    scores = {
        "precision": share(hits, said),
        "recall": recall,
        "f1": share(2 * hits, support + said),
    }
    if counts.shape[1] == 2:
        scores = {k: v[:, 1] for k, v in scores.items()}
    else:  # 0/0 of a class that occurs or is predicted counts 0, as in scikit-learn
        seen = support + said > 0
        zero = {k: np.where(seen, np.nan_to_num(v), np.nan) for k, v in scores.items()}
        scores = {k: np.where(several, mean_defined(v), np.nan) for k, v in zero.items()}
    return {
        "accuracy": accuracy,
        "balanced_accuracy": np.where(several, mean_defined(recall), np.nan),
        "kappa": np.where(several, share(accuracy - by_luck, 1 - by_luck), np.nan),
        **scores,
        **{f"recall/{k}": recall[:, k] for k in range(counts.shape[1])},
    }


def _calibration(p: Prepared, w: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    none = np.full(len(w), np.nan)
    if p.gaps is None or p.brier is None:
        return {"ece": none, "brier": none}
    return {"ece": share(np.abs(w @ p.gaps).sum(1), total), "brier": share(w @ p.brier, total)}


def ranked(w: np.ndarray, order: np.ndarray, starts: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Weighted AUROC and average precision `[2, resamples]`.

    AUROC is P(score of a positive > of a negative) + P(equal) / 2; average precision is the precision at each
    distinct score, weighted by the share of the positives that have it.
    """
    there = np.flatnonzero(positive)
    if not len(there):
        return np.full((2, len(w)), np.nan)
    # Only scores that a positive has add to either figure: everything else is needed as a running sum alone.
    runs, first = np.unique(np.searchsorted(starts, there, side="right") - 1, return_index=True)
    sums = np.cumsum(w[:, order], axis=1)
    ends = np.append(starts[1:], len(order)) - 1
    total = sums[:, -1:]
    below = np.where(starts[runs] > 0, sums[:, starts[runs] - 1], 0.0)
    pos = np.add.reduceat(w[:, order[there]], first, axis=1)  # [resamples, scores of positives]
    pos_below = np.cumsum(pos, axis=1) - pos
    positives = pos.sum(1)
    neg = sums[:, ends[runs]] - below - pos
    auroc = share((pos * (below - pos_below + neg / 2)).sum(1), positives * (total[:, 0] - positives))
    called = total - below
    precision = (positives[:, None] - pos_below) / np.where(called > 0, called, 1)
    return np.stack([auroc, share((pos * precision).sum(1), positives)])


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the whole is 0."""
    return part / np.where(whole > 0, whole, np.nan)


def mean_defined(x: np.ndarray) -> np.ndarray:
    """The mean of each row over what is defined, NaN where nothing is."""
    count = np.isfinite(x).sum(1)
    return np.where(count > 0, np.nansum(x, axis=1) / np.maximum(count, 1), np.nan)
