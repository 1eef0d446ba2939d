r"""Zero-shot evaluation speed: pictures end to end against the bare tower and PyTorch, and the text bank.

    python tools/bench_eval.py --model small --images 256 --batch 32
    python tools/bench_eval.py --model unimed-clip-vit-b16 --images 64 --batch 16 --text 256

Pictures: JPEG bytes -> decode, resize, crop -> tower -> embeddings on the host (`evaluate.zeroshot.embed`), against
the same tower on a batch that waits on the device, and against transformers' CLIPVisionModelWithProjection (SDPA, same
shapes, threads and precision). Text: the prompts of the built-in tasks at their own length (`Loaded.encode_text`),
against the same tower on the same prompts padded to the context, and against BertModel on the padded ones. Rounds
alternate; each figure is the best and the median of `--rounds`. A ratio above 1 means that the first named is faster.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rounds import measure


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="small", help="a named model with a BERT text tower")
    p.add_argument("--images", type=int, default=256, help="pictures a round; a multiple of the batch")
    p.add_argument("--side", type=int, default=512, help="pixels of a side of the JPEGs")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--text", type=int, default=0, help="context length; 0 = the model's own")
    p.add_argument("--decoders", type=int, default=0, help="decoding threads; 0 = one a core")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--no-torch", action="store_true", help="this project alone")
    p.add_argument("--no-text", action="store_true", help="pictures alone")
    p.add_argument("--json", default="", help="also write the figures to this file")
    return p.parse_args()


class Pictures:
    """Gray and colour JPEGs as a record source."""

    name = "generated"

    def __init__(self, n: int, side: int):
        import numpy as np
        from PIL import Image

        from unimed_jax.data.record import Example

        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (8, side // 16, side // 16, 3), dtype=np.uint8)
        self.files = []
        for i, small in enumerate(coarse):
            image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
            out = io.BytesIO()
            (image.convert("L") if i % 2 else image).save(out, "JPEG", quality=90)
            self.files.append(Example(key=f"generated/{i}", image=out.getvalue()))
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        return self.files[i % len(self.files)]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_towers(m, on_gpu: bool) -> tuple[Callable, Callable, Callable]:
    """(embed images u8[b h w 3], embed tokens, wait) out of transformers."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        torch.set_num_threads(cores())
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
    cast = lambda: torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu)

    def images(x):
        with torch.inference_mode(), cast():
            pixels = torch.from_numpy(x).to(device).permute(0, 3, 1, 2).float() / 255
            return vision(pixel_values=(pixels - 0.45) / 0.27).image_embeds

    def tokens(x):
        with torch.inference_mode(), cast():
            ids = torch.from_numpy(x).long().to(device)
            return bert(input_ids=ids, attention_mask=(ids != t.pad_id).long()).last_hidden_state[:, 0]

    return images, tokens, (torch.cuda.synchronize if on_gpu else lambda: None)


def bank_tokens(context: int):
    """The built-in prompts as token ids of a vocabulary learned from them."""
    from unimed_jax.data.text import train_wordpiece
    from unimed_jax.evaluate import tasks

    known = [tasks.load(name) for name in tasks.names()]
    texts = [p for t in known for prompts in t.classes.values() for p in prompts]
    texts = list(dict.fromkeys(texts))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_wordpiece(texts, 2000, folder)
    return tokenizer.encode(texts, context)


def table(times: dict[str, list[float]], n: int, unit: str, ratios: list[tuple[str, str]]) -> dict:
    rows = {
        name: {f"{unit}/s best": round(n / min(t), 2), f"{unit}/s median": round(n / statistics.median(t), 2)}
        for name, t in times.items()
    }
    found = {}
    for a, b in ratios:
        if a in times and b in times:
            best, median = (
                min(times[b]) / min(times[a]),
                statistics.median(times[b]) / statistics.median(times[a]),
            )
            found[f"{a} / {b}"] = {"best": round(best, 3), "median": round(median, 3)}
    return {"rows": rows, "ratios": found}


def show(title: str, part: dict) -> None:
    print(f"\n{title}")
    for name, row in part["rows"].items():
        print(f"  {name:<34}" + "".join(f"{v:>12.1f} {k}" for k, v in row.items()))
    for name, r in part["ratios"].items():
        print(f"  ratio {name:<46} best {r['best']:.3f}  median {r['median']:.3f}")


