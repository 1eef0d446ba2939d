"""A small tree of folders with every layout of the 21 sets (and those beside them), tiny random pictures inside."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PER_CLASS = 3
ORGANS = 11
SKIN = [
    *("nontumor_skin_necrosis_necrosis", "nontumor_skin_muscle_skeletal"),
    *("nontumor_skin_sweatglands_sweatglands", "nontumor_skin_vessel_vessel"),
    *("nontumor_skin_elastosis_elastosis", "nontumor_skin_chondraltissue_chondraltissue"),
    *("nontumor_skin_hairfollicle_hairfollicle", "nontumor_skin_epidermis_epidermis"),
    *("nontumor_skin_nerves_nerves", "nontumor_skin_subcutis_subcutis", "nontumor_skin_dermis_dermis"),
    "nontumor_skin_sebaceousglands_sebaceousglands",
]
TUMORS = [
    *("tumor_skin_epithelial_sqcc", "tumor_skin_melanoma_melanoma"),
    *("tumor_skin_epithelial_bcc", "tumor_skin_naevus_naevus"),
]
FINDINGS = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


class Tree:
    """Writes pictures, each different from all others, and lists."""

    def __init__(self, root: Path):
        self.root = root
        self._rng = np.random.default_rng(0)

    def picture(self, name: str, mode: str = "RGB") -> str:
        """A random picture below the root; its suffix decides the format."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = self._rng.integers(20, 40, 2)
        image = Image.fromarray(self._rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.convert(mode).save(path)
        return name

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A CSV below the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])


def make(root: Path) -> Path:
    """All sets; `root` is the --data-root, with the original's own lists in `root`/local_data."""
    tree = Tree(root)
    for part in (_xray, _downstream, _medimeta, _retina, _pathology, _beside):
        part(tree)
    return root


def _xray(t: Tree) -> None:
    rows = []
    for i in range(len(FINDINGS) * PER_CLASS):
        k = i % len(FINDINGS)
        name = f"CheXpert-v1.0-small/train/patient{i // 2:05}/study1/view{i}_frontal.jpg"
        t.picture(f"chexpert/{name}", "L")
        rows.append([i, name, *(int(k == j) for j in range(len(FINDINGS)))])
    t.table("local_data/chexpert-5x200.csv", ["", "imgpath", *FINDINGS], rows)
    rows = [[i, t.picture(f"rsna_custom_test_set/images/{i}.png", "P"), i % 2] for i in range(2 * PER_CLASS)]
    rows = [[i, name.removeprefix("rsna_custom_test_set/"), k] for i, name, k in rows]
    t.table("rsna_custom_test_set/RSNA_pneumonia_balanced_testfile.csv", ["", "path", "label"], rows)


def _downstream(t: Tree) -> None:
    """RadImageNet's: path and a word."""
    sets = {
        "acl_mri": ("test_fold1.csv", ("no", "yes")),
        "meniscal_mri": ("meniscus_test_fold1.csv", ("n", "p")),
        "breast_us": ("breast_test_fold1.csv", ("benign", "malignant")),
        "thyroid_us": ("thyroid_test_fold1.csv", ("benign", "malignant")),
    }
    for folder, (file, words) in sets.items():
        rows = []
        for i in range(2 * PER_CLASS):
            t.picture(f"{folder}/scans/{i}.png", "L")
            rows.append([f"scans/{i}.png", words[i % 2]])
        t.table(f"{folder}/{file}", ["img_dir", "label"], rows)


def _medimeta(t: Tree) -> None:
    """Integer labels; rows of other splits must not be read, so their pictures do not exist."""
    classes = {"organs_axial": ORGANS, "organs_coronal": ORGANS, "organs_sagittal": ORGANS}
    for folder, n in (classes | {"dr_regular": 5, "dr_uwf": 5}).items():
        rows = []
        for i in range(n * PER_CLASS):
            t.picture(f"{folder}/images/{i:06}.tiff", "L")
            rows.append([f"images/{i:06}.tiff", "original", i % n, "test"])
        rows += [["images/none.tiff", "original", 0, "train"], ["images/none.tiff", "original", 99, "val"]]
        t.table(f"{folder}/annotations.csv", ["file_path", "origin", "label", "split"], rows)


