"""Two evaluations of the same records: paired differences with bootstrap intervals by subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import columns, metrics, multilabel_metrics, results, stored, tallies

FORMAT, VERSION = "unimed_jax.comparison", 1
_AGAIN = "evaluate both again on the same records"


def folders(
    this: str | Path, other: str | Path, *, resamples: int | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Differences (this - other) of every metric of every task that two results folders share.

    Both sets of predictions are resampled together: each draw takes the same subjects from both, so what makes a
    subject easy or hard for both cancels. Intervals are percentiles (95 %), undefined differences say why.

    Args:
        this: results folder.
        other: results folder to compare with.
        resamples: of the bootstrap; None = as many as `this` was evaluated with.
        seed: of the resampling; None = that of `this`.

    Returns:
        What `unimed-jax report --compare --json` prints: `tasks[].values.METRIC.{this, other, difference, low, high}`.

    Raises:
        DataError: when a folder has no results or no scores, no task is in both, or a task's classes, records, labels
            or subjects are not the same.
    """
    heads = [results.read(folder) for folder in (this, other)]
    every = lambda head: [*head["tasks"], *head.get("findings", ())]
    ours, theirs = ({t["name"]: t for t in every(head)} for head in heads)
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise DataError(
            f"no task is in both {this} ({', '.join(ours)}) and {other} ({', '.join(theirs)})",
            "evaluate both with the same --tasks",
        )
    settings = heads[0]["settings"]
    draws = {
        "resamples": settings["resamples"] if resamples is None else resamples,
        "seed": settings["seed"] if seed is None else seed,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "use": results.USE,
        "this": {"folder": str(this), "model": heads[0]["model"], "created": heads[0]["created"]},
        "other": {"folder": str(other), "model": heads[1]["model"], "created": heads[1]["created"]},
        "settings": draws,
        "only_this": [name for name in ours if name not in theirs],
        "only_other": [name for name in theirs if name not in ours],
        "tasks": _shared([this, other], [(ours[name], theirs[name]) for name in shared], draws),
    }


