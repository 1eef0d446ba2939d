"""Weight tables: exact both ways, strict about names, shapes and values; native tower files; starting from them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimed_jax import config
from unimed_jax.convert import dinov2_onnx, mapping, native, tables, tensor_file
from unimed_jax.convert.source import open_source
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip

VISION = config.Vision(image_size=16, patch_size=8, width=12, depth=3, heads=2, mlp_dim=20)
DINO = dataclasses.replace(VISION, ln_pre=False, patch_bias=True, ln_eps=1e-6, act="gelu")
BERT = config.Text(
    vocab_size=9, context_length=6, max_positions=7, width=12, depth=3, heads=2, mlp_dim=20, proj="linear"
)
CLIP_TEXT = dataclasses.replace(BERT, kind="clip", pool="eot", max_positions=6)
TIMM = dataclasses.replace(DINO, mlp_dim=48)
CASES = {
    "hf_clip_vision": config.Model(embed_dim=5, vision=VISION, text=BERT),
    "hf_clip_text": config.Model(embed_dim=5, vision=VISION, text=CLIP_TEXT),
    "hf_bert": config.Model(embed_dim=5, vision=VISION, text=BERT),
    "hf_dinov2": config.Model(embed_dim=5, vision=DINO, text=BERT),
    "openclip_vision": config.Model(embed_dim=5, vision=VISION, text=BERT),
    "timm_vision": config.Model(embed_dim=5, vision=TIMM, text=BERT),
    "openclip_clip_text": config.Model(embed_dim=5, vision=VISION, text=CLIP_TEXT),
    "openclip_custom_clip_text": config.Model(embed_dim=5, vision=VISION, text=CLIP_TEXT),
    "openclip_hf_text": config.Model(embed_dim=5, vision=VISION, text=BERT),
    "unimed_text": config.Model(embed_dim=6, vision=VISION, text=dataclasses.replace(BERT, proj="mlp")),
}
B16 = config.Model()


def random_params(m, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32),
        clip.skeleton(m)[1],
        is_leaf=lambda a: hasattr(a, "shape"),
    )


def without_head(tower):
    return {k: v for k, v in tower.items() if k != "proj"}


def assert_same(a, b):
    a, b = clip.flatten(a), clip.flatten(b)
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


@pytest.fixture(params=CASES)
def case(request):
    table, m = tables.TABLES[request.param], CASES[request.param]
    return table, m, random_params(m)[table.tower]


def test_there_and_back_is_bit_equal(case):
    table, m, params = case
    state = tables.from_params(params, table, m)
    again = tables.to_params(state, table, m)
    assert_same(again, without_head(params) if table.absent else params)
    assert all(v.flags.c_contiguous and v.dtype == np.float32 for v in state.values())
    back = tables.from_params(again, table, m)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[k], state[k]) for k in state)


def test_layers_and_fused_parts_go_to_their_own_keys():
    m = CASES["hf_bert"]
    params = random_params(m)["text"]
    state = tables.from_params(params, tables.HF_BERT, m)
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(state["encoder.layer.1.attention.self.key.weight"], kernel[1][:, 12:24].T)
    np.testing.assert_array_equal(
        state["encoder.layer.2.attention.output.LayerNorm.weight"], params["blocks"]["ln1"]["scale"][2]
    )
    assert state["encoder.layer.0.intermediate.dense.weight"].shape == (20, 12)


def test_key_count_of_the_published_b16():
    """352 tensors with fused qkv in the reference; Hugging Face splits it: 200 for vision, 197 for BERT."""
    shapes = {}
    for table in (tables.HF_CLIP_VISION, tables.HF_BERT):
        shapes[table.name] = mapping.their_shapes(table, B16)
    assert len(shapes["CLIPVisionModelWithProjection"]) == 7 + 12 * 16 + 1
    assert len(shapes["BertModel"]) == 5 + 12 * 16
    total = sum(int(np.prod(s)) for part in shapes.values() for s in part.values())
    assert total == 195_903_489 - 1 - (768 * 640 + 640 * 512)


def test_layer_scale_is_folded_into_the_branch():
    m = CASES["hf_dinov2"]
    params = random_params(m)["vision"]
    state = tables.from_params(params, tables.HF_DINOV2, m)
    assert np.array_equal(state["encoder.layer.1.layer_scale2.lambda1"], np.ones(12))
    scale = np.linspace(0.5, 2, 12, dtype=np.float32)
    state["encoder.layer.1.layer_scale2.lambda1"] = scale
    folded = tables.to_params(state, tables.HF_DINOV2, m)
    down, plain = folded["blocks"]["mlp"]["down"], params["blocks"]["mlp"]["down"]
    np.testing.assert_array_equal(down["kernel"][1], plain["kernel"][1] * scale)
    np.testing.assert_array_equal(down["bias"][1], plain["bias"][1] * scale)
    np.testing.assert_array_equal(down["kernel"][0], plain["kernel"][0])


# --- strictness


def test_every_fault_is_listed(case):
    table, m, params = case
    state = tables.from_params(params, table, m)
    missing, shaped, *_ = state
    broken = list(state)[-3]
    del state[missing]
    state["something.else"] = np.zeros(3)
    state[shaped] = np.zeros((2, 2, 2))
    state[broken] = np.full_like(state[broken], np.nan)
    with pytest.raises(DataError) as e:
        tables.to_params(state, table, m, where="file.safetensors")
    for word in (
        "file.safetensors",
        table.name,
        f"1 missing: {missing}",
        "1 unexpected: something.else",
        f"1 mis-shaped: {shaped} [2, 2, 2]",
        f"1 not finite: {broken}",
    ):
        assert word in str(e.value)
    assert e.value.exit_code == 3


def test_another_depth_is_refused_both_ways(case):
    table, m, params = case
    state = tables.from_params(params, table, m)
    tower = getattr(m, table.tower)
    for depth, word in ((2, "unexpected"), (4, "missing")):
        other = dataclasses.replace(m, **{table.tower: dataclasses.replace(tower, depth=depth)})
        with pytest.raises(DataError, match=word):
            tables.to_params(state, table, other)
        with pytest.raises(DataError, match="mis-shaped"):
            tables.from_params(params, table, other)


def test_an_architecture_that_the_format_cannot_hold_is_refused():
    m = CASES["hf_dinov2"]
    with pytest.raises(DataError, match="no place for patch/bias"):
        tables.from_params(random_params(m)["vision"], tables.HF_CLIP_VISION, m)
    with pytest.raises(DataError, match="no place for ln_embed"):
        tables.to_params({}, tables.HF_CLIP_TEXT, CASES["hf_bert"])


def test_buffers_poolers_and_old_spellings_are_understood():
    m = CASES["hf_bert"]
    params = random_params(m)["text"]
    state = {f"bert.{k}": v for k, v in tables.from_params(params, tables.HF_BERT, m).items()}
    state["bert.embeddings.position_ids"] = np.arange(7)[None]
    state["bert.pooler.dense.weight"] = np.zeros((12, 12))
    state["cls.predictions.bias"] = np.zeros(9)
    state["bert.embeddings.LayerNorm.gamma"] = state.pop("bert.embeddings.LayerNorm.weight")
    state["bert.embeddings.LayerNorm.beta"] = state.pop("bert.embeddings.LayerNorm.bias")
    assert_same(tables.to_params(state, tables.HF_BERT, m), without_head(params))


# --- ONNX


def onnx_file(path, state):
    """An export as torch writes it: named biases, anonymous transposed matrices, positions split in two."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    nodes, arrays = [], {}
    for n, (key, value) in enumerate(state.items()):
        if key == "embeddings.position_embeddings":
            arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif value.ndim == 2 and key.endswith(".weight"):
            arrays[f"onnx::MatMul_{n + 10}"] = value.T
            nodes.append(helper.make_node("MatMul", [f"x{n}", f"onnx::MatMul_{n + 10}"], [f"y{n}"]))
            bias = "backbone." + key.replace(".weight", ".bias")
            nodes.append(helper.make_node("Add", [bias, f"y{n}"], [f"z{n}"]))
        else:
            arrays[f"backbone.{key}"] = value
    arrays["decoder.weight"] = np.zeros((2, 2), np.float32)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(a), k) for k, a in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), str(path))


