"""UniMed's 13 sources: shares as the original mixes, every record once an epoch, any number of processes."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from unimed_jax import config
from unimed_jax.data import pipeline
from unimed_jax.data.mixture import Mixture, draws_per_epoch, keys_of, permute, permute_all
from unimed_jax.errors import UsageError

# Shards of at most 1000 samples in the order of the original's list.
SHARDS = dict(
    zip(config.UNIMED_SOURCES, (1049, 212, 270, 7, 113, 61, 1645, 468, 265, 1018, 155, 13, 6), strict=True)
)


def mixture_of(sizes, weights=None, mode="size", seed=0, temperature=1.0) -> Mixture:
    draws = draws_per_epoch(sizes, weights or [1.0] * len(sizes), mode, temperature)
    return Mixture(
        names=tuple(f"s{i}" for i in range(len(sizes))), sizes=tuple(sizes), draws=draws, seed=seed
    )


def random_mixture(seed: int) -> Mixture:
    """One to 13 sources of 1 to 200 records; weights from a fifth to five; every way of mixing."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 14))
    sizes = np.exp(rng.uniform(0, np.log(200), n)).astype(int).tolist()
    weights = np.exp(rng.uniform(-1.6, 1.6, n)).tolist()
    return mixture_of(sizes, weights, ("size", "weight", "temperature")[seed % 3], seed, rng.uniform(1, 4))


# --- the two ways of the original ----------------------------------------------------------------------------------


