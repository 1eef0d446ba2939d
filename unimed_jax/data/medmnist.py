"""MedMNIST v2's files: what their twelve 2D sets hold, and readers of their arrays.

A set is one `.npz` with `train_images`, `train_labels` and the same of `val` and `test`; pictures are u8[n h w] or
u8[n h w 3] of 28, 64, 128 or 224 pixels a side (`pathmnist.npz`, `pathmnist_64.npz`, ...). Names of sets and classes
and the counts are those of the authors' package medmnist 3.0.2 (Yang et al., Scientific Data 10:41, 2023). Arrays of
objects are refused: nothing is unpickled.
"""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Integer, UInt8

from unimed_jax.data import limits
from unimed_jax.errors import DataError, did_you_mean

SPLITS = ("train", "val", "test")
SETS_3D = (
    *("organmnist3d", "nodulemnist3d", "adrenalmnist3d"),
    *("fracturemnist3d", "vesselmnist3d", "synapsemnist3d"),
)
_MAX_ARRAY = 16 << 30  # bytes of an array that is read at once
_PIECE = 1 << 22
_TEMPLATES = ("{View} showing {shown}.", "{View}: {shown}.", "{Shown} seen in {view}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MedSet:
    """One set: what its pictures are, and its classes in the order of their numbers."""

    modality: str  # one of config.MODALITIES, or empty: dermatoscopes, OCT and microscopes of cells are none
    anatomy: str
    view: str  # a noun phrase for templates
    classes: dict[str, str]  # the set's own name of a class: a noun phrase for templates
    counts: tuple[int, int, int]  # pictures in train, val, test
    multilabel: bool = False  # labels are u8[n classes] of 0 and 1
    licence: str = "CC BY 4.0"

    @property
    def names(self) -> tuple[str, ...]:
        """What the classes are called where a number says nothing."""
        return tuple(shown if name.isdecimal() else name for name, shown in self.classes.items())


_ORGANS = {
    "bladder": "the bladder",
    "femur-left": "the left femur",
    "femur-right": "the right femur",
    "heart": "the heart",
    "kidney-left": "the left kidney",
    "kidney-right": "the right kidney",
    "liver": "the liver",
    "lung-left": "the left lung",
    "lung-right": "the right lung",
    "pancreas": "the pancreas",
    "spleen": "the spleen",
}


def _organs(plane: str, counts: tuple[int, int, int]) -> MedSet:
    view = f"{plane} abdominal CT image cropped to one organ"
    return MedSet(modality="CT", anatomy="abdomen", view=view, classes=_ORGANS, counts=counts)


SETS: dict[str, MedSet] = {
    "pathmnist": MedSet(
        modality="Histopathology",
        anatomy="colorectum",
        view="an H&E histopathology patch of colorectal tissue",
        classes={
            "adipose": "adipose tissue",
            "background": "background without tissue",
            "debris": "debris",
            "lymphocytes": "lymphocytes",
            "mucus": "mucus",
            "smooth muscle": "smooth muscle",
            "normal colon mucosa": "normal colon mucosa",
            "cancer-associated stroma": "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium": "colorectal adenocarcinoma epithelium",
        },
        counts=(89_996, 10_004, 7_180),
    ),
    "chestmnist": MedSet(
        modality="X-ray",
        anatomy="chest",
        view="a frontal chest X-ray",
        classes={
            "atelectasis": "atelectasis",
            "cardiomegaly": "cardiomegaly",
            "effusion": "pleural effusion",
            "infiltration": "infiltration",
            "mass": "a mass",
            "nodule": "a nodule",
            "pneumonia": "pneumonia",
            "pneumothorax": "pneumothorax",
            "consolidation": "consolidation",
            "edema": "pulmonary edema",
            "emphysema": "emphysema",
            "fibrosis": "fibrosis",
            "pleural": "pleural thickening",
            "hernia": "a hernia",
        },
        counts=(78_468, 11_219, 22_433),
        multilabel=True,
    ),
    "dermamnist": MedSet(
        modality="",
        anatomy="skin",
        view="a dermatoscopic image of a skin lesion",
        classes={
            "actinic keratoses and intraepithelial carcinoma": "actinic keratosis or intraepithelial carcinoma",
            "basal cell carcinoma": "basal cell carcinoma",
            "benign keratosis-like lesions": "a benign keratosis-like lesion",
            "dermatofibroma": "a dermatofibroma",
            "melanoma": "melanoma",
            "melanocytic nevi": "a melanocytic nevus",
            "vascular lesions": "a vascular lesion",
        },
        counts=(7_007, 1_003, 2_005),
        licence="CC BY-NC 4.0",
    ),
    "octmnist": MedSet(
        modality="",
        anatomy="retina",
        view="a retinal optical coherence tomography image",
        classes={
            "choroidal neovascularization": "choroidal neovascularization",
            "diabetic macular edema": "diabetic macular edema",
            "drusen": "drusen",
            "normal": "no abnormality",
        },
        counts=(97_477, 10_832, 1_000),
    ),
    "pneumoniamnist": MedSet(
        modality="X-ray",
        anatomy="chest",
        view="a pediatric chest X-ray",
        classes={"normal": "no abnormality", "pneumonia": "pneumonia"},
        counts=(4_708, 524, 624),
    ),
    "retinamnist": MedSet(
        modality="Fundus",
        anatomy="retina",
        view="a color fundus photograph",
        classes={
            "0": "no diabetic retinopathy",
            "1": "mild nonproliferative diabetic retinopathy",
            "2": "moderate nonproliferative diabetic retinopathy",
            "3": "severe nonproliferative diabetic retinopathy",
            "4": "proliferative diabetic retinopathy",
        },
        counts=(1_080, 120, 400),
    ),
    "breastmnist": MedSet(
        modality="Ultrasound",
        anatomy="breast",
        view="a breast ultrasound image",
        classes={"malignant": "a malignant tumor", "normal, benign": "no malignant tumor"},
        counts=(546, 78, 156),
    ),
    "bloodmnist": MedSet(
        modality="",
        anatomy="blood",
        view="a microscopy image of a stained blood smear",
        classes={
            "basophil": "a basophil",
            "eosinophil": "an eosinophil",
            "erythroblast": "an erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)": "an immature granulocyte",
            "lymphocyte": "a lymphocyte",
            "monocyte": "a monocyte",
            "neutrophil": "a neutrophil",
            "platelet": "a platelet",
        },
        counts=(11_959, 1_712, 3_421),
    ),
    "tissuemnist": MedSet(
        modality="",
        anatomy="kidney",
        view="a fluorescence microscopy image of human kidney cortex",
        classes={
            "Collecting Duct, Connecting Tubule": "a cell of a collecting duct or connecting tubule",
            "Distal Convoluted Tubule": "a cell of a distal convoluted tubule",
            "Glomerular endothelial cells": "a glomerular endothelial cell",
            "Interstitial endothelial cells": "an interstitial endothelial cell",
            "Leukocytes": "a leukocyte",
            "Podocytes": "a podocyte",
            "Proximal Tubule Segments": "a cell of a proximal tubule segment",
            "Thick Ascending Limb": "a cell of a thick ascending limb",
        },
        counts=(165_466, 23_640, 47_280),
    ),
    "organamnist": _organs("an axial", (34_561, 6_491, 17_778)),
    "organcmnist": _organs("a coronal", (12_975, 2_392, 8_216)),
    "organsmnist": _organs("a sagittal", (13_932, 2_452, 8_827)),
}


def name_of(file: Path) -> str:
    """Which set a file is, by its name; empty for none of them.

    Example:
        >>> name_of(Path("pathmnist_224.npz")), name_of(Path("mine.npz"))
        ('pathmnist', '')
    """
    stem = re.sub(r"_\d+$", "", file.stem.lower())
    return stem if stem in SETS or stem in SETS_3D else ""


def known(name: str, where: str) -> MedSet:
    """A set by name.

    Raises:
        DataError: for a set of volumes, or a name that is none.
    """
    if name in SETS_3D:
        raise DataError(f"{where} is a 3D set, its pictures are volumes", f"the 2D sets: {', '.join(SETS)}")
    if name not in SETS:
        raise DataError(
            f"{where} is none of MedMNIST's 2D sets.{did_you_mean(name, SETS)}",
            f"--set set=NAME says which of {', '.join(SETS)} it is",
        )
    return SETS[name]


def sentences(s: MedSet, shown: list[str]) -> tuple[str, ...]:
    """Template captions of a picture.

    Args:
        s: its set.
        shown: its classes, none for a multi-label picture without findings.

    Example:
        >>> sentences(SETS["pneumoniamnist"], ["pneumonia"])[0]
        'A pediatric chest X-ray showing pneumonia.'
        >>> sentences(SETS["chestmnist"], ["mass", "edema", "hernia"])[1]
        'A frontal chest X-ray: a mass, pulmonary edema and a hernia.'
    """
    phrases = [s.classes[c] for c in shown] or ["no labelled finding"]
    text = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    upper = lambda t: t[0].upper() + t[1:]
    words = {"view": s.view, "View": upper(s.view), "shown": text, "Shown": upper(text)}
    return tuple(template.format(**words) for template in _TEMPLATES)


def load(file: Path, split: str) -> tuple[UInt8[np.ndarray, "n ..."], np.ndarray]:
    """All pictures u8[n h w] or u8[n h w 3] of a split, and its labels as they are.

    Raises:
        DataError: for a file that cannot be read, lacks an array, or holds anything but such pictures.
    """
    try:
        with zipfile.ZipFile(file) as z:
            if sum(i.file_size for i in z.infolist() if i.filename.startswith(f"{split}_")) > _MAX_ARRAY:
                raise DataError(f"{file}: the arrays of {split} are larger than {_MAX_ARRAY} bytes")
        with np.load(file, allow_pickle=False) as z:
            lacks = [k for k in (f"{split}_images", f"{split}_labels") if k not in z]
            if lacks:
                raise DataError(f"{file} has no array {lacks[0]}", f"there are: {', '.join(z.files)}")
            pictures, labels = z[f"{split}_images"], z[f"{split}_labels"]
    except _ERRORS as e:
        raise _unreadable(file, e) from e
    _check_pictures(file, pictures.shape, pictures.dtype)
    return pictures, labels


# What zipfile, zlib and numpy raise for damaged files: encrypted members, unknown methods, headers that are no literal.
_ERRORS = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def _unreadable(file: Path, e: Exception) -> DataError:
    if isinstance(e, OSError) and e.strerror:
        return DataError(f"{file} cannot be read ({e.strerror})")
    return DataError(f"{file} cannot be read as .npz ({type(e).__name__})", "download it again")


def _check_pictures(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        if shape[1] * shape[2] > limits.MAX_IMAGE_PIXELS:
            raise DataError(
                f"{file}: pictures of {shape[1]} x {shape[2]} pixels", "no set of MedMNIST has such"
            )
        return
    raise DataError(f"{file}: pictures are {dtype}{list(shape)}", "uint8 [n, h, w] or [n, h, w, 3]")


def labels(file: Path, split: str, s: MedSet) -> Integer[np.ndarray, "n classes"]:
    """The labels of a split: one number a picture as [n 1], of a multi-label set [n classes] of 0 and 1.

    Raises:
        DataError: for a damaged file, or labels that do not fit the set.
    """
    with _member(file, f"{split}_labels") as (f, shape, dtype, _):
        n, count = shape[0] if shape else 0, math.prod(shape)
        if dtype.kind not in "iu" or count * dtype.itemsize > _MAX_ARRAY // 16:
            raise DataError(f"{file}: {split}_labels are {dtype}{list(shape)}", "one integer a picture")
        found = np.frombuffer(f.read(count * dtype.itemsize), dtype)
    columns = len(s.classes) if s.multilabel else 1
    if count != n * columns or len(found) != count:
        wanted = f"0 or 1 for each of the {columns} classes" if s.multilabel else "one integer a picture"
        raise DataError(f"{file}: {split}_labels are {dtype}{list(shape)}", wanted)
    highest = 1 if s.multilabel else len(s.classes) - 1
    bad = np.flatnonzero((found < 0) | (found > highest))
    if len(bad):
        raise DataError(
            f"{file}: {split} row {bad[0] // columns} has the label {found[bad[0]]}, the set has 0 to {highest}",
            "is the file the set that its name says?",
        )
    return found.reshape(n, columns)


def check_pictures(file: Path, split: str) -> tuple[tuple[int, ...], str]:
    """The shape of a split's pictures and the checksum of their array, once all of it was read and found to have it.

    Raises:
        DataError: for a damaged file, or anything but pictures.
    """
    with _member(file, f"{split}_images") as (f, shape, dtype, checksum):
        _check_pictures(file, shape, dtype)
        size = 0
        while piece := f.read(_PIECE):
            size += len(piece)
    if size != math.prod(shape):
        raise DataError(f"{file}: {split}_images has {size} bytes, its shape is {list(shape)}")
    return shape, checksum


class Pictures:
    """The pictures of a split one by one, without ever holding them all: cheap in ascending order.

    A compressed array is inflated up to the picture that is asked for; going back begins anew.

    Args:
        file: the `.npz`.
        split: train, val or test.

    Raises:
        DataError: for a file that cannot be read; indexing raises it, too, and EOFError beyond the end.
    """

    def __init__(self, file: Path, split: str):
        self._file = file
        self._context = _member(file, f"{split}_images")
        self._stream, shape, *_ = self._context.__enter__()
        self._shape = shape[1:]
        self._begin = self._stream.tell()

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "..."]:
        size = math.prod(self._shape)
        try:
            self._stream.seek(self._begin + index * size)
            data = self._stream.read(size)
        except _ERRORS as e:
            raise _unreadable(self._file, e) from e
        if len(data) != size:
            raise EOFError("the array ends before this picture")
        return np.frombuffer(data, np.uint8).reshape(self._shape)

    def close(self) -> None:
        """Closes the file."""
        self._context.__exit__(None, None, None)


@contextmanager
def _member(file: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, str]]:
    """An array inside the file: its bytes as a stream, its shape and type, and the checksum that the file promises.

    Raises:
        DataError: for a file that is no `.npz`, an array that is missing or no plain one.
    """
    try:
        with zipfile.ZipFile(file) as z:
            if f"{name}.npy" not in z.namelist():
                there = ", ".join(n.removesuffix(".npy") for n in z.namelist())
                raise DataError(f"{file} has no array {name}", f"there are: {there[:200]}")
            with z.open(f"{name}.npy") as f:
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                major, _ = np.lib.format.read_magic(f)
                if major not in read:
                    raise ValueError(f"version {major} of .npy")
                shape, columns_first, dtype = read[major](f)
                if dtype.hasobject:
                    raise DataError(f"{file}: {name} holds pickled objects, which are never read")
                if columns_first:
                    raise ValueError("columns first")
                yield f, shape, dtype, f"{z.getinfo(f'{name}.npy').CRC:08x}"
    except _ERRORS as e:
        raise _unreadable(file, e) from e
