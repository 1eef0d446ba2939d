"""`unimed-jax eval --suite`: the data sets of a suite as they lie on the disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.evaluate.suite_results import SuiteResults
    from unimed_jax.evaluate.suite_run import Collected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only a suite has."""
    from unimed_jax.evaluate import suite_run, suites

    group = parser.add_argument_group("data sets on the disk")
    add = group.add_argument
    add("--suite", default="", metavar="S", help=f"{', '.join(suites.names())}, or a JSON or YAML file")
    add("--data-root", default="", metavar="DIR", help="folder of the suite's data sets")
    add("--set", action="append", default=[], metavar="NAME=PATH", help="a data set's own folder; repeatable")
    add("--sets", default="", metavar="A,B", help="only these; default: all sets of the suite's average")
    add("--option", action="append", default=[], metavar="SET:OPTION", help="a variant of a set; repeatable")
    add("--annotations", default="", metavar="DIR", help="lists that the original's repository holds")
    add(
        "--prompts",
        default="",
        metavar="P",
        help="FILE.json, or ref:PATH/constants.py of a checkout of the original; default: our own",
    )
    add(
        "--protocol",
        choices=suite_run.PROTOCOLS,
        default="own",
        help="reference: also the original's figures",
    )
    add("--prompt-sensitivity", action="store_true", help="score each prompt alone, too")
    add("--allow-bad", type=int, default=0, metavar="N", help="pictures or rows that may fail, in all sets")


def run(args: argparse.Namespace, *, first: bool) -> int:
    """Evaluates and writes the results.

    Args:
        args: the flags.
        first: whether this is the process of a job that writes them.

    Raises:
        UsageError: for a suite, set, option or prompt file that is none.
        DataError: when no set can be evaluated.
        SomeInputsFailed: after everything is written, when sets are missing or refused, or too many pictures failed.
    """
    from unimed_jax.cli import job
    from unimed_jax.evaluate import report

    if args.report:
        report.require()
    found = collect(args, _split(args.sets))
    if not args.json:
        print(_plan(found))
    if not found.ready:
        failed = found.failed[0]
        raise DataError(
            f"none of the {len(found.failed)} data sets can be evaluated, the first: {failed['reason']}",
            failed["remedy"],
        )
    done = _evaluate(args, found, first)

    def write() -> None:
        done.save(args.out, force=args.force)
        if args.report:
            report.write(report.from_run(args.out), Path(args.out) / "report.html")
        print(json.dumps(done.json(), indent=1) if args.json else _table(done))
        if not args.json:
            page = " report.html" if args.report else ""
            lost = " findings.csv" * bool(done.findings) + " errors.csv" * bool(done.bad)
            print(f"wrote   {args.out}/results.json .md .csv predictions.csv{lost}{page}")
            print("note    research use only, not a medical device")

    job.by_the_first(write)
    return _verdict(done, args.allow_bad, args.out)


def collect(args: argparse.Namespace, wanted: list[str]) -> Collected:
    """What the suite of the flags has on this disk.

    Args:
        args: the flags.
        wanted: sets; none = those of its average.

    Raises:
        UsageError: for a suite, set, option or prompt file that is none.
        DataError: for a data root that is no folder.
    """
    from unimed_jax.evaluate import suite_prompts, suite_run, suites

    if args.allow_bad < 0:
        raise UsageError("--allow-bad must be at least 0")
    own = places(args.set)
    if not args.data_root and not own:
        raise UsageError("--suite needs the folder of its data sets", "--data-root DIR, or --set NAME=PATH")
    root = Path(args.data_root) if args.data_root else None
    if root and not root.is_dir():
        raise DataError(f"no folder {root}", "check --data-root")
    chosen = suites.load(args.suite).choose(wanted, args.option, reference=args.protocol == "reference")
    return suite_run.collect(
        chosen,
        suite_prompts.load(args.prompts),
        data_root=root,
        places=own,
        annotations=Path(args.annotations) if args.annotations else None,
    )


def _evaluate(args: argparse.Namespace, found: Collected, first: bool) -> SuiteResults:
    from unimed_jax import config, infer, parallel
    from unimed_jax.cli.progress import Progress
    from unimed_jax.evaluate import calibration, suite_run

    mesh = parallel.make_mesh(config.Mesh())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    if not args.json:
        print(f"model   {model.describe()}")
    with Progress("embed", "img") as progress:
        done = suite_run.evaluate(
            model,
            found,
            protocol=args.protocol,
            sensitivity=args.prompt_sensitivity,
            resamples=args.ci,
            seed=args.seed,
            threads=args.threads,
            calibrated=calibration.load(args.calibration) if args.calibration else None,
            in_sample=args.in_sample,
            progress=progress if first else None,
        )
    if not done.sets:
        raise DataError("no data set has a picture that can be read", done.failed[-1]["reason"])
    return done


