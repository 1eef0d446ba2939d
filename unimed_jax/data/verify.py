"""Looks at everything that is stored: `check` finds damage and leaks."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from unimed_jax import config
from unimed_jax.data import files, images, markers, pool, record, shards, validate
from unimed_jax.data.record import Example
from unimed_jax.data.shards import MANIFEST, Manifest, ShardInfo, Shards
from unimed_jax.errors import DataError, UnimedError

_MANY = 20  # problems listed a shard


@dataclass(slots=True, kw_only=True)
class CheckReport:
    """What `check` found."""

    sources: list[str] = field(default_factory=list)
    shards: int = 0
    records: int = 0
    problems: list[str] = field(default_factory=list)
    full: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(slots=True, frozen=True)
class Job:
    """One shard to read."""

    folder: Path
    source: str
    split: str
    shard: ShardInfo


def jobs_of(found: dict[str, Path]) -> list[Job]:
    """The shards of all sources, in the order of names and manifests.

    Raises:
        DataError: see `Manifest.read`.
    """
    return [
        Job(folder, name, split, shard)
        for name, folder in found.items()
        for split, infos in Manifest.read(folder).splits.items()
        for shard in infos
    ]


def records_of(job: Job) -> Iterator[tuple[int, Example | DataError]]:
    """The records of a shard in order; a damaged one comes as its error.

    Raises:
        DataError: for a shard that cannot be opened, see `shards.open_shard`.
    """
    reader = shards.open_shard(job.folder, job.shard)
    for row in range(job.shard.count):
        try:
            yield row, record.decode(reader.read([row])[0])
        except DataError as e:
            yield row, e
        except Exception as e:  # array_record raises plain RuntimeError
            yield row, DataError(f"cannot be read: {e}")


def check(root: str | Path, *, full: bool = True, workers: int = 1) -> CheckReport:
    """Verifies all sources under a folder.

    Quick: manifests, names, sizes and counts of shards. Full: also the digest of every shard and picture, that every
    picture decodes and every caption is valid, that keys are unique, and that no picture and no patient is in two
    splits.

    Args:
        root: of all sources, or of one.
        full: read everything.
        workers: processes.

    Raises:
        DataError: if there is nothing to check.
    """
    report = CheckReport(full=full, problems=_unfinished(Path(root)))
    found = shards.find_sources(root)
    if not found and not report.problems:
        raise DataError(f"no source with a {MANIFEST} under {root}", "unimed-jax data build SOURCE --out DIR")
    jobs = jobs_of(found)
    report.sources, report.shards = list(found), len(jobs)
    report.records = sum(job.shard.count for job in jobs)
    for folder in found.values():
        report.problems += _strangers(folder)
    work = _check_shard if full else _open_only
    results = dict(pool.run(work, (), jobs, workers))
    ids = []
    for i, job in enumerate(jobs):  # in the order of the manifest, whichever ended first
        problems, columns = results[job]
        n = columns.shape[1]
        report.problems += problems
        ids.append(np.rec.fromarrays([*columns, np.full(n, i), np.arange(n)], _IDS))
    if full and ids:
        report.problems += _duplicates(jobs, np.concatenate(ids))
    return report


_TEXTS = ("key", "picture", "original", "patient")  # of a record, each as `number_of`
_IDS = np.dtype([(name, "u8") for name in _TEXTS] + [("job", "i8"), ("row", "i8")])
_Found = tuple[list[str], UInt64[np.ndarray, "4 n"]]  # problems, and the texts of the records


def number_of(text: str) -> int:
    """64 bits that stand for a text; 0 for an empty one."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0


def source_sha256(example: Example) -> str:
    """Of the picture that a record was made from, also where a smaller one is stored."""
    return example.original_sha256 or example.sha256


def _open_only(job: Job) -> _Found:
    none = np.zeros((len(_TEXTS), 0), np.uint64)
    try:
        shards.open_shard(job.folder, job.shard)
        return [], none
    except DataError as e:
        return [e.cause], none


def _check_shard(job: Job) -> _Found:
    path = job.folder / job.shard.file
    problems, ids, bad = _open_only(job)[0], [], 0
    if not problems:
        if files.file_sha256(path) != job.shard.sha256:
            problems.append(
                f"shard {path} is not the file that was written: its sha256 differs from the manifest's"
            )
        for row, example in records_of(job):
            if isinstance(example, DataError):
                fault, example = example.cause, Example(key="", image=b"")
            else:
                fault = _fault(example, job)
            texts = (example.key, example.sha256, source_sha256(example), example.patient)
            ids.append(tuple(map(number_of, texts)))
            bad += bool(fault)
            if fault and bad <= _MANY:
                problems.append(f"shard {path} record {row} {example.key}: {fault}".replace(" : ", ": "))
        if bad > _MANY:
            problems.append(f"shard {path}: {bad - _MANY} more records with problems")
    return problems, np.array(ids, np.uint64).reshape(-1, len(_TEXTS)).T


