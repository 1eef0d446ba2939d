"""The page: answers, refusals, what it keeps and what it asks for, over HTTP and in a browser."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import small_model
from browser import CHROMIUM, Browser
from PIL import Image

from unimed_jax import demo, infer, saliency
from unimed_jax.cli import demo as verb
from unimed_jax.data import images
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import calibration, multilabel, tasks

LABELS = "chest\nhead"
TASK = tasks.from_labels(["chest", "head"])
# Notes every attempt to reach something, and lets only the loopback address through.
WATCH = """
import os, socket
connect, find = socket.socket.connect, socket.getaddrinfo
def note(host):
    with open(os.environ["REACHED"], "a") as f:
        print(host, file=f)
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"a test tried to reach the network: {host}")
def watched(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        note(address[0])
    return connect(self, address)
def looked_up(host, *args, **kwargs):
    note(host.decode() if isinstance(host, bytes) else host)
    return find(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = watched, looked_up
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "slice.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A DICOM file whose header names a patient, in three frames."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    path = tmp_path_factory.mktemp("scan") / "scan.dcm"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    ds.PatientName, ds.PatientID, ds.InstitutionName = "PLANTED^NAME", "PLANTED-ID", "PLANTED CLINIC"
    ds.Modality, ds.PhotometricInterpretation = "CT", "MONOCHROME1"
    ds.Rows, ds.Columns, ds.NumberOfFrames, ds.SamplesPerPixel = 40, 30, 3, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(1).integers(0, 4000, (3, 40, 30), np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def test_the_answer_is_that_of_classify(model, picture):
    found = demo.Desk(model).answer(picture, TASK)
    expected = model.classify([picture], TASK.classes)[0]
    assert list(found.scores) == ["chest", "head"]
    np.testing.assert_allclose(list(found.scores.values()), expected, atol=1e-6)
    assert found.line == "Image. Scores are not calibrated probabilities."
    assert found.picture.shape == (341, 512, 3)
    assert found.overlay is not None
    gray = found.picture.astype(float).mean(-1)
    # What the centre crop leaves out is darkened, not coloured.
    np.testing.assert_allclose(found.overlay[:, :80], 0.4 * gray[:, :80, None].repeat(3, -1), atol=1)
    heat = saliency.explain(model, images.eval_image(picture.read_bytes(), 32)[None], TASK.classes)[0]
    placed, seen = saliency.place(heat, 341, 512)
    np.testing.assert_array_equal(found.overlay, saliency.overlay(found.picture, placed, seen))
    assert demo.Desk(model).answer(picture, TASK, method="").overlay is None


def test_a_scan_is_described_without_its_names(model, scan):
    found = demo.Desk(model).answer(scan, TASK, window="40,400", method="")
    assert found.line == (
        "DICOM CT, slice 2 of 3, window as chosen, inverted. Scores are not calibrated probabilities."
    )


def test_calibrated_scores_say_so_and_only_for_their_question(model, picture):
    fitted = calibration.Temperature(
        name="labels", prompts_sha256=TASK.digest, temperature=3.0, n=40, subjects=20
    )
    known = model.about
    desk = demo.Desk(model, calibration.Calibration(model=known, tasks=(fitted,)))
    plain = np.array(list(demo.Desk(model).answer(picture, TASK, method="").scores.values()))
    found = desk.answer(picture, TASK, method="")
    softer = plain ** (1 / 3.0) / (plain ** (1 / 3.0)).sum()
    np.testing.assert_allclose(list(found.scores.values()), softer, atol=1e-6)
    assert "Scores are calibrated: temperature 3.000" in found.line
    other = desk.answer(picture, tasks.from_labels(["head", "chest"]), method="")
    assert "does not know this question" in other.line
    np.testing.assert_allclose(sorted(other.scores.values()), sorted(plain), atol=1e-6)


def test_findings_do_not_exclude_each_other(model, picture):
    task = multilabel.from_labels(["chest", "head", "left"])
    found = demo.Desk(model).answer(picture, task)
    z = model.encode_image([picture])
    bank = dict(zip(task.prompts, model.encode_text(task.prompts), strict=True))
    margins = multilabel.margins(task, z, bank, model.logit_scale)[0]
    np.testing.assert_allclose(list(found.scores.values()), multilabel.probability(margins), atol=1e-6)
    there = [k for k, m in zip(task.findings, margins, strict=True) if m >= 0]
    words = f"Found: {', '.join(there)}" if there else "No finding reaches its threshold"
    assert found.line == f"Image. {words}. Scores are not calibrated probabilities."
    assert found.overlay is not None
    cuts = {(there or ["chest"])[0]: {"scale": 2.0, "offset": 0.5, "threshold": 0.0}}
    fitted = calibration.Platt(
        name="f", prompts_sha256=task.digest, findings=cuts, left={}, n=40, subjects=20
    )
    desk = demo.Desk(model, calibration.Calibration(model=model.about, tasks=(fitted,)))
    again = desk.answer(picture, task, method="")
    first = next(iter(cuts))
    assert again.scores[first] == pytest.approx(
        multilabel.probability(2 * margins[list(task.findings).index(first)] + 0.5), abs=1e-5
    )
    assert f"Found: {first}" in again.line
    assert "findings calibrated" in again.line
    assert "does not know this question" in desk.answer(picture, TASK, method="").line


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n1234"], ids=["empty", "text", "cut"])
def test_bad_files_are_refused_without_their_name(model, tmp_path, content):
    path = tmp_path / "DOE^JANE.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="this file") as e:
        demo.Desk(model).answer(path, TASK)
    assert "JANE" not in e.value.line()


def test_questions():
    assert list(demo.question(demo.OWN, " a, b\n\nc,", "xray").classes) == ["a", "b", "c"]
    assert demo.question("modality", "ignored", "").name == "modality"
    assert demo.question("chest_findings", "", "").name == "chest_findings"
    assert list(demo.question(demo.OWN, "mass", "ct", several=True).findings) == ["mass"]
    for labels, words in (
        ("one", "at least two"),
        ("a,a", "given twice"),
        ("\n".join(map(str, range(101))), "too many"),
    ):
        with pytest.raises(UsageError, match=words):
            demo.question(demo.OWN, labels, "")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "70000"}, "0 to 65535"),
        ({"labels": "one"}, "at least two"),
        ({"task": "modalty"}, "Did you mean"),
        ({"task": "modality", "multilabel": ""}, "--multilabel belongs to --labels"),
        ({"calibration": "none.json"}, "no calibration"),
        ({"model": "none"}, "none"),
    ],
)
def test_wrong_flags_are_refused_before_the_page(flags, words, monkeypatch):
    monkeypatch.setattr(demo, "require", lambda: None)
    monkeypatch.setattr(demo, "serve", lambda *_, **__: pytest.fail("served"))
    with pytest.raises((UsageError, DataError), match=words):
        verb.run([x for k, v in ({"model": "m"} | flags).items() for x in (f"--{k}", v) if x])


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="gradio") as e:
        verb.run(["--model", "m"])
    assert 'pip install "unimed-jax[demo]"' in e.value.line()


