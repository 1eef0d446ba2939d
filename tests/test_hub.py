"""Fetching named models from a server that speaks the hub's protocol: pins, refusals, one folder for offline use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import small_model
from safetensors.numpy import save_file
from training import environment

import unimed_jax as uj
from unimed_jax import hub
from unimed_jax.cli import models as cli
from unimed_jax.convert import mapping, native, tables
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import origins, zoo

COMMIT, OLDER = "c" * 40, "a" * 40
NAME = "unimed-clip-vit-b16"  # its architecture is replaced by a small one


class Hub:
    """Repositories as {(repo, revision, file): bytes}; "main" is `COMMIT`."""

    def __init__(self):
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.asked: Counter = Counter()
        self.sha256 = ""  # of the weights
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, *, body: bool):
                path = self.path.split("?")[0].strip("/").split("/")
                outer.asked[self.command] += 1
                if path[:2] == ["api", "models"]:
                    repo = "/".join(path[2:4])
                    found = any(r == repo for r, _, _ in outer.files)
                    text = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": []}).encode()
                    self.send(200 if found else 404, text, {"Content-Type": "application/json"}, body)
                    return
                repo, revision, name = "/".join(path[:2]), path[3], "/".join(path[4:])
                data = outer.files.get((repo, COMMIT if revision == "main" else revision, name))
                if data is None:
                    known = any(r == repo for r, _, _ in outer.files)
                    code = "EntryNotFound" if known else "RepoNotFound"
                    self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": revision}, body)
                    return
                etag = hashlib.sha256(data).hexdigest()
                self.send(200, data, {"X-Repo-Commit": revision, "ETag": f'"{etag}"'}, body)

            def send(self, code, data, headers, body):
                self.send_response(code)
                for k, v in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(k, v)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def small():
    """A UniMed-shaped model with heads of 64."""
    m = small_model.model(vision__heads=1, text__heads=1)
    m.name = NAME
    return m, small_model.params(m, 3)


@pytest.fixture
def served(small, tmp_path, monkeypatch):
    """The hub with that model under `NAME`'s own file names, and BERT's vocabulary beside it."""
    m, params = small
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("UNIMED_JAX_MODELS", str(tmp_path / "models"))
    monkeypatch.setitem(zoo.MODELS, NAME, m)
    state = {
        "logit_scale": np.float32(2.5),
        **mapping.from_params(params["vision"], tables.OPENCLIP_VISION, m),
        **mapping.from_params(params["text"], tables.UNIMED_TEXT, m),
    }
    save_file({k: np.asarray(v) for k, v in state.items()}, tmp_path / "w.safetensors")
    small_model.tokenizer(tmp_path / "words")
    weights, words = (
        (tmp_path / "w.safetensors").read_bytes(),
        (tmp_path / "words" / "tokenizer.json").read_bytes(),
    )
    origin = dataclasses.replace(
        origins.get(NAME),
        weights=origins.File(repo="them/clip", name="w.safetensors"),
        tokenizer=origins.File(repo="them/bert", name="tokenizer.json"),
    )
    monkeypatch.setitem(origins.ORIGINS, NAME, origin)
    server = Hub()
    for revision in (COMMIT, OLDER):
        server.files["them/clip", revision, "w.safetensors"] = weights
        server.files["them/bert", revision, "tokenizer.json"] = words
    server.sha256 = hashlib.sha256(weights).hexdigest()
    yield server
    server.server.shutdown()


def pin(monkeypatch, **pins) -> None:
    """Pins both files of `NAME`; the tokenizer by its revision and the digest that is there."""
    origin = origins.get(NAME)
    weights = dataclasses.replace(origin.weights, **pins)
    monkeypatch.setitem(origins.ORIGINS, NAME, dataclasses.replace(origin, weights=weights, tokenizer=None))


def test_first_download_is_recorded_and_then_offline(served, small, tmp_path, monkeypatch):
    lines: list[str] = []
    done = hub.fetch(
        NAME, tmp_path / "models" / NAME, trust_first=True, endpoint=served.url, progress=lines.append
    )
    assert done.files["weights"]["revision"] == COMMIT
    assert done.files["weights"]["sha256"] == served.sha256
    assert served.sha256 in lines[0]
    spec = json.loads((done.folder / "config.json").read_text())["extra"]["origin"]
    assert spec["files"] == done.files
    assert "NC" in spec["licence"]
    assert origins.get(NAME).licence in (done.folder / "README.md").read_text()
    served.server.shutdown()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = uj.load(NAME)  # by name, from $UNIMED_JAX_MODELS
    np.testing.assert_array_equal(loaded.params["vision"]["pos"], small[1]["vision"]["pos"])
    assert loaded.logit_scale == pytest.approx(np.exp(2.5))
    assert loaded.encode_text(["axial ct"]).shape == (1, 32)
    model, _, _ = uj.create_model_and_transforms(NAME)
    assert model.logit_scale == loaded.logit_scale
    assert uj.get_tokenizer(NAME)("a chest").shape == (1, 32)
    assert not [p for p in done.folder.parent.iterdir() if p != done.folder]  # nothing half-made is left


def test_check_and_show_a_fetched_model(served, tmp_path, capsys):
    assert cli.run(["show", NAME]) == 0
    out = capsys.readouterr().out
    assert "not known: --revision or --trust-first-download" in out
    assert f"unimed-jax models fetch {NAME}" in out
    hub.fetch(NAME, tmp_path / "models" / NAME, trust_first=True, endpoint=served.url)
    assert cli.run(["check", NAME]) == 0
    out = capsys.readouterr().out
    assert f"hub: them/clip w.safetensors at {COMMIT}, sha256 {served.sha256}" in out
    assert "both towers run" in out
    assert "licence: CC BY-NC 4.0" in out
    assert "prompts: modality" in out
    cli.run(["list"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{NAME} "))
    assert line.endswith("here")


def test_pins_are_asked_for(served, tmp_path):
    with pytest.raises(
        UsageError, match=r"no public pin is known for revision, sha256 of them/clip/w\.safetensors"
    ):
        hub.fetch(NAME, tmp_path / "m", endpoint=served.url)
    assert not served.asked
    with pytest.raises(UsageError, match=r"tokenizer\.json.*--trust-first-download"):
        hub.fetch(NAME, tmp_path / "m", revision=OLDER, sha256=served.sha256, endpoint=served.url)
    for revision, sha256 in (("main", served.sha256), (OLDER[:12], served.sha256), (OLDER, "abc")):
        with pytest.raises(UsageError, match="is no pin"):
            hub.fetch(NAME, tmp_path / "m", revision=revision, sha256=sha256, trust_first=True)
    done = hub.fetch(
        NAME,
        tmp_path / "m",
        revision=OLDER,
        sha256=served.sha256.upper(),
        tokenizer=tmp_path / "words",
        endpoint=served.url,
    )
    assert done.files["weights"]["revision"] == OLDER
    assert list(done.files) == ["weights"]


def test_a_changed_file_is_refused_and_nothing_is_left(served, tmp_path, monkeypatch):
    pin(monkeypatch, revision=COMMIT, sha256="0" * 64)
    with pytest.raises(DataError, match=rf"has sha256 {served.sha256}, not 0000.*do not use it"):
        hub.fetch(NAME, tmp_path / "models" / NAME, endpoint=served.url)
    assert not list((tmp_path / "models").iterdir())


def test_other_pins_than_the_known_are_refused(served, tmp_path, monkeypatch):
    pin(monkeypatch, revision=COMMIT, sha256=served.sha256)
    for revision, sha256 in ((OLDER, ""), ("", "1" * 64)):
        with pytest.raises(UsageError, match="is not the known"):
            hub.fetch(NAME, tmp_path / "m", revision=revision, sha256=sha256, endpoint=served.url)
    assert hub.fetch(NAME, tmp_path / "m", endpoint=served.url).files["weights"]["revision"] == COMMIT


def test_a_model_without_tokenizer_still_sees(served, tmp_path, monkeypatch, capsys):
    pin(monkeypatch, revision=COMMIT, sha256=served.sha256)
    folder = hub.fetch(NAME, tmp_path / "m", endpoint=served.url).folder
    assert cli.run(["check", str(folder)]) == 0
    assert "no tokenizer, so no texts" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no tokenizer"):
        uj.load(folder).encode_text(["axial ct"])


def test_weights_that_do_not_fit_the_name(served, small, tmp_path, monkeypatch):
    wider = dataclasses.replace(small[0], vision=dataclasses.replace(small[0].vision, depth=3))
    monkeypatch.setitem(zoo.MODELS, NAME, wider)
    with pytest.raises(DataError, match="missing: visual"):
        hub.fetch(NAME, tmp_path / "m", trust_first=True, endpoint=served.url)
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_that_does_not_fit(served, small, tmp_path, monkeypatch):
    few = dataclasses.replace(small[0], text=dataclasses.replace(small[0].text, kind="clip"))
    monkeypatch.setitem(zoo.MODELS, NAME, few)
    with pytest.raises(DataError):
        hub.fetch(NAME, tmp_path / "m", trust_first=True, endpoint=served.url)
    assert not (tmp_path / "m").exists()


def test_what_is_not_there(served, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no published weights are known for 'tiny'"):
        hub.fetch("tiny", tmp_path / "m")
    with pytest.raises(UsageError, match=f"unimed-jax models fetch {NAME} --out .*models/{NAME}"):
        uj.load(NAME)
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="exists"):
        hub.fetch(NAME, tmp_path / "m", trust_first=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "m" / "mine.txt").write_text("x")
    for place in ("link", "m"):  # before anything is fetched
        with pytest.raises(UsageError, match=r"is a link|holds 'mine.txt'"):
            hub.fetch(NAME, tmp_path / place, trust_first=True, force=True, endpoint="http://127.0.0.1:9")
    del served.files["them/clip", COMMIT, "w.safetensors"]
    with pytest.raises(DataError, match=r"them/clip/w\.safetensors cannot be fetched"):
        hub.fetch(NAME, tmp_path / "n", trust_first=True, endpoint=served.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (NAME, "dinov2-s14"):  # with a pinned revision, too
        with pytest.raises(DataError, match="HF_HUB_OFFLINE is set: nothing is fetched"):
            hub.fetch(name, tmp_path / "n", trust_first=True, endpoint=served.url)


# With a known revision, and with one that the hub would have to tell first.
@pytest.mark.parametrize("name", [NAME, "unimed-clip-vit-l14-336"])
def test_a_refusal_is_one_line(tmp_path, name):
    """Nothing listens there; the library's own words about its retries are not ours."""
    code = (
        "import huggingface_hub.utils._http as h, sys; h.time.sleep = lambda s: None; "
        "from unimed_jax.cli import main; sys.exit(main.main(sys.argv[1:]))"
    )
    command = ["models", "fetch", name, "--out", str(tmp_path / "m"), "--trust-first-download"]
    env = environment() | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be fetched" in done.stderr


