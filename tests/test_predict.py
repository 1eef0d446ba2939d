"""The verbs predict and eval from the command line: outputs, exit codes, bad files, and no identifier anywhere."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import small_model
import test_medical
from PIL import Image

from unimed_jax import infer
from unimed_jax.cli import eval as eval_verb
from unimed_jax.cli import predict as verb
from unimed_jax.data import found, medical
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import DataError, SomeInputsFailed, UnimedError, UsageError
from unimed_jax.evaluate import predict, tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return small_model.loaded(folder).save(folder / "m")


@pytest.fixture
def study(tmp_path) -> Path:
    """Three pictures and a note, in folders with spaces and accents."""
    folder = tmp_path / "study één"
    (folder / "deep er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("b.png", "a.jpg", "deep er/c.tif")):
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def run(model: Path, *paths: Path, out: Path, labels: str = "ct,mri", **flags: str) -> int:
    extra = [x for k, v in flags.items() for x in ([f"--{k}", v] if v else [f"--{k}"])]
    return verb.run([*map(str, paths), "--model", str(model), "--labels", labels, "--out", str(out), *extra])


def test_a_folder_becomes_a_table(model, study, tmp_path, capsys):
    out = tmp_path / "out" / "p.csv"
    assert run(model, study, out=out, modality="ct") == 0
    found = rows(out)
    assert [Path(r["file"]).name for r in found] == ["a.jpg", "b.png", "c.tif"]
    loaded = infer.load(model)
    expected = loaded.classify(
        [r["file"] for r in found], tasks.from_labels(["ct", "mri"], modality="ct").classes
    )
    np.testing.assert_allclose(
        [[float(r["score: ct"]), float(r["score: mri"])] for r in found], expected, atol=1e-4
    )
    assert [r["predicted"] for r in found] == [("ct", "mri")[k] for k in expected.argmax(1)]
    record = json.loads((out.parent / "p.run.json").read_text())
    assert record["model"]["sha256"] == loaded.digest
    assert record["prompts"]["classes"]["ct"][0] == "a CT image: ct"
    assert (record["files"], record["pictures"], record["failed"]) == (3, 3, 0)
    assert not (out.parent / "p.errors.csv").exists()
    printed = capsys.readouterr().out
    for word in ("model   tiny", "prompts labels", "3 files", "wrote", "not a medical device"):
        assert word in printed


def test_bad_files_are_listed_and_the_others_are_unchanged(model, study, tmp_path):
    run(model, study, out=tmp_path / "clean" / "p.csv")
    (study / "cut.png").write_bytes((study / "b.png").read_bytes()[:300])
    (study / "empty.jpg").touch()
    (study / "=cmd.png").write_text("text")
    with pytest.raises(SomeInputsFailed, match="3 of 6 files failed") as e:
        run(model, study, out=tmp_path / "dirty" / "p.csv")
    assert e.value.exit_code == 4
    assert (tmp_path / "dirty" / "p.csv").read_bytes() == (tmp_path / "clean" / "p.csv").read_bytes()
    errors = {Path(r["file"]).name: r["reason"] for r in rows(tmp_path / "dirty" / "p.errors.csv")}
    assert errors.keys() == {"cut.png", "empty.jpg", "=cmd.png"}
    assert "empty" in errors["empty.jpg"]
    assert "cut.png" in errors["cut.png"]


def test_all_files_bad_is_a_data_error(model, tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(DataError, match="none of 1 files"):
        run(model, tmp_path / "x.png", out=tmp_path / "p.csv")
    assert len(rows(tmp_path / "p.errors.csv")) == 1
    assert rows(tmp_path / "p.csv") == []


def test_names_cannot_be_formulas(model, tmp_path, monkeypatch):
    """Seven beginnings that a spreadsheet computes or splits at, in file names, class names and truth."""
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    starts = "=+-@\t\r"
    for start in starts:
        Image.new("RGB", (40, 40)).save(f"{start}1.png")
        Path(f"{start}bad.png").write_text("text")
    prompts = {f"{start}x": [f"a ct {i}"] for i, start in enumerate(f"{starts}\0")}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "truth.csv").write_text("file,label\nin,=x\n")
    command = [".", "--model", str(model), "--prompts", str(tmp_path / "prompts.json")]
    command += ["--truth", str(tmp_path / "truth.csv"), "--ci", "0"]
    with pytest.raises(SomeInputsFailed):
        verb.run([*command, "--out", str(tmp_path / "p.csv")])
    found = rows(tmp_path / "p.csv")
    assert sorted(r["file"] for r in found) == sorted(
        ["'=1.png", "'+1.png", "'-1.png", "'@1.png", "' 1.png", "' 1.png"]
    )
    assert {r["label"] for r in found} == {"'=x"}
    assert all(r["predicted"].startswith("'") for r in found)
    bad = rows(tmp_path / "p.errors.csv")
    assert len(bad) == 6
    assert all(cell[:1] not in {*starts} for r in (*found, *bad) for cell in r.values())
    assert json.loads((tmp_path / "p.run.json").read_text())["prompts"]["classes"].keys() == prompts.keys()


def test_the_page_shows_the_pictures(model, study, tmp_path):
    pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
    (study / "bad.png").write_text("text")
    with pytest.raises(SomeInputsFailed):
        run(model, study, out=tmp_path / "p.csv", report=str(tmp_path / "p.html"))
    page = (tmp_path / "p.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    for word in (
        "Predictions",
        "a.jpg",
        "bad.png",
        "not a medical device",
        "3 from 4 files, of which 1 failed",
    ):
        assert word in page


def test_frames_windows_and_kinds(model, tmp_path):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    movie, ct = test_medical.sample("examples_ybr_color.dcm"), test_medical.sample("CT_small.dcm")
    assert run(model, movie, ct, out=tmp_path / "p.csv", slices="every:10", window="lung") == 0
    found = rows(tmp_path / "p.csv")
    assert [(r["frame"], r["modality"]) for r in found] == [
        ("0", "US"),
        ("10", "US"),
        ("20", "US"),
        ("0", "CT"),
    ]
    record = json.loads((tmp_path / "p.run.json").read_text())
    assert record["kinds"] == {"DICOM US": 1, "DICOM CT": 1}
    assert record["settings"]["window"] == "lung"


def test_a_movie_does_not_fill_the_page(model, tmp_path):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    movie, every = test_medical.sample("examples_ybr_color.dcm"), medical.Slices.parse("all")
    found = predict.predict(infer.load(model), [movie], tasks.from_labels(["a", "b"]), slices=every, shown=2)
    assert len(found.rows) > len(found.shown) == 2


def test_batches_do_not_change_scores(model, tmp_path):
    for i in range(9):
        Image.fromarray(small_model.pictures(1, size=40, seed=i)[0]).save(tmp_path / f"{i}.png")
    loaded = infer.load(model, batch_size=4)
    task, files = tasks.from_labels(["ct", "mri"]), found.find_files([tmp_path])
    small = predict.predict(loaded, files, task, threads=2)
    large = predict.predict(infer.load(model, batch_size=64), files[::-1], task)
    a = {r["file"]: r["scores"]["ct"] for r in small.rows}
    b = {r["file"]: r["scores"]["ct"] for r in large.rows}
    assert a == pytest.approx(b, abs=1e-5)
    assert [r["file"] for r in small.rows] == [str(f) for f in files]


def test_prompt_files_and_built_in_tasks(model, study, tmp_path):
    prompts = tmp_path / "organs.json"
    prompts.write_text(json.dumps({"liver": ["a ct of the liver"], "head": ["the head", "a head ct"]}))
    common = [str(study), "--model", str(model), "--out"]
    assert verb.run([*common, str(tmp_path / "1" / "p.csv"), "--prompts", str(prompts)]) == 0
    assert {"score: liver", "score: head"} <= set(rows(tmp_path / "1" / "p.csv")[0])
    assert verb.run([*common, str(tmp_path / "2" / "p.csv"), "--task", "modality"]) == 0
    assert "score: Fundus" in rows(tmp_path / "2" / "p.csv")[0]


def test_json_is_all_that_is_printed(model, study, tmp_path, capsys):
    assert run(model, study, out=tmp_path / "p.csv", json="") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pictures"] == 3
    assert sum(summary["predicted"].values()) == 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": "one"}, UsageError, "at least two"),
        ({"labels": "a,a"}, UsageError, "given twice"),
        ({"window": "lungs"}, UsageError, "Did you mean"),
        ({"slices": "first"}, UsageError, "middle, all or every:N"),
        ({"modality": "x-rey"}, UsageError, "Did you mean"),
        ({"threads": "0"}, UsageError, "at least 1"),
        ({"treads": "2"}, UsageError, "Did you mean"),
    ],
)
def test_wrong_flags_are_refused(model, study, tmp_path, change, error, words):
    with pytest.raises(error) as e:
        run(model, study, out=tmp_path / "p.csv", **change)
    assert words in e.value.line()
    assert not (tmp_path / "p.csv").exists()


def test_outputs_are_checked_before_the_work(model, study, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(infer, "load", never)
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        run(model, study, out=tmp_path / "p.csv")
    with pytest.raises(UsageError, match="is a folder"):
        run(model, study, out=tmp_path)
    with pytest.raises(UsageError, match="same name"):
        run(model, study, out=tmp_path / "q.csv", report=str(tmp_path / "q.run.json"))
    with pytest.raises(DataError, match="cannot be made"):
        run(model, study, out=tmp_path / "p.csv" / "q.csv")
    with pytest.raises(DataError, match="no file or folder"):
        run(model, tmp_path / "nothing", out=tmp_path / "q.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"no pictures in .*void") as e:
        run(model, tmp_path / "void", out=tmp_path / "q.csv")
    assert ".dcm" in e.value.remedy
    assert (tmp_path / "p.csv").read_text() == "mine"


def test_force_replaces_and_drops_an_old_list_of_errors(model, study, tmp_path):
    (study / "bad.png").write_text("text")
    with pytest.raises(SomeInputsFailed):
        run(model, study, out=tmp_path / "p.csv")
    (study / "bad.png").unlink()
    assert run(model, study, out=tmp_path / "p.csv", force="") == 0
    assert not (tmp_path / "p.errors.csv").exists()


def test_force_never_replaces_what_is_read(model, study, tmp_path):
    known = found.find_files([study])
    before = {p: p.read_bytes() for p in known}
    truth = tmp_path / "t.csv"
    truth.write_text(f"file,label\n{known[0]},ct\n")
    for options in ({"out": known[0]}, {"out": truth, "truth": str(truth)}, {"report": str(known[0])}):
        with pytest.raises(UsageError, match="is read"):
            run(model, study, **{"out": tmp_path / "p.csv", "force": "", **options})
    assert {p: p.read_bytes() for p in known} == before
    assert truth.read_text().startswith("file,label")


def test_a_file_name_that_is_no_utf_8_is_scored(model, tmp_path):
    name = os.fsencode(tmp_path) + b"/M\xfcller.png"
    with open(name, "wb") as f:
        Image.fromarray(small_model.pictures(1)[0]).save(f, "PNG")
    page = tmp_path / "p.html"
    assert run(model, os.fsdecode(name), out=tmp_path / "p.csv", report=str(page)) == 0
    assert "M\\udcfcller.png" in (tmp_path / "p.csv").read_text("utf-8")
    assert "ller.png" in page.read_text("utf-8")


def test_half_replaced_outputs_have_no_record(model, study, tmp_path, monkeypatch):
    from unimed_jax.data import files

    assert run(model, study, out=tmp_path / "p.csv") == 0
    real = files.write_text

    def full(path, text):
        if path.name == "p.run.json":
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(DataError, match="No space left"):
        run(model, study, out=tmp_path / "p.csv", labels="a,b,c", force="")
    assert "score: c" in (tmp_path / "p.csv").read_text()
    assert not (tmp_path / "p.run.json").exists()


def test_two_tables_share_a_folder(model, study, tmp_path):
    assert run(model, study, out=tmp_path / "one.csv") == 0
    assert run(model, study, out=tmp_path / "two.csv") == 0
    made = {"one.csv", "one.run.json", "two.csv", "two.run.json"}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == made


def test_files_are_found_in_a_fixed_order(tmp_path):
    for name in (
        "b/IM0001",
        "b/2.dcm",
        "a/1.nii.gz",
        "a/x.tar.gz",
        "c.csv",
        "1.2.840.10008",
        ".x/y.png",
        "b/DICOMDIR",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in found.find_files([tmp_path])]
    assert names == ["1.2.840.10008", "a/1.nii.gz", "b/2.dcm", "b/IM0001"]
    twice = found.find_files([tmp_path / "c.csv", tmp_path / "a", tmp_path / "a"])
    assert [p.name for p in twice] == ["c.csv", "1.nii.gz"]


def test_no_identifier_reaches_any_output(model, tmp_path):
    """40 tagged values in the header of a good and of a damaged DICOM: none in any file, stream or log at DEBUG."""
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    study = tmp_path / "study"
    study.mkdir()
    canaries = test_medical.plant(study / "one.dcm")
    (study / "cut.dcm").write_bytes((study / "one.dcm").read_bytes()[:-5000])
    (study / "header.dcm").write_bytes((study / "one.dcm").read_bytes()[:900])
    out = tmp_path / "out"
    command = ["predict", str(study), "--model", str(model), "--labels", "ct,mri", "--slices", "all"]
    command += ["--out", str(out / "p.csv"), "--report", str(out / "p.html")]
    code = f"""
    import logging, warnings
    warnings.simplefilter("always")
    logging.basicConfig(level=logging.DEBUG, filename={str(tmp_path / "log.txt")!r})
    logging.captureWarnings(True)
    from unimed_jax.cli import main
    main.main({command!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=240)
    assert done.returncode == 4, done.stderr.decode()[-2000:]
    names = sorted(p.name for p in out.iterdir())
    assert names == ["p.csv", "p.errors.csv", "p.html", "p.run.json"]
    assert len(rows(out / "p.csv")) == 1
    assert len(rows(out / "p.errors.csv")) == 2
    assert len(canaries) == 40
    seen = {p.name: p.read_bytes() for p in [*out.iterdir(), tmp_path / "log.txt"]}
    seen |= {"stdout": done.stdout, "stderr": done.stderr}
    assert [(c, where) for c in canaries for where, data in seen.items() if c.encode() in data] == []


# ---- eval


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    export = pytest.importorskip("unimed_jax.data.export")
    root = tmp_path_factory.mktemp("records")
    export.export(Phantom(n=96, size=40), root, shards=1)
    return root


def test_eval_writes_results_and_a_page(model, records, tmp_path, capsys):
    out = tmp_path / "e"
    command = [
        "--model",
        str(model),
        "--data",
        str(records),
        "--tasks",
        "phantom_modality",
        "--out",
        str(out),
    ]
    assert eval_verb.run([*command, "--ci", "50", "--report"]) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {
        "results.json",
        "results.md",
        "results.csv",
        "predictions.csv",
        "examples.json",
        "report.html",
    }
    stored = json.loads((out / "results.json").read_text())
    assert stored["data"]["sources"]["phantom"]["split"] == "test"
    assert len(stored["data"]["sources"]["phantom"]["manifest_sha256"]) == 64
    assert stored["tasks"][0]["n"] == stored["data"]["sources"]["phantom"]["records"] == 24
    printed = capsys.readouterr().out
    assert "phantom_modality" in printed
    assert "balanced_accuracy" in printed
    with pytest.raises(UsageError, match="holds results already"):
        eval_verb.run(command)
    assert eval_verb.run([*command, "--ci", "0", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["resamples"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--split", "tset"], "has the split 'tset'"),
        (["--sources", "other"], "no source 'other'"),
        (["--sources", "phantom", "--split", "tset"], "phantom has no split 'tset'"),
        (["--tasks", "modalty"], "Did you mean"),
        (["--tasks", "modality"], "none of 24 records"),
        (["--tasks", "phantom_modality,phantom_modality"], "given twice"),
        (["--data", "/nonexistent"], "no folder"),
        (["--model", "/nonexistent"], "no model at"),
        (["--ci", "-1"], "--ci must be"),
    ],
)
def test_eval_refuses(model, records, tmp_path, change, words):
    base = {
        "--model": str(model),
        "--data": str(records),
        "--tasks": "phantom_modality",
        "--out": str(tmp_path / "e"),
    }
    base |= dict(zip(change[::2], change[1::2], strict=True))
    with pytest.raises(UnimedError) as e:
        eval_verb.run([x for pair in base.items() for x in pair])
    assert words in e.value.line()
    assert not (tmp_path / "e").exists()


def test_eval_leaves_what_others_wrote(model, records, tmp_path):
    """A table of predict may have the name of a part of the results."""
    mine = tmp_path / "e" / "predictions.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    command = ["--model", str(model), "--data", str(records), "--tasks", "phantom_modality", "--ci", "0"]
    for place, words in ((mine.parent, "predictions.csv"), (mine, "is a file")):
        with pytest.raises(UsageError, match=words):
            eval_verb.run([*command, "--out", str(place)])
    assert mine.read_text() == "mine"


def test_an_empty_folder_names_the_pattern(model, tmp_path):
    with pytest.raises(DataError, match=r"no records in .* .tried"):
        eval_verb.run(["--model", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "e")])


def test_refusals_are_one_line_and_an_exit_code(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "unimed_jax",
        "predict",
        str(tmp_path),
        "--model",
        str(model),
        "--labels",
        "a,b",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "p.csv")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert done.stderr.startswith("unimed-jax: no pictures in ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []
