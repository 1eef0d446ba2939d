"""data/sources/parquet.py: tables that hold their pictures, row by row, whatever is wrong with some."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import closed_folder
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unimed_jax.cli import data as cli
from unimed_jax.data import label_captions
from unimed_jax.data.export import export
from unimed_jax.data.record import hash_patient
from unimed_jax.data.shards import Manifest, Shards, find_sources
from unimed_jax.data.sources.parquet import Parquet
from unimed_jax.errors import DataError, UsageError

CLASSES = ["normal", "pneumonia"]


def picture(seed, kind="PNG", size=20):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 2), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write(file, rows, *, group=5, **options):
    """Rows as Hugging Face's `datasets` writes them: {bytes, path}, numbers of classes, their names in the schema."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"image": image, "caption": pa.string(), "label": pa.int64(), "patient": pa.string()}
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, schema=pa.schema(kinds.items(), metadata=about))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group, **options)


def row(i, **changes):
    values = {
        "image": {"bytes": picture(i, "PNG" if i % 2 else "JPEG"), "path": f"{i}.png"},
        "caption": f"A film of the chest, number {i}.",
        "label": i % 2,
        "patient": f"p{i // 3}",
    }
    return values | changes


def records(root, name="parquet"):
    folder = find_sources(root)[name]
    return {e.key: e for split in Manifest.read(folder).splits for e in Shards(folder, split)}


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_data_set_as_on_hugging_face(tmp_path, capsys):
    raw = tmp_path / "raw" / "data"
    write(raw / "train-00000-of-00002.parquet", [row(i) for i in range(13)])
    write(raw / "train-00001-of-00002.parquet", [row(i) for i in range(13, 20)])
    write(raw / "validation-00000-of-00001.parquet", [row(i) for i in range(20, 26)])
    argv = ["build", "parquet", "--raw", str(tmp_path / "raw"), "--name", "films", "--shards", "3"]
    argv += ["--set", "label=label", "--set", "modality=X-ray", "--set", "patient=patient"]
    for workers in ("1", "2"):
        assert cli.run([*argv, "--out", str(tmp_path / workers), "--workers", workers]) == 0
        assert "train 20, val 6 records; rejected: none" in capsys.readouterr().out
    assert files(tmp_path / "1") == files(tmp_path / "2")
    found = records(tmp_path / "1", "films")
    for i in range(26):
        place = ("train-00000-of-00002", 0) if i < 13 else ("train-00001-of-00002", 13)
        place = place if i < 20 else ("validation-00000-of-00001", 20)
        e = found[f"films/data/{place[0]}/{i - place[1]:07d}"]
        assert e.image == row(i)["image"]["bytes"]  # the table's bytes
        assert [(c.text, c.kind) for c in e.captions] == [(row(i)["caption"], "original")]
        assert e.labels == (f"label:{CLASSES[i % 2]}",)
        assert (e.modality, e.patient) == ("X-ray", hash_patient(f"p{i // 3}", "films"))
        assert e.split == ("train" if i < 20 else "val")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/holdout-00000-of-00001.parquet", "holdout"),  # never taken for training
        ("data/train-00000-of-00001-0123abcd.parquet", "train"),
        ("default/validation/0000.parquet", "val"),
        ("chest_test.parquet", "test"),
        ("train/test-00000-of-00001.parquet", "test"),
        ("contest.parquet", "train"),
        ("films.parquet", "train"),
    ],
)
def test_splits_by_name(tmp_path, name, split):
    write(tmp_path / name, [row(0)])
    assert [r.split for r in Parquet(raw=tmp_path).items()] == [split]


def test_columns_of_other_names_and_kinds(tmp_path):
    rows = [
        {
            "id": f"study {i}",
            "pixels": picture(i),
            "said": [f"Seen: {i}.", "A slice."],
            "text": f"Report {i}.",
            "seen": ["mass", "edema"][: i % 3],
            "device": ["CT", "MRI"][i % 2],
            "fold": ["train", "valid"][i % 2],
        }
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=3)
    source = Parquet(
        raw=tmp_path / "x.parquet",
        caption="said",
        report="text",
        label="seen",
        modality="device",
        split="fold",
        key="id",
    )
    export(source, tmp_path / "out", shards=2)
    found = records(tmp_path / "out")
    for i, r in enumerate(rows):
        e = found[f"parquet/study {i}"]
        assert e.image == r["pixels"]
        assert [(c.text, c.kind) for c in e.captions] == [
            (f"Seen: {i}.", "original"),
            ("A slice.", "original"),
            (f"Report {i}.", "report"),
        ]
        assert e.labels == tuple(f"seen:{x}" for x in r["seen"])
        assert (e.modality, e.split) == (r["device"], ["train", "val"][i % 2])


