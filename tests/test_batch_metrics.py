"""False negatives, padding and sources of a batch: brute force, one device, eight devices, two processes."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from training import environment

from unimed_jax import config, parallel
from unimed_jax.models import clip
from unimed_jax.train import batch_metrics

ROWS, SOURCES, WIDTH = 32, 5, 32
GROUPS = ((8, 0.5), (WIDTH, 0.5))


def brute_force(ids, mask):
    """Every pair of rows, one by one."""
    rows = [i for i in range(len(ids)) if mask[i]]
    pairs = [(i, j) for i, j in itertools.permutations(rows, 2) if ids[i] == ids[j]]
    n = len(rows)
    return {
        "same_caption_rate": len({i for i, _ in pairs}) / max(n, 1),
        "same_caption_pairs": len(pairs) / max(n * (n - 1), 1),
    }


@pytest.mark.parametrize("different", [1, 2, 5, 40])
def test_same_captions_equal_brute_force(different):
    rng = np.random.default_rng(different)
    f = jax.jit(batch_metrics.same_captions)
    for b in (1, 2, 37):
        ids = rng.integers(0, 2**31, different)[rng.integers(0, different, b)].astype(np.int32)
        for mask in (np.ones(b, bool), rng.random(b) < 0.6, np.zeros(b, bool)):
            want = brute_force(ids.tolist(), mask)
            assert {k: float(v) for k, v in f(ids, mask).items()} == pytest.approx(want, abs=1e-6)


def test_a_batch_of_one_caption_does_not_overflow():
    found = batch_metrics.same_captions(jnp.zeros(100_000, jnp.int32))
    assert [float(v) for v in found.values()] == pytest.approx([1, 1])


def data(seed: int, *, short: bool) -> dict[str, np.ndarray]:
    """A batch with repeated captions. Every second one has up to 8 tokens; if not `short`, in the first half only."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(9, WIDTH + 1, ROWS)
    few = np.arange(ROWS) % 2 == 1 if short else (np.arange(ROWS) % 2 == 1) & (np.arange(ROWS) < ROWS // 2)
    lengths[few] = rng.integers(3, 9, few.sum())
    tokens = rng.integers(1, 200, (ROWS, WIDTH), dtype=np.int32)
    tokens[np.arange(WIDTH) >= lengths[:, None]] = 0
    return {
        "tokens": tokens,
        "mask": rng.random(ROWS) < 0.9,
        "caption_id": rng.integers(0, 20, ROWS).astype(np.int32),
        "source": rng.integers(0, SOURCES, ROWS).astype(np.int32),
    }


def expected(seed: int, *, groups: bool, short: bool) -> dict[str, object]:
    b = data(seed, short=short)
    computed = ROWS * ((8 + WIDTH) // 2 if groups and short else WIDTH)
    return brute_force(b["caption_id"].tolist(), b["mask"]) | {
        "text_padding": 1 - (b["tokens"] != 0).sum() / computed,
        "examples": np.bincount(b["source"][b["mask"]], minlength=SOURCES).tolist(),
    }


BATCHES = [(0, True), (1, False), (2, True)]  # (seed, short)


def measure(*, groups: bool, parts: int = 1) -> dict[str, object]:
    """Text embeddings and metrics of BATCHES on all devices and processes there are, from one compiled program."""
    m = small_model.model(text_groups=GROUPS if groups else ())
    cfg = config.Train(batch_size=ROWS, model=m, optim=config.Optim(accum_steps=parts))
    mesh = parallel.make_mesh(config.Mesh())
    graphdef = clip.skeleton(m)[0]

    def step(params, b):
        text = clip.bind(graphdef, params).text
        metrics = batch_metrics.of_batch(b, text, cfg, mesh, SOURCES)
        return metrics, jnp.square(text(b["tokens"], shards=mesh.size)).sum()

    f = jax.jit(step, out_shardings=parallel.replicated(mesh))
    params = small_model.params(m)
    n, k = jax.process_count(), jax.process_index()
    found = []
    for seed, short in BATCHES:
        own = {c: np.split(x, n)[k] for c, x in data(seed, short=short).items()}
        metrics, size = f(params, parallel.put(own, mesh))
        found.append({c: np.asarray(x).tolist() for c, x in metrics.items()} | {"size": float(size)})
    return {"steps": found, "compilations": f._cache_size()}


def check(found: dict, *, groups: bool) -> None:
    assert found["compilations"] == 1
    for (seed, short), step in zip(BATCHES, found["steps"], strict=True):
        want = expected(seed, groups=groups, short=short)
        assert step["examples"] == want.pop("examples")
        assert {k: step[k] for k in want} == pytest.approx(want, abs=1e-6)


@pytest.fixture(scope="module")
def alone():
    return {groups: measure(groups=groups) for groups in (False, True)}


def test_metrics_and_padding_on_one_device(alone):
    for groups, found in alone.items():
        check(found, groups=groups)
    sizes = [[step["size"] for step in alone[groups]["steps"]] for groups in (False, True)]
    np.testing.assert_allclose(*sizes, rtol=1e-5)  # cropping changes no embedding


def test_micro_batches_take_their_widths_one_by_one():
    """Of the batch that does not fit as a whole, the micro-batch with the short captions does."""
    whole, cut = (measure(groups=True, parts=n)["steps"] for n in (1, 2))
    tokens = data(1, short=False)["tokens"]
    assert cut[1]["text_padding"] == pytest.approx(
        1 - (tokens != 0).sum() / (ROWS // 2 * (20 + 32)), abs=1e-6
    )
    assert whole[0] == cut[0]


def children(*jobs: dict[str, str], devices: int) -> list[dict]:
    """This file as a program in each environment, at once; what they print."""
    procs = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=environment(devices, **job),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    try:
        out = [p.communicate(timeout=200) for p in procs]
    finally:
        for p in procs:
            p.kill()
    assert [p.returncode for p in procs] == [0] * len(procs), out[0][1][-3000:]
    return [json.loads(o.splitlines()[-1]) for o, _ in out]


def same_as_alone(found: dict, alone: dict) -> None:
    check(found, groups=True)
    for one, other in zip(found["steps"], alone[True]["steps"], strict=True):
        assert one["size"] == pytest.approx(other["size"], rel=1e-5)


def test_the_same_on_eight_devices(alone):
    same_as_alone(children({}, devices=8)[0], alone)


def test_two_processes_take_the_same_width(alone):
    """In the second batch only one process has captions that fit: both must run the same program, or hang."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    jobs = [{"JAX_COORDINATOR_ADDRESS": address, "TEST_PROCESS": str(i)} for i in range(2)]
    one, other = children(*jobs, devices=2)
    assert one == other
    same_as_alone(one, alone)


if __name__ == "__main__":
    if "TEST_PROCESS" in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(num_processes=2, process_id=int(os.environ["TEST_PROCESS"]))
    print(json.dumps(measure(groups=True)))
