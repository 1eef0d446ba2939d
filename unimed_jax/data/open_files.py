"""Files that stay open: those read last, of all sources of this process together.

A mixture has thousands of shards, and on many systems a process may have 1024 files open. Opening a shard again costs
a few percent of decoding a picture on a local disk, and more on a network's.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_MOST = 8192  # a reader of a shard takes about 10 kB


def most() -> int:
    """How many files may stay open: half of those that the system permits this process."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // 2))


class OpenFiles:
    """What is open, by owner and number; of too many, what was used longest ago goes. Any threads may use it.

    Args:
        most: how many stay open; asked whenever one more is opened.

    Example:
        >>> class Source: ...
        >>> files, source, opened = OpenFiles(lambda: 2), Source(), []
        >>> owner = files.owner(source)
        >>> for number in (0, 1, 0, 2, 0, 1):
        ...     files.get(owner, number, lambda: opened.append(number) or "a file")
        'a file'
        'a file'
        'a file'
        'a file'
        'a file'
        'a file'
        >>> opened
        [0, 1, 2, 1]
    """

    def __init__(self, most: Callable[[], int] = most):
        self._most = most
        self._owners = itertools.count()
        self._reset()

    def _reset(self) -> None:
        self._open: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.RLock()  # owners may be collected while this thread holds it
        # Last: until it is set, no other thread of a forked process takes what was there before, a held lock say.
        self._pid = os.getpid()

    def owner(self, of: object) -> int:
        """A name for what files belong to; they are let go when it is collected."""
        name = next(self._owners)
        weakref.finalize(of, self._forget, name).atexit = False
        return name

    def get(self, owner: int, number: int, opened: Callable[[], Any]) -> Any:
        """The open file of that owner and number, opened where it is not; it stays usable while it is referred to."""
        if self._pid != os.getpid():  # after a fork
            self._reset()
        key = (owner, number)
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        fresh = opened()  # without the lock: on a network this takes long, and others read meanwhile
        with self._lock:
            found = self._open.setdefault(key, fresh)
            while len(self._open) > self._most():
                self._open.popitem(last=False)
        return found

    def _forget(self, owner: int) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            for key in [k for k in self._open if k[0] == owner]:
                self._open.pop(key, None)
