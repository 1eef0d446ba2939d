"""Results of a suite: every set's metrics, averages that never mix metrics, and what was missing or left out.

The files are those of `results`, so that reports and comparisons read them; results.json also holds

    datasets.<set>.metrics.<metric>.{value, low, high}   fractions, intervals by subject
    datasets.<set>.auroc_per_class.<class>.{value, low, high}   one class against the rest, of three or more
    datasets.<set>.reference.<metric>                    percent, as the original computes it (--protocol reference)
    averages.<metric>.{overall, <modality>}              unweighted means over sets, {value, sets}

results.csv has one more column, the modality: that of the set, or the group that a mean is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from unimed_jax.config import MODALITIES
from unimed_jax.data import files
from unimed_jax.errors import DataError
from unimed_jax.evaluate import results, suites
from unimed_jax.evaluate.findings_results import FindingsResult
from unimed_jax.evaluate.metrics import METRICS, TITLES, Metrics, Value
from unimed_jax.evaluate.results import Results, TaskResult

OVERALL, OTHER = "overall", "other"
_REFERENCE = {  # figures of the original as a reader knows them
    "auc_roc": "AUROC",
    "f1_score": "F1",
    "precision_score": "precision",
    "recall_score": "recall",
}
_RANGE = ("minimum", "median", "maximum")


@dataclass(slots=True, kw_only=True)
class SetResult:
    """One set of a suite."""

    data_set: suites.DataSet
    task: TaskResult | FindingsResult
    prompts: str  # where they come from
    notes: list[str]
    bad: list[dict[str, str]]  # file, reason
    repeated: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    annotations: str = ""  # sha256 of the set's list
    reference: dict[str, float | None] = field(default_factory=dict)  # percent
    sensitivity: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Its entry under `datasets`."""
        s, m = self.data_set, self.task.metrics
        out = {
            "modality": s.modality,
            "metric": s.metric,
            "in_average": s.average,
            "n": m.n,
            "subjects": m.subjects,
            "classes": list(s.classes),
            "metrics": {k: v.json() for k, v in m.values.items()},
            **(m.per_class() if isinstance(m, Metrics) else {}),
            "prompts": {"sha256": self.task.task.digest, "from": self.prompts},
            "annotations_sha256": self.annotations,
            "bad": len(self.bad),
            "repeated": self.repeated,
            "left_out": self.left_out,
            "notes": self.notes,
        }
        for key in ("reference", "sensitivity", "parts"):
            if getattr(self, key):
                out[key] = getattr(self, key)
        return out


