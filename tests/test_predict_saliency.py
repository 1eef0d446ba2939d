"""`predict --saliency`: overlays beside the pictures of the page, and what the page says of them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_model
from PIL import Image

from unimed_jax import infer, saliency
from unimed_jax.cli import predict as verb
from unimed_jax.errors import UsageError
from unimed_jax.evaluate import multilabel, question, tasks
from unimed_jax.evaluate.shown import THUMBNAIL


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return small_model.loaded(folder).save(folder / "m")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


def run(model: Path, study: Path, out: Path, *flags: str) -> str:
    page = out / "p.html"
    words = [str(study), "--model", str(model), "--labels", "ct,mri", "--out", str(out / "p.csv")]
    assert verb.run([*words, "--report", str(page), *flags]) == 0
    return page.read_text()


def pictures_of(page: str, alt: str) -> list[np.ndarray]:
    found = re.findall(rf'<img src="data:image/jpeg;base64,([^"]+)" alt="{alt}', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in found]


def test_the_methods_of_the_flag_are_those_that_exist():
    assert set(verb._SALIENCY) == set(saliency.METHODS)


def test_the_page_shows_maps_only_when_asked(model, study, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    plain = run(model, study, tmp_path / "1")
    assert "evidence" not in plain
    assert not pictures_of(plain, "saliency")
    page = run(model, study, tmp_path / "2", "--saliency", "attention")
    assert saliency.NOTE in page
    shown = pictures_of(page, "saliency of (?:ct|mri)")
    loaded = infer.load(model)
    squares = np.stack([loaded.preprocess(p) for p in sorted(study.iterdir())])
    heats = saliency.explain(loaded, squares, tasks.from_labels(["ct", "mri"]).classes, "attention")
    assert len(shown) == 3
    for picture, square, heat in zip(shown, squares, heats, strict=True):
        small = Image.fromarray(square).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        expected = saliency.overlay(np.asarray(small), heat).astype(float)
        assert np.abs(picture - expected).mean() < 6  # JPEG
    settings = json.loads((tmp_path / "2" / "p.run.json").read_text())["settings"]
    assert settings["saliency"]["method"] == "attention"
    assert (tmp_path / "1" / "p.csv").read_text() == (tmp_path / "2" / "p.csv").read_text()


def test_findings_are_explained_against_their_opposite(model, study):
    loaded = infer.load(model)
    task = multilabel.from_labels(["effusion", "pneumonia"])
    asked = question.ask(loaded, task)
    z = loaded.encode_image([str(p) for p in sorted(study.iterdir())])
    toward = asked.toward(z)
    for vector, direction, ranks in zip(z, toward, asked.scores(z).ranks, strict=True):
        first = list(task.findings.values())[ranks.argmax()]
        for_, against = (loaded.text_bank({"x": side})[0] for side in (first.positive, first.negative))
        np.testing.assert_allclose(direction, for_ - against, atol=1e-5)
        assert loaded.logit_scale * (vector @ direction) == pytest.approx(ranks.max(), abs=1e-3)


def test_maps_need_a_page(model, study, tmp_path):
    words = [str(study), "--model", str(model), "--labels", "ct,mri", "--out", str(tmp_path / "p.csv")]
    with pytest.raises(UsageError, match="--saliency belongs to --report"):
        verb.run([*words, "--saliency", "rollout"])
