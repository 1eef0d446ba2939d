"""What a model reached on one multi-label task, as results.json, results.csv and findings.csv hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.evaluate import (
    calibration,
    calibration_fit,
    findings_truth,
    multilabel,
    multilabel_metrics,
    tallies,
)
from unimed_jax.evaluate.metrics import TITLES, Value

FILE = "findings.csv"
COLUMNS = ("task", "key", "subject", "finding", "truth", "probability", "margin")
MEAN = "mean over findings"


@dataclass(slots=True, kw_only=True)
class FindingsResult:
    """One multi-label task."""

    task: multilabel.Findings
    metrics: multilabel_metrics.Findings
    keys: list[str]
    subjects: Int[np.ndarray, "n"]  # number of each record's subject, by first occurrence: no identifier
    truth: Int[np.ndarray, "n f"]
    margins: Float[np.ndarray, "n f"]  # calibrated where a calibration was given
    calibrated: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)  # hits and misses with thumbnails

    @property
    def main(self) -> Value:
        """The mean over the findings of the task's own metric."""
        return self.metrics.values[self.task.metric]

    @property
    def chance(self) -> float | None:
        """What guessing reaches: one half for AUROC, the mean prevalence for average precision."""
        if self.task.metric == "auroc":
            return 0.5
        known = [f.positives / f.n for f in self.metrics.findings.values() if 0 < f.positives < f.n]
        return float(np.mean(known)) if known else None

    def json(self) -> dict[str, Any]:
        """Everything but the records."""
        t, m = self.task, self.metrics
        pairs = {
            k: {"positive": list(p.positive), "negative": list(p.negative)} for k, p in t.findings.items()
        }
        return {
            "name": t.name,
            "version": t.version,
            "description": t.description,
            "metric": t.metric,
            "chance": self.chance,
            "unlisted": t.unlisted,
            "n": m.n,
            "subjects": m.subjects,
            "prompts": {"sha256": t.digest, "shape": t.shape(), "findings": pairs},
            "values": {k: v.json() for k, v in m.values.items()},
            "findings": {k: f.json() for k, f in m.findings.items()},
            "notes": m.notes,
            **({"calibration": self.calibrated} if self.calibrated else {}),
        }

    def figures(self) -> Iterator[tuple[str, int, str, Value, float | None]]:
        """(finding or the mean, records, metric, value, chance) of every figure."""
        for k, v in self.metrics.values.items():
            yield MEAN, self.metrics.n, k, v, 0.5 if k == "auroc" else None
        for name, f in self.metrics.findings.items():
            chances = {"auroc": 0.5, "average_precision": f.positives / f.n if f.n else None}
            for k, v in f.values.items():
                yield name, f.n, k, v, chances.get(k)
            if f.delong:
                yield name, f.n, "auroc_delong", f.delong, 0.5

    def records(self) -> Iterator[dict[str, Any]]:
        """The rows of findings.csv: one a record and finding."""
        p, names = multilabel.probability(self.margins), list(self.task.findings)
        for i, key in enumerate(self.keys):
            head = {"task": self.task.name, "key": key, "subject": int(self.subjects[i])}
            for j, name in enumerate(names):
                truth = int(self.truth[i, j])
                yield head | {
                    "finding": name,
                    "truth": "" if truth < 0 else truth,
                    "probability": float(p[i, j]),
                    "margin": f"[{self.margins[i, j]:.9g}]",  # as text: nine digits, and no formula
                }

    def table(self) -> list[tuple[str, ...]]:
        """The findings in columns, the mean first: header and rows."""
        shown = [k for k in multilabel_metrics.BASIC if k in self.metrics.values]
        rows = [("finding", "n", "positive", *(TITLES.get(k, k.replace("_", " ")) for k in shown))]
        figure = lambda v: "-" if v.value is None else f"{v.value:.3f}"
        mean = self.metrics.values
        rows.append((MEAN, str(self.metrics.n), "", *(figure(mean[k]) for k in shown)))
        for name, f in self.metrics.findings.items():
            rows.append((name, str(f.n), str(f.positives), *(figure(f.values[k]) for k in shown)))
        return rows


def score(
    task: multilabel.Findings,
    keys: Sequence[str],
    truth: findings_truth.Truth,
    groups: Sequence[str],
    z: Float[np.ndarray, "n d"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
    scale: float,
    resamples: int,
    seed: int,
    fit: calibration.Platt | None = None,
    in_sample: bool = False,
) -> FindingsResult:
    """Metrics of one multi-label task from embeddings.

    Args:
        task: its findings and prompts.
        keys: name of each record.
        truth: of each record and finding.
        groups: subject of each record.
        z: unit image embedding of each.
        prompts: unit embedding of each prompt text.
        scale: factor on the cosines.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of the resampling.
        fit: a calibration of these findings.
        in_sample: whether it may have been fitted on these records.

    Raises:
        DataError: see `multilabel_metrics.findings` and `calibration.fitted_on`.
    """
    names = list(task.findings)
    raw = multilabel.margins(task, z, prompts, scale)
    margins, calibrated, notes = raw, {}, list(truth.notes)
    if fit:
        same = calibration.fitted_on(fit, keys, raw, in_sample)
        margins = fit.apply(raw, names)
        figures = calibration_fit.of_findings(
            raw, margins, truth.truth, groups, resamples=resamples, seed=seed
        )
        calibrated = calibration.applied(fit, figures, same)
        notes += [f"{k} is not calibrated: {why}" for k, why in fit.left.items()]
    found = multilabel_metrics.findings(
        multilabel.probability(margins),
        truth.truth,
        names,
        groups,
        margins=margins,
        thresholds=fit.thresholds if fit else None,
        resamples=resamples,
        seed=seed,
    )
    found.notes[:0] = notes
    return FindingsResult(
        task=task,
        metrics=found,
        keys=list(keys),
        subjects=tallies.codes(groups),
        truth=truth.truth,
        margins=margins,
        calibrated=calibrated,
    )