@dataclass(kw_only=True)
class SuiteResults(Results):
    """One evaluation of a suite."""

    COLUMNS: ClassVar[tuple[str, ...]] = (*Results.COLUMNS, "modality")
    suite: suites.Suite
    prompt_source: dict[str, str]
    protocol: str
    tasks: list[TaskResult] = field(default_factory=list)
    sets: list[SetResult] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)  # set, status, reason, remedy

    def add(self, found: SetResult) -> None:
        """Takes one more set."""
        self.sets.append(found)
        if isinstance(found.task, FindingsResult):
            self.findings.append(found.task)
        else:
            self.tasks.append(found.task)

    @property
    def bad(self) -> list[dict[str, str]]:
        """Pictures and rows that could not be used, of all sets."""
        return [{"set": s.data_set.name} | b for s in self.sets for b in s.bad]

    @property
    def complete(self) -> bool:
        """Whether every set of the average is there with every picture."""
        return not self.failed and not self.bad and not self.lacking

    @property
    def lacking(self) -> list[str]:
        """Sets of the suite's average that were not asked for."""
        asked = {s.name for s in self.suite.sets}
        return [n for n in self.suite.average if n not in asked]

    def averages(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Metric -> modality or "overall" -> {value, sets}: means over the sets of the average that have a value."""
        none = Value(None)
        values = {
            k: {s.data_set.name: s.task.metrics.values.get(k, none).value for s in self.sets} for k in METRICS
        }
        out = {k: self._means(v) for k, v in values.items()}
        if self.protocol == "reference":
            percent = {s.data_set.name: s.reference.get("accuracy") for s in self.sets}
            out["reference_accuracy_percent"] = self._means(percent)
        return out

    def _means(self, values: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
        groups: dict[str, list[float]] = {OVERALL: []}
        for s in self.sets:
            value = values[s.data_set.name]
            if s.data_set.average and value is not None:
                groups[OVERALL].append(value)
                groups.setdefault(s.data_set.modality or OTHER, []).append(value)
        order = [OVERALL, *MODALITIES, OTHER]
        return {k: _mean(groups[k]) for k in order if k in groups}

    def json(self) -> dict[str, Any]:
        """The content of results.json."""
        extra = {
            "suite": {
                "name": self.suite.name,
                "version": self.suite.version,
                "sha256": self.suite.sha256,
                "complete": self.complete,
            },
            "protocol": self.protocol,
            "prompts": self.prompt_source,
            "datasets": {s.data_set.name: s.json() for s in self.sets},
            "averages": self.averages(),
            "published": list(self.suite.published),
            "failed": self.failed,
        }
        return Results.json(self) | extra

    def rows(self) -> list[dict[str, Any]]:
        """Every figure of the sets, then the averages (their n counts sets), then what else there is.

        That is: the original's figures in percent, single prompts, parts of sets, and published averages beside a
        complete suite.
        """
        at = {id(s.task): s.data_set.modality or OTHER for s in self.sets}
        out = [
            row | {"modality": at[id(t)]} for t in (*self.tasks, *self.findings) for row in self.task_rows(t)
        ]
        for metric, groups in self.averages().items():
            for name, m in groups.items():
                row = {"task": f"mean: {name}", "method": "model", "metric": metric, "value": m["value"]}
                out.append(row | {"n": m["sets"], "model_sha256": self.model["sha256"], "modality": name})
        out += [row for s in self.sets for row in self._more_rows(s)]
        for p in self.suite.published if self.complete else ():
            head = {"method": f"published: {p['name']}, {p['source']}", "metric": "accuracy_percent"}
            for groups, values in published_groups(p):
                group, unknown = " / ".join(groups), ", order unknown" * (len(values) > 1)
                row = head | {"task": f"mean: {group}{unknown}", "modality": group}
                out += [row | {"value": float(v)} for v in values]
        return out

    def _more_rows(self, s: SetResult) -> Iterable[dict[str, Any]]:
        d, m = s.data_set, s.task.metrics
        hashes = {"prompts_sha256": s.task.task.digest, "model_sha256": self.model["sha256"]}
        common = hashes | {"code": self.code["revision"], "modality": d.modality or OTHER}
        whole = common | {"task": d.name, "n": m.n, "subjects": m.subjects}
        for name, value in s.reference.items():
            metric = f"reference_{name}_percent"
            yield whole | {"method": "reference protocol", "metric": metric, "value": value}
        for name in _RANGE if s.sensitivity else ():
            method = f"{s.sensitivity['prompts']} single prompts"
            metric = f"{s.sensitivity['metric']}: {name}"
            yield whole | {"method": method, "metric": metric, "value": s.sensitivity[name]}
        for name, part in s.parts.items():
            row = {"task": f"{d.name}: {name}", "method": "model", "metric": "accuracy"}
            yield common | row | {"value": part["accuracy"], "n": part["n"]}

    def markdown(self) -> str:
        """The averages and the sets, and then what every evaluation says."""
        lines = [f"# {self.suite.name}", "", *self._mean_lines(), "", *self._set_lines(), ""]
        notes = [f"- {s.data_set.name}: {n}" for s in self.sets for n in s.notes]
        notes += [f"- {f['set']}: {f['status']}: {f['reason']}. {f['remedy']}".rstrip() for f in self.failed]
        return "\n".join([*lines, *notes, ""]) + "\n" + Results.markdown(self)

    def _mean_lines(self) -> list[str]:
        out = ["| mean over sets | metric | value | sets |", "| --- | --- | --- | --- |"]
        for metric, groups in self.averages().items():
            for name, m in groups.items():
                out.append(f"| {name} | {words(metric)} | {number(metric, m['value'])} | {m['sets']} |")
        for p in self.suite.published if self.complete else ():
            for name, value in published_lines(p):
                out.append(f"| {name}: {p['name']}, {p['source']} | accuracy, percent | {value} | |")
        return out

    def _set_lines(self) -> list[str]:
        out = ["| set | modality | n | metric | value [95 % CI] |", "| --- | --- | --- | --- | --- |"]
        for s in self.sets:
            d = s.data_set
            head = f"| {d.name} | {d.modality} | {s.task.metrics.n} |"
            out.append(f"{head} {words(d.metric)} | {s.task.main.text()} |")
            for metric, value in s.reference.items():
                name = f"reference {words(metric)}, percent"
                out.append(f"{head} {name} | {'undefined' if value is None else f'{value:.2f}'} |")
            if s.sensitivity:
                out.append(f"{head} {words(d.metric)}, single prompts | {spread(s.sensitivity)} |")
            for name, p in s.parts.items():
                out.append(
                    f"| {d.name}: {name} | | {p['n']} | accuracy | {number('accuracy', p['accuracy'])} |"
                )
        return out

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes what `Results.save` writes, and errors.csv when pictures or rows could not be used.

        Raises:
            UsageError, DataError: see `Results.save`.
        """
        out = Results.save(self, folder, force=force)
        try:
            if self.bad:
                files.write_text(out / results.ERRORS, results.to_csv(self.bad, ("set", "file", "reason")))
            else:
                (out / results.ERRORS).unlink(missing_ok=True)
        except OSError as e:
            raise DataError(f"{out / results.ERRORS} cannot be written: {e.strerror or e}") from e
        return out


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"value": sum(values) / len(values) if values else None, "sets": len(values)}


def published_groups(p: Mapping[str, Any]) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """A published average as (groups, percent): one of each, or several that the source does not tell apart."""
    figures = {OVERALL: p["overall"], **p.get("modalities", {})}
    lost = p.get("unassigned")
    unknown = [(tuple(lost["modalities"]), tuple(lost["values"]))] if lost else []
    return [*(((k,), (v,)) for k, v in figures.items()), *unknown]


def published_lines(p: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A published average as (group, figure); two columns that cannot be told apart stay together."""
    shown = lambda values: " and ".join(f"{v:.2f}" for v in values) + ", order unknown" * (len(values) > 1)
    return [(" / ".join(groups), shown(values)) for groups, values in published_groups(p)]


def words(metric: str) -> str:
    """A metric's name for readers."""
    known = {**TITLES, **_REFERENCE, "reference_accuracy_percent": "accuracy, percent (reference)"}
    return known.get(metric, metric.replace("_", " "))


def number(metric: str, value: float | None) -> str:
    """An average for readers."""
    if value is None:
        return "undefined"
    return f"{value:.2f}" if metric.endswith("percent") else f"{value:.3f}"


def spread(found: Mapping[str, Any]) -> str:
    """The range over single prompts in words."""
    if found["median"] is None:
        return "undefined"
    return f"{found['minimum']:.3f} to {found['maximum']:.3f}, median {found['median']:.3f} of {found['prompts']}"
