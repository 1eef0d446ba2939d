"""Embeddings of many pictures or texts into one Parquet file a process, resumable at any time.

Work is cut into parts of consecutive inputs. A finished part lies beside the target and is never computed again; at the
end all parts become the target, in order. Batches never cross a part, so that the result of an interrupted run has the
same bytes as that of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax import __version__, vectors
from unimed_jax.data import files, lock
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import batches, embedding_table
from unimed_jax.evaluate.embedding_table import Facts
from unimed_jax.evaluate.inputs import Inputs, Texts
from unimed_jax.evaluate.streams import End, Lost, squares
from unimed_jax.infer import Loaded
from unimed_jax.train import hygiene

_BATCHES = 64  # in a part
_ERRORS = ("input", "reason", "remedy")

Progress = Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class Done:
    """What was written."""

    path: Path
    inputs: int  # of this process: files, volumes, records or lines
    rows: int
    errors: list[dict[str, str]] = field(default_factory=list)  # input, reason, remedy
    resumed: int = 0  # inputs of parts that an earlier run had finished


_LAUNCHERS = {  # of hygiene.cluster: (this process, how many) in the environment
    "jax": ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "tpu": ("TPU_WORKER_ID", ""),
}


def parse_share(text: str, env: Mapping[str, str] | None = None) -> tuple[int, int]:
    """`I/N`, else what the launcher of this process says; (0, 1) for a single process.

    Nothing is exchanged between the processes, so JAX's distributed runtime is not started: one that dies takes no
    other with it, and is repeated alone.

    Raises:
        UsageError: for anything that is no share.

    Example:
        >>> parse_share("2/4"), parse_share("", {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"})
        ((2, 4), (3, 4))
    """
    env = os.environ if env is None else env
    first, _, count = text.partition("/")
    if not text:
        launcher = hygiene.cluster(env)
        if not launcher:
            return 0, 1
        names = _LAUNCHERS[launcher]
        first = env.get(names[0], "")
        hosts = [h for h in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
        count = env.get(names[1], "") if names[1] else str(len(hosts))
        text = f"{first}/{count} of {launcher}"
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UsageError(f"share is {text!r}", "I/N, from 0/N to N-1/N")
    return int(first), int(count)


def target_of(out: Path, index: int, processes: int) -> Path:
    """The file of one of several processes.

    Example:
        >>> str(target_of(Path("e.parquet"), 1, 4))
        'e-00001-of-00004.parquet'
    """
    return out if processes == 1 else out.with_name(f"{out.stem}-{index:05d}-of-{processes:05d}{out.suffix}")


def errors_of(target: Path) -> Path:
    """The list of what could not be read, beside the target."""
    return target.with_name(f"{target.stem}.errors.csv")


def to_parquet(
    loaded: Loaded,
    inputs: Inputs | Texts,
    out: str | Path,
    *,
    dtype: str = "float16",
    settings: dict[str, str] | None = None,
    share: tuple[int, int] = (0, 1),
    threads: int = 4,
    force: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Embeds all inputs of this process's share and writes them with `embedding_table`.

    Args:
        loaded: the model; each process uses its own devices.
        inputs: files, records, the pictures of a suite, or `Texts`.
        out: the file; of several processes each writes `OUT-00000-of-00004.parquet`.
        dtype: of the stored numbers.
        settings: what else decides the pixels, for the metadata.
        share: this process, and how many there are.
        threads: pictures read in parallel.
        force: replace an existing file, and drop unfinished parts of another run.
        progress: called with (done, all) inputs of the share.

    Returns:
        Counts, and what could not be read; it stands in `OUT.errors.csv`, too.

    Raises:
        UsageError: for an existing target, or unfinished parts of other inputs, settings or weights.
        DataError: when nothing could be read, the disk is full, or another process writes the same file.
    """
    if dtype not in embedding_table.DTYPES:
        raise UsageError(f"dtype is {dtype!r}", " or ".join(embedding_table.DTYPES))
    target = target_of(Path(out), *share)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{target.parent} cannot be made: {e.strerror or e}", "choose another --out") from e
    # As in training, a job that was stopped may go on elsewhere: the lock that it left needs no person.
    with lock.held(target.with_name(f".{target.name}.lock"), steal=True):
        return _embed(loaded, inputs, target, dtype, settings or {}, share, threads, force, progress)


def _embed(
    loaded: Loaded,
    inputs: Inputs | Texts,
    target: Path,
    dtype: str,
    settings: dict[str, str],
    share: tuple[int, int],
    threads: int,
    force: bool,
    progress: Progress | None,
) -> Done:
    check_target(target, force)
    folder = target.with_name(f".{target.name}.parts")
    if errors_of(target).exists() and not folder.exists() and not force:
        raise UsageError(f"{errors_of(target)} exists", "choose another --out, or --force to replace it")
    facts = Facts(
        content="text" if isinstance(inputs, Texts) else "image",
        dim=loaded.cfg.embed_dim,
        dtype=dtype,
        model={"name": loaded.cfg.name, "sha256": loaded.digest, "dtype": loaded.dtype},
        settings=settings,
        code=__version__,
    )
    mine = batches.share_of(len(inputs), *share)
    size = _plan(folder, facts, inputs, share, _BATCHES * loaded.batch_size, force)
    result = Done(path=target, inputs=len(mine), rows=0)
    names: list[Path] = []
    start = mine.start
    while start < mine.stop:
        names.append(folder / f"{len(names):06d}.parquet")
        note = _finished(names[-1])
        if note:
            result.resumed += note["inputs"]
        else:
            done = start - mine.start
            step = (lambda n, base=done: progress(base + n, len(mine))) if progress else (lambda n: None)
            numbers = range(start, min(start + size, mine.stop))
            note = _write_part(loaded, inputs, numbers, size, names[-1], facts, threads, step)
        start += note["inputs"]
        result.errors += note["errors"]
    _finish(result, names, facts, folder)
    return result


def vectors_of(
    loaded: Loaded,
    inputs: Inputs,
    numbers: Sequence[int],
    *,
    threads: int = 4,
    progress: Progress | None = None,
) -> tuple[list[str], Float[np.ndarray, "n d"]]:
    """Ids and unit vectors of some inputs, in memory.

    Raises:
        DataError: for the first that cannot be read.
    """
    errors: list[dict[str, str]] = []
    ids: list[str] = []
    held = [np.zeros((0, loaded.cfg.embed_dim), np.float32)]
    for rows, z, done in _picture_vectors(loaded, inputs, numbers, threads, errors):
        ids += [r["id"] for r in rows]
        held.append(z)
        if progress:
            progress(done, len(numbers))
    if errors:
        raise DataError(f"{errors[0]['input']}: {errors[0]['reason']}", errors[0]["remedy"])
    return ids, np.concatenate(held)


def check_target(target: Path, force: bool) -> None:
    """Refuses a target that is there, before any work.

    Raises:
        UsageError: when it exists, or is a folder.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder", "give a file name")
    if target.suffix != ".parquet":
        raise UsageError(f"--out {target.name} is no Parquet file", "a name that ends in .parquet")
    if target.exists() and not force:
        raise UsageError(f"{target} exists", "choose another --out, or --force to replace it")


def _plan(
    folder: Path, facts: Facts, inputs: Inputs | Texts, share: tuple[int, int], size: int, force: bool
) -> int:
    """Makes or checks the folder of parts; returns the inputs of a part, as they were when the first run began."""
    plan = {"facts": facts.json(), "inputs": inputs.fingerprint(), "share": list(share)}
    place = folder / "plan.json"
    try:
        old = json.loads(place.read_text("utf-8"))
        if old["plan"] == plan:
            return int(old["size"])
        stale = True
    except FileNotFoundError:
        stale = False
    except (OSError, ValueError, KeyError, TypeError):
        stale = True
    if stale and not force:
        raise UsageError(
            f"{folder} holds unfinished work on other inputs, settings or weights",
            "run that command again, or --force to begin anew",
        )
    try:
        files.remove(folder)
        folder.mkdir(parents=True)
        files.write_text(place, json.dumps({"plan": plan, "size": size}))
    except OSError as e:
        raise DataError(f"{folder} cannot be written: {e.strerror or e}", "choose another --out") from e
    return size


def _note_of(part: Path) -> Path:
    return part.with_suffix(".json")


def _finished(part: Path) -> dict[str, Any] | None:
    """What an earlier run noted of a part that it finished: how many inputs, and their errors."""
    if not (part.is_file() and embedding_table.whole(part)):
        return None
    return json.loads(_note_of(part).read_text("utf-8"))


def _write_part(
    loaded: Loaded,
    inputs: Inputs | Texts,
    numbers: range,
    most: int,
    path: Path,
    facts: Facts,
    threads: int,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """One part: these inputs, or as many of them as have `most` pictures. Its note appears first: a part is whole."""
    errors: list[dict[str, str]] = []
    with files.swapped(path) as beside:
        done = 0
        with embedding_table.Writer(beside, facts) as writer:
            if isinstance(inputs, Texts):
                blocks = _text_vectors(loaded, inputs, numbers)
            else:
                blocks = _picture_vectors(loaded, inputs, numbers, threads, errors, most)
            for rows, z, done in _grouped(blocks):
                if rows:
                    writer.write(embedding_table.table(facts, rows, z))
                step(done)
        files.sync(beside)
        note = {"inputs": done, "errors": errors}
        files.write_text(_note_of(path), json.dumps(note))
    return note


def _grouped(
    blocks: Iterator[tuple[list[dict[str, Any]], np.ndarray, int]],
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, int]]:
    """Whole row groups out of batches, whatever the size of these."""
    rows: list[dict[str, Any]] = []
    held: list[np.ndarray] = []
    count = 0
    for found, z, count in blocks:
        rows += found
        held.append(z)
        while len(rows) >= embedding_table.GROUP:
            every = np.concatenate(held)
            yield rows[: embedding_table.GROUP], every[: embedding_table.GROUP], count
            rows, held = rows[embedding_table.GROUP :], [every[embedding_table.GROUP :]]
        yield [], np.zeros(0), count
    yield rows, np.concatenate(held) if held else np.zeros(0), count


def _text_vectors(
    loaded: Loaded, inputs: Texts, numbers: range
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, int]]:
    for start in range(0, len(numbers), loaded.batch_size):
        lines = [inputs.lines[n] for n in numbers[start : start + loaded.batch_size]]
        yield (
            [{"id": str(n), "text": text} for n, text in lines],
            loaded.encode_text([text for _, text in lines]),
            start + len(lines),
        )


def _picture_vectors(
    loaded: Loaded,
    inputs: Inputs,
    numbers: Sequence[int],
    threads: int,
    errors: list[dict[str, str]],
    most: int = sys.maxsize,
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, int]]:
    """(rows, unit vectors, inputs done) of full batches; the next one is read and sent while the device computes."""
    waiting: tuple[Any, list[dict[str, Any]], int] | None = None
    for pixels, rows, done in _batches(loaded, inputs, numbers, threads, errors, most):
        z = (
            loaded.encode_rows(pixels, np.arange(len(pixels)))[0]
            if rows
            else np.zeros((0, loaded.cfg.embed_dim))
        )
        if waiting:
            yield _collect(*waiting)
        waiting = z, rows, done
    if waiting:
        yield _collect(*waiting)


def _collect(z: Any, rows: list[dict[str, Any]], done: int) -> tuple[list[dict[str, Any]], np.ndarray, int]:
    return rows, vectors.unit(np.asarray(z, np.float32)[: len(rows)]), done


def _batches(
    loaded: Loaded,
    inputs: Inputs,
    numbers: Sequence[int],
    threads: int,
    errors: list[dict[str, str]],
    most: int,
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]], int]]:
    """Batches of one size, the last padded with its last picture; ends with the input that reaches `most` pictures."""
    size = loaded.image_size
    batch = np.zeros((loaded.batch_size, size, size, 3), np.uint8)
    rows: list[dict[str, Any]] = []
    done, total = 0, 0
    for event in squares(inputs, numbers, size, threads):
        if isinstance(event, Lost):
            e = event.error
            errors.append(dict(zip(_ERRORS, (event.title, e.cause, e.remedy), strict=True)))
        elif isinstance(event, End):
            done += 1
            if total >= most:
                break
        else:
            item, batch[len(rows)] = event
            rows.append({k: getattr(item, k) for k in ("id", "file", "frame", "modality", "key")})
            total += 1
            if len(rows) == len(batch):
                yield batch, rows, done
                batch, rows = np.zeros_like(batch), []
    batch[len(rows) :] = batch[max(len(rows) - 1, 0)]
    yield batch, rows, done


def _finish(result: Done, parts: Sequence[Path], facts: Facts, folder: Path) -> None:
    """Errors, then the target, then the parts go."""
    from unimed_jax.evaluate import results

    listed = errors_of(result.path)
    try:
        if result.errors:
            files.write_text(listed, results.to_csv(result.errors, _ERRORS))
        else:
            listed.unlink(missing_ok=True)  # an old list would be read as this one's
    except OSError as e:
        raise DataError(f"{listed} cannot be written: {e.strerror or e}", "free space") from e
    if result.errors and not any(map(embedding_table.count, parts)):
        files.remove(folder)
        raise DataError(f"none of {result.inputs} inputs could be read", f"see {listed}")
    merged = folder / "merged.parquet"  # in the folder, so that a kill leaves nothing else behind
    try:
        result.rows = embedding_table.merge(parts, merged, facts)
        files.sync(merged)
        merged.replace(result.path)
    except OSError as e:
        raise DataError(f"{result.path} cannot be written: {e.strerror or e}", "free space") from e
    files.remove(folder)