def _shared(
    folders: Sequence[str | Path],
    tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    draws: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The comparison of each task; of one with several labels a picture, of the means over its findings."""
    files = {"confusion": stored.predictions, "findings": stored.findings}
    rows = {
        key: [read(folder) for folder in folders]
        for key, read in files.items()
        if any(key in a and key in b for a, b in tasks)
    }
    out = []
    for a, b in tasks:
        key = "findings" if "findings" in a else "confusion"
        if key not in b:
            raise DataError(f"task {a['name']} has several labels a picture in one folder only", _AGAIN)
        mine, theirs = (found.get(a["name"], []) for found in rows[key])
        out.append((_findings if key == "findings" else _task)(a, b, mine, theirs, **draws))
    return out


def _findings(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    rows: Sequence[Mapping[str, str]],
    others: Sequence[Mapping[str, str]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    name, names = a["name"], list(a["findings"])
    if names != list(b["findings"]):
        raise DataError(f"task {name} has other findings in the two folders", _AGAIN)
    mine, theirs = (stored.scored_findings(name, r, names) for r in (rows, others))
    place = {key: i for i, key in enumerate(theirs.keys)}
    if set(mine.keys) != set(place) or not mine.keys:
        raise DataError(f"task {name}: the records differ", _AGAIN)
    order = [place[key] for key in mine.keys]
    subjects = tallies.codes(theirs.subjects[order].tolist())
    if (mine.truth != theirs.truth[order]).any() or (mine.subjects != subjects).any():
        raise DataError(f"task {name}: truth or subjects differ", _AGAIN)
    found = multilabel_metrics.paired(
        [mine.margins, theirs.margins[order]],
        mine.truth,
        mine.subjects.tolist(),
        resamples=resamples,
        seed=seed,
    )
    return _compared(a, b, found, mine.subjects, resamples)


def table(found: Mapping[str, Any]) -> str:
    """Each task's own metric in columns; all others are in the JSON and on the page."""
    lines = [("task", "metric", "this", "other", "difference", "95% CI", "n", "subjects")]
    figure = lambda v: "-" if v is None else f"{v:.3f}"
    for t in found["tasks"]:
        v = t["values"][t["metric"]]
        gap = "-" if v["difference"] is None else f"{v['difference']:+.3f}"
        low = v.get("reason", "") if v["low"] is None else f"[{v['low']:+.3f} {v['high']:+.3f}]"
        numbers = (figure(v["this"]), figure(v["other"]), gap, low, str(t["n"]), str(t["subjects"]))
        lines.append((t["name"], t["metric"], *numbers))
    notes = [f"note    {t['name']}: {note}" for t in found["tasks"] for note in t["notes"]]
    for where in ("this", "other"):
        if found[f"only_{where}"]:
            notes.append(f"note    only in {where}: {', '.join(found[f'only_{where}'])}")
    return "\n".join([*columns.aligned(lines), *notes])


def paired(
    scores: Sequence[Float[np.ndarray, "n c"]],
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    probabilities: Sequence[Float[np.ndarray, "n c"] | None] = (None, None),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[metrics.Value, metrics.Value, metrics.Value]]:
    """Each metric of two sets of scores, without intervals, and their difference (first - second) with one.

    Args:
        scores: two, of the same records.
        labels: class indices.
        classes: their names.
        groups: subject of each record; None = every record is its own subject.
        probabilities: two, for ECE and Brier; None = undefined.
        resamples: bootstrap resamples by subject; 0 = no intervals.
        seed: of the resampling.

    Raises:
        DataError: as `metrics.classification`.

    Example:
        >>> good, bad = np.eye(2)[[0, 1, 1, 0]], np.eye(2)[[0, 1, 0, 0]]
        >>> paired([good, bad], np.array([0, 1, 1, 0]), ["a", "b"])["accuracy"][2].value
        0.25
    """
    labels = np.asarray(labels, np.int64)
    ends = [
        metrics.classification(s, labels, classes, groups, probabilities=p, resamples=0).values
        for s, p in zip(scores, probabilities, strict=True)
    ]
    subject = np.arange(len(labels)) if groups is None else tallies.codes(groups)
    prepared = [
        tallies.prepare(np.asarray(s, np.float64), labels, p)
        for s, p in zip(scores, probabilities, strict=True)
    ]
    first, second = tallies.resampled(prepared, subject, resamples, seed)
    out = {}
    for name in metrics.ALL:
        a, b = ends[0][name], ends[1][name]
        if a.value is None or b.value is None:
            gap = metrics.Value(None, reason=a.reason or b.reason)
        else:
            drawn = first[name] - second[name] if first else None
            gap = metrics.interval(a.value - b.value, drawn, "")
        out[name] = (a, b, gap)
    return out


def _task(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    rows: Sequence[Mapping[str, str]],
    others: Sequence[Mapping[str, str]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    name, classes = a["name"], a["classes"]
    if classes != b["classes"]:
        raise DataError(f"task {name} has other classes in the two folders", _AGAIN)
    others = _aligned(name, rows, others)
    mine, theirs = (stored.scored(name, r, classes) for r in (rows, others))
    logs, subjects = [mine.log_scores, theirs.log_scores], mine.subjects
    found = paired(
        logs,
        mine.labels,
        classes,
        subjects.tolist(),
        probabilities=[np.exp(x) for x in logs],
        resamples=resamples,
        seed=seed,
    )
    return _compared(a, b, found, subjects, resamples)


def _compared(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    found: Mapping[str, tuple[metrics.Value, metrics.Value, metrics.Value]],
    subjects: Int[np.ndarray, "n"],
    resamples: int,
) -> dict[str, Any]:
    notes = []
    if a["prompts"]["sha256"] != b["prompts"]["sha256"]:
        notes.append("the prompts differ")
    notes += _calibrations(a, b)
    if resamples and subjects.max() < 1:
        notes.append("no intervals: all records belong to one subject")
    values = {}
    for k, (x, y, gap) in found.items():
        both = {"this": x.value, "other": y.value, "difference": gap.value, "low": gap.low, "high": gap.high}
        values[k] = both | ({"reason": gap.reason} if gap.reason else {})
    return {
        "name": a["name"],
        "metric": a["metric"],
        "n": len(subjects),
        "subjects": int(subjects.max()) + 1,
        "values": values,
        "notes": notes,
    }


def _calibrations(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs by the calibration alone, when only one side has one, or each its own."""
    fits = [t.get("calibration", {}) for t in (a, b)]
    one, two = ({k: fit[k] for k in ("temperature", "findings") if k in fit} for fit in fits)
    if one == two:
        return []
    what = "the calibrations differ" if one and two else f"only {'this' if one else 'other'} is calibrated"
    if "findings" in a:
        return [f"{what}: ECE, Brier score and figures at a threshold change by it, AUROC does not"]
    if len(a["classes"]) == 2:
        return [f"{what}: ECE and Brier score change by it, nothing else does"]
    return [f"{what}: ECE, Brier score, AUROC and average precision change by it, predicted classes do not"]


def _aligned(
    name: str, rows: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    """The other's rows in our order, when they are of the same records, labels and subjects."""
    by_key = {r["key"]: r for r in others}
    mine = {r["key"] for r in rows}
    missing, more = [k for k in mine if k not in by_key], [k for k in by_key if k not in mine]
    if missing or more or not rows:
        first = min(missing or more or ["none"])
        raise DataError(
            f"task {name}: the records differ, {len(missing)} only here, {len(more)} only there (first: {first})",
            _AGAIN,
        )
    found = [by_key[r["key"]] for r in rows]
    for r, o in zip(rows, found, strict=True):
        if r["label"] != o["label"]:
            raise DataError(
                f"task {name}: record {r['key']} is {r['label']!r} here and {o['label']!r} there", _AGAIN
            )
    ours, theirs = (tallies.codes([r["subject"] for r in rs]) for rs in (rows, found))
    if (ours != theirs).any():
        key = rows[int((ours != theirs).argmax())]["key"]
        raise DataError(f"task {name}: record {key} belongs to other subjects here and there", _AGAIN)
    return found
