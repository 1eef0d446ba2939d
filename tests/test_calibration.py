"""Calibration: temperature and Platt's scaling, what they are bound to, and refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import small_model
from PIL import Image
from scipy.special import log_softmax
from sklearn import metrics as oracle
from sklearn.calibration import _sigmoid_calibration

from unimed_jax.cli import calibrate as verb
from unimed_jax.cli import eval as eval_verb
from unimed_jax.cli import predict as predict_verb
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import calibration, calibration_fit, multilabel, results, tasks

MODEL = {"name": "m", "sha256": "ab" * 32, "normalize": "openai", "dtype": "float32"}


def classes(n: int = 400, truth: float = 2.5, seed: int = 0):
    """Logits that are `truth` times too sharp, and labels drawn from the right probabilities."""
    rng = np.random.default_rng(seed)
    right = rng.normal(size=(n, 3)) * 1.5
    labels = (np.exp(log_softmax(right, 1)).cumsum(1) < rng.random((n, 1))).sum(1)
    return log_softmax(truth * right, 1), labels, np.arange(n), [f"r/{i}" for i in range(n)]


def pairs(n: int = 400, seed: int = 0):
    rng = np.random.default_rng(seed)
    right = rng.normal(size=(n, 2)) * 2 - 1
    truth = (multilabel.probability(right) > rng.random((n, 2))).astype(int)
    truth[rng.random((n, 2)) < 0.1] = -1
    return 3 * right + 2, truth, np.arange(n), [f"r/{i}" for i in range(n)]


def test_the_temperature_is_found():
    t = calibration_fit.fit_temperature("a", "p", *classes(4000), resamples=0)
    assert t.temperature == pytest.approx(2.5, rel=0.06)
    log_p, labels, *_ = classes(4000)
    loss = lambda x: -log_softmax(log_p / x, 1)[np.arange(len(labels)), labels].mean()
    assert all(loss(t.temperature) <= loss(t.temperature * f) for f in (0.98, 1.02, 0.5, 2))
    np.testing.assert_allclose(t.apply(log_p), log_softmax(log_p / t.temperature, 1), atol=1e-12)


def test_figures_are_out_of_fold_with_intervals_and_a_paired_change():
    t = calibration_fit.fit_temperature("a", "p", *classes(), resamples=200)
    for k in ("ece", "nll"):
        f = t.figures[k]
        assert f["after"].value < f["before"].value
        assert f["change"].value == pytest.approx(f["after"].value - f["before"].value)
        assert f["change"].low < f["change"].value < f["change"].high < 0
    log_p, labels, *_ = classes()
    assert t.figures["nll"]["before"].value == pytest.approx(oracle.log_loss(labels, np.exp(log_p)))
    inside = oracle.log_loss(labels, np.exp(t.apply(log_p)))
    assert inside < t.figures["nll"]["after"].value < inside + 0.05


def test_scores_that_say_nothing_are_told():
    log_p, labels, subject, keys = classes(200)
    noise = np.random.default_rng(5).permutation(labels)
    t = calibration_fit.fit_temperature("a", "p", 20 * log_p, noise, subject, keys, resamples=0)
    assert t.at_limit == (t.temperature > 99.9)
    assert (
        dataclasses.replace(t, temperature=100.0)
        .text()
        .endswith("the scores say almost nothing about the labels")
    )
    assert dataclasses.replace(t, temperature=2.0).text().endswith("from 200 records of 200 subjects")


def test_subjects_are_never_on_both_sides_of_a_fold():
    log_p, subject = classes(100)[0], np.arange(100) // 10
    seen = []
    calibration_fit._out_of_fold(
        subject,
        0,
        lambda rows, part: seen.append((set(subject[rows]), set(subject[part]))) or log_p[part],
        log_p,
    )
    assert len(seen) == 5
    assert all(not a & b for a, b in seen)
    assert set().union(*(b for _, b in seen)) == set(range(10))


def test_platt_equals_scikit_learn():
    margins, truth, subject, keys = pairs()
    p = calibration_fit.fit_findings("f", "p", ["x", "y"], margins, truth, subject, keys, resamples=50)
    for j, name in enumerate(("x", "y")):
        known = truth[:, j] >= 0
        a, b = _sigmoid_calibration(margins[known, j], truth[known, j])
        fit = p.findings[name]
        assert (fit["scale"], fit["offset"]) == pytest.approx((-a, -b), rel=1e-3)
        q = multilabel.probability(p.apply(margins, ["x", "y"]))[known, j]
        best = max(oracle.f1_score(truth[known, j], q >= cut) for cut in q)
        assert oracle.f1_score(truth[known, j], q >= fit["threshold"]) == pytest.approx(best)
    assert p.figures["brier"]["after"].value < p.figures["brier"]["before"].value
    want = np.mean(
        [
            oracle.brier_score_loss(truth[k, j], multilabel.probability(margins[k, j]))
            for j in range(2)
            for k in [truth[:, j] >= 0]
        ]
    )
    assert p.figures["brier"]["before"].value == pytest.approx(want)


def test_a_threshold_separates_neighbouring_floats():
    p = np.array([0.5, np.nextafter(0.5, 1)])
    assert p[0] < calibration_fit.best_threshold(p, np.array([0, 1])) <= p[1]
    assert calibration_fit.best_threshold(p[:1], np.array([1])) == p[0]


def test_what_cannot_be_fitted_is_refused_or_left_with_the_reason():
    log_p, labels, subject, keys = classes(29)
    with pytest.raises(DataError, match="29 records are too few"):
        calibration_fit.fit_temperature("a", "p", log_p, labels, subject, keys)
    log_p, labels, subject, keys = classes(60)
    with pytest.raises(DataError, match="only one class occurs"):
        calibration_fit.fit_temperature("a", "p", log_p, labels * 0, subject, keys)
    margins, truth, subject, keys = pairs(100)
    truth[:, 1] = np.arange(100) < 9
    p = calibration_fit.fit_findings("f", "p", ["x", "y"], margins, truth, subject, keys, resamples=0)
    assert p.left == {"y": "9 records on one side, 10 are needed"}
    np.testing.assert_array_equal(p.apply(margins, ["x", "y"])[:, 1], margins[:, 1])
    margins[:, 0] *= -1
    with pytest.raises(DataError, match=r"no finding can be calibrated \(x: its scores rank the wrong way"):
        calibration_fit.fit_findings("f", "p", ["x", "y"], margins, truth, subject, keys)


@pytest.fixture
def stored(tmp_path):
    t = calibration_fit.fit_temperature("a", "p1", *classes(60), resamples=10)
    margins, truth, subject, keys = pairs(100)
    p = calibration_fit.fit_findings("f", "p2", ["x", "y"], margins, truth, subject, keys, resamples=10)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(calibration.Calibration(model=MODEL, tasks=(t, p)).json()))
    return path, t, p


def test_a_file_holds_everything_and_belongs_to_model_and_prompts(stored):
    path, t, p = stored
    found = calibration.load(path)
    assert found.tasks == (t, p)
    assert found.for_task("other name", "p2", MODEL) == p
    with pytest.raises(UsageError, match="was fitted for the model abababababab, here it is cdcd"):
        found.for_task("a", "p1", MODEL | {"sha256": "cd" * 32})
    with pytest.raises(UsageError, match="fitted for pixels normalised as openai, here it is half"):
        found.for_task("a", "p1", MODEL | {"normalize": "half"})
    with pytest.raises(UsageError, match="fitted for scores computed in float32, here it is bfloat16") as e:
        found.for_task("a", "p1", MODEL | {"dtype": "bfloat16"})
    assert "--dtype" in e.value.remedy
    with pytest.raises(UsageError, match=r"nothing for a with prompts p3 \(it has: a p1, f p2\)"):
        found.for_task("a", "p3", MODEL)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(version=2),
        lambda r: r["tasks"][0].update(temperature=0),
        lambda r: r["tasks"][0].update(temperature="nan"),
        lambda r: r["tasks"][0].update(kind="isotonic"),
        lambda r: r["tasks"][1]["findings"]["x"].update(scale=-1),
        lambda r: r["tasks"][1].pop("left"),
        lambda r: r.pop("model"),
        lambda r: r["model"].pop("normalize"),
    ],
)
def test_a_damaged_file_is_refused(stored, change):
    path = stored[0]
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="holds no calibration"):
        calibration.load(path)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no calibration"):
        calibration.load(tmp_path / "none.json")
    for text in ("{", "[]", '{"format": "x"}', "[" * 9999):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match="holds no calibration"):
            calibration.load(tmp_path / "x.json")


def test_records_that_were_fitted_on_are_noticed(stored):
    _, t, _ = stored
    log_p, _, _, keys = classes(60)
    with pytest.raises(DataError, match="60 of 60 records were used to fit"):
        calibration.fitted_on(t, keys, log_p, allowed=False)
    assert calibration.fitted_on(t, keys, log_p, allowed=True) == 60
    others = classes(60, seed=1)[0]
    assert calibration.fitted_on(t, keys, others, allowed=False) == 0  # same names, other pictures
    both = np.concatenate([log_p[:2], others[2:]])
    assert calibration.fitted_on(t, keys, both, allowed=False) == 2
    elsewhere = [f"/other/place/{k}" for k in keys]
    assert calibration.fitted_on(t, elsewhere, t.undo(t.apply(log_p)), allowed=True) == 60
    figures = calibration_fit.of_classes(
        log_p, t.apply(log_p), np.arange(60) % 3, range(60), resamples=0, seed=0
    )
    lines = results.change(calibration.applied(t, figures, 60))
    assert lines[0].startswith("ECE 0.")
    assert lines[1] == "IN SAMPLE: 60 of the records were used to fit"
    assert results.change({}) == []


def test_what_was_applied_can_be_undone(stored):
    _, t, p = stored
    log_p, margins = classes(60)[0], pairs(100)[0]
    np.testing.assert_allclose(t.undo(t.apply(log_p)), log_p, atol=1e-12)
    np.testing.assert_allclose(p.undo(p.apply(margins, ["x", "z"]), ["x", "z"]), margins, atol=1e-12)
    sure = np.array([[0.0, -800.0]])  # a saturated score has no sign of its zero
    assert calibration.fingerprints(["a"], sure) == calibration.fingerprints(["a"], -abs(sure))


def test_a_single_subject_is_not_judged_by_itself():
    log_p, labels, subject, keys = classes(60)
    one = calibration_fit.fit_temperature("a", "p", log_p, labels, subject * 0, keys, resamples=10)
    assert (one.subjects, one.figures) == (1, {})
    assert one.text().endswith("60 records of 1 subject")
    margins, truth, subject, keys = pairs(100)
    p = calibration_fit.fit_findings("f", "p", ["x", "y"], margins, truth, subject * 0, keys, resamples=10)
    assert (p.subjects, p.figures) == (1, {})


def test_a_threshold_lies_between_two_records():
    p, truth = np.array([0.9, 0.8, 0.8, 0.3, 0.1]), np.array([1, 1, 0, 1, 0])
    assert calibration_fit.best_threshold(p, truth) == pytest.approx(0.2)
    assert calibration_fit.best_threshold(np.array([0.4, 0.4]), np.array([1, 0])) == pytest.approx(0.4)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, a CSV of pictures with labels that the model half knows, and another."""
    root = tmp_path_factory.mktemp("calibrate")
    model = small_model.loaded(root, batch_size=8)
    model.save(root / "model")
    rng = np.random.default_rng(0)
    for split in ("val", "test"):
        (root / split).mkdir()
        pictures = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
        for i, p in enumerate(pictures):
            Image.fromarray(p).save(root / split / f"{i}.png")
        p = model.classify(pictures, tasks.from_labels(["a", "b"]).classes)[:, 1]
        labels = np.where((p > np.median(p)) ^ (np.arange(48) % 4 == 0), "b", "a")
        rows = [f"{i}.png,{k},{int(k == 'a')},{int(k == 'b')}" for i, k in enumerate(labels)]
        (root / split / "list.csv").write_text("\n".join(["file,label,a,b", *rows]))
    return root