def original_resampled(sizes, factors, n, rng):
    """With `dataset_resampled`: shards with replacement, each as likely as its source's factor, until n samples."""
    shards = [(s, min(1000, size - i)) for s, size in enumerate(sizes) for i in range(0, size, 1000)]
    p = np.array([factors[s] for s, _ in shards])
    drawn = rng.choice(len(shards), 2 * n // 1000 + 100, p=p / p.sum())
    counts, total = np.zeros(len(sizes)), 0
    for i in drawn:
        if total >= n:
            return counts
        counts[shards[i][0]] += shards[i][1]
        total += shards[i][1]
    raise AssertionError("too few draws")


def test_by_default_an_epoch_is_every_record_once():
    """As the original without resampling: the list of all shards, whatever the factors say."""
    sizes = [1000 * n for n in SHARDS.values()]
    weights = list(config.UNIMED_WEIGHTS.values())
    assert list(draws_per_epoch(sizes, weights, config.Data().mixture)) == sizes


def test_a_temperature_of_one_mixes_as_the_original_resamples():
    """In expectation: weight x records, in an epoch as long as all records; the partial last shards count in part."""
    sizes, factors = [700, 30_400, 5_000, 99_001, 12], [4.0, 1.0, 2.5, 0.5, 30.0]
    n, rng = sum(sizes), np.random.default_rng(0)
    rounds = np.array([original_resampled(sizes, factors, n, rng) for _ in range(400)])
    shares = rounds / rounds.sum(1, keepdims=True)
    ours = np.array(draws_per_epoch(sizes, factors, "temperature", 1.0)) / n
    error = shares.std(0) / np.sqrt(len(rounds))
    # A ratio of sums is biased by about one shard in n.
    assert (np.abs(shares.mean(0) - ours) < 4 * error + 1000 / n * ours + 1e-5).all()


# --- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 4097, 5_282_000, 3_000_000_017])
def test_permuting_many_at_once_is_permuting_each(n):
    keys = keys_of(1, "many", n % 7)
    indices = np.random.default_rng(n).integers(0, n, 300).astype(np.uint64)
    assert permute_all(indices, n, keys).tolist() == [permute(int(i), n, keys) for i in indices]


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_positions_one_by_one(seed):
    m = random_mixture(seed)
    n = m.epoch_examples
    for position in (0, 1, n // 3, n - 1, n, n + 7, 2 * n + n // 2):
        found = collections.Counter(m.locate(i).source for i in range(position))
        assert m.counts(position) == tuple(found[s] for s in range(len(m.sizes)))
    assert m.counts(3 * n) == tuple(3 * d for d in m.draws)


@pytest.mark.parametrize("seed", range(24))
def test_every_record_comes_as_often_as_its_source_says(seed):
    """Several epochs: within each every source has its draws; over all, no record is a pass behind another."""
    m = random_mixture(seed)
    epochs = 4
    seen = collections.Counter()
    for epoch in range(epochs):
        draws = [m.locate(epoch * m.epoch_examples + i) for i in range(m.epoch_examples)]
        sources = collections.Counter(d.source for d in draws)
        assert tuple(sources[s] for s in range(len(m.sizes))) == m.draws
        seen.update((d.source, d.record) for d in draws)
    for s, (size, draws) in enumerate(zip(m.sizes, m.draws, strict=True)):
        counts = [seen[s, r] for r in range(size)]
        assert sum(counts) == epochs * draws
        assert max(counts) - min(counts) <= 1
        assert len(seen.keys() & {(s, r) for r in range(size)}) == min(size, epochs * draws)


def test_an_epoch_of_all_5_million_holds_every_record_once():
    sizes = [1000 * n for n in SHARDS.values()]
    m = mixture_of(sizes)
    assert m.epoch_examples == 5_282_000
    ends = np.cumsum(sizes)
    for epoch in (0, 7):
        slots = permute_all(
            np.arange(m.epoch_examples, dtype=np.uint64), m.epoch_examples, keys_of(0, "mixture", epoch)
        )
        assert (np.bincount(slots.astype(np.int64), minlength=m.epoch_examples) == 1).all()
        for name, size in zip(m.names, sizes, strict=True):
            places = np.arange(size, dtype=np.uint64)
            records = permute_all(places, size, keys_of(0, f"source/{name}", epoch))
            assert (np.bincount(records.astype(np.int64), minlength=size) == 1).all()
        # What training computes for single positions is taken from these tables.
        for offset in np.random.default_rng(epoch).integers(0, m.epoch_examples, 50).tolist():
            draw = m.locate(epoch * m.epoch_examples + offset)
            slot = int(slots[offset])
            assert draw.source == np.searchsorted(ends, slot, side="right")
            place = slot - (ends[draw.source] - sizes[draw.source])
            keys = keys_of(0, f"source/{m.names[draw.source]}", epoch)
            assert (draw.record, draw.epoch) == (permute(int(place), sizes[draw.source], keys), epoch)


# --- any number of processes ---------------------------------------------------------------------------------------


class Nothing:
    """A source of which only the length counts."""

    name = "nothing"

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n


def pipelines(monkeypatch, sizes, batch: int, count: int, *, threads: int = 1) -> list[pipeline.Pipeline]:
    """The pipelines of all processes, as a config makes them."""
    specs = [config.Source(name=f"s{i}") for i in range(len(sizes))]
    monkeypatch.setattr(pipeline, "open_sources", lambda data: (specs, [Nothing(n) for n in sizes]))
    cfg = config.Train(batch_size=batch, data=config.Data(threads=threads))
    unused = cast(Any, None)  # no text is read
    make = lambda k: pipeline.make(cfg, tokenizer=unused, process_index=k, process_count=count)
    return [make(k) for k in range(count)]


def positions(p: pipeline.Pipeline, step: int) -> list[int]:
    """The places in the stream that a process reads in a step."""
    b = p.blocks
    return [i for part in range(b.per_step) for i in b.positions(step * b.per_step + part)]


def test_slices_of_1_to_512_processes_are_disjoint_and_complete(monkeypatch):
    """13 sources, some of one record, all with fewer records than there are processes in the end."""
    sizes = [1, 1, 2, 7, 30, 61, 113, 155, 212, 265, 270, 400, 500]
    for count in range(1, 513):
        rows = 1 + count % 3
        parts = pipelines(monkeypatch, sizes, rows * count, count, threads=1 + count % 2)
        for step in (0, 10**6):
            found = [i for p in parts for i in positions(p, step)]
            assert found == list(range(step * rows * count, (step + 1) * rows * count))


@pytest.mark.parametrize("count", [1, 3, 8, 64, 500, 512])
def test_an_epoch_of_all_processes_is_every_record(monkeypatch, count):
    sizes = [1, 2, 13, 100, 900, 8, 512, 511, 513, 40, 3, 1, 5]
    batch = -(-96 // count) * count
    parts = pipelines(monkeypatch, sizes, batch, count)
    m = parts[0].mixture
    n = m.epoch_examples
    assert n == sum(sizes)
    steps = -(-2 * n // batch)
    found = [m.locate(i)[:2] for step in range(steps) for p in parts for i in positions(p, step)]
    every = sorted((s, r) for s, size in enumerate(sizes) for r in range(size))
    assert sorted(found[:n]) == sorted(found[n : 2 * n]) == every


@pytest.mark.parametrize(("batch", "count"), [(100, 3), (2048, 511), (512, 513), (1, 2)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, batch, count):
    with pytest.raises(UsageError, match=rf"batch_size {batch} does not divide over {count} processes") as e:
        pipelines(monkeypatch, [5000], batch, count)
    assert e.value.exit_code == 2
    assert e.value.remedy


def test_fewer_records_than_processes_are_refused(monkeypatch):
    """Each process needs a row, and no record may be its own negative."""
    with pytest.raises(UsageError, match="batch_size 512 exceeds the 40 examples of an epoch"):
        pipelines(monkeypatch, [20, 20], 512, 512)


def test_weights_by_name_reach_the_draws(monkeypatch):
    sizes = list(SHARDS.values())
    cfg = config.Train(batch_size=13)
    weights = config.UNIMED_WEIGHTS | {"openi": 5.0, "pmc_clip": 0.25}
    specs = [config.Source(name=n, weight=w) for n, w in weights.items()]
    m = pipeline.make_mixture(cfg, specs, sizes)
    want = {**SHARDS, "openi": 35, "pmc_clip": 411}
    assert dict(zip(m.names, m.draws, strict=True)) == want
    even = dataclasses.replace(cfg.data, mixture="temperature", temperature=4.0)
    shares = np.array(pipeline.make_mixture(dataclasses.replace(cfg, data=even), specs, sizes).draws)
    want = np.array([w * n**0.25 for w, n in zip(weights.values(), sizes, strict=True)])
    np.testing.assert_allclose(shares, sum(sizes) * want / want.sum(), atol=0.5)
