"""`unimed-jax eval`: zero-shot on records, on a suite (cli/suite.py), or beyond classes (cli/embedding_tasks.py)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from unimed_jax.cli.args import Parser, reader_threads
from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    from unimed_jax.data.shards import Shards
    from unimed_jax.evaluate.results import Results

_ONLY_SUITE = (
    *("data_root", "set", "sets", "option", "annotations", "prompts", "protocol"),
    *("prompt_sensitivity", "allow_bad"),
)


def _parser() -> Parser:
    from unimed_jax.cli import embedding_tasks, suite
    from unimed_jax.evaluate import multilabel, tasks

    parser = Parser(
        "unimed-jax eval",
        description="Zero-shot classification of records (--data) or of data sets on the disk (--suite), with 95 % "
        "intervals by subject; on records also retrieval and linear probes.",
    )
    parser.add_argument("--model", required=True, metavar="M", help="model folder or run folder")
    parser.add_argument("--data", default="", metavar="DIR", help="records: a root of sources, or one source")
    parser.add_argument("--split", default="test", help="of every source")
    parser.add_argument(
        "--tasks",
        default="modality",
        help=f"names or JSON files: {', '.join([*tasks.names(), *multilabel.names()])}",
    )
    parser.add_argument(
        "--sources", default="", metavar="A,B", help="only these sources; default: all with the split"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="results.json, .md, .csv, predictions.csv"
    )
    parser.add_argument("--report", action="store_true", help="write report.html into --out, too")
    parser.add_argument(
        "--ci", type=int, default=1000, metavar="N", help="bootstrap resamples; 0 = no intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--calibration", default="", metavar="FILE", help="of unimed-jax calibrate")
    parser.add_argument(
        "--in-sample", action="store_true", help="it may have been fitted on these records; results say so"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once, over all devices")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--threads", type=int, default=reader_threads(), help="pictures decoded in parallel")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    suite.add_arguments(parser)
    embedding_tasks.add_arguments(parser)
    return parser


def run(argv: list[str]) -> int:
    """Evaluates and writes the results; refusals propagate as UnimedError."""
    from unimed_jax.cli import embedding_tasks
    from unimed_jax.evaluate import results

    args = _parser().parse(argv)
    beyond = embedding_tasks.wanted(args)
    if args.ci < 0 or args.batch_size < 1 or args.threads < 1:
        raise UsageError("--ci must be at least 0, --batch-size and --threads at least 1")
    out = Path(args.out)
    if not beyond:
        results.check_target(out, force=args.force)
    if args.in_sample and not args.calibration:
        raise UsageError("--in-sample belongs to --calibration", "leave it out")
    if args.calibration and beyond:
        raise UsageError("--calibration is for zero-shot scores", "leave it out with --retrieval and --probe")
    if bool(args.data) == bool(args.suite):
        raise UsageError("eval takes records or a suite", "give one of --data DIR and --suite NAME")
    if args.suite:
        defaults = {"split": "test", "tasks": "modality", "sources": ""}
        for name, value in defaults.items():
            if getattr(args, name) != value:
                raise UsageError(f"--{name} belongs to --data", "a suite has --sets and --prompts")
        from unimed_jax.cli import job, suite

        with job.joined() as first:
            if beyond:
                return embedding_tasks.run(args, lambda _: [])
            return suite.run(args, first=first)
    given = [f for f in _ONLY_SUITE if getattr(args, f) not in ("", [], False, 0, "own")]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} belongs to --suite", "leave it out, or name a suite"
        )
    names = [s for s in args.sources.split(",") if s]
    from unimed_jax.cli import job

    with job.joined() as first:
        if beyond:
            return embedding_tasks.run(args, lambda split: _sources(Path(args.data), split, names))
        return _records(args, names, first=first)


def _records(args: argparse.Namespace, names: list[str], *, first: bool) -> int:
    """Zero-shot tasks on records; `first` is the process of a job that writes."""
    from unimed_jax.evaluate import calibration, report, zeroshot

    out = Path(args.out)

    chosen = [zeroshot.load(name) for name in args.tasks.split(",") if name]
    calibrated = calibration.load(args.calibration) if args.calibration else None
    if args.report:
        report.require()
    sources = _sources(Path(args.data), args.split, names)

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli import job
    from unimed_jax.cli.progress import Progress

    mesh = parallel.make_mesh(config.Mesh())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    if not args.json:
        print(f"model   {model.describe()}")
        print(f"data    {', '.join(f'{s.name} {len(s)} {s.split} records' for s in sources)}")
    with Progress("embed", "img") as progress:
        found = zeroshot.evaluate(
            model,
            sources,
            chosen,
            resamples=args.ci,
            seed=args.seed,
            threads=args.threads,
            calibrated=calibrated,
            in_sample=args.in_sample,
            progress=progress if first else None,
        )

    def write() -> None:
        found.save(out, force=args.force)
        if args.report:
            report.write(report.from_run(out), out / "report.html")
        print(json.dumps(found.json(), indent=1) if args.json else _table(found))
        if not args.json:
            more = " findings.csv" * bool(found.findings) + " report.html" * args.report
            print(f"wrote   {out}/results.json .md .csv predictions.csv{more}")
            print("note    research use only, not a medical device")

    job.by_the_first(write)
    return 0


def _sources(root: Path, split: str, names: list[str]) -> list[Shards]:
    from unimed_jax.data import shards

    found = shards.find_sources(root)
    if not found:
        raise DataError(
            f"no records in {root} (tried */*/manifest.json)", "unimed-jax data build SOURCE --out DIR"
        )
    unknown = [n for n in names if n not in found]
    if unknown:
        raise UsageError(f"no source {unknown[0]!r} in {root}", f"there are: {', '.join(found)}")
    wanted = {n: folder for n, folder in found.items() if not names or n in names}
    splits = {n: shards.Manifest.read(folder).splits for n, folder in wanted.items()}
    have = [n for n, named in splits.items() if split in named]
    lacking = [n for n in names if n not in have]
    there = f"there are: {', '.join(sorted({s for m in splits.values() for s in m}))}"
    if lacking:  # asked for by name, it is not left out silently
        raise DataError(f"source {lacking[0]} has no split {split!r}", there)
    if not have:
        raise DataError(f"no source in {root} has the split {split!r}", there)
    return [shards.Shards(wanted[n], split) for n in have]


def _table(found: Results) -> str:
    """The results in columns, references below their task."""
    from unimed_jax.evaluate import columns, results

    head = ("task", "n", "subjects", "metric", "value", "95% CI", "chance", "prompts")
    rows: list[tuple[str, ...]] = [head]
    for t in found.tasks:
        metric = t.task.metric
        for name, m in {t.task.name: t.metrics, **{f"  {k}": v for k, v in t.references.items()}}.items():
            v = m.values[metric]
            value = "-" if v.value is None else f"{v.value:.3f}"
            interval = v.reason if v.low is None else f"[{v.low:.3f} {v.high:.3f}]"
            ours = name == t.task.name
            tail = (f"{t.task.chance:.3f}", f"{t.task.shape()} {t.task.digest[:8]}") if ours else ("", "")
            rows.append((name, str(m.n), str(m.subjects), metric, value, interval, *tail))
    for t in found.findings:
        interval = t.main.reason if t.main.low is None else f"[{t.main.low:.3f} {t.main.high:.3f}]"
        value, chance = ("-" if x is None else f"{x:.3f}" for x in (t.main.value, t.chance))
        figures = (t.task.metric, value, interval, chance, f"{t.task.shape()} {t.task.digest[:8]}")
        rows.append((t.task.name, str(t.metrics.n), str(t.metrics.subjects), *figures))
    lines = columns.aligned(rows)
    for t in found.findings:
        lines += ["", *columns.aligned(t.table()), ""]
    every = (*found.tasks, *found.findings)
    lines += [f"note    {t.task.name}: {n}" for t in every for n in t.metrics.notes]
    return "\n".join(
        lines + [f"calibr. {t.task.name}: {c}" for t in every for c in results.change(t.calibrated)]
    )
