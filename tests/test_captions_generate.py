"""Captions from labels: what is asked, what is kept, and what happens when the server or the process fails."""

from __future__ import annotations

import csv
import email.utils
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import chat_server
import pytest
import small_model
from PIL import Image

from unimed_jax.captioning import client, generate, prompts, review
from unimed_jax.cli import captions as cli
from unimed_jax.cli import main
from unimed_jax.data import label_captions, shards
from unimed_jax.data.label_captions import Triplet
from unimed_jax.errors import DataError, Fault, SomeInputsFailed, UsageError

TABLE = """modality,anatomy,finding,synonyms
X-ray,chest,pneumonia,airspace consolidation
X-ray,chest,pleural effusion,pleural fluid;hydrothorax
MRI,knee,meniscal tear,
CT,chest,normal,
"""
PNEUMONIA = Triplet(modality="X-ray", anatomy="chest", finding="pneumonia", synonyms=("consolidation",))
TEXTS = ["A film of a lobe with pneumonia.", "Patchy pneumonia in a chest film."]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(TABLE)
    return path


def arguments(table: Path, url: str, *more: str, out: str = "out.json") -> list[str]:
    target = str(table.parent / out)
    return ["generate", str(table), "--out", target, "--endpoint", url, "--model", "llm", "-k", "3", *more]


def waits() -> tuple[list[float], dict]:
    slept: list[float] = []
    return slept, {"sleep": slept.append, "timeout": 0.4}


def run_one(server: chat_server.Server, folder: Path, *, k: int = 3, rounds: int = 4, **options) -> dict:
    """One label against a scripted server: its entry of the file."""
    endpoint = client.Endpoint(server.url, "llm", **({"sleep": lambda s: None, "timeout": 5.0} | options))
    settings = generate.Settings(k=k, rounds=rounds)
    found = generate.run([PNEUMONIA], endpoint, generate.Cache(folder / "cache"), settings)
    label = found.labels[0]
    return {"captions": [c["text"] for c in label.captions], **label.more}


def test_captions_of_each_label_with_their_origin(table, tmp_path, capsys):
    with chat_server.serving() as server:
        assert cli.run(arguments(table, server.url, "--seed", "5")) == 0
    found = label_captions.read(tmp_path / "out.json")
    assert [x.triplet.finding for x in found.labels] == [
        "pneumonia",
        "pleural effusion",
        "meniscal tear",
        "normal",
    ]
    assert found.labels[1].triplet.synonyms == ("pleural fluid", "hydrothorax")
    assert {len(x.captions) for x in found.labels} == {3}
    first = found.labels[0].captions[0]
    assert first["kind"] == "llm"
    assert first["model"] == "llm-7b-q4"
    assert (first["seed"], len(first["reply_sha256"])) == (5, 64)
    assert found.generator["model"] == "llm"
    assert found.generator["seed"] == 5
    assert found.generator["prompt"] == {"version": prompts.VERSION, "sha256": prompts.digest()}
    assert len({c["text"] for x in found.labels for c in x.captions}) == 12
    body = server.requests[0]
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["captions"]
    assert body["stream"] is True
    assert "12 captions of 4 labels, kind llm" in capsys.readouterr().out
    assert not (tmp_path / "out.json.errors.csv").exists()


def test_same_command_again_asks_nothing_and_writes_the_same_bytes(table, tmp_path):
    with chat_server.serving() as server:
        cli.run(arguments(table, server.url))
        before = (tmp_path / "out.json").read_bytes()
        (tmp_path / "out.json").unlink()
        asked = len(server.requests)
        cli.run(arguments(table, server.url))
        assert len(server.requests) == asked
        assert (tmp_path / "out.json").read_bytes() == before
        cli.run(arguments(table, server.url))
        assert (tmp_path / "out.json").read_bytes() == before
        with pytest.raises(UsageError, match="captions that are not among the new ones"):
            cli.run(arguments(table, server.url, "--seed", "7"))
        assert (tmp_path / "out.json").read_bytes() == before
        cli.run(arguments(table, server.url, "--seed", "7", "--force"))
        assert len(server.requests) == 2 * asked  # the answers were kept
        assert (tmp_path / "out.json").read_bytes() != before


