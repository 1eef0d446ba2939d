"""Perceptual hashes and the audit of overlap: what is found, what is not, and how often by chance."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_model
from PIL import Image, ImageEnhance

from unimed_jax import infer
from unimed_jax.cli import data as verb
from unimed_jax.cli import overlap as overlap_verb
from unimed_jax.data import phash
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError
from unimed_jax.evaluate import inputs, overlap


def scene(seed: int, size: tuple[int, int] = (180, 220)) -> Image.Image:
    """A smooth gray picture, like none of another seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("L")


def crop(image: Image.Image, share: float) -> Image.Image:
    w, h = image.size
    x, y = round(w * share), round(h * share)
    return image.crop((x, y, w - x, h - y))


CHANGES = {
    "jpeg 50": lambda i: jpeg(i, 50),
    "half": lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.BICUBIC),
    "square": lambda i: i.resize((224, 224), Image.Resampling.BICUBIC),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
    "darker": lambda i: ImageEnhance.Brightness(i).enhance(0.7),
    "crop 1 %": lambda i: crop(i, 0.01),
}


def bits(a: Image.Image, b: Image.Image) -> int:
    x, y = phash.phash(np.asarray(a)), phash.phash(np.asarray(b))
    assert x is not None
    assert y is not None
    return (x ^ y).bit_count()


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_a_copy_may_have_suffered(change):
    found = [bits(scene(i), CHANGES[change](scene(i))) <= phash.DISTANCE for i in range(100)]
    assert np.mean(found) >= 0.99


def test_pictures_that_have_nothing_in_common_are_far_apart():
    hashes = np.array([phash.phash(np.asarray(scene(i))) for i in range(400)], np.uint64)
    a, b, _ = phash.near(hashes, hashes)
    assert (a != b).sum() == 0


def test_flips_and_rotations_are_other_pictures():
    image = scene(0)
    assert bits(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > phash.DISTANCE
    assert bits(image, image.transpose(Image.Transpose.ROTATE_90)) > phash.DISTANCE


def test_the_middle_square_of_a_picture_is_found():
    whole = [np.asarray(scene(i)) for i in range(50)]
    squares = [np.asarray(Image.fromarray(w[:, 20:200]).resize((224, 224))) for w in whole]
    for w, s in zip(whole, squares, strict=True):
        assert len(phash.phashes(s)) == 1
        assert min((x ^ phash.phashes(s)[0]).bit_count() for x in phash.phashes(w)) <= phash.DISTANCE


def test_noise_does_not_decide_about_a_symmetric_picture():
    """Half of the coefficients are exactly zero there."""
    half = np.asarray(scene(3))
    image = Image.fromarray(np.hstack([half, half[:, ::-1]]))
    assert bits(image, jpeg(image, 90)) <= 2


def test_a_picture_of_one_gray_has_no_hash():
    assert phash.phash(np.full((50, 60), 77, np.uint8)) is None
    assert phash.phash(np.full((50, 60, 3), 77, np.uint8)) is None


@pytest.mark.parametrize("distance", [0, 3, 4, 7, 10, 15])
def test_pairs_are_those_of_all_comparisons(distance):
    rng = np.random.default_rng(distance)
    a = rng.integers(0, 2**64, 1000, dtype=np.uint64)
    b = a[rng.integers(0, 1000, 300)]
    for j in range(len(b)):
        for k in rng.choice(64, rng.integers(0, 20), replace=False):
            b[j] ^= np.uint64(1) << np.uint64(k)
    i, j, n = phash.near(a, b, distance)
    every = np.bitwise_count(a[:, None] ^ b[None])
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(
        map(tuple, np.argwhere(every <= distance).tolist())
    )
    assert len(i) == len(set(zip(i.tolist(), j.tolist(), strict=True)))
    np.testing.assert_array_equal(n, every[i, j])
    assert sorted(zip(j.tolist(), n.tolist(), i.tolist(), strict=True)) == list(
        zip(j.tolist(), n.tolist(), i.tolist(), strict=True)
    )


def test_candidates_come_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**64, 500, dtype=np.uint64) & np.uint64(0xFFFFFFFFFFFF0000)
    whole = phash.near(a, a[:50], 8)
    monkeypatch.setattr(phash, "_AT_ONCE", 700)
    for x, y in zip(whole, phash.near(a, a[:50], 8), strict=True):
        np.testing.assert_array_equal(x, y)
    monkeypatch.setattr(phash, "_MOST", 30)
    with pytest.raises(DataError, match="more than 30 pairs"):
        phash.near(a, a[:50], 8)
    with pytest.raises(UsageError, match="0 to 15"):
        phash.near(a, a, 16)


