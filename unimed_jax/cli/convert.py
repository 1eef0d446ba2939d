"""`unimed-jax convert`: weights from any known file, folder or run to any format that can hold the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimed_jax.cli.args import Parser

DESCRIPTION = """Reads UniMed-CLIP, MetaCLIP, OpenAI, OpenCLIP and Hugging Face weights without PyTorch, finds out the
architecture, and writes a model folder of this program or another library's format. Every tensor is accounted for;
whatever is missing, unexpected, mis-shaped or not finite is listed and then nothing is written. Nothing in a file is
ever executed, and nothing is fetched."""

# format: how the result is used
USE = {
    "native": 'unimed_jax.load("{0}")   or   unimed-jax predict FILES --model {0} --labels A,B --out OUT.csv',
    "openclip": 'open_clip.create_model_from_pretrained("local-dir:{0}")',
    "unimed": 'the original\'s create_model_and_transforms(..., pretrained="{0}")',
    "hf-vision": 'transformers.CLIPVisionModelWithProjection.from_pretrained("{0}")',
    "hf-clip": 'transformers.CLIPModel.from_pretrained("{0}")',
}


def run(argv: list[str]) -> int:
    """Converts; refusals propagate as UnimedError."""
    parser = Parser("unimed-jax convert", description=DESCRIPTION)
    parser.add_argument(
        "src",
        metavar="SRC",
        help=".pt, .bin or .safetensors file, folder of another library, model folder, RUN[@STEP]",
    )
    parser.add_argument("dst", metavar="DST", help="folder to write; a .pt file for --to unimed")
    parser.add_argument("--to", default="native", help="native, openclip, unimed, hf-clip or hf-vision")
    parser.add_argument(
        "--model", default="", metavar="NAME", help="a named architecture, where SRC does not show its own"
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="PATH", help="tokenizer file or folder, where SRC has none"
    )
    parser.add_argument(
        "--with-optimizer", action="store_true", help="bring Adam's moments and the step, too"
    )
    ema = parser.add_mutually_exclusive_group()
    ema.add_argument("--ema", action="store_true", default=None, help="of a run, the averaged weights")
    ema.add_argument("--no-ema", dest="ema", action="store_false", help="of a run, the plain weights")
    parser.add_argument(
        "--hf-text-name", default="", metavar="NAME", help="for openclip: the text tower's name on the hub"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with PyTorch on fixed inputs, fail above 1e-4"
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.add_argument("--force", action="store_true", help="replace an existing DST")
    args = parser.parse(argv)
    from unimed_jax.data import files

    # Gigabytes are hashed while the libraries are loaded.
    digest = files.sha256_ahead(Path(args.src)) if Path(args.src).is_file() else None
    from unimed_jax import conversion

    request = conversion.Request(
        src=args.src,
        dst=args.dst,
        to=args.to,
        model=args.model,
        tokenizer=args.tokenizer,
        with_optimizer=args.with_optimizer,
        ema=args.ema,
        hf_text=args.hf_text_name,
        verify=args.verify,
        force=args.force,
        digest=digest,
    )
    done = conversion.convert(request, (lambda line: None) if args.json else print)
    if args.json:
        print(json.dumps(_record(done, args.to), indent=1))
    elif len(done.towers) == 2:
        print(f"use     {USE[args.to].format(done.wrote[0])}")
    else:
        print(f"use     unimed-jax train ... --config.init.{done.towers[0]}={done.wrote[0]}")
    return 0


def _record(done: Any, to: str) -> dict[str, Any]:
    from unimed_jax import config

    return {
        "format": done.format,
        "to": to,
        "towers": list(done.towers),
        "model": config.to_dict(done.model),
        "read": done.read,
        "ignored": done.ignored,
        "wrote": [str(p) for p in done.wrote],
        "max_abs_difference": done.verified,
        "missing": done.missing,
    }
