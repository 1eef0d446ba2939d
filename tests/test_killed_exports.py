"""An export that is killed at any moment and run again ends with the bytes of one that was never disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from test_shards import digests, write_raw

from unimed_jax.data import verify

MOMENTS = 50
# Forks before array_record has started a thread, so each child starts where a new process would, in milliseconds. An
# alarm without handler ends the child in the kernel as SIGKILL does: nothing of Python runs any more.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
from unimed_jax.data import export, shards, text, validate, writer
from unimed_jax.data.sources.folder import Folder

raw, root = Path(sys.argv[1]), Path(sys.argv[2])
source = Folder(raw=raw, captions=raw / "table.csv", name="demo")

def child(out, alarm):
    pid = os.fork()
    if pid == 0:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, alarm)
        export.export(source, out, shards=4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

begin = time.perf_counter()
assert child(root / "whole", 0) == 0
whole = time.perf_counter() - begin
drawn, ends = random.Random(0), []
for i in range(int(sys.argv[3])):
    out = root / str(i)
    killed = child(out, drawn.uniform(0.02, 1) * whole)
    held = sorted(p.name for p in out.rglob("*") if p.is_file())
    ends.append([killed, child(out, 0), held])
print(json.dumps(ends))
"""


def test_fifty_random_moments(tmp_path):
    source = write_raw(tmp_path / "raw", n=120)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source.raw, tmp_path / "out", str(MOMENTS)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert {(first, last) for first, last, _ in ends} <= {(-signal.SIGALRM, 0), (0, 0)}
    assert sum(first != 0 for first, _, _ in ends) > MOMENTS // 2
    assert (
        len({tuple(held) for _, _, held in ends}) > 5
    )  # the moments differ: other shards are there, or halves
    want = digests(tmp_path / "out" / "whole")
    for i in range(MOMENTS):
        assert digests(tmp_path / "out" / str(i)) == want, i
    assert verify.check(tmp_path / "out" / "0").ok
