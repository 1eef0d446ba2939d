"""Open shards: bounded over all sources, shared by threads, let go with their source; too few files are named."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unimed_jax.data import export, open_files, shards
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import DataError
from unimed_jax.train import hygiene


class Source:
    pass


def test_threads_share_what_is_open_and_the_bound_holds():
    files = open_files.OpenFiles(lambda: 5)
    sources = [Source() for _ in range(4)]
    owners = [files.owner(s) for s in sources]
    wrong, most = [], []

    def read(seed: int) -> None:
        for i in range(3000):
            owner, number = owners[(i * seed) % 4], (i * 7 + seed) % 9
            if files.get(owner, number, lambda: (owner, number)) != (owner, number):  # noqa: B023
                wrong.append(i)
            most.append(len(files._open))

    threads = [threading.Thread(target=read, args=(s,)) for s in range(1, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(files._open) == 5
    assert max(most) <= 5 + len(threads)
    del sources
    gc.collect()
    assert not files._open


def test_what_is_in_use_stays_usable_when_it_goes():
    files, source = open_files.OpenFiles(lambda: 1), Source()
    owner = files.owner(source)
    first = files.get(owner, 0, lambda: ["first"])
    files.get(owner, 1, lambda: ["second"])
    assert first == ["first"]
    assert files.get(owner, 0, lambda: ["again"]) == ["again"]


def test_a_failure_to_open_is_passed_on_and_keeps_nothing():
    files, source = open_files.OpenFiles(lambda: 1), Source()

    def fail():
        raise DataError("no")

    with pytest.raises(DataError):
        files.get(files.owner(source), 0, fail)
    assert not files._open


def test_a_fork_opens_anew():
    files, source = open_files.OpenFiles(lambda: 9), Source()
    owner = files.owner(source)
    files.get(owner, 0, os.getpid)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"%d" % (files.get(owner, 0, os.getpid) == os.getpid()))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    assert files.get(owner, 0, lambda: 0) == os.getpid()
    os.close(read)
    os.close(write)


def test_threads_of_a_fork_never_wait_for_a_lock_that_was_held_before(monkeypatch):
    files, source = open_files.OpenFiles(lambda: 9), Source()
    owner, found = files.owner(source), []
    holder = threading.Thread(target=files._lock.acquire)  # which the fork leaves behind
    holder.start()
    holder.join()
    files._pid = -1  # as in a child
    real = threading.RLock
    monkeypatch.setattr(open_files.threading, "RLock", lambda: (time.sleep(0.2), real())[1])
    readers = [
        threading.Thread(target=lambda n=n: found.append(files.get(owner, n, lambda: n)), daemon=True)
        for n in range(4)
    ]
    for t in readers:
        t.start()
        time.sleep(0.02)
    for t in readers:
        t.join(5)
    assert sorted(found) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[Path]:
    """Two sources of 60 shards each."""
    roots = [tmp_path_factory.mktemp(name) for name in "ab"]
    for root in roots:
        export.export(Phantom(n=240, size=16), root, shards=60)
    return roots


READ = """
import json, os, resource, sys
from unimed_jax.data import shards
sources = [shards.Shards(f"{root}/phantom", "train") for root in sys.argv[2:]]
[s[0] for s in sources]  # imports done
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
count = lambda: len(os.listdir("/proc/self/fd"))
most = 0
for i in range(len(sources[0])):
    for s in sources:
        s[i]
    most = max(most, count())
print(json.dumps([most, len(sources[0].shards)]))
"""


def read_all(roots: list[Path], limit: int) -> list[int]:
    words = [sys.executable, "-c", READ, str(limit), *map(str, roots)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_more_shards_than_files_may_be_open(roots):
    """One bound for all sources: each for itself would soon have all files that the process may open."""
    most, shards_each = read_all(roots, 64)
    assert shards_each > 32
    assert most <= 48
    assert read_all(roots, 1024)[0] > 2 * shards_each  # where they may, all stay open


def test_too_many_open_files_are_named_not_blamed_on_the_shard(roots):
    folder = shards.resolve(roots[0] / "phantom")
    shard = shards.Manifest.read(folder).splits["train"][0]
    shards.open_shard(folder, shard)  # imports done
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(n) for n in os.listdir("/proc/self/fd"))
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    try:
        with contextlib.suppress(OSError):
            for _ in range(used + 4):
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(DataError, match="cannot be opened: Too many open files") as e:
            shards.open_shard(folder, shard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert "ulimit -n" in e.value.remedy


def test_training_takes_the_files_that_it_may_open():
    code = (
        "import resource; from unimed_jax.train import hygiene; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 5000)); hygiene.open_file_limit(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert out.stdout.strip() == "(5000, 5000)"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def never(*_):
        raise ValueError("current limit exceeds maximum limit")

    with pytest.MonkeyPatch.context() as patch:  # some systems name a limit and permit less
        patch.setattr(resource, "getrlimit", lambda _: (300, resource.RLIM_INFINITY))
        patch.setattr(resource, "setrlimit", never)
        hygiene.open_file_limit()
    try:
        hygiene.open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
