"""Architectures read from names and shapes: every size is found, what cannot be seen is asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from checkpoints import TOWERS, params, random_model, state

from unimed_jax import config, config_rules
from unimed_jax.convert import architecture, mapping, tables
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import zoo

FORMS = list(TOWERS)
SMALL_BERT = config.Text(
    vocab_size=9, max_positions=7, context_length=6, width=12, depth=2, heads=2, mlp_dim=20, proj="mlp"
)


def shapes_of(m: config.Model, form: str) -> dict[str, tuple[int, ...]]:
    """Shapes as the format writes them; no memory behind them."""
    out: dict[str, tuple[int, ...]] = {}
    for name in filter(None, TOWERS[form]):
        out |= mapping.their_shapes(tables.TABLES[name], m)
    return out | ({"logit_scale": ()} if all(TOWERS[form]) else {})


def hidden(m: config.Model, towers=("vision", "text")) -> dict:
    fields = ("heads", "act", "ln_eps", "pool", "normalize", "eot_id", "dropout", "context_length", "pad_id")
    return {
        k: v
        for k, v in architecture.flat(m).items()
        if k.partition(".")[2] in fields and k.split(".")[0] in towers
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(1))  # test_convert_source.py opens thirty more
def test_random_architectures_are_found(form, seed):
    rng = np.random.default_rng([seed, FORMS.index(form)])
    m = random_model(rng, form)
    found = architecture.infer(shapes_of(m, form), hints=hidden(m))
    assert found.format == form.split("-")[0] if form.startswith("openclip") else form
    want, got = architecture.flat(m), architecture.flat(found.model)
    for tower in found.towers:
        assert {k: v for k, v in got.items() if k.startswith(tower)} == {
            k: v for k, v in want.items() if k.startswith(tower)
        }
    assert found.model.embed_dim == m.embed_dim


RELEASED = ["unimed-clip-vit-b16", "unimed-clip-vit-l14-336", "unimed-clip-vit-l14-336-large-text"]


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_found_from_their_tensors_alone(name):
    found = architecture.infer(shapes_of(zoo.get(name), "unimed"))
    assert found.model == zoo.get(name)
    assert name in found.fits
    assert found.assumed == {"vision.heads": found.model.vision.heads, "text.heads": found.model.text.heads}


def test_the_activation_of_a_bare_clip_is_asked_for():
    m = zoo.get("openai-b16")
    with pytest.raises(UsageError, match=r"does not say vision\.act, text\.act.*openai-b16") as e:
        architecture.infer(shapes_of(m, "openclip-clip"), where="b16.pt")
    assert "b16.pt" in str(e.value)
    assert e.value.exit_code == 2
    told = architecture.infer(shapes_of(m, "openclip-clip"), hints={"format": "openai"})
    assert told.format == "openai"
    assert told.model.vision.act == told.model.text.act == "quick_gelu"


def test_heads_that_nothing_says_are_asked_for():
    """Width 64 could be one head or four; a named model of these shapes has four."""
    m = zoo.get("tiny")
    with pytest.raises(UsageError, match=r"vision\.heads, text\.heads.*tiny"):
        architecture.infer(shapes_of(m, "unimed"))
    assert architecture.infer(shapes_of(m, "unimed"), model=m).model == m
    odd = dataclasses.replace(m, vision=dataclasses.replace(m.vision, width=60, heads=5), text=SMALL_BERT)
    with pytest.raises(UsageError, match="no named model has these shapes"):
        architecture.infer(shapes_of(odd, "unimed"))
    assert architecture.infer(shapes_of(odd, "unimed"), fallback=odd).model.vision.heads == 5


def test_a_fallback_with_another_text_tower_gives_a_possible_model():
    """A run's BERT has 12 heads, a CLIP's text tower of width 512 cannot; only its vision tower is wanted."""
    m = zoo.get("metaclip-b16-400m")
    found = architecture.infer(shapes_of(m, "openclip-clip"), fallback=config.Model())
    assert found.model.vision == m.vision
    assert (found.model.text.width, found.model.text.heads) == (512, 8)
    clip_run = dataclasses.replace(zoo.get("unimed-clip-vit-b16"), text=m.text)
    found = architecture.infer(shapes_of(config.Model(), "openclip-bert"), fallback=clip_run)
    assert found.model.text.pool == "cls"
    config_rules.validate_model(found.model)


def test_the_mean_pooled_bert_is_not_guessed():
    m = config.Model()
    with pytest.raises(UsageError, match=r"vision\.act, text\.pool"):
        architecture.infer(shapes_of(m, "openclip-bert"))


def test_one_tensor_of_a_wrong_shape_does_not_change_the_architecture():
    m = zoo.get("unimed-clip-vit-b16")
    shapes = shapes_of(m, "unimed")
    for key in ("visual.positional_embedding", "visual.ln_post.weight", "text_encoder.proj.0.weight"):
        found = architecture.infer(shapes | {key: (5, 5)})
        assert found.model.vision.width == 768
        assert found.model.text.width == 768
    found = architecture.infer({k: v for k, v in shapes.items() if "conv1" not in k})
    assert found.model.vision.patch_size in (14, 16, 32)


def test_mutated_shapes_never_break_the_inference():
    """Refusals, or an architecture; nothing else, whatever the shapes are."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for n in range(300):
        form = FORMS[n % len(FORMS)]
        shapes = shapes_of(MUTATED.setdefault(form, random_model(rng, form)), form)
        for key in rng.choice(list(shapes), 3):
            change = rng.integers(5)
            shape = list(shapes.get(key, (3,)))
            if change == 0:
                shapes.pop(key, None)
            elif change == 1:
                shapes[key] = tuple(shape[::-1])
            elif change == 2:
                shapes[key] = tuple(shape[:-1])
            elif change == 3:
                shapes[key] = (*(int(rng.choice([0, 1, 7, 2**40])) for _ in shape), int(rng.integers(0, 3)))
            else:
                shapes[key.replace("0", "999")] = tuple(shape)
        for options in ({"fallback": MUTATED[form]}, {"hints": hidden(MUTATED[form])}, {}):
            outcomes.add(outcome(shapes, options))
        architecture.nearest(shapes)
    assert {DataError, UsageError, "unimed", "hf-bert", "native"} <= outcomes


