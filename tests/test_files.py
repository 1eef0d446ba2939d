"""Files and folders that appear at once: what is replaced, and what never is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from unimed_jax.data import files
from unimed_jax.errors import DataError
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
    assert calls == [[f".out.{os.getpid()}.new"]]
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
