"""Models in the formats of others: exact, complete, refused when a format cannot hold one, never half written."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import golden, params, random_model, state
from safetensors.numpy import load_file, save_file
from small_model import clip_text, tokenizer
from small_model import params as mild_params
from test_convert_source import same_bits

from unimed_jax import config
from unimed_jax.convert import hf_configs, openclip_config, outputs, tensor_writer
from unimed_jax.convert.source import open_source
from unimed_jax.data.text import Tokenizer, clean
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip, zoo

TINY = zoo.get("tiny")
TINY.vision.heads = 1  # of 64, as the original's
CLIP_TEXT = clip_text(20, vocab_size=60, width=48, depth=2, heads=3, mlp_dim=100)
TINY_CLIP = dataclasses.replace(TINY, text=CLIP_TEXT)
OPENAI_EOT = dataclasses.replace(TINY, text=dataclasses.replace(CLIP_TEXT, eot_id=9))
# Everything that open_clip's config can say and that is not its default.
ODD = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(
        TINY.vision, pool="mean", act="gelu", ln_pre=False, ln_eps=1e-4, mlp_dim=101, normalize="half"
    ),
    text=dataclasses.replace(TINY.text, pool="mean", proj="linear", act="quick_gelu", dropout=0.2),
)
TIMM = dataclasses.replace(
    TINY,
    vision=config.Vision(
        width=192, heads=3, mlp_dim=768, act="gelu", ln_pre=False, patch_bias=True, ln_eps=1e-6
    ),
)
HOLDS = [
    ("unimed", TINY),
    ("openclip", TINY),
    ("openclip", ODD),
    ("openclip", TINY_CLIP),
    ("openclip", OPENAI_EOT),
    ("openclip", TIMM),
    ("hf-vision", TINY),
    ("hf-clip", TINY_CLIP),
    ("hf-clip", OPENAI_EOT),
]
needs_torch = pytest.mark.torch


def write(to: str, m: config.Model, dst: Path, **options) -> Path:
    if to == "unimed":
        pytest.importorskip("torch")
    outputs.write(to, params(m), m, dst, tokenizer=options.pop("tokenizer", None), **options)
    return dst


# --- bits and names


@pytest.mark.parametrize(("to", "m"), HOLDS, ids=[f"{to}-{i}" for i, (to, _) in enumerate(HOLDS)])
def test_out_and_in_again_is_bit_equal(tmp_path, to, m):
    source = open_source(write(to, m, tmp_path / "out"))
    assert source.format == to
    want = params(m)
    want = {k: v for k, v in want.items() if to != "hf-vision" or k == "vision"}
    same_bits(source.params(), want)
    assert len(source.state) == len(outputs.shapes(to, m))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seed", range(5))
def test_random_models_go_out_and_come_in(tmp_path, seed):
    for form, to in (("unimed", "openclip"), ("openclip-clip", "hf-clip"), ("openclip-custom", "openclip")):
        m = random_model(np.random.default_rng([seed, 7]), form)
        same_bits(open_source(write(to, m, tmp_path / form)).params(), params(m))


def test_names_and_shapes_are_those_of_open_clip_itself(tmp_path):
    """Strict loading there needs exactly these; read off open_clip's own module."""
    ((form, want),) = (v for k, v in golden().items() if k.startswith("open_clip"))
    folder = write(form, TINY, tmp_path / "o")
    written = load_file(folder / "open_clip_model.safetensors")
    assert {k: v.shape for k, v in written.items()} == want
    assert all(v.dtype == np.float32 for v in written.values())


def test_a_logit_bias_goes_along(tmp_path):
    m = dataclasses.replace(TINY, logit_bias=True)
    source = open_source(write("openclip", m, tmp_path / "o"))
    assert source.model.logit_bias
    same_bits(source.params(), params(m))