MUTATED: dict[str, config.Model] = {}


def outcome(shapes, options):
    try:
        return architecture.infer(shapes, **options).format
    except (DataError, UsageError) as e:
        return type(e)


def test_nearest_names_what_fits_or_what_differs():
    large = zoo.get("unimed-clip-vit-l14-336")
    assert "unimed-clip-vit-l14-336" in architecture.nearest(shapes_of(large, "unimed"))
    other = dataclasses.replace(large, vision=dataclasses.replace(large.vision, image_size=448))
    (near,) = architecture.nearest(shapes_of(other, "unimed"))
    assert near.startswith("unimed-clip-vit-l14")
    assert "vision.image_size 448 instead of" in near


def test_a_config_that_contradicts_the_tensors_is_refused():
    m = config.Model()
    with pytest.raises(DataError, match=r"vision\.width is 768 by the tensors, 1024 by the config"):
        architecture.infer(shapes_of(m, "unimed"), hints={"vision.width": 1024})
    gelu = dataclasses.replace(m, vision=dataclasses.replace(m.vision, act="gelu"))
    with pytest.raises(DataError, match=r"vision\.act is quick_gelu by the file, gelu by model"):
        architecture.infer(shapes_of(m, "unimed"), model=gelu)


def test_strangers_are_named():
    with pytest.raises(DataError, match=r"no tower is known.*conv1\.weight, fc\.bias"):
        architecture.infer({"conv1.weight": (64, 3, 7, 7), "fc.bias": (10,)})
    with pytest.raises(DataError, match="the file is empty"):
        architecture.infer({})
    mixed = {"visual.class_embedding": (8,), "text_model.embeddings.position_embedding.weight": (4, 8)}
    with pytest.raises(DataError, match="different formats"):
        architecture.infer(mixed)


def test_layers_are_drawn_together_in_lists():
    names = [f"a.{i}.w" for i in (0, 1, 2, 5)] + ["b", "proj.0.weight"]
    assert mapping.some(names) == "a.{0-2,5}.w, b, proj.0.weight"
    assert mapping.some([f"n{i}" for i in range(9)], 3) == "n0, n1, n2 and 6 more"


def test_state_dicts_of_all_formats_have_no_key_in_common_with_another_tower():
    """A key must belong to one tower only; else it would be looked for twice."""
    rng = np.random.default_rng(0)
    for form in FORMS:
        m = random_model(rng, form)
        keys = state(m, form, params(m))
        parts, rest = architecture.split(keys, architecture.find_tables(keys))
        assert sum(map(len, parts.values())) + len(rest) == len(keys)
        assert set(rest) <= {"logit_scale"}
