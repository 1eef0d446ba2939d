"""Suites on the disk: every layout, the numbers, and everything that can be wrong."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import closed_folder
import numpy as np
import pytest
import sklearn.metrics as sk
import small_model
import suite_tree

from unimed_jax import infer
from unimed_jax.cli import eval as eval_verb
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError
from unimed_jax.evaluate import layouts, report, suite_prompts, suite_run, suites

SETS_21 = [s.name for s in suites.load("unimed21").sets if s.average]
OWN = suite_prompts.load("")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return suite_tree.make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=8)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def whole(folder, tree, tmp_path_factory) -> tuple[Path, dict]:
    """The one command on all 21 sets."""
    out = tmp_path_factory.mktemp("out") / "r"
    flags = ["--suite", "unimed21", "--data-root", str(tree), "--model", str(folder), "--out", str(out)]
    more = ["--ci", "50", "--protocol", "reference", "--prompt-sensitivity", "--batch-size", "32", "--report"]
    assert eval_verb.run([*flags, *more]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_one_command_evaluates_all_21_layouts(whole):
    _, found = whole
    assert list(found["datasets"]) == SETS_21
    assert found["failed"] == []
    assert found["suite"]["complete"]
    for name, s in found["datasets"].items():
        expected = suite_tree.PER_CLASS * len(s["classes"]) + (name == "odir_retina")
        assert s["n"] == expected, name
        assert s["bad"] == 0
        assert set(s["metrics"]["accuracy"]) >= {"value", "low", "high"}
        assert 0 <= s["metrics"]["accuracy"]["low"] <= s["metrics"]["accuracy"]["value"]
    assert found["datasets"]["odir_retina"]["repeated"] == 1
    assert found["datasets"]["odir_retina"]["subjects"] == 9
    assert found["datasets"]["chexpert-5x200"]["subjects"] == 8  # two views of a patient are one subject
    assert found["datasets"]["NCK_CRC"]["left_out"] == {"BACK": 3}


def rows_of(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """True class names and log scores of one set from predictions.csv."""
    with (out / "predictions.csv").open() as f:
        rows = [r for r in csv.DictReader(f) if r["task"] == name]
    return np.array([r["label"] for r in rows]), np.array([json.loads(r["log_scores"]) for r in rows])


@pytest.mark.parametrize("name", SETS_21)
def test_metrics_equal_scikit_learn_on_the_same_scores(whole, name):
    out, found = whole
    s = found["datasets"][name]
    words, logs = rows_of(out, name)
    labels = np.array([s["classes"].index(w) for w in words])
    predicted = logs.argmax(1)
    value = {k: v["value"] for k, v in s["metrics"].items()}
    assert value["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert value["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert value["kappa"] == pytest.approx(sk.cohen_kappa_score(labels, predicted))
    if len(s["classes"]) == 2:
        auroc = sk.roc_auc_score(labels, logs[:, 1] - logs[:, 0])
        assert value["f1"] == pytest.approx(sk.f1_score(labels, predicted, zero_division=0))
    else:
        auroc = np.mean([sk.roc_auc_score(labels == k, logs[:, k]) for k in range(len(s["classes"]))])
    assert value["auroc"] == pytest.approx(auroc, abs=1e-9)


@pytest.mark.parametrize("name", ["rsna_pneumonia", "breast_us", "CT_axial"])
def test_reference_figures_by_a_plain_loop(whole, tree, tiny, name):
    """Cosines of one picture at a time, no logit scale, of RSNA the first prompt only; scikit-learn's figures."""
    _, found = whole
    s = next(x for x in suites.load("unimed21").sets if x.name == name)
    prompts, _ = suite_prompts.task(s, OWN)
    bank = []
    for texts in prompts.classes.values():
        z = tiny.encode_text(list(texts[:1] if name == "rsna_pneumonia" else texts)).astype(float)
        bank.append(z.mean(0) / np.linalg.norm(z.mean(0)))
    rows = layouts.read(s, None, tree).rows
    cosines = np.array([tiny.encode_image([r.path])[0] @ np.array(bank).T for r in rows])
    labels, predicted = np.array([r.label for r in rows]), cosines.argmax(1)
    expected = {"accuracy": sk.accuracy_score(labels, predicted)}
    if s.binary:
        expected["auc_roc"] = sk.roc_auc_score(labels, cosines[:, 1] - cosines[:, 0])
        for key, fn in {
            "f1_score": sk.f1_score,
            "precision_score": sk.precision_score,
            "recall_score": sk.recall_score,
        }.items():
            expected[key] = fn(labels, predicted, zero_division=0)
    got = found["datasets"][name]["reference"]
    assert got == {k: pytest.approx(100 * v) for k, v in expected.items()}


