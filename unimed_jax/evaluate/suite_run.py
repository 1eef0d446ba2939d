"""A suite from data on the disk to results: every picture is embedded once, a set that fails never stops the rest.

First everything is read that can be wrong without a model (`collect`): folders, lists, labels, prompts. Then all
pictures of all sets go through the model together, in batches of one size; one that cannot be read is counted, listed
and left out. Then each set is a matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from unimed_jax.data import medical
from unimed_jax.errors import DataError, UnimedError, UsageError
from unimed_jax.evaluate import (
    batches,
    calibration,
    findings_results,
    findings_truth,
    layouts,
    metrics,
    multilabel,
    shown,
    suite_prompts,
    suites,
    tasks,
    zeroshot,
)
from unimed_jax.evaluate.findings_results import FindingsResult
from unimed_jax.evaluate.results import TaskResult
from unimed_jax.evaluate.suite_results import SetResult, SuiteResults
from unimed_jax.infer import Loaded

PROTOCOLS = ("own", "reference")
_REFERENCE = {  # our metric -> the original's name
    "auroc": "auc_roc",
    "f1": "f1_score",
    "precision": "precision_score",
    "recall": "recall_score",
}
_Key = tuple[Path, int]  # a picture: its file, and its place in an array or -1


@dataclass(slots=True, kw_only=True)
class Ready:
    """A set that can be evaluated."""

    data_set: suites.DataSet
    table: layouts.Table
    task: tasks.Task | multilabel.Findings
    prompts: str  # where they come from, in words


@dataclass(slots=True, kw_only=True)
class Collected:
    """What a suite has on this disk, and what is wrong with the rest."""

    suite: suites.Suite
    source: suite_prompts.Source
    ready: list[Ready] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)  # set, status, reason, remedy


def collect(
    suite: suites.Suite,
    source: suite_prompts.Source,
    *,
    data_root: Path | None = None,
    places: Mapping[str, Path] | None = None,
    annotations: Path | None = None,
) -> Collected:
    """Reads every set's list and prompts; computes nothing.

    Args:
        suite: from `suites.load(...).choose(...)`.
        source: from `suite_prompts.load`.
        data_root: the folder of all sets.
        places: set -> its own folder, where it is elsewhere.
        annotations: where the lists are that the original's repository holds.

    Raises:
        UsageError: for a place of a set that is not evaluated.
    """
    places = places or {}
    unknown = [k for k in places if k not in {s.name for s in suite.sets}]
    if unknown:
        raise UsageError(f"a path is given for {unknown[0]}, which is not evaluated", "see --sets")
    out = Collected(suite=suite, source=source)
    for s in suite.sets:
        try:
            task, words = suite_prompts.task(s, source)
            table = layouts.read(s, places.get(s.name), data_root, annotations)
            out.ready.append(Ready(data_set=s, table=table, task=task, prompts=words))
        except UnimedError as e:
            status = "missing" if isinstance(e, layouts.Missing) else "refused"
            out.failed.append({"set": s.name, "status": status, "reason": e.cause, "remedy": e.remedy})
    return out


def evaluate(
    loaded: Loaded,
    collected: Collected,
    *,
    protocol: str = "own",
    sensitivity: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 4,
    examples: int = 6,
    calibrated: calibration.Calibration | None = None,
    in_sample: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SuiteResults:
    """Zero-shot classification of every set that is ready.

    Args:
        loaded: the model.
        collected: from `collect`.
        protocol: "reference" adds the original's figures: in percent, from cosines without the logit scale.
        sensitivity: also score each prompt alone.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of the resampling.
        threads: pictures decoded in parallel.
        examples: hits and misses kept with thumbnails, each.
        calibrated: applied to the scores of every set.
        in_sample: whether it may have been fitted on these pictures.
        progress: called with (done, all) pictures.

    Returns:
        Results, the same on every process; sets without a readable picture, or on whose pictures the calibration was
        fitted, are among its `failed`.

    Raises:
        UsageError: for a calibration of another model or other prompts.
    """
    fits: dict[str, Any] = {}
    if calibrated:
        for r in collected.ready:
            fits[r.data_set.name] = calibrated.for_task(r.task.name, r.task.digest, loaded.about)
    agree(collected.ready)
    prompts = zeroshot.prompt_embeddings(loaded, [r.task for r in collected.ready])
    z, errors, places = embed(loaded, collected.ready, threads=threads, progress=progress)
    sources = {collected.suite.name: {"split": "test", "records": len(z)}}
    data = {"sources": sources, "evaluated": len(z) - len(errors)}
    out = SuiteResults(
        **zeroshot.heading(loaded, data, resamples, seed, calibrated),
        suite=collected.suite,
        prompt_source=collected.source.json(),
        protocol=protocol,
        failed=list(collected.failed),
    )
    for r in collected.ready:
        numbers = places[r.data_set.name]
        good = [i for i, n in enumerate(numbers.tolist()) if n not in errors]
        lost = [
            {"file": row.key, "reason": errors[n]}
            for row, n in zip(r.table.rows, numbers.tolist(), strict=True)
            if n in errors
        ]
        if not good:
            reason = f"none of {len(numbers)} pictures can be read, the first: {lost[0]['reason']}"
            out.failed.append({"set": r.data_set.name, "status": "refused", "reason": reason, "remedy": ""})
            continue
        rows, mine = [r.table.rows[i] for i in good], z[numbers[good]]
        keys, groups = [row.key for row in rows], [row.group for row in rows]
        how = (mine, prompts, loaded.logit_scale, resamples, seed, fits.get(r.data_set.name), in_sample)
        labels = np.array([row.label for row in rows], np.int64)
        source = _Shown(rows, r.table.array)
        try:
            if isinstance(r.task, multilabel.Findings):
                truth = findings_truth.Truth(np.array([row.findings for row in rows], np.int8))
                several = findings_results.score(r.task, keys, truth, groups, *how)
                several.examples = shown.of_findings(
                    several, range(len(rows)), mine, prompts, source, examples
                )
                out.add(_result(r, several, lost))
                continue
            found = zeroshot.score(r.task, keys, labels, groups, *how)
        except DataError as e:
            refused = {"set": r.data_set.name, "status": "refused", "reason": e.cause, "remedy": e.remedy}
            out.failed.append(refused)
            continue
        found.examples = shown.of_classes(found, range(len(rows)), mine, prompts, source, groups, examples)
        result = _result(r, found, lost)
        cosines = zeroshot.cosines(r.task, mine, prompts)
        result.parts = _parts(r.data_set, cosines, labels)
        if protocol == "reference":
            result.reference = reference_figures(cosines, labels, binary=r.data_set.binary)
        if sensitivity:
            result.sensitivity = _sensitivity(r.task, r.data_set.metric, mine, labels, prompts)
        out.add(result)
    return out


def _result(r: Ready, found: TaskResult | FindingsResult, lost: list[dict[str, str]]) -> SetResult:
    s, t = r.data_set, r.table
    bad = [*t.bad, *lost]
    notes = [*t.notes, *s.notes, *([f"{len(bad)} pictures or rows could not be used"] if bad else [])]
    return SetResult(
        data_set=s,
        task=found,
        prompts=r.prompts,
        notes=notes,
        bad=bad,
        repeated=t.repeated,
        left_out=dict(t.left_out),
        annotations=t.sha256,
    )


def _parts(
    s: suites.DataSet, cosines: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]
) -> dict[str, dict[str, Any]]:
    """The accuracy of each named group of classes."""
    hit = cosines.argmax(1) == labels
    masks = {name: np.isin(labels, classes) for name, classes in s.parts.items()}
    return {
        k: {"n": int(m.sum()), "accuracy": float(hit[m].mean()) if m.any() else None}
        for k, m in masks.items()
    }


def reference_figures(
    cosines: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"], *, binary: bool
) -> dict[str, float | None]:
    """The original evaluator's figures in percent: accuracy, and of some sets of two classes four more.

    The prediction is the class of the largest cosine, the score of class 1 is its cosine minus that of class 0, and
    F1, precision and recall are those of class 1, 0/0 counting 0.

    Example:
        >>> z = np.array([[0.3, 0.1], [0.2, 0.4], [0.1, 0.3], [0.5, 0.2]])
        >>> found = reference_figures(z, np.array([0, 1, 0, 1]), binary=True)
        >>> {k: None if v is None else round(v, 2) for k, v in found.items()}
        {'accuracy': 50.0, 'auc_roc': 50.0, 'f1_score': 50.0, 'precision_score': 50.0, 'recall_score': 50.0}
    """
    accuracy = {"accuracy": 100 * float((cosines.argmax(1) == labels).mean())}
    if not binary:
        return dict(accuracy)
    values = metrics.classification(cosines, labels, ["0", "1"], resamples=0).values
    found = {name: values[metric].value for metric, name in _REFERENCE.items()}
    # 0/0 counts 0 there; an AUROC of one class does not exist.
    percent = {k: None if v is None and k == "auc_roc" else 100 * (v or 0.0) for k, v in found.items()}
    return accuracy | percent


def _sensitivity(
    task: tasks.Task,
    metric: str,
    z: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
) -> dict[str, Any]:
    """The set's metric with one prompt a class: the first of each, the second of each, and so on.

    A class with fewer prompts than another starts again with its first.
    """
    values = []
    for k in range(max(len(p) for p in task.classes.values())):
        one = {c: (p[k % len(p)],) for c, p in task.classes.items()}
        cosines = zeroshot.cosines(dataclasses.replace(task, classes=one), z, prompts)
        found = metrics.classification(cosines, labels, list(one), resamples=0)
        values.append(found.values[metric].value)
    known = [v for v in values if v is not None]
    figures = (min(known), float(np.median(known)), max(known)) if known else (None, None, None)
    names = ("minimum", "median", "maximum")
    return {"metric": metric, "prompts": len(values), **dict(zip(names, figures, strict=True))}


class _Shown:
    """Rows as `shown.of_classes` wants records."""

    def __init__(self, rows: Sequence[layouts.Row], array: np.ndarray | None):
        self.rows, self.array = rows, array

    def __getitem__(self, index: int) -> SimpleNamespace:
        row = self.rows[index]
        found = self.array[row.frame] if self.array is not None else medical.read(row.path)[0].data
        image = Image.fromarray(found) if isinstance(found, np.ndarray) else found
        return SimpleNamespace(image=image, simulated=False)


def agree(ready: Sequence[Ready]) -> None:
    """Makes sure that all processes of a job see the same rows.

    Raises:
        DataError: see `batches.agree`.
    """
    batches.agree(
        [f"{r.data_set.name} {row.key} {row.label} {row.findings}" for r in ready for row in r.table.rows]
    )


def embed(
    loaded: Loaded,
    ready: Sequence[Ready],
    *,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[np.ndarray, "n d"], dict[int, str], dict[str, Int[np.ndarray, "rows"]]]:
    """All pictures of some sets, each once, however many rows name it.

    Returns:
        Unit embeddings; number -> reason of the pictures that cannot be read; set -> the number of each row's picture.
    """
    numbers: dict[_Key, int] = {}
    places = {
        r.data_set.name: np.array(
            [numbers.setdefault((row.path, row.frame), len(numbers)) for row in r.table.rows], np.int64
        )
        for r in ready
    }
    pictures = list(numbers)
    arrays = {r.table.rows[0].path: r.table.array for r in ready if r.table.array is not None}

    def read(number: int) -> np.ndarray | str:
        path, frame = pictures[number]
        try:
            return loaded.preprocess(arrays[path][frame] if frame >= 0 else path)
        except UnimedError as e:
            return e.cause

    z, errors = batches.embed(loaded, len(pictures), read, threads=threads, progress=progress)
    return z, errors, places
