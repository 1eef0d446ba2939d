"""Time and memory of a conversion, against a copy of the same file; both as processes of their own, in one run.

    python tools/bench_convert.py
    python tools/bench_convert.py --model unimed-clip-vit-b16 --to native openclip --rounds 3 --json convert.json

A training checkpoint `{"epoch", "name", "state_dict"}` of random float32 weights is written with torch.save under the
original's names. Rounds alternate between the copy and the conversions; a figure is the best of `--rounds`. Times are
those of the whole process, imports included; a copy has ended when it is on the disk (`cp` and `sync`), as a
conversion has. Memory is the process's peak resident size, which counts mapped pages of the file while they are held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unimed_jax.convert import outputs
from unimed_jax.models import clip, zoo


def write_checkpoint(name: str, file: Path) -> None:
    """A training checkpoint of random weights under the original's names."""
    import torch

    m = zoo.get(name)
    rng = np.random.default_rng(0)
    shapes = clip.flatten(clip.skeleton(m)[1])
    params = clip.unflatten(
        {k: rng.standard_normal(v.shape, np.float32) * np.float32(0.02) for k, v in shapes.items()}
    )
    state = {k: torch.from_numpy(np.array(v)) for k, v in outputs.tensors("unimed", params, m)}
    torch.save({"epoch": 10, "name": name, "state_dict": state}, file)


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident bytes) of a process."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="unimed-clip-vit-l14-336-large-text", help="a UniMed-CLIP variant")
    parser.add_argument("--to", nargs="+", default=["native", "openclip"], help="formats")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", default=None, help="where to work; default: the system's temporary folder"
    )
    parser.add_argument("--json", default="", help="write the figures here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temp:
        file = Path(temp) / "checkpoint.pt"
        # In a process of its own: this one must not hold the weights while others are measured.
        code = f"import bench_convert as b, pathlib; b.write_checkpoint({args.model!r}, pathlib.Path({str(file)!r}))"
        here = str(Path(__file__).parent)
        subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=here, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        size = file.stat().st_size
        copied = f"{temp}/copy.pt"
        jobs = {"copy": ["sh", "-c", f"cp '{file}' '{copied}' && sync '{copied}'"]}
        for to in args.to:
            out = f"{temp}/{to}" + (".pt" if to == "unimed" else "")
            jobs[to] = [sys.executable, "-m", "unimed_jax", "convert", str(file), out, "--to", to, "--force"]
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.rounds):
            for name, command in jobs.items():
                seconds, memory = measure(command)
                before = best.get(name, (seconds, memory))
                best[name] = (min(before[0], seconds), min(before[1], memory))
                for left in Path(temp).glob("*"):
                    if left != file:
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
    copy = best["copy"][0]
    print(
        f"{args.model}: {size / 1e9:.2f} GB, {platform.machine()}, {os.cpu_count()} cores, best of {args.rounds}"
    )
    print(f"{'':10} {'seconds':>8} {'x copy':>7} {'peak GB':>8} {'x file':>7}")
    for name, (seconds, memory) in best.items():
        print(f"{name:10} {seconds:8.2f} {seconds / copy:7.2f} {memory / 1e9:8.2f} {memory / size:7.2f}")
    if args.json:
        figures = {k: {"seconds": s, "peak_bytes": b} for k, (s, b) in best.items()}
        Path(args.json).write_text(
            json.dumps({"model": args.model, "file_bytes": size, "jobs": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