def test_empty_sets_have_no_pairs():
    none = np.zeros(0, np.uint64)
    for a, b in ((none, none), (none, none + 1), (np.ones(3, np.uint64), none)):
        assert [len(x) for x in phash.near(a, b)] == [0, 0, 0]


def test_a_hundred_thousand_against_a_thousand_is_quick():
    """A search by comparison of all would be 1e8 comparisons; this one makes about 2e6."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**64, n, dtype=np.uint64) for n in (100_000, 1000))
    start = time.perf_counter()
    phash.near(a, b)
    assert time.perf_counter() - start < 10


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    """Training and evaluation: one copied file, one stored as BMP, one re-encoded, one new; a flat one in both."""
    a, b = tmp_path / "train", tmp_path / "test"
    a.mkdir()
    b.mkdir()
    for i in range(8):
        scene(i).save(a / f"{i}.png")
    (b / "copy.png").write_bytes((a / "0.png").read_bytes())
    scene(1).convert("RGB").save(b / "bitmap.bmp")
    scene(2).save(b / "encoded.jpg", quality=60)
    scene(99).save(b / "new.png")
    for folder in (a, b):
        Image.new("L", (40, 40), 9 + len(folder.name)).save(folder / "flat.png")
    return a, b


def run(*args: str | Path) -> int:
    return verb.run(["overlap", *map(str, args)])


def test_each_kind_of_overlap_is_named_by_its_strongest_evidence(sets, tmp_path, capsys):
    a, b = sets
    out, page = tmp_path / "o" / "overlap.csv", tmp_path / "o" / "overlap.html"
    assert run(a, b, "--out", out, "--html", page) == 0
    with out.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["kind"], Path(r["a"]).name, Path(r["b"]).name) for r in rows] == [
        ("bytes", "0.png", "copy.png"),
        ("pixels", "1.png", "bitmap.bmp"),
        ("phash", "2.png", "encoded.jpg"),
    ]
    assert rows[0]["bits"] == ""
    assert int(rows[2]["bits"]) <= 10
    printed = capsys.readouterr().out
    assert "3  pictures of b are like one of a, of 5" in printed
    assert "9 pictures, 1 of nearly one gray" in printed
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 6
    assert "encoded.jpg" in text
    assert run(a, b, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shared"] == 3
    assert found["counts"] == {k: {"pairs": 1, "pictures": 1} for k in ("bytes", "pixels", "phash")}
    assert found["sets"]["b"] == {"name": str(b), "pictures": 5, "flat": 1, "failed": 0}
    with pytest.raises(DataError, match="3 of 5 pictures") as e:
        run(a, b, "--fail")
    assert e.value.exit_code == 3
    (tmp_path / "other").mkdir()
    scene(50).save(tmp_path / "other" / "x.png")
    assert run(a, tmp_path / "other", "--fail") == 0
    assert run(a, b, "--distance", "-1") == 0
    assert "perceptual" not in capsys.readouterr().out.split("pictures of b are like one of a, of 1")[-1]


def test_one_set_with_itself(sets, tmp_path, capsys):
    a, _ = sets
    for name in ("again.png", "deep/third.png"):
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_bytes((a / "4.png").read_bytes())
    scene(4).save(a / "other.bmp")
    assert run(a, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["bytes"] == {"pairs": 3, "pictures": 2}
    assert found["counts"]["pixels"] == {"pairs": 3, "pictures": 2}
    assert found["counts"]["phash"] == {"pairs": 0, "pictures": 0}
    assert found["shared"] == 3
    names = {frozenset(Path(p[k]).name for k in "ab") for p in found["pairs"]}
    assert len(names) == len(found["pairs"]) == 6
    assert frozenset({"4.png", "other.bmp"}) in names


def test_many_copies_are_counted_and_some_listed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i in range(30):
        scene(0).save(tmp_path / "a" / f"{i}.png")
    scene(0).save(tmp_path / "b" / "x.png")
    scene(0).save(tmp_path / "b" / "y.tif")
    found = overlap.audit(inputs.Files([tmp_path / "a"]), inputs.Files([tmp_path / "b"]))
    assert found.counts["bytes"] == {"pairs": 30, "pictures": 1}
    assert found.counts["pixels"] == {"pairs": 30, "pictures": 1}
    assert len(found.pairs) == 2 * overlap.MOST


def test_a_model_is_the_last_evidence(sets, tmp_path):
    a, b = sets
    loaded = small_model.loaded(tmp_path / "m", batch_size=4)
    found = overlap.audit(inputs.Files([a]), inputs.Files([b]), loaded=loaded, cosine=-1)
    assert found.counts["embedding"]["pictures"] == 5
    assert found.counts["embedding"]["pairs"] == 9 * 5 - 3
    best = [p for p in found.pairs if p.kind == "embedding"]
    z = loaded.encode_image([str(b / "new.png"), *(str(a / f"{i}.png") for i in range(8))])
    expected = {f"{i}.png": float(z[0] @ z[i + 1]) for i in range(8)}
    got = {Path(found.a.ids[p.a]).name: p.cosine for p in best if found.b.ids[p.b].endswith("new.png")}
    assert {k: v for k, v in got.items() if k in expected} == pytest.approx(expected, abs=1e-5)
    alone = overlap.audit(inputs.Files([a]), loaded=loaded, cosine=-1)
    assert alone.counts["embedding"]["pairs"] == 9 * 8 // 2
    assert all(p.a < p.b for p in alone.pairs)
    none = overlap.audit(inputs.Files([a]), inputs.Files([b]), loaded=loaded, cosine=1)
    assert {(p.a, p.b) for p in none.pairs if p.kind != "embedding"} == {
        (p.a, p.b) for p in found.pairs if p.kind != "embedding"
    }


def test_copies_that_are_not_listed_are_no_news_to_a_model(tmp_path):
    for i in range(30):
        (tmp_path / "a").mkdir(exist_ok=True)
        scene(0).save(tmp_path / "a" / f"{i:02d}.png")
    scene(1).save(tmp_path / "a" / "other.png")
    loaded = small_model.loaded(tmp_path / "m", batch_size=8)
    found = overlap.audit(inputs.Files([tmp_path / "a"]), loaded=loaded, cosine=-1)
    assert found.counts["bytes"]["pairs"] == 30 * 29 // 2
    assert {found.b.ids[p.b] for p in found.pairs if p.kind == "embedding"} == {
        str(tmp_path / "a" / "other.png")
    }


def test_a_twin_is_found_from_either_side(monkeypatch):
    """Of a dense cluster the nearest of an early picture all come later: the pair is theirs."""
    z = np.ones((60, 8), np.float32) + 0.02 * np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    names = [str(i) for i in range(60)]
    pixels = [n.encode() for n in names]
    prints = overlap.Prints(
        name="x", ids=names, numbers=list(range(60)), stored=names, pixels=pixels, hashes=[()] * 60
    )
    monkeypatch.setattr(overlap, "fingerprint", lambda *_, **__: prints)
    monkeypatch.setattr(overlap, "_embeddings", lambda *_: z)
    near = np.argsort(-(z @ z.T), axis=1)[:, 1 : overlap.MOST + 1]
    found = overlap.audit([], loaded=SimpleNamespace(cfg=SimpleNamespace(name="m"), digest=""), cosine=0.9)
    pairs = {(p.a, p.b) for p in found.pairs}
    crowded = Counter(max(i, j) for j in range(60) for i in near[j].tolist())
    for j in range(60):
        for i in near[j].tolist():
            assert (min(i, j), max(i, j)) in pairs or crowded[max(i, j)] > overlap.MOST


def test_records_splits_and_suites(tmp_path, capsys):
    pytest.importorskip("array_record")
    from unimed_jax.data import export, shards
    from unimed_jax.data.phantom import Phantom

    export.export(Phantom(n=80, size=40), tmp_path / "records")
    root = tmp_path / "records"
    assert run(f"{root}@train", f"{root}@test", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    test = shards.Shards(shards.find_sources(root)["phantom"], "test")
    assert found["sets"]["b"] == {"name": "phantom@test", "pictures": len(test), "flat": 0, "failed": 0}
    assert found["counts"]["bytes"]["pairs"] == 0
    (tmp_path / "suite" / "set" / "x").mkdir(parents=True)
    (tmp_path / "suite" / "set" / "y").mkdir(parents=True)
    (tmp_path / "suite" / "set" / "x" / "1.png").write_bytes(test[0].image)
    scene(5).save(tmp_path / "suite" / "set" / "y" / "2.png")
    sets = [
        {"name": name, "classes": ["x", "y"], "layout": {"kind": "folders", "folder": folder}}
        for name, folder in (("s", "set"), ("t", "gone"))
    ]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "sets": sets}))
    suite = ("--suite", tmp_path / "mine.json", "--data-root", tmp_path / "suite")
    assert run(root, *suite, "--sets", "s", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(p["kind"], p["a"], p["b"]) for p in found["pairs"]][:1] == [("bytes", test[0].key, "s/x/1.png")]
    with pytest.raises(SomeInputsFailed, match="1 pictures or sets"):
        run(root, *suite, "--out", tmp_path / "o.csv")
    assert "t: not found" in (tmp_path / "o.errors.csv").read_text()


def test_pictures_that_cannot_be_read_are_listed(sets, tmp_path):
    a, b = sets
    (b / "bad.png").write_bytes((a / "0.png").read_bytes()[:200])
    with pytest.raises(SomeInputsFailed, match="1 pictures or sets could not be read") as e:
        run(a, b, "--out", tmp_path / "o.csv")
    assert e.value.exit_code == 4
    assert "bad.png" in (tmp_path / "o.errors.csv").read_text()
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4
    with pytest.raises(DataError, match="there again"):
        run(a, b, "--fail")
    os.mkfifo(b / "pipe")  # is not waited for
    (b / "endless.dcm").symlink_to("/dev/zero")
    with pytest.raises(SomeInputsFailed, match="3 pictures or sets could not be read"):
        run(a, b)
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "x.png").write_text("text")
    with pytest.raises(DataError, match=r"no picture of .* can be read"):
        run(a, tmp_path / "worse")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["A", "B", "--suite", "unimed21", "--data-root", "."], "give B or --suite"),
        (["A", "--suite", "unimed21"], "belong together"),
        (["A", "nowhere"], "no file or folder nowhere"),
        (["A", "B", "--distance", "16"], "0 to 15"),
        (["A", "B", "--threads", "0"], "at least 1"),
        (["A", "B", "--slices", "first"], "middle, all or every:N"),
        (["A", "B", "--out", "there.csv"], "exists"),
        (["A", "B", "--out", ".", "--force"], "is a folder"),
        (["A", "B", "--out", "new.csv", "--html", "./new.csv"], "the same name"),
        (["A", "B", "--out", "test/new.png", "--force"], "is read, and an output has its name"),
        (["A", "--html", "train/0.png", "--force"], "is read, and an output has its name"),
    ],
)
def test_wrong_requests_are_refused(sets, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    names = {"A": str(sets[0]), "B": str(sets[1])}
    with pytest.raises(UsageError) as e:
        run(*(names.get(x, x) for x in args))
    assert words in e.value.line()
    assert Path("there.csv").read_text() == "mine"


def test_without_a_model_none_is_loaded(sets, monkeypatch):
    monkeypatch.setattr(infer, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert run(*sets) == 0
    assert overlap_verb._WORDS.keys() == set(overlap.KINDS)
