"""Inputs to prepared pictures: read by several threads, handed on in order, in bounded memory.

Decoding waits until its bytes fit into a budget, whatever the number of threads; a file that alone exceeds it is
decoded alone. What is prepared waits in short queues, one for each input that is being read.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimed_jax.data import files, limits
from unimed_jax.data.dicom import Frame, Hold, Picture
from unimed_jax.data.found import Failed, Input
from unimed_jax.errors import DataError

_WAITING = 8  # prepared pictures of one input

Source = Callable[[Input, Hold], Iterator[Frame | Failed]]


@dataclass(frozen=True, slots=True)
class Ready:
    """A picture for the model."""

    file: Path
    picture: Picture  # without its pixels
    square: np.ndarray  # u8[size size 3]
    extra: str  # what `keep` made of it


@dataclass(frozen=True, slots=True)
class Done:
    """An input is finished."""

    digests: dict[Path, str]  # SHA-256 of the files that gave pictures


class Budget:
    """Bytes that may be in use at once."""

    def __init__(self, most: int):
        self._most, self._used = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free, or all are; gives them back at the end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def read(
    inputs: Sequence[Input],
    source: Source,
    size: int,
    *,
    ahead: int,
    threads: int,
    keep: Callable[[int, int, Picture], str],
    budget: int = limits.MAX_DECODING_BYTES,
) -> Iterator[tuple[int, Ready | Failed | Done]]:
    """Everything that the inputs hold, in their order, each as (number of the input, what).

    Args:
        inputs: what to read.
        source: finds the frames of an input.
        size: pixels of a side.
        ahead: inputs that are read before they are asked for.
        threads: that read.
        keep: makes a text of (number of the input, number of the picture in it, picture), e.g. a thumbnail.
        budget: bytes of what is being decoded.
    """
    held, stop = Budget(budget), threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="predict-read")
    lanes: deque[tuple[int, _Lane]] = deque()
    left = iter(enumerate(inputs))

    def start(count: int) -> None:
        for _ in range(count):
            number, item = next(left, (-1, None))
            if item is None:
                return
            lane = _Lane(stop)
            lanes.append((number, lane))
            pool.submit(lane.fill, item, source, size, held, lambda k, p, n=number: keep(n, k, p))

    try:
        start(ahead + threads)
        while lanes:
            number, lane = lanes[0]
            event = lane.take()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Done):
                lanes.popleft()
                start(1)
            yield number, event
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Lane:
    """The prepared pictures of one input."""

    def __init__(self, stop: threading.Event):
        self._queue: queue.Queue[Ready | Failed | Done | BaseException] = queue.Queue(_WAITING)
        self._stop = stop

    def take(self) -> Ready | Failed | Done | BaseException:
        return self._queue.get()

    def _put(self, event: Ready | Failed | Done | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(event, timeout=0.2)
            except queue.Full:
                continue
        raise _Stopped

    def fill(
        self, item: Input, source: Source, size: int, held: Budget, keep: Callable[[int, Picture], str]
    ) -> None:
        """Reads an input to its end; a file that fails gives no further pictures."""
        failed: set[Path] = set()
        digests: dict[Path, str] = {}
        try:
            for k, found in enumerate(source(item, held.hold)):
                if found.file in failed or self._stop.is_set():
                    continue
                ready = found if isinstance(found, Failed) else _prepare(found, size, held, k, keep)
                if isinstance(ready, Failed):
                    failed.add(ready.file)
                elif ready.file not in digests:
                    digests[ready.file] = files.file_sha256(ready.file)
                self._put(ready)
            self._put(Done({f: d for f, d in digests.items() if f not in failed}))
        except _Stopped:
            pass
        except BaseException as e:  # of this program or the machine: the reader of the lane raises it
            with suppress(_Stopped):
                self._put(e)


class _Stopped(Exception):
    """Nobody takes the pictures any more."""


def _prepare(
    frame: Frame, size: int, held: Budget, k: int, keep: Callable[[int, Picture], str]
) -> Ready | Failed:
    try:
        with held.hold(frame.cost):
            picture = frame.read()
            return Ready(frame.file, picture.facts(), picture.square(size), keep(k, picture))
    except DataError as e:
        return Failed(frame.file, e)
    except OSError as e:  # gone or unreadable since it was found
        return Failed(frame.file, DataError(f"{frame.file.name}: cannot be read ({type(e).__name__})"))
