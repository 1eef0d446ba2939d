"""Two evaluations side by side: pairing by key, the interval of the difference, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from unimed_jax.cli import report as verb
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import compare, metrics, results, tallies, tasks

CLASSES = ["heart", "liver", "=kidney"]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def saved(
    folder: Path,
    seed: int,
    *,
    skill: float = 1.5,
    names=("organs",),
    order=None,
    keys=range(60),
    prompt="in a picture",
    relabel: int = -1,
    split_subject: int = -1,
) -> list[results.TaskResult]:
    """Results of a model that does not exist: 60 records of 20 subjects; some of a subject's scores are shared."""
    done = []
    for name in names:
        classes = {c: (f"{c} {prompt}",) for c in CLASSES}
        task = tasks.Task(name=name, classes=classes)
        keys = list(keys)
        labels = np.array([k // 3 % 3 for k in keys])
        labels[[i for i, k in enumerate(keys) if k == relabel]] = 0
        groups = [f"p{k // 3}" if k != split_subject else "other" for k in keys]
        rng, common = np.random.default_rng(seed), np.random.default_rng(99)
        scores = (
            common.normal(size=(200, 3))[keys] + rng.normal(size=(200, 3))[keys] + skill * np.eye(3)[labels]
        )
        logs = log_softmax(scores)
        rows = list(range(len(keys))) if order is None else list(order)
        subject = tallies.codes([groups[i] for i in rows])
        predictions = [
            results.Prediction(
                key=f"list/{keys[i]}",
                label=CLASSES[labels[i]],
                predicted=CLASSES[int(logs[i].argmax())],
                scores=dict(zip(CLASSES, np.exp(logs[i]).tolist(), strict=True)),
                subject=int(g),
                log_scores=tuple(logs[i].tolist()),
            )
            for i, g in zip(rows, subject, strict=True)
        ]
        found = metrics.classification(
            logs, labels, CLASSES, groups, probabilities=np.exp(logs), resamples=200
        )
        done.append(results.TaskResult(task=task, metrics=found, predictions=predictions))
    results.Results(
        model={
            "name": f"model-{seed}",
            "sha256": f"{seed}" * 64,
            "normalize": "openai",
            "dtype": "float32",
            "logit_scale": 10.0,
        },
        data={"sources": {"set": {"split": "test", "records": 60}}, "evaluated": 60},
        code={"version": "0", "revision": "cd" * 20},
        settings={"resamples": 200, "seed": 0, "devices": 1},
        created="2026-01-02T03:04:05+00:00",
        tasks=done,
    ).save(folder)
    return done


def test_differences_are_those_of_the_stored_values(tmp_path):
    a = saved(tmp_path / "a", 1)[0].metrics
    b = saved(tmp_path / "b", 2, skill=0.5, order=reversed(range(60)))[0].metrics
    found = compare.folders(tmp_path / "a", tmp_path / "b")
    task = found["tasks"][0]
    assert (task["n"], task["subjects"], task["notes"]) == (60, 20, [])
    assert list(task["values"]) == list(metrics.ALL)
    for name, v in task["values"].items():
        assert v["this"] == pytest.approx(a.values[name].value, abs=1e-8), name
        assert v["other"] == pytest.approx(b.values[name].value, abs=1e-8), name
        assert v["difference"] == pytest.approx(v["this"] - v["other"], abs=1e-12)
        assert v["low"] < v["high"]
    assert task["values"]["accuracy"]["low"] > 0  # a better model, seen through the pairing
    json.dumps(found, allow_nan=False)


def test_what_only_a_calibration_changes_is_said(tmp_path):
    from unimed_jax.evaluate import calibration, calibration_fit

    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 1)
    path = tmp_path / "b" / "results.json"
    stored = json.loads(path.read_text())
    fit = calibration.Temperature(name="t", prompts_sha256="", temperature=2.0, n=30, subjects=30)
    logs = np.log(np.full((4, 3), 1 / 3))
    figures = calibration_fit.of_classes(logs, logs, np.arange(4) % 3, range(4), resamples=0, seed=0)
    stored["tasks"][0]["calibration"] = calibration.applied(fit, figures, 0)
    path.write_text(json.dumps(stored))
    notes = compare.folders(tmp_path / "a", tmp_path / "b")["tasks"][0]["notes"]
    assert notes == [
        "only other is calibrated: ECE, Brier score, AUROC and average precision change by it, predicted classes do not"
    ]
    assert compare.folders(tmp_path / "b", tmp_path / "b")["tasks"][0]["notes"] == []


def test_the_interval_is_that_of_resampled_subjects_drawn_once_for_both():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(40) % 2, np.repeat(np.arange(10), 4)
    a, b = (rng.normal(size=(40, 2)) + np.eye(2)[labels] for _ in range(2))
    gap = compare.paired([a, b], labels, "ab", groups, resamples=300, seed=5)["accuracy"][2]
    hit = (a.argmax(1) == labels).astype(float) - (b.argmax(1) == labels)
    again, draws = np.random.default_rng(5), []
    for _ in range(300):
        chosen = again.integers(10, size=10)
        draws.append(np.concatenate([hit[groups == g] for g in chosen]).mean())
    assert gap.value == pytest.approx(hit.mean())
    assert [gap.low, gap.high] == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))


