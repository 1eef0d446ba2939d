"""The habits of the command line: what is misspelt is named with its neighbour, values are named by their kind."""

from __future__ import annotations

import subprocess
import sys

import pytest

from unimed_jax.cli import args, progress
from unimed_jax.errors import UsageError


def parser() -> args.Parser:
    made = args.Parser("unimed-jax x")
    verbs = made.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check")
    check.add_argument("--size", type=int, default=3, help="pixels")
    check.add_argument("--share", type=float, help="of all")
    check.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision")
    verbs.add_parser("build")
    return made


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chekc"], """no verb 'chekc'. Did you mean "check"? There are: check, build"""),
        (["zzz"], "no verb 'zzz'. There are: check, build"),
        (["check", "--dtype", "flaot32"], """--dtype: no choice 'flaot32'. Did you mean "float32"?"""),
        (["check", "--sizes", "3"], """Did you mean "--size"?"""),
        (["check", "--size", "x"], "invalid int value"),
    ],
)
def test_what_is_misspelt_is_named_with_its_neighbour(argv, words):
    with pytest.raises(UsageError) as e:
        parser().parse(argv)
    assert words in e.value.line()
    assert "--help" in e.value.remedy


def test_help_names_the_kind_of_a_value(capsys):
    with pytest.raises(SystemExit):
        parser().parse(["check", "--help"])
    said = capsys.readouterr().out
    assert "--size N" in said
    assert "--share X" in said


def test_a_misspelt_second_verb_is_a_usage_error_of_the_program():
    command = [sys.executable, "-m", "unimed_jax", "data", "chekc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'Did you mean "check"?' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_speed_begins_after_the_first_report(monkeypatch, capsys):
    """What comes before it is loading and compilation."""
    now = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("embed", "img") as p:
        for done in (10, 20, 30):
            p(done, 30)
    assert capsys.readouterr().err.splitlines() == ["embed   10/30", "embed   30/30  5 img/s"]
