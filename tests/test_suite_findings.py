"""Multi-label sets of a suite, and suites in YAML."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_model
from PIL import Image
from sklearn import metrics as oracle

from unimed_jax.cli import eval as eval_verb
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError
from unimed_jax.evaluate import calibrate, layouts, results, suite_prompts, suite_run, suites, yaml_text

N = 40
PAIRS = {
    "effusion": {"positive": ["effusion"], "negative": ["normal chest"]},
    "nodule": {"positive": ["dark left chest", "a b c"], "negative": ["bright right chest"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The same pictures as MedMNIST's file, as a CSV with a column a finding, and as one with lists."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N, 28, 28), dtype=np.uint8)
    truth = np.stack([np.arange(N) % 2, np.arange(N) // 2 % 2], 1)
    np.savez(root / "mnist.npz", test_images=pictures, test_labels=truth.astype(np.uint8))
    for i, p in enumerate(pictures):
        Image.fromarray(p).save(root / f"{i}.png")
    cells = truth.astype(str).astype(object)
    cells[0, 0], cells[1, 1], cells[2, 1] = "", "-1", "1.0"
    _write(
        root / "columns.csv",
        ["file", "eff", "nod", "patient_id"],
        [[f"{i}.png", *c, i // 2] for i, c in enumerate(cells)],
    )
    said = [
        "|".join(n for n, y in zip(("Effusion", "Nodule"), t, strict=True) if y) or "No Finding"
        for t in truth
    ]
    _write(root / "lists.csv", ["file", "labels"], [[f"{i}.png", s] for i, s in enumerate(said)])
    return root


def _write(path: Path, header, rows) -> None:
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def entry(**changes) -> dict:
    base = {
        "name": "chest",
        "modality": "X-ray",
        "multilabel": True,
        "classes": list(PAIRS),
        "prompts": PAIRS,
    }
    return base | {"layout": {"kind": "npz", "file": "mnist.npz"}} | changes


COLUMNS = {"kind": "csv", "file": "columns.csv", "image": "file", "label": ["eff", "nod"]}
COLUMNS |= {"group_columns": ["patient_id"]}
LISTS = {"kind": "csv", "file": "lists.csv", "image": "file", "label": "labels"}
LISTS |= {"separator": "|", "none": ["No Finding"]}


def suite(tmp_path: Path, *entries: dict) -> suites.Suite:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "sets": entries}))
    return suites.load(path).choose()


def test_three_layouts_say_the_same(tiny, root, tmp_path):
    labels = {"Effusion": "effusion", "Nodule": "nodule"}
    sets = (
        entry(),
        entry(name="columns", layout=COLUMNS | {"blank": "absent"}),
        entry(name="lists", layout=LISTS, labels=labels, metric="average_precision"),
    )
    found = suite_run.collect(suite(tmp_path, *sets), suite_prompts.load(""), data_root=root)
    assert not found.failed
    done = suite_run.evaluate(tiny, found, resamples=10, sensitivity=True)
    npz, columns, lists = done.findings
    assert done.tasks == []
    np.testing.assert_allclose(npz.margins, lists.margins, atol=2e-3)
    np.testing.assert_array_equal(npz.truth, lists.truth)
    assert columns.truth[0, 0] == 0
    assert columns.truth[1, 1] == -1
    assert (columns.truth == npz.truth).sum() == 2 * N - 1
    assert columns.metrics.subjects == N // 2
    assert "1 blank cells count as absent" in done.sets[1].notes
    assert "unknown and left out, not counted as absent: nodule 1" in columns.metrics.notes
    areas = [oracle.roc_auc_score(npz.truth[:, j], npz.margins[:, j]) for j in range(2)]
    assert npz.main.value == pytest.approx(np.mean(areas))
    assert done.averages()["auroc"]["overall"]["sets"] == 3
    out = done.save(tmp_path / "out")
    stored = results.read(out)
    assert stored["datasets"]["chest"]["metrics"]["auroc"]["value"] == npz.main.value
    assert [t["name"] for t in stored["findings"]] == ["chest", "columns", "lists"]
    assert (out / "findings.csv").read_text().count("\n") == 3 * N * 2 + 1


def test_a_calibration_of_one_set_is_refused_on_the_same_pictures_only(tiny, root, tmp_path):
    found = suite_run.collect(suite(tmp_path, entry()), suite_prompts.load(""), data_root=root)
    done = suite_run.evaluate(tiny, found, resamples=0)
    margins = done.findings[0].margins
    high = (margins > np.median(margins, 0)).astype(np.uint8)
    high[::5] = 1 - high[::5]
    with np.load(root / "mnist.npz") as z:
        pictures = z["test_images"]
    new = tmp_path / "new"
    new.mkdir()
    np.savez(
        new / "mnist.npz", test_images=pictures, test_labels=high, val_images=255 - pictures, val_labels=high
    )
    found = suite_run.collect(suite(tmp_path, entry()), suite_prompts.load(""), data_root=new)
    suite_run.evaluate(tiny, found, resamples=0).save(tmp_path / "val")
    fitted = calibrate.from_results(tmp_path / "val", resamples=0)
    again = suite_run.evaluate(tiny, found, resamples=0, calibrated=fitted)
    assert again.failed[0]["reason"].startswith("chest: 40 of 40 records were used to fit")
    other = entry(name="other", layout={"kind": "npz", "file": "mnist.npz", "split": "val"})
    found = suite_run.collect(suite(tmp_path, other), suite_prompts.load(""), data_root=new)
    fresh = suite_run.evaluate(tiny, found, resamples=0, calibrated=fitted).findings[0]
    assert fresh.calibrated["fitted_here"] == 0
    assert set(fresh.calibrated["figures"]) == {"ece", "nll", "brier"}


def test_labels_that_are_no_finding_are_refused_with_their_places(root, tmp_path):
    s = suite(tmp_path, entry(layout=LISTS | {"none": []}, labels={"Effusion": "effusion"})).sets[0]
    with pytest.raises(DataError, match=r"'No Finding' x10 .*'Nodule' x20"):
        layouts.read(s, None, root)
    _write(tmp_path / "c.csv", ["file", "eff", "nod"], [["0.png", "1", "maybe"], ["1.png", "0", "1"]])
    for i in (0, 1):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    s = suite(tmp_path, entry(layout=COLUMNS | {"file": "c.csv"})).sets[0]
    table = layouts.read(s, None, tmp_path)
    assert [r.findings for r in table.rows] == [(0, 1)]
    assert table.bad[0]["reason"] == "'maybe' is neither 1, 0, -1 nor blank"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": {"kind": "folders"}}, "csv or npz, not folders"),
        ({"layout": COLUMNS | {"label": ["eff"]}}, "does not name 2 columns"),
        ({"layout": LISTS | {"label": ["a", "b"]}}, "with a separator is one column"),
        ({"layout": COLUMNS | {"blank": "no"}}, "layout.blank is 'no'"),
        ({"metric": "accuracy"}, "metric is 'accuracy'"),
        ({"binary": True}, "has no binary"),
        ({"prompts": {"effusion": PAIRS["effusion"]}}, "do not name exactly the classes"),
        ({"prompts": {"effusion": ["a"], "nodule": ["b"]}}, "no positive and negative prompts"),
        ({"multilabel": False}, "prompts of effusion is no list"),
        (
            {"multilabel": False, "prompts": "", "layout": COLUMNS | {"blank": "absent"}},
            "is for multi-label sets",
        ),
    ],
)
def test_a_wrong_entry_is_refused_with_its_field(tmp_path, changes, words):
    with pytest.raises(UsageError) as e:
        suite(tmp_path, entry(**changes))
    assert words in e.value.line()


def test_prompts_of_a_file_or_by_name(root, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"chest": PAIRS}))
    s = suite(tmp_path, entry(prompts="")).sets[0]
    task, _ = suite_prompts.task(s, suite_prompts.load(str(path)))
    assert (
        task.digest == suite_prompts.task(suite(tmp_path, entry()).sets[0], suite_prompts.load(""))[0].digest
    )
    plain, words = suite_prompts.task(s, suite_prompts.load(""))
    assert "there are no prompts" in words
    assert "X-ray" in plain.prompts[0]
    named = entry(prompts="chest_findings", classes=["effusion", "nodule"])
    with pytest.raises(UsageError, match="chest_findings: no class atelectasis"):
        suite_prompts.task(suite(tmp_path, named).sets[0], suite_prompts.load(""))
    path.write_text(json.dumps({"chest": {k: v["positive"] for k, v in PAIRS.items()}}))
    with pytest.raises(UsageError, match="has no pairs of prompts"):
        suite_prompts.task(s, suite_prompts.load(str(path)))


def test_arrays_that_do_not_fit_are_refused(root, tmp_path):
    for labels in (np.zeros((N, 3), np.uint8), np.full((N, 2), 2, np.uint8), np.zeros(N, np.uint8)):
        np.savez(tmp_path / "mnist.npz", test_images=np.zeros((N, 8, 8), np.uint8), test_labels=labels)
        with pytest.raises(DataError, match="labels are uint8"):
            layouts.read(suite(tmp_path, entry()).sets[0], None, tmp_path)


# ---- YAML

TEXT = """
name: mine
sets:
  - name: knee      # a comment
    modality: MRI
    classes: ["no", "yes"]
    labels: {no: "no", yes: "yes"}
    layout: {kind: csv, file: list.csv, label: 1, where: {split: test, fold: [1, 2]}}
