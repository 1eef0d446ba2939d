"""`unimed-jax data overlap`: pictures that training and evaluation share, or that one set holds twice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.evaluate.inputs import Inputs
    from unimed_jax.evaluate.overlap import Audit

_COLUMNS = ("kind", "bits", "cosine", "a", "b")
_WORDS = {
    "bytes": "the same file",
    "pixels": "the same picture, stored differently",
    "phash": "similar, by perceptual hash",
    "embedding": "similar to the model",
}


def add_parser(verbs: Any) -> None:
    """The command's flags."""
    parser = verbs.add_parser(
        "overlap",
        help="pictures in both of two sets, or twice in one",
        description="Compares two sets, each records (ROOT or ROOT@SPLIT), a folder of pictures or a suite; or one "
        "set with itself. Exit code 0 whether or not there is overlap; with --fail 3 if there is; 4 if pictures "
        "could not be read.",
    )
    add = parser.add_argument
    add("a", metavar="A", help="records, ROOT@SPLIT, or a folder of pictures; usually what was trained on")
    add(
        "b",
        nargs="?",
        metavar="B",
        default="",
        help="the same of what is evaluated on; default: A with itself",
    )
    add("--suite", default="", metavar="S", help="instead of B: the sets of a suite, in --data-root")
    add("--data-root", default="", metavar="DIR", help="folder of the suite's data sets")
    add("--set", action="append", default=[], metavar="NAME=PATH", help="a data set's own folder; repeatable")
    add("--sets", default="", metavar="X,Y", help="only these sets of the suite")
    add("--option", action="append", default=[], metavar="SET:OPTION", help="a variant of a set; repeatable")
    add("--annotations", default="", metavar="DIR", help="lists that the original's repository holds")
    add("--slices", default="middle", help="middle, all or every:N, of files with several frames")
    add(
        "--distance",
        type=int,
        default=10,
        help="bits in which perceptual hashes may differ; -1 = without them",
    )
    add("--model", default="", metavar="M", help="also compare embeddings of this model")
    add("--cosine", type=float, default=0.98, help="of two embeddings, from which pictures count as similar")
    add("--out", default="", metavar="OVERLAP.csv", help="write the pairs; pictures that fail go beside it")
    add("--html", default="", metavar="FILE", help="write a page that shows pairs side by side")
    add("--fail", action="store_true", help="exit code 3 if anything is found")
    add("--threads", type=int, default=4, help="pictures read in parallel")
    add("--batch-size", type=int, default=64, help="pictures at once, for --model")
    add("--json", action="store_true", help="print everything as JSON")
    add("--force", action="store_true", help="replace existing outputs")


def run(args: argparse.Namespace) -> int:
    """Audits, prints and writes.

    Raises:
        UsageError: for places or flags that do not go together.
        DataError: when no picture of a set can be read; with --fail, when something is found.
        SomeInputsFailed: after everything is written, when pictures could not be read.
    """
    if args.threads < 1 or args.batch_size < 1:
        raise UsageError("--threads and --batch-size must be at least 1")
    if args.b and args.suite:
        raise UsageError("a suite stands in the place of B", "give B or --suite")
    if bool(args.suite) != bool(args.data_root or args.set):
        raise UsageError("--suite and --data-root (or --set) belong together", "give both, or B")
    beside = Path(args.out)
    errors = beside.with_name(f"{beside.stem}.errors.csv") if beside.name else None
    outputs = [Path(p) for p in (args.out, errors, args.html) if p]
    if len(set(map(Path.absolute, outputs))) < len(outputs):
        raise UsageError("--out and --html have the same name", "two files, two names")
    for path in outputs:
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "give a file name")
        if path.exists() and not args.force:
            raise UsageError(f"{path} exists", "choose another name, or --force to replace it")
    a, b, failed = _open(args)

    from unimed_jax.data import files

    files.refuse_sources(outputs, [*a.sources(), *(b.sources() if b else ())])

    from unimed_jax.cli.progress import Progress
    from unimed_jax.evaluate import overlap

    loaded = None
    if args.model:
        from unimed_jax import config, infer, parallel

        loaded = infer.load(args.model, mesh=parallel.make_mesh(config.Mesh()), batch_size=args.batch_size)
    with Progress("compare", "pictures") as progress:
        found = overlap.audit(
            a,
            b,
            distance=args.distance,
            loaded=loaded,
            cosine=args.cosine,
            threads=args.threads,
            progress=progress,
        )
    lost = [*found.errors, *({"set": f["set"], "input": "", "reason": f["reason"]} for f in failed)]
    if args.json:
        print(json.dumps({**found.json(), "errors": lost}, indent=1, ensure_ascii=False))
    else:
        print(_table(found))
        for f in failed:
            print(f"left out {f['set']}: {f['reason']}")
    written = _write(args, errors, found, lost, a, b)
    if written and not args.json:
        print(f"wrote   {'  '.join(written)}")
    if args.fail and found.shared:
        raise DataError(
            f"{found.shared} of {len(found.b)} pictures of {found.b.name} are there again", _where(args)
        )
    if lost:
        raise SomeInputsFailed(
            f"{len(lost)} pictures or sets could not be read",
            f"see {errors}" if errors else "--out lists them",
        )
    return 0


