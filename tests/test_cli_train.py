"""`unimed-jax train`: flags and config files; every refusal is one line with the remedy in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training import build_data, environment

from unimed_jax import config
from unimed_jax.cli import main
from unimed_jax.cli import train as verb
from unimed_jax.errors import UsageError


def run(*argv: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main.main(["train", *argv])
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


def test_overrides_reach_their_fields():
    cfg = verb.load_config(
        "phantom_tiny",
        {
            "optim.lr": "1e-2",
            "batch_size": "8",
            "data.hflip": "true",
            "data.root": "/a b=c",
            "data.crop_scale": "(0.5, 1.0)",
            "optim.freeze": "('vision/.*',)",
            "writers": "jsonl",
            "duration.steps": "0",
            "duration.epochs": "2",
        },
    )
    assert (cfg.optim.lr, cfg.batch_size, cfg.data.hflip, cfg.data.root) == (1e-2, 8, True, "/a b=c")
    assert (cfg.data.crop_scale, cfg.optim.freeze, cfg.writers) == ((0.5, 1.0), ("vision/.*",), ("jsonl",))
    assert (cfg.duration.steps, cfg.duration.epochs) == (0, 2.0)
    again = verb.load_config("phantom_tiny", {})  # nothing sticks from one call to the next
    assert (again.optim.lr, again.batch_size) == (1e-3, 16)


def test_words_are_separated():
    overrides, rest = verb.split_overrides(
        ["--config=x", "--config.a.b=1=2", "--config.c", "3", "--workdir", "w", "--config.d", "--dry_run"]
    )
    assert overrides == {"a.b": "1=2", "c": "3", "d": "true"}
    assert rest == ["--config=x", "--workdir", "w", "--dry_run"]


@pytest.mark.parametrize(
    ("spec", "field", "value", "says"),
    [
        ("unimed_b17", "", "", "no config 'unimed_b17'. Did you mean \"unimed_b16\"?"),
        ("configs/nope.py", "", "", "no config 'configs/nope.py'"),
        ("README.md", "", "", "README.md is no Python file"),
        ("unimed_b16:huge", "", "", "no variant 'huge'"),
        ("phantom_tiny", "batchsize", "1", "config has no field 'batchsize'. Did you mean \"batch_size\"?"),
        ("phantom_tiny", "optim.lrr", "1", "config.optim has no field 'lrr'. Did you mean \"lr\"?"),
        ("phantom_tiny", "optim.lr.x", "1", "config.optim.lr has no field 'x'"),
        ("phantom_tiny", "optim.lr", "abc", "--config.optim.lr=abc"),
        ("phantom_tiny", "seed", "1.5", "--config.seed=1.5"),
        ("phantom_tiny", "data.hflip", "maybe", "--config.data.hflip=maybe"),
        ("phantom_tiny", "optim", "1", "config.optim is a group of settings. Fix: set config.optim.lr"),
        (
            "phantom_tiny",
            "data.sources",
            "a",
            "config.data.sources is a table. Fix: set it in the config file",
        ),
        ("phantom_tiny", "model.text_groups", "()", "is a table"),
        ("phantom_tiny", "model.dtype", "float16", "model.dtype is 'float16'. Fix: one of float32, bfloat16"),
        ("phantom_tiny", "duration.epochs", "2", "duration is given 2 times"),
        ("phantom_tiny", "optim.accum_steps", "3", "does not divide"),
        ("phantom_tiny", "checkpoint.keep", "1", "at least 2"),
    ],
)
def test_refusals_are_one_line_and_exit_2(spec, field, value, says, capsys, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    flags = [f"--config.{field}={value}"] if field else []
    code, out, err = run(f"--config={spec}", "--workdir=w", *flags, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err


IMPORT = "from unimed_jax.config import *\n"
DEFINE = "def get_config(arg=''):\n    "


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (DEFINE + "return {}", "get_config returned dict"),
        (DEFINE + "return 1 / 0", "ZeroDivisionError"),
        ("x = (", "SyntaxError"),
        (IMPORT + DEFINE + "c = Train(); c.sede = 1; return c", "sede"),
        (IMPORT + DEFINE + "return Train(seed='a')", "config.seed is 'a'"),
        ("y = 1", "get_config"),
    ],
)
def test_broken_config_files(tmp_path, body, says):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(UsageError) as e:
        verb.load_config(str(path), {})
    assert says in e.value.line()
    assert "\n" not in e.value.line()


def test_a_config_of_ones_own_with_an_argument(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(
        "from unimed_jax.config import *\ndef get_config(arg=''):\n    return Train(name=arg or 'none')"
    )
    assert verb.load_config(str(path), {}).name == "none"
    assert verb.load_config(f"{path}:wide", {"seed": "3"}).name == "wide"


def test_shipped_configs_are_found_by_name(repo_root):
    assert {"phantom_tiny", "unimed_b16", "unimed_l14_336_large_text"} <= set(verb.shipped())
    assert verb.find_config("unimed_b16:all") == f"{repo_root / 'configs' / 'unimed_b16.py'}:all"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--workdir=w"], "--config is missing"),
        (["--config=phantom_tiny"], "--workdir is missing"),
        (["--config=phantom_tiny", "--workdir=gs://b/run"], "is a URL"),
        (["--config=phantom_tiny", "--workdir=w", "--profile=5"], "for example --profile=100:105"),
        (["--config=phantom_tiny", "--workdir=w", "--profile=5:5"], "for example --profile=100:105"),
        (["--config=phantom_tiny", "--wokdir=w"], 'Did you mean "--workdir"?'),
        (["--config=phantom_tiny", "--workdir=w"], "data.root is empty"),
    ],
)
def test_other_flags(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*flags, capsys=capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err


def test_help_of_the_settings(capsys):
    code, out, _ = run("--config=phantom_tiny", "--config.help", capsys=capsys)
    assert code == 0
    lines = out.splitlines()
    assert "--config.optim.lr=0.001" in lines
    assert "--config.model.vision.patch_size=8" in lines
    assert len(lines) == len(_leaves(config.to_dict(config.Train())))
    code, out, _ = run("--config.help", capsys=capsys)
    assert "--config.optim.lr=0.0005" in out.splitlines()


def _leaves(table: dict, prefix: str = "") -> list[str]:
    deep = [(prefix + k, v) for k, v in table.items()]
    return [x for k, v in deep for x in (_leaves(v, k + ".") if isinstance(v, dict) else [k])]


def test_missing_data_is_exit_3(capsys, tmp_path):
    root = tmp_path / "nothing here"
    for flag in ("--dry_run", f"--workdir={tmp_path / 'run'}"):
        code, _, err = run("--config=unimed_b16", f"--config.data.root={root}", flag, capsys=capsys)
        assert (code, err.count("\n")) == (3, 1)
        assert "nothing here" in err


def test_batch_that_does_not_divide_over_the_devices(tmp_path):
    data = build_data(tmp_path / "root", n=120)
    argv = ["--config=phantom_tiny", f"--config.data.root={data}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "train", *argv, "--config.batch_size=12"],
        env=environment(8), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "unimed-jax: global batch 12 does not divide over 8 devices. Nearest: 8 or 16. Fix: change batch_size\n"
    )


@pytest.mark.slow
def test_b16_takes_real_steps_on_a_cpu(tmp_path):
    """The published architecture, cut in nothing but the batch."""
    data = build_data(tmp_path / "root", n=120)
    argv = ["--config=unimed_b16:all", f"--config.data.root={data}", f"--workdir={tmp_path / 'run'}"]
    flags = ["batch_size=8", "duration.epochs=0", "duration.steps=2", "log_every=1", "data.threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "train", *argv, *(f"--config.{f}" for f in flags)],
        env=environment(), capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 2/2  loss " in done.stdout
    assert Path(tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 4 * 195_903_489
