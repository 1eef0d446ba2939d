"""How fast records become batches, stage by stage, against the bare limit of decoding and resizing.

Rates "per core" divide by the CPU time of this process and its workers, so that a busy machine moves them little;
"wall" is what a training run sees. The records are those that training reads first, so they stand for the mixture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed_jax import config
from unimed_jax.data import images, pipeline
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import UsageError

LIMIT = "decode, crop, resize"  # in a bare loop, one core
_BATCH = 32  # rows
_WARM = 4  # batches before a stream is in its steady state
_MOST_BYTES = 1 << 29  # of pictures held in memory


class Rate(NamedTuple):
    """Pictures a second, by the clock and by CPU time."""

    wall: float
    core: float


Stage = Callable[[], Rate]


def cpu_seconds() -> float:
    """CPU time of this process and of its living worker processes."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed(step: Callable[[], object], n: int) -> Rate:
    """The rate of a step that does n pictures.

    Example:
        >>> timed(lambda: sum(range(100_000)), 1).wall > 0
        True
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    step()
    return Rate(n / (time.perf_counter() - wall), n / max(cpu_seconds() - cpu, 1e-9))


def stages(
    cfg: config.Train, tokenizer: Tokenizer, n: int, *, threads: int, workers: int
) -> tuple[dict[str, Stage], dict[str, Any]]:
    """One round of each stage, by name, and what is read.

    Args:
        cfg: `data` (root, sources, split, augmentation) and the image size count.
        tokenizer: of the captions.
        n: pictures a round, at least a batch.
        threads: reader threads of the pipeline, beside one alone.
        workers: reader processes of the pipeline; 0 = leave them out.

    Raises:
        UsageError, DataError: see `pipeline.make`.
    """
    one = _share(cfg, tokenizer, threads=1, workers=0)
    sources, size = one.blocks.sources, one.blocks.image_size
    draws, blobs, held = [], [], 0
    for draw in map(one.mixture.locate, range(n)):
        blob = sources[draw.source][draw.record].image
        held += len(blob)
        if held > _MOST_BYTES:
            break
        draws.append(draw)
        blobs.append(blob)
    rng, crop = np.random.default_rng(0), one.blocks.transform
    table: dict[str, Stage] = {
        "read": lambda: timed(lambda: [sources[d.source][d.record] for d in draws], len(draws)),
        "decode": lambda: timed(lambda: [images.decode(b) for b in blobs], len(blobs)),
        LIMIT: lambda: timed(lambda: [images.train_image(b, size, rng, **crop) for b in blobs], len(blobs)),
        "pipeline, 1 thread": lambda: _stream(one, n),
    }
    if threads > 1:
        several = _share(cfg, tokenizer, threads=threads, workers=0)
        table[f"pipeline, {threads} threads"] = lambda: _stream(several, n)
    if workers:
        processes = _share(cfg, tokenizer, threads=1, workers=workers)
        table[f"pipeline, {workers} process{'es' if workers > 1 else ''}"] = lambda: _stream(processes, n)
    facts = {
        "sources": {k: len(s) for k, s in zip(one.mixture.names, sources, strict=True)},
        "pictures": len(blobs),
        "mean_bytes": round(sum(map(len, blobs)) / len(blobs)),
    }
    return table, facts


def _share(cfg: config.Train, tokenizer: Tokenizer, *, threads: int, workers: int) -> pipeline.Pipeline:
    specs, opened = pipeline.open_sources(cfg.data)
    whole = pipeline.make_mixture(cfg, specs, [len(s) for s in opened]).epoch_examples
    data = dataclasses.replace(cfg.data, threads=threads, workers=workers)
    changed = dataclasses.replace(cfg, data=data, batch_size=min(_BATCH, whole))
    return pipeline.make(changed, tokenizer=tokenizer)


def _stream(share: pipeline.Pipeline, n: int) -> Rate:
    """The whole pipeline in its steady state: what is ready at the start is made up for at the end."""
    steps = max(1, n // share.batch_size)
    with contextlib.closing(share.batches()) as batches:
        for _ in itertools.islice(batches, _WARM):
            pass
        return timed(lambda: [None for _ in itertools.islice(batches, steps)], steps * share.batch_size)


def best(table: Mapping[str, Stage], rounds: int) -> dict[str, Rate]:
    """The best rates of several rounds, which alternate between the stages.

    Example:
        >>> best({"a": lambda: Rate(1, 2)}, 3)
        {'a': Rate(wall=1, core=2)}
    """
    found = dict.fromkeys(table, Rate(0.0, 0.0))
    for _ in range(rounds):
        for stage, once in table.items():
            rate = once()
            found[stage] = Rate(max(found[stage].wall, rate.wall), max(found[stage].core, rate.core))
    return found


def rows(found: Mapping[str, Rate], mean_bytes: float) -> list[dict[str, Any]]:
    """JSON-ready: each stage with its rates, megabytes of encoded pictures a second, and its share of the limit."""
    limit = found[LIMIT]
    return [
        {
            "stage": stage,
            "wall_per_s": round(rate.wall, 1),
            "core_per_s": round(rate.core, 1),
            "mb_per_s": round(rate.wall * mean_bytes / 1e6, 1),
            "core_over_limit": round(rate.core / limit.core, 3),
        }
        for stage, rate in found.items()
    ]


def cores_for(rate: float, found: Mapping[str, Rate]) -> int:
    """Host cores that the pipeline needs to deliver a rate, by the last (the widest) pipeline measured.

    Example:
        >>> cores_for(2000, {"pipeline, 1 thread": Rate(190, 190)})
        11
    """
    widest = [r for stage, r in found.items() if stage.startswith("pipeline")][-1]
    return math.ceil(rate / widest.core)


def measure(
    cfg: config.Train,
    tokenizer: Tokenizer,
    *,
    n: int = 256,
    rounds: int = 3,
    threads: int = 1,
    workers: int = 0,
    rate: float = 0.0,
) -> dict[str, Any]:
    """All stages on the records of a config.

    Args:
        cfg: see `stages`.
        tokenizer: of the captions.
        n: pictures a round.
        rounds: the best counts.
        threads: see `stages`.
        workers: see `stages`.
        rate: pictures a second that a training chip takes; 0 = unknown.

    Raises:
        UsageError: for numbers below 1.
        UsageError, DataError: see `stages`.
    """
    if min(n, rounds, threads) < 1 or workers < 0 or rate < 0:
        raise UsageError("pictures, rounds and threads must be at least 1, workers and rate at least 0")
    table, facts = stages(cfg, tokenizer, n, threads=threads, workers=workers)
    found = best(table, rounds)
    out = facts | {"size": cfg.model.vision.image_size, "stages": rows(found, facts["mean_bytes"])}
    return out | ({"rate": rate, "cores_for_rate": cores_for(rate, found)} if rate else {})
