"""Retrieval and the linear probe: what a model's frozen embeddings are worth beyond zero-shot classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.data.record import Example
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import (
    columns,
    multilabel,
    probe,
    results,
    retrieval,
    suite_run,
    tallies,
    tasks,
    zeroshot,
)
from unimed_jax.infer import Loaded

HELD_OUT = 0.2  # share of the training subjects that choose C where there is no validation split
_VERSION = 1

Progress = Callable[[int, int], None]


def retrieve(
    loaded: Loaded,
    sources: Any | Sequence[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Retrieval between all pictures and all captions of the records, both directions (see `retrieval.evaluate`).

    Records of equal pictures (by their bytes) are one image; captions of equal text are one caption. Records without
    a caption are left out and counted.

    Returns:
        The content of retrieval.json.

    Raises:
        DataError: for duplicate keys, no captions, or a record that cannot be read.
    """
    pool = zeroshot.Pool([sources] if hasattr(sources, "name") else sources)
    facts = pool.facts()
    said = {i: tuple(dict.fromkeys(c.text for c in e.captions if c.text.strip())) for i, e in facts.items()}
    used = [i for i, captions in said.items() if captions]
    if not used:
        raise DataError(f"none of {len(facts)} records of {pool.name} has a caption", "export with captions")
    place = {text: k for k, text in enumerate(dict.fromkeys(t for i in used for t in said[i]))}
    texts = loaded.encode_text(list(place))
    z = zeroshot.embed(loaded, pool, used, threads=threads, progress=progress)
    pairs = [(row, i, text) for row, i in enumerate(used) for text in said[i]]
    found = retrieval.evaluate(
        z[[row for row, _, _ in pairs]],
        texts[[place[text] for _, _, text in pairs]],
        [facts[i].sha256 or facts[i].key for _, i, _ in pairs],
        [text for _, _, text in pairs],
        [facts[i].patient or facts[i].key for _, i, _ in pairs],
        resamples=resamples,
        seed=seed,
    )
    return _head(
        "retrieval",
        loaded,
        {"test": zeroshot.describe(pool, len(pool))},
        {"resamples": resamples, "seed": seed, "ties": "against the model"},
    ) | {"pairs": len(pairs), "without_caption": len(facts) - len(used), **found.json()}