def test_every_row_is_written_or_rejected_with_its_reason(tmp_path):
    broken = picture(3)[:200]
    rows = [row(i) for i in range(40)]
    rows[4] = row(4, image={"bytes": None, "path": "4.png"})
    rows[5] = row(5, image=None)
    rows[6] = row(6, image={"bytes": broken, "path": None})
    rows[7] = row(7, caption=None)
    rows[8] = row(8, caption="nul \x00")
    rows[9] = row(9, label=7)
    rows[10] = row(10, label=-1)  # not labelled
    rows[11] = row(11, label=None)
    write(tmp_path / "raw" / "a.parquet", rows)
    clean = [row(i) for i in range(40)]
    write(tmp_path / "clean" / "a.parquet", clean)
    manifest = export(Parquet(raw=tmp_path / "raw", label="label"), tmp_path / "out", shards=2, max_bad=1)
    assert manifest.rejects == {
        "annotation": 1,
        "caption_control": 1,
        "caption_empty": 1,
        "decode_error": 1,
        "missing": 2,
    }
    export(Parquet(raw=tmp_path / "clean", label="label"), tmp_path / "all", shards=2)
    bad, good = records(tmp_path / "out"), records(tmp_path / "all")
    assert len(bad) + sum(manifest.rejects.values()) == len(rows)
    changed = {f"parquet/a/{i:07d}" for i in (10, 11)}
    assert {k: e for k, e in bad.items() if k not in changed} == {
        k: good[k] for k in bad if k not in changed
    }  # the others are as without them
    assert all(bad[k].labels == () for k in changed)


def test_a_damaged_row_group_is_listed_and_the_others_are_kept(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, [row(i) for i in range(20)])
    table = pq.ParquetFile(file)
    chunk = table.metadata.row_group(2).column(0)
    data = bytearray(file.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data[begin : begin + 300] = bytes(300)
    file.write_bytes(data)
    manifest = export(Parquet(raw=file), tmp_path / "out", shards=3, max_bad=1)
    assert manifest.rejects == {"unreadable": 5}
    assert {int(k[-7:]) for k in records(tmp_path / "out")} == set(range(20)) - set(range(10, 15))
    whole = bytes(data)
    for damaged in (whole[:-100], whole.replace(b"patient", b"\x80atient")):  # names are UTF-8
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            Parquet(raw=file).items()


def test_captions_by_label(tmp_path):
    write(tmp_path / "a.parquet", [row(i) for i in range(6)])
    made = [
        label_captions.Label(
            triplet=label_captions.Triplet(modality="X-ray", anatomy="chest", finding=f),
            captions=[{"text": f"Film: {f}.", "kind": "llm"}],
        )
        for f in CLASSES
    ]
    said = tmp_path / "said.json"
    label_captions.write(said, label_captions.LabelCaptions(labels=made))
    options = {"finding": "label", "anatomy": "chest", "modality": "X-ray", "label_captions": str(said)}
    source = Parquet(raw=tmp_path / "a.parquet", **options)
    digests = [repr(r) for r in source.items()]
    export(source, tmp_path / "out")
    for k, e in records(tmp_path / "out").items():
        finding = CLASSES[int(k[-1]) % 2]
        assert [(c.text, c.kind) for c in e.captions][1:] == [(f"Film: {finding}.", "llm")]
        assert e.labels == (f"finding:{finding}",)
    made[0].captions.append({"text": "Another film.", "kind": "llm"})
    label_captions.write(said, label_captions.LabelCaptions(labels=made))
    assert not set(digests) & {repr(r) for r in source.items()}  # other captions, another export
    label_captions.write(said, label_captions.LabelCaptions(labels=made[:1]))
    with pytest.raises(DataError, match=r"a\.parquet row 1: label .*pneumonia.* has no captions"):
        source.items()
    with pytest.raises(UsageError, match="captions by label need"):
        Parquet(raw=tmp_path, label_captions=str(said))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"image": "imge"}, "no column 'imge'. Did you mean \"image\""),
        ({"image": "label"}, "column 'label' is int64"),
        ({"caption": "captoin"}, "no column 'captoin'"),
        ({"modality": "Xray"}, "no column 'Xray'. Did you mean \"X-ray\""),
        ({"key": "patient"}, "key parquet/p0 is there twice: a.parquet row 0 and a.parquet row 1"),
        ({"split": "caption"}, "is no name for a split"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, options, cause):
    write(tmp_path / "a.parquet", [row(i) for i in range(6)])
    with pytest.raises(DataError) as e:
        export(Parquet(raw=tmp_path, **options), tmp_path / "out")
    assert cause in e.value.cause


