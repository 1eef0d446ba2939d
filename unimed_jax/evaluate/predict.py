"""Files to scores: reads what can be read, embeds in full batches, and keeps count of the rest."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed_jax import saliency
from unimed_jax.data import found as inputs
from unimed_jax.data import medical, slides
from unimed_jax.data.found import Input
from unimed_jax.evaluate import question, reading
from unimed_jax.evaluate.question import Question
from unimed_jax.evaluate.shown import THUMBNAIL, thumbnail
from unimed_jax.evaluate.tasks import Task
from unimed_jax.infer import Loaded

MEAN = "mean"  # in the column `frame`: the slide as a whole
_KINDS = {"dicom": "DICOM", "nifti": "NIfTI", "image": "image", "slide": "slide"}


@dataclass(slots=True, kw_only=True)
class Predictions:
    """Scores of all pictures, and what could not be read."""

    classes: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)  # file, reason, remedy
    shown: list[dict[str, Any]] = field(default_factory=list)  # pictures for a report
    kinds: Counter[str] = field(default_factory=Counter)  # "DICOM CT", "image", ...: files that were read
    inverted: int = 0  # MONOCHROME1 files
    sha256: str = ""  # over the sorted SHA-256 of the files that were read
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Pictures for each predicted class, or each finding; of slides, the slide."""
        whole = {r["input"] for r in self.rows if r["frame"] == MEAN}
        rows = (r for r in self.rows if r["input"] not in whole or r["frame"] == MEAN)
        found = Counter(k for r in rows for k in r["found"])
        return {c: found[c] for c in self.classes}


@dataclass(slots=True)
class _Batch:
    """What waits for the model."""

    numbers: list[int] = field(default_factory=list)
    ready: list[reading.Ready] = field(default_factory=list)


