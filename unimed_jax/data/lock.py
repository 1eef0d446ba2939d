"""One writer a folder: a lock file that names its owner, and that is free again when its owner has died."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from unimed_jax.errors import DataError


@contextlib.contextmanager
def held(path: Path, *, steal: bool = False) -> Iterator[None]:
    """Holds a lock file while the block runs; it is removed afterwards.

    The file is created exclusively and says which host and process made it. Its owner also keeps a kernel lock on
    it, which ends with the process: so a lock left by a crash on this machine is taken over at once, and one from
    another machine (where the kernel lock may not be seen) only with `steal`.

    Args:
        path: the lock file.
        steal: take over the lock of another machine, whose process is known to be dead.

    Raises:
        DataError: if another process holds it (named), or the file cannot be created.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    fd = _create(path)
    while fd is None:
        clear(path, steal=steal)
        fd = _create(path)
    try:
        os.write(fd, json.dumps(me).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the kernel lock ends, so that nobody sees a file without owner
        os.close(fd)


def _create(path: Path) -> int | None:
    """Creates and locks the file; None if it exists, or was taken for a dead owner's before it was locked."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    except OSError as e:
        raise DataError(
            f"cannot write to {path.parent} ({e.strerror})", "give a folder that can be written"
        ) from e
    fcntl.flock(fd, fcntl.LOCK_EX)
    if not _is_at(path, fd):
        os.close(fd)
        return None
    return fd


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file is still the one under this name."""
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def clear(path: Path, *, steal: bool = False) -> None:
    """Removes a lock file if its owner is dead; one that is not there is fine.

    Args:
        path: the lock file.
        steal: as of `held`.

    Raises:
        DataError: if the owner is alive, or may be.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # released in the meantime
    try:
        owner = _owner(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path} is held by {owner}", "wait until it has finished") from None
        if owner.rpartition(" on ")[2] not in (socket.gethostname(), "?") and not steal:
            raise DataError(
                f"{path} was left by {owner}", "once you are sure that it is dead, run again with --steal"
            )
        # Another process may have done the same just before: remove only the file that is locked here.
        if _is_at(path, fd):
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _owner(fd: int) -> str:
    try:
        values = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(values['pid'])} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return "process ? on ?"