def test_reference_figures_by_hand():
    """Six pictures: 3 of 6 right; of 3 said positive, 2 are; of 4 positives, 2 are found."""
    cosines = np.array([[0.25, 0.5], [0.2, 0.3], [0.5, 0.1], [0.4, 0.3], [0.125, 0.375], [0.6, 0.1]])
    labels = np.array([1, 1, 1, 1, 0, 0])
    got = suite_run.reference_figures(cosines, labels, binary=True)
    # Scores .25 .1 -.4 -.1 of the positives, .25 and -.5 of the negatives: .5 + 4 of 8 pairs.
    assert got == {
        "accuracy": pytest.approx(50),
        "auc_roc": pytest.approx(100 * 4.5 / 8),
        "f1_score": pytest.approx(100 * 4 / 7),
        "precision_score": pytest.approx(100 * 2 / 3),
        "recall_score": pytest.approx(50),
    }
    assert suite_run.reference_figures(cosines, labels, binary=False) == {"accuracy": pytest.approx(50)}
    never = suite_run.reference_figures(cosines[:, ::-1] * [1, 0], np.array([1] * 6), binary=True)
    assert (never["precision_score"], never["auc_roc"]) == (0.0, None)


def test_averages_are_means_over_sets_and_never_mix_metrics(whole):
    _, found = whole
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        values = {k: s["metrics"][metric]["value"] for k, s in found["datasets"].items()}
        mean = found["averages"][metric]["overall"]
        assert mean == {"value": pytest.approx(np.mean(list(values.values()))), "sets": 21}
        ct = found["averages"][metric]["CT"]
        assert ct == {
            "value": pytest.approx(np.mean([values[f"CT_{p}"] for p in ("axial", "coronal", "sagittal")])),
            "sets": 3,
        }
    sizes = {k: m["sets"] for k, m in found["averages"]["accuracy"].items()}
    assert sizes == {
        "overall": 21, "X-ray": 2, "CT": 3, "MRI": 2, "Ultrasound": 2, "Histopathology": 8, "Fundus": 4,
    }  # fmt: skip
    percent = np.mean([s["reference"]["accuracy"] for s in found["datasets"].values()])
    assert found["averages"]["reference_accuracy_percent"]["overall"]["value"] == pytest.approx(percent)


def test_views_of_the_results_are_written(whole):
    out, found = whole
    text = (out / "results.md").read_text()
    assert "| overall | accuracy |" in text
    assert "61.63" in text  # the published average stands beside a complete suite
    assert "order unknown" in text
    assert "mean: overall" in (out / "results.csv").read_text()
    assert not (out / "errors.csv").exists()
    s = found["datasets"]["CT_axial"]["sensitivity"]
    assert s["minimum"] <= s["median"] <= s["maximum"]


def tables(page: str) -> dict[str, list[list[str]]]:
    """The first table below each heading: rows of cells as plain text."""
    out, below = {}, r"<h[23]>([^<]*)</h[23]>(?:(?!<h[23]>).)*?<table>(.*?)</table>"
    for head, table in re.findall(below, page, re.S):
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr")[1:]]
        strip = lambda cell: " ".join(html.unescape(re.sub("<[^>]*>", " ", cell)).split())
        out.setdefault(head, [[strip(c) for c in row] for row in rows])
    return out


def test_the_csv_holds_every_figure_of_the_json(whole):
    out, found = whole
    with (out / "results.csv").open() as f:
        rows = list(csv.DictReader(f))
    before = ["task", "method", "metric", "value", "low", "high", "n", "subjects", "chance"]
    assert list(rows[0]) == [*before, "prompts_sha256", "model_sha256", "code", "modality"]
    assert all(r["modality"] for r in rows)
    by = {(r["task"], r["method"], r["metric"]): r for r in rows}
    close = lambda key, value: float(by[key]["value"]) == pytest.approx(value, rel=1e-5)
    for name, s in found["datasets"].items():
        row = by[name, "model", "accuracy"]
        assert (row["modality"], int(row["n"])) == (s["modality"], s["n"])
        for k, v in s["reference"].items():
            key = (name, "reference protocol", f"reference_{k}_percent")
            assert by[key]["value"] == "" if v is None else close(key, v)
            assert by[key]["modality"] == s["modality"]
        count, metric = s["sensitivity"]["prompts"], s["metric"]
        for k in ("minimum", "median", "maximum"):
            assert close((name, f"{count} single prompts", f"{metric}: {k}"), s["sensitivity"][k])
    for metric, groups in found["averages"].items():
        for group, m in groups.items():
            key = (f"mean: {group}", "model", metric)
            assert close(key, m["value"])
            assert (by[key]["modality"], int(by[key]["n"])) == (group, m["sets"])
    published = [r for r in rows if r["method"] == "published: UniMed-CLIP B/16, README of the original"]
    assert [(r["modality"], r["value"]) for r in published] == [
        *(("overall", "61.63"), ("X-ray", "68.78"), ("CT", "31.23"), ("Fundus", "68.64")),
        ("Histopathology", "59.96"),
        *(("MRI / Ultrasound", "85.54"), ("MRI / Ultrasound", "68.83")),
    ]
    assert {r["metric"] for r in published} == {"accuracy_percent"}
    assert published[-1]["task"] == "mean: MRI / Ultrasound, order unknown"
    first = [r["method"] for r in rows].index("reference protocol")
    assert not any(r["task"] in SETS_21 and r["method"] == "model" for r in rows[first:])  # new rows are last


