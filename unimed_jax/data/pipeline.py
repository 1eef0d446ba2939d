"""Records -> training batches, as a function of the step.

The stream has no state. Position step x batch_size + row names one (source, record, epoch) (data/mixture.py); its
caption, its crop and its colours depend on these and the seed only. So the batches are the same for any number of
threads, worker processes and hosts, and a run that stops anywhere continues with exactly the next row. For the
same reason nothing is ever skipped: a record that cannot be read stops the run (it was checked at export).

Nothing here touches a device: batches are numpy arrays, this process's rows only.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32

from unimed_jax import config
from unimed_jax.data import captions, mixture, shards, workers
from unimed_jax.data.blocks import MAX_BLOCK, Blocks, Records, read_record
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError, did_you_mean

T = TypeVar("T")
Batch = dict[str, np.ndarray]


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The training stream of one process.

    Attributes:
        mixture: the order of the records.
        batch_size: rows of the global batch.
        blocks: this process's share of the stream, in blocks of rows.
        threads: reader threads a process.
        workers: reader processes; 0 = threads in this process.
    """

    mixture: mixture.Mixture
    batch_size: int
    blocks: Blocks
    threads: int = 4
    workers: int = 0

    @property
    def epoch_examples(self) -> int:
        """Examples in one epoch of the mixture, over all processes."""
        return self.mixture.epoch_examples

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every source had its share, rounded up: batches run on across the end of an epoch."""
        return -(-self.epoch_examples // self.batch_size)

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches of steps start_step, start_step + 1, ... without end; close it to end the readers.

        Each batch holds this process's rows: `image` u8[b h w 3], `tokens` i32[b t], `source` i32[b] (index into
        `mixture.names`), `mask` bool[b], `caption_id` i32[b] (equal captions have equal ids).

        Raises:
            DataError: for a record that cannot be read: shard, record and key.
            Fault: when a worker process dies.
        """
        per_step = self.blocks.per_step
        row = self.blocks.image_size**2 * 3
        parts = workers.read(
            self.blocks,
            start=start_step * per_step,
            threads=self.threads,
            workers=self.workers,
            ahead=per_step + self.threads,
            nbytes=self.blocks.block * row,
        )
        with contextlib.closing(parts):
            while True:
                yield _join(itertools.islice(parts, per_step), self.blocks.rows)


def _join(parts: Iterable[Batch], rows: int) -> Batch:
    """Copies the blocks of one step into one batch and lets go of each at once."""
    batch: Batch = {}
    at = 0
    for part in parts:
        n = len(part["mask"])
        for name, value in part.items():
            if name not in batch:
                batch[name] = np.empty((rows, *value.shape[1:]), value.dtype)
            batch[name][at : at + n] = value
        at += n
    return batch


