"""Writes the records of a source: many processes, each shard whole or absent, the same bytes for the same input.

Items are ordered by the SHA-256 of their keys (so that shards are mixed, whatever the order of the source) and cut
into equal parts, one a shard; items that name the same `run` stay side by side in their order. A rerun skips the
shards that are finished, so an export that was stopped anywhere is continued by the same command. The manifest is
written last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.data import card, files, limits, lock, pool, record, reduce, writer
from unimed_jax.data.shards import MANIFEST, REJECTS, SPLIT_NAME, VERSION, Manifest, RecordSource, ShardInfo
from unimed_jax.data.text import Tokenizer
from unimed_jax.data.writer import Job
from unimed_jax.errors import DataError, UsageError

_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_LOCK = ".lock"
_RULES = 1  # to be raised when the same input becomes other captions or pictures than before
_EARLY_STOP = 1000  # rejects after which a hopeless export is not continued just to list them all

Progress = Callable[[int, int, int], None]
# (source, tokenizer, shards to write) -> each shard, once it is written, with its sidecar
Run = Callable[[RecordSource, Tokenizer | None, Sequence[Job]], Iterator[tuple[Job, dict[str, Any]]]]


def export(
    source: RecordSource,
    out: str | os.PathLike[str],
    *,
    shards: int | None = None,
    workers: int = 1,
    tokenizer: Tokenizer | None = None,
    max_bad: float = limits.MAX_BAD_SHARE,
    max_side: int = 0,
    force: bool = False,
    steal: bool = False,
    progress: Progress | None = None,
    run: Run | None = None,
) -> Manifest:
    """Writes a source to `<out>/<source>/1.0.0`; the same input gives the same bytes for any number of workers.

    Args:
        source: where the examples come from.
        out: root of all sources.
        shards: files a split; default by `default_shards`.
        workers: processes; 1 works in this one.
        tokenizer: counts the tokens of every caption and is saved as `<out>/tokenizer.json`; default: the one there.
        max_bad: share of the items that may be rejected.
        max_side: larger pictures are made smaller, see data/reduce.py; 0 = none.
        force: write everything anew, also over a finished export.
        steal: take over the lock of an exporter on another machine that is known to be dead.
        progress: called with (items done, items in all, rejects) after each shard.
        run: writes the shards, instead of `workers` processes of this machine.

    Raises:
        DataError: duplicate keys (with both places), too many rejects, a full disk, another exporter at work, or a
            finished export of other content (without `force`).
        UsageError: an impossible name or number.
    """
    if not 0 <= max_bad <= 1:
        raise UsageError(f"max_bad is {max_bad}", "a share, 0 to 1")
    root = Path(out)
    folder = _folder(source, root, shards, workers, max_side)
    with lock.held(folder / _LOCK, steal=steal):
        tokenizer = _tokenizer(root, tokenizer, force)
        jobs = plan(source, folder, shards, tokenizer, max_side)
        digest = _digest([source.licence, source.description, *(j.digest for j in jobs)])
        if (folder / MANIFEST).exists() and not force:
            return _unchanged(folder, digest)
        (folder / MANIFEST).unlink(missing_ok=True)
        for job in jobs:
            lock.clear(_shard_lock(job), steal=steal)
        run = run or functools.partial(_run, workers=workers)
        sidecars = _write_all(source, jobs, run, tokenizer, max_bad, force, progress)
        try:
            return _finalize(source, folder, jobs, sidecars, tokenizer, max_bad, digest)
        except OSError as e:
            raise writer.write_error(folder / MANIFEST, e) from e


def write_range(
    source: RecordSource,
    out: str | os.PathLike[str],
    first: int,
    last: int,
    *,
    shards: int | None = None,
    workers: int = 1,
    tokenizer: Tokenizer | None = None,
    max_side: int = 0,
    steal: bool = False,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Writes some shards of an export, so that machines that share `out` can write it together.

    `export` with the same arguments then writes what is missing, and the manifest; until then nothing looks finished.

    Args:
        source: as of `export`, and so are the others below `last`.
        out: root of all sources.
        first: number of the first shard, counted over all splits in the order of their names.
        last: number of the first shard that is left to others; beyond the end is the end.
        shards: files a split.
        workers: processes.
        tokenizer: counts the tokens of every caption.
        max_side: larger pictures are made smaller.
        steal: take over locks of another machine's dead exporter.
        progress: called after each shard.

    Returns:
        (finished shards, of anyone; all shards).

    Raises:
        UsageError: for a range without shards.
        DataError: when another exporter writes one of them, or the export is finished; and as `export`.
    """
    root = Path(out)
    folder = _folder(source, root, shards, workers, max_side)
    tokenizer = _tokenizer(root, tokenizer, force=False)
    jobs = plan(source, folder, shards, tokenizer, max_side)
    mine = jobs[first:last] if 0 <= first < last else []
    if not mine:
        raise UsageError(f"shards {first}:{last} are none of {len(jobs)}", f"a range within 0:{len(jobs)}")
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is a finished export", "unimed-jax data check verifies it")
    lock.clear(folder / _LOCK, steal=steal)
    with contextlib.ExitStack() as held:
        for job in mine:
            held.enter_context(lock.held(_shard_lock(job), steal=steal))
        run = functools.partial(_run, workers=workers)
        _write_all(source, mine, run, tokenizer, 1.0, False, progress)
    return sum(writer.finished(job) is not None for job in jobs), len(jobs)


