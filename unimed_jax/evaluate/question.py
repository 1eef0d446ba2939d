"""What a model is asked about a picture: classes that exclude each other, or findings that do not.

Both turn embeddings into scores, calibrated where a calibration is given, and say what a row of a table holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax import saliency, vectors
from unimed_jax.errors import UsageError
from unimed_jax.evaluate import calibration, multilabel
from unimed_jax.evaluate.multilabel import Findings
from unimed_jax.evaluate.tasks import Task
from unimed_jax.infer import Loaded

_HALF = 0.5
_TINY = 1e-15


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of some pictures."""

    ranks: Float[np.ndarray, "n c"]  # logarithms, or logits of findings: never saturated
    p: Float[np.ndarray, "n c"]


class Classes:
    """One of several: the softmax of `logit_scale x cosine` over the classes.

    Args:
        loaded: the model.
        task: classes and prompts.
        fit: its calibration, if any.
    """

    def __init__(self, loaded: Loaded, task: Task, fit: calibration.Temperature | None = None):
        self.task, self.fit, self.names = task, fit, tuple(task.classes)
        self.texts = [(name, p) for name, prompts in task.classes.items() for p in prompts]
        self.prompts = loaded.encode_text([p for _, p in self.texts])
        ends = np.cumsum([len(v) for v in task.classes.values()])[:-1]
        self._bank = vectors.ensemble(np.split(self.prompts, ends))
        self._scale = loaded.logit_scale

    def scores(self, z: Float[np.ndarray, "n d"]) -> Scores:
        """Of unit image embeddings."""
        log_p = vectors.class_scores(z, self._bank, self._scale)
        log_p = self.fit.apply(log_p) if self.fit else log_p
        return Scores(log_p, np.exp(log_p))

    def mean(self, p: Float[np.ndarray, "n c"]) -> Scores:
        """Of a whole whose parts have these scores: their mean."""
        mean = p.mean(0, keepdims=True)
        return Scores(np.log(np.maximum(mean, _TINY)), mean)

    def toward(self, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """What a saliency map explains: the first class against the next; see `saliency.directions`."""
        return saliency.directions(z, self._bank)

    def found(self, p: Float[np.ndarray, "c"]) -> tuple[str, ...]:
        """The predicted class."""
        return (self.names[int(p.argmax())],)


class Pairs:
    """Each finding by itself: present when its probability reaches its threshold.

    Args:
        loaded: the model.
        task: findings and prompts.
        fit: its calibration with thresholds, if any; without, the threshold is 0.5.
    """

    def __init__(self, loaded: Loaded, task: Findings, fit: calibration.Platt | None = None):
        self.task, self.fit, self.names = task, fit, tuple(task.findings)
        self.texts = [(k, t) for k, pair in task.findings.items() for t in pair.positive]
        bank = dict(zip(task.prompts, loaded.encode_text(task.prompts), strict=True))
        self.prompts = np.stack([bank[t] for _, t in self.texts])
        self._bank, self._scale = bank, loaded.logit_scale
        cuts = fit.thresholds if fit else {}
        self.cuts = np.array([cuts.get(k, _HALF) for k in self.names])

    def scores(self, z: Float[np.ndarray, "n d"]) -> Scores:
        """Of unit image embeddings."""
        margins = multilabel.margins(self.task, z, self._bank, self._scale)
        margins = self.fit.apply(margins, self.names) if self.fit else margins
        return Scores(margins, multilabel.probability(margins))

    def mean(self, p: Float[np.ndarray, "n c"]) -> Scores:
        """Of a whole whose parts have these scores: their mean."""
        mean = p.mean(0, keepdims=True)
        inside = mean.clip(_TINY, 1 - _TINY)
        return Scores(np.log(inside) - np.log1p(-inside), mean)

    def toward(self, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """What a saliency map explains: the first finding, what speaks for it against what speaks against it."""
        each = multilabel.margins(self.task, np.eye(z.shape[1]), self._bank, 1.0).T  # [f d]
        return each[self.scores(z).ranks.argmax(1)]

    def found(self, p: Float[np.ndarray, "c"]) -> tuple[str, ...]:
        """The findings that are present."""
        return tuple(k for k, yes in zip(self.names, p >= self.cuts, strict=True) if yes)


Question = Classes | Pairs


def ask(loaded: Loaded, task: Task | Findings, fits: calibration.Calibration | None = None) -> Question:
    """The question of a task; its prompts are embedded once.

    Args:
        loaded: the model.
        task: classes or findings.
        fits: calibrations, of which the task's own is used.

    Raises:
        UsageError: when there is no calibration of this kind for this model and these prompts.
    """
    fit = fits.for_task(task.name, task.digest, loaded.about) if fits else None
    if isinstance(task, Task) and not isinstance(fit, calibration.Platt):
        return Classes(loaded, task, fit)
    if isinstance(task, Findings) and not isinstance(fit, calibration.Temperature):
        return Pairs(loaded, task, fit)
    raise UsageError(f"the calibration of {task.name} is of another kind", "calibrate this task")


def prompts_of(task: Task | Findings) -> dict[str, Any]:
    """The prompts as a record holds them."""
    if isinstance(task, Task):
        return {k: list(v) for k, v in task.classes.items()}
    return {k: {"positive": list(p.positive), "negative": list(p.negative)} for k, p in task.findings.items()}


def text(found: Sequence[str]) -> str:
    """What was found, in one cell."""
    return "; ".join(found)