def make(
    cfg: config.Train, *, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Pipeline:
    """Opens the sources of a config and returns this process's share of the training stream.

    Args:
        cfg: `data`, `batch_size`, `seed`, the image size and the context length are read.
        tokenizer: of the text tower.
        process_index: of this process, 0 <= process_index < process_count.
        process_count: processes that share the global batch; process k has rows [k, k + 1) x batch_size / count.

    Raises:
        UsageError: for a source or caption policy that does not exist, a batch that does not divide over the
            processes or is larger than an epoch.
        DataError: for sources that are damaged or empty.
    """
    if cfg.batch_size % process_count:
        raise UsageError(
            f"config: batch_size {cfg.batch_size} does not divide over {process_count} processes",
            "use a multiple",
        )
    specs, opened = open_sources(cfg.data)
    mix = make_mixture(cfg, specs, [len(s) for s in opened])
    if cfg.batch_size > mix.epoch_examples:
        raise UsageError(
            f"config: batch_size {cfg.batch_size} exceeds the {mix.epoch_examples} examples of an epoch",
            "lower batch_size or add records: a record would be its own negative",
        )
    rows = cfg.batch_size // process_count
    data, readers = cfg.data, cfg.data.threads * max(1, cfg.data.workers)
    share = Blocks(
        mixture=mix,
        sources=tuple(opened),
        policies=tuple(_policy(s) for s in specs),
        tokenizer=tokenizer,
        context_length=cfg.model.text.context_length,
        image_size=cfg.model.vision.image_size,
        transform={
            "scale": data.crop_scale,
            "ratio": data.crop_ratio,
            "hflip": data.hflip,
            "jitter": data.color_jitter,
        },
        views=data.views,
        batch_size=cfg.batch_size,
        first_row=process_index * rows,
        rows=rows,
        block=max(1, min(MAX_BLOCK, rows // readers)),
    )
    return Pipeline(
        mixture=mix, batch_size=cfg.batch_size, blocks=share, threads=data.threads, workers=data.workers
    )


def _policy(spec: config.Source) -> str:
    return captions.check_policy(spec.captions or captions.default_policy(spec.name))


def open_sources(data: config.Data) -> tuple[list[config.Source], list[shards.Shards]]:
    """Returns the sources of the mixture and their opened records, in the config's order or by name.

    Raises:
        UsageError: for a source that is not under the root, or is named twice.
        DataError: when there is none at all, or one is empty.
    """
    if not data.root:
        raise UsageError(
            "config: data.root is empty", "--config.data.root=FOLDER, as `unimed-jax data build` wrote it"
        )
    root = Path(data.root)
    found = shards.find_sources(root)
    specs = list(data.sources) or [config.Source(name=name) for name in sorted(found)]
    if not specs:
        raise DataError(
            f"no source with a manifest.json under {root}", "unimed-jax data build SOURCE --out ROOT"
        )
    opened = []
    for spec in specs:
        folder = _folder(root, spec, found)
        records = shards.Shards(folder, data.split)
        if not len(records):
            raise DataError(
                f"source {spec.name} has no record in split {data.split} ({folder})", "leave it out"
            )
        for other, before in zip(specs, opened, strict=False):
            if before.folder.samefile(records.folder):
                raise UsageError(
                    f"config: sources {other.name} and {spec.name} are the same records ({folder})",
                    "a record would be its own negative: name one, and raise its weight",
                )
        opened.append(records)
    return specs, opened


def _folder(root: Path, spec: config.Source, found: dict[str, Path]) -> Path:
    if not spec.path and spec.name in found:
        return found[spec.name]
    under = shards.find_sources(root / spec.path) if spec.path else {}
    if spec.name in under:
        return under[spec.name]
    if len(under) == 1:
        return next(iter(under.values()))
    raise UsageError(
        f"config: no source {spec.name!r} under {root / spec.path}.{did_you_mean(spec.name, found)}",
        f"there are: {', '.join(sorted(found)) or 'none'}; to train on all of them, leave data.sources empty "
        "(shipped configs: --config=NAME:all)",
    )


def make_mixture(cfg: config.Train, specs: Sequence[config.Source], sizes: Sequence[int]) -> mixture.Mixture:
    """Returns the mixture of a config over sources of these sizes."""
    return mixture.Mixture(
        names=tuple(s.name for s in specs),
        sizes=tuple(sizes),
        draws=mixture.draws_per_epoch(
            sizes, [s.weight for s in specs], cfg.data.mixture, cfg.data.temperature
        ),
        seed=cfg.seed,
    )


def device_prefetch(batches: Iterable[T], put: Callable[[T], Any], n: int) -> Generator[Any, None, None]:
    """Yields put(batch) of every batch, with up to n of them already put: transfers overlap with computing.

    Args:
        batches: host batches.
        put: starts the transfer to the devices and returns at once, as `jax.device_put` does.
        n: batches kept ready; 0 = none.

    Example:
        >>> list(device_prefetch([1, 2, 3], lambda x: x * 10, 2))
        [10, 20, 30]
    """
    ready: collections.deque[Any] = collections.deque()
    source = iter(batches)
    try:
        for batch in source:
            ready.append(put(batch))
            if len(ready) > n:
                yield ready.popleft()
        while ready:
            yield ready.popleft()
    finally:
        if hasattr(source, "close"):
            source.close()  # type: ignore[attr-defined]


def plan(cfg: config.Train, *, steps: int = 16, shards_of_batch: int = 1) -> dict[str, Any]:
    """Says what a training run would read, without decoding a picture: the data part of `--dry_run`.

    Args:
        cfg: `data`, `batch_size`, `duration`, `seed`, the context length and `model.text_groups` are read.
        steps: the captions of this many first batches are really drawn and measured.
        shards_of_batch: devices that a batch is split over; each groups its own rows by length.

    Returns:
        JSON-ready: `mixture`, `sources` (weight, records, draws and passes an epoch, share, caption policy),
        `epoch_examples`, `steps_per_epoch`, `total_steps`, `epochs`, `tokens` (lengths of the captions drawn, from the
        counts stored at export, and the share of padding without groups; empty where none are stored) and
        `text_groups` (share of batches that fit, and of padding; empty when off).

    Raises:
        UsageError, DataError: as `make`.
    """
    specs, opened = open_sources(cfg.data)
    mix = make_mixture(cfg, specs, [len(s) for s in opened])
    policies = [_policy(s) for s in specs]
    total = cfg.duration.steps_for(batch_size=cfg.batch_size, epoch_examples=mix.epoch_examples)
    lengths = _caption_lengths(mix, opened, policies, min(steps, max(1, total)) * cfg.batch_size)
    return {
        "mixture": cfg.data.mixture,
        "sources": [
            {
                "name": spec.name,
                "weight": spec.weight,
                "records": size,
                "draws_per_epoch": draws,
                "passes_per_epoch": draws / size,
                "share": draws / mix.epoch_examples,
                "captions": policy,
            }
            for spec, size, draws, policy in zip(specs, mix.sizes, mix.draws, policies, strict=True)
        ],
        "epoch_examples": mix.epoch_examples,
        "steps_per_epoch": -(-mix.epoch_examples // cfg.batch_size),
        "total_steps": total,
        "epochs": total * cfg.batch_size / mix.epoch_examples,
        "tokens": _histogram(lengths, cfg.model.text.context_length) if lengths.all() else {},
        "text_groups": _groups_fit(lengths, cfg, shards_of_batch)
        if lengths.all() and cfg.model.text_groups
        else {},
    }


def _caption_lengths(
    mix: mixture.Mixture, opened: Sequence[Records], policies: Sequence[str], n: int
) -> Int32[np.ndarray, "n"]:
    lengths = np.zeros(n, np.int32)
    for i in range(n):
        draw = mix.locate(i)
        name = mix.names[draw.source]
        example = read_record(opened[draw.source], draw.record, name)
        rng = mixture.generator(mix.seed, name, draw, "caption")
        lengths[i] = example.captions[captions.draw(example.captions, policies[draw.source], rng)].tokens
    return lengths


def _histogram(lengths: Int32[np.ndarray, "n"], context: int) -> dict[str, Any]:
    edges = [e for e in (16, 32, 48, 64, 77, 96, 128, 192, 256, 384, 512) if e < context] + [context]
    inside = np.minimum(lengths, context)
    counts, _ = np.histogram(inside, [0, *(e + 0.5 for e in edges)])
    return {
        "captions": len(lengths),
        "mean": float(inside.mean()),
        "median": float(np.median(inside)),
        "p95": float(np.percentile(inside, 95)),
        "longest": int(lengths.max()),
        "truncated": float((lengths > context).mean()),
        "padding": float(1 - inside.mean() / context),
        "up_to": {str(e): int(c) for e, c in zip(edges, counts, strict=True)},
    }


def _groups_fit(lengths: Int32[np.ndarray, "n"], cfg: config.Train, shards_of_batch: int) -> dict[str, Any]:
    """Share of batches in which every length group holds captions of its width only (see models/text.py)."""
    context, groups = cfg.model.text.context_length, cfg.model.text_groups
    rows = cfg.batch_size // shards_of_batch // cfg.optim.accum_steps
    by_device = np.minimum(lengths, context).reshape(-1, shards_of_batch, cfg.optim.accum_steps, rows)
    ordered = np.sort(by_device.swapaxes(1, 2).reshape(-1, shards_of_batch, rows), axis=-1)
    fit = np.ones(len(ordered), bool)
    share, first, positions = 0.0, 0, 0
    for i, (width, part) in enumerate(groups):
        share += part
        end = rows if i == len(groups) - 1 else int(share * rows + 1e-6)
        positions += width * (end - first)
        first = end
        if end:
            fit &= (ordered[..., end - 1] <= width).all(axis=-1)
    computed = np.where(fit, positions, rows * context)
    return {
        "batches": len(fit),
        "fit": float(fit.mean()),
        "padding": float(1 - ordered.mean() * rows / computed.mean()),
    }
