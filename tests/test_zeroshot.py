"""Tasks, the evaluator and its results: labels checked before anything is computed, numbers equal to a plain loop."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import small_model
from PIL import Image

from unimed_jax import infer
from unimed_jax.data import images
from unimed_jax.data.phantom import Phantom
from unimed_jax.data.record import Example
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import batches, metrics, results, tasks, zeroshot


class Records(list):
    """Examples in a list, as a source."""

    name = "list"


def record(i: int, label: str = "CT", **changes) -> Example:
    pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    fields = {"key": f"list/{i}", "image": out.getvalue(), "modality": label, "patient": f"p{i // 2}"}
    return Example(**fields | changes)


CLASSES = {
    "CT": ["a ct slice", "ct of the chest"],
    "MRI": ["magnetic resonance image"],
    "Fundus": ["retinal fundus"],
}
TASK = tasks.Task(name="three", classes={k: tuple(v) for k, v in CLASSES.items()})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=8)


# ---- tasks


def test_built_in_tasks_are_well_formed():
    assert {"modality", "phantom_modality", "mri_plane", "ct_plane", "ct_region", "stain"} <= set(
        tasks.names()
    )
    for name in tasks.names():
        t = tasks.load(name)
        assert t.name == name
        assert t.description
        assert min(len(p) for p in t.classes.values()) >= 4
        assert len(t.digest) == 64


def test_the_digest_covers_classes_prompts_and_order():
    base = TASK.digest
    other = dict(reversed(TASK.classes.items()))
    assert dataclasses.replace(TASK, classes=other).digest != base
    assert dataclasses.replace(TASK, classes=TASK.classes | {"CT": ("a ct slice",)}).digest != base
    assert dataclasses.replace(TASK, description="x", metric="accuracy").digest == base


def test_a_plain_file_of_prompts_is_a_task(tmp_path):
    (tmp_path / "finding.json").write_text(
        json.dumps({"normal": ["a normal chest"], "effusion": ["an effusion"]})
    )
    t = tasks.load(tmp_path / "finding.json")
    assert (t.name, t.label, list(t.classes)) == ("finding", "labels:finding", ["normal", "effusion"])
    (tmp_path / "mine.json").write_text(json.dumps({"CT": ["a"], "MRI": ["b"]}))
    assert tasks.load(tmp_path / "mine.json").label == "modality"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[]", "no task"),
        ('{"a": ["x"]}', "at least two"),
        ('{"a": ["x"], "b": []}', "'b' has no prompts"),
        ('{"a": ["x"], "b": [" "]}', "'b' has no prompts"),
        ('{"a": ["x"], "b": "y"}', "no list of texts"),
        ('{"a": ["x"], "a": ["y"]}', "'a' twice"),
        ('{"a": ["x"], "A": ["y"]}', "differ by case only"),
        ('{"a": ["x"], "b": ["x"]}', "share the prompt"),
        ('{"a": ["x"], " ": ["y"]}', "without a name"),
        ('{"classes": {"a": ["x"], "b": ["y"]}, "metrc": "auroc"}', 'Did you mean "metric"'),
        ('{"classes": {"a": ["x"], "b": ["y"]}, "metric": "f1"}', "metric is 'f1'"),
        ('{"classes": {"a": ["x"], "b": ["y"]}, "label": "plane"}', "label is 'plane'"),
        ('{"classes": {"a": ["x"], "b": ["y"]}, "where": {"modalty": "CT"}}', 'Did you mean "modality"'),
        ('{"classes": {"a": ["x"], "b": ["y"]}, "ignore": ["a"]}', "both a class and ignored"),
    ],
)
def test_bad_task_files_are_refused(tmp_path, content, words):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        tasks.load(tmp_path / "t.json")


def test_unknown_tasks_are_named():
    with pytest.raises(UsageError, match='Did you mean "modality"'):
        tasks.load("modalty")
    with pytest.raises(UsageError, match="does not exist"):
        tasks.load("nothing.json")


def test_tasks_from_labels_name_the_modality():
    t = tasks.from_labels(["pneumonia", "normal"], modality="X-ray")
    assert all("X-ray" in p and k in p for k, prompts in t.classes.items() for p in prompts)
    for bad in (["a"], ["a", "a"]):
        with pytest.raises(UsageError, match=r"at least two|given twice"):
            tasks.from_labels(bad)
    with pytest.raises(UsageError, match="Did you mean"):
        tasks.from_labels(["a", "b"], modality="x-rey")


def select(t: tasks.Task, *examples: Example) -> dict[int, int]:
    return tasks.select(t, dict(enumerate(examples)))


def test_records_are_selected_by_field_and_label():
    plane = tasks.Task(
        name="plane",
        classes={"axial": ("a",), "coronal": ("b",)},
        label="labels:plane",
        where={"modality": ("MRI",), "simulated": (False,)},
        ignore=("oblique",),
    )
    found = select(
        plane,
        record(0, "MRI", labels=("plane:coronal", "region:brain")),
        record(1, "CT", labels=("plane:axial",)),
        record(2, "MRI", labels=("plane:oblique",)),
        record(3, "MRI", labels=("region:brain",)),
        record(4, "MRI", labels=("plane:axial",), simulated=True),
        record(5, "MRI", labels=("plane:axial",)),
    )
    assert found == {0: 1, 5: 0}


def test_labels_outside_the_classes_are_refused_with_everything_that_is_wrong():
    with pytest.raises(DataError) as e:
        select(TASK, record(0, "CT"), record(1, "X-ray"), record(2, "X-ray"), record(3, "mri"))
    assert "'X-ray' x2" in e.value.cause
    assert "'mri' is 'MRI' but for case" in e.value.cause
    assert "classes without records: Fundus, MRI" in e.value.cause


def test_two_values_of_one_label_are_refused():
    t = tasks.Task(name="plane", classes={"axial": ("a",), "coronal": ("b",)}, label="labels:plane")
    with pytest.raises(DataError, match="record list/0 has 2 values"):
        select(t, record(0, labels=("plane:axial", "plane:coronal")))


def test_nothing_selected_says_what_was_asked_for():
    t = dataclasses.replace(TASK, where={"source": ("elsewhere",)})
    with pytest.raises(DataError, match=r"none of 1 records.*elsewhere"):
        select(t, record(0))


# ---- the evaluator


def loop(m: infer.Loaded, records: Records, task: tasks.Task) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, one record at a time."""
    bank = []
    for prompts in task.classes.values():
        z = np.mean([m.encode_text([p])[0].astype(float) for p in prompts], axis=0)
        bank.append(z / np.linalg.norm(z))
    names = list(task.classes)
    rows = [
        m.encode_image(images.eval_image(e.image, m.image_size)[None])[0] @ np.array(bank).T for e in records
    ]
    return np.array(rows), np.array([names.index(e.modality) for e in records])


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
def test_metrics_equal_a_plain_loop_for_any_size(tiny, n):
    """Sizes 1, B-1, B, B+1: the last batch is filled and masked, never dropped."""
    records = Records(record(i, list(CLASSES)[i % 3]) for i in range(n))
    found = zeroshot.evaluate(tiny, records, TASK, resamples=20).tasks[0]
    cosines, labels = loop(tiny, records, TASK)
    expected = metrics.classification(
        tiny.logit_scale * cosines, labels, list(CLASSES), [e.patient for e in records], resamples=20
    )
    assert found.metrics.n == n
    assert found.metrics.confusion.tolist() == expected.confusion.tolist()
    for name in ("accuracy", "balanced_accuracy"):
        assert found.metrics.values[name].value == pytest.approx(expected.values[name].value)
        assert found.metrics.values[name].low == pytest.approx(expected.values[name].low)
    assert [p.predicted for p in found.predictions] == [list(CLASSES)[k] for k in cosines.argmax(1)]
    odds = np.exp(tiny.logit_scale * (cosines - cosines.max(1, keepdims=True)))
    odds /= odds.sum(1, keepdims=True)
    np.testing.assert_allclose(
        [list(p.scores.values()) for p in found.predictions], odds, rtol=2e-3, atol=1e-6
    )
    if n == 1:
        assert found.metrics.values["auroc"].reason == "only one class occurs"