def test_a_csv_is_fitted_and_applied_by_eval(folder, tmp_path, capsys):
    out = tmp_path / "c.json"
    base = [str(folder / "val/list.csv"), "--out", str(out), "--ci", "20"]
    assert verb.run([*base, "--model", str(folder / "model"), "--labels", "a,b"]) == 0
    said = capsys.readouterr().out
    assert "fitted  validation: temperature" in said
    assert "out of fold, by subject: ECE" in said
    fitted = calibration.load(out).tasks[0]
    assert fitted.prompts_sha256 == tasks.from_labels(["a", "b"]).digest
    assert fitted.n == 48
    with pytest.raises(UsageError, match="exists"):
        verb.run([*base, "--model", str(folder / "model"), "--labels", "a,b"])
    suite = {"name": "s", "sets": [{"name": "test", "classes": ["a", "b"], "layout": {"kind": "csv"}}]}
    suite["sets"][0]["layout"] |= {"file": "list.csv", "image": "file", "label": "label"}
    (tmp_path / "s.json").write_text(json.dumps(suite))
    flags = ["--model", str(folder / "model"), "--suite", str(tmp_path / "s.json"), "--ci", "20"]
    flags += ["--calibration", str(out), "--out", str(tmp_path / "o")]
    assert eval_verb.run([*flags, "--data-root", str(folder / "test")]) == 0
    assert "calibr. test: ECE" in capsys.readouterr().out
    stored = json.loads((tmp_path / "o/results.json").read_text())
    task = stored["tasks"][0]
    assert stored["settings"]["calibration"] == calibration.load(out).sha256
    assert task["calibration"]["temperature"] == fitted.temperature
    assert task["calibration"]["figures"]["ece"]["after"]["value"] == pytest.approx(
        task["values"]["ece"]["value"]
    )
    with pytest.raises(DataError, match="48 of 48 records were used to fit"):
        eval_verb.run([*flags, "--data-root", str(folder / "val"), "--force"])
    with pytest.raises(DataError, match="calibrated already"):
        verb.run([str(tmp_path / "o"), "--out", str(tmp_path / "again.json")])
    plain = [f for f in flags if f not in ("--calibration", str(out))]
    plain[plain.index(str(tmp_path / "o"))] = str(tmp_path / "v")
    assert eval_verb.run([*plain, "--data-root", str(folder / "val")]) == 0
    assert (
        verb.run([str(tmp_path / "v"), "--out", str(tmp_path / "again.json"), "--tasks", "test", "--ci", "0"])
        == 0
    )
    again = calibration.load(tmp_path / "again.json").tasks[0]
    assert (again.n, again.prompts_sha256) == (fitted.n, fitted.prompts_sha256)
    assert again.temperature == pytest.approx(fitted.temperature, rel=1e-3)


