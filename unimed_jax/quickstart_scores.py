"""How the quickstart is scored: every split's pictures pass the frozen tower once, then all methods read the features.

The towers are frozen and the heads linear, so a seed's embeddings are its heads times these features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax import config
from unimed_jax.data import images, shards
from unimed_jax.data.text import Tokenizer
from unimed_jax.evaluate import metrics, references, tasks, zeroshot
from unimed_jax.infer import Loaded
from unimed_jax.models import clip
from unimed_jax.train import assemble, features
from unimed_jax.vectors import ensemble, unit


@dataclass(slots=True, kw_only=True)
class Part:
    """One split under test.

    Attributes:
        records: its records.
        facts: the same without pictures, by number.
        features: unit features of the frozen image tower, f32[records width].
        references: task -> method -> metrics.
    """

    records: Any
    facts: Mapping[int, Any]
    features: Float[np.ndarray, "n w"]
    references: dict[str, dict[str, metrics.Metrics]]


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was measured once for all seeds: the splits, the frozen text features by prompt, and the leaky split."""

    parts: dict[str, Part]
    prompts: dict[str, Float[np.ndarray, "w"]]
    leaky: metrics.Metrics


def measure(cfg: config.Train, splits: Sequence[str], main: str) -> Measured:
    """Features and references of every split: 1-NN on raw pixels and on the frozen tower's features, for every task;
    and, with the first split, the leaky 1-NN on pixels for the task `main`.

    The neighbours are the training records, every fixed crop of them: what the model was trained on, too.
    """
    parts = assemble.assemble(cfg)
    assert isinstance(parts.data, features.FeaturePipeline)
    assert parts.data.image is not None
    train, views = parts.data.blocks.sources[0], cfg.data.views
    train_features = parts.data.image.reshape(len(train), views, -1)
    train_facts, train_pixels = zeroshot.Pool([train]).facts(), pixels(train)
    tower = bare_tower(cfg.model, assemble.first_params(parts), parts.tokenizer)
    folder = shards.find_sources(Path(cfg.data.root))["minimed"]
    measured: dict[str, Part] = {}
    leaky = None
    for split in splits:
        records = shards.Shards(folder, split)
        facts, own_pixels = zeroshot.Pool([records]).facts(), pixels(records)
        own_features = zeroshot.embed(tower, records, range(len(records)))
        found: dict[str, dict[str, metrics.Metrics]] = {}
        for task in map(tasks.load, cfg.eval.tasks):
            rows, columns = tasks.select(task, train_facts), tasks.select(task, facts)
            labels, truth = np.array(list(rows.values())), np.array(list(columns.values()))
            groups = [facts[i].patient or facts[i].key for i in columns]
            sides = {
                "1-NN on DINOv2-S features": (
                    train_features[list(rows)].reshape(len(rows) * views, -1),
                    np.repeat(labels, views),
                    own_features[list(columns)],
                ),
                "1-NN on raw pixels": (train_pixels[list(rows)], labels, own_pixels[list(columns)]),
            }
            found[task.name] = {
                method: references.nearest_neighbour_metrics(
                    x, y, z, truth, list(task.classes), groups, resamples=cfg.eval.bootstrap
                )
                for method, (x, y, z) in sides.items()
            }
            if leaky is None and task.name == main:
                pooled = np.concatenate([train_pixels[list(rows)], own_pixels[list(columns)]])
                leaky = references.leaky_split(pooled, np.concatenate([labels, truth]), list(task.classes))
        measured[split] = Part(records=records, facts=facts, features=own_features, references=found)
    texts = list(
        dict.fromkeys(p for t in cfg.eval.tasks for ps in tasks.load(t).classes.values() for p in ps)
    )
    prompts = dict(zip(texts, tower.encode_text(texts), strict=True))
    assert leaky is not None
    return Measured(parts=measured, prompts=prompts, leaky=leaky)


def bare_tower(m: config.Model, params: clip.Params, tokenizer: Tokenizer | None) -> Loaded:
    """The towers without heads; both are of one width."""
    bare = dataclasses.replace(
        m,
        embed_dim=m.vision.width,
        vision=dataclasses.replace(m.vision, proj="none"),
        text=dataclasses.replace(m.text, proj="none"),
    )
    towers = {t: {k: v for k, v in params[t].items() if k != "proj"} for t in ("vision", "text")}
    return Loaded(bare, dict(params) | towers, tokenizer, batch_size=32)


def score(model: Loaded, measured: Measured, split: str, name: str) -> metrics.Metrics:
    """The zero-shot metrics of a model with linear heads on the frozen towers, without intervals."""
    task, part = tasks.load(name), measured.parts[split]
    picked = tasks.select(task, part.facts)
    image, text = (np.asarray(model.params[t]["proj"]["kernel"], np.float32) for t in ("vision", "text"))
    z = unit(part.features[list(picked)] @ image)
    bank = ensemble(
        [unit(np.stack([measured.prompts[p] for p in texts]) @ text) for texts in task.classes.values()]
    )
    groups = [part.facts[i].patient or part.facts[i].key for i in picked]
    labels = np.array(list(picked.values()), np.int64)
    return metrics.classification(z @ bank.T, labels, list(task.classes), groups, resamples=0)


def block(
    own: Sequence[metrics.Metrics], *, scratch: float | None, beside: Mapping[str, metrics.Metrics]
) -> dict[str, Any]:
    """One split's part of summary.json: balanced accuracy of every seed, recall a class, and the references."""
    seeds = [float(m.values["balanced_accuracy"].value or 0.0) for m in own]
    recall = {
        name: float(np.mean([m.recall[name].value or 0.0 for m in own]))
        for name, n in own[0].support.items()
        if n
    }
    return {
        "pictures": own[0].n,
        "subjects": own[0].subjects,
        "support": {k: n for k, n in own[0].support.items() if n},
        "seeds": seeds,
        "mean": float(np.mean(seeds)),
        "low": min(seeds),
        "high": max(seeds),
        "recall": recall,
        "scratch": scratch,
        "references": {name: m.values["balanced_accuracy"].json() for name, m in beside.items()},
    }


def pixels(records: Any) -> Float[np.ndarray, "n f"]:
    """Thumbnails of all records, for neighbours."""
    return references.thumbnails(np.stack([images.eval_image(e.image, 64) for e in records]))
