"""Ultrasound: clips and single frames, cropped to the scan so that no burned-in text remains."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import Facts, Picture

_STEP = 2  # every second frame of a clip: neighbours are 1/30 s apart
# (package, file, subject, facts, crop: top, bottom, left, right in pixels, and other frames than _STEP's)
_CLIPS: tuple[tuple[Any, ...], ...] = (
    (
        "pydicom-data",
        "color3d_jpeg_baseline.dcm",
        "sonosite-204",
        {"region": "heart", "view": "apical four-chamber"},
        (20, 430, 80, 600),
    ),
    (
        "deid-data",
        "ultrasounds/ultrasound-multiframe.dcm",
        "philips-echo",
        {"region": "heart", "view": "parasternal long-axis", "doppler": True},
        (40, 600, 60, 760),
    ),
    (
        "pydicom-data",
        "US1_UNCR.dcm",
        "NEMA-13US1",
        {"region": "lymph node", "doppler": True},
        (110, 340, 70, 580),
    ),
    (
        "pydicom-data",
        "JPGLosslessP14SV1_1s_1f_8b.dcm",
        "philips-adult-echo",
        {"region": "heart"},
        (150, 665, 130, 900),
    ),
    ("pydicom-data", "gdcm-US-ALOKA-16.dcm", "aloka", {"region": "pelvis"}, (78, 412, 36, 630)),
    (
        "pydicom-data",
        "color-pl.dcm",
        "acme-tee",
        {"region": "heart", "view": "transoesophageal", "doppler": True},
        (0, 120, 30, 226),
    ),
    (
        "rsna-anonymizer",
        "us_multi_frame_grayscale/us_multi_frame_grayscale_JPG2000.dcm",
        "rsna-axilla",
        {"region": "axilla"},
        (50, 680, 145, 895),
        slice(3, None, 5),  # frames 0, 2 and every fifth carry made-up names and dates in the scan itself
    ),
    (
        "rsna-anonymizer",
        "us_rgb_single_frame/US_RGB_SingleFrame.dcm",
        "rsna-liver",
        {"region": "liver"},
        (75, 425, 215, 452),
    ),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every ultrasound picture (frames that repeat an earlier one are left out)."""
    for package, name, subject, known, crop, *frames in _CLIPS:
        path = root[package] / name
        for index in distinct(path)[frames[0] if frames else slice(None, None, _STEP)]:
            facts = Facts(modality="Ultrasound", subject=subject, package=package, **known)
            yield Picture(
                key=f"{package}/{name.rsplit('.', 1)[0]}/{index:03d}",
                facts=facts,
                make=partial(render, path, index, crop),
            )


@functools.lru_cache(maxsize=5)
def _frames(path: Path) -> np.ndarray:
    """All frames of a clip as u8[n h w] or u8[n h w 3]."""
    from pydicom.pixels.processing import apply_color_lut

    header, values = pixels.dicom(path)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
    return (values // 257).astype(np.uint8) if values.dtype == np.uint16 else values


def distinct(path: Path) -> list[int]:
    """Indices of the frames of a clip that differ from all earlier ones."""
    seen: dict[bytes, int] = {}
    for index, frame in enumerate(_frames(path)):
        seen.setdefault(hashlib.sha256(frame.tobytes()).digest(), index)
    return sorted(seen.values())


def render(path: Path, index: int, crop: tuple[int, int, int, int]) -> np.ndarray:
    """One frame of a clip, cropped, u8[h w] or u8[h w 3]."""
    top, bottom, left, right = crop
    return pixels.fit(_frames(path)[index, top:bottom, left:right])
