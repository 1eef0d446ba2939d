"""Zero-shot evaluation: every record is embedded once, then every task is a matrix product.

Tasks, labels and record keys are checked before anything is computed. Batches are padded and masked (one compilation)
and shared over the mesh; each process decodes only its own rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax import __version__
from unimed_jax.data import images
from unimed_jax.data.blocks import blaming, read_record
from unimed_jax.data.record import Example
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import (
    batches,
    calibration,
    calibration_fit,
    findings_results,
    findings_truth,
    metrics,
    multilabel,
    shown,
    tallies,
    tasks,
)
from unimed_jax.evaluate.results import Prediction, Results, TaskResult
from unimed_jax.infer import Loaded
from unimed_jax.train import run_folder
from unimed_jax.vectors import class_scores, ensemble

Wanted = str | Path | tasks.Task | multilabel.Findings


class Pool:
    """Several sources as one numbered sequence of records."""

    def __init__(self, sources: Sequence[Any]):
        self.sources = list(sources)
        self.name = "+".join(s.name for s in self.sources)
        self._ends = list(itertools.accumulate(len(s) for s in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        part = bisect.bisect_right(self._ends, index)
        return self.sources[part][index - (self._ends[part - 1] if part else 0)]

    def facts(self) -> dict[int, Example]:
        """Every record without its picture.

        Raises:
            DataError: for a key that occurs twice, or an empty set.
        """
        found: dict[int, Example] = {}
        first: dict[str, int] = {}
        for i in range(len(self)):
            found[i] = dataclasses.replace(self[i], image=b"")
            key = found[i].key
            if first.setdefault(key, i) != i:
                raise DataError(
                    f"records {first[key]} and {i} of {self.name} have the same key {key!r}", "export again"
                )
        if not found:
            raise DataError(
                f"{self.name or 'the folder'} has no records in this split",
                "unimed-jax data stats shows them",
            )
        return found


def evaluate(
    loaded: Loaded,
    sources: Any | Sequence[Any],
    wanted: Wanted | Sequence[Wanted],
    *,
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 4,
    references: Mapping[str, Mapping[str, metrics.Metrics]] | None = None,
    examples: int = 6,
    calibrated: calibration.Calibration | None = None,
    in_sample: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Zero-shot classification of all tasks on all sources, those with several labels a picture too.

    Args:
        loaded: the model.
        sources: one `Shards` or several; anything with name, len and records by number.
        wanted: task names, files or tasks.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of the resampling.
        threads: decoding in parallel.
        references: task -> name -> metrics of something to compare with, copied into the results.
        examples: hits and misses kept with thumbnails, each.
        calibrated: applied to the scores of every task.
        in_sample: whether it may have been fitted on these records.
        progress: called with (done, all) records.

    Returns:
        Results, the same on every process.

    Raises:
        UsageError: for an unknown task, or none; or a calibration of another model or other prompts.
        DataError: for labels that are no class, duplicate keys, an empty selection, a record that cannot be read, or
            records that the calibration was fitted on.
    """
    single = (str, Path, tasks.Task, multilabel.Findings)
    chosen = [load(t) for t in ([wanted] if isinstance(wanted, single) else wanted)]
    names = [t.name for t in chosen]
    if not chosen or len(set(names)) < len(names):
        raise UsageError(
            f"tasks are given twice: {', '.join(names)}" if chosen else "no task is given", "--tasks NAME,..."
        )
    pool = Pool([sources] if hasattr(sources, "name") else sources)
    facts = pool.facts()
    picked: dict[str, tuple[list[int], Any]] = {t.name: _truth(t, facts) for t in chosen}
    fits = {
        t.name: calibrated.for_task(t.name, t.digest, loaded.about) if calibrated else None for t in chosen
    }
    union = sorted(set().union(*(indices for indices, _ in picked.values())))
    place = {index: row for row, index in enumerate(union)}
    batches.agree([f"{facts[i].key} {facts[i].labels}" for i in union])
    prompts = prompt_embeddings(loaded, chosen)
    embeddings = embed(loaded, pool, union, threads=threads, progress=progress)
    out = Results(**heading(loaded, describe(pool, len(union)), resamples, seed, calibrated), tasks=[])
    for t in chosen:
        indices, truth = picked[t.name]
        z, mine = embeddings[[place[i] for i in indices]], [facts[i] for i in indices]
        # Without a patient every record is its own subject.
        groups = [e.patient if t.group == "patient" and e.patient else e.key for e in mine]
        about = ([e.key for e in mine], truth, groups, z, prompts, loaded.logit_scale, resamples, seed)
        fit = fits[t.name]
        if isinstance(t, multilabel.Findings):
            assert not isinstance(fit, calibration.Temperature)
            found = findings_results.score(t, *about, fit, in_sample)
            found.examples = shown.of_findings(found, indices, z, prompts, pool, examples)
            out.findings.append(found)
            continue
        assert not isinstance(fit, calibration.Platt)
        result = score(t, *about, fit, in_sample)
        result.references = dict((references or {}).get(t.name, {}))
        subjects = [e.patient or e.key for e in mine]
        result.examples = shown.of_classes(result, indices, z, prompts, pool, subjects, examples)
        out.tasks.append(result)
    return out


