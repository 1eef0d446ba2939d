"""Results on disk: results.json is the record; .md, .csv and the report are views of it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from unimed_jax.data import files
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import findings_results
from unimed_jax.evaluate.findings_results import FindingsResult
from unimed_jax.evaluate.metrics import ALL, TITLES, Metrics, Value
from unimed_jax.evaluate.tasks import Task

FORMAT, VERSION = "unimed_jax.results", 1
FILES = (
    "results.json",
    "results.md",
    "results.csv",
    "predictions.csv",
    "examples.json",
)
ERRORS = "errors.csv"  # what of a suite could not be used
USE = "Research use only, not a medical device."
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\0")
_COLUMNS = (
    *("task", "method", "metric", "value", "low", "high", "n", "subjects", "chance"),
    *("prompts_sha256", "model_sha256", "code"),
)
PREDICTED = ("task", "key", "subject", "label", "predicted", "score", "log_scores")


@dataclass(slots=True, kw_only=True)
class Prediction:
    """One record of one task."""

    key: str
    label: str
    predicted: str
    scores: dict[str, float]  # softmax of logit_scale x cosine
    subject: int = 0  # number of its subject within the task, by first occurrence: no identifier
    log_scores: tuple[
        float, ...
    ] = ()  # logarithms of the scores, in the order of the classes: never saturated

    def row(self) -> dict[str, Any]:
        """One line of predictions.csv; the logarithms are what `report --compare` computes with."""
        logs = f"[{', '.join(f'{x:.9g}' for x in self.log_scores)}]"
        return {
            "key": self.key,
            "subject": self.subject,
            "label": self.label,
            "predicted": self.predicted,
            "score": self.scores[self.predicted],
            "log_scores": logs,
        }


@dataclass(slots=True, kw_only=True)
class TaskResult:
    """What a model reached on one task, beside what it has to beat."""

    task: Task
    metrics: Metrics
    predictions: list[Prediction] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)  # hits and misses with thumbnails
    references: dict[str, Metrics] = field(default_factory=dict)
    calibrated: dict[str, Any] = field(default_factory=dict)  # by what, and the figures before and after

    @property
    def main(self) -> Value:
        """The task's own metric."""
        return self.metrics.values[self.task.metric]

    def json(self) -> dict[str, Any]:
        """Everything but predictions and pictures."""
        t, m = self.task, self.metrics
        return {
            "name": t.name,
            "version": t.version,
            "description": t.description,
            "metric": t.metric,
            "chance": t.chance,
            "n": m.n,
            "subjects": m.subjects,
            "classes": list(t.classes),
            "prompts": {
                "sha256": t.digest,
                "shape": t.shape(),
                "classes": {k: list(v) for k, v in t.classes.items()},
            },
            "support": m.support,
            "values": {k: v.json() for k, v in m.values.items()},
            **({"auroc_delong": m.delong.json()} if m.delong else {}),
            "recall": {k: v.json() for k, v in m.recall.items()},
            **m.per_class(),
            "confusion": m.confusion.tolist(),
            "notes": m.notes,
            "references": {
                name: {"n": r.n, "subjects": r.subjects, "values": {k: v.json() for k, v in r.values.items()}}
                for name, r in self.references.items()
            },
            "chances": {k: m.chance(k) for k in m.values},
            **({"calibration": self.calibrated} if self.calibrated else {}),
        }


