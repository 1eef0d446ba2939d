"""Linear probe and k-shot: multinomial logistic regression on frozen features.

The protocol is our own (the original publishes none that could be repeated): features are standardised with the mean
and deviation of the training records in use, the L2 strength is swept on the validation split, the model that did best
there is tested once and not refitted. Figures are comparable within this protocol only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import metrics, tallies

SWEEP = tuple(10.0**k for k in range(-6, 3))  # C, as in scikit-learn: the inverse of the L2 strength
FRACTIONS = (0.01, 0.1, 1.0)
SHOTS = (1, 2, 4, 8, 16)
_STALE = 10  # steps without a lower loss after which float32 has nothing left to gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A linear classifier."""

    kernel: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, "c"]
    steps: int
    gradient: float  # largest element at the end

    def logits(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Scores of each class; their softmax are the probabilities."""
        return np.asarray(features, self.kernel.dtype) @ self.kernel + self.bias


@dataclass(frozen=True, slots=True)
class Split:
    """Features, class indices and subjects of some records."""

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"]
    groups: Sequence[Hashable] | None = None  # None = every record is its own subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One probe: trained with one budget of labels, tested once."""

    budget: str  # "10 %" or "4 shots"
    seed: int
    n: int  # training records
    c: float  # chosen on the validation split
    swept: dict[float, float]  # C -> the metric on the validation split
    metrics: metrics.Metrics

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "budget": self.budget,
            "seed": self.seed,
            "n_train": self.n,
            "C": self.c,
            "validation": [{"C": c, "value": v} for c, v in self.swept.items()],
            "n_test": self.metrics.n,
            "subjects": self.metrics.subjects,
            "values": {k: v.json() for k, v in self.metrics.values.items()},
            "notes": self.metrics.notes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """All budgets and seeds."""

    metric: str
    classes: list[str]
    runs: list[Run] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Mean and standard deviation over seeds of the metric, by budget; the deviation of one run is None."""
        found: dict[str, list[float]] = {}
        for r in self.runs:
            value = r.metrics.values[self.metric].value
            if value is not None:
                found.setdefault(r.budget, []).append(value)
        return {
            k: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if len(v) > 1 else None}
            for k, v in found.items()
        }

    def json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "metric": self.metric,
            "classes": self.classes,
            "summary": self.summary(),
            "runs": [r.json() for r in self.runs],
        }


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    classes: int,
    *,
    c: float = 1.0,
    start: Fit | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    steps: int = 1000,
) -> Fit:
    """Minimises C * (sum of the cross-entropies) + |kernel|^2 / 2 by L-BFGS; the bias is not penalised.

    This is what scikit-learn's LogisticRegression minimises for three classes or more. Two classes have a kernel
    each, too, of which only the difference counts: they equal its binary form at twice the C.

    Args:
        features: as they are; `run` standardises.
        labels: class indices.
        classes: how many.
        c: inverse of the L2 strength.
        start: where to begin; None = zeros.
        dtype: float32, or float64 for full agreement with other programs (slow on accelerators).
        tolerance: ends when no element of the gradient of the loss / (C n) is larger; None = 1e-5, or 1e-8 in float64.
        steps: at most.

    Raises:
        DataError: for no records, shapes or labels that do not fit, or features that are not finite.

    Example:
        >>> found = fit(np.array([[-1.0], [-2.0], [1.0], [2.0]]), np.array([0, 0, 1, 1]), 2)
        >>> found.logits(np.array([[-3.0], [3.0]])).argmax(1)
        array([0, 1])
    """
    features, labels = np.asarray(features, dtype), np.asarray(labels, np.int32)
    _check(features, labels, classes)
    if tolerance is None:
        tolerance = 1e-8 if dtype == "float64" else 1e-5
    n, d = features.shape
    zeros = {"kernel": np.zeros((d, classes), dtype), "bias": np.zeros(classes, dtype)}
    begin = (
        {"kernel": np.asarray(start.kernel, dtype), "bias": np.asarray(start.bias, dtype)} if start else zeros
    )
    with jax.enable_x64(dtype == "float64"):
        found, gradient, taken = _minimise(features, labels, begin, 1 / (c * n), tolerance, steps)
        kernel, bias = np.asarray(found["kernel"]), np.asarray(found["bias"])
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        raise DataError("the probe's weights are not finite", "check the features' range")
    return Fit(kernel=kernel, bias=bias, steps=int(taken), gradient=float(gradient))


@functools.partial(jax.jit, static_argnums=5)
def _minimise(
    x: Float[jax.Array, "n d"],
    y: Int[jax.Array, "n"],
    begin: Mapping[str, jax.Array],
    strength: float,
    tolerance: float,
    steps: int,
) -> tuple[Any, jax.Array, jax.Array]:
    """The parameters, the largest element of the gradient there, and the steps taken."""

    def loss(p: Mapping[str, jax.Array]) -> jax.Array:
        logits = jnp.dot(x, p["kernel"], precision=jax.lax.Precision.HIGHEST) + p["bias"]
        fitting = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return fitting + strength / 2 * jnp.sum(p["kernel"] ** 2)

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(loss)
    largest = lambda grad: jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(grad)]))

    def proceed(carry) -> jax.Array:
        _, _, _, gradient, stale, taken = carry
        return (gradient > tolerance) & (stale < _STALE) & (taken < steps)

    def step(carry):
        p, state, lowest, _, stale, taken = carry
        value, grad = value_and_grad(p, state=state)
        updates, state = solver.update(grad, state, p, value=value, grad=grad, value_fn=loss)
        p = optax.apply_updates(p, updates)
        reached = optax.tree.get(state, "value")
        stale = jnp.where(reached < lowest, 0, stale + 1)
        gradient = largest(optax.tree.get(state, "grad"))
        return p, state, jnp.minimum(lowest, reached), gradient, stale, taken + 1

    value, grad = jax.value_and_grad(loss)(begin)
    first = (begin, solver.init(begin), value, largest(grad), jnp.int32(0), jnp.int32(0))
    p, _, _, gradient, _, taken = jax.lax.while_loop(proceed, step, first)
    return p, gradient, taken


def run(
    train: Split,
    validation: Split,
    test: Split,
    classes: Sequence[str],
    *,
    metric: str = "balanced_accuracy",
    fractions: Sequence[float] = FRACTIONS,
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    sweep: Sequence[float] = SWEEP,
    resamples: int = 1000,
    dtype: str = "float32",
) -> Probe:
    """Probes with each share of the labels and each number of shots, for each seed.

    A seed draws which training records are used (`subset`); all of them are one run. The same validation split
    chooses C for every budget, so small budgets are those of the training labels alone. Of equal values the smaller C
    is taken.

    Args:
        train: records to learn from.
        validation: chooses C.
        test: judged once for each run.
        classes: names, in the order of the indices.
        metric: chooses C and is summarised; one of `metrics.METRICS`.
        fractions: of the training records of each class, in (0, 1].
        shots: training records of each class.
        seeds: of the draws.
        sweep: values of C.
        resamples: of the test intervals, by subject.
        dtype: see `fit`.

    Raises:
        DataError: for a subject in two splits, a class without training records or with fewer than the shots, shapes
            or labels that do not fit, or a metric that is undefined on the validation split.
    """
    splits = {"training": train, "validation": validation, "test": test}
    for split in splits.values():
        _check(np.asarray(split.features), np.asarray(split.labels), len(classes))
    check(train, validation, test, classes, shots)
    budgets: list[tuple[str, dict[str, Any]]] = [(f"{100 * f:g} %", {"fraction": f}) for f in fractions]
    budgets += [(f"{k} shot{'s' * (k > 1)}", {"shots": k}) for k in shots]
    runs = []
    for budget, size in budgets:
        for seed in seeds[:1] if size.get("fraction") == 1 else seeds:
            chosen = subset(train.labels, classes, train.groups, seed=seed, **size)
            runs.append(_one(budget, seed, chosen, splits, classes, metric, sorted(sweep), resamples, dtype))
    return Probe(metric=metric, classes=list(classes), runs=runs)


def subset(
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    *,
    fraction: float | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Int[np.ndarray, "m"]:
    """Records of every class, drawn by seed: a share of them (rounded up) or a number.

    Subjects take turns, so that few records come from many subjects; larger draws of a seed contain its smaller ones.

    Raises:
        DataError: for a class without records, or with fewer than the shots.

    Example:
        >>> labels = np.array([0] * 10 + [1] * 4)
        >>> np.bincount(labels[subset(labels, "ab", fraction=0.5)]), len(subset(labels, "ab", shots=3))
        (array([5, 2]), 6)
    """
    labels = np.asarray(labels)
    subject = np.arange(len(labels)) if groups is None else tallies.codes(groups)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for k, name in enumerate(classes):
        rows = order[labels[order] == k]
        size = shots if shots is not None else math.ceil(len(rows) * (1.0 if fraction is None else fraction))
        if not len(rows) or size > len(rows):
            asked = f", {shots} are asked for" if shots is not None else ""
            raise DataError(f"probe: class {name!r} has {len(rows)} training records{asked}", "ask for fewer")
        seen: dict[int, int] = {}
        turn = [seen.setdefault(s, 0) for s in subject[rows].tolist()]
        for i, s in enumerate(subject[rows].tolist()):
            turn[i], seen[s] = seen[s], seen[s] + 1
        chosen.append(rows[np.argsort(turn, kind="stable")][:size])
    return np.sort(np.concatenate(chosen))


def _one(
    budget: str,
    seed: int,
    chosen: Int[np.ndarray, "m"],
    splits: Mapping[str, Split],
    classes: Sequence[str],
    metric: str,
    sweep: Sequence[float],
    resamples: int,
    dtype: str,
) -> Run:
    train, validation, test = splits.values()
    x = np.asarray(train.features, dtype)[chosen]
    mean, sd = x.mean(0), x.std(0)
    scale = np.where(sd > 1e-6 * max(float(sd.max()), 1e-30), sd, 1)  # what never varies says nothing
    ready = lambda features: (np.asarray(features, dtype) - mean) / scale
    x, held_out = ready(train.features)[chosen], ready(validation.features)
    labels = np.asarray(train.labels)[chosen]
    last, best, swept = None, None, {}
    for c in sweep:
        last = fit(x, labels, len(classes), c=c, start=last, dtype=dtype)
        logits = last.logits(held_out)
        v = metrics.classification(logits, validation.labels, classes, resamples=0).values[metric]
        if v.value is None:
            raise DataError(f"probe: {metric} is undefined on the validation split ({v.reason})")
        swept[c] = v.value
        if best is None or v.value > best[0]:
            best = (v.value, c, last)
    assert best is not None
    logits = best[2].logits(ready(test.features)).astype(np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    found = metrics.classification(
        logits,
        test.labels,
        classes,
        test.groups,
        probabilities=odds / odds.sum(1, keepdims=True),
        resamples=resamples,
    )
    if best[1] in (sweep[0], sweep[-1]) and len(sweep) > 1:
        found.notes.append(f"C = {best[1]:g} is at the edge of the sweep")
    return Run(budget=budget, seed=seed, n=len(chosen), c=best[1], swept=swept, metrics=found)


def _check(features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise DataError(f"probe: features of the shape {features.shape} for {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"probe: labels reach from {labels.min()} to {labels.max()}, classes to {classes - 1}"
        )
    if not np.isfinite(features).all():
        row = int(np.argmax(~np.isfinite(features).all(1)))
        raise DataError(f"probe: record {row} has features that are not finite", "check the model's weights")


def check(
    train: Split, validation: Split, test: Split, classes: Sequence[str], shots: Sequence[int] = ()
) -> None:
    """Refuses what can be refused from labels and subjects alone, before anything is embedded.

    Raises:
        DataError: for a subject in two splits, or a class without training records or with fewer than the shots.
    """
    seen: dict[Hashable, str] = {}
    for name, split in {"training": train, "validation": validation, "test": test}.items():
        for g in set(() if split.groups is None else split.groups):
            if seen.setdefault(g, name) != name:
                raise DataError(
                    f"probe: a subject is in the {seen[g]} and the {name} split", "split by subject"
                )
    subset(train.labels, classes, shots=max(shots, default=1))