def test_predict_notices_pictures_that_were_fitted_on(folder, tmp_path, capsys):
    model = ["--model", str(folder / "model"), "--labels", "a,b"]
    verb.run([str(folder / "val/list.csv"), "--out", str(tmp_path / "c.json"), "--ci", "0", *model])
    lists = {k: str(folder / k / "list.csv") for k in ("val", "test")}
    flags = [*model, "--calibration", str(tmp_path / "c.json"), "--ci", "10"]
    assert predict_verb.run([lists["test"], *flags, "--out", str(tmp_path / "t.csv")]) == 0
    assert "IN SAMPLE" not in capsys.readouterr().out
    with pytest.raises(DataError, match="48 of 48 records were used to fit") as e:
        predict_verb.run([lists["val"], *flags, "--out", str(tmp_path / "v.csv")])
    assert "--in-sample" in e.value.remedy
    assert len((tmp_path / "v.csv").read_text().splitlines()) == 49  # scores are not judged by anything
    assert not (tmp_path / "v.metrics.json").exists()
    capsys.readouterr()
    assert predict_verb.run([lists["val"], *flags, "--in-sample", "--out", str(tmp_path / "w.csv")]) == 0
    assert "IN SAMPLE: the calibration was fitted on 48 of 48 pictures" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--in-sample belongs to --calibration"):
        predict_verb.run([lists["val"], *model, "--in-sample", "--out", str(tmp_path / "x.csv")])
    with pytest.raises(UsageError, match="scores computed in float32"):
        predict_verb.run([lists["val"], *flags, "--dtype", "bfloat16", "--out", str(tmp_path / "x.csv")])