def test_a_part_becomes_a_tower_file(served, small, tmp_path, monkeypatch):
    """BERT alone, for init.text."""
    m, params = small
    part = dataclasses.replace(
        m, name="biomedbert-base", embed_dim=64, text=dataclasses.replace(m.text, proj="none")
    )
    body = {k: v for k, v in params["text"].items() if k != "proj"}
    save_file(mapping.from_params(body, tables.HF_BERT, part), tmp_path / "b.safetensors")
    served.files["them/bert", COMMIT, "b.safetensors"] = (tmp_path / "b.safetensors").read_bytes()
    file = origins.File(repo="them/bert", name="b.safetensors")
    origin = dataclasses.replace(origins.get("biomedbert-base"), weights=file)
    origin = dataclasses.replace(origin, tokenizer=origins.get(NAME).tokenizer)
    monkeypatch.setitem(origins.ORIGINS, "biomedbert-base", origin)
    monkeypatch.setitem(zoo.PARTS, "biomedbert-base", part)
    done = hub.fetch("biomedbert-base", tmp_path / "bert", trust_first=True, endpoint=served.url)
    found, meta = native.load_tower(done.folder / "text.safetensors")
    np.testing.assert_array_equal(found["text"]["word"], body["word"])
    assert meta["origin"]["files"] == done.files
    assert Tokenizer(done.folder).kind == "bert"


