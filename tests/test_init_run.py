"""Runs that start from given weights or go on with a given optimizer: what is computed, said and kept."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from training import build_data, leaves, losses

from unimed_jax import config, config_rules
from unimed_jax.cli.train import load_config
from unimed_jax.convert import native, optimizer
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip
from unimed_jax.train import assemble, checkpoint, loop, optim, saved_states

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "root")


def make(data: Path, **overrides: str) -> config.Train:
    fields = {
        "data.root": str(data),
        "duration.steps": "6",
        "checkpoint.every.steps": "3",
        "writers": "('jsonl',)",
        "model.text.dropout": "0.0",
    }
    return load_config("phantom_tiny", fields | overrides)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An undisturbed run of six steps with a state after the third."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.run(make(data), workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(data, whole, tmp_path_factory) -> Path:
    """Weights and moments of its third step as a model folder."""
    out = tmp_path_factory.mktemp("model")
    cfg = make(data)
    parts = assemble.assemble(cfg)
    with checkpoint.Checkpointer(whole / "checkpoints") as saved:
        newest = saved.folder / "6"
        newest.rename(saved.folder.parent / "aside")
        try:
            state, meta = saved.restore(parts.state)
        finally:
            (saved.folder.parent / "aside").rename(newest)
    assert meta["step"] == 3
    mu, nu, count = optim.moments(state["opt"])
    flat = lambda tree: {k: np.asarray(v) for k, v in clip.flatten(tree).items()}.items
    moments = optimizer.Moments(
        first=flat(mu), second=flat(nu), step=int(count), settings={"b2": 0.95, "lr": 1.0}
    )
    optimizer.save(out / optimizer.FILE, moments, cfg.model)
    native.save_tower(jax.tree.map(np.asarray, state["params"]), out / "model.safetensors")
    return out


def test_a_run_goes_on_bit_for_bit_from_a_folder_with_moments(data, whole, folder, tmp_path, capsys):
    """Weights, moments, bias correction, schedule and position in the data: all continue."""
    workdir = tmp_path / "run"
    result = loop.run(make(data, **{"init.model": str(folder), "init.optimizer": "True"}), workdir)
    assert (result.status, result.step) == ("finished", 6)
    assert leaves(workdir) == leaves(whole)
    assert losses(workdir) == [line for line in losses(whole) if line["step"] > 3]
    said = capsys.readouterr().err
    assert f"Adam's moments after 3 updates, loaded from {folder}" in said
    assert "b2 was 0.95, is 0.98" in said
    kept = json.loads((workdir / "init.json").read_text())
    assert f"vision/cls [64]: loaded from {folder}" in kept
    assert len(kept) == len(clip.flatten(clip.skeleton(make(data).model)[1])) + 2


def test_without_the_moments_it_is_another_run(data, whole, folder, tmp_path):
    workdir = tmp_path / "run"
    loop.run(make(data, **{"init.model": str(folder), "duration.steps": "3"}), workdir)
    assert losses(workdir)[0]["step"] == 1
    assert losses(workdir)[-1]["loss"] != losses(whole)[-1]["loss"]


def test_moments_of_trainable_parameters_only(data, folder):
    cfg = make(
        data, **{"init.model": str(folder), "init.optimizer": "True", "optim.freeze": "('vision/.*',)"}
    )
    state = assemble.first_state(assemble.assemble(cfg))
    mu, _, count = optim.moments(state["opt"])
    assert "vision" not in mu
    saved = dict(optimizer.load(folder / optimizer.FILE).first())
    np.testing.assert_array_equal(mu["text"]["word"], saved["text/word"])
    assert int(count) == int(state["step"]) == 3


def test_wrong_requests_are_refused(data, whole, folder, tmp_path):
    with pytest.raises(UsageError, match=r"init\.optimizer needs init\.model"):
        config_rules.validate(make(data, **{"init.optimizer": "True"}))
    with pytest.raises(UsageError, match=r"init\.resize is 'nearest'"):
        config_rules.validate(make(data, **{"init.resize": "nearest"}))
    go_on = {"init.model": str(folder), "init.optimizer": "True"}
    with pytest.raises(DataError, match="has done 3 steps, the duration is 3"):
        loop.run(make(data, **go_on, **{"duration.steps": "3"}), tmp_path / "a")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="weights only, no optimizer state"):
        loop.run(make(data, **go_on | {"init.model": str(tmp_path / "bare")}), tmp_path / "b")


def test_the_plan_says_what_a_run_starts_from(data, folder):
    text = loop.run(make(data), "unused", dry_run=True).text
    assert "start     at random" in text
    tower = {"init.vision": str(folder), "init.logit_scale": str(folder)}
    text = loop.run(make(data, **tower), "unused", dry_run=True).text
    assert f"start     logit_scale: loaded from {folder}" in text
    assert f"leaves, 82,688 parameters: loaded from {folder}" in text
    assert "parameters: initialised" in text
    assert "left out (not asked for)" in text


def test_a_run_or_one_of_its_states_is_a_beginning(data, whole, tmp_path):
    """RUN gives its final model, RUN@STEP a saved state; neither gives moments."""
    abstract = clip.skeleton(make(data).model)[1]
    fresh = clip.init(make(data).model, jax.random.key(1))

    def begin(path: str, **more: str):
        return clip.flatten(native.init_from(make(data, **{"init.model": path} | more), fresh))

    for path, step in ((f"{whole}@3", 3), (f"{whole}@6", 6), (str(whole), 6)):
        wanted = clip.flatten(saved_states.load_params(whole, step=step)[0])
        got = begin(path)
        assert got.keys() == wanted.keys() == clip.flatten(abstract).keys()
        for k, v in wanted.items():
            np.testing.assert_array_equal(got[k], v, err_msg=k)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "checkpoints").symlink_to(whole / "checkpoints")
    np.testing.assert_array_equal(begin(str(unfinished))["text/word"], begin(str(whole))["text/word"])
    with pytest.raises(DataError, match="no checkpoint of step 4"):
        begin(f"{whole}@4")
    cfg = make(data, **{"init.model": f"{whole}@3", "init.optimizer": "True"})
    with pytest.raises(DataError, match="is a run: its moments stay with it"):
        native.init_moments(cfg)
    for path in (f"{whole}@3", str(whole)):
        for part in ("model", "text"):
            cfg = make(data, **{f"init.{part}": path})
            native.refuse_other_tokenizer(cfg, assemble.load_tokenizer(data / "tokenizer.json").digest)
            with pytest.raises(DataError, match="was trained with another tokenizer"):
                native.refuse_other_tokenizer(cfg, "0" * 64)
    native.refuse_other_tokenizer(
        make(data, **{"init.model": f"{whole}@4"}), "0" * 64
    )  # gone: for a resumed run