def test_tables_without_pictures_or_captions_are_refused(tmp_path):
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 0 columns that hold bytes"):
        Parquet(raw=tmp_path).items()
    pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column of captions"):
        Parquet(raw=tmp_path).items()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        Parquet(raw=tmp_path).items()
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"no \.parquet below"):
        Parquet(raw=tmp_path).items()


def test_a_report_in_the_wrong_place_is_not_repeated_whole(tmp_path):
    report = "The heart is of normal size, the lungs are clear. " * 9 + "Anna Muster, born 1950."
    write(tmp_path / "a.parquet", [row(i, caption=report) for i in range(3)])
    with pytest.raises(DataError, match="is no name for a split") as e:
        export(Parquet(raw=tmp_path, split="caption"), tmp_path / "out")
    assert len(e.value.line()) < 200
    with pytest.raises(DataError, match="no item is left"):
        export(Parquet(raw=tmp_path, modality="caption"), tmp_path / "out", max_bad=1)
    (rejects,) = (tmp_path / "out").rglob("rejects.jsonl")
    assert "Muster" not in rejects.read_text()


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    cells = [pa.array([picture(0)]), pa.array(["a film"]), pa.array(["another"])]
    pq.write_table(pa.Table.from_arrays(cells, ["image", "caption", "caption"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns that are called 'caption'"):
        export(Parquet(raw=tmp_path), tmp_path / "out")


def test_cells_that_hold_nothing_and_zero(tmp_path):
    columns = {"image": [picture(i) for i in range(3)], "caption": ["a film"] * 3}
    columns |= {
        "grade": [1.5, float("nan"), None],
        "subject": [0.0, float("nan"), None],
        "number": [0, 1, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for patient, known in (("subject", "0.0"), ("number", "0")):
        source = Parquet(raw=tmp_path, name=patient, label="grade", patient=patient, salt="s")
        export(source, tmp_path / "out")
        first, *others = records(tmp_path / "out", patient).values()
        assert (first.labels, first.patient) == (("grade:1.5",), hash_patient(known, "s"))
        assert [e.labels for e in others] == [(), ()]
        assert others[1].patient == "" == others[0].patient * (patient == "subject")


def test_times_that_python_does_not_know_cost_their_rows(tmp_path):
    columns = {"image": [picture(i) for i in range(3)], "caption": ["a film"] * 3}
    columns["taken"] = pa.array([0, 10**15, None], pa.timestamp("s"))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    manifest = export(Parquet(raw=tmp_path, label="taken"), tmp_path / "out", max_bad=1)
    assert (manifest.rejects, manifest.examples("train")) == ({"annotation": 1}, 2)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        Parquet(raw=tmp_path, split="taken").items()


def test_a_file_that_is_cut_while_it_is_exported(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, [row(i) for i in range(6)])
    source = Parquet(raw=file)
    rows = source.items()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        source.example(rows[0])


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        write(tmp_path / folder / "a.parquet", [row(i) for i in range(3)])
    (tmp_path / "b" / "link.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"link\.parquet cannot be read as Parquet"):
        Parquet(raw=tmp_path).items()
    closed_folder.close(tmp_path / "b", monkeypatch)
    with pytest.raises(DataError, match=r"the folder .*/b cannot be listed \(Permission denied\)"):
        Parquet(raw=tmp_path).items()


MEMORY = """
import sys, pyarrow as pa
from unimed_jax.data.sources.parquet import Parquet
source = Parquet(raw=sys.argv[1])
items = source.items()
assert sum(len(source.example(i).image) for i in items) == 400 * 200_000
print(pa.default_memory_pool().max_memory())
"""


def test_memory_is_that_of_a_page_not_of_a_row_group(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(i, image={"bytes": rng.bytes(200_000), "path": None}) for i in range(400)]
    write(tmp_path / "a.parquet", rows, group=400, write_batch_size=8)  # 80 MB in one group, pages of 2 MB
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a.parquet")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 25e6
