"""The towers of a checkpoint as PyTorch modules that its tensors fill under their own names; only for comparisons.

The modules carry the names of the file's format and know nothing of the conversion tables. The arithmetic is PyTorch's
(`nn.MultiheadAttention`) and transformers' (`BertModel`, `CLIPModel`, `Dinov2Model`). PyTorch is imported inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax import config
from unimed_jax.convert import torch_pretrained
from unimed_jax.convert.mapped import shown
from unimed_jax.convert.names import some
from unimed_jax.convert.source import Source
from unimed_jax.data.images import NORMALIZE
from unimed_jax.errors import DataError, UsageError

Encode = Callable[[np.ndarray], np.ndarray]


def encoders(source: Source) -> dict[str, Encode]:
    """The towers of a file as PyTorch functions on numpy arrays, in float32.

    Returns:
        "vision": u8[n h w 3] -> f32[n d]; "text": i32[n t] -> f32[n d]; not normalised. Only `source.towers` may be
        called.

    Raises:
        UsageError: when PyTorch is not installed.
        DataError: when the file's tensors do not load strictly into the modules of its format.
    """
    try:
        import torch
    except ImportError as e:
        raise UsageError(
            "comparing with PyTorch needs torch, which is not installed", "pip install 'unimed-jax[torch]'"
        ) from e
    state = {
        k: torch.from_numpy(np.array(v, np.float32))
        for k, v in source.state.items()
        if k not in source.ignored
    }
    _quiet()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in NORMALIZE[source.model.vision.normalize])
    build = _BUILDERS[source.format]
    with torch.no_grad():
        image, text = build(state, source)

    def encode_image(pictures: np.ndarray) -> Float[np.ndarray, "n d"]:
        with torch.no_grad():
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
            return image((pixels - mean) / std).numpy()

    def encode_text(tokens: np.ndarray) -> Float[np.ndarray, "n d"]:
        with torch.no_grad():
            return text(torch.from_numpy(tokens.astype(np.int64))).numpy()

    return {"vision": encode_image, "text": encode_text}


def _quiet() -> None:
    """No progress bars and no advice from transformers: one line a tower is what was asked for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _strict(module: Any, state: Mapping[str, Any], source: Source) -> Any:
    """Loads tensors under their own names; buffers that newer libraries no longer save may be absent."""
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as e:
        raise DataError(
            f"{source.path}: {shown(' '.join(str(e).split()))}", "convert without --verify"
        ) from e
    missing = [k for k in missing if not k.endswith(("position_ids", "token_type_ids"))]
    if missing or unexpected:
        raise DataError(
            f"{source.path}: PyTorch's modules lack {some(missing) or 'nothing'} and do not know "
            f"{some(unexpected) or 'nothing'}"
        )
    return module.eval()


def _act(name: str) -> Any:
    import torch
    from torch import nn

    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    return QuickGELU() if name == "quick_gelu" else nn.GELU()


def _block(width: int, heads: int, mlp: int, act: str, eps: float) -> Any:
    """A residual block with the names of OpenAI's CLIP."""
    from collections import OrderedDict

    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            layers = [("c_fc", nn.Linear(width, mlp)), ("act", _act(act)), ("c_proj", nn.Linear(mlp, width))]
            self.mlp = nn.Sequential(OrderedDict(layers))

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    return Block()


def _stack(depth: int, *args: Any) -> Any:
    """`resblocks` below a module, as CLIP names them."""
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.resblocks = nn.ModuleList([_block(*args) for _ in range(depth)])

        def forward(self, x, mask=None):
            for block in self.resblocks:
                x = block(x, mask)
            return x

    return Transformer()


def _clip_vision(v: config.Vision, embed_dim: int) -> Any:
    """`visual.*` of OpenAI CLIP, MetaCLIP, OpenCLIP and UniMed-CLIP."""
    import torch
    from torch import nn

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            tokens = (v.image_size // v.patch_size) ** 2 + 1
            self.conv1 = nn.Conv2d(3, v.width, v.patch_size, v.patch_size, bias=v.patch_bias)
            self.class_embedding = nn.Parameter(torch.zeros(v.width))
            self.positional_embedding = nn.Parameter(torch.zeros(tokens, v.width))
            self.ln_pre = nn.LayerNorm(v.width, eps=v.ln_eps) if v.ln_pre else nn.Identity()
            self.transformer = _stack(v.depth, v.width, v.heads, v.mlp_dim, v.act, v.ln_eps)
            self.ln_post = nn.LayerNorm(v.width, eps=v.ln_eps)
            self.proj = nn.Parameter(torch.zeros(v.width, embed_dim))

        def forward(self, pixels):
            x = self.conv1(pixels).flatten(2).transpose(1, 2)
            first = self.class_embedding.expand(len(x), 1, -1)
            x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
            return self.ln_post(self.transformer(x)[:, 0]) @ self.proj

    return Vision()


def _clip_text(t: config.Text, embed_dim: int) -> Any:
    """The causal text transformer of OpenAI CLIP, whose keys have no prefix."""
    import torch
    from torch import nn

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = nn.Embedding(t.vocab_size, t.width)
            self.positional_embedding = nn.Parameter(torch.zeros(t.max_positions, t.width))
            self.transformer = _stack(t.depth, t.width, t.heads, t.mlp_dim, t.act, t.ln_eps)
            self.ln_final = nn.LayerNorm(t.width, eps=t.ln_eps)
            self.text_projection = nn.Parameter(torch.zeros(t.width, embed_dim))

        def forward(self, ids):
            n = ids.shape[1]
            mask = torch.full((n, n), -math.inf).triu(1)
            x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:n], mask)
            return self.ln_final(x)[torch.arange(len(ids)), _eot(ids, t)] @ self.text_projection

    return Text()


