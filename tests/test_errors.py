"""Refusals: one line, the documented exit codes, and they survive a process boundary."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from unimed_jax import errors
from unimed_jax.cli import main


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.DataError, 3),
        (errors.SomeInputsFailed, 4),
        (errors.Fault, 70),
        (errors.Stalled, 71),
        (errors.Preempted, 75),
    ],
)
def test_exit_codes_and_one_line(kind, code):
    e = kind("what\nis   wrong", "do\nthis")
    assert e.exit_code == code
    assert e.line() == "what is wrong. Fix: do this"
    again = copy.copy(e)  # goes through __reduce__, as crossing a process does
    assert type(again) is kind
    assert (again.cause, again.remedy) == (e.cause, e.remedy)


def test_the_command_prints_one_line_and_no_traceback():
    out = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "tran"], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 2
    assert out.stderr.count("\n") == 1
    assert 'Did you mean "train"' in out.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "tran", "--debug"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" in shown.stderr
    assert shown.returncode == 2
    assert shown.stderr.splitlines()[-1] == out.stderr.rstrip()


def test_a_broken_pipe_is_success_only_when_it_is_our_own_output(monkeypatch, capsys):
    def broken(argv):
        raise BrokenPipeError(32, "Broken pipe")  # a worker process that is gone

    monkeypatch.setattr(main, "dispatch", broken)
    with pytest.raises(SystemExit) as e:
        main.main(["train"])
    assert e.value.code == 70
    assert "Broken pipe" in capsys.readouterr().err
    listing = subprocess.run(
        f"{sys.executable} -m unimed_jax --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (listing.returncode, listing.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            ["out of memory", "accum_steps"],
        ),
        (ValueError("two\nlines"), ["fault: ValueError: two lines", "this is a defect"]),
        (OSError(28, "No space left on device", "out.csv"), ["No space left on device: out.csv"]),
    ],
)
def test_what_nobody_foresaw_is_still_short(monkeypatch, capsys, error, words):
    from unimed_jax.cli import main

    def broken(argv):
        raise error

    monkeypatch.setattr(main, "dispatch", broken)
    with pytest.raises(SystemExit) as e:
        main.main(["train"])
    shown = capsys.readouterr().err
    assert e.value.code == (3 if isinstance(error, OSError) else 70)
    assert all(w in shown for w in words)
    assert "Traceback" not in shown
