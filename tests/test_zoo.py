"""Named models: sizes, FLOPs, the command that prints them."""

from __future__ import annotations

import json

import pytest

from unimed_jax import config, config_rules
from unimed_jax.cli import models as cli
from unimed_jax.errors import UsageError
from unimed_jax.models import clip, flops, zoo


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("unimed-clip-vit-b16", 195_903_489),
        ("unimed-clip-vit-l14-336", 414_365_185),
        ("unimed-clip-vit-l14-336-large-text", 639_991_809),
        ("openai-b16", 149_620_737),
        ("openai-b32", 151_277_313),
        ("openai-l14", 427_616_513),
        ("openai-l14-336", 427_944_193),
        ("metaclip-b16-400m", 149_620_737),
        ("biomedclip", 195_902_721),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert clip.count(clip.skeleton(zoo.get(name))[1]) == parameters


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_is_valid_and_survives_json(name):
    m = zoo.get(name)
    assert config_rules.validate_model(m).name == name
    assert config.from_dict(config.Model, json.loads(json.dumps(config.to_dict(m)))) == m
    assert clip.skeleton(m)[1]["logit_scale"].shape == ()


@pytest.mark.parametrize(("name", "low", "high"), [("small", 10e6, 20e6), ("tiny", 0, 1e6)])
def test_small_models_are_small(name, low, high):
    assert low < clip.count(clip.skeleton(zoo.get(name))[1]) < high


def test_get_returns_a_copy():
    zoo.get("tiny").vision.width = 7
    assert zoo.get("tiny").vision.width == 64


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match='Did you mean "unimed-clip-vit-b16"'):
        zoo.get("unimed-clip-vit-b61")


@pytest.mark.parametrize(
    ("name", "image", "caption", "train"),
    [
        ("unimed-clip-vit-b16", 35.127, 45.90, 243.1),
        ("unimed-clip-vit-l14-336", 381.920, 45.90, 1283.5),
        ("unimed-clip-vit-l14-336-large-text", 381.920, 161.06, 1628.9),
    ],
)
def test_flops_equal_the_published_profiles(name, image, caption, train):
    m = zoo.get(name)
    assert flops.image_flops(m) / 1e9 == pytest.approx(image, abs=1e-3)
    assert flops.text_flops(m) / 1e9 == pytest.approx(caption, abs=6e-3)
    assert flops.train_flops(m) / 1e9 == pytest.approx(train, abs=0.06)


def test_flops_of_short_captions():
    m = zoo.get("unimed-clip-vit-b16")
    assert flops.train_flops(m, 64) / 1e9 == pytest.approx(138.5, abs=0.06)


def test_list_names_every_model(capsys):
    assert cli.run(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in zoo.MODELS)
    assert "195.9M" in out


def test_show_prints_the_sizes(capsys):
    assert cli.run(["show", "unimed-clip-vit-l14-336"]) == 0
    out = capsys.readouterr().out
    for word in ("414,365,185", "336 px, 577 tokens", "context 256", "381.92", "quick_gelu"):
        assert word in out
    assert cli.run(["show", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == clip.count(clip.skeleton(zoo.get("tiny"))[1])
    assert config.from_dict(config.Model, facts["config"]) == zoo.get("tiny")


def test_wrong_requests_are_refused():
    with pytest.raises(UsageError, match="no model 'nothing'"):
        cli.run(["show", "nothing"])
    with pytest.raises(UsageError):
        cli.run(["lst"])