def test_the_command_line(served, tmp_path):
    """A process of its own, with the hub's own environment variable; BiomedCLIP's pins do not fit what is served."""
    served.files["microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "x", "x"] = b""
    env = environment(HF_ENDPOINT=served.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
    command = [
        sys.executable,
        "-m",
        "unimed_jax",
        "models",
        "fetch",
        "biomedclip",
        "--out",
        str(tmp_path / "m"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "sha256 of microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract/vocab.txt" in done.stderr
    done = subprocess.run(
        [*command, "--trust-first-download"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert "cannot be fetched" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", origins.ORIGINS)
def test_origins_are_complete(name):
    origin = origins.get(name)
    assert name in (zoo.PARTS if origin.tower else zoo.MODELS)
    assert origin.licence
    assert origin.use
    for file in (origin.weights, origin.tokenizer):
        if file is None:
            continue
        assert file.repo.count("/") == 1
        assert file.revision == "" or len(bytes.fromhex(file.revision)) == 20
        assert file.sha256 == "" or len(bytes.fromhex(file.sha256)) == 32
    assert all(len(bytes.fromhex(sha)) == 32 for sha in origin.same.values())
    if origin.tower != "vision":
        kind = (zoo.PARTS if origin.tower else zoo.MODELS)[name].text.kind
        assert origin.tokenizer is not None
        assert (kind == "clip") == (origin.tokenizer.name == "tokenizer.json")
    for task in origin.prompts:
        from unimed_jax.evaluate import tasks

        assert tasks.load(task).name == task
