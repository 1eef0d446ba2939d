"""`unimed-jax predict`: image files to class scores, as CSV and, if asked for, as one HTML page."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.cli.args import Parser
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.evaluate.predict import Predictions
    from unimed_jax.evaluate.tasks import Task
    from unimed_jax.infer import Loaded

NOTE = "scores are not calibrated probabilities; research use only, not a medical device"
_SHOWN = 48  # pictures in the report
_BESIDE = {"errors": "errors.csv", "run": "run.json"}


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax predict",
        description="Scores DICOM, NIfTI, PNG, JPEG and TIFF files against classes. Nothing leaves this machine; no "
        "header value of a DICOM file but its modality reaches an output.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, or folders read with everything below"
    )
    parser.add_argument("--model", required=True, metavar="M", help="model folder or run folder")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--labels", metavar="A,B", help="class names; sentences are made of them")
    classes.add_argument("--prompts", metavar="FILE", help='JSON: {"class": ["prompt", ...], ...}')
    classes.add_argument("--task", metavar="NAME", help="a built-in task, e.g. modality")
    parser.add_argument(
        "--modality", default="", help="named in the sentences of --labels: xray, ct, mri, ..."
    )
    parser.add_argument(
        "--window", default="", help="lung, brain, bone, ... or CENTRE,WIDTH; default: the file's own"
    )
    parser.add_argument(
        "--slices", default="middle", help="middle, all or every:N, of files with several frames"
    )
    parser.add_argument(
        "--out", required=True, metavar="OUT.csv", help="OUT.errors.csv and OUT.run.json go beside it"
    )
    parser.add_argument(
        "--report", default="", metavar="OUT.html", help="write a page with the pictures, too"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--threads", type=int, default=4, help="files read in parallel")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--force", action="store_true", help="replace existing outputs")
    return parser


def run(argv: list[str]) -> int:
    """Predicts; exit code 4 when some files failed, which OUT.errors.csv lists."""
    args = _parser().parse(argv)
    if args.batch_size < 1 or args.threads < 1:
        raise UsageError("--batch-size and --threads must be at least 1")
    from unimed_jax.data import medical, windows
    from unimed_jax.evaluate import predict
    from unimed_jax.evaluate.report import require

    task = _task(args)
    window, slices = windows.parse_window(args.window), medical.Slices.parse(args.slices)
    if args.modality and not args.labels:
        raise UsageError("--modality belongs to --labels", "prompts say themselves what they are about")
    outputs = _outputs(args)
    if args.report:
        require()
    files = predict.find_files(args.paths)

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli.progress import Progress

    mesh = parallel.make_mesh(config.Mesh())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    say = (lambda *_: None) if args.json else print
    say(f"model   {model.describe()}")
    say(f"prompts {task.name}  {task.shape()}  sha {task.digest[:12]}")
    with Progress("embed", "files") as progress:
        found = predict.predict(
            model,
            files,
            task,
            window=window,
            slices=slices,
            threads=args.threads,
            shown=_SHOWN if args.report else 0,
            progress=progress,
        )
    record = _record(args, model, task, found, len(files))
    written = _write(outputs, found, record)
    kinds = ", ".join(f"{n} {k}" for k, n in found.kinds.most_common())
    say(
        f"input   {len(files)} files: {kinds or 'none read'}; {found.inverted} inverted; {len(found.errors)} failed"
    )
    for name, n in sorted(found.counts().items(), key=lambda kv: -kv[1])[:8]:
        say(f"        {n:6d}  {name}")
    say(f"wrote   {'  '.join(str(p) for p in written)}")
    say(f"note    {NOTE}")
    if args.json:
        print(
            json.dumps(record | {"predicted": found.counts(), "wrote": [str(p) for p in written]}, indent=1)
        )
    if found.errors:
        errors = outputs["errors"]
        if not found.rows:
            raise DataError(f"none of {len(files)} files could be read", f"see {errors}")
        raise SomeInputsFailed(f"{len(found.errors)} of {len(files)} files failed", f"see {errors}")
    return 0


def _task(args: argparse.Namespace) -> Task:
    from unimed_jax.evaluate import tasks

    if args.labels:
        return tasks.from_labels([x.strip() for x in args.labels.split(",")], modality=args.modality)
    if args.prompts and not Path(args.prompts).is_file():
        raise UsageError(f"no prompt file {args.prompts}", "give a JSON file, or --task NAME")
    return tasks.load(Path(args.prompts) if args.prompts else args.task)


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Where everything goes; refuses before any work what could not be written afterwards."""
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


def _record(
    args: argparse.Namespace, model: Loaded, task: Task, found: Predictions, files: int
) -> dict[str, Any]:
    """OUT.run.json: what a second person needs to get the same numbers; no file names."""
    import datetime

    from unimed_jax import __version__
    from unimed_jax.train import run_folder

    return {
        "format": "unimed_jax.predictions",
        "version": 1,
        "use": NOTE,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, "revision": run_folder.git_revision()},
        "model": {
            "name": model.cfg.name,
            "sha256": model.digest,
            "dtype": model.dtype,
            "logit_scale": model.logit_scale,
        },
        "prompts": {
            "name": task.name,
            "sha256": task.digest,
            "shape": task.shape(),
            "classes": {k: list(v) for k, v in task.classes.items()},
        },
        "settings": {"window": args.window, "slices": args.slices, "modality": args.modality},
        "files": files,
        "pictures": len(found.rows),
        "failed": len(found.errors),
        "inverted": found.inverted,
        "kinds": dict(found.kinds),
    }


def _write(outputs: dict[str, Path], found: Predictions, record: dict[str, Any]) -> list[Path]:
    from unimed_jax.data import files
    from unimed_jax.evaluate import report, results

    columns = ("file", "frame", "kind", "modality", "predicted", "score")
    names = {c: f"score: {c}" for c in found.classes}
    rows = [r | {names[c]: p for c, p in r["scores"].items()} for r in found.rows]
    texts = {
        "out": results.to_csv(rows, (*columns, *names.values())),
        "errors": results.to_csv(found.errors, ("file", "reason", "remedy")) if found.errors else "",
        "run": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    try:
        for name, text in texts.items():
            if text:
                files.write_text(outputs[name], text)
            else:
                outputs[name].unlink(missing_ok=True)  # an old list of errors would be read as this one's
    except OSError as e:
        raise DataError(f"{outputs['out'].parent} cannot be written: {e.strerror or e}", "free space") from e
    if "report" in outputs:
        report.write(
            report.from_predictions(record, found.shown, found.counts(), found.errors), outputs["report"]
        )
    return [p for p in outputs.values() if p.exists()]