def test_onnx_matrices_get_their_names_from_their_biases(tmp_path):
    m = CASES["hf_dinov2"]
    state = tables.from_params(random_params(m)["vision"], tables.HF_DINOV2, m)
    onnx_file(tmp_path / "v.onnx", state)
    read = dinov2_onnx.read_onnx(tmp_path / "v.onnx")
    assert read.keys() == state.keys()
    assert all(np.array_equal(read[k], state[k]) for k in state)
    # Another model than DINOv2-S is refused by its shapes.
    with pytest.raises(DataError, match="mis-shaped"):
        dinov2_onnx.vision_from_dinov2_onnx(tmp_path / "v.onnx", 28)


def test_bad_onnx_files_are_refused(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(DataError, match=r"absent\.onnx"):
        dinov2_onnx.read_onnx(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match=r"bad\.onnx"):
        dinov2_onnx.read_onnx(tmp_path / "bad.onnx")
    m = CASES["hf_dinov2"]
    state = tables.from_params(random_params(m)["vision"], tables.HF_DINOV2, m)
    del state["embeddings.position_embeddings"]
    onnx_file(tmp_path / "nopos.onnx", state)
    with pytest.raises(DataError, match="position table"):
        dinov2_onnx.read_onnx(tmp_path / "nopos.onnx")


# --- Hugging Face files


def bert_folder(folder, m, **changes):
    from safetensors.numpy import save_file

    t = m.text
    params = random_params(m)["text"]
    save_file(tables.from_params(params, tables.HF_BERT, m), folder / "model.safetensors")
    c = {
        "model_type": "bert",
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.max_positions,
        "hidden_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "intermediate_size": t.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(c | changes))
    return without_head(params)


def test_bert_folder(tmp_path):
    want = bert_folder(tmp_path, CASES["hf_bert"])
    opened = open_source(tmp_path)
    assert_same(opened.params()["text"], want)
    c = opened.model.text
    assert (c.width, c.depth, c.heads, c.mlp_dim, c.context_length) == (12, 3, 2, 20, 7)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 2}, "depth is 3 by the tensors, 2 by the config"),
        ({"vocab_size": 10}, "vocab_size is 9 by the tensors, 10 by the config"),
        ({"hidden_act": "relu"}, "relu"),
        ({"model_type": "roberta"}, "roberta"),
    ],
)
def test_bert_folder_that_disagrees_with_itself(tmp_path, changes, word):
    bert_folder(tmp_path, CASES["hf_bert"], **changes)
    with pytest.raises(DataError, match=word):
        open_source(tmp_path)