def test_the_result_does_not_depend_on_workers_or_on_which_answer_comes_first(table, tmp_path):
    slow = lambda body: (
        time.sleep(0.15 if chat_server.part(body, "finding") == "pneumonia" else 0),
        chat_server.good,
    )[1]
    results = []
    with chat_server.serving(slow) as server:
        for workers in ("1", "4"):
            out = f"w{workers}.json"
            cli.run(arguments(table, server.url, "--workers", workers, out=out))
            results.append((tmp_path / out).read_bytes())
    assert results[0] == results[1]


BAD_ANSWERS = {
    "malformed": chat_server.says('{"captions": ["a film with pneum'),
    "words": chat_server.says("Sorry, I cannot help with that."),
    "not_texts": chat_server.says('{"captions": [1, 2]}'),
    "other_key": chat_server.says('{"texts": ["a"]}'),
    "empty": chat_server.says(""),
    "nested": chat_server.says("[" * 100_000 + "]" * 100_000),
    "none": chat_server.gives(),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_answers_that_are_no_captions_are_asked_for_again(name, tmp_path):
    with chat_server.serving([BAD_ANSWERS[name]]) as server:
        found = run_one(server, tmp_path)
    assert len(found["captions"]) == 3
    assert found["rejected"] == {"malformed": 1}
    assert [r["seed"] for r in server.requests] == [0, 1]


def test_refusals_and_filters_are_asked_again(tmp_path):
    refusal = chat_server.says("", refusal="I can't.")
    filtered = chat_server.says("", finish="content_filter")
    with chat_server.serving([refusal, filtered]) as server:
        found = run_one(server, tmp_path)
    assert len(found["captions"]) == 3
    assert found["rejected"] == {"refused": 2}


def test_a_cut_answer_gets_twice_the_tokens(tmp_path):
    with chat_server.serving([chat_server.says('{"captions": ["a', finish="length")]) as server:
        found = run_one(server, tmp_path)
    assert found["rejected"] == {"cut_off": 1}
    assert server.requests[1]["max_tokens"] == 2 * server.requests[0]["max_tokens"]


def test_too_few_are_completed_and_too_many_are_counted(tmp_path):
    with chat_server.serving([chat_server.count(1), chat_server.count(5)]) as server:
        found = run_one(server, tmp_path)
    assert len(found["captions"]) == 3
    assert chat_server.wanted(server.requests[1]) == 2
    assert found["captions"][0] in server.requests[1]["messages"][1]["content"]
    assert found["rejected"] == {"surplus": 3}


def test_bad_captions_are_replaced_and_their_faults_said(tmp_path):
    bad = chat_server.gives(
        "A chest film without pneumonia.",
        "A film of a 45-year-old man with pneumonia.",
        "Pneumonia in the lower lobe of the lung.",
    )
    with chat_server.serving([bad]) as server:
        found = run_one(server, tmp_path)
    assert found["captions"][0] == "Pneumonia in the lower lobe of the lung."
    assert len(found["captions"]) == 3
    assert found["rejected"] == {"contradiction": 1, "patient": 1}
    again = server.requests[1]["messages"][1]["content"]
    assert "denied the finding" in again
    assert "one patient" in again
    assert "45-year-old" not in again


NETWORK = {
    "rate": (chat_server.status(429), None),
    "rate_said": (chat_server.status(429, Retry_After="7"), 7.0),
    "busy": (chat_server.status(503), None),
    "broken": (chat_server.status(500), None),
    "cut": (chat_server.cut, None),
    "early": (chat_server.early, None),
    "half_refusal": (chat_server.half_refusal, None),
    "silent": (chat_server.silent, None),
    "stalls": (chat_server.stalls, None),
    "error_inside": (lambda h, b: h.stream(['data: {"error": {"message": "out of memory"}}\n\n']), None),
    "no_protocol": (lambda h, b: h.stream(["data: {broken\n\n"]), None),
    "other_shape": (lambda h, b: h.stream(['data: {"choices": [{"index": 0}]}\n\n', "data: 5\n\n"]), None),
    "endless": (chat_server.says("a" * (prompts.MAX_REPLY_CHARS + 1)), None),
}


@pytest.mark.parametrize("name", NETWORK)
def test_what_the_network_does_is_tried_again_with_the_same_question(name, tmp_path):
    action, asked = NETWORK[name]
    slept, options = waits()
    with chat_server.serving([action, action]) as server:
        found = run_one(server, tmp_path, **options)
    assert len(found["captions"]) == 3
    assert "rejected" not in found
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]
    if asked:
        assert slept == [asked, asked]
    else:
        assert 0.3 < slept[0] < 0.7 < slept[1] < 1.3


