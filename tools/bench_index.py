"""Start-up, memory and position lookup of a mixture of UniMed's size: 13 sources, 5,282 shards, 5,282,000 records.

    python tools/bench_index.py
    python tools/bench_index.py --keep records13     # leave the records there, e.g. for `train --dry_run`

The manifests are of full size. Every shard is a hard link to one of 13 real shards of 1000 small pictures, one a
source, so that opening and reading are real while the disk holds 13 files: figures of the index and of opening files,
not of a disk. Each figure comes from a process of its own: from before its first import to the first position, and
to the first batch; memory is the peak of the resident set, with what the imports alone take beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS = (
    1049,
    212,
    270,
    7,
    113,
    61,
    1645,
    468,
    265,
    1018,
    155,
    13,
    6,
)  # in the order of config.UNIMED_SOURCES
PER_SHARD = 1000
BATCH = 2048
STEPS = (0, 1, 2579, 25_791, 1_000_000)  # first, second, last of an epoch, last of ten, far beyond


def write_records(root: Path) -> None:
    """Exports one shard a source and gives the manifest as many links to it as the source has shards."""
    import numpy as np
    from PIL import Image

    from unimed_jax import config
    from unimed_jax.data import export, shards, text
    from unimed_jax.data.record import Caption, Example

    words = [f"{view} view of the {part}" for view in ("frontal", "lateral") for part in ("chest", "hand")]

    class Small:
        licence, description = "", "generated for a benchmark"

        def __init__(self, name: str):
            self.name = name

        def items(self) -> list[shards.Item]:
            return [shards.Item(f"{self.name}/{i}") for i in range(PER_SHARD)]

        def example(self, item: shards.Item) -> Example:
            rng = np.random.default_rng(int(item.key.rsplit("/", 1)[1]))
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(out, "PNG")
            line = words[int(rng.integers(len(words)))]
            return Example(
                key=item.key, image=out.getvalue(), captions=(Caption(text=line, kind="original"),)
            )

    tokenizer = text.train_wordpiece(words, 60, root)
    for name, n in zip(config.UNIMED_SOURCES, SHARDS, strict=True):
        export.export(Small(name), root, shards=1, tokenizer=tokenizer)
        folder = shards.resolve(root / name)
        manifest = shards.Manifest.read(folder)
        (one,) = manifest.splits["train"]
        links = [
            dataclasses.replace(one, file=f"unimed-train.array_record-{i:05d}-of-{n:05d}") for i in range(n)
        ]
        for link in links:
            os.link(folder / one.file, folder / link.file)
        manifest.splits["train"] = links
        (folder / shards.MANIFEST).write_text(manifest.to_json())


def peak_mb() -> float:
    """The largest resident set of this process (`getrusage` would count the parent's before the exec)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def child(root: Path, step: int, started: float) -> dict[str, float]:
    """In a fresh process: seconds until the positions of a step are known and its batch is read."""
    from unimed_jax import config
    from unimed_jax.data import pipeline, text

    imported = time.time() - started
    base = peak_mb()
    cfg = config.Train(batch_size=BATCH)
    cfg.data = config.Data(
        root=str(root),
        sources=tuple(config.Source(name=n, weight=w) for n, w in config.UNIMED_WEIGHTS.items()),
    )
    cfg.model.vision.image_size = 16
    p = pipeline.make(cfg, tokenizer=text.load_tokenizer(root / "tokenizer.json"))
    made = time.time() - started
    begin = time.perf_counter()
    p.mixture.locate(step * BATCH)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for i in range(step * BATCH, (step + 1) * BATCH):
        p.mixture.locate(i)
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    p.mixture.counts(step * BATCH)
    counted = time.perf_counter() - begin
    known = peak_mb()
    begin = time.perf_counter()
    batches = p.batches(step)
    for _ in itertools.islice(batches, 1):
        pass
    read = time.perf_counter() - begin
    batches.close()
    return {
        "step": step,
        "records": p.epoch_examples,
        "imports_s": imported,
        "made_s": made,
        "first_position_us": 1e6 * first,
        "positions_of_a_batch_ms": 1e3 * whole,
        "counts_s": counted,
        "first_batch_s": read,
        "imports_mb": base,
        "positions_known_mb": known,
        "batch_read_mb": peak_mb(),
    }


def measure(root: Path, rounds: int) -> list[dict[str, float]]:
    """The best of several fresh processes for each step."""
    best: dict[int, dict[str, float]] = {}
    for step in itertools.chain.from_iterable([STEPS] * rounds):
        words = [sys.executable, __file__, "--child", str(root), str(step), repr(time.time())]
        found: dict[str, float] = json.loads(
            subprocess.run(words, capture_output=True, text=True, check=True).stdout
        )
        before = best.get(step, found)
        best[step] = {k: min(v, before[k]) for k, v in found.items()}
    return list(best.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=2, help="fresh processes a step")
    p.add_argument("--keep", default="", help="folder for the records; default: a temporary one")
    p.add_argument("--json", default="", help="also write the figures to this file")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        root, step, started = args.child
        print(json.dumps(child(Path(root), int(step), float(started))))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.keep or folder)
        if not (root / "tokenizer.json").exists():
            write_records(root)
        rows = measure(root, args.rounds)
    for key in rows[0]:
        print(f"{key:26}" + "".join(f"{r[key]:>14,.3f}".removesuffix(".000").rjust(14) for r in rows))
    if args.json:
        facts = {"command": "python tools/bench_index.py " + " ".join(sys.argv[1:]), "rows": rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
