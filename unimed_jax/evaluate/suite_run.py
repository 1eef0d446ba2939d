"""A suite from data on the disk to results: every picture is embedded once, a set that fails never stops the rest.

First everything is read that can be wrong without a model (`collect`): folders, lists, labels, prompts. Then all
pictures of all sets go through the model together, in batches of one size; one that cannot be read is counted, listed
and left out. Then each set is a matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from unimed_jax.data import medical
from unimed_jax.errors import UnimedError, UsageError
from unimed_jax.evaluate import layouts, metrics, suite_prompts, suites, tasks, zeroshot
from unimed_jax.evaluate.results import TaskResult
from unimed_jax.evaluate.suite_results import SetResult, SuiteResults
from unimed_jax.infer import Loaded
from unimed_jax.vectors import unit

PROTOCOLS = ("own", "reference")
_Key = tuple[Path, int]  # a picture: its file, and its place in an array or -1


@dataclass(slots=True, kw_only=True)
class Ready:
    """A set that can be evaluated."""

    data_set: suites.DataSet
    table: layouts.Table
    task: tasks.Task
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
        except OSError as e:
            reason = f"{s.name}: {e.filename} cannot be read ({e.strerror or type(e).__name__})"
            out.failed.append({"set": s.name, "status": "refused", "reason": reason, "remedy": ""})
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
        progress: called with (done, all) pictures.

    Returns:
        Results, the same on every process; sets without a readable picture are among its `failed`.
    """
    pictures: dict[_Key, int] = {}
    for r in collected.ready:
        for row in r.table.rows:
            pictures.setdefault((row.path, row.frame), len(pictures))
    arrays = {r.table.rows[0].path: r.table.array for r in collected.ready if r.table.array is not None}
    prompts = zeroshot.prompt_embeddings(loaded, [r.task for r in collected.ready])
    z, errors = _embed(loaded, list(pictures), arrays, threads, progress)
    sources = {collected.suite.name: {"split": "test", "records": len(pictures)}}
    data = {"sources": sources, "evaluated": len(pictures) - len(errors)}
    out = SuiteResults(
        **zeroshot.heading(loaded, data, resamples, seed),
        suite=collected.suite,
        prompt_source=collected.source.json(),
        protocol=protocol,
        failed=list(collected.failed),
    )
    for r in collected.ready:
        numbers = np.array([pictures[row.path, row.frame] for row in r.table.rows])
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
        labels = np.array([row.label for row in rows], np.int64)
        groups = [row.group for row in rows]
        found = zeroshot.score(
            r.task,
            [row.key for row in rows],
            labels,
            groups,
            mine,
            prompts,
            loaded.logit_scale,
            resamples,
            seed,
        )
        shown = _Shown(rows, r.table.array)
        found.examples = zeroshot.pick_examples(
            found, range(len(rows)), mine, prompts, shown, groups, examples
        )
        out.add(_result(r, found, lost, mine, labels, prompts, protocol, sensitivity))
    return out


def _result(
    r: Ready,
    found: TaskResult,
    lost: list[dict[str, str]],
    z: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
    protocol: str,
    sensitivity: bool,
) -> SetResult:
    s, t = r.data_set, r.table
    hit = zeroshot.cosines(r.task, z, prompts).argmax(1) == labels
    parts = {name: np.isin(labels, classes) for name, classes in s.parts.items()}
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
        reference=reference_figures(zeroshot.cosines(r.task, z, prompts), labels, binary=s.binary)
        if protocol == "reference"
        else {},
        sensitivity=_sensitivity(r, z, labels, prompts) if sensitivity else {},
        parts={
            k: {"n": int(m.sum()), "accuracy": float(hit[m].mean()) if m.any() else None}
            for k, m in parts.items()
        },
    )


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
    predicted = cosines.argmax(1)
    out: dict[str, float | None] = {"accuracy": 100 * float((predicted == labels).mean())}
    if not binary:
        return out
    hits = int(((labels == 1) & (predicted == 1)).sum())
    said, there = int((predicted == 1).sum()), int((labels == 1).sum())
    auroc = metrics.classification(cosines, labels, ["0", "1"], resamples=0).values["auroc"].value
    return out | {
        "auc_roc": None if auroc is None else 100 * auroc,
        "f1_score": 200 * hits / (said + there) if said + there else 0.0,
        "precision_score": 100 * hits / said if said else 0.0,
        "recall_score": 100 * hits / there if there else 0.0,
    }