def _fault(example: Example, job: Job) -> str:
    """What is wrong with a record; empty if nothing is."""
    if (example.source, example.split) != (job.source, job.split):
        return f"it belongs to split {example.split!r} of source {example.source!r}"
    if hashlib.sha256(example.image).hexdigest() != example.sha256:
        return "the picture is not the one that was stored: its sha256 differs"
    if example.modality and example.modality not in config.MODALITIES:
        return f"unknown modality {example.modality!r}"
    if marker := next((m for c in example.captions if (m := markers.find(c.text, example.source))), None):
        return f"several captions are joined in one by {marker.text}; export the source again"
    try:
        if images.decode(example.image, where="the picture").shape[:2] != (example.height, example.width):
            return "the picture has another size than the record says"
        validate.clean_captions(example.captions, source=example.source)
    except UnimedError as e:
        return e.cause
    except validate.Reject as e:
        return f"{e.reason}: {e.detail}"
    return ""


def _unfinished(root: Path) -> list[str]:
    """Folders with shards and no manifest."""
    if not root.is_dir():
        return []
    folders = {
        p.parent for pattern in ("*", "*/*", "*/*/*") for p in root.glob(f"{pattern}unimed-*.array_record-*")
    }
    return [
        f"{folder} has shards but no {MANIFEST}: its export is not finished"
        for folder in sorted(folders)
        if not (folder / MANIFEST).exists()
    ]


def _strangers(folder: Path) -> list[str]:
    """Shards that the manifest does not name."""
    known = {s.file for infos in Manifest.read(folder).splits.values() for s in infos}
    known |= {f"{file}.json" for file in known}
    return [
        f"{path} is not in the manifest"
        for path in sorted(folder.glob("*.array_record-*"))
        if path.name not in known
    ]


def _duplicates(jobs: list[Job], ids: np.ndarray) -> list[str]:
    """Keys that are there twice; pictures in two splits of any source; patients in two splits of one source."""
    split_names = sorted({job.split for job in jobs})
    source_names = sorted({job.source for job in jobs})
    split = np.array([split_names.index(job.split) for job in jobs])[ids["job"]]
    source = np.array([source_names.index(job.source) for job in jobs])[ids["job"]]
    nothing = np.zeros(len(ids), np.int64)
    problems = []
    for group, scope, across, text in (
        ("key", nothing, np.arange(len(ids)), "the key is there twice"),
        ("picture", nothing, split, "the same picture is in two splits"),
        ("original", nothing, split, "the same picture, stored in two sizes, is in two splits"),
        ("patient", source, split, "the same patient is in two splits"),
    ):
        pairs = list(_pairs(ids[group], scope, across))
        if group == "original":  # those of one size are named already
            pairs = [(a, b) for a, b in pairs if ids["picture"][a] != ids["picture"][b]]
        for a, b in pairs[:_MANY]:
            problems.append(f"{text}: {_name(jobs, ids[a])} and {_name(jobs, ids[b])}")
        if len(pairs) > _MANY:
            problems.append(f"{text}: {len(pairs) - _MANY} more")
    return problems


def _pairs(values: np.ndarray, scope: np.ndarray, across: np.ndarray) -> Iterator[tuple[int, int]]:
    """One pair of rows for each value (0 excepted) that occurs, within one scope, on two sides of `across`."""
    order = np.lexsort((across, scope, values))
    v, s, x = values[order], scope[order], across[order]
    twice = (v[1:] == v[:-1]) & (s[1:] == s[:-1]) & (x[1:] != x[:-1]) & (v[1:] != 0)
    seen = set()
    for i in np.flatnonzero(twice):
        if (v[i], s[i]) not in seen:
            seen.add((v[i], s[i]))
            yield int(order[i]), int(order[i + 1])


def _name(jobs: list[Job], row: Any) -> str:
    job = jobs[int(row["job"])]
    blob = shards.open_shard(job.folder, job.shard).read([int(row["row"])])[0]
    return f"{record.decode(blob).key} ({job.split})"


def sample(root: str | Path, n: int, *, source: str = "", split: str = "") -> list[Example]:
    """Picks n records, spread evenly over the sources and splits (all, or those named).

    Raises:
        DataError: if nothing fits the names.
    """
    found = shards.find_sources(root)
    opened = [
        Shards(folder, name)
        for key, folder in found.items()
        if source in ("", key)
        for name in Manifest.read(folder).splits
        if split in ("", name)
    ]
    ends = list(itertools.accumulate(map(len, opened)))
    total = ends[-1] if ends else 0
    if not total:
        raise DataError(f"no record of source {source or '*'} split {split or '*'} under {root}")
    chosen = range(0, total, max(1, total // max(1, n)))[:n]
    places = ((bisect.bisect_right(ends, i), i) for i in chosen)
    return [opened[k][i - ends[k]] for k, i in places]  # counted from the end, as Python does
