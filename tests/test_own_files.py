"""Our own files as they may come from elsewhere: whatever they say is read, or refused in one printable line."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from safetensors.numpy import save_file

from unimed_jax import config, conversion, model_folder
from unimed_jax.convert import native, optimizer, source, tensor_file
from unimed_jax.errors import DataError

_ESCAPE = "\x1b[2J"


def one_printable_line(error: pytest.ExceptionInfo) -> None:
    line = error.value.line()
    assert line.isprintable()
    assert len(line) < 2500


def reads_or_refuses(act: Callable[[], object]) -> None:
    """Runs it; a refusal is one printable line of bounded length."""
    try:
        act()
    except DataError as e:
        line = e.line()
    else:
        return
    assert line.isprintable(), line
    assert len(line) < 2500, line


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory):
    """A vision tower's leaves and the header that says what they are."""
    m = small_model.model()
    file = tmp_path_factory.mktemp("tower") / "v.safetensors"
    native.save_tower(
        {"vision": small_model.params(m)["vision"]}, file, {"vision": config.to_dict(m.vision), "origin": {}}
    )
    opened = tensor_file.open_safetensors(file)
    return {k: np.array(v) for k, v in opened.items()}, opened.metadata


@pytest.mark.parametrize(
    "meta",
    [
        "[" * 100_000,
        "{",
        "[1]",
        '{"n": ' + "9" * 5000 + "}",
        '{"vision": 5}',
        '{"vision": {"evil": 1}}',
        '{"vision": {"heads": [1]}}',
        '{"vision": {"ln_eps": "' + _ESCAPE * 900 + '"}}',
        '{"vision": {"ln_eps": 1' + "0" * 400 + "}}",
        '{"vision": {"' + _ESCAPE * 900 + '": 1}}',
    ],
    ids=lambda meta: meta[:24].replace("\x1b", "ESC"),
)
def test_a_tower_files_header_of_any_content_is_refused_in_one_line(tower_file, tmp_path, meta):
    leaves, header = tower_file
    save_file(leaves, tmp_path / "v.safetensors", header | {"meta": meta.replace("\x1b", "\\u001b")})
    for read in (source.open_source, native.load_tower):
        with pytest.raises(DataError) as error:
            read(tmp_path / "v.safetensors")
        one_printable_line(error)


def test_a_tower_files_header_tells_settings_and_nothing_else(tower_file, tmp_path):
    leaves, header = tower_file
    meta = json.loads(header["meta"]) | {"assumed": {_ESCAPE: _ESCAPE}, "left_out": 5, "note": "x" * 9000}
    save_file(leaves, tmp_path / "v.safetensors", header | {"meta": json.dumps(meta)})
    opened = source.open_source(tmp_path / "v.safetensors")
    assert opened.facts == {}
    assert opened.model.vision == small_model.model().vision


@pytest.mark.parametrize("key", [5, None, 1.5, b"x"])
def test_an_embedded_architecture_with_keys_of_any_type_is_refused(key):
    with pytest.raises(DataError, match="has no field"):
        source._embedded({key: 1}, "w.pt")


def test_names_in_our_own_files_are_one_bounded_line(tower_file, tmp_path):
    leaves, header = tower_file
    cfg = config.Train()
    cfg.model = small_model.model()
    cfg.init.vision = str(tmp_path / "v.safetensors")
    params = small_model.params(cfg.model)
    extra = np.zeros(1, np.float32)
    lines: list[str] = []
    save_file(leaves | {f"{_ESCAPE * 200}/a": extra}, cfg.init.vision, header)
    native.init_from(cfg, params, report=lines.append)
    assert any("x1b" in line for line in lines)
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    save_file(leaves | {f"vision/{_ESCAPE * 200}": extra}, cfg.init.vision, header)
    with pytest.raises(DataError, match="1 unexpected") as error:
        native.init_from(cfg, params)
    one_printable_line(error)
    save_file(leaves, cfg.init.vision, {"format": "x" * 5000 + _ESCAPE})
    with pytest.raises(DataError, match="no tower file") as error:
        native.load_tower(cfg.init.vision)
    one_printable_line(error)


