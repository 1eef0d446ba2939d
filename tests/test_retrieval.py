"""Retrieval against a loop over every pair, ties, and the memory that it takes."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from unimed_jax.errors import DataError
from unimed_jax.evaluate import retrieval


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute(queries, gallery, positives) -> tuple[list[int], list[float]]:
    """By the definition, in float64: every wrong answer compared with every correct one."""
    best, precision = [], []
    for q, good in zip(queries, positives, strict=True):
        good = set(np.asarray(good).tolist())
        scores = [float(q.astype(float) @ g.astype(float)) for g in gallery]
        correct = sorted((scores[j] for j in good), reverse=True)
        wrong = [s for j, s in enumerate(scores) if j not in good]
        places = [hit + sum(s > c - 1e-6 for s in wrong) for hit, c in enumerate(correct, 1)]
        best.append(places[0])
        precision.append(sum(hit / rank for hit, rank in enumerate(places, 1)) / len(places))
    return best, precision


def pairs(n: int, images: int, captions: int, d: int = 8, seed: int = 0):
    """Pairs in which images have several captions and captions several images, as one embedding each."""
    rng = np.random.default_rng(seed)
    image_of, text_of = rng.integers(images, size=n), rng.integers(captions, size=n)
    pool = rng.normal(size=(max(images, captions), d))
    z = pool[image_of] + 0.5 * rng.normal(size=(images, d))[image_of]
    t = pool[text_of] + 0.5 * rng.normal(size=(captions, d))[text_of]
    return z, t, [f"im{i}" for i in image_of], [f"caption {j}" for j in text_of]


@pytest.mark.parametrize(("n", "images", "captions"), [(1, 1, 1), (30, 30, 30), (90, 40, 25), (200, 50, 4)])
@pytest.mark.parametrize("slab", [1, 177, 10**6])
def test_both_directions_equal_a_loop(n, images, captions, slab):
    z, t, ids, texts = pairs(n, images, captions, seed=n)
    found = retrieval.evaluate(z, t, ids, texts, resamples=0, slab=slab)
    different = {"image": list(dict.fromkeys(ids)), "text": list(dict.fromkeys(texts))}
    emb = {
        "image": unit(np.stack([z[ids.index(i)] for i in different["image"]])).astype(np.float32),
        "text": unit(np.stack([t[texts.index(c)] for c in different["text"]])).astype(np.float32),
    }
    links = set(zip(ids, texts, strict=True))
    for q, g in itertools.permutations(("image", "text")):
        linked = lambda a, b, q=q: ((a, b) if q == "image" else (b, a)) in links
        positives = [[j for j, b in enumerate(different[g]) if linked(a, b)] for a in different[q]]
        best, precision = brute(emb[q], emb[g], positives)
        d = getattr(found, f"{q}_to_{g}")
        assert (d.queries, d.gallery) == (len(different[q]), len(different[g]))
        assert d.positives == pytest.approx(np.mean([len(p) for p in positives]))
        for k in (1, 5, 10):
            assert d.values[f"R@{k}"].value == pytest.approx(np.mean(np.array(best) <= k))
        assert d.values["median_rank"].value == np.median(best)
        assert d.values["mAP"].value == pytest.approx(np.mean(precision))


def test_counting_and_sorting_agree(monkeypatch):
    rng = np.random.default_rng(0)
    q, g = (unit(np.round(rng.normal(size=(40, 3))) + 0.5).astype(np.float32) for _ in range(2))
    positives = [rng.choice(40, size=1 + i % 12, replace=False) for i in range(40)]
    mixed = retrieval.ranks(q, g, positives)
    assert (mixed[0] == brute(q, g, positives)[0]).all()
    np.testing.assert_allclose(mixed[1], brute(q, g, positives)[1])
    for few in (0, 100):
        monkeypatch.setattr(retrieval, "_FEW", few)
        np.testing.assert_array_equal(retrieval.ranks(q, g, positives), mixed)


def test_a_model_that_maps_everything_to_one_point_finds_nothing():
    one = np.ones((50, 8)) + 1e-9 * np.random.default_rng(0).normal(size=(50, 8))
    found = retrieval.evaluate(one, one, range(50), [str(i) for i in range(50)]).text_to_image
    assert found.values["R@10"].value == 0.0
    assert found.values["median_rank"].value == 50
    assert found.chance["R@10"] == pytest.approx(0.2)


def test_copies_of_an_image_and_equal_captions_are_one_item():
    z = np.eye(3)[[0, 0, 1, 2]]
    found = retrieval.evaluate(z, z[[1, 0, 3, 2]], "aabc", ["x", "x", "y", "z"], resamples=0)
    assert found.image_to_text.queries == found.image_to_text.gallery == 3
    assert found.image_to_text.values["R@1"].value == pytest.approx(1 / 3)


def test_chance_equals_drawing_at_random():
    counts, draws = np.array([1, 3, 7]), np.random.default_rng(0)
    for k in (1, 5, 10, 20):
        hits = np.mean([[draws.permutation(12)[: min(k, 12)].min() < p for p in counts] for _ in range(4000)])
        assert retrieval.chance(counts, 12, k) == pytest.approx(hits, abs=0.02)


def test_intervals_resample_the_subjects_of_the_queries():
    z, t, ids, texts = pairs(120, 120, 120, seed=3)
    groups = [int(i.removeprefix("im")) % 20 for i in ids]
    d = retrieval.evaluate(z, t, ids, texts, groups, resamples=200, seed=4).image_to_text
    for name, v in d.values.items():
        assert v.low <= v.value <= v.high, name
    first = [ids.index(i) for i in dict.fromkeys(ids)]
    alone = retrieval.evaluate(z, t, ids, texts, resamples=0).image_to_text
    assert alone.values["R@5"].low is None
    assert alone.values["R@5"].value == d.values["R@5"].value
    # the same draws by hand
    subject = np.array([groups[i] for i in first])
    order = list(dict.fromkeys(subject.tolist()))
    rng, slow = np.random.default_rng(4), []
    q, g = (
        retrieval._unit(x, np.array(f), "x")
        for x, f in ((z, first), (t, [texts.index(c) for c in dict.fromkeys(texts)]))
    )
    names = list(dict.fromkeys(texts))
    links = {
        i: {names.index(c) for k, c in zip(ids, texts, strict=True) if k == i} for i in dict.fromkeys(ids)
    }
    best, _ = retrieval.ranks(q, g, [np.array(sorted(links[i])) for i in links])
    for _ in range(200):
        chosen = rng.integers(len(order), size=len(order))
        slow.append(np.median(np.concatenate([best[subject == order[s]] for s in chosen])))
    v = d.values["median_rank"]
    assert [v.low, v.high] == pytest.approx(list(np.percentile(slow, [2.5, 97.5])))


def test_memory_is_bounded_by_the_slab():
    rng = np.random.default_rng(0)
    q, g = (unit(rng.normal(size=(6000, 16))).astype(np.float32) for _ in range(2))
    positives = [np.array([i]) for i in range(6000)]
    tracemalloc.start()
    try:
        retrieval.ranks(q, g, positives, slab=600_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6  # the slab is 2.4 MB, all scores would be 144 MB


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z, t, i, c: (z[:0], t[:0], i[:0], c[:0]), "at least one"),
        (lambda z, t, i, c: (z, t[:-1], i, c), "as many"),
        (lambda z, t, i, c: (z, t, i[:-1], c), "as many"),
        (lambda z, t, i, c: (z, t * (np.arange(9) != 4)[:, None], i, c), "caption embedding of pair 4"),
        (
            lambda z, t, i, c: (z + np.where(np.arange(9) == 2, np.nan, 0)[:, None], t, i, c),
            "image embedding of pair 2",
        ),
    ],
)
def test_refusals(change, words):
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 9, 4))
    with pytest.raises(DataError, match=words):
        retrieval.evaluate(*change(z, t, list(range(9)), [str(i) for i in range(9)]))
    with pytest.raises(DataError, match="query 1 has no correct"):
        retrieval.ranks(np.eye(2, dtype="f"), np.eye(2, dtype="f"), [np.array([0]), np.array([], int)])
