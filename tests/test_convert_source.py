"""Every kind of checkpoint is opened, compared tensor by tensor, and gives the same weights bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import TOWERS, golden, params, random_model, state
from safetensors.numpy import save_file

from unimed_jax import config
from unimed_jax.convert import (
    architecture,
    card,
    dinov2_onnx,
    hf_configs,
    mapping,
    openclip_config,
    outputs,
    tables,
)
from unimed_jax.convert.source import open_source
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip, zoo

FORMS = list(TOWERS)
TINY = zoo.get("tiny")


def write_folder(folder: Path, m: config.Model, form: str, s: dict[str, np.ndarray]) -> Path:
    """A folder as the format's own library writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict] = {}
    weights = "model.safetensors"
    if form.startswith("openclip"):
        weights = "open_clip_model.safetensors"
        files[openclip_config.NAME] = openclip_config.write(m, text_name="some/bert", tokenizer_name="")
        if m.text.kind == "bert":
            files["config.json"] = hf_configs.bert(m.text)
        if form == "openclip-timm":  # no ViT of timm is small enough; its settings are read as they are
            files[openclip_config.NAME]["model_cfg"]["vision_cfg"] |= {
                "head_width": m.vision.width // m.vision.heads
            }
    elif form == "hf-clip":
        files = {
            "config.json": hf_configs.clip(m, None),
            "preprocessor_config.json": hf_configs.pictures(m.vision),
        }
    elif form == "hf-vision":
        files["config.json"] = hf_configs.clip_vision(m)
    elif form == "hf-bert":
        files["config.json"] = hf_configs.bert(m.text)
    elif form == "hf-dinov2":
        v = m.vision
        files["config.json"] = {
            "model_type": "dinov2",
            "hidden_size": v.width,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.heads,
            "mlp_ratio": v.mlp_dim // v.width,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "hidden_act": v.act,
            "layer_norm_eps": v.ln_eps,
        }
        files["preprocessor_config.json"] = {
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
        }
    elif form == "native":
        files["config.json"] = {"format": "unimed_jax.model", "version": 1, "model": config.to_dict(m)}
    save_file(s, folder / weights)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def same_bits(a: dict, b: dict) -> None:
    a, b = clip.flatten(a), clip.flatten(b)
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == np.float32
        assert np.array_equal(np.asarray(a[k]).view(np.uint32), np.asarray(b[k]).view(np.uint32)), k