# -- model folders ----------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (5, _ESCAPE, [1], {"a": 1}, None, 10**400, "x" * 3000)
ORIGIN = {
    "file": "w.pt",
    "licence": "MIT",
    "steps": 3,
    "note": ["from there"],
    "files": {"weights": {"repo": "r", "name": "n", "revision": "v", "sha256": "s"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    return small_model.loaded(place).save(place / "model", extra={"origin": ORIGIN, "run": "a", "steps": 7})


def damaged(spec: dict[str, Any], parts: tuple[str, ...]) -> list[dict[str, Any]]:
    """The config with every value at every place below some of its parts."""
    found = []

    def walk(table: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, inside in table.items():
            here = (*path, key)
            if here[0] in parts:
                for value in VALUES:
                    other = copy.deepcopy(spec)
                    at = other
                    for k in path:
                        at = at[k]
                    at[key] = value
                    found.append(other)
            if isinstance(inside, dict):
                walk(inside, here)

    walk(spec, ())
    return found


def test_any_value_in_a_model_folders_config_is_read_or_refused_in_one_line(folder, tmp_path):
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    spec = json.loads((copied / "config.json").read_text())
    specs = damaged(spec, ("format", "version", "model", "tokenizer"))
    assert len(specs) > 250
    for other in specs:
        (copied / "config.json").write_text(json.dumps(other))
        reads_or_refuses(lambda: model_folder.read_tokenizer(copied))  # reads the config, and no weights
    cfg = config.Train()
    cfg.model, cfg.init.text = small_model.model(), str(copied)
    params = small_model.params(cfg.model)
    for other in damaged(spec, ("model", "tokenizer"))[::3]:
        (copied / "config.json").write_text(json.dumps(other))
        for start in (
            lambda: native.init_from(cfg, params),
            lambda: native.refuse_other_tokenizer(cfg, spec["tokenizer"]["digest"]),
        ):
            reads_or_refuses(start)
    for part in ("weights", "tokenizer"):
        for value in (5, "abc", [1], {"sha256": 5}):
            (copied / "config.json").write_text(json.dumps(spec | {part: value}))
            with pytest.raises(DataError, match=f"{part} .* has no readable"):
                model_folder.verify(copied)


def test_an_origin_of_any_content_is_told_on_short_lines_and_goes_along(folder, tmp_path):
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    spec = json.loads((copied / "config.json").read_text())
    specs = damaged(spec, ("extra",))
    assert len(specs) > 80
    for other in specs:
        (copied / "config.json").write_text(json.dumps(other))
        assert all(x.isprintable() and len(x) < 1000 for x in model_folder.describe_origin(copied))
        found = conversion._own_origin(conversion.Request(src=copied, dst=tmp_path / "x"))
        assert "converted from the model folder or run m" in found.note
        model_folder._card(small_model.model(), None, {"origin": dataclasses.asdict(found)}, "p")
    assert model_folder.describe_origin(folder)[0] == "hub: r n at v, sha256 s"
    found = conversion._own_origin(conversion.Request(src=folder, dst=tmp_path / "x"))
    assert (found.licence, found.run, found.steps, found.note[0]) == ("MIT", "a", 3, "from there")


def test_names_of_a_model_folders_weights_are_one_bounded_line(folder, tmp_path):
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    opened = tensor_file.open_safetensors(copied / "model.safetensors")
    leaves = {k: np.array(v) for k, v in opened.items()}
    save_file(leaves | {_ESCAPE * 500: np.zeros(1, np.float32)}, copied / "model.safetensors")
    with pytest.raises(DataError, match="1 unexpected") as error:
        model_folder.read(copied)
    one_printable_line(error)


@pytest.mark.parametrize("step", ["", "\u00b2", "-1", "9" * 5000, _ESCAPE])
@pytest.mark.parametrize(
    "settings", ["{}", "5", "{", "[" * 100_000, '{"lr": "x"}', '{"lr": 1' + "0" * 400 + "}"]
)
def test_moments_say_readable_things_or_are_refused(tmp_path, step, settings):
    leaf = {"mu/a": np.zeros(1, np.float32), "nu/a": np.zeros(1, np.float32)}
    header = {"format": optimizer.FORMAT, "version": "1", "settings": settings}
    for number in (step, "7"):
        save_file(leaf, tmp_path / "o.safetensors", header | {"step": number})
        if number == "7" and settings == "{}":
            assert optimizer.load(tmp_path / "o.safetensors").step == 7
            continue
        with pytest.raises(DataError) as error:
            optimizer.load(tmp_path / "o.safetensors")
        one_printable_line(error)
