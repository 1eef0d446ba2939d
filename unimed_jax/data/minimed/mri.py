"""MRI: two averages of many brains, brains of single people, and other regions."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import Facts, Picture

# (package, file, subject, facts beyond the common ones, planes, slice step, least foreground share)
_VOLUMES: tuple[tuple[Any, ...], ...] = (
    (
        "nilearn",
        "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "avg-MNI152",
        {"sequence": "T1-weighted", "average": True, "masked": True},
        ("axial", "coronal", "sagittal"),
        2,
        0.12,
    ),
    (
        "pydeface",
        "mean_reg2mean.nii.gz",
        "avg-pydeface",
        {"sequence": "T1-weighted", "average": True, "region": "head"},
        ("axial", "coronal", "sagittal"),
        2,
        0.2,
    ),
    ("nibabel", "example4d.nii.gz", "nibabel-4d", {"sequence": "echo-planar"}, ("axial",), 1, 0.12),
    (
        "dipy",
        "S0_10slices.nii.gz",
        "dipy-S0",
        {"sequence": "diffusion (b=0)"},
        ("axial",),
        1,
        0.08,
    ),
    ("pyradiomics", "brain1_image.nrrd", "pyrad-brain1", {}, ("axial",), 1, 0.12),
    ("pyradiomics", "brain2_image.nrrd", "pyrad-brain2", {}, ("axial",), 1, 0.12),
    ("totalsegmentator", "example_mr_sm.nii.gz", "ts-mr", {"region": "abdomen"}, ("axial",), 1, 0.12),
)
_SINGLE = (
    ("pydicom-data", "MR2_UNCR.dcm", "NEMA-MR2", "shoulder", "coronal"),
    ("pydicom-data", "MR-SIEMENS-DICOM-WithOverlays.dcm", "gdcm-liver", "abdomen", "axial"),
    ("rsna-anonymizer", "JPEG-LS_Lossy.dcm", "rsna-finger", "finger", "sagittal"),
    ("matplotlib", "s1045.ima.gz", "mpl-s1045", "head", "sagittal"),
)
# Siemens mosaics, all axial slices of a brain in one picture: (package, file, subject, facts, tiles a side)
_MOSAICS: tuple[tuple[Any, ...], ...] = (
    ("heudiconv", "axasc35.dcm", "heudiconv-epi", {"sequence": "echo-planar"}, 6),
    (
        "heudiconv",
        "b0dwiForFmap/b0dwi_for_fmap+00001.dcm",
        "heudiconv-dwi",
        {"sequence": "diffusion (b=0)"},
        9,
    ),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every MRI picture; `root` maps package names to folders."""
    for package, name, subject, known, planes, step, least in _VOLUMES:
        path = root[package] / name
        values, _ = pixels.volume(path)
        low, high = _range(path)
        tumour = _tumour_slices(path)
        stem = name.split(".")[0].removesuffix("_image")
        for plane in planes:
            for index in pixels.foreground(values, plane, low + 0.08 * (high - low), least, step):
                facts = Facts(
                    modality="MRI",
                    subject=subject,
                    package=package,
                    plane=plane,
                    finding="brain tumour" if index in tumour else "",
                    **{"region": "brain", **known},
                )
                yield Picture(
                    key=f"{package}/{stem}/{plane}/{index:03d}",
                    facts=facts,
                    make=partial(render, path, plane, index),
                )
    for package, name, subject, region, plane in _SINGLE:
        facts = Facts(modality="MRI", subject=subject, package=package, region=region, plane=plane)
        yield Picture(
            key=f"{package}/{name.removesuffix('.dcm')}",
            facts=facts,
            make=partial(render_file, root[package] / name),
        )
    yield from _mosaics(root)


def _mosaics(root: dict[str, Path]) -> Iterator[Picture]:
    for package, name, subject, known, side in _MOSAICS:
        path = root[package] / name
        tiles, high = mosaic(path, side)
        for index in pixels.foreground(tiles, "axial", 0.15 * high, 0.2, 1):
            yield Picture(
                key=f"{package}/{subject}/axial/{index:03d}",
                facts=Facts(
                    modality="MRI", subject=subject, package=package, region="brain", plane="axial", **known
                ),
                make=partial(render_tile, path, side, index),
            )


@functools.lru_cache(maxsize=8)
def _range(path: Path) -> tuple[float, float]:
    """The display range of a volume: from its least value to the 99.7th percentile of what is not background."""
    values = pixels.volume(path)[0][::2, ::2, ::2]
    tissue = values[values > values.min()]
    return float(values.min()), float(np.percentile(tissue, 99.7))


def _tumour_slices(path: Path) -> set[int]:
    mask = path.with_name(path.name.replace("_image", "_label"))
    if mask == path:
        return set()
    return set(np.flatnonzero((pixels.volume(mask)[0] > 0).sum(axis=(0, 1)) > 20).tolist())


def render(path: Path, plane: str, index: int) -> np.ndarray:
    """One slice of a volume, u8[h w], at one brightness for the whole volume."""
    values, spacing = pixels.volume(path)
    shown = pixels.display(pixels.take(values, plane, index), plane, spacing)
    return pixels.fit(pixels.window(shown, *_range(path)))


def render_file(path: Path) -> np.ndarray:
    """A single-slice file, u8[h w]."""
    if path.suffix == ".gz":  # bare big-endian numbers of 256 x 256 pixels
        values = np.frombuffer(gzip.decompress(path.read_bytes()), ">u2").reshape(256, 256)
        return pixels.fit(pixels.percentile_window(values, 0, 99.7))
    header, values = pixels.dicom(path)
    return pixels.fit(pixels.percentile_window(pixels.rescaled(header, values[0]), 0, 99.7))


@functools.lru_cache(maxsize=2)
def mosaic(path: Path, side: int) -> tuple[np.ndarray, float]:
    """The slices of a mosaic of `side` x `side` tiles as [h w slices], as displayed, and the upper display value."""
    values = pixels.dicom(path)[1][0]
    height, width = values.shape[0] // side, values.shape[1] // side
    tiles = values.reshape(side, height, side, width).transpose(1, 3, 0, 2).reshape(height, width, -1)
    return tiles, float(np.percentile(values[values > 0], 99.7))


def render_tile(path: Path, side: int, index: int) -> np.ndarray:
    """One slice of a mosaic, u8[h w], at one brightness for the whole volume."""
    tiles, high = mosaic(path, side)
    return pixels.fit(pixels.window(tiles[..., index], 0, high))