# --- every format


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_random_models_come_in_bit_for_bit(tmp_path, form, seed):
    """Folders where the library writes configs; else the bare file with what it cannot say given."""
    rng = np.random.default_rng([seed, FORMS.index(form), 1])
    m = random_model(rng, form)
    p = params(m, seed)
    s = state(m, form, p)
    if form in ("unimed", "openclip-timm"):
        save_file(s, tmp_path / "model_only.safetensors")
        source = open_source(tmp_path / "model_only.safetensors", model=m)
    else:
        source = open_source(write_folder(tmp_path / "x", m, form, s))
    assert source.format == ("openclip" if form.startswith("openclip") else form)
    assert source.towers == tuple(t for t, n in zip(("vision", "text"), TOWERS[form], strict=True) if n)
    want, got = architecture.flat(m), architecture.flat(source.model)
    unsaid = {"text.dropout"} if form == "hf-bert" else set()
    for k in want:
        if k.split(".")[0] in source.towers and k not in unsaid:
            assert got[k] == want[k], k
    assert source.report() == f"{len(s)} tensors: {len(s)} loaded, 0 ignored, 0 initialised"
    kept = {
        t: {k: v for k, v in p[t].items() if form not in ("hf-bert",) or k != "proj"} for t in source.towers
    }
    scalars = {k: p[k] for k in ("logit_scale",)} if len(source.towers) == 2 else {}
    same_bits(source.params(), kept | scalars)


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        *(("unimed", p) for p in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")),
        *((form, "module.") for form in ("openclip-bert", "openclip-clip", "openclip-timm")),
    ],
)
def test_wrappers_and_training_checkpoints(tmp_path, form, prefix):
    torch = pytest.importorskip("torch")
    m = random_model(np.random.default_rng(5), form)
    p = params(m)
    s = {f"{prefix}{k}": torch.from_numpy(np.array(v)) for k, v in state(m, form, p).items()}
    body = {
        "epoch": 7,
        "name": "run",
        "epoch_step": 12,
        "state_dict": s,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float64(1e-4)}]},
        "scaler": {"scale": 65536.0},
    }
    torch.save(body, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt", model=m)
    same_bits(source.params(), p)
    assert source.facts == {"epoch": 7, "name": "run", "epoch_step": 12, "left_out": ["scaler"]}
    assert source.optimizer is not None
    assert source.optimizer.keys() == {"state", "param_groups"}
    torch.save(s, tmp_path / "bare.pth")
    bare = open_source(tmp_path / "bare.pth", model=m)
    assert bare.facts == {}
    assert bare.optimizer is None
    same_bits(bare.params(), p)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_tensor_is_left_out_by_name(tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    s: dict = {k: torch.from_numpy(np.array(v)) for k, v in state(TINY, "unimed", params(TINY)).items()}
    s |= {"experts": [torch.ones(2), torch.ones(2)], "note": "by hand"}
    torch.save({"state_dict": s, "scaler": {}} if wrapped else s, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt", model="tiny")
    assert source.facts["left_out"] == ["scaler"] * wrapped + ["experts", "note"]
    torch.save(s | {f"n{i}": i for i in range(200)}, tmp_path / "a.pt")
    names = open_source(tmp_path / "a.pt", model="tiny").facts["left_out"]
    assert (len(names), names[-1]) == (101, "102 more")
    if not wrapped:
        torch.save(s, tmp_path / "a.bin")
        tensors = [k for k, v in s.items() if isinstance(v, torch.Tensor)]
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.bin")}))
        assert open_source(index, model="tiny").facts["left_out"] == ["experts", "note"]


def test_a_key_with_and_without_its_prefix_is_refused(tmp_path):
    s = state(TINY, "unimed", params(TINY))
    save_file(s | {"module.logit_scale": s["logit_scale"]}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="'logit_scale' twice"):
        open_source(tmp_path / "a.safetensors", model="tiny")


def test_buffers_and_heads_are_ignored_with_a_reason(tmp_path):
    s = state(TINY, "unimed", params(TINY))
    s["text_encoder.transformer.embeddings.position_ids"] = np.arange(32)[None]
    save_file(s, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors", model="tiny")
    assert source.ignored == {"text_encoder.transformer.embeddings.position_ids": "position_ids buffer"}
    assert (
        source.report()
        == f"{len(s)} tensors: {len(s) - 1} loaded, 1 ignored (position_ids buffer), 0 initialised"
    )
    m = random_model(np.random.default_rng(0), "hf-bert")
    bert = {f"bert.{k}": v for k, v in state(m, "hf-bert", params(m)).items()}
    bert["bert.pooler.dense.weight"] = np.zeros((3, 3), np.float32)
    bert["cls.predictions.bias"] = np.zeros(3, np.float32)
    bert["cls.seq_relationship.weight"] = np.zeros((2, 3), np.float32)
    source = open_source(write_folder(tmp_path / "bert", m, "hf-bert", bert))
    assert sorted(source.ignored.values()) == [
        "pooler, not part of the encoder",
        "pre-training head, not part of the encoder",
        "pre-training head, not part of the encoder",
    ]


def test_openai_archives(tmp_path):
    """TorchScript, half precision, numbers beside the weights; the activation is OpenAI's."""
    torch = pytest.importorskip("torch")
    m = random_model(np.random.default_rng(3), "openclip-clip")
    m.vision.act = m.text.act = "quick_gelu"
    m.text.eot_id = -1
    p = params(m)
    root = torch.nn.Module()
    for key, value in state(m, "openclip-clip", p).items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        kind = torch.float32 if key == "logit_scale" else torch.float16
        node.register_parameter(name, torch.nn.Parameter(torch.from_numpy(np.array(value)).to(kind)))
    for name, value in (("input_resolution", 8), ("context_length", 9), ("vocab_size", 10)):
        root.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(root), str(tmp_path / "openai.pt"))
    source = open_source(tmp_path / "openai.pt", fallback=m)
    assert source.format == "openai"
    assert source.model.vision.act == source.model.text.act == "quick_gelu"
    assert set(source.ignored.values()) == {"number beside OpenAI's weights"}
    got = clip.flatten(source.params())
    for name, leaf in clip.flatten(p).items():
        want = leaf if name == "logit_scale" else leaf.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_half_precision_is_widened_exactly_and_other_types_refused(tmp_path):
    p = params(TINY)
    s = state(TINY, "unimed", p)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({k: v.astype(dtype) for k, v in s.items()}, tmp_path / "h.safetensors")
        got = clip.flatten(open_source(tmp_path / "h.safetensors", model="tiny").params())
        for name, leaf in clip.flatten(p).items():
            np.testing.assert_array_equal(got[name], leaf.astype(dtype).astype(np.float32))
    s["visual.proj"] = s["visual.proj"].astype(np.int32)
    s["visual.ln_post.bias"] = s["visual.ln_post.bias"].astype(np.float64) / 3
    save_file(s, tmp_path / "i.safetensors")
    with pytest.raises(DataError, match=r"1 not floating point: visual\.proj"):
        open_source(tmp_path / "i.safetensors", model="tiny")
    s["visual.proj"] = s["visual.proj"].astype(np.float64)
    save_file(s, tmp_path / "i.safetensors")
    with pytest.raises(DataError, match=r"visual\.ln_post\.bias"):
        open_source(tmp_path / "i.safetensors", model="tiny").params()


def test_sharded_folders(tmp_path):
    m = random_model(np.random.default_rng(2), "hf-clip")
    p = params(m)
    s = state(m, "hf-clip", p)
    folder = write_folder(tmp_path, m, "hf-clip", s)
    (folder / "model.safetensors").unlink()
    where = {k: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, k in enumerate(s)}
    for file in set(where.values()):
        save_file({k: v for k, v in s.items() if where[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same_bits(open_source(folder).params(), p)
    same_bits(open_source(folder / "model.safetensors.index.json").params(), p)


def test_new_names_and_layer_scale_of_dinov2(tmp_path):
    m = random_model(np.random.default_rng(8), "hf-dinov2")
    p = params(m)
    s = state(m, "hf-dinov2", p)
    names = {
        ".attention.attention.query.": ".attention.q_proj.",
        ".attention.attention.key.": ".attention.k_proj.",
        ".attention.attention.value.": ".attention.v_proj.",
        ".attention.output.dense.": ".attention.o_proj.",
    }
    new = {}
    for k, v in s.items():
        for old, name in names.items():
            k = k.replace(old, name)
        new[f"dinov2.{k}"] = v * 2 if "layer_scale" in k else v
    new["dinov2.embeddings.mask_token"] = np.zeros((1, m.vision.width), np.float32)
    new["classifier.weight"] = np.zeros((3, 2), np.float32)
    source = open_source(write_folder(tmp_path, m, "hf-dinov2", new))
    assert len(source.ignored) == 2
    got = source.params()["vision"]["blocks"]
    np.testing.assert_array_equal(
        got["mlp"]["down"]["kernel"], 2 * p["vision"]["blocks"]["mlp"]["down"]["kernel"]
    )
    np.testing.assert_array_equal(
        got["attn"]["out"]["bias"], 2 * p["vision"]["blocks"]["attn"]["out"]["bias"]
    )
    np.testing.assert_array_equal(got["mlp"]["up"]["kernel"], p["vision"]["blocks"]["mlp"]["up"]["kernel"])


# --- faults


def faulty(change) -> dict[str, np.ndarray]:
    s = state(TINY, "unimed", params(TINY))
    change(s)
    return s


BLOCK = "visual.transformer.resblocks.1"
FAULTS = {
    "dropped": (lambda s: s.pop(f"{BLOCK}.ln_1.bias"), rf"1 missing: {BLOCK}\.ln_1\.bias"),
    "dropped for good": (lambda s: s.pop("visual.conv1.weight"), r"1 missing: visual\.conv1\.weight"),
    "temperature": (lambda s: s.pop("logit_scale"), "1 missing: logit_scale"),
    "extra": (lambda s: s.update(extra=np.zeros(2, np.float32)), "1 unexpected: extra"),
    "scale": (lambda s: s.update(logit_scale=np.zeros(2, np.float32)), r"logit_scale \[2\] instead of \[\]"),
    "positions": (
        lambda s: s.update({"visual.positional_embedding": np.zeros((20, 64), np.float32)}),
        r"1 mis-shaped: visual\.positional_embedding \[20, 64\] instead of \[17, 64\]",
    ),
    "transposed": (
        lambda s: s.update({"visual.proj": np.ascontiguousarray(s["visual.proj"].T)}),
        r"visual\.proj \[32, 64\] instead of \[64, 32\]",
    ),
    "bias": (lambda s: s.update(logit_bias=np.zeros((), np.float32)), "1 unexpected: logit_bias"),
}


@pytest.mark.parametrize(
    ("fault", "named"),
    # Without a name, a logit_bias is no fault.
    [(f, n) for f in FAULTS for n in ("tiny", "") if n or f != "bias"],
)
def test_faults_are_listed(tmp_path, fault, named):
    change, word = FAULTS[fault]
    save_file(faulty(change), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=word) as e:
        open_source(tmp_path / "a.safetensors", model=named, fallback=None if named else TINY)
    assert e.value.exit_code == 3
    assert str(tmp_path) in str(e.value)
    assert "\n" not in e.value.line()


def test_all_faults_come_in_one_message_and_values_of_all_tensors(tmp_path):
    def change(s):
        for i in (0, 1):
            del s[f"visual.transformer.resblocks.{i}.mlp.c_fc.bias"]
        s["stranger"] = np.zeros(1, np.float32)
        s["visual.ln_pre.bias"][3] = np.nan
        s["text_encoder.proj.2.weight"][0, 1] = -np.inf

    save_file(faulty(change), tmp_path / "a.safetensors")
    with pytest.raises(DataError) as e:
        open_source(tmp_path / "a.safetensors", model="tiny")
    for word in (
        "2 missing: visual.transformer.resblocks.{0-1}.mlp.c_fc.bias",
        "1 unexpected: stranger",
        "2 not finite: visual.ln_pre.bias, text_encoder.proj.2.weight",
    ):
        assert word in str(e.value)


def test_values_that_are_not_finite_are_all_listed_when_the_leaves_are_made(tmp_path):
    def change(s):
        s["visual.ln_pre.bias"][3] = np.nan
        s["text_encoder.proj.2.weight"][0, 1] = np.inf
        s["logit_scale"] = np.full((), np.nan, np.float32)

    save_file(faulty(change), tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors", model="tiny")
    with pytest.raises(DataError, match="3 not finite") as e:
        source.params()
    for key in ("visual.ln_pre.bias", "text_encoder.proj.2.weight", "logit_scale"):
        assert key in str(e.value)


def test_names_from_a_file_are_escaped_and_bounded(tmp_path):
    """ESC and BEL reach no terminal, and a file cannot fill it."""
    strangers = ["visual.\x1b]0;owned\x07", *(f"visual.{i}_{'x' * 50_000}" for i in range(200))]
    s = faulty(lambda s: s.update({k: np.zeros(1, np.float32) for k in strangers}))
    save_file(s, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="201 unexpected") as e:
        open_source(tmp_path / "a.safetensors", model="tiny")
    assert r"visual.\x1b]0;owned\x07" in str(e.value)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 10_000


@pytest.mark.parametrize("name", ["org/bert\n\n# Approved for diagnosis", "x" * 5000, 3])
def test_facts_of_a_config_are_short_lines(tmp_path, name):
    m = random_model(np.random.default_rng(1), "openclip-bert")
    folder = write_folder(tmp_path, m, "openclip-bert", state(m, "openclip-bert", params(m)))
    spec = json.loads((folder / "open_clip_config.json").read_text())
    spec["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = name
    (folder / "open_clip_config.json").write_text(json.dumps(spec))
    assert "hf_tokenizer_name" not in open_source(folder).facts


def test_words_of_a_card_bring_no_markup():
    origin = card.Origin(file="w|x`y.pt", note=("a\n\n# Approved", "\\<script>", "z" * 5000))
    lines = card.card(config.Model(name="a`b"), "native", origin=origin).splitlines()
    assert lines[0] == r"# a\`b"
    assert r"| file | w\|x\`y.pt |" in lines
    assert "| note | a # Approved |" in lines
    assert r"| note | \\\<script> |" in lines
    assert max(map(len, lines)) < 700


def test_a_file_of_another_model_names_the_one_that_fits(tmp_path):
    """ViT-L into B: sizes disagree everywhere, the remedy is one name."""
    large = zoo.get("unimed-clip-vit-l14-336")
    holder = {k: np.broadcast_to(np.float32(0), v) for k, v in outputs.shapes("unimed", large).items()}
    found = architecture.infer({k: v.shape for k, v in holder.items()}, model=zoo.get("unimed-clip-vit-b16"))
    assert found.fits == ("unimed-clip-vit-l14-336",)
    save_file(faulty(lambda s: None), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"its shapes are those of tiny") as e:
        open_source(tmp_path / "a.safetensors", model="unimed-clip-vit-b16")
    assert "visual.positional_embedding [17, 64] instead of [197, 768]" in str(e.value)
    assert "visual.transformer.resblocks.{2-11}.mlp.c_fc.bias" in str(e.value)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint at"):
        open_source(tmp_path / "absent.pt")
    save_file(faulty(lambda s: None), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="no model 'b16'"):
        open_source(tmp_path / "a.safetensors", model="b16")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="no tower is known"):
        open_source(tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match=r"2 weight files and no config.*a\.safetensors, b\.safetensors"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no weights"):
        open_source(tmp_path / "empty")


# --- folders' configs


def test_a_folder_with_several_configs_and_a_preference(tmp_path):
    """Our own OpenCLIP folders hold a BERT config too."""
    m = random_model(np.random.default_rng(1), "openclip-bert")
    p = params(m)
    folder = write_folder(tmp_path, m, "openclip-bert", state(m, "openclip-bert", p))
    assert open_source(folder).format == "openclip"
    assert open_source(folder / "open_clip_model.safetensors").model == open_source(folder).model
    bert = dataclasses.replace(m, embed_dim=m.text.width, text=dataclasses.replace(m.text, proj="none"))
    save_file(state(bert, "hf-bert", p), folder / "model.safetensors")
    assert open_source(folder).format == "openclip"
    assert open_source(folder, prefer="hf").format == "hf-bert"
    with pytest.raises(UsageError, match="native"):
        open_source(folder, prefer="native")
    with pytest.raises(UsageError, match="prefer is"):
        open_source(folder, prefer="x")


@pytest.mark.parametrize(
    ("form", "file", "path", "value", "word"),
    [
        ("openclip-bert", "open_clip_config.json", "model_cfg.text_cfg.hf_pooler_type", "cls_pooler", "tanh"),
        (
            "openclip-bert",
            "open_clip_config.json",
            "model_cfg.vision_cfg.ls_init_value",
            0.1,
            "ls_init_value",
        ),
        ("openclip-bert", "open_clip_config.json", "model_cfg.vision_cfg.new_thing", 1, "new_thing"),
        ("openclip-bert", "open_clip_config.json", "model_cfg.vision_cfg.layers", [3, 4, 6, 3], "ResNet"),
        ("openclip-bert", "open_clip_config.json", "model_cfg.vision_cfg.width", 999, r"vision\.width is"),
        ("openclip-bert", "open_clip_config.json", "model_cfg.multimodal_cfg", {}, "multimodal_cfg"),
        ("openclip-bert", "open_clip_config.json", "model_cfg.vision_cfg.head_width", 0, "head_width is 0"),
        (
            "openclip-bert",
            "open_clip_config.json",
            "model_cfg.vision_cfg.head_width",
            -64,
            "head_width is -64",
        ),
        ("openclip-bert", "open_clip_config.json", "model_cfg.\x1b[2J", 1, r"model_cfg\.\\x1b\[2J"),
        ("openclip-bert", "open_clip_config.json", "preprocess_cfg.resize_mode", "squash", "squash"),
        ("openclip-bert", "open_clip_config.json", "preprocess_cfg.interpolation", "bilinear", "bilinear"),
        ("openclip-bert", "open_clip_config.json", "preprocess_cfg.mean", [0.1, 0.2, 0.3], "none of ours"),
        (
            "openclip-clip",
            "open_clip_config.json",
            "model_cfg.text_cfg.no_causal_mask",
            True,
            "no_causal_mask",
        ),
        ("hf-clip", "preprocessor_config.json", "image_mean", [0, 0, 0], "none of ours"),
        ("hf-clip", "preprocessor_config.json", "resample", 2, "resample 2"),
        ("hf-clip", "preprocessor_config.json", "size", {"height": 8, "width": 8}, "size"),
        ("hf-clip", "preprocessor_config.json", "do_center_crop", False, "do_center_crop"),
        ("hf-clip", "config.json", "vision_config.hidden_act", "relu", "relu"),
        ("hf-clip", "config.json", "model_type", "siglip", "siglip"),
        ("hf-clip", "config.json", "model_type", "vision-text-dual-encoder", "VisionTextDualEncoder"),
        ("hf-clip", "config.json", "text_config.num_attention_heads", "2", "num_attention_heads is '2'"),
        ("hf-bert", "config.json", "position_embedding_type", "relative_key", "relative_key"),
        ("hf-bert", "config.json", "is_decoder", True, "decoder"),
        ("hf-bert", "config.json", "num_attention_heads", 0, r"heads is 0"),
        ("hf-bert", "config.json", "num_attention_heads", 7919, "does not divide into 7919 heads"),
        ("hf-dinov2", "config.json", "use_swiglu_ffn", True, "gated MLP"),
        ("hf-dinov2", "preprocessor_config.json", "image_std", [1, 1, 1], "none of ours"),
    ],
)
def test_settings_that_we_do_not_have_are_refused_by_name(tmp_path, form, file, path, value, word):
    m = random_model(np.random.default_rng(4), form)
    folder = write_folder(tmp_path, m, form, state(m, form, params(m)))
    spec = json.loads((folder / file).read_text())
    *parents, name = path.split(".")
    node = spec
    for parent in parents:
        node = node[parent]
    node[name] = value
    (folder / file).write_text(json.dumps(spec))
    with pytest.raises(DataError, match=word) as e:
        open_source(folder)
    assert file in str(e.value) or str(folder) in str(e.value)


NASTY = [
    None,
    True,
    0,
    -1,
    3,
    2**70,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [1, "a"],
    {},
    {"a": []},
]


@pytest.mark.parametrize("form", ["openclip-bert", "openclip-clip", "hf-clip", "hf-bert", "hf-dinov2"])
def test_any_value_in_a_config_is_read_or_refused(tmp_path, form):
    """Every field of every config gets values that no library writes: one line, or a model of the same shapes."""
    m = random_model(np.random.default_rng(4), form)
    folder = write_folder(tmp_path, m, form, state(m, form, params(m)))
    rng = np.random.default_rng(0)
    refused = 0
    for file in sorted(folder.glob("*.json")):
        text = file.read_text()
        for path in paths(json.loads(text)):
            spec = json.loads(text)
            node = spec
            for parent in path[:-1]:
                node = node[parent]
            node[path[-1]] = NASTY[rng.integers(len(NASTY))]
            file.write_text(json.dumps(spec))
            try:
                open_source(folder)
            except (DataError, UsageError):
                refused += 1
        file.write_text(text)
    assert refused > 5
    open_source(folder)


def paths(spec, at=()):
    for key, value in spec.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


def test_a_damaged_config_is_refused(tmp_path):
    m = random_model(np.random.default_rng(4), "hf-clip")
    folder = write_folder(tmp_path, m, "hf-clip", state(m, "hf-clip", params(m)))
    for text in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(DataError, match="JSON"):
            open_source(folder)


def test_biomedclip_folder(tmp_path):
    """Its config names a timm tower; the tensors must be that tower's."""
    m = zoo.get("biomedclip")
    m.vision.width, m.vision.heads, m.vision.depth, m.vision.mlp_dim = 192, 3, 12, 768
    m.text = random_model(np.random.default_rng(0), "openclip-bert").text
    m.text.proj = "mlp"
    p = params(m)
    folder = write_folder(tmp_path, m, "openclip-bert", state(m, "openclip-timm", p))
    spec = json.loads((folder / "open_clip_config.json").read_text())
    assert spec["model_cfg"]["vision_cfg"]["timm_model_name"] == "vit_tiny_patch16_224"
    source = open_source(folder)
    assert architecture.same(source.model, m)
    same_bits(source.params(), p)
    if torch := pytest.importorskip("torch"):  # as it is distributed
        (folder / "open_clip_model.safetensors").unlink()
        s = {k: torch.from_numpy(np.array(v)) for k, v in source.state.items()}
        torch.save(s, folder / "open_clip_pytorch_model.bin")
        same_bits(open_source(folder).params(), p)
    spec["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_base_patch16_224"
    (folder / "open_clip_config.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"vision\.width is 192 by the tensors, 768 by the config"):
        open_source(folder)
    spec["model_cfg"]["vision_cfg"]["timm_model_name"] = "resnet50"
    (folder / "open_clip_config.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="resnet50"):
        open_source(folder)


# --- names and shapes of the released models, and their sizes


def test_our_names_and_shapes_are_those_of_the_released_files():
    for name, (form, want) in golden().items():
        m = zoo.get("tiny" if form == "openclip" else name)
        assert outputs.shapes(form, m) == want, name
    assert [len(want) for form, want in golden().values() if form == "unimed"] == [352, 496, 688]


class Made(dict):
    """A full-size state dict whose tensors are made when they are looked at."""

    pool = np.random.default_rng(0).normal(size=2**22 + 2**16).astype(np.float32)

    def __getitem__(self, key: str) -> np.ndarray:
        shape = super().__getitem__(key)
        start = zlib.crc32(key.encode()) % 2**16
        return np.resize(self.pool[start : start + 2**22], shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["unimed-clip-vit-b16", "unimed-clip-vit-l14-336", "unimed-clip-vit-l14-336-large-text"]
)
def test_full_size_towers_go_there_and_back_bit_for_bit(name):
    """Each tensor of the released variants through the tables of every format that holds it; one leaf in memory."""
    m = zoo.get(name)
    made = Made(golden()[name][1])
    pairs = [
        (tables.OPENCLIP_VISION, (tables.OPENCLIP_VISION, tables.HF_CLIP_VISION)),
        (tables.UNIMED_TEXT, (tables.UNIMED_TEXT, tables.OPENCLIP_HF_TEXT)),
    ]
    for first, others in pairs:
        for row, shape in mapping.rows_of(first, m):
            leaf = mapping._take(made, row, shape, [])
            for other in others:
                back = next(r for r in other.rows if r.ours == row.ours)
                one = dataclasses.replace(other, rows=(back,), absent=(rf"(?!{row.ours}$).*",))
                theirs = dict(mapping.to_state(clip.unflatten({row.ours: leaf}), one, m))
                again = mapping._take(theirs, back, shape, [])
                assert np.array_equal(again, leaf)
                if other is first:
                    assert all(np.array_equal(v, made[k]) for k, v in theirs.items())


# --- real weights


@pytest.mark.assets
def test_the_real_minilm_comes_in_and_goes_back_to_equal_bytes(assets):
    source = open_source(assets / "minilm")
    assert source.format == "hf-bert"
    assert source.report().startswith("104 tensors: 101 loaded, 3 ignored")
    assert (source.model.text.heads, source.model.text.width) == (12, 384)
    assert source.tokenizer == assets / "minilm" / "tokenizer.json"
    back = dict(mapping.to_state(source.params()["text"], tables.HF_BERT, source.model))
    kept = source.state.keys() - source.ignored.keys()
    assert back.keys() == kept
    assert all(back[k].tobytes() == np.asarray(source.state[k]).tobytes() for k in kept)


@pytest.mark.assets
def test_the_real_dinov2_comes_in_and_goes_back(assets, tmp_path):
    """Folded LayerScale comes back as ones; every other tensor, and the function, has equal bytes."""
    pytest.importorskip("onnx")
    s = dinov2_onnx.read_onnx(assets / "dinov2" / "vit_s_focus.onnx")
    m = random_model(np.random.default_rng(0), "hf-dinov2")
    side = int(np.sqrt(s["embeddings.position_embeddings"].shape[1] - 1))
    m.vision = dataclasses.replace(
        m.vision, image_size=side * 14, patch_size=14, width=384, depth=12, heads=6, mlp_dim=1536
    )
    source = open_source(
        write_folder(tmp_path, m, "hf-dinov2", {k: np.ascontiguousarray(v) for k, v in s.items()})
    )
    assert source.model.vision == m.vision
    p = source.params()["vision"]
    back = tables.from_params(p, tables.HF_DINOV2, source.model)
    folded = re.compile(r".*\.(layer_scale\d\.lambda1|attention\.output\.dense\.\w+|mlp\.fc2\.\w+)")
    plain = [k for k in back if not folded.fullmatch(k)]
    assert len(plain) > 100
    assert all(back[k].tobytes() == np.asarray(s[k], np.float32).tobytes() for k in plain)
    same_bits(tables.to_params(back, tables.HF_DINOV2, source.model), p)