def test_the_page_has_tables_of_averages_reference_figures_and_single_prompts(whole):
    out, found = whole
    shown = tables((out / "report.html").read_text())
    head, *rows = shown["Averages"]
    groups = ["overall", "X-ray", "CT", "MRI", "Ultrasound", "Histopathology", "Fundus"]
    assert head == ["model", "metric", *groups]
    assert [r[1] for r in rows[:4]] == [
        *("accuracy", "balanced accuracy", "AUROC", "accuracy, percent (reference)")
    ]
    means = found["averages"]["accuracy"]
    assert rows[0][2:] == [f"{means[g]['value']:.3f} {means[g]['sets']} sets" for g in groups]
    percent = found["averages"]["reference_accuracy_percent"]
    assert rows[3][2] == f"{percent['overall']['value']:.2f} 21 sets"
    either = "85.54 or 68.83"
    label = "UniMed-CLIP B/16 published, README of the original"
    figures = ["61.63", "68.78", "31.23", either, either, "59.96", "68.64"]
    assert rows[4] == [label, "accuracy, percent", *figures]
    assert rows[7][2:] == ["62.09", *[""] * 6]  # only the overall average of the large one is published
    head, *rows = shown["By the original's rules, percent"]
    assert head[3:] == ["accuracy", "AUROC", "F1", "precision", "recall"]
    assert [r[0] for r in rows] == SETS_21
    for row in rows:
        r = found["datasets"][row[0]]["reference"]
        assert row[3] == f"{r['accuracy']:.2f}"
        assert row[5] == (f"{r['f1_score']:.2f}" if "f1_score" in r else "")
    _, *rows = shown["One prompt a class at a time"]
    s = found["datasets"]["CT_axial"]
    figures = [f"{s['sensitivity'][k]:.3f}" for k in ("minimum", "median", "maximum")]
    count, whole_value = str(s["sensitivity"]["prompts"]), f"{s['metrics']['accuracy']['value']:.3f}"
    assert ["CT_axial", "accuracy", whole_value, count, *figures] in rows
    assert not {"Not evaluated", "Parts of sets"} & set(shown)


def test_a_part_of_a_suite_says_what_is_missing_and_why(tiny, tree, tmp_path):
    """With parts of a set, without averages of others, and with what to do about the missing one."""
    lacking = suite_tree.Tree(tmp_path / "d").root
    found = collect(tree, ["radimagenet", "breast_us", "PCAM"], places={"PCAM": lacking})
    found.failed[0]["reason"] += " <b>"
    done = suite_run.evaluate(tiny, found, resamples=0)
    done.save(tmp_path / "o")
    parts = next(s.parts for s in done.sets if s.parts)
    with (tmp_path / "o" / "results.csv").open() as f:
        rows = list(csv.DictReader(f))
    got = {r["task"]: r for r in rows if r["task"].startswith("radimagenet: ")}
    assert set(parts) == {"US", "MRI", "CT"}
    assert set(got) == {f"radimagenet: {k}" for k in parts}
    for k, p in parts.items():
        assert float(got[f"radimagenet: {k}"]["value"]) == pytest.approx(p["accuracy"], rel=1e-5)
        assert int(got[f"radimagenet: {k}"]["n"]) == p["n"]
    assert not any(r["method"].startswith("published") for r in rows)
    assert "| radimagenet: US |" in (tmp_path / "o" / "results.md").read_text()
    page = report.render(report.from_run(tmp_path / "o"))
    shown = tables(page)
    assert [[r[1], r[2], r[3]] for r in shown["Parts of sets"][1:]] == [
        [k, str(p["n"]), f"{p['accuracy']:.3f}"] for k, p in parts.items()
    ]
    (row,) = shown["Not evaluated"][1:]
    f = found.failed[0]
    assert row == ["PCAM", "missing", f["reason"], f["remedy"]]
    assert "&lt;b&gt;" in page
    assert "UniMed-CLIP B/16" not in page
    assert "Published averages are not shown" in page
    assert "By the original's rules, percent" not in shown


def test_each_picture_is_embedded_once_in_batches_of_one_size(tiny, tree, monkeypatch):
    calls = []
    whole = tiny.encode_rows
    monkeypatch.setattr(tiny, "encode_rows", lambda x, ids: calls.append(len(x)) or whole(x, ids))
    found = collect(tree, ["skin_cancer", "skin_tumor"])
    done = suite_run.evaluate(tiny, found, resamples=0)
    assert calls == [8] * 6  # 48 pictures, not 60
    assert [t.metrics.n for t in done.tasks] == [48, 12]
    alone = suite_run.evaluate(tiny, collect(tree, ["skin_tumor"]), resamples=0)
    assert alone.tasks[0].metrics.values == done.tasks[1].metrics.values


def test_results_do_not_depend_on_batch_size_or_order(tiny, folder, tree):
    found = collect(tree, ["BACH", "breast_us"])
    small = infer.load(folder, batch_size=5)
    again = dataclasses.replace(found, ready=found.ready[::-1])
    one, two = suite_run.evaluate(tiny, found, resamples=20), suite_run.evaluate(small, again, resamples=20)
    for a, b in zip(one.tasks, two.tasks[::-1], strict=True):
        assert a.metrics.values["accuracy"] == b.metrics.values["accuracy"]
        logs = [[p.log_scores for p in t.predictions] for t in (a, b)]
        np.testing.assert_allclose(*logs, atol=1e-4)


