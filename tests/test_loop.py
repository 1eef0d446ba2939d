"""The training loop in this process: stop and go, drift, refusals, divergence, a full disk, exports."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training import build_data, command, environment, leaves, losses

from unimed_jax import config, infer
from unimed_jax.cli.train import load_config
from unimed_jax.data import text
from unimed_jax.errors import DataError, Preempted, UsageError
from unimed_jax.train import checkpoint, hygiene, loop, meter, plan, run_folder, saved_states, writers

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture
def cfg(data) -> config.Train:
    """Six steps with a state after every second."""
    return make(data)


def make(data: Path, **overrides: str) -> config.Train:
    fields = {
        "data.root": str(data),
        "duration.steps": "6",
        "checkpoint.every.steps": "2",
        "writers": "('jsonl',)",
    }
    return load_config("phantom_tiny", fields | {k.replace("__", "."): v for k, v in overrides.items()})


def stop_at(monkeypatch, step: int) -> None:
    monkeypatch.setattr(hygiene.StopSignals, "requested", lambda self, now: now == step)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = loop.run(make(data), workdir)
    assert (result.status, result.step, result.total_steps) == ("finished", 6, 6)
    return workdir


def test_two_halves_equal_the_whole(cfg, whole, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    stop_at(monkeypatch, 3)
    with pytest.raises(Preempted, match="stopped after step 3 of 6") as e:
        loop.run(cfg, workdir)
    assert e.value.exit_code == 75
    assert saved_states.load_params(workdir)[1]["step"] == 3
    stop_at(monkeypatch, -1)
    loop.run(cfg, workdir)
    assert "continuing after step 3 of 6" in capsys.readouterr().err
    assert losses(workdir) == losses(whole)
    assert leaves(workdir) == leaves(whole)


def test_log_and_export(cfg, whole):
    lines = losses(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["bad"] == 0 for line in lines)
    assert lines[0]["lr"] == pytest.approx(cfg.optim.lr / 4)  # first step of a warm-up of four
    loaded = infer.load(whole / "model")
    params = saved_states.load_params(whole)[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), loaded.params, params))
    assert (whole / "model" / "tokenizer.json").is_file()


def test_finished_run_is_left_alone(cfg, whole):
    before = leaves(whole)
    assert loop.run(cfg, whole).status == "already finished"
    assert leaves(whole) == before


def test_killed_between_last_save_and_export(cfg, whole, tmp_path):
    """The end of a run is repeated when it was not reached."""
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "model")
    (workdir / "finished.json").unlink()
    assert loop.run(cfg, workdir).status == "finished"
    files = [(w / "model" / "model.safetensors").read_bytes() for w in (workdir, whole)]
    assert files[0] == files[1]
    assert losses(workdir) == losses(whole)


# -- what may change ------------------------------------------------------------------------------------------------

REFUSED = {
    "optim.lr": "0.5",
    "seed": "1",
    "batch_size": "8",
    "duration.steps": "8",
    "model.text.dropout": "0.0",
    "model.vision.width": "32",
    "loss.tile": "8",
    "data.hflip": "true",
    "optim.warmup.steps": "5",
}
PERMITTED = {
    "log_every": "2",
    "checkpoint.keep": "2",
    "checkpoint.every.steps": "3",
    "data.threads": "1",
    "data.prefetch": "0",
    "watchdog_s": "0",
    "eval.batch_size": "8",
    "name": "other",
    "mesh.min_size": "7",
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_change_the_result_are_refused(data, whole, field):
    before = leaves(whole)
    with pytest.raises(DataError, match=rf"made with other settings: {field} was .*, is ") as e:
        loop.run(make(data, **{field: REFUSED[field]}), whole)
    assert e.value.exit_code == 3
    assert leaves(whole) == before


@pytest.mark.parametrize("field", PERMITTED)
def test_other_settings_are_permitted(data, cfg, field):
    changes = run_folder.refuse_drift(
        config.to_dict(cfg), make(data, **{field: PERMITTED[field]}), extend=False, where="it"
    )
    assert len(changes) == 1
    assert changes[0].startswith(f"{field} was ")


def test_every_field_is_either_permitted_or_refused_by_name():
    """A new field is refused unless someone puts it into the table."""
    tops = {f.name for f in dataclasses.fields(config.Train)}
    for path in run_folder.MAY_CHANGE:
        config.get_path(config.Train(), path)
    assert {p.split(".")[0] for p in run_folder.MAY_CHANGE} <= tops


def test_extend(data, cfg, whole, tmp_path):
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    longer = make(data, **{"duration.steps": "8"})
    with pytest.raises(DataError, match="--extend permits"):
        loop.run(longer, workdir)
    result = loop.run(longer, workdir, extend=True)
    assert (result.status, result.step) == ("finished", 8)
    assert losses(workdir)[:6] == losses(whole)
    with pytest.raises(DataError, match="has done 8 steps, the duration is 6"):
        loop.run(cfg, workdir, extend=True)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_second_run_in_the_same_folder(data, tmp_path):
    workdir = tmp_path / "run"
    p = subprocess.Popen(
        command(data, workdir, "--config.duration.steps=100000"), env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 120
        while not (workdir / "config.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(DataError, match=rf"held by .*{p.pid}") as e:
            loop.run(make(data), workdir)
        assert e.value.exit_code == 3
    finally:
        p.kill()
        p.wait()
    with run_folder.held(workdir):  # kill -9 lets go of it
        pass


def test_other_tokenizer(data, cfg, whole, tmp_path):
    other = text.train_wordpiece(["quite another text", "with other words"], 200, tmp_path / "tok")
    swapped = make(data, **{"data.tokenizer": str(tmp_path / "tok")})
    with pytest.raises(DataError, match="was exported with another tokenizer"):
        loop.run(swapped, tmp_path / "new")
    with pytest.raises(DataError, match="was made with another tokenizer"):
        run_folder.refuse_other_data(
            {"tokenizer": "x", "manifests": {}}, {"tokenizer": other.digest, "manifests": {}}, "it"
        )
    small = make(data, **{"model.text.vocab_size": "100"})
    with pytest.raises(DataError, match=r"tokenizer has \d+ tokens, model.text.vocab_size is 100"):
        loop.run(small, tmp_path / "new")
    assert not (tmp_path / "new" / "checkpoints" / "0").exists()


def test_other_records(cfg, whole, tmp_path):
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    other = build_data(tmp_path / "root", n=120)
    with pytest.raises(DataError, match=r"tokenizer|other records of phantom"):
        loop.run(make(other), workdir)
    meta = {"tokenizer": "t", "manifests": {"phantom": "a", "openi": "b"}}
    with pytest.raises(DataError, match="other records of openi, phantom"):
        run_folder.refuse_other_data(meta, {"tokenizer": "t", "manifests": {"phantom": "c"}}, "it")


def test_impossible_places(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        loop.run(make(data), tmp_path / "file" / "run")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        loop.run(make(tmp_path / "nowhere"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"data\.root is empty"):
        loop.run(load_config("phantom_tiny", {}), tmp_path / "run")


def test_spaces_and_umlauts_in_the_path(data, tmp_path):
    workdir = tmp_path / "a run, größer"
    assert loop.run(make(data, **{"duration.steps": "2"}), workdir).model == workdir / "model"


# -- faults ---------------------------------------------------------------------------------------------------------


def test_divergence_saves_the_state_and_stops(data, tmp_path, capsys):
    workdir = tmp_path / "run"
    wild = make(data, **{"optim.lr": "1e30", "duration.steps": "30"})
    with pytest.raises(DataError, match=r"not finite for 3 steps in a row \((\d+) to (\d+)\)") as e:
        loop.run(wild, workdir)
    assert e.value.exit_code == 3
    assert "the update was not applied" in capsys.readouterr().err
    params = saved_states.load_params(workdir / "diverged")[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))  # the last good weights
    records = json.loads((workdir / "diverged" / "records.json").read_text())
    assert len(records) == 3
    assert all(len(r) == wild.batch_size for r in records.values())
    assert losses(workdir)[-1]["bad"] == 1
    assert writers.read_metrics(workdir / "metrics.jsonl")[-1]["loss"] in ("nan", "inf")


def test_failed_save_is_noticed_and_tried_again(data, tmp_path, monkeypatch, capsys):
    real, broken = checkpoint.Checkpointer.poll, []

    def poll(self):
        real(self)
        if self.latest() == 2 and not broken:
            broken.append(True)
            raise DataError("saving step 4 failed: the disk is full; step 2 is kept")

    monkeypatch.setattr(checkpoint.Checkpointer, "poll", poll)
    loop.run(make(data), tmp_path / "run")
    assert "the disk is full; step 2 is kept; trying once more" in capsys.readouterr().err
    assert saved_states.load_params(tmp_path / "run")[1]["step"] == 6


def test_full_disk_ends_in_one_line(data, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    # Enough for two states of about 2 MB, not for three: old ones go only when the new one is safe.
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount here")
    try:
        flags = ("--config.checkpoint.every.steps=2", "--config.writers=jsonl")
        done = subprocess.run(
            command(data, disk / "run", *flags),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 3, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert "the disk is full" in done.stderr.splitlines()[-1]
        meta = saved_states.load_params(disk / "run")[1]  # the newest that stands is whole
        assert meta["step"] >= 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_dead_reader_process_is_a_fault(data, tmp_path):
    """kill -9 of a reader: exit 70 with its exit code in one line, within five seconds, and no process left."""
    flags = ("data.workers=1", "duration.steps=1000000", "checkpoint.every.steps=1000000")
    p = subprocess.Popen(
        command(data, tmp_path / "run", *(f"--config.{flag}" for flag in flags)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 200
        while len(losses(tmp_path / "run")) < 3 and p.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        workers = [
            int(c) for c in _children(p.pid) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()
        ]
        assert workers
        killed = time.monotonic()
        for w in workers:
            os.kill(w, 9)
        err = p.communicate(timeout=60)[1]
        seconds = time.monotonic() - killed
    finally:
        p.kill()
    assert p.returncode == 70, err
    assert "a data worker process ended with exit code -9 (SIGKILL)" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert seconds < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # of a machine of its own


def _children(pid: int) -> list[str]:
    return [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


# -- what runs beside -----------------------------------------------------------------------------------------------


def test_average_is_exported(data, tmp_path):
    workdir = tmp_path / "run"
    loop.run(make(data, **{"optim.ema_decay": "0.5", "duration.steps": "3"}), workdir)
    mean, plain = (saved_states.load_params(workdir, ema=e)[0] for e in (True, False))
    assert not np.array_equal(mean["vision"]["cls"], plain["vision"]["cls"])
    np.testing.assert_array_equal(
        infer.load(workdir / "model").params["vision"]["cls"], mean["vision"]["cls"]
    )


def test_evaluation_inside_training(data, tmp_path):
    workdir = tmp_path / "run"
    task = {"CT": ["a CT slice"], "Fundus": ["a fundus photograph"]}
    (tmp_path / "modality.json").write_text(json.dumps({"name": "two", "label": "modality", "classes": task,
        "where": {"modality": list(task)}, "version": 1}))  # fmt: skip
    fields = {
        "eval.tasks": f"('{tmp_path / 'modality.json'}',)",
        "eval.every.steps": "2",
        "eval.bootstrap": "20",
    }
    result = loop.run(make(data, **fields, **{"duration.steps": "3"}), workdir)
    scores = [(line["step"], line["eval/two"]) for line in losses(workdir) if "eval/two" in line]
    assert [step for step, _ in scores] == [2, 3]
    assert sorted(p.name for p in (workdir / "eval").iterdir()) == ["step_2", "step_3"]
    saved = json.loads((workdir / "eval" / "step_3" / "results.json").read_text())
    assert (
        saved["tasks"][0]["values"]["balanced_accuracy"]["value"]
        == scores[1][1]
        == result.metrics["eval/two"]
    )
    assert saved["data"]["sources"]["phantom"]["split"] == "test"
    with pytest.raises(UsageError):
        loop.run(make(data, **{"eval.tasks": "('nonsense',)"}), tmp_path / "other")


def test_start_from_a_model(data, whole, tmp_path):
    """`init.model`: with a learning rate of zero the exported weights are those that came in."""
    frozen = make(data, **{"init.model": str(whole / "model"), "optim.lr": "0", "duration.steps": "2"})
    loop.run(frozen, tmp_path / "run")
    files = [(w / "model" / "model.safetensors").read_bytes() for w in (tmp_path / "run", whole)]
    assert files[0] == files[1]


def test_profile(data, tmp_path):
    loop.run(make(data, **{"duration.steps": "4"}), tmp_path / "run", profile=(1, 3))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_nothing_recompiles(data, tmp_path, caplog):
    with jax.log_compiles():
        loop.run(make(data), tmp_path / "run")
    steps = [r.getMessage() for r in caplog.records if "Compiling jit(step)" in r.getMessage()]
    assert len(steps) == 1


# -- small parts ----------------------------------------------------------------------------------------------------


def test_metrics_file_survives_a_cut_and_drops_what_is_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    w = writers.Jsonl(path)
    for step in range(1, 6):
        w.write(step, {"loss": 1.0 / step, "nan": float("nan")})
    w.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert [line["step"] for line in writers.read_metrics(path)] == [1, 2, 3, 4, 5]
    w = writers.Jsonl(path, start_step=3)
    w.write(4, {"loss": 9.0})
    w.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert lines[0]["nan"] == "nan"
    assert not list(tmp_path.glob("*.tmp"))


def test_unknown_writer_and_missing_tensorboard(tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match='Did you mean "jsonl"'):
        writers.open_writers(["jsonn"], tmp_path, 0)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert writers.open_writers(["tensorboard"], tmp_path, 0) == []
    assert "unimed-jax[train]" in capsys.readouterr().err


def test_tensorboard_events(tmp_path):
    (w,) = writers.open_writers(["tensorboard"], tmp_path, 0)
    w.write(1, {"loss": 0.5, "note": "x"})
    w.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_meter_counts_images_and_waiting(cfg, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    m = meter.Meter(cfg=cfg)
    m.restart()
    for _ in range(4):
        m.step(0.1)
    now[0] += 2.0
    read = m.read()
    assert read == pytest.approx({"images_per_s": 32.0, "step_s": 0.5, "data_wait": 0.2})
    assert m.read() == {}


def test_peak_flops_know_the_longest_name():
    assert meter.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert meter.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert meter.peak_flops("TPU v5 lite") == 197e12
    assert meter.peak_flops("cpu") is None


def test_plan_says_what_would_run(data, cfg, tmp_path):
    text_ = loop.run(cfg, tmp_path / "run", dry_run=True).text
    assert "172,929 parameters" in text_
    assert "phantom" in text_
    assert "steps     6, warm-up 4 (66.7%)" in text_
    assert "compiled: arguments" in text_
    assert not (tmp_path / "run").exists()


def test_plan_of_b16_without_data():
    """Parameters and memory of the published size, from shapes alone."""
    text_ = plan.describe(load_config("unimed_b16", {}))
    assert "195,903,489 parameters" in text_
    assert "parameters 0.78 GB, moments 1.57 GB" in text_
    assert "steps     unknown without data" in text_
