"""Every command of the README and the docs runs, in a new folder that holds what they name."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_model
from PIL import Image
from pydicom.data import get_testdata_file

from unimed_jax.convert import outputs

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/data.md", "docs/evaluating.md", "docs/converting.md", "CONTRIBUTING.md"]
TUTORIALS = ["docs/tutorials/pod.md", "docs/tutorials/checkpoint.md", "docs/tutorials/study.md"]
# Run by `make`'s own test below, by tests/test_demo.py (it never ends), by CI itself, or not without a package index.
ELSEWHERE = ("make ", "pip install", ".venv/bin/pre-commit", "unimed-jax demo ")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall((ROOT / page).read_text()) if kind == language]


def commands(page: str) -> list[str]:
    lines = [line for body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    plain = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in plain if line and not line.startswith(("#", *ELSEWHERE))]


def usage_only(command: str) -> bool:
    """A synopsis such as `train --config=FILE [...]` is no command to run."""
    return any(word in command for word in ("[", "FILE", " DIR"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder as it is after `make demo`, with a user's own images and scans beside it."""
    folder = tmp_path_factory.mktemp("home")
    run = [sys.executable, "-m", "unimed_jax", "quickstart", "--out", "demo", "--offline"]
    # An empty cache: the fall-back is what every machine has.
    environment = {**os.environ, "UNIMED_JAX_CACHE": str(folder / "empty-cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "SYNTHETIC" in done.stdout
    _weights_of_a_user(folder)
    rng = np.random.default_rng(0)
    for name in ("scans", "images"):
        (folder / name).mkdir()
    for name in ("ct.png", "mri.png"):
        Image.fromarray(rng.integers(0, 255, (80, 90), np.uint8)).save(folder / "scans" / name)
    (folder / "study").mkdir()
    for name, test_file in (("ct.dcm", "CT_small.dcm"), ("mr.dcm", "MR_small.dcm")):
        shutil.copy(str(get_testdata_file(test_file)), folder / "study" / name)
    (folder / "study-truth.csv").write_text("file,label\nstudy/ct.dcm,CT\nstudy/mr.dcm,MR\n")
    (folder / "truth.csv").write_text("file,label\nscans/ct.png,CT\nscans/mri.png,MRI\n")
    with (folder / "images" / "captions.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["file", "caption", "modality", "patient", "split"])
        for i in range(220):
            name, modality = f"{i}.png", ("CT", "MRI")[i % 2]
            Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(folder / "images" / name)
            split = "test" if i % 10 < 2 else "train"
            table.writerow([name, f"a {modality} slice number {i}", modality, f"p{i}", split])
    return folder


def _weights_of_a_user(folder: Path) -> None:
    """A PyTorch checkpoint, its tokenizer apart, and a run: what the page on conversion begins with."""
    model = small_model.loaded(folder / "tokenizer", cfg=small_model.model(vision__heads=1))
    params = {k: jax.tree.map(np.asarray, v) for k, v in model.params.items()}
    outputs.write("unimed", params, model.cfg, folder / "unimed_clip.pt", tokenizer=None)
    shutil.copytree(folder / "demo" / "runs" / "phantom", folder / "runs" / "unimed")


def shorten(command: str) -> str:
    """The same command, with fewer steps and a smaller model: what is tested is that it is right."""
    if " train " in command and "--dry_run" not in command:
        command += (
            " --config.duration.steps=2 --config.batch_size=8 --config.optim.warmup.steps=1"
            " --config.model.vision.width=32 --config.model.vision.heads=2 --config.model.vision.depth=1"
            " --config.model.vision.mlp_dim=64 --config.model.text.width=32 --config.model.text.heads=2"
            " --config.model.text.depth=1 --config.model.text.mlp_dim=64"
        )
    if "--data demo/records" in command:  # the drawings of the fall-back have a task of their own
        command = re.sub(r"--(tasks|probe) \S+", r"--\1 phantom_modality", command)
    return command


@pytest.mark.slow
@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS])
def test_every_command_runs(page, home):
    ran = 0
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for command in commands(page):
        if usage_only(command):
            continue
        if command.startswith("export "):
            environment |= [command.removeprefix("export ").split("=", 1)]
            continue
        assert command.startswith("unimed-jax "), f"{page}: who runs {command!r}?"
        words = shlex.split(shorten(command))
        for flag in ("--out", "--report", "--html"):
            if flag in words and "data" not in words:
                target = home / words[words.index(flag) + 1]
                if target.is_file():
                    target.unlink()
        if words[1] == "convert":  # several pages make the same model
            shutil.rmtree(home / words[3], ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-m", "unimed_jax", *words[1:]],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
        ran += 1
    assert ran or page == "CONTRIBUTING.md"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/evaluating.md", *TUTORIALS])
def test_every_python_block_runs(page, home):
    for body in blocks(page, "python"):
        if "minilm/" in body:  # needs real weights: tests/test_parity.py does the same with them
            compile(body, page, "exec")
            continue
        done = subprocess.run(
            [sys.executable, "-c", body],
            cwd=home,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{page}:\n{body}\n{done.stderr[-2500:]}"


def test_make_targets_of_the_readme_exist():
    wanted = set(
        re.findall(
            r"(?:^|`)make (\w+)",
            (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text(),
            re.M,
        )
    )
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "env"} <= wanted <= targets
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "unimed-jax quickstart --out demo" in plan.stdout


def test_links_lead_somewhere():
    for page in ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
