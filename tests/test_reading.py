"""Reading ahead: in order, in bounded memory, and never a thread left behind."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from unimed_jax.data.dicom import Frame, Picture
from unimed_jax.data.found import Failed, Input
from unimed_jax.errors import DataError
from unimed_jax.evaluate import reading


class Scanner:
    """Inputs `n` of `n % 3 + 1` frames each, which take time and count what is decoded at once."""

    def __init__(self, folder: Path, cost: int = 1):
        self.folder, self.cost = folder, cost
        self.now = self.peak = 0
        self.lock = threading.Lock()

    def inputs(self, count: int) -> list[Input]:
        for n in range(count):
            (self.folder / str(n)).write_text(str(n))
        return [Input((self.folder / str(n),)) for n in range(count)]

    def frames(self, item: Input, hold):
        (path,) = item.files
        n = int(path.name)
        for k in range(n % 3 + 1):
            yield Frame(file=path, cost=self.cost, read=lambda k=k: self.decode(n, k))

    def decode(self, n: int, k: int) -> Picture:
        with self.lock:
            self.now += self.cost
            self.peak = max(self.peak, self.now)
        time.sleep(random.random() / 200)
        with self.lock:
            self.now -= self.cost
        return Picture(data=np.full((8, 8), n, np.uint8), kind="image", frame=k)


def read(scanner: Scanner, count: int, **options):
    keep = lambda n, k, p: f"{n}/{k}"
    options = {"ahead": 4, "threads": 4} | options
    return list(reading.read(scanner.inputs(count), scanner.frames, 4, keep=keep, **options))


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (2, 8), (50, 3)])
def test_everything_comes_once_and_in_order(tmp_path, ahead, threads):
    got = read(Scanner(tmp_path), 20, ahead=ahead, threads=threads)
    ready = [(n, e.picture.frame) for n, e in got if isinstance(e, reading.Ready)]
    assert ready == [(n, k) for n in range(20) for k in range(n % 3 + 1)]
    assert [e.extra for _, e in got if isinstance(e, reading.Ready)] == [f"{n}/{k}" for n, k in ready]
    assert [n for n, e in got if isinstance(e, reading.Done)] == list(range(20))
    assert all((e.square == n).all() for n, e in got if isinstance(e, reading.Ready))
    assert all(e.picture.data == b"" for _, e in got if isinstance(e, reading.Ready))


@pytest.mark.parametrize(("budget", "at_once"), [(25, 2), (9, 1), (1000, 8)])
def test_what_is_decoded_at_once_stays_within_the_budget(tmp_path, budget, at_once):
    """A picture of 10 bytes: two of them fit into 25; into 9 none does, and each is decoded alone."""
    scanner = Scanner(tmp_path, cost=10)
    read(scanner, 24, threads=8, ahead=20, budget=budget)
    assert scanner.peak <= 10 * at_once
    assert scanner.peak >= 10 * min(at_once, 2)


def test_long_inputs_do_not_run_away_from_a_slow_reader(tmp_path):
    scanner = Scanner(tmp_path)
    made = []

    def frames(item, hold):
        for k in range(500):
            yield Frame(file=item.files[0], cost=1, read=lambda k=k: made.append(k) or scanner.decode(0, k))

    stream = reading.read(scanner.inputs(3), frames, 4, ahead=3, threads=3, keep=lambda *_: "")
    next(stream)
    time.sleep(0.5)
    assert len(made) <= 3 * 10 + 3
    stream.close()


def test_a_reader_that_leaves_ends_the_threads(tmp_path):
    stream = reading.read(
        Scanner(tmp_path).inputs(60), Scanner(tmp_path).frames, 4, ahead=30, threads=4, keep=lambda *_: ""
    )
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("predict-read")]


def test_failures_come_in_their_place_and_end_their_file_only(tmp_path):
    scanner = Scanner(tmp_path)

    def frames(item, hold):
        for k, frame in enumerate(scanner.frames(item, hold)):
            if item.files[0].name == "2" and k == 1:
                yield Frame(file=frame.file, cost=1, read=lambda: (_ for _ in ()).throw(DataError("cut")))
            elif item.files[0].name == "4":
                yield Failed(frame.file, DataError("odd"))
            else:
                yield frame

    stream = reading.read(scanner.inputs(6), frames, 4, ahead=2, threads=2, keep=lambda *_: "")
    got = [(n, type(e).__name__) for n, e in stream]
    assert got == [
        *[(0, "Ready"), (0, "Done"), (1, "Ready"), (1, "Ready"), (1, "Done")],
        *[(2, "Ready"), (2, "Failed"), (2, "Done"), (3, "Ready"), (3, "Done")],
        *[(4, "Failed"), (4, "Done"), (5, "Ready"), (5, "Ready"), (5, "Ready"), (5, "Done")],
    ]


def test_files_are_named_by_hash_unless_they_fail(tmp_path):
    got = {n: e.digests for n, e in read(Scanner(tmp_path), 2) if isinstance(e, reading.Done)}
    assert [len(d) for d in got.values()] == [1, 1]
    import hashlib

    assert got[1][tmp_path / "1"] == hashlib.sha256(b"1").hexdigest()


def test_a_fault_of_the_program_is_raised_to_the_reader(tmp_path):
    def frames(item, hold):
        raise RuntimeError("a bug")
        yield

    with pytest.raises(RuntimeError, match="a bug"):
        list(reading.read(Scanner(tmp_path).inputs(3), frames, 4, ahead=2, threads=2, keep=lambda *_: ""))
    assert not [t for t in threading.enumerate() if t.name.startswith("predict-read")]


def test_a_file_that_vanishes_is_a_failure(tmp_path):
    def frames(item, hold):
        yield Frame(
            file=item.files[0], cost=1, read=lambda: Picture(data=(tmp_path / "x").read_bytes(), kind="image")
        )

    got = list(reading.read(Scanner(tmp_path).inputs(1), frames, 4, ahead=1, threads=1, keep=lambda *_: ""))
    assert isinstance(got[0][1], Failed)
    assert "cannot be read (FileNotFoundError)" in got[0][1].error.cause
