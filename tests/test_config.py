"""Settings: JSON round trip, refusals that name the field, durations."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from unimed_jax import config, config_rules
from unimed_jax.data import images
from unimed_jax.errors import UsageError


def test_json_round_trip_is_exact():
    c = config.Train(
        data=config.Data(sources=(config.Source(name="a", weight=2.0), config.Source(name="b"))),
        model=config.Model(text_groups=((64, 0.75), (256, 0.25))),
        optim=config.Optim(freeze=("vision/.*",), lr_multipliers=(("text/.*", 0.1),)),
    )
    again = config.from_dict(config.Train, json.loads(json.dumps(config.to_dict(c))))
    assert again == c
    assert isinstance(again.data.sources[0], config.Source)


def test_a_typo_cannot_be_set():
    with pytest.raises(AttributeError):
        config.Train().bach_size = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bach_size": 8}, ["config has no field", 'Did you mean "batch_size"']),
        ({"optim": {"lr": "fast"}}, ["config.optim.lr", "'fast'", "float"]),
        ({"model": {"vision": {"depth": 1.5}}}, ["config.model.vision.depth", "int"]),
        ({"data": {"sources": [{"weigth": 1}]}}, ["config.data.sources[0]", 'Did you mean "weight"']),
        ({"batch_size": True}, ["config.batch_size", "int"]),
    ],
)
def test_from_dict_names_what_is_wrong(values, words):
    with pytest.raises(UsageError) as e:
        config.from_dict(config.Train, values)
    for w in words:
        assert w in str(e.value)
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("batch_size", 0, "batch_size is 0"),
        ("model.vision.patch_size", 15, "no multiple of patch_size"),
        ("model.vision.heads", 7, "does not divide into 7 heads"),
        ("model.name", "a\nloaded everything", r"model.name is 'a\nloaded everything'. Fix: one printable"),
        ("model.name", "\x1b[2J", r"model.name is '\x1b[2J'"),
        ("model.name", "x" * 101, "at most 100 characters"),
        ("model.vision.act", "relu" * 999, "one of quick_gelu"),
        ("model.vision.act", "relu", "quick_gelu"),
        ("model.vision.proj", "none", "not model.embed_dim"),
        ("model.text.context_length", 600, "exceeds max_positions"),
        ("model.text.pool", "eot", "belongs to kind clip"),
        ("model.text_groups", ((64, 0.5),), "add up to 0.5"),
        ("model.text_groups", ((256, 0.5), (64, 0.5)), "must rise"),
        ("optim.accum_steps", 3, "micro-batches"),
        ("optim.freeze", ("(",), "no regex"),
        ("duration", config.Duration(), "duration is empty"),
        ("duration", config.Duration(steps=1, epochs=1), "given 2 times"),
        ("loss.kind", "sigmoid", "bias"),
        ("loss.kind", "triplet", "one of clip, sigmoid"),
        ("checkpoint.keep", 1, "at least 2"),
        ("data.crop_scale", (0.0, 1.0), "crop_scale"),
        ("data.sources", (config.Source(),), "has no name"),
        ("data.sources", (config.Source(name="a", weight=0.0),), "weight 0.0. Fix: leave it out"),
        ("data.sources", (config.Source(name="a", weight=math.nan),), "weight nan"),
        ("data.sources", (config.Source(name="a", weight=math.inf),), "weight inf. Fix: at most 1e+06"),
        ("data.sources", (config.Source(name="a"),) * 2, "names a twice. Fix: raise its weight"),
        ("mesh.fsdp", 0, "mesh.fsdp is 0"),
        ("model.vision.patch_size", 0, "patch_size is 0. Fix: at least 1"),
        ("model.vision.normalize", "imagnet", "one of openai, imagenet, half"),
        ("model.text.dropout", 1.0, "model.text.dropout is 1.0. Fix: at least 0, below 1"),
        ("log_every", 0, "log_every is 0. Fix: at least 1"),
        ("data.prefetch", -1, "data.prefetch is -1"),
        ("optim.clip_norm", math.nan, "optim.clip_norm is nan"),
        ("optim.lr", math.inf, "optim.lr is inf"),
        ("optim.b2", 1.0, "optim.b2 is 1.0"),
    ],
)
def test_validate_refuses(path, value, word):
    c = config_rules.validate(config.Train())
    holder, _, name = path.rpartition(".")
    setattr(config.get_path(c, holder) if holder else c, name, value)
    with pytest.raises(UsageError, match="config: ") as e:
        config_rules.validate(c)
    assert word in str(e.value)


def test_every_number_has_a_range():
    """A zero or a NaN must be refused before the run, not divide by zero within it."""

    def numbers(c, prefix=""):
        for f in dataclasses.fields(c):
            value, path = getattr(c, f.name), prefix + f.name
            if dataclasses.is_dataclass(value):
                yield from numbers(value, f"{path}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield path

    otherwise = re.compile(
        r"(duration|.*\.every|optim\.warmup)\..*|mesh\.(data|fsdp)|optim\.layer_decay"
        r"|model\.init_.*|model\.text\.eot_id"
    )
    free = {path for path in numbers(config.Train()) if not otherwise.fullmatch(path)}
    assert free == set(config_rules.RANGES)


def test_words_of_the_normalisation_are_those_of_the_pictures():
    assert config_rules.CHOICES["model.vision.normalize"] == tuple(images.NORMALIZE)


def test_durations_agree():
    epochs = config.Duration(epochs=10)
    assert epochs.steps_for(batch_size=2048, epoch_examples=5_282_000) == 25_792
    assert config.Duration(examples=100).steps_for(batch_size=8, epoch_examples=1) == 13
    assert config.Duration(steps=7).steps_for(batch_size=8, epoch_examples=1) == 7
    assert config.Duration().steps_for(batch_size=8, epoch_examples=1) == 0


def test_diff_names_only_what_changed():
    a = config.Train()
    b = dataclasses.replace(a, seed=1, optim=dataclasses.replace(a.optim, lr=1.0))
    assert config.diff(a, b) == {"optim.lr": (5e-4, 1.0), "seed": (0, 1)}
    assert config.diff(a, config.to_dict(a)) == {}
