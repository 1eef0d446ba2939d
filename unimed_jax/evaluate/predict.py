"""Files to class scores: finds them, reads what can be read, embeds in batches, and keeps count of the rest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data import medical
from unimed_jax.errors import DataError
from unimed_jax.evaluate.tasks import Task
from unimed_jax.evaluate.zeroshot import THUMBNAIL, thumbnail
from unimed_jax.infer import Loaded, ensemble


@dataclass(slots=True, kw_only=True)
class Predictions:
    """Scores of all pictures, and what could not be read."""

    classes: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)  # file, reason, remedy
    shown: list[dict[str, Any]] = field(default_factory=list)  # pictures for a report
    kinds: Counter[str] = field(default_factory=Counter)  # "DICOM CT", "image", ...: files
    inverted: int = 0  # MONOCHROME1 files

    def counts(self) -> dict[str, int]:
        """Pictures for each predicted class."""
        found = Counter(r["predicted"] for r in self.rows)
        return {c: found[c] for c in self.classes}


@dataclass(slots=True)
class _Prepared:
    file: str
    picture: medical.Picture
    square: np.ndarray
    thumbnail: str


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Named files as they are, and everything in folders that looks like a picture, in a fixed order.

    In folders, files with a known suffix or none (as scanners write them) count; hidden ones do not.

    Raises:
        DataError: for a path that does not exist, or when nothing is found, with the suffixes tried.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith("."))
                found |= dict.fromkeys(Path(folder, n) for n in sorted(names) if _looks_like_a_picture(n))
        elif path.exists():
            found[path] = None
        else:
            raise DataError(f"no file or folder {path}", "check the spelling")
    if not found:
        tried = " ".join(sorted(medical.SUFFIXES))
        raise DataError(
            f"no pictures in {', '.join(map(str, paths))}", f"files without suffix or with {tried} are read"
        )
    return list(found)


def _looks_like_a_picture(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    known = suffix in medical.SUFFIXES and (suffix != ".gz" or name.lower().endswith(".nii.gz"))
    return not name.startswith(".") and name != "DICOMDIR" and (known or not suffix or suffix[1:].isdigit())


def predict(
    loaded: Loaded,
    files: Sequence[Path],
    task: Task,
    *,
    window: tuple[float, float] | None = None,
    slices: medical.Slices | None = None,
    threads: int = 4,
    shown: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Scores every picture of every file against the classes of a task.

    Args:
        loaded: the model.
        files: from `find_files`.
        task: its classes and prompts; nothing else of it is used.
        window: for gray DICOM and NIfTI values; default: the file's own.
        slices: frames of a file; default: the middle one.
        threads: files read in parallel.
        shown: pictures kept with a thumbnail and their best prompts.
        progress: called with (done, all) files.

    Returns:
        Rows with file, frame, kind, modality, predicted, score and one score a class (softmax of logit_scale x cosine),
        in the order of the files; files that cannot be read are in `errors`.
    """
    out = Predictions(classes=tuple(task.classes))
    texts = [(name, p) for name, ps in task.classes.items() for p in ps]
    prompts = loaded.encode_text([p for _, p in texts])
    bank = ensemble(np.split(prompts, np.cumsum([len(ps) for ps in task.classes.values()])[:-1]))
    scale = loaded.logit_scale
    for done, ready in _read_all(loaded, files, out, window, slices, threads, shown):
        if ready:
            z = loaded.encode_image(np.stack([r.square for r in ready]))
            logits = scale * (z.astype(np.float64) @ bank.T)
            odds = np.exp(logits - logits.max(1, keepdims=True))
            for r, vector, p in zip(ready, z, odds / odds.sum(1, keepdims=True), strict=True):
                scores = dict(zip(out.classes, p.tolist(), strict=True))
                out.rows.append(_row(r, scores))
                if r.thumbnail and len(out.shown) < shown:
                    out.shown.append(_card(out.rows[-1], r, scores, texts, prompts @ vector))
        if progress:
            progress(done, len(files))
    return out


def _read_all(
    loaded: Loaded, files: Sequence[Path], out: Predictions, window, slices, threads: int, shown: int
) -> Iterator[tuple[int, list[_Prepared]]]:
    """Batches of (files done, pictures); the next batch is read while the caller computes on this one."""

    def prepare(job: tuple[int, Path]) -> list[_Prepared] | dict[str, str]:
        number, path = job
        try:
            found = medical.read(path, window=window, slices=slices)
            keep = number < shown
            return [
                _Prepared(
                    str(path), p, p.square(loaded.image_size), thumbnail(p.square(THUMBNAIL)) if keep else ""
                )
                for p in found
            ]
        except DataError as e:
            return {"file": str(path), "reason": e.cause, "remedy": e.remedy}

    with ThreadPoolExecutor(threads, thread_name_prefix="predict-read") as pool:
        jobs = list(enumerate(files))
        ahead = [pool.submit(prepare, j) for j in jobs[: loaded.batch_size]]
        for start in range(0, len(jobs), loaded.batch_size):
            now = [f.result() for f in ahead]
            following = jobs[start + loaded.batch_size : start + 2 * loaded.batch_size]
            ahead = [pool.submit(prepare, j) for j in following]
            ready: list[_Prepared] = []
            for item in now:
                if isinstance(item, dict):
                    out.errors.append(item)
                elif item:
                    ready += item
                    first = item[0].picture
                    out.kinds[f"{_KINDS[first.kind]} {first.modality}".strip()] += 1
                    out.inverted += first.inverted
            yield start + len(now), ready


_KINDS = {"dicom": "DICOM", "nifti": "NIfTI", "image": "image"}


def _row(r: _Prepared, scores: dict[str, float]) -> dict[str, Any]:
    best = max(scores, key=lambda k: scores[k])
    p = r.picture
    head = {"file": r.file, "frame": p.frame, "kind": p.kind, "modality": p.modality}
    return head | {"predicted": best, "score": scores[best], "scores": scores}


def _card(
    row: dict[str, Any],
    r: _Prepared,
    scores: dict[str, float],
    texts: Sequence[tuple[str, str]],
    cosines: np.ndarray,
) -> dict[str, Any]:
    top = [(*texts[k], float(cosines[k])) for k in np.argsort(-cosines)[:3]]
    prompts = [{"class": c, "prompt": p, "cosine": v} for c, p, v in top]
    return {
        "file": Path(r.file).name,
        "predicted": row["predicted"],
        "scores": scores,
        "prompts": prompts,
        "jpeg": r.thumbnail,
    }