def test_equal_predictions_differ_by_exactly_nothing(tmp_path):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 1)
    for v in compare.folders(tmp_path / "a", tmp_path / "b")["tasks"][0]["values"].values():
        assert v["difference"] == v["low"] == v["high"] == 0.0


def test_a_difference_of_something_undefined_says_why():
    scores, labels = [np.eye(2)[[0, 0, 1]], np.eye(2)[[0, 0, 0]]], np.array([0, 0, 1])
    found = compare.paired(scores, labels, ["no", "yes"], resamples=20)
    assert found["precision"][2] == metrics.Value(None, reason="yes is never predicted")
    assert found["ece"][2].reason == "the scores are no probabilities"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": range(57)}, r"3 only here, 0 only there \(first: list/57\)"),
        ({"keys": [*range(59), 63]}, "1 only here, 1 only there"),
        ({"relabel": 5}, "record list/5 is 'liver' here and 'heart' there"),
        ({"split_subject": 4}, "record list/4 belongs to other subjects"),
        ({"names": ("tissue",)}, "no task is in both"),
    ],
)
def test_other_records_are_refused(tmp_path, change, words):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, **change)
    with pytest.raises(DataError, match=words) as e:
        compare.folders(tmp_path / "a", tmp_path / "b")
    assert "\n" not in str(e.value)


def test_damaged_or_old_predictions_are_refused(tmp_path):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2)
    path = tmp_path / "b" / "predictions.csv"
    rows = list(csv.DictReader(path.open()))
    old = ("task", "key", "label", "predicted", "score")
    path.write_text(results.to_csv(rows, old))
    with pytest.raises(DataError, match="has no column 'subject'"):
        compare.folders(tmp_path / "a", tmp_path / "b")
    rows[7]["log_scores"] = "[-1.0, -2"
    path.write_text(results.to_csv(rows, results.PREDICTED))
    with pytest.raises(DataError, match="does not hold 3 log_scores"):
        compare.folders(tmp_path / "a", tmp_path / "b")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        compare.folders(tmp_path / "a", tmp_path / "b")


def test_the_verb_prints_and_writes(tmp_path, capsys):
    pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
    saved(tmp_path / "a", 1, names=("organs", "tissue"))
    saved(tmp_path / "run" / "eval" / "step_3", 2, skill=0.5, prompt="seen", names=("organs", "stain"))
    words = [str(tmp_path / "a"), "--compare", str(tmp_path / "run")]
    assert verb.run(words) == 0
    text = capsys.readouterr().out
    task = compare.folders(tmp_path / "a", tmp_path / "run/eval/step_3")["tasks"][0]
    v = task["values"]["balanced_accuracy"]
    assert f"{v['difference']:+.3f}" in text
    assert f"[{v['low']:+.3f} {v['high']:+.3f}]  60  20" in text
    assert "note    organs: the prompts differ" in text
    assert "note    only in this: tissue" in text
    assert "note    only in other: stain" in text
    page = (tmp_path / "a" / "comparison.html").read_text()
    assert "Compared with model-2" in page
    assert f"{v['difference']:+.3f}" in page
    with pytest.raises(UsageError, match="exists"):
        verb.run(words)
    assert verb.run([*words, "--json", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0] == task
    with pytest.raises(UsageError, match="--compare"):
        verb.run([str(tmp_path / "a"), "--json", "--force"])
    with pytest.raises(UsageError, match="no folder"):
        verb.run([str(tmp_path / "a"), "--compare", str(tmp_path / "none"), "--force"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no results\.json"):
        verb.run([str(tmp_path / "a"), "--compare", str(tmp_path / "empty"), "--force"])