def _sensitivity(
    r: Ready,
    z: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
) -> dict[str, Any]:
    """The set's metric with one prompt a class: the first of each, the second of each, and so on.

    A class with fewer prompts than another starts again with its first.
    """
    values = []
    for k in range(max(len(p) for p in r.task.classes.values())):
        one = {c: (p[k % len(p)],) for c, p in r.task.classes.items()}
        cosines = zeroshot.cosines(dataclasses.replace(r.task, classes=one), z, prompts)
        found = metrics.classification(cosines, labels, list(one), resamples=0)
        values.append(found.values[r.data_set.metric].value)
    known = [v for v in values if v is not None]
    figures = (min(known), float(np.median(known)), max(known)) if known else (None, None, None)
    names = ("minimum", "median", "maximum")
    return {"metric": r.data_set.metric, "prompts": len(values), **dict(zip(names, figures, strict=True))}


class _Shown:
    """Rows as `zeroshot.pick_examples` wants records."""

    def __init__(self, rows: Sequence[layouts.Row], array: np.ndarray | None):
        self.rows, self.array = rows, array

    def __getitem__(self, index: int) -> SimpleNamespace:
        row = self.rows[index]
        found = self.array[row.frame] if self.array is not None else medical.read(row.path)[0].data
        image = Image.fromarray(found) if isinstance(found, np.ndarray) else found
        return SimpleNamespace(image=image, simulated=False)


def _embed(
    loaded: Loaded,
    pictures: Sequence[_Key],
    arrays: Mapping[Path, np.ndarray],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Float[np.ndarray, "n d"], dict[int, str]]:
    """Unit embeddings of all pictures, and number -> reason of those that cannot be read."""
    out = np.zeros((len(pictures), loaded.cfg.embed_dim), np.float32)
    errors: dict[int, str] = {}
    done = 0
    for vectors, ids, reasons in _batches(loaded, pictures, arrays, threads):
        ids, vectors = np.asarray(ids), np.asarray(vectors)
        real = ids >= 0
        out[ids[real]] = vectors[real]
        # Every process learns which pictures failed anywhere; only the one that read it knows why.
        for n in (-2 - ids[ids < -1]).tolist():
            errors[n] = reasons.get(n, "cannot be read (see the process that read it)")
        done += int((ids != -1).sum())
        if progress:
            progress(done, len(pictures))
    return unit(out), errors


def _batches(
    loaded: Loaded, pictures: Sequence[_Key], arrays: Mapping[Path, np.ndarray], threads: int
) -> Iterator[tuple[Any, Any, dict[int, str]]]:
    """Global batches as (embeddings, ids, reasons), one ahead of the reader.

    An id is the picture's number, -1 for padding, -2 - number for a picture that cannot be read.
    """
    processes = sorted({d.process_index for d in loaded.mesh.devices.flat})
    size, mine = loaded.batch_size // len(processes), processes.index(jax.process_index())

    def read(number: int) -> np.ndarray | str:
        path, frame = pictures[number]
        try:
            return loaded.preprocess(arrays[path][frame] if frame >= 0 else path)
        except UnimedError as e:
            return e.cause

    starts = range(mine * size, len(pictures), size * len(processes))
    steps = -(-len(pictures) // loaded.batch_size)
    waiting = None
    with ThreadPoolExecutor(threads, thread_name_prefix="suite-read") as pool:
        queue: list[list[Any]] = []
        parts = [range(s, min(s + size, len(pictures))) for s in starts]
        parts += [range(0)] * (steps - len(parts))
        for step in range(steps):
            while len(queue) < 2 and step + len(queue) < steps:
                queue.append([pool.submit(read, n) for n in parts[step + len(queue)]])
            image = np.zeros((size, loaded.image_size, loaded.image_size, 3), np.uint8)
            ids = np.full(size, -1, np.int32)
            reasons: dict[int, str] = {}
            for row, (n, future) in enumerate(zip(parts[step], queue.pop(0), strict=True)):
                found = future.result()
                ids[row] = -2 - n if isinstance(found, str) else n
                if isinstance(found, str):
                    reasons[n] = found
                else:
                    image[row] = found
            ahead = (*loaded.encode_rows(image, ids), reasons)
            if waiting:
                yield waiting
            waiting = ahead
    if waiting:
        yield waiting
