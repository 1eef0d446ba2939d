"""Loading, saving, embedding and classifying, and everything that a model folder may have wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import small_model
import test_medical
from PIL import Image
from safetensors.numpy import load_file, save_file

from unimed_jax import infer, model_folder
from unimed_jax.cli import models as models_verb
from unimed_jax.data import images
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> infer.Loaded:
    return small_model.loaded(tmp_path_factory.mktemp("vocabulary"), batch_size=16)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "m", extra={"step": 7})


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def plain_image(m: infer.Loaded, x: np.ndarray) -> np.ndarray:
    """The tower without any of infer's machinery."""
    graphdef, _ = clip.skeleton(m.cfg)
    z = np.asarray(clip.bind(graphdef, m.params).encode_image(x), np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def plain_text(m: infer.Loaded, tokens: np.ndarray) -> np.ndarray:
    graphdef, _ = clip.skeleton(m.cfg)
    z = np.asarray(clip.bind(graphdef, m.params).encode_text(tokens), np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


# ---- embeddings


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 17, 40])
def test_images_equal_the_plain_tower_for_any_number(tiny, n):
    x = small_model.pictures(n)
    z = tiny.encode_image(x)
    assert z.shape == (n, 32)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, plain_image(tiny, x), atol=2e-6)


def test_order_and_company_do_not_change_an_embedding(tiny):
    x = small_model.pictures(20)
    order = np.random.default_rng(1).permutation(20)
    np.testing.assert_allclose(tiny.encode_image(x)[order], tiny.encode_image(x[order]), atol=2e-6)
    np.testing.assert_allclose(tiny.encode_image(x)[5:6], tiny.encode_image(x[5:6]), atol=2e-6)


def test_texts_are_encoded_at_their_own_length(tmp_path):
    cfg = small_model.model(text__context_length=256, text__max_positions=256)
    m = small_model.loaded(tmp_path, cfg=cfg, batch_size=8)
    assert m.tokenizer is not None
    texts = ["a ct", "axial " * 20, "chest " * 50, "head " * 100, "blue " * 400, ""] * 3
    tokens = m.tokenizer.encode(texts, 256)
    assert sorted({int(n) for n in infer._lengths(tokens, cfg.text)}) == [2, 4, 22, 52, 102, 256]
    np.testing.assert_allclose(m.encode_text(texts), plain_text(m, tokens), atol=2e-6)
    np.testing.assert_allclose(m.encode_text(tokens), m.encode_text(texts), atol=1e-7)
    assert m._text._cache_size() <= 5 * 3  # at most: text widths x batch sizes


def test_text_is_cropped_in_the_causal_tower_too(tmp_path):
    kinds = {
        "kind": "clip",
        "pool": "eot",
        "context_length": 32,
        "max_positions": 32,
        "dropout": 0.0,
        "eot_id": 3,
    }
    cfg = small_model.model(**{f"text__{k}": v for k, v in kinds.items()}, text__proj="linear")
    m = small_model.loaded(tmp_path, cfg=cfg)
    assert m.tokenizer is not None
    tokens = m.tokenizer.encode(["a ct", "axial ct of the chest " * 3], 32)
    tokens[0, 10:20] = 7  # behind the end token: never seen
    assert (tokens == m.tokenizer.last_id).any()
    cfg.text.eot_id = m.tokenizer.last_id
    m = infer.Loaded(cfg, m.params, m.tokenizer)
    np.testing.assert_allclose(m.encode_text(tokens), plain_text(m, tokens), atol=2e-6)


def test_nothing_compiles_twice(tmp_path):
    cfg = small_model.model(name="compiled-once")
    m = small_model.loaded(tmp_path, cfg=cfg, batch_size=16)
    for n in (16, 16, 48, 32):
        m.encode_image(small_model.pictures(n))
    assert m._image._cache_size() == 1
    for n in (3, 5, 7, 8):
        m.encode_image(small_model.pictures(n))
    assert m._image._cache_size() == 2
    again = infer.Loaded(
        cfg, m.params, m.tokenizer, batch_size=16
    )  # as evaluation in training does each time
    again.encode_image(small_model.pictures(16))
    assert again._image is m._image
    assert m._image._cache_size() == 2


def test_unnormalised_embeddings(tiny):
    x = small_model.pictures(3)
    raw = tiny.encode_image(x, normalize=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw, axis=1, keepdims=True), tiny.encode_image(x), atol=1e-6
    )


