"""The losses against float64 NumPy, across device counts, and the memory they take."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimed_jax.errors import UsageError
from unimed_jax.train.loss import contrastive_loss

ROWS, DIM = 96, 32
SETTINGS = {"clip": (20.0, 0.0), "sigmoid": (10.0, -5.0)}  # scale, bias
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (1, 8))
SOME = ((1, 1), (4, 2))  # where masks and the gathered form are tried, too: each case costs a compilation


def pairs(noise=3.0, seed=0):
    """Unit vectors f32[96 32] twice, caption ids with repeats, and a mask with some rows off."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(ROWS, DIM))
    b = a + noise * rng.normal(size=a.shape)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit(a), unit(b), rng.integers(0, 60, ROWS).astype(np.int32), rng.random(ROWS) < 0.9


def excluded(ids, mask, dedup):
    """bool[b b]: pairs that are no negatives; the diagonal is never excluded."""
    out = ~(mask[:, None] & mask[None])
    if dedup == "mask":
        out |= ids[:, None] == ids[None]
    np.fill_diagonal(out, False)
    return out


def oracle(a, b, scale, bias, kind, out, mask):
    """Loss in float64, from the definition: softmax cross-entropy both ways, or log-sigmoids of all pairs."""
    logits = np.where(out, -np.inf, scale * a.astype(np.float64) @ b.astype(np.float64).T + bias)
    w = mask / mask.sum()
    if kind == "clip":
        log_softmax = lambda x: (
            x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
        )
        both = np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))
        return -(w * both).sum() / 2
    sign = 2 * np.eye(len(logits)) - 1
    return (w[:, None] * np.logaddexp(0, -sign * logits)).sum()


def oracle_gradients(a, b, scale, bias, kind, out, mask, step=1e-6):
    """(d scale, d bias, directional derivatives along two random directions in a and b), central differences."""
    rng = np.random.default_rng(7)
    a, b = a.astype(np.float64), b.astype(np.float64)
    u, v = rng.normal(size=a.shape), rng.normal(size=b.shape)
    f = lambda da=0.0, db=0.0, ds=0.0, dt=0.0: oracle(
        a + da * u, b + db * v, scale + ds, bias + dt, kind, out, mask
    )
    slope = lambda name: (f(**{name: step}) - f(**{name: -step})) / (2 * step)
    return slope("ds"), slope("dt"), slope("da"), slope("db"), u, v


