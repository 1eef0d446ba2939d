"""AdamW's moments from PyTorch and back: names, order, file, and a run that goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_model

from unimed_jax import config, parallel
from unimed_jax.convert import native, optimizer, source
from unimed_jax.errors import DataError
from unimed_jax.models import clip, zoo
from unimed_jax.train import assemble
from unimed_jax.train import step as train_step

torch = pytest.importorskip("torch")
import torch_unimed  # noqa: E402  needs torch

pytestmark = pytest.mark.torch
OPTIM = config.Optim(lr=5e-4, warmup=config.Duration(steps=5))


def plain(x: Any) -> Any:
    """A torch tree as a reader without torch gives it."""
    if isinstance(x, torch.Tensor):
        return x.detach().numpy()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


@pytest.fixture(scope="module")
def model() -> config.Model:
    return small_model.model(text__dropout=0.0)


@pytest.fixture(scope="module")
def batches(model):
    rng = np.random.default_rng(0)
    size, context = model.vision.image_size, model.text.context_length
    out = []
    for _ in range(2):
        tokens = rng.integers(1, model.text.vocab_size, (8, context), dtype=np.int32)
        tokens[np.arange(context) >= rng.integers(4, context + 1, (8, 1))] = model.text.pad_id
        out.append({"image": rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8), "tokens": tokens})
    return out


@pytest.fixture(scope="module")
def trained(model, batches):
    """Seven steps in PyTorch: (model, optimizer)."""
    torch.manual_seed(0)
    peer = torch_unimed.Peer(model)
    adam = torch_unimed.make_optimizer(peer, OPTIM)
    torch_unimed.train(peer, adam, batches, [torch_unimed.rate(s, OPTIM, 5, 37) for s in range(7)])
    return peer, adam


# -- order ----------------------------------------------------------------------------------------------------------


def test_order_is_that_of_the_modules(trained):
    peer, _ = trained
    names = [n for n, _ in peer.named_parameters()]
    assert optimizer.module_order(sorted(names)) == names
    assert optimizer.module_order(names[::-1]) == names == list(peer.state_dict())
    shapes = {n: tuple(p.shape) for n, p in peer.named_parameters()}
    undecayed, decayed = optimizer.groups_of(shapes)
    assert undecayed == [n for n, s in shapes.items() if len(s) < 2]
    assert undecayed[:2] == ["logit_scale", "visual.class_embedding"]
    assert decayed[0] == "visual.positional_embedding"


def test_order_of_many_layers():
    """Ten comes after nine, not after one."""
    names = [f"visual.transformer.resblocks.{i}.ln_2.bias" for i in (10, 9, 1)]
    assert optimizer.module_order(names) == names[::-1]
    with pytest.raises(DataError, match=r"visual\.head"):
        optimizer.module_order(["visual.head"])


@pytest.mark.parametrize(
    ("name", "undecayed", "decayed"),
    [("unimed-clip-vit-b16", 224, 128), ("unimed-clip-vit-l14-336-large-text", 440, 248)],
)
def test_group_sizes_of_the_released_models(name, undecayed, decayed):
    m = zoo.get(name)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in torch_unimed.Peer(m).named_parameters()}
    assert [len(g) for g in optimizer.groups_of(shapes)] == [undecayed, decayed]
    assert sum(int(np.prod(s)) for s in shapes.values()) == clip.count(clip.skeleton(m)[1])
    assert optimizer.module_order(shapes) == list(shapes)
    golden = json.loads((Path(__file__).parent / "golden" / "state_dicts.json").read_text())[name]["tensors"]
    layer = lambda n: re.sub(r"(resblocks|layer)\.\d+", r"\1.{i}", n)
    flat = {n: spec["shape"] if isinstance(spec, dict) else spec for n, spec in golden.items()}
    assert {layer(n): list(s) for n, s in shapes.items()} == flat
    assert set(optimizer.ORDER) == set(golden)


# -- torch's state dict -----------------------------------------------------------------------------------------------


def test_moments_get_their_names(trained):
    peer, adam = trained
    shapes = {n: tuple(p.shape) for n, p in peer.state_dict().items()}
    first, second, step, settings = optimizer.from_torch(plain(adam.state_dict()), shapes)
    assert step == 7
    assert settings == {
        "lr": adam.param_groups[1]["lr"],
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
    }
    for name, p in peer.named_parameters():
        np.testing.assert_array_equal(first[name], adam.state[p]["exp_avg"])
        np.testing.assert_array_equal(second[name], adam.state[p]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda o: o["param_groups"].append(o["param_groups"][0]), "no AdamW of"),
        (lambda o: o["param_groups"][0]["params"].pop(), "no AdamW of"),
        (lambda o: o.pop("state"), "no AdamW of"),
        (lambda o: o["param_groups"][1].pop("betas"), "no AdamW of"),
        (lambda o: o["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda o: o["state"][0].update(step=3), "3 to 7 times"),
        (lambda o: o["state"].clear(), "0 times"),
        (lambda o: o["state"][1].update(exp_avg_sq=np.zeros(2)), "moments of visual.class_embedding are no"),
        (lambda o: o["state"][1].update(exp_avg=[[1], [2, 3]]), "moments of visual.class_embedding are no"),
        (
            lambda o: o["state"][1].update(exp_avg=np.zeros(64, "S3")),
            "moments of visual.class_embedding are no",
        ),
        (lambda o: o["state"][0].update(step=float("inf")), "no AdamW of"),
        (lambda o: o["state"][0].update(step=np.zeros(3)), "no AdamW of"),
        (lambda o: [s.update(step=-1) for s in o["state"].values()], "-1 to -1 times"),
        (lambda o: [s.update(step=2**31) for s in o["state"].values()], "2147483648 times"),
        (lambda o: o["param_groups"][1].update(lr=float("nan")), "settings are not finite"),
        (lambda o: o["param_groups"][0]["params"].__setitem__(0, 1), "in two groups"),
        (lambda o: o.update(state=[]), "no AdamW of|0 times"),
        (lambda o: o.update(param_groups=3), "no AdamW of"),
        (lambda o: o["state"][0].pop("exp_avg"), "no AdamW of"),
    ],
)
def test_another_optimizer_is_refused(trained, change, word):
    peer, adam = trained
    state = plain(adam.state_dict())
    change(state)
    with pytest.raises(DataError, match=word):
        optimizer.from_torch(state, {n: tuple(p.shape) for n, p in peer.state_dict().items()})


def test_a_sorted_state_dict_is_refused(trained):
    """Its order says nothing of which moment belongs to which weight."""
    peer, adam = trained
    shapes = {n: tuple(p.shape) for n, p in sorted(peer.state_dict().items())}
    with pytest.raises(DataError, match="not in the order"):
        optimizer.from_torch(plain(adam.state_dict()), shapes)


def open_clip_order(peer: Any) -> list[str]:
    """The names of OpenCLIP for the same modules; its blocks have their norms before what they norm."""
    place = {p: i for i, p in enumerate(("ln_1", "attn", "ln_2", "mlp"))}

    def key(item: tuple[int, str]) -> tuple[int, ...]:
        at, name = item
        block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.(\w+)", name)
        return (first, int(block[1]), place[block[2]], at) if block else (at,)

    names = list(peer.state_dict())
    first = next(i for i, n in enumerate(names) if ".resblocks." in n)
    return [n.replace("text_encoder.", "text.") for _, n in sorted(enumerate(names), key=key)]


def test_names_of_open_clip_need_its_order(trained):
    """Two moments of one shape would be exchanged silently."""
    peer, adam = trained
    there = {n.replace("text_encoder.", "text."): tuple(p.shape) for n, p in peer.state_dict().items()}
    shapes = {n: there[n] for n in open_clip_order(peer)}
    plain_groups = [len(g) for g in optimizer.groups_of(shapes)]
    state = plain(adam.state_dict())
    assert [len(g["params"]) for g in state["param_groups"]] == plain_groups
    by_name = dict(zip((n for g in optimizer.groups_of(there) for n in g), range(99), strict=False))
    order = [n for g in optimizer.groups_of(shapes) for n in g]
    state["state"] = {i: state["state"][by_name[n]] for i, n in enumerate(order)}
    first, _, step, _ = optimizer.from_torch(state, shapes)
    assert step == 7
    for name, p in peer.named_parameters():
        np.testing.assert_array_equal(
            first[name.replace("text_encoder.", "text.")], adam.state[p]["exp_avg"], err_msg=name
        )
    names = list(shapes)
    a, b = names.index("visual.ln_pre.weight"), names.index("visual.ln_pre.bias")
    names[a], names[b] = names[b], names[a]
    with pytest.raises(DataError, match="not in the order of its modules"):
        optimizer.from_torch(state, {n: shapes[n] for n in names})
    with pytest.raises(DataError, match=r"order of its modules is not known \(visual\.trunk\.x"):
        optimizer.from_torch(state, {"visual.trunk.x": (2,), **shapes})


def test_moments_that_are_not_finite_are_all_listed(trained, model, tmp_path):
    peer, adam = copy.deepcopy(trained)
    states = list(adam.state.values())
    states[1]["exp_avg"].view(-1)[0] = torch.nan
    states[4]["exp_avg_sq"].view(-1)[0] = torch.inf
    states[5]["exp_avg_sq"].view(-1)[0] = -1.0
    file = torch_unimed.save(tmp_path / "bad.pt", peer, adam)
    with pytest.raises(
        DataError, match=r"bad\.pt: 3 moments .*not finite.*: exp_avg of .*exp_avg_sq of "
    ) as e:
        optimizer.of_source(source.open_source(file, fallback=model))
    assert "earlier checkpoint" in e.value.remedy


def test_weights_that_were_not_trained_are_listed(trained, model, tmp_path):
    peer, adam = copy.deepcopy(trained)
    for p in (peer.visual.proj, peer.logit_scale):
        del adam.state[p]
    file = torch_unimed.save(tmp_path / "frozen.pt", peer, adam)
    with pytest.raises(DataError, match=r"2 weights were not trained .*: logit_scale, visual\.proj"):
        optimizer.of_source(source.open_source(file, fallback=model))


# -- our file ---------------------------------------------------------------------------------------------------------


def some_moments(m: config.Model, step: int = 4) -> optimizer.Moments:
    leaves = [clip.flatten(small_model.params(m, seed)) for seed in (1, 2)]
    return optimizer.Moments(
        first=leaves[0].items, second=leaves[1].items, step=step, settings={"lr": 1e-3, "b1": 0.9}
    )


def test_file_keeps_every_bit(model, tmp_path):
    wanted = some_moments(model)
    file = optimizer.save(tmp_path / "new" / optimizer.FILE, wanted, model)
    found = optimizer.load(file)
    assert (found.step, found.settings) == (4, wanted.settings)
    for a, b in zip(found.trees(), wanted.trees(), strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[k], b[k]) and a[k].dtype == np.float32 for k in b)
    assert [p.name for p in file.parent.iterdir()] == [optimizer.FILE]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda leaves: leaves.pop("vision/pos"), "never came: nu/vision/pos"),
        (lambda leaves: leaves.update(extra=np.zeros(1)), "nu/extra"),
        (
            lambda leaves: leaves.update({"vision/cls": np.zeros(3)}),
            r"nu/vision/cls \[3\] was not announced",
        ),
        (
            lambda leaves: leaves.update({"vision/cls": np.full(64, np.nan)}),
            "1 moments are not finite: nu/vision/cls",
        ),
    ],
)
def test_moments_of_another_model_are_not_written(model, tmp_path, change, word):
    leaves = dict(some_moments(model).second())
    change(leaves)
    with pytest.raises(DataError, match=word):
        optimizer.save(tmp_path / "o", dataclasses.replace(some_moments(model), second=leaves.items), model)
    assert list(tmp_path.iterdir()) == []


def test_other_files_hold_no_moments(tmp_path):
    from safetensors.numpy import save_file

    save_file({"mu/x": np.zeros(1)}, tmp_path / "x")
    with pytest.raises(DataError, match="no moments"):
        optimizer.load(tmp_path / "x")


# -- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_torch_run_goes_on_here(trained, model, batches, tmp_path, way):
    """Seven steps there, then thirty here and thirty there: the same losses."""
    peer, adam = copy.deepcopy(trained)
    file = torch_unimed.save(tmp_path / "epoch_1.pt", peer, adam)
    start, total, warmup = 7, 37, 5
    o = dataclasses.replace(OPTIM, warmup=config.Duration(steps=warmup))
    if way == "folder":
        opened = source.open_source(file, fallback=model)
        moments = optimizer.of_source(opened)
        optimizer.save(tmp_path / "model" / optimizer.FILE, moments, model)
        native.save_tower(opened.params(), tmp_path / "model" / "model.safetensors")
        file = tmp_path / "model"
    cfg = config.Train(batch_size=8, model=model, optim=o, init=config.Init(model=str(file), optimizer=True))
    mesh = parallel.make_mesh(cfg.mesh, jax.devices()[:1])
    built = assemble.assemble_model(cfg, mesh, total, epoch_examples=0)
    lines: list[str] = []
    state = assemble.first_state(built, lines.append)
    assert int(state["step"]) == start
    assert sum("loaded from" in line for line in lines) == len(clip.flatten(built.params)) + 1
    step = train_step.make_train_step(cfg, built.graphdef, built.tx, mesh)
    ours = []
    for s in range(start, total):
        state, metrics = step(state, parallel.put(batches[(s - start) % 2], mesh))
        ours.append(float(metrics["loss"]))
    rates = [torch_unimed.rate(s, o, warmup, total) for s in range(start, total)]
    theirs = torch_unimed.train(peer, adam, batches, rates)
    assert theirs[-1] < 0.7 * theirs[0]  # it learned: small errors had time to grow
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_fresh_moments_would_be_seen(trained, model, batches):
    """What the test above compares does depend on the moments."""
    peer, adam = copy.deepcopy(trained)
    other = copy.deepcopy(peer)
    rates = [2e-4] * 6
    theirs = torch_unimed.train(peer, adam, batches, rates)
    fresh = torch_unimed.train(other, torch_unimed.make_optimizer(other, OPTIM), batches, rates)
    assert max(abs(a - b) for a, b in zip(theirs, fresh, strict=True)) > 1e-2
