"""UniMed's 13 sources: from published annotations and from the original's tars to the same records."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import tarfile
from typing import Any

import closed_folder
import pytest
from test_cli_data import outcome
from unimed_tree import BUILDERS, jpeg, write_csv, write_tars

from unimed_jax import config
from unimed_jax.data import markers, pipeline, text, verify
from unimed_jax.data.blocks import caption_id
from unimed_jax.data.export import export
from unimed_jax.data.record import hash_patient
from unimed_jax.data.shards import Manifest, Shards
from unimed_jax.data.sources import SOURCES, modality, open_source, unimed_rows
from unimed_jax.data.sources.unimed import LAYOUTS
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError


@pytest.fixture
def tree(request, tmp_path):
    return BUILDERS[request.param](tmp_path / "it's raw")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "it's raw").mkdir()
    monkeypatch.chdir(tmp_path)  # where a cell that was executed would leave its mark


def records(root, name):
    shards = Shards(root / name / "1.0.0", "train")
    return {e.key: e for e in (shards[i] for i in range(len(shards)))}


def rejects(root, name):
    lines = (root / name / "1.0.0" / "rejects.jsonl").read_text().splitlines()
    return {r["key"]: r["reason"] for r in map(json.loads, lines)}


def said(example):
    return [(c.text, c.kind) for c in example.captions]


def test_every_source_has_a_layout_a_name_and_a_tree():
    assert set(LAYOUTS) == set(config.UNIMED_SOURCES) == set(BUILDERS)
    assert set(config.UNIMED_SOURCES) <= set(SOURCES)


@pytest.mark.parametrize("tree", BUILDERS, indirect=True)
def test_a_raw_tree_becomes_the_records_that_it_says(tree, tmp_path):
    source = open_source(tree.name, {"raw": str(tree.raw), "captions": str(tree.captions)})
    export(source, tmp_path / "out", max_bad=0.9)
    found = records(tmp_path / "out", tree.name)
    assert found.keys() == tree.expected.keys()
    for key, want in tree.expected.items():
        e = found[key]
        assert said(e) == want.pop("captions"), key
        assert e.image == want.pop("image")
        assert e.patient == hash_patient(want.pop("patient", ""), tree.name)
        for name, value in want.items():
            assert getattr(e, name) == value, (key, name)
    left = rejects(tmp_path / "out", tree.name)
    assert left == tree.rejects
    assert len(found) + len(left) == len(source.items())  # written + rejected = seen
    assert verify.check(tmp_path / "out").ok
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("tree", BUILDERS, indirect=True)
def test_the_command_writes_what_tfds_and_a_training_read(tree, tmp_path, capsys):
    import tensorflow_datasets as tfds

    root = tmp_path / "out"
    text.train_wordpiece(
        [t for w in tree.expected.values() for t, _ in w["captions"]], 256, tmp_path / "words"
    )
    places = (
        "--raw",
        str(tree.raw),
        "--captions",
        str(tree.captions),
        "--tokenizer",
        str(tmp_path / "words"),
    )
    code, out, err = outcome(capsys, "build", tree.name, *places, "--max-bad", "0.9", "--out", str(root))
    assert code == 0, err
    assert f"train {len(tree.expected)} records; rejected: " in out
    builder: Any = tfds.builder_from_directory(root / tree.name / "1.0.0")
    theirs = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    found = {row["key"].decode(): row for row in theirs}
    assert found.keys() == tree.expected.keys()
    for key, want in tree.expected.items():
        row = found[key]
        assert row["image"] == want["image"]
        captions = [
            (t.decode(), k.decode()) for t, k in zip(*map(row["captions"].get, ("text", "kind")), strict=True)
        ]
        assert captions == want["captions"], key
        if "modality" in want:
            assert row["modality"].decode() == want["modality"]
    # A training reads every record once an epoch, with a caption of its own.
    c = config.Train(batch_size=1, duration=config.Duration(epochs=1))
    c.model.vision.image_size, c.model.text.context_length = 16, 256
    c.data = config.Data(root=str(root), sources=(config.Source(name=tree.name),))
    reader = pipeline.make(c, tokenizer=text.load_tokenizer(root))
    with contextlib.closing(reader.batches()) as batches:
        drawn = [next(batches)["caption_id"][0] for _ in range(reader.steps_per_epoch)]
    left = [{caption_id(t) for t, _ in w["captions"]} for w in tree.expected.values()]
    assert len(drawn) == len(left)
    for caption in drawn:
        left.remove(next(own for own in left if caption in own))


def test_tars_are_named_one_by_one_or_by_their_folder(tmp_path, capsys):
    tree = BUILDERS["openi"](tmp_path / "it's raw")
    write_tars(tree, tmp_path / "tars")
    tars = sorted(map(str, (tmp_path / "tars").glob("*.tar")))
    shutil.copy(tars[0], tmp_path / "tars" / "more.tar")
    for out, given in (
        ("folder", [str(tmp_path / "tars")]),
        ("each", [*tars, str(tmp_path / "tars" / "more.tar")]),
    ):
        code, _, err = outcome(capsys, "import-wds", *given, "--name", "openi", "--out", str(tmp_path / out))
        assert code == 0, err
    files = sorted(
        p.relative_to(tmp_path / "folder") for p in (tmp_path / "folder").rglob("*") if p.is_file()
    )
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "each" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes()
    shutil.copytree(tmp_path / "tars", tmp_path / "again")
    code, _, err = outcome(
        capsys,
        "import-wds",
        tars[0],
        str(tmp_path / "again"),
        "--name",
        "openi",
        "--out",
        str(tmp_path / "x"),
    )
    assert code == 3
    assert "two tars are called" in err


@pytest.mark.parametrize("tree", BUILDERS, indirect=True)
def test_the_original_tars_hold_the_same_pictures_and_captions(tree, tmp_path, capsys):
    write_tars(tree, tmp_path / "tars")
    code, out, err = outcome(
        capsys,
        "import-wds",
        str(tmp_path / "tars"),
        "--name",
        tree.name,
        "--out",
        str(tmp_path / "out"),
    )
    assert code == 0, err
    assert f"{len(tree.joined)} records" in out
    found = records(tmp_path / "out", tree.name).values()
    got = sorted((e.image, said(e)) for e in found)
    kinds = {"retina_part2": "original"}  # the tars do not say that its captions come from a template
    want = [
        (w["image"], [(t, kinds.get(tree.name, k)) for t, k in w["captions"]]) for w in tree.expected.values()
    ]
    assert got == sorted(want)
    if tree.name != "radimagenet":  # there the path says it, which the tars have not
        assert {(e.image, e.modality) for e in found} == {
            (w["image"], w.get("modality", modality.named(w["captions"][0][0])))
            for w in tree.expected.values()
        }
    assert Manifest.read(tmp_path / "out" / tree.name / "1.0.0").licence == LAYOUTS[tree.name].licence


@pytest.mark.parametrize("marker", [m for m in markers.MARKERS if m.source], ids=lambda m: m.source)
def test_annotations_and_tars_give_the_same_texts_whatever_surrounds_them(marker):
    rng = random.Random(0)
    pieces = ["lung", "b ", ".", ". ", " ", "..", "\n", "_dr_", "nan", "N/A", "é", "?"]
    for _ in range(1000):
        texts = ["".join(rng.choices(pieces, k=rng.randrange(7))) for _ in range(rng.randrange(1, 9))]
        tar = "".join(
            (t if marker.source == "radimagenet" else t.strip(".")) + "." + marker.text for t in texts
        )
        tar += f"{marker.text}noreportpresent" if marker.report else ""
        listed = unimed_rows.listed(["[]", repr(texts)], "key")
        assert [c.text for c in markers.split(tar, marker.source)] == [
            c.text for c in listed if not markers.is_placeholder(c.text)
        ], texts


def test_annotations_may_be_named_by_their_folder_and_pictures_by_theirs(tmp_path):
    tree = BUILDERS["chexpert"](tmp_path / "it's raw")
    source = open_source(
        "chexpert", {"raw": str(tree.raw / "CheXpert-v1.0-small"), "captions": str(tree.captions.parent)}
    )
    assert source.example(source.items()[0]).modality == "X-ray"


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    tree = BUILDERS["openi"](tmp_path / "it's raw")
    for options, message in (
        ({"raw": tmp_path / "nowhere", "captions": tree.captions}, "no folder"),
        ({"raw": tree.raw, "captions": tmp_path / "nowhere"}, "no annotation file"),
        ({"raw": tree.raw, "captions": tmp_path}, r"filter_cap\.json cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            open_source("openi", options).items()
    with pytest.raises(UsageError, match="several annotation files") as e:
        open_source("openi", {"raw": tree.raw, "captions": tree.captions / "filter_cap.json"}).items()
    assert "filter_cap.json,openai_refined_concepts.json" in e.value.remedy
    short = json.loads((tree.captions / "openai_refined_concepts.json").read_text())
    short["refined_captions"].pop()
    (tree.captions / "openai_refined_concepts.json").write_text(json.dumps(short))
    with pytest.raises(DataError, match=r"has 4 entries and .* 3: they belong together"):
        open_source("openi", {"raw": tree.raw, "captions": tree.captions}).items()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("quilt", "a,b\n1,2\n", "has no column 2"),
        ("retina_part3", "image,other\nx,y\n", "has no column 'caption'"),
        ("llava_med_alignment_set", '{"image": 1}', "holds no list"),
        ("llava_med_alignment_set", "[" * 100_000, "is no JSON"),
        ("llava_med_hq_60k_set", "[1, 2]", "no table of lists"),
        ("openi", '{"annotations": 3}', "no list 'annotations'"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, name, content, message):
    folder = tmp_path / "notes"
    folder.mkdir()
    for file in LAYOUTS[name].annotations:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(name, {"raw": str(tmp_path), "captions": str(folder)}).items()


def test_bytes_that_are_not_utf8_reject_their_row_only(tmp_path):
    tree = BUILDERS["roco"](tmp_path / "it's raw")
    tree.captions.write_bytes(tree.captions.read_bytes() + b"two,caf\xe9\r\n\xff\xfe,A path\r\n")
    source = open_source("roco", {"raw": str(tree.raw), "captions": str(tree.captions)})
    export(source, tmp_path / "out", max_bad=0.9)
    more = rejects(tmp_path / "out", "roco").items() - tree.rejects.items()
    assert more == {
        ("roco/two.jpg#2", "caption_not_utf8"),
        ("roco/unnamed, train_captions.csv line 9", "annotation"),
    }


def exported(tmp_path, name, **options):
    source = open_source(name, {"raw": str(tmp_path / "raw"), "captions": str(tmp_path), **options})
    manifest = export(source, tmp_path / "out", max_bad=1)
    found, bad = records(tmp_path / "out", name), rejects(tmp_path / "out", name)
    assert len(found) + len(bad) == len(source.items()) == sum(manifest.rejects.values()) + len(found)
    return {k.removeprefix(f"{name}/"): e for k, e in found.items()}, bad


def pictures_of(tmp_path, *names):
    for name in names:
        file = tmp_path / "raw" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(1))


def test_a_stray_quote_costs_its_own_row_only(tmp_path):
    pictures_of(tmp_path, "1.jpg", "3.jpg", "4.jpg", "5.jpg")
    (tmp_path / "train_captions.csv").write_text(
        'ID,Caption\r\n1,One\r\n2,"An open quote\r\n3,"Three ""quoted"" words,\r\non two lines"\r\n'
        '4,"Four"\r\n5,Five,\r\n6,One comma, too many\r\n7,"open until the end\r\n8\r\n',
        newline="",
    )
    found, bad = exported(tmp_path, "roco")
    assert {k: e.captions[0].text for k, e in found.items()} == {
        "1.jpg": "One",
        "3.jpg": 'Three "quoted" words,\r\non two lines',
        "4.jpg": "Four",
        "5.jpg": "Five",
    }
    assert {k.split("line ")[1] for k in bad} == {"3", "8", "9", "10"}


def test_the_first_row_of_a_table_without_header_is_a_row(tmp_path):
    pictures_of(tmp_path, "1.png", "2.png")
    rows = [[f"['{n}']", "[]", "['A finding is seen']"] for n in ("1.png", "2.png")]
    write_csv(tmp_path / "Chest-Xray8_with_captions.csv", rows)
    assert set(exported(tmp_path, "chest_xray8")[0]) == {"1.png", "2.png"}


def test_labels_that_cannot_be_stored_reject_their_row_only(tmp_path):
    names = [f"{i}.png" for i in range(3)]
    pictures_of(tmp_path, *names)
    labels = (r"['\udcff']", r"['a\x00b']", r"['a\n b']")
    rows = [[f"['{n}']", x, "['A finding is seen']"] for n, x in zip(names, labels, strict=True)]
    write_csv(tmp_path / "Chest-Xray8_with_captions.csv", [["", "l", "c"], *rows])
    found, bad = exported(tmp_path, "chest_xray8")
    assert {k: e.labels for k, e in found.items()} == {"2.png": ("finding:a b",)}
    assert set(bad.values()) == {"label"}


def test_a_key_is_unique_whatever_the_paths_are_called(tmp_path):
    pictures_of(tmp_path, "a.png", "a.png#2")
    rows = [[f"['{n}']", "[]", "['A finding is seen']"] for n in ("a.png", "a.png", "a.png#2", "a.png")]
    write_csv(tmp_path / "Chest-Xray8_with_captions.csv", [["", "l", "c"], *rows])
    found, _ = exported(tmp_path, "chest_xray8")
    assert set(found) == {"a.png", "a.png#2", "a.png#2#2", "a.png#3"}


def test_pipes_and_devices_are_not_read(tmp_path):
    pictures_of(tmp_path, "a.png")
    os.mkfifo(tmp_path / "raw" / "pipe.png")
    (tmp_path / "raw" / "zero.png").symlink_to("/dev/zero")
    rows = [["image", "caption"], *([n, "A retina"] for n in ("a.png", "pipe.png", "zero.png"))]
    write_csv(tmp_path / "39_MM_Retinal_dataset.csv", rows)
    found, bad = exported(tmp_path, "retina_part3")
    assert (set(found), set(bad.values())) == ({"a.png"}, {"unreadable"})


def test_another_salt_is_another_export(tmp_path):
    tree = BUILDERS["chexpert"](tmp_path)
    options = {"raw": str(tree.raw), "captions": str(tree.captions)}
    patients = []
    for salt in ("one", "two"):
        source = open_source("chexpert", options | {"salt": salt})
        export(source, tmp_path / "out", max_bad=1)
        patients.append({e.patient for e in records(tmp_path / "out", "chexpert").values()})
        (tmp_path / "out" / "chexpert" / "1.0.0" / "manifest.json").unlink()  # as after a kill
    assert not patients[0] & patients[1]


def test_what_a_figure_says_is_text_or_nothing_or_a_reject(tmp_path):
    pictures_of(tmp_path, *(f"{i}.jpg" for i in range(5)))
    entries = [
        {"pair_id": "0", "fig_caption": float("nan"), "in_text_mention": None},
        {"pair_id": "1", "fig_caption": ["One"], "in_text_mention": [{"tokens": "It is seen"}]},
        {"pair_id": "2", "fig_caption": "Two", "in_text_mention": [{"tokens": ["It", "is"]}]},
        {"pair_id": "3", "fig_caption": None, "in_text_mention": []},
    ]
    (tmp_path / "llava_med_instruct_fig_captions.json").write_text(json.dumps({"x": entries}))
    found, bad = exported(tmp_path, "llava_med_hq_60k_set")
    assert set(found) == {"1.jpg:mention", "2.jpg:caption"}
    assert set(bad) == {f"llava_med_hq_60k_set/{k}" for k in ("1.jpg:caption", "2.jpg:mention")}


def test_rewrites_that_are_no_texts_reject_their_entry(tmp_path):
    pictures_of(tmp_path, "1.png", "2.png", "3.png")
    entries = [{"image_id": str(i), "caption": "Heart is big"} for i in range(1, 4)]
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": entries}))
    rewrites = [["Big heart"], [5, None], [{"text": "x"}]]
    (tmp_path / "openai_refined_concepts.json").write_text(json.dumps({"refined_captions": rewrites}))
    found, bad = exported(tmp_path, "openi")
    assert ({k: said(e)[1:] for k, e in found.items()}, len(bad)) == ({"1.png": [("Big heart.", "llm")]}, 2)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), ("a,b\n1,x".encode("utf-16"), "not UTF-8")]
)
def test_tables_that_are_empty_or_in_another_encoding(tmp_path, content, message):
    (tmp_path / "raw").mkdir()
    (tmp_path / "train_captions.csv").write_bytes(content)
    source = open_source("roco", {"raw": str(tmp_path / "raw"), "captions": str(tmp_path)})
    with pytest.raises(DataError, match=message):
        source.items()


def test_json_with_a_byte_order_mark_is_read_and_a_repeated_key_is_not(tmp_path):
    pictures_of(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "pmc_oa.jsonl").write_text(
        '\ufeff{"image": "a.jpg", "caption": "A lung"}\n{"image": "a.jpg", "image": "b.jpg", "caption": "x"}\n'
        '{"image": "b.jpg", "capt'
    )
    found, bad = exported(tmp_path, "pmc_clip")
    assert (set(found), len(bad)) == ({"a.jpg"}, 2)
    file = tmp_path / "llava_med_instruct_fig_captions.json"
    file.write_text('\ufeff{"x": [], "x": []}')
    source = open_source("llava_med_hq_60k_set", {"raw": str(tmp_path / "raw"), "captions": str(file)})
    with pytest.raises(DataError, match="the key 'x' is there twice"):
        source.items()


def test_hidden_names_leave_no_path_behind(tmp_path):
    tree = BUILDERS["mimic_cxr"](tmp_path / "it's raw")
    options = {"raw": str(tree.raw), "captions": str(tree.captions), "hide_names": "true", "salt": "s"}
    export(open_source("mimic_cxr", options), tmp_path / "out", max_bad=0.9)
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"p10000030" not in file.read_bytes(), file


def test_workers_do_not_change_the_bytes(tmp_path):
    tree = BUILDERS["retina_part1"](tmp_path / "it's raw")
    made = []
    for workers in (1, 2):
        source = open_source("retina_part1", {"raw": str(tree.raw), "captions": str(tree.captions)})
        out = tmp_path / f"out{workers}"
        export(source, out, shards=2, workers=workers)
        made.append({p.name: p.read_bytes() for p in sorted(out.rglob("*array_record*"))})
    assert made[0] == made[1]
    assert len(made[0]) == 4  # two shards and their sidecars


@pytest.mark.parametrize(
    ("caption", "want"),
    [
        ("Axial contrast-enhanced CT scan", "CT"),
        ("T2-weighted image of the knee", "MRI"),
        ("Chest X-ray, posteroanterior view", "X-ray"),
        ("Transabdominal ultrasound", "Ultrasound"),
        ("H&E stain, x40", "Histopathology"),
        ("Haematoxylin and eosin", "Histopathology"),
        ("Fundus photograph of the left eye", "Fundus"),
        ("CT (a) and MRI (b)", ""),
        ("18F-FDG PET/CT", ""),
        ("CT angiography", ""),
        ("A direct effect", ""),
        ("gastric fundus on endoscopy", ""),
        ("A mass in the gastric fundus", ""),
        ("CT of a mass in the gastric fundus", "CT"),
        ("Median nerve of a patient with CTS", ""),
        ("Ct values of the reaction", ""),
        ("X-ray diffraction of the crystal", ""),
        ("Histologically proven tumour of the hand", ""),
        ("Histological section", "Histopathology"),
        ("", ""),
    ],
)
def test_modality_is_named_or_unknown_never_guessed(caption, want):
    assert modality.named(caption) == want


# --- tars


def tar(path, members):
    import io

    with tarfile.open(path, "w") as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def test_tars_of_anyone(tmp_path):
    (tmp_path / "t" / "b").mkdir(parents=True)
    tar(
        tmp_path / "t" / "one.tar",
        [
            ("x/1.png", jpeg(1)), ("x/1.json", b'{"caption": "First", "url": "u"}'),
            ("x/2.jpg", jpeg(2)), ("x/2.json", b'{"captions": ["A", "B"]}'),
            ("3.jpg", jpeg(3)), ("3.seg.png", b"mask"), ("3.txt", b"\xef\xbb\xbfWith a mark"),
            ("4.jpg", jpeg(4)), ("5.txt", b"No picture"), ("6.jpg", jpeg(6)), ("6.json", b"{"),
            ("7.jpg", jpeg(7)), ("7.jpg", jpeg(8)), ("7.txt", b"Twice"),
            ("../8.jpg", jpeg(9)), ("../8.txt", b"Outside"), ("9.jpg", b"no picture"), ("9.txt", b"Nine"),
            ("10.jpg", jpeg(10)), ("10.json", b'{"caption": 7}'),
        ],
    )  # fmt: skip
    tar(tmp_path / "t" / "b" / "two.tar", [("1.jpg", jpeg(11)), ("1.txt", b"The same number in another tar")])
    source = open_source("webdataset", {"raw": str(tmp_path / "t"), "name": "mine", "modality": "CT"})
    export(source, tmp_path / "out", max_bad=0.9)
    found = records(tmp_path / "out", "mine")
    assert {k: [c.text for c in e.captions] for k, e in found.items()} == {
        "mine/one/x/1": ["First"],
        "mine/one/x/2": ["A", "B"],
        "mine/one/3": ["With a mark"],
        "mine/b/two/1": ["The same number in another tar"],
    }
    assert {e.modality for e in found.values()} == {"CT"}
    assert found["mine/b/two/1"].image == jpeg(11)
    assert rejects(tmp_path / "out", "mine") == {
        "mine/one/4": "annotation",
        "mine/one/5": "annotation",
        "mine/one/6": "annotation",
        "mine/one/7": "annotation",
        "mine/one/'../8'": "annotation",
        "mine/one/9": "decode_error",
        "mine/one/10": "annotation",
    }
    assert len(found) + 7 == len(source.items())


def test_a_tar_that_is_none(tmp_path):
    tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.txt", b"x")])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar\.gz is no whole, uncompressed tar") as e:
        open_source("webdataset", {"raw": str(tmp_path / "c")}).items()
    assert "gunzip" in e.value.remedy
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "a.tar").read_bytes()[:900])
    with pytest.raises(DataError, match="no whole, uncompressed tar"):
        open_source("webdataset", {"raw": str(cut)}).items()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar below"):
        open_source("webdataset", {"raw": str(tmp_path / "empty")}).items()
    with pytest.raises(UsageError, match="modality is 'Ct'"):
        open_source("webdataset", {"raw": str(tmp_path), "modality": "Ct"})


def test_no_damage_of_a_tar_loses_samples_in_silence(tmp_path):
    file = tmp_path / "a.tar"
    tar(file, [(f"{i}.{s}", d) for i in range(3) for s, d in (("jpg", jpeg(i)), ("txt", b"A film."))])
    whole = file.read_bytes()
    with tarfile.open(file) as t:
        offset = t.getmembers()[2].offset

    def refused() -> str:
        with pytest.raises(DataError) as e:
            open_source("webdataset", {"raw": str(file)}).items()
        return str(e.value)

    for cut in (offset, offset + 100):  # tarfile takes both for the end
        file.write_bytes(whole[:cut])
        assert f"cut off at byte {offset}" in refused()
    file.write_bytes(whole[:offset] + b"?" + whole[offset + 1 :])
    assert f"damaged at byte {offset}" in refused()
    file.write_bytes(whole + whole)
    assert "goes on after its end mark" in refused()
    file.write_bytes(whole + bytes(5 * tarfile.RECORDSIZE))
    assert len(open_source("webdataset", {"raw": str(file)}).items()) == 3


def test_names_of_members_are_below_the_tar(tmp_path):
    names = ("./1.jpg", "./1.txt", "/etc/2.jpg", "/etc/2.txt")
    tar(tmp_path / "a.tar", [(n, jpeg(1) if n.endswith("jpg") else b"A film.") for n in names])
    one, two = open_source("webdataset", {"raw": str(tmp_path / "a.tar")}).items()
    assert (one.key, one.fault) == ("a/1", "")
    assert (two.key, two.fault) == ("a/'/etc/2'", "it leaves the folder")


def test_a_folder_of_tars_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "a.tar", [("1.jpg", jpeg(1)), ("1.txt", b"A film.")])
    closed_folder.close(tmp_path / "b", monkeypatch)
    with pytest.raises(DataError, match=r"the folder .*/b cannot be listed \(Permission denied\)"):
        open_source("webdataset", {"raw": str(tmp_path)}).items()


def test_members_that_are_no_files_are_rejected(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as t:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(info)
    (item,) = open_source("webdataset", {"raw": str(tmp_path / "links.tar")}).items()
    with pytest.raises(Reject, match="plain file"):
        open_source("webdataset", {"raw": str(tmp_path / "links.tar")}).example(item)


def test_a_tar_that_shrinks_after_it_was_indexed(tmp_path):
    tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.txt", b"x")])
    source = open_source("webdataset", {"raw": str(tmp_path / "a.tar")})
    (item,) = source.items()
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(Reject, match="ends in the middle"):
        source.example(item)


def test_the_verb_lists_sources_and_names_options(tmp_path, capsys):
    code, _, err = outcome(capsys, "build", "chexpert", "--out", str(tmp_path / "o"))
    assert (code, err.count("\n")) == (2, 1)
    assert "needs --raw, --captions" in err
    code, _, err = outcome(
        capsys, *("build", "chexpert", "--raw", str(tmp_path), "--captions", "x", "--name", "other"),
        *("--out", str(tmp_path / "o")),
    )  # fmt: skip
    assert code == 2
    assert "no option 'name'" in err
    write_csv(tmp_path / "06_DEN.csv", [["image", "categories"], ["a.jpg", "['drusen']"]])
    code, _, err = outcome(
        capsys, *("build", "retina_part2", "--raw", str(tmp_path), "--captions", str(tmp_path / "06_DEN.csv")),
        *("--out", str(tmp_path / "o")),
    )  # fmt: skip
    assert code == 3
    assert "missing 1" in err
