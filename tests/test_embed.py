"""The verb embed: what stands in the file, bad inputs, kills, shares, and what must not change a vector."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_model
import test_medical
from PIL import Image

from unimed_jax import infer
from unimed_jax.cli import embed as verb
from unimed_jax.data import medical
from unimed_jax.errors import DataError, SomeInputsFailed, UnimedError, UsageError
from unimed_jax.evaluate import embed, embedding_table, inputs, layouts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return small_model.loaded(folder).save(folder / "m")


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small_model.pictures(1, size=40, seed=seed)[0]).save(path)
    return path


@pytest.fixture
def study(tmp_path) -> Path:
    """Twenty pictures in two folders."""
    for i in range(20):
        picture(tmp_path / "study" / "ab"[i % 2] / f"{i:02d}.png", i)
    return tmp_path / "study"


def run(model: Path, *args: str | Path) -> int:
    return verb.run([*map(str, args), "--model", str(model)])


def test_files_become_unit_vectors_in_order(model, study, tmp_path, capsys):
    out = tmp_path / "out" / "e.parquet"
    assert run(model, study, "--out", out, "--dtype-out", "float32", "--batch-size", "8") == 0
    rows, z, facts = embedding_table.read(out)
    loaded = infer.load(model)
    files = [study / "ab"[k] / f"{i:02d}.png" for k in (0, 1) for i in range(k, 20, 2)]
    assert [r["file"] for r in rows] == [r["id"] for r in rows] == [str(f) for f in files]
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, loaded.encode_image(files), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    assert facts.model == {"name": "tiny", "sha256": loaded.digest, "dtype": "float32"}
    assert (facts.content, facts.dim, facts.normalised) == ("image", 32, True)
    assert sorted(p.name for p in out.parent.iterdir()) == ["e.parquet"]
    printed = capsys.readouterr().out
    assert "model   tiny" in printed
    assert "20 x 32 float32; 0 of 20 inputs failed" in printed


def test_other_readers_see_a_plain_uncompressed_table(model, study, tmp_path):
    run(model, study, "--out", tmp_path / "e.parquet")
    found = pq.read_table(tmp_path / "e.parquet")
    assert str(found.schema.field("embedding").type) == "fixed_size_list<element: halffloat not null>[32]"
    assert found.column_names == ["id", "file", "frame", "modality", "key", "text", "embedding"]
    head = json.loads(found.schema.metadata[b"unimed_jax.embeddings"])
    assert head["format"] == "unimed_jax.embeddings"
    assert head["settings"]["slices"] == "middle"
    meta = pq.read_metadata(tmp_path / "e.parquet").row_group(0)
    column = meta.column(meta.num_columns - 1)
    assert column.compression == "UNCOMPRESSED"
    assert str(tmp_path) not in json.dumps(head)


def test_names_are_as_they_were_given(model, study, tmp_path, monkeypatch):
    monkeypatch.chdir(study.parent)
    run(model, "study/a", "--out", "e.parquet")
    assert str(tmp_path).encode() not in Path("e.parquet").read_bytes()
    assert embedding_table.read("e.parquet")[0][0]["file"] == "study/a/00.png"


def test_bad_files_are_listed_and_the_others_unchanged(model, study, tmp_path):
    run(model, study, "--out", tmp_path / "clean.parquet")
    (study / "a" / "00-cut.png").write_bytes((study / "a" / "00.png").read_bytes()[:300])
    (study / "b" / "=1.jpg").touch()
    with pytest.raises(SomeInputsFailed, match="2 of 22 inputs failed") as e:
        run(model, study, "--out", tmp_path / "dirty.parquet")
    assert e.value.exit_code == 4
    clean, dirty = (embedding_table.read(tmp_path / f"{k}.parquet") for k in ("clean", "dirty"))
    assert clean[0] == dirty[0]
    np.testing.assert_allclose(clean[1].astype(np.float32), dirty[1].astype(np.float32), atol=5e-4)
    with (tmp_path / "dirty.errors.csv").open(newline="") as f:
        errors = {Path(r["input"]).name: r["reason"] for r in csv.DictReader(f)}
    assert errors.keys() == {"00-cut.png", "=1.jpg"}
    assert "empty" in errors["=1.jpg"]


def test_the_list_of_errors_of_another_command_stays(model, study, tmp_path):
    other = tmp_path / "e.errors.csv"
    other.write_text("of predict")
    with pytest.raises(UsageError, match=r"e\.errors\.csv exists"):
        run(model, study, "--out", tmp_path / "e.parquet")
    assert other.read_text() == "of predict"
    assert run(model, study, "--out", tmp_path / "e.parquet", "--force") == 0
    assert not other.exists()


def test_a_file_name_that_is_no_utf_8_is_embedded(model, study, tmp_path):
    os.rename(study / "a" / "00.png", os.fsencode(study) + b"/a/M\xfcller.png")
    assert run(model, study / "a", "--out", tmp_path / "e.parquet") == 0
    assert embedding_table.read(tmp_path / "e.parquet")[0][-1]["id"].endswith("M\\udcfcller.png")


def test_nothing_readable_writes_no_index(model, tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(DataError, match="none of 1 inputs"):
        run(model, tmp_path / "x.png", "--out", tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()
    assert (tmp_path / "e.errors.csv").is_file()
    assert not list(tmp_path.glob(".e*"))


def test_records_and_their_splits(model, tmp_path):
    pytest.importorskip("array_record")
    from unimed_jax.data import export, shards
    from unimed_jax.data.phantom import Phantom

    export.export(Phantom(n=120, size=40), tmp_path / "records")
    source = shards.find_sources(tmp_path / "records")["phantom"]
    test = shards.Shards(source, "test")
    run(model, "--data", tmp_path / "records", "--split", "test", "--out", tmp_path / "e.parquet")
    rows, z, _ = embedding_table.read(tmp_path / "e.parquet")
    assert [r["key"] for r in rows] == [test[i].key for i in range(len(test))]
    assert [r["modality"] for r in rows] == [test[i].modality for i in range(len(test))]
    assert {r["file"] for r in rows} == {""}
    expected = infer.load(model).encode_image([test[i].image for i in range(len(test))])
    np.testing.assert_allclose(z.astype(np.float32), expected, atol=5e-4)
    run(model, "--data", tmp_path / "records", "--out", tmp_path / "all.parquet")
    every = sum(len(shards.Shards(source, s)) for s in shards.Manifest.read(source).splits)
    assert len(embedding_table.Index(tmp_path / "all.parquet")) == every > len(test)


def test_lines_of_text(model, tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffa chest x-ray\n\n  ct of the head \r\n".encode())
    run(model, "--text", tmp_path / "t.txt", "--out", tmp_path / "e.parquet", "--dtype-out", "float32")
    rows, z, facts = embedding_table.read(tmp_path / "e.parquet")
    assert [(r["id"], r["text"]) for r in rows] == [("1", "a chest x-ray"), ("3", "ct of the head")]
    assert facts.content == "text"
    np.testing.assert_allclose(
        z, infer.load(model).encode_text(["a chest x-ray", "ct of the head"]), atol=1e-5
    )
    (tmp_path / "latin.txt").write_bytes("a\nR\u00f6ntgen".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt line 2 is no UTF-8"):
        run(model, "--text", tmp_path / "latin.txt", "--out", tmp_path / "f.parquet")


def test_frames_of_a_file_are_rows(model, tmp_path):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    movie, ct = test_medical.sample("examples_ybr_color.dcm"), test_medical.sample("CT_small.dcm")
    run(model, movie, ct, "--out", tmp_path / "e.parquet", "--slices", "every:10", "--window", "lung")
    rows, _, facts = embedding_table.read(tmp_path / "e.parquet")
    assert [(r["frame"], r["modality"]) for r in rows] == [(0, "US"), (10, "US"), (20, "US"), (0, "CT")]
    assert [r["id"] for r in rows] == [f"{movie}#0", f"{movie}#10", f"{movie}#20", str(ct)]
    assert (facts.settings["window"], facts.settings["slices"]) == ("lung", "every:10")


def test_a_series_is_one_volume_and_lists_name_files(model, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    ds = pydicom.dcmread(test_medical.sample("CT_small.dcm"))
    (tmp_path / "ct").mkdir()
    for k in range(5):
        ds.ImagePositionPatient = [0, 0, 2 * k]
        ds.SOPInstanceUID = f"1.2.3.{k}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(tmp_path / "ct" / f"{k}.dcm")
    run(model, tmp_path / "ct", "--out", tmp_path / "m.parquet")
    rows, _, _ = embedding_table.read(tmp_path / "m.parquet")
    assert [(Path(r["file"]).name, r["frame"]) for r in rows] == [("2.dcm", 2)]
    run(model, tmp_path / "ct", "--out", tmp_path / "a.parquet", "--slices", "all")
    rows, _, _ = embedding_table.read(tmp_path / "a.parquet")
    assert [Path(r["id"]).name for r in rows] == [f"{k}.dcm#{k}" for k in range(5)]
    (tmp_path / "list.csv").write_text("file\nct/3.dcm\nct/1.dcm\n")
    run(model, "--list", tmp_path / "list.csv", "--out", tmp_path / "l.parquet")
    rows, _, _ = embedding_table.read(tmp_path / "l.parquet")
    assert [Path(r["id"]).name for r in rows] == ["3.dcm", "1.dcm"]


def test_a_part_ends_with_the_input_that_fills_it(model, tmp_path, monkeypatch):
    """Many frames in a file: parts stay small, and begin where the one before ended."""
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    small_parts(monkeypatch)  # of 8 inputs or pictures
    for k in range(4):
        shutil.copy(test_medical.sample("examples_ybr_color.dcm"), tmp_path / f"{k}.dcm")
    loaded = infer.load(model, batch_size=4)
    files = inputs.Files([tmp_path], slices=medical.Slices.parse("every:6"))  # 5 of 30 frames
    whole = embed.to_parquet(loaded, files, tmp_path / "whole.parquet")
    assert (whole.inputs, whole.rows) == (4, 20)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, sorted(p.name for p in (tmp_path / ".cut.parquet.parts").glob("0*.parquet"))))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.to_parquet(loaded, files, tmp_path / "cut.parquet", progress=stop)
    assert seen[-1][1] == ["000000.parquet"]
    done = embed.to_parquet(loaded, files, tmp_path / "cut.parquet")
    assert (done.resumed, done.rows) == (2, 20)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_vectors_do_not_depend_on_batch_order_or_devices(model, study, tmp_path):
    """Float32 vectors agree within 1e-5; float16 ones within one step of their grid near 1 (5e-4)."""
    files = inputs.Files([study])
    found = {}
    for name, size in (("whole", 64), ("small", 3)):
        loaded = infer.load(model, batch_size=size)
        embed.to_parquet(loaded, files, tmp_path / f"{name}.parquet", dtype="float32")
        found[name] = embedding_table.read(tmp_path / f"{name}.parquet")
    files.inputs = files.inputs[::-1]
    embed.to_parquet(infer.load(model), files, tmp_path / "back.parquet", dtype="float32")
    rows, z, _ = embedding_table.read(tmp_path / "back.parquet")
    assert found["whole"][0] == found["small"][0] == rows[::-1]
    np.testing.assert_allclose(found["small"][1], found["whole"][1], atol=1e-5)
    np.testing.assert_allclose(z[::-1], found["whole"][1], atol=1e-5)
    code = (
        "import jax, sys; from unimed_jax.cli import embed; assert jax.device_count() == 4;"
        f"sys.exit(embed.run([{str(study)!r}, '--model', {str(model)!r}, '--out', {str(tmp_path / 'four.parquet')!r},"
        "'--dtype-out', 'float32', '--batch-size', '8']))"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, z, _ = embedding_table.read(tmp_path / "four.parquet")
    assert rows == found["whole"][0]
    np.testing.assert_allclose(z, found["whole"][1], atol=1e-5)


def test_one_compilation(model, study, tmp_path):
    loaded = infer.load(model, batch_size=8)
    infer._encoders.cache_clear()
    loaded = infer.load(model, batch_size=8)
    embed.to_parquet(loaded, inputs.Files([study]), tmp_path / "e.parquet")
    assert loaded._image._cache_size() == 1


def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "_BATCHES", 2)  # parts of 8 inputs
    monkeypatch.setattr(embedding_table, "GROUP", 3)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(model, study, tmp_path, monkeypatch):
    small_parts(monkeypatch)
    (study / "b" / "99.png").write_text("bad")
    loaded = infer.load(model, batch_size=4)
    whole = embed.to_parquet(loaded, inputs.Files([study]), tmp_path / "whole.parquet")
    assert (whole.rows, whole.resumed, len(whole.errors)) == (20, 0, 1)

    class Pulled(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 18:
            raise Pulled

    target = tmp_path / "cut.parquet"
    with pytest.raises(Pulled):
        embed.to_parquet(loaded, inputs.Files([study]), target, progress=stop)
    assert not target.exists()
    parts = sorted((tmp_path / ".cut.parquet.parts").glob("*.parquet"))
    assert [p.name for p in parts] == ["000000.parquet", "000001.parquet"]
    parts[1].write_bytes(parts[1].read_bytes()[:-100])  # a damaged part is made again
    seen = []
    other = infer.load(model, batch_size=4)
    done = embed.to_parquet(other, inputs.Files([study]), target, progress=lambda n, _: seen.append(n))
    assert done.resumed == 8
    assert min(seen) > 8
    assert done.errors == whole.errors
    assert target.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert (tmp_path / "cut.errors.csv").read_bytes() == (tmp_path / "whole.errors.csv").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_other_settings_do_not_continue_unfinished_work(model, study, tmp_path, monkeypatch):
    small_parts(monkeypatch)
    loaded = infer.load(model, batch_size=4)

    def stop(done: int, total: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    def start(**options) -> embed.Done:
        return embed.to_parquet(loaded, inputs.Files([study]), tmp_path / "e.parquet", **options)

    with pytest.raises(KeyboardInterrupt):
        start(progress=stop)
    with pytest.raises(UsageError, match="unfinished work on other inputs"):
        start(dtype="float32")
    picture(study / "a" / "new.png", 99)
    with pytest.raises(UsageError, match="unfinished work on other inputs"):
        start()
    done = start(force=True)
    assert (done.rows, done.resumed) == (21, 0)


@pytest.mark.slow
def test_kill_9_at_any_time(model, tmp_path):
    """The command line, killed again and again; the result has the bytes of a run that was left alone."""
    for i in range(60):
        picture(tmp_path / "in" / f"{i:02d}.png", i)
    code = (
        "import sys, time; from unimed_jax.evaluate import embed, inputs; from unimed_jax.cli import embed as verb;"
        "embed._BATCHES = 1; read = inputs.Files.read;"
        "inputs.Files.read = lambda *a, **k: (time.sleep(0.02), read(*a, **k))[1];"
        "sys.exit(verb.run(sys.argv[1:]))"
    )

    def command(out: str) -> list[str]:
        flags = ["--out", str(tmp_path / out), "--model", str(model), "--batch-size", "4", "--threads", "1"]
        return [sys.executable, "-c", code, str(tmp_path / "in"), *flags]

    subprocess.run(command("whole.parquet"), check=True, capture_output=True, timeout=120)
    kills = 0
    folder = tmp_path / ".e.parquet.parts"
    for parts in (1, 8):
        p = subprocess.Popen(command("e.parquet"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if p.poll() is not None or len(list(folder.glob("0*.parquet"))) >= parts:
                break
            time.sleep(0.02)
        kills += p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait(30)
        assert not (tmp_path / "e.parquet").exists()
    assert kills == 2
    done = subprocess.run(command("e.parquet"), capture_output=True, text=True, check=True, timeout=120)
    assert "were done before" in done.stdout
    assert (tmp_path / "e.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not list(tmp_path.glob(".e*"))


def test_two_runs_do_not_write_one_file(model, study, tmp_path, monkeypatch):
    from unimed_jax.evaluate import embed

    plain = embed._plan

    def second_run(*args):
        monkeypatch.setattr(embed, "_plan", plain)
        with pytest.raises(DataError, match=f"held by process {os.getpid()} on ") as e:
            run(model, study, "--out", tmp_path / "e.parquet")
        assert "wait" in e.value.remedy
        return plain(*args)

    monkeypatch.setattr(embed, "_plan", second_run)
    run(model, study, "--out", tmp_path / "e.parquet")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".e", "e"))) == ["e.parquet"]


def test_every_process_writes_its_share(model, study, tmp_path, monkeypatch):
    run(model, study, "--out", tmp_path / "one.parquet", "--dtype-out", "float32")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    for i in range(3):
        monkeypatch.setenv("SLURM_PROCID", str(i))
        run(model, study, "--out", tmp_path / "e.parquet", "--dtype-out", "float32")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("e-*")) == [f"e-{i:05d}-of-00003.parquet" for i in range(3)]
    one, three = embedding_table.read(tmp_path / "one.parquet"), embedding_table.read(tmp_path / "e.parquet")
    assert one[0] == three[0]
    np.testing.assert_allclose(one[1], three[1], atol=1e-5)
    (tmp_path / "e-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="share 1 of 3 of e is missing"):
        embedding_table.Index(tmp_path / "e.parquet")


def test_more_processes_than_inputs(model, study, tmp_path):
    one = next((study / "a").iterdir())
    for i in range(2):
        run(model, one, "--out", tmp_path / "e.parquet", "--share", f"{i}/2")
    assert len(embedding_table.Index(tmp_path / "e.parquet")) == 1


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["x", "--text", "t"], UsageError, "give one of PATH"),
        ([], UsageError, "give one of PATH"),
        (["x", "--split", "test"], UsageError, "belongs to --data"),
        (["--text", "t", "--window", "lung"], UsageError, "--window is for files"),
        (["--data", "d", "--max-tiles", "3"], UsageError, "--max-tiles is for files"),
        (["--text", "nowhere.txt"], UsageError, "no text file"),
        (["nowhere"], DataError, "no file or folder"),
        (["--data", "nowhere"], DataError, "no folder"),
        (["x", "--share", "2/2"], UsageError, "I/N"),
        (["x", "--out", "e.csv"], UsageError, "ends in .parquet"),
        (["x", "--threads", "0"], UsageError, "at least 1"),
        (["x", "--dtype-out", "int8"], UsageError, "no choice 'int8'"),
    ],
)
def test_wrong_requests_are_refused(model, tmp_path, monkeypatch, args, error, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer, "load", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(error) as e:
        run(model, "--out", "e.parquet", *args)
    assert words in e.value.line()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_index_stays(model, study, tmp_path):
    (tmp_path / "e.parquet").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        run(model, study, "--out", tmp_path / "e.parquet")
    assert (tmp_path / "e.parquet").read_text() == "mine"
    run(model, study, "--out", tmp_path / "e.parquet", "--force")
    assert len(embedding_table.Index(tmp_path / "e.parquet")) == 20


def test_damaged_and_foreign_files_are_no_index(model, study, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign.parquet")
    (tmp_path / "text.parquet").write_text("text")
    run(model, study, "--out", tmp_path / "e.parquet")
    data = (tmp_path / "e.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-9])
    found = pq.read_table(tmp_path / "e.parquet")
    head = json.loads(found.schema.metadata[b"unimed_jax.embeddings"])
    changes = {"model": {}, "dim": 33, "dtype": "int8", "settings": ["x"], "version": 2, "content": None}
    for name, value in changes.items():
        said = json.dumps({**head, name: value})
        pq.write_table(
            found.replace_schema_metadata({"unimed_jax.embeddings": said}), tmp_path / f"{name}.parquet"
        )
    for name in ("foreign", "text", "cut", *changes):
        with pytest.raises(UnimedError, match=name):
            embedding_table.Index(tmp_path / f"{name}.parquet")


def test_no_identifier_of_a_header_reaches_an_index(model, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    ds = pydicom.dcmread(test_medical.sample("CT_small.dcm"))
    for n, keyword in enumerate(
        ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "InstitutionName")
    ):
        setattr(ds, keyword, f"PLANTED{n}")
    ds.save_as(tmp_path / "x.dcm")
    shutil.copy(tmp_path / "x.dcm", tmp_path / "y.dcm")
    (tmp_path / "y.dcm").write_bytes((tmp_path / "x.dcm").read_bytes()[:2000])
    with pytest.raises(SomeInputsFailed):
        run(model, tmp_path / "x.dcm", tmp_path / "y.dcm", "--out", tmp_path / "e.parquet")
    for name in ("e.parquet", "e.errors.csv"):
        assert b"PLANTED" not in (tmp_path / name).read_bytes()


def test_pictures_of_a_suite(model, tmp_path):
    for kind in ("good", "bad"):
        picture(tmp_path / "data" / "lungs" / kind / "1.png", len(kind))
    suite = {
        "name": "mine",
        "sets": [
            {"name": n, "classes": ["good", "bad"], "layout": {"kind": "folders", "folder": n}}
            for n in ("lungs", "gone")
        ],
    }
    (tmp_path / "mine.json").write_text(json.dumps(suite))
    found, failed = inputs.suite(tmp_path / "mine.json", tmp_path / "data")
    assert len(found) == 2
    assert [f["set"] for f in failed] == ["gone"]
    assert all(item.sha256 for i in range(2) for item in found.read(i, hashed=True))
    done = embed.to_parquet(infer.load(model), found, tmp_path / "e.parquet")
    assert done.rows == 2
    (tmp_path / "data" / "lungs").rename(tmp_path / "elsewhere")
    found, failed = inputs.suite(tmp_path / "mine.json", "", places={"lungs": tmp_path / "elsewhere"})
    assert len(found) == 2
    assert [f["set"] for f in failed] == ["gone"]
    with pytest.raises(UsageError, match="a path is given for lung,"):
        inputs.suite(tmp_path / "mine.json", "", places={"lung": tmp_path})


def test_a_set_of_a_suite_that_the_disk_does_not_give_leaves_the_others(tmp_path, monkeypatch):
    for name, kind in ((n, k) for n in ("one", "two") for k in ("good", "bad")):
        picture(tmp_path / "data" / name / kind / "1.png", 1)
    sets = [
        {"name": n, "classes": ["good", "bad"], "layout": {"kind": "folders", "folder": n}}
        for n in ("one", "two")
    ]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "sets": sets}))
    real = layouts._READERS["folders"]

    def read(s, *args):
        if s.name == "one":
            raise PermissionError(13, "Permission denied", "/data/one")
        return real(s, *args)

    monkeypatch.setitem(layouts._READERS, "folders", read)
    found, failed = inputs.suite(tmp_path / "mine.json", tmp_path / "data")
    assert len(found) == 2
    assert failed == [
        {"set": "one", "reason": "one: /data/one cannot be read (Permission denied)", "remedy": ""}
    ]
