"""What a DICOM header says about a patient reaches nothing that a command writes, prints, logs or raises."""

from __future__ import annotations

import base64
import json
import logging
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import small_model
import test_medical

from unimed_jax import demo, infer
from unimed_jax.cli import main
from unimed_jax.errors import DataError
from unimed_jax.evaluate import tasks

pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
CLASSES = ("ct", "mri")
PER_CLASS = 15  # a temperature is fitted on no fewer than 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(loaded, tmp_path_factory) -> Path:
    return loaded.save(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SimpleNamespace:
    """Readable files in a folder for each class, and damaged ones beside them; all with every planted value."""
    root = tmp_path_factory.mktemp("study")
    planted = test_medical.plant(root / "plain.dcm")
    whole = (root / "plain.dcm").read_bytes()
    head, rows, tail = whole[:7000], whole[7000:39_000], whole[39_000:]
    for i in range(PER_CLASS * len(CLASSES)):
        path = root / "data" / CLASSES[i % 2] / f"{i}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        at = 1024 * i  # four rows of pixels: other pictures of the same values
        path.write_bytes(head + rows[at:] + rows[:at] + tail)
    (root / "damaged").mkdir()
    (root / "damaged" / "cut.dcm").write_bytes(whole[:-5000])
    (root / "damaged" / "header.dcm").write_bytes(whole[:900])
    assert len(planted) == 40
    return SimpleNamespace(root=root, data=root / "data", damaged=root / "damaged", planted=planted)


def content(path: Path) -> bytes:
    """The bytes of a file with what is compressed or encoded in it laid open."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        data += repr((table.schema.metadata, table.to_pylist())).encode()
    coded = re.findall(rb"base64,([A-Za-z0-9+/=]+)", data)
    return b"\n".join([data, *map(base64.b64decode, coded)])


def leaked(planted: list[str], seen: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(value, where) for value in planted for where, data in seen.items() if value.encode() in data]


@pytest.fixture
def out(tmp_path) -> Path:
    """Where everything is written that is searched."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def watched(study, out, capfd, caplog) -> Iterator[Callable[..., dict[str, bytes]]]:
    """Runs a command and returns all that came of it, by place; none of it holds a planted value."""
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def run(*command: str | Path, code: int = 0) -> dict[str, bytes]:
            with pytest.raises(SystemExit) as end:
                main.main([*map(str, command)])
            printed, err = capfd.readouterr()
            assert end.value.code == code, err
            files = {str(p.relative_to(out)): p for p in out.rglob("*")}
            seen = {name: content(p) for name, p in files.items() if p.is_file()}
            said = [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records]
            said += [r.exc_text or "" for r in caplog.records]
            seen |= {"stdout": printed.encode(), "stderr": err.encode(), "log": "\n".join(said).encode()}
            assert leaked(study.planted, seen | {"names": "\n".join(files).encode()}) == []
            return seen

        yield run


def test_a_leak_would_be_seen(study, tmp_path):
    path = study.data / CLASSES[0] / "0.dcm"
    assert leaked(study.planted, {"": content(path)}) == [(value, "") for value in study.planted]
    (tmp_path / "page.html").write_bytes(b'<img src="data:;base64,%s">' % base64.b64encode(path.read_bytes()))
    assert len(leaked(study.planted, {"": content(tmp_path / "page.html")})) == 40


def test_embed_and_search(model, study, watched, out):
    index = out / "e.parquet"
    seen = watched("embed", study.data, study.damaged, "--model", model, "--out", index, code=4)
    assert pq.read_table(index).num_rows == PER_CLASS * len(CLASSES)
    assert seen["e.errors.csv"].count(b"\n") == 1 + 2
    query = study.data / CLASSES[1] / "1.dcm"
    ask = ["search", "--index", index, "--model", model, "--image"]
    seen = watched(*ask, query, "--out", out / "hits.csv", "--html", out / "hits.html")
    assert seen["hits.html"].count(b"<img") == 10
    assert json.loads(watched(*ask, query, "--json")["stdout"])["hits"][0]["id"] == str(query)
    for name in ("cut", "header"):
        watched(*ask, study.damaged / f"{name}.dcm", code=3)


def test_overlap(model, study, watched, out):
    flags = ["--model", model, "--cosine", "0.5", "--out", out / "o.csv", "--html", out / "o.html"]
    seen = watched("data", "overlap", study.root, study.data, *flags, code=4)
    assert seen["o.csv"].count(b"\n") > PER_CLASS * len(CLASSES)
    assert seen["o.errors.csv"].count(b"\n") == 1 + 2
    assert b"<img" in seen["o.html"]
    watched("data", "overlap", study.damaged, study.data, "--json", code=3)


def test_eval_of_a_suite(model, study, watched, out, tmp_path):
    layout = {"kind": "folders", "folder": "."}
    suite = {"name": "mine", "sets": [{"name": "scans", "classes": list(CLASSES), "layout": layout}]}
    (tmp_path / "mine.json").write_text(json.dumps(suite))
    shutil.copytree(study.data, tmp_path / "data")
    for path in study.damaged.iterdir():
        shutil.copy(path, tmp_path / "data" / CLASSES[0])
    command = ["eval", "--suite", tmp_path / "mine.json", "--model", model, "--ci", "20", "--report"]
    seen = watched(*command, "--data-root", tmp_path / "data", "--out", out / "r", code=4)
    scans = json.loads(seen["r/results.json"])["datasets"]["scans"]
    assert (scans["n"], scans["bad"]) == (PER_CLASS * len(CLASSES), 2)
    assert seen["r/errors.csv"].count(b"\n") == 1 + 2
    assert {"r/predictions.csv", "r/report.html", "r/results.md"} < set(seen)
    assert b"data:image" in seen["r/report.html"]


def test_calibrate(model, study, watched, out, tmp_path):
    good = [p.name for p in sorted(study.data.rglob("*.dcm"), key=lambda p: p.name)]
    bad = [p.name for p in study.damaged.iterdir()]
    for path in study.root.rglob("*.dcm"):
        shutil.copy(path, tmp_path)
    listed = tmp_path / "val.csv"
    flags = [
        "--model",
        model,
        "--labels",
        ",".join(CLASSES),
        "--ci",
        "20",
        "--out",
        out / "c.json",
        "--force",
    ]
    for names in (good, *([*good, name] for name in bad)):
        listed.write_text("file,label\n" + "".join(f"{n},{CLASSES[i % 2]}\n" for i, n in enumerate(names)))
        seen = watched("calibrate", listed, *flags, code=0 if names is good else 3)
    assert json.loads(seen["c.json"])["tasks"]
    assert any(name.encode() in seen["stderr"] for name in bad)


def test_demo(loaded, study, capfd, caplog):
    desk, task, seen = demo.Desk(loaded), tasks.from_labels(list(CLASSES)), []
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = desk.answer(study.data / CLASSES[0] / "0.dcm", task)
        assert found.line.startswith("DICOM CT")
        assert found.overlay is not None
        seen += [repr(found), found.line, found.picture.tobytes().decode("latin-1")]
        for path in study.damaged.iterdir():
            with pytest.raises(DataError, match="this file") as e:
                desk.answer(path, task)
            seen += [e.value.line(), *traceback.format_exception(e.value)]
    seen += [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records]
    seen += list(capfd.readouterr())
    assert leaked(study.planted, {"": "\n".join(seen).encode()}) == []


def test_tracebacks(model, study, watched, out):
    watched("embed", study.data, "--model", model, "--out", out / "e.parquet")
    for name in ("cut", "header"):
        path = study.damaged / f"{name}.dcm"
        for command in (
            ("embed", path, "--out", out / f"{name}.parquet"),
            ("predict", path, "--labels", ",".join(CLASSES), "--out", out / f"{name}.p.csv"),
            ("search", "--index", out / "e.parquet", "--image", path),
        ):
            seen = watched(*command, "--model", model, "--debug", code=3)
            assert b"Traceback" in seen["stderr"]
            assert f"{name}.dcm".encode() in b"".join(seen.values())
