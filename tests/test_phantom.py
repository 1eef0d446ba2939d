from __future__ import annotations

import collections
import io
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from unimed_jax import config
from unimed_jax.data.phantom import PER_PATIENT, Phantom
from unimed_jax.data.record import decode, encode


@pytest.fixture(scope="module")
def source() -> Phantom:
    return Phantom(n=144, size=64)


@pytest.fixture(scope="module")
def examples(source):
    return [source.example(item) for item in source.items()]


def pixels(example) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(example.image)).convert("RGB"))


def test_six_modalities_in_equal_numbers_and_marked_as_synthetic(source, examples):
    counts = collections.Counter(e.modality for e in examples)
    assert counts == dict.fromkeys(config.MODALITIES, 24)
    assert all(e.simulated and e.source == "phantom" for e in examples)
    assert "SYNTHETIC" in source.description


def test_same_picture_every_time_and_another_for_another_seed_or_index(source, examples):
    again = pickle.loads(pickle.dumps(source))
    assert [again.example(i) for i in again.items()] == examples
    other = Phantom(n=144, size=64, seed=1)
    assert all(other.example(i).image != e.image for i, e in zip(other.items(), examples, strict=True))
    assert len({e.image for e in examples}) == len({e.key for e in examples}) == len(examples)


def test_a_picture_does_not_depend_on_how_many_there_are(examples):
    few = Phantom(n=6, size=64)
    assert [few.example(i) for i in few.items()] == examples[:6]


def test_split_is_by_patient_and_patients_have_several_pictures(examples):
    splits = collections.defaultdict(set)
    for e in examples:
        splits[e.patient].add(e.split)
    assert all(len(s) == 1 for s in splits.values())
    assert set(collections.Counter(e.patient for e in examples).values()) == {PER_PATIENT}
    by_split = {s: {e.modality for e in examples if e.split == s} for s in ("train", "val", "test")}
    assert all(found == set(config.MODALITIES) for found in by_split.values())


def test_captions_say_what_the_labels_say(examples):
    for e in examples:
        labels = dict(x.split(":", 1) for x in e.labels)
        text = " | ".join(c.text for c in e.captions)
        assert len(e.captions) >= 3
        assert len({c.text for c in e.captions}) == len(e.captions)
        assert all(c.kind in config.CAPTION_KINDS for c in e.captions)
        for task in ("plane", "region", "window", "laterality", "view"):
            if task in labels:
                assert labels[task] in text
        if labels.get("finding") == "lesion":
            assert "no nodule" not in text
            assert "no drusen" not in text
            assert "no cyst" not in text


def test_findings_are_visible(examples):
    """A cyst is a dark disc in the fan and a crowded slide has more dark pixels: read from the pixels alone."""

    def dark(modality: str, finding: str, below: int, box: slice) -> float:
        chosen = [e for e in examples if e.modality == modality and f"finding:{finding}" in e.labels]
        return float(np.mean([(pixels(e)[box, box].mean(axis=-1) < below).mean() for e in chosen]))

    everywhere = slice(None)
    assert dark("Histopathology", "lesion", 140, everywhere) > 2 * dark(
        "Histopathology", "normal", 140, everywhere
    )
    assert dark("Ultrasound", "lesion", 20, slice(20, 44)) > 1.3 * dark(
        "Ultrasound", "normal", 20, slice(20, 44)
    )


def test_gray_is_png_and_colour_is_jpeg_and_sizes_are_true(examples):
    for e in examples[:12]:
        image = Image.open(io.BytesIO(e.image))
        assert (image.format or "").lower() == e.image_format
        assert image.size == (e.width, e.height) == (64, 64)
        assert image.mode == ("RGB" if e.modality in ("Histopathology", "Fundus") else "L")
        assert pixels(e).std() > 20  # not a flat picture


def test_round_trip_through_a_record(examples):
    assert decode(encode(examples[0])).captions == examples[0].captions


def test_it_is_cheap(source):
    items = source.items()
    best = min(_seconds(lambda: [source.example(i) for i in items[:24]]) for _ in range(3))
    assert best / 24 < 0.02  # measured: 0.002 on an idle core; the bound leaves room for a busy one


def _seconds(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