def test_eight_devices_give_the_same_results(tiny, folder, tree, tmp_path):
    """Each batch is shared; a damaged picture is known to all."""
    lists = tree / "damaged"
    for name in ("left/a.png", "right/b.png", "right/c.png"):
        suite_tree.Tree(lists).picture(name)
    (lists / "left" / "z.png").write_bytes(b"broken")
    entry = TWO | {"name": "damaged", "layout": {"kind": "folders", "folder": "damaged"}}
    suite, out = own(tmp_path, entry), tmp_path / "o"
    one = suite_run.evaluate(tiny, collect(tree, suite=str(suite)), resamples=0)
    flags = [
        "--suite",
        str(suite),
        "--data-root",
        str(tree),
        "--model",
        str(folder),
        "--out",
        str(out),
        "--ci",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "eval", *flags, "--allow-bad", "1"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 x cpu" in done.stdout
    _, logs = rows_of(out, "damaged")
    np.testing.assert_allclose(logs, [p.log_scores for p in one.tasks[0].predictions], atol=1e-4)
    assert [b["reason"] for b in one.bad] == ["z.png: is no picture of a known format"]
    assert "z.png" in (out / "errors.csv").read_text()


def collect(root: Path, wanted=(), options=(), source=OWN, suite="unimed21", **more) -> suite_run.Collected:
    chosen = suites.load(suite).choose(wanted, options)
    return suite_run.collect(chosen, source, data_root=root, **more)


def test_sets_beside_the_average_and_options(tree):
    found = collect(tree, ["dr_uwf", "SICAPv2", "radimagenet"])
    assert [len(r.table.rows) for r in found.ready] == [15, 12, 20]
    assert len({r.group for r in found.ready[1].table.rows}) == 6  # blocks of one slide
    assert len(found.ready[2].task.classes) == 165
    once = collect(tree, ["odir_retina"], ["odir_retina:once"]).ready[0].table
    assert (len(once.rows), once.repeated) == (9, 1)
    nine = collect(tree, ["NCK_CRC"], ["NCK_CRC:nine_classes"]).ready[0]
    assert list(nine.task.classes)[:2] == ["ADI", "BACK"]
    assert (len(nine.table.rows), nine.table.left_out) == (27, {})
    test = collect(tree, ["five_retina"], ["five_retina:test_folder"]).ready[0].table
    assert len(test.rows) == 6
    assert all("/test/" in r.key for r in test.rows)
    for wanted, options, text in (
        (["acl"], [], 'Did you mean "acl_mri"'),
        ([], ["odir_retina:twice"], "no option"),
        (["PCAM"], ["odir_retina:once"], "not evaluated"),
    ):
        with pytest.raises(UsageError, match=text):
            collect(tree, wanted, options)


def test_radimagenet_is_scored_by_modality(tiny, tree):
    done = suite_run.evaluate(tiny, collect(tree, ["radimagenet"]), resamples=0)
    parts = done.sets[0].parts
    assert sum(p["n"] for p in parts.values()) == 20
    total = sum(p["n"] * p["accuracy"] for p in parts.values())
    assert total / 20 == pytest.approx(done.tasks[0].metrics.values["accuracy"].value)
    assert done.averages()["accuracy"]["overall"] == {"value": None, "sets": 0}


def test_the_order_does_not_depend_on_the_file_system(tree, monkeypatch):
    found = collect(tree, ["PCAM", "LC25000_lung"])
    walk = layouts.os.walk
    monkeypatch.setattr(
        layouts.os, "walk", lambda p, **k: ((a, b[::-1], c[::-1]) for a, b, c in walk(p, **k))
    )
    again = collect(tree, ["PCAM", "LC25000_lung"])
    assert [r.table.rows for r in again.ready] == [r.table.rows for r in found.ready]


# ---- prompts


def test_built_in_prompts_have_the_classes_of_their_sets_in_order():
    for s in suites.load("unimed21").sets:
        task, words = suite_prompts.task(s, OWN)
        assert tuple(task.classes) == s.classes
        assert words == f"{s.name} version 1"


def test_our_own_prompts_may_be_copied_changed_and_given_back(tmp_path):
    for s in suites.load("unimed21").sets:
        own = json.loads((suite_prompts.FOLDER / f"{s.prompts}.json").read_text())
        first = next(iter(own["classes"]))
        own["classes"][first].append("a prompt of my own")
        (tmp_path / "mine.json").write_text(json.dumps(own))
        task, _ = suite_prompts.task(s, suite_prompts.load(str(tmp_path / "mine.json")))
        assert tuple(task.classes) == s.classes
        assert {k: list(v) for k, v in task.classes.items()} == {k: own["classes"][k] for k in s.classes}


CONSTANTS = b"""
import os
os.system("touch EXECUTED")
breast_us_prompts = {"benign": ["an ultrasound image", "a bright picture"], "malignant": ("a dark picture",)}
NCK_CRC_prompts = {k: [k] for k in open("/etc/passwd")}
BACH_prompts = {"a": ["left"], "b": ["right"]}
RSNA_CLASS_PROMPTS_webdataset = {"Normal": ["normal chest", "x-ray"], "Pneumonia": ["pneumonia", "effusion"]}
Osteo_prompts = {"Normal": ["normal"], "Necrotic": ["dark"], "Tumor": ["tissue"]}
Osteo_prompts = None
five_prompts = {"amd": ["a"], "dr": ["b"], "glaucoma": ["c"], "normal": ["normal"]}
"""


def test_prompts_of_the_original_are_read_and_never_executed(tiny, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constants.py").write_bytes(CONSTANTS)  # it would run a command if it were imported
    source = suite_prompts.load(f"ref:{tmp_path / 'constants.py'}")
    assert not (tmp_path / "EXECUTED").exists()
    assert source.json()["sha256"] == hashlib.sha256(CONSTANTS).hexdigest()
    names = ["breast_us", "rsna_pneumonia", "five_retina", "NCK_CRC", "BACH", "Osteo"]
    chosen = suites.load("unimed21").choose(names, reference=True)
    found = suite_run.collect(chosen, source, data_root=tree)
    assert [r.task.name for r in found.ready] == ["rsna_pneumonia", "breast_us", "five_retina"]
    rsna, breast, five = found.ready
    assert rsna.task.classes == {"Normal": ("normal chest",), "Pneumonia": ("pneumonia",)}
    assert "the first 1 of each class only" in rsna.prompts
    assert breast.task.classes["benign"] == ("an ultrasound image", "a bright picture")
    assert "'amd' as 'age related macular degeneration'" in five.prompts
    reasons = {f["set"]: f["reason"] for f in found.failed}
    assert reasons.keys() == {"NCK_CRC", "BACH", "Osteo"}
    assert "no dict of prompts 'NCK_CRC_prompts'" in reasons["NCK_CRC"]
    assert "has 2 classes, the set BACH has 4" in reasons["BACH"]
    assert suite_run.evaluate(tiny, found, resamples=0).json()["prompts"]["kind"] == "reference"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ref:c.py", b"def f(:", "no Python source"),
        ("ref:c.py", b"x = 1", "no dict of prompts"),
        ("ref:c.py", b"x = " + b"(" * 5000 + b")" * 5000, "no Python source"),
        ("ref:none.py", None, "cannot be read"),
        ("p.json", b"{", "no JSON"),
        ("p.json", b"[]", "holds no prompts"),
        ("p.json", b'{"PCAM": {"a": "b"}}', "'PCAM' is no table"),
        ("p.json", b'{"PCAM": []}', "'PCAM' is no table"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name.removeprefix("ref:")).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        suite_prompts.load(name)


def test_a_prompt_file_goes_by_names(tree, tmp_path):
    table = {"no": ["a normal image"], "yes": ["an effusion"]}
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"acl_mri": dict(reversed(table.items())), "meniscal_mri": {"no": ["x"]}}))
    found = collect(tree, ["acl_mri", "meniscal_mri", "breast_us"], source=suite_prompts.load(str(file)))
    assert found.ready[0].task.classes == {"no": ("a normal image",), "yes": ("an effusion",)}
    assert list(found.ready[0].task.classes) == ["no", "yes"]
    assert "no prompts for yes" in found.failed[0]["reason"]
    assert "breast_us is missing" in found.failed[1]["reason"]


