"""One self-contained HTML page of a run, an evaluation or a set of predictions (extra `report`).

Nothing in the page is loaded from elsewhere: styles, plots and thumbnails are inside. It follows the reader's light or
dark theme and fits a phone.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import __version__
from unimed_jax.data import files
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import curves, metrics, plots, results, suite_page

LARGE = 24  # classes; a table of more cannot be read
MOST = 15  # confusions that are named beside a large matrix
TEMPLATES = Path(__file__).parent / "templates"
_CONFIG = (  # settings that a reader of a report asks for first
    ("batch_size", "Batch size"),
    ("optim.lr", "Learning rate"),
    ("optim.weight_decay", "Weight decay"),
    ("optim.freeze", "Frozen"),
    ("loss.kind", "Loss"),
    ("model.dtype", "Precision"),
    ("seed", "Seed"),
)


def require() -> None:
    """Refuses early, before hours of work, when the extra is not installed.

    Raises:
        DataError: with the pip line.
    """
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise DataError(f"the report needs {name}, which is not installed", plots.PIP)


def from_run(folder: str | Path) -> dict[str, Any]:
    """Collects the page of a run folder or a results folder.

    Raises:
        UsageError: when there is no such folder.
        DataError: when it holds neither results nor metrics, or they are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}", "give a run folder or the --out of unimed-jax eval")
    found = newest_results(folder)
    lines = plots.read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    if found is None and not lines:
        raise DataError(
            f"{folder} holds neither results.json nor metrics.jsonl", "unimed-jax eval writes results"
        )
    page: dict[str, Any] = {
        "title": folder.resolve().name,
        "curves": plots.curves(lines) if lines else [],
        "tasks": [],
    }
    if found is not None:
        stored, shown = results.read(found), _examples(found)
        page["facts"] = _result_facts(stored)
        drawn = curves.of_folder(found, stored)
        page["tasks"] = [_task(t, shown.get(t["name"], []), drawn.get(t["name"])) for t in stored["tasks"]]
        page["findings"] = [
            _findings(t, drawn.get(t["name"]), shown.get(t["name"], [])) for t in stored.get("findings", ())
        ]
        page["calibrated"] = "calibration" in stored["settings"]
        page["title"] = stored["model"]["name"]
        if "datasets" in stored:
            page["title"] = f"{stored['suite']['name']}: {page['title']}"
            page["suite"] = suite_page.collect(stored)
    run = _json(folder / "config.json")
    if isinstance(run, dict) and "batch_size" in run:
        page["settings"] = [(name, _lookup(run, path)) for path, name in _CONFIG]
        page["title"] = f"{run.get('name', '')}: {page['title']}" if run.get("name") else page["title"]
    if lines:
        page["last"] = _last(lines)
    return page


def from_predictions(
    run: Mapping[str, Any],
    pictures: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
    errors: Sequence[Mapping[str, str]],
    judged: Mapping[str, Any] | None = None,
    drawn: curves.Curves | None = None,
) -> dict[str, Any]:
    """Collects the page of `unimed-jax predict`.

    Args:
        run: the content of OUT.run.json.
        pictures: examples with thumbnails, as in examples.json; `label` and `hit` only where the truth is known.
        counts: class -> number of pictures that it was predicted for.
        errors: {file, reason} of what could not be read.
        judged: the content of OUT.metrics.json.
        drawn: the curves of the same.
    """
    total = run["pictures"]
    rows = [(name, n, n / total if total else 0.0) for name, n in counts.items()]
    facts = [
        ("Model", f"{run['model']['name']}, sha256 {run['model']['sha256'][:12]}"),
        (
            "Prompts",
            f"{run['prompts']['name']}, {run['prompts']['shape']}, sha256 {run['prompts']['sha256'][:12]}",
        ),
        ("Pictures", f"{total} from {run['files']} files, of which {len(errors)} failed"),
        ("Made", run["created"]),
    ]
    page = {
        "title": "Predictions",
        "facts": facts,
        "asked": "Findings seen" if run["settings"].get("multilabel") else "Predicted classes",
        "predicted": rows,
        "pictures": [_shown(p) for p in pictures],
        "errors": [dict(e) for e in errors],
        "calibrated": bool(run["settings"].get("calibration_sha256")),
        "saliency": run["settings"].get("saliency"),
        "tasks": [],
        "curves": [],
    }
    if judged and "confusion" in judged:
        known = sorted((p for p in pictures if "hit" in p), key=lambda p: -max(p["scores"].values()))
        page["tasks"] = [_task(judged, known, drawn) | {"gallery": "the surest of those shown first"}]
        page["pictures"] = [_shown(p) for p in pictures if "hit" not in p]
    elif judged:
        page["findings"] = [_findings(judged, drawn)]
    return page


def compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a comparison (`compare.folders`): one table a task, its own metric first."""
    tables = []
    for t in found["tasks"]:
        order = sorted(t["values"], key=lambda k: k != t["metric"])
        rows = [{"name": words(k), "ours": k == t["metric"], **t["values"][k]} for k in order]
        tables.append({**t, "title": _title(t["name"]), "rows": rows})
    return {**found, "tables": tables}


def write(page: Mapping[str, Any], out: str | Path) -> Path:
    """Renders a page and writes it, atomically.

    Raises:
        DataError: without jinja2, or when the file cannot be written.
    """
    out = Path(out)
    text = render(page)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, text)
    except OSError as e:
        raise DataError(f"{out} cannot be written: {e.strerror or e}", "choose another --out") from e
    return out


def render(page: Mapping[str, Any]) -> str:
    """The HTML of a page; every text in it is escaped.

    Raises:
        DataError: without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise DataError("the report needs jinja2, which is not installed", plots.PIP) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.0f} %"
    environment.filters["words"] = words
    environment.filters["signed"] = lambda x: "–" if x is None else f"{x:+.3f}"
    environment.filters["figure"] = lambda x: "–" if x is None else f"{x:.3f}"
    return environment.get_template("report.html.j2").render(page=page, use=results.USE, version=__version__)


def newest_results(folder: Path) -> Path | None:
    """The folder of the newest results.json in a run or results folder."""
    found = [p.parent for p in (folder / "results.json", *folder.glob("eval/**/results.json")) if p.is_file()]
    return max(found, key=lambda p: (p / "results.json").stat().st_mtime_ns) if found else None


