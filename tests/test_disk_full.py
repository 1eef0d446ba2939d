"""The training loop on a disk that fills up: noticed at once, the older state kept, tried once more, then said why."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import build_data, leaves, losses

from unimed_jax import config
from unimed_jax.cli.train import load_config
from unimed_jax.errors import DataError
from unimed_jax.train import checkpoint, hygiene, loop, saved_states

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root", n=60)


@pytest.fixture(scope="module")
def cfg(data) -> config.Train:
    """Six steps with a state of 2 MB after every second, as in test_loop.py: the same programs."""
    fields = {
        "data.root": str(data),
        "duration.steps": "6",
        "checkpoint.every.steps": "2",
        "checkpoint.keep": "3",
        "writers": "('jsonl',)",
        "log_every": "1",
    }
    return load_config("phantom_tiny", fields)


@pytest.fixture(scope="module")
def undisturbed(cfg, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    loop.run(cfg, workdir)
    return workdir


class Tmpfs:
    """A small file system of its own that a file fills; needs root."""

    def __init__(self, base: Path):
        self.folder = base / "disk"
        self.folder.mkdir()
        options = ["-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.folder)]
        if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        self.filler = self.folder / "filler"

    def fill(self) -> None:
        """Leaves half a megabyte: enough for the log, not for a state."""
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_bsize
        self.filler.write_bytes(bytes(free - 500_000))

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class FileSize:
    """The limit on the size of a file of this process; needs no rights."""

    def __init__(self, base: Path):
        self.folder, self.before = base, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, self.before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def close(self) -> None:
        self.free()


@pytest.fixture(params=[Tmpfs, FileSize], ids=["tmpfs", "file-size"])
def disk(request, tmp_path) -> Iterator[Tmpfs | FileSize]:
    made = request.param(tmp_path)
    try:
        yield made
    finally:
        made.close()


class Watcher:
    """Fills the disk before the save of step 4 and writes down what the loop says, and in which step."""

    def __init__(self, monkeypatch, disk, *, free_at_retry: bool):
        self.step, self.said, self.tried = 0, [], []
        save, poll, say = checkpoint.Checkpointer.save, loop._Run._poll, hygiene.say

        def on_save(saved, step, state, meta):
            self.tried.append(step)
            if step == 4:
                saved.wait()
                disk.fill()
            save(saved, step, state, meta)

        def on_poll(run, state, step):
            self.step = step
            while step == 5 and run.saved._manager.is_saving_in_progress():
                time.sleep(0.01)  # a real step takes longer than this write
            poll(run, state, step)

        def on_say(line):
            self.said.append((self.step, line))
            if free_at_retry and "trying once more" in line:
                disk.free()
            say(line)

        monkeypatch.setattr(checkpoint.Checkpointer, "save", on_save)
        monkeypatch.setattr(loop._Run, "_poll", on_poll)
        monkeypatch.setattr(hygiene, "say", on_say)


# Writes that Orbax had begun when one of them failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_noticed_by_the_next_step_and_tried_again(cfg, undisturbed, disk, monkeypatch):
    watcher = Watcher(monkeypatch, disk, free_at_retry=True)
    workdir = disk.folder / "run"
    assert loop.run(cfg, workdir).status == "finished"
    [(step, line)] = watcher.said
    assert step == 5  # by the next step
    assert watcher.tried == [2, 4, 5, 6]  # the newest state instead, once
    assert "saving step 4" in line
    assert "the disk is full; step 2 is kept; trying once more" in line
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [2, 5, 6]
    assert leaves(workdir) == leaves(undisturbed)
    assert losses(workdir) == losses(undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_was_saved(cfg, undisturbed, disk, monkeypatch):
    watcher = Watcher(monkeypatch, disk, free_at_retry=False)
    workdir = disk.folder / "run"
    with pytest.raises(DataError, match=r"saving step 5 .*the disk is full; step 2 is kept") as e:
        loop.run(cfg, workdir)
    assert e.value.exit_code == 3
    assert "free some space" in e.value.line()
    assert "\n" not in e.value.line()
    assert watcher.tried == [2, 4, 5]  # no third time
    assert [line.endswith("trying once more") for _, line in watcher.said] == [True]
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    assert saved_states.load_params(workdir)[1]["step"] == 2
    monkeypatch.undo()
    disk.free()
    result = loop.run(cfg, workdir)  # the same command again
    assert (result.status, result.step) == ("finished", 6)
    assert leaves(workdir) == leaves(undisturbed)
    assert losses(workdir) == losses(undisturbed)
