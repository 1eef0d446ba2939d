"""Metrics against scikit-learn and plain loops, and their bootstrap intervals."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest

from unimed_jax.errors import DataError
from unimed_jax.evaluate import metrics


def case(n: int, c: int, seed: int, ties: bool = False):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(n, c)), rng.integers(c, size=n)
    scores[np.arange(n), labels] += 0.7
    if ties:
        scores = np.round(scores, 0)
    return scores, labels, [f"s{g}" for g in rng.integers(max(2, n // 4), size=n)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "c"), [(40, 2), (60, 3), (200, 6)])
def test_values_equal_scikit_learn(n, c, ties):
    sk = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = case(n, c, seed=n + c, ties=ties)
    m = metrics.classification(scores, labels, [str(i) for i in range(c)], resamples=0)
    predicted = scores.argmax(1)
    assert m.values["accuracy"].value == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert m.values["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert (m.confusion == sk.confusion_matrix(labels, predicted, labels=range(c))).all()
    if c == 2:
        expected = sk.roc_auc_score(labels, scores[:, 1] - scores[:, 0])
    else:
        expected = np.mean([sk.roc_auc_score(labels == k, scores[:, k]) for k in range(c)])
    assert m.values["auroc"].value == pytest.approx(expected, abs=1e-12)
    recalls = sk.recall_score(labels, predicted, average=None, labels=range(c))
    assert [m.recall[str(k)].value for k in range(c)] == pytest.approx(list(recalls))


def test_weighted_resamples_equal_repeated_records():
    """A resample evaluated through weights is the metric of the records repeated that often."""
    scores, labels, _ = case(50, 3, seed=1, ties=True)
    w = np.random.default_rng(0).integers(0, 4, size=(5, 50))
    ranks = metrics._rankings(scores, labels, 3)
    fast = metrics._weighted(w.astype(float), labels, scores.argmax(1), ranks, 3)
    for row in range(5):
        again = np.repeat(np.arange(50), w[row])
        slow = metrics.classification(scores[again], labels[again], "abc", resamples=0)
        for name in metrics.METRICS:
            assert fast[name][row] == pytest.approx(slow.values[name].value, abs=1e-12)


def test_intervals_resample_subjects_not_records():
    rng = np.random.default_rng(3)
    hit = np.repeat(rng.random(20) < 0.7, 30)  # 20 subjects of 30 identical slices each
    labels = np.tile([0, 1], 300)
    scores = np.eye(2)[np.where(hit, labels, 1 - labels)]
    by_subject = metrics.classification(scores, labels, "ab", np.repeat(np.arange(20), 30)).values["accuracy"]
    by_record = metrics.classification(scores, labels, "ab").values["accuracy"]
    assert by_subject.value == by_record.value == pytest.approx(hit.mean())
    width = lambda v: v.high - v.low
    assert width(by_subject) == pytest.approx(2 * 1.96 * np.sqrt(hit.mean() * (1 - hit.mean()) / 20), rel=0.2)
    assert width(by_record) == pytest.approx(2 * 1.96 * np.sqrt(hit.mean() * (1 - hit.mean()) / 600), rel=0.2)


def test_intervals_do_not_depend_on_the_slab_size(monkeypatch):
    scores, labels, groups = case(60, 3, seed=5)
    whole = metrics.classification(scores, labels, "abc", groups, resamples=100, seed=7)
    monkeypatch.setattr(metrics, "_SLAB", 60 * 7)
    slabs = metrics.classification(scores, labels, "abc", groups, resamples=100, seed=7)
    assert whole.values == slabs.values
    assert whole.recall == slabs.recall


def test_a_subject_order_of_any_type_gives_the_same_interval():
    scores, labels, groups = case(60, 2, seed=8)
    a = metrics.classification(scores, labels, "ab", groups)
    b = metrics.classification(scores, labels, "ab", [hash(g) for g in groups])
    assert a.values == b.values
    assert a.subjects == len(set(groups))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_records_are_undefined_with_a_reason(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = metrics.classification(np.zeros((n, 2)), np.zeros(n, int), "ab")
    assert m.n == n
    assert m.values["auroc"].value is None
    assert m.values["auroc"].reason == ("only one class occurs" if n else "no records")
    assert m.values["accuracy"].value == (1.0 if n else None)
    assert m.recall["b"].reason == "no records of this class"


def test_a_class_without_records_is_named_and_left_out_of_the_mean():
    scores = np.eye(3)[[0, 1, 1, 2]]
    m = metrics.classification(scores, np.array([0, 1, 0, 1]), ["a", "b", "c"])
    assert m.values["balanced_accuracy"].value == pytest.approx(0.5)
    assert m.recall["c"].value is None
    assert m.notes == ["no records of: c"]
    assert m.support == {"a": 2, "b": 2, "c": 0}


def test_one_subject_has_no_interval():
    m = metrics.classification(np.eye(2), np.array([0, 1]), "ab", ["p", "p"])
    assert m.values["accuracy"] == metrics.Value(1.0)
    assert m.notes == ["no intervals: all records belong to one subject"]


def test_an_interval_that_rarely_exists_is_not_reported():
    """Two subjects, one a class: half of the resamples hold one class only."""
    m = metrics.classification(np.eye(2)[[0, 1]], np.array([0, 1]), "ab", ["p", "q"])
    v = m.values["balanced_accuracy"]
    assert v.value == 1.0
    assert v.low is None
    assert "too few subjects" in v.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, l, g: (s[:, :2], l, g), "shape"),
        (lambda s, l, g: (s, l + 1, g), "labels reach"),
        (lambda s, l, g: (s * np.where(np.arange(len(s)) == 3, np.nan, 1)[:, None], l, g), "record 3"),
        (lambda s, l, g: (s, l, g[:-1]), "subjects"),
    ],
)
def test_refusals(change, words):
    scores, labels, groups = change(*case(12, 3, seed=0))
    with pytest.raises(DataError, match=words):
        metrics.classification(scores, labels, "abc", groups)


def test_no_value_is_ever_nan():
    rng = np.random.default_rng(0)
    for seed in range(40):
        n, c = int(rng.integers(0, 8)), int(rng.integers(2, 5))
        scores, labels, groups = (
            case(n, c, seed, ties=True) if n else (np.zeros((0, c)), np.zeros(0, int), [])
        )
        m = metrics.classification(scores, labels, [str(k) for k in range(c)], groups, resamples=50)
        for v in [*m.values.values(), *m.recall.values()]:
            assert all(x is None or np.isfinite(x) for x in (v.value, v.low, v.high))
            assert v.value is not None or v.reason


def test_a_thousand_resamples_take_about_a_second():
    scores, labels, groups = case(2000, 6, seed=2)
    start = time.perf_counter()
    metrics.classification(scores, labels, "abcdef", groups)
    assert time.perf_counter() - start < 20