def _examples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    stored = _json(folder / "examples.json")
    return stored if isinstance(stored, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _lookup(run: Mapping[str, Any], path: str) -> str:
    value: Any = run
    for name in path.split("."):
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _last(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= line
    wanted = {"step": "Steps", "loss": "Loss", "logit_scale": "Logit scale", "images_per_s": "Images / s"}
    show = lambda v: f"{v:,.4g}" if isinstance(v, float) else str(v)
    return [(title, show(newest[name])) for name, title in wanted.items() if name in newest]


def _result_facts(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    sources = stored["data"]["sources"].items()
    code = stored["code"]
    return [
        (
            "Model",
            f"{stored['model']['name']}, sha256 {stored['model']['sha256'][:12]}, {stored['model']['dtype']}",
        ),
        (
            "Data",
            "; ".join(f"{name}, {s['records']} records, split {s['split'] or '–'}" for name, s in sources),
        ),
        ("Made", stored["created"]),
        (
            "Code",
            f"unimed_jax {code['version']}" + (f", {code['revision'][:12]}" if code["revision"] else ""),
        ),
        ("Intervals", f"95 %, {stored['settings']['resamples']} bootstrap resamples by subject"),
    ]


def _task(
    t: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], drawn: curves.Curves | None = None
) -> dict[str, Any]:
    rows = [
        {"name": "this model", "n": t["n"], "subjects": t["subjects"], "values": t["values"], "ours": True}
    ]
    rows += [{"name": name, **r, "ours": False} for name, r in t["references"].items()]
    return {
        **t,
        "title": _title(t["name"]),
        "description": t["description"].rstrip("."),
        "main": t["values"][t["metric"]],
        "rows": rows,
        "metrics": _metric_rows(t, rows),
        "plot": plots.intervals(t),
        **_confusion(t),
        **_drawn(t, drawn),
        "hits": [_shown(e) for e in shown if e["hit"]],
        "misses": [_shown(e) for e in shown if not e["hit"]],
    }


def _metric_rows(t: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each metric, the task's own first; DeLong's interval below the bootstrap's."""
    chances = t.get("chances", {})
    order = sorted(t["values"], key=lambda k: k != t["metric"])
    out = []
    for k in order:
        out.append(
            {
                "name": words(k),
                "ours": k == t["metric"],
                "values": [m["values"].get(k) for m in methods],
                "chance": chances.get(k),
            }
        )
        if k == "auroc" and "auroc_delong" in t:
            values = [t["auroc_delong"]] + [None] * (len(methods) - 1)
            out.append({"name": "AUROC, DeLong's interval", "ours": False, "values": values, "chance": None})
    return out


def words(metric: str) -> str:
    """A metric's name for readers; calibration errors say that less is better.

    Example:
        >>> words("balanced_accuracy"), words("ece")
        ('balanced accuracy', 'ECE (lower is better)')
    """
    name = metrics.TITLES.get(metric, metric.replace("_", " "))
    return f"{name} (lower is better)" if metric in metrics.LOWER_IS_BETTER else name


def _title(name: str) -> str:
    """A task's name as a heading: "ct_region" is "CT region"."""
    words = [w.upper() if w in ("ct", "mri", "us", "ih", "he") else w for w in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def _findings(
    t: Mapping[str, Any], drawn: curves.Curves | None, shown: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A multi-label task: its mean, and a row for each finding."""
    order = sorted(t["values"], key=lambda k: k != t["metric"])
    rows = [{"name": "mean over findings", "values": [t["values"][k] for k in order], "ours": True}]
    for name, f in t["findings"].items():
        row = {"name": name, "values": [f["values"].get(k) for k in order], "ours": False}
        rows.append({**f, **row})
    return {
        **t,
        "title": _title(t["name"]),
        "description": t["description"].rstrip("."),
        "main": t["values"][t["metric"]],
        "columns": [words(k.removesuffix("_chosen")) for k in order],
        "chosen": [k.endswith("_chosen") for k in order],
        "thresholds": any("threshold" in f for f in t["findings"].values()),
        "rows": rows,
        "hits": [_shown(e) for e in shown if e["hit"]],
        "misses": [_shown(e) for e in shown if not e["hit"]],
        **_drawn(t, drawn),
    }


def _drawn(t: Mapping[str, Any], found: curves.Curves | None) -> dict[str, Any]:
    """The curves as SVG with their titles, and what a calibration changed."""
    figures = []
    if found and found.roc:
        figures.append(("ROC", plots.roc(found.roc, t["name"])))
    if found and len(found.reliability.share):
        title = f"Reliability {found.what}"
        figures.append((title, plots.reliability(found.reliability, t["name"])))
    return {"curves": figures, "calibration": results.change(t.get("calibration", {}))}


def _confusion(t: Mapping[str, Any]) -> dict[str, Any]:
    """The confusion matrix as a table; a large one as a picture, with the most frequent confusions in words."""
    if len(t["classes"]) <= LARGE:
        return {"matrix": _matrix(t), "aurocs": bool(t.get("auroc_per_class"))}
    counts = np.array(t["confusion"], float)
    support = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(support, 1)
    apart = shares * (1 - np.eye(len(shares)))
    worst = np.argsort(-apart, axis=None, kind="stable")[:MOST]
    names, n = t["classes"], len(shares)
    pairs = [(int(k) // n, int(k) % n) for k in worst if apart.flat[k] > 0]
    return {
        "heat": plots.heat(shares),
        "confused": [
            {"truth": names[i], "said": names[j], "n": int(counts[i, j]), "of": int(support[i, 0])}
            for i, j in pairs
        ],
        "recalls": [{"name": c, "n": int(support[i, 0]), **_of_class(t, c)} for i, c in enumerate(names)],
        "aurocs": bool(t.get("auroc_per_class")),
    }


def _matrix(t: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the confusion matrix with the share of the true class, which colours the cell."""
    out = []
    for place, (name, row) in enumerate(zip(t["classes"], t["confusion"], strict=True), 1):
        total = sum(row)
        cells = [{"n": n, "share": n / total if total else 0.0} for n in row]
        out.append({"name": name, "place": place, "n": total, "cells": cells, **_of_class(t, name)})
    return out


def _of_class(t: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The figures of one class; results of two classes, and older ones, have no AUROC of each."""
    return {"recall": t["recall"][name], "auroc": t.get("auroc_per_class", {}).get(name)}


def _shown(e: Mapping[str, Any]) -> dict[str, Any]:
    scores = sorted(e["scores"].items(), key=lambda kv: -kv[1])[:3]
    return {**e, "top": scores}
