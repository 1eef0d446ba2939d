"""Frozen towers computed once: LiT with precomputed features (Zhai et al. 2022, arXiv 2111.07991, section 3).

A frozen tower gives the same features for the same input in every step. With `data.features` set, the features of
every fixed crop (`data.views`) and of every caption are computed once, kept in that folder, and looked up in each
batch; only the projections run in the step. The stream of records, crops and captions is the one without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from unimed_jax import config
from unimed_jax.data.blocks import caption_id, read_record
from unimed_jax.data.mixture import Draw
from unimed_jax.data.pipeline import Batch, Pipeline
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip
from unimed_jax.train import optim
from unimed_jax.train.fingerprint import fingerprint

BATCH = 32  # rows a forward pass; fixed, so that each tower compiles once
_VERSION = 1  # of the files; part of their names

Tell = Callable[[str], None]


def frozen_towers(cfg: config.Train, abstract: clip.Params) -> tuple[str, ...]:
    """The towers of which nothing but the projection is trained.

    Example:
        >>> cfg = config.Train(optim=config.Optim(freeze=("vision/(?!proj).*",)))
        >>> frozen_towers(cfg, clip.skeleton(cfg.model)[1])
        ('vision',)
    """
    frozen = optim.frozen_paths(cfg.optim, abstract)
    bodies = {
        tower: {f"{tower}/{p}" for p in clip.flatten(abstract[tower]) if not p.startswith("proj/")}
        for tower in ("vision", "text")
    }
    return tuple(tower for tower, body in bodies.items() if body <= frozen)


def towers_of(cfg: config.Train, abstract: clip.Params) -> tuple[str, ...]:
    """The towers that `data.features` precomputes; none when it is off.

    Raises:
        UsageError: when it is on and nothing is frozen, or a frozen vision tower has no fixed crops.
    """
    if not cfg.data.features:
        return ()
    towers = frozen_towers(cfg, abstract)
    if not towers:
        raise UsageError(
            "config: data.features is set but no tower is frozen", 'optim.freeze=("vision/(?!proj).*",)'
        )
    if "vision" in towers and not cfg.data.views:
        raise UsageError(
            "config: data.features with fresh crops each epoch", "set data.views to the crops a record"
        )
    return towers


@dataclass(slots=True, kw_only=True)
class FeaturePipeline:
    """A Pipeline whose batches carry features in the place of pixels or tokens.

    Attributes:
        source: the pipeline that it stands for.
        image: features of view v of record r of source s at row image_start[s] + r x views + v; or None.
        image_start: first row of each source.
        text: features of every caption; or None.
        text_row: row of each caption.
    """

    source: Pipeline
    image: Float[np.ndarray, "rows w"] | None
    image_start: Sequence[int]
    text: Float[np.ndarray, "captions w"] | None
    text_row: dict[str, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches of steps start_step, start_step + 1, ... without end; see `Pipeline.batches`."""
        step = start_step
        while True:
            yield self._batch(step)
            step += 1

    def _batch(self, step: int) -> Batch:
        blocks = self.source.blocks
        first = step * blocks.batch_size + blocks.first_row
        draws = [blocks.mixture.locate(p) for p in range(first, first + blocks.rows)]
        examples = [
            read_record(blocks.sources[d.source], d.record, blocks.mixture.names[d.source]) for d in draws
        ]
        texts = [blocks.caption(e, d) for e, d in zip(examples, draws, strict=True)]
        if self.image is not None:
            image = self.image[[self._row(d) for d in draws]]
        else:
            image = np.stack([blocks.picture(e, d) for e, d in zip(examples, draws, strict=True)])
        if self.text is not None:
            tokens = self.text[[self.text_row[t] for t in texts]]
        else:
            tokens = np.asarray(blocks.tokenizer.encode(texts, blocks.context_length), np.int32)
        return {
            "image": image,
            "tokens": tokens,
            "source": np.array([d.source for d in draws], np.int32),
            "mask": np.ones(len(draws), bool),
            "caption_id": np.array([caption_id(t) for t in texts], np.int32),
        }

    def _row(self, draw: Draw) -> int:
        views = self.source.blocks.views
        return self.image_start[draw.source] + draw.record * views + draw.epoch % views