"""


def test_a_suite_in_yaml_is_the_same_as_in_json(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT)
    raw = yaml_text.parse(TEXT.encode(), "x")
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    a, b = suites.load(tmp_path / "mine.yaml"), suites.load(tmp_path / "mine.json")
    assert a.sets == b.sets
    assert a.sets[0].labels == {"no": 0, "yes": 1}
    assert a.sets[0].layout.where == {"split": ("test",), "fold": ("1", "2")}
    assert a.sha256 != b.sha256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "classes: [no, yes]",
            'line 1 has no, which YAML takes for a truth value. Fix: write "no" in quotes',
        ),
        ("a: 1\nb:\n  c: Off", "line 3 has Off, which YAML takes"),
        ("a: 1\nb: 2\na: 3", "line 3 has 'a' a second time"),
        ("a: &x [1]\nb: *x", "line 2 has an alias"),
        ("? [a]\n: 1", "a key that is no text"),
        ("a: !!python/object/apply:os.system [id]", "line 1 is no YAML text"),
        ("a: [1", "is no YAML text"),
        ("a: 1\n--- \nb: 2", "is no YAML text"),
        ("a: \x00", "is no YAML text"),
        ("[" * 5000, "is no YAML text"),
    ],
)
def test_what_yaml_would_misread_is_refused_with_its_line(text, words):
    with pytest.raises(UsageError) as e:
        yaml_text.parse(text.encode(), "s.yaml")
    assert e.value.line().startswith("s.yaml")
    assert words in e.value.line()


def test_dates_and_merges_stay_texts_and_a_wrong_field_is_named(tmp_path):
    assert yaml_text.parse(b"a: 2020-01-01\n<<: x\nb: true", "s") == {"a": "2020-01-01", "<<": "x", "b": True}
    path = tmp_path / "s.yml"
    path.write_text("sets: [{name: a, clases: [x, y]}]")
    with pytest.raises(UsageError, match="clases"):
        suites.load(path)
    path.write_text("just words")
    with pytest.raises(UsageError, match="is no suite"):
        suites.load(path)


# ---- several processes


def _job(commands: list[list[str]], tmp_path: Path) -> list[subprocess.CompletedProcess[str]]:
    """Runs the processes of one job side by side; none outlives it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "unimed_jax", *c], env=env | {"JAX_PROCESS_ID": str(i)}, **pipes
        )
        for i, c in enumerate(commands)
    ]
    try:
        said = [p.communicate(timeout=240) for p in both]
    finally:
        for p in both:
            p.kill()
    return [subprocess.CompletedProcess([], p.returncode, *s) for p, s in zip(both, said, strict=True)]


