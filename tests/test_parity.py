"""Towers against PyTorch: transformers' modules with random weights, float32, at an output scale of about 1."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_model import clip_text

from unimed_jax import config
from unimed_jax.convert import dinov2_onnx, native, tables
from unimed_jax.convert.source import open_source
from unimed_jax.models import clip, layers, zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-5
DINO_NAMES = {  # checkpoint files keep the left names; transformers 5 renames them inside the module
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def randomize(module, seed=0):
    """Random weights that keep activations near 1; every parameter differs from its default."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim >= 2 and "embedding" not in name:
                p.copy_(noise * p[0].numel() ** -0.5)
            elif name.endswith("weight") and p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    return module.eval()


def state_of(module, rename=None):
    out = {}
    for k, v in module.state_dict().items():
        for old, new in (rename or {}).items():
            k = k.replace(new, old)
        out[k] = v.numpy()
    return out


def embed(m, tower, params, x):
    """Our embeddings; the other tower is never looked at."""
    graphdef, abstract = clip.skeleton(m)
    whole = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract) | {tower: params}
    method = "encode_image" if tower == "vision" else "encode_text"
    return np.asarray(jax.jit(lambda p, x: getattr(clip.bind(graphdef, p), method)(x))(whole, x))


def small(**changes):
    """A model whose other tower costs nothing."""
    base = {
        "name": "t",
        "embed_dim": 24,
        "dtype": "float32",
        "vision": config.Vision(image_size=8, patch_size=8, width=8, depth=1, heads=1, mlp_dim=8),
        "text": config.Text(
            vocab_size=8, context_length=4, max_positions=4, width=8, depth=1, heads=1, mlp_dim=8
        ),
    }
    return config.Model(**(base | changes))


def pixels(b, size, seed=0):
    return np.random.default_rng(seed).normal(size=(b, size, size, 3)).astype(np.float32)


def nchw(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def padded(lengths, width, vocab, seed=0, pad=0):
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), width), pad, np.int32)
    for row, n in zip(ids, lengths, strict=True):
        row[:n] = rng.integers(pad + 1, vocab, n)
    return ids


def assert_close(ours, theirs, tol=TOLERANCE):
    scale = float(np.abs(theirs).mean())
    assert 0.05 < scale < 5, f"outputs of scale {scale} would say little"
    assert np.abs(ours - theirs).max() <= tol * max(1, scale)


# --- CLIP's vision tower


def hf_vision(v: config.Vision, embed_dim):
    c = transformers.CLIPVisionConfig(
        hidden_size=v.width,
        intermediate_size=v.mlp_dim,
        num_hidden_layers=v.depth,
        num_attention_heads=v.heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        projection_dim=embed_dim,
        hidden_act=v.act,
        layer_norm_eps=v.ln_eps,
    )
    return randomize(transformers.CLIPVisionModelWithProjection(c))


def check_vision(v, embed_dim, batch):
    m = small(vision=v, embed_dim=embed_dim)
    module = hf_vision(v, embed_dim)
    x = pixels(batch, v.image_size)
    with torch.no_grad():
        theirs = module(nchw(x)).image_embeds.numpy()
    params = tables.to_params(state_of(module), tables.HF_CLIP_VISION, m)
    assert_close(embed(m, "vision", params, x), theirs)
    return m, params, x, theirs


VISIONS = [
    config.Vision(image_size=32, patch_size=8, width=48, depth=3, heads=4, mlp_dim=96),
    config.Vision(image_size=28, patch_size=14, width=32, depth=1, heads=2, mlp_dim=40, act="gelu"),
    config.Vision(image_size=32, patch_size=16, width=64, depth=2, heads=1, mlp_dim=256, ln_eps=1e-3),
]


@pytest.mark.parametrize("v", VISIONS, ids=["quick", "gelu", "eps"])
def test_clip_vision(v):
    check_vision(v, 24, 3)


@pytest.mark.slow
def test_clip_vision_b16_at_full_size():
    check_vision(config.Vision(), 512, 1)


@pytest.mark.parametrize(
    "wrong", [{"act": "gelu"}, {"ln_eps": 1e-3}, {"heads": 2}, {"pool": "mean"}], ids=lambda w: next(iter(w))
)
def test_a_wrong_switch_is_seen(wrong):
    m, params, x, theirs = check_vision(VISIONS[0], 24, 3)
    m.vision = dataclasses.replace(m.vision, **wrong)
    assert np.abs(embed(m, "vision", params, x) - theirs).max() > 10 * TOLERANCE


def test_the_tanh_gelu_is_seen(monkeypatch):
    m, params, x, theirs = check_vision(VISIONS[1], 24, 3)
    monkeypatch.setitem(layers.ACT, "gelu", functools.partial(jax.nn.gelu, approximate=True))
    assert np.abs(embed(m, "vision", params, x) - theirs).max() > 10 * TOLERANCE


