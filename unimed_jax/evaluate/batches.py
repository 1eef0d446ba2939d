"""Pictures to embeddings, once for every evaluation: read ahead in threads, padded to one size, over all processes.

Each process reads its own rows of every batch; all of them get all embeddings, and why a picture could not be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unimed_jax.data.pipeline import map_ahead
from unimed_jax.errors import DataError
from unimed_jax.infer import Loaded
from unimed_jax.vectors import unit

_PADDING = -1
Read = Callable[[int], UInt8[np.ndarray, "size size 3"] | str]


def embed(
    loaded: Loaded,
    count: int,
    read: Read,
    *,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[np.ndarray, "n d"], dict[int, str]]:
    """Unit embeddings of pictures 0 to `count`, the same on every process.

    Args:
        loaded: the model.
        count: of pictures.
        read: the evaluation picture of a number, or why there is none; called in threads.
        threads: pictures read in parallel.
        progress: called with (done, all) pictures.

    Returns:
        Embeddings in order (zero where there is none), and number -> reason of pictures without one.

    Raises:
        UnimedError: what `read` raises.
    """
    out = np.zeros((count, loaded.cfg.embed_dim), np.float32)
    errors: dict[int, str] = {}
    done = 0
    for z, ids, own in _batches(loaded, count, read, threads):
        ids, z = np.asarray(ids), np.asarray(z)
        real = ids >= 0
        out[ids[real]] = z[real]
        errors |= own
        done += int((ids != _PADDING).sum())
        if progress:
            progress(done, count)
    return unit(out), _shared(errors)


def processes(loaded: Loaded) -> list[int]:
    """The processes that share the model's mesh, in order."""
    return sorted({d.process_index for d in loaded.mesh.devices.flat})


def _batches(
    loaded: Loaded, count: int, read: Read, threads: int
) -> Iterator[tuple[Any, Any, dict[int, str]]]:
    """Global batches as (embeddings, ids, reasons of this process), one ahead of the caller.

    An id is the picture's number, -1 for padding, -2 - number for a picture that cannot be read.
    """
    job = processes(loaded)
    size, mine = loaded.batch_size // len(job), job.index(jax.process_index())
    steps = -(-count // loaded.batch_size)
    first = [step * loaded.batch_size + mine * size for step in range(steps)]
    parts = [range(min(f, count), min(f + size, count)) for f in first]
    numbers = (n for part in parts for n in part)
    waiting = None
    with ThreadPoolExecutor(threads, thread_name_prefix="eval-read") as pool:
        pictures = map_ahead(pool, read, numbers, ahead=size + threads)
        for part in parts:
            image = np.zeros((size, loaded.image_size, loaded.image_size, 3), np.uint8)
            ids = np.full(size, _PADDING, np.int32)
            reasons: dict[int, str] = {}
            for row, n in enumerate(part):
                found = next(pictures)
                ids[row] = -2 - n if isinstance(found, str) else n
                if isinstance(found, str):
                    reasons[n] = found
                else:
                    image[row] = found
            now = (*loaded.encode_rows(image, ids), reasons)
            if waiting:
                yield waiting
            waiting = now
    if waiting:
        yield waiting


def agree(items: Iterable[str]) -> None:
    """Makes sure that all processes of a job evaluate the same.

    Raises:
        DataError: on every process, when they do not.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    whole = hashlib.sha256()
    for item in items:
        whole.update(item.encode() + b"\0")
    mine = np.frombuffer(whole.digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    if (every != every[0]).any():
        raise DataError(
            "the processes of this job see different data",
            "give all of them the same files: a shared folder, or equal copies",
        )


def _shared(errors: dict[int, str]) -> dict[int, str]:
    """The reasons of all processes, by number."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = np.frombuffer(json.dumps(list(errors.items())).encode(), np.uint8)
        lengths = np.asarray(multihost_utils.process_allgather(np.array([len(text)]))).ravel()
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(text)] = text
        everyone = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
        lists: Sequence[Any] = [
            json.loads(row[:n].tobytes()) for row, n in zip(everyone, lengths.tolist(), strict=True)
        ]
        errors = {int(n): str(why) for found in lists for n, why in found}
    return dict(sorted(errors.items()))
