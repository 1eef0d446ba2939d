"""Fundus: photographs of eyes; those of the holdout lie in an archive of their own."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import Facts, Picture
from unimed_jax.data.minimed.split import STARE

# (package, file, subject, finding, side); findings are those in the data sets' own file names and descriptions.
_PHOTOS = (
    ("scikit-image", "retina.jpg", "wikimedia-normal", "normal", "left"),
    ("retinalysis-fundusprep", "CHASEDB1_08L.png", "CHASE-08", "", "left"),
    ("retinalysis-fundusprep", "CHASEDB1_12R.png", "CHASE-12", "", "right"),
    ("retinalysis-fundusprep", "DRIVE_22.png", "DRIVE-22", "", ""),
    ("retinalysis-fundusprep", "DRIVE_40.png", "DRIVE-40", "", ""),
    ("retinalysis-fundusprep", "HRF_04_g.jpg", "HRF-04g", "glaucoma", ""),
    ("retinalysis-fundusprep", "HRF_07_dr.jpg", "HRF-07dr", "diabetic retinopathy", ""),
    ("retinalysis-fundusprep", "PALM_TR_P0185.png", "PALM-P0185", "pathologic myopia", ""),
    ("retinalysis-fundusprep", "cropped.png", "rfp-cropped", "", ""),
    ("retinalysis-fundusprep", "issue_1.png", "rfp-issue_1", "", ""),
    ("retinalysis-fundusprep", "issue_2.png", "rfp-issue_2", "", ""),
    ("retinalysis-fundusprep", "sample_dark.png", "rfp-sample_dark", "", ""),
    ("retinalysis-fundusprep", "issue_3.dcm", "topcon", "", "right"),
    ("retinalysis-registration", "image0.png", "rreg-0", "drusen", ""),
    ("retinalysis-registration", "image1.png", "rreg-0", "drusen", ""),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every fundus photograph."""
    for package, name, subject, finding, side in _PHOTOS:
        yield Picture(
            key=f"{package}/{name.rsplit('.', 1)[0]}",
            facts=Facts(
                modality="Fundus",
                subject=subject,
                package=package,
                region="retina",
                finding=finding,
                side=side,
            ),
            make=partial(render, root[package] / name),
        )
    for name in STARE:
        yield Picture(
            key=f"deepdraw/stare/{name}",
            facts=Facts(modality="Fundus", subject=f"STARE-{name}", package="deepdraw", region="retina"),
            make=partial(render_zipped, root["deepdraw"] / "test-database.zip", f"stare-images/{name}.ppm"),
        )


def render(path: Path) -> np.ndarray:
    """A photograph reduced to the set's size, u8[h w 3]."""
    if path.suffix == ".dcm":
        return pixels.fit(np.ascontiguousarray(pixels.dicom(path)[1][0]))
    return pixels.fit(pixels.photo(path))


def render_zipped(archive: Path, name: str) -> np.ndarray:
    """A photograph inside a zip archive, reduced to the set's size, u8[h w 3]."""
    from PIL import Image

    with zipfile.ZipFile(archive) as z, z.open(name) as stream, Image.open(stream) as opened:
        return pixels.fit(np.asarray(opened.convert("RGB")))
