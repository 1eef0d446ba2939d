"""data/reduce.py: what `--max-side` stores, and that nothing else changes."""

from __future__ import annotations

import csv
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from unimed_jax.cli import data as cli
from unimed_jax.data import images, record, reduce, stats, verify
from unimed_jax.data.export import export, write_range
from unimed_jax.data.shards import Manifest, Shards, find_sources
from unimed_jax.data.sources.folder import Folder
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import inputs, overlap


def encoded(pixels, kind="PNG", mode=None, **options):
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def smooth(height, width, depth=3):
    """A picture in which aliasing and overshoot would show."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / (3 + k)) * 90 + np.cos(y / 7) * 30 + 128 for k in range(depth)]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)[..., 0 if depth == 1 else slice(None)]


RGB, GRAY = smooth(90, 200), smooth(200, 90, 1)
DEEP = (smooth(120, 80, 1).astype(np.uint16) * 17) + 40  # 40 to 4375


def of(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("data", "kind", "mode", "size"),
    [
        (encoded(RGB, "JPEG", quality=92), "JPEG", "RGB", (64, 29)),
        (encoded(GRAY, "JPEG"), "JPEG", "L", (29, 64)),
        (encoded(RGB, "JPEG", "CMYK"), "JPEG", "RGB", (64, 29)),
        (encoded(RGB), "PNG", "RGB", (64, 29)),
        (encoded(GRAY), "PNG", "L", (29, 64)),
        (encoded(RGB, "PNG", "P"), "PNG", "RGB", (64, 29)),
        (encoded(RGB, "PNG", "RGBA"), "PNG", "RGB", (64, 29)),
        (encoded(RGB, "GIF", "P"), "PNG", "RGB", (64, 29)),
        (encoded(RGB, "TIFF"), "PNG", "RGB", (64, 29)),
        (encoded(RGB, "WEBP"), "PNG", "RGB", (64, 29)),
        (encoded(RGB[:3]), "PNG", "RGB", (64, 1)),
    ],
)
def test_formats_and_sizes(data, kind, mode, size):
    small, what = reduce.fit(data, 64)
    found = of(small)
    assert (found.format, found.mode, found.size, what) == (kind, mode, size, f"reduced {kind.lower()}")
    expected = Image.fromarray(images.decode(data)).resize(size, Image.Resampling.LANCZOS)
    error = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert error.max() == 0 if kind == "PNG" else error.mean() < 2
    assert reduce.fit(small, 64) == (small, "")  # once is enough
    assert reduce.fit(data, 200)[0] is data


def test_16_bits_stay_16_bits_in_their_own_range():
    for kind in ("PNG", "TIFF"):
        small, what = reduce.fit(encoded(DEEP, kind), 60)
        values = np.asarray(of(small))
        assert (values.dtype, values.shape, what) == (np.uint16, (60, 40), "reduced png")
        assert DEEP.min() <= values.min() < values.max() <= DEEP.max()
        exact = np.asarray(
            Image.fromarray(DEEP.astype(np.float32)).resize((40, 60), Image.Resampling.LANCZOS)
        )
        assert np.abs(values - exact.clip(DEEP.min(), DEEP.max())).max() <= 0.5


def test_what_16_bits_do_not_hold_is_kept():
    for values in (smooth(90, 80, 1).astype(np.float32) / 255, smooth(90, 80, 1).astype(np.int32) * 1000):
        data = encoded(values, "TIFF")
        assert reduce.fit(data, 60) == (data, reduce.KEPT)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Small and large pictures of several kinds, one of them cut off."""
    folder = tmp_path_factory.mktemp("raw")
    kinds = [("jpg", encoded(RGB, "JPEG")), ("png", encoded(GRAY)), ("tif", encoded(DEEP, "TIFF"))]
    kinds += [("small.png", encoded(RGB[:30, :40])), ("float.tif", encoded(DEEP.astype(np.float32), "TIFF"))]
    rows = []
    for k in range(20):
        suffix, data = kinds[k % 5]
        data = data[:-40] if k == 10 else data
        (folder / f"{k:02d}.{suffix}").write_bytes(data)
        rows.append([f"{k:02d}.{suffix}", f"Picture number {k}."])
    with (folder / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["file", "caption"], *rows])
    return Folder(raw=folder, captions=folder / "table.csv", name="mixed")


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def records(root):
    folder = find_sources(root)["mixed"]
    return {e.key: e for split in Manifest.read(folder).splits for e in Shards(folder, split)}


