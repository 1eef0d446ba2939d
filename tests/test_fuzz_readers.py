"""A few thousand damaged files through `tools/fuzz_readers.py`, and proof that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

READERS = ("torch", "legacy", "torchscript", "pickle", "safetensors", "index")


@pytest.mark.torch
def test_a_few_thousand_files(repo_root, tmp_path):
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, str(repo_root / "tools" / "fuzz_readers.py"), "--n", "500", "--seed", "12"],
        capture_output=True, text=True, timeout=200, cwd=tmp_path,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["reader"] for r in results] == list(READERS)
    assert all("failure" not in r for r in results), results
    assert all(r["opened"] + r["refused"] == 500 and r["opened"] > 5 and r["refused"] > 200 for r in results)
    assert done.returncode == 0, done.stderr


PLANTED = {
    "raise ValueError('x')": "ValueError: x",
    "raise DataError('damaged')": "a refusal that is no line",
    "os.system('true')": "os.system",
    "eval('1')": "compile",
    "open('/dev/null').read()": "open /dev/null",
    "time.sleep(5)": "Hang",
    "kept.append(b'x' * 2**28)": "MB",
    "os.kill(os.getpid(), 9)": "exit -9",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_it_notices(repo_root, tmp_path, fault):
    """The driver runs with a reader that behaves badly on the files that are not whole."""
    tools = repo_root / "tools"
    bad = tmp_path / "planted.py"
    bad.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(tools)!r})
import fuzz_readers
from unimed_jax.errors import DataError
fuzz_readers.SECONDS = 1
fuzz_readers.__file__ = __file__
right, kept, seen = fuzz_readers.open_safetensors, [], []
def wrong(path):
    seen.append(path)
    if len(seen) > 20:
        {fault}
    return right(path)
fuzz_readers.open_safetensors = wrong
raise SystemExit(fuzz_readers.main())
""")
    done = subprocess.run(
        [sys.executable, str(bad), "--n", "40", "--reader", "safetensors"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert PLANTED[fault] in result["failure"], result
    assert Path(tmp_path / result["file"]).is_file()
