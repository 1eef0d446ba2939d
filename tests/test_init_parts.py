"""Starting from parts: each tower from any framework's file, positions resized by rule, every leaf accounted for."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_model

from unimed_jax import config, config_rules
from unimed_jax.convert import mapping, native, positions, tables
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch
CLIP_TEXT = small_model.clip_text(9, vocab_size=40, width=64, depth=2, heads=1, mlp_dim=96)


@pytest.fixture(scope="module")
def model() -> config.Model:
    """One head of 64, as OpenCLIP counts heads."""
    return small_model.model(vision__heads=1, text__heads=1)


@pytest.fixture(scope="module")
def donor(model) -> tuple[config.Model, clip.Params]:
    """A MetaCLIP-like model: the same vision tower, a CLIP text tower, at a larger picture."""
    m = dataclasses.replace(model, text=CLIP_TEXT, vision=dataclasses.replace(model.vision, image_size=48))
    return m, small_model.params(m, 5)


@pytest.fixture
def metaclip(donor, tmp_path):
    """Its `.pt` as training wrote it."""
    m, params = donor
    state = {
        "logit_scale": np.float32(4.6),
        **mapping.from_params(params["vision"], tables.OPENCLIP_VISION, m),
        **mapping.from_params(params["text"], tables.OPENCLIP_CLIP_TEXT, m),
    }
    body = {"epoch": 3, "state_dict": {f"module.{k}": torch.tensor(v) for k, v in state.items()}}
    torch.save(body, tmp_path / "b16_400m.pt")
    return tmp_path / "b16_400m.pt"


@pytest.fixture
def bert(model, tmp_path):
    """A BertModel folder with a pooler and old buffers."""
    folder, t = tmp_path / "bert", model.text
    params = small_model.params(model, 6)["text"]
    state = mapping.from_params({k: v for k, v in params.items() if k != "proj"}, tables.HF_BERT, model)
    state |= {
        "pooler.dense.weight": np.zeros((64, 64), np.float32),
        "pooler.dense.bias": np.zeros(64, np.float32),
    }
    state |= {"embeddings.position_ids": np.arange(t.max_positions)[None]}
    folder.mkdir()
    torch.save({f"bert.{k}": torch.tensor(v) for k, v in state.items()}, folder / "pytorch_model.bin")
    spec = {
        "model_type": "bert",
        "vocab_size": t.vocab_size,
        "hidden_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "intermediate_size": t.mlp_dim,
        "max_position_embeddings": t.max_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(spec))
    return folder, params


def start(m: config.Model, lines: list[str] | None = None, **init) -> clip.Params:
    said = config.from_dict(config.Init, {k: str(v) for k, v in init.items()})
    cfg = config_rules.validate(config.Train(model=m, init=said))
    return native.init_from(cfg, small_model.params(m, 1), report=None if lines is None else lines.append)


def same(a, b) -> None:
    a, b = clip.flatten(a), clip.flatten(b)
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


@pytest.mark.parametrize("rule", ["bicubic", "antialias"])
def test_as_the_original_starts(model, donor, metaclip, bert, rule):
    """MetaCLIP's vision tower with its head and temperature, BERT, a fresh projection."""
    folder, text = bert
    lines: list[str] = []
    out = start(model, lines, vision=metaclip, text=folder, logit_scale=metaclip, resize=rule)
    fresh, vision = small_model.params(model, 1), donor[1]["vision"]
    same(out["vision"], vision | {"pos": positions.resize_positions(vision["pos"], 4, rule)})
    same(out["text"], text | {"proj": fresh["text"]["proj"]})
    assert out["logit_scale"] == np.float32(4.6)
    assert f"vision/pos [17, 64]: resized ({rule}) from [37, 64] of {metaclip}" in lines
    assert "text/proj/up/kernel [64, 48]: initialised" in lines
    assert f"{metaclip}: text: left out (not asked for)" in lines
    assert f"{metaclip}: vision: left out (not asked for)" in lines  # where only the temperature is taken
    assert any(
        line.startswith(f"{folder}: bert.pooler.dense.") and "left out (pooler" in line for line in lines
    )
    assert any("position_ids" in line and "left out" in line for line in lines)
    assert f"{metaclip} does not say vision.act: quick_gelu taken from the config" in lines
    assert len([line for line in lines if " [" in line]) == len(clip.flatten(out))
    table = native.summary(lines)
    assert len(table) < len(lines) - 20
    count = clip.count({k: v for k, v in text.items() if k != "proj"})
    assert f"text: 17 leaves, {count:,} parameters: loaded from {folder}" in table
    assert "text/proj/down/kernel, text/proj/up/kernel: initialised" in table


def test_the_temperature_is_fresh_unless_it_is_named(model, metaclip):
    lines: list[str] = []
    out = start(model, lines, vision=metaclip, resize="bicubic")
    assert out["logit_scale"] == np.float32(model.init_logit_scale)
    assert "logit_scale []: initialised" in lines
    assert f"{metaclip}: logit_scale: left out (not asked for)" in lines


def test_abstract_parameters_read_and_keep_nothing(model, metaclip):
    cfg = config.Train(model=model, init=config.Init(vision=str(metaclip), resize="bicubic"))
    abstract = clip.skeleton(model)[1]
    out = native.init_from(cfg, abstract)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(out))


def test_another_grid_needs_a_rule(model, metaclip):
    with pytest.raises(
        DataError, match=r"37 vision positions, the model 17 \(4 x 4 and one\).*init.resize=bicubic"
    ):
        start(model, vision=metaclip)