def test_an_answer_of_pieces_without_words_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_REPLY_CHARS", 2000)
    wordless = lambda h, b: h.stream(["data: {}\n\n" * 100] * 30 + chat_server.events("never read"))
    with chat_server.serving([wordless]) as server:
        found = run_one(server, tmp_path, sleep=lambda _: None)
    assert (len(found["captions"]), len(server.requests)) == (3, 2)
    assert server.requests[0] == server.requests[1]


def test_retry_after_may_be_a_date_and_may_be_too_long(tmp_path):
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    slept, options = waits()
    with chat_server.serving([chat_server.status(429, Retry_After=date)]) as server:
        run_one(server, tmp_path, **options)
    assert 55 < slept[0] <= 60
    slept, options = waits()
    with (
        chat_server.serving([chat_server.status(429, Retry_After="86400")]) as server,
        pytest.raises(Fault, match=r"status 429, and the server asks to wait 86400 s"),
    ):
        run_one(server, tmp_path / "b", **options)
    assert slept == []


def test_a_dead_server_ends_the_run_and_one_lost_label_does_not(table, tmp_path):
    with (
        chat_server.serving(lambda body: chat_server.status(500)) as server,
        pytest.raises(Fault, match=r"does not answer: status 500 \(3 tries\)"),
    ):
        run_one(server, tmp_path, retries=2)
    assert len(server.requests) == 3
    lost = lambda body: (
        chat_server.status(500) if chat_server.part(body, "finding") == "pneumonia" else chat_server.good
    )
    with chat_server.serving(lost) as server, pytest.raises(SomeInputsFailed) as failed:
        cli.run(arguments(table, server.url, "--retries", "0", "--rounds", "1"))
    assert "3 captions of 1 labels are missing" in str(failed.value)
    found = label_captions.read(tmp_path / "out.json")
    assert [len(x.captions) for x in found.labels] == [0, 3, 3, 3]
    with chat_server.serving() as server:  # another port, the rest is asked for and nothing else
        assert cli.run(arguments(table, server.url)) == 0
    assert len(server.requests) == 1
    assert not (tmp_path / "out.json.errors.csv").exists()


def test_what_cannot_be_had_is_reported_and_never_dropped(table, tmp_path, capsys):
    useless = lambda body: (
        chat_server.gives("A film of something else.", "No pneumonia is seen on this film.")
        if chat_server.part(body, "finding") == "pneumonia"
        else chat_server.good
    )
    with chat_server.serving(useless) as server, pytest.raises(SomeInputsFailed) as failed:
        cli.run(arguments(table, server.url, "--rounds", "2"))
    assert failed.value.exit_code == 4
    rows = list(csv.DictReader((tmp_path / "out.json.errors.csv").open()))
    assert [(r["finding"], r["missing"]) for r in rows] == [("pneumonia", "3")]
    assert "2 contradiction (it denies 'pneumonia')" in rows[0]["reasons"]
    assert "2 finding_missing" in rows[0]["reasons"]
    entry = json.loads((tmp_path / "out.json").read_text())["labels"][0]
    assert entry["missing"] == 3
    assert entry["captions"] == []
    assert "pneumonia: 3 missing" in capsys.readouterr().out


def test_a_server_without_json_mode_is_asked_in_words(table, tmp_path):
    with chat_server.serving(lambda body: chat_server.no_json_mode) as server:
        assert cli.run(arguments(table, server.url, "--workers", "1")) == 0
    kinds = [r.get("response_format", {}).get("type") for r in server.requests]
    assert kinds == ["json_schema", "json_object", None, None, None, None]


def test_parameters_that_a_model_refuses_are_left_out_and_named(tmp_path):
    def newer(body: dict) -> object:
        for name, text in (
            ("max_tokens", "use 'max_completion_tokens'"),
            ("temperature", "only the default is supported"),
        ):
            if name in body:
                return lambda h, b: h.answer(400, {"error": {"message": text, "param": name}}, {})
        return (
            chat_server.status(422, "unknown field `seed`") if "seed" in body else chat_server.gives(*TEXTS)
        )

    with chat_server.serving(newer) as server:
        endpoint = client.Endpoint(server.url, "llm")
        found = generate.run([PNEUMONIA], endpoint, generate.Cache(tmp_path), generate.Settings(k=2))
    assert [c["text"] for c in found.labels[0].captions] == TEXTS
    assert len(server.requests) == 4
    last = server.requests[-1]
    assert "max_completion_tokens" in last
    assert last["response_format"]["type"] == "json_schema"
    assert found.generator["not_sent"] == ["seed", "temperature"]