@dataclass(slots=True, kw_only=True)
class Results:
    """One evaluation: which model, on what, with which code, and every task."""

    COLUMNS: ClassVar[tuple[str, ...]] = _COLUMNS  # of results.csv
    model: dict[str, Any]
    data: dict[str, Any]
    code: dict[str, str]
    settings: dict[str, Any]
    created: str  # UTC, ISO 8601
    tasks: list[TaskResult]
    findings: list[FindingsResult] = field(default_factory=list)  # multi-label tasks

    def figures(self) -> dict[str, float]:
        """{"eval/TASK": value of its metric}; undefined ones are left out."""
        found = {f"eval/{t.task.name}": t.main.value for t in (*self.tasks, *self.findings)}
        return {k: v for k, v in found.items() if v is not None}

    def json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "status": "complete",
            "use": USE,
            "created": self.created,
            "code": self.code,
            "model": self.model,
            "data": self.data,
            "settings": self.settings,
            "tasks": [t.json() for t in self.tasks],
            **({"findings": [t.json() for t in self.findings]} if self.findings else {}),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each metric of the model and of each reference, and for each class's recall and AUROC."""
        return [row for t in (*self.tasks, *self.findings) for row in self.task_rows(t)]

    def task_rows(self, t: TaskResult | FindingsResult) -> Iterable[dict[str, Any]]:
        """The rows of one task."""
        if isinstance(t, FindingsResult):
            yield from self._finding_rows(t)
            return
        for method, m in {"model": t.metrics, **t.references}.items():
            values = m.values | ({"auroc_delong": m.delong} if m.delong else {})
            values |= {f"recall: {k}": v for k, v in m.recall.items()}
            values |= {f"auroc: {k}": v for k, v in m.auroc.items()}
            for metric, v in values.items():
                yield self._row(t, method, m, metric, v)

    def _finding_rows(self, t: FindingsResult) -> Iterable[dict[str, Any]]:
        for finding, n, metric, v, chance in t.figures():
            values = (f"{t.task.name}: {finding}", "model", metric, v.value, v.low, v.high, n)
            hashes = (t.task.digest, self.model["sha256"], self.code["revision"])
            yield dict(zip(_COLUMNS, (*values, t.metrics.subjects, chance, *hashes), strict=True))

    def _row(self, t: TaskResult, method: str, m: Metrics, metric: str, v: Value) -> dict[str, Any]:
        ours = method == "model"
        values = (t.task.name, method, metric, v.value, v.low, v.high, m.n, m.subjects)
        chance = m.chance("auroc" if metric.startswith("auroc") else metric)
        hashes = (t.task.digest if ours else "", self.model["sha256"] if ours else "", self.code["revision"])
        return dict(zip(_COLUMNS, (*values, chance, *hashes), strict=True))

    def markdown(self) -> str:
        """The table of a README or an issue."""
        head = f"model {self.model['name']} (sha256 {self.model['sha256'][:12]}), {self.created}. {USE}"
        columns = ("task", "n (subjects)", "metric", "value [95 % CI]", "chance", "prompts")
        rows: list[Sequence[str]] = [columns, ["---"] * len(columns)]
        for t in self.tasks:
            name, metric, m = t.task.name, t.task.metric, t.metrics
            prompts = f"{t.task.shape()} {t.task.digest[:8]}"
            rows.append(
                (name, f"{m.n} ({m.subjects})", metric, t.main.text(), f"{t.task.chance:.3f}", prompts)
            )
            for reference, r in t.references.items():
                rows.append((f"{name}: {reference}", f"{r.n}", metric, r.values[metric].text(), "", ""))
        for t in self.findings:
            name, m, chance = f"{t.task.name}: mean", t.metrics, "" if t.chance is None else f"{t.chance:.3f}"
            prompts = f"{t.task.shape()} {t.task.digest[:8]}"
            rows.append((name, f"{m.n} ({m.subjects})", t.task.metric, t.main.text(), chance, prompts))
        every = (*self.tasks, *self.findings)
        notes = [f"- {t.task.name}: {note}" for t in every for note in t.metrics.notes]
        notes += [f"- {t.task.name}: calibrated, {words}" for t in every for words in change(t.calibrated)]
        notes += [
            f"- {t.task.name}: AUROC by DeLong {t.metrics.delong.text()}"
            for t in self.tasks
            if t.metrics.delong
        ]
        values = "All values; their intervals are in results.csv."
        wide = self._wide() if self.tasks else []
        each = [line for t in self.findings for line in ("", f"{t.task.name}:", "", *_findings_table(t))]
        return "\n".join([head, "", *_lines(rows), "", values, "", *wide, *each, "", *notes]).rstrip() + "\n"

    def _wide(self) -> list[str]:
        """A column for every metric, without intervals: those would not fit."""
        columns = ("task", *(TITLES.get(k, k.replace("_", " ")) for k in ALL))
        rows: list[Sequence[str]] = [columns, ["---"] * len(columns)]
        for t in self.tasks:
            for name, m in {"": t.metrics, **t.references}.items():
                figures = (m.values[k].value for k in ALL)
                shown = ("–" if v is None else f"{v:.3f}" for v in figures)
                rows.append((f"{t.task.name}: {name}" if name else t.task.name, *shown))
        return _lines(rows)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes results.json, .md, .csv, predictions.csv and examples.json; results.json last, so it marks the end.

        Raises:
            UsageError: when the folder holds results and `force` is not given.
            DataError: when the disk is full or the folder cannot be written.
        """
        folder = Path(folder)
        check_target(folder, force=force)
        predictions = [{"task": t.task.name} | p.row() for t in self.tasks for p in t.predictions]
        examples = {t.task.name: t.examples for t in (*self.tasks, *self.findings)}
        texts = {
            "examples.json": json.dumps(examples),
            "predictions.csv": to_csv(predictions, PREDICTED),
            "results.csv": to_csv(self.rows(), self.COLUMNS),
            "results.md": self.markdown(),
            "results.json": json.dumps(self.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        }
        if self.findings:
            rows = [r for t in self.findings for r in t.records()]
            texts = {findings_results.FILE: to_csv(rows, findings_results.COLUMNS)} | texts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.findings:
                (folder / findings_results.FILE).unlink(missing_ok=True)
            (folder / FILES[0]).unlink(
                missing_ok=True
            )  # half-replaced files must not look like a whole result
            for name, text in texts.items():
                files.write_text(folder / name, text)
        except OSError as e:
            raise DataError(
                f"{folder} cannot be written: {e.strerror or e}", "free space or check permissions"
            ) from e
        return folder


def check_target(folder: Path, *, force: bool) -> None:
    """Refuses a folder in which something would be replaced: results, or anything that has the name of a part of them.

    Raises:
        UsageError: naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, results are a folder", "choose another --out")
    there = [n for n in (*FILES, findings_results.FILE, ERRORS) if (folder / n).exists()]
    if there and not force:
        raise UsageError(
            f"{folder} holds results already ({there[0]})", "choose another --out, or --force to replace them"
        )


