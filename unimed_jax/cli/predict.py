"""`unimed-jax predict`: files, folders and lists to scores, as CSV and, if asked for, as one HTML page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.cli import predict_output as output
from unimed_jax.cli.args import Parser, add_picture_arguments, picture_options, reader_threads
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.data.found import Found
    from unimed_jax.data.medical import Slices
    from unimed_jax.data.slides import Tiles
    from unimed_jax.evaluate.multilabel import Findings
    from unimed_jax.evaluate.predict import Predictions
    from unimed_jax.evaluate.question import Question
    from unimed_jax.evaluate.tasks import Task
    from unimed_jax.evaluate.truth import Judged, Truth

_SHOWN = 48  # pictures in the report
_SALIENCY = ("attention", "gradient", "smoothgrad", "rollout")  # the keys of saliency.METHODS


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax predict",
        description="Scores DICOM, NIfTI, PNG, JPEG and TIFF files and whole slides against classes. Nothing leaves "
        "this machine; no header value of a DICOM file but its modality reaches an output.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files; folders, read with everything below them, slices of a series as one volume; lists (.csv)",
    )
    parser.add_argument(
        "--list",
        action="append",
        default=[],
        metavar="FILE",
        help="a CSV with the columns file and, if known, label and patient; may be repeated",
    )
    parser.add_argument("--model", required=True, metavar="M", help="model folder or run folder")
    _ask(parser)
    add_picture_arguments(parser)
    parser.add_argument(
        "--truth", default="", metavar="FILE", help="a CSV with the columns file and label: metrics"
    )
    parser.add_argument(
        "--ci", type=int, default=1000, metavar="N", help="bootstrap resamples of the metrics"
    )
    parser.add_argument(
        "--out", required=True, metavar="OUT.csv", help="OUT.errors.csv and OUT.run.json go beside it"
    )
    parser.add_argument(
        "--report", default="", metavar="OUT.html", help="write a page with the pictures, too"
    )
    parser.add_argument(
        "--saliency", choices=_SALIENCY, default="", help="show on the page where the scores come from"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--threads", type=int, default=reader_threads(), help="files read in parallel")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--force", action="store_true", help="replace existing outputs")
    return parser


def _ask(parser: Parser) -> None:
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--labels", metavar="A,B", help="class names; sentences are made of them")
    classes.add_argument("--prompts", metavar="FILE", help='JSON: {"class": ["prompt", ...], ...}')
    classes.add_argument("--task", metavar="NAME", help="a built-in task, e.g. modality")
    parser.add_argument(
        "--modality",
        default="",
        metavar="NAME",
        help="named in the sentences of --labels: xray, ct, mri, ...",
    )
    parser.add_argument(
        "--multilabel",
        action="store_true",
        help="findings that do not exclude each other, each with prompts for and against it",
    )
    parser.add_argument(
        "--calibration", default="", metavar="FILE", help="what unimed-jax calibrate has learned"
    )
    parser.add_argument(
        "--in-sample", action="store_true", help="it may have been fitted on the pictures with truth"
    )


def run(argv: list[str]) -> int:
    """Predicts; exit code 4 when some files failed, which OUT.errors.csv lists."""
    args = _parser().parse(argv)
    if args.batch_size < 1 or args.threads < 1 or args.ci < 0:
        raise UsageError("--batch-size and --threads must be at least 1, --ci at least 0")
    if not args.paths and not args.list:
        raise UsageError("nothing to score", "give files, folders or lists")
    if args.saliency and not args.report:
        raise UsageError("--saliency belongs to --report", "add --report OUT.html")
    if args.in_sample and not args.calibration:
        raise UsageError("--in-sample belongs to --calibration", "leave it out")
    from unimed_jax.cli import job

    task = _task(args)
    options = picture_options(args)
    with job.joined() as first:
        return _run(args, task, *options, first=first)


def _run(
    args: argparse.Namespace,
    task: Task | Findings,
    window: tuple[float, float] | None,
    slices: Slices,
    tiles: Tiles,
    *,
    first: bool,
) -> int:
    """On every process of a job: reads and scores its share; the first judges, draws and writes."""
    from unimed_jax.data import files
    from unimed_jax.data import found as inputs
    from unimed_jax.evaluate import predict
    from unimed_jax.evaluate.report import require

    outputs = output.paths(args)
    if args.report:
        require()
    named = inputs.find(args.paths, args.list, threads=args.threads)
    lists = [*(x.file for x in named.lists), args.truth, args.prompts, args.calibration]
    files.refuse_sources(
        outputs.values(), [*filter(None, lists), *(f for i in named.inputs for f in i.files)]
    )
    truth = _truth(args, named, task)

    import jax

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli import job
    from unimed_jax.cli.progress import Progress
    from unimed_jax.evaluate import calibration, question

    fits = calibration.load(args.calibration) if args.calibration else None
    if fits and args.window:
        named.notes.append(
            "--window changes the pixels, the calibration was fitted on the files' own windows"
        )
    mesh = parallel.make_mesh(config.Mesh(), jax.local_devices())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    asked = question.ask(model, task, fits)
    if not args.json:
        print(f"model   {model.describe()}")
        print(f"prompts {task.name}  {task.shape()}  sha {task.digest[:12]}")
    with Progress("embed", "files") as progress:
        found = predict.predict(
            model,
            named.inputs,
            asked,
            window=window,
            slices=slices,
            tiles=tiles,
            threads=args.threads,
            shown=_SHOWN if args.report else 0,
            share=(jax.process_index(), jax.process_count()),
            progress=progress if first else None,
        )

    def write() -> None:
        if args.saliency:
            predict.explain(model, asked, found.shown, args.saliency)
        record = output.record(args, model, asked, named, found, fits.sha256 if fits else "")
        _write(args, outputs, asked, named, found, record, truth)

    job.by_the_first(write)
    if found.errors:
        errors = outputs["errors"]
        if not found.rows:
            raise DataError(f"none of {named.files} files could be read", f"see {errors}")
        raise SomeInputsFailed(f"{len(found.errors)} of {named.files} files failed", f"see {errors}")
    return 0


def _write(
    args: argparse.Namespace,
    outputs: dict[str, Path],
    asked: Question,
    named: Found,
    found: Predictions,
    record: dict[str, Any],
    truth: Truth | None,
) -> None:
    """Judges, writes, and says what came of it."""
    from unimed_jax.evaluate import truth as truths

    judged, refused = None, None
    try:
        if truth:
            judged = truths.judge(asked, found, truth, resamples=args.ci, in_sample=args.in_sample)
    except DataError as e:  # of the metrics: the scores are what they are
        refused = e
    written = output.write(outputs, found, record, truth, judged)
    if args.json:
        summary: dict[str, Any] = record | {"predicted": found.counts(), "wrote": [str(p) for p in written]}
        print(json.dumps(summary | ({"metrics": judged.json} if judged else {}), indent=1))
    else:
        for line in _lines(named, found, truth, judged):
            print(line)
        print(f"wrote   {'  '.join(str(p) for p in written)}")
        print(f"note    {output.note(asked)}")
    if refused:
        raise refused


def _lines(named: Found, found: Predictions, truth: Truth | None, judged: Judged | None) -> list[str]:
    """What was read and found, for the terminal."""
    kinds = ", ".join(f"{n} {k}" for k, n in found.kinds.most_common())
    failed = f"{found.inverted} inverted; {len(found.errors)} failed"
    out = [f"input   {named.files} files: {kinds or 'none read'}; {failed}"]
    out += [f"        {n}" for n in [*named.notes, *found.notes]]
    out += [
        f"        {n:6d}  {name}" for name, n in sorted(found.counts().items(), key=lambda kv: -kv[1])[:8]
    ]
    if truth:
        out += [f"truth   {'; '.join([f'{len(truth.said)} pictures or volumes', *truth.notes])}"]
        out += [] if judged else ["        none of them could be read, there are no metrics"]
    if judged:
        first = sorted(judged.values, key=lambda k: k != judged.main)
        out += [f"metrics {judged.n} pictures of {judged.subjects} subjects"]
        out += [f"        {k:18s} {judged.values[k].text()}" for k in first]
        out += [f"        {n}" for n in judged.notes]
    return out


def _truth(args: argparse.Namespace, named: Found, task: Task | Findings) -> Truth | None:
    """The truth of --truth and of all lists that hold it."""
    from unimed_jax.data import tables
    from unimed_jax.evaluate import truth

    lists = [x for x in named.lists if truth.tells(task, x)]
    if args.truth:
        lists.append(tables.read_list(Path(args.truth)))
        named.notes += lists[-1].notes
    folders = [p for p in map(Path, args.paths) if p.is_dir()]
    return truth.match(named, lists, folders, task) if lists else None


def _task(args: argparse.Namespace) -> Task | Findings:
    from unimed_jax.evaluate import multilabel, tasks

    if args.modality and not args.labels:
        raise UsageError("--modality belongs to --labels", "prompts say themselves what they are about")
    labels = [x.strip() for x in (args.labels or "").split(",")]
    if args.labels:
        make = multilabel.from_labels if args.multilabel else tasks.from_labels
        return make(labels, modality=args.modality)
    if args.prompts and not Path(args.prompts).is_file():
        raise UsageError(f"no prompt file {args.prompts}", "give a JSON file, or --task NAME")
    name = Path(args.prompts) if args.prompts else args.task
    task = multilabel.either(name)
    if isinstance(task, multilabel.Findings) != args.multilabel:
        what = "is about findings" if not args.multilabel else "has no prompts for and against findings"
        raise UsageError(
            f"{name} {what}", "add --multilabel" if not args.multilabel else "leave --multilabel out"
        )
    return task