def load(wanted: Wanted) -> tasks.Task | multilabel.Findings:
    """A task of either kind, by name, from a file, or as it is.

    Raises:
        UsageError: see `tasks.load` and `multilabel.load`.

    Example:
        >>> load("modality").name, load("chest_findings").name
        ('modality', 'chest_findings')
    """
    if isinstance(wanted, (tasks.Task, multilabel.Findings)):
        return wanted
    return multilabel.either(wanted)


def _truth(t: tasks.Task | multilabel.Findings, facts: dict[int, Example]) -> tuple[list[int], Any]:
    """Which records a task has, and their classes, or what is known of their findings."""
    if isinstance(t, multilabel.Findings):
        return findings_truth.select(t, facts)
    picked = tasks.select(t, facts)
    return list(picked), np.array(list(picked.values()), np.int64)


def heading(
    loaded: Loaded,
    data: dict[str, Any],
    resamples: int,
    seed: int,
    calibrated: calibration.Calibration | None = None,
) -> dict[str, Any]:
    """What results say about model, data, code and settings."""
    return {
        "model": loaded.about,
        "data": data,
        "code": {"version": __version__, "revision": run_folder.git_revision()},
        "settings": {
            "resamples": resamples,
            "seed": seed,
            "devices": loaded.mesh.size,
            **({"calibration": calibrated.sha256} if calibrated else {}),
        },
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def embed(
    loaded: Loaded,
    pool: Any,
    indices: Sequence[int],
    *,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Unit image embeddings of records, in the order of `indices`; complete on every process.

    Raises:
        DataError: for a record that cannot be read.
    """
    alone = len(batches.processes(loaded)) == 1
    name = getattr(pool, "name", "records")

    def read(row: int) -> np.ndarray | str:
        index = int(indices[row])
        try:
            example = read_record(pool, index, name)
            with blaming(pool, index, name, example.key):
                return images.eval_image(example.image, loaded.image_size)
        except DataError as e:
            if alone:
                raise
            return e.line()  # its peers wait for this process: all of them refuse at the end

    z, errors = batches.embed(loaded, len(indices), read, threads=threads, progress=progress)
    for why in errors.values():
        raise DataError(why)
    return z


def prompt_embeddings(
    loaded: Loaded, chosen: Sequence[tasks.Task | multilabel.Findings]
) -> dict[str, Float[np.ndarray, "d"]]:
    """Every prompt of every task, once."""
    texts = list(dict.fromkeys(p for t in chosen for p in t.prompts))
    return dict(zip(texts, loaded.encode_text(texts), strict=True))


def score(
    task: tasks.Task,
    keys: Sequence[str],
    labels: Int[np.ndarray, "n"],
    groups: Sequence[str],
    z: Float[np.ndarray, "n d"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
    scale: float,
    resamples: int,
    seed: int,
    fit: calibration.Temperature | None = None,
    in_sample: bool = False,
) -> TaskResult:
    """Metrics and predictions of one task from embeddings.

    Args:
        task: its classes and prompts.
        keys: name of each record.
        labels: class index of each.
        groups: subject of each.
        z: unit image embedding of each.
        prompts: unit embedding of each prompt text.
        scale: factor on the cosines.
        resamples: see `metrics.classification`.
        seed: see `metrics.classification`.
        fit: a calibration of these classes.
        in_sample: whether it may have been fitted on these records.

    Raises:
        DataError: see `metrics.classification` and `calibration.fitted_on`.
    """
    raw = log_p = class_scores(z, class_bank(task, prompts), scale)
    calibrated: dict[str, Any] = {}
    if fit:
        same = calibration.fitted_on(fit, keys, raw, in_sample)
        log_p = fit.apply(raw)
        figures = calibration_fit.of_classes(raw, log_p, labels, groups, resamples=resamples, seed=seed)
        calibrated = calibration.applied(fit, figures, same)
    names = list(task.classes)
    found = metrics.classification(
        log_p, labels, names, groups, probabilities=np.exp(log_p), resamples=resamples, seed=seed
    )
    predictions = [
        Prediction(
            key=key,
            label=names[label],
            predicted=names[int(row.argmax())],
            scores=dict(zip(names, np.exp(row).tolist(), strict=True)),
            subject=int(subject),
            log_scores=tuple(row.tolist()),
        )
        for key, label, row, subject in zip(keys, labels, log_p, tallies.codes(groups), strict=True)
    ]
    return TaskResult(task=task, metrics=found, predictions=predictions, calibrated=calibrated)


def cosines(
    task: tasks.Task, z: Float[np.ndarray, "n d"], prompts: Mapping[str, Float[np.ndarray, "d"]]
) -> Float[np.ndarray, "n c"]:
    """Cosine of each picture with each class."""
    return z.astype(np.float64) @ class_bank(task, prompts).T.astype(np.float64)


def class_bank(task: tasks.Task, prompts: Mapping[str, Float[np.ndarray, "d"]]) -> Float[np.ndarray, "c d"]:
    """A unit vector of each class: the normalised mean of its prompts."""
    return ensemble([np.stack([prompts[p] for p in texts]) for texts in task.classes.values()])


def describe(pool: Pool, used: int) -> dict[str, Any]:
    """What results say about the records: sources, licences and hashes of their manifests."""
    sources = {}
    for s in pool.sources:
        sources[s.name] = {"split": getattr(s, "split", ""), "records": len(s)}
        manifest = getattr(s, "manifest", None)
        if manifest is not None:
            sources[s.name] |= {
                "licence": manifest.licence,
                "manifest_sha256": run_folder.manifests([s])[s.name],
            }
    return {"sources": sources, "evaluated": used}
