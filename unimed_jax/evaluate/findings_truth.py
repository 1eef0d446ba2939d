"""What is known about the findings of records, and of rows of a table: present, absent or unknown, gaps counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import tasks
from unimed_jax.evaluate.multilabel import ABSENT, PRESENT, UNKNOWN, UNLISTED, Findings

if TYPE_CHECKING:
    from unimed_jax.data.record import Example

_CELLS = {"1": PRESENT, "0": ABSENT, "-1": UNKNOWN, "u": UNKNOWN, "uncertain": UNKNOWN}


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known about the records of a task."""

    truth: Int[np.ndarray, "n f"]  # PRESENT, ABSENT or UNKNOWN
    notes: tuple[str, ...] = ()  # how gaps were counted


def select(task: Findings, examples: Mapping[int, Example]) -> tuple[list[int], Truth]:
    """Which records belong to a task, with the truth of every finding, before anything is computed.

    A record belongs when it passes `where` and says anything: a finding, its absence, uncertainty, or one of `none`.

    Raises:
        DataError: for labels that are no finding (all of them), a record that calls a finding two things, and when no
            record is left, with what was asked for.
    """
    order = {k: i for i, k in enumerate(task.findings)}
    picked: list[int] = []
    rows: list[np.ndarray] = []
    unknown: Counter[str] = Counter()
    unlabelled = unlisted = 0
    for i, e in examples.items():
        if not all(set(tasks.values_of(e, name)) & set(accepted) for name, accepted in task.where.items()):
            continue
        said = _said(task, e)
        unknown.update(k for k in said if k not in order and k not in task.none and k not in task.ignore)
        if not said.keys() & (order.keys() | set(task.none)):
            unlabelled += 1
            continue
        found = {k: v for k, v in said.items() if k in order}
        clear = any(said.get(k) == PRESENT for k in task.none)
        if clear and PRESENT in found.values():
            raise DataError(f"task {task.name}: record {e.key} has findings and says that it has none")
        row = np.full(len(order), ABSENT if clear else UNLISTED[task.unlisted], np.int8)
        unlisted += 0 if clear else len(order) - len(found)
        for k, v in found.items():
            row[order[k]] = v
        picked.append(i)
        rows.append(row)
    if unknown:
        parts = ", ".join(f"{v!r} x{n}" for v, n in sorted(unknown.items()))
        raise DataError(
            f"task {task.name}: labels that are no finding: {parts}",
            "add findings, or list them under ignore",
        )
    if not picked:
        asked = ", ".join(f"{k} in {list(v)}" for k, v in task.where.items()) or "all records"
        raise DataError(
            f"task {task.name}: none of {len(examples)} records has {task.label} ({asked})",
            "unimed-jax data stats shows the labels of a folder",
        )
    return picked, Truth(np.stack(rows), tuple(_notes(task, unlisted, unlabelled)))


def _said(task: Findings, e: Example) -> dict[str, int]:
    """What a record says about each of its values."""
    out: dict[str, int] = {}
    for prefix, value in ((task.label, PRESENT), (task.absent, ABSENT), (task.uncertain, UNKNOWN)):
        for name in tasks.values_of(e, prefix) if prefix else ():
            if out.setdefault(name, value) != value:
                raise DataError(f"task {task.name}: record {e.key} says two things about {name!r}")
    return out


def of_cell(text: str, blank: str) -> int:
    """What a cell of a table says about its column's finding: 1, 0, -1 or u (uncertain), or blank.

    Raises:
        ValueError: for anything else.

    Example:
        >>> of_cell("1.0", "absent"), of_cell(" ", "unknown"), of_cell("-1", "absent")
        (1, -1, -1)
    """
    word = text.strip().lower()
    if not word:
        return UNLISTED[blank]
    found = _CELLS.get(word.removesuffix(".0"))
    if found is None:
        raise ValueError(f"{text[:40]!r} is neither 1, 0, -1 nor blank")
    return found


def of_list(
    text: str, separator: str, labels: Mapping[str, int], count: int, none: Sequence[str], blank: str
) -> tuple[list[int], list[str]]:
    """What a cell with several names says about every finding, and its names that are none.

    Example:
        >>> of_list("Mass|Nodule", "|", {"Mass": 1}, 2, ["No Finding"], "unknown")
        ([0, 1], ['Nodule'])
        >>> of_list("No Finding", "|", {"Mass": 1}, 2, ["No Finding"], "unknown")
        ([0, 0], [])
    """
    names = [n.strip() for n in text.split(separator) if n.strip()]
    if not names:
        return [UNLISTED[blank]] * count, []
    found = {labels[n] for n in names if n in labels}
    return [int(i in found) for i in range(count)], [n for n in names if n not in labels and n not in none]


def _notes(task: Findings, unlisted: int, unlabelled: int) -> list[str]:
    out = []
    if unlisted:
        out.append(f"{unlisted} findings that records do not list count as {task.unlisted}")
    if unlabelled:
        out.append(f"{unlabelled} records without any label of the task are left out")
    return out