def test_the_vision_tower_alone_is_enough_for_hf_vision(tmp_path):
    only = {"vision": params(TINY)["vision"]}
    outputs.write("hf-vision", only, TINY, tmp_path / "v", tokenizer=None)
    same_bits(open_source(tmp_path / "v").params(), only)
    with pytest.raises(DataError, match="no logit_scale"):
        outputs.write("openclip", only, TINY, tmp_path / "o", tokenizer=None)
    with pytest.raises(DataError, match="no text tower"):
        outputs.write("openclip", only | {"logit_scale": np.float32(1)}, TINY, tmp_path / "o", tokenizer=None)
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


# --- refusals


@pytest.mark.parametrize(
    ("to", "change", "word"),
    [
        ("unimed", {"vision__act": "gelu"}, "QuickGELU"),
        ("unimed", {"vision__ln_pre": False}, "norm before the blocks"),
        ("unimed", {"vision__pool": "mean"}, "class token"),
        ("unimed", {"text__proj": "linear"}, "two-layer MLP"),
        ("unimed", {"text__pool": "mean"}, r"\[CLS\]"),
        ("unimed", {"logit_bias": True}, "logit_bias"),
        ("unimed", {"text": CLIP_TEXT}, "BERT"),
        ("openclip", {"vision__patch_bias": True}, "patch embedding has no bias"),
        ("openclip", {"vision__proj": "mlp"}, "one matrix"),
        ("openclip", {"text": dataclasses.replace(CLIP_TEXT, act="gelu")}, "one setting"),
        ("hf-vision", {"vision__ln_pre": False}, "norm before the blocks"),
        ("hf-vision", {"vision__patch_bias": True}, "no bias"),
        ("hf-vision", {"vision__proj": "mlp"}, "one matrix"),
        ("hf-vision", {"vision__pool": "mean"}, "class token"),
        ("hf-clip", {}, "this one is BERT"),
        ("hf-clip", {"text": CLIP_TEXT, "logit_bias": True}, "logit_bias"),
        ("hf-clip", {"text": dataclasses.replace(CLIP_TEXT, context_length=10)}, "text positions"),
    ],
)
def test_formats_refuse_what_they_cannot_hold(tmp_path, to, change, word):
    m = zoo.get("tiny")
    for name, value in change.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(m, part) if part else m, field, value)
    with pytest.raises(UsageError, match=word) as e:
        outputs.write(to, {}, m, tmp_path / "x", tokenizer=None)
    assert "these can, exactly: --to native" in str(e.value)
    assert f"--to {to}" not in e.value.remedy
    assert not list(tmp_path.iterdir())


def test_the_dual_encoder_of_transformers_is_refused_with_the_exact_alternatives(tmp_path):
    for name in ("vision-text-dual-encoder", "hf-dual"):
        with pytest.raises(
            UsageError, match=r"BERT's pooler .*--to native, --to openclip, --to unimed, --to hf-vision"
        ):
            outputs.write(name, {}, TINY, tmp_path / "x", tokenizer=None)
    with pytest.raises(UsageError, match='Did you mean "openclip"'):
        outputs.write("openclipp", {}, TINY, tmp_path / "x", tokenizer=None)


