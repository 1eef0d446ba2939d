"""Thirty training steps beside PyTorch: transformers' towers, torch's AdamW, the reference's groups and schedule."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import small_model

from unimed_jax import config, parallel
from unimed_jax.convert import tables
from unimed_jax.data.images import NORMALIZE
from unimed_jax.models import clip
from unimed_jax.train import optim, step

STEPS, WARMUP, ROWS, LR = 30, 5, 16, 5e-4
CEILING = 2.655  # of logit_scale; just below its start, so that the clamp has to act


def batches(m: config.Model, n: int = 2):
    """Fixed batches with captions of different lengths."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        tokens = rng.integers(1, m.text.vocab_size, (ROWS, m.text.context_length), dtype=np.int32)
        lengths = rng.integers(4, m.text.context_length + 1, (ROWS, 1))
        tokens[np.arange(m.text.context_length) >= lengths] = m.text.pad_id
        size = m.vision.image_size
        yield {"image": rng.integers(0, 256, (ROWS, size, size, 3), dtype=np.uint8), "tokens": tokens}


def torch_model(m: config.Model, params: clip.Params):
    """The same dual encoder out of transformers' modules, with these weights; forward returns the loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    v, t = m.vision, m.text

    class Peer(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(float(params["logit_scale"])))
            self.visual = CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=v.width, intermediate_size=v.mlp_dim, num_hidden_layers=v.depth,
                    num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch_size,
                    projection_dim=m.embed_dim, hidden_act=v.act, layer_norm_eps=v.ln_eps,
                )
            )  # fmt: skip
            self.bert = BertModel(
                BertConfig(
                    vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.depth,
                    num_attention_heads=t.heads, intermediate_size=t.mlp_dim, max_position_embeddings=t.max_positions,
                    hidden_act=t.act, layer_norm_eps=t.ln_eps, pad_token_id=t.pad_id,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                ),
                add_pooling_layer=False,
            )  # fmt: skip
            up, down = (params["text"]["proj"][k]["kernel"] for k in ("up", "down"))
            self.proj = nn.Sequential(
                nn.Linear(*up.shape, bias=False), nn.GELU(), nn.Linear(*down.shape, bias=False)
            )
            for linear, kernel in ((self.proj[0], up), (self.proj[2], down)):
                linear.weight.data = torch.tensor(np.asarray(kernel).T.copy())
            for module, table in ((self.visual, tables.HF_CLIP_VISION), (self.bert, tables.HF_BERT)):
                state = tables.from_params(params[table.tower], table, m)
                module.load_state_dict({k: torch.tensor(x) for k, x in state.items()})

        def forward(self, image, tokens):
            mean, std = (torch.tensor(x) for x in NORMALIZE[v.normalize])
            pixels = ((torch.tensor(image).float() / 255 - mean) / std).permute(0, 3, 1, 2)
            tokens = torch.tensor(tokens).long()
            hidden = self.bert(tokens, attention_mask=(tokens != t.pad_id).long()).last_hidden_state[:, 0]
            a = F.normalize(self.visual(pixels).image_embeds, dim=-1)
            b = F.normalize(self.proj(hidden), dim=-1)
            logits = self.logit_scale.exp() * a @ b.T
            target = torch.arange(len(logits))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return Peer()


def torch_losses(m: config.Model, params: clip.Params, data) -> tuple[list[float], list[float]]:
    """Loss and temperature factor before each step of the reference's loop."""
    import torch

    model = torch_model(m, params)
    decayed = lambda name, p: p.ndim >= 2 and not any(x in name for x in ("bn", "ln", "bias", "logit_scale"))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decayed(n, p) == keep], "weight_decay": 0.2 * keep}
        for keep in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    losses, scales = [], []
    for s in range(STEPS):
        done = (s - WARMUP) / (STEPS - WARMUP)
        rate = LR * (s + 1) / WARMUP if s < WARMUP else 0.5 * LR * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        scales.append(float(model.logit_scale.detach().exp()))
        loss = model(**data[s % len(data)])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, CEILING)
        losses.append(float(loss.detach()))
    return losses, scales


def our_losses(m: config.Model, params: clip.Params, data) -> tuple[list[float], list[float]]:
    o = config.Optim(lr=LR, warmup=config.Duration(steps=WARMUP), max_logit_scale=CEILING)
    cfg = config.Train(batch_size=ROWS, model=m, optim=o)
    mesh = parallel.make_mesh(cfg.mesh, jax.devices()[:1])
    graphdef, abstract = clip.skeleton(m)
    tx = optim.make_optimizer(cfg, abstract, STEPS)
    state = step.create_state(cfg, params, tx)
    state = jax.device_put(state, parallel.shardings(state, mesh))
    train_step = step.make_train_step(cfg, graphdef, tx, mesh)
    placed = [parallel.put(b, mesh) for b in data]
    metrics = []
    for s in range(STEPS):
        state, found = train_step(state, placed[s % len(placed)])
        metrics.append(found)
    return [float(x["loss"]) for x in metrics], [float(x["logit_scale"]) for x in metrics]


@pytest.mark.torch
@pytest.mark.slow
def test_thirty_steps_follow_torch():
    m = small_model.model(text__dropout=0.0)
    params = small_model.params(m)
    data = list(batches(m))
    theirs, their_scales = torch_losses(m, params, data)
    ours, our_scales = our_losses(m, params, data)
    assert theirs[-1] < 0.5 * theirs[0]  # it learned: small errors had time to grow
    assert their_scales[1] == pytest.approx(math.exp(CEILING))  # the clamp acted
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(our_scales, their_scales, rtol=1e-5)
