"""Files mapped into memory read-only: tensors are views of the file and nothing is copied."""

from __future__ import annotations

import mmap
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.errors import DataError

MAX_DIMS = 32  # of one tensor
MAX_BYTES = 2**62  # of one tensor and of any product on the way: far from where 64-bit arithmetic ends


_REPR = reprlib.Repr()  # bounded also for a value that holds itself a thousand times
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 90, 60, 40


def shown(value: object) -> str:
    """A value from a file, safe to print: escaped, at most 100 characters, in bounded time.

    Example:
        >>> shown("a" * 200)[-5:]
        "aaaa'"
    """
    text = _REPR.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class FileMap:
    """The bytes of one regular file.

    Args:
        path: the file; it must not be cut short while this object lives.

    Raises:
        DataError: when it is missing, empty, unreadable or no regular file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise DataError(f"{path} is no regular file", "give the file itself")
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as e:
            raise DataError(f"{path} does not exist") from e
        except ValueError as e:  # what mmap says of an empty file, and stat of a NUL in the path
            raise DataError(f"{path} is empty", "download or save it again") from e
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
        self.size = len(self._map)

    def bytes(self, start: int, size: int) -> bytes:
        """A copy of `size` bytes; fewer at the end of the file."""
        return self._map[start : start + size]

    def view(
        self, start: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """A read-only array over the file; the caller has checked that it lies inside; strides in bytes."""
        if 0 in shape:
            array = np.zeros(shape, dtype)
            array.flags.writeable = False
            return array
        return np.ndarray(shape, dtype, buffer=self._map, offset=start, strides=strides)

    def release(self) -> None:
        """Gives the pages read so far back to the system; views stay valid and read them again."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Mapped(Mapping[str, np.ndarray]):
    """Named read-only tensors over mapped files.

    Args:
        path: what was opened.
        views: name -> view, in the file's order.
        maps: the files below the views.
        metadata: JSON values that the file carries beside its tensors.
        left_out: names, safe to print, of what stands among the tensors and is none.
    """

    def __init__(
        self,
        path: str | Path,
        views: Mapping[str, np.ndarray],
        maps: Sequence[FileMap],
        metadata: Mapping[str, Any] | None = None,
        left_out: Sequence[str] = (),
    ):
        self.path = Path(path)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.maps = tuple(maps)
        self.left_out = tuple(left_out)
        self._views = dict(views)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"Mapped({str(self.path)!r}, {len(self)} tensors)"

    def release(self) -> None:
        """Gives the pages read so far back to the system, so that peak memory stays below the file's size."""
        for m in self.maps:
            m.release()
