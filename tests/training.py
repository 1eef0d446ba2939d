"""What the training tests share: a small data set, and the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from unimed_jax.data import export, text
from unimed_jax.data.phantom import Phantom
from unimed_jax.train import saved_states, writers


def build_data(root: Path, n: int = 240, size: int = 40) -> Path:
    """Exports phantom with a tokenizer trained on its captions; about two seconds."""
    source = Phantom(n=n, size=size)
    captions = [c.text for item in source.items() for c in source.example(item).captions]
    tokenizer = text.train_wordpiece(captions, 256, root)
    export.export(source, root, shards=2, tokenizer=tokenizer)
    return root


def command(data: Path, workdir: Path, *flags: str, config: str = "phantom_tiny") -> list[str]:
    """The command line of a run."""
    return [
        *(sys.executable, "-m", "unimed_jax", "train", f"--config={config}"),
        *(f"--config.data.root={data}", f"--workdir={workdir}", *flags),
    ]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """A CPU with so many fake devices; everything else as for a user."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


def train(data: Path, workdir: Path, *flags: str, devices: int = 1, code: int = 0, **env: str) -> str:
    """Runs to the end, checks the exit code, returns stderr."""
    done = subprocess.run(
        command(data, workdir, *flags),
        env=environment(devices, **env),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == code, (
        f"exit {done.returncode}, not {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stderr


def losses(workdir: Path) -> list[dict[str, Any]]:
    """The log lines without what depends on the machine's speed."""
    lines = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in writers.TIMING} for line in lines]


def leaves(workdir: Path) -> dict[str, Any]:
    """The fingerprints of the newest saved state: parameters, optimizer, step."""
    return saved_states.read_meta(saved_states.find_step(workdir))["leaves"]
