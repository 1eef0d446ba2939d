"""Limits on everything that is read from outside, in one table; larger input is refused before it is decoded.

Medical pictures are large but not unbounded: 64 million pixels hold an 8000 x 8000 mosaic. A decompression bomb
of a few kilobytes would otherwise take gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

MAX_IMAGE_PIXELS = 64_000_000  # pixels of one picture, as stored and as resized
# Of one slice of a volume or gray DICOM frame, which is computed in float64; the largest mammograms have 27 million.
MAX_GRAY_PIXELS = 32_000_000
MAX_FILE_BYTES = 512 * 2**20  # bytes of one source file
MAX_DECODING_BYTES = 2**30  # memory of what is decoded at once; one picture may exceed it, and is then alone
MAX_FRAMES = 4096  # frames read from one medical file
MAX_TILES = 2**20  # squares of a slide that are searched for tissue; a slide of 2 cm at 40x has 130,000
MAX_RECORD_BYTES = 64 * 2**20  # bytes of one record
MAX_CAPTIONS = 256  # captions of one record
MAX_CAPTION_CHARS = 20_000  # characters of one caption; the longest radiology reports have a few thousand
MAX_LABEL_CHARS = 1000  # characters of one label
MAX_DECODE_SECONDS = 10.0  # processor time to decode one picture at export
MAX_BAD_SHARE = 0.001  # share of a source that an export may reject


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TooSlow(Exception):
    """Raised inside `processor_time` when the limit is reached."""


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Ends the work inside after so much processor time of this process, with TooSlow.

    Processor time, because a busy machine must not turn good pictures into rejects. Only in a process's main thread,
    where export does its work; elsewhere there is no limit. A decoder written in C is interrupted when it comes back
    for more data, as Pillow's do every few kilobytes.

    Example:
        >>> with processor_time(0.05):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
        ...
        unimed_jax.data.limits.TooSlow: 0.05 s of processor time
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise TooSlow(f"{seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
