"""`unimed-jax embed`: pictures or texts to unit vectors in Parquet; the same command again continues."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from unimed_jax.cli.args import Parser, add_picture_arguments, picture_options, reader_threads
from unimed_jax.errors import SomeInputsFailed, UsageError

if TYPE_CHECKING:
    from unimed_jax.evaluate.inputs import Inputs, Texts

# What decides the pixels of files, and its default; it stands in the index.
_FOR_FILES = {"window": "", "slices": "middle", "mpp": None, "level": None, "tissue": 0.25, "max_tiles": 1000}


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax embed",
        description="Embeds files, exported records or lines of text. Stopped at any time, the same command continues.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files, folders and lists, as for predict")
    parser.add_argument(
        "--list", action="append", default=[], metavar="FILE", help="a CSV with the column file"
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="records instead: a root of sources, or one source"
    )
    parser.add_argument("--split", default="", help="of the records; default: all")
    parser.add_argument("--text", default="", metavar="FILE", help="lines of a UTF-8 text file instead")
    parser.add_argument("--model", required=True, metavar="M", help="model folder or run folder")
    parser.add_argument("--out", required=True, metavar="EMB.parquet", help="EMB.errors.csv goes beside it")
    parser.add_argument(
        "--dtype-out", choices=("float16", "float32"), default="float16", help="of the stored vectors"
    )
    add_picture_arguments(parser)
    parser.add_argument(
        "--share",
        default="",
        metavar="I/N",
        help="one of N processes, from 0/N; default: what the launcher says",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--threads", type=int, default=reader_threads(), help="files read in parallel")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument(
        "--force", action="store_true", help="replace an existing file, drop other unfinished work"
    )
    return parser


def run(argv: list[str]) -> int:
    """Embeds; exit code 4 when some inputs failed, which EMB.errors.csv lists."""
    args = _parser().parse(argv)
    if args.batch_size < 1 or args.threads < 1:
        raise UsageError("--batch-size and --threads must be at least 1")
    pictures = bool(args.paths or args.list)
    if pictures + bool(args.data) + bool(args.text) != 1:
        raise UsageError(
            "embed takes files, records or texts", "give one of PATH..., --data DIR and --text FILE"
        )
    given = [f"--{k.replace('_', '-')}" for k, v in _FOR_FILES.items() if getattr(args, k) != v]
    if given and not pictures:
        raise UsageError(f"{given[0]} is for files", "leave it out")
    if args.split and not args.data:
        raise UsageError("--split belongs to --data", "leave it out")
    from unimed_jax.evaluate import embed

    share = embed.parse_share(args.share)
    target = embed.target_of(Path(args.out), *share)
    embed.check_target(target, args.force)
    inputs = _inputs(args)

    import jax

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli.progress import Progress

    mesh = parallel.make_mesh(config.Mesh(), jax.local_devices())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    say = (lambda *_: None) if args.json else print
    say(f"model   {model.describe()}")
    say(f"input   {inputs.name}: {len(inputs)}{f', share {share[0]} of {share[1]}' if share[1] > 1 else ''}")
    for note in getattr(inputs, "notes", ()):
        say(f"        {note}")
    with Progress("embed", "inputs") as progress:
        done = embed.to_parquet(
            model,
            inputs,
            args.out,
            dtype=args.dtype_out,
            settings={k: str(getattr(args, k)) for k in _FOR_FILES} if pictures else {},
            share=share,
            threads=args.threads,
            force=args.force,
            progress=progress,
        )
    before = f"; {done.resumed} were done before" if done.resumed else ""
    failed = f"{len(done.errors)} of {done.inputs} inputs failed"
    say(f"rows    {done.rows} x {model.cfg.embed_dim} {args.dtype_out}; {failed}{before}")
    say(f"wrote   {done.path}")
    if args.json:
        found = {
            "out": str(done.path),
            "rows": done.rows,
            "dim": model.cfg.embed_dim,
            "dtype": args.dtype_out,
            "inputs": done.inputs,
            "failed": len(done.errors),
            "resumed": done.resumed,
            "model": {"name": model.cfg.name, "sha256": model.digest},
        }
        print(json.dumps(found, indent=1))
    if done.errors:
        raise SomeInputsFailed(failed, f"see {embed.errors_of(done.path)}")
    return 0


def _inputs(args: argparse.Namespace) -> Inputs | Texts:
    from unimed_jax.evaluate import inputs

    if args.text:
        return inputs.Texts(args.text)
    if args.data:
        return inputs.Records(args.data, args.split)
    window, slices, tiles = picture_options(args)
    return inputs.Files(
        args.paths, args.list, window=window, slices=slices, tiles=tiles, threads=args.threads
    )
