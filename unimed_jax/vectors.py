"""Vectors and scores on the host: unit length, prompt ensembles, and the softmax of classes. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def unit(x: Float[np.ndarray, "*b d"]) -> Float[np.ndarray, "*b d"]:
    """Vectors of unit length along the last axis; zero stays zero.

    Example:
        >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ensemble(classes: Sequence[Float[np.ndarray, "p d"]]) -> Float[np.ndarray, "c d"]:
    """The mean of each class's unit embeddings, normalised (CLIP's prompt ensemble).

    Example:
        >>> ensemble([np.eye(2), np.eye(2)[:1]]).round(2).tolist()
        [[0.7099999785423279, 0.7099999785423279], [1.0, 0.0]]
    """
    return unit(np.stack([z.astype(np.float64).mean(0) for z in classes])).astype(np.float32)


def log_softmax(x: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Logarithms of the softmax of each row, in float64: they rank like it, and never saturate.

    Example:
        >>> np.exp(log_softmax(np.array([[0.0, 0.0], [900.0, 0.0]]))).tolist()
        [[0.5, 0.5], [1.0, 0.0]]
    """
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x, dtype=np.float64).sum(1, keepdims=True))


def class_scores(
    z: Float[np.ndarray, "n d"], bank: Float[np.ndarray, "c d"], scale: float
) -> Float[np.ndarray, "n c"]:
    """Logarithms of the softmax of `scale` x cosine over classes, the rows of `bank`; both of unit length.

    Example:
        >>> np.exp(class_scores(np.eye(2)[:1], np.eye(2), 2.0)).round(3).tolist()
        [[0.881, 0.119]]
    """
    return log_softmax(scale * (z.astype(np.float64) @ bank.T.astype(np.float64)))
