"""data/medmnist.py and its source: the authors' files become records, whole or refused."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from unimed_jax import config
from unimed_jax.cli import data as cli
from unimed_jax.data import label_captions, medmnist
from unimed_jax.data.export import export
from unimed_jax.data.shards import Manifest, Shards, find_sources
from unimed_jax.data.sources.medmnist import MedMnist
from unimed_jax.errors import DataError
from unimed_jax.evaluate import layouts, multilabel, suites

COUNTS = {"train": 23, "val": 7, "test": 9}


def write(file, name, size=28, *, compressed=True, **changes):
    """A file as MedMNIST's: uint8, labels [n 1] or [n 14]."""
    about, rng, arrays = medmnist.SETS[name], np.random.default_rng(len(name)), {}
    rgb = name in ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")
    for split, n in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size, *[3] * rgb), dtype=np.uint8)
        if about.multilabel:
            arrays[f"{split}_labels"] = rng.integers(0, 2, (n, len(about.classes)), dtype=np.uint8)
            arrays[f"{split}_labels"][0] = 0
        else:
            arrays[f"{split}_labels"] = (np.arange(n, dtype=np.uint8) % len(about.classes))[:, None]
    arrays |= changes
    file.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return arrays


def records(root, name="medmnist"):
    folder = find_sources(root)[name]
    return {e.key: e for split in Manifest.read(folder).splits for e in Shards(folder, split)}


def test_the_table_is_sound():
    assert len(medmnist.SETS) == 12
    for name, s in medmnist.SETS.items():
        assert s.modality in ("", *config.MODALITIES), name
        assert len(set(s.classes.values())) == len(s.classes) > 1
        for shown in s.classes:
            texts = medmnist.sentences(s, [shown])
            assert len(set(texts)) == 3, texts
            assert all(t[0].isupper() and t.endswith(".") for t in texts), texts


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("stem", "size"), [("pneumoniamnist", 28), ("pathmnist_64", 64), ("chestmnist", 28), ("octmnist", 28)]
)
def test_every_picture_and_label_arrives(tmp_path, stem, size, compressed):
    name = medmnist.name_of(tmp_path / f"{stem}.npz")
    arrays = write(tmp_path / "raw" / f"{stem}.npz", name, size, compressed=compressed)
    source = MedMnist(raw=tmp_path / "raw" / f"{stem}.npz")
    manifest = export(source, tmp_path / "out", shards=3)
    assert {s: manifest.examples(s) for s in manifest.splits} == COUNTS
    assert not manifest.rejects
    found, about = records(tmp_path / "out"), medmnist.SETS[name]
    assert len(found) == sum(COUNTS.values())  # written = seen
    for split, n in COUNTS.items():
        for i in range(n):
            e = found[f"medmnist/{stem}/{split}/{i:06d}"]
            assert (e.image_format, e.modality, e.split) == ("png", about.modality, split)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(e.image))), arrays[f"{split}_images"][i])
            row = arrays[f"{split}_labels"][i]
            classes = list(about.classes)
            if about.multilabel:
                seen = [c for c, v in zip(classes, row, strict=True) if v] or ["no finding"]
                assert e.labels == tuple(f"finding:{c}" for c in seen)
            else:
                assert e.labels == (f"{name}:{classes[row[0]]}",)
            assert {c.kind for c in e.captions} == {"template"}
            assert len(e.captions) == 3
    if about.multilabel:
        blank = found[f"medmnist/{stem}/test/000000"]
        assert blank.labels == ("finding:no finding",)
        assert blank.captions[0].text == "A frontal chest X-ray showing no labelled finding."


def test_a_folder_of_sets_is_the_same_for_any_number_of_workers(tmp_path):
    write(tmp_path / "raw" / "breastmnist_128.npz", "breastmnist", 128)
    write(tmp_path / "raw" / "organamnist.npz", "organamnist")
    for workers in (1, 2):
        export(MedMnist(raw=tmp_path / "raw"), tmp_path / str(workers), shards=2, workers=workers)
    a, b = (
        {p.name: p.read_bytes() for p in sorted((tmp_path / w).rglob("*")) if p.is_file()} for w in ("1", "2")
    )
    assert a == b
    assert len(records(tmp_path / "1")) == 2 * sum(COUNTS.values())


