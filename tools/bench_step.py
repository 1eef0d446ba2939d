r"""Train-step and forward speed against PyTorch: the same shapes, threads and precision, in one run.

    python tools/bench_step.py --model small --batch 16 --text 64
    python tools/bench_step.py --model unimed-clip-vit-b16 --batch 128 --text 256 --lengths 64 \
        --text-groups 64:0.75,256:0.25

The peer is transformers' CLIPVisionModelWithProjection and BertModel (SDPA attention) with the same two-layer head,
fused AdamW where it exists and, on a GPU, bf16 autocast. Rounds alternate; each figure is the best and the median of
`--rounds` rounds of `--steps` steps. A ratio above 1 means that this project is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from unimed_jax.data import limits


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="small", help="a named model (unimed-jax models list)")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--text", type=int, default=64, help="context length")
    p.add_argument(
        "--lengths", type=int, default=0, help="mean caption tokens; 0 = every caption fills the context"
    )
    p.add_argument("--text-groups", default="", help="WIDTH:SHARE,... e.g. 64:0.75,256:0.25")
    p.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    p.add_argument("--forward", action="store_true", help="image and text embeddings only, no training")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=2, help="steps a round")
    p.add_argument(
        "--threads", type=int, default=0, help="PyTorch threads; 0 = all cores this process may use"
    )
    p.add_argument("--compile", action="store_true", help="torch.compile for the peer as well")
    p.add_argument("--no-torch", action="store_true", help="this project alone")
    p.add_argument("--json", default="", help="also write the figures to this file")
    return p.parse_args()


def model_config(args: argparse.Namespace, on_gpu: bool):
    from unimed_jax.models import zoo

    m = zoo.get(args.model)
    groups = tuple(
        (int(w), float(s)) for w, _, s in (g.partition(":") for g in args.text_groups.split(",") if g)
    )
    text = dataclasses.replace(m.text, context_length=args.text, dropout=0.0)
    return dataclasses.replace(
        m, text=text, text_groups=groups, remat=args.remat, dtype="bfloat16" if on_gpu else "float32"
    )


def batch_of(m, args: argparse.Namespace) -> dict:
    """Random pictures; captions of exactly the context, or of a geometric length around `--lengths`."""
    import numpy as np

    rng = np.random.default_rng(0)
    b, t = args.batch, args.text
    tokens = rng.integers(5, m.text.vocab_size, (b, t), dtype=np.int32)
    if args.lengths:
        lengths = np.clip(rng.gamma(4.0, args.lengths / 4.0, b).astype(int), 4, t)
        tokens[np.arange(t)[None] >= lengths[:, None]] = m.text.pad_id
    side = m.vision.image_size
    return {
        "image": rng.integers(0, 256, (b, side, side, 3), dtype=np.uint8),
        "tokens": tokens,
        "source": np.zeros(b, np.int32),
        "mask": np.ones(b, bool),
        "caption_id": np.arange(b, dtype=np.int32),
    }


def ours(m, batch: dict, args: argparse.Namespace):
    """Returns (run one step, wait for it, facts)."""
    import jax

    from unimed_jax import config, parallel
    from unimed_jax.models import clip
    from unimed_jax.train import optim, step

    graphdef, abstract = clip.skeleton(m)
    params = jax.jit(lambda k: clip.init(m, k))(jax.random.key(0))
    mesh = parallel.make_mesh(config.Mesh(), devices=jax.devices()[:1])
    if args.forward:

        def forward(params, images, tokens):
            model = clip.bind(graphdef, params)
            return model.encode_image(images), model.encode_text(tokens)

        compiled = jax.jit(forward).lower(params, batch["image"], batch["tokens"]).compile()
        on_device = jax.device_put((batch["image"], batch["tokens"]))
        return lambda: compiled(params, *on_device), jax.block_until_ready, {}

    cfg = config.Train(batch_size=args.batch, model=m, duration=config.Duration(steps=1000))
    tx = optim.make_optimizer(cfg, abstract, 1000)
    state = step.create_state(cfg, params, tx)
    train_step = step.make_train_step(cfg, graphdef, tx, mesh)
    placed = parallel.put(batch, mesh)
    holder = {"state": state}

    def once():
        holder["state"], metrics = train_step(holder["state"], placed)
        return metrics["loss"]

    return once, jax.block_until_ready, {}


def peer(m, batch: dict, args: argparse.Namespace, on_gpu: bool):
    """The PyTorch side: the same towers out of transformers."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        torch.set_num_threads(args.threads or limits.cores())
    v, t = m.vision, m.text
    sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.mlp_dim, num_hidden_layers=v.depth,
            num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch_size,
            projection_dim=m.embed_dim, hidden_act=v.act, layer_norm_eps=v.ln_eps, **sdpa,
        )
    )  # fmt: skip
    bert = BertModel(
        BertConfig(
            vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.depth, num_attention_heads=t.heads,
            intermediate_size=t.mlp_dim, max_position_embeddings=t.max_positions, layer_norm_eps=t.ln_eps,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sdpa,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    hidden = (t.width + m.embed_dim) // 2
    head = torch.nn.Sequential(
        torch.nn.Linear(t.width, hidden, bias=False),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, m.embed_dim, bias=False),
    )
    scale = torch.nn.Parameter(torch.tensor(2.6593, device=device))
    modules: list[torch.nn.Module] = [vision, bert, head]
    for module in modules:
        module.to(torch.device(device)).train()
    parameters = [p for module in modules for p in module.parameters()] + [scale]
    opt = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device)[:, None, None]
    images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2).contiguous()
    ids = torch.from_numpy(batch["tokens"]).long().to(device)
    mask = (ids != t.pad_id).long()
    normalize = torch.nn.functional.normalize

    def embed():
        x = (images.float() / 255 - mean) / std
        a = vision(pixel_values=x).image_embeds
        b = head(bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
        return a, b

    def loss_of():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
            a, b = embed()
        a, b = normalize(a.float(), dim=-1), normalize(b.float(), dim=-1)
        logits = scale.exp() * a @ b.T
        y = torch.arange(len(logits), device=device)
        return (
            torch.nn.functional.cross_entropy(logits, y) + torch.nn.functional.cross_entropy(logits.T, y)
        ) / 2

    run_loss = torch.compile(loss_of) if args.compile else loss_of

    def once():
        if args.forward:
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
                return embed()
        opt.zero_grad(set_to_none=True)
        loss = run_loss()
        loss.backward()
        opt.step()
        with torch.no_grad():
            scale.clamp_(0, 4.6052)
        return loss

    def wait(_):
        if on_gpu:
            torch.cuda.synchronize()

    return once, wait, {"torch": torch.__version__, "torch threads": torch.get_num_threads()}


def measure(sides: dict, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step, alternating the sides; every side is warmed up first."""
    for once, wait in sides.values():
        wait(once())
        wait(once())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (once, wait) in sides.items():
            start = time.perf_counter()
            for _ in range(steps):
                result = once()
            wait(result)
            times[name].append((time.perf_counter() - start) / steps)
    return times


def main() -> None:
    args = parse()
    # On a GPU both frameworks share the card: jax must not take it all at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from unimed_jax.models import flops

    on_gpu = jax.default_backend() == "gpu"
    m = model_config(args, on_gpu)
    batch = batch_of(m, args)
    sides, facts = {}, {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name, make in (
        ("unimed_jax", lambda: ours(m, batch, args)),
        ("torch", lambda: peer(m, batch, args, on_gpu)),
    ):
        if name == "torch" and args.no_torch:
            continue
        once, wait, more = make()
        sides[name] = (once, wait)
        facts |= more
    times = measure(sides, args.rounds, args.steps)
    work = (1 if args.forward else 3) * (flops.image_flops(m) + flops.text_flops(m, args.text)) * args.batch
    report = {
        "command": "python tools/bench_step.py " + " ".join(sys.argv[1:]),
        **facts,
        "load average": round(os.getloadavg()[0], 2),
        "padded work a step, TFLOP": round(work / 1e12, 4),
    }
    for name, t in times.items():
        report[name] = {
            "best s": round(min(t), 4),
            "median s": round(statistics.median(t), 4),
            "samples/s": round(args.batch / min(t), 2),
        }
    if "torch" in times:
        report["ratio best"] = round(min(times["torch"]) / min(times["unimed_jax"]), 3)
        report["ratio median"] = round(
            statistics.median(times["torch"]) / statistics.median(times["unimed_jax"]), 3
        )
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
