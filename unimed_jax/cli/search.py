"""`unimed-jax search`: the nearest rows of an index to texts, pictures or its own rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_KINDS = ("text", "image", "like")
_BATCH = 32  # pictures of queries embedded at once


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: a text, a picture, or a row of the index."""

    kind: str
    value: str  # as written
    file: Path | None = None  # of a picture

    @property
    def title(self) -> str:
        """For readers."""
        return f"{self.kind}: {self.value}"


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax search",
        description="Exact nearest neighbours in what `unimed-jax embed` wrote; many queries read it once.",
    )
    parser.add_argument(
        "--index", required=True, metavar="EMB.parquet", help="a file, a folder or a pattern of files"
    )
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", action="append", metavar="T", help="what to look for; may be repeated")
    query.add_argument(
        "--image",
        action="extend",
        nargs="+",
        metavar="F",
        help="pictures (PNG, JPEG, TIFF, DICOM, NIfTI)",
    )
    query.add_argument(
        "--like",
        action="append",
        metavar="ID",
        help="a row of the index, not among its own hits; may be repeated",
    )
    query.add_argument(
        "--queries",
        metavar="Q.csv",
        help="a query a row, in one of the columns text, image (relative to the list) and like",
    )
    parser.add_argument(
        "--model", default="", metavar="M", help="the model that made the index; --like needs none"
    )
    parser.add_argument("-k", type=int, default=10, help="hits of each query")
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
    if args.data and not args.html:
        raise UsageError("--data is for --html", "leave it out, or give both")
    for path in filter(None, (args.out, args.html)):
        if Path(path).is_dir():
            raise UsageError(f"{path} is a folder", "give a file name")
        if Path(path).exists() and not args.force:
            raise UsageError(f"{path} exists", "choose another name, or --force to replace it")
    asked = _listed(Path(args.queries)) if args.queries else _given(args)
    if not args.model and any(q.kind != "like" for q in asked):
        raise UsageError("texts and images need --model", "the model that made the index")
    from unimed_jax.data import files
    from unimed_jax.evaluate import embedding_table

    index = embedding_table.Index(args.index)
    outputs = [Path(p) for p in (args.out, args.html) if p]
    read = [q.file for q in asked if q.file] + ([Path(args.queries)] if args.queries else [])
    files.refuse_sources(outputs, [*index.files, *read])
    if not len(index):
        raise DataError("the index has no rows", "embed something")
    facts = index.facts
    head = {
        "index": {"rows": len(index), "content": facts.content, "dtype": facts.dtype},
        "model": facts.model,
        "settings": facts.settings,
    }
    answers = list(zip(asked, _hits(args, index, asked), strict=True))
    one = len(asked) == 1 and not args.queries
    if args.json:
        said = [{"query": {q.kind: q.value}, "hits": hits} for q, hits in answers]
        body = said[0] if one else {"queries": said}
        print(json.dumps({**head, **body, "note": NOTE}, indent=1, ensure_ascii=False))
    else:
        print(
            "\n\n".join(_table(hits) if one else f"{_cell(q.title)}\n{_table(hits)}" for q, hits in answers)
        )
    _write(args, head, answers, one)
    return 0


def _given(args: argparse.Namespace) -> list[Query]:
    """The queries of the command line.

    Raises:
        UsageError: for an empty text.
    """
    kind = next(k for k in _KINDS if getattr(args, k) is not None)
    values = getattr(args, kind)
    if kind == "text" and not all(v.strip() for v in values):
        raise UsageError("--text is empty", "say what to look for")
    return [Query(kind, v, Path(v) if kind == "image" else None) for v in values]