def test_existing_targets_are_kept(tmp_path):
    folder = write("openclip", TINY, tmp_path / "o")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UsageError, match="exists"):
        write("openclip", TINY, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    outputs.write("openclip", params(TINY, 1), TINY, folder, tokenizer=None, force=True)
    same_bits(open_source(folder).params(), params(TINY, 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is no openclip folder alone"):
        write("openclip", TINY, tmp_path / "mine", force=True)
    with pytest.raises(UsageError, match="is a folder, --to unimed writes a file"):
        write("unimed", TINY, tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "o"]


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "disk", "flip", "card"])
def test_nothing_appears_when_something_is_wrong(tmp_path, monkeypatch, fault):
    p, more = params(TINY), None
    if fault == "missing":
        del p["vision"]["cls"]
    elif fault == "shape":
        p["vision"]["pos"] = p["vision"]["pos"][:-1]
    elif fault == "nan":
        p["text"]["word"][3, 2] = np.nan
    elif fault == "disk":
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    elif fault == "flip":
        plain = tensor_writer._put

        def broken(f, at, data):
            flipped = bytearray(data)
            flipped[-7:-6] = [b ^ (at > 10_000) for b in flipped[-7:-6]]
            plain(f, at, flipped)

        monkeypatch.setattr(tensor_writer, "_put", broken)
    else:

        def more(folder):
            raise OSError(28, "No space left on device")

    words = {
        "missing": "1 missing: cls",
        "shape": "mis-shaped",
        "nan": r"not finite: text\.transformer\.embeddings\.word_embeddings",
        "disk": "No space left",
        "flip": "does not read back bit for bit",
        "card": "No space left",
    }
    with pytest.raises(DataError, match=words[fault]):
        outputs.write("openclip", p, TINY, tmp_path / "o", tokenizer=None, more=more)
    assert not list(tmp_path.iterdir())


def leaf_by_leaf(p):
    return sorted(clip.flatten(p).items())


@pytest.mark.parametrize("to", ["openclip", "hf-vision", "unimed"])
def test_leaves_one_at_a_time_give_the_same_file(tmp_path, to):
    p = params(TINY)
    for place, given in (("whole", p), ("leaves", iter(leaf_by_leaf(p)))):
        outputs.write(to, given, TINY, tmp_path / place / to, tokenizer=None)
    written = [outputs.open_source(tmp_path / place / to) for place in ("whole", "leaves")]
    assert written[0].state.keys() == written[1].state.keys()
    assert all(np.array_equal(written[0].state[k], v) for k, v in written[1].state.items())


@pytest.mark.parametrize("to", ["openclip", "unimed"])
def test_leaves_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path, to):
    p = params(TINY)
    word = p["text"]["word"]
    del p["vision"]["cls"]
    p["vision"] |= {"pos": p["vision"]["pos"][:-1], "other": np.zeros(3, np.float32)}
    p["text"]["word"] = np.full_like(word, np.inf)
    with pytest.raises(DataError) as refusal:
        outputs.write(to, iter(leaf_by_leaf(p)), TINY, tmp_path / to, tokenizer=None)
    for words in (
        "1 missing: vision/cls",
        "1 unexpected: vision/other",
        "1 mis-shaped: vision/pos",
        "1 not fin",
    ):
        assert words in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["openclip", "hf-vision"])
@pytest.mark.parametrize("name", ["logit_bias", "logit_scale", "visoin/cls", "text/other"])
def test_a_leaf_that_nobody_knows_is_refused(tmp_path, to, name):
    more = [*leaf_by_leaf(params(TINY)), (name, np.float32(1))]
    known = to == "hf-vision" and name in ("logit_scale", "text/other")  # of what the format does not have
    if known:
        outputs.write(to, iter(more), TINY, tmp_path / "o", tokenizer=None)
        return
    with pytest.raises(DataError, match=f"1 unexpected: {name}"):
        outputs.write(to, iter(more), TINY, tmp_path / "o", tokenizer=None)
    assert not list(tmp_path.iterdir())


@needs_torch
def test_a_disk_that_is_full_under_torch_is_one_line(tmp_path):
    p = params(TINY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"x\.pt cannot be written: PyTorch .* the disk may be full") as e:
            outputs.write("unimed", p, TINY, tmp_path / "x.pt", tokenizer=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in e.value.line()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["unimed", "openclip"])
def test_every_file_is_on_the_disk_before_it_appears(tmp_path, monkeypatch, to):
    real, synced = os.fsync, set()

    def fsync(handle):
        synced.add(os.fstat(handle).st_ino)
        assert not (tmp_path / to).exists()
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for file in outputs.write(to, params(TINY), TINY, tmp_path / to, tokenizer=None):
        assert file.stat().st_ino in synced, file.name


