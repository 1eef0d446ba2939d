"""What an evaluation wrote about every record, read back: for comparisons, calibration and curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from unimed_jax.errors import DataError
from unimed_jax.evaluate import findings_results, results, tallies

Rows = list[dict[str, str]]
_AGAIN = "evaluate again"
_TRUTH = {"1": 1, "0": 0, "": -1}


@dataclass(frozen=True, slots=True)
class Scored:
    """The records of one task."""

    keys: list[str]
    subjects: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    log_scores: Float[np.ndarray, "n c"]


@dataclass(frozen=True, slots=True)
class ScoredFindings:
    """The records of one multi-label task."""

    keys: list[str]
    subjects: Int[np.ndarray, "n"]
    truth: Int[np.ndarray, "n f"]  # 1, 0 or -1
    margins: Float[np.ndarray, "n f"]


def predictions(folder: str | Path) -> dict[str, Rows]:
    """The rows of predictions.csv by task.

    Raises:
        DataError: when it is missing, damaged or of an earlier version.
    """
    return _read(Path(folder) / "predictions.csv", results.PREDICTED)


def findings(folder: str | Path) -> dict[str, Rows]:
    """The rows of findings.csv by task.

    Raises:
        DataError: when it is missing or damaged.
    """
    return _read(Path(folder) / findings_results.FILE, findings_results.COLUMNS)


def _read(path: Path, columns: Sequence[str]) -> dict[str, Rows]:
    try:
        with path.open(encoding="utf-8", newline="") as f:
            table = csv.DictReader(f)
            lacking = [c for c in columns if c not in (table.fieldnames or ())]
            found: dict[str, Rows] = {}
            for row in table:
                found.setdefault(row["task"] if not lacking else "", []).append(row)
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"{path} cannot be read ({type(e).__name__})", "unimed-jax eval writes one") from e
    if lacking:
        raise DataError(f"{path} has no column {lacking[0]!r}, an earlier version made it", _AGAIN)
    return found


def scored(name: str, rows: Sequence[Mapping[str, str]], classes: Sequence[str]) -> Scored:
    """The arrays of one task.

    Raises:
        DataError: for a label that is no class, or rows without one logarithm a class.
    """
    place = {results.cell(c): i for i, c in enumerate(classes)}
    strange = [r["label"] for r in rows if r["label"] not in place]
    if strange:
        raise DataError(
            f"task {name}: predictions.csv has the label {strange[0]!r}, which is no class", _AGAIN
        )
    try:
        logs = np.array([json.loads(r["log_scores"]) for r in rows], np.float64)
    except (ValueError, TypeError):
        logs = np.zeros(0)
    if logs.shape != (len(rows), len(classes)):
        raise DataError(
            f"task {name}: predictions.csv does not hold {len(classes)} log_scores in each row", _AGAIN
        )
    return Scored(
        [r["key"] for r in rows],
        tallies.codes([r["subject"] for r in rows]),
        np.array([place[r["label"]] for r in rows], np.int64),
        logs,
    )


def scored_findings(name: str, rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> ScoredFindings:
    """The arrays of one multi-label task: one row a record and finding, all findings of a record together.

    Raises:
        DataError: when a record does not have exactly the findings, or a figure is none.
    """
    width, wanted = len(names), [results.cell(n) for n in names]
    bad = len(rows) % width or any(
        [r["finding"] for r in rows[i : i + width]] != wanted for i in range(0, len(rows), width)
    )
    try:
        truth = np.array([_TRUTH[r["truth"]] for r in rows], np.int64)
        margins = np.array([float(r["margin"].strip("[]")) for r in rows])
    except (ValueError, KeyError, AttributeError):
        bad, truth, margins = True, np.zeros(0), np.zeros(0)
    if bad:
        raise DataError(f"task {name}: {findings_results.FILE} is damaged", _AGAIN)
    first = rows[::width]
    return ScoredFindings(
        [r["key"] for r in first],
        tallies.codes([r["subject"] for r in first]),
        truth.reshape(-1, width),
        margins.reshape(-1, width),
    )