def _listed(path: Path) -> list[Query]:
    """The queries of a CSV file.

    Raises:
        DataError: for a file that is no list of queries; the first row that is none, or two at once, is named.
    """
    from unimed_jax.data import tables

    table = tables.read(path)
    places = {k: table.header.index(k) for k in _KINDS if k in table.header}
    if not places:
        raise DataError(
            f"{path} has no column {', '.join(_KINDS)}", f"there are: {', '.join(table.header)[:200]}"
        )
    out = []
    for line, cells in table.rows:
        found = {k: cells[i].strip() for k, i in places.items() if i < len(cells) and cells[i].strip()}
        if len(found) != 1:
            what = "no query" if not found else " and ".join(found)
            raise DataError(f"{path} line {line} has {what}", f"fill one of {', '.join(places)}")
        ((kind, value),) = found.items()
        out.append(Query(kind, value, path.parent / value if kind == "image" else None))
    if not out:
        raise DataError(f"{path} has no queries", "one row each, below the line with the columns")
    return out


def _hits(args: argparse.Namespace, index: Index, asked: Sequence[Query]) -> list[list[dict[str, Any]]]:
    """The hits of each query, in one pass over the index."""
    vectors, own = _vectors(args.model, index, asked)
    import jax

    from unimed_jax import config, parallel
    from unimed_jax.evaluate import search

    mesh = parallel.make_mesh(config.Mesh(), jax.local_devices())
    found = search.search(index, vectors, args.k + any(row >= 0 for row in own), mesh=mesh)
    out = []
    for row, every in zip(own, found, strict=True):
        hits = [h for h in every if h["row"] != row][: args.k]
        out.append([h | {"rank": rank} for rank, h in enumerate(hits, 1)])
    return out


def _vectors(model_name: str, index: Index, asked: Sequence[Query]) -> tuple[np.ndarray, list[int]]:
    """What to look for [q, d], and each query's own row number or -1."""
    import numpy as np

    from unimed_jax.evaluate import search

    places = {kind: [i for i, q in enumerate(asked) if q.kind == kind] for kind in _KINDS}
    out, own = np.zeros((len(asked), index.facts.dim), np.float32), [-1] * len(asked)
    if model_name:
        from unimed_jax import infer

        model = infer.load(model_name, batch_size=max(1, min(_BATCH, len(places["image"]))))
        search.check_model(index, model.digest, model.cfg.name)
        if at := places["text"]:
            out[at] = model.encode_text([asked[i].value for i in at])
        if at := places["image"]:
            out[at] = model.encode_image([asked[i].file or asked[i].value for i in at])
    for i in places["like"]:
        own[i] = index.find(asked[i].value)
        out[i] = index.vector(own[i])
    return out, own


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


def _write(
    args: argparse.Namespace,
    head: dict[str, Any],
    answers: Sequence[tuple[Query, list[dict[str, Any]]]],
    one: bool,
) -> None:
    from unimed_jax.data import files
    from unimed_jax.evaluate import gallery, inputs, results

    if args.out:
        rows = [{"kind": q.kind, "query": q.value} | h for q, hits in answers for h in hits]
        columns = _COLUMNS if one else ("kind", "query", *_COLUMNS)
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            files.write_text(Path(args.out), results.to_csv(rows, columns))
        except OSError as e:
            raise DataError(f"{args.out} cannot be written: {e.strerror or e}", "choose another name") from e
    if args.html:
        facts = {
            **({"Query": answers[0][0].title} if one else {"Queries": str(len(answers))}),
            "Index": f"{head['index']['rows']} rows",
            "Model": f"{head['model']['name']}, sha256 {head['model']['sha256'][:12]}",
        }
        shown = {h["row"]: h for _, hits in answers for h in hits}
        keys = {h["key"] for h in shown.values() if h["key"]}
        records = inputs.Records(args.data).with_keys(keys) if args.data else {}
        jpegs = {row: _thumbnail(h, head["settings"], records) for row, h in shown.items()}
        groups = [
            (
                "" if one else q.title,
                [([(jpegs[h["row"]], h["id"])], f"{h['rank']}. {h['score']:.4f} {h['text']}") for h in hits],
            )
            for q, hits in answers
        ]
        gallery.write(args.html, gallery.page("Search", facts, groups, NOTE))
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