def test_text_positions_are_not_resized(model, bert):
    longer = dataclasses.replace(model, text=dataclasses.replace(model.text, max_positions=64))
    with pytest.raises(DataError, match="32 text positions, the model 64"):
        start(longer, text=bert[0], resize="bicubic")


def test_a_text_tower_of_another_kind_is_refused(model, metaclip):
    with pytest.raises(DataError, match=r"was made for text.kind 'clip', the model has 'bert'"):
        start(model, text=metaclip)
    with pytest.raises(DataError, match=r"was made for text.kind 'clip'"):
        start(model, model=metaclip, resize="bicubic")


def test_files_that_lack_what_is_asked_for(model, bert, tmp_path):
    folder, _ = bert
    with pytest.raises(DataError, match="holds no vision tower, only text"):
        start(model, vision=folder)
    with pytest.raises(DataError, match=r"holds no logit_scale.*starts fresh"):
        start(model, logit_scale=folder)
    with pytest.raises(UsageError, match="no checkpoint at"):
        start(model, text=tmp_path / "absent")


def test_every_broken_tensor_is_listed(model, donor, tmp_path):
    m, params = donor
    state = mapping.from_params(params["vision"], tables.OPENCLIP_VISION, m)
    state["visual.ln_post.bias"][3] = np.nan
    state["visual.transformer.resblocks.1.ln_2.weight"][0] = np.inf
    torch.save({k: torch.tensor(v) for k, v in state.items()}, tmp_path / "v.pt")
    with pytest.raises(DataError, match=r"2 not finite: .*ln_2\.weight.*ln_post\.bias"):
        start(model, vision=tmp_path / "v.pt", resize="bicubic")
    del state["visual.proj"], state["visual.conv1.weight"]
    torch.save({k: torch.tensor(v) for k, v in state.items()}, tmp_path / "v.pt")
    with pytest.raises(DataError, match=r"missing: visual\.conv1\.weight"):
        start(model, vision=tmp_path / "v.pt", resize="bicubic")


def test_a_vision_tower_of_another_width_is_refused(model, metaclip):
    other = dataclasses.replace(
        model, vision=dataclasses.replace(model.vision, width=128, heads=1, image_size=48)
    )
    with pytest.raises(DataError, match=r"mis-shaped: .*vision/"):
        start(other, vision=metaclip)


def test_a_text_tower_with_other_words_is_refused(model, tmp_path):
    """Weights of the same shapes whose rows mean other words."""
    words = small_model.tokenizer(tmp_path / "run")
    (tmp_path / "bert").mkdir()
    cfg = config.Train(model=model, init=config.Init(text=str(tmp_path / "bert")))
    native.refuse_other_words(cfg, words)  # no vocabulary lies there
    lines = [w for w, _ in sorted(words.vocabulary().items(), key=lambda item: item[1])]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(lines) + "\n")
    native.refuse_other_words(cfg, words)  # the same words in another form
    lines[40], lines[41] = lines[41], lines[40]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"is number 4\d there, number 4\d in this run \(2 words differ\)"):
        native.refuse_other_words(cfg, words)


def test_a_model_folder_without_tokenizer_may_start_a_run(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": "unimed_jax.model", "tokenizer": None}))
    cfg = config.Train(model=model, init=config.Init(model=str(tmp_path)))
    native.refuse_other_tokenizer(cfg, "a" * 64)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "text.safetensors"])
def test_a_weight_file_belongs_to_the_words_beside_it(model, tmp_path, name):
    words = small_model.tokenizer(tmp_path / "run")
    (tmp_path / "bert").mkdir()
    lines = [w for w, _ in sorted(words.vocabulary().items(), key=lambda item: item[1])]
    lines[40], lines[41] = lines[41], lines[40]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(lines) + "\n")
    for part in ("text", "model"):
        cfg = config.Train(
            model=model, init=config.from_dict(config.Init, {part: str(tmp_path / "bert" / name)})
        )
        with pytest.raises(DataError, match=r"2 words differ.*data.tokenizer="):
            native.refuse_other_words(cfg, words)
    cfg = config.Train(model=model, init=config.Init(text=str(tmp_path / "bert" / "epoch_5.pt")))
    native.refuse_other_words(cfg, words)  # lies there by chance


@pytest.mark.parametrize("form", ["bare", "training"])
def test_a_file_of_torch_before_its_zip_format(model, bert, tmp_path, form):
    folder, text = bert
    state = torch.load(folder / "pytorch_model.bin")
    body = state if form == "bare" else {"epoch": 1, "state_dict": state, "scaler": {}}
    torch.save(body, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    lines: list[str] = []
    out = start(model, lines, text=tmp_path / "old.bin")
    same(
        {k: v for k, v in out["text"].items() if k != "proj"}, {k: v for k, v in text.items() if k != "proj"}
    )
    assert (f"{tmp_path / 'old.bin'}: scaler: left out (no tensors of the model)" in lines) == (
        form == "training"
    )


@pytest.mark.parametrize("name", ["openai-b16", "biomedbert-base"])
def test_a_name_says_how_to_fetch_it_and_works_once_it_is_there(model, tmp_path, monkeypatch, name):
    monkeypatch.setenv("UNIMED_JAX_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"unimed-jax models fetch {name} --out {tmp_path / name}"):
        start(model, text=name)
    params, file = small_model.params(model, 9), "model" if name == "openai-b16" else "text"
    leaves = {"text": params["text"]} if file == "text" else params
    native.save_tower(leaves, tmp_path / name / f"{file}.safetensors")
    (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir("/")
    same(start(model, text=name)["text"], params["text"])
