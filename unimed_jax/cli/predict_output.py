"""What `unimed-jax predict` writes: the table, the list of failures, the record, metrics and the page."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    from unimed_jax.data.found import Found
    from unimed_jax.evaluate.predict import Predictions
    from unimed_jax.evaluate.question import Question
    from unimed_jax.evaluate.truth import Judged, Truth
    from unimed_jax.infer import Loaded

RESEARCH = "research use only, not a medical device"
_BESIDE = {"errors": "errors.csv", "run": "run.json", "metrics": "metrics.json"}


def note(asked: Question) -> str:
    """What the scores are."""
    if not asked.fit:
        return f"scores are not calibrated probabilities; {RESEARCH}"
    return f"scores are calibrated ({asked.fit.text()}); {RESEARCH}"


def paths(args: argparse.Namespace) -> dict[str, Path]:
    """Where everything goes; refuses before any work what could not be written afterwards.

    Raises:
        UsageError: for names that clash, exist or are folders.
        DataError: where nothing can be written.
    """
    out = Path(args.out)
    # Named after the table: several of them share a folder.
    beside = {name: out.with_name(f"{out.stem}.{end}") for name, end in _BESIDE.items()}
    found = {"out": out, **beside}
    if args.report:
        found["report"] = Path(args.report)
    if len(set(found.values())) < len(found):
        raise UsageError(f"--out {out} and another output have the same name", "choose another name")
    for path in found.values():
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "give a file name")
        if path.exists() and not args.force:
            raise UsageError(f"{path} exists", "choose another --out, or --force to replace it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DataError(f"{path.parent} cannot be made: {e.strerror}", "choose another --out") from e
        if not os.access(path.parent, os.W_OK):
            raise DataError(
                f"{path.parent} cannot be written", "choose another --out, or change its permissions"
            )
    return found


def record(
    args: argparse.Namespace,
    model: Loaded,
    asked: Question,
    named: Found,
    found: Predictions,
    calibration_sha256: str,
) -> dict[str, Any]:
    """OUT.run.json: what a second person needs to get the same numbers; no file names, nobody's groups."""
    import datetime

    from unimed_jax import __version__, saliency
    from unimed_jax.evaluate import question
    from unimed_jax.evaluate.predict import MEAN
    from unimed_jax.train import run_folder

    task = asked.task
    return {
        "format": "unimed_jax.predictions",
        "version": 1,
        "use": note(asked),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, "revision": run_folder.git_revision()},
        "model": model.about,
        "prompts": {
            "name": task.name,
            "sha256": task.digest,
            "shape": task.shape(),
            "classes": question.prompts_of(task),
        },
        "settings": {
            "window": args.window,
            "slices": args.slices,
            "modality": args.modality,
            "multilabel": bool(args.multilabel),
            "calibration_sha256": calibration_sha256,
            "mpp": args.mpp,
            "level": args.level,
            "tissue": args.tissue,
            "max_tiles": args.max_tiles,
            "saliency": {"method": args.saliency, "note": saliency.NOTE} if args.saliency else None,
        },
        "inputs": {"sha256": found.sha256, "volumes": named.volumes, "repeated": named.repeated},
        "files": named.files,
        "pictures": sum(r["frame"] != MEAN for r in found.rows),
        "failed": len(found.errors),
        "inverted": found.inverted,
        "kinds": dict(found.kinds),
    }


def write(
    outputs: dict[str, Path],
    found: Predictions,
    record: dict[str, Any],
    truth: Truth | None = None,
    judged: Judged | None = None,
) -> list[Path]:
    """Writes everything; a list of errors or metrics of an earlier run goes when this one has none.

    Raises:
        DataError: when something cannot be written.
    """
    from unimed_jax.data import files
    from unimed_jax.evaluate import report, results

    columns = ["file", "frame", "kind", "modality", "predicted", "score"]
    if any("x" in r for r in found.rows):
        columns[2:2] = ["x", "y"]
    if truth:
        columns.insert(columns.index("predicted"), "label")
    names = {c: f"score: {c}" for c in found.classes}
    said = truth.words if truth else {}
    rows = [
        r | {"label": said.get(r["input"], "")} | {names[c]: p for c, p in r["scores"].items()}
        for r in found.rows
    ]
    texts = {
        "out": results.to_csv(rows, (*columns, *names.values())),
        "errors": results.to_csv(found.errors, ("file", "reason", "remedy")) if found.errors else "",
        "metrics": json.dumps(judged.json, indent=1, ensure_ascii=False) + "\n" if judged else "",
        "run": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    try:
        outputs["run"].unlink(missing_ok=True)  # half-replaced files must not look like a whole result
        for name, text in texts.items():
            if text:
                files.write_text(outputs[name], text)
            else:
                outputs[name].unlink(missing_ok=True)
    except OSError as e:
        raise DataError(f"{outputs['out'].parent} cannot be written: {e.strerror or e}", "free space") from e
    if "report" in outputs:
        known = {"judged": judged.json, "drawn": judged.curves} if judged else {}
        page = report.from_predictions(record, shown(found, truth), found.counts(), found.errors, **known)
        report.write(page, outputs["report"])
    return [p for p in outputs.values() if p.exists()]


def shown(found: Predictions, truth: Truth | None) -> list[dict[str, Any]]:
    """The pictures of the page, each with its truth where that is known; tiles are parts, nobody judged them."""
    from unimed_jax.evaluate.truth import is_right

    out = []
    for card in found.shown:
        row = card["row"]
        known: dict[str, Any] = {}
        if truth and row["input"] in truth.said and row["kind"] != "slide":
            right = is_right(found.classes, truth.said[row["input"]], row["found"])
            known = {"label": truth.words[row["input"]], "hit": right}
        out.append({k: v for k, v in card.items() if k not in ("row", "square")} | known)
    return out