def read(folder: str | Path) -> dict[str, Any]:
    """The content of a results.json.

    Raises:
        DataError: when it is missing, damaged or of another version.
    """
    path = Path(folder) / FILES[0]
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read ({type(e).__name__})", "unimed-jax eval writes one") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise DataError(f"{path} holds no results that this program reads", "evaluate again")
    return found


def _lines(rows: Iterable[Sequence[str]]) -> list[str]:
    r"""Rows of a Markdown table; names of classes may hold anything.

    Example:
        >>> _lines([("a|b", "<i>")])
        ['| a\\|b | &lt;i> |']
    """
    safe = lambda text: " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return [f"| {' | '.join(map(safe, row))} |" for row in rows]


def _findings_table(t: FindingsResult) -> list[str]:
    head, *rest = t.table()
    return _lines([head, ["---"] * len(head), *rest])


def change(calibrated: Mapping[str, Any]) -> list[str]:
    """What a calibration changed, in words; nothing where none was applied.

    Example:
        >>> side = lambda x: {"value": x, "low": None, "high": None}
        >>> change({"figures": {"ece": {"before": side(0.2), "after": side(0.05)}}, "fitted_here": 0})
        ['ECE 0.200 to 0.050']
    """
    if not calibrated:
        return []
    text = lambda v: Value(v["value"], v["low"], v["high"]).text()
    sides = {_FIGURES[k]: v for k, v in calibrated["figures"].items() if v["before"]["value"] is not None}
    words = "; ".join(f"{k} {text(v['before'])} to {text(v['after'])}" for k, v in sides.items())
    out = [words] if words else []
    same = calibrated["fitted_here"]
    return out + ([f"IN SAMPLE: {same} of the records were used to fit"] if same else [])


_FIGURES = {"ece": "ECE", "nll": "negative log-likelihood", "brier": "Brier score"}


def cell(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula; numbers stay numbers, None is empty.

    Example:
        >>> cell("=1+1"), cell(-0.5), cell(None)
        ("'=1+1", -0.5, '')
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    quote = "'" if value.startswith(_FORMULA) else ""
    return quote + re.sub(r"[\0\t\r\n]", " ", value)


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV with safe cells; floats with six digits."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([cell(c) for c in columns])
    for row in rows:
        values = (row.get(c) for c in columns)
        table.writerow([f"{v:.6g}" if isinstance(v, float) else cell(v) for v in values])
    return out.getvalue()
