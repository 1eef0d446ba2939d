"""The probe's regression against scikit-learn, and what its protocol promises."""

from __future__ import annotations

import json

import numpy as np
import pytest

from unimed_jax.errors import DataError
from unimed_jax.evaluate import probe

CLASSES = ["a", "b", "c", "d"]


def data(n: int, c: int = 4, d: int = 6, seed: int = 0, skill: float = 1.0):
    """Features around a centre for each class; the centres are the same for all seeds."""
    centres = np.random.default_rng(42).normal(size=(4, d))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % c
    return skill * centres[labels] + rng.normal(size=(n, d)), labels


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_several_classes_equal_scikit_learn(c):
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data(300)
    theirs = linear.LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    ours = probe.fit(x, y, 4, c=c, dtype="float64")
    assert ours.gradient <= 1e-8
    np.testing.assert_allclose(ours.kernel.T, theirs.coef_, atol=2e-5 * max(1, np.abs(theirs.coef_).max()))
    shift = lambda b: b - b.mean()  # a constant on all classes changes nothing
    np.testing.assert_allclose(shift(ours.bias), shift(theirs.intercept_), atol=2e-5)
    single = probe.fit(x, y, 4, c=c)
    assert single.kernel.dtype == np.float32
    np.testing.assert_allclose(single.kernel.T, theirs.coef_, atol=2e-3 * max(1, np.abs(theirs.coef_).max()))
    again, _ = data(500, seed=9)
    assert (ours.logits(again).argmax(1) == theirs.predict(again)).all()
    assert (single.logits(again).argmax(1) == theirs.predict(again)).mean() > 0.99


def test_two_classes_equal_scikit_learn_at_twice_the_c():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data(200, c=2)
    theirs = linear.LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000).fit(x, y)
    ours = probe.fit(x, y, 2, c=1.0, dtype="float64")
    np.testing.assert_allclose(ours.kernel[:, 1] - ours.kernel[:, 0], theirs.coef_[0], atol=2e-5)
    assert ours.bias[1] - ours.bias[0] == pytest.approx(theirs.intercept_[0], abs=2e-5)


def test_the_start_does_not_change_the_end():
    x, y = data(120)
    cold = probe.fit(x, y, 4, c=1.0, dtype="float64")
    warm = probe.fit(x, y, 4, c=1.0, dtype="float64", start=probe.fit(x, y, 4, c=0.1, dtype="float64"))
    np.testing.assert_allclose(warm.kernel, cold.kernel, atol=1e-6)


def test_separable_classes_and_almost_no_penalty_stay_finite():
    x, y = data(40, skill=50.0)
    found = probe.fit(x, y, 4, c=1e6)
    assert np.isfinite(found.kernel).all()
    assert (found.logits(x).argmax(1) == y).all()
    assert found.steps <= 1000


def test_a_class_without_training_records_is_never_favoured():
    x, y = data(60, c=2)
    assert probe.fit(x, y, 3).logits(x).argmax(1).max() == 1


def splits(groups: bool = False):
    parts = []
    for s, n in enumerate((400, 200, 240)):
        x, y = data(n, seed=s + 1)
        parts.append(probe.Split(x, y, [f"{s}/{i // 5}" for i in range(n)] if groups else None))
    return parts


def test_the_protocol(monkeypatch):
    train, validation, test = splits(groups=True)
    found = probe.run(
        train, validation, test, CLASSES, fractions=(0.05, 1.0), shots=(1,), seeds=(0, 1), resamples=50
    )
    assert [(r.budget, r.seed, r.n) for r in found.runs] == [
        ("5 %", 0, 20),
        ("5 %", 1, 20),
        ("100 %", 0, 400),
        ("1 shot", 0, 4),
        ("1 shot", 1, 4),
    ]
    summary = found.summary()
    assert summary["100 %"]["mean"] > summary["5 %"]["mean"] > summary["1 shot"]["mean"] > 0.25
    assert summary["100 %"]["sd"] is None
    assert summary["5 %"]["sd"] > 0
    for r in found.runs:
        assert list(r.swept) == list(probe.SWEEP)
        best = max(r.swept.values())
        assert r.c == min(c for c, v in r.swept.items() if v == best)
        assert r.metrics.subjects == 48
        assert r.metrics.values["ece"].value is not None
    json.dumps(found.json(), allow_nan=False)