def test_a_disk_without_room_is_known_before_any_tensor_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    untouched = iter(leaf_by_leaf(params(TINY)))
    with pytest.raises(DataError, match="No space left"):
        outputs.write("openclip", untouched, TINY, tmp_path / "o", tokenizer=None)
    assert next(untouched)[0] == leaf_by_leaf(params(TINY))[0][0]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "")))
    outputs.write("openclip", params(TINY), TINY, tmp_path / "o", tokenizer=None)  # not every file system can


def test_a_writer_that_forgets_a_setting_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hf_configs,
        "clip_vision",
        lambda m: {**hf_configs.clip(m, None)["vision_config"]} | {"hidden_act": "gelu"},
    )
    with pytest.raises(DataError, match=r"vision\.act 'quick_gelu' reads back as 'gelu'"):
        write("hf-vision", TINY, tmp_path / "v")


def test_streamed_safetensors_are_those_of_the_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)),
        "a.c": rng.normal(size=7),
        "s": np.array(2.0),
        "e": np.zeros((0, 4)),
    }
    tensors = {k: np.asarray(v, np.float32) for k, v in tensors.items()}
    shapes = {k: v.shape for k, v in tensors.items()}
    tensor_writer.write_safetensors(tmp_path / "x", shapes, reversed(tensors.items()), {"format": "pt"})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[k], v) for k, v in tensors.items())
    for wrong in (
        [("z", tensors["b"])],
        [("b", tensors["a.c"])],
        [("b", tensors["b"])] * 2,
        [("b", tensors["b"])],
    ):
        with pytest.raises(DataError):
            tensor_writer.write_safetensors(tmp_path / "y", shapes, wrong)


# --- configs and tokenizers