def test_a_server_that_dies_is_not_asked_about_every_label(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "modality,anatomy,finding\n" + "".join(f"CT,liver,lesion {c}\n" for c in "abcdefghijklmnop")
    )
    with chat_server.serving([chat_server.good] * 3 + [chat_server.status(500)] * 99) as server:
        with pytest.raises(SomeInputsFailed, match="39 captions of 13 labels"):
            cli.run(arguments(table, server.url, "--retries", "1", "--workers", "2"))
        assert len(server.requests) <= 40
    found = label_captions.read(tmp_path / "out.json")
    lost = [x.more["details"]["unanswered"] for x in found.labels if x.more]
    assert sum("2 tries" in why for why in lost) >= 4
    assert sum("not asked" in why for why in lost) >= 4
    with chat_server.serving() as server:
        cli.run(arguments(table, server.url))
    assert len(server.requests) == 13
    assert {r["seed"] for r in server.requests} == {0}


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (401, UsageError, "UNIMED_CAPTIONS_API_KEY"),
        (403, UsageError, "refuses access"),
        (404, UsageError, "no such address or model 'llm'"),
        (400, DataError, "refuses the request"),
        (307, UsageError, "redirects"),
    ],
)
def test_refused_requests_end_the_run_at_once(code, error, said, tmp_path):
    refuse = chat_server.status(code, "bad", Location="http://192.0.2.1/v1")
    with chat_server.serving(lambda body: refuse) as server, pytest.raises(error, match=said):
        run_one(server, tmp_path)
    assert len(server.requests) == (3 if code == 400 else 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1/v1",
        "https://api.example.org/v1",
        "http://127.0.0.1.example.org/v1",
        "http://0.0.0.0/v1",
    ],
)
def test_other_machines_only_on_request(url):
    with pytest.raises(UsageError, match="--allow-remote"):
        client.Endpoint(url, "llm")
    assert client.Endpoint(url, "llm", allow_remote=True).url == url


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:80", "http://", "http://u:secret@127.0.0.1/v1", "http://[::1", "http://127.0.0.1/v1?key=secret"]
)  # fmt: skip
def test_addresses_that_are_none_or_hold_a_secret(url):
    with pytest.raises(UsageError) as e:
        client.check_url(url, allow_remote=True)
    assert "secret" not in str(e.value)


def test_the_key_goes_to_the_server_and_nowhere_else(table, tmp_path, monkeypatch, capsys):
    key = "sk-hush-12345678"
    for name, value in {
        client.KEY_VARIABLE: key, "OPENAI_API_KEY": "sk-other", "OPENAI_ORG_ID": "org-mine",
        "OPENAI_PROJECT_ID": "proj-mine", "OPENAI_BASE_URL": "http://192.0.2.1", "HTTP_PROXY": "http://192.0.2.1:1",
        "ALL_PROXY": "http://192.0.2.1:1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    echo = chat_server.gives(f"Pneumonia and the key {key} in one sentence.", key)
    with chat_server.serving([echo]) as server:
        cli.run(arguments(table, server.url, "--workers", "1"))
    assert {h["authorization"] for h in server.headers} == {f"Bearer {key}"}
    assert not any("mine" in str(h) or "sk-other" in str(h) for h in server.headers)
    with (
        chat_server.serving(lambda b: chat_server.status(401, f"Incorrect key: {key}, sk-hu***78")) as server,
        pytest.raises(UsageError) as e,
    ):
        cli.run(arguments(table, server.url, out="b.json"))
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    output = capsys.readouterr()
    for text in (str(e.value), written, output.out, output.err):
        assert "hush" not in text
        assert "sk-hu" not in text


def test_damaged_answers_are_asked_for_again(table, tmp_path):
    with chat_server.serving() as server:
        cli.run(arguments(table, server.url))
        before = (tmp_path / "out.json").read_bytes()
        answers = sorted((tmp_path / "out.json.cache").iterdir())
        answers[0].write_text(answers[0].read_text()[:40])
        answers[1].write_text("[]")
        answers[2].write_text(answers[3].read_text())
        asked = len(server.requests)
        cli.run(arguments(table, server.url))
        assert len(server.requests) == asked + 3
    assert (tmp_path / "out.json").read_bytes() == before


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_captions(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "modality,anatomy,finding\n" + "".join(f"CT,liver,lesion {c}\n" for c in "abcdefghijklmnop")
    )
    with chat_server.serving() as server:
        cli.run(arguments(table, server.url, out="whole.json"))
    expected = json.loads((tmp_path / "whole.json").read_text())
    with chat_server.serving(delay=0.05) as server:
        command = [sys.executable, "-m", "unimed_jax", "captions"]
        command += arguments(table, server.url, "--workers", "1")
        for kill_at in (1, 4, 9):  # questions that were asked
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                end = time.monotonic() + 60
                while len(server.requests) < kill_at and time.monotonic() < end:
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
            assert not (tmp_path / "out.json").exists()
            assert process.returncode == -signal.SIGKILL
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) <= 16 + 3  # at most the question that was open, each time
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["labels"] == expected["labels"]
    assert not [p for p in tmp_path.rglob(".*") if p.name.endswith((".new", ".lock"))]