def precompute(
    cfg: config.Train, data: Pipeline, params: clip.Params, digests: dict[str, Any], tell: Tell = print
) -> FeaturePipeline:
    """Computes, or reads from `cfg.data.features`, the features of the frozen towers.

    Every process holds all features: count on (records x views + captions) x width x 4 bytes.

    Args:
        cfg: the experiment.
        data: its training stream.
        params: parameters; those of the frozen towers count.
        digests: of tokenizer and manifests, which the features depend on.
        tell: called with progress lines.

    Raises:
        UsageError: see `towers_of`.
        DataError: for a record that cannot be read, or a full disk.
    """
    graphdef, abstract = clip.skeleton(cfg.model)
    towers = towers_of(cfg, abstract)
    folder = Path(cfg.data.features)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = data.blocks
    sizes = [len(s) * max(1, blocks.views) for s in blocks.sources]
    image = text = None
    rows: dict[str, int] = {}
    if "vision" in towers:
        depends = {
            "transform": blocks.transform,
            "views": blocks.views,
            "sources": list(blocks.mixture.names),
            "dtype": cfg.model.dtype,
        }
        file = folder / _name("image", cfg.model.vision, params["vision"], depends, digests)
        run = jax.jit(lambda p, x: clip.bind(graphdef, p).vision.features(x))
        image = _stored(file, lambda: _image_features(blocks, lambda x: run(params, x), tell))
    if "text" in towers:
        captions = sorted({c.text for s in blocks.sources for i in range(len(s)) for c in s[i].captions})
        rows = {c: i for i, c in enumerate(captions)}
        listed = hashlib.sha256("\n".join(captions).encode()).hexdigest()
        depends = {"captions": listed, "dtype": cfg.model.dtype}
        file = folder / _name("text", cfg.model.text, params["text"], depends, digests)
        encode = jax.jit(lambda p, t: clip.bind(graphdef, p).text.features(t))
        text = _stored(file, lambda: _text_features(blocks, captions, lambda t: encode(params, t), tell))
    starts = [0, *np.cumsum(sizes).tolist()]
    return FeaturePipeline(source=data, image=image, image_start=starts, text=text, text_row=rows)


def _name(
    kind: str, tower: Any, params: clip.Params, depends: dict[str, Any], digests: dict[str, Any]
) -> str:
    body = {k: v for k, v in params.items() if k != "proj"}
    facts = {
        "version": _VERSION,
        "tower": config.to_dict(tower) | {"proj": ""},
        "weights": fingerprint(body),
        "depends": depends,
        "digests": digests,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{kind}-{digest[:16]}.npy"


def _stored(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, computed and written whole when it is not there."""
    if not file.exists():
        value = compute()
        beside = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npy")
        try:
            with beside.open("wb") as f:
                np.save(f, value)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, file)
        except OSError as e:
            raise DataError(f"cannot write {file}: {e.strerror}", "free some space") from e
        finally:
            beside.unlink(missing_ok=True)
    return np.load(file, allow_pickle=False)


def _image_features(blocks: Any, run: Callable[[np.ndarray], jax.Array], tell: Tell) -> np.ndarray:
    draws = [
        Draw(s, r, v)
        for s, source in enumerate(blocks.sources)
        for r in range(len(source))
        for v in range(blocks.views)
    ]

    def picture(draw: Draw) -> np.ndarray:
        name = blocks.mixture.names[draw.source]
        return blocks.picture(read_record(blocks.sources[draw.source], draw.record, name), draw)

    with ThreadPoolExecutor(4) as pool:
        ahead = [draws[i : i + BATCH] for i in range(0, len(draws), BATCH)]
        pending = [pool.map(picture, part) for part in ahead[:2]]
        out = []
        for n, part in enumerate(ahead):
            images = np.stack(list(pending[n]))
            pending[n] = iter(())  # its pictures are done with
            if n + 2 < len(ahead):
                pending.append(pool.map(picture, ahead[n + 2]))
            out.append(np.asarray(run(_filled(images)))[: len(part)])
            if n % 8 == 7 or n + 1 == len(ahead):
                tell(
                    f"features of frozen vision tower: {min((n + 1) * BATCH, len(draws))} of {len(draws)} crops"
                )
    return np.concatenate(out).astype(np.float32)


def _text_features(
    blocks: Any, captions: list[str], run: Callable[[np.ndarray], jax.Array], tell: Tell
) -> np.ndarray:
    tokens = np.asarray(blocks.tokenizer.encode(captions, blocks.context_length), np.int32)
    lengths = (tokens != blocks.tokenizer.pad_id).sum(1)
    order = np.argsort(lengths, kind="stable")
    out: dict[int, np.ndarray] = {}
    for i in range(0, len(order), BATCH):
        part = order[i : i + BATCH]
        width = min(blocks.context_length, -(-int(lengths[part].max()) // 16) * 16)  # padding is inert
        rows = np.asarray(run(_filled(tokens[part, :width])))
        out |= {int(k): rows[j] for j, k in enumerate(part)}
    tell(f"features of frozen text tower: {len(captions)} captions")
    return np.stack([out[i] for i in range(len(captions))]).astype(np.float32)


def _filled(rows: np.ndarray) -> np.ndarray:
    """Rows repeated up to BATCH: one shape, one compilation."""
    return (
        np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows), axis=0)]) if len(rows) < BATCH else rows
    )


def widths(cfg: config.Train, abstract: clip.Params) -> dict[str, int]:
    """Feature width of each precomputed tower: what a batch holds in the place of pixels and tokens."""
    every = {"vision": cfg.model.vision.width, "text": cfg.model.text.width}
    return {tower: every[tower] for tower in towers_of(cfg, abstract)}
