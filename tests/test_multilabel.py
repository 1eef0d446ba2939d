"""Findings: files, truth with gaps, scores of prompt pairs, and metrics equal to scikit-learn's."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import small_model
from PIL import Image
from sklearn import metrics as oracle

from unimed_jax.data.record import Example
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import (
    calibrate,
    compare,
    findings_truth,
    multilabel,
    multilabel_metrics,
    report,
    stored,
    tasks,
    zeroshot,
)

PAIRS = {
    "effusion": {"positive": ["effusion"], "negative": ["no effusion", "clear"]},
    "nodule": {"positive": ["nodule", "spot"], "negative": ["no nodule"]},
}


def task(**changes) -> multilabel.Findings:
    pairs = {k: multilabel.Pair(tuple(v["positive"]), tuple(v["negative"])) for k, v in PAIRS.items()}
    return dataclasses.replace(multilabel.Findings(name="chest", findings=pairs), **changes)


def records(*labels: tuple[str, ...]) -> dict[int, Example]:
    return {
        i: Example(
            key=f"r/{i}",
            image=b"",
            image_format="png",
            height=1,
            width=1,
            captions=(),
            labels=x,
            modality="X-ray",
        )
        for i, x in enumerate(labels)
    }


# ---- files


def test_built_in_tasks_are_well_formed():
    for name in multilabel.names():
        t = multilabel.load(name)
        assert t.name == name
        assert t.description
        for pair in t.findings.values():
            assert min(len(pair.positive), len(pair.negative)) >= 4
            assert not set(pair.positive) & set(pair.negative)
    assert not set(multilabel.names()) & set(tasks.names())


def test_a_plain_file_of_pairs_is_a_task(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PAIRS))
    assert multilabel.is_multilabel(path)
    t = multilabel.load(path)
    assert (t.name, t.shape(), t.label) == ("mine", "2x(1-2+1-2)", "labels:finding")
    assert t.prompts == ("effusion", "no effusion", "clear", "nodule", "spot", "no nodule")
    path.write_text(json.dumps({"a": ["x"], "b": ["y"]}))
    assert not multilabel.is_multilabel(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"findings": {}}, "no table of findings"),
        ({"findings": []}, "no table of findings"),
        ({"findings": PAIRS, "where": []}, "where is no table"),
        ({"findings": PAIRS, "metrik": "auroc"}, "Did you mean"),
        ({"findings": PAIRS, "metric": "accuracy"}, "metric is 'accuracy'"),
        ({"findings": PAIRS, "unlisted": "negative"}, "unlisted is 'negative'"),
        ({"findings": PAIRS, "version": "1"}, "version is '1'"),
        ({"findings": PAIRS, "none": ["nodule"]}, "is a finding, and one of none"),
        ({"findings": PAIRS, "uncertain": "labels:finding"}, "must differ"),
        ({"findings": PAIRS, "label": "modality"}, "label is 'modality'"),
        ({"findings": PAIRS, "where": {"organ": "x"}}, "where has no field"),
        ({"a": {"positive": ["x"]}}, "no positive and negative prompts"),
        ({"a": {"positive": ["x"], "negative": []}}, "no negative prompts"),
        ({"a": {"positive": ["x"], "negative": ["x"]}}, "on both sides"),
        ({"a": {"positive": "x", "negative": ["y"]}}, "no list of texts"),
        ({"a": PAIRS["nodule"], "A": PAIRS["effusion"]}, "differ by case"),
    ],
)
def test_a_wrong_file_is_refused_with_its_field(tmp_path, raw, words):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"t\.json") as e:
        multilabel.load(path)
    assert words in e.value.line()


def test_unknown_names_and_labels_given_twice_are_refused():
    with pytest.raises(UsageError, match='Did you mean "chest_findings'):
        multilabel.load("chest_finding")
    with pytest.raises(UsageError, match="twice"):
        multilabel.from_labels(["a", "a"])
    with pytest.raises(UsageError, match="no modality"):
        multilabel.from_labels(["a"], modality="photo")


def test_the_digest_covers_sides_and_order():
    t = task()
    pairs = t.findings
    swapped = {k: multilabel.Pair(p.negative, p.positive) for k, p in pairs.items()}
    others = [swapped, dict(reversed(pairs.items())), {"effusion": pairs["effusion"]}]
    assert len({t.digest, *(task(findings=f).digest for f in others)}) == 4
    assert task(metric="average_precision").digest == t.digest


# ---- truth


def test_truth_is_present_absent_or_unknown_and_gaps_are_stated():
    t = task(
        absent="labels:no", uncertain="labels:maybe", unlisted="unknown", none=("normal",), ignore=("device",)
    )
    rows = records(
        ("finding:effusion", "maybe:nodule"),
        ("finding:normal",),
        ("no:effusion", "finding:device"),
        ("plane:axial",),
        ("finding:device",),
    )
    picked, truth = findings_truth.select(t, rows)
    assert picked == [0, 1, 2]
    assert truth.truth.tolist() == [[1, -1], [0, 0], [0, -1]]
    assert truth.notes == (
        "1 findings that records do not list count as unknown",
        "2 records without any label of the task are left out",
    )
    _, closed = findings_truth.select(dataclasses.replace(t, unlisted="absent"), rows)
    assert closed.truth.tolist() == [[1, -1], [0, 0], [0, 0]]
    assert "count as absent" in closed.notes[0]


def test_labels_that_contradict_or_are_no_finding_are_refused():
    t = task(absent="labels:no", none=("normal",))
    with pytest.raises(DataError, match="says two things about 'nodule'"):
        findings_truth.select(t, records(("finding:nodule", "no:nodule")))
    with pytest.raises(DataError, match="says that it has none"):
        findings_truth.select(t, records(("finding:nodule", "finding:normal")))
    with pytest.raises(DataError, match="no finding: 'Nodule' x2, 'mass' x1"):
        findings_truth.select(t, records(("finding:Nodule",), ("finding:Nodule", "finding:mass")))
    with pytest.raises(DataError, match="none of 1 records"):
        findings_truth.select(
            dataclasses.replace(t, where={"modality": ("CT",)}), records(("finding:nodule",))
        )


# ---- scores


def test_the_probability_is_the_softmax_over_the_pair():
    t, rng = task(), np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    vectors = {p: unit(rng.normal(size=6)) for p in t.prompts}
    z = unit(rng.normal(size=(5, 6)))
    got = multilabel.probability(multilabel.margins(t, z, vectors, 20.0))
    for j, pair in enumerate(t.findings.values()):
        sides = [unit(np.mean([vectors[p] for p in side], 0)) for side in (pair.positive, pair.negative)]
        odds = np.exp(20.0 * z @ np.stack(sides).T)
        np.testing.assert_allclose(got[:, j], odds[:, 0] / odds.sum(1), atol=1e-6)


# ---- metrics


def made(n: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 3)) < [0.3, 0.5, 0.1]).astype(int)
    margin = np.round(rng.normal(size=(n, 3)) + 1.5 * truth - 1, 1)  # with ties
    truth[rng.random((n, 3)) < 0.2] = -1
    return margin, multilabel.probability(margin), truth


def test_metrics_equal_scikit_learn():
    margin, p, truth = made()
    names = ["a", "b", "c"]
    cuts = {"a": 0.35, "b": 0.6, "c": 0.2}
    found = multilabel_metrics.findings(p, truth, names, margins=margin, thresholds=cuts, resamples=0)
    for j, name in enumerate(names):
        rows = truth[:, j] >= 0
        y, q = truth[rows, j], p[rows, j]
        f = found.findings[name]
        assert (f.n, f.positives, f.unknown) == (rows.sum(), y.sum(), (~rows).sum())
        want = {
            "auroc": oracle.roc_auc_score(y, q),
            "average_precision": oracle.average_precision_score(y, q),
            "brier": oracle.brier_score_loss(y, q),
        }
        for ending, cut in (("", 0.5), ("_chosen", cuts[name])):
            said = q >= cut
            want[f"f1{ending}"] = oracle.f1_score(y, said)
            want[f"sensitivity{ending}"] = oracle.recall_score(y, said)
            want[f"specificity{ending}"] = oracle.recall_score(1 - y, ~said)
        edges = np.ceil(q * 15) - 1
        want["ece"] = sum(
            abs(q[edges == k].mean() - y[edges == k].mean()) * (edges == k).mean() for k in np.unique(edges)
        )
        for k, v in want.items():
            assert f.values[k].value == pytest.approx(v, abs=1e-12), k
    for k, v in found.values.items():
        mean = np.mean([f.values[k].value for f in found.findings.values()])
        assert v.value == pytest.approx(mean)


def test_intervals_resample_subjects_together_for_all_findings():
    margin, p, truth = made(120)
    groups = np.arange(120) // 4
    names = ["a", "b", "c"]
    found = multilabel_metrics.findings(p, truth, names, groups, margins=margin, resamples=200, seed=3)
    rng = np.random.default_rng(3)
    means = []
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(30, size=30)])
        areas = []
        for j in range(3):
            known = rows[truth[rows, j] >= 0]
            if 0 < truth[known, j].sum() < len(known):
                areas.append(oracle.roc_auc_score(truth[known, j], p[known, j]))
        means.append(np.mean(areas))
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found.values["auroc"].low, found.values["auroc"].high) == pytest.approx((low, high))
    assert found.findings["a"].delong is None  # four records a subject
    assert multilabel_metrics.findings(p, truth, names, resamples=0).findings["a"].delong is not None


def test_what_is_unknown_or_undefined_is_said():
    truth = np.array([[1, -1, 1], [0, -1, 1], [1, -1, -1], [0, -1, 1]])
    p = np.full((4, 3), 0.4)
    found = multilabel_metrics.findings(p, truth, ["a", "b", "c"], resamples=50)
    assert found.findings["b"].values["auroc"].reason == "no record where it is known"
    assert found.findings["c"].values["auroc"].reason == "only one class occurs"
    assert found.findings["c"].values["average_precision"].value is None
    assert found.values["auroc"].value == 0.5  # of the only finding that has one
    assert "unknown and left out, not counted as absent: b 4, c 1" in found.notes
    assert "without AUROC, only one class occurs: b, c" in found.notes
    empty = multilabel_metrics.findings(np.zeros((0, 1)), np.zeros((0, 1), int), ["a"], resamples=9)
    assert all(v.value is None and v.reason for v in empty.values.values())


def test_shapes_and_probabilities_are_checked():
    good, truth = np.full((2, 1), 0.5), np.zeros((2, 1), int)
    for args in (
        (good, truth, ["a", "b"]),
        (good + 1, truth, ["a"]),
        (good, truth + 2, ["a"]),
        (good, truth, ["a"], [1]),
    ):
        with pytest.raises(DataError, match="metrics"):
            multilabel_metrics.findings(*args)


# ---- the evaluator


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=8)


class Records(list):
    name = "list"


def pictures(n: int) -> Records:
    """Random pictures; every other one has an effusion, every third a nodule, three subjects each."""
    out = Records()
    for i in range(n):
        image = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(
            image, "PNG"
        )
        labels = (("finding:effusion",) if i % 2 else ()) + (("finding:nodule",) if i % 3 == 0 else ())
        fields = {"key": f"list/{i}", "image": image.getvalue(), "modality": "X-ray", "patient": f"p{i // 3}"}
        out.append(Example(**fields, labels=labels or ("finding:normal",)))
    return out


def test_an_evaluation_has_both_kinds_and_a_calibration_belongs_to_it(tiny, tmp_path):
    t = task(none=("normal",), where={"modality": ("X-ray",)}, metric="average_precision")
    single = tasks.Task(name="kind", classes={"X-ray": ("x-ray",), "CT": ("ct",)})
    records = pictures(36)
    first = zeroshot.evaluate(tiny, records, t, resamples=0).findings[0].margins
    high = (first > np.median(first, 0)) ^ (np.arange(36) % 5 == 0)[:, None]  # something to find, with errors
    for i, e in enumerate(records):
        labels = [f"finding:{k}" for k, yes in zip(t.findings, high[i], strict=True) if yes]
        records[i] = dataclasses.replace(e, labels=tuple(labels) or ("finding:normal",))
    found = zeroshot.evaluate(tiny, records, [t, single], resamples=20)
    f = found.findings[0]
    assert [x.task.name for x in found.tasks] == ["kind"]
    vectors = dict(zip(t.prompts, tiny.encode_text(t.prompts), strict=True))
    z = tiny.encode_image([Image.open(io.BytesIO(e.image)) for e in records])
    np.testing.assert_allclose(f.margins, multilabel.margins(t, z, vectors, tiny.logit_scale), atol=1e-3)
    y = f.truth[:, 0]
    assert f.metrics.findings["effusion"].values["auroc"].value == pytest.approx(
        oracle.roc_auc_score(y, f.margins[:, 0])
    )
    assert found.figures()["eval/chest"] == f.main.value
    seen = [e for e in f.examples if e["hit"]]
    assert [e["hit"] for e in f.examples] == [True] * len(seen) + [False] * (len(f.examples) - len(seen))
    assert len({e["key"] for e in f.examples}) == len(f.examples) <= 12
    for e in f.examples:
        row = int(e["key"].removeprefix("list/"))
        name = e["label"].removeprefix("no ")
        there = high[row, list(t.findings).index(name)]
        assert e["label"] == (name if there else f"no {name}")
        assert (e["label"] == e["predicted"]) == e["hit"]
        assert (e["scores"][name] >= 0.5) == (not e["predicted"].startswith("no "))
    found.save(tmp_path / "a")
    again = stored.scored_findings("chest", stored.findings(tmp_path / "a")["chest"], ["effusion", "nodule"])
    np.testing.assert_allclose(again.margins, f.margins, rtol=1e-8)
    np.testing.assert_array_equal(again.truth, f.truth)
    np.testing.assert_array_equal(again.subjects, np.arange(36) // 3)
    text = (tmp_path / "a/results.md").read_text()
    assert "chest: mean" in text
    assert f"| nodule | 36 | {high[:, 1].sum()} |" in text
    fitted = calibrate.from_results(tmp_path / "a", ["chest"], resamples=5)
    with pytest.raises(DataError, match="36 of 36 records were used to fit"):
        zeroshot.evaluate(tiny, records, t, resamples=0, calibrated=fitted)
    with pytest.raises(UsageError, match="nothing for kind"):
        zeroshot.evaluate(tiny, records, single, resamples=0, calibrated=fitted)
    flattering = zeroshot.evaluate(tiny, records, t, resamples=5, calibrated=fitted, in_sample=True)
    after = flattering.findings[0]
    assert after.calibrated["fitted_here"] == 36
    assert "f1_chosen" in after.metrics.values
    assert after.metrics.values["auroc"].value == pytest.approx(f.metrics.values["auroc"].value)
    flattering.save(tmp_path / "b")
    assert "IN SAMPLE" in (tmp_path / "b/results.md").read_text()
    both = compare.folders(tmp_path / "a", tmp_path / "b")
    assert [t["name"] for t in both["tasks"]] == ["chest"]
    assert both["only_this"] == ["kind"]
    values = both["tasks"][0]["values"]
    assert values["auroc"]["difference"] == pytest.approx(0, abs=1e-9)
    gap = f.metrics.values["brier"].value - after.metrics.values["brier"].value
    assert values["brier"]["difference"] == pytest.approx(gap, abs=1e-6)
    assert values["brier"]["low"] < gap < values["brier"]["high"]
    assert "average_precision" in compare.table(both)
    assert report.compared(both)["tables"][0]["rows"][0]["name"] == "average precision"
    with pytest.raises(DataError, match="calibrated already"):
        calibrate.from_results(tmp_path / "b")
    with pytest.raises(UsageError, match="has no task 'x'"):
        calibrate.from_results(tmp_path / "a", ["x"])
    assert zeroshot.evaluate(tiny, records, single, resamples=0).findings == []


def test_a_damaged_list_of_findings_is_refused(tiny, tmp_path):
    t = task(none=("normal",))
    zeroshot.evaluate(tiny, pictures(4), t, resamples=0).save(tmp_path)
    rows = stored.findings(tmp_path)["chest"]
    for bad in (
        rows[:-1],
        rows[::-1],
        [rows[0] | {"truth": "2"}, *rows[1:]],
        [rows[0] | {"margin": "x"}, *rows[1:]],
    ):
        with pytest.raises(DataError, match=r"findings.csv is damaged"):
            stored.scored_findings("chest", bad, ["effusion", "nodule"])
