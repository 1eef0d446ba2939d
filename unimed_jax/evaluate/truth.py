"""What is known about the pictures that were scored, from CSV files, and how right the scores are.

A row of a CSV names a file or a folder: relative to the CSV, to a folder that was named, or to where the program
runs. What is said about a file of a volume holds for the volume, what is said about a folder for everything below it
that no nearer row speaks of. Nothing is dropped in silence: every gap is counted.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.found import Found
from unimed_jax.data.tables import Entry, Listing
from unimed_jax.errors import DataError, did_you_mean
from unimed_jax.evaluate import (
    calibration,
    curves,
    findings_truth,
    metrics,
    multilabel,
    multilabel_metrics,
    tallies,
)
from unimed_jax.evaluate.findings_results import FindingsResult
from unimed_jax.evaluate.multilabel import Findings
from unimed_jax.evaluate.predict import MEAN, Predictions
from unimed_jax.evaluate.question import Classes, Question
from unimed_jax.evaluate.results import TaskResult
from unimed_jax.evaluate.tasks import Task

FORMAT, VERSION = "unimed_jax.prediction_metrics", 1

_UNCERTAIN = {"-1", "u", "uncertain"}  # of a column of classes, unless a class has the name

Said = int | tuple[int, ...]  # a class, or what is known of each finding


@dataclass(slots=True)
class Truth:
    """The truth of inputs, by their number."""

    said: dict[int, Said] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)  # the same for readers
    groups: dict[int, str] = field(default_factory=dict)  # who was pictured: for counting only
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def match(found: Found, lists: Sequence[Listing], folders: Sequence[Path], task: Task | Findings) -> Truth:
    """Which input has which truth, before anything is computed.

    Args:
        found: the inputs.
        lists: with the truth.
        folders: that names may be relative to, besides the list's own and the current one.
        task: whose classes or findings the truth is about.

    Raises:
        DataError: for labels that are no class (all of them), two truths of one picture, or no truth at all.
    """
    places = _Places(found)
    out = Truth()
    counts: Counter[str] = Counter()
    nearest: dict[int, tuple[int, Entry, Listing]] = {}  # input -> (depth of the name, row, its list)
    unknown: Counter[str] = Counter()
    names = task.findings if isinstance(task, Findings) else ()
    for listing in lists:
        read = _reader(task, listing)
        for entry in listing.entries:
            uncertain: Counter[str] = Counter()
            said = read(entry, unknown, uncertain)
            if said is None:
                counts["rows without a label"] += 1
                continue
            numbers, depth = places.of(entry, [listing.file.parent, *folders, Path()])
            if not numbers:
                counts["rows that name no picture here"] += 1
            elif isinstance(task, Findings) and uncertain:
                counts["findings called uncertain, not judged"] += uncertain.total()
            for number in numbers:
                _say(out, nearest, number, depth, entry, listing, said, counts)
    if unknown:
        raise _no_class(task, unknown)
    vague = [
        n for n, s in out.said.items() if s == multilabel.UNKNOWN or s == (multilabel.UNKNOWN,) * len(names)
    ]
    for number in vague:
        del out.said[number]
    counts["pictures or volumes whose label is uncertain, not judged"] = len(vague)
    if vague and not out.said:
        raise DataError("the truth calls every picture uncertain", "labels that say something")
    if not out.said:
        first = next((e.name for listing in lists for e in listing.entries), "")
        raise DataError(
            f"no row of the truth names any of {len(found.inputs)} pictures, the first is {first!r}",
            "names are relative to the CSV, to a named folder, or to the current one",
        )
    for listing in (x for x in found.lists if x not in lists):  # a list may say who was pictured, and no more
        for entry in (e for e in listing.entries if e.group):
            for number in places.of(entry, [listing.file.parent])[0]:
                out.groups.setdefault(number, f"group {entry.group}")
    out.words = {n: words(task, s) for n, s in out.said.items()}
    counts["pictures or volumes without truth"] = len(found.inputs) - len(out.said)
    out.counts = {k: n for k, n in counts.items() if n}
    out.notes = [f"{k}: {n}" for k, n in out.counts.items()]
    return out


def _say(
    out: Truth, nearest, number: int, depth: int, entry: Entry, listing: Listing, said: Said, counts
) -> None:
    """Keeps the nearest of what is said about an input."""
    before = nearest.get(number)
    if before and depth == before[0]:
        counts["rows that repeat another"] += 1
        if out.said[number] != said:
            lines = f"{before[2].file.name} line {before[1].line} and {listing.file.name} line {entry.line}"
            raise DataError(f"{lines} say different things about one picture", "correct the list")
    if not before or depth > before[0]:
        nearest[number] = (depth, entry, listing)
        out.said[number] = said
    if entry.group and (not before or depth >= before[0]):
        out.groups[number] = f"group {entry.group}"


class _Places:
    """Inputs by the names of their files and of all folders above them."""

    def __init__(self, found: Found):
        self._files: dict[str, int] = {}
        self._folders: dict[str, list[int]] = defaultdict(list)
        for number, item in enumerate(found.inputs):
            above: set[str] = set()
            for file in item.files:
                path = os.path.abspath(file)
                self._files[path] = number
                folder = os.path.dirname(path)
                while folder not in above:
                    above.add(folder)
                    folder = os.path.dirname(folder)
            for folder in above:
                self._folders[folder].append(number)

    def of(self, entry: Entry, bases: Sequence[Path]) -> tuple[list[int], int]:
        """(numbers of the inputs, depth of the name: of a file beyond any folder).

        Raises:
            DataError: when it is in several of the folders that were named, and not beside the list.
        """
        names = [os.path.abspath(os.path.join(base, entry.name)) for base in bases]
        for known in (self._files, self._folders):
            there = [n for n in dict.fromkeys(names) if n in known]
            if names[0] not in known and len(set(names[1:-1]) & set(there)) > 1:
                raise DataError(
                    f"line {entry.line} of the truth names {entry.name[:80]!r}, which is in several folders",
                    "write the folder, too",
                )
            if there and known is self._files:
                return [self._files[there[0]]], 1 << 16
            if there:
                return self._folders[there[0]], there[0].count(os.sep)
        return [], 0


# ---- what a row says


# (row, labels that are no class, findings that it calls uncertain) -> what it says, None for nothing.
Reader = Callable[[Entry, Counter[str], Counter[str]], Said | None]


def tells(task: Task | Findings, listing: Listing) -> bool:
    """Whether a list has a column with the truth of a task."""
    titles = {t.casefold() for t in listing.header}
    return listing.has_label or (
        isinstance(task, Findings) and any(k.casefold() in titles for k in task.findings)
    )


def _reader(task: Task | Findings, listing: Listing) -> Reader:
    if isinstance(task, Task):
        return _class_reader(task, listing)
    return _finding_reader(task, listing)


def _class_reader(task: Task, listing: Listing) -> Reader:
    if not listing.has_label:
        raise _no_label(listing, "label, truth or class")
    index = {k: i for i, k in enumerate(task.classes)}

    def read(entry: Entry, unknown: Counter[str], uncertain: Counter[str]) -> Said | None:
        if entry.label and entry.label not in index:
            if entry.label.casefold() in _UNCERTAIN:
                return multilabel.UNKNOWN
            unknown[entry.label] += 1
        return index.get(entry.label)

    return read


def _finding_reader(task: Findings, listing: Listing) -> Reader:
    """One column a finding (1, 0; -1 or u: uncertain; empty: unknown), else a column of names between semicolons."""
    names = list(task.findings)
    folded = {title.casefold(): k for k, title in enumerate(listing.header)}
    columns = [folded.get(n.casefold()) for n in names]
    if all(c is None for c in columns):
        if not listing.has_label:
            raise _no_label(listing, f"label with names between semicolons, or a column for {names[0]!r}")
        return lambda entry, unknown, uncertain: _listed(task, names, entry, unknown)

    def read(entry: Entry, unknown: Counter[str], uncertain: Counter[str]) -> Said | None:
        values = [entry.cells[c].strip() if c is not None and c < len(entry.cells) else "" for c in columns]
        try:
            said = tuple(findings_truth.of_cell(v, "unknown") for v in values)
        except ValueError as e:
            raise DataError(
                f"{listing.file} line {entry.line}: a finding is {e}",
                "1, 0, -1 or u: uncertain, blank: unknown",
            ) from None
        uncertain.update(
            n for n, v, s in zip(names, values, said, strict=True) if v and s == multilabel.UNKNOWN
        )
        return None if set(said) == {multilabel.UNKNOWN} and not uncertain else said

    return read


def _listed(task: Findings, names: Sequence[str], entry: Entry, unknown: Counter[str]) -> Said | None:
    said = {x.strip() for x in entry.label.split(";")} - {""}
    unknown.update(x for x in said if x not in names and x not in task.none and x not in task.ignore)
    clear = said & set(task.none)
    if clear and said & set(names):
        raise DataError(f"line {entry.line} of the truth has findings and says {min(clear)!r}")
    if not said - set(task.ignore):
        return None
    rest = multilabel.ABSENT if clear else multilabel.UNLISTED[task.unlisted]
    return tuple(multilabel.PRESENT if n in said else rest for n in names)


def _no_label(listing: Listing, what: str) -> DataError:
    titles = ", ".join(t[:40] for t in listing.header[:12])
    return DataError(f"{listing.file} has no column with the truth", f"{what}; there are: {titles}")


def _no_class(task: Task | Findings, unknown: Counter[str]) -> DataError:
    names = list(task.classes) if isinstance(task, Task) else list(task.findings)
    parts = [f"{k[:60]!r} x{n}" for k, n in sorted(unknown.items())[:20]]
    more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
    hint = did_you_mean(min(unknown), names)
    return DataError(
        f"the truth has labels that are no class: {', '.join(parts)}{more}.{hint}",
        f"the classes are {', '.join(names)}",
    )


def words(task: Task | Findings, said: Said) -> str:
    """The truth of a picture in a cell."""
    if isinstance(said, int):
        return list(task.classes)[said] if isinstance(task, Task) else ""
    names = task.findings if isinstance(task, Findings) else ()
    return "; ".join(k for k, v in zip(names, said, strict=True) if v == multilabel.PRESENT) or "none"


def is_right(names: Sequence[str], said: Said, found: Sequence[str]) -> bool:
    """Whether what was found is the truth; findings that are unknown do not count.

    Example:
        >>> is_right(["mass", "edema"], (1, -1), ["mass", "edema"]), is_right(["ct", "mri"], 1, ["ct"])
        (True, False)
    """
    if isinstance(said, int):
        return list(found) == [names[said]]
    known = ((k, v) for k, v in zip(names, said, strict=True) if v != multilabel.UNKNOWN)
    return all((k in found) == (v == multilabel.PRESENT) for k, v in known)


# ---- how right the scores are


@dataclass(slots=True, kw_only=True)
class Judged:
    """The metrics of a set of predictions."""

    values: dict[str, metrics.Value]
    main: str  # which of them is the task's own
    n: int
    subjects: int
    notes: list[str]
    curves: curves.Curves
    json: dict[str, Any]


def judge(
    asked: Question, found: Predictions, truth: Truth, *, resamples: int = 1000, in_sample: bool = False
) -> Judged | None:
    """Metrics of all pictures whose truth is known, with intervals by subject; None where there is no such picture.

    Every slice counts, and of a slide its mean. Subjects are the groups of the truth, else files and volumes.

    Args:
        asked: what was asked.
        found: the scores.
        truth: see `match`.
        resamples: bootstrap resamples; 0 = no intervals.
        in_sample: whether the calibration may have been fitted on these pictures.

    Raises:
        DataError: when it was, and may not.
    """
    rows = [
        r for r in found.rows if r["input"] in truth.said and (r["kind"] != "slide" or r["frame"] == MEAN)
    ]
    if not rows:
        return None
    groups = [truth.groups.get(r["input"], f"input {r['input']}") for r in rows]
    said = np.array([truth.said[r["input"]] for r in rows])
    ranks = np.stack([r["ranks"] for r in rows])
    p = np.array([list(r["scores"].values()) for r in rows])
    same = _fitted_on(asked, rows, ranks, in_sample)
    if isinstance(asked, Classes):
        m = metrics.classification(ranks, said, asked.names, groups, probabilities=p, resamples=resamples)
        result = TaskResult(task=asked.task, metrics=m)
        drawn = curves.of_classes(asked.names, ranks, said)
    else:
        m = multilabel_metrics.findings(
            p,
            said,
            asked.names,
            groups,
            margins=ranks,
            thresholds=asked.fit.thresholds if asked.fit else None,
            resamples=resamples,
        )
        subjects = tallies.codes(groups)
        keys = [str(r["input"]) for r in rows]
        result = FindingsResult(
            task=asked.task, metrics=m, keys=keys, subjects=subjects, truth=said, margins=ranks
        )
        drawn = curves.of_findings(asked.names, ranks, said)
    head = {"format": FORMAT, "version": VERSION, "resamples": resamples, "truth": dict(truth.counts)}
    if same:
        m.notes.append(f"IN SAMPLE: the calibration was fitted on {same} of {len(rows)} pictures")
    return Judged(
        values=m.values,
        main=asked.task.metric,
        n=m.n,
        subjects=m.subjects,
        notes=m.notes,
        curves=drawn,
        json=head | result.json(),
    )


def _fitted_on(asked: Question, rows: Sequence[dict[str, Any]], ranks: np.ndarray, in_sample: bool) -> int:
    """How many of the pictures the calibration was fitted on."""
    if not asked.fit:
        return 0
    plain = asked.fit.undo(ranks) if isinstance(asked, Classes) else asked.fit.undo(ranks, asked.names)
    return calibration.fitted_on(asked.fit, [Path(r["file"]).as_posix() for r in rows], plain, in_sample)
