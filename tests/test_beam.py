"""data/beam.py: a Beam pipeline writes what the local export writes, also when bundles fail and come again."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import beam_export
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from unimed_jax.cli import data as cli
from unimed_jax.data import beam, writer
from unimed_jax.data import export as local
from unimed_jax.data.shards import Manifest, find_sources
from unimed_jax.data.sources.folder import Folder
from unimed_jax.errors import DataError, UsageError

BEAM = Path(sys.prefix) / "beam"  # tests/beam.txt says why it is apart
SCRIPT = Path(beam_export.__file__)


def run(*argv, timeout=240):
    if not (BEAM / "apache_beam").is_dir():
        pytest.skip("Apache Beam is not in .venv/beam: make env")
    paths = os.pathsep.join([str(BEAM), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Real slices and films out of pydicom's package, pictures, and one file that is none."""
    folder = tmp_path_factory.mktemp("raw")
    rows = []
    for name in ("CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "image_dfl.dcm"):
        shutil.copy(str(get_testdata_file(name, download=False)), folder / name)
        rows.append([name, f"The slice {name}.", "train"])
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (80, 50 + i), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append([f"{i}.png", f"Noise number {i}.", "test" if i % 4 == 0 else "train"])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    rows.append(["broken.png", "Nothing.", "train"])
    with (folder / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["file", "caption", "split"], *rows])
    return folder


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing",
    ],
)
def test_the_same_bytes_as_the_local_export(raw, tmp_path, options):
    source = Folder(raw=raw, captions=raw / "table.csv", name="mixed")
    manifest = local.export(source, tmp_path / "local", shards=3, max_bad=0.1, max_side=64)
    argv = [
        "data",
        "build",
        "folder",
        "--raw",
        str(raw),
        "--captions",
        str(raw / "table.csv"),
        "--name",
        "mixed",
    ]
    argv += ["--shards", "3", "--max-bad", "0.1", "--max-side", "64", "--out", str(tmp_path / "beam")]
    done = run(*argv, "--runner", "beam", f"--beam-options={options}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test 8, train 26 records; rejected: decode_error 1" in done.stdout
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    assert manifest.rejects == {"decode_error": 1}


@pytest.mark.parametrize(("times", "ends"), [(1, 0), (9, 70)])
def test_bundles_that_come_again_leave_one_shard(tmp_path, times, ends):
    marks = tmp_path / "marks"
    marks.mkdir()
    runner = "apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner"  # tries a bundle four times
    done = run("fails", str(tmp_path / "beam"), str(marks), str(times), "fault", runner)
    assert done.returncode == ends, done.stdout + done.stderr[-2000:]
    if ends:
        assert done.stdout.startswith("Fault: source phantom broke on phantom/0")
        assert done.stdout.count("\n") == 1
        assert not find_sources(tmp_path / "beam")
        left = files(tmp_path / "beam")
        assert all(not name.endswith(".part") for name in left)
        done = run("fails", str(tmp_path / "beam"), str(marks), "0", "fault", "FnApiRunner")  # mended
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert len(list(marks.iterdir())) == 2
    local.export(beam_export.Fails(str(marks), 0, RuntimeError), tmp_path / "local", shards=3)
    assert files(tmp_path / "beam") == files(tmp_path / "local")


def test_a_refusal_stays_one_line(tmp_path):
    (tmp_path / "marks").mkdir()
    done = run("fails", str(tmp_path / "out"), str(tmp_path / "marks"), "9", "data", "FnApiRunner")
    assert (done.returncode, done.stdout) == (3, "DataError: broken for now\n"), done.stderr[-2000:]


def test_a_runner_that_beam_does_not_have_is_refused_before_anything_is_made(raw, tmp_path):
    argv = ["data", "build", "folder", "--raw", str(raw), "--captions", str(raw / "table.csv")]
    argv += ["--out", str(tmp_path / "out"), "--runner", "beam", "--beam-options=--runner=FlinkRuner"]
    done = run(*argv)
    said = done.stderr.splitlines()[-1]
    assert (done.returncode, said.count("FlinkRuner")) == (2, 1), done.stderr[-2000:]
    assert said.startswith("unimed-jax: Beam has no runner 'FlinkRuner'. Did you mean \"FlinkRunner\"")
    assert not (tmp_path / "out").exists()


def work(root, source, shards=3):
    folder = root / source.name / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = local.plan(source, folder, shards, None)
    return jobs, beam._Work(source, None, folder, shards, 0, str(root))


def test_attempts_at_the_same_time_are_one_shard(tmp_path):
    source = beam_export.Fails(str(tmp_path), 0, RuntimeError)
    jobs, one = work(tmp_path / "beam", source)
    elements = [(job.path.name, job.digest) for job in jobs]
    threads = [threading.Thread(target=one, args=(e,)) for e in elements for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    local.export(source, tmp_path / "beam", shards=3)
    local.export(source, tmp_path / "local", shards=3)
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    before = {job.path: job.path.stat().st_mtime_ns for job in jobs}
    for e in elements:  # an attempt after all were done
        one(e)
    assert before == {job.path: job.path.stat().st_mtime_ns for job in jobs}
    assert all(writer.finished(job) for job in jobs)


def test_a_worker_that_sees_other_files_says_so(raw, tmp_path):
    source = Folder(raw=raw, captions=raw / "table.csv", name="mixed")
    _, one = work(tmp_path, source)
    with pytest.raises(DataError, match="this worker sees other raw files"):
        one(("unimed-train.array_record-00000-of-00003", "0" * 64))
    assert not list(tmp_path.rglob("*.array_record*"))


def test_requests_that_make_no_sense(raw, tmp_path):
    argv = [
        "build",
        "folder",
        "--raw",
        str(raw),
        "--captions",
        str(raw / "table.csv"),
        "--out",
        str(tmp_path),
    ]
    for more, cause in (
        (["--runner", "beam", "--workers", "2"], "--workers and --runner beam exclude each other"),
        (["--runner", "beam", "--shard-range", "0:1"], "--shard-range and --runner beam"),
        (["--beam-options=--runner=X"], "--beam-options are for --runner beam"),
        (["--runner", "beam", '--beam-options=--x "'], "No closing quotation"),
    ):
        with pytest.raises(UsageError, match=cause):
            cli.run([*argv, *more])
    if importlib.util.find_spec("apache_beam") is None:
        with pytest.raises(UsageError, match="Apache Beam is not installed"):
            cli.run([*argv, "--runner", "beam"])
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_the_local_one(tmp_path):
    source = beam_export.Fails(str(tmp_path), 0, RuntimeError)
    run_here = lambda source, tokenizer, todo: ((j, writer.write_shard(source, j, tokenizer)) for j in todo)
    local.export(source, tmp_path / "a", shards=2, run=run_here)
    assert Manifest.read(find_sources(tmp_path / "a")["phantom"]).examples("train") == 60
