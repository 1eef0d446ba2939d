"""Metrics against scikit-learn and plain loops, and their bootstrap intervals."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest

from unimed_jax.errors import DataError
from unimed_jax.evaluate import delong, metrics, tallies


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
    areas = {str(k): sk.roc_auc_score(labels == k, scores[:, k]) for k in range(c)} if c > 2 else {}
    assert {k: v.value for k, v in m.auroc.items()} == pytest.approx(areas)


def softmax(scores: np.ndarray) -> np.ndarray:
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "c"), [(40, 2), (60, 3), (200, 6)])
def test_further_values_equal_scikit_learn(n, c, ties):
    sk = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = case(n, c, seed=3 * n + c, ties=ties)
    p = softmax(scores)
    m = metrics.classification(scores, labels, [str(i) for i in range(c)], probabilities=p, resamples=0)
    predicted, how = scores.argmax(1), {"average": "binary" if c == 2 else "macro"}
    if c == 2:
        precision = sk.average_precision_score(labels, scores[:, 1] - scores[:, 0])
    else:
        precision = np.mean([sk.average_precision_score(labels == k, scores[:, k]) for k in range(c)])
    expected = {
        "average_precision": precision,
        "f1": sk.f1_score(labels, predicted, **how),
        "precision": sk.precision_score(labels, predicted, **how),
        "recall": sk.recall_score(labels, predicted, **how),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "brier": np.mean(((p - np.eye(c)[labels]) ** 2).sum(1)),
    }
    if c == 2:
        assert expected["brier"] == pytest.approx(2 * sk.brier_score_loss(labels, p[:, 1]))
    for name, value in expected.items():
        assert m.values[name].value == pytest.approx(value, abs=1e-12), name


def test_calibration_error_equals_a_loop_over_bins():
    scores, labels, _ = case(300, 4, seed=9)
    p = softmax(scores)
    p[:3] = np.eye(4)[:3]  # a confidence of exactly 1 belongs to the last bin
    p[3] = [0.6, 0.4, 0.0, 0.0]  # 9/15: an edge belongs to the bin below it
    confidence, hit = p.max(1), p.argmax(1) == labels
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15 + 1e-12) & (confidence <= (k + 1) / 15 + 1e-12)
        if inside.any():
            total += inside.sum() / 300 * abs(confidence[inside].mean() - hit[inside].mean())
    m = metrics.classification(p, labels, "abcd", probabilities=p, resamples=0)
    assert m.values["ece"].value == pytest.approx(total, abs=1e-12)
    perfect = metrics.classification(np.eye(2), np.arange(2), "ab", probabilities=np.eye(2), resamples=0)
    assert (perfect.values["ece"].value, perfect.values["brier"].value) == (0.0, 0.0)


def test_macro_figures_count_a_class_that_is_predicted_but_does_not_occur():
    sk = pytest.importorskip("sklearn.metrics")
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 2, 1])
    m = metrics.classification(np.eye(4)[predicted], labels, "abcd", resamples=0)
    for name, score in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert m.values[name].value == pytest.approx(score(labels, predicted, average="macro"))
    never = metrics.classification(np.eye(3)[[0, 0, 0]], np.array([0, 1, 2]), "abc", resamples=0)
    assert never.values["precision"].value == pytest.approx(1 / 9)
    assert never.notes == ["never predicted, counted as precision 0: b, c"]


def test_two_classes_name_what_is_missing():
    never = metrics.classification(np.eye(2)[[0, 0]], np.array([0, 1]), ["no", "yes"], resamples=0)
    assert never.values["precision"] == metrics.Value(None, reason="yes is never predicted")
    assert never.values["recall"].value == never.values["f1"].value == 0.0
    absent = metrics.classification(np.eye(2)[[0, 0]], np.array([0, 0]), ["no", "yes"], resamples=0)
    assert absent.values["recall"].reason == "no records of yes"
    assert absent.values["f1"].reason == "yes neither occurs nor is predicted"
    assert absent.values["kappa"].reason == "only one class occurs"
    assert absent.values["ece"].reason == "the scores are no probabilities"


def test_chance_is_only_named_where_there_is_one():
    m = metrics.classification(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 1, 0]), "abc", resamples=0)
    assert [m.chance(k) for k in ("accuracy", "auroc", "kappa", "f1", "ece")] == [1 / 3, 0.5, 0.0, None, None]
    assert m.chance("average_precision") == 0.5


def test_weighted_resamples_equal_repeated_records():
    """A resample evaluated through weights is the metric of the records repeated that often."""
    for c in (2, 3):
        scores, labels, _ = case(50, c, seed=1, ties=True)
        p = softmax(scores)
        w = np.random.default_rng(0).integers(0, 4, size=(5, 50))
        fast = tallies.weighted(tallies.prepare(scores, labels, p), w.astype(float))
        for row in range(5):
            again = np.repeat(np.arange(50), w[row])
            names = [str(k) for k in range(c)]
            slow = metrics.classification(
                scores[again], labels[again], names, probabilities=p[again], resamples=0
            )
            for name in metrics.ALL:
                assert fast[name][row] == pytest.approx(slow.values[name].value, abs=1e-12), name


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
    options = {"probabilities": softmax(scores), "resamples": 100, "seed": 7}
    whole = metrics.classification(scores, labels, "abc", groups, **options)
    monkeypatch.setattr(tallies, "SLAB", 60 * 7)
    slabs = metrics.classification(scores, labels, "abc", groups, **options)
    assert all(v.low is not None for v in whole.values.values())
    of_class = lambda m: m.recall | {f"auroc {k}": v for k, v in m.auroc.items()}
    assert all(v.low < v.value < v.high for v in whole.auroc.values())
    for name, v in (whole.values | of_class(whole)).items():
        other = (slabs.values | of_class(slabs))[name]
        assert [v.low, v.high] == pytest.approx([other.low, other.high], rel=1e-12), name  # sums round apart


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
    assert m.auroc["a"].value == pytest.approx(0.75)
    assert m.per_class()["auroc_per_class"]["c"] == {
        "value": None, "low": None, "high": None, "reason": "no records of this class",
    }  # fmt: skip


def test_the_auroc_of_each_class_needs_a_rest_and_more_than_two_classes():
    alone = metrics.classification(np.eye(3)[[0, 1]], np.array([0, 0]), "abc")
    assert alone.auroc["a"].reason == "only this class occurs"
    assert metrics.classification(np.eye(2), np.array([0, 1]), "ab").per_class() == {}


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
        p = softmax(scores) if seed % 2 and n else None
        names = [str(k) for k in range(c)]
        m = metrics.classification(scores, labels, names, groups, probabilities=p, resamples=50)
        for v in [
            *m.values.values(),
            *m.recall.values(),
            *m.auroc.values(),
            *([m.delong] if m.delong else []),
        ]:
            assert all(x is None or np.isfinite(x) for x in (v.value, v.low, v.high))
            assert v.value is not None or v.reason


@pytest.mark.parametrize(("change", "words"), [((0.5, 0.2), "do not add up"), ((1.5, -0.5), "record 0")])
def test_probabilities_that_are_none_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        metrics.classification(np.eye(2), np.arange(2), "ab", probabilities=np.array([change, (1.0, 0.0)]))
    with pytest.raises(DataError, match="shape"):
        metrics.classification(np.eye(2), np.arange(2), "ab", probabilities=np.ones((2, 1)))


# ---- DeLong


def components(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The areas and their covariance by the definition: every pair compared."""
    beats = lambda a, b: (a[:, None] > b) + 0.5 * (a[:, None] == b)
    pairs = np.stack([beats(s[positive], s[~positive]) for s in scores])  # [k, m, n]
    m, n = pairs.shape[1:]
    area, v10, v01 = pairs.mean((1, 2)), pairs.mean(2), pairs.mean(1)
    of = lambda v: np.array([[np.sum((a - a.mean()) * (b - b.mean())) / (len(a) - 1) for b in v] for a in v])
    return area, of(v10) / m + of(v01) / n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [6, 31, 200])
