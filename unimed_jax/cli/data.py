"""`unimed-jax data`: build records from a source, check them, count them, look at some, compare sets."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.cli import data_bench, overlap
from unimed_jax.cli.args import Parser
from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    from unimed_jax.data.record import Example
    from unimed_jax.data.shards import RecordSource


def _parser() -> Parser:
    parser = Parser(
        prog="unimed-jax data", description="Records: build, import-wds, check, stats, show, overlap, bench."
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="{build,import-wds,check,stats,show,overlap,bench}"
    )
    build = verbs.add_parser(
        "build",
        help="write the records of a source",
        description=_sources_help(),
    )
    build.add_argument("source", help="name of a source")
    build.add_argument("--raw", help="folder of the raw data")
    build.add_argument("--captions", help="table of captions")
    build.add_argument("--name", help="name of the source, where it can be chosen")
    tars = verbs.add_parser(
        "import-wds",
        help="write the records of web-dataset tars, UniMed's own among them",
        description="Writes the records of web-dataset tars: pictures with a .txt, or a .json with caption, text or "
        "captions; --name SOURCE reads those of UniMed by their own rules.",
    )
    tars.add_argument("raw", nargs="+", metavar="TARS", help="tars, or folders with tars")
    tars.add_argument(
        "--name", help="of the source; a name of UniMed's sources, where the tars are that source's"
    )
    tars.set_defaults(source="webdataset")
    for verb in (build, tars):
        _add_export_options(verb)
    check = verbs.add_parser("check", help="verify records; exit code 3 with a list if anything is wrong")
    check.add_argument("--full", action="store_true", help="read every record, decode every picture")
    stats = verbs.add_parser(
        "stats", help="count pictures, patients, captions, their lengths, and what is there twice"
    )
    stats.add_argument(
        "--duplicates",
        action="store_true",
        help="decode every picture; compare pixels and perceptual hashes, too",
    )
    stats.add_argument(
        "--distance", type=int, default=10, help="bits in which the hashes of similar pictures may differ"
    )
    show = verbs.add_parser("show", help="print some records")
    show.add_argument("-n", type=int, default=5, help="records")
    show.add_argument("--source", default="", help="only this source")
    show.add_argument("--split", default="", help="only this split")
    show.add_argument("--html", default="", metavar="FILE", help="write a page with the pictures, too")
    for verb in (check, stats, show):
        verb.add_argument("root", help="folder with sources, or of one source")
    for verb in (check, stats):
        verb.add_argument("--workers", type=int, default=1, help="processes")
        verb.add_argument("--json", action="store_true", help="print JSON")
    overlap.add_parser(verbs)
    data_bench.add_parser(verbs)
    return parser


def _add_export_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", required=True, help="root folder of all sources; written to OUT/SOURCE/1.0.0")
    verb.add_argument("--shards", type=int, help="files a split (default: by size)")
    verb.add_argument("--workers", type=int, default=1, help="processes")
    verb.add_argument(
        "--runner",
        default="local",
        choices=("local", "beam"),
        help="beam: shards are written by an Apache Beam pipeline (extra beam)",
    )
    verb.add_argument(
        "--beam-options",
        default="",
        metavar="TEXT",
        help='of the pipeline, e.g. --beam-options="--runner=FlinkRunner --flink_master=HOST:8081" (default: it '
        "runs here)",
    )
    verb.add_argument(
        "--shard-range",
        default="",
        metavar="A:B",
        help="write these shards only; the last call leaves it out",
    )
    verb.add_argument("--tokenizer", help="counts tokens; tokenizer.json, vocab.txt or a folder with one")
    verb.add_argument(
        "--max-side",
        type=int,
        default=0,
        metavar="N",
        help="store larger pictures with a longer side of N pixels (default: as they are)",
    )
    verb.add_argument("--max-bad", type=float, help="share of items that may be rejected (default: 0.001)")
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another option of the source"
    )
    verb.add_argument("--force", action="store_true", help="replace a finished export")
    verb.add_argument(
        "--steal", action="store_true", help="take over the lock of a dead exporter on another machine"
    )


def _sources_help() -> str:
    from unimed_jax.data.sources import SOURCES

    # The 13 of UniMed share one line.
    shown: dict[str, list[str]] = {}
    for name, entry in SOURCES.items():
        shown.setdefault(entry.help, []).append(name)
    return "Sources: " + "; ".join(f"{', '.join(names)} ({text})" for text, names in shown.items()) + "."


def run(argv: list[str]) -> int:
    """Runs one of the commands and returns the exit code."""
    args = _parser().parse(argv)
    if args.verb != "bench" and getattr(args, "workers", 1) < 1:
        raise UsageError(f"--workers is {args.workers}", "at least 1")
    return {
        "build": _build,
        "import-wds": _build,
        "check": _check,
        "stats": _stats,
        "show": _show,
        "overlap": overlap.run,
        "bench": data_bench.run,
    }[args.verb](args)


def _build(args: argparse.Namespace) -> int:
    from unimed_jax.data import card, export, limits, text
    from unimed_jax.data.sources import open_source

    for flag, clash in (("--workers", args.workers > 1), ("--shard-range", args.shard_range)):
        if args.runner == "beam" and clash:
            raise UsageError(f"{flag} and --runner beam exclude each other", "Beam decides who writes what")
    if args.beam_options and args.runner != "beam":
        raise UsageError("--beam-options are for --runner beam", "give both")
    try:
        beam_options = shlex.split(args.beam_options)
    except ValueError as e:
        raise UsageError(f"--beam-options {args.beam_options!r}: {e}", "quote them as in a shell") from e
    options: dict[str, Any] = {
        k: v for k in ("raw", "captions", "name") if (v := getattr(args, k, None)) is not None
    }
    for entry in args.set:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(f"--set {entry} is not KEY=VALUE")
        options[key.strip().replace("-", "_")] = value
    source = open_source(args.source, options)
    if (prepare := getattr(source, "prepare", None)) is not None:  # minimed fetches its packages
        prepare(lambda line: print(line, file=sys.stderr, flush=True))
    if args.shard_range:
        return _build_range(args, source)
    settings: dict[str, Any] = {
        "shards": args.shards,
        "tokenizer": text.Tokenizer(args.tokenizer) if args.tokenizer else None,
        "max_bad": limits.MAX_BAD_SHARE if args.max_bad is None else args.max_bad,
        "max_side": args.max_side,
        "force": args.force,
        "steal": args.steal,
    }
    if args.runner == "beam":
        from unimed_jax.data import beam

        manifest = beam.export(source, args.out, beam_options, **settings)
    else:
        with _Progress() as progress:
            manifest = export.export(source, args.out, workers=args.workers, progress=progress, **settings)
    splits = ", ".join(f"{split} {manifest.examples(split)}" for split in manifest.splits)
    rejects = ", ".join(f"{reason} {n}" for reason, n in manifest.rejects.items()) or "none"
    notes = "".join(f"; {what}: {n}" for what, n in card.caption_notes(manifest).items())
    print(f"{manifest.source}: {splits} records; rejected: {rejects}{notes}")
    print(f"in {Path(args.out) / manifest.source / manifest.version}")
    return 0


def _build_range(args: argparse.Namespace, source: RecordSource) -> int:
    """Writes some shards, which `data build` without the range completes."""
    from unimed_jax.data import export, text

    first, colon, last = args.shard_range.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal():
        raise UsageError(f"--shard-range {args.shard_range!r} is no range", "e.g. 0:16 for the first sixteen")
    given = [flag for flag, value in (("--force", args.force), ("--max-bad", args.max_bad)) if value]
    if given:
        raise UsageError(
            f"{given[0]} belongs to the whole export", "leave it to the call without --shard-range"
        )
    with _Progress() as progress:
        done, total = export.write_range(
            source,
            args.out,
            int(first),
            int(last),
            shards=args.shards,
            workers=args.workers,
            tokenizer=text.Tokenizer(args.tokenizer) if args.tokenizer else None,
            max_side=args.max_side,
            steal=args.steal,
            progress=progress,
        )
    print(f"{source.name}: {done} of {total} shards are written")
    print("the same command without --shard-range writes what is missing, and the manifest")
    return 0


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("records", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]} rejected"))
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=None, bad=0)
        self._bar.start()
        return self

    def __call__(self, done: int, total: int, bad: int) -> None:
        self._bar.update(self._task, completed=done, total=total, bad=bad)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _check(args: argparse.Namespace) -> int:
    from unimed_jax.data import verify

    report = verify.check(args.root, full=args.full, workers=args.workers)
    if args.json:
        values = {k: getattr(report, k) for k in ("ok", "full", "sources", "shards", "records", "problems")}
        print(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        for problem in report.problems:
            print(problem)
        kind = "every record read" if report.full else "sizes and counts only; --full reads every record"
        print(f"{', '.join(report.sources)}: {report.shards} shards, {report.records} records ({kind})")
    if not report.ok:
        sys.stdout.flush()
        raise DataError(
            f"{len(report.problems)} problems under {args.root}, listed above", "export the source again"
        )
    return 0


def _stats(args: argparse.Namespace) -> int:
    from unimed_jax.data import stats

    found = stats.stats(args.root, workers=args.workers, duplicates=args.duplicates, distance=args.distance)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    place = ("source", "split", "modality")
    more = ("same_pixels", "similar") if args.duplicates else ()
    columns = (*place, "images", "duplicates", *more, "patients", "simulated")
    titles = (*place, "images", "there before", *(m.replace("_", " ") for m in more), "patients", "simulated")
    _print_table(titles, [[row[c] for c in columns] for row in found["rows"]])
    columns = (*place, "captions", "duplicate_captions", "words")
    groups = [
        (what, key, [n for n in stats.bucket_names(bounds) if any(n in row[key] for row in found["rows"])])
        for what, key, bounds in (
            ("words", "words_by_length", stats.WORD_BUCKETS),
            ("tokens", "tokens", stats.TOKEN_BUCKETS),
        )
    ]
    rows = [
        [
            *(row[c] for c in columns),
            *row["lengths"].values(),
            *(row[key].get(n, 0) for _, key, names in groups for n in names),
        ]
        for row in found["rows"]
    ]
    titles = (*place, "captions", "there before", "words", "median", "95 %", "longest")
    _print_table((*titles, *(f"{what} {n}" for what, _, names in groups for n in names)), rows)
    print(f"{found['images']} pictures, {found['duplicates']} of them there more than once")
    if args.duplicates:
        print(
            f"{found['same_pixels']} more with the pixels of an earlier one, {found['similar']} more similar to one "
            f"(at most {args.distance} bits)"
        )
    print(f"{found['captions']} captions, {found['duplicate_captions']} of them there more than once")
    return 0


def _print_table(header: tuple[str, ...], rows: list[list[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name, value in zip(header, rows[0] if rows else header, strict=True):
        table.add_column(name, justify="right" if isinstance(value, int) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else _plain(v) for v in row))
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _plain(text: Any) -> str:
    """Stored text for a terminal: without markup and control characters."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in str(text)))


