"""What a model has to beat: nearest neighbours on pixels or features, and the score that a leaky split pretends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from unimed_jax.evaluate import metrics
from unimed_jax.vectors import unit


def thumbnails(images: UInt8[np.ndarray, "n h w 3"], side: int = 32) -> Float[np.ndarray, "n f"]:
    """Gray thumbnails of `side` x `side` pixels as rows of zero mean and unit length, for pixel neighbours.

    Example:
        >>> thumbnails(np.zeros((2, 64, 64, 3), np.uint8)).shape
        (2, 1024)
    """
    from PIL import Image

    rows = np.stack(
        [
            np.asarray(
                Image.fromarray(im).convert("L").resize((side, side), Image.Resampling.BOX), np.float32
            )
            for im in images
        ]
    ).reshape(len(images), -1)
    return unit(rows - rows.mean(1, keepdims=True))


def nearest_neighbour(
    train: Float[np.ndarray, "m f"],
    train_labels: Int[np.ndarray, "m"],
    test: Float[np.ndarray, "n f"],
    classes: int,
) -> Float[np.ndarray, "n c"]:
    """Scores of a 1-nearest-neighbour classifier under cosine similarity: each class's closest training row.

    The class of the nearest neighbour has the highest score, so accuracy is that of 1-NN, and the scores rank.

    Example:
        >>> nearest_neighbour(np.eye(2), np.array([0, 1]), np.array([[0.9, 0.1]]), 2).argmax(1)
        array([0])
    """
    similarity = unit(test) @ unit(train).T
    scores = np.full((len(test), classes), -2.0)
    for k in range(classes):
        if (train_labels == k).any():
            scores[:, k] = similarity[:, train_labels == k].max(1)
    return scores


def nearest_neighbour_metrics(
    train: Float[np.ndarray, "m f"],
    train_labels: Int[np.ndarray, "m"],
    test: Float[np.ndarray, "n f"],
    test_labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
    groups: Sequence[Any],
    *,
    resamples: int = 1000,
) -> metrics.Metrics:
    """Metrics of 1-NN on the same test records, with the same intervals by subject as the model's."""
    scores = nearest_neighbour(train, train_labels, test, len(class_names))
    return metrics.classification(scores, test_labels, class_names, groups, resamples=resamples)


def leaky_split(
    features: Float[np.ndarray, "n f"],
    labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
    *,
    test_share: float = 0.4,
    seed: int = 0,
) -> metrics.Metrics:
    """1-NN under a random split over images: slices of one subject on both sides. A warning, not a result."""
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = int(len(labels) * test_share)
    test, train = order[:cut], order[cut:]
    scores = nearest_neighbour(features[train], labels[train], features[test], len(class_names))
    return metrics.classification(scores, labels[test], class_names, None, resamples=0)