# ---- suites of one's own


def own(tmp_path: Path, *sets: dict) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "sets": list(sets)}))
    return path


TWO = {"name": "two", "modality": "CT", "classes": ["left", "right"], "layout": {"kind": "folders"}}


def csv_set(**layout) -> dict:
    columns = {"kind": "csv", "file": "list.csv", "image": "image", "label": "label"}
    return TWO | {"layout": columns | layout}


def pictures(root: Path, *names: str) -> suite_tree.Tree:
    t = suite_tree.Tree(root)
    for name in names:
        t.picture(name)
    return t


def test_folders_csv_and_npz_of_ones_own(tiny, folder, tmp_path, capsys):
    t = pictures(
        tmp_path / "d", "left/a.png", "left/deep/b.png", "right/c.png", "x/1.png", "x/2.png", "x/3.png"
    )
    t.table(
        "list.csv",
        ["id", "image", "label", "who"],
        [[i, f"x/{i}.png", i % 2, f"p{i % 2}"] for i in (1, 2, 3)],
    )
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "d" / "pneumoniamnist.npz",
        test_images=rng.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        test_labels=np.array([[0], [1], [1], [0], [1]]),
    )
    suite = own(
        tmp_path,
        TWO,
        csv_set(group_columns=["who"]) | {"name": "listed", "labels": "index", "metric": "balanced_accuracy"},
        TWO | {"name": "npz", "labels": "index", "layout": {"kind": "npz", "file": "pneumoniamnist.npz"}},
    )
    out = tmp_path / "o"
    flags = [
        "--suite",
        str(suite),
        "--data-root",
        str(tmp_path / "d"),
        "--model",
        str(folder),
        "--out",
        str(out),
    ]
    with pytest.raises(SomeInputsFailed, match="1 data sets were not evaluated: two"):
        eval_verb.run([*flags, "--ci", "0"])  # the folder x is no class of the first set
    assert "labels that are no class: 'x' x3" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert [(k, s["n"], s["subjects"]) for k, s in found["datasets"].items()] == [
        ("listed", 3, 2),
        ("npz", 5, 5),
    ]
    assert eval_verb.run([*flags, "--force", "--sets", "npz", "--ci", "0"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["a"]}, "at least two"),
        ({"classes": ["a", "A"]}, "more than case"),
        ({"classes": "ab"}, "no list of names"),
        ({"modality": "PET"}, "no modality 'PET'"),
        ({"metric": "f1"}, "metric is 'f1'"),
        ({"clases": ["a", "b"]}, 'Did you mean "classes"'),
        ({"layout": {"kind": "tar"}}, "no kind"),
        ({"layout": {"kind": "csv"}}, "layout.file is missing"),
        ({"layout": {"kind": "folders", "imags": "x"}}, 'Did you mean "images"'),
        ({"layout": {"kind": "folders", "paths": "("}}, "no regular expression"),
        ({"labels": {"l": "leftt"}}, 'Did you mean "left"'),
        ({"labels": [1]}, "labels is no table"),
        ({"prompts": {"left": ["a"]}}, "exactly the classes"),
        ({"name": "../x"}, "the name may hold"),
        ({"average": "yes"}, "average is 'yes'"),
        ({"parts": {"a": [2]}}, "no class"),
        ({"prompts": {"left": "a", "right": ["b"]}}, "no list of texts"),
        ({"options": {"o": {"classes": ["a"]}}}, "at least two"),
    ],
)
def test_bad_suite_files_are_refused(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        suites.load(own(tmp_path, TWO | change))


def test_values_of_any_type_are_taken_or_refused_in_one_line(tmp_path):
    values = [None, True, 1, -1, 1.5, "x", "", [], {}, [None], ["a", "b"], {"a": None}, {"a": ["b"]}, [[1]]]
    refused = 0
    for value in values:
        changes = [{f.name: value} for f in dataclasses.fields(suites.DataSet)]
        changes += [{"layout": TWO["layout"] | {f.name: value}} for f in dataclasses.fields(suites.Layout)]
        for change in changes:
            try:
                suites.load(own(tmp_path, TWO | change))
            except UsageError:
                refused += 1
    assert refused > 300


def test_suites_that_are_none(tmp_path):
    with pytest.raises(UsageError, match='Did you mean "unimed21"'):
        suites.load("unimed12")
    with pytest.raises(UsageError, match="two sets are named"):
        suites.load(own(tmp_path, TWO, TWO))
    (tmp_path / "s.json").write_text('{"name": "x", "name": "y", "sets": []}')
    with pytest.raises(UsageError, match="named twice"):
        suites.load(tmp_path / "s.json")
    with pytest.raises(UsageError, match="cannot be read"):
        suites.load(tmp_path / "none.json")


# ---- bad input


def one(tmp_path: Path, entry: dict) -> suite_run.Collected:
    return collect(tmp_path / "d", suite=str(own(tmp_path, entry)))


def refusal(tmp_path: Path, entry: dict) -> str:
    found = one(tmp_path, entry)
    assert not found.ready
    return f"{found.failed[0]['status']}: {found.failed[0]['reason']}"


def test_missing_sets_are_listed_with_what_to_fetch(folder, tree, tmp_path, capsys):
    root = tmp_path / "part"
    root.mkdir()
    (root / "acl_mri").symlink_to(tree / "acl_mri")
    out = tmp_path / "o"
    flags = ["--suite", "unimed21", "--data-root", str(root), "--model", str(folder), "--out", str(out)]
    with pytest.raises(SomeInputsFailed, match="20 data sets were not evaluated") as e:
        eval_verb.run([*flags, "--ci", "0"])
    assert e.value.exit_code == 4
    printed = capsys.readouterr().out
    for s in suites.load("unimed21").sets:
        assert (s.fetch in printed) == (s.average and s.name != "acl_mri"), s.name
    assert "published averages are not shown" in printed
    found = json.loads((out / "results.json").read_text())
    assert list(found["datasets"]) == ["acl_mri"]
    assert {f["status"] for f in found["failed"]} == {"missing"}
    with pytest.raises(DataError, match="none of the 2 data sets"):
        eval_verb.run([*flags, "--sets", "BACH,PCAM", "--force"])


def test_lists_of_the_original_may_be_anywhere(tree, tmp_path):
    places = {"chexpert-5x200": tree / "chexpert"}
    lists = tree / "local_data"
    chosen = suites.load("unimed21").choose(["chexpert-5x200"])
    found = suite_run.collect(chosen, OWN, places=places, annotations=lists)
    assert len(found.ready[0].table.rows) == 15
    lost = suite_run.collect(chosen, OWN, places=places)
    assert "chexpert-5x200.csv not found" in lost.failed[0]["reason"]
    with pytest.raises(UsageError, match="which is not evaluated"):
        suite_run.collect(chosen, OWN, places={"PCAM": tree})


def test_labels_outside_the_table_refuse_the_set_and_are_all_listed(tmp_path):
    t = pictures(tmp_path / "d", "1.png")
    t.table(
        "list.csv",
        ["image", "label"],
        [["1.png", "left"], ["1.png", "Right"], ["1.png", "up"], ["1.png", "up"]],
    )
    text = refusal(tmp_path, csv_set())
    assert "'up' x2 (list.csv line 4)" in text
    assert "'Right' is 'right' but for case" in text


def test_missing_corrupt_and_leaving_pictures_are_counted_and_listed(tiny, folder, tmp_path):
    t = pictures(tmp_path / "d", "1.png", "2.png")
    (tmp_path / "secret.png").write_bytes((tmp_path / "d" / "1.png").read_bytes())
    (tmp_path / "d" / "cut.png").write_bytes((tmp_path / "d" / "1.png").read_bytes()[:200])
    (tmp_path / "d" / "text.png").write_text("no picture")
    names = [
        "1.png",
        "2.png",
        "none.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "cut.png",
        "text.png",
        "",
    ]
    t.table("list.csv", ["image", "label"], [[n, ("left", "right")[i % 2]] for i, n in enumerate(names)])
    suite, out = own(tmp_path, csv_set()), tmp_path / "o"
    flags = [
        "--suite",
        str(suite),
        "--data-root",
        str(tmp_path / "d"),
        "--model",
        str(folder),
        "--out",
        str(out),
    ]
    with pytest.raises(SomeInputsFailed, match="6 pictures or rows could not be used"):
        eval_verb.run([*flags, "--ci", "0"])
    with (out / "errors.csv").open() as f:
        rows = [(Path(r["file"]).name, r["reason"]) for r in csv.DictReader(f)]
    reasons = [r for _, r in rows]
    assert reasons[:4] == ["no such file", *["the name leaves the folder of the set"] * 3]
    assert rows[4][0] == "cut.png"
    assert "cannot be decoded" in reasons[4]
    assert "no picture of a known format" in reasons[5]
    found = json.loads((out / "results.json").read_text())
    assert (found["datasets"]["two"]["n"], found["datasets"]["two"]["bad"]) == (2, 6)
    assert eval_verb.run([*flags, "--ci", "0", "--force", "--allow-bad", "6"]) == 0
    good = collect(tmp_path / "d", suite=str(suite))
    alone = [tiny.encode_image([r.path])[0] for r in good.ready[0].table.rows[:2]]
    predicted = suite_run.evaluate(tiny, good, resamples=0).tasks[0].predictions
    bank = tiny.text_bank(good.ready[0].task.classes)
    assert [p.predicted for p in predicted] == [TWO["classes"][int((bank @ z).argmax())] for z in alone]


def test_a_set_without_a_readable_picture_does_not_stop_the_rest(tiny, tmp_path):
    pictures(tmp_path / "d", "two/left/1.png", "two/right/2.png")
    for name in ("broken/left/1.png", "broken/right/2.png"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    entry = TWO | {"layout": {"kind": "folders", "folder": "two"}}
    broken = TWO | {"name": "broken", "layout": {"kind": "folders", "folder": "broken"}}
    found = collect(tmp_path / "d", suite=str(own(tmp_path, broken, entry)))
    done = suite_run.evaluate(tiny, found, resamples=0)
    assert [s.data_set.name for s in done.sets] == ["two"]
    assert "none of 2 pictures can be read" in done.failed[0]["reason"]


def test_one_class_only_is_said_and_never_nan(tiny, tmp_path):
    pictures(tmp_path / "d", "left/1.png", "left/2.png")
    found = one(tmp_path, TWO)
    assert "only one class occurs: left" in found.ready[0].table.notes
    done = suite_run.evaluate(tiny, found, protocol="reference", resamples=10)
    stored = json.loads(json.dumps(done.json(), allow_nan=False))
    auroc = stored["datasets"]["two"]["metrics"]["auroc"]
    assert auroc == {"value": None, "low": None, "high": None, "reason": "only one class occurs"}
    assert stored["averages"]["auroc"]["overall"] == {"value": None, "sets": 0}


def test_empty_sets_say_what_was_tried(tmp_path):
    (tmp_path / "d" / "left").mkdir(parents=True)
    assert refusal(tmp_path, TWO) == "refused: two: there are no pictures"
    t = suite_tree.Tree(tmp_path / "d")
    t.table("list.csv", ["image", "label", "split"], [["1.png", "left", "train"]])
    assert "has no rows with split in ['test']" in refusal(tmp_path, csv_set(where={"split": ["test"]}))
    (tmp_path / "d" / "list.csv").write_text("")
    assert "is empty" in refusal(tmp_path, csv_set())
    (tmp_path / "d" / "list.csv").write_text("image,label\n1.png,left\n")
    assert "none of 1 pictures can be used, the first: list.csv line 2: 1.png: no such file" in refusal(
        tmp_path, csv_set()
    )


def test_a_folder_that_cannot_be_listed_does_not_stop_the_rest(tmp_path, monkeypatch):
    pictures(tmp_path / "d", "left/1.png")

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "d cannot be read (Permission denied)" in refusal(tmp_path, TWO)


@pytest.mark.parametrize("closed", ["right", "right/deep"])
def test_a_class_whose_folder_cannot_be_listed_is_never_left_out_in_silence(tmp_path, monkeypatch, closed):
    pictures(tmp_path / "d", "left/1.png", "right/2.png", "right/deep/3.png")
    closed_folder.close(tmp_path / "d" / closed, monkeypatch)
    assert f"{closed} cannot be read (Permission denied)" in refusal(tmp_path, TWO)


def test_lists_in_latin_1_are_read_and_said(tmp_path):
    pictures(tmp_path / "d", "größe.png", "2.png")
    text = "image,label\ngröße.png,left\n2.png,right\n"
    (tmp_path / "d" / "list.csv").write_bytes(text.encode("latin-1"))
    table = one(tmp_path, csv_set()).ready[0].table
    assert [r.key for r in table.rows] == ["größe.png", "2.png"]
    assert table.notes == ["list.csv is not UTF-8 and was read as Latin-1"]
    (tmp_path / "d" / "list.csv").write_bytes(text.encode("utf-8-sig"))
    assert one(tmp_path, csv_set()).ready[0].table.notes == []


def test_the_data_root_may_be_relative(tmp_path, monkeypatch):
    pictures(tmp_path / "d", "1.png", "2.png").table(
        "list.csv", ["image", "label"], [["1.png", "left"], ["2.png", "right"]]
    )
    monkeypatch.chdir(tmp_path / "d")
    chosen = suites.load(own(tmp_path, csv_set()))
    assert len(suite_run.collect(chosen, OWN, data_root=Path(".")).ready[0].table.rows) == 2


def test_duplicate_rows_are_counted_and_contradictions_refused(tmp_path):
    t = pictures(tmp_path / "d", "1.png", "2.png")
    rows = [["1.png", "left"], ["2.png", "right"], ["1.png", "left"]]
    t.table("list.csv", ["image", "label"], rows)
    table = one(tmp_path, csv_set()).ready[0].table
    assert (len(table.rows), table.repeated) == (3, 1)
    assert len({r.group for r in table.rows}) == 2
    t.table("list.csv", ["image", "label"], [*rows, ["./1.png", "right"]])
    assert "pictures have two labels: ./1.png is 'left' and 'right'" in refusal(tmp_path, csv_set())


@pytest.mark.parametrize(
    ("header", "row", "layout", "words"),
    [
        ("image,lable", "1.png,left", {}, "no column 'label'. Did you mean \"lable\""),
        ("image,label", "1.png,left", {"label": 7}, "has 2 columns, column 7"),
        ("image,label", '1.png,"left', {}, "is no CSV"),
        ("image,label", "1.png", {}, "1 columns, 2 are needed"),
        ("image,label", "1.png,left", {"label_list": True}, "'left' is no list of texts"),
        ("image,label", "1.png,__import__('os')", {"label_list": True}, "is no list of texts"),
        ("image,left,right", "1.png,1,1", {"label": ["left", "right"]}, "2 of the label columns are 1"),
        ("image,left,right", "1.png,a,1", {"label": ["left", "right"]}, "not numbers"),
    ],
)
def test_damaged_lists_are_refused_in_words(tmp_path, header, row, layout, words):
    pictures(tmp_path / "d", "1.png")
    (tmp_path / "d" / "list.csv").write_text(f"{header}\n{row}\n")
    assert words in refusal(tmp_path, csv_set(**layout))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"test_images": np.zeros((2, 4, 4), np.uint8)}, "no array test_labels"),
        ({"test_images": np.zeros((2, 4, 4)), "test_labels": np.zeros(2, int)}, "pictures are float64"),
        ({"test_images": np.zeros((2, 4, 4), np.uint8), "test_labels": np.zeros((2, 14), int)}, "labels are"),
        ({"test_images": np.array([{}], object), "test_labels": np.zeros(1, int)}, "cannot be read"),
        ({"test_images": np.zeros((1, 4, 4), np.uint8), "test_labels": np.array([2])}, "no class: '2' x1"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path, arrays, words):
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "x.npz", **arrays)
    entry = TWO | {"labels": "index", "layout": {"kind": "npz", "file": "x.npz"}}
    assert words in refusal(tmp_path, entry)
    (tmp_path / "d" / "x.npz").write_bytes(b"PK\x03\x04broken")
    assert "cannot be read as .npz" in refusal(tmp_path, entry)


