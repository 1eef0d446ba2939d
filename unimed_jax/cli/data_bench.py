"""`unimed-jax data bench`: how fast these records become batches here, and how many cores a training chip needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unimed_jax.cli.args import reader_threads
from unimed_jax.data import limits
from unimed_jax.errors import UsageError


def add_parser(verbs: Any) -> None:
    """The command under `data`."""
    bench = verbs.add_parser(
        "bench",
        help="how fast records are read and decoded here",
        description="Reads the records that training would read first, stage by stage: rates by the clock and by CPU "
        "time, and the share of what decoding and resizing alone allow. Writes nothing.",
    )
    add = bench.add_argument
    add("root", help="folder with sources, or of one source")
    add("--split", default="train", help="of the records")
    add("--size", type=int, default=224, help="pixels of a side of the training picture")
    add("--threads", type=int, default=reader_threads(), help="reader threads")
    add("--workers", type=int, default=0, help="reader processes, measured beside the threads")
    add("--images", type=int, default=256, help="pictures a round")
    add("--rounds", type=int, default=3, help="the best of them counts")
    add(
        "--rate",
        type=float,
        default=0.0,
        metavar="R",
        help="pictures a second of a training chip: how many cores feed it",
    )
    add("--tokenizer", default="", help="default: ROOT/tokenizer.json")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; refusals propagate as UnimedError."""
    from unimed_jax import config
    from unimed_jax.data import bench, shards, text

    if min(args.size, args.images, args.rounds, args.threads) < 1 or min(args.workers, args.rate) < 0:
        raise UsageError(
            "--size, --images, --rounds and --threads must be at least 1, --workers and --rate at least 0"
        )
    shards.find_sources(args.root)
    words = Path(args.tokenizer or args.root)
    if not args.tokenizer and not (words / "tokenizer.json").is_file():
        raise UsageError(f"{words} has no tokenizer.json", "--tokenizer FILE, the one of the model to train")
    cfg = config.Train()
    cfg.model.vision.image_size = args.size
    cfg.data = config.Data(root=args.root, split=args.split)
    found = bench.measure(
        cfg,
        text.load_tokenizer(words),
        n=args.images,
        rounds=args.rounds,
        threads=args.threads,
        workers=args.workers,
        rate=args.rate,
    )
    found = {"root": args.root, "split": args.split, "cores": limits.cores(), **found}
    print(json.dumps(found, indent=1) if args.json else _table(found))
    return 0


def _table(found: dict[str, Any]) -> str:
    from unimed_jax.data import bench
    from unimed_jax.evaluate import columns

    lines = [("stage", "a second", "a core and second", "MB/s", "of the limit")]
    for r in found["stages"]:
        share = f"{r['core_over_limit']:.2f}" if r["stage"].startswith("pipeline") else ""
        lines.append(
            (r["stage"], f"{r['wall_per_s']:.0f}", f"{r['core_per_s']:.0f}", f"{r['mb_per_s']:.1f}", share)
        )
    sources = ", ".join(f"{k} {n}" for k, n in found["sources"].items())
    head = (
        f"{sources} records; {found['pictures']} of {found['mean_bytes'] / 1000:.0f} kB to {found['size']} px"
    )
    out = [head, *columns.aligned(lines), f"limit: {bench.LIMIT} in a bare loop on one core"]
    if "rate" in found:
        out.append(
            f"{found['rate']:g} pictures a second need {found['cores_for_rate']} cores like these "
            f"({found['cores']} here)"
        )
    return "\n".join(out)
