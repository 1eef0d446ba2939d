"""`unimed-jax models`: named models, where their weights come from, fetching them, checking a folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from unimed_jax.cli.args import Parser


def run(argv: list[str]) -> int:
    """Lists or shows named models, or checks a model folder; refusals propagate as UnimedError."""
    parser = Parser("unimed-jax models", description="Named models and model folders.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    lister = verbs.add_parser("list", help="every named model, one a line")
    show = verbs.add_parser("show", help="one model in full")
    show.add_argument("name", help="a name from `list`")
    check = verbs.add_parser("check", help="compare a model folder with its digests, load it and run it once")
    check.add_argument("folder", help="model folder, or the name of a fetched model")
    _add_fetch(verbs)
    for p in (lister, show):
        p.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse(argv)
    if args.verb == "check":
        return _check(args.folder)
    if args.verb == "fetch":
        return _fetch(args)
    from unimed_jax.models import zoo

    if args.verb == "show":
        return _show(facts(args.name), as_json=args.json)
    return _list([facts(name) for name in zoo.MODELS], as_json=args.json)


def _add_fetch(verbs: Any) -> None:
    fetch = verbs.add_parser(
        "fetch", help="download the weights of a named model once, verified, as a model folder"
    )
    fetch.add_argument(
        "name", help="a name from `list`, or a part: dinov2-s14, biomedbert-base, biomedbert-large"
    )
    fetch.add_argument("--out", default="", help="folder to make; default: $UNIMED_JAX_MODELS/NAME")
    fetch.add_argument(
        "--revision", default="", help="commit of the weights' repository, where none is pinned"
    )
    fetch.add_argument("--sha256", default="", help="digest of the weights, where none is pinned")
    fetch.add_argument(
        "--trust-first-download",
        action="store_true",
        help="where no pin is known, take what the hub has today and record it in the folder",
    )
    fetch.add_argument(
        "--tokenizer", default="", help="a local tokenizer.json or vocab.txt instead of the hub's"
    )
    fetch.add_argument("--force", action="store_true", help="replace an existing model folder")


def _fetch(args: Any) -> int:
    from unimed_jax import hub
    from unimed_jax.models import origins, zoo

    origin = origins.get(args.name)
    out = args.out or str(zoo.models_dir() / args.name)
    print(f"{args.name}: {origin.about}\nlicence {origin.licence}; {origin.use}")
    done = hub.fetch(
        args.name,
        out,
        revision=args.revision,
        sha256=args.sha256,
        trust_first=args.trust_first_download,
        tokenizer=args.tokenizer,
        force=args.force,
        progress=print,
    )
    print(f"wrote {done.folder}; from here on nothing needs the network")
    return 0


def facts(name: str) -> dict[str, Any]:
    """What a named model is and costs: parameters (counts), sizes (pixels, tokens), forward GFLOPs a sample.

    Raises:
        UsageError: for an unknown name.
    """
    from unimed_jax import config
    from unimed_jax.models import clip, flops, origins, zoo

    m = zoo.get(name)
    _, abstract = clip.skeleton(m)
    return {
        "name": name,
        "parameters": clip.count(abstract),
        "vision_parameters": clip.count(abstract["vision"]),
        "text_parameters": clip.count(abstract["text"]),
        "image_size": m.vision.image_size,
        "image_tokens": (m.vision.image_size // m.vision.patch_size) ** 2 + 1,
        "context_length": m.text.context_length,
        "embed_dim": m.embed_dim,
        "image_gflops": flops.image_flops(m) / 1e9,
        "text_gflops": flops.text_flops(m) / 1e9,
        "train_gflops": flops.train_flops(m) / 1e9,
        "config": config.to_dict(m),
        "origin": dataclasses.asdict(origins.ORIGINS[name]) if name in origins.ORIGINS else None,
        "here": str(zoo.local(name) or ""),
    }


def _tower(c: dict[str, Any]) -> str:
    kind = c.get("kind") or f"ViT/{c['patch_size']}"
    return f"{kind} {c['depth']}x{c['width']}"


def _list(models: list[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(models, indent=1))
        return 0
    from unimed_jax.evaluate import columns

    head = (
        "name",
        "parameters",
        "vision",
        "text",
        "image",
        "context",
        "embed",
        "GF image",
        "GF text",
        "weights",
    )
    rows = [
        (
            f["name"],
            f"{f['parameters'] / 1e6:.1f}M",
            _tower(f["config"]["vision"]),
            _tower(f["config"]["text"]),
            f"{f['image_size']} px",
            f"{f['context_length']}",
            f"{f['embed_dim']}",
            f"{f['image_gflops']:.2f}",
            f"{f['text_gflops']:.2f}",
            _whereabouts(f),
        )
        for f in models
    ]
    print("\n".join(columns.aligned([head, *rows])))
    return 0


def _whereabouts(f: dict[str, Any]) -> str:
    """Where the weights of a name are: here, to be fetched (with or without a question), or nowhere."""
    if f["here"]:
        return "here"
    if not f["origin"]:
        return "-"
    files = [f["origin"][role] for role in ("weights", "tokenizer") if f["origin"][role]]
    pinned = all(file[k] for file in files for k in ("revision", "sha256"))
    return "hub, pinned" if pinned else "hub"


def _origin(f: dict[str, Any]) -> list[str]:
    """The lines of `show` about the weights."""
    o = f["origin"]
    if not o:
        return ["  weights         none published"]
    lines = [
        f"  about           {o['about']}",
        f"  licence         {o['licence']}",
        f"  use             {o['use']}",
    ]
    for role in ("weights", "tokenizer"):
        if file := o[role]:
            lines.append(f"  {role:<15} {file['repo']} {file['name']}")
            lines.append(
                f"    revision      {file['revision'] or 'not known: --revision or --trust-first-download'}"
            )
            lines.append(
                f"    sha256        {file['sha256'] or 'not known: --sha256 or --trust-first-download'}"
            )
    lines += [f"  same weights    {url}\n    sha256        {sha}" for url, sha in o["same"].items()]
    lines.append(f"  prompts         {', '.join(o['prompts']) or 'of your own'}")
    lines.append(f"  here            {f['here'] or 'no: unimed-jax models fetch ' + f['name']}")
    return lines


def _show(f: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(f, indent=1))
        return 0
    settings = f["config"]
    print(f["name"])
    print(
        f"  parameters      {f['parameters']:,} (vision {f['vision_parameters']:,}, text {f['text_parameters']:,})"
    )
    print(f"  image           {f['image_size']} px, {f['image_tokens']} tokens")
    print(f"  text            context {f['context_length']} tokens")
    print(f"  embedding       {f['embed_dim']}")
    print(f"  forward GFLOPs  image {f['image_gflops']:.2f}, text {f['text_gflops']:.2f} at full context")
    print(f"  training GFLOPs {f['train_gflops']:.2f} an image-caption pair")
    print("\n".join(_origin(f)))
    for tower in ("vision", "text"):
        print(f"  {tower}")
        for k, v in settings[tower].items():
            print(f"    {k:<14} {v}")
    for k, v in settings.items():
        if k not in ("name", "vision", "text"):
            print(f"  {k:<15} {v}")
    return 0


def _check(folder: str) -> int:
    import numpy as np

    from unimed_jax import infer, model_folder
    from unimed_jax.errors import DataError
    from unimed_jax.models import origins

    model_folder.verify(folder)
    loaded = infer.load(folder)
    size = loaded.cfg.vision.image_size
    ramp = np.linspace(0, 255, size * size * 3).astype(np.uint8).reshape(1, size, size, 3)
    outputs = {"vision": loaded.encode_image(ramp)}
    if loaded.tokenizer is not None:
        outputs["text"] = loaded.encode_text(["a chest radiograph"])
    for tower, z in outputs.items():
        norm = float(np.linalg.norm(np.asarray(z, np.float64)))
        if not abs(norm - 1) < 1e-3:  # NaN fails too
            raise DataError(
                f"{folder}: the {tower} tower gives an embedding of length {norm}", "save it again"
            )
    ran = "both towers run" if len(outputs) == 2 else "the vision tower runs; no tokenizer, so no texts"
    print(f"{folder}: {loaded.cfg.name}, {sum(a.size for a in _leaves(loaded.params)):,} parameters, {ran}")
    known = origins.ORIGINS.get(loaded.cfg.name)
    for line in model_folder.describe_origin(folder):
        print(f"  {line}")
    if known and known.prompts:
        print(f"  prompts: {', '.join(known.prompts)}")
    return 0


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)