def _eot(ids: Any, t: config.Text) -> Any:
    return (ids if t.eot_id < 0 else (ids == t.eot_id).int()).argmax(-1)


def _timm_vision(v: config.Vision, embed_dim: int) -> Any:
    """`visual.*` of OpenCLIP with a timm tower, as BiomedCLIP has."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(v.width, 3 * v.width), nn.Linear(v.width, v.width)

        def forward(self, x):
            q, k, w = self.qkv(x).unflatten(-1, (3, v.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, w).transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = (
                nn.Linear(v.width, v.mlp_dim),
                _act(v.act),
                nn.Linear(v.mlp_dim, v.width),
            )

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(v.width, eps=v.ln_eps) for _ in range(2))
            self.attn, self.mlp = Attention(), Mlp()

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, v.width, v.patch_size, v.patch_size, bias=v.patch_bias)

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            tokens = (v.image_size // v.patch_size) ** 2 + 1
            self.cls_token = nn.Parameter(torch.zeros(1, 1, v.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, v.width))
            self.patch_embed = Patches()
            self.blocks = nn.Sequential(*[Block() for _ in range(v.depth)])
            self.norm = nn.LayerNorm(v.width, eps=v.ln_eps)

        def forward(self, pixels):
            x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
            return self.norm(self.blocks(x))[:, 0]

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(v.width, embed_dim, bias=False)

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = Trunk(), Head()

        def forward(self, pixels):
            return self.head.proj(self.trunk(pixels))

    return Vision()


def _bert_config(t: config.Text) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=t.vocab_size,
        hidden_size=t.width,
        num_hidden_layers=t.depth,
        num_attention_heads=t.heads,
        intermediate_size=t.mlp_dim,
        hidden_act=t.act,
        max_position_embeddings=t.max_positions,
        layer_norm_eps=t.ln_eps,
        pad_token_id=t.pad_id,
    )


def _bert_with_head(state: Mapping[str, Any], t: config.Text, embed_dim: int, source: Source) -> Any:
    """OpenCLIP's text tower out of Hugging Face's BERT: `transformer.*` and `proj`."""
    from torch import nn
    from transformers import BertModel

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = BertModel(_bert_config(t), add_pooling_layer=False)
            hidden = (t.width + embed_dim) // 2
            self.proj = {
                "none": nn.Identity,
                "linear": lambda: nn.Linear(t.width, embed_dim, bias=False),
                "mlp": lambda: nn.Sequential(
                    nn.Linear(t.width, hidden, bias=False),
                    nn.GELU(),
                    nn.Linear(hidden, embed_dim, bias=False),
                ),
            }[t.proj]()

    text = _strict(Text(), state, source)
    encode = torch_pretrained.pooled(text.transformer, t)
    return lambda ids: text.proj(encode(ids))


def _open_clip(state: dict[str, Any], source: Source) -> tuple[Any, Any]:
    """OpenAI, MetaCLIP, OpenCLIP, UniMed-CLIP and BiomedCLIP: told apart by their keys."""
    m = source.model
    image = text = None
    visual = _part(state, "visual.")
    if visual:
        make = _timm_vision if "trunk.pos_embed" in visual else _clip_vision
        image = _strict(make(m.vision, m.embed_dim), visual, source)
    bert = _part(state, "text_encoder.") or _part(state, "text.")
    if "token_embedding.weight" in bert:  # CustomTextCLIP with OpenAI's text tower
        text = _strict(_clip_text(m.text, m.embed_dim), bert, source)
    elif bert:
        text = _bert_with_head(bert, m.text, m.embed_dim, source)
    elif "token_embedding.weight" in state:
        own = {
            k: v
            for k, v in state.items()
            if not k.startswith("visual.") and k not in ("logit_scale", "logit_bias")
        }
        text = _strict(_clip_text(m.text, m.embed_dim), own, source)
    return image, text


_BUILDERS: dict[str, Callable[[dict[str, Any], Source], tuple[Any, Any]]] = {
    "unimed": _open_clip,
    "openclip": _open_clip,
    "openai": _open_clip,
    "hf-clip": torch_pretrained.clip,
    "hf-vision": torch_pretrained.clip,
    "hf-bert": torch_pretrained.bert,
    "hf-dinov2": torch_pretrained.dinov2,
}
