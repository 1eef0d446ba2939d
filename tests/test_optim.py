"""Schedule, decay, freezing, factors; AdamW against PyTorch on the reference's parameter groups."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unimed_jax import config
from unimed_jax.errors import UsageError
from unimed_jax.models import clip, zoo
from unimed_jax.train import optim


def experiment(**settings):
    settings = {"warmup": config.Duration(steps=3)} | settings
    return config.Train(batch_size=8, model=zoo.get("tiny"), optim=config.Optim(**settings))


@pytest.fixture(scope="module")
def params():
    return clip.init(zoo.get("tiny"), jax.random.key(0))


def as_numpy(tree):
    return {k: np.asarray(v) for k, v in clip.flatten(tree).items()}


def gradients(params, steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: (10.0 ** rng.uniform(-8, 0) * rng.normal(size=x.shape)).astype(np.float32)
    return [jax.tree.map(draw, params) for _ in range(steps)]


def norm(tree):
    return math.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in as_numpy(tree).values()))


def run(cfg, params, grads, total):
    """Our parameters after these gradients (dict by path), and the optimizer state."""
    tx = optim.make_optimizer(cfg, params, total)
    frozen = optim.frozen_paths(cfg.optim, params)
    state = tx.init(params)
    trainable, rest = optim.split(params, frozen)

    @jax.jit
    def update(p, g, state, step):
        u, state = tx.update(g, state, p, step=step)
        return optax.apply_updates(p, u), state

    for i, g in enumerate(grads):
        trainable, state = update(trainable, optim.split(g, frozen)[0], state, jnp.int32(i))
    return as_numpy(optim.join(trainable, rest)), state


def test_schedule_equals_the_reference_formula():
    base, warmup, total = 5e-4, 2000, 25840
    rate = jax.vmap(optim.schedule(config.Optim(lr=base), warmup, total))
    steps = np.array([0, 1, 1998, 1999, 2000, 2001, 13920, 25839, 25840, 30000])
    expected = [
        base * (s + 1) / warmup
        if s < warmup
        else 0.5 * base * (1 + math.cos(math.pi * min((s - warmup) / (total - warmup), 1)))
        for s in steps
    ]
    np.testing.assert_allclose(rate(steps), expected, rtol=1e-5, atol=1e-15)
    assert float(rate(steps)[-1]) == 0


def test_schedule_that_is_all_warmup_or_has_none():
    assert float(optim.schedule(config.Optim(lr=1.0), 10, 5)(4)) == pytest.approx(0.5)
    assert float(optim.schedule(config.Optim(lr=1.0), 0, 5)(0)) == 1.0


def test_warmup_in_epochs_is_refused(params):
    with pytest.raises(UsageError, match="in epochs"):
        optim.make_optimizer(experiment(warmup=config.Duration(epochs=1)), params, 10)


@pytest.mark.parametrize("name", ["unimed-clip-vit-b16", "unimed-clip-vit-l14-336-large-text", "openai-b16"])
def test_decay_by_name_equals_the_reference_rule_by_dimension(name):
    """The reference decays what has two dimensions or more; stacked leaves have one more than it sees."""
    abstract = clip.skeleton(zoo.get(name))[1]
    mask = clip.flatten(optim.decay_mask(abstract))
    for path, leaf in clip.flatten(abstract).items():
        assert mask[path] == (leaf.ndim - ("/blocks/" in path) >= 2), path
    assert not mask["vision/cls"]
    assert mask["vision/pos"]
    assert mask["text/word" if "text/word" in mask else "text/token"]


@pytest.mark.torch
def test_adamw_equals_torch(params):
    """20 steps on gradients between 1e-8 and 1, two groups, the schedule set before each step."""
    import torch

    total, cfg = 20, experiment(lr=1e-2)
    grads = gradients(params, total)
    ours, _ = run(cfg, params, grads, total)

    mask = clip.flatten(optim.decay_mask(params))
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in as_numpy(params).items()}
    groups = [
        {"params": [p for k, p in theirs.items() if mask[k] == decayed], "weight_decay": 0.2 * decayed}
        for decayed in (False, True)
    ]
    opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    for s, g in enumerate(grads):
        for group in opt.param_groups:
            group["lr"] = (
                1e-2 * (s + 1) / 3 if s < 3 else 0.5e-2 * (1 + math.cos(math.pi * (s - 3) / (total - 3)))
            )
        for k, v in clip.flatten(g).items():
            theirs[k].grad = torch.tensor(v)
        opt.step()
    for k, v in theirs.items():
        np.testing.assert_allclose(ours[k], v.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=k)


def test_frozen_leaves_have_no_moments_and_do_not_move(params):
    cfg = experiment(freeze=(r"vision/(?!proj).*", "logit_scale"))
    ours, state = run(cfg, params, gradients(params, 3), 10)
    before = as_numpy(params)
    moved = {k for k in ours if not np.array_equal(ours[k], before[k])}
    assert moved == {k for k in before if k.startswith("text/") or k == "vision/proj/kernel"}
    adam = next(s for s in state if hasattr(s, "mu"))
    assert set(clip.flatten(adam.mu)) == moved
    assert set(clip.flatten(adam.nu)) == moved


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze": ("vison/.*",)}, r"optim.freeze pattern 'vison/\.\*' matches no parameter"),
        ({"freeze": (".*",)}, "nothing is left to train"),
        ({"lr_multipliers": (("head", 2.0),)}, "optim.lr_multipliers pattern 'head' matches no parameter"),
    ],
)
def test_patterns_that_cannot_be_meant(params, settings, said):
    with pytest.raises(UsageError, match=said):
        optim.make_optimizer(experiment(**settings), params, 10)


def test_layer_decay_goes_down_the_stack(params):
    factors = clip.flatten(optim.lr_factors(config.Optim(layer_decay=0.5), params))
    assert factors["vision/blocks/mlp/up/kernel"].ravel().tolist() == [0.25, 0.5]  # two blocks
    assert factors["text/blocks/ln1/scale"].shape == (2, 1)
    for path in (
        "vision/patch/kernel",
        "vision/cls",
        "vision/pos",
        "vision/ln_pre/scale",
        "text/word",
        "text/pos",
    ):
        assert factors[path] == 0.125, path
    for path in ("vision/ln_post/bias", "vision/proj/kernel", "text/proj/up/kernel", "logit_scale"):
        assert factors[path] == 1, path


def test_factors_scale_the_whole_update(params):
    """The first matching multiplier wins; decay is scaled with the learning rate, as a torch group's is."""
    g = gradients(params, 1)
    plain, _ = run(experiment(), params, g, 10)
    slow, _ = run(
        experiment(layer_decay=0.5, lr_multipliers=(("text/word", 0.0), ("text/.*", 2.0))), params, g, 10
    )
    before = as_numpy(params)
    change = lambda after, k: after[k] - before[k]
    assert not change(slow, "text/word").any()
    np.testing.assert_allclose(
        change(slow, "text/proj/up/kernel"), 2 * change(plain, "text/proj/up/kernel"), atol=1e-7
    )
    kernel = "vision/blocks/attn/qkv/kernel"
    np.testing.assert_allclose(
        change(slow, kernel), np.array([0.25, 0.5])[:, None, None] * change(plain, kernel), atol=1e-7
    )


def test_clip_norm_bounds_the_gradient(params):
    """Moments after one step are a tenth of the clipped gradient: their norm says what Adam was given."""
    g = gradients(params, 1)
    _, state = run(experiment(clip_norm=0.5), params, g, 10)
    adam = next(s for s in state if hasattr(s, "mu"))
    assert float(norm(g[0])) > 0.5
    assert float(norm(adam.mu)) == pytest.approx(0.05, rel=1e-5)


def test_clamp_and_ema():
    o = config.Optim()
    assert float(optim.clamp({"logit_scale": jnp.float32(-1)}, o)["logit_scale"]) == 0
    assert float(optim.clamp({"logit_scale": jnp.float32(5)}, o)["logit_scale"]) == pytest.approx(
        math.log(100)
    )
    ema = {"w": jnp.float32(0)}
    for s in range(1000):
        ema = optim.update_ema(ema, {"w": jnp.float32(1)}, 0.9, s)
    assert float(ema["w"]) == pytest.approx(1)