def _show(args: argparse.Namespace) -> int:
    from unimed_jax.data import verify

    if args.n < 1:
        raise UsageError(f"-n is {args.n}", "at least 1")
    examples = verify.sample(args.root, args.n, source=args.source, split=args.split)
    rows = []
    for e in examples:
        more = f" (+{len(e.captions) - 1})" if len(e.captions) > 1 else ""
        picture = f"{e.image_format} {e.width}x{e.height}{' simulated' if e.simulated else ''}"
        caption = e.captions[0].text[:200] + more if e.captions else ""
        rows.append([e.key, e.split, e.modality, picture, ", ".join(e.labels), caption])
    _print_table(("key", "split", "modality", "picture", "labels", "caption"), rows)
    if args.html:
        _write_html(args, examples)
        print(f"wrote {args.html}")
    return 0


def _write_html(args: argparse.Namespace, examples: list[Example]) -> None:
    """A self-contained page: each picture, small, with everything said about it."""
    from unimed_jax.data import images
    from unimed_jax.evaluate import gallery

    figures = []
    for e in examples:
        about = (e.split, e.modality, ", ".join(e.labels), "simulated" * e.simulated)
        below = "\n".join([e.key, *filter(None, about)])
        captions = "\n".join(f"{c.text} ({c.kind})" for c in e.captions)
        picture = gallery.thumbnail(images.decode(e.image, where=e.key))
        figures.append(([(picture, below)], captions))
    chosen = {"records": args.root, "source": args.source, "split": args.split, "shown": str(len(examples))}
    facts = {k: v for k, v in chosen.items() if v}
    note = "research use only, not a medical device"
    gallery.write(args.html, gallery.page("Records", facts, [("", figures)], note))