def probe_task(
    loaded: Loaded,
    sources: Mapping[str, Any],
    task: str | Path | tasks.Task,
    *,
    fractions: Sequence[float] = probe.FRACTIONS,
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    resamples: int = 1000,
    threads: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A linear probe of the unit image embeddings on a task's classes; its prompts are not used (see `probe.run`).

    Args:
        loaded: the model.
        sources: "train" and "test" -> sources, "val" too where there is one; else a fifth of the training subjects
            of each class chooses C instead.
        task: whose records, labels, metric and grouping count.
        fractions: of the training records of each class.
        shots: training records of each class.
        seeds: of the draws.
        resamples: of the test intervals, by subject.
        threads: decoding in parallel.
        progress: called with (done, all) records of a split.

    Returns:
        The content of probe.json.

    Raises:
        DataError: see `probe.run` and `zeroshot.evaluate`.
    """
    task = tasks.load(task)
    pools = {k: zeroshot.Pool([s] if hasattr(s, "name") else s) for k, s in sources.items()}
    facts = {k: pool.facts() for k, pool in pools.items()}
    picked = {k: tasks.select(task, facts[k]) for k in pools}
    bare = _divided({k: _split(facts[k], task, picked[k]) for k in pools})
    probe.check(bare["train"], bare["val"], bare["test"], list(task.classes), shots)
    parts = {}
    for k, pool in pools.items():
        z = zeroshot.embed(loaded, pool, list(picked[k]), threads=threads, progress=progress)
        parts[k] = _split(facts[k], task, picked[k], z)
    data = {k: zeroshot.describe(pool, len(pool)) for k, pool in pools.items()}
    budgets = {"fractions": fractions, "shots": shots, "seeds": seeds, "resamples": resamples}
    return _probed(loaded, task, task.metric, parts, data, budgets)


def probe_sets(
    loaded: Loaded,
    collected: suite_run.Collected,
    sets: Mapping[str, str],
    *,
    fractions: Sequence[float] = probe.FRACTIONS,
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    resamples: int = 1000,
    threads: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A linear probe between sets of a suite: folders of classes, lists, arrays (see `probe_task` and `probe.run`).

    Args:
        loaded: the model.
        collected: the sets, from `suite_run.collect`.
        sets: "train" and "test" -> names of sets with the same classes, "val" too where there is one.
        fractions: see `probe_task`, and so the others.
        shots: see `probe_task`.
        seeds: see `probe_task`.
        resamples: see `probe_task`.
        threads: see `probe_task`.
        progress: called with (done, all) pictures.

    Returns:
        The content of probe.json; pictures that cannot be read are left out and counted there.

    Raises:
        UsageError: for sets of several labels a picture, or of different classes.
        DataError: for a set that is missing or refused, and see `probe.run`.
    """
    found = {r.data_set.name: r for r in collected.ready}
    why = {f["set"]: DataError(f["reason"], f["remedy"]) for f in collected.failed}
    for name in sets.values():
        if name not in found:
            raise why.get(name) or DataError(f"set {name} is not there")
    ready = {k: found[name] for k, name in sets.items()}
    classes = _same_classes(ready)
    suite_run.agree(list(ready.values()))
    bare = _divided({k: _rows_of(r, np.arange(len(r.table.rows))) for k, r in ready.items()})
    probe.check(bare["train"], bare["val"], bare["test"], classes, shots)
    z, errors, places = suite_run.embed(loaded, list(ready.values()), threads=threads, progress=progress)
    parts, data = {}, {}
    for k, r in ready.items():
        numbers = places[r.data_set.name]
        good = np.flatnonzero(~np.isin(numbers, list(errors)))
        parts[k] = _rows_of(r, good, z[numbers[good]])
        about = {"set": r.data_set.name, "records": len(numbers), "annotations_sha256": r.table.sha256}
        lost = len(numbers) - len(good) + len(r.table.bad)
        data[k] = {"sources": {collected.suite.name: about}, "evaluated": len(good), "bad": lost}
    test = ready["test"]
    assert isinstance(test.task, tasks.Task)
    budgets = {"fractions": fractions, "shots": shots, "seeds": seeds, "resamples": resamples}
    return _probed(loaded, test.task, test.data_set.metric, parts, data, budgets)


def _same_classes(ready: Mapping[str, suite_run.Ready]) -> list[str]:
    """The classes that all sets have, in their order.

    Raises:
        UsageError: when there are none such.
    """
    test = ready["test"].data_set
    for r in ready.values():
        if isinstance(r.task, multilabel.Findings):
            raise UsageError(f"set {r.data_set.name} has several labels a picture", "the probe takes classes")
        if r.data_set.classes != test.classes:
            raise UsageError(
                f"the sets {r.data_set.name} and {test.name} have different classes",
                "the same names in the same order",
            )
    return list(test.classes)


def _rows_of(
    r: suite_run.Ready, rows: Int[np.ndarray, "n"], z: Float[np.ndarray, "n d"] | None = None
) -> probe.Split:
    mine = [r.table.rows[i] for i in rows.tolist()]
    features = np.zeros((len(mine), 0), np.float32) if z is None else z
    return probe.Split(features, np.array([row.label for row in mine], np.int64), [row.group for row in mine])


def _probed(
    loaded: Loaded,
    task: tasks.Task,
    metric: str,
    parts: Mapping[str, probe.Split],
    data: Mapping[str, Any],
    budgets: Mapping[str, Any],
) -> dict[str, Any]:
    """The probe on embedded splits, and what is said about it."""
    own = "its own split" if "val" in parts else f"{HELD_OUT:.0%} of the training subjects of each class"
    parts = _divided(parts)
    names = list(task.classes)
    found = probe.run(parts["train"], parts["val"], parts["test"], names, metric=metric, **budgets)
    settings = {
        "resamples": budgets["resamples"],
        "seeds": list(budgets["seeds"]),
        "sweep": list(probe.SWEEP),
        "features": "unit image embeddings, standardised by the training records in use",
        "validation": own,
        "records": {k: len(p.labels) for k, p in parts.items()},
    }
    chance = 0.5 if metric == "auroc" else 1 / len(names)
    about = {"task": task.name, "chance": chance, **found.json()}
    return _head("probe", loaded, data, settings) | about


def hold_out(labels: Int[np.ndarray, "n"], groups: Sequence[Any]) -> np.ndarray:
    """Which records are of the held-out fifth of the subjects of each class (a subject counts for its first record).

    Example:
        >>> hold_out(np.zeros(10, int), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]).sum()
        np.int64(2)
    """
    subject = tallies.codes(groups)
    first = np.unique(subject, return_index=True)[1]
    order = np.random.default_rng(0).permutation(len(first))
    taken = np.zeros(len(first), bool)
    for k in np.unique(np.asarray(labels)[first]):
        own = order[np.asarray(labels)[first][order] == k]
        taken[own[: max(1, round(len(own) * HELD_OUT))]] = len(own) > 1
    return taken[subject]


def table(found: Mapping[str, Any]) -> str:
    """What the command prints."""
    return "\n".join(columns.aligned(_lines(found)))


def _lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    show = lambda v: results.Value(v["value"], v["low"], v["high"], v.get("reason", "")).text()
    if "pairs" in found:
        names = ("R@1", "R@5", "R@10", "mAP", "median_rank")
        lines: list[tuple[str, ...]] = [("query", "metric", "value [95% CI]", "chance", "queries", "gallery")]
        for way in ("image_to_text", "text_to_image"):
            d = found[way]
            sizes = (str(d["queries"]), str(d["gallery"]))
            for name in names:
                luck = f"{d['chance'][name]:.3f}" if name in d["chance"] else ""
                lines.append((way.replace("_", " "), name, show(d["values"][name]), luck, *sizes))
        return lines
    lines = [("budget", "seed", "train", "C", found["metric"], "test", "subjects")]
    for r in found["runs"]:
        v = show(r["values"][found["metric"]])
        lines.append(
            (
                r["budget"],
                str(r["seed"]),
                str(r["n_train"]),
                f"{r['C']:g}",
                v,
                str(r["n_test"]),
                str(r["subjects"]),
            )
        )
    for budget, s in found["summary"].items():
        if s["sd"] is not None:
            lines.append((budget, "mean", "", "", f"{s['mean']:.3f} (sd {s['sd']:.3f})", "", ""))
    return [*lines, ("chance", "", "", "", f"{found['chance']:.3f}", "", "")]


def _split(
    facts: Mapping[int, Example],
    task: tasks.Task,
    picked: Mapping[int, int],
    z: Float[np.ndarray, "n d"] | None = None,
) -> probe.Split:
    """The task's records with their embeddings, or with none while only labels and subjects are checked."""
    groups = [
        facts[i].patient if task.group == "patient" and facts[i].patient else facts[i].key for i in picked
    ]
    features = np.zeros((len(picked), 0), np.float32) if z is None else z
    return probe.Split(features, np.array(list(picked.values()), np.int64), groups)


def _divided(parts: Mapping[str, probe.Split]) -> dict[str, probe.Split]:
    """With a validation split from the training subjects where there is none."""
    if "val" in parts:
        return dict(parts)
    whole = parts["train"]
    away = hold_out(whole.labels, whole.groups or [])
    return {**parts, "train": _rows(whole, ~away), "val": _rows(whole, away)}


def _rows(split: probe.Split, chosen: np.ndarray) -> probe.Split:
    groups = [g for g, yes in zip(split.groups or (), chosen, strict=True) if yes]
    return probe.Split(split.features[chosen], split.labels[chosen], groups)


def _head(kind: str, loaded: Loaded, data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    about = zeroshot.heading(loaded, dict(data), settings["resamples"], 0)
    about["settings"] |= settings
    return {"format": f"unimed_jax.{kind}", "version": _VERSION, "use": results.USE, **about}
