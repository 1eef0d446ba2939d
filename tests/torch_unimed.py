"""UniMed-CLIP's dual encoder in PyTorch with the original's module tree and parameter names, and its training loop.

Written from a description of the architecture with the layers of torch and transformers; takes uint8 pictures and token
ids. `named_parameters()` has the order of the original's modules.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from unimed_jax import config
from unimed_jax.data.images import NORMALIZE


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, hidden)),
            ("act", QuickGELU()),
            ("c_proj", nn.Linear(hidden, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):  # [t b d]
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, v: config.Vision):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(v.width, v.heads, v.mlp_dim) for _ in range(v.depth))


class Visual(nn.Module):
    def __init__(self, v: config.Vision, embed_dim: int):
        super().__init__()
        tokens = (v.image_size // v.patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, v.width, v.patch_size, v.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(v.width) * v.width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, v.width) * v.width**-0.5)
        self.ln_pre = nn.LayerNorm(v.width)
        self.transformer = Blocks(v)
        self.ln_post = nn.LayerNorm(v.width)
        self.proj = nn.Parameter(torch.randn(v.width, embed_dim) * v.width**-0.5)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x).permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[0]) @ self.proj


class TextEncoder(nn.Module):
    def __init__(self, t: config.Text, embed_dim: int):
        super().__init__()
        self.pad_id, hidden = t.pad_id, (t.width + embed_dim) // 2
        # fmt: off
        c = BertConfig(
            vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.depth, num_attention_heads=t.heads,
            intermediate_size=t.mlp_dim, max_position_embeddings=t.max_positions, pad_token_id=t.pad_id,
            hidden_dropout_prob=t.dropout, attention_probs_dropout_prob=t.dropout,
        )
        # fmt: on
        self.transformer = BertModel(c, add_pooling_layer=False)
        self.proj = nn.Sequential(
            nn.Linear(t.width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
        )

    def forward(self, tokens):
        mask = (tokens != self.pad_id).long()
        return self.proj(self.transformer(tokens, attention_mask=mask).last_hidden_state[:, 0])


class Peer(nn.Module):
    def __init__(self, m: config.Model):
        super().__init__()
        self.normalize = NORMALIZE[m.vision.normalize]
        self.visual = Visual(m.vision, m.embed_dim)
        self.text_encoder = TextEncoder(m.text, m.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: np.ndarray, tokens: np.ndarray):
        """The symmetric contrastive loss of a batch: u8[b h w 3] and i32[b t]."""
        mean, std = (torch.tensor(x) for x in self.normalize)
        pixels = ((torch.tensor(image).float() / 255 - mean) / std).permute(0, 3, 1, 2)
        a = F.normalize(self.visual(pixels), dim=-1)
        b = F.normalize(self.text_encoder(torch.tensor(tokens).long()), dim=-1)
        logits = self.logit_scale.exp() * a @ b.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def make_optimizer(model: nn.Module, o: config.Optim) -> torch.optim.AdamW:
    """The original's two groups: biases, norms and scalars without decay come first."""
    plain = lambda n, p: p.ndim < 2 or any(x in n for x in ("bn", "ln", "bias", "logit_scale"))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if plain(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not plain(n, p)], "weight_decay": o.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)


def train(
    model: Peer, optimizer: torch.optim.AdamW, batches: list[dict[str, Any]], rates: list[float]
) -> list[float]:
    """The losses before each step; step s uses batch s modulo their number and learning rate s."""
    losses = []
    for s, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model(**batches[s % len(batches)])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss.detach()))
    return losses


def rate(s: int, o: config.Optim, warmup: int, total: int) -> float:
    """The original's learning rate at step s, a numpy scalar as there."""
    if s < warmup:
        return o.lr * (s + 1) / warmup
    return o.lr * 0.5 * (1 + np.cos(np.pi * (s - warmup) / (total - warmup)))


def save(file: Path, model: nn.Module, optimizer: torch.optim.AdamW, *, epoch: int = 1) -> Path:
    """A training checkpoint as the original writes it from its distributed wrapper."""
    state = OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items())
    body = {
        "epoch": epoch,
        "name": "small",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scaler": {},
    }
    torch.save(body, file)
    return file