def test_pictures_of_every_kind_are_prepared_alike(tiny, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    expected = images.eval_image(image, 32)
    kinds = [
        image,
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(),
        np.asarray(image),
    ]
    for kind in kinds:
        assert (tiny.preprocess(kind) == expected).all()
    z = tiny.encode_image(kinds)
    np.testing.assert_allclose(z, np.repeat(tiny.encode_image(expected[None]), 5, axis=0), atol=2e-6)
    gray = np.asarray(image.convert("L"))
    assert (tiny.preprocess(gray) == images.eval_image(image.convert("L"), 32)).all()


def test_dicom_paths_are_pictures(tiny):
    data = pytest.importorskip("pydicom.data", reason='pip install "unimed-jax[medical]"')
    path = data.get_testdata_file("CT_small.dcm", download=False)
    assert tiny.encode_image([path]).shape == (1, 32)


def test_empty_requests(tiny):
    assert tiny.encode_image([]).shape == (0, 32)
    assert tiny.encode_image(small_model.pictures(0)).shape == (0, 32)
    assert tiny.encode_text([]).shape == (0, 32)


def test_other_array_libraries_are_accepted(tiny):
    torch = pytest.importorskip("torch")
    x = small_model.pictures(2)
    np.testing.assert_array_equal(tiny.encode_image(torch.from_numpy(x)), tiny.encode_image(x))
    np.testing.assert_array_equal(tiny.encode_image(jax.numpy.asarray(x)), tiny.encode_image(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), "channels first"),
        (lambda x: x / 255, "not uint8"),
        (lambda x: x[:, :16], "16 x 32 pixels, this model takes 32 x 32"),
        (lambda x: x[0], "shape"),
        (lambda x: "scan.png", "takes a list"),
        (lambda x: [x[0] / 255], "a picture is float64"),
        (lambda x: [x[0].transpose(2, 0, 1)], "a picture is uint8"),
    ],
)
def test_wrong_images_are_refused(tiny, make, words):
    with pytest.raises(UsageError, match=words):
        tiny.encode_image(make(small_model.pictures(2)))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("a ct", "takes a list"),
        (np.zeros((2, 33), np.int32), "tokens are"),
        (np.zeros((2, 8)), "tokens are float64"),
        (np.full((2, 8), 256), "reach from 256"),
    ],
)
def test_wrong_texts_are_refused(tiny, texts, words):
    with pytest.raises(UsageError, match=words):
        tiny.encode_text(texts)


def test_classify_follows_the_formula(tiny):
    x = small_model.pictures(5)
    classes = {
        "ct": ["a ct slice", "ct of the chest"],
        "mr": ["magnetic resonance image"],
        "us": ["a sonogram"] * 3,
    }
    bank = []
    for prompts in classes.values():
        z = tiny.encode_text(prompts).mean(0)
        bank.append(z / np.linalg.norm(z))
    logits = tiny.logit_scale * (tiny.encode_image(x) @ np.stack(bank).T)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = tiny.classify(x, classes)
    np.testing.assert_allclose(p, expected, rtol=1e-4)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    assert tiny.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("classes", [{}, {"a": []}, {"a": "one text"}])
def test_classes_without_prompts_are_refused(tiny, classes):
    with pytest.raises(UsageError, match=r"prompts|classes"):
        tiny.text_bank(classes)


def test_sharded_over_eight_devices_is_the_same(folder, tmp_path):
    code = """
    import numpy as np, sys, jax
    from unimed_jax import config, infer, parallel
    import small_model
    x, texts = small_model.pictures(21), ["a ct", "head " * 25, "chest"] * 7
    for cfg in (config.Mesh(), config.Mesh(data=2, fsdp=4)):
        m = infer.load(sys.argv[1], mesh=parallel.make_mesh(cfg), batch_size=12)
        assert m.batch_size == 16
        a, b = m.encode_image(x), m.encode_text(texts)
        z, ids = m.encode_rows(x[:16], np.arange(16))
        z, ids = np.asarray(z), np.asarray(ids)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        np.testing.assert_allclose(z, a[ids], atol=2e-6)
        np.savez(sys.argv[2], a=a, b=b)
        one = infer.load(sys.argv[1])
        np.testing.assert_allclose(a, one.encode_image(x), atol=2e-6)
        np.testing.assert_allclose(b, one.encode_text(texts), atol=2e-6)
        assert m.digest == one.digest
    print(len(jax.devices()), "devices agree")
    """
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), str(tmp_path / "out.npz")],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "8 devices agree" in out.stdout


# ---- the folder