def test_the_command_line_refuses_what_does_not_fit(folder, tree, tmp_path):
    base = ["--model", str(folder), "--out", str(tmp_path / "o")]
    for flags, words in (
        ([], "one of --data DIR and --suite NAME"),
        (["--data", "x", "--suite", "unimed21"], "one of --data DIR"),
        (["--data", "x", "--sets", "PCAM"], "--sets belongs to --suite"),
        (["--data", "x", "--protocol", "reference"], "--protocol belongs to --suite"),
        (["--suite", "unimed21", "--tasks", "mri_plane"], "--tasks belongs to --data"),
        (["--suite", "unimed21"], "needs the folder"),
        (["--suite", "unimed21", "--set", "PCAM"], "no NAME=PATH"),
        (["--suite", "unimed21", "--set", "PCAM=a", "--set", "PCAM=b"], "given twice"),
        (["--suite", "unimed21", "--data-root", str(tree), "--allow-bad", "-1"], "at least 0"),
        (["--suite", "unimed21", "--data-root", str(tree), "--prompts", "none.json"], "cannot be read"),
    ):
        with pytest.raises(UsageError) as e:
            eval_verb.run([*base, *flags])
        assert words in e.value.line()
    with pytest.raises(DataError, match="no folder"):
        eval_verb.run([*base, "--suite", "unimed21", "--data-root", str(tmp_path / "none")])
