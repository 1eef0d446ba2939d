"""ROC curves and reliability: equal to scikit-learn's, thinned without loss, and drawn on the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as oracle

from unimed_jax.evaluate import curves, metrics, plots, report, results, tasks

pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
pytest.importorskip("matplotlib", reason='pip install "unimed-jax[report]"')


def made(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + truth, 2 if n > 200 else 1), truth


def test_a_short_curve_is_exact():
    scores, truth = made(60)
    rate, sensitivity, _ = oracle.roc_curve(truth, scores, drop_intermediate=False)
    found = curves.roc("x", scores, truth)
    np.testing.assert_allclose(found.rate, rate)
    np.testing.assert_allclose(found.sensitivity, sensitivity)


def test_a_long_curve_keeps_its_area_and_starts_at_the_origin():
    scores, truth = made(5000)
    found = curves.roc("x", scores, truth)
    assert len(found.rate) == 102
    assert (found.rate[0], found.sensitivity[0], found.sensitivity[-1]) == (0, 0, 1)
    assert (np.diff(found.sensitivity) >= 0).all()
    assert oracle.auc(found.rate, found.sensitivity) == pytest.approx(
        oracle.roc_auc_score(truth, scores), abs=0.005
    )


def test_the_calibration_error_is_the_distance_in_the_diagram():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet([1, 1, 1], 300))
    labels = rng.integers(0, 3, 300)
    chosen = log_p.argmax(1)
    found = curves.reliability(np.exp(log_p.max(1)), chosen == labels)
    ece = (np.abs(found.confidence - found.frequency) * found.share).sum()
    m = metrics.classification(log_p, labels, list("abc"), probabilities=np.exp(log_p), resamples=0)
    assert ece == pytest.approx(m.values["ece"].value)
    assert found.share.sum() == pytest.approx(1)


def folder(tmp_path, classes: int, n: int):
    """Results of a model that does not exist, with predictions."""
    names = [f"class {k}" for k in range(classes - 1)] + ["<b>$last$</b>"]
    task = tasks.Task(name="many", classes={c: (f"a {c}",) for c in names}, metric="accuracy")
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    logits = rng.normal(size=(n, classes)) + 3 * np.eye(classes)[labels]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = metrics.classification(log_p, labels, names, probabilities=np.exp(log_p), resamples=0)
    rows = [
        results.Prediction(
            key=f"r/{i}",
            label=names[labels[i]],
            predicted=names[int(x.argmax())],
            scores=dict(zip(names, np.exp(x).tolist(), strict=True)),
            subject=i,
            log_scores=tuple(x.tolist()),
        )
        for i, x in enumerate(log_p)
    ]
    whole = results.Results(
        model={
            "name": "m",
            "sha256": "ab" * 32,
            "normalize": "openai",
            "dtype": "float32",
            "logit_scale": 1.0,
        },
        data={"sources": {"s": {"split": "test", "records": n}}, "evaluated": n},
        code={"version": "0", "revision": ""},
        settings={"resamples": 0, "seed": 0},
        created="2026-01-01T00:00:00+00:00",
        tasks=[results.TaskResult(task=task, metrics=found, predictions=rows)],
    )
    return whole.save(tmp_path / "out"), found


@pytest.mark.parametrize(("classes", "lines"), [(2, 1), (5, 5), (30, 30)])
def test_the_page_draws_every_task(tmp_path, classes, lines):
    out, found = folder(tmp_path, classes, 150)
    drawn = curves.of_folder(out, results.read(out))["many"]
    assert len(drawn.roc) == lines
    areas = [oracle.auc(c.rate, c.sensitivity) for c in drawn.roc]
    assert np.mean(areas) == pytest.approx(found.values["auroc"].value, abs=0.01)
    text = report.render(report.from_run(out))
    assert text.count("<figure>") == 2
    assert "Reliability of the predicted class" in text
    assert "<b>$last$" not in text
    assert ("Most frequent confusions" in text) == (classes > report.LARGE)
    assert ("mean of 30, band" in text) == (classes == 30)


def test_a_page_without_predictions_has_no_curves(tmp_path):
    out, _ = folder(tmp_path, 3, 30)
    (out / "predictions.csv").write_text("task,key\n")
    assert curves.of_folder(out, results.read(out)) == {}
    assert "<figure>" not in report.render(report.from_run(out))


def test_a_large_matrix_is_a_mask_of_shares():
    shares = np.eye(30)
    shares[0, 1] = 0.25
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(plots.heat(shares)))))
    assert found.shape == (30, 30, 4)
    assert (found[0, 0, 3], found[0, 1, 3], found[1, 0, 3]) == (255, 128, 0)
