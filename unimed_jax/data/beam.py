"""The export as an Apache Beam pipeline (extra `beam`): the same shards, byte for byte, written by any Beam runner.

An element is a shard. Workers get the source and the shard's name, list the items themselves and compare the shard's
digest with the caller's, so that a worker that sees other files says so; the pipeline itself stays small, however many
pictures there are. A shard appears under its name only when it is whole, and every attempt writes beside it under a
name of its own: bundles that a runner tries again, or runs twice, leave one shard. The caller reads the shards'
sidecars, and lists rejects and writes the manifest as the local export does. Raw files and the output must be on paths
that all workers see.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimed_jax.data import export as local
from unimed_jax.data import writer
from unimed_jax.data.shards import Manifest, RecordSource
from unimed_jax.data.text import Tokenizer
from unimed_jax.data.writer import Job
from unimed_jax.errors import DataError, Fault, UnimedError, UsageError, did_you_mean

PIP = 'pip install "unimed-jax[beam]"'
# Beam's own DirectRunner first looks for a runner to download; this is what it falls back to.
_RUNNER = "--runner=FnApiRunner"


def export(
    source: RecordSource,
    out: str | os.PathLike[str],
    options: Sequence[str] = (),
    *,
    shards: int | None = None,
    max_side: int = 0,
    **others: Any,
) -> Manifest:
    """Writes a source as `export.export` does, its shards by a Beam pipeline.

    Args:
        source: where the examples come from; its paths must be the same on every worker.
        out: root of all sources, on a file system that every worker sees.
        options: of the pipeline, e.g. ["--runner=FlinkRunner", "--flink_master=host:8081"]; by default it runs here.
        shards: as of `export.export`, and so are the others.
        max_side: larger pictures are made smaller.
        others: tokenizer, max_bad, force, steal.

    Raises:
        UsageError: without Beam, for a runner that it does not have, or values that its options do not take.
        DataError: as `export.export`.
        Fault: when the pipeline fails.
    """
    asked = _pipeline_options(options)
    run = functools.partial(_run, options=asked, shards=shards, max_side=max_side)
    return local.export(source, Path(out).absolute(), shards=shards, max_side=max_side, run=run, **others)


def _pipeline_options(options: Sequence[str]) -> Any:
    try:
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
            StandardOptions,
        )
        from apache_beam.runners.runner import create_runner  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError("Apache Beam is not installed", PIP) from e
    named = any(o == "--runner" or o.startswith("--runner=") for o in options)
    try:
        found = PipelineOptions([*options] if named else [_RUNNER, *options])
        name = found.get_all_options()["runner"]
    except SystemExit:  # argparse has said why
        raise UsageError(
            f"Beam refuses the options {' '.join(options)!r}", "see Beam's pages on its runners"
        ) from None
    try:
        create_runner(name)
    except ImportError as e:
        raise UsageError(f"Beam's runner {name} cannot be loaded: {e}", "install what it needs") from e
    except (ValueError, AttributeError) as e:
        known = StandardOptions.KNOWN_RUNNER_NAMES
        raise UsageError(
            f"Beam has no runner {name!r}.{did_you_mean(name, known)}", f"one of {', '.join(known)}"
        ) from e
    return found


@dataclass(slots=True, frozen=True)
class _Work:
    """What a worker needs beside a shard's name."""

    source: RecordSource
    tokenizer: Tokenizer | None
    folder: Path
    shards: int | None
    max_side: int
    run: str  # of this pipeline: plans of another are forgotten

    def __call__(self, element: tuple[str, str]) -> str:
        """Writes one shard, unless an earlier attempt has."""
        name, digest = element
        job = _plan(self).get(name)
        if job is None or job.digest != digest:
            raise DataError(
                f"this worker sees other raw files than the caller: {name} would hold something else",
                "put them on a path that all workers see",
            )
        if writer.finished(job) is None:
            attempt = replace(job, attempt=uuid.uuid4().hex[:12])
            writer.write_shard(self.source, attempt, self.tokenizer)
        return name


def _both_ends(text: str) -> str:
    return text if len(text) <= 320 else f"{text[:150]} ... {text[-150:]}"


_plans: dict[str, dict[str, Job]] = {}
_planning = threading.Lock()


def _plan(work: _Work) -> dict[str, Job]:
    """The shards by name; a process lists the items once a pipeline."""
    with _planning:
        if work.run not in _plans:
            _plans.clear()
            jobs = local.plan(work.source, work.folder, work.shards, work.tokenizer, work.max_side)
            _plans[work.run] = {job.path.name: job for job in jobs}
        return _plans[work.run]


def _run(
    source: RecordSource,
    tokenizer: Tokenizer | None,
    todo: Sequence[Job],
    *,
    options: Any,
    shards: int | None,
    max_side: int,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Writes shards by a pipeline; yields them with their sidecars once it has ended."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]

    if not todo:
        return
    work = _Work(source, tokenizer, todo[0].path.parent, shards, max_side, uuid.uuid4().hex)
    try:
        with beam.Pipeline(options=options) as pipeline:
            names = pipeline | "shards" >> beam.Create([(job.path.name, job.digest) for job in todo])
            _ = names | "spread" >> beam.Reshuffle() | "write" >> beam.Map(work)
    except UnimedError as e:  # Beam adds where it was to the message
        raise type(e)(e.cause.partition(" [while running")[0], e.remedy) from e
    except Exception as e:
        said = " ".join(str(e).split())
        raise Fault(
            f"the Beam pipeline failed: {type(e).__name__}: {_both_ends(said)}",
            "run it again: finished shards are kept",
        ) from e
    for job in todo:
        sidecar = writer.finished(job)
        if sidecar is None:
            raise Fault(f"the Beam pipeline ended without {job.path}", "do all workers see this folder?")
        yield job, sidecar
