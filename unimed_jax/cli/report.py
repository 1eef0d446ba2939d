"""`unimed-jax report`: one self-contained HTML page of a run or of results, alone or beside another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimed_jax.cli.args import Parser
from unimed_jax.errors import DataError, UsageError


def run(argv: list[str]) -> int:
    """Writes the page; refusals propagate as UnimedError."""
    parser = Parser(
        "unimed-jax report", description="One HTML page: results, confusion, curves, example pictures."
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="run folder, or the --out of unimed-jax eval")
    parser.add_argument(
        "--compare",
        default="",
        metavar="OTHER",
        help="second run or results folder on the same records: paired differences with 95 %% intervals",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --compare: print all differences as JSON, not the table"
    )
    parser.add_argument(
        "--out", default="", metavar="R.html", help="default: RUN_DIR/report.html, or comparison.html"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    args = parser.parse(argv)
    if args.json and not args.compare:
        raise UsageError("--json prints a comparison", "give --compare OTHER, or read results.json")
    out = Path(args.out or Path(args.folder) / ("comparison.html" if args.compare else "report.html"))
    if out.exists() and not args.force:
        raise UsageError(f"{out} exists", "choose another --out, or --force to replace it")
    from unimed_jax.evaluate import report

    report.require()
    page = report.from_run(args.folder)
    if args.compare:
        found = _compare(Path(args.folder), Path(args.compare))
        page["compared"] = report.compared(found)
        page["title"] = f"{page['title']} compared with {found['other']['model']['name']}"
        _print(found, as_json=args.json)
    report.write(page, out)
    if not args.json:
        print(f"wrote   {out}")
    return 0


def _compare(this: Path, other: Path) -> dict[str, Any]:
    from unimed_jax.evaluate import compare, report

    if not other.is_dir():
        raise UsageError(f"no folder {other}", "give a run folder or the --out of unimed-jax eval")
    found = [report.newest_results(folder) for folder in (this, other)]
    for folder, results in zip((this, other), found, strict=True):
        if results is None:
            raise DataError(f"{folder} holds no results.json", "unimed-jax eval writes one")
    return compare.folders(found[0] or this, found[1] or other)


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    from unimed_jax.evaluate import compare

    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        return
    for where in ("this", "other"):
        side, model = found[where], found[where]["model"]
        print(
            f"{where:7} {model['name']} (sha256 {model['sha256'][:12]}), {side['folder']}, {side['created']}"
        )
    print(compare.table(found))
