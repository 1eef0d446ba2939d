"""DeLong's interval for the area under the ROC curve of independent records, in O(n log n).

E. R. DeLong, D. M. DeLong, D. L. Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
characteristic curves: a nonparametric approach", Biometrics 44 (1988); the fast form by midranks is X. Sun, W. Xu,
IEEE Signal Processing Letters 21 (2014).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from unimed_jax.errors import DataError

_Z = 1.959963984540054  # two-sided 95 %


def covariance(
    scores: Float[np.ndarray, "k n"], positive: Bool[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k k"]]:
    """Areas of k scores on the same records, and their covariance.

    Ties count one half.

    Raises:
        DataError: with fewer than two positives or two negatives.

    Example:
        >>> area, cov = covariance(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([False, False, True, True]))
        >>> area.tolist(), cov.tolist()
        ([0.75], [[0.125]])
    """
    scores, positive = np.atleast_2d(np.asarray(scores, np.float64)), np.asarray(positive, bool)
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise DataError(f"DeLong's variance needs two records of each class, there are {m} and {n}")
    above, below = scores[:, positive], scores[:, ~positive]
    whole = np.stack([_midranks(np.concatenate([a, b])) for a, b in zip(above, below, strict=True)])
    # Structural components: the share of the other class that a record beats.
    v10 = (whole[:, :m] - np.stack([_midranks(a) for a in above])) / n
    v01 = 1 - (whole[:, m:] - np.stack([_midranks(b) for b in below])) / m
    return v10.mean(1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def interval(
    scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]
) -> tuple[float, float | None, float | None]:
    """The area with its 95 % normal interval, cut to [0, 1]; the limits are None where the variance is 0.

    Raises:
        DataError: with fewer than two positives or two negatives.
    """
    area, cov = covariance(np.asarray(scores)[None], positive)
    value, spread = float(area[0]), _Z * float(np.sqrt(max(cov[0, 0], 0.0)))
    if not spread:
        return value, None, None
    return value, max(0.0, value - spread), min(1.0, value + spread)


def _midranks(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 1; equal numbers share the mean of theirs."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