def test_cut_and_missing_files_are_refused(tmp_path):
    bert_folder(tmp_path, CASES["hf_bert"])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"no complete safetensors"):
        tensor_file.read_with_metadata(file)
    with pytest.raises(DataError, match="does not exist"):
        tensor_file.read_with_metadata(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        open_source(tmp_path)


def test_half_precision_becomes_float32(tmp_path):
    import ml_dtypes
    from safetensors.numpy import save_file

    a = np.linspace(-1, 1, 8).astype(np.float16)
    save_file({"h": a, "b": a.astype(ml_dtypes.bfloat16), "i": np.arange(3)}, tmp_path / "x.safetensors")
    state, _ = tensor_file.read_with_metadata(tmp_path / "x.safetensors")
    assert state["h"].dtype == state["b"].dtype == np.float32
    assert state["i"].dtype == np.int64
    np.testing.assert_array_equal(state["h"], a.astype(np.float32))


# --- native files and init


def test_tower_file_round_trip(tmp_path):
    m = CASES["hf_bert"]
    params = {"vision": random_params(m)["vision"]}
    meta = {"source": "test", "vision": config.to_dict(m.vision)}
    native.save_tower(params, tmp_path / "a" / "v.safetensors", meta)
    again, read = native.load_tower(tmp_path / "a" / "v.safetensors")
    assert_same(again, params)
    assert read == meta
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["v.safetensors"]


def test_a_foreign_file_is_no_tower(tmp_path):
    from safetensors.numpy import save_file

    save_file({"vision/pos": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no tower file"):
        native.load_tower(tmp_path / "x.safetensors")


def train_config(m, **init):
    return config.Train(model=m, init=config.Init(**{k: str(v) for k, v in init.items()}))


def test_init_overlays_towers_and_names_the_rest(tmp_path):
    m = CASES["hf_bert"]
    start, other = random_params(m, 1), random_params(m, 2)
    native.save_tower({"vision": without_head(other["vision"])}, tmp_path / "v.st")
    native.save_tower({"text": other["text"]}, tmp_path / "t.st")
    lines: list[str] = []
    cfg = train_config(m, vision=tmp_path / "v.st", text=tmp_path / "t.st")
    start = jax.tree.map(jnp.asarray, start)
    out = native.init_from(cfg, start, report=lines.append)
    assert_same(out["text"], other["text"])
    assert_same(without_head(out["vision"]), without_head(other["vision"]))
    assert_same(out["vision"]["proj"], start["vision"]["proj"])
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(out))
    assert len(lines) == len(clip.flatten(start))
    initialised = [line for line in lines if line.endswith(": initialised")]
    assert [line.split(" ")[0] for line in initialised] == ["logit_scale", "vision/proj/kernel"]
    assert_same(native.init_from(train_config(m), start), start)


def test_init_from_a_whole_model_folder(tmp_path):
    from safetensors.numpy import save_file

    m = CASES["hf_bert"]
    start, other = random_params(m, 1), random_params(m, 2)
    save_file(clip.flatten(other), tmp_path / "model.safetensors")
    assert_same(native.init_from(train_config(m, model=tmp_path), start), other)
    native.save_tower({"text": start["text"]}, tmp_path / "t.st")
    out = native.init_from(train_config(m, model=tmp_path, text=tmp_path / "t.st"), start)
    assert_same(out["text"], start["text"])
    assert_same(out["vision"], other["vision"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v.pop("pos"), "1 missing: vision/pos"),
        (lambda v: v.update(extra=np.zeros(2, np.float32)), "1 unexpected: vision/extra"),
        (
            lambda v: v.update(cls=np.zeros(13, np.float32)),
            r"mis-shaped: vision/cls \[13\] instead of \[12\]",
        ),
        (lambda v: v.update(cls=np.full(12, np.inf, np.float32)), "not finite: vision/cls"),
    ],
)
def test_init_refuses_what_does_not_fit(tmp_path, change, word):
    m = CASES["hf_bert"]
    tower = random_params(m)["vision"]
    change(tower)
    native.save_tower({"vision": tower}, tmp_path / "v.st")
    with pytest.raises(DataError, match=word):
        native.init_from(train_config(m, vision=tmp_path / "v.st"), random_params(m))


def test_init_refuses_another_activation_and_another_tower(tmp_path):
    m = CASES["hf_bert"]
    params = random_params(m)
    meta = {"vision": config.to_dict(m.vision)}
    native.save_tower({"vision": params["vision"]}, tmp_path / "v.st", meta)
    other = dataclasses.replace(m, vision=dataclasses.replace(m.vision, act="gelu"))
    with pytest.raises(DataError, match=r"vision\.act 'quick_gelu'"):
        native.init_from(train_config(other, vision=tmp_path / "v.st"), params)
    with pytest.raises(DataError, match="no text tower"):
        native.init_from(train_config(m, text=tmp_path / "v.st"), params)


@pytest.mark.parametrize(
    ("tower", "field", "value"), [("vision", "act", "gelu"), ("text", "pool", "mean"), ("text", "pad_id", 3)]
)
def test_init_refuses_a_whole_model_of_another_meaning(tmp_path, tower, field, value):
    """Weights of the same shapes would be taken silently."""
    from safetensors.numpy import save_file

    m = CASES["hf_bert"]
    params = random_params(m)
    save_file(clip.flatten(params), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model": config.to_dict(m), "tokenizer": {"digest": "a" * 64}})
    )
    native.init_from(train_config(m, model=tmp_path), params)
    other = dataclasses.replace(m, **{tower: dataclasses.replace(getattr(m, tower), **{field: value})})
    with pytest.raises(DataError, match=rf"was made for {tower}\.{field} "):
        native.init_from(train_config(other, model=tmp_path), params)


def test_a_run_does_not_start_from_a_model_with_another_tokenizer(tmp_path):
    cfg = train_config(CASES["hf_bert"], model=tmp_path)
    native.refuse_other_tokenizer(cfg, "b" * 64)  # weights alone name none
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer": {"digest": "a" * 64}}))
    native.refuse_other_tokenizer(cfg, "a" * 64)
    with pytest.raises(DataError, match="trained with another tokenizer"):
        native.refuse_other_tokenizer(cfg, "b" * 64)
    native.refuse_other_tokenizer(train_config(CASES["hf_bert"]), "b" * 64)


def test_image_size_must_fit_the_patches():
    m = CASES["hf_dinov2"]
    with pytest.raises(UsageError, match="patch_size"):
        clip.skeleton(dataclasses.replace(m, vision=dataclasses.replace(m.vision, image_size=20)))
