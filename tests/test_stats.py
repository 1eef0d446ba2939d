"""data/stats.py: every number equals one that was counted in another way."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unimed_jax.data import images, phash, stats
from unimed_jax.data.export import export
from unimed_jax.data.phantom import Phantom
from unimed_jax.data.shards import Manifest, Shards, find_sources
from unimed_jax.data.sources.folder import Folder
from unimed_jax.data.text import train_wordpiece
from unimed_jax.errors import DataError, UsageError

WORDS = ["a", "film", "of", "the", "chest", "and", "another", "slice", "seen"]


def encoded(pixels, kind, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def scene(seed, size=96):
    """A picture with some structure, so that its hash means something."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sources: 24 pictures, of some the same bytes, the same pixels or nearly the same, in either."""
    folder = tmp_path_factory.mktemp("raw")
    pictures = {f"{i:02d}.png": encoded(scene(i), "PNG") for i in range(16)}
    pictures["bytes.png"] = pictures["03.png"]
    pictures["pixels.bmp"] = encoded(scene(4), "BMP")
    pictures["rgb.png"] = encoded(images.to_rgb(scene(5)), "PNG")
    pictures["near.jpg"] = encoded(scene(6), "JPEG", quality=60)
    pictures["half.png"] = encoded(scene(7)[::2, ::2], "PNG")
    pictures["flat.png"] = encoded(np.full((40, 50), 90, np.uint8), "PNG")
    pictures["flat2.png"] = encoded(np.full((40, 51), 90, np.uint8), "PNG")
    pictures["near2.jpg"] = encoded(scene(6), "JPEG", quality=40)
    rng = np.random.default_rng(0)
    rows = []
    for i, (name, data) in enumerate(pictures.items()):
        (folder / name).write_bytes(data)
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(2)]
        texts[1] = ["A film.", ""][i % 2] if i % 3 == 0 else texts[1]
        modality = ["CT", "MRI", ""][i % 3]
        rows.append([name, *texts, modality, f"p{i // 4}", ["train", "train", "test"][i % 3]])
    root = tmp_path_factory.mktemp("records")
    tokenizer = train_wordpiece([" ".join(WORDS)] * 9, 60, tmp_path_factory.mktemp("tok"))
    for name, part in (("one", rows[::2]), ("two", rows[1::2])):
        with (folder / f"{name}.csv").open("w", newline="") as f:
            csv.writer(f).writerows([["file", "caption", "caption2", "modality", "patient", "split"], *part])
        source = Folder(raw=folder, captions=folder / f"{name}.csv", name=name)
        export(source, root, shards=2, tokenizer=tokenizer)
    return root


def in_order(root):
    for folder in find_sources(root).values():
        for split in Manifest.read(folder).splits:
            yield from Shards(folder, split)


def expected(root, distance):
    """The same, record by record and pair by pair."""
    rows, bytes_seen, captions_seen, pixels_seen = {}, set(), set(), set()
    before: list[tuple[int, ...]] = []
    for e in in_order(root):
        row = rows.setdefault((e.source, e.split, e.modality or "unknown"), Counter())
        row["images"] += 1
        row["duplicates"] += e.image in bytes_seen
        pixels = images.decode(e.image)
        pixels = pixels[..., 0] if pixels.ndim == 3 else pixels  # every picture here is gray
        seen = (pixels.shape, pixels.tobytes())
        row["same_pixels"] += seen in pixels_seen and e.image not in bytes_seen
        if seen not in pixels_seen:
            hashes = phash.phashes(pixels)
            row["similar"] += any(
                (a ^ b).bit_count() <= distance for other in before for a in other for b in hashes
            )
            before.append(hashes)
        bytes_seen.add(e.image)
        pixels_seen.add(seen)
        for c in e.captions:
            row["captions"] += 1
            row["words"] += len(c.text.split())
            row["duplicate_captions"] += c.text in captions_seen
            captions_seen.add(c.text)
    return rows


@pytest.mark.parametrize(("distance", "workers"), [(10, 1), (4, 2), (0, 1)])
def test_every_count(root, distance, workers):
    found = stats.stats(root, duplicates=True, distance=distance, workers=workers)
    rows = expected(root, distance)
    assert [(r["source"], r["split"], r["modality"]) for r in found["rows"]] == sorted(rows)
    for row in found["rows"]:
        wanted = rows[row["source"], row["split"], row["modality"]]
        assert {k: row[k] for k in stats_keys} == {k: wanted[k] for k in stats_keys}
    for total in ("images", "captions", "duplicates", "duplicate_captions", "same_pixels", "similar"):
        assert found[total] == sum(r[total] for r in rows.values())
    assert (found["duplicates"], found["same_pixels"]) == (1, 2)
    assert found["similar"] >= 3 or distance < 10
    json.dumps(found)


stats_keys = ("images", "duplicates", "same_pixels", "similar", "captions", "words", "duplicate_captions")


def test_lengths_and_patients(root):
    found = stats.stats(root)
    assert "similar" not in found
    for row in found["rows"]:
        mine = [
            e
            for e in in_order(root)
            if (e.source, e.split, e.modality or "unknown") == (row["source"], row["split"], row["modality"])
        ]
        lengths = sorted(len(c.text.split()) for e in mine for c in e.captions)
        assert row["patients"] == len({e.patient for e in mine})
        assert row["lengths"]["longest"] == lengths[-1]
        for share, key in ((0.5, "median"), (0.95, "p95")):
            exact = np.quantile(lengths, share, method="inverted_cdf")
            assert row["lengths"][key] == exact
        assert sum(row["words_by_length"].values()) == len(lengths)
        assert row["words_by_length"].get("<=8", 0) == sum(n <= 8 for n in lengths)
        tokens = [c.tokens for e in mine for c in e.captions]
        assert row["tokens"].get("<=32", 0) == sum(t <= 32 for t in tokens)
        assert sum(row["tokens"].values()) == len(tokens)


def test_groups():
    assert [stats.bucket(n) for n in (0, 1, 32, 33, 256, 257)] == [
        *("not counted", "<=32", "<=32", "<=64", "<=256", ">256")
    ]
    assert {stats.bucket(n) for n in range(300)} == set(stats.bucket_names())


def test_large_sets_and_many_pairs_are_compared_in_pieces(root, monkeypatch):
    whole = stats.stats(root, duplicates=True)
    monkeypatch.setattr(stats, "_AT_ONCE", 3)
    assert stats.stats(root, duplicates=True) == whole
    monkeypatch.undo()
    monkeypatch.setattr(phash, "_MOST", 10)  # more pairs than may be listed: here pictures are counted
    assert stats.stats(root, duplicates=True) == whole


def test_refusals(tmp_path):
    export(Phantom(n=12, size=24), tmp_path)
    for distance in (-1, 16):
        with pytest.raises(UsageError, match="distance is"):
            stats.stats(tmp_path, distance=distance)
    (shard,) = find_sources(tmp_path)["phantom"].glob("unimed-train.array_record-00000-of-00001")
    data = bytearray(shard.read_bytes())
    at = data.index(b"\x89PNG") + 40
    data[at : at + 30] = bytes(30)
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"record \d+"):
        stats.stats(tmp_path, duplicates=True)
