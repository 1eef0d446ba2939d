"""`unimed-jax report`: one self-contained HTML page of a run or of results."""

from __future__ import annotations

from pathlib import Path

from unimed_jax.cli.args import Parser
from unimed_jax.errors import UsageError


def run(argv: list[str]) -> int:
    """Writes the page; refusals propagate as UnimedError."""
    parser = Parser(
        "unimed-jax report", description="One HTML page: results, confusion, curves, example pictures."
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="run folder, or the --out of unimed-jax eval")
    parser.add_argument("--out", default="", metavar="R.html", help="default: RUN_DIR/report.html")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    args = parser.parse(argv)
    out = Path(args.out or Path(args.folder) / "report.html")
    if out.exists() and not args.force:
        raise UsageError(f"{out} exists", "choose another --out, or --force to replace it")
    from unimed_jax.evaluate import report

    report.write(report.from_run(args.folder), out)
    print(f"wrote   {out}")
    return 0
