r"""The evaluator's speed against the bare tower, bare decoding, and the same whole job in PyTorch; all in one run.

    python tools/bench_eval.py                    # both cases, with defaults for a CPU or a GPU
    python tools/bench_eval.py --cases tower --model unimed-clip-vit-b32 --images 64
    python tools/bench_eval.py --cases text --model small

Cases:
  tower   a full-size tower and 512 px JPEGs, so that decoding is not the limit: the evaluator over the bare tower;
  decode  next to no tower and 2048 px JPEGs: the evaluator over bare decoding on the same threads;
  text    the prompts of the built-in tasks at their own length, over the same tower on padded ones.

The evaluator: records on the disk -> decode, resize, crop -> tower -> unit embeddings on the host, as every evaluation
embeds (`evaluate.zeroshot.embed`). The bare tower works on one batch that waits on the device. The whole job in PyTorch
is what its users write: a pool of threads decodes with Pillow ahead of the tower, transformers'
CLIPVisionModelWithProjection with SDPA in inference mode, pinned batches on a GPU; same shapes, threads, batch and
precision (bfloat16 on a GPU). On a CPU decoding and the tower share the cores, so the limit is what both together
allow; on a GPU it is the slower one. Rounds alternate; best and median of `--rounds`, on a CPU the ratio of
CPU seconds, too, which other programs move less. A ratio above 1 means that the first named is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noise import Noise
from rounds import measure

from unimed_jax.data import limits

CASES = ("tower", "decode", "text")
Times = dict[str, list[float]]  # seconds of each side


@dataclass(frozen=True)
class Defaults:
    model: str
    images: int
    batch: int
    side: int


DEFAULTS = {  # (case, on a GPU)
    ("tower", False): Defaults("unimed-clip-vit-b16", 32, 8, 512),
    ("tower", True): Defaults("unimed-clip-vit-l14-336", 1536, 256, 512),
    ("decode", False): Defaults("", 48, 16, 2048),
    ("decode", True): Defaults("", 512, 64, 2048),
}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", choices=CASES, default=["tower", "decode"])
    p.add_argument("--model", default="", help="of the cases tower and text; a named model with a BERT tower")
    p.add_argument("--images", type=int, default=0, help="pictures a round; 0 = by the case")
    p.add_argument("--side", type=int, default=0, help="pixels of a side of the JPEGs; 0 = by the case")
    p.add_argument("--batch", type=int, default=0, help="0 = by the case")
    p.add_argument("--text", type=int, default=0, help="context length; 0 = the model's own")
    p.add_argument("--threads", type=int, default=0, help="that decode; 0 = one a core")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--no-torch", action="store_true", help="this project alone")
    p.add_argument("--json", default="", help="also write the figures to this file")
    return p.parse_args()


@dataclass
class Peer:
    """The same model in PyTorch."""

    images: Callable[[Any], Any]  # u8[b h w 3] -> embeddings on the device
    tokens: Callable[[Any], Any]
    wait: Callable[[], None]

    def job(self, blobs: list[bytes], size: int, batch: int, threads: int) -> Any:
        """Bytes of pictures to unit embeddings on the host, decoding ahead of the tower."""
        import numpy as np
        import torch

        out = []
        with ThreadPoolExecutor(threads) as pool:
            ready = pool.map(lambda b: pillow_square(b, size), blobs)
            for start in range(0, len(blobs), batch):
                x = np.stack([next(ready) for _ in range(min(batch, len(blobs) - start))])
                z = self.images(x)
                out.append(z / z.norm(dim=-1, keepdim=True))
        return torch.cat(out).float().cpu().numpy()


def pillow_square(data: bytes, size: int) -> Any:
    """The evaluation picture as torchvision's Resize and CenterCrop make it of a Pillow image."""
    import numpy as np
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def torch_peer(m, on_gpu: bool) -> Peer:
    """transformers' towers of a model's shapes, with random weights."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        torch.set_num_threads(limits.cores())
    v, t = m.vision, m.text
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.mlp_dim, num_hidden_layers=v.depth,
            num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch_size,
            projection_dim=m.embed_dim, hidden_act=v.act, layer_norm_eps=v.ln_eps,
        )
    )  # fmt: skip
    bert = BertModel(
        BertConfig(
            vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.depth, num_attention_heads=t.heads,
            intermediate_size=t.mlp_dim, max_position_embeddings=t.max_positions, layer_norm_eps=t.ln_eps,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    for module in (vision, bert):
        module.set_attn_implementation("sdpa")
        torch.nn.Module.to(module, device).eval()
    if on_gpu:  # weights that are bfloat16 already are faster than casting them in each call
        vision, bert = vision.bfloat16(), bert.bfloat16()
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def images(x):
        with torch.inference_mode():
            pixels = torch.from_numpy(x)
            pixels = pixels.pin_memory().to(device, non_blocking=True) if on_gpu else pixels
            pixels = pixels.permute(0, 3, 1, 2).to(dtype) / 255
            return vision(pixel_values=(pixels - 0.45) / 0.27).image_embeds

    def tokens(x):
        with torch.inference_mode():
            ids = torch.from_numpy(x).long().to(device)
            return bert(input_ids=ids, attention_mask=(ids != t.pad_id).long()).last_hidden_state[:, 0]

    return Peer(images, tokens, torch.cuda.synchronize if on_gpu else lambda: None)


def prompts() -> list[str]:
    """Every prompt of the built-in tasks, once."""
    from unimed_jax.evaluate import tasks

    known = [tasks.load(name) for name in tasks.names()]
    return list(dict.fromkeys(p for t in known for texts in t.classes.values() for p in texts))


def table(times: Times, n: int, unit: str, ratios: list[tuple[str, str]], cpu: Times) -> dict[str, Any]:
    """Rates, and how much faster the first of each pair is, by the clock and by the CPU time of this process."""
    rows = {
        name: {f"{unit}/s best": round(n / min(t), 2), f"{unit}/s median": round(n / statistics.median(t), 2)}
        for name, t in times.items()
    }
    speed = lambda of, a, b: round(of(times[b]) / of(times[a]), 3)
    found = {
        f"{a} / {b}": {"best": speed(min, a, b), "median": speed(statistics.median, a, b)}
        | ({"cpu": round(min(cpu[b]) / min(cpu[a]), 3)} if cpu else {})
        for a, b in ratios
        if a in times and b in times
    }
    return {"rows": rows, "ratios": found}


def show(title: str, part: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in part["rows"].items():
        print(f"  {name:<34}" + "".join(f"{v:>12.1f} {k}" for k, v in row.items()))
    for name, r in part["ratios"].items():
        print(f"  ratio {name:<40}" + "".join(f"  {k} {v:.3f}" for k, v in r.items()))


def model(name: str, context: int):
    """A named model; without a name, next to no tower at 224 px."""
    from unimed_jax.models import zoo

    m = zoo.get(name or "tiny")
    if not name:
        m = dataclasses.replace(m, vision=dataclasses.replace(m.vision, image_size=224, patch_size=32))
    context = context or m.text.context_length
    rows = max(context, m.text.max_positions)
    return dataclasses.replace(
        m, text=dataclasses.replace(m.text, context_length=context, max_positions=rows)
    )


def load(m, batch: int, folder: Path, on_gpu: bool):
    """The model with random weights and a vocabulary learned from the prompts."""
    import jax

    from unimed_jax import infer
    from unimed_jax.data.text import train_wordpiece
    from unimed_jax.models import clip

    params = jax.jit(lambda k: clip.init(m, k))(jax.random.key(0))
    tokenizer = train_wordpiece(prompts(), min(2000, m.text.vocab_size), folder)
    dtype = "bfloat16" if on_gpu else "float32"
    return infer.Loaded(m, params, tokenizer, batch_size=batch, dtype=dtype)


def pictures(case: str, args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """One of the two cases about pictures."""
    import jax
    import numpy as np

    from unimed_jax.data import export, images, shards
    from unimed_jax.evaluate import zeroshot

    d = DEFAULTS[case, on_gpu]
    n, batch, px = args.images or d.images, args.batch or d.batch, args.side or d.side
    threads = args.threads or limits.cores()
    if n % batch:
        raise SystemExit(f"--images {n} is no multiple of --batch {batch}")
    m = model("" if case == "decode" else args.model or d.model, args.text)
    size, every = m.vision.image_size, range(n)
    x = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(m, batch, Path(folder), on_gpu)
        for gray in (False, True):
            source = Noise("gray" if gray else "colour", (n + 1 - gray) // 2, px, gray=gray, distinct=8)
            export.export(source, folder, shards=1)
        pool = zeroshot.Pool([shards.Shards(f, "train") for f in shards.find_sources(folder).values()])
        blobs = [pool[i].image for i in every]
        resident = jax.device_put(x)

        def tower() -> None:
            for _ in range(n // batch):
                z = loaded._image(loaded.params, resident)
            jax.block_until_ready(z)

        def decode() -> None:
            with ThreadPoolExecutor(threads) as workers:
                list(workers.map(lambda b: images.eval_image(b, size), blobs))

        evaluator = lambda: zeroshot.embed(loaded, pool, every, threads=threads)
        sides = {"evaluator": evaluator, "tower alone": tower, "decoding alone": decode}
        if not args.no_torch:
            peer = torch_peer(m, on_gpu)
            sides["PyTorch, whole job"] = lambda: peer.job(blobs, size, batch, threads)
            sides["PyTorch, tower alone"] = lambda: (
                [peer.images(x) for _ in range(n // batch)] and peer.wait()
            )
        cpu: Times = {}
        times = measure(sides, args.rounds, cpu)
        whole = []
        for _ in range(2):  # the first compiles the text tower
            start = time.perf_counter()
            found = zeroshot.evaluate(loaded, pool, "modality", threads=threads, examples=0)
            whole.append(time.perf_counter() - start)
    pairs = [
        ("evaluator", "tower alone"),
        ("evaluator", "decoding alone"),
        ("evaluator", "PyTorch, whole job"),
        ("tower alone", "PyTorch, tower alone"),
    ]
    out = table(times, n, "img", pairs, {} if on_gpu else cpu)
    parts = [min(times[k]) / n for k in ("tower alone", "decoding alone")]
    limit = 1 / (max(parts) if on_gpu else sum(parts))
    reached = n / min(times["evaluator"]) / limit
    rest = max(0.0, whole[-1] - min(times["evaluator"]))
    out |= {"limit img/s": round(limit, 2), "evaluator / limit": round(reached, 3)}
    out["seconds of eval beside the pictures"] = round(rest, 3)
    show(f"{case}: {n} JPEGs of {px} px, batch {batch}, {m.name} at {size} px, {threads} threads", out)
    print(f"  decoding and tower together allow {limit:.1f} img/s; the evaluator reaches {reached:.3f} of it")
    words = f"{len(found.tasks[0].task.prompts)} prompts, metrics, {found.settings['resamples']} resamples"
    print(f"  a whole `eval` takes {rest:.2f} s more, however many pictures: {words}")
    return out


def texts(args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """The case about prompts."""
    import jax
    import numpy as np

    m = model(args.model or "small", args.text)
    batch, context = args.batch or 32, m.text.context_length
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(m, batch, Path(folder), on_gpu)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(prompts(), context)
    parts = [ids[i : i + batch] for i in range(0, len(ids), batch)]
    padded = [np.concatenate([p, np.repeat(p[-1:], batch - len(p), 0)]) for p in parts]
    own, full, peers = "own length", f"padded to {context}", f"PyTorch, padded to {context}"
    sides = {
        own: lambda: loaded.encode_text(ids),
        full: lambda: jax.block_until_ready([loaded._text(loaded.params, p) for p in padded]),
    }
    if not args.no_torch:
        peer = torch_peer(m, on_gpu)
        sides[peers] = lambda: [peer.tokens(p) for p in padded] and peer.wait()
    out = table(measure(sides, args.rounds), len(ids), "prompts", [(own, full), (own, peers)], {})
    lengths = (ids != m.text.pad_id).sum(1)
    show(f"text: {len(ids)} prompts, mean {lengths.mean():.1f} and at most {lengths.max()} tokens", out)
    return out


def main() -> None:
    args = parse()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the card
    import jax

    on_gpu = jax.default_backend() == "gpu"
    report: dict[str, Any] = {
        "command": "python tools/bench_eval.py " + " ".join(sys.argv[1:]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cores": limits.cores(),
        "dtype": "bfloat16" if on_gpu else "float32",
        "load average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(report))
    for case in args.cases:
        report[case] = texts(args, on_gpu) if case == "text" else pictures(case, args, on_gpu)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
