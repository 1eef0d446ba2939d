"""Files and folders that appear at once: what is replaced, and what never is."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from unimed_jax.convert import mapped, tensor_writer
from unimed_jax.data import files
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import report


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path / "out", "text")
    with pytest.raises(DataError, match="Is a directory"), files.swapped(tmp_path / "out") as beside:
        beside.write_text("text")
    assert names(tmp_path) == ["out", "out/precious"]


def test_a_page_never_takes_the_place_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "render", lambda page: "<p>")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        report.write({}, tmp_path / "out")
    assert names(tmp_path) == ["out", "out/precious"]


def test_a_folder_never_takes_the_place_of_a_file_or_link(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for target in ("file", "link"):
        with pytest.raises(DataError, match="Not a directory"), files.swapped(tmp_path / target) as beside:
            beside.mkdir()
    assert names(tmp_path) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_is_replaced_and_what_it_names_is_not(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "file").read_text() == "x"


def test_devices_and_pipes_stay_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="neither a file nor a folder"):
            files.write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_an_interrupted_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    rename = os.replace

    def interrupted(src, target):
        if str(src).endswith(".new"):
            raise KeyboardInterrupt
        rename(src, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "out") as beside:
        beside.mkdir()
    assert names(tmp_path) == ["out", "out/old"]


def test_the_last_look_comes_when_the_work_is_done(tmp_path):
    calls = []

    def refuse():
        calls.append(names(tmp_path))
        raise DataError("somebody was faster")

    with pytest.raises(DataError, match="faster"), files.replacing(tmp_path / "out", refuse) as beside:
        beside.write_text("x")
    ((beside,),) = calls
    assert beside.startswith(".out.")
    assert beside.endswith(f"-{os.getpid()}.new")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_beside_the_target_is_removed(tmp_path):
    with files.replacing(tmp_path / "a[1].json") as beside:
        pattern = beside.name
        beside.write_text("old")
    mine = f"-{os.getpid()}.new"
    assert pattern.endswith(mine)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = {
        "gone": pattern.replace(mine, f"-{gone.pid}.new"),
        "alive": pattern.replace(mine, f"-{os.getppid()}.new"),
        "other": pattern.replace(mine, f"-{gone.pid}.new").replace("a[1]", "b"),
        "elsewhere": f".a[1].json.00000000-{gone.pid}.new",  # another machine's: who knows
        "old": pattern.replace(mine, f"-{gone.pid}.old"),  # may be all that is left of what was there
        "foreign": pattern.replace(mine, "-x.new"),
    }
    for name in left.values():
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a[1].json", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a[1].json", *left.values()} - {left["gone"]}


def test_a_digest_is_begun_early_and_says_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 1000)
    for size in (0, 999, 1000, 2001, 50_000):
        data = os.urandom(size)
        (tmp_path / "f").write_bytes(data)
        want = hashlib.sha256(data).hexdigest()
        assert files.file_sha256(tmp_path / "f") == files.sha256_ahead(tmp_path / "f")() == want
    with pytest.raises(FileNotFoundError):
        files.sha256_ahead(tmp_path / "nothing")()


@pytest.mark.parametrize("thread", ["flush", "MainThread"])
def test_a_disk_that_fails_while_tensors_are_written_is_noticed(tmp_path, monkeypatch, thread):
    """It reports an error once: to whoever asked, which may be the thread that sends pieces ahead."""
    monkeypatch.setattr(tensor_writer, "_FLUSHED", 1)
    real, failed = os.fsync, []

    def fsync(handle):
        if threading.current_thread().name == thread and not failed:
            failed.append(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(tensor_writer.os, "fsync", fsync)
    arrays = {f"t{i}": np.full((50, 50), i, np.float32) for i in range(20)}
    shapes = {k: v.shape for k, v in arrays.items()}
    with pytest.raises(OSError, match="No space left"):
        tensor_writer.write_safetensors(tmp_path / "x.safetensors", shapes, arrays.items())
    assert failed
    digest = tensor_writer.write_safetensors(tmp_path / "x.safetensors", shapes, arrays.items(), hashed=True)
    assert digest == files.file_sha256(tmp_path / "x.safetensors")


def test_a_slow_disk_does_not_keep_what_was_written_in_memory(tmp_path, monkeypatch):
    """The pages that were read back are let go after every piece, also while the disk is still at an older one."""
    monkeypatch.setattr(tensor_writer, "_FLUSHED", 1)
    real, go, released = os.fsync, threading.Event(), []

    def fsync(handle):
        if threading.current_thread().name == "flush":
            go.wait(60)
        real(handle)

    def release(_):
        released.append(1)
        if len(released) == len(arrays):
            go.set()

    monkeypatch.setattr(tensor_writer.os, "fsync", fsync)
    monkeypatch.setattr(mapped.Mapped, "release", release)
    arrays = {f"t{i}": np.full((50, 50), i, np.float32) for i in range(9)}
    shapes = {k: v.shape for k, v in arrays.items()}
    threading.Timer(1, go.set).start()  # or it would wait for ever
    tensor_writer.write_safetensors(tmp_path / "x.safetensors", shapes, arrays.items())
    assert len(released) == len(arrays)


def test_what_is_read_is_never_replaced(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    for source in ("a.csv", "link.csv", "../" + tmp_path.name + "/a.csv"):
        with pytest.raises(UsageError, match="is read"):
            files.refuse_sources([tmp_path / "new.csv", tmp_path / "a.csv"], [tmp_path / source])
    files.refuse_sources([tmp_path / "new.csv"], [tmp_path / "new.csv", tmp_path / "a.csv"])


def test_a_text_with_the_name_of_a_file_that_is_no_utf_8_is_written(tmp_path):
    files.write_text(tmp_path / "a.txt", f"{os.fsdecode(b'M' + bytes([252]))},é")
    assert (tmp_path / "a.txt").read_text("utf-8") == "M\\udcfc,é"
