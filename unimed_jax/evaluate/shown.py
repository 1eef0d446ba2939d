"""Examples for a page: some hits and some misses, with thumbnails and the prompts that are closest."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from unimed_jax.data import images
from unimed_jax.evaluate import multilabel
from unimed_jax.evaluate.findings_results import FindingsResult
from unimed_jax.evaluate.results import TaskResult

THUMBNAIL = 176  # pixels


def of_classes(
    result: TaskResult,
    indices: Sequence[int],
    z: np.ndarray,
    prompts: Mapping[str, np.ndarray],
    pool: Any,
    subjects: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """Some hits and some misses: classes take turns, subjects within a class too, the surest first."""
    texts = [(name, p) for name, ps in result.task.classes.items() for p in ps]
    bank = np.stack([prompts[p] for _, p in texts])
    chosen = []
    for hit in (True, False):
        rows = [r for r, p in enumerate(result.predictions) if (p.label == p.predicted) == hit]
        rows.sort(key=lambda r: -result.predictions[r].scores[result.predictions[r].predicted])
        rows = one_of_each(rows, [subjects[r] for r in rows])
        chosen += [(r, hit) for r in one_of_each(rows, [result.predictions[r].label for r in rows])[:count]]
    out = []
    for r, hit in chosen:
        p, cosines = result.predictions[r], bank @ z[r]
        top = [
            {"class": texts[k][0], "prompt": texts[k][1], "cosine": float(cosines[k])}
            for k in np.argsort(-cosines)[:3]
        ]
        example = pool[indices[r]]
        out.append(
            {
                "key": p.key,
                "label": p.label,
                "predicted": p.predicted,
                "hit": hit,
                "scores": p.scores,
                "prompts": top,
                "simulated": example.simulated,
                "jpeg": thumbnail(images.eval_image(example.image, THUMBNAIL)),
            }
        )
    return out


def of_findings(
    result: FindingsResult,
    indices: Sequence[int],
    z: Float[np.ndarray, "n d"],
    prompts: Mapping[str, np.ndarray],
    pool: Any,
    count: int,
) -> list[dict[str, Any]]:
    """Findings that were seen, and findings that were overlooked or seen where there are none; a picture comes once.

    Findings take turns, subjects within a finding too, the surest first.
    """
    p, truth = multilabel.probability(result.margins), result.truth
    names, said = list(result.task.findings), p >= 0.5
    groups = {True: said & (truth == 1), False: ((truth == 1) & ~said) | ((truth == 0) & said)}
    out, used = [], set()
    for hit, where in groups.items():
        cells = sorted(zip(*np.nonzero(where), strict=True), key=lambda c: -abs(p[c] - 0.5))
        turns = one_of_each(range(len(cells)), [str(result.subjects[i]) for i, _ in cells])
        order = [cells[k] for k in one_of_each(turns, [names[cells[k][1]] for k in turns])]
        chosen = 0
        for i, j in order:
            if i in used or chosen == count:
                continue
            used.add(i)
            chosen += 1
            pair, example = result.task.findings[names[j]], pool[indices[i]]
            texts = [*(("for", t) for t in pair.positive), *(("against", t) for t in pair.negative)]
            cosines = np.array([float(prompts[t] @ z[i]) for _, t in texts])
            top = [
                {"class": texts[k][0], "prompt": texts[k][1], "cosine": cosines[k]}
                for k in np.argsort(-cosines)[:3]
            ]
            others = [int(k) for k in np.argsort(-p[i]) if k != j]
            words = {True: names[j], False: f"no {names[j]}"}
            out.append(
                {
                    "key": result.keys[i],
                    "label": words[bool(truth[i, j] == 1)],
                    "predicted": words[bool(said[i, j])],
                    "hit": hit,
                    "scores": {names[k]: float(p[i, k]) for k in (j, *others[:2])},
                    "prompts": top,
                    "simulated": example.simulated,
                    "jpeg": thumbnail(images.eval_image(example.image, THUMBNAIL)),
                }
            )
    return out


def one_of_each(rows: Sequence[int], labels: Sequence[str]) -> list[int]:
    """The first row of every label, then the second of every label, and so on."""
    queues: dict[str, list[int]] = {}
    for row, label in zip(rows, labels, strict=True):
        queues.setdefault(label, []).append(row)
    return [r for turn in itertools.zip_longest(*queues.values()) for r in turn if r is not None]


def thumbnail(pixels: np.ndarray) -> str:
    """A picture as base64 JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
