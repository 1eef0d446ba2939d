"""The train step: one compilation, exact restarts, devices, accumulation, frozen towers, bad batches."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from unimed_jax import config, parallel
from unimed_jax.errors import UsageError
from unimed_jax.models import clip
from unimed_jax.train import optim, step
from unimed_jax.train.loss import contrastive_loss

ROWS = 16


def experiment(m=None, *, mesh=None, loss=None, **settings):
    settings = {"lr": 1e-3, "warmup": config.Duration(steps=3)} | settings
    return config.Train(
        batch_size=ROWS,
        model=m or small_model.model(),
        optim=config.Optim(**settings),
        mesh=mesh or config.Mesh(),
        loss=loss or config.Loss(),
    )


def batch(m, seed=0):
    """A host batch with padded captions, two of them equal, and every row real."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, m.text.vocab_size, (ROWS, m.text.context_length), dtype=np.int32)
    tokens[np.arange(m.text.context_length) >= rng.integers(4, m.text.context_length, (ROWS, 1))] = (
        m.text.pad_id
    )
    return {
        "image": small_model.pictures(ROWS, m.vision.image_size, seed),
        "tokens": tokens,
        "mask": np.ones(ROWS, bool),
        "caption_id": np.array([0, 0, *range(2, ROWS)], np.int32),
        "source": np.zeros(ROWS, np.int32),
    }


class Run:
    """A compiled step with its mesh and first state."""

    def __init__(self, cfg, devices=None):
        self.cfg = cfg
        self.mesh = parallel.make_mesh(cfg.mesh, devices or jax.devices()[:1])
        graphdef, abstract = clip.skeleton(cfg.model)
        self.tx = optim.make_optimizer(cfg, abstract, 10)
        self.step = step.make_train_step(cfg, graphdef, self.tx, self.mesh)

    def state(self):
        return self.place(step.create_state(self.cfg, small_model.params(self.cfg.model), self.tx))

    def place(self, state):
        return jax.device_put(state, parallel.shardings(state, self.mesh, min_size=self.cfg.mesh.min_size))

    def go(self, state, steps, first=0):
        found = []
        for i in range(first, first + steps):
            state, metrics = self.step(state, parallel.put(batch(self.cfg.model, i), self.mesh))
            found.append({k: float(v) for k, v in metrics.items()})
        return state, found


