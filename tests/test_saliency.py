"""Saliency maps against finite differences, numpy, PyTorch's own attention weights, and a planted patch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from small_model import loaded as small_loaded
from small_model import model as small_model
from small_model import params as random_params
from small_model import pictures
from test_parity import hf_vision, nchw, pixels, small, state_of

from unimed_jax import config, infer, saliency
from unimed_jax.convert import tables
from unimed_jax.data import images as rules
from unimed_jax.errors import UsageError
from unimed_jax.models import clip
from unimed_jax.models.vision import normalize

KINDS = {
    "clip": {},
    "mean": {"vision__pool": "mean", "vision__act": "gelu", "vision__ln_pre": False, "vision__proj": "mlp"},
    "dino": {
        "vision__act": "gelu",
        "vision__ln_pre": False,
        "vision__patch_bias": True,
        "vision__ln_eps": 1e-6,
    },
}


def tiny(kind: str, **options) -> infer.Loaded:
    cfg = small_model(vision__width=32, vision__mlp_dim=48, **KINDS[kind])
    return infer.Loaded(cfg, random_params(cfg), **options)


def bound(model: infer.Loaded, fn):
    graphdef, _ = clip.skeleton(dataclasses.replace(model.cfg, dtype=model.dtype))
    return jax.jit(lambda p, *args: fn(clip.bind(graphdef, p).vision, *args))


def aims(model: infer.Loaded, n: int, seed: int = 3) -> np.ndarray:
    toward = np.random.default_rng(seed).normal(size=(n, model.cfg.embed_dim)).astype(np.float32)
    return toward / np.linalg.norm(toward, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_with_weights_gives_the_same_embedding(kind):
    model, x = tiny(kind), pictures(3)
    z, weights = bound(model, lambda v, x: saliency.encode_with_weights(v, normalize(x, v.normalize)))(
        model.params, x
    )
    np.testing.assert_allclose(z, model.encode_image(x, normalize=False), atol=1e-5)
    assert weights.shape == (2, 3, 4, 17, 17)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "mean"])
def test_the_gradient_equals_finite_differences(kind):
    model, x = tiny(kind), pictures(2)
    toward = aims(model, 2)
    graph = bound(model, lambda v, x, t: saliency._pixel_gradient(v, x, t))
    score = bound(model, lambda v, x, t: (clip.unit(v(normalize(x, v.normalize))) * t).sum(-1))
    found = np.asarray(graph(model.params, x.astype(np.float32), toward))
    rng = np.random.default_rng(0)
    for _ in range(3):  # along random directions over all pixels: single ones are lost in float32
        step = rng.normal(size=x.shape).astype(np.float32)
        up, down = (np.asarray(score(model.params, x + e * step, toward), np.float64) for e in (0.5, -0.5))
        np.testing.assert_allclose((found * step).sum((1, 2, 3)), up - down, rtol=0.02, atol=2e-5)
    shown, raw = saliency.maps(model, x, toward, "gradient"), np.abs(found).max(-1)
    for map_, slope in zip(shown, raw, strict=True):
        high = np.percentile(slope, 99)
        np.testing.assert_allclose(map_, ((slope - slope.min()) / (high - slope.min())).clip(0, 1), atol=1e-4)


def test_smoothgrad_is_the_mean_of_noisy_gradients_and_the_same_every_time(monkeypatch):
    model, x = tiny("clip"), pictures(3)
    toward = aims(model, 3)
    first, again = (saliency.maps(model, x, toward, "smoothgrad") for _ in range(2))
    np.testing.assert_array_equal(first, again)
    alone = saliency.maps(model, x[2:], toward[2:], "smoothgrad")[0]
    np.testing.assert_allclose(first[2], alone, atol=1e-4)
    plain = saliency.maps(model, x, toward, "gradient")
    assert np.abs(first - plain).max() > 0.1
    monkeypatch.setattr(saliency, "NOISE", 0.0)
    saliency._compiled.cache_clear()
    np.testing.assert_allclose(saliency.maps(model, x, toward, "smoothgrad"), plain, atol=1e-3)
    saliency._compiled.cache_clear()


def oracle_rollout(weights: np.ndarray, pool: str) -> np.ndarray:
    """Abnar and Zuidema's recursion in numpy float64; weights [L b h t t]."""
    weights = np.asarray(weights, np.float64)
    rolled = np.eye(weights.shape[-1])
    for layer in weights:
        mixed = 0.5 * layer.mean(1) + 0.5 * np.eye(weights.shape[-1])
        rolled = (mixed / mixed.sum(-1, keepdims=True)) @ rolled
    row = rolled[:, 0] if pool == "cls" else rolled[:, 1:].mean(1)
    side = int((row.shape[1] - 1) ** 0.5)
    return row[:, 1:].reshape(-1, side, side)