def test_pictures_are_embedded_once_for_all_tasks_and_one_program(tiny, monkeypatch):
    records = Records(record(i, list(CLASSES)[i % 3]) for i in range(11))
    calls = []
    whole = tiny.encode_rows
    monkeypatch.setattr(tiny, "encode_rows", lambda x, ids: calls.append(len(x)) or whole(x, ids))
    before = tiny._image._cache_size()
    some = dataclasses.replace(TASK, name="some", where={"modality": ("CT",)}, metric="accuracy")
    found = zeroshot.evaluate(tiny, records, [TASK, some], resamples=0)
    assert calls == [6, 6]
    assert tiny._image._cache_size() <= before + 1
    assert [t.metrics.n for t in found.tasks] == [11, 4]
    assert found.figures().keys() == {"eval/three", "eval/some"}


def test_several_sources_are_one_set(tiny):
    records = [record(i, list(CLASSES)[i % 3]) for i in range(10)]
    one = zeroshot.evaluate(tiny, Records(records), TASK, resamples=10)
    two = zeroshot.evaluate(tiny, [Records(records[:3]), Records(records[3:])], TASK, resamples=10)
    assert one.tasks[0].metrics.values == two.tasks[0].metrics.values
    assert [p.key for p in one.tasks[0].predictions] == [p.key for p in two.tasks[0].predictions]


