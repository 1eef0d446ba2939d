"""safetensors files written one tensor at a time, so that the weights are in memory once.

Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from unimed_jax.convert.tensor_file import open_safetensors
from unimed_jax.data.files import file_sha256
from unimed_jax.errors import DataError

Item = TypeVar("Item")
_FLUSHED = 2**28  # bytes after which the disk is told to begin
_AHEAD = (
    3  # tensors made ahead, and hashed behind: making, writing and hashing take turns at being the slowest
)


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    *,
    hashed: bool = False,
) -> str:
    """Writes float32 tensors in the order of their names, whatever order they come in, and waits for the disk.

    Args:
        file: target, replaced when it exists; the caller writes beside and renames.
        shapes: of every tensor, by name.
        tensors: (name, array), each name once; quickest in the order of their names. An array must not change after
            it was handed over.
        metadata: for the header.
        hashed: whether the file's sha256 is wanted, which is computed while it is written.

    Returns:
        The sha256, or "".

    Raises:
        DataError: when the tensors are not those of `shapes`, or one does not read back bit for bit.
        OSError: when it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    left = set(shapes)
    with file.open("wb") as f, _Flusher(f.fileno()) as flusher, _Digest(wanted=hashed) as digest:
        _allocate(f.fileno(), start + end)
        _put(f, 0, len(text).to_bytes(8, "little") + text)
        digest.add(0, len(text).to_bytes(8, "little") + text)
        seen = open_safetensors(file)  # from here on, every tensor as a reader finds it
        for name, tensor in _ahead(tensors):
            if name not in left or tuple(tensor.shape) != tuple(shapes[name]):
                raise DataError(f"{file.name}: tensor {name} {list(tensor.shape)} was not announced")
            left.remove(name)
            data = np.ascontiguousarray(tensor, "<f4").reshape(-1).view(np.uint32)
            at = start + header[name]["data_offsets"][0]
            _put(f, at, data.view(np.uint8).data)
            if not np.array_equal(seen[name].reshape(-1).view(np.uint32), data):
                raise DataError(f"{name} does not read back bit for bit", "the disk or the memory is faulty")
            digest.add(at, data.view(np.uint8).data)
            if flusher.add(data.nbytes):
                seen.release()
        os.fsync(f.fileno())
    if left:
        raise DataError(f"{file.name}: {len(left)} tensors were announced and never came: {sorted(left)[0]}")
    return digest.value or (file_sha256(file) if hashed else "")


def _allocate(handle: int, size: int) -> None:
    """Gives a file its size and blocks: a full disk is known before any work, and writing costs half the system time.

    Raises:
        OSError: when the disk has no room for it.
    """
    os.ftruncate(handle, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # anything else: a file system that cannot, and need not


def _put(f: BinaryIO, at: int, data: Any) -> None:
    f.seek(at)
    f.write(data)
    f.flush()


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; the next ones are made in a thread while one is being used."""
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="tensors") as pool:
        following = deque(pool.submit(next, source, None) for _ in range(_AHEAD))
        while (item := following.popleft().result()) is not None:
            following.append(pool.submit(next, source, None))
            yield item


class _Flusher:
    """Sends what was written to the disk while more is being made: at the end little is left to wait for."""

    def __init__(self, handle: int):
        self._handle, self._waiting = handle, 0
        self._work: queue.Queue[bool] = queue.Queue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)

    def __enter__(self) -> _Flusher:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._work.put(False)
        self._thread.join()
        if self._error and kind is None:  # the disk reports it once, so not again at the end
            raise self._error

    def add(self, size: int) -> bool:
        """Takes note of so many bytes written; whether they are a piece that goes, or waits to go, to the disk."""
        self._waiting += size
        full = self._waiting >= _FLUSHED
        if full:
            self._waiting = 0
            if self._work.empty():  # else a slow disk has not begun with the piece before, and takes both
                self._work.put(True)
        return full

    def _run(self) -> None:
        while self._work.get():
            try:
                os.fsync(self._handle)
            except OSError as e:
                self._error = e


class _Digest:
    """The sha256 of bytes that are written in order, computed in a thread of its own while the next ones are made."""

    def __init__(self, *, wanted: bool):
        self._hash, self._end, self._sequential = hashlib.sha256(), 0, wanted
        self._work: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)  # at most so many tensors wait for it
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self.value = ""

    def __enter__(self) -> _Digest:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._work.put(None)
        self._thread.join()
        self.value = self._hash.hexdigest() if self._sequential and kind is None else ""

    def add(self, at: int, data: Any) -> None:
        """Takes bytes that stand at offset `at`; out of order, there is no digest and nothing more to do."""
        self._sequential &= at == self._end
        if self._sequential:
            self._end = at + len(data)
            self._work.put(data)

    def _run(self) -> None:
        while (data := self._work.get()) is not None:
            self._hash.update(data)
