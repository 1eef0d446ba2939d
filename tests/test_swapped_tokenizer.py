"""Two lines of a vocabulary change places: no run goes on with it, and no model is evaluated with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small_model
from training import build_data, leaves

from unimed_jax import config
from unimed_jax.cli import eval as eval_verb
from unimed_jax.cli import predict as predict_verb
from unimed_jax.cli.train import load_config
from unimed_jax.data import export, text
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import DataError, Preempted
from unimed_jax.train import checkpoint, hygiene, loop

pytestmark = pytest.mark.usefixtures("compilation_cache")


def swap(path: Path) -> None:
    """Exchanges the last two entries of a tokenizer.json or lines of a vocab.txt."""
    if path.suffix == ".txt":
        *lines, a, b = path.read_text().splitlines()
        path.write_text("\n".join([*lines, b, a]) + "\n")
        return
    spec = json.loads(path.read_text())
    vocabulary = spec["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(spec))


def make(root: Path, **more: str) -> config.Train:
    """As in test_loop.py: the same programs."""
    fields = {
        "data.root": str(root), "duration.steps": "6", "checkpoint.every.steps": "2", "writers": "('jsonl',)"
    }  # fmt: skip
    return load_config("phantom_tiny", fields | more)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, Path]:
    """Records, and a run on them that was stopped after two of six steps."""
    root = build_data(tmp_path_factory.mktemp("data") / "root", n=60)
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hygiene.StopSignals, "requested", lambda self, now: now == 2)
        with pytest.raises(Preempted):
            loop.run(make(root), workdir)
    return root, workdir


@pytest.fixture
def copies(stopped, tmp_path) -> tuple[Path, Path]:
    root, workdir = stopped
    return Path(shutil.copytree(root, tmp_path / "root")), Path(shutil.copytree(workdir, tmp_path / "run"))


def _refused(cfg: config.Train, workdir: Path, words: str) -> None:
    before = leaves(workdir)
    with pytest.raises(DataError, match=words) as e:
        loop.run(cfg, workdir)
    assert e.value.exit_code == 3
    assert "\n" not in e.value.line()
    assert e.value.remedy
    assert leaves(workdir) == before  # nothing was trained, saved or moved aside
    assert not (workdir / "checkpoints" / checkpoint.DAMAGED).exists()
    assert not (workdir / "model").exists()


def test_a_replaced_tokenizer_ends_the_resumed_run(copies):
    """The records say with which tokenizer their captions were counted."""
    root, workdir = copies
    swap(root / "tokenizer.json")
    _refused(make(root), workdir, "phantom was exported with another tokenizer")


def test_another_tokenizer_in_the_config_ends_the_resumed_run(copies, tmp_path):
    root, workdir = copies
    other = tmp_path / "tokenizer.json"
    shutil.copy(root / "tokenizer.json", other)
    swap(other)
    cfg = make(root, **{"data.tokenizer": str(other)})
    _refused(cfg, workdir, "phantom was exported with another tokenizer")


def test_records_exported_again_end_the_resumed_run(copies, stopped):
    """Here records and tokenizer agree with each other, but not with what the saved state has learnt."""
    root, workdir = copies
    swap(root / "tokenizer.json")
    export.export(
        Phantom(n=60, size=40), root, shards=2, tokenizer=text.Tokenizer(root / "tokenizer.json"), force=True
    )
    _refused(
        make(root),
        workdir,
        r"the saved state in .*run was made with another tokenizer \(sha256 \w+, now \w+\)",
    )
    # With its own tokenizer the same run goes on, from where it stopped.
    result = loop.run(make(stopped[0]), workdir)
    assert (result.status, result.step) == ("finished", 6)


def test_two_lines_of_a_vocab_txt(stopped, tmp_path):
    """The same words and the same counts: only the ids of two tokens differ."""
    root, _ = stopped
    tokenizer = text.Tokenizer(root / "tokenizer.json")
    spec = json.loads((root / "tokenizer.json").read_text())
    lines = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(lines) + "\n")
    records = tmp_path / "records"
    export.export(Phantom(n=20, size=40), records, tokenizer=text.Tokenizer(vocabulary))
    before = text.Tokenizer(vocabulary)
    assert before.vocab_size == tokenizer.vocab_size
    swap(vocabulary)
    assert text.Tokenizer(vocabulary).digest != before.digest
    with pytest.raises(DataError, match="phantom was exported with another tokenizer"):
        loop.run(make(records, **{"data.tokenizer": str(vocabulary)}), tmp_path / "new")
    assert not (tmp_path / "new" / "checkpoints" / "0").exists()


def _evaluate(model: Path, root: Path, tmp_path: Path) -> None:
    flags = ["--model", str(model), "--out", str(tmp_path / "eval"), "--split=train", "--ci=0"]
    eval_verb.run([*flags, "--data", str(root)])


def test_no_evaluation_of_a_model_folder_with_a_swapped_tokenizer(stopped, tmp_path):
    root, _ = stopped
    model = small_model.loaded(tmp_path).save(tmp_path / "model")
    swap(model / "tokenizer.json")
    for attempt in (
        lambda: _evaluate(model, root, tmp_path),
        lambda: predict_verb.run(
            [str(root), "--model", str(model), "--labels=a,b", "--out", str(tmp_path / "p.csv")]
        ),
    ):
        with pytest.raises(DataError, match=r"tokenizer.json is not the tokenizer of .*model") as e:
            attempt()
        assert e.value.exit_code == 3
    assert not (tmp_path / "eval").exists()
    assert not (tmp_path / "p.csv").exists()


def test_no_evaluation_of_a_run_whose_tokenizer_was_swapped(copies, tmp_path):
    root, workdir = copies
    settings = json.loads((workdir / "config.json").read_text())
    own = workdir / "tokenizer.json"
    shutil.copy(Path(settings["data"]["root"]) / "tokenizer.json", own)
    swap(own)
    with pytest.raises(DataError, match=r"tokenizer.json is not the tokenizer of .*run") as e:
        _evaluate(workdir, root, tmp_path)
    assert e.value.exit_code == 3
