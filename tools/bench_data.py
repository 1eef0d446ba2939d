"""Input speed, stage by stage, against the decode limit and against a plain Pillow loop; all in one run.

    python tools/bench_data.py
    python tools/bench_data.py --pixels 1024 --threads 4 --workers 4 --json data.json

Generated JPEGs (power-law noise, quality 90, 4:2:0), colour and gray. Rounds alternate between the stages; each
figure is the best of `--rounds`. "per core" divides by the CPU time of this process and its workers, so a busy
machine moves it little; "wall" is what a training run would see. The Pillow loop decodes, converts to RGB, crops and
resizes as the PyTorch implementation's loader does, without reading tars or tokenizing: an upper bound for it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from unimed_jax import config
from unimed_jax.data import export, images, pipeline, shards, text
from unimed_jax.data.record import Caption, Example
from unimed_jax.data.shards import Item

BATCH = 32  # rows
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


class Noise:
    """A record source of generated JPEGs with the spectrum of photographs."""

    licence, description = "", "generated for a benchmark"

    def __init__(self, name: str, n: int, pixels: int):
        self.name, self.n, self.pixels = name, n, pixels

    def items(self) -> list[Item]:
        return [Item(f"{self.name}/{i}") for i in range(self.n)]

    def example(self, item: Item) -> Example:
        rng = np.random.default_rng([ord(self.name[0]), int(item.key.rsplit("/", 1)[1])])
        channels = 3 if self.name == "colour" else 1
        image = np.stack([power_law(self.pixels, rng) for _ in range(channels)], axis=-1)
        out = io.BytesIO()
        Image.fromarray(image.squeeze()).save(out, "JPEG", quality=90)
        words = " ".join(
            rng.choice(["chest", "film", "without", "effusion", "frontal", "view", "of", "lung"], 30)
        )
        return Example(
            key=item.key, image=out.getvalue(), captions=(Caption(text=words), Caption(text=words[:60]))
        )


def power_law(pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with an amplitude of 1 / frequency, as u8[h w]."""
    f = np.hypot(np.fft.fftfreq(pixels)[:, None], np.fft.rfftfreq(pixels)[None])
    f[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((pixels, pixels))) / f
    image = np.fft.irfft2(spectrum, (pixels, pixels))
    return np.clip(128 + 50 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8)


def pillow_loop(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image as the PyTorch implementation's loader makes it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, h, w = images.crop_box(image.height, image.width, rng, scale=SCALE, ratio=RATIO)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def cpu_seconds() -> float:
    """CPU time of this process and of its living worker processes."""
    tick = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def timed(step: Callable[[], object], n: int) -> tuple[float, float]:
    """Images per second of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    step()
    return n / (time.perf_counter() - wall), n / (cpu_seconds() - cpu)


def loop(fn: Callable[[bytes], object], blobs: list[bytes]) -> tuple[float, float]:
    return timed(lambda: [fn(b) for b in blobs], len(blobs))


def stream(root: Path, name: str, size: int, threads: int, workers: int, n: int) -> tuple[float, float]:
    """The full pipeline in its steady state: what is ready at the start of the window is made up at its end."""
    c = config.Train(batch_size=BATCH)
    c.model.vision.image_size = size
    c.data = config.Data(
        root=str(root), sources=(config.Source(name=name),), threads=threads, workers=workers
    )
    tokenizer = text.load_tokenizer(root / "tokenizer.json")
    steps = max(1, n // BATCH)
    with contextlib.closing(pipeline.make(c, tokenizer=tokenizer).batches()) as batches:
        for _ in itertools.islice(batches, 4):
            pass
        return timed(lambda: [None for _ in itertools.islice(batches, steps)], steps * BATCH)


def stages(root: Path, name: str, args: argparse.Namespace) -> dict[str, Callable[[], tuple[float, float]]]:
    """Stage -> one round of it."""
    records = shards.Shards(shards.find_sources(root)[name], "train")
    blobs = [records[i].image for i in range(len(records))]
    rng, size = np.random.default_rng(0), args.size
    tokenizer = text.load_tokenizer(root / "tokenizer.json")
    captions = [records[i].captions[0].text for i in range(len(records))]
    n = max(BATCH, args.images)
    table = {
        "read a record": lambda: timed(lambda: [records[i] for i in range(len(records))], len(records)),
        "tokenize": lambda: timed(lambda: tokenizer.encode(captions, 256), len(captions)),
        "decode": lambda: loop(images.decode, blobs),
        "decode, crop, resize": lambda: loop(
            lambda b: images.train_image(b, size, rng, scale=SCALE, ratio=RATIO), blobs
        ),
        "evaluation image": lambda: loop(lambda b: images.eval_image(b, size), blobs),
        "Pillow loop": lambda: loop(lambda b: pillow_loop(b, size, rng), blobs),
        "pipeline, 1 thread": lambda: stream(root, name, size, 1, 0, n),
        f"pipeline, {args.threads} threads": lambda: stream(root, name, size, args.threads, 0, n),
    }
    if args.workers:
        table[f"pipeline, {args.workers} processes"] = lambda: stream(root, name, size, 1, args.workers, n)
    return table


def measure(root: Path, name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    table = stages(root, name, args)
    best = dict.fromkeys(table, (0.0, 0.0))
    for _ in range(args.rounds):
        for stage, run in table.items():
            found = run()
            best[stage] = (max(best[stage][0], found[0]), max(best[stage][1], found[1]))
    limit, peer = best["decode, crop, resize"], best["Pillow loop"]
    return [
        {
            "images": name,
            "stage": stage,
            "wall_per_s": round(wall, 1),
            "core_per_s": round(core, 1),
            "wall_over_limit": round(wall / limit[0], 3),
            "core_over_limit": round(core / limit[1], 3),
            "core_over_pillow": round(core / peer[1], 3),
        }
        for stage, (wall, core) in best.items()
    ]


def show(rows: list[dict[str, object]]) -> None:
    titles = ("wall/s", "core/s", "wall/limit", "core/limit", "core/Pillow")
    print(f"{'images':8} {'stage':26}" + "".join(f"{t:>13}" for t in titles))
    for r in rows:
        figures = list(r.values())[2:]
        print(f"{r['images']!s:8} {r['stage']!s:26}" + "".join(f"{x:>13}" for x in figures))
    print("limit = decode, crop, resize in a bare loop (one core); Pillow = the Pillow loop (one core)")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=192, help="images a round")
    p.add_argument("--pixels", type=int, default=512, help="side of the generated images")
    p.add_argument("--size", type=int, default=224, help="side of the result")
    p.add_argument("--threads", type=int, default=cores)
    p.add_argument("--workers", type=int, default=cores, help="processes; 0 = leave them out")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", default="", help="also write the figures to this file")
    args = p.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = [Noise(name, args.images, args.pixels) for name in ("colour", "gray")]
        lines = [c.text for s in sources for i in s.items()[:20] for c in s.example(i).captions]
        tokenizer = text.train_wordpiece(lines, 200, root)
        for source in sources:
            export.export(source, root, shards=1, tokenizer=tokenizer)
            rows += measure(root, source.name, args)
    show(rows)
    if args.json:
        facts = {
            "command": "python tools/bench_data.py " + " ".join(sys.argv[1:]),
            "cores": cores,
            "processor": platform.processor() or platform.machine(),
            "pixels": args.pixels,
            "size": args.size,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