def test_two_runs_do_not_share_one_result(table, tmp_path):
    from unimed_jax.data import lock

    with (
        chat_server.serving() as server,
        lock.held(tmp_path / ".out.json.lock"),
        pytest.raises(DataError, match=f"held by process {os.getpid()}"),
    ):
        cli.run(arguments(table, server.url))
    assert server.requests == []


def test_tokens_are_counted_with_a_tokenizer(table, tmp_path):
    small_model.tokenizer(tmp_path / "tok")
    with chat_server.serving() as server, pytest.raises(SomeInputsFailed):
        cli.run(
            arguments(
                table, server.url, "--tokenizer", str(tmp_path / "tok"), "--context", "5", "--rounds", "1"
            )
        )
    details = label_captions.read(tmp_path / "out.json").labels[0].more["details"]
    assert "tokens, more than 5" in details["length"]


def test_foreign_files_are_not_replaced(table, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        cli.run(arguments(table, "http://127.0.0.1:1/v1"))
    with pytest.raises(UsageError, match="is what is read"):
        cli.run(["template", str(table), "--out", str(table), "--force"])
    assert (tmp_path / "out.json").read_text() == "mine"


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"unimed-jax\[captions\]"):
        client.Endpoint("http://127.0.0.1:1/v1", "llm")


def test_the_documented_commands_run(tmp_path, repo_root, monkeypatch):
    section = (
        (repo_root / "docs" / "data.md")
        .read_text()
        .partition("## Captions from labels")[2]
        .partition("\n## ")[0]
    )
    table, commands = re.findall(r"```(?:csv|text)\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("labels.csv").write_text(table)
    Path("images").mkdir()
    Image.new("L", (20, 20)).save("images/a.png")
    Path("images/labels.csv").write_text("file,modality,anatomy,finding\na.png,X-ray,chest,no finding\n")
    with chat_server.serving() as server:
        for command in commands.replace("http://127.0.0.1:8000/v1", server.url).splitlines():
            program, *argv = shlex.split(command)
            assert program == "unimed-jax"
            if argv[1] == "apply":  # what the page saves
                digest = review.digest(label_captions.read(Path("captions.json")))
                saved = {"format": review.FORMAT, "version": review.VERSION, "captions_sha256": digest}
                Path("decisions.json").write_text(json.dumps(saved | {"decisions": {}}))
            assert main.dispatch(argv) == 0
    records = shards.Shards(tmp_path / "records" / "folder", "train")
    assert [c.kind for c in records[0].captions] == ["llm"] * 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modality,anatomy\nCT,liver\n", "no column finding"),
        ("modality,anatomy,finding,extra\n", "unknown column 'extra'"),
        ("modality,anatomy,finding\n", "has no labels"),
        ("modality,anatomy,finding\nPET,liver,cyst\n", "line 2: modality is 'PET'"),
        ("modality,anatomy,finding\nCT,,cyst\n", "line 2 has no anatomy"),
        ("modality,anatomy,finding\nCT,liver\n", "another number of columns"),
        ("modality,anatomy,finding\nCT,liver,cyst\nct,Liver, CYST\n", "line 3 repeats the label of"),
        ("modality,anatomy,finding\nCT,liver,=cmd()\n", "begins with '='"),
        ("modality,anatomy,finding\nCT,liver,a\0b\n", "control characters"),
        ("modality,anatomy,finding\nCT,liver," + "x" * 300 + "\n", "more than 200"),
    ],
)
def test_bad_tables(text, said, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        label_captions.read_triplets(path)
