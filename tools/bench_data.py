"""Input speed, stage by stage, against the decode limit and against a web-dataset loader on the same files; in one run.

    python tools/bench_data.py
    python tools/bench_data.py --pixels 1024 --threads 4 --workers 4 --json data.json

Generated JPEGs (power-law noise, quality 90, 4:2:0), colour and gray: exported to records, and the same bytes and
captions packed into a tar. Stages of `unimed_jax.data.bench` (which `unimed-jax data bench` runs on one's own
records), the export, and two peers: a bare Pillow loop, and in a process of its own webdataset + Pillow + torchvision
(tools/peer_loader.py). Rounds alternate between the stages; each figure is the best of `--rounds`. "core" divides by
CPU time, so a busy machine moves it little; "wall" is what a training run sees.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from noise import Noise
from PIL import Image

from unimed_jax import config
from unimed_jax.data import bench, export, images, limits, shards, text
from unimed_jax.data.bench import LIMIT, Rate

EXPORT, PILLOW = "export", "Pillow loop"


class PeerProcess:
    """The web-dataset loader, one round a call."""

    def __init__(self, tar: Path, size: int, n: int):
        self.n = n
        peers = Path(sys.prefix) / "peers"
        paths = os.pathsep.join([str(peers), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(Path(__file__).with_name("peer_loader.py")), str(tar), str(size)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
        )  # fmt: skip
        self.name = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"the peer ended with exit code {self.process.wait()}")
        return line

    def __call__(self) -> Rate:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        wall, cpu = json.loads(self._line())
        return Rate(self.n / wall, self.n / cpu)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def pillow_picture(data: bytes, size: int, rng: np.random.Generator, crop: dict[str, Any]) -> np.ndarray:
    """One picture as loaders make it with Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, h, w = images.crop_box(
        image.height, image.width, rng, scale=crop["scale"], ratio=crop["ratio"]
    )
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def pack(source: Noise, path: Path) -> None:
    """The pictures of a source with their first captions as a web-dataset tar."""
    with tarfile.open(path, "w") as tar:
        for i, item in enumerate(source.items()):
            example = source.example(item)
            for suffix, data in (("jpg", example.image), ("txt", example.captions[0].text.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure(source: Noise, root: Path, tokenizer: text.Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of all stages on one kind of picture."""
    export.export(source, root, shards=1, tokenizer=tokenizer)
    c = config.Train()
    c.model.vision.image_size = args.size
    c.data = config.Data(root=str(root), sources=(config.Source(name=source.name),))
    table, facts = bench.stages(c, tokenizer, args.images, threads=args.threads, workers=args.workers)
    records = shards.Shards(root / source.name, "train")
    blobs = [records[i].image for i in range(len(records))]
    rng, crop = np.random.default_rng(0), {"scale": c.data.crop_scale, "ratio": c.data.crop_ratio}
    table[EXPORT] = lambda: bench.timed(
        lambda: export.export(source, root, shards=1, tokenizer=tokenizer, force=True), source.n
    )
    table[PILLOW] = lambda: bench.timed(
        lambda: [pillow_picture(b, args.size, rng, crop) for b in blobs], len(blobs)
    )
    tar = root / f"{source.name}.tar"
    pack(source, tar)
    peer = PeerProcess(tar, args.size, source.n)
    try:
        found = bench.best(table | {peer.name: peer}, args.rounds)
    finally:
        peer.close()
    rows = bench.rows(found, facts["mean_bytes"])
    for r in rows:
        core = found[r["stage"]].core
        r["core_over_decode"] = round(core / found["decode"].core, 3)
        r["core_over_peer"] = round(core / found[peer.name].core, 3)
    return {"images": source.name, "mean_bytes": facts["mean_bytes"], "stages": rows}


def show(part: dict[str, Any]) -> None:
    titles = ("wall/s", "core/s", "MB/s", "core/limit", "core/decode", "core/peer")
    print(
        f"\n{part['images']}, {part['mean_bytes'] / 1000:.0f} kB".ljust(53)
        + "".join(f"{t:>12}" for t in titles)
    )
    for r in part["stages"]:
        print(f"{r['stage'][:52]:52}" + "".join(f"{x:>12}" for x in list(r.values())[1:]))


def main() -> None:
    cores = limits.cores()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=192, help="images a round")
    p.add_argument("--pixels", type=int, default=512, help="side of the generated images")
    p.add_argument("--size", type=int, default=224, help="side of the result")
    p.add_argument("--threads", type=int, default=cores)
    p.add_argument("--workers", type=int, default=cores, help="processes; 0 = leave them out")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", default="", help="also write the figures to this file")
    args = p.parse_args()
    facts: dict[str, Any] = {
        "command": "python tools/bench_data.py " + " ".join(sys.argv[1:]),
        "cores": cores,
        "processor": platform.processor() or platform.machine(),
        "load average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(facts))
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = [
            Noise("gray" if gray else "colour", args.images, args.pixels, gray=gray) for gray in (False, True)
        ]
        lines = [c.text for s in sources for i in s.items()[:20] for c in s.example(i).captions]
        tokenizer = text.train_wordpiece(lines, 200, root)
        for source in sources:
            parts.append(measure(source, root, tokenizer, args))
            show(parts[-1])
    print(f"\nlimit = {LIMIT} in a bare loop; core = a core and second; peer = the last line")
    if args.json:
        Path(args.json).write_text(json.dumps(facts | {"parts": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