def _folder(source: RecordSource, root: Path, shards: int | None, workers: int, max_side: int) -> Path:
    """The folder of an export, made."""
    reduce.check(max_side)
    if not _SOURCE_NAME.fullmatch(source.name):
        raise UsageError(f"{source.name!r} is no name for a source", "lower case letters, digits, - and _")
    if workers < 1 or (shards is not None and shards < 1):
        raise UsageError(f"workers is {workers}, shards {shards}", "1 or more")
    folder = root / source.name / VERSION
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"cannot create {folder} ({e.strerror})", "give a folder that can be written") from e
    return folder


def _shard_lock(job: Job) -> Path:
    return job.path.with_name(f".lock-{job.path.name}")


def plan(
    source: RecordSource, folder: Path, shards: int | None, tokenizer: Tokenizer | None, max_side: int = 0
) -> list[Job]:
    """Cuts the items of a source into shards: a pure function of the items.

    Raises:
        DataError: for a source without items, a duplicate key, or an impossible split name.
    """
    splits: dict[str, list[tuple[bytes, str, Any]]] = defaultdict(list)
    runs: dict[str, bytes] = {}
    first: dict[str, str] = {}
    for i, item in enumerate(source.items()):
        key = full_key(source.name, item.key)
        place = getattr(item, "where", "") or f"item {i}"
        if key in first:
            raise DataError(
                f"key {key} is there twice: {first[key]} and {place}", "keys must be unique in a source"
            )
        if not SPLIT_NAME.fullmatch(item.split):
            raise DataError(
                f"{place}: {item.split[:40]!r} is no name for a split", "lower case letters, digits and _"
            )
        first[key] = place
        run = getattr(item, "run", "") or key
        place_of_run = runs.get(run) or hashlib.sha256(run.encode()).digest()
        if run != key:
            runs[run] = place_of_run
        splits[item.split].append((place_of_run, key, item))
    if not splits:
        raise DataError(f"source {source.name} has no items", "is the folder the right one?")
    jobs = []
    for split, ordered in sorted(splits.items()):
        ordered.sort(key=lambda entry: entry[0])  # stable: a run keeps its order
        n = min(shards or default_shards(len(ordered)), len(ordered))
        for k in range(n):
            part = ordered[k * len(ordered) // n : (k + 1) * len(ordered) // n]
            items, keys = tuple(item for _, _, item in part), tuple(key for _, key, _ in part)
            made_from = [tokenizer.digest if tokenizer else "", split, *_made_from(source, items, keys)]
            if max_side:
                made_from.append(json.dumps(reduce.settings(max_side)))
            name = f"unimed-{split}.array_record-{k:05d}-of-{n:05d}"
            jobs.append(
                Job(
                    path=folder / name,
                    split=split,
                    items=items,
                    keys=keys,
                    digest=_digest(made_from),
                    max_side=max_side,
                )
            )
    return jobs


def full_key(source: str, key: str) -> str:
    """The key of a record, unique over all sources.

    Example:
        >>> full_key("mine", "a.png"), full_key("mine", "mine/a.png")
        ('mine/a.png', 'mine/a.png')
    """
    return key if key.startswith(f"{source}/") else f"{source}/{key}"


def default_shards(n: int) -> int:
    """Shards of n records: of 8192 each, but up to 8 of 256, so that small sets are written in parallel, too.

    Example:
        >>> default_shards(100), default_shards(2500), default_shards(1_000_000)
        (1, 8, 123)
    """
    return max(1, min(8, n // 256), -(-n // 8192))


def _made_from(source: RecordSource, items: Sequence[Any], keys: Sequence[str]) -> list[str]:
    """What the examples are made from: by the source's `fingerprint` if it has one, else by what its repr shows."""
    fingerprint = getattr(source, "fingerprint", "")
    return [fingerprint, *keys] if fingerprint else [repr(source), *map(repr, items)]


def _digest(values: Any) -> str:
    # Shards of a program that stored other fields, or the same by other rules, are never finished by this one.
    text = json.dumps([record.layout(), _RULES, values], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer(root: Path, given: Tokenizer | None, force: bool) -> Tokenizer | None:
    """The tokenizer of a root: one for all sources, since token counts of different ones do not compare."""
    path = root / "tokenizer.json"
    there = Tokenizer(path) if path.is_file() else None
    if given is None:
        return there
    if there is None or (there.digest != given.digest and force):
        given.save(root)
    elif there.digest != given.digest:
        raise DataError(
            f"{path} is another tokenizer than {given.path}",
            "use it, another --out, or --force to replace it",
        )
    return given


def _unchanged(folder: Path, digest: str) -> Manifest:
    manifest = Manifest.read(folder)
    if manifest.plan != digest:
        raise DataError(
            f"{folder} holds a finished export of other content, or by another version's rules",
            "give another --out; --force of data build replaces it",
        )
    return manifest


def _write_all(
    source: RecordSource,
    jobs: Sequence[Job],
    run: Run,
    tokenizer: Tokenizer | None,
    max_bad: float,
    force: bool,
    progress: Progress | None,
) -> dict[Path, dict[str, Any]]:
    """Writes every shard that is not finished; returns the sidecars by shard."""
    total, done, bad = sum(len(j.items) for j in jobs), 0, 0
    sidecars: dict[Path, dict[str, Any]] = {}

    def ended(job: Job, sidecar: dict[str, Any]) -> None:
        nonlocal done, bad
        sidecars[job.path] = sidecar
        done, bad = done + len(job.items), bad + len(sidecar["rejects"])
        if progress:
            progress(done, total, bad)

    todo = []
    for job in jobs:
        sidecar = None if force else writer.finished(job)
        if sidecar is None:
            job.sidecar.unlink(missing_ok=True)
            todo.append(job)
        else:
            ended(job, sidecar)
    try:
        for job, sidecar in run(source, tokenizer, todo):
            ended(job, sidecar)
            if bad > max(_EARLY_STOP, max_bad * total):
                break
    finally:
        for job in todo:  # of workers that were stopped
            job.part.unlink(missing_ok=True)
    return sidecars


def _run(
    source: RecordSource, tokenizer: Tokenizer | None, todo: Sequence[Job], *, workers: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    yield from pool.run(_work, (source, tokenizer), todo, workers)


def _work(source: RecordSource, tokenizer: Tokenizer | None, job: Job) -> dict[str, Any]:
    return writer.write_shard(source, job, tokenizer)


def _finalize(
    source: RecordSource,
    folder: Path,
    jobs: Sequence[Job],
    sidecars: dict[Path, dict[str, Any]],
    tokenizer: Tokenizer | None,
    max_bad: float,
    digest: str,
) -> Manifest:
    """Lists the rejects, refuses too many, writes metadata and card, removes strangers, and last the manifest."""
    rejects = [r for job in jobs if job.path in sidecars for r in sidecars[job.path]["rejects"]]
    reasons = dict(sorted(Counter(r["reason"] for r in rejects).items()))
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rejects]
    files.write_text(folder / REJECTS, "".join(lines))
    total = sum(len(j.items) for j in jobs)
    listed = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
    if len(rejects) > max_bad * total:
        raise DataError(
            f"{len(rejects)} of {total} items of {source.name} were rejected ({listed}), allowed is a share of "
            f"{max_bad:g}; they are listed in {folder / REJECTS}",
            f"mend them, or run again with --max-bad={len(rejects) / total + 0.001:.3f}",
        )
    splits: dict[str, list[ShardInfo]] = defaultdict(list)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for job in jobs:
        sidecar = sidecars[job.path]
        splits[job.split].append(ShardInfo(**{k: sidecar[k] for k in ("file", "count", "bytes", "sha256")}))
        counts[job.split].update(sidecar["counts"])
    if not sum(c["records"] for c in counts.values()):
        raise DataError(
            f"source {source.name}: no item is left ({listed})", f"{folder / REJECTS} says where and why"
        )
    manifest = Manifest(
        source=source.name,
        licence=source.licence,
        description=source.description,
        splits=dict(splits),
        rejects=reasons,
        tokenizer=tokenizer.digest if tokenizer else "",
        plan=digest,
        counts={split: dict(sorted(c.items())) for split, c in counts.items()},
        reduction=reduce.settings(jobs[0].max_side),
    )
    _remove_strangers(folder, jobs)
    card.write_tfds_metadata(folder, manifest)
    files.write_text(folder / "README.md", card.text(manifest))
    files.write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _remove_strangers(folder: Path, jobs: Sequence[Job]) -> None:
    """Removes shards of an earlier export with other splits or another number of shards."""
    ours = {p.name for job in jobs for p in (job.path, job.sidecar)}
    for path in [*folder.glob("unimed-*.array_record-*"), *folder.glob(".unimed-*.part")]:
        if path.name not in ours:
            path.unlink()