def test_the_folder_gives_the_model_back(tiny, folder):
    again = infer.load(folder)
    ours, theirs = clip.flatten(tiny.params), clip.flatten(again.params)
    assert ours.keys() == theirs.keys()
    assert all((np.asarray(ours[k]) == np.asarray(theirs[k])).all() for k in ours)
    assert again.cfg == tiny.cfg
    assert again.digest == tiny.digest
    assert again.tokenizer is not None
    assert tiny.tokenizer is not None
    assert again.tokenizer.digest == tiny.tokenizer.digest
    spec = json.loads((folder / "config.json").read_text())
    assert spec["format"] == "unimed_jax.model"
    assert spec["extra"] == {"step": 7}
    assert spec["preprocess"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_saving_never_overwrites_silently(tiny, folder, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        tiny.save(folder)
    before = infer.load(folder).digest
    small_model.loaded(tmp_path, seed=5).save(folder, force=True)
    assert infer.load(folder).digest != before
    tiny.save(folder, force=True)
    assert infer.load(folder).digest == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="no model folder"):
        tiny.save(tmp_path / "notes", force=True)


def test_a_failed_save_leaves_nothing_and_the_old_one_whole(tiny, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unimed_jax.model_folder.write_safetensors", full)
    with pytest.raises(DataError, match="No space left"):
        tiny.save(folder, force=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def damage_weights(**changes):
    def change(folder: Path) -> None:
        leaves = load_file(folder / "model.safetensors")
        for how, name in changes.items():
            if how == "drop":
                del leaves[name]
            elif how == "add":
                leaves[name] = np.zeros(3, np.float32)
            elif how == "reshape":
                leaves[name] = leaves[name].reshape(-1)
            elif how == "nan":
                leaves[name].flat[0] = np.nan
            elif how == "retype":
                leaves[name] = leaves[name].astype(np.int32)
        save_file(leaves, folder / "model.safetensors")

    return change


def edit_config(change):
    def edit(folder: Path) -> None:
        spec = json.loads((folder / "config.json").read_text())
        change(spec)
        (folder / "config.json").write_text(json.dumps(spec))

    return edit


def twice(folder: Path) -> None:
    """A header that names one tensor twice, which the format forbids and the library accepts."""
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].rstrip()
    entry = json.dumps({"logit_scale": json.loads(header)["logit_scale"]})[1:-1]
    header = header[:-1] + b"," + entry.encode() + b"}"
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])


def other_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    spec = json.loads(text)
    vocabulary = spec["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_weights(drop="vision/pos"), "1 missing: vision/pos"),
        (damage_weights(add="vision/extra"), "1 unexpected: vision/extra"),
        (damage_weights(reshape="vision/pos"), r"1 mis-shaped: vision/pos \[1088\] instead of \[17, 64\]"),
        (damage_weights(nan="text/word"), "1 not finite: text/word"),
        (damage_weights(retype="text/word"), "1 no float32: text/word"),
        (damage_weights(drop="vision/cls", add="x"), "1 missing: vision/cls; 1 unexpected: x"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "safetensors",
        ),
        (twice, "'logit_scale' twice"),
        (other_tokenizer, "is not the tokenizer of"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), "no readable JSON"),
        (edit_config(lambda s: s.update(format="other")), "no unimed_jax model folder"),
        (edit_config(lambda s: s.update(version=99)), "version 99"),
        (edit_config(lambda s: s["model"].update(depth=3)), "no field 'depth'"),
        (edit_config(lambda s: s["model"]["vision"].update(depth=3)), "mis-shaped: vision/blocks"),
        (edit_config(lambda s: s["model"]["text"].update(vocab_size=100)), "mis-shaped: text/word"),
        (edit_config(lambda s: s["model"]["vision"].update(act="relu")), "act is 'relu'"),
    ],
)
def test_damaged_folders_are_refused(copy, damage, words):
    damage(copy)
    with pytest.raises(DataError, match=words) as e:
        infer.load(copy)
    assert e.value.remedy


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny", "architecture, not weights"),
        ("unimed-clip-vit-b16", "not on this machine: .*unimed-jax models fetch unimed-clip-vit-b16 --out"),
        ("unimed-clip-vitb16", "Did you mean"),
        ("nowhere", "no model"),
    ],
)
def test_missing_models_are_named(name, words):
    with pytest.raises(UsageError, match=words):
        infer.load(name)