def test_delong_equals_its_definition(n, ties):
    rng = np.random.default_rng(n)
    positive = np.arange(n) % 3 == 0
    scores = rng.normal(size=(3, n)) + positive
    scores = np.round(scores) if ties else scores
    area, cov = delong.covariance(scores, positive)
    slow_area, slow_cov = components(scores, positive)
    np.testing.assert_allclose(area, slow_area, rtol=1e-12)
    np.testing.assert_allclose(cov, slow_cov, rtol=1e-9, atol=1e-15)


def test_delong_covers_the_truth():
    """Normal scores one apart: the true area is Phi(1 / sqrt 2) = 0.76025; 95 % of 1000 intervals hold it."""
    rng = np.random.default_rng(0)
    positive = np.arange(120) < 50
    held = 0
    for _ in range(1000):
        _, low, high = delong.interval(rng.normal(size=120) + positive, positive)
        held += low <= 0.7602499 <= high
    assert (
        0.925 <= held / 1000 <= 0.97
    )  # three standard errors below 0.95; the normal interval is a little short


def test_delong_stands_beside_the_bootstrap_where_subjects_are_single():
    scores, labels, groups = case(200, 2, seed=4)
    m = metrics.classification(scores, labels, "ab")
    boot, normal = m.values["auroc"], m.delong
    assert normal.value == pytest.approx(boot.value, abs=1e-12)
    assert [normal.low, normal.high] == pytest.approx([boot.low, boot.high], abs=0.02)
    assert metrics.classification(scores, labels, "ab", groups).delong is None
    assert metrics.classification(*case(40, 3, seed=4)[:2], "abc").delong is None
    assert metrics.classification(scores[:0], labels[:0], "ab").delong is None
    perfect = metrics.classification(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), "ab").delong
    assert perfect == metrics.Value(1.0, reason="no interval: DeLong's variance is 0")
    one = metrics.classification(np.eye(2), np.array([0, 1]), "ab").delong
    assert one == metrics.Value(None, reason="fewer than two records of a class")
    with pytest.raises(DataError, match="two records of each class"):
        delong.interval(np.zeros(3), np.array([True, False, False]))


def test_a_thousand_resamples_take_about_a_second():
    scores, labels, groups = case(2000, 6, seed=2)
    start = time.perf_counter()
    metrics.classification(scores, labels, "abcdef", groups)
    assert time.perf_counter() - start < 20
