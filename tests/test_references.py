"""Nearest-neighbour references against a plain loop, and the leak they are there to show."""

from __future__ import annotations

import numpy as np

from unimed_jax.evaluate import references


def test_nearest_neighbour_equals_a_loop():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 7)), rng.normal(size=(25, 7))
    labels = rng.integers(0, 4, 40)
    got = references.nearest_neighbour(train, labels, test, 5).argmax(1)
    cosine = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in train] for a in test]
    assert got.tolist() == [int(labels[int(np.argmax(row))]) for row in cosine]


def test_a_class_without_training_rows_is_never_predicted():
    scores = references.nearest_neighbour(np.eye(3), np.array([0, 0, 2]), -np.eye(3), 3)
    assert 1 not in scores.argmax(1)


def test_thumbnails_ignore_brightness_but_not_content():
    ramp = np.tile(np.linspace(0, 200, 64).astype(np.uint8), (64, 1))
    images = np.stack([np.repeat(x[..., None], 3, -1) for x in (ramp, ramp + 50, ramp.T.copy())])
    rows = references.thumbnails(images)
    assert rows[0] @ rows[1] > 0.999
    assert rows[0] @ rows[2] < 0.5


def test_a_random_split_over_slices_pretends_a_score():
    """Labels are random by subject: nothing can be learnt, yet the leaky split scores high."""
    rng = np.random.default_rng(1)
    subject = np.repeat(np.arange(30), 10)
    features = rng.normal(size=(30, 16))[subject] + 0.05 * rng.normal(size=(300, 16))
    labels = rng.integers(0, 2, 30)[subject]
    leaky = references.leaky_split(features, labels, ["a", "b"]).values["balanced_accuracy"].value
    held_out = subject % 3 == 0
    honest = references.nearest_neighbour_metrics(
        features[~held_out],
        labels[~held_out],
        features[held_out],
        labels[held_out],
        ["a", "b"],
        subject[held_out],
    )
    assert leaky is not None
    assert leaky > 0.95
    assert honest.values["balanced_accuracy"].value < 0.8
    assert honest.subjects == 10
