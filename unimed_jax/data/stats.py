"""Counts of everything under a folder of records: pictures, patients, captions, their lengths, and what is there twice.

A record counts as a duplicate when an earlier one, in the order of sources, splits and shards, holds the same; so the
rows add up. Pictures are compared by their bytes and those that they were reduced from, and where that is asked for by
what they show: by decoded pixels, and by perceptual hash (data/phash.py), which may err.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from unimed_jax.data import images, phash, pool, shards, verify
from unimed_jax.data.record import Example
from unimed_jax.data.shards import MANIFEST
from unimed_jax.data.verify import Job
from unimed_jax.errors import DataError, UnimedError, UsageError

TOKEN_BUCKETS = (32, 64, 96, 128, 192, 256)
WORD_BUCKETS = (8, 16, 32, 64, 128, 256)
_AT_ONCE = 1 << 20  # hashes that are looked up at once

Place = tuple[str, str, str]  # source, split, modality


def bucket(length: int, bounds: tuple[int, ...] = TOKEN_BUCKETS) -> str:
    """The name of the length group of a caption.

    Example:
        >>> bucket(0), bucket(33), bucket(300), bucket(5, WORD_BUCKETS)
        ('not counted', '<=64', '>256', '<=8')
    """
    if not length:
        return "not counted"
    return next((f"<={n}" for n in bounds if length <= n), f">{bounds[-1]}")


def bucket_names(bounds: tuple[int, ...] = TOKEN_BUCKETS) -> tuple[str, ...]:
    """The names of all groups, in order."""
    return (*(f"<={n}" for n in bounds), f">{bounds[-1]}", "not counted")


def stats(
    root: str | Path, *, workers: int = 1, duplicates: bool = False, distance: int = phash.DISTANCE
) -> dict[str, Any]:
    """Counts all sources under a folder.

    Args:
        root: of all sources, or of one.
        workers: processes.
        duplicates: decode every picture and compare what they show, too.
        distance: bits in which the perceptual hashes of similar pictures may differ.

    Returns:
        {"rows": a dict for each source, split and modality, "images": n, "duplicates": pictures that are there more
        than once, "captions": n, "duplicate_captions": n, and with `duplicates` "same_pixels" and "similar"}. A row
        has source, split, modality, images, duplicates, patients, simulated, captions, duplicate_captions, words,
        lengths (of captions, in words: {median, p95, longest}), words_by_length and tokens ({group: captions}), and
        the two more counts.

    Raises:
        DataError: for a folder without sources, or damaged records.
        UsageError: for a distance that is none.
    """
    if not 0 <= distance <= phash.FURTHEST:
        raise UsageError(f"distance is {distance}", f"0 to {phash.FURTHEST} bits")
    found = shards.find_sources(root)
    if not found:
        raise DataError(f"no source with a {MANIFEST} under {root}", "unimed-jax data build SOURCE --out DIR")
    jobs = verify.jobs_of(found)
    results = dict(pool.run(_count, (duplicates,), jobs, workers))
    places, tallies = _merge(jobs, results)
    columns = {name: np.concatenate([getattr(results[j], name) for j in jobs]) for name in _COLUMNS}
    by_bytes = _again(columns["pictures"]) | _again(columns["originals"])
    of_picture = np.concatenate(places)
    of_caption = np.repeat(of_picture, columns["captions_of"])
    twice = {
        "duplicates": np.bincount(of_picture[by_bytes], minlength=len(tallies)),
        "duplicate_captions": np.bincount(of_caption[_again(columns["captions"])], minlength=len(tallies)),
    }
    if duplicates:
        same = _again(columns["pixels"])
        near = _similar(columns["hashes"], columns["hashes_of"], ~same, distance)
        twice["same_pixels"] = np.bincount(of_picture[same & ~by_bytes], minlength=len(tallies))
        twice["similar"] = np.bincount(of_picture[near], minlength=len(tallies))
    rows = [_row(place, tally) for place, tally in tallies.items()]
    for i, row in enumerate(rows):
        row |= {what: int(n[i]) for what, n in twice.items()}
    rows.sort(key=lambda row: (row["source"], row["split"], row["modality"]))
    totals = {what: int(n.sum()) for what, n in twice.items()}
    return {"rows": rows, "images": len(of_picture), "captions": len(of_caption), **totals}


@dataclass(slots=True)
class _Tally:
    """The counts of one source, split and modality."""

    images: int = 0
    simulated: int = 0
    patients: set[str] = field(default_factory=set)
    words: Counter[int] = field(default_factory=Counter)  # length: captions
    tokens: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Found:
    """What one shard holds; numbers that stand for texts are those of `verify.number_of`."""

    tallies: dict[str, _Tally]  # by modality
    modality_of: Int[np.ndarray, "n"]  # of each record: which of them
    pictures: UInt64[np.ndarray, "n"]
    originals: UInt64[np.ndarray, "n"]
    captions: UInt64[np.ndarray, "m"]
    captions_of: Int[np.ndarray, "n"]  # how many captions a record has
    pixels: UInt64[np.ndarray, "n"]
    hashes: UInt64[np.ndarray, "k"]
    hashes_of: Int[np.ndarray, "n"]


_COLUMNS = ("pictures", "originals", "captions", "captions_of", "pixels", "hashes", "hashes_of")


def _count(duplicates: bool, job: Job) -> _Found:
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    modality_of, pictures, originals, captions, captions_of = [], [], [], [], []
    seen: dict[str, int] = {}
    pixels, hashes, hashes_of = [], [], []
    for row, example in verify.records_of(job):
        where = f"shard {job.folder / job.shard.file} record {row}"
        if isinstance(example, DataError):
            raise DataError(f"{where}: {example.cause}", "data check --full")
        modality = example.modality or "unknown"
        modality_of.append(seen.setdefault(modality, len(seen)))
        tally = tallies[modality]
        tally.images += 1
        tally.simulated += example.simulated
        tally.words.update(len(c.text.split()) for c in example.captions)
        tally.tokens.update(c.tokens for c in example.captions)
        if example.patient:
            tally.patients.add(example.patient)
        pictures.append(verify.number_of(example.sha256))
        originals.append(verify.number_of(verify.source_sha256(example)))
        captions += [verify.number_of(c.text) for c in example.captions]
        captions_of.append(len(example.captions))
        if duplicates:
            digest, found = _prints(example, where)
            pixels.append(digest)
            hashes += found
            hashes_of.append(len(found))
    u8, i8 = np.uint64, np.int64
    return _Found(
        dict(tallies),
        np.array(modality_of, i8),
        *(np.array(pictures, u8), np.array(originals, u8)),
        *(np.array(captions, u8), np.array(captions_of, i8)),
        *(np.array(pixels, u8), np.array(hashes, u8), np.array(hashes_of, i8)),
    )


def _prints(example: Example, where: str) -> tuple[int, tuple[int, ...]]:
    try:
        digest, hashes = phash.prints(images.one_channel(images.decode(example.image)))
    except UnimedError as e:
        raise DataError(f"{where} {example.key}: {e.cause}", "data check --full") from e
    return int.from_bytes(digest[:8], "little"), hashes


def _merge(jobs: list[Job], results: dict[Job, _Found]) -> tuple[list[np.ndarray], dict[Place, _Tally]]:
    """The tallies of all shards by place, and the number of its place for every record, in the order of the jobs."""
    tallies: dict[Place, _Tally] = {}
    numbers: dict[Place, int] = {}
    places = []
    for job in jobs:
        of: list[int] = []
        for modality, one in results[job].tallies.items():
            place = (job.source, job.split, modality)
            of.append(numbers.setdefault(place, len(numbers)))
            all_of = tallies.setdefault(place, _Tally())
            all_of.images += one.images
            all_of.simulated += one.simulated
            all_of.patients |= one.patients
            all_of.words.update(one.words)
            all_of.tokens.update(one.tokens)
        places.append(np.array(of, np.int64)[results[job].modality_of])
    return places, tallies


def _row(place: Place, tally: _Tally) -> dict[str, Any]:
    captions = sum(tally.words.values())
    return {
        **dict(zip(("source", "split", "modality"), place, strict=True)),
        "images": tally.images,
        "patients": len(tally.patients),
        "simulated": tally.simulated,
        "captions": captions,
        "words": sum(length * n for length, n in tally.words.items()),
        "lengths": {
            "median": _quantile(tally.words, 0.5),
            "p95": _quantile(tally.words, 0.95),
            "longest": max(tally.words, default=0),
        },
        "words_by_length": _grouped(tally.words, WORD_BUCKETS),
        "tokens": _grouped(tally.tokens, TOKEN_BUCKETS),
    }


def _quantile(lengths: Counter[int], share: float) -> int:
    """The shortest length that so many of the captions do not exceed."""
    need, done = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        done += lengths[length]
        if done >= need:
            return length
    return 0


def _grouped(lengths: Counter[int], bounds: tuple[int, ...]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for length, n in lengths.items():
        sums[bucket(length, bounds)] += n
    return {name: sums[name] for name in bucket_names(bounds) if sums[name]}


def _again(values: UInt64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which values occur earlier."""
    again = np.ones(len(values), bool)
    again[np.unique(values, return_index=True)[1]] = False
    return again


def _similar(
    hashes: UInt64[np.ndarray, "k"],
    hashes_of: Int[np.ndarray, "n"],
    asked: Bool[np.ndarray, "n"],
    distance: int,
) -> Bool[np.ndarray, "n"]:
    """Which of the pictures asked for are near an earlier one of them by any of their hashes."""
    owners = np.repeat(np.arange(len(hashes_of)), hashes_of)
    hashes, owners = hashes[asked[owners]], owners[asked[owners]]
    out = np.zeros(len(hashes_of), bool)
    start, step = 0, _AT_ONCE
    while start < len(hashes):
        try:
            at, rows, _ = phash.near(hashes, hashes[start : start + step], distance)
        except DataError:  # too many pairs to hold: fewer at once, since here only their pictures count
            if step == 1:
                raise
            step = max(1, step // 8)
            continue
        later = owners[start + rows]
        out[later[owners[at] < later]] = True
        start += step
    return out