def leaves(tree):
    return {parallel.leaf_path(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b, but=()):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and [k for k in a if a[k].tobytes() != b[k].tobytes()] == list(but)


@pytest.fixture(scope="module")
def run():
    """Dropout 0.1 as in the reference, and an average of the parameters."""
    return Run(experiment(ema_decay=0.5))


@pytest.fixture(scope="module")
def six(run):
    """(final state as numpy, metrics) of six steps in one go."""
    state, metrics = run.go(run.state(), 6)
    return jax.tree.map(np.asarray, state), metrics


def test_metrics(six):
    names = {"loss", "grad_norm", "param_norm", "lr", "logit_scale", "bad", "i2t_top1", "t2i_top1", "pos_sim"}
    of_batch = {"same_caption_rate", "same_caption_pairs", "text_padding"}
    state, metrics = six
    assert set(metrics[0]) == names | of_batch
    assert metrics[0]["same_caption_rate"] == 2 / ROWS
    assert metrics[0]["text_padding"] == pytest.approx((batch(small_model.model())["tokens"] == 0).mean())
    assert [m["bad"] for m in metrics] == [0] * 6
    np.testing.assert_allclose([m["lr"] for m in metrics[:4]], [1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], rtol=1e-5)
    assert metrics[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert int(state["step"]) == 6


def test_restart_is_exact_and_nothing_compiles_twice(run, six):
    """Three steps, the state through host memory, three more: the same bits as six, from one compiled program."""
    state, first = run.go(run.state(), 3)
    saved = jax.tree.map(np.asarray, state)
    state, second = run.go(run.place(saved), 3, first=3)
    assert same(state, six[0])
    assert first + second == six[1]
    assert run.step._cache_size() == 1


def test_the_state_is_given_away(run):
    """Donated: a step needs no second copy of parameters and moments."""
    state = run.state()
    run.go(state, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_dropout_follows_seed_and_step_only(run):
    """The same step twice gives the same loss; another step gives another dropout on the same data."""
    data = parallel.put(batch(run.cfg.model), run.mesh)
    loss = lambda state: float(run.step(state, data)[1]["loss"])
    start = run.state()
    later = jax.tree.map(jnp.copy, start) | {"step": jax.device_put(np.int32(5), start["step"].sharding)}
    again = jax.tree.map(jnp.copy, start)
    one = loss(start)
    assert loss(again) == one
    assert loss(later) != one


def test_average_of_parameters(run):
    """Inertia is (1 + s) / (10 + s) until it reaches ema_decay."""
    state = run.state()
    mean = leaves(state["params"])
    for s in range(2):
        state, _ = run.go(state, 1, first=s)
        d = min(0.5, (1 + s) / (10 + s))
        mean = {k: d * mean[k] + (1 - d) * x for k, x in leaves(state["params"]).items()}
    for k, x in leaves(state["ema"]).items():
        np.testing.assert_allclose(x, mean[k], rtol=1e-5, atol=1e-6)


def test_bad_step_changes_nothing(run):
    """A NaN in one word: no leaf of parameters, moments or average moves by a bit; the step is counted."""
    state, _ = run.go(run.state(), 1)
    word = np.asarray(state["params"]["text"]["word"]).copy()
    poisoned = word.copy()
    poisoned[:] = np.nan
    set_word = lambda s, w: {**s, "params": {**s["params"], "text": {**s["params"]["text"], "word": w}}}
    state = set_word(state, jax.device_put(poisoned, state["params"]["text"]["word"].sharding))
    before = jax.tree.map(np.asarray, state)
    state, metrics = run.go(state, 2, first=1)
    assert [m["bad"] for m in metrics] == [1, 1]
    assert same(state, before, but=["step"])
    assert int(state["step"]) == 3
    state = set_word(state, jax.device_put(word, state["params"]["text"]["word"].sharding))
    state, metrics = run.go(state, 1, first=3)
    assert metrics[0]["bad"] == 0
    assert np.isfinite(metrics[0]["grad_norm"])
    assert metrics[0]["lr"] == pytest.approx(1e-3)  # the schedule went on while updates were left out
    assert run.step._cache_size() == 1


def lit():
    m = small_model.model(dtype="bfloat16", text__dropout=0.0)
    return experiment(m, freeze=("vision/.*", r"text/(?!proj).*"))


def test_frozen_towers_stay_bit_identical_in_bfloat16():
    run = Run(lit())
    start = run.state()
    # Adding an update of zero would turn minus zero into zero.
    start["params"]["vision"]["cls"] = -jnp.zeros_like(start["params"]["vision"]["cls"])
    start = run.place(jax.tree.map(np.asarray, start))
    before = leaves(start["params"])
    assert np.signbit(before["vision/cls"]).all()
    state, metrics = run.go(start, 3)
    after = leaves(state["params"])
    moved = {k for k in before if before[k].tobytes() != after[k].tobytes()}
    assert moved == {"logit_scale", "text/proj/down/kernel", "text/proj/up/kernel"}
    assert {x.dtype for x in after.values()} == {np.dtype(np.float32)}
    moments = {k for k in leaves(state["opt"]) if "/mu/" in k}
    assert len(moments) == 3
    assert all(np.isfinite(m["loss"]) and m["bad"] == 0 for m in metrics)
    assert run.step._cache_size() == 1


def test_frozen_towers_have_no_backward_pass():
    """Floating-point operations of the traced step: two frozen towers cost less than half."""

    def flops(cfg):
        run = Run(cfg)
        state = jax.eval_shape(lambda: step.create_state(cfg, small_model.params(cfg.model), run.tx))
        return run.step.lower(state, batch(cfg.model)).cost_analysis()["flops"]

    cfg = lit()
    assert flops(cfg) < 0.5 * flops(experiment(cfg.model))


# --- accumulation -----------------------------------------------------------------------------------------------


def gradients(cfg, parts_by_hand=0):
    """(loss, metrics, gradients) of one batch; by hand: micro-batches embedded one by one, then differentiated."""
    mesh = parallel.make_mesh(cfg.mesh, jax.devices()[:1])
    graphdef = clip.skeleton(cfg.model)[0]
    params, data, key = small_model.params(cfg.model), batch(cfg.model), jax.random.key(3)

    def by_hand(params, fixed, data, key):
        def loss(params):
            model, n = clip.bind(graphdef, params), parts_by_hand
            cut = lambda x: x.reshape(n, -1, *x.shape[1:])
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
            embed = lambda x: model(x[0], x[1], key=x[2])[:2]
            image, text = jax.lax.map(embed, (cut(data["image"]), cut(data["tokens"]), keys))
            flat = lambda x: x.reshape(ROWS, -1)
            return contrastive_loss(flat(image), flat(text), jnp.exp(params["logit_scale"]), impl="gathered")

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, grads

    f = by_hand if parts_by_hand else step._gradients(cfg, graphdef, mesh)
    return jax.tree.map(np.asarray, jax.jit(f)(params, {}, data, key if cfg.model.text.dropout else None))


def assert_equal_gradients(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    a, b = leaves(got[2]), leaves(want[2])
    assert a.keys() == b.keys()
    largest = max(np.abs(x).max() for x in b.values())
    for k in b:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-6 * largest, err_msg=k)


@pytest.mark.slow
def test_accumulated_gradients_equal_the_full_batch():
    m = small_model.model(text__dropout=0.0)
    assert_equal_gradients(gradients(experiment(m, accum_steps=4)), gradients(experiment(m)))


@pytest.mark.slow
def test_accumulation_keeps_the_dropout_of_each_micro_batch():
    assert_equal_gradients(gradients(experiment(accum_steps=2)), gradients(experiment(), parts_by_hand=2))


def test_batch_that_does_not_divide_into_micro_batches():
    with pytest.raises(UsageError, match="global batch 16 does not divide over 1 devices in 3 micro-batches"):
        Run(experiment(accum_steps=3))


# --- several devices: one child process with 8 CPU devices --------------------------------------------------------

MESHES = ((8, 1, 1), (4, 2, 2), (1, 8, 1))  # data, fsdp, micro-batches


def device_script(out):
    """Runs in the child: five steps on each mesh, every leaf that can be sharded is; one mesh also accumulates."""
    arrays = {}
    m = small_model.model(text__dropout=0.0)
    mesh = lambda d, f: config.Mesh(data=d, fsdp=f, min_size=0)
    runs = {f"{d}x{f}": experiment(m, mesh=mesh(d, f), accum_steps=n) for d, f, n in MESHES}
    for name, cfg in runs.items():
        run = Run(cfg, jax.devices())
        if cfg.mesh.data == 1:  # ahead of time, to look at the program
            data = parallel.put(batch(m), run.mesh)
            run.step = run.step.lower(run.state(), data).compile()
            arrays["reshuffles"] = run.step.as_text().count(" all-to-all(")
        state, metrics = run.go(run.state(), 5)
        arrays[f"{name}.loss"] = [x["loss"] for x in metrics]
        arrays[f"{name}.grad_norm"] = [x["grad_norm"] for x in metrics]
        arrays[f"{name}.compilations"] = 1 if cfg.mesh.data == 1 else run.step._cache_size()
        local = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        arrays[f"{name}.share"] = local(state) / sum(x.nbytes for x in jax.tree.leaves(state))
        mu = state["opt"][0].mu["vision"]["blocks"]["mlp"]["up"]["kernel"]
        arrays[f"{name}.moment_like_param"] = (
            mu.sharding == state["params"]["vision"]["blocks"]["mlp"]["up"]["kernel"].sharding
        )
    np.savez(out, **arrays)


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    out = tmp_path_factory.mktemp("step") / "devices.npz"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, str(out)], env=env, check=True, timeout=500)
    with np.load(out) as f:
        return dict(f)


@functools.cache
def one_device():
    return Run(experiment(small_model.model(text__dropout=0.0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{d}x{f}" for d, f, _ in MESHES])
def test_same_losses_on_eight_devices(devices, name):
    run = one_device()
    _, metrics = run.go(run.state(), 5)
    np.testing.assert_allclose(devices[f"{name}.loss"], [x["loss"] for x in metrics], rtol=2e-6)
    np.testing.assert_allclose(devices[f"{name}.grad_norm"], [x["grad_norm"] for x in metrics], rtol=2e-5)
    assert devices[f"{name}.compilations"] == 1
    assert devices[f"{name}.moment_like_param"]


@pytest.mark.slow
def test_fsdp_shares_the_state(devices):
    assert devices["8x1.share"] == 1
    assert devices["4x2.share"] < 0.55
    assert devices["1x8.share"] < 0.2


@pytest.mark.slow
def test_activations_stay_split_by_rows(devices):
    """Weights come to the activations, never the other way round."""
    assert devices["reshuffles"] == 0


if __name__ == "__main__":
    device_script(sys.argv[1])