# --- CLIP's text tower


def hf_clip_text(t: config.Text, embed_dim, eos):
    c = transformers.CLIPTextConfig(
        hidden_size=t.width,
        intermediate_size=t.mlp_dim,
        num_hidden_layers=t.depth,
        num_attention_heads=t.heads,
        vocab_size=t.vocab_size,
        max_position_embeddings=t.max_positions,
        projection_dim=embed_dim,
        hidden_act=t.act,
        layer_norm_eps=t.ln_eps,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return randomize(transformers.CLIPTextModelWithProjection(c))


CLIP_TEXT = clip_text(20, vocab_size=50, width=48, depth=3, heads=4, mlp_dim=96)


@pytest.mark.parametrize(("eot_id", "eos"), [(-1, 2), (30, 30)], ids=["largest", "named"])
def test_clip_text(eot_id, eos):
    """transformers pools at the largest id when eos_token_id is the legacy 2, else at the first such token."""
    t = dataclasses.replace(CLIP_TEXT, eot_id=eot_id)
    m = small(text=t)
    module = hf_clip_text(t, 24, eos)
    ids = padded([3, 20, 11], 20, 49)
    ids[ids == 30] = 31
    for row, n in zip(ids, (3, 20, 11), strict=True):
        row[n - 1] = 49 if eot_id < 0 else 30
    with torch.no_grad():
        theirs = module(torch.from_numpy(ids)).text_embeds.numpy()
    params = tables.to_params(state_of(module), tables.HF_CLIP_TEXT, m)
    assert_close(embed(m, "text", params, ids), theirs)


def part(state, *prefixes):
    return {k: v for k, v in state.items() if k.startswith(prefixes)}


def test_a_whole_clip_model():
    v, t = VISIONS[0], CLIP_TEXT
    m = small(vision=v, text=t)
    vision, text = hf_vision(v, 24), hf_clip_text(t, 24, 2)
    c = transformers.CLIPConfig(
        text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=24
    )
    module = transformers.CLIPModel(c)
    module.load_state_dict({**vision.state_dict(), **text.state_dict(), "logit_scale": torch.tensor(3.0)})
    module.eval()
    x, ids = pixels(3, 32), padded([3, 20, 11], 20, 50)
    with torch.no_grad():
        out = module(input_ids=torch.from_numpy(ids), pixel_values=nchw(x))
    state = state_of(module)
    params = {
        "vision": tables.to_params(
            part(state, "vision_model.", "visual_projection."), tables.HF_CLIP_VISION, m
        ),
        "text": tables.to_params(part(state, "text_model.", "text_projection."), tables.HF_CLIP_TEXT, m),
        "logit_scale": state["logit_scale"],
    }
    graphdef, _ = clip.skeleton(m)
    ours = jax.jit(lambda p, x, t: clip.bind(graphdef, p)(x, t))(params, x, ids)
    np.testing.assert_allclose(ours.image, out.image_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(ours.text, out.text_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(ours.logit_scale, np.exp(3.0), rtol=1e-6)
    logits = float(ours.logit_scale) * ours.text @ ours.image.T
    np.testing.assert_allclose(logits, out.logits_per_text.numpy(), atol=1e-3)
    back = {
        **tables.from_params(params["vision"], tables.HF_CLIP_VISION, m),
        **tables.from_params(params["text"], tables.HF_CLIP_TEXT, m),
    }
    assert back.keys() == state.keys() - {"logit_scale"}
    assert all(np.array_equal(v, state[k]) for k, v in back.items())


# --- BERT


def check_bert(t, batch_lengths, width):
    m = small(text=t, embed_dim=t.width)
    c = transformers.BertConfig(
        hidden_size=t.width,
        intermediate_size=t.mlp_dim,
        num_hidden_layers=t.depth,
        num_attention_heads=t.heads,
        vocab_size=t.vocab_size,
        max_position_embeddings=t.max_positions,
        hidden_act=t.act,
        layer_norm_eps=t.ln_eps,
        pad_token_id=t.pad_id,
    )
    module = randomize(transformers.BertModel(c, add_pooling_layer=False))
    ids = padded(batch_lengths, width, t.vocab_size, pad=t.pad_id)
    mask = torch.from_numpy(ids != t.pad_id)
    with torch.no_grad():
        hidden = module(torch.from_numpy(ids), attention_mask=mask).last_hidden_state
    if t.pool == "cls":
        theirs = hidden[:, 0].numpy()
    else:
        theirs = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    params = tables.to_params(state_of(module), tables.HF_BERT, m)
    assert_close(embed(m, "text", params, ids), theirs)


BERT = config.Text(
    vocab_size=60,
    context_length=24,
    max_positions=40,
    width=48,
    depth=3,
    heads=4,
    mlp_dim=96,
    proj="none",
)


@pytest.mark.parametrize(
    "t",
    [BERT, dataclasses.replace(BERT, pool="mean", pad_id=3), dataclasses.replace(BERT, ln_eps=1e-3, heads=2)],
    ids=["cls", "mean", "eps"],
)
def test_bert(t):
    check_bert(t, [5, 24, 1, 17], 24)


@pytest.mark.slow
def test_bert_base_at_full_size():
    check_bert(config.Text(proj="none"), [256, 31], 256)


def test_unimed_text_head():
    """Linear, exact GELU, Linear, no biases, hidden width (d + E) // 2."""
    m = small(text=dataclasses.replace(BERT, proj="mlp"), embed_dim=31)
    bare = small(text=BERT, embed_dim=48)
    abstract = clip.skeleton(m)[1]["text"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.2, abstract)
    head = torch.nn.Sequential(
        torch.nn.Linear(48, 39, bias=False), torch.nn.GELU(), torch.nn.Linear(39, 31, bias=False)
    )
    with torch.no_grad():
        head[0].weight.copy_(torch.from_numpy(params["proj"]["up"]["kernel"].T))
        head[2].weight.copy_(torch.from_numpy(params["proj"]["down"]["kernel"].T))
    ids = padded([5, 24], 24, 60)
    features = embed(bare, "text", {k: v for k, v in params.items() if k != "proj"}, ids)
    with torch.no_grad():
        theirs = head(torch.from_numpy(np.array(features))).numpy()
    np.testing.assert_allclose(embed(m, "text", params, ids), theirs, atol=TOLERANCE)


# --- DINOv2


def dino(v: config.Vision, trained_size):
    c = transformers.Dinov2Config(
        hidden_size=v.width,
        mlp_ratio=v.mlp_dim // v.width,
        num_hidden_layers=v.depth,
        num_attention_heads=v.heads,
        image_size=trained_size,
        patch_size=v.patch_size,
        hidden_act=v.act,
        layer_norm_eps=v.ln_eps,
    )
    return randomize(transformers.Dinov2Model(c))


def test_dinov2_with_layer_scale_and_resized_positions():
    v = config.Vision(
        image_size=56,
        patch_size=14,
        width=48,
        depth=3,
        heads=4,
        mlp_dim=192,
        act="gelu",
        ln_pre=False,
        ln_eps=1e-6,
        patch_bias=True,
        proj="none",
    )
    m, x = small(vision=v, embed_dim=48), pixels(2, 56)
    module = dino(v, trained_size=98)  # a 7 x 7 grid, shown 4 x 4 patches
    state = state_of(module, DINO_NAMES)
    name = "embeddings.position_embeddings"
    state[name] = dinov2_onnx.resize_positions(state[name][0], 4)[None]
    with torch.no_grad():
        theirs = module(nchw(x)).last_hidden_state[:, 0].numpy()
    assert_close(embed(m, "vision", tables.to_params(state, tables.HF_DINOV2, m), x), theirs)


# --- real weights


@pytest.mark.assets
@pytest.mark.slow
def test_real_dinov2(assets, tmp_path):
    file = assets / "dinov2" / "vit_s_focus.onnx"
    params = dinov2_onnx.vision_from_dinov2_onnx(file, 224)
    native.save_tower(params, tmp_path / "v.safetensors")
    params, _ = native.load_tower(tmp_path / "v.safetensors")
    m = zoo.get("dinov2-s14-minilm")
    m.embed_dim, m.vision = 384, dataclasses.replace(m.vision, proj="none")
    m.text = small().text
    module = dino(dataclasses.replace(m.vision), trained_size=518)
    state = {}
    for k, a in dinov2_onnx.read_onnx(file).items():
        for old, new in DINO_NAMES.items():
            k = k.replace(old, new)
        state[k] = torch.tensor(a)
    left = module.load_state_dict(state, strict=False)
    assert left.missing_keys == ["embeddings.mask_token"]
    assert not left.unexpected_keys
    x = pixels(2, 224)
    with torch.no_grad():
        theirs = module(nchw(x)).last_hidden_state[:, 0].numpy()
    assert_close(embed(m, "vision", params["vision"], x), theirs, 2e-5)


@pytest.mark.assets
def test_real_minilm(assets):
    folder = assets / "minilm"
    opened = open_source(folder)
    params = opened.params()
    module = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    m = small(embed_dim=384, text=dataclasses.replace(opened.model.text, pool="mean"))
    ids = padded([5, 128, 64, 1], 128, 30000)
    mask = torch.from_numpy(ids != 0)
    with torch.no_grad():
        hidden = module(torch.from_numpy(ids), attention_mask=mask).last_hidden_state
    theirs = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    assert_close(embed(m, "text", params["text"], ids), theirs, 2e-5)