def main() -> None:
    args = parse()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the card
    import dataclasses

    import jax
    import numpy as np

    from unimed_jax import infer
    from unimed_jax.data import images
    from unimed_jax.evaluate import zeroshot
    from unimed_jax.models import clip, zoo

    if args.images % args.batch:
        raise SystemExit(f"--images {args.images} is no multiple of --batch {args.batch}")
    on_gpu = jax.default_backend() == "gpu"
    m = zoo.get(args.model)
    context = args.text or m.text.context_length
    rows = max(context, m.text.max_positions)
    m = dataclasses.replace(m, text=dataclasses.replace(m.text, context_length=context, max_positions=rows))
    params = jax.jit(lambda k: clip.init(m, k))(jax.random.key(0))
    dtype = "bfloat16" if on_gpu else "float32"
    loaded = infer.Loaded(m, params, batch_size=args.batch, dtype=dtype)
    source, every = Pictures(args.images, args.side), range(args.images)
    threads = args.decoders or cores()
    side = m.vision.image_size
    x = np.random.default_rng(0).integers(0, 256, (args.batch, side, side, 3), dtype=np.uint8)
    resident = jax.device_put(x)
    batches = args.images // args.batch

    def tower():
        for _ in range(batches):
            z = loaded._image(loaded.params, resident)
        jax.block_until_ready(z)

    def decode():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: images.eval_image(source[i].image, side), every))

    sides = {
        "evaluator end to end": lambda: zeroshot.embed(loaded, source, every, threads=threads),
        "tower alone": tower,
        "decoding alone": decode,
    }
    if not args.no_torch:
        peer_images, peer_tokens, wait = torch_towers(m, on_gpu)
        sides["torch tower alone"] = lambda: [peer_images(x) for _ in range(batches)] and wait()
    pictures = table(
        measure(sides, args.rounds),
        args.images,
        "img",
        [
            ("evaluator end to end", "tower alone"),
            ("evaluator end to end", "decoding alone"),
            ("tower alone", "torch tower alone"),
            ("evaluator end to end", "torch tower alone"),
        ],
    )
    best = {name: row["img/s best"] for name, row in pictures["rows"].items()}
    # On a CPU decoding and the tower share the cores, on an accelerator the slower one decides.
    parts = best["tower alone"], best["decoding alone"]
    limit = min(parts) if on_gpu else 1 / sum(1 / p for p in parts)
    pictures["limit img/s"] = round(limit, 2)
    pictures["end to end / limit"] = round(best["evaluator end to end"] / limit, 3)
    report = {
        "command": "python tools/bench_eval.py " + " ".join(sys.argv[1:]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cores": cores(),
        "dtype": dtype,
        "load average": round(os.getloadavg()[0], 2),
        "pictures": pictures,
    }
    print(json.dumps({k: v for k, v in report.items() if k != "pictures"}))
    show(f"{args.images} JPEGs of {args.side} px, batch {args.batch}, {m.name}", pictures)
    limit_words = (
        f"{pictures['limit img/s']} img/s; end to end reaches {pictures['end to end / limit']} of it"
    )
    print(f"  limit by decoding and tower together {limit_words}")
    if not args.no_text:
        ids = bank_tokens(context)
        size = loaded.batch_size
        padded = [np.concatenate([p, np.repeat(p[-1:], size - len(p), 0)]) for p in
                  (ids[i : i + size] for i in range(0, len(ids), size))]  # fmt: skip
        whole = lambda: jax.block_until_ready([loaded._text(loaded.params, p) for p in padded])
        sides = {
            "text bank, own length": lambda: loaded.encode_text(ids),
            f"text bank, padded to {context}": whole,
        }
        if not args.no_torch:
            sides[f"torch, padded to {context}"] = lambda: [peer_tokens(p) for p in padded] and wait()
        names = list(sides)
        report["text"] = table(
            measure(sides, args.rounds), len(ids), "prompts", [(names[0], n) for n in names[1:]]
        )
        lengths = (ids != m.text.pad_id).sum(1)
        show(
            f"{len(ids)} prompts, mean {lengths.mean():.1f} and at most {lengths.max()} tokens",
            report["text"],
        )
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
