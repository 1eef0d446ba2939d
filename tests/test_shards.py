"""data/{shards,export,writer,validate,lock,pool,verify}.py: what is stored is whole, the same, and checked."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimed_jax.data import images, limits, lock, open_files, record, shards, stats, validate, verify
from unimed_jax.data.export import default_shards, export, write_range
from unimed_jax.data.record import Caption, Example
from unimed_jax.data.shards import Manifest, Shards, find_sources
from unimed_jax.data.sources.folder import Folder
from unimed_jax.data.text import Tokenizer, train_wordpiece
from unimed_jax.data.validate import Reject, clean_captions
from unimed_jax.errors import DataError, Fault, UsageError

N = 60


def jpeg(seed, size=24):
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size + 3, 3), dtype=np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_raw(folder, n=N, extra=()):
    """A folder of n images and its table; extra rows are put in the middle. Patients do not cross the splits."""
    (folder / "img").mkdir(parents=True)
    rows = []
    for i in range(n):
        (folder / "img" / f"{i:03d}.jpg").write_bytes(jpeg(i))
        split = "test" if i % 5 == 0 else "train"
        rows.append(
            {
                "file": f"img/{i:03d}.jpg",
                "caption": f"A frontal chest radiograph, number {i}.",
                "caption2": "An X-ray of the chest." if i % 2 else "",
                "labels": "region:chest; view:frontal",
                "modality": "X-ray",
                "patient": f"{split} {i // 10}",
                "split": split,
            }
        )
    rows[n // 2 : n // 2] = [dict.fromkeys(rows[0], "") | row for row in extra]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Folder(raw=folder, captions=folder / "table.csv", name="demo", licence="CC0", description="Noise.")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_wordpiece(
        ["A frontal chest radiograph, number 0123456789.", "An X-ray of the chest."] * 9,
        120,
        tmp_path_factory.mktemp("tok"),
    )


@pytest.fixture(scope="module")
def exported(source, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    export(source, root, shards=3, tokenizer=tokenizer)
    return root


@pytest.fixture
def copy(exported, tmp_path):
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(exported, tmp_path / "copy"))


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def everything(root, name="demo"):
    folder = find_sources(root)[name]
    return {e.key: e for split in Manifest.read(folder).splits for e in Shards(folder, split)}


# --- what is written ------------------------------------------------------------------------------------------------


def test_records_hold_what_the_source_says(exported, source, tokenizer):
    records = everything(exported)
    assert len(records) == N
    for row in source.items():
        e = records[f"demo/{row.file}"]
        assert e.image == (source.raw / row.file).read_bytes()  # the source's bytes
        assert (e.height, e.width, e.image_format) == (24, 27, "jpeg")
        assert e.sha256 == hashlib.sha256(e.image).hexdigest()
        assert [c.text for c in e.captions] == [c.text for c in row.captions]
        assert [c.tokens for c in e.captions] == [tokenizer.count(c.text) for c in row.captions]
        assert (e.labels, e.modality, e.source, e.split) == (
            ("region:chest", "view:frontal"),
            "X-ray",
            "demo",
            row.split,
        )
        assert e.patient == record.hash_patient(f"{row.split} {int(row.file[4:7]) // 10}", "demo")


def test_order_is_by_the_hash_of_the_key(exported):
    for split in ("train", "test"):
        keys = [e.key for e in Shards(exported / "demo", split)]
        assert keys == sorted(keys, key=lambda k: hashlib.sha256(k.encode()).digest())


def test_same_bytes_for_any_number_of_workers(source, tokenizer, exported, tmp_path):
    export(source, tmp_path, shards=3, tokenizer=tokenizer, workers=2)
    assert digests(tmp_path) == digests(exported)


def test_manifest_and_card(exported):
    folder = exported / "demo" / "1.0.0"
    manifest = Manifest.read(folder)
    assert (manifest.source, manifest.licence, manifest.rejects) == ("demo", "CC0", {})
    assert {s: manifest.examples(s) for s in manifest.splits} == {"train": 48, "test": 12}
    for infos in manifest.splits.values():
        for info in infos:
            data = (folder / info.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (info.bytes, info.sha256)
            assert json.loads((folder / f"{info.file}.json").read_text())["sha256"] == info.sha256
    assert manifest.tokenizer == Tokenizer(exported).digest
    card = (folder / "README.md").read_text()
    assert "X-ray 48" in card
    assert "CC0" in card
    assert "Research use only" in card
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_no_patient_identifier_is_written_anywhere(tmp_path):
    source = write_raw(tmp_path / "raw", 8)
    source = dataclasses.replace(source, hide_names=True, salt="secret")
    export(source, tmp_path / "out")
    blob = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"train 0" not in blob
    assert b"img/00" not in blob
    assert b"secret" not in blob
    assert str(tmp_path).encode() not in blob


def test_tensorflow_datasets_reads_the_same(exported):
    import tensorflow_datasets as tfds

    folder = exported / "demo" / "1.0.0"
    for split in ("train", "test"):
        ours = Shards(folder, split)
        theirs = tfds.builder_from_directory(folder).as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        assert len(theirs) == len(ours)
        for i, example in enumerate(ours):
            got = theirs[i]
            assert got["image"] == example.image
            assert got["original_sha256"] == b""
            for name in ("key", "modality", "source", "patient", "split", "sha256", "image_format"):
                assert got[name].decode() == getattr(example, name)
            assert (got["height"], got["width"]) == (example.height, example.width)
            captions = zip(*(got["captions"][k] for k in ("text", "kind", "tokens")), strict=True)
            assert example.captions == tuple(
                Caption(text=t.decode(), kind=k.decode(), tokens=int(n)) for t, k, n in captions
            )
            assert tuple(x.decode() for x in got["labels"]) == example.labels
    assert len(tfds.data_source("demo", data_dir=exported, split="train[:50%]", download=False)) == 24
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("n", [1, 5, 13, 60, 99])
def test_a_sample_is_spread_over_the_splits_and_lists_no_places(exported, n, monkeypatch):
    every = [
        e.key
        for split in Manifest.read(exported / "demo" / "1.0.0").splits
        for e in Shards(exported / "demo", split)
    ]
    assert [e.key for e in verify.sample(exported, n)] == every[:: max(1, len(every) // n)][:n]
    monkeypatch.setattr(Shards, "__len__", lambda _: 10**9)  # one of so many would take gigabytes
    monkeypatch.setattr(Shards, "__getitem__", lambda _, i: i)
    assert len(verify.sample(exported, n)) == n


def test_default_number_of_shards():
    assert [default_shards(n) for n in (1, 511, 512, 2500, 65_536, 1_000_000)] == [1, 1, 2, 8, 8, 123]


# --- reading --------------------------------------------------------------------------------------------------------


def test_random_access(exported):
    records = Shards(exported / "demo", "train")
    assert len(records) == 48
    assert records[-1] == records[47]
    assert record.decode(records.raw(5)) == records[5]
    for index in (48, -49):
        with pytest.raises(IndexError):
            records[index]
    again = pickle.loads(pickle.dumps(records))
    assert again[7] == records[7]
    assert "record" in records.where(7)


def test_threads_share_one_reader(exported, monkeypatch):
    few = open_files.OpenFiles(lambda: 2)  # three shards: one is opened again and again
    monkeypatch.setattr(shards, "_OPEN", few)
    records = Shards(exported / "demo", "train")
    expected = [records[i].key for i in range(48)]
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 48, 400):
            if records[int(i)].key != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(few._open) == 2


def test_find_sources(exported, tmp_path):
    version = exported / "demo" / "1.0.0"
    for root in (exported, exported / "demo", version):
        assert find_sources(root) == {"demo": version}
    assert find_sources(tmp_path) == {}
    with pytest.raises(DataError, match="no folder"):
        find_sources(tmp_path / "missing")
    with pytest.raises(DataError, match="no records at"):
        Shards(tmp_path, "train")
    with pytest.raises(DataError, match=r"no split 'tran'\. Did you mean \"train\""):
        Shards(exported / "demo", "tran")


def first_shard(root, split="train"):
    return sorted((root / "demo" / "1.0.0").glob(f"unimed-{split}.array_record-*-of-00003"))[0]


MUTATIONS = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "tail cut": lambda data: data[:-1],
    "junk appended": lambda data: data + b"junk" * 100,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_shard_of_another_size_is_refused_when_opened(copy, mutation):
    path = first_shard(copy)
    path.write_bytes(MUTATIONS[mutation](path.read_bytes()))
    with pytest.raises(DataError, match=path.name):
        Shards(copy / "demo", "train")
    report = verify.check(copy, full=False)
    assert not report.ok
    assert path.name in report.problems[0]


def test_a_cut_shard_of_the_right_size_is_refused_by_its_count(copy):
    path = first_shard(copy)
    data = path.read_bytes()
    path.write_bytes(data[:-70_000].ljust(len(data), b"\0"))
    records = Shards(copy / "demo", "train")  # the size is right
    with pytest.raises(DataError, match=path.name):
        records[0]
    assert any(path.name in p for p in verify.check(copy, full=False).problems)


def test_a_record_bomb_is_refused_before_it_is_read(copy):
    path = first_shard(copy)
    writer = shards.array_record_module().ArrayRecordWriter(str(path), "group_size:1,zstd")
    writer.write(b"\0" * 2**27)  # 128 MiB in 128 KiB
    writer.close()
    manifest = copy / "demo/1.0.0/manifest.json"
    values = json.loads(manifest.read_text())
    info = next(s for s in values["splits"]["train"]["shards"] if s["file"] == path.name)
    info |= {"count": 1, "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match="is compressed"):
        Shards(copy / "demo", "train")[0]


def test_missing_extra_and_renamed_shards(copy):
    path = first_shard(copy)
    path.rename(path.with_name("unimed-train.array_record-00007-of-00009"))
    with pytest.raises(DataError, match=path.name):
        Shards(copy / "demo", "train")
    problems = " ".join(verify.check(copy, full=False).problems)
    assert path.name in problems
    assert "00007-of-00009 is not in the manifest" in problems


def test_every_flipped_bit_is_found_by_the_full_check(copy):
    path = first_shard(copy)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 6):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        assert any(path.name in p for p in verify.check(copy).problems)
        try:  # and a read gives the right record or an error, never a wrong one
            records = Shards(copy / "demo", "train")
            for i in range(records.shards[0].count):
                assert hashlib.sha256(records[i].image).hexdigest() == records[i].sha256
        except DataError as e:
            message = str(e)
        else:
            message = path.name
        assert path.name in message


def test_an_unknown_schema_version_names_file_and_record(source, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SCHEMA_VERSION", 9)
    export(source, tmp_path, shards=1)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"unimed-train.array_record-00000-of-00001 record 3: .* version 9"):
        Shards(tmp_path / "demo", "train")[3]
    manifest = tmp_path / "demo" / "1.0.0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(DataError, match=r"manifest\.json has schema version 9"):
        Shards(tmp_path / "demo", "train")


def test_a_manifest_that_cannot_be_read_is_not_called_damaged(copy):
    manifest = copy / "demo" / "1.0.0" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(Is a directory\)"):
        Manifest.read(manifest.parent)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "other"}', '{"format": "unimed_jax.records"}', "\xff"]
)
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / "demo" / "1.0.0" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Shards(copy / "demo", "train")


# --- rejects --------------------------------------------------------------------------------------------------------


def bad_rows(folder):
    """One bad row of each kind: (reason, row)."""
    (folder / "img").mkdir(parents=True)

    def file(name, data):
        (folder / "img" / name).write_bytes(data)
        return f"img/{name}"

    good = jpeg(1000)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    named = {
        "empty_file": {"file": file("empty.png", b""), "caption": "x"},
        "decode_error": {"file": file("cut.jpg", good[: len(good) // 2]), "caption": "x"},
        "too_large": {"file": file("bomb.png", bomb.getvalue()), "caption": "x"},
        "missing": {"file": "img/absent.png", "caption": "x"},
        "unreadable": {"file": "img", "caption": "x"},
        "caption_empty": {"file": file("e.jpg", jpeg(1)), "caption": "  ", "caption2": "NaN"},
        "caption_not_utf8": {
            "file": file("l.jpg", jpeg(2)),
            "caption": b"R\xf6ntgen".decode("utf-8", "surrogateescape"),
        },
        "caption_control": {"file": file("n.jpg", jpeg(3)), "caption": "a\0b"},
        "caption_too_long": {"file": file("m.jpg", jpeg(4)), "caption": "word " * 200_000},
    }
    return [named[k] for k in named], sorted(named)


def test_bad_items_are_counted_listed_and_change_nothing_else(source, tmp_path, exported, tokenizer):
    rows, reasons = bad_rows(tmp_path / "bad")
    extra = [row | {"split": "train"} for row in rows]
    (tmp_path / "raw").mkdir()
    mixed = write_raw(tmp_path / "raw" / "x", extra=extra)
    for path in (tmp_path / "bad" / "img").iterdir():
        path.rename(tmp_path / "raw" / "x" / "img" / path.name)
    manifest = export(mixed, tmp_path / "out", tokenizer=tokenizer, max_bad=0.5)
    assert manifest.rejects == dict.fromkeys(reasons, 1)
    listed = [json.loads(x) for x in (tmp_path / "out/demo/1.0.0/rejects.jsonl").read_text().splitlines()]
    assert sorted(r["reason"] for r in listed) == reasons
    assert all(str(tmp_path) not in json.dumps(r) for r in listed)
    ours, clean = everything(tmp_path / "out"), everything(exported)
    assert ours == clean
    assert {k: record.encode(e) for k, e in ours.items()} == {k: record.encode(e) for k, e in clean.items()}
    assert verify.check(tmp_path / "out").ok


def test_a_picture_that_takes_too_long_is_rejected(monkeypatch):
    def endless(*_, **__):
        while True:
            pass

    good = images.decode
    example = Example(key="a", image=b"x", image_format="png", height=1, width=1, captions=())
    monkeypatch.setattr(images, "decode", endless)
    monkeypatch.setattr(limits, "MAX_DECODE_SECONDS", 0.05)
    with pytest.raises(validate.Reject) as e:
        validate.finish(example)
    assert e.value.reason == "too_slow"
    monkeypatch.setattr(images, "decode", good)  # the limit ends with the picture
    with pytest.raises(validate.Reject, match="decode_error"):
        validate.finish(example)


def test_too_many_rejects_stop_the_export_without_a_manifest(tmp_path):
    source = write_raw(tmp_path / "raw", 20)
    (tmp_path / "raw/img/003.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 20 items of demo were rejected \(decode_error 1\)") as e:
        export(source, tmp_path / "out")
    assert e.value.remedy.endswith("--max-bad=0.051")
    assert find_sources(tmp_path / "out") == {}
    assert "demo/img/003.jpg" in (tmp_path / "out/demo/1.0.0/rejects.jsonl").read_text()
    assert export(source, tmp_path / "out", max_bad=0.051).rejects == {"decode_error": 1}


def test_wrong_extension_is_fine_if_the_content_decodes(tmp_path):
    source = write_raw(tmp_path / "raw", 6)
    out = io.BytesIO()
    Image.new("L", (5, 4), 9).save(out, "PNG")
    (tmp_path / "raw/img/002.jpg").write_bytes(out.getvalue())
    export(source, tmp_path / "out")
    e = everything(tmp_path / "out")["demo/img/002.jpg"]
    assert (e.image_format, e.height, e.width, e.image) == ("png", 4, 5, out.getvalue())


def test_nothing_left_and_nothing_there(tmp_path):
    source = write_raw(tmp_path / "raw", 2)
    for path in (tmp_path / "raw/img").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no item is left"):
        export(source, tmp_path / "out", max_bad=1.0)
    (tmp_path / "raw/table.csv").write_text("file,caption\n")
    with pytest.raises(DataError, match="has no items"):
        export(source, tmp_path / "out")


def test_duplicate_keys_name_both_places(tmp_path):
    source = write_raw(tmp_path / "raw", 10, extra=[{"file": "img/003.jpg", "caption": "again"}])
    with pytest.raises(DataError, match=r"img/003.jpg is there twice: table.csv line 5 and table.csv line 7"):
        export(source, tmp_path / "out")
    assert find_sources(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("cafe\u0301 au lait", "caf\u00e9 au lait"),  # NFC
        ("  spaces \t and\nlines ", "spaces \t and\nlines"),
        ("עברית مرحبا 😀", "עברית مرحبا 😀"),
        ("nan", Reject),
        ("noreportpresent.", Reject),
        (" . ", Reject),
        ("bell \a", Reject),
        ("x" * (limits.MAX_CAPTION_CHARS + 1), Reject),
    ],
)
def test_clean_captions(text, outcome):
    if outcome is Reject:
        with pytest.raises(Reject):
            clean_captions([Caption(text=text)])
    else:
        assert clean_captions([Caption(text=text), Caption(text="nan")]) == (Caption(text=outcome),)


def test_captions_of_an_unknown_kind_or_too_many():
    with pytest.raises(Reject, match="caption_kind"):
        clean_captions([Caption(text="a", kind="gossip")])
    with pytest.raises(Reject, match="caption_too_many"):
        clean_captions([Caption(text="a")] * 257)


@dataclasses.dataclass
class Broken:
    """A source with a defect."""

    how: str
    name: str = "broken"
    licence: str = ""
    description: str = ""

    def items(self):
        return [shards.Item(f"{i}", "train") for i in range(8)]

    def example(self, item):
        if item.key == "5":
            if self.how == "raise":
                raise ZeroDivisionError("oops")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "split":
                return Example(key="5", image=jpeg(5), captions=(Caption(text="a"),), split="test")
        return Example(key=item.key, image=jpeg(int(item.key)), captions=(Caption(text="a"),))


@pytest.mark.parametrize(("how", "workers"), [("raise", 1), ("raise", 2), ("split", 1), ("die", 2)])
def test_a_broken_source_is_a_fault_and_leaves_nothing_that_looks_finished(how, workers, tmp_path):
    with pytest.raises(Fault, match=r"broke on broken/5|worker process died|lists broken/5"):
        export(Broken(how), tmp_path, workers=workers, shards=3)
    assert find_sources(tmp_path) == {}
    assert not list(tmp_path.rglob(".lock"))


# --- resuming, locks, full disks ------------------------------------------------------------------------------------


def test_a_finished_export_is_left_alone(source, tokenizer, exported, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in exported.rglob("*") if p.is_file()}
    export(source, exported, shards=3)  # the tokenizer of the root is used
    assert before == {p: p.stat().st_mtime_ns for p in exported.rglob("*") if p.is_file()}


def test_other_content_needs_force(tmp_path):
    source = write_raw(tmp_path / "raw", 10)
    export(source, tmp_path / "out", shards=3)
    with pytest.raises(DataError, match="finished export of other content"):
        export(source, tmp_path / "out", shards=2)
    export(source, tmp_path / "out", shards=2, force=True)
    names = sorted(p.name for p in (tmp_path / "out/demo/1.0.0").glob("unimed-train*"))
    assert len(names) == 4  # two shards and their sidecars; the three old ones are gone
    assert verify.check(tmp_path / "out").ok


_FEWER = {name: value for name, value in record._SCALARS.items() if name != "original_sha256"}


@pytest.mark.parametrize(
    ("name", "older"),
    [("unimed_jax.data.record._SCALARS", _FEWER), ("unimed_jax.data.export._RULES", 0)],
)
def test_shards_of_another_version_of_the_program_are_written_anew(
    source, exported, tokenizer, tmp_path, monkeypatch, name, older
):
    monkeypatch.setattr(name, older)
    write_range(source, tmp_path / "begun", 0, 3, shards=3, tokenizer=tokenizer)  # and then it was stopped
    export(source, tmp_path / "finished", shards=3, tokenizer=tokenizer)
    monkeypatch.undo()
    export(source, tmp_path / "begun", shards=3, tokenizer=tokenizer)
    assert digests(tmp_path / "begun") == digests(exported)
    with pytest.raises(DataError, match="or by another version's rules"):
        export(source, tmp_path / "finished", shards=3, tokenizer=tokenizer)
    assert len(everything(tmp_path / "finished")) == N  # which stays readable


def test_another_tokenizer_needs_force(tmp_path, tokenizer):
    source = write_raw(tmp_path / "raw", 6)
    export(source, tmp_path / "out", tokenizer=tokenizer)
    other = train_wordpiece(["quite another vocabulary"] * 3, 60, tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        export(source, tmp_path / "out", tokenizer=other)
    assert export(source, tmp_path / "out", tokenizer=other, force=True).tokenizer == other.digest
    assert Tokenizer(tmp_path / "out").digest == other.digest


def test_a_rerun_skips_finished_shards_and_ends_with_the_same_bytes(source, tokenizer, exported, tmp_path):
    export(source, tmp_path, shards=3, tokenizer=tokenizer)
    folder = tmp_path / "demo" / "1.0.0"
    (folder / "manifest.json").unlink()  # as if killed before the end,
    lost, torn, kept = sorted(folder.glob("unimed-train.*-of-00003"))
    lost.unlink()  # with one shard missing,
    torn.write_bytes(torn.read_bytes()[:-9])  # one torn,
    (folder / f".{lost.name}.part").write_bytes(b"half")  # one half-written
    before = kept.stat().st_mtime_ns
    assert find_sources(tmp_path) == {}
    assert any("not finished" in p for p in verify.check(tmp_path, full=False).problems)
    export(source, tmp_path, shards=3, tokenizer=tokenizer)
    assert digests(tmp_path) == digests(exported)
    assert kept.stat().st_mtime_ns == before


EXPORT = """
import sys
from pathlib import Path
from unimed_jax.data.export import export
from unimed_jax.data.sources.folder import Folder
from unimed_jax.errors import UnimedError
if __name__ == "__main__":
    raw, out, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    source = Folder(raw=raw, captions=raw / "table.csv", name="demo", licence="CC0", description="Noise.")
    try:
        export(source, out, shards=3, workers=workers, progress=lambda *a: print(*a, flush=True))
    except UnimedError as e:
        print(e.line(), file=sys.stderr)
        sys.exit(e.exit_code)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "run_export.py"
    path.write_text(EXPORT)
    return path