def test_captions_by_label_replace_templates(tmp_path, capsys):
    write(tmp_path / "pneumoniamnist.npz", "pneumoniamnist")
    said = {"normal": "Clear lungs in a child.", "pneumonia": "Airspace disease in a child."}
    triplets = {k: label_captions.Triplet(modality="X-ray", anatomy="chest", finding=k) for k in said}
    made = [
        label_captions.Label(triplet=t, captions=[{"text": said[k], "kind": "llm"}])
        for k, t in triplets.items()
    ]
    label_captions.write(tmp_path / "captions.json", label_captions.LabelCaptions(labels=made))
    argv = [
        "build",
        "medmnist",
        "--raw",
        str(tmp_path / "pneumoniamnist.npz"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.run([*argv, "--set", f"label_captions={tmp_path / 'captions.json'}"]) == 0
    assert "train 23" in capsys.readouterr().out
    for e in records(tmp_path / "out").values():
        assert [(c.text, c.kind) for c in e.captions] == [(said[e.labels[0].partition(":")[2]], "llm")]
    label_captions.write(tmp_path / "captions.json", label_captions.LabelCaptions(labels=made[:1]))
    with pytest.raises(DataError, match=r"train row 1: label .*pneumonia.* has no captions"):
        cli.run([*argv, "--set", f"label_captions={tmp_path / 'captions.json'}"])
    write(tmp_path / "octmnist.npz", "octmnist")
    source = MedMnist(raw=tmp_path / "octmnist.npz", label_captions=str(tmp_path / "captions.json"))
    with pytest.raises(DataError, match="none of the six modalities"):
        source.items()


def damaged(file):
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as z:
        at = z.getinfo("val_images.npy").header_offset
    data[at + 1000] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "changes", "cause"),
    [
        ("organmnist3d", {}, "is a 3D set"),
        ("mine", {}, "none of MedMNIST's 2D sets"),
        ("pneumoniamnist", {"val_labels": np.full((7, 1), 2, np.uint8)}, "val row 0 has the label 2"),
        ("pneumoniamnist", {"val_labels": np.zeros((6, 1), np.uint8)}, "7 pictures and 6 labels"),
        ("pneumoniamnist", {"test_labels": np.zeros((9, 14), np.uint8)}, "test_labels are uint8"),
        ("pneumoniamnist", {"test_labels": np.zeros((9, 1))}, "test_labels are float64"),
        ("pneumoniamnist", {"train_images": np.zeros((23, 28, 28, 28), np.uint8)}, "pictures are uint8"),
        ("pneumoniamnist", {"train_images": np.zeros((1, 9000, 9000), np.uint8)}, "pictures of 9000 x 9000"),
        ("pneumoniamnist", {"train_images": np.zeros((23, 28, 28), np.float32)}, "pictures are float32"),
        ("pneumoniamnist", {"train_labels": np.array([{}] * 23, object)[:, None]}, "holds pickled objects"),
    ],
)
def test_other_files_are_refused(tmp_path, name, changes, cause):
    write(tmp_path / f"{name}.npz", "pneumoniamnist", **changes)
    with pytest.raises(DataError, match=cause):
        MedMnist(raw=tmp_path).items()


