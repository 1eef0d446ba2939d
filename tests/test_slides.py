"""Whole slides: which tiles, at which scale, and what is tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unimed_jax.data import found, medical, slides
from unimed_jax.data.slides import Tiles
from unimed_jax.errors import DataError, UsageError

tifffile = pytest.importorskip("tifffile", reason='pip install "unimed-jax[medical]"')
openslide = pytest.importorskip("openslide", reason='pip install "unimed-jax[wsi]"')

APERIO = (
    "Aperio Image Library v11.2.1 \r\n1536x1024 [0,0 1536x1024] (256x256) JPEG/RGB Q=70"
    "|AppMag = 40|MPP = 0.25|User = CANARY-user|Filename = CANARY-file|ImageID = CANARY-id"
)


def glass() -> np.ndarray:
    """1024 x 1536 pixels of glass with a stained square at rows 256 to 512, columns 0 to 512, and a pen stroke."""
    pixels = np.full((1024, 1536, 3), (246, 245, 247), np.uint8)
    pixels[256:512, 0:512] = (200, 90, 160)
    pixels[768:, 1024:] = (20, 20, 24)
    return pixels


def plain(path: Path) -> Path:
    """A tiled TIFF that says nothing of a scanner or a scale."""
    tifffile.imwrite(path, glass(), tile=(256, 256), photometric="rgb")
    return path


def aperio(path: Path) -> Path:
    """Two levels, 0.25 microns per pixel, and names in the description."""
    with tifffile.TiffWriter(path) as f:
        f.write(glass(), tile=(256, 256), photometric="rgb", description=APERIO, metadata=None)
        small = np.ascontiguousarray(glass()[::4, ::4])
        f.write(small, tile=(256, 256), photometric="rgb", description="x", metadata=None)
    return path


def read(path: Path, **tiles) -> list[medical.Picture]:
    return [f.read() for f in slides.frames(path, Tiles(**tiles))]


def test_tiles_of_tissue_at_the_scale_of_the_slide(tmp_path):
    path = aperio(tmp_path / "s.svs")
    got = read(path, size=128)  # 0.5 microns per pixel: 256 pixels of the finest level
    assert [p.corner for p in got] == [(0, 256), (256, 256)]
    assert all((p.data == (200, 90, 160)).all() and p.data.shape == (128, 128, 3) for p in got)
    assert [(p.kind, p.frame, p.frames, p.modality) for p in got] == [
        ("slide", 0, 2, ""),
        ("slide", 1, 2, ""),
    ]
    assert [p.corner for p in read(path, size=256, mpp=0.25)] == [(0, 256), (256, 256)]
    assert [p.corner for p in read(path, size=64, level=1)] == [(0, 256), (256, 256)]
    assert [p.corner for p in read(path, size=128, mpp=1.0)] == [(0, 0)]  # a quarter of it is tissue


def test_tissue_and_number_of_tiles(tmp_path):
    path = aperio(tmp_path / "s.svs")
    assert len(read(path, size=128, tissue=0)) == 24
    with pytest.raises(DataError, match="no tile is 60% tissue") as e:
        read(path, size=128, mpp=1.0, tissue=0.6)
    assert "--tissue" in e.value.remedy
    thinned = read(path, size=128, tissue=0, most=3)
    assert [(p.frame, p.frames) for p in thinned] == [(0, 24), (12, 24), (23, 24)]


def test_the_whole_area_is_searched_in_blocks(tmp_path, monkeypatch):
    path = aperio(tmp_path / "s.svs")
    whole = [p.corner for p in read(path, size=100, mpp=0.3, tissue=0.1)]
    monkeypatch.setattr(slides, "_BLOCK", 64)
    assert [p.corner for p in read(path, size=100, mpp=0.3, tissue=0.1)] == whole
    assert len(whole) > 8


def test_a_slide_of_one_level_is_searched_on_a_few_lines(tmp_path, monkeypatch):
    path = plain(tmp_path / "s.tif")
    read_region, pixels = openslide.OpenSlide.read_region, []

    def counted(self, corner, level, box):
        pixels.append(box[0] * box[1])
        return read_region(self, corner, level, box)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", counted)
    for tissue in (0.1, 0.25, 0.7):  # the stained square cuts tiles of 200 pixels in several shares
        some = [f.read().corner for f in slides.frames(path, Tiles(level=0, size=200, tissue=tissue))]
        seen = sum(n for n in pixels if n != 200 * 200)  # all but the tiles themselves
        assert seen <= 1536 * 1024 / 20
        with monkeypatch.context() as m:
            m.setattr(slides, "_WHOLE", 1 << 16)
            assert [
                f.read().corner for f in slides.frames(path, Tiles(level=0, size=200, tissue=tissue))
            ] == some
        pixels.clear()
    assert some


def test_a_slide_without_a_scale_needs_a_level(tmp_path):
    path = plain(tmp_path / "s.tif")
    with pytest.raises(DataError, match="does not say its microns per pixel") as e:
        read(path, size=256)
    assert "--level" in e.value.remedy
    assert [p.corner for p in read(path, size=256, level=0)] == [(0, 256), (256, 256)]
    with pytest.raises(DataError, match="has no level 5"):
        read(path, level=5)
    with pytest.raises(DataError, match="less than a tile"):
        read(path, size=2000, level=0)
    with pytest.raises(DataError, match="a tile would be read from"):
        read(aperio(tmp_path / "a.svs"), size=224, mpp=500)


def test_a_slide_of_endless_size_is_refused_before_it_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(slides.limits, "MAX_TILES", 23)
    with pytest.raises(DataError, match="24 tiles are too many"):
        read(aperio(tmp_path / "s.svs"), size=128)


def test_a_tiff_too_large_for_a_picture_says_how_to_cut_it(tmp_path, monkeypatch):
    path = plain(tmp_path / "s.tif")
    monkeypatch.setattr(medical.images.Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, as for 180 Mpx
    with pytest.raises(DataError, match="too many pixels") as e:
        medical.read(path)
    assert "--level 0" in e.value.remedy


def test_a_tiff_is_a_slide_when_a_scanner_signed_it_or_tiles_are_asked_for(tmp_path):
    signed, unsigned = aperio(tmp_path / "a.tif"), plain(tmp_path / "b.tif")
    ordinary = tmp_path / "c.tif"
    tifffile.imwrite(ordinary, np.zeros((40, 40), np.uint8))
    asked = Tiles(level=0)
    assert [slides.is_slide(p, Tiles()) for p in (signed, unsigned, ordinary)] == [True, False, False]
    assert [slides.is_slide(p, asked) for p in (signed, unsigned, ordinary)] == [True, True, False]
    (item,) = found.find([unsigned]).inputs
    (frame,) = found.frames(item)
    assert frame.read().kind == "image"


def test_damaged_slides_are_refused(tmp_path):
    (tmp_path / "text.svs").write_text("no slide" * 100)
    with pytest.raises(DataError, match=r"text\.svs: cannot read the slide"):
        read(tmp_path / "text.svs")
    with pytest.raises(DataError, match="cannot read the slide"):
        read(tmp_path / "none.svs")
    path = aperio(tmp_path / "cut.svs")
    path.write_bytes(path.read_bytes()[:400_000])
    with pytest.raises(DataError, match="cannot read") as e:
        read(path, size=128, tissue=0)
    assert "CANARY" not in e.value.line()


def test_openslide_missing_names_the_extra(tmp_path, monkeypatch):
    import builtins

    plain(tmp_path / "s.tif")
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "openslide":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match="slides need openslide") as e:
        read(tmp_path / "x.svs")
    assert 'pip install "unimed-jax[wsi]"' in e.value.remedy
    assert not slides.is_slide(tmp_path / "s.tif", Tiles())
    with pytest.raises(DataError, match="slides need openslide"):
        slides.is_slide(tmp_path / "s.tif", Tiles(level=0))


@pytest.mark.parametrize(
    "wrong", [{"mpp": 0.5, "level": 1}, {"mpp": 0}, {"level": -1}, {"tissue": 2}, {"most": 0}]
)
def test_impossible_tiles(wrong):
    with pytest.raises(UsageError):
        Tiles(**wrong).checked()
