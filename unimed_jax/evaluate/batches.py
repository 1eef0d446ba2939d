"""Pictures to embeddings, once for every evaluation: read ahead in threads, in batches of one size, over all processes.

Each process reads its own rows of every batch; all of them get all embeddings, and why a picture could not be read.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unimed_jax.errors import DataError
from unimed_jax.infer import Loaded
from unimed_jax.vectors import unit

T = TypeVar("T")
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


def map_ahead(
    pool: ThreadPoolExecutor, fn: Callable[[int], T], items: Iterable[int], ahead: int
) -> Generator[T, None, None]:
    """Like pool.map, but at most `ahead` results wait; closed early, it begins no further ones.

    Example:
        >>> with ThreadPoolExecutor(2) as pool:
        ...     list(map_ahead(pool, abs, [-1, -2, -3], ahead=1))
        [1, 2, 3]
    """
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(fn, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def rows(count: int, most: int, devices: int) -> int:
    """The size of the batches that pictures are cut into: few, equal ones, of one of eight sizes.

    So one evaluation is one compilation, several hardly ever more, and little is filled up at the end of a small set.

    Example:
        >>> rows(1000, 64, 1), rows(65, 64, 1), rows(10, 64, 1), rows(30, 8, 4)
        (64, 40, 16, 8)
    """
    steps = max(1, -(-count // most))
    step = -(-max(1, most // 8) // devices) * devices
    return min(most, max(1, -(-count // (steps * step))) * step)


def _batches(
    loaded: Loaded, count: int, read: Read, threads: int
) -> Iterator[tuple[Any, Any, dict[int, str]]]:
    """Global batches as (embeddings, ids, reasons of this process), one ahead of the caller.

    An id is the picture's number, -1 for padding, -2 - number for a picture that cannot be read.
    """
    job = processes(loaded)
    whole = rows(count, loaded.batch_size, loaded.mesh.size)
    size, mine = whole // len(job), job.index(jax.process_index())
    first = [start + mine * size for start in range(0, count, whole)]
    parts = [range(min(f, count), min(f + size, count)) for f in first]
    numbers = (n for part in parts for n in part)
    waiting = None
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="eval-read") as pool,
        closing(map_ahead(pool, read, numbers, ahead=size + threads)) as pictures,
    ):
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


def share_of(count: int, index: int, processes: int) -> range:
    """The consecutive inputs that one of several processes works on by itself.

    Example:
        >>> [list(share_of(5, i, 2)) for i in range(2)]
        [[0, 1], [2, 3, 4]]
    """
    return range(count * index // processes, count * (index + 1) // processes)


def gather(data: bytes) -> list[bytes]:
    """What every process of the job gives, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [data]
    from jax.experimental import multihost_utils

    own = np.frombuffer(data, np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(own)]))).ravel()
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = own
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:n].tobytes() for row, n in zip(every, lengths.tolist(), strict=True)]


def _shared(errors: dict[int, str]) -> dict[int, str]:
    """The reasons of all processes, by number."""
    lists: Sequence[Any] = [json.loads(text) for text in gather(json.dumps(list(errors.items())).encode())]
    return dict(sorted((int(n), str(why)) for found in lists for n, why in found))