def test_findings_of_a_csv_are_fitted(folder, tmp_path, capsys):
    out = tmp_path / "c.json"
    flags = ["--model", str(folder / "model"), "--labels", "b,a", "--multilabel", "--ci", "0", "--json"]
    with contextlib.suppress(DataError):  # a random model may rank both the wrong way round
        assert verb.run([str(folder / "val/list.csv"), "--out", str(out), *flags]) == 0
        found = json.loads(capsys.readouterr().out)["tasks"][0]
        assert found["kind"] == "platt"
        assert set(found["findings"]) | set(found["left"]) == {"a", "b"}
        assert found["prompts_sha256"] == multilabel.from_labels(["b", "a"]).digest


def test_the_command_refuses_what_does_not_fit(folder, tmp_path):
    source, out = str(folder / "val/list.csv"), ["--out", str(tmp_path / "c.json")]
    model = ["--model", str(folder / "model")]
    for flags, words in (
        ([source, *out], "needs --model M and one of"),
        ([source, *out, *model, "--labels", "a,b", "--task", "modality"], "needs --model M and one of"),
        ([source, *out, *model, "--task", "modality", "--modality", "ct"], "belong to --labels"),
        ([source, *out, *model, "--labels", "a,b", "--tasks", "x"], "belongs to a results folder"),
        ([str(folder / "val"), *out, *model], "belongs to a CSV"),
        ([str(tmp_path / "none"), *out], "no folder or CSV"),
    ):
        with pytest.raises(UsageError) as e:
            verb.run(flags)
        assert words in e.value.line()
    with pytest.raises(DataError, match="has no column 'kind'"):
        verb.run([source, *out, *model, "--labels", "a,b", "--label", "kind"])
    with pytest.raises(DataError, match="labels that are no class: 'b' x"):
        verb.run([source, *out, *model, "--labels", "a,c"])
    with pytest.raises(DataError, match="cannot be read"):
        verb.run([str(folder / "val"), *out])
    for flags, words in (
        (["--data", "x", "--in-sample"], "--in-sample belongs to --calibration"),
        (["--data", "x", "--retrieval", "--calibration", "c"], "--calibration is for zero-shot scores"),
    ):
        with pytest.raises(UsageError) as e:
            eval_verb.run([*model, "--out", str(tmp_path / "o"), *flags])
        assert words in e.value.line()
    assert not (tmp_path / "c.json").exists()