def _retina(t: Tree) -> None:
    sets = {
        "25_REFUGE": ("no glaucoma", "glaucoma"),
        "13_FIVES": ("age related macular degeneration", "diabetic retinopathy", "glaucoma", "normal"),
        "08_ODIR200x3": ("normal", "pathologic myopia", "cataract"),
    }
    for name, words in sets.items():
        rows = []
        for i in range(len(words) * PER_CLASS):
            path = t.picture(f"{name}/{'test' if i % 2 else 'train'}/{i}.jpg")
            rows.append([i, path, "{}", str([words[i % len(words)]])])
        if name == "08_ODIR200x3":
            rows.append(rows[1])  # a repeated row of pathologic myopia
        t.table(f"local_data/{name}.csv", ["", "image", "attributes", "categories"], rows)


def _pathology(t: Tree) -> None:
    for folder in ("lung_aca", "lung_n", "lung_scc", "colon_aca", "colon_n"):
        for i in range(PER_CLASS):
            t.picture(f"LC25000_test/{folder}/{folder}{i}.jpeg")
    for i in range(2 * PER_CLASS):
        t.picture(f"PCam_Test_preprocessed/img{i}_{i % 2}.png")
    for folder in ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"):
        for i in range(PER_CLASS):
            t.picture(f"CRC-VAL-HE-7K/{folder}/{folder}-{i}.tif")
    rows = []
    for i in range(4 * PER_CLASS):
        label = ("Benign", "InSitu", "Invasive", "Normal")[i % 4]
        t.picture(f"BACH/{label}/x{i:03}.tif")
        rows.append([f"x{i:03}.tif", label])
    t.table("BACH/microscopy_ground_truth.csv", ["file", "label"], rows)
    rows = []
    for i in range(3 * PER_CLASS):
        t.picture(f"Osteosarcoma/set{i % 2}/Case-{i}.jpg")
        rows.append([f"set{i % 2}/Case-{i}.jpg", ("Non-Tumor", "Non-Viable-Tumor", "Viable")[i % 3]])
    t.table("Osteosarcoma/annotations_final.csv", ["path", "label"], rows)
    rows = []
    for i in range(16 * PER_CLASS):
        label = [*SKIN, *TUMORS][i % 16]
        t.picture(f"skin_tumor/data/tiles/{i}.jpg")
        rows.append([i, f"data/tiles/{i}.jpg", label, "Test"])
    rows.append([99, "data/tiles/none.jpg", SKIN[0], "Train"])
    header = ["", "file", "class", "set"]
    t.table("skin_tumor/data/tiles-v2.csv", header, rows)
    t.table("skin_tumor/data/SkinTumorSubset.csv", header, [r for r in rows if r[2] in TUMORS])


def _beside(t: Tree) -> None:
    """SICAPv2 and RadImageNet, which are not in the average."""
    grades = ["NC", "G3", "G4", "G5"]
    rows = []
    for i in range(4 * PER_CLASS):
        t.picture(f"SICAPv2/images/slide{i // 2}_block_{i}.jpg")
        rows.append([f"slide{i // 2}_block_{i}.jpg", *(int(i % 4 == k) for k in range(4)), 0])
    t.table("SICAPv2/partition/Test/Test.csv", ["image_name", *grades, "G4C"], rows)
    rows = []
    for i in range(20):
        path = t.picture(f"radiology/{i}.png", "L")
        rows.append([str([path]), i * 8])
    t.table("radimagenet_test_set_formatted.csv", ["path", "label"], rows)
