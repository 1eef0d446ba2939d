"""`unimed-jax captions`: captions from labels, by a language model or from templates, and their review."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unimed_jax.cli.args import Parser
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.captioning.checks import Rules
    from unimed_jax.data.label_captions import LabelCaptions


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax captions",
        description="Captions from labels (modality, anatomy, finding): generate, template, review, apply.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{generate,template,review,apply}")
    generate = verbs.add_parser(
        "generate",
        help="ask a language model behind an OpenAI-compatible endpoint",
        description="Labels in, checked captions out. The table's columns are modality, anatomy, finding and perhaps "
        "synonyms (with ; between them). The key, if any, comes from UNIMED_CAPTIONS_API_KEY. The same command again "
        "goes on where it stopped.",
    )
    template = verbs.add_parser("template", help="fill templates instead, marked as such")
    for verb in (generate, template):
        verb.add_argument("triplets", metavar="TRIPLETS.csv", help="table of labels")
        verb.add_argument("--out", required=True, metavar="FILE", help="CAPTIONS.json, or .csv")
        verb.add_argument("-k", type=int, default=10, help="captions of each label")
        verb.add_argument("--min-words", type=int, default=4, help="of a caption")
        verb.add_argument("--max-words", type=int, default=60, help="of a caption")
        verb.add_argument("--tokenizer", help="counts tokens; tokenizer.json, vocab.txt or a folder with one")
        verb.add_argument("--context", type=int, default=77, help="tokens of a caption, with --tokenizer")
    generate.add_argument("--endpoint", required=True, metavar="URL", help="e.g. http://127.0.0.1:8000/v1")
    generate.add_argument("--model", required=True, metavar="NAME", help="as the server knows it")
    generate.add_argument(
        "--allow-remote", action="store_true", help="labels may go to another machine than this one"
    )
    generate.add_argument("--seed", type=int, default=0, help="sent with each question")
    generate.add_argument("--temperature", type=float, default=0.8, help="of the model")
    generate.add_argument("--rounds", type=int, default=6, help="times a label is asked about, at most")
    generate.add_argument("--workers", type=int, default=4, help="questions at a time")
    generate.add_argument("--timeout", type=float, default=120.0, help="seconds of silence before a new try")
    generate.add_argument(
        "--retries", type=int, default=5, help="further tries after a failure of the network"
    )
    generate.add_argument("--steal", action="store_true", help="take over the lock of a dead run elsewhere")
    review = verbs.add_parser("review", help="write a page to accept or strike captions")
    review.add_argument("captions", metavar="CAPTIONS")
    review.add_argument("--out", required=True, metavar="PAGE.html", help="open it in a browser")
    apply = verbs.add_parser("apply", help="leave out what the page's decisions strike")
    apply.add_argument("captions", metavar="CAPTIONS")
    apply.add_argument("decisions", metavar="DECISIONS.json", help="saved by the page")
    apply.add_argument("--out", required=True, metavar="FILE", help="REVIEWED.json, or .csv")
    apply.add_argument("--accepted-only", action="store_true", help="leave out what is undecided, too")
    for verb in (generate, template, review, apply):
        verb.add_argument("--force", action="store_true", help="replace what is there")
    return parser


# option: (lowest, highest)
_RANGES = {
    "k": (1, 100),
    "min_words": (1, 1000),
    "max_words": (1, 1000),
    "context": (3, 4096),
    "temperature": (0.0, 2.0),
    "rounds": (1, 100),
    "workers": (1, 256),
    "timeout": (0.1, 86400.0),
    "retries": (0, 100),
    "seed": (0, 2**31 - 200),
}


def run(argv: list[str]) -> int:
    """Runs one of the commands and returns the exit code."""
    args = _parser().parse(argv)
    for option, (low, high) in _RANGES.items():
        value = getattr(args, option, low)
        if not low <= value <= high:
            dashes = "-" if len(option) == 1 else "--"
            raise UsageError(f"{dashes}{option.replace('_', '-')} is {value}", f"{low} to {high}")
    out = Path(args.out)
    if out.is_dir() or not out.name:
        raise UsageError(f"--out {args.out} is a folder", "give a file")
    if args.verb != "review" and out.suffix not in (".json", ".csv"):
        raise UsageError(f"--out {args.out} is neither .json nor .csv")
    inputs = [getattr(args, name, None) for name in ("triplets", "captions", "decisions")]
    if any(given and Path(given).resolve() == out.resolve() for given in inputs):
        raise UsageError(f"--out {args.out} is what is read", "give another file")
    # A generation that goes on has its answers beside it.
    resumed = args.verb == "generate" and _cache_folder(out).is_dir()
    if out.exists() and not (args.force or resumed):
        raise UsageError(f"{out} exists", "--force replaces it")
    return {"generate": _generate, "template": _template, "review": _review, "apply": _apply}[args.verb](args)


def _cache_folder(out: Path) -> Path:
    return out.with_name(out.name + ".cache")


def _rules(args: argparse.Namespace) -> Rules:
    from unimed_jax.captioning.checks import Rules

    if args.min_words > args.max_words:
        raise UsageError(f"--min-words {args.min_words} is more than --max-words {args.max_words}")
    if not args.tokenizer:
        return Rules(min_words=args.min_words, max_words=args.max_words)
    from unimed_jax.data.text import Tokenizer

    count = Tokenizer(args.tokenizer).count
    return Rules(min_words=args.min_words, max_words=args.max_words, max_tokens=args.context, count=count)


def _generate(args: argparse.Namespace) -> int:
    from unimed_jax.captioning import client, generate
    from unimed_jax.cli.progress import Progress
    from unimed_jax.data import label_captions, lock

    triplets = label_captions.read_triplets(Path(args.triplets))
    settings = generate.Settings(
        k=args.k, seed=args.seed, temperature=args.temperature, rounds=args.rounds, rules=_rules(args)
    )
    endpoint = client.Endpoint(
        args.endpoint,
        args.model,
        allow_remote=args.allow_remote,
        timeout=args.timeout,
        retries=args.retries,
    )
    out = Path(args.out)
    cache = generate.Cache(_cache_folder(out))
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{cache.folder} cannot be made ({e.strerror})") from e
    with lock.held(out.with_name(f".{out.name}.lock"), steal=args.steal):
        cache.sweep()
        with Progress("captions", "captions") as progress:
            found = generate.run(triplets, endpoint, cache, settings, workers=args.workers, progress=progress)
        if cache.hits:
            print(f"{cache.hits} answers were there from an earlier run", file=sys.stderr)
        if out.exists() and not args.force:
            _refuse_loss(out, found)
        return _finish(out, found, "--rounds asks more often; synonyms help where the finding is not named")


def _refuse_loss(out: Path, found: LabelCaptions) -> None:
    """Refuses to replace a file with captions that are not among the new ones: of other settings, or edited.

    Raises:
        UsageError: saying how many.
        DataError: for a file that holds no captions.
    """
    from unimed_jax.data import label_captions

    there, new = (
        {(label.triplet.key, c["text"]) for label in x.labels for c in label.captions}
        for x in (label_captions.read(out), found)
    )
    if lost := len(there - new):
        raise UsageError(
            f"{out} has {lost} captions that are not among the new ones",
            "--force replaces it, or give another --out; the answers are kept",
        )


def _template(args: argparse.Namespace) -> int:
    from unimed_jax.captioning import templates
    from unimed_jax.data import label_captions

    triplets = label_captions.read_triplets(Path(args.triplets))
    found = templates.run(triplets, args.k, _rules(args))
    return _finish(Path(args.out), found, "fewer captions with -k, or synonyms in the table")


def _finish(out: Path, found: LabelCaptions, remedy: str) -> int:
    """Writes the captions and the list of what is missing.

    Raises:
        SomeInputsFailed: when captions are missing.
    """
    from unimed_jax.captioning import generate
    from unimed_jax.data import label_captions

    lacking = generate.lacking(found)
    label_captions.write(out, found)
    errors = out.with_name(out.name + ".errors.csv")
    generate.write_errors(errors, lacking)
    total = sum(len(x.captions) for x in found.labels)
    print(f"{total} captions of {len(found.labels)} labels, kind {found.generator['kind']}: {out}")
    if not lacking:
        return 0
    for label in lacking[:10]:
        print(f"  {label.triplet.name}: {label.more['missing']} missing, {generate.reasons(label)}")
    sys.stdout.flush()
    missing = sum(x.more["missing"] for x in lacking)
    raise SomeInputsFailed(
        f"{missing} captions of {len(lacking)} labels are missing, listed in {errors}", remedy
    )


def _review(args: argparse.Namespace) -> int:
    from unimed_jax.captioning import review
    from unimed_jax.data import label_captions

    found = label_captions.read(Path(args.captions))
    review.write_page(Path(args.out), found)
    print(f"{sum(len(x.captions) for x in found.labels)} captions of {len(found.labels)} labels: {args.out}")
    print(f"then: unimed-jax captions apply {args.captions} decisions.json --out REVIEWED.json")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from unimed_jax.captioning import review
    from unimed_jax.data import label_captions

    found = label_captions.read(Path(args.captions))
    decisions = review.read_decisions(Path(args.decisions), found)
    kept = review.apply(found, decisions, accepted_only=args.accepted_only)
    label_captions.write(Path(args.out), kept)
    counts = ", ".join(f"{kept.generator['review'][c]} {c}" for c in ("accepted", "struck", "undecided"))
    print(f"{sum(len(x.captions) for x in kept.labels)} captions stay ({counts}): {args.out}")
    empty = [x.triplet.name for x in kept.labels if not x.captions]
    if empty:
        sys.stdout.flush()
        raise SomeInputsFailed(
            f"{len(empty)} labels have no caption left, the first is {empty[0]}",
            "generate again with another --seed, or unimed-jax captions template",
        )
    return 0