def test_open_clip_config(tmp_path):
    spec = openclip_config.write(
        zoo.get("unimed-clip-vit-b16"), text_name="some/bert", tokenizer_name="some/bert"
    )
    model = spec["model_cfg"]
    assert (model["embed_dim"], model["quick_gelu"]) == (512, True)
    assert model["text_cfg"] == {
        "context_length": 256,
        "vocab_size": 30522,
        "hf_model_name": "some/bert",
        "hf_tokenizer_name": "some/bert",
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
    }
    assert model["vision_cfg"]["image_size"] == 224
    assert spec["preprocess_cfg"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    timm = openclip_config.write(zoo.get("biomedclip"), text_name="b", tokenizer_name="")["model_cfg"][
        "vision_cfg"
    ]
    assert timm["timm_model_name"] == "vit_base_patch16_224"
    assert timm["timm_pool"] == ""
    folder = write("openclip", TINY, tmp_path / "here")
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == str(folder.resolve())  # "." would not be found
    named = write("openclip", TINY, tmp_path / "hub", hf_text_name="org/bert")
    text = json.loads((named / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == "org/bert"


@pytest.mark.parametrize("mlp_dim", [1, 7, 100, 101, 333, 1365])
@pytest.mark.parametrize("width", [3, 12, 48, 60, 768])
def test_mlp_ratios_give_the_width_back(mlp_dim, width):
    assert int(width * openclip_config._ratio(mlp_dim, width)) == mlp_dim


TEXTS = [
    "a  chest x-ray of the left &amp; right",
    "",
    "CT " * 60,
    "Pneumonia\n(effusion) 3 µm",
    "axial plane",
]


@needs_torch
@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_auto_tokenizer_gives_our_ids(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "bert":
        ours = tokenizer(tmp_path / "t")
    else:
        ours = Tokenizer(tmp_path / "t" / clip_tokenizer(tmp_path / "t"))
    (tmp_path / "out").mkdir()
    names = hf_configs.write_tokenizer(tmp_path / "out", ours, 20)
    assert sorted(names) == sorted(p.name for p in (tmp_path / "out").iterdir())
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert Tokenizer(tmp_path / "out" / "tokenizer.json").digest == ours.digest
    ids = theirs([clean(t) for t in TEXTS], max_length=20, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(np.asarray(ids), ours.encode(TEXTS, 20))
    if kind == "bert":
        assert Tokenizer(tmp_path / "out" / "vocab.txt").vocab_size == ours.vocab_size


def clip_tokenizer(folder: Path) -> str:
    """A small byte-pair tokenizer with CLIP's special tokens; id 0 is an ordinary letter, as in OpenAI's."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {w: i for i, w in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], end_of_word_suffix="</w>", unk_token=words[-1]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(words[-2:])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    return "tokenizer.json"


# --- torch


def ours(m: config.Model, p, images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, text = encoder(json.dumps(config.to_dict(dataclasses.replace(m, dtype="float32"))))(
        p, images, tokens
    )
    return np.asarray(image), np.asarray(text)


@functools.lru_cache(maxsize=4)
def encoder(settings: str):
    graphdef, _ = clip.skeleton(config.from_dict(config.Model, json.loads(settings)))

    def both(p, images, tokens):
        model = clip.bind(graphdef, p)
        return model.encode_image(images), model.encode_text(tokens)

    return jax.jit(both)


def inputs(m: config.Model, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, m.vision.image_size, m.vision.image_size, 3)).astype(np.float32)
    tokens = rng.integers(3, m.text.vocab_size, (n, min(24, m.text.context_length))).astype(np.int32)
    tokens[-1, 5:] = 0
    return images, tokens


def peer(m: config.Model, file: Path):
    """The original's module tree, filled strictly from one of our files as the original's loader does."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch_unimed import Peer

    body = torch.load(file, map_location="cpu", weights_only=True)
    module = Peer(m)
    module.load_state_dict(body["state_dict"], strict=True)
    return module.eval(), body


def encode(module, images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    with torch.no_grad():
        image = module.visual(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        return image, module.text_encoder(torch.from_numpy(tokens).long()).numpy()


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert 0.05 < np.abs(b).max() < 50
    assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


@needs_torch
def test_the_unimed_file_is_the_originals(tmp_path):
    """weights_only, all keys matched, and the same function."""
    file = tmp_path / "m.pt"
    p = mild_params(TINY, 3)
    pytest.importorskip("torch")
    outputs.write("unimed", p, TINY, file, tokenizer=None, facts={"epoch": 4, "name": "mine"})
    module, body = peer(TINY, file)
    assert (body["epoch"], body["name"]) == (4, "mine")
    assert {k: tuple(v.shape) for k, v in body["state_dict"].items()} == outputs.shapes("unimed", TINY)
    assert body["state_dict"].keys() == module.state_dict().keys()
    x = inputs(TINY, 3)
    for a, b in zip(ours(TINY, p, *x), encode(module, *x), strict=True):
        assert_close(a, b)
    assert open_source(file).facts == {"epoch": 4, "name": "mine"}


@needs_torch
def test_a_transposed_square_matrix_shows_in_the_outputs_only(tmp_path):
    p = mild_params(TINY, 3)
    pytest.importorskip("torch")
    outputs.write("unimed", p, TINY, tmp_path / "m.pt", tokenizer=None)
    module, _ = peer(TINY, tmp_path / "m.pt")
    s = state(TINY, "unimed", p)
    key = "visual.transformer.resblocks.0.attn.out_proj.weight"
    s[key] = np.ascontiguousarray(s[key].T)
    save_file(s, tmp_path / "bad.safetensors")
    wrong = open_source(tmp_path / "bad.safetensors", model="tiny").params()
    x = inputs(TINY, 3)
    (image, text), (theirs, their_text) = ours(TINY, wrong, *x), encode(module, *x)
    assert_close(text, their_text)
    assert np.abs(image - theirs).max() > 1e-3


@needs_torch
def test_transformers_opens_our_folders(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for m in (TINY_CLIP, OPENAI_EOT):
        folder = tmp_path / f"eot{m.text.eot_id}"
        p = mild_params(m, 2)
        outputs.write("hf-clip", p, m, folder, tokenizer=None)
        module, info = transformers.CLIPModel.from_pretrained(str(folder), output_loading_info=True)
        assert not any(info.values()), info
        images, tokens = inputs(m, 3)
        tokens[:, 7] = m.text.vocab_size - 1
        tokens[0, 3] = 9
        tokens[1:, 5] = 9
        with torch.no_grad():
            out = module(
                input_ids=torch.from_numpy(tokens).long(),
                pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2),
            )
        image, text = ours(m, p, images, tokens)
        unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
        np.testing.assert_allclose(unit(image), out.image_embeds.numpy(), atol=1e-5)
        np.testing.assert_allclose(unit(text), out.text_embeds.numpy(), atol=1e-5)
    processor = transformers.CLIPImageProcessor.from_pretrained(str(tmp_path / "eot9"))
    assert processor.crop_size["height"] == TINY.vision.image_size


@needs_torch
def test_folders_that_transformers_saves_come_in(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30}
    sizes = {"image_size": 16, "patch_size": 8}
    v = transformers.CLIPVisionConfig(**small, **sizes, projection_dim=7)
    t = transformers.CLIPTextConfig(
        **small, vocab_size=20, max_position_embeddings=6, eos_token_id=19, bos_token_id=18, projection_dim=7
    )
    both = transformers.CLIPConfig(text_config=t.to_dict(), vision_config=v.to_dict(), projection_dim=7)
    b = transformers.BertConfig(**small, vocab_size=20, max_position_embeddings=6)
    d = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=3, **sizes
    )
    for name, c, format_, ignored in (
        ("CLIPModel", both, "hf-clip", 0),
        ("CLIPVisionModelWithProjection", v, "hf-vision", 0),
        ("CLIPVisionModel", v, "hf-vision", 0),
        ("BertModel", b, "hf-bert", 2),
        ("BertForMaskedLM", b, "hf-bert", 5),
        ("BertForPreTraining", b, "hf-bert", 9),
        ("Dinov2Model", d, "hf-dinov2", 1),
        ("Dinov2ForImageClassification", d, "hf-dinov2", 3),
    ):
        module = getattr(transformers, name)(c)
        module.save_pretrained(str(tmp_path / name))
        source = open_source(tmp_path / name)
        assert source.format == format_, name
        assert len(source.ignored) == ignored, (name, source.ignored)
        assert sum(a.size for _, a in source.leaves()) > 1000
        # Inside the module transformers 5 has other names than in its files; both are read.
        torch.save(module.state_dict(), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
        same_bits(open_source(tmp_path / name).params(), source.params())


OPEN_CLIP = """
import sys
from pathlib import Path

import numpy as np
import torch

if torch.version.cuda is None:
    # torchvision's binary does not load beside a CPU build of torch, and open_clip needs its transforms only.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
import open_clip

for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    given = np.load(folder.with_suffix(".given.npz"))
    module, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        out = {
            "image": module.eval().encode_image(torch.from_numpy(given["images"])).numpy(),
            "text": module.encode_text(torch.from_numpy(given["tokens"])).numpy(),
        }
    if (folder / "tokenizer.json").exists():
        out["ids"] = open_clip.get_tokenizer(f"local-dir:{folder}")(given["texts"].tolist()).numpy()
    np.savez(folder.with_suffix(".npz"), **out)
"""


@needs_torch
def test_open_clip_itself(tmp_path):
    """Strict loading, the same function, the same token ids; in a process that finds open_clip (tests/peers.txt)."""
    peers = Path(sys.prefix) / "peers"
    if not (peers / "open_clip").is_dir():
        pytest.skip("open_clip is not in .venv/peers: make env")
    words, models = tokenizer(tmp_path / "t"), (TINY, ODD, TINY_CLIP, OPENAI_EOT, TIMM)
    want = []
    for n, m in enumerate(models):
        folder, p = tmp_path / "all" / f"m{n}", mild_params(m, n)
        outputs.write("openclip", p, m, folder, tokenizer=words if m.text.kind == "bert" else None)
        images, tokens = inputs(m, 2)
        tokens = padded(tokens, m)
        want.append(ours(m, p, images, tokens))
        np.savez(
            folder.with_suffix(".given.npz"),
            images=images.transpose(0, 3, 1, 2),
            tokens=tokens.astype(np.int64),
            texts=TEXTS,
        )
    paths = os.pathsep.join([str(peers), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, tmp_path / "all"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for n, m in enumerate(models):
        got = np.load(tmp_path / "all" / f"m{n}.npz")
        assert_close(want[n][0], got["image"])
        assert_close(want[n][1], got["text"])
        assert ("ids" in got) == (m.text.kind == "bert")
        if "ids" in got:
            np.testing.assert_array_equal(got["ids"], words.encode(TEXTS, m.text.context_length))


def padded(tokens: np.ndarray, m: config.Model) -> np.ndarray:
    out = np.zeros((len(tokens), m.text.context_length), np.int32)
    out[:, : tokens.shape[1]] = tokens
    return out


@needs_torch
@pytest.mark.slow
def test_b16_at_full_size(tmp_path):
    """A training checkpoint of the released size in; out in every format it fits; both frameworks agree to 1e-5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    m = zoo.get("unimed-clip-vit-b16")
    p = b16_params(m)
    s = {f"module.{k}": torch.from_numpy(np.array(v)) for k, v in state(m, "unimed", p).items()}
    torch.save(
        {"epoch": 3, "name": "b16", "state_dict": s, "optimizer": {}, "scaler": {}}, tmp_path / "b16.pt"
    )
    source = open_source(tmp_path / "b16.pt")
    assert source.model == m
    assert source.report() == "352 tensors: 352 loaded, 0 ignored, 0 initialised"
    same_bits(source.params(), p)
    for to in ("unimed", "openclip", "hf-vision"):
        outputs.write(to, p, m, tmp_path / to, tokenizer=None)  # reads back and compares every bit itself
    assert open_source(tmp_path / "openclip").model == m
    images, tokens = inputs(m, 2)
    image, text = ours(m, p, images, tokens)
    theirs = encode(peer(m, tmp_path / "unimed")[0], images, tokens)
    assert_close(image, theirs[0])
    assert_close(text, theirs[1])
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(str(tmp_path / "hf-vision"))
    with torch.no_grad():
        assert_close(image, vision(torch.from_numpy(images).permute(0, 3, 1, 2)).image_embeds.numpy())
    bert = transformers.BertModel(
        transformers.AutoConfig.from_pretrained(str(tmp_path / "openclip")), add_pooling_layer=False
    )
    prefix = "text.transformer."
    weights = load_file(tmp_path / "openclip" / "open_clip_model.safetensors")
    part = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in weights.items() if k.startswith(prefix)}
    bert.load_state_dict(part, strict=True)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        cls = bert.eval()(ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
        hidden = torch.nn.functional.gelu(cls @ torch.from_numpy(weights["text.proj.0.weight"]).T)
        assert_close(text, (hidden @ torch.from_numpy(weights["text.proj.2.weight"]).T).numpy())


def b16_params(m: config.Model) -> clip.Params:
    """Random weights that keep activations near 1 through all layers; every one differs from its default."""
    out = {}
    for name, leaf in clip.flatten(params(m)).items():
        last = name.rsplit("/", 1)[-1]
        if last == "kernel":
            fan_in = int(np.prod(leaf.shape[:-1])) // (leaf.shape[0] if "blocks" in name else 1)
            leaf = leaf * np.float32(fan_in**-0.5)
        elif last == "scale":
            leaf = np.float32(1) + np.float32(0.2) * leaf
        elif name == "logit_scale":
            leaf = np.full((), 4.6, np.float32)
        else:
            leaf = leaf * np.float32(0.2)
        out[name] = leaf.astype(np.float32)
    return clip.unflatten(out)