def test_killed_exports_leave_no_workers_and_are_continued(source, script, tmp_path):
    export(source, tmp_path / "clean", shards=3)
    out = tmp_path / "killed"
    for delay in (0.0, 0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, script, source.raw, out, "2"], stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # the first shard is done
        time.sleep(delay)
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and _group_alive(process.pid):
            time.sleep(0.05)
        assert not _group_alive(process.pid)
    export(source, out, shards=3)
    assert digests(out) == digests(tmp_path / "clean")


def _group_alive(group):
    """Whether a process of this group runs (a zombie does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_ranges_of_several_machines_are_one_export(source, tokenizer, exported, tmp_path):
    assert write_range(source, tmp_path, 2, 5, shards=3, tokenizer=tokenizer) == (3, 6)
    assert write_range(source, tmp_path, 5, 99, shards=3, tokenizer=tokenizer, workers=2) == (4, 6)
    assert find_sources(tmp_path) == {}  # nothing looks finished
    assert not list((tmp_path / "demo" / "1.0.0").glob(".lock*"))
    assert write_range(source, tmp_path, 0, 1, shards=3, tokenizer=tokenizer) == (5, 6)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("unimed-*")}
    export(source, tmp_path, shards=3, tokenizer=tokenizer)
    assert digests(tmp_path) == digests(exported)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())  # it wrote the missing one only
    with pytest.raises(DataError, match="finished export"):
        write_range(source, tmp_path, 0, 1, shards=3, tokenizer=tokenizer)


def test_ranges_that_meet_are_refused(source, tmp_path):
    folder = tmp_path / "demo" / "1.0.0"
    folder.mkdir(parents=True)
    with lock.held(folder / ".lock-unimed-test.array_record-00001-of-00003"):
        with pytest.raises(DataError, match=rf"00001-of-00003 is held by process {os.getpid()}"):
            write_range(source, tmp_path, 0, 2, shards=3)
        with pytest.raises(DataError, match="00001-of-00003 is held by"):
            export(source, tmp_path, shards=3)
        assert write_range(source, tmp_path, 2, 3, shards=3) == (1, 6)
    with lock.held(folder / ".lock"), pytest.raises(DataError, match="is held by process"):
        write_range(source, tmp_path, 0, 2, shards=3)
    for first, last in ((6, 9), (2, 2), (3, 1), (-1, 2)):
        with pytest.raises(UsageError, match=f"shards {first}:{last} are none of 6"):
            write_range(source, tmp_path, first, last, shards=3)


def test_two_exporters_at_once(source, script, tmp_path):
    export(source, tmp_path / "clean", shards=3)
    out = tmp_path / "both"
    command = [sys.executable, script, source.raw, out, "1"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    errors = [p.communicate(timeout=60)[1] for p in both]
    for process, error in zip(both, errors, strict=True):
        assert process.returncode in (0, 3)
        if process.returncode:
            assert "is held by process" in error
            assert error.count("\n") == 1
    assert digests(out) == digests(tmp_path / "clean")


def test_lock(tmp_path):
    path = tmp_path / ".lock"
    with lock.held(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with (
            pytest.raises(DataError, match=f"held by process {os.getpid()} on "),
            lock.held(path, steal=True),
        ):
            pass
    assert not path.exists()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(DataError, match="process 1 on elsewhere") as e, lock.held(path):
        pass
    assert "--steal" in e.value.remedy
    with lock.held(path, steal=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    import socket

    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))  # left by a crash on this machine
    with lock.held(path):
        pass


def test_a_lock_that_is_taken_between_its_making_and_its_locking(tmp_path, monkeypatch):
    path, real, made = tmp_path / ".lock", lock.fcntl.flock, []

    def late(fd, how):
        if not made:  # another process finds the new file unlocked and takes its owner for dead
            path.unlink()
        made.append(fd)
        real(fd, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.held(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()  # the file that stands is ours
    assert len(made) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a folder on a file system of so many KiB; skips where that is not allowed."""
    mounted = []

    def make(kib):
        folder = tmp_path / f"disk{kib}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting a tmpfs is not allowed here; RLIMIT_FSIZE is tested instead")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("kib", "workers"), [(4, 1), (64, 1), (128, 1), (200, 1), (300, 1), (400, 1), (520, 1), (200, 2)]
)
def test_full_disk(small_disk, script, source, tmp_path, kib, workers):
    out = small_disk(kib) / "out"
    done = subprocess.run(
        [sys.executable, script, source.raw, out, str(workers)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "disk is full" in done.stderr or "No space" in done.stderr
    assert find_sources(out) == {} if out.exists() else True
    for path in out.rglob("unimed-*.array_record-*"):  # whatever has its final name is whole
        if path.suffix != ".json":
            reader = shards.array_record_module().ArrayRecordReader(str(path))
            assert reader.num_records() > 0
            assert len(reader.read_all()) == reader.num_records()
    assert not list(out.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", out.parent], check=True)
    manifest = export(source, out, shards=3)
    assert sum(map(manifest.examples, manifest.splits)) == N
    assert verify.check(out).ok


def test_file_size_limit(script, source, tmp_path):
    """The same without root: no file may grow beyond 40 kB."""
    out = tmp_path / "out"
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); "
        f"sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, script, source.raw, out, "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3, done.stderr
    assert "disk is full" in done.stderr
    assert not list(out.rglob("unimed-*"))
    assert export(source, out, shards=3)


def test_places_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot create"):
        export(source, tmp_path / "file" / "out")
    strange = tmp_path / "a b" / "ü 中" / "it's"
    export(source, strange)
    assert verify.check(strange).ok


@pytest.mark.parametrize("bad", [{"workers": 0}, {"shards": 0}, {"max_bad": -1.0}, {"max_bad": 2.0}])
def test_impossible_numbers(source, tmp_path, bad):
    with pytest.raises(UsageError):
        export(source, tmp_path, **bad)


def test_impossible_names(source, tmp_path):
    for name in ("", "Demo", "../up", "a/b", "a b"):
        with pytest.raises(UsageError, match="no name for a source"):
            export(dataclasses.replace(source, name=name), tmp_path)


# --- check and stats ------------------------------------------------------------------------------------------------


def test_check_finds_nothing_in_good_records(exported):
    for full in (False, True):
        report = verify.check(exported, full=full, workers=1 + full)
        assert (report.ok, report.sources, report.shards, report.records) == (True, ["demo"], 6, N)


def test_check_finds_leaks_between_splits(tmp_path):
    source = write_raw(tmp_path / "raw", 20)
    (tmp_path / "raw/img/004.jpg").write_bytes((tmp_path / "raw/img/005.jpg").read_bytes())  # train and test
    (tmp_path / "raw/img/006.jpg").write_bytes((tmp_path / "raw/img/007.jpg").read_bytes())  # both train
    table = (tmp_path / "raw/table.csv").read_text()
    (tmp_path / "raw/table.csv").write_text(table.replace("X-ray,test 1", "X-ray,train 1"))
    export(source, tmp_path / "out")
    problems = verify.check(tmp_path / "out").problems
    assert len(problems) == 2
    assert "same picture is in two splits" in problems[0]
    assert "demo/img/004.jpg (train)" in problems[0]
    assert "demo/img/005.jpg (test)" in problems[0]
    assert "same patient is in two splits" in problems[1]
    assert stats.stats(tmp_path / "out")["duplicates"] == 2


def test_check_finds_leaks_between_sources(tmp_path, source):
    export(source, tmp_path)
    other = dataclasses.replace(write_raw(tmp_path / "raw", 5), name="other")
    (tmp_path / "raw/img/000.jpg").write_bytes(jpeg(1))  # test here, train there
    for i in range(1, 5):
        (tmp_path / f"raw/img/00{i}.jpg").write_bytes(jpeg(500 + i))
    export(other, tmp_path)
    problems = verify.check(tmp_path).problems
    assert len(problems) == 1  # patients of different sources are different people
    assert "demo/img/001.jpg (train)" in problems[0]
    assert "other/img/000.jpg (test)" in problems[0]


def test_check_finds_records_that_no_export_would_write(tmp_path, monkeypatch):
    source = write_raw(tmp_path / "raw", 10)
    faults = {
        "sha256 differs": {"image": jpeg(77)},
        "another size": {"height": 99},
        "unknown modality": {"modality": "Photo"},
        "caption_empty": {"captions": (Caption(text="nan"),)},
        "belongs to split": {"split": "val"},
        "cannot be decoded": {"image": b"x", "sha256": hashlib.sha256(b"x").hexdigest()},
    }
    whole = validate.finish
    for (text, change), i in zip(faults.items(), range(1, 20), strict=False):

        def finish(example, count=None, change=change, i=i):
            done = whole(example, count)
            return dataclasses.replace(done, **change) if done.key == f"demo/img/00{i}.jpg" else done

        monkeypatch.setattr(validate, "finish", finish)
        export(source, tmp_path / str(i))
        problems = verify.check(tmp_path / str(i)).problems
        assert len(problems) == 1
        assert text in problems[0]


def test_empty_roots(tmp_path):
    for look in (verify.check, stats.stats):
        with pytest.raises(DataError, match=r"no source with a manifest\.json"):
            look(tmp_path)
        with pytest.raises(DataError, match="no folder"):
            look(tmp_path / "missing")