# --- served


@dataclass
class Served:
    address: str
    process: subprocess.Popen
    uploads: Path
    reached: Path
    work: Path


def serve(folder: Path, model: Path) -> Served:
    """The command in a process of its own, with a broken proxy and every switch of the library's set against us."""
    work, temporary, watch = (folder / n for n in ("work", "tmp", "watch"))
    for f in (work, temporary, watch):
        f.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(watch), str(Path(__file__).resolve().parents[1])]),
        "REACHED": str(folder / "reached"),
        "TMPDIR": str(temporary),
        "JAX_PLATFORMS": "cpu",
        "HTTP_PROXY": "http://192.0.2.1:3128",
        "http_proxy": "http://192.0.2.1:3128",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_SHARE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "HF_HUB_OFFLINE": "0",
    }
    log = (folder / "log").open("w+")
    command = [sys.executable, "-m", "unimed_jax", "demo", "--model", str(model), "--port", "0"]
    command += ["--labels", "chest,head"]
    process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 300  # a busy machine takes a minute
    while "(on this machine only" not in (text := (folder / "log").read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < end, text
        time.sleep(0.2)
    address = text.split("page ")[1].split()[0]
    return Served(address, process, next(temporary.glob("unimed-jax-demo-*")), folder / "reached", work)


@pytest.fixture(scope="module")
def served(model, tmp_path_factory) -> Iterator[Served]:
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("served")
    found = serve(folder, model.save(folder / "model"))
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    from gradio_client import Client

    os.environ["NO_PROXY"] = "127.0.0.1"
    client = Client(
        served.address,
        verbose=False,
        analytics_enabled=False,
        download_files=tmp_path_factory.mktemp("downloads"),
    )
    yield client
    client.close()


def ask(
    client,
    path: Path | None,
    classes=demo.OWN,
    labels=LABELS,
    several=False,
    modality="",
    window="",
    method="attention",
):
    from gradio_client import handle_file

    file = handle_file(str(path)) if path else None
    return client.predict(file, classes, labels, several, modality, window, method, api_name="/score")


def test_scores_over_http(served, client, model, picture):
    scores, shown, overlay, line = ask(client, picture)
    found = demo.Desk(model).answer(picture, TASK)
    assert scores["label"] == max(found.scores, key=lambda k: found.scores[k])
    got = {c["label"]: c["confidence"] for c in scores["confidences"]}
    assert got == pytest.approx(found.scores, abs=1e-5)
    np.testing.assert_array_equal(np.asarray(Image.open(shown).convert("RGB")), found.picture)
    np.testing.assert_allclose(np.asarray(Image.open(overlay).convert("RGB")), found.overlay, atol=2)
    assert found.line in line
    assert list(served.uploads.rglob("slice.png")), "uploads belong into the folder that goes"


def test_tasks_and_no_saliency_over_http(client, picture):
    scores, _, overlay, _ = ask(client, picture, classes="modality", labels="", method="")
    assert {c["label"] for c in scores["confidences"]} == set(tasks.load("modality").classes)
    assert overlay is None


def test_findings_over_http(client, model, picture):
    found = demo.Desk(model).answer(picture, multilabel.from_labels(["chest", "head"]))
    scores, _, overlay, line = ask(client, picture, several=True)
    assert found.line in line
    assert overlay is not None
    got = {c["label"]: c["confidence"] for c in scores["confidences"]}
    assert got == pytest.approx(found.scores, abs=1e-5)
    line = ask(client, picture, classes="chest_findings", labels="")[3]
    assert "Found: " in line or "No finding reaches" in line


def test_bad_requests_get_one_line(client, picture, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"<script>alert(1)</script>")
    for asked, words in (
        ({"path": tmp_path / "bad.png"}, "this file: is no picture of a known format"),
        ({"path": None}, "there is no picture yet"),
        ({"path": picture, "labels": "one"}, "at least two"),
        ({"path": picture, "labels": "<b>x</b>,<b>x</b>"}, "&lt;b&gt;x&lt;/b&gt;"),
    ):
        scores, shown, overlay, line = ask(client, **asked)
        assert words in line
        assert "bad" in line
        assert (shown, overlay) == (None, None)
        assert not scores or not scores.get("confidences")


def test_no_name_of_a_patient_is_shown(served, client, scan):
    found = ask(client, scan)
    assert "DICOM CT, slice 2 of 3" in found[3]
    assert "PLANTED" not in str(found)
    for path in found[1:3]:
        assert b"PLANTED" not in Path(path).read_bytes()
    assert "PLANTED" not in (served.reached.parent / "log").read_text()


def test_the_page_is_sealed(served):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(served.address, timeout=30) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "fonts.g" not in answer.read().decode()
    request = urllib.request.Request(served.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as e:
        opener.open(request, timeout=30)
    assert e.value.code == 400


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(served, picture, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(served.address)
        browser.wait("document.querySelector('input[type=file]')")
        browser.upload(picture)
        browser.wait("document.body.innerText.includes('slice')")
        browser.js(
            "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == 'Score').click()"
        )
        browser.wait("document.querySelector('.uj-line')")
        loaded = (
            "[...document.querySelectorAll('img')].filter(i => i.complete && i.naturalWidth == 512).length"
        )
        browser.wait(f"{loaded} == 2")
        text = browser.js("document.body.innerText")
        for words in (
            "not a medical device",
            "no evidence that the score is right",
            "chest",
            "head",
            "not calibrated",
        ):
            assert words in text
        browser.js("document.querySelector('input[type=checkbox]').click()")
        browser.js(
            "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == 'Score').click()"
        )
        browser.wait("/Found: |No finding reaches/.test(document.querySelector('.uj-line').innerText)")
        for width in (1280, 390):  # a phone's, too
            browser.resize(width, 900)
            browser.wait(f"document.documentElement.scrollWidth <= {width}")
            browser.shoot(tmp_path / f"{width}.png")
            assert Image.open(tmp_path / f"{width}.png").width > width - 20  # a scroll bar may take some
        asked = [a for a in browser.asked if not a.startswith((served.address, "data:", "blob:", "about:"))]
        assert asked == []
        assert browser.said == []


def test_nothing_is_reached_and_nothing_stays(served):
    """Last of all: the process ends, its uploads are gone, and it has spoken to this machine only."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 0, (served.reached.parent / "log").read_text()
    assert not served.uploads.exists()
    assert list(served.uploads.parent.iterdir()) == []
    assert list(served.work.iterdir()) == []
    assert set(served.reached.read_text().split()) <= {"127.0.0.1", "localhost"}
    assert "Traceback" not in (served.reached.parent / "log").read_text()


def test_a_taken_port_is_refused():
    import socket

    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot be used"):
            demo._free(taken.getsockname()[1])
