"""`unimed-jax calibrate`: validation records to a file with which `eval` and `predict` give probabilities."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.cli.args import Parser, reader_threads
from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    from unimed_jax.evaluate.calibration import Calibration

_SET = "validation"
_SUBJECTS = ("subject", "patient_id", "patient", "PatientID")  # columns that say who was pictured
_ONLY_CSV = ("model", "labels", "prompts", "task", "modality")


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax calibrate",
        description="Fits a temperature (classes) or a scale and an offset each (findings) on validation records. The "
        "file belongs to one model and its prompts; judge it on other records: unimed-jax eval --calibration FILE.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="results folder of unimed-jax eval, or a CSV of pictures and labels")
    add("--out", required=True, metavar="FILE.json", help="the calibration")
    add("--tasks", default="", metavar="A,B", help="of a results folder; default: all")
    add("--ci", type=int, default=1000, metavar="N", help="bootstrap resamples; 0 = no intervals")
    add("--seed", type=int, default=0, help="of folds and resampling")
    add("--json", action="store_true", help="print the file")
    add("--force", action="store_true", help="replace an existing file")
    group = parser.add_argument_group("with a CSV")
    add = group.add_argument
    add("--model", default="", metavar="M", help="model folder or run folder")
    add("--labels", default="", metavar="A,B", help="class names; sentences are made of them")
    add("--prompts", default="", metavar="FILE", help='JSON: {"class": ["prompt", ...], ...}, or findings')
    add("--task", default="", metavar="NAME", help="a built-in task")
    add("--modality", default="", help="named in the sentences of --labels: xray, ct, mri, ...")
    add("--multilabel", action="store_true", help="--labels are findings, each a column of 1, 0 and blanks")
    add("--image", default="file", metavar="COLUMN", help="of the CSV: pictures, from the folder of the CSV")
    add("--label", default="label", metavar="COLUMN", help="of the CSV: the class")
    add("--batch-size", type=int, default=32, help="pictures at once")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add("--threads", type=int, default=reader_threads(), help="pictures decoded in parallel")
    return parser


def run(argv: list[str]) -> int:
    """Fits and writes."""
    args = _parser().parse(argv)
    if args.ci < 0 or args.batch_size < 1 or args.threads < 1:
        raise UsageError("--ci must be at least 0, --batch-size and --threads at least 1")
    out, source = Path(args.out), Path(args.source)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "give a file name")
    if out.exists() and not args.force:
        raise UsageError(f"{out} exists", "choose another --out, or --force to replace it")
    from unimed_jax.data import files
    from unimed_jax.evaluate import calibrate

    files.refuse_sources([out], filter(None, [args.source, args.prompts]))
    if source.is_dir():
        given = [f for f in (*_ONLY_CSV, "multilabel") if getattr(args, f)]
        if given:
            raise UsageError(f"--{given[0]} belongs to a CSV", "results know their model and prompts")
        found = calibrate.from_results(
            source, [t for t in args.tasks.split(",") if t], resamples=args.ci, seed=args.seed
        )
    elif source.is_file():
        if args.tasks:
            raise UsageError("--tasks belongs to a results folder", "--task NAME")
        found = _of_csv(args, source)
    else:
        raise UsageError(f"no folder or CSV {source}", "unimed-jax eval --split val writes a results folder")
    text = json.dumps(found.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with files.swapped(out) as beside:
        beside.write_text(text, encoding="utf-8")
    if args.json:
        print(text.rstrip())
        return 0
    _say(found)
    print(f"wrote   {out}")
    print("note    research use only, not a medical device")
    return 0


def _say(found: Calibration) -> None:
    from unimed_jax.evaluate import results

    print(f"model   {found.model['name']} sha {found.model['sha256'][:12]}")
    for t in found.tasks:
        print(f"fitted  {t.name}: {t.text()}")
        for line in results.change({"figures": t.json()["figures"], "fitted_here": 0}):
            print(f"        out of fold, by subject: {line}")
        if not t.figures:
            print("        not judged: all records are of one subject, figures on them would flatter")
        for finding, why in getattr(t, "left", {}).items():
            print(f"left    {finding}: {why}")


def _of_csv(args: argparse.Namespace, source: Path) -> Calibration:
    """Evaluates the pictures of a CSV as a suite of one set, and fits on that."""
    if not args.model or sum(map(bool, (args.labels, args.prompts, args.task))) != 1:
        raise UsageError("a CSV needs --model M and one of --labels, --prompts and --task")
    if (args.modality or args.multilabel) and not args.labels:
        raise UsageError(
            "--modality and --multilabel belong to --labels", "prompts say themselves what they are"
        )
    from unimed_jax.evaluate import suite_prompts, suite_run, suites

    suite = suites.from_dict({"name": "validation", "sets": [_entry(args, source)]}, source)
    ready = suite_run.collect(suite, suite_prompts.load(""), places={_SET: source.parent})
    for f in ready.failed:
        raise DataError(f["reason"], f["remedy"])

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli.progress import Progress
    from unimed_jax.evaluate import calibrate

    mesh = parallel.make_mesh(config.Mesh())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    with Progress("embed", "img") as progress:
        done = suite_run.evaluate(
            model, ready, resamples=0, threads=args.threads, examples=0, progress=progress
        )
    if done.failed or done.bad:
        first = (done.failed or done.bad)[0]
        raise DataError(
            f"{len(done.bad)} pictures of {source} could not be used, the first: {first['reason']}",
            "correct the list: what is fitted must be complete",
        )
    with tempfile.TemporaryDirectory() as folder:
        done.save(folder, force=True)
        return calibrate.from_results(folder, resamples=args.ci, seed=args.seed)


def _entry(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The CSV as a set of a suite."""
    from unimed_jax.evaluate import multilabel, tasks

    names = [x.strip() for x in args.labels.split(",")]
    if args.labels:
        make = multilabel.from_labels if args.multilabel else tasks.from_labels
        task = make(names, modality=args.modality)
    else:
        asked = args.prompts or args.task
        task = multilabel.either(asked)
    layout = {"kind": "csv", "file": source.name, "image": args.image, "group_columns": list(_SUBJECTS)}
    if isinstance(task, multilabel.Findings):
        pairs = {
            k: {"positive": list(p.positive), "negative": list(p.negative)} for k, p in task.findings.items()
        }
        how = {"multilabel": True, "prompts": pairs, "layout": layout | {"label": list(pairs)}}
    else:
        prompts = {k: list(v) for k, v in task.classes.items()}
        how = {"prompts": prompts, "layout": layout | {"label": args.label}}
    return {"name": _SET, "classes": list(how["prompts"]), **how}