@pytest.mark.parametrize("kind", ["clip", "mean"])
def test_rollout_equals_numpy(kind):
    model, x = tiny(kind), pictures(2)
    _, weights = bound(model, lambda v, x: saliency.encode_with_weights(v, normalize(x, v.normalize)))(
        model.params, x
    )
    ours = bound(model, saliency._rollout)(model.params, x, aims(model, 2))
    np.testing.assert_allclose(ours, oracle_rollout(weights, model.cfg.vision.pool), atol=1e-6)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_attention_and_its_maps_equal_pytorch(act):
    """transformers' `output_attentions`, and Chefer's rule on the gradients that PyTorch keeps of them."""
    torch = pytest.importorskip("torch")
    shape = config.Vision(image_size=32, patch_size=8, width=48, depth=3, heads=4, mlp_dim=96, act=act)
    m, module = small(vision=shape), hf_vision(shape, 24)
    module.set_attn_implementation("eager")
    x, toward = pixels(2, 32), np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
    out = module(nchw(x), output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    z = torch.nn.functional.normalize(out.image_embeds, dim=-1)
    (z * torch.from_numpy(toward)).sum().backward()
    theirs = np.stack([a.detach().numpy() for a in out.attentions])

    graphdef, abstract = clip.skeleton(m)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
    params["vision"] = tables.to_params(state_of(module), tables.HF_CLIP_VISION, m)
    path = jax.jit(lambda p, x: saliency.encode_with_weights(clip.bind(graphdef, p).vision, x))
    embedding, weights = path(params, x)
    np.testing.assert_allclose(embedding, out.image_embeds.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(weights, theirs, atol=1e-5)

    ran = lambda method: jax.jit(lambda p, x, t: method(clip.bind(graphdef, p).vision, x, t))(
        params, x, toward
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            saliency, "normalize", lambda images, name: images
        )  # these pixels are normalised already
        np.testing.assert_allclose(ran(saliency._rollout), oracle_rollout(theirs, "cls"), atol=1e-5)
        relevance = np.broadcast_to(np.eye(17), (2, 17, 17))
        for a in out.attentions:
            cam = (a.grad.numpy().astype(np.float64) * a.detach().numpy()).clip(0).mean(1)
            relevance = relevance + cam @ relevance
        np.testing.assert_allclose(ran(saliency._attention), relevance[:, 0, 1:].reshape(2, 4, 4), atol=1e-5)


def planted(pool: str) -> tuple[infer.Loaded, int]:
    """A model that looks for brightness in one place: only that patch's token reaches the pooled one.

    The patch embedding writes the brightness of a patch into channel 0 and its position sets channel 1 of patch 6
    only; the queries look for channel 1, the values carry channel 0 to channel 2, and the MLPs do nothing.
    """
    cfg = small_model(
        vision__width=16, vision__heads=1, vision__mlp_dim=16, vision__ln_pre=False, vision__pool=pool
    )
    params = jax.tree.map(np.zeros_like, random_params(cfg))
    v, wanted, width = params["vision"], 6, 16
    v["patch"]["kernel"][..., 0] = 0.01
    v["cls"][3] = 1.0
    v["pos"][:, 4] = np.linspace(-1, 1, 17)  # something for the norms to work on
    v["pos"][1 + wanted, 1] = 6.0
    for norm in (v["blocks"]["ln1"], v["blocks"]["ln2"], v["ln_post"]):
        norm["scale"][...] = 1.0
    qkv = v["blocks"]["attn"]["qkv"]
    qkv["bias"][:, 0] = 20.0  # every query asks the same
    qkv["kernel"][:, 1, width] = 1.0  # the key of the wanted place answers
    qkv["kernel"][:, 0, 2 * width] = 1.0
    qkv["bias"][:, 2 * width] = 2.0  # whatever is seen there speaks for the class
    v["blocks"]["attn"]["out"]["kernel"][:, 0, 2] = 4.0
    v["proj"]["kernel"][2, 0], v["proj"]["kernel"][3, 1], v["proj"]["kernel"][5, 2] = 1.0, 1.0, 1.0
    return infer.Loaded(cfg, params), wanted


@pytest.mark.parametrize("method", saliency.METHODS)
def test_a_planted_patch_lights_up(method):
    model, wanted = planted("cls")
    x = pictures(2, seed=5)
    toward = np.zeros((2, 32), np.float32)
    toward[:, 0] = 1
    found = saliency.maps(model, x, toward, method)
    assert found.shape == (2, 32, 32)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    row, column = divmod(wanted, 4)
    patches = found.reshape(2, 4, 8, 4, 8).mean((2, 4))
    for shown in patches:
        assert np.unravel_index(shown.argmax(), shown.shape) == (row, column)
        others = np.delete(shown.ravel(), wanted)
        assert shown[row, column] > 2 * others.max()


def test_directions_are_of_the_class_or_of_the_margin_to_the_next():
    bank = np.eye(3, dtype=np.float32)
    z = np.float32([[0.1, 0.7, 0.3], [0.9, 0.2, 0.1]])
    np.testing.assert_array_equal(saliency.directions(z, bank), [[0, 1, -1], [1, -1, 0]])
    np.testing.assert_array_equal(saliency.directions(z, bank, margin=False), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(saliency.directions(z, bank, np.array([2, 2])), [[0, -1, 1], [-1, 0, 1]])
    np.testing.assert_array_equal(saliency.directions(z, bank[:1]), [[1, 0, 0]] * 2)


def test_maps_do_not_depend_on_the_batch():
    model, x = tiny("mean"), pictures(11)
    toward = aims(model, 11)
    together = saliency.maps(model, x, toward)
    np.testing.assert_allclose(together[9:], saliency.maps(model, x[9:], toward[9:]), atol=1e-4)
    assert saliency.maps(model, x[:0], toward[:0]).shape == (0, 32, 32)


def test_one_compilation_serves_every_number_of_pictures(monkeypatch):
    model, traced = tiny("clip"), []
    method = saliency._rollout
    monkeypatch.setitem(saliency.METHODS, "rollout", lambda *args: traced.append(1) or method(*args))
    saliency._compiled.cache_clear()
    for n in (1, 3, 9):
        saliency.maps(model, pictures(n), aims(model, n), "rollout")
    assert len(traced) == 1


def test_wrong_requests_are_refused():
    model = tiny("clip")
    with pytest.raises(UsageError, match='Did you mean "rollout"'):
        saliency.maps(model, pictures(1), aims(model, 1), "roll-out")
    with pytest.raises(UsageError, match="32 x 32"):
        saliency.maps(model, pictures(1, 16), aims(model, 1))


def test_a_map_that_says_nothing_is_dark():
    assert not saliency._scaled(np.full((4, 4), 0.3, np.float32), 32).any()
    assert not saliency._scaled(np.zeros((32, 32), np.float32), 32).any()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 200), (333, 101), (7, 40)])