def predict(
    loaded: Loaded,
    files: Sequence[Path | Input],
    task: Task | Question,
    *,
    window: tuple[float, float] | None = None,
    slices: medical.Slices | None = None,
    tiles: slides.Tiles | None = None,
    threads: int = 4,
    shown: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Scores every picture of every input.

    Args:
        loaded: the model.
        files: from `found.find` or `found.find_files`.
        task: what to ask; of a task only classes and prompts are used.
        window: for gray DICOM and NIfTI values; default: the file's own.
        slices: of a volume; default: the middle one.
        tiles: of whole-slide images; default: 0.5 microns per pixel.
        threads: files read in parallel.
        shown: pictures kept with a thumbnail, the model's square and their best prompts.
        progress: called with (done, all) inputs.

    Returns:
        Rows with file, frame, kind, modality, predicted, score and one score a class, in the order of the inputs, and
        one row more with their mean below the tiles of a slide; files that cannot be read are in `errors`, and have no
        rows. Nothing depends on threads, the batch size or the order of the files but the last digits of the scores.
    """
    asked = question.ask(loaded, task) if isinstance(task, Task) else task
    items = [f if isinstance(f, Input) else Input((f,)) for f in files]
    out = Predictions(classes=asked.names)
    tiles = replace(tiles or slides.Tiles(), size=loaded.image_size)
    source = lambda item, hold: inputs.frames(item, window=window, slices=slices, tiles=tiles, hold=hold)
    keep = lambda n, k, p: thumbnail(p.square(THUMBNAIL)) if n < shown and k < shown else ""
    failed: set[str] = set()
    digests: list[str] = []
    batch = _Batch()
    done = 0
    stream = reading.read(
        items, source, loaded.image_size, ahead=loaded.batch_size, threads=threads, keep=keep
    )
    for number, event in stream:
        if isinstance(event, reading.Ready):
            batch.numbers.append(number)
            batch.ready.append(event)
            if len(batch.ready) == loaded.batch_size:
                _score(loaded, asked, batch, out, shown)
                batch = _Batch()
        elif isinstance(event, inputs.Failed):
            failed.add(str(event.file))
            e = event.error
            out.errors.append({"file": str(event.file), "reason": e.cause, "remedy": e.remedy})
        else:
            digests += event.digests.values()
            done += 1
            if progress:
                progress(done, len(items))
    _score(loaded, asked, batch, out, shown)
    return _finished(out, asked, failed, digests)


def _score(loaded: Loaded, asked: Question, batch: _Batch, out: Predictions, shown: int) -> None:
    if not batch.ready:
        return
    z = loaded.encode_image(np.stack([r.square for r in batch.ready]))
    scores = asked.scores(z)
    for number, r, vector, ranks, p in zip(
        batch.numbers, batch.ready, z, scores.ranks, scores.p, strict=True
    ):
        out.rows.append(_row(asked, number, r, ranks, p))
        if r.extra and len(out.shown) < shown:
            out.shown.append(_card(out.rows[-1], r, asked, asked.prompts @ vector))


def _row(asked: Question, number: int, r: reading.Ready, ranks: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    f = r.picture
    head = {"file": str(r.file), "frame": f.frame, "kind": f.kind, "modality": f.modality}
    place = dict(zip("xy", f.corner, strict=True)) if f.corner else {}
    more = {"input": number, "frames": f.frames, "inverted": f.inverted}
    return head | place | _scored(asked, ranks, p) | more


def _scored(asked: Question, ranks: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    found = asked.found(p)
    scores = dict(zip(asked.names, p.tolist(), strict=True))
    return {
        "predicted": question.text(found),
        "found": found,
        "score": float(p.max()),
        "scores": scores,
        "ranks": ranks,
    }


def _card(row: dict[str, Any], r: reading.Ready, asked: Question, cosines: np.ndarray) -> dict[str, Any]:
    top = [(*asked.texts[k], float(cosines[k])) for k in np.argsort(-cosines)[:3]]
    f = r.picture
    return {
        "file": r.file.name + (f", {f.frame + 1} of {f.frames}" if f.frames > 1 else ""),
        "predicted": row["predicted"] or "none",
        "scores": row["scores"],
        "prompts": [{"class": c, "prompt": p, "cosine": v} for c, p, v in top],
        "jpeg": r.extra,
        "row": row,
        "square": r.square,
    }


def explain(loaded: Loaded, asked: Question, cards: Sequence[dict[str, Any]], method: str) -> None:
    """Adds to each picture that is shown the map of its first class against the next, or of its first finding.

    Args:
        loaded: the model.
        asked: what it was asked.
        cards: `Predictions.shown`; each gets an `overlay`.
        method: a key of `saliency.METHODS`.
    """
    if not cards:
        return
    squares = np.stack([c["square"] for c in cards])
    heats = saliency.maps(loaded, squares, asked.toward(loaded.encode_image(squares)), method)
    for card, square, heat in zip(cards, squares, heats, strict=True):
        small = Image.fromarray(square).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        card["overlay"] = thumbnail(saliency.overlay(np.asarray(small), heat))


def _finished(out: Predictions, asked: Question, failed: set[str], digests: Sequence[str]) -> Predictions:
    """Without the rows of files that failed later on, with those of whole slides, and counted."""
    rows = [r for r in out.rows if r["file"] not in failed]
    out.shown = [s for s in out.shown if s["row"]["file"] not in failed]
    out.rows, thinned = [], 0
    for _, group in itertools.groupby(rows, key=lambda r: r["input"]):
        together = list(group)
        out.rows += together
        first = together[0]
        if first["kind"] == "slide":
            out.rows.append(_whole(asked, together))
            thinned += first["frames"] > len(together)
        files = {r["file"]: r for r in together}
        for r in files.values():
            out.kinds[f"{_KINDS[r['kind']]} {r['modality']}".strip()] += 1
            out.inverted += r["inverted"]
    if thinned:
        out.notes.append(
            f"{thinned} slides have more tiles of tissue than were scored (--max-tiles), spread evenly"
        )
    out.sha256 = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
    return out


def _whole(asked: Question, tiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = asked.mean(np.array([list(t["scores"].values()) for t in tiles]))
    same = {k: tiles[0][k] for k in ("file", "kind", "modality", "input", "frames", "inverted")}
    return same | {"frame": MEAN} | _scored(asked, scores.ranks[0], scores.p[0])
