"""`unimed-jax convert`, end to end on small models: every route, bit for bit, proof against PyTorch, and refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
import training

import unimed_jax
from unimed_jax import config, conversion, model_folder
from unimed_jax.cli import main
from unimed_jax.conversion import Request, convert
from unimed_jax.convert import optimizer, outputs, source, verify
from unimed_jax.convert.tensor_file import open_safetensors
from unimed_jax.data.files import file_sha256
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A model folder of UniMed-CLIP's shape, small."""
    folder = tmp_path_factory.mktemp("native")
    # Heads of 64, as the original's vision towers have.
    return small_model.loaded(folder, cfg=small_model.model(vision__heads=1)).save(folder / "model")


@pytest.fixture(scope="module")
def clip_like(tmp_path_factory) -> Path:
    """A model folder whose text tower is OpenAI's kind; without tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tower = small_model.clip_text(16, vocab_size=99, width=64, depth=2, heads=4, mlp_dim=128)
    m = small_model.model(text=tower)
    return model_folder.save(folder / "model", m, small_model.params(m), None)


def same_bits(one: Path, other: Path) -> None:
    a, b = (open_safetensors(p / "model.safetensors") for p in (one, other))
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        assert np.array_equal(a[name].view(np.uint32), b[name].view(np.uint32)), name


def test_openclip_and_back_with_proof(native, tmp_path):
    there = convert(Request(src=native, dst=tmp_path / "oc", to="openclip", verify=True))
    assert set(there.verified) == {"vision", "text"}
    assert max(there.verified.values()) < 1e-5
    assert (tmp_path / "oc" / "README.md").read_text().startswith("# tiny\n")
    back = convert(Request(src=tmp_path / "oc", dst=tmp_path / "back", verify=True))
    assert max(back.verified.values()) < 1e-5
    assert not back.missing
    same_bits(native, tmp_path / "back")
    one, other = unimed_jax.load(native), unimed_jax.load(tmp_path / "back")
    assert one.tokenizer.digest == other.tokenizer.digest
    assert np.array_equal(one.encode_text(["a chest x-ray"]), other.encode_text(["a chest x-ray"]))


def test_unimed_file_and_back(native, tmp_path):
    file = tmp_path / "w.pt"
    assert convert(Request(src=native, dst=file, to="unimed", verify=True)).wrote == [
        file,
        tmp_path / "w.pt.md",
    ]
    loaded = torch.load(file, weights_only=True)
    assert {"epoch", "name", "state_dict"} <= set(loaded)
    assert "text_encoder.proj.2.weight" in loaded["state_dict"]
    done = convert(Request(src=file, dst=tmp_path / "bare"))
    assert done.missing == [f"no tokenizer, so only images can be encoded: {model_folder.NO_TOKENIZER}"]
    same_bits(native, tmp_path / "bare")
    convert(Request(src=file, dst=tmp_path / "whole", tokenizer=native, verify=True))
    same_bits(native, tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Checked at conversion" in card
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["extra"]["origin"]["sha256"] in card


def test_without_a_tokenizer_images_work_and_texts_say_what_is_missing(native, tmp_path, capsys):
    convert(Request(src=native, dst=tmp_path / "w.pt", to="unimed"))
    convert(Request(src=tmp_path / "w.pt", dst=tmp_path / "bare"))
    model = unimed_jax.load(tmp_path / "bare")
    assert np.array_equal(
        model.encode_image(small_model.pictures(2)),
        unimed_jax.load(native).encode_image(small_model.pictures(2)),
    )
    with pytest.raises(UsageError, match="has no tokenizer, so it encodes images only"):
        model.encode_text(["a chest x-ray"])
    with pytest.raises(DataError, match="holds no tokenizer"):
        unimed_jax.get_tokenizer(tmp_path / "bare")
    assert main.dispatch(["models", "check", str(tmp_path / "bare")]) == 0
    # The folder heals: the same weights, with words.
    convert(Request(src=tmp_path / "bare", dst=tmp_path / "healed", tokenizer=native))
    same_bits(native, tmp_path / "healed")
    assert unimed_jax.load(tmp_path / "healed").encode_text(["a chest x-ray"]).shape == (1, 32)
    capsys.readouterr()


def test_load_takes_foreign_files_and_folders(native, tmp_path):
    convert(Request(src=native, dst=tmp_path / "w.pt", to="unimed"))
    convert(Request(src=native, dst=tmp_path / "oc", to="openclip"))
    want = unimed_jax.load(native).digest
    assert unimed_jax.load(tmp_path / "w.pt").digest == want
    found = unimed_jax.load(tmp_path / "oc")
    assert found.digest == want
    assert found.tokenizer is not None


def test_vision_alone(native, tmp_path):
    lines: list[str] = []
    there = convert(Request(src=native, dst=tmp_path / "v", to="hf-vision", verify=True), lines.append)
    assert list(there.verified) == ["vision"]
    assert "left    out: text, logit_scale, which the format hf-vision cannot hold" in lines
    with pytest.raises(UsageError, match="holds the vision tower alone"):
        convert(Request(src=tmp_path / "v", dst=tmp_path / "x"))
    with pytest.raises(UsageError, match="wants a whole model"):
        convert(Request(src=tmp_path / "v", dst=tmp_path / "x", to="openclip"))
    with pytest.raises(UsageError, match=r"--config.init.vision="):
        unimed_jax.load(tmp_path / "v")
    tower = tmp_path / "vision.safetensors"
    convert(Request(src=tmp_path / "v", dst=tower, verify=True))
    assert not (tmp_path / "x").exists()
    ours = model_folder.read(native)[1]["vision"]
    theirs = source.open_source(tower).params()["vision"]
    for name, leaf in clip.flatten(ours).items():
        assert np.array_equal(leaf, clip.flatten(theirs)[name]), name
    lines.clear()
    convert(Request(src=tmp_path / "v", dst=tmp_path / "v2", to="hf-vision"), lines.append)
    assert not [line for line in lines if line.startswith("left")]
    assert (tmp_path / "v2" / "config.json").read_text() == (tmp_path / "v" / "config.json").read_text()


def test_clip_text_towers(clip_like, tmp_path):
    done = convert(Request(src=clip_like, dst=tmp_path / "hf", to="hf-clip", verify=True))
    assert max(done.verified.values()) < 1e-5
    convert(Request(src=tmp_path / "hf", dst=tmp_path / "back", verify=True))
    same_bits(clip_like, tmp_path / "back")
    done = convert(Request(src=clip_like, dst=tmp_path / "oc", to="openclip", verify=True))
    assert max(done.verified.values()) < 1e-5
    convert(Request(src=tmp_path / "oc", dst=tmp_path / "again"))
    same_bits(clip_like, tmp_path / "again")


def test_a_bare_state_dict_asks_for_what_it_cannot_show(clip_like, tmp_path):
    convert(Request(src=clip_like, dst=tmp_path / "oc", to="openclip"))
    state = {k: torch.from_numpy(np.array(v)) for k, v in source.open_source(tmp_path / "oc").state.items()}
    torch.save({"module." + k: v for k, v in state.items()}, tmp_path / "bare.pt")
    with pytest.raises(UsageError, match="act"):
        convert(Request(src=tmp_path / "bare.pt", dst=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_averaged_weights_of_a_run(tmp_path):
    data = training.build_data(tmp_path / "data", n=60)
    flags = ("--config.duration.steps=4", "--config.optim.warmup.steps=1", "--config.optim.ema_decay=0.5")
    training.train(data, tmp_path / "run", *flags)
    convert(Request(src=tmp_path / "run", dst=tmp_path / "ema", ema=True))
    convert(Request(src=tmp_path / "run", dst=tmp_path / "plain", ema=False))
    convert(Request(src=f"{tmp_path / 'run'}@4", dst=tmp_path / "step"))
    same_bits(tmp_path / "ema", tmp_path / "run" / "model")
    same_bits(tmp_path / "ema", tmp_path / "step")
    with pytest.raises(AssertionError):
        same_bits(tmp_path / "ema", tmp_path / "plain")
    with pytest.raises(UsageError, match="says itself what it is"):
        convert(Request(src=tmp_path / "run", dst=tmp_path / "x", with_optimizer=True))
    for kind in (True, False):
        with pytest.raises(UsageError, match="its weights are one kind"):
            convert(Request(src=tmp_path / "run" / "model", dst=tmp_path / "x", ema=kind))
    for lost in (tmp_path / "run" / "tokenizer.json", *data.rglob("tokenizer.json")):
        lost.unlink(missing_ok=True)
    with pytest.raises(DataError, match="holds no tokenizer"):
        convert(Request(src=f"{tmp_path / 'run'}@4", dst=tmp_path / "x"))
    words = tmp_path / "ema" / "tokenizer.json"
    convert(Request(src=f"{tmp_path / 'run'}@4", dst=tmp_path / "given", tokenizer=words))
    same_bits(tmp_path / "given", tmp_path / "step")
    other = json.loads(words.read_text())
    vocabulary = other["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary |= {one: vocabulary[two], two: vocabulary[one]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="tokenizer"):  # the run says which one it was trained with
        convert(Request(src=f"{tmp_path / 'run'}@4", dst=tmp_path / "x", tokenizer=tmp_path / "other.json"))


def test_outputs_that_differ_write_nothing(native, tmp_path, monkeypatch):
    convert(Request(src=native, dst=tmp_path / "oc", to="openclip"))
    right = source.Source.params

    def wrong(self):
        params = right(self)
        kernel = params["vision"]["blocks"]["attn"]["out"]["kernel"]
        params["vision"]["blocks"]["attn"]["out"]["kernel"] = kernel.transpose(
            0, 2, 1
        )  # square: no shape is wrong
        return params

    monkeypatch.setattr(source.Source, "params", wrong)
    with pytest.raises(DataError, match=r"differ from PyTorch's by more than 0.0001: vision"):
        convert(Request(src=tmp_path / "oc", dst=tmp_path / "x", verify=True))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["openclip", "unimed"])
def test_a_written_file_that_differs_never_appears_and_the_old_one_stays(native, tmp_path, monkeypatch, to):
    dst = tmp_path / "out"
    monkeypatch.setattr(verify, "LIMIT", 0.0)
    with pytest.raises(DataError, match="differ from PyTorch"):
        convert(Request(src=native, dst=dst, to=to, verify=True))
    assert list(tmp_path.iterdir()) == []
    convert(Request(src=native, dst=dst, to=to))
    before = contents(tmp_path)
    with pytest.raises(DataError, match="differ from PyTorch"):
        convert(Request(src=native, dst=dst, to=to, verify=True, force=True))
    monkeypatch.setattr(conversion.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="needs torch"):
        convert(Request(src=native, dst=dst, to=to, verify=True, force=True))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["native", "openclip", "unimed"])
def test_the_old_target_comes_back_when_the_last_rename_fails(native, tmp_path, monkeypatch, to):
    dst = tmp_path / "out"
    first = convert(Request(src=native, dst=dst, to=to)).wrote
    before = contents(tmp_path)
    rename = os.replace

    def fails_once(src, target):
        if Path(target) == dst and ".new" in Path(src).name:
            raise OSError(28, "No space left on device")
        rename(src, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(DataError, match="No space left"):
        convert(Request(src=native, dst=dst, to=to, force=True))
    assert contents(tmp_path) == before
    assert first[0] == dst


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_force_deletes_only_what_a_conversion_wrote(native, tmp_path):
    convert(Request(src=native, dst=tmp_path / "w.pt", to="unimed"))
    run = tmp_path / "run"
    (run / "checkpoints" / "5").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    hold = tmp_path / "hold"
    hold.mkdir()
    shutil.copy(tmp_path / "w.pt", hold)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="holds 'checkpoints'"):
        convert(Request(src=tmp_path / "w.pt", dst=run, force=True))
    for to in ("native", "openclip"):
        with pytest.raises(UsageError, match="would be overwritten"):
            convert(Request(src=hold / "w.pt", dst=hold, to=to, force=True))
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        convert(Request(src=tmp_path / "w.pt", dst=tmp_path / "f.txt", force=True))
    (tmp_path / "f.txt").unlink()
    assert contents(tmp_path) == before


def test_no_part_of_the_source_is_overwritten(native, tmp_path):
    vision, whole = tmp_path / "vision", tmp_path / "oc"
    convert(Request(src=native, dst=vision, to="hf-vision"))
    convert(Request(src=native, dst=whole, to="openclip"))
    run = tmp_path / "run"
    shutil.copytree(native, run / "model")
    links, blobs = tmp_path / "links", tmp_path / "blobs"  # as the hub's cache lies on the disk
    blobs.mkdir()
    shutil.copytree(vision, links)
    os.replace(links / "model.safetensors", blobs / "abc")
    (links / "model.safetensors").symlink_to(blobs / "abc")
    before = contents(tmp_path)
    for src, dst, to in (
        (vision, vision / "model.safetensors", "native"),
        (whole, whole / "open_clip_model.safetensors", "unimed"),
        (run, run / "model", "native"),
        (f"{run}@5", run / "model", "native"),
        (links / "model.safetensors", links, "hf-vision"),
    ):
        with pytest.raises(UsageError, match="would be overwritten"):
            convert(Request(src=src, dst=dst, to=to, force=True))
    assert contents(tmp_path) == before
    convert(Request(src=whole, dst=whole / "native"))  # a new folder below it takes nothing away
    convert(Request(src=whole, dst=whole / "native", force=True))
    convert(Request(src=run, dst=run / "w.pt", to="unimed"))  # nor does a file that is never read there
    convert(Request(src=run, dst=run / "w.pt", to="unimed", force=True))


def test_folders_that_no_conversion_may_replace(native, tmp_path, monkeypatch):
    convert(Request(src=native, dst=tmp_path / "vision", to="hf-vision"))
    full = tmp_path / "full.safetensors"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "empty")
    for src, dst, why in (
        (tmp_path / "vision", full, "holds 'notes.txt'"),
        (native, tmp_path / "link", "is a link"),
        (native, Path("."), "is no name of a folder"),
    ):
        with pytest.raises(UsageError, match=why):
            convert(Request(src=src, dst=dst, force=True))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["native", "openclip", "unimed"])
def test_what_appears_while_a_conversion_runs_stays(native, tmp_path, monkeypatch, to):
    dst = tmp_path / "out"
    sync = os.fsync

    def somebody_else_writes(fd):
        dst.mkdir(exist_ok=True)
        (dst / "theirs.txt").write_text("x")
        sync(fd)

    if to == "unimed":
        real = torch.save
        monkeypatch.setattr(torch, "save", lambda *a: (dst.write_text("theirs"), real(*a)))
    else:
        monkeypatch.setattr(os, "fsync", somebody_else_writes)
    with pytest.raises(UsageError, match="exists"):
        convert(Request(src=native, dst=dst, to=to))
    kept = {"out": b"theirs"} if to == "unimed" else {"out/theirs.txt": b"x"}
    assert contents(tmp_path).items() >= kept.items()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_no_card_appears_for_a_file_that_is_not_on_the_disk(native, tmp_path, monkeypatch):
    real = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"v\.pt cannot be written: No space left"):
        convert(Request(src=native, dst=tmp_path / "v.pt", to="unimed"))
    assert not list(tmp_path.iterdir())


def test_the_card_beside_a_file_overwrites_nothing_unasked(native, tmp_path):
    (tmp_path / "w.pt.md").write_text("my notes")
    with pytest.raises(UsageError, match=r"w.pt.md exists"):
        convert(Request(src=native, dst=tmp_path / "w.pt", to="unimed"))
    assert contents(tmp_path) == {"w.pt.md": b"my notes"}
    (tmp_path / "v.pt.md").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        convert(Request(src=native, dst=tmp_path / "v.pt", to="unimed", force=True))
    assert not (tmp_path / "v.pt").exists()


def test_what_is_left_out_is_said_and_moments_and_origin_go_along(native, tmp_path):
    m, params, _ = model_folder.read(native)
    state = {k: torch.from_numpy(np.array(v)) for k, v in outputs.tensors("unimed", params, m)}
    state = {n: state[n] for n in optimizer.module_order(state)}
    names = list(state)
    plain = [i for i, n in enumerate(names) if state[n].ndim < 2]
    group = lambda ids, decay: {
        "lr": 1e-3,
        "betas": (0.9, 0.98),
        "eps": 1e-6,
        "weight_decay": decay,
        "params": ids,
        "amsgrad": False,
        "maximize": False,
    }
    order = plain + [i for i in range(len(names)) if i not in plain]
    body = {
        "epoch": 3,
        "state_dict": state,
        "unimed_jax": {"model": config.to_dict(m)},
        "scaler": {"scale": 1.0},
        "state_dict_ema": {"x": torch.zeros(2)},
        "optimizer": {
            "state": {
                n: {
                    "step": torch.tensor(7.0),
                    "exp_avg": state[names[i]] * 0,
                    "exp_avg_sq": state[names[i]] * 0,
                }
                for n, i in enumerate(order)
            },
            "param_groups": [
                group(list(range(len(plain))), 0.0),
                group(list(range(len(plain), len(names))), 0.2),
            ],
        },
    }
    torch.save(body, tmp_path / "train.pt")
    lines: list[str] = []
    request = Request(src=tmp_path / "train.pt", dst=tmp_path / "a", tokenizer=native)
    convert(request, lines.append)
    left = [line for line in lines if line.startswith("left")]
    assert left == [
        "left    out: scaler, state_dict_ema",
        "left    out: the optimizer's state; --with-optimizer brings it",
    ]
    convert(dataclasses.replace(request, dst=tmp_path / "b", with_optimizer=True))
    convert(Request(src=tmp_path / "b", dst=tmp_path / "c"))
    assert (tmp_path / "c" / "optimizer.safetensors").is_file()
    assert optimizer.load(tmp_path / "c" / "optimizer.safetensors").step == 7
    spec = json.loads((tmp_path / "c" / "config.json").read_text())["extra"]["origin"]
    assert (
        spec["sha256"]
        == json.loads((tmp_path / "b" / "config.json").read_text())["extra"]["origin"]["sha256"]
    )
    assert spec["file"] == "train.pt"
    assert "converted from the model folder or run b" in (tmp_path / "c" / "README.md").read_text()
    lines.clear()
    convert(Request(src=tmp_path / "c", dst=tmp_path / "oc", to="openclip"), lines.append)
    assert "left    out: optimizer.safetensors, which the format openclip cannot hold" in lines


def test_a_foreign_folder_is_loaded_with_a_tokenizer_that_fits_or_not_at_all(native, tmp_path):
    convert(Request(src=native, dst=tmp_path / "oc", to="openclip"))
    words = json.loads((tmp_path / "oc" / "tokenizer.json").read_text())
    words["model"]["vocab"]["zebra"] = 240  # a gap: 201 words, numbers up to 240
    for number, fits in ((200, True), (5000, False)):
        words["model"]["vocab"]["zebra"] = number
        (tmp_path / "oc" / "tokenizer.json").write_text(json.dumps(words))
        if fits:
            assert unimed_jax.load(tmp_path / "oc").tokenizer is not None
            continue
        for act in (unimed_jax.load, lambda p: convert(Request(src=p, dst=tmp_path / "x"))):
            with pytest.raises(DataError, match="tokens, the model 256"):
                act(tmp_path / "oc")
    assert not (tmp_path / "x").exists()


def test_sharded_torch_folders_and_lone_files_are_found(clip_like, tmp_path):
    convert(Request(src=clip_like, dst=tmp_path / "hf", to="hf-clip"))
    state = {
        k: torch.from_numpy(np.array(v))
        for k, v in open_safetensors(tmp_path / "hf" / "model.safetensors").items()
    }
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, some in shards.items():
        torch.save({n: state[n] for n in some}, tmp_path / "hf" / file)
    index = {"metadata": {}, "weight_map": {n: file for file, some in shards.items() for n in some}}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert unimed_jax.load(tmp_path / "hf").digest == unimed_jax.load(clip_like).digest
    convert(Request(src=tmp_path / "hf", dst=tmp_path / "back"))
    same_bits(clip_like, tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    for file in shards:
        assert f"sha256 of {file}: {file_sha256(tmp_path / 'hf' / file)}" in card
    assert "sha256 of the file" not in card  # that of the index would say nothing
    one = tmp_path / "one"  # of a single file, too
    shutil.copytree(tmp_path / "hf", one, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    torch.save(state, one / "pytorch_model-1.bin")
    index["weight_map"] = dict.fromkeys(names, "pytorch_model-1.bin")
    (one / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(Request(src=one, dst=tmp_path / "back1"))
    card = (tmp_path / "back1" / "README.md").read_text()
    assert f"sha256 of pytorch_model-1.bin: {file_sha256(one / 'pytorch_model-1.bin')}" in card
    assert "sha256 of the file" not in card


def test_a_deep_config_is_refused_in_one_line(native, tmp_path):
    shutil.copytree(native, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(DataError) as refusal:
        unimed_jax.load(tmp_path / "m")
    assert "no readable JSON" in refusal.value.line()
    assert "\n" not in refusal.value.line()


def test_a_name_on_the_hub_goes_with_one_format(native, tmp_path):
    with pytest.raises(UsageError, match="--hf-text-name goes with --to openclip"):
        convert(Request(src=native, dst=tmp_path / "x", hf_text="some/bert"))


def test_the_limit_does_not_grow_with_the_embeddings():
    d = verify.Difference(tower="vision", value=2e-4, scale=1000.0, n=4)
    assert not d.ok
    assert dataclasses.replace(d, value=9e-5).ok
    assert not dataclasses.replace(d, value=float("nan")).ok


def test_towers_that_say_another_embedding_width_than_the_whole(clip_like, tmp_path):
    """As transformers writes a CLIPModel whose tower configs keep their default of 512."""
    convert(Request(src=clip_like, dst=tmp_path / "hf", to="hf-clip"))
    spec = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert spec["projection_dim"] != 512
    for tower in ("vision_config", "text_config"):
        spec[tower]["projection_dim"] = 512
    (tmp_path / "hf" / "config.json").write_text(json.dumps(spec))
    done = convert(Request(src=tmp_path / "hf", dst=tmp_path / "back", verify=True))
    assert set(done.verified) == {"vision", "text"}
    assert max(done.verified.values()) < 1e-5


def test_the_very_file_is_compared(clip_like, tmp_path):
    """Beside it lies another, which transformers would take."""
    folder = tmp_path / "hf"
    convert(Request(src=clip_like, dst=folder, to="hf-clip"))
    state = {
        k: torch.from_numpy(np.array(v)) for k, v in open_safetensors(folder / "model.safetensors").items()
    }
    torch.save({k: v * 0.5 if v.ndim > 1 else v for k, v in state.items()}, folder / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "model.safetensors"):
        done = convert(Request(src=folder / name, dst=tmp_path / name / "out", verify=True))
        assert max(done.verified.values()) < 1e-5, name


def test_faults_of_a_file_are_all_listed_and_nothing_is_written(native, tmp_path):
    state = dict(outputs.tensors("unimed", *reversed(model_folder.read(native)[:2])))
    state = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    said = {
        "model": config.to_dict(model_folder.read(native)[0])
    }  # the number of heads, which no shape shows
    del state["visual.ln_post.bias"]
    state["visual.extra.weight"] = torch.zeros(3)
    state["text_encoder.proj.0.weight"][0, 0] = torch.nan
    torch.save({"state_dict": state, "unimed_jax": said}, tmp_path / "w.pt")
    with pytest.raises(DataError) as refusal:
        convert(Request(src=tmp_path / "w.pt", dst=tmp_path / "x"))
    for word in (
        "missing",
        "visual.ln_post.bias",
        "unexpected",
        "visual.extra.weight",
        "not finite",
        "proj.0",
    ):
        assert word in refusal.value.cause, refusal.value.cause
    assert "\n" not in refusal.value.line()
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"to": "opencli"}, 'Did you mean "openclip"'),
        ({"to": "hf-clip"}, "its text tower is OpenAI's causal transformer"),
        ({"to": "hf-dual"}, "BERT's pooler"),
        ({"to": "openclip", "with_optimizer": True}, "holds no optimizer state"),
        ({"model": "tiny"}, "says itself what it is"),
        ({"verify": True}, "nothing to compare"),
    ],
)
def test_requests_that_make_no_sense(native, tmp_path, changes, words):
    with pytest.raises(UsageError) as refusal:
        convert(Request(src=native, dst=tmp_path / "x", **changes))
    assert words in refusal.value.line()
    assert not (tmp_path / "x").exists()


def test_targets_are_not_overwritten(native, tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        convert(Request(src=native, dst=target))
    for to in ("native", "openclip"):
        with pytest.raises(UsageError, match=r"it holds 'thesis\.txt'"):
            convert(Request(src=native, dst=target, to=to, force=True))
    assert (target / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="would be overwritten"):
        convert(Request(src=native, dst=native, force=True))
    shutil.rmtree(target)
    convert(Request(src=native, dst=target))
    convert(Request(src=native, dst=target, force=True))
    same_bits(native, target)


def test_a_tokenizer_of_another_model_is_refused(native, clip_like, tmp_path):
    small_model.text.train_wordpiece([f"word{i}" for i in range(900)], 900, tmp_path / "words")
    with pytest.raises(DataError, match="tokens, the model"):
        convert(Request(src=native, dst=tmp_path / "x", tokenizer=tmp_path / "words"))
    with pytest.raises(DataError, match="is a bert tokenizer"):
        convert(Request(src=clip_like, dst=tmp_path / "x", tokenizer=native))
    assert not (tmp_path / "x").exists()


def test_the_command_line(native, tmp_path, capsys):
    assert main.dispatch(["convert", str(native), str(tmp_path / "oc"), "--to", "openclip", "--verify"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["read", "arch", "verify", "verify", "wrote", "use"]
    assert main.dispatch(["convert", str(tmp_path / "oc"), str(tmp_path / "n"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["format"] == "openclip"
    assert record["wrote"] == [str(tmp_path / "n")]
    assert record["missing"] == []
    (tmp_path / "bad.pt").write_bytes(b"\x80\x04K\x01.")
    for src, dst, code in (("nothing", "y", 2), ("oc", "n", 2), ("bad.pt", "y", 3)):
        with pytest.raises(SystemExit) as left:
            main.main(["convert", str(tmp_path / src), str(tmp_path / dst)])
        assert left.value.code == code
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("unimed-jax: ")


@pytest.mark.assets
def test_real_minilm(assets, tmp_path):
    tower = tmp_path / "text.safetensors"
    done = convert(Request(src=assets / "minilm", dst=tower, verify=True))
    assert done.towers == ("text",)
    assert done.verified["text"] < 2e-5
    state = source.open_source(assets / "minilm")
    again = dict(
        conversion.outputs.mapping.to_state(
            source.open_source(tower).params()["text"], state.tables["text"], state.model
        )
    )
    for name, tensor in again.items():
        assert np.array_equal(np.asarray(state.state[name]).view(np.uint32), tensor.view(np.uint32)), name
    assert set(again) | set(state.ignored) == set(state.state)
