r"""Embedding files, searching an index and auditing overlap, each against what it can be compared with in the same run.

    python tools/bench_embed.py --model small --images 256 --batch 32
    python tools/bench_embed.py --rows 100000 --dim 512 --images 0 --hashes 0
    python tools/bench_embed.py --images 0 --rows 0 --hashes 1000000 --records demo/records

Embedding: JPEG files -> `embed.to_parquet`, end to end, against the bare tower on a batch that waits on the device, and
against decoding alone. Search: `search.search` on a Parquet index of float16, against numpy on the same file (read,
float32, product, argpartition, sort); and `top_k` on rows on the device, against numpy on rows in memory. Audit:
`phash.near` against comparing all pairs (of some queries, scaled up); with `--records`, which changes of real pictures
are found and how often pictures of different patients are taken for the same. Rounds alternate; best and median of
`--rounds`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rounds import measure

from unimed_jax.data import limits


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="small", help="a named model")
    p.add_argument("--images", type=int, default=256, help="files to embed; 0 = skip")
    p.add_argument("--side", type=int, default=512, help="pixels of a side of the JPEGs")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--threads", type=int, default=0, help="that decode; 0 = one a core")
    p.add_argument("--rows", type=int, default=100_000, help="of the index; 0 = skip")
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--queries", type=int, default=1)
    p.add_argument("-k", type=int, default=10)
    p.add_argument("--hashes", type=int, default=1_000_000, help="against --asked others; 0 = skip")
    p.add_argument("--asked", type=int, default=10_000)
    p.add_argument("--records", default="", help="real pictures, for what perceptual hashes find")
    p.add_argument("--rounds", type=int, default=5)
    return p.parse_args()


def show(title: str, times: dict[str, list[float]], ratios: list[tuple[str, str]]) -> None:
    """Prints seconds, and how many times faster the first named is."""
    print(f"\n{title}")
    for name, t in times.items():
        print(f"  {name:<36} best {min(t):8.4f} s  median {statistics.median(t):8.4f} s")
    for a, b in ratios:
        best = min(times[b]) / min(times[a])
        median = statistics.median(times[b]) / statistics.median(times[a])
        print(f"  speed of {a} / {b}: best {best:.3f}, median {median:.3f}")


def jpegs(folder: Path, n: int, side: int) -> None:
    """Gray and colour pictures."""
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        (image.convert("L") if i % 2 else image).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    for i in range(n):
        (folder / f"{i:06d}.jpg").write_bytes(made[i % len(made)])


def bench_embed(args: argparse.Namespace, threads: int) -> None:
    import jax

    from unimed_jax import infer
    from unimed_jax.evaluate import embed, inputs, streams
    from unimed_jax.models import clip, zoo

    if args.images % args.batch:
        raise SystemExit(f"--images {args.images} is no multiple of --batch {args.batch}")
    on_gpu = jax.default_backend() == "gpu"
    m = zoo.get(args.model)
    params = jax.jit(lambda k: clip.init(m, k))(jax.random.key(0))
    loaded = infer.Loaded(m, params, batch_size=args.batch, dtype="bfloat16" if on_gpu else "float32")
    assert loaded.digest  # hashing the weights is not what is measured
    side = m.vision.image_size
    batch = np.random.default_rng(0).integers(0, 256, (args.batch, side, side, 3), dtype=np.uint8)
    resident = jax.device_put(batch)

    def tower() -> None:
        for _ in range(args.images // args.batch):
            z = loaded._image(loaded.params, resident)
        jax.block_until_ready(z)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        jpegs(folder / "in", args.images, args.side)
        found = inputs.Files([folder / "in"])

        def decode() -> None:
            for _ in streams.squares(found, range(len(found)), side, threads):
                pass

        def whole() -> None:
            embed.to_parquet(loaded, found, folder / "e.parquet", threads=threads, force=True)

        times = measure({"embed": whole, "tower alone": tower, "decoding alone": decode}, args.rounds)
    title = f"{args.images} JPEGs of {args.side} px, batch {args.batch}, {m.name}, {threads} threads"
    show(title, times, [("embed", "tower alone"), ("embed", "decoding alone")])
    parts = min(times["tower alone"]), min(times["decoding alone"])
    # On a CPU decoding and the tower share the cores, on an accelerator the slower one decides.
    limit = max(parts) if on_gpu else sum(parts)
    print(f"  of what tower and decoding allow together: {limit / min(times['embed']):.3f}")


def bench_search(args: argparse.Namespace) -> None:
    from unimed_jax.evaluate import embedding_table, search

    rng = np.random.default_rng(0)
    z = rng.standard_normal((args.rows, args.dim), np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    q = z[: args.queries] + 0.1 * rng.standard_normal((args.queries, args.dim), np.float32)
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    half = z.astype(np.float16)
    full = half.astype(np.float32)

    def by_numpy(rows: np.ndarray = full) -> tuple[np.ndarray, np.ndarray]:
        scores = q @ rows.T
        top = np.argpartition(-scores, args.k, axis=1)[:, : args.k]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1)
        found = np.take_along_axis(top, order, 1)
        return np.take_along_axis(scores, found, 1), found

    with tempfile.TemporaryDirectory() as name:
        facts = embedding_table.Facts(
            content="image",
            dim=args.dim,
            dtype="float16",
            model={"name": "m", "sha256": "0", "dtype": "float32"},
        )
        path = Path(name) / "e.parquet"
        with embedding_table.Writer(path, facts) as f:
            f.write(embedding_table.table(facts, [{"id": str(i)} for i in range(len(half))], half))
        index = embedding_table.Index(path)
        resident = search.on_device(index)
        from_file, in_memory = "numpy, from the same file", "numpy, float32 rows in memory"
        sides = {
            "search, from the file": lambda: search.search(index, q, args.k),
            "top_k, rows on the device": lambda: search.top_k(q, resident, args.k, rows=len(index)),
            from_file: lambda: by_numpy(np.concatenate(list(index.slabs())).astype(np.float32)),
            in_memory: by_numpy,
        }
        times = measure(sides, args.rounds)
        _, ours = search.top_k(q, index.slabs(search.SLAB), args.k)
    title = f"{args.queries} queries, {args.rows} x {args.dim} float16, k = {args.k}"
    pairs = [("search, from the file", from_file), ("top_k, rows on the device", in_memory)]
    show(title, times, pairs)
    print(f"  the same rows as numpy: {bool((ours == by_numpy()[1]).all())}")


def bench_hashes(args: argparse.Namespace) -> None:
    from unimed_jax.data import phash

    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**64, n, dtype=np.uint64) for n in (args.hashes, args.asked))
    some = b[:50]

    def every() -> None:
        for hash_ in some:
            np.flatnonzero(np.bitwise_count(a ^ hash_) <= phash.DISTANCE)

    times = measure({"near": lambda: phash.near(a, b), "all pairs": every}, min(args.rounds, 3))
    times["all pairs"] = [t * len(b) / len(some) for t in times["all pairs"]]
    show(
        f"{args.hashes} hashes x {args.asked}, at most {phash.DISTANCE} bits", times, [("near", "all pairs")]
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  peak memory of this process {peak:.0f} MB")


def what_hashes_find(root: str) -> None:
    """Recall of known changes, and pairs of different patients within the distance."""
    from PIL import Image, ImageEnhance

    from unimed_jax.data import images, phash
    from unimed_jax.evaluate import inputs, overlap

    def jpeg(image: Image.Image, quality: int) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(io.BytesIO(out.getvalue()))

    def crop(image: Image.Image, share: float) -> Image.Image:
        w, h = image.size
        x, y = round(w * share), round(h * share)
        return image.crop((x, y, w - x, h - y))

    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "JPEG, quality 90": lambda i: jpeg(i, 90),
        "JPEG, quality 20": lambda i: jpeg(i, 20),
        "half the size": lambda i: i.resize((max(i.width // 2, 16), max(i.height // 2, 16))),
        "squashed to 224 x 224": lambda i: i.resize((224, 224)),
        "middle square, 224 x 224": lambda i: Image.fromarray(images.eval_image(i, 224)),
        "brightness x 1.2": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
        "brightness x 0.7": lambda i: ImageEnhance.Brightness(i).enhance(0.7),
        "contrast x 1.3": lambda i: ImageEnhance.Contrast(i).enhance(1.3),
        "1 % cut off each side": lambda i: crop(i, 0.01),
        "2 % cut off each side": lambda i: crop(i, 0.02),
        "5 % cut off each side": lambda i: crop(i, 0.05),
        "mirrored": lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    pool = inputs.Records(root)._pool
    examples = [pool[i] for i in range(len(pool))]
    pictures = [Image.fromarray(images.decode(e.image)) for e in examples]
    hashes = [phash.phashes(np.asarray(p)) for p in pictures]
    least = lambda x, y: min(((p ^ q).bit_count() for p in x for q in y), default=64)
    print(f"\n{len(pictures)} pictures of {root}, at most {phash.DISTANCE} bits")
    for name, change in changes.items():
        bits = [least(h, phash.phashes(np.asarray(change(p)))) for h, p in zip(hashes, pictures, strict=True)]
        print(f"  {name:<28} found {np.mean(np.array(bits) <= phash.DISTANCE):.3f}")
    near = overlap._nearby(hashes, hashes, phash.DISTANCE)
    modality = np.array([e.modality for e in examples])
    patient = np.array([e.patient or e.key for e in examples])
    for name in [*sorted(set(modality)), "different modalities"]:
        one = modality == name
        pairs = one[:, None] & one[None] if one.any() else modality[:, None] != modality[None]
        pairs = np.triu(pairs & (patient[:, None] != patient[None]), 1)
        hits = sum(bool(pairs[i, j]) for j, close in near.items() for i in close)
        print(f"  {name:<28} {hits} of {int(pairs.sum())} pairs of different patients taken for the same")


def main() -> None:
    args = parse()
    import jax

    cores = limits.cores()
    facts = {
        "command": "python tools/bench_embed.py " + " ".join(sys.argv[1:]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cores": cores,
        "load average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(facts))
    if args.images:
        bench_embed(args, args.threads or cores)
    if args.rows:
        bench_search(args)
    if args.hashes:
        bench_hashes(args)
    if args.records:
        what_hashes_find(args.records)


if __name__ == "__main__":
    main()
