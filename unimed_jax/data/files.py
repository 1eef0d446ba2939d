"""How files and folders appear: refused when something else is there, written beside their place, swapped in at once.

What was there before stays until the new one stands, and comes back when that fails.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import mmap
import os
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unimed_jax.errors import DataError, UsageError


def refuse_folder(folder: Path, own: Collection[str], *, force: bool, what: str) -> None:
    """Refuses a target folder that exists, or, with `force`, that holds anything but what is written there.

    Args:
        folder: the target.
        own: names of the files that a result of this kind consists of.
        force: whether an older result may be replaced.
        what: the kind of result, for messages.

    Raises:
        UsageError: naming what is in the way.
    """
    if folder.name in ("", ".."):  # the root, or a folder that somebody stands in: nothing takes its place
        raise UsageError(f"{str(folder)!r} is no name of a folder to make", "give a folder by its name")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, {what} is a folder", "give the folder itself")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, {what} is a folder", "choose another place")
    if not force:
        raise UsageError(f"{folder} exists", "choose another folder, or --force to replace it")
    if others := sorted(p.name for p in folder.iterdir() if p.name not in own or p.is_dir()):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{folder} exists and is no {what} alone: it holds {others[0]!r}{more}",
            "choose another folder; nothing else is ever deleted",
        )


_PIECE = 2**23  # bytes


def refuse_sources(outputs: Iterable[Path], sources: Iterable[str | Path]) -> None:
    """Refuses outputs that would replace what is read, also where older outputs may be replaced.

    Args:
        outputs: files that are to be written.
        sources: files that are read.

    Raises:
        UsageError: naming the first of them.
    """
    there = {os.path.realpath(p) for p in outputs if os.path.lexists(p)}
    for source in sources if there else ():
        if os.path.realpath(source) in there:
            raise UsageError(f"{source} is read, and an output has its name", "choose another output")


@contextmanager
def replacing(target: Path, refuse: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A path beside the target, for a file or folder to be made there; it takes the target's place when the block ends.

    A file only ever replaces a file or a link, a folder only a folder.

    Args:
        target: its final place.
        refuse: called at the last moment; raises when something appeared at the target that must stay.

    Raises:
        OSError: when that fails; then the target is as it was.
    """
    _remove_stale(target)
    if target.exists() and not target.is_file() and not target.is_dir():  # /dev/null would become a file
        raise OSError(errno.EINVAL, "neither a file nor a folder")
    beside, old = _beside(target, "new"), _beside(target, "old")
    try:
        yield beside
        refuse()
        if not beside.is_dir() or not target.is_dir() or target.is_symlink():
            os.replace(beside, target)  # fails when one is a folder and the other is not
            return
        os.replace(target, old)  # a folder cannot be replaced in one step
        try:
            os.replace(beside, target)
        except BaseException:
            if not os.path.lexists(target):
                os.replace(old, target)
            raise
        remove(old)
    finally:
        remove(beside)


@contextmanager
def swapped(target: Path, refuse: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """`replacing`, with the target's folder made where it is missing, and one line when it cannot be written.

    Raises:
        DataError: when it cannot be written; then the target is as it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, refuse) as beside:
            yield beside
    except OSError as e:
        raise DataError(f"{target} cannot be written: {e.strerror or e}", "free space or check rights") from e


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: beside its place, synced, renamed; see `encodable`.

    Raises:
        OSError: when it cannot be written; then an older file is as it was.
    """
    with replacing(path) as beside:
        beside.write_text(encodable(text), encoding="utf-8")
        sync(beside)


def encodable(text: str) -> str:
    r"""The text in Unicode: bytes of a file name that is no UTF-8 appear as numbers.

    Example:
        >>> encodable(os.fsdecode(b"M\xfcller.png")), encodable("Müller.png")
        ('M\\udcfcller.png', 'Müller.png')
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_json(
    path: Path, remedy: str, *, missing: str = "check its name and permissions", most: int | None = None
) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        path: the file.
        remedy: what to do when it is no JSON.
        missing: what to do when it cannot be read.
        most: bytes that it may have.

    Raises:
        DataError: when it cannot be read, is too large or no JSON, or has a key twice.
    """
    try:
        if most is not None and path.stat().st_size > most:
            raise DataError(f"{path} has more than {most} bytes")
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror or type(e).__name__})", missing) from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is no JSON: {str(e)[:100]}", remedy) from e


def parse_json(text: str) -> Any:
    """A JSON text; the same key twice in an object, of which json keeps the last, is none.

    Raises:
        ValueError: for another text.
        RecursionError: for one that is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:60]!r} is there twice")
    return found


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def below(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """The files with wanted names in a folder and all below it, sorted; links to folders are not followed.

    Raises:
        DataError: for a folder that cannot be listed: its files would be left out in silence.
    """

    def refuse(e: OSError) -> None:
        raise DataError(
            f"the folder {e.filename} cannot be listed ({e.strerror})", "permit it, or move it away"
        )

    named = (
        Path(at, name) for at, _, names in os.walk(folder, onerror=refuse) for name in names if wanted(name)
    )
    # Links to nothing, too, for the reader to refuse; pipes and devices are none.
    return sorted(p for p in named if p.is_file() or not p.exists())


def sync_all(path: Path) -> None:
    """`sync` of a file, or of every file in a folder."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        sync(file)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        # Large pieces: between two of them a busy interpreter lets this thread wait.
        piece = memoryview(bytearray(min(_PIECE, os.fstat(f.fileno()).st_size + 1)))
        while n := f.readinto(piece):
            digest.update(piece[:n])
    return digest.hexdigest()


def sha256_ahead(path: Path) -> Callable[[], str]:
    """Begins the SHA-256 of a file in the background; the function that is returned waits for it.

    The file is mapped, which takes a fifth of the system's time that reading does: for files that are mapped anyway,
    since one that is cut short meanwhile ends the process.

    Raises:
        OSError: by that function, when the file cannot be read.
    """
    done: Future[str] = Future()

    def compute() -> None:
        try:
            done.set_result(_mapped_sha256(path) if path.stat().st_size else file_sha256(path))
        except BaseException as e:
            done.set_exception(e)

    # A daemon: a refusal in the meantime must not wait for gigabytes.
    threading.Thread(target=compute, name="sha256", daemon=True).start()
    return done.result


def _mapped_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        for start in range(0, len(pages), _PIECE):
            size = min(_PIECE, len(pages) - start)
            with memoryview(pages) as view, view[start : start + size] as piece:
                digest.update(piece)
            if hasattr(pages, "madvise"):  # what was read no longer counts as this process's memory
                pages.madvise(mmap.MADV_DONTNEED)
    return digest.hexdigest()


def _beside(target: Path, kind: str) -> Path:
    """A name beside the target that no other process has, on any machine that sees the folder."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}.{kind}")


@functools.cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _remove_stale(target: Path) -> None:
    """Removes what killed processes of this machine have left beside a target; what a living one makes stays."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{_host()}-*.new"):
        try:
            os.kill(int(path.name.split("-")[-1].removesuffix(".new")), 0)
        except ProcessLookupError:
            remove(path)
        except (ValueError, OverflowError, PermissionError):
            pass  # not of our naming, or alive


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
