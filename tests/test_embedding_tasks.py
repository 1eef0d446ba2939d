"""Retrieval and the probe on records, through the embeddings of a model and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_model

from unimed_jax import infer
from unimed_jax.cli import eval as verb
from unimed_jax.data import images
from unimed_jax.data.export import export
from unimed_jax.data.phantom import Phantom
from unimed_jax.data.record import Example
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError
from unimed_jax.evaluate import embedding_tasks, probe, retrieval, tasks


class Records(list):
    name = "list"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=16)


@pytest.fixture(scope="module")
def phantom() -> dict[str, Records]:
    """240 drawings of six modalities, by split."""
    source, found = Phantom(n=240, size=40), {}
    for item in source.items():
        found.setdefault(item.split, Records()).append(source.example(item))
    return found


def embedded(m: infer.Loaded, records: list[Example]) -> np.ndarray:
    return np.concatenate([m.encode_image(images.eval_image(e.image, m.image_size)[None]) for e in records])


def test_retrieval_pairs_each_picture_with_its_captions(tiny, phantom):
    records = phantom["test"]
    found = embedding_tasks.retrieve(tiny, records, resamples=20)
    pairs = [(e, c.text) for e in records for c in e.captions]
    z = embedded(tiny, [e for e, _ in pairs])
    expected = retrieval.evaluate(
        z,
        np.concatenate([tiny.encode_text([text]) for _, text in pairs]),
        [e.sha256 or e.key for e, _ in pairs],
        [text for _, text in pairs],
        [e.patient for e, _ in pairs],
        resamples=20,
    ).json()
    assert found["pairs"] == len(pairs)
    assert found["without_caption"] == 0
    for way in ("image_to_text", "text_to_image"):
        assert found[way]["queries"] == expected[way]["queries"]
        for name, v in expected[way]["values"].items():
            assert found[way]["values"][name]["value"] == pytest.approx(v["value"], abs=1e-6), name
    assert found["text_to_image"]["gallery"] == len({e.key for e in records})
    assert found["image_to_text"]["gallery"] == len({text for _, text in pairs}) < len(pairs)
    json.dumps(found, allow_nan=False)


def test_records_without_a_caption_are_left_out_and_counted(tiny, phantom):
    import dataclasses

    some = Records(phantom["test"][:10])
    some[3] = dataclasses.replace(some[3], captions=())
    found = embedding_tasks.retrieve(tiny, some, resamples=0)
    assert found["without_caption"] == 1
    assert found["image_to_text"]["queries"] == 9
    with pytest.raises(DataError, match="none of 1 records of list has a caption"):
        embedding_tasks.retrieve(tiny, Records([some[3]]))


def test_the_probe_learns_what_the_embeddings_hold(tiny, phantom):
    task = tasks.load("phantom_modality")
    options = {"fractions": (1.0,), "shots": (2,), "seeds": (0, 1), "resamples": 20}
    found = embedding_tasks.probe_task(tiny, phantom, task, **options)
    names = list(task.classes)
    splits = [
        probe.Split(
            embedded(tiny, phantom[k]),
            np.array([names.index(e.modality) for e in phantom[k]]),
            [e.patient for e in phantom[k]],
        )
        for k in ("train", "val", "test")
    ]
    expected = probe.run(*splits, names, **options).json()
    assert [(r["budget"], r["n_train"]) for r in found["runs"]] == [
        ("100 %", len(phantom["train"])),
        ("2 shots", 12),
        ("2 shots", 12),
    ]
    for ours, theirs in zip(found["runs"], expected["runs"], strict=True):
        value = theirs["values"]["balanced_accuracy"]["value"]
        assert ours["values"]["balanced_accuracy"]["value"] == pytest.approx(value, abs=0.03)
    assert found["summary"]["100 %"]["mean"] > 2 * found["chance"]
    assert found["settings"]["validation"] == "its own split"
    json.dumps(found, allow_nan=False)


def test_without_a_validation_split_training_subjects_choose_c(tiny, phantom):
    parts = {k: phantom[k] for k in ("train", "test")}
    found = embedding_tasks.probe_task(tiny, parts, "phantom_modality", fractions=(1.0,), resamples=0)
    sizes = found["settings"]["records"]
    assert found["settings"]["validation"] == "20% of the training subjects of each class"
    assert sizes["train"] + sizes["val"] == len(phantom["train"])
    assert found["runs"][0]["n_train"] == sizes["train"]
    labels, groups = np.array([0] * 20 + [1] * 6), [*np.arange(20) // 2, *[50 + i // 2 for i in range(6)]]
    away = embedding_tasks.hold_out(labels, groups)
    assert np.bincount(labels[away]).tolist() == [4, 2]
    assert not {groups[i] for i in np.flatnonzero(away)} & {groups[i] for i in np.flatnonzero(~away)}


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny.save(folder / "model")
    export(Phantom(n=240, size=40), folder / "records", shards=1)
    return folder


def test_the_command(home, capsys):
    base = [
        "--model",
        str(home / "model"),
        "--data",
        str(home / "records"),
        "--ci",
        "20",
        "--out",
        str(home / "out"),
    ]
    assert verb.run([*base, "--retrieval"]) == 0
    text = capsys.readouterr().out
    stored = json.loads((home / "out" / "retrieval.json").read_text())
    assert stored["format"] == "unimed_jax.retrieval"
    assert "not a medical device" in stored["use"]
    assert stored["data"]["test"]["sources"]["phantom"]["manifest_sha256"]
    assert f"text to image  R@1          {stored['text_to_image']['values']['R@1']['value']:.3f} [" in text
    with pytest.raises(UsageError, match="exists"):
        verb.run([*base, "--retrieval"])
    assert verb.run([*base, "--probe", "phantom_modality", "--shots", "1", "--seeds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((home / "out" / "probe.json").read_text())
    assert [(r["budget"], r["seed"]) for r in found["runs"]] == [("1 shot", 0), ("1 shot", 1)]
    assert verb.run([*base, "--probe", "phantom_modality", "--fractions", "1", "--force"]) == 0
    text = capsys.readouterr().out
    assert "balanced_accuracy" in text
    assert "100 %" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "1"], "--shots belongs to --probe"),
        (["--retrieval", "--probe", "modality"], "a run of its own"),
        (["--probe", "modality", "--train-set", "a"], "names a set of a suite"),
        (["--train-set", "a"], "--train-set belongs to --probe"),
        (["--retrieval", "--report"], "--report is for zero-shot"),
        (["--probe", "modality", "--tasks", "ct_plane"], "--tasks is for zero-shot"),
        (["--probe", "modality", "--shots", "0"], "--shots 0 is no list of numbers 1 or more"),
        (["--probe", "modality", "--fractions", "half"], "--fractions half is no list"),
        (["--probe", "modalty"], "Did you mean"),
    ],
)
def test_flags_that_do_not_fit_are_refused(home, words, message):
    with pytest.raises(UsageError, match=message):
        verb.run(["--model", "m", "--data", str(home / "records"), "--out", str(home / "no"), *words])


def test_too_few_records_are_refused_before_anything_is_embedded(tiny, phantom, monkeypatch):
    monkeypatch.setattr(tiny, "encode_rows", None)
    with pytest.raises(DataError, match="training records, 1000 are asked for"):
        embedding_tasks.probe_task(tiny, phantom, "phantom_modality", shots=(1, 1000))


def test_the_same_subjects_on_both_sides_are_refused(home):
    words = ["--model", str(home / "model"), "--data", str(home / "records"), "--out", str(home / "no")]
    with pytest.raises(DataError, match="in the training and the test split"):
        verb.run([*words, "--probe", "phantom_modality", "--split", "train"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory, phantom) -> Path:
    """The same drawings as folders of classes, a list of its own for validation, and a suite of all of them."""
    root = tmp_path_factory.mktemp("disk")
    classes = list(tasks.load("phantom_modality").classes)
    sets = []
    for split in ("train", "val", "test"):
        for i, e in enumerate(phantom[split]):
            folder = root / split / e.modality
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03}.{e.image_format}").write_bytes(e.image)
        layout = {"kind": "folders", "folder": split}
        sets.append({"name": split, "classes": classes, "layout": layout, "metric": "balanced_accuracy"})
        sets[-1]["prompts"] = {c: [f"a picture of {c}"] for c in classes}
    sets.append(sets[0] | {"name": "turned", "classes": classes[::-1]})
    (root / "suite.json").write_text(json.dumps({"name": "own", "sets": sets}))
    return root


def test_a_probe_on_folders_of_classes_equals_that_on_records(home, disk, tiny, phantom, tmp_path, capsys):
    flags = ["--model", str(home / "model"), "--suite", str(disk / "suite.json"), "--data-root", str(disk)]
    flags += ["--probe", "test", "--train-set", "train", "--val-set", "val", "--ci", "20", "--fractions", "1"]
    assert verb.run([*flags, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    records = embedding_tasks.probe_task(tiny, phantom, "phantom_modality", fractions=(1.0,), resamples=20)
    assert found["settings"]["records"] == {k: len(v) for k, v in phantom.items() if k != "holdout"}
    ours, theirs = (r["runs"][0]["values"]["balanced_accuracy"]["value"] for r in (found, records))
    assert ours == pytest.approx(theirs, abs=0.05)
    assert found["data"]["test"]["sources"]["own"]["set"] == "test"
    assert found["data"]["test"]["bad"] == 0
    broken = next((disk / "test").glob("*/*"))
    kept = broken.read_bytes()
    broken.write_bytes(b"no picture")
    try:
        with pytest.raises(SomeInputsFailed, match="1 pictures or rows"):
            verb.run([*flags, "--out", str(tmp_path), "--force"])
        assert json.loads((tmp_path / "probe.json").read_text())["data"]["test"]["bad"] == 1
        assert verb.run([*flags, "--out", str(tmp_path), "--force", "--allow-bad", "1"]) == 0
    finally:
        broken.write_bytes(kept)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--probe", "test"], "takes two sets"),
        (["--probe", "test", "--train-set", "test"], "are the same"),
        (["--probe", "test", "--train-set", "trian"], "Did you mean"),
        (["--probe", "test", "--train-set", "turned"], "different classes"),
        (["--probe", "test", "--train-set", "train", "--sets", "val"], "--sets is for zero-shot"),
        (["--retrieval"], "a run of its own"),
    ],
)
def test_wrong_probes_on_suites_are_refused(home, disk, tmp_path, flags, words):
    base = ["--model", str(home / "model"), "--suite", str(disk / "suite.json"), "--data-root", str(disk)]
    with pytest.raises((UsageError, DataError), match=words) as e:
        verb.run([*base, "--out", str(tmp_path), *flags])
    assert "\n" not in e.value.line()


def test_a_set_that_is_missing_is_named(home, disk, tmp_path):
    base = ["--model", str(home / "model"), "--suite", str(disk / "suite.json"), "--data-root", str(tmp_path)]
    with pytest.raises(DataError, match=r"(train|test)"):
        verb.run([*base, "--out", str(tmp_path / "o"), "--probe", "test", "--train-set", "train"])