def value_and_gradients(kind, impl, dedup, masked, mesh=None, tile=5, data=None):
    a, b, ids, mask = pairs() if data is None else data
    scale, bias = SETTINGS[kind]

    @jax.jit
    def run(a, b, scale, bias):
        def loss(a, b, scale, bias):
            return contrastive_loss(
                a, b, scale, bias=bias, ids=jnp.asarray(ids), mask=jnp.asarray(mask) if masked else None,
                mesh=mesh, kind=kind, impl=impl, dedup=dedup, tile=tile,
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(a, b, scale, bias)

    (value, metrics), grads = run(a, b, jnp.float32(scale), jnp.float32(bias))
    return float(value), [np.asarray(g) for g in grads], {k: float(v) for k, v in metrics.items()}


CASES = list(itertools.product(("clip", "sigmoid"), ("off", "mask"), (False, True)))


@pytest.mark.parametrize("impl", ["ring", "gathered"])
@pytest.mark.parametrize(("kind", "dedup", "masked"), CASES)
def test_equals_float64_oracle(kind, dedup, masked, impl):
    a, b, ids, mask = pairs()
    mask = mask if masked else np.ones(ROWS, bool)
    scale, bias = SETTINGS[kind]
    out = excluded(ids, mask, dedup)
    value, (da, db, ds, dt), metrics = value_and_gradients(kind, impl, dedup, masked)
    assert value == pytest.approx(oracle(a, b, scale, bias, kind, out, mask), rel=1e-6)

    e_ds, e_dt, e_da, e_db, u, v = oracle_gradients(a, b, scale, bias, kind, out, mask)
    assert ds == pytest.approx(e_ds, rel=2e-5)
    assert dt == pytest.approx(e_dt, rel=2e-5, abs=1e-7)
    assert (da * u).sum() == pytest.approx(e_da, rel=2e-5)
    assert (db * v).sum() == pytest.approx(e_db, rel=2e-5)
    if masked:
        assert not da[~mask].any()
        assert not db[~mask].any()

    logits = np.where(out, -np.inf, a.astype(np.float64) @ b.astype(np.float64).T)
    w, own = mask / mask.sum(), np.diag(logits)
    assert metrics["pos_sim"] == pytest.approx((w * own).sum(), abs=1e-6)
    assert metrics["i2t_top1"] == pytest.approx((w * (own >= logits.max(1))).sum(), abs=1e-6)
    assert metrics["t2i_top1"] == pytest.approx((w * (own >= logits.max(0))).sum(), abs=1e-6)
    assert 0 < metrics["i2t_top1"] < 1


@pytest.mark.parametrize(("kind", "tile"), [("clip", n) for n in (1, 7, 48, 95, 1000)] + [("sigmoid", 7)])
def test_tile_changes_nothing(kind, tile):
    whole, grads, metrics = value_and_gradients(kind, "ring", "off", False, tile=96)
    value, got, got_metrics = value_and_gradients(kind, "ring", "off", False, tile=tile)
    assert value == pytest.approx(whole, rel=5e-7)
    for x, y in zip(got, grads, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(grads[0]).max() if x.ndim else 2e-6)
    assert got_metrics == pytest.approx(metrics, rel=1e-6)


def test_small_loss_keeps_its_digits():
    """A batch that is nearly solved: the positives are added last, so that nothing cancels."""
    a, b, ids, _ = pairs(noise=0.3)
    scale = 60.0
    exact = oracle(a, b, scale, 0.0, "clip", excluded(ids, np.ones(ROWS, bool), "off"), np.ones(ROWS))
    assert exact < 1e-4
    loss, _ = contrastive_loss(a, b, jnp.float32(scale))
    assert float(loss) == pytest.approx(exact, rel=1e-4)


def test_duplicates_without_and_with_mask():
    """Four copies of one caption: without ids the loss cannot fall below ln 4, with ids they are no negatives."""
    image = jnp.eye(4)
    text = jnp.tile(jnp.eye(4)[:1], (4, 1))
    same = jnp.zeros(4, jnp.int32)
    masked, _ = contrastive_loss(image, text, jnp.float32(10), ids=same, dedup="mask")
    plain, _ = contrastive_loss(image, text, jnp.float32(10), ids=same)
    assert float(masked) == 0
    assert float(plain) > np.log(4) / 2


def test_bfloat16_embeddings_are_compared_in_float32():
    a, b, *_ = pairs()
    low = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    loss, _ = contrastive_loss(*low, jnp.bfloat16(20))
    exact, _ = contrastive_loss(*(x.astype(jnp.float32) for x in low), jnp.float32(20))
    assert loss.dtype == jnp.float32
    assert float(loss) == float(exact)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "softmax"}, "one of clip, sigmoid"),
        ({"impl": "tree"}, "one of ring, gathered"),
        ({"dedup": "on"}, "one of off, mask"),
        ({"dedup": "mask"}, "no caption ids"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(UsageError, match=said):
        contrastive_loss(jnp.eye(4), jnp.eye(4), jnp.float32(1), **arguments)


def test_nan_is_not_swallowed():
    a, b, *_ = pairs()
    a[3, 0] = np.nan
    for kind, impl in itertools.product(("clip", "sigmoid"), ("ring", "gathered")):
        assert np.isnan(contrastive_loss(a, b, jnp.float32(1), kind=kind, impl=impl)[0])


# --- several devices: one child process with 8 CPU devices computes, the tests compare ---------------------------


def device_script(out):
    """Runs in the child: every case on every mesh, and the compiled memory of both layouts."""
    arrays = {}
    for shape in MESHES:
        n = shape[0] * shape[1]
        mesh = jax.make_mesh(
            shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:n]
        )
        for kind, impl, dedup in itertools.product(SETTINGS, ("ring", "gathered"), ("off", "mask")):
            if (impl == "gathered" or dedup == "mask") and shape not in SOME:
                continue
            value, grads, _ = value_and_gradients(kind, impl, dedup, dedup == "mask", mesh=mesh)
            name = f"{kind}.{impl}.{dedup}.{shape[0]}x{shape[1]}"
            arrays |= {f"{name}.value": value} | {f"{name}.{i}": g for i, g in enumerate(grads)}
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for impl, rows in itertools.product(("ring", "gathered"), (2048, 4096)):
        arrays[f"memory.{impl}.{rows}"] = temporaries(mesh, impl, rows)
    np.savez(out, **arrays)


def temporaries(mesh, impl, rows, dim=64, tile=128):
    """Bytes of temporary memory a device for value and gradients, as the compiler planned them."""
    x = jax.ShapeDtypeStruct(
        (rows, dim), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
    )
    loss = lambda a, b, s: contrastive_loss(a, b, s, mesh=mesh, impl=impl, tile=tile)[0]
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, scale).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    out = tmp_path_factory.mktemp("loss") / "devices.npz"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, str(out)], env=env, check=True, timeout=300)
    with np.load(out) as f:
        return dict(f)


CASES_ON_DEVICES = [(k, "off", m) for k in SETTINGS for m in MESHES[1:]] + [
    (k, "mask", SOME[1]) for k in SETTINGS
]


@pytest.mark.parametrize(("kind", "dedup", "shape"), CASES_ON_DEVICES)
def test_same_on_any_mesh(devices, kind, dedup, shape):
    name = lambda impl, shape: f"{kind}.{impl}.{dedup}.{shape[0]}x{shape[1]}"
    learned = range(3 if kind == "clip" else 4)  # the clip loss does not depend on a bias
    for impl in ("ring", "gathered") if shape in SOME else ("ring",):
        one, many = name(impl, (1, 1)), name(impl, shape)
        assert devices[f"{many}.value"] == pytest.approx(devices[f"{one}.value"], rel=1e-6)
        for i in learned:
            x, y = devices[f"{many}.{i}"], devices[f"{one}.{i}"]
            assert np.abs(x - y).max() <= 1e-6 * np.abs(y).max(), (impl, i)
    for i in learned:
        x, y = devices[f"{name('ring', shape)}.{i}"], devices[f"{name('gathered', (1, 1))}.{i}"]
        assert np.abs(x - y).max() <= 3e-6 * np.abs(y).max(), i


def test_ring_memory_grows_with_the_rows_only(devices):
    ring = [int(devices[f"memory.ring.{n}"]) for n in (2048, 4096)]
    gathered = [int(devices[f"memory.gathered.{n}"]) for n in (2048, 4096)]
    assert ring[1] < 2.2 * ring[0]
    assert gathered[1] > 3.3 * gathered[0]
    assert ring[1] < gathered[1] / 5


if __name__ == "__main__":
    device_script(sys.argv[1])
