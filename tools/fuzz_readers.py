"""Mutates checkpoint files and checks that the readers only ever open or refuse them.

    python tools/fuzz_readers.py --n 100000 --seed 0 [--reader torch legacy torchscript pickle safetensors index]

Per reader, N damaged files are opened and every value of them is looked at. Each must open, or be refused with one line
that names the file; nothing may take 10 s, use memory beyond a fixed allowance, run code, or open another file. A
reader runs in a process of its own, so that a crash is counted too; the file that caused a failure is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from fuzz_mutations import READERS, mutated, safetensors_seeds

from unimed_jax.convert.tensor_file import open_safetensors, open_sharded
from unimed_jax.convert.torch_zip import open_torch
from unimed_jax.errors import UnimedError

SECONDS = 10  # for one file
MEMORY_MB = 192  # growth of the process: what the limits on steps and values allow, whatever a file says
# Events of the interpreter (PEP 578) that reading a file must never cause.
FORBIDDEN = ("os.", "subprocess.", "socket.", "ctypes.", "pickle.", "marshal.", "exec", "compile", "shutil.")


# --- one reader


def look(path: Path, reader: str) -> None:
    """Opens a file and looks at every value in it."""
    if reader == "safetensors":
        tensors = open_safetensors(path)
    elif reader == "index":
        tensors = open_sharded(path)
    else:
        opened = open_torch(path, verify_crc=True)
        json.dumps(opened.tree, default=str, skipkeys=True)
        tensors = opened.tensors()
    shown = sum(v.nbytes for v in tensors.values())
    if shown > 16 * sum(m.size for m in tensors.maps):
        raise AssertionError(f"{shown} bytes of tensors from {path.stat().st_size}")
    for v in tensors.values():
        v.tobytes()


class Hang(Exception):
    """A file took too long."""


def worker(reader: str, n: int, seed: int, folder: Path) -> dict:
    """Opens `n` mutated files; what it returns has no "failure" when all is well."""
    seeds, mutations, name = READERS[reader]
    path, rng = folder / name, random.Random(f"{reader}{seed}")
    originals, parts = seeds(), safetensors_seeds()
    for i in range(2):
        (folder / f"part-{i}.safetensors").write_bytes(_part(i))
    for raw in (*originals, b"PK\3\4", b"x", parts[0]):  # everything that is imported late is imported now
        path.write_bytes(raw)
        _outcome(path, reader)
    events, counts, slowest, first = _watch(folder), Counter(), 0.0, _resident_mb()
    peak = first
    signal.signal(signal.SIGALRM, _too_long)
    for i in range(n):
        raw = mutated(rng, originals, mutations)
        path.unlink()  # never the file that the last one mapped
        path.write_bytes(raw)
        start = time.perf_counter()
        signal.alarm(SECONDS)
        del events[:]
        try:
            outcome = _outcome(path, reader)
        except BaseException as e:
            return {"failure": f"file {i}: {type(e).__name__}: {e}"}
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
        peak = max(peak, _resident_mb())
        if events:
            return {"failure": f"file {i}: {events[:3]}"}
        if peak - first > MEMORY_MB:
            return {"failure": f"file {i}: {peak - first:.0f} MB"}
        counts[outcome] += 1
    grown = round(peak - first, 1)
    return {"reader": reader, "files": n, **counts, "slowest_s": round(slowest, 4), "memory_mb": grown}


def _part(i: int) -> bytes:
    from safetensors.numpy import save

    return save({f"{n}{i}": np.full(3, i, np.float32) for n in "ab"})


def _outcome(path: Path, reader: str) -> str:
    try:
        look(path, reader)
    except UnimedError as e:
        line = e.line()
        if "\n" in line or not line.isprintable() or len(line) > 1000 or str(path.parent) not in line:
            raise AssertionError(f"a refusal that is no line: {line!r}") from e
        return "refused"
    return "opened"


def _too_long(*_) -> None:
    raise Hang


def _watch(folder: Path) -> list[str]:
    """Collects what the interpreter does beside reading files in `folder`; a hook cannot be taken away again."""
    events: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            if not str(args[0]).startswith((str(folder), "/proc/self/")) or "w" in str(args[1]).replace(
                "wb", "", 1
            ):
                events.append(f"open {args[0]}")
        elif event.startswith(FORBIDDEN):
            events.append(f"{event} {str(args)[:80]}")

    sys.addaudithook(hook)
    return events


def _resident_mb() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


# --- all readers


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=20_000, help="files per reader")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    p.add_argument("--worker", default="", help=argparse.SUPPRESS)  # folder: runs one reader in this process
    args = p.parse_args()
    if args.worker:
        print(json.dumps(worker(args.reader[0], args.n, args.seed, Path(args.worker))))
        return 0
    return max(_run(reader, args.n, args.seed) for reader in args.reader)


def _run(reader: str, n: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--worker",
            folder,
            "--n",
            str(n),
            "--seed",
            str(seed),
            "--reader",
            reader,
        ]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + n * 0.1)
            result = json.loads(done.stdout) if done.returncode == 0 else {}
            failure = result.get(
                "failure", f"exit {done.returncode}: {done.stderr[-500:]}" if not result else ""
            )
        except subprocess.TimeoutExpired:
            result, failure = {}, "the whole run took too long"
        if failure:
            kept = Path(f"fuzz-{reader}-{seed}{Path(READERS[reader][2]).suffix}")
            shutil.copy(Path(folder) / READERS[reader][2], kept)
            print(json.dumps({"reader": reader, "failure": failure, "file": str(kept)}))
            return 1
    print(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