def _open(args: argparse.Namespace) -> tuple[Inputs, Inputs | None, list[dict[str, str]]]:
    from unimed_jax.cli import suite
    from unimed_jax.data import medical
    from unimed_jax.evaluate import inputs

    slices = medical.Slices.parse(args.slices)
    a = inputs.open_place(args.a, slices=slices)
    if args.suite:
        wanted = [s for s in args.sets.split(",") if s]
        found, failed = inputs.suite(
            args.suite,
            args.data_root,
            wanted=wanted,
            options=args.option,
            places=suite.places(args.set),
            annotations=args.annotations,
        )
        return a, found, failed
    return a, inputs.open_place(args.b, slices=slices) if args.b else None, []


def _where(args: argparse.Namespace) -> str:
    return f"see {args.out}" if args.out else "--out lists them"


def _table(found: Audit) -> str:
    """Counts of each kind."""
    lines = []
    for name, s in [("a", found.a)] if found.itself else [("a", found.a), ("b", found.b)]:
        failed = f", {len(s.errors)} could not be read" if s.errors else ""
        flat = f", {s.flat} of nearly one gray (no hash)" if s.flat else ""
        lines.append(f"{name}       {s.name}: {len(s)} pictures{flat}{failed}")
    for kind, n in found.counts.items():
        limit = {"phash": f" (at most {found.distance} bits)", "embedding": f" (cosine >= {found.cosine})"}
        lines.append(f"{n['pictures']:7d}  {_WORDS[kind]}{limit.get(kind, '')}: {n['pairs']} pairs")
    whose = "are like an earlier one" if found.itself else "of b are like one of a"
    lines.append(f"{found.shared:7d}  pictures {whose}, of {len(found.b)}")
    return "\n".join(lines)


def _write(
    args: argparse.Namespace,
    errors: Path | None,
    found: Audit,
    lost: list[dict[str, str]],
    a: Inputs,
    b: Inputs | None,
) -> list[str]:
    from unimed_jax.data import files
    from unimed_jax.evaluate import gallery, results

    written = []
    if errors:
        texts = {Path(args.out): results.to_csv(found.rows(), _COLUMNS)}
        if lost:
            texts[errors] = results.to_csv(lost, ("set", "input", "reason"))
        else:
            errors.unlink(missing_ok=True)
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                files.write_text(path, text)
                written.append(str(path))
        except OSError as e:
            raise DataError(f"{args.out} cannot be written: {e.strerror or e}", "choose another name") from e
    if args.html:
        gallery.write(args.html, _page(found, a, b))
        written.append(args.html)
    return written


def _page(found: Audit, a: Inputs, b: Inputs | None) -> str:
    from unimed_jax.evaluate import gallery, overlap

    groups = []
    for kind, chosen in overlap.examples(found, a, b).items():
        figures = []
        for pair, *items in chosen:
            sides = [(gallery.thumbnail(item.pixels()), item.id) for item in items]
            values = {"phash": f"{pair.bits} bits", "embedding": f"cosine {pair.cosine or 0:.4f}"}
            figures.append((sides, values.get(kind, "")))
        n = found.counts[kind]
        groups.append((f"{_WORDS[kind].capitalize()}: {n['pictures']} pictures, {n['pairs']} pairs", figures))
    facts = {"A": f"{found.a.name}, {len(found.a)} pictures"}
    if not found.itself:
        facts["B"] = f"{found.b.name}, {len(found.b)} pictures"
    facts["Found"] = f"{found.shared} pictures of {found.b.name}"
    note = "Similar is not the same: pairs by hash or model are to be looked at, the least certain are shown first."
    return gallery.page("Overlap", facts, groups, note)
