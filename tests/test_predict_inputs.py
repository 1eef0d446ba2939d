"""`unimed-jax predict` on what is more than one picture: volumes, slides, lists; on any number of devices."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import small_model
import test_found
import test_medical
import test_slides
from PIL import Image

from unimed_jax import infer
from unimed_jax.cli import predict as verb
from unimed_jax.data import found
from unimed_jax.errors import SomeInputsFailed, UsageError
from unimed_jax.evaluate import calibration, multilabel, predict, tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return small_model.loaded(folder).save(folder / "m")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def run(model: Path, *words: object, labels: str = "ct,mri") -> int:
    return verb.run([*map(str, words), "--model", str(model), "--labels", labels])


# ---- volumes


def test_a_series_is_one_volume_and_its_slices_are_chosen(model, tmp_path, capsys):
    for i, k in enumerate((3, 1, 0, 2)):
        test_found.write_slice(tmp_path / "ct" / f"{i}.dcm", k)
    assert run(model, tmp_path / "ct", "--out", tmp_path / "a.csv") == 0
    (middle,) = rows(tmp_path / "a.csv")
    assert (Path(middle["file"]).name, middle["frame"], middle["modality"]) == ("3.dcm", "2", "CT")
    assert "4 DICOM files are the slices of 1 volume" in capsys.readouterr().out
    assert run(model, tmp_path / "ct", "--slices", "all", "--out", tmp_path / "b.csv") == 0
    assert [(Path(r["file"]).name, r["frame"]) for r in rows(tmp_path / "b.csv")] == [
        *[("2.dcm", "0"), ("1.dcm", "1"), ("3.dcm", "2"), ("0.dcm", "3")]
    ]
    record = json.loads((tmp_path / "b.run.json").read_text())
    assert (record["files"], record["pictures"], record["inputs"]["volumes"]) == (4, 4, 1)


def test_a_damaged_slice_costs_only_itself(model, tmp_path):
    for k in range(4):
        test_found.write_slice(tmp_path / "ct" / f"{k}.dcm", k)
    path = tmp_path / "ct" / "1.dcm"
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(SomeInputsFailed, match="1 of 4 files failed"):
        run(model, tmp_path / "ct", "--slices", "all", "--out", tmp_path / "p.csv")
    assert [r["frame"] for r in rows(tmp_path / "p.csv")] == ["0", "2", "3"]
    assert [Path(r["file"]).name for r in rows(tmp_path / "p.errors.csv")] == ["1.dcm"]


def test_a_file_that_fails_in_the_middle_has_no_rows(model, tmp_path, monkeypatch):
    movie = test_medical.sample("examples_ybr_color.dcm")
    original = found.medical.dicom._pixels

    def broken(path, ds, k, frames, module):
        if k == 20:
            raise ValueError("cut")
        return original(path, ds, k, frames, module)

    monkeypatch.setattr(found.medical.dicom, "_pixels", broken)
    task, every = tasks.from_labels(["a", "b"]), found.medical.Slices.parse("every:10")
    got = predict.predict(infer.load(model, batch_size=2), [movie], task, slices=every, shown=3)
    assert (got.rows, got.shown, got.kinds) == ([], [], {})
    assert "cannot decode the pixels" in got.errors[0]["reason"]


# ---- slides


def test_slides_have_a_row_a_tile_and_their_mean(model, tmp_path, capsys):
    slide = test_slides.aperio(tmp_path / "s.svs")
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    size = infer.load(model).image_size
    words = [slide, tmp_path / "x.png", "--mpp", 0.25 * 256 / size, "--max-tiles", 3, "--tissue", 0]
    assert run(model, *words, "--out", tmp_path / "p.csv", "--report", tmp_path / "p.html") == 0
    table = rows(tmp_path / "p.csv")
    assert [r["frame"] for r in table] == ["0", "12", "23", "mean", "0"]
    assert [(r["x"], r["y"]) for r in table] == [
        ("0", "0"),
        ("0", "512"),
        ("1280", "768"),
        ("", ""),
        ("", ""),
    ]
    assert [r["kind"] for r in table] == ["slide"] * 4 + ["image"]
    scores = np.array([float(r["score: ct"]) for r in table])
    assert scores[3] == pytest.approx(scores[:3].mean(), abs=1e-5)
    record = json.loads((tmp_path / "p.run.json").read_text())
    assert (record["files"], record["pictures"], record["kinds"]) == (2, 4, {"slide": 1, "image": 1})
    printed = capsys.readouterr().out
    assert "1 slides have more tiles of tissue than were scored (--max-tiles)" in printed
    assert (
        sum(int(line.split()[0]) for line in printed.splitlines() if line.split()[1:] in (["ct"], ["mri"]))
        == 2
    )
    assert "CANARY" not in (tmp_path / "p.html").read_text() + printed


def test_truth_judges_a_slide_by_its_mean(model, tmp_path):
    test_slides.aperio(tmp_path / "s.svs")
    (tmp_path / "l.csv").write_text("file,label\ns.svs,mri\n")
    words = ["--list", tmp_path / "l.csv", "--level", 1, "--out", tmp_path / "p.csv", "--ci", 0]
    assert run(model, *words) == 0
    assert len(rows(tmp_path / "p.csv")) > 2
    assert json.loads((tmp_path / "p.metrics.json").read_text())["n"] == 1


# ---- calibration


def test_a_calibration_changes_scores_and_is_named(model, tmp_path, capsys):
    Image.fromarray(small_model.pictures(1, size=40)[0]).save(tmp_path / "x.png")
    loaded, task = infer.load(model), tasks.from_labels(["ct", "mri"])
    fit = calibration.Temperature(
        name="labels", prompts_sha256=task.digest, temperature=4.0, n=30, subjects=20
    )
    facts = loaded.about
    (tmp_path / "c.json").write_text(json.dumps(calibration.Calibration(model=facts, tasks=(fit,)).json()))
    run(model, tmp_path / "x.png", "--out", tmp_path / "a.csv")
    capsys.readouterr()
    report = tmp_path / "b.html"
    run(
        model,
        tmp_path / "x.png",
        "--calibration",
        tmp_path / "c.json",
        "--out",
        tmp_path / "b.csv",
        "--report",
        report,
    )
    odds = [
        float(r["score: ct"]) / float(r["score: mri"])
        for r in (*rows(tmp_path / "a.csv"), *rows(tmp_path / "b.csv"))
    ]
    assert odds[1] == pytest.approx(odds[0] ** 0.25, rel=1e-3)
    assert "scores are calibrated (temperature 4.000 from 30 records" in capsys.readouterr().out
    assert "not calibrated" not in report.read_text()
    record = json.loads((tmp_path / "b.run.json").read_text())
    assert len(record["settings"]["calibration_sha256"]) == 64
    with pytest.raises(UsageError, match="has nothing for labels"):
        run(
            model,
            tmp_path / "x.png",
            "--calibration",
            tmp_path / "c.json",
            "--out",
            tmp_path / "c.csv",
            labels="a,b",
        )


def test_thresholds_of_findings_come_from_the_calibration(model, tmp_path):
    Image.fromarray(small_model.pictures(1, size=40)[0]).save(tmp_path / "x.png")
    loaded, task = infer.load(model), multilabel.from_labels(["effusion", "normal"])
    ones = {
        k: {"scale": 1.0, "offset": 0.0, "threshold": t} for k, t in (("effusion", 1e-9), ("normal", 1.0))
    }
    fit = calibration.Platt(name="f", prompts_sha256=task.digest, findings=ones, left={}, n=9, subjects=9)
    facts = loaded.about
    (tmp_path / "c.json").write_text(json.dumps(calibration.Calibration(model=facts, tasks=(fit,)).json()))
    words = [
        tmp_path / "x.png",
        "--multilabel",
        "--calibration",
        tmp_path / "c.json",
        "--out",
        tmp_path / "p.csv",
    ]
    assert run(model, *words, labels="effusion,normal") == 0
    assert rows(tmp_path / "p.csv")[0]["predicted"] == "effusion"


# ---- the same numbers, however they are computed


def test_nothing_depends_on_batches_threads_order_or_devices(model, tmp_path):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    folder = tmp_path / "in"
    for k in range(3):
        test_found.write_slice(folder / f"{k}.dcm", k)
    for i, pixels in enumerate(small_model.pictures(9, size=40)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    test_slides.aperio(folder / "s.svs")
    flags = ["--slices", "all", "--level", "1", "--labels", "ct,mri", "--model", str(model)]
    names = sorted(p.name for p in folder.iterdir())
    (folder / "l.csv").write_text("\n".join(["file", *names[::-1]]))
    assert (
        verb.run(
            [str(folder), *flags, "--batch-size", "5", "--threads", "1", "--out", str(tmp_path / "a.csv")]
        )
        == 0
    )
    four = ["--batch-size", "8", "--threads", "8", "--out", str(tmp_path / "b.csv")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "predict", "--list", str(folder / "l.csv"), *flags, *four],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 x cpu" in done.stdout
    one, other = rows(tmp_path / "a.csv"), rows(tmp_path / "b.csv")
    # A list scores each slice by itself: its number in the volume is not known there.
    key = lambda r: (Path(r["file"]).name, "0" if r["file"].endswith(".dcm") else r["frame"])
    first, second = ({key(r): r for r in table} for table in (one, other))
    assert first.keys() == second.keys()
    assert len(first) == len(one) == len(other) > 12
    for k, r in first.items():
        assert float(r["score: ct"]) == pytest.approx(float(second[k]["score: ct"]), abs=2e-5)
        assert r["predicted"] == second[k]["predicted"]
    records = [json.loads((tmp_path / f"{x}.run.json").read_text()) for x in "ab"]
    assert records[0]["inputs"]["sha256"] == records[1]["inputs"]["sha256"]
    digests = sorted(hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names)
    assert records[0]["inputs"]["sha256"] == hashlib.sha256("".join(digests).encode()).hexdigest()


# ---- nobody is named


def test_no_identifier_of_series_lists_truth_or_slides_reaches_an_output(model, tmp_path):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    import pydicom

    study, out = tmp_path / "study", tmp_path / "out"
    study.mkdir()
    canaries = test_medical.plant(study / "0.dcm")
    for k in (1, 2):
        ds = pydicom.dcmread(study / "0.dcm")
        ds.ImagePositionPatient = [0, 0, 5 * k]
        ds.save_as(study / f"{k}.dcm", enforce_file_format=False)
    (study / "cut.dcm").write_bytes((study / "0.dcm").read_bytes()[:900])
    test_slides.aperio(study / "s.svs")
    (study / "damaged.svs").write_bytes((study / "s.svs").read_bytes()[:9000])
    (study / "l.csv").write_text("file,patient,label\n0.dcm,CANARY-group-1,ct\ns.svs,CANARY-group-2,mri\n")
    (tmp_path / "t.csv").write_text("file,patient_id,label\nstudy,CANARY-group-3,ct\n")
    command = ["predict", str(study), str(study / "l.csv"), "--model", str(model), "--labels", "ct,mri"]
    command += [
        "--slices",
        "all",
        "--level",
        "1",
        "--truth",
        str(tmp_path / "t.csv"),
        "--out",
        str(out / "p.csv"),
    ]
    command += ["--report", str(out / "p.html"), "--ci", "20"]
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
    assert b"3 DICOM files are the slices of 1 volume" in done.stdout
    assert len(rows(out / "p.errors.csv")) == 2
    assert json.loads((out / "p.metrics.json").read_text())["subjects"] == 2
    assert len(canaries) == 40
    canaries += ["CANARY-group", "CANARY-user", "CANARY-file", "CANARY-id", "CANARY"]
    seen = {p.name: p.read_bytes() for p in [*out.iterdir(), tmp_path / "log.txt"]}
    seen |= {"stdout": done.stdout, "stderr": done.stderr}
    assert [(c, where) for c in canaries for where, data in seen.items() if c.encode() in data] == []


# ---- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--list", "none.csv"], "none.csv cannot be read"),
        ([], "nothing to score"),
        (["x.png", "--mpp", "0.5", "--level", "0"], "--mpp and --level exclude each other"),
        (["x.png", "--tissue", "7"], "--tissue is a share"),
        (["x.png", "--ci", "-1"], "--ci at least 0"),
        (["x.png", "--calibration", "none.json"], "no calibration none.json"),
        (["x.png", "--truth", "none.csv"], "none.csv cannot be read"),
    ],
)
def test_wrong_requests(model, tmp_path, monkeypatch, words, message):
    from unimed_jax.errors import UnimedError

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("x.png")
    with pytest.raises(UnimedError) as e:
        run(model, *words, "--out", "p.csv")
    assert message in e.value.line()
    assert not Path("p.csv").exists()
