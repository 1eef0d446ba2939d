"""What a run leaves for others: the model folder, and zero-shot evaluations during and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from unimed_jax import config
from unimed_jax.data import shards
from unimed_jax.errors import DataError
from unimed_jax.evaluate import tasks, zeroshot
from unimed_jax.infer import Loaded
from unimed_jax.train import run_folder
from unimed_jax.train.assemble import Parts

_DONE = "finished.json"


def export(parts: Parts, params: Any, workdir: Path) -> Path:
    """Writes `workdir/model`: config.json, model.safetensors, tokenizer.json."""
    folder = workdir / "model"
    _loaded(parts, params).save(folder, force=True, extra={"run": parts.cfg.name, "steps": parts.total_steps})
    return folder


def mark_exported(workdir: Path, step: int) -> None:
    """Notes that everything after step `step` is done, so that the same command again does nothing."""
    if jax.process_index() == 0:
        run_folder.write_json(workdir / _DONE, {"step": step})


def is_exported(workdir: Path, step: int) -> bool:
    """Whether the run ended with this step and its model folder stands."""
    try:
        done = json.loads((workdir / _DONE).read_text())
    except (OSError, ValueError):
        return False
    return done == {"step": step} and (workdir / "model" / "config.json").is_file()


def evaluate(parts: Parts, params: Any, workdir: Path, step: int) -> dict[str, float]:
    """Zero-shot evaluation on `cfg.eval`; results go to workdir/eval/step_N, the main figures are returned.

    Returns:
        {"eval/TASK": value of the task's metric}; empty when no task is named.
    """
    e = parts.cfg.eval
    if not e.tasks:
        return {}
    results = zeroshot.evaluate(
        _loaded(parts, params),
        _eval_sources(parts.cfg),
        list(e.tasks),
        resamples=e.bootstrap,
        threads=parts.cfg.data.threads,
    )
    if jax.process_index() == 0:
        results.save(workdir / "eval" / f"step_{step}", force=True)
    return results.figures()


def check_evaluation(cfg: config.Train) -> None:
    """Refuses an unknown task, a missing split or labels without a class before the first step, not after the last.

    Raises:
        UsageError: for an unknown task.
        DataError: for records that are not there, or that a task cannot be scored on.
    """
    wanted = [tasks.load(task) for task in cfg.eval.tasks]
    if wanted:
        facts = zeroshot.Pool(_eval_sources(cfg)).facts()
        for task in wanted:
            tasks.select(task, facts)


def _eval_sources(cfg: config.Train) -> list[shards.Shards]:
    root = cfg.eval.root or cfg.data.root
    found = shards.find_sources(root)
    named = [s.name for s in cfg.data.sources if s.name in found] if not cfg.eval.root else []
    opened = [shards.Shards(found[name], cfg.eval.split) for name in named or found]
    if not any(len(s) for s in opened):
        raise DataError(
            f"no record of split {cfg.eval.split!r} under {root} to evaluate on",
            "set eval.root or eval.split",
        )
    return opened


def _loaded(parts: Parts, params: Any) -> Loaded:
    return Loaded(
        parts.cfg.model, params, parts.tokenizer, mesh=parts.mesh, batch_size=parts.cfg.eval.batch_size
    )