def test_records_without_patient_are_their_own_subjects(tiny):
    records = Records(record(i, list(CLASSES)[i % 3], patient="") for i in range(6))
    assert zeroshot.evaluate(tiny, records, TASK, resamples=0).tasks[0].metrics.subjects == 6


@pytest.mark.parametrize(
    ("records", "error", "words"),
    [
        ([], DataError, "no records"),
        ([record(0), record(0)], DataError, "records 0 and 1 of list have the same key 'list/0'"),
        ([record(0), record(1, "US")], DataError, "no class: 'US'"),
        ([record(0), record(1, image=b"broken")], DataError, "list/1"),
    ],
)
def test_bad_sets_are_refused(tiny, records, error, words):
    with pytest.raises(error, match=words):
        zeroshot.evaluate(tiny, Records(records), TASK)


def test_labels_are_checked_before_anything_is_computed(tiny, monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(tiny, "encode_text", never)
    monkeypatch.setattr(tiny, "encode_rows", never)
    with pytest.raises(DataError, match="no class"):
        zeroshot.evaluate(tiny, Records([record(0, "US")]), TASK)
    with pytest.raises(UsageError, match="given twice"):
        zeroshot.evaluate(tiny, Records([record(0)]), [TASK, TASK])
    with pytest.raises(UsageError, match="no task"):
        zeroshot.evaluate(tiny, Records([record(0)]), [])


def test_eight_devices_give_the_same_results(tiny, tmp_path):
    tiny.save(tmp_path / "m")
    code = """
    import sys
    from unimed_jax import config, infer, parallel
    from unimed_jax.data.phantom import Phantom
    from unimed_jax.evaluate import zeroshot
    source = Phantom(n=30, size=40)
    class Records(list): name = "phantom"
    records = Records(source.example(i) for i in source.items())
    one, many = (
        zeroshot.evaluate(infer.load(sys.argv[1], mesh=mesh, batch_size=8), records, "phantom_modality", resamples=50)
        for mesh in (None, parallel.make_mesh(config.Mesh(data=4, fsdp=2)))
    )
    assert many.settings["devices"] == 8
    a, b = one.tasks[0], many.tasks[0]
    for name, v in a.metrics.values.items():
        other = b.metrics.values[name]
        if name in ("ece", "brier"):  # of probabilities, which round apart by the split of the batch
            assert max(abs(v.value - other.value), abs(v.low - other.low), abs(v.high - other.high)) < 1e-5, name
        else:
            assert v == other, name
    assert [p.predicted for p in a.predictions] == [p.predicted for p in b.predictions]
    print("agree")
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert out.stdout.strip() == "agree", out.stderr[-3000:]


# ---- results


@pytest.fixture(scope="module")
def found(tiny) -> results.Results:
    source = Phantom(n=48, size=40)
    records = Records(source.example(item) for item in source.items())
    names = list(tasks.load("phantom_modality").classes)
    labels = np.array([names.index(e.modality) for e in records])
    guess = metrics.classification(
        np.random.default_rng(0).normal(size=(48, 6)),
        labels,
        list(tasks.load("phantom_modality").classes),
        resamples=50,
    )
    references = {"phantom_modality": {"=1-NN on pixels": guess}}
    return zeroshot.evaluate(
        tiny, records, "phantom_modality", resamples=50, references=references, examples=4
    )


def test_examples_show_hits_and_misses_of_several_classes(found):
    shown = found.tasks[0].examples
    assert 4 <= len(shown) <= 8
    assert any(not e["hit"] for e in shown)
    assert len({e["label"] for e in shown if not e["hit"]}) == 4
    for e in shown:
        assert e["hit"] == (e["label"] == e["predicted"])
        assert len(e["prompts"]) == 3
        assert e["prompts"][0]["cosine"] >= e["prompts"][2]["cosine"]
        assert e["simulated"]


def test_results_are_complete_on_disk(found, tiny, tmp_path):
    folder = found.save(tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == sorted(results.FILES)
    stored = results.read(folder)
    task = stored["tasks"][0]
    assert stored["model"]["sha256"] == tiny.digest
    assert stored["status"] == "complete"
    assert "not a medical device" in stored["use"]
    assert task["prompts"]["sha256"] == tasks.load("phantom_modality").digest
    assert (task["n"], task["chance"]) == (48, pytest.approx(1 / 6))
    assert sum(map(sum, task["confusion"])) == 48
    value = task["values"]["balanced_accuracy"]
    assert value["low"] <= value["value"] <= value["high"]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    # ten metrics, the recall and the AUROC of six classes, each
    assert [r["method"] for r in rows] == ["model"] * 22 + ["'=1-NN on pixels"] * 22
    assert [r["metric"] for r in rows[:10]] == list(metrics.ALL) == list(task["values"])
    assert rows[10]["metric"] == "recall: X-ray"
    assert (rows[16]["metric"], rows[16]["chance"]) == ("auroc: X-ray", "0.5")
    areas = [v["value"] for v in task["auroc_per_class"].values()]
    assert np.mean(areas) == pytest.approx(task["values"]["auroc"]["value"])
    assert float(rows[1]["value"]) == pytest.approx(value["value"], abs=1e-5)
    assert [r["chance"] for r in rows[:5]] == ["0.166667", "0.166667", "0.5", "0.166667", ""]
    assert task["values"]["ece"]["value"] is not None
    assert (
        task["references"]["=1-NN on pixels"]["values"]["ece"]["reason"] == "the scores are no probabilities"
    )
    predictions = list(csv.DictReader((folder / "predictions.csv").open()))
    assert len(predictions) == 48
    for r in predictions:
        logs = json.loads(r["log_scores"])
        assert np.exp(logs).sum() == pytest.approx(1, abs=1e-5)
        assert task["classes"][int(np.argmax(logs))] == r["predicted"]
    assert len({r["subject"] for r in predictions}) == task["subjects"]
    text = (folder / "results.md").read_text()
    assert "| Cohen's kappa | ECE | Brier score |" in text
    assert "| phantom_modality | 48 (" in text
    assert "=1-NN on pixels" in text


def test_results_are_not_overwritten_silently(found, tmp_path):
    found.save(tmp_path)
    with pytest.raises(UsageError, match="holds results already"):
        found.save(tmp_path)
    found.save(tmp_path, force=True)


def test_a_failed_write_never_looks_complete(found, tmp_path, monkeypatch):
    found.save(tmp_path)
    whole, left = os.replace, [2]

    def full(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        whole(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        found.save(tmp_path, force=True)
    assert not (tmp_path / "results.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(DataError, match="cannot be read"):
        results.read(tmp_path)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\0"])
def test_no_cell_is_a_formula(start):
    text = results.to_csv([{"a": f"{start}cmd()", "b": -0.25}], ("a", "b"))
    row = next(csv.DictReader(io.StringIO(text, newline="")))
    assert row["a"].startswith("'")
    assert row["b"] == "-0.25"
    assert "\0" not in text


def test_a_file_that_is_no_results_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="no results"):
        results.read(Path(tmp_path))


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (9, [5, 5]), (30, [8] * 4), (0, [])])
def test_pictures_are_read_once_in_order_and_in_equal_batches(tiny, monkeypatch, count, sizes):
    """One compilation, and next to no padding: nine pictures are not two batches of eight."""
    source = Phantom(n=30, size=40)
    records = Records(source.example(i) for i in source.items())
    squares = [zeroshot.images.eval_image(e.image, tiny.image_size) for e in records]
    seen, run = [], tiny.encode_rows

    def watched(image, ids):
        assert not image[ids < 0].any()
        seen.append((image, ids))
        return run(image, ids)

    monkeypatch.setattr(tiny, "encode_rows", watched)
    chosen = list(range(30))[::-1][:count]
    z = zeroshot.embed(tiny, records, chosen, threads=3)
    assert [len(ids) for _, ids in seen] == sizes
    if count:
        images, ids = (np.concatenate(x) for x in zip(*seen, strict=True))
        assert ids[ids >= 0].tolist() == list(range(count))
        np.testing.assert_array_equal(images[ids >= 0], [squares[i] for i in chosen])
        np.testing.assert_allclose(z, tiny.encode_image(np.stack([squares[i] for i in chosen])), atol=2e-6)


def test_a_reader_that_is_closed_begins_no_further_pictures():
    begun = []
    with ThreadPoolExecutor(1) as pool:
        with contextlib.closing(batches.map_ahead(pool, begun.append, range(1000), ahead=3)) as found:
            next(found)
        assert len(begun) <= 4
    assert len(begun) <= 4


def test_two_processes_share_the_records_and_agree(tiny, tmp_path):
    tiny.save(tmp_path / "m")
    code = """
    import sys, json, jax
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), initialization_timeout=60)
    from unimed_jax import config, infer, parallel
    from unimed_jax.data.phantom import Phantom
    from unimed_jax.evaluate import zeroshot
    source = Phantom(n=30, size=40)
    class Records(list): name = "phantom"
    records = Records(source.example(i) for i in source.items())
    decoded = []
    plain = zeroshot.images.eval_image
    zeroshot.images.eval_image = lambda data, size: decoded.append(size) or plain(data, size)
    m = infer.load(sys.argv[1], mesh=parallel.make_mesh(config.Mesh(data=2, fsdp=2)), batch_size=8)
    found = zeroshot.evaluate(m, records, "phantom_modality", resamples=20, examples=0)
    task = found.tasks[0]
    print(json.dumps([task.main.json(), [p.predicted for p in task.predictions], decoded.count(32), m.digest]))
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m"), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    both = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    try:
        outputs = [p.communicate(timeout=240) for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in outputs)
    assert first.pop(2) == 16  # 30 records in 4 batches of 8: each process decodes 4 rows of each,
    assert second.pop(2) == 14  # and the second none of the last two, which are padding
    assert first == second
    assert first[2] == tiny.digest
    source = Phantom(n=30, size=40)
    records = Records(source.example(item) for item in source.items())
    alone = zeroshot.evaluate(tiny, records, "phantom_modality", resamples=20, examples=0).tasks[0]
    assert [p.predicted for p in alone.predictions] == first[1]