def _verdict(done: SuiteResults, allowed: int, out: str) -> int:
    parts = []
    if done.failed:
        names = ", ".join(f["set"] for f in done.failed)
        parts.append(f"{len(done.failed)} data sets were not evaluated: {names}")
    if len(done.bad) > allowed:
        parts.append(f"{len(done.bad)} pictures or rows could not be used, see {out}/errors.csv")
    if parts:
        raise SomeInputsFailed("; ".join(parts), "the others are evaluated and written")
    return 0


def _split(text: str) -> list[str]:
    return [t for t in text.split(",") if t]


def places(texts: list[str]) -> dict[str, Path]:
    """The folders that `--set NAME=PATH` gives.

    Raises:
        UsageError: for a text that is none, or a name twice.
    """
    out: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--set {text!r} is no NAME=PATH")
        if name in out:
            raise UsageError(f"--set {name} is given twice")
        out[name] = Path(path)
    return out


def _plan(found: Collected) -> str:
    """What will be evaluated, with which prompts, and what is missing with what to fetch."""
    source = found.source
    lines = [f"suite   {found.suite.name} version {found.suite.version}, {len(found.suite.sets)} data sets"]
    if source.file:
        lines.append(f"prompts {source.file} sha256 {source.sha256[:12]}")
    for r in found.ready:
        t = r.table
        bad = f", {len(t.bad)} unusable" if t.bad else ""
        words = f"prompts {r.task.shape()}" + (f" {r.prompts}" if r.prompts else "")
        lines.append(f"data    {r.data_set.name}: {len(t.rows)} pictures{bad}; {words}")
    for f in found.failed:
        fix = f" Fetch: {f['remedy']}" if f["remedy"] and f["status"] == "missing" else f" {f['remedy']}"
        lines.append(f"{f['status']:<7} {f['reason']}.{fix}".rstrip())
    return "\n".join(lines)


def _table(done: SuiteResults) -> str:
    """The sets, the averages and the notes in columns."""
    from unimed_jax.evaluate import columns, results
    from unimed_jax.evaluate.suite_results import number, published_lines, spread, words

    rows = [("set", "modality", "n", "subjects", "metric", "value", "95% CI")]
    for s in done.sets:
        d, m, v = s.data_set, s.task.metrics, s.task.main
        interval = v.reason if v.low is None else f"[{v.low:.3f} {v.high:.3f}]"
        value = "-" if v.value is None else f"{v.value:.3f}"
        rows.append((d.name, d.modality, str(m.n), str(m.subjects), words(d.metric), value, interval))
        for k, x in s.reference.items():
            figure = "undefined" if x is None else f"{x:.2f}"
            rows.append(("", "", "", "", f"reference {words(k)}, percent", figure, ""))
        for k, p in s.parts.items():
            value = "-" if p["accuracy"] is None else f"{p['accuracy']:.3f}"
            rows.append((f"  {k}", "", str(p["n"]), "", "accuracy", value, ""))
    for metric, groups in done.averages().items():
        for name, mean in groups.items():
            of = f"{mean['sets']} sets"
            rows.append((f"mean {name}", "", of, "", words(metric), number(metric, mean["value"]), ""))
    lines = columns.aligned(rows)
    for s in done.sets:
        if s.sensitivity:
            lines.append(f"prompts {s.data_set.name}: one prompt a class {spread(s.sensitivity)}")
        lines += [f"note    {s.data_set.name}: {n}" for n in (*s.notes, *s.task.metrics.notes)]
        lines += [f"calibr. {s.data_set.name}: {c}" for c in results.change(s.task.calibrated)]
    for t in done.findings:
        lines += ["", t.task.name, *columns.aligned(t.table()), ""]
    for p in done.suite.published if done.complete else ():
        lines += [
            f"publ.   {p['name']} {name}: accuracy, percent: {value}" for name, value in published_lines(p)
        ]
    if done.suite.published and not done.complete:
        lines.append(
            "note    published averages are not shown: they are over the whole suite, this is a part"
        )
    return "\n".join(lines)