def test_a_map_lies_where_the_model_looked(height, width):
    """A bright square in the picture, found in the evaluation picture, comes back to the same place."""
    side = max(2, min(height, width) // 5)
    top, left = height // 2 - side // 2, width // 2 + min(height, width) // 4 - side // 2
    picture = np.zeros((height, width), np.uint8)
    picture[top : top + side, left : left + side] = 255
    shown = rules.eval_image(Image.fromarray(picture), 64)[:, :, 0].astype(np.float32) / 255
    heat, seen = saliency.place(shown, height, width)
    assert heat.shape == seen.shape == (height, width)
    assert not heat[~seen].any()
    across = np.flatnonzero(seen.any(0))
    assert abs(len(across) - min(height, width)) <= max(1, width // 50)
    assert abs((across[0] + across[-1]) / 2 - (width - 1) / 2) <= 1
    centre = lambda a: np.array([(a.sum(1 - i) * np.arange(a.shape[i])).sum() / a.sum() for i in (0, 1)])
    assert np.abs(centre(heat.astype(np.float64)) - centre(picture.astype(np.float64))).max() < 1 + side / 10


def test_a_stripe_of_one_pixel_is_shown():
    for height, width in ((1, 1000), (1000, 1), (1, 1), (7, 100_000)):
        heat, seen = saliency.place(np.ones((32, 32), np.float32), height, width)
        assert heat.shape == seen.shape == (height, width)
        assert heat[seen].min() == 1
        assert seen.any()


def test_the_overlay_keeps_the_picture_where_nothing_was_found():
    picture = pictures(1)[0]
    heat, seen = np.zeros((32, 32), np.float32), np.ones((32, 32), bool)
    heat[:8], seen[:, :4] = 1.0, False
    out = saliency.overlay(picture, heat, seen)
    gray = picture.astype(float).mean(-1)
    np.testing.assert_allclose(out[8:, 4:], np.repeat(gray[8:, 4:, None], 3, -1), atol=1)
    np.testing.assert_allclose(out[:, :4], 0.4 * np.repeat(gray[:, :4, None], 3, -1), atol=1)
    hot = out[:8, 4:].astype(int)
    assert (hot[..., 0] > hot[..., 2] + 40).all()
    assert saliency.overlay(picture, np.zeros((4, 4), np.float32)).shape == (32, 32, 3)


def test_explain_needs_only_classes(tmp_path):
    model = small_loaded(tmp_path)
    classes = {"a": ["a chest x-ray"], "b": ["a ct slice of the head"]}
    found = saliency.explain(model, pictures(2), classes, "attention")
    toward = saliency.directions(model.encode_image(pictures(2)), model.text_bank(classes))
    np.testing.assert_array_equal(found, saliency.maps(model, pictures(2), toward, "attention"))
    assert found.max() == 1