def test_one_run_equals_scikit_learn_done_by_hand():
    linear = pytest.importorskip("sklearn.linear_model")
    score = pytest.importorskip("sklearn.metrics").balanced_accuracy_score
    train, validation, test = splits()
    found = probe.run(
        train,
        validation,
        test,
        CLASSES,
        fractions=(1.0,),
        sweep=(1e-4, 1e-2, 1.0),
        resamples=0,
        dtype="float64",
    ).runs[0]
    mean, sd = train.features.mean(0), train.features.std(0)
    swept = {}
    for c in (1e-4, 1e-2, 1.0):
        model = linear.LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
        swept[c] = model.fit((train.features - mean) / sd, train.labels)
    on = lambda m, s: score(s.labels, m.predict((s.features - mean) / sd))
    assert found.swept == pytest.approx({c: on(m, validation) for c, m in swept.items()})
    assert found.metrics.values["balanced_accuracy"].value == pytest.approx(on(swept[found.c], test))


def test_test_records_change_nothing_but_the_test():
    train, validation, test = splits()
    other = probe.Split(test.features[::-1] * 3, test.labels)
    a, b = (
        probe.run(train, validation, t, CLASSES, fractions=(0.1,), seeds=(0,), resamples=0).runs[0]
        for t in (test, other)
    )
    assert (a.c, a.swept) == (b.c, b.swept)


def test_draws_take_every_class_many_subjects_and_grow():
    labels = np.array([0] * 100 + [1] * 30 + [2] * 7)
    groups = [i // 10 for i in range(137)]
    small = probe.subset(labels, "abc", groups, fraction=0.01, seed=3)
    large = probe.subset(labels, "abc", groups, fraction=0.1, seed=3)
    assert np.bincount(labels[small]).tolist() == [1, 1, 1]
    assert np.bincount(labels[large]).tolist() == [10, 3, 1]
    assert set(small) <= set(large)
    assert len({groups[i] for i in large if labels[i] == 0}) == 10  # one of each of its ten subjects
    assert (probe.subset(labels, "abc", fraction=1.0, seed=5) == np.arange(137)).all()
    assert (
        probe.subset(labels, "abc", shots=4, seed=1) != probe.subset(labels, "abc", shots=4, seed=2)
    ).any()


def test_features_that_never_vary_are_harmless():
    train, validation, test = splits()
    wide = [
        probe.Split(np.pad(s.features, ((0, 0), (0, 2)), constant_values=7.0), s.labels) for s in splits()
    ]
    options = {"fractions": (1.0,), "resamples": 0}
    plain, padded = (probe.run(*parts, CLASSES, **options) for parts in ([train, validation, test], wide))
    assert padded.summary()["100 %"]["mean"] == pytest.approx(plain.summary()["100 %"]["mean"])


def test_refusals():
    train, validation, test = splits(groups=True)
    with pytest.raises(DataError, match="class 'a' has 100 training records, 101 are asked for"):
        probe.run(train, validation, test, CLASSES, fractions=(), shots=(101,))
    with pytest.raises(DataError, match="class 'e' has 0 training records"):
        probe.run(train, validation, test, [*CLASSES, "e"])
    leaky = probe.Split(test.features, test.labels, [train.groups[0], *test.groups[1:]])
    with pytest.raises(DataError, match="in the training and the test split"):
        probe.run(train, validation, leaky, CLASSES)
    one = probe.Split(validation.features[::4], validation.labels[::4])
    with pytest.raises(DataError, match="undefined on the validation split"):
        probe.run(train, one, test, CLASSES)
    with pytest.raises(DataError, match="record 2 has features"):
        probe.fit(np.array([[0.0], [1.0], [np.nan]]), np.array([0, 1, 1]), 2)
    with pytest.raises(DataError, match="labels reach"):
        probe.fit(np.zeros((2, 1)), np.array([0, 2]), 2)
    with pytest.raises(DataError, match="shape"):
        probe.fit(np.zeros((2, 1)), np.array([0]), 2)
