"""`unimed-jax search`: the nearest rows of an index to a text, a picture or one of its own rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.cli.args import Parser
from unimed_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from unimed_jax.evaluate.embedding_table import Index
    from unimed_jax.evaluate.inputs import Item

NOTE = "nearest by cosine, which is no diagnosis; research use only, not a medical device"
_COLUMNS = ("rank", "score", "id", "file", "frame", "modality", "key", "text")


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax search", description="Exact nearest neighbours in what `unimed-jax embed` wrote."
    )
    parser.add_argument(
        "--index", required=True, metavar="EMB.parquet", help="a file, a folder or a pattern of files"
    )
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", metavar="T", help="what to look for")
    query.add_argument("--image", metavar="F", help="a picture (PNG, JPEG, TIFF, DICOM, NIfTI)")
    query.add_argument("--like", metavar="ID", help="a row of the index; it is not among its own hits")
    parser.add_argument(
        "--model", default="", metavar="M", help="the model that made the index; --like needs none"
    )
    parser.add_argument("-k", type=int, default=10, help="hits")
    parser.add_argument("--out", default="", metavar="HITS.csv", help="write the hits as a table")
    parser.add_argument("--html", default="", metavar="HITS.html", help="write a page with the pictures")
    parser.add_argument(
        "--data", default="", metavar="DIR", help="records, for the pictures of a page about them"
    )
    parser.add_argument("--json", action="store_true", help="print the hits as JSON")
    parser.add_argument("--force", action="store_true", help="replace existing outputs")
    return parser


def run(argv: list[str]) -> int:
    """Searches and prints; refusals propagate as UnimedError."""
    args = _parser().parse(argv)
    if args.k < 1:
        raise UsageError("-k must be at least 1")
    if args.like is None and not args.model:
        raise UsageError("--text and --image need --model", "the model that made the index")
    if args.data and not args.html:
        raise UsageError("--data is for --html", "leave it out, or give both")
    for path in filter(None, (args.out, args.html)):
        if Path(path).is_dir():
            raise UsageError(f"{path} is a folder", "give a file name")
        if Path(path).exists() and not args.force:
            raise UsageError(f"{path} exists", "choose another name, or --force to replace it")
    from unimed_jax.data import files
    from unimed_jax.evaluate import embedding_table

    index = embedding_table.Index(args.index)
    outputs = [Path(p) for p in (args.out, args.html) if p]
    files.refuse_sources(outputs, [*index.files, *filter(None, [args.image])])
    if not len(index):
        raise DataError("the index has no rows", "embed something")
    query, own = _query(args, index)
    import jax

    from unimed_jax import config, parallel
    from unimed_jax.evaluate import search

    mesh = parallel.make_mesh(config.Mesh(), jax.local_devices())
    found = search.search(index, query[None], args.k + (own >= 0), mesh=mesh)[0]
    hits = [h for h in found if h["row"] != own][: args.k]
    for rank, hit in enumerate(hits, 1):
        hit["rank"] = rank
    facts = index.facts
    head = {
        "index": {"rows": len(index), "content": facts.content, "dtype": facts.dtype},
        "model": facts.model,
        "settings": facts.settings,
        "query": {k: v for k in ("text", "image", "like") if (v := getattr(args, k)) is not None},
    }
    if args.json:
        print(json.dumps({**head, "hits": hits, "note": NOTE}, indent=1, ensure_ascii=False))
    else:
        print(_table(hits))
    _write(args, head, hits)
    return 0


def _query(args: argparse.Namespace, index: Index) -> tuple[np.ndarray, int]:
    """The vector to look for, and its own row number or -1."""
    from unimed_jax.evaluate import search

    model = None
    if args.model:
        from unimed_jax import infer

        model = infer.load(args.model, batch_size=1)
        search.check_model(index, model.digest, model.cfg.name)
    if args.like is not None:
        own = index.find(args.like)
        return index.vector(own), own
    assert model is not None
    if args.text is not None:
        if not args.text.strip():
            raise UsageError("--text is empty", "say what to look for")
        return model.encode_text([args.text])[0], -1
    return model.encode_image([args.image])[0], -1


def _table(hits: list[dict[str, Any]]) -> str:
    """Rank, score, what it is; only what has a value."""
    columns = [c for c in _COLUMNS if c in ("rank", "score", "id") or any(h[c] for h in hits)]
    columns = [c for c in columns if c not in ("file", "key") or any(h[c] != h["id"] for h in hits)]
    lines = [columns, *([_cell(h[c]) for c in columns] for h in hits)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else " " for c in text)


def _write(args: argparse.Namespace, head: dict[str, Any], hits: list[dict[str, Any]]) -> None:
    from unimed_jax.data import files
    from unimed_jax.evaluate import gallery, inputs, results

    if args.out:
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            files.write_text(Path(args.out), results.to_csv(hits, _COLUMNS))
        except OSError as e:
            raise DataError(f"{args.out} cannot be written: {e.strerror or e}", "choose another name") from e
    if args.html:
        facts = {
            "Query": ", ".join(f"{k}: {v}" for k, v in head["query"].items()),
            "Index": f"{head['index']['rows']} rows",
            "Model": f"{head['model']['name']}, sha256 {head['model']['sha256'][:12]}",
        }
        keys = {h["key"] for h in hits if h["key"]}
        records = inputs.Records(args.data).with_keys(keys) if args.data else {}
        settings = head["settings"]
        figures = [
            ([(_thumbnail(h, settings, records), h["id"])], f"{h['rank']}. {h['score']:.4f} {h['text']}")
            for h in hits
        ]
        gallery.write(args.html, gallery.page("Search", facts, [("", figures)], NOTE))
    written = [p for p in (args.out, args.html) if p]
    if written and not args.json:
        print(f"wrote   {'  '.join(written)}")
    if not args.json:
        print(f"note    {NOTE}")


def _thumbnail(hit: dict[str, Any], settings: dict[str, str], records: Mapping[str, Item]) -> str:
    """The hit's picture, if its file or record is still there; else nothing."""
    from unimed_jax.data import medical, windows
    from unimed_jax.evaluate import gallery, inputs

    class One(medical.Slices):
        def pick(self, frames: int) -> range:
            return range(min(hit["frame"], frames - 1), min(hit["frame"], frames - 1) + 1)

    record = records.get(hit["key"])
    if record is None and not (hit["file"] and Path(hit["file"]).is_file()):
        return ""
    try:
        if record is not None:
            return gallery.thumbnail(record.pixels())
        window = windows.parse_window(settings.get("window", ""))
        found = medical.read(hit["file"], window=window, slices=One())[0]
        return gallery.thumbnail(inputs.Item(id="", data=found.data, file=hit["file"]).pixels())
    except DataError:
        return ""