@pytest.fixture(scope="module")
def reduced(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("reduced")
    export(source, root, shards=3, max_side=64, max_bad=0.1)
    return root


def test_an_export_says_what_it_changed(source, reduced, tmp_path, capsys):
    found = records(reduced)
    assert len(found) == 19
    for key, e in found.items():
        raw = (source.raw / key.partition("/")[2]).read_bytes()
        changed = e.image != raw
        assert changed == (not key.endswith(("small.png", "float.tif")))
        assert e.original_sha256 == (hashlib.sha256(raw).hexdigest() if changed else "")
        assert e.sha256 == hashlib.sha256(e.image).hexdigest()
        assert (e.height, e.width) == images.decode(e.image).shape[:2]
    manifest = Manifest.read(find_sources(reduced)["mixed"])
    assert manifest.reduction == reduce.settings(64)
    assert manifest.rejects == {"decode_error": 1}
    counts = manifest.counts["train"]
    assert [counts[k] for k in ("reduced jpeg", "reduced png", reduce.KEPT)] == [3, 8, 4]
    card = (find_sources(reduced)["mixed"] / "README.md").read_text()
    assert "11 were reduced" in card
    assert "3 as JPEG (quality 95, 4:4:4), 8 as PNG" in card
    assert verify.check(reduced).ok
    argv = [
        "build",
        "folder",
        "--raw",
        str(source.raw),
        "--captions",
        str(source.captions),
        "--name",
        "mixed",
    ]
    argv += [
        "--shards",
        "3",
        "--max-bad",
        "0.1",
        "--workers",
        "2",
        "--max-side",
        "64",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.run(argv) == 0
    assert files(tmp_path / "o") == files(reduced)  # for any number of workers
    with pytest.raises(UsageError, match="max_side is 8"):
        cli.run([*argv[:-4], "--max-side", "8", "--out", str(tmp_path / "p")])


def test_another_limit_is_another_export(source, reduced, tmp_path):
    for other in (0, 65):
        with pytest.raises(DataError, match="finished export of other content"):
            export(source, reduced, shards=3, max_side=other, max_bad=0.1)
    write_range(source, tmp_path, 0, 2, shards=3, max_side=65)  # not finished: written anew
    export(source, tmp_path, shards=3, max_side=64, max_bad=0.1)
    assert files(tmp_path) == files(reduced)


def test_a_reduced_picture_is_still_known_by_its_source(source, reduced):
    a = inputs.open_place(str(reduced))
    found = overlap.audit(a, inputs.open_place(str(source.raw)), distance=-1)
    pairs = {(found.a.ids[p.a], found.b.ids[p.b]) for p in found.pairs if p.kind == "bytes"}
    assert len({b for _, b in pairs}) == 19
    assert all(key.endswith(name[-4:]) for key, name in pairs)


def test_check_and_stats_know_a_picture_that_is_stored_in_two_sizes(source, tmp_path):
    for name, split, max_side in (("small", "train", 64), ("large", "test", 0)):
        rows = [["file", "caption", "split"], *([r.file, "A picture.", split] for r in source.items()[:3])]
        with (tmp_path / f"{name}.csv").open("w", newline="") as f:
            csv.writer(f).writerows(rows)
        one = Folder(raw=source.raw, captions=tmp_path / f"{name}.csv", name=name)
        export(one, tmp_path / "out", max_side=max_side, max_bad=0.1)
    problems = verify.check(tmp_path / "out").problems
    assert len(problems) == 3
    assert all("stored in two sizes, is in two splits" in p for p in problems)
    found = stats.stats(tmp_path / "out", duplicates=True)
    assert (found["images"], found["duplicates"], found["same_pixels"]) == (6, 3, 0)


def test_older_records_have_no_original():
    old = record.encode(record.Example(key="a/1", image=b"."))
    assert record.decode(old.replace(b"original_sha256", b"another_feature")).original_sha256 == ""