@pytest.mark.slow
def test_two_processes_share_a_suite_and_one_writes(tiny, root, tmp_path):
    tiny.save(tmp_path / "model")
    data = tmp_path / "data"
    shutil.copytree(root, data)
    for i in (3, 6):  # one picture of each process's share is damaged
        (data / f"{i}.png").write_bytes(b"no picture")
    sets = [entry(), entry(name="columns", layout=COLUMNS)]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "sets": sets}))
    base = ["eval", "--model", str(tmp_path / "model"), "--suite", str(tmp_path / "mine.json"), "--ci", "20"]
    base += ["--batch-size", "8", "--data-root", str(data)]
    done = _job([[*base, "--out", str(tmp_path / "two")]] * 2, tmp_path)
    assert [p.returncode for p in done] == [4, 4], done[0].stderr[-1500:] + done[1].stderr[-1500:]
    assert "wrote" in done[0].stdout
    assert not {"wrote", "suite", "model"} & set(done[1].stdout.split())
    with pytest.raises(SomeInputsFailed):
        eval_verb.run([*base, "--out", str(tmp_path / "one")][1:])
    for name in ("findings.csv", "errors.csv", "results.csv"):
        one, two = ((tmp_path / k / name).read_text() for k in ("one", "two"))
        if name == "errors.csv":
            assert one == two
            assert one.count("\n") == 3
        assert len(one.splitlines()) == len(two.splitlines())
    one, two = (results.read(tmp_path / k)["datasets"] for k in ("one", "two"))
    for name in one:
        for k, v in one[name]["metrics"].items():
            assert two[name]["metrics"][k]["value"] == pytest.approx(v["value"], abs=1e-5), (name, k)
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "7.png").unlink()
    commands = [[*base[:-1], str(where), "--out", str(tmp_path / "three")] for where in (data, other)]
    for p in _job(commands, tmp_path):
        assert p.returncode == 3
        assert "see different data" in p.stderr