def test_a_file_of_no_known_kind_or_an_empty_folder_is_no_model(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("weights are in the other folder")
    with pytest.raises(DataError, match=r"notes.txt"):
        infer.load(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(DataError, match="neither a model nor a run"):
        infer.load(tmp_path)


def test_a_run_gives_its_newest_checkpoint_or_its_model(tiny, folder, tmp_path):
    from unimed_jax import config
    from unimed_jax.train import checkpoint

    assert tiny.tokenizer is not None
    run = config.Train(model=tiny.cfg)
    tiny.tokenizer.save(tmp_path)
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
        for step, seed in ((1, 11), (2, 12)):
            params = small_model.params(tiny.cfg, seed)
            state = {
                "step": jax.numpy.asarray(step, jax.numpy.int32),
                "params": params,
                "opt": {"n": params["logit_scale"]},
            }
            meta = {"config": config.to_dict(run), "tokenizer": tiny.tokenizer.digest}
            saver.save(step, state, meta)
    seeds = {11: infer.load(f"{tmp_path}@1"), 12: infer.load(tmp_path)}
    for seed, m in seeds.items():
        assert m.digest == infer.Loaded(tiny.cfg, small_model.params(tiny.cfg, seed)).digest
    shutil.copytree(folder, tmp_path / "model")
    assert infer.load(tmp_path).digest == tiny.digest
    with pytest.raises(DataError, match="step 9"):
        infer.load(f"{tmp_path}@9")


# ---- open_clip's words


def test_the_check_finds_a_flipped_bit_that_loads(copy, capsys):
    assert models_verb.run(["check", str(copy)]) == 0
    assert "both towers run" in capsys.readouterr().out
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1 << 5  # still a finite number
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="has changed since it was saved"):
        models_verb.run(["check", str(copy)])


def test_open_clip_words(folder):
    model, preprocess_train, preprocess = infer.create_model_and_transforms(folder)
    tokenize = infer.get_tokenizer(folder)
    image = Image.fromarray(small_model.pictures(1, size=64)[0])
    x = np.stack([preprocess(image), preprocess_train(image, np.random.default_rng(0))])
    assert x.shape == (2, 32, 32, 3)
    assert tokenize("a ct").shape == (1, 32)
    z, t = (
        model.encode_image(x, normalize=True),
        model.encode_text(tokenize(["a ct", "head"]), normalize=True),
    )
    assert (z @ t.T).shape == (2, 2)
    assert (tokenize(["a ct"]) == model.tokenizer.encode(["a ct"], 32)).all()


def test_training_and_evaluation_transforms_take_the_same_pictures(tiny, tmp_path):
    gray = small_model.pictures(1, size=64)[0, ..., 0]
    Image.fromarray(gray).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    for picture in (path, str(path), path.read_bytes(), gray, Image.fromarray(gray).convert("CMYK")):
        assert tiny.preprocess(picture).shape == (32, 32, 3)
        assert tiny.preprocess_train(picture, np.random.default_rng(0)).shape == (32, 32, 3)
    for transform in (tiny.preprocess, tiny.preprocess_train):
        with pytest.raises(UsageError, match="a picture is float64"):
            transform(np.zeros((4, 4)))
        with pytest.raises(DataError, match=r"no\.png"):
            transform(tmp_path / "no.png")


def test_both_transforms_read_dicom(tiny):
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    path = test_medical.sample("CT_small.dcm")
    for transform in (tiny.preprocess, tiny.preprocess_train):
        assert transform(path).max() > 0


def test_a_name_alone_has_random_weights_and_says_so():
    with pytest.warns(UserWarning, match="random weights"):
        model, _, preprocess = infer.create_model_and_transforms("tiny")
    assert model.encode_image([preprocess(Image.new("L", (40, 40)))]).shape == (1, 32)
    with pytest.raises(UsageError, match="no tokenizer"):
        model.encode_text(["a ct"])
    with pytest.raises(UsageError, match="architecture"):
        infer.get_tokenizer("tiny")


def test_public_names():
    import unimed_jax as uj

    assert uj.load is infer.load
    assert uj.create_model_and_transforms is infer.create_model_and_transforms


def test_loading_needs_no_torch_and_no_network(folder):
    code = f"""
    import sys, socket
    def refuse(*a, **k): raise OSError("network")
    socket.socket.connect = refuse
    sys.modules["torch"] = None
    import unimed_jax as uj
    print(uj.load({str(folder)!r}).encode_text(["a ct"]).shape)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert out.stdout.strip() == "(1, 32)", out.stderr[-2000:]


def test_the_reader_of_folders_stands_alone(folder):
    cfg, params, tokenizer = model_folder.read(folder)
    assert (cfg.name, params["logit_scale"].shape, tokenizer.kind) == ("tiny", (), "bert")
