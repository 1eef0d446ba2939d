"""Files to scores: reads what can be read, embeds in full batches, and keeps count of the rest.

Several processes of a job read consecutive shares of the inputs, each on its own devices, and tell each other what they
found; what follows of it is computed from the whole, so that it is the same for any number of processes.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed_jax import saliency
from unimed_jax.data import found as inputs
from unimed_jax.data import medical, slides
from unimed_jax.data.found import Input
from unimed_jax.errors import DataError, UnimedError
from unimed_jax.evaluate import batches, question, reading
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
class _Share:
    """What one process has found, and what waits for its model."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    ready: list[reading.Ready] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        """How many have been read."""
        return len(self.rows) + len(self.ready)


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
    share: tuple[int, int] = (0, 1),
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
        share: this process of a job, and how many it has; all of them call this with the same inputs, each with a
            model on its own devices.
        progress: called with (done, all) inputs of this process after each batch.

    Returns:
        Rows with file, frame, kind, modality, predicted, score and one score a class, in the order of the inputs, and
        one row more with their mean below the tiles of a slide; files that cannot be read are in `errors`, and have no
        rows. Nothing depends on threads, the batch size or the order of the files but the last digits of the scores,
        and nothing on the number of processes. Each of these gets everything, but `shown` only the first.

    Raises:
        DataError: when the processes see other inputs or questions, or one of them fails.
    """
    asked = question.ask(loaded, task) if isinstance(task, Task) else task
    items = [f if isinstance(f, Input) else Input((f,)) for f in files]
    tiles = replace(tiles or slides.Tiles(), size=loaded.image_size)
    settings = (window, slices, tiles, loaded.batch_size, loaded.dtype)
    alike = (loaded.digest, asked.task.digest, repr(settings))
    batches.agree(itertools.chain(alike, (ascii(f) for i in items for f in i.files)))
    source = lambda item, hold: inputs.frames(item, window=window, slices=slices, tiles=tiles, hold=hold)
    mine = batches.share_of(len(items), *share)
    part, fault = _Share(), ()
    try:
        for number, event in _events(loaded, items, mine, source, threads, shown):
            if isinstance(event, reading.Ready):
                part.numbers.append(number)
                part.ready.append(event)
                if len(part.ready) == loaded.batch_size:
                    _score(loaded, asked, part, shown, loaded.batch_size)
                    if progress:
                        progress(number - mine.start, len(mine))
            elif isinstance(event, inputs.Failed):
                e = event.error
                part.errors.append({"file": str(event.file), "reason": e.cause, "remedy": e.remedy})
            else:
                part.digests += event.digests.values()
    except UnimedError as e:  # the others wait for this one
        fault = (e.cause, e.remedy)
    read = _gathered({"pictures": part.pictures, "fault": fault}, share)
    for other in read:
        if other["fault"]:
            raise DataError(*other["fault"])
    # All batches of a job have one shape: the last digits would depend on who scores the last pictures.
    _score(loaded, asked, part, shown, sum(r["pictures"] for r in read))
    if progress and mine:
        progress(len(mine), len(mine))
    return _finished(_whole_job(part, share), asked, shown)


def _events(
    loaded: Loaded, items: Sequence[Input], mine: range, source: reading.Source, threads: int, shown: int
) -> Iterator[tuple[int, reading.Ready | inputs.Failed | reading.Done]]:
    """What this process's inputs hold, each with the number of its input."""
    first = mine.start
    keep = lambda n, k, p: thumbnail(p.square(THUMBNAIL)) if n + first < shown and k < shown else ""
    part = items[first : mine.stop]
    found = reading.read(part, source, loaded.image_size, ahead=loaded.batch_size, threads=threads, keep=keep)
    return ((first + number, event) for number, event in found)


def _score(loaded: Loaded, asked: Question, part: _Share, shown: int, pictures: int) -> None:
    """Scores what waits, filled up as if it were so many pictures."""
    if not part.ready:
        return
    squares = np.stack([r.square for r in part.ready])
    more = min(pictures, loaded.batch_size) - len(squares)
    z = loaded.encode_image(np.concatenate([squares, np.repeat(squares[-1:], more, axis=0)]))
    scores = asked.scores(z)
    waiting = zip(part.numbers, part.ready, z, scores.ranks, scores.p, strict=False)
    for number, r, vector, ranks, p in waiting:
        part.rows.append(_row(asked, number, r, ranks, p))
        if r.extra and len(part.cards) < shown:
            part.cards.append(_card(part.rows[-1], r, asked, asked.prompts @ vector))
    part.numbers, part.ready = [], []


def _gathered(own: Any, share: tuple[int, int]) -> list[Any]:
    """What every process of the job says, in their order."""
    if share[1] == 1:
        return [own]
    return [json.loads(text) for text in batches.gather(json.dumps(own).encode())]


def _whole_job(own: _Share, share: tuple[int, int]) -> _Share:
    """The shares of all processes in one; on the first with the cards of all, on the others with none."""
    if share[1] == 1:
        return own
    send = lambda row: row | {"ranks": row["ranks"].tolist()}
    take = lambda row: row | {"ranks": np.array(row["ranks"]), "found": tuple(row["found"])}
    first = share[0] == 0
    cards = [
        c | {"row": send(c["row"]), "square": base64.b64encode(c["square"].tobytes()).decode()}
        for c in ([] if first else own.cards)
    ]
    rows = [send(r) for r in own.rows]
    said = {"rows": rows, "errors": own.errors, "cards": cards, "digests": own.digests}
    out = _Share(cards=own.cards if first else [])
    for other in _gathered(said, share):
        out.rows += [take(r) for r in other["rows"]]
        out.errors += other["errors"]
        out.digests += other["digests"]
        for c in other["cards"] if first else ():
            pixels = np.frombuffer(base64.b64decode(c["square"]), np.uint8)
            side = round((len(pixels) / 3) ** 0.5)
            out.cards.append(c | {"row": take(c["row"]), "square": pixels.reshape(side, side, 3)})
    return out


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


def _finished(job: _Share, asked: Question, shown: int) -> Predictions:
    """Without the rows of files that failed later on, with those of whole slides, and counted."""
    failed = {e["file"] for e in job.errors}
    rows = [r for r in job.rows if r["file"] not in failed]
    cards = [c for c in job.cards[:shown] if c["row"]["file"] not in failed]
    out, thinned = Predictions(classes=asked.names, errors=job.errors, shown=cards), 0
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
    out.sha256 = hashlib.sha256("".join(sorted(job.digests)).encode()).hexdigest()
    return out


def _whole(asked: Question, tiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = asked.mean(np.array([list(t["scores"].values()) for t in tiles]))
    same = {k: tiles[0][k] for k in ("file", "kind", "modality", "input", "frames", "inverted")}
    return same | {"frame": MEAN} | _scored(asked, scores.ranks[0], scores.p[0])
