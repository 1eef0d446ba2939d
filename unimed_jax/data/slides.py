"""Whole-slide images as tiles of tissue, at one scale (extra `wsi`).

A slide is cut into a grid of squares that are `size` pixels wide at the scale that is asked for. Squares without
tissue, that is without enough coloured pixels, are left out. Of a slide's properties only the scale is used.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from unimed_jax.data import limits
from unimed_jax.data.dicom import Frame, Hold, Picture
from unimed_jax.errors import DataError, UsageError

PIP = 'pip install "unimed-jax[wsi]"'
SUFFIXES = frozenset([".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".svslide", ".bif"])
_TIFF = (".tif", ".tiff")
_TILED = "generic-tiff"  # OpenSlide's name for a tiled TIFF that no scanner has signed
_SATURATION = 0.08  # (max - min) / max of a pixel's colours, above which it is stained; glass has less
_DARK = 40  # pen, dust and the black around a scan are no tissue, whatever their saturation
_MASK = 8  # pixels of a tile's side that are enough to see tissue
_LINES = 8  # of a tile's pixels are looked at, where the coarsest level shows it much larger than that
_WHOLE = 64  # pixels of a tile's side up to which all are looked at
_BLOCK = 2048  # pixels of a side that are searched for tissue at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Which tiles of a slide are read."""

    size: int = 224  # pixels of a side
    mpp: float | None = None  # microns per pixel; without a level, 0.5 (20x)
    level: int | None = None  # of the file, instead of a scale
    tissue: float = 0.25  # share of a tile that must be tissue
    most: int = 1000  # of one slide; more are thinned out evenly

    @property
    def asked(self) -> bool:
        """Whether someone wants tiles, also of a TIFF that could be an ordinary picture."""
        return self.mpp is not None or self.level is not None

    def checked(self) -> Tiles:
        """Itself.

        Raises:
            UsageError: for values that make no sense.
        """
        if self.mpp is not None and self.level is not None:
            raise UsageError("--mpp and --level exclude each other", "give one of them")
        if self.mpp is not None and not 0.01 <= self.mpp <= 1000:
            raise UsageError(f"--mpp is {self.mpp:g}", "microns per pixel, e.g. 0.5 (about 20x)")
        if self.level is not None and self.level < 0:
            raise UsageError(f"--level is {self.level}", "0 is the finest")
        if not 0 <= self.tissue <= 1 or self.most < 1:
            raise UsageError("--tissue is a share from 0 to 1, --max-tiles at least 1")
        return self