@pytest.mark.parametrize("compressed", [True, False])
def test_damage_is_found_before_anything_is_written(tmp_path, compressed):
    file = tmp_path / "pneumoniamnist.npz"
    write(file, "pneumoniamnist", compressed=compressed)
    damaged(file)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        export(MedMnist(raw=file), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*"))
    with pytest.raises(DataError, match=r"no \.npz in"):
        MedMnist(raw=tmp_path / "out").items()
    with pytest.raises(DataError, match="no folder or"):
        MedMnist(raw=tmp_path / "nothing").items()


def test_no_damage_is_anything_but_a_refusal(tmp_path):
    """Bytes changed at random, half of them in the directory at the end; what still opens is whole."""
    rng, file, outcomes = np.random.default_rng(0), tmp_path / "pneumoniamnist.npz", set()
    write(file, "pneumoniamnist")
    whole = file.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(data)) if rng.random() < 0.5 else -1 - rng.integers(900)
            data[at] = rng.integers(256)
        file.write_bytes(data)
        source = MedMnist(raw=file)
        try:
            shown = [len(source.example(row).image) for row in source.items()]
            outcomes.add(len(shown))
        except DataError as e:
            assert "\n" not in e.line()  # noqa: PT017
            outcomes.add("refused")
    assert outcomes <= {"refused", sum(COUNTS.values())}


def test_other_pictures_under_the_same_name_are_another_export(tmp_path):
    file = tmp_path / "pneumoniamnist.npz"
    arrays = write(file, "pneumoniamnist")
    export(MedMnist(raw=file), tmp_path / "out", shards=2)
    source = MedMnist(raw=file)
    before = source.example(source.items()[3]).image
    other = 255 - arrays["train_images"]
    file.unlink()
    write(file, "pneumoniamnist", train_images=other)
    with pytest.raises(DataError, match="finished export of other content"):
        export(source, tmp_path / "out", shards=2)
    after = source.example(source.items()[3]).image  # the file that this thread has open is not this one
    assert after != before
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(after))), other[3])


def test_an_encrypted_file_and_a_header_that_is_no_literal(tmp_path):
    file = tmp_path / "pneumoniamnist.npz"
    write(file, "pneumoniamnist", compressed=False)
    data = file.read_bytes()
    for place in (b"PK\x03\x04", b"PK\x01\x02"):
        offset = 6 if place == b"PK\x03\x04" else 8
        at = data.index(place) + offset
        data = data[:at] + bytes([data[at] | 1]) + data[at + 1 :]
    file.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as"):
        MedMnist(raw=file).items()
    write(file, "pneumoniamnist", compressed=False)
    file.write_bytes(file.read_bytes().replace(b"{'descr'", b"(('descr'"))
    with pytest.raises(DataError, match="cannot be read as"):
        MedMnist(raw=file).items()


@pytest.mark.parametrize("name", ["\udcff.npz", "a\nb.npz"])
def test_names_that_no_key_can_hold(tmp_path, name):
    write(tmp_path / "a.npz", "breastmnist")
    (tmp_path / "a.npz").rename(tmp_path / name)
    with pytest.raises(DataError, match="it is not UTF-8 or has control characters") as e:
        export(MedMnist(raw=tmp_path, set="breastmnist"), tmp_path / "out")
    assert e.value.line().isascii()


def test_a_file_of_another_name(tmp_path):
    write(tmp_path / "download.npz", "breastmnist")
    found = MedMnist(raw=tmp_path / "download.npz", set="breastmnist").items()
    assert found[0].labels == ("breastmnist:malignant",)
    assert len(found) == sum(COUNTS.values())


def test_the_findings_are_those_of_the_evaluator():
    assert list(multilabel.load("chest_findings").findings) == list(medmnist.SETS["chestmnist"].classes)


def test_the_evaluator_knows_the_sets(tmp_path):
    write(tmp_path / "chestmnist_64.npz", "chestmnist", 64)
    write(tmp_path / "retinamnist.npz", "retinamnist")
    sets = [
        {"name": n, "layout": {"kind": "npz", "file": f"{f}.npz"}}
        for n, f in (("chest", "chestmnist_64"), ("retina", "retinamnist"))
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"name": "mine", "sets": sets}))
    chest, retina = suites.load(tmp_path / "suite.json").sets
    assert chest.multilabel
    assert len(chest.classes) == 14
    assert chest.modality == "X-ray"
    assert retina.classes[4] == "proliferative diabetic retinopathy"
    assert retina.modality == "Fundus"
    assert len(layouts.read(chest, tmp_path, None).rows) == COUNTS["test"]
    assert [r.label for r in layouts.read(retina, tmp_path, None).rows] == [i % 5 for i in range(9)]
