"""Image-text retrieval in both directions: recall at k, median rank and mean average precision, in bounded memory.

Every distinct image and every distinct caption is in its gallery once. A caption belongs to all images that carry the
same text, an image to all of its captions: a query has one correct answer or many.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import tallies
from unimed_jax.evaluate.metrics import Value, interval

DEPTHS = (1, 5, 10)
SLAB = 16_000_000  # scores held at once (64 MB)
_TIE = np.float32(1e-6)  # scores this close are equal: below it, float32 products are noise
_FEW = 8  # correct answers up to which counting beats sorting


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What one kind of query found in the other kind's gallery."""

    queries: int
    gallery: int
    positives: float  # correct answers a query, on average
    values: dict[str, Value]  # R@1, R@5, R@10, mAP (0 to 1) and median_rank (from 1)
    chance: dict[str, float]  # R@k of a random order

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "queries": self.queries,
            "gallery": self.gallery,
            "positives": self.positives,
            "values": {k: v.json() for k, v in self.values.items()},
            "chance": self.chance,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Both directions."""

    image_to_text: Direction
    text_to_image: Direction

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {"image_to_text": self.image_to_text.json(), "text_to_image": self.text_to_image.json()}


def evaluate(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "n d"],
    image_ids: Sequence[Hashable],
    captions: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    slab: int = SLAB,
) -> Retrieval:
    """Retrieval among n pairs of an image and one of its captions; any length of embedding, normalised here.

    Intervals (95 %, percentile) resample the subjects of the queries and keep the gallery. Ties count against the
    model: see `ranks`.

    Args:
        images: embedding of the image of each pair.
        texts: embedding of the caption of each pair.
        image_ids: pairs with equal ones are of the same image (a key or a hash of its bytes).
        captions: pairs with equal ones are the same caption.
        groups: subject of each pair; None = each query is its own.
        resamples: of the bootstrap; 0 = no intervals.
        seed: of the resampling.
        slab: scores held at once.

    Raises:
        DataError: for lengths that do not fit, no pairs, or embeddings that are not finite or zero.

    Example:
        >>> found = evaluate(np.eye(3), np.eye(3)[[0, 2, 1]], "abc", ["x", "y", "z"], resamples=0)
        >>> found.text_to_image.values["R@1"].text(), found.text_to_image.gallery
        ('0.333', 3)
    """
    n = len(images)
    lengths = {len(x) for x in (texts, image_ids, captions, *([] if groups is None else [groups]))}
    if lengths != {n} or not n or images.shape != texts.shape:
        raise DataError(
            f"retrieval needs as many images as captions, ids and subjects, and at least one; there are "
            f"{images.shape} images, {texts.shape} captions, {len(image_ids)} ids"
        )
    image_of, text_of = tallies.codes(image_ids), tallies.codes(captions)
    first_image, first_text = (np.unique(x, return_index=True)[1] for x in (image_of, text_of))
    pictures, sentences = _unit(images, first_image, "image"), _unit(texts, first_text, "caption")
    links = np.unique(np.stack([image_of, text_of], 1), axis=0)
    subject = np.arange(n) if groups is None else tallies.codes(groups)
    draw = {"resamples": resamples, "seed": seed}
    to_text = _answers(links, len(first_image))
    to_image = _answers(links[:, ::-1], len(first_text))
    return Retrieval(
        image_to_text=_direction(pictures, sentences, to_text, subject[first_image], slab, **draw),
        text_to_image=_direction(sentences, pictures, to_image, subject[first_text], slab, **draw),
    )


def ranks(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "g d"],
    positives: Sequence[Int[np.ndarray, "p"]],
    *,
    slab: int = SLAB,
) -> tuple[Int[np.ndarray, "q"], Float[np.ndarray, "q"]]:
    """Rank of the best correct answer (from 1) and average precision of each query, by cosine.

    The rank is one more than the number of wrong answers whose score is greater *or equal*: ties count against the
    model, so that one which maps everything to one point gets the worst ranks, not the best. Equal is less than
    1e-6 below. Average precision is the mean, over the correct answers, of the precision at their ranks, ties
    counted the same way. Scores are computed for `slab // g` queries at a time.

    Args:
        queries: unit vectors.
        gallery: unit vectors.
        positives: distinct places of each query's correct answers in the gallery.
        slab: scores held at once.

    Raises:
        DataError: for a query without a correct answer.

    Example:
        >>> rank, ap = ranks(np.eye(2, dtype="f"), np.ones((3, 2), "f") / 2**0.5, [np.array([0]), np.array([0, 1])])
        >>> rank.tolist(), ap.round(2).tolist()
        ([3, 2], [0.33, 0.58])
    """
    best, precision = np.zeros(len(queries), np.int64), np.zeros(len(queries))
    size = max(1, slab // max(len(gallery), 1))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ gallery.T
        for i, row in enumerate(scores, start):
            if not len(positives[i]):
                raise DataError(f"retrieval: query {i} has no correct answer in the gallery")
            best[i], precision[i] = _rank(row, row[positives[i]])
    return best, precision


def _rank(row: Float32[np.ndarray, "g"], correct: Float32[np.ndarray, "p"]) -> tuple[int, float]:
    """Rank of the best of the correct scores, and their average precision."""
    correct = np.sort(correct)
    least = correct[::-1] - _TIE
    if len(correct) <= _FEW:
        above = np.array([np.count_nonzero(row >= x) for x in least])
    else:
        above = len(row) - np.searchsorted(np.sort(row), least)
    wrong = above - (len(correct) - np.searchsorted(correct, least))
    place = np.arange(1, len(correct) + 1)
    return int(wrong[0]) + 1, float((place / (place + wrong)).mean())


def chance(positives: Int[np.ndarray, "q"], gallery: int, depth: int) -> float:
    """R@depth of a random order: 1 - C(g - p, k) / C(g, k), averaged over the queries.

    Example:
        >>> round(chance(np.array([1, 2]), 10, 1), 6)
        0.15
    """
    miss = np.ones(len(positives))
    for i in range(min(depth, gallery)):
        miss *= np.maximum(gallery - positives - i, 0) / (gallery - i)
    return float((1 - miss).mean())


def _direction(
    queries: np.ndarray,
    gallery: np.ndarray,
    positives: Sequence[np.ndarray],
    subject: np.ndarray,
    slab: int,
    *,
    resamples: int,
    seed: int,
) -> Direction:
    best, precision = ranks(queries, gallery, positives, slab=slab)
    counts = np.array([len(p) for p in positives])
    columns = {f"R@{k}": (best <= k).astype(np.float64) for k in DEPTHS} | {"mAP": precision}
    subject = tallies.codes(subject.tolist())
    subjects = int(subject.max()) + 1
    draws: dict[str, list[np.ndarray]] = {k: [] for k in (*columns, "median_rank")}
    for slabs in tallies.subject_weights(subjects if subjects > 1 else 0, len(best), resamples, seed):
        w = slabs[:, subject]
        for name, x in columns.items():
            draws[name].append(w @ x / w.sum(1))
        draws["median_rank"].append(_median(best, w))
    points = {k: float(x.mean()) for k, x in columns.items()} | {"median_rank": float(np.median(best))}
    drawn = {k: np.concatenate(d) if d else None for k, d in draws.items()}
    return Direction(
        queries=len(queries),
        gallery=len(gallery),
        positives=float(counts.mean()),
        values={k: interval(v, drawn[k], "") for k, v in points.items()},
        chance={f"R@{k}": chance(counts, len(gallery), k) for k in DEPTHS},
    )


def _median(x: Int[np.ndarray, "n"], w: Int[np.ndarray, "r n"]) -> Float[np.ndarray, "r"]:
    """The median of x repeated w times, for each row of w."""
    order = np.argsort(x, kind="stable")
    upto = np.cumsum(w[:, order], axis=1)
    total = upto[:, -1:]
    low, high = ((upto > i).argmax(1) for i in ((total - 1) // 2, total // 2))
    return (x[order][low] + x[order][high]) / 2


def _answers(links: Int[np.ndarray, "l 2"], queries: int) -> list[np.ndarray]:
    """The second column's values for each value of the first."""
    links = links[np.argsort(links[:, 0], kind="stable")]
    return np.split(links[:, 1], np.searchsorted(links[:, 0], np.arange(1, queries)))


def _unit(rows: np.ndarray, chosen: np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(rows, np.float32)[chosen]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = ~(np.isfinite(length) & (length > 0))[:, 0]
    if bad.any():
        raise DataError(
            f"retrieval: the {what} embedding of pair {int(chosen[bad.argmax()])} is zero or not finite",
            "check the model's weights",
        )
    rows /= length
    return rows