def is_slide(path: Path, tiles: Tiles) -> bool:
    """Whether a file is read as a slide: by its suffix, or a TIFF that a scanner signed; other tiled TIFF when asked.

    Raises:
        DataError: for tiles of a TIFF without OpenSlide.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix not in _TIFF:
        return False
    try:
        import openslide
    except ImportError:
        if tiles.asked:
            raise _missing(path) from None
        return False
    try:
        vendor = openslide.OpenSlide.detect_format(path)
    except Exception:  # no such file, or damaged: the reader of ordinary images says so
        return False
    return vendor is not None and (vendor != _TILED or tiles.asked)


def frames(path: Path, tiles: Tiles, hold: Hold = nullcontext) -> Iterator[Frame]:
    """The tiles of tissue, row by row; `Picture.frames` is how many there are, of which at most `tiles.most` come.

    Args:
        path: the slide.
        tiles: which.
        hold: entered while parts of the slide are searched for tissue.

    Raises:
        DataError: for a slide that cannot be read, has no such level or scale, or no tissue.
    """
    openslide = _openslide(path)
    try:
        slide = openslide.OpenSlide(path)
        step, level = _scale(path, slide, tiles)
        side = max(1, round(step / slide.level_downsamples[level]))
        if side * side > limits.MAX_IMAGE_PIXELS:
            raise DataError(
                f"{path.name}: a tile would be read from {side} x {side} pixels", "a smaller --mpp"
            )
        corners = _tissue(path, slide, step, tiles.tissue, hold)
    except DataError:
        raise
    except Exception as e:  # OpenSlide's messages may quote the file's properties
        raise DataError(f"{path.name}: cannot read the slide ({type(e).__name__})") from None
    if not corners:
        raise DataError(
            f"{path.name}: no tile is {tiles.tissue:.0%} tissue", "a lower --tissue; 0 takes every tile"
        )
    chosen = np.unique(np.linspace(0, len(corners) - 1, min(tiles.most, len(corners))).round().astype(int))
    for k in chosen.tolist():
        read = functools.partial(_tile, path, slide, corners[k], level, side, tiles.size, k, len(corners))
        yield Frame(file=path, cost=side * side * 16, read=read)


def _openslide(path: Path) -> Any:
    try:
        import openslide
    except ImportError:
        raise _missing(path) from None
    return openslide


def _missing(path: Path) -> DataError:
    return DataError(f"{path.name}: slides need openslide, which is not installed", PIP)


def _scale(path: Path, slide: Any, tiles: Tiles) -> tuple[float, int]:
    """(pixels of the finest level that a tile is wide, level to read it from)."""
    if tiles.level is not None:
        if tiles.level >= slide.level_count:
            raise DataError(
                f"{path.name}: has no level {tiles.level}", f"levels 0 to {slide.level_count - 1}"
            )
        return tiles.size * slide.level_downsamples[tiles.level], tiles.level
    try:
        finest = float(slide.properties["openslide.mpp-x"])
    except (KeyError, ValueError):
        finest = math.nan
    if not 0.001 <= finest <= 1000:
        raise DataError(f"{path.name}: does not say its microns per pixel", "choose --level, 0 is the finest")
    zoom = (tiles.mpp or 0.5) / finest
    return tiles.size * zoom, slide.get_best_level_for_downsample(max(zoom, 1.0))


def _tissue(path: Path, slide: Any, step: float, share: float, hold: Hold) -> list[tuple[int, int]]:
    """Corners of the tiles of tissue, in pixels of the finest level; found on the coarsest level that shows it."""
    columns, rows = (int(side / step + 1e-6) for side in slide.dimensions)
    if not columns or not rows:
        width, height = slide.dimensions
        raise DataError(
            f"{path.name}: {width} x {height} pixels are less than a tile of {step:.0f}", "a smaller --mpp"
        )
    if columns * rows > limits.MAX_TILES:
        raise DataError(f"{path.name}: {columns * rows} tiles are too many", "a larger --mpp or --level")
    fine_enough = [k for k, d in enumerate(slide.level_downsamples) if step / d >= _MASK]
    level = fine_enough[-1] if fine_enough else 0
    side = step / slide.level_downsamples[level]
    across = max(1, int(_BLOCK // side))
    found = []
    for row in range(rows):
        for first in range(0, columns, across):
            edges = np.round(np.arange(min(across, columns - first) + 1) * side).astype(int)
            box = (int(edges[-1]) or 1, max(1, round(side)))
            with hold(box[0] * min(box[1], _WHOLE) * 16):
                stained = _searched(slide, (round(first * step), round(row * step)), level, box)
            for k, (left, right) in enumerate(itertools.pairwise(edges)):
                part = stained[:, left:right] if right > left else stained
                if part.mean() >= share:
                    found.append((round((first + k) * step), round(row * step)))
    return found


def _searched(
    slide: Any, corner: tuple[int, int], level: int, box: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Where a row of tiles is stained: all of it, or on some lines across, which a slide of one level needs.

    Turning pixels into an array costs several times what decoding them does.
    """
    width, height = box
    if height <= _WHOLE:
        return _stained(np.asarray(slide.read_region(corner, level, box)))
    scale = slide.level_downsamples[level]
    down = [corner[1] + round((k + 0.5) / _LINES * height * scale) for k in range(_LINES)]
    lines = [np.asarray(slide.read_region((corner[0], y), level, (width, 1))) for y in down]
    return _stained(np.concatenate(lines))


def _stained(pixels: UInt8[np.ndarray, "h w 4"]) -> Bool[np.ndarray, "h w"]:
    """Which pixels have a colour.

    Example:
        >>> _stained(np.uint8([[[250, 250, 248, 255], [200, 90, 160, 255], [30, 5, 5, 255]]])).tolist()
        [[False, True, False]]
    """
    high, low = pixels[..., :3].max(-1), pixels[..., :3].min(-1)
    return (pixels[..., 3] > 0) & (high > _DARK) & ((high - low) > _SATURATION * high)


def _tile(
    path: Path, slide: Any, corner: tuple[int, int], level: int, side: int, size: int, k: int, count: int
) -> Picture:
    """One tile at the asked scale; what a scanner left out is white, as glass is."""
    try:
        region = slide.read_region(corner, level, (side, side))
    except Exception as e:  # as in `frames`
        raise DataError(
            f"{path.name}: cannot read a tile ({type(e).__name__})", "the file is damaged"
        ) from None
    colours = Image.new("RGB", region.size, "white")
    colours.paste(region, mask=region.getchannel("A"))
    colours = colours.resize((size, size), Image.Resampling.BICUBIC) if side != size else colours
    return Picture(
        data=np.asarray(colours), kind="slide", frame=k, frames=count, corner=corner, where=path.name
    )
