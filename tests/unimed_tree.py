"""Raw trees of UniMed's 13 sources as their authors lay them out, with a few pictures and every known hazard.

Each builder makes the annotation file by hand, not through the package: annotations as published, pictures in the
folder that the original's scripts expect. `Tree.expected` says what must be stored for each key, `Tree.rejects` what
must not.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@dataclass
class Tree:
    """One source on the disk and what an export of it must hold."""

    name: str
    raw: Path
    captions: Path
    expected: dict[str, dict] = field(default_factory=dict)  # key below the source: fields of the example
    rejects: dict[str, str] = field(default_factory=dict)  # key: reason
    # Captions of each sample as the original's writer joins them: (picture, text); for the tars.
    joined: list[tuple[bytes, str]] = field(default_factory=list)

    def picture(self, path: str) -> bytes:
        file = self.raw / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(jpeg(len(path) * 1000 + sum(path.encode())))
        return file.read_bytes()

    def good(self, path: str, below: str, captions: list[tuple[str, str]], key: str = "", **more) -> None:
        image = self.picture(f"{below}/{path}")
        self.expected[f"{self.name}/{key or path}"] = {
            "captions": [c for c in captions if c[0]],
            "image": image,
            **more,
        }


def write_csv(path: Path, rows: list[list[str]], encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as f:
        csv.writer(f).writerows(rows)


def join(texts: list[str], marker: str) -> str:
    """As the original's writers do it: the outer periods off, one period and the marker on."""
    return "".join(t.strip(".") + "." + marker for t in texts)


def llm(*texts: str) -> list[tuple[str, str]]:
    return [(t, "llm") for t in texts]


def _listed(
    name: str, below: str, marker: str, paths: list[str], file: str, **fields
) -> Callable[[Path], Tree]:
    """RadImageNet, CheXpert, ChestX-ray8: path, labels and captions as Python lists in the first three columns."""

    def make(root: Path) -> Tree:
        tree = Tree(name, root / "raw", root / file)
        rows = [["", "labels", "captions"]]
        for i, path in enumerate(paths):
            texts = [f"Finding {i} seen, view {k}" for k in range(10)]
            texts[3] += "."  # some of the published ones end in a period
            texts[4] = f'It isn\'t "clear" {i}'
            rows.append([repr([path, "spare"]), repr([f"finding {i}", "Edema"]), repr(texts)])
            more = {k: v[i] if isinstance(v, list) else v for k, v in fields.items()}
            stored = [t.strip(".") + "." for t in texts]
            tree.good(path, below, llm(*stored), labels=(f"finding:finding {i}", "finding:Edema"), **more)
            tree.joined.append((tree.picture(f"{below}/{path}"), join(texts, marker)))
        first = rows[1]
        rows.append([first[0], repr(["Other"]), repr(["A second row of the same picture"])])
        more = {k: v[0] if isinstance(v, list) else v for k, v in fields.items()}
        tree.good(
            paths[0], below, llm("A second row of the same picture."), key=f"{paths[0]}#2",
            labels=("finding:Other",), **more,
        )  # fmt: skip
        tree.joined.append(
            (tree.picture(f"{below}/{paths[0]}"), join(["A second row of the same picture"], marker))
        )
        hazards = {
            repr([f"{paths[0]}.gone.jpg"]): ("missing", f"{paths[0]}.gone.jpg"),
            repr(["../../outside.jpg"]): ("annotation", f"unnamed, {file} line {len(rows) + 2}"),
            "__import__('os').system('touch executed')": (
                "annotation",
                f"unnamed, {file} line {len(rows) + 3}",
            ),
        }
        for cell, (reason, key) in hazards.items():
            rows.append([cell, repr(["x"]), repr(["A caption"])])
            tree.rejects[f"{name}/{key}"] = reason
        bad = paths[1]
        rows.append([repr([bad]), repr(["x"]), "['unfinished"])
        tree.rejects[f"{name}/{bad}#2"] = "annotation"
        rows.append([repr([bad]), repr(["x"]), "[]"])
        tree.rejects[f"{name}/{bad}#3"] = "caption_empty"
        write_csv(tree.captions, rows)
        (root / "outside.jpg").write_bytes(jpeg(1))
        return tree

    return make


def _mimic(root: Path) -> Tree:
    tree = Tree("mimic_cxr", root / "raw", root / "mimic_cxr_with_captions_and_reports_only_frontal_view.csv")
    rows = [["path", "labels", "captions", "report"]]
    reports = ["FINDINGS: Lungs are clear.\nIMPRESSION: Normal.", "", "nan"]
    for i, report in enumerate(reports):
        path = f"files/p10/p1000003{i}/s5041426{i}/0{i}aa.jpg"
        texts = [f"Chest film {i} number {k}" for k in range(10)]
        rows.append([repr([path]), repr(["No Finding"]), repr(texts), report])
        stored = llm(*(f"{t}." for t in texts)) + ([(report, "report")] if i == 0 else [])
        tree.good(
            path,
            "mimic-cxr-jpg",
            stored,
            labels=("finding:No Finding",),
            modality="X-ray",
            patient=f"p1000003{i}",
        )
        said = report if i == 0 else "noreportpresent"
        tree.joined.append(
            (tree.picture(f"mimic-cxr-jpg/{path}"), join(texts, "_mimiccxr_") + "_mimiccxr_" + said)
        )
    rows.append([repr(["files/p10/p10000039/s1/gone.jpg"]), "[]", repr(["A film"]), "A report"])
    tree.rejects["mimic_cxr/files/p10/p10000039/s1/gone.jpg"] = "missing"
    write_csv(tree.captions, rows)
    return tree


def _openi(root: Path) -> Tree:
    tree = Tree("openi", root / "raw", root / "notes")
    tree.captions.mkdir(parents=True)
    reports, rewrites = [], []
    for i in range(3):
        name = f"CXR{i}_1_IM-000{i}-3001"
        reports.append({"image_id": name, "caption": f" Heart size {i} normal. "})
        rewrites.append([f"The heart {i} is normal{k}" for k in "abc"])
        stored = [(f"Heart size {i} normal.", "original"), *llm(*(f"{t}." for t in rewrites[-1]))]
        tree.good(f"{name}.png", "openI/image", stored, modality="X-ray", patient=str(i))
        texts = [reports[-1]["caption"].strip(), *rewrites[-1]]
        tree.joined.append((tree.picture(f"openI/image/{name}.png"), join(texts, "_openi_")))
    reports.append({"image_id": None, "caption": "No picture"})
    rewrites.append([])
    tree.rejects["openi/unnamed, filter_cap.json entry 3"] = "annotation"
    (tree.captions / "filter_cap.json").write_text(json.dumps({"annotations": reports}))
    (tree.captions / "openai_refined_concepts.json").write_text(json.dumps({"refined_captions": rewrites}))
    return tree


def _free(
    name: str,
    below: str,
    file: str,
    write: Callable[[Path, list[tuple[str, str]]], None],
    ending: str = "",
    **fields,
) -> Callable[[Path], Tree]:
    """Sources of one free caption a picture."""

    def make(root: Path) -> Tree:
        tree = Tree(name, root / "raw", root / file)
        captions = {
            "a/one": "  Axial CT scan of the chest, grade_dr_3 lesion.  ",
            "two": "Ödem, „MRI“ of the head\nwith two lines",
            "three": "A._chexpert_B._chexpert_ stays one caption of its author.",
        }
        for stem, caption in captions.items():
            tree.good(f"{stem}.jpg", below, [(caption.strip(), "original")], **fields)
            tree.joined.append((tree.picture(f"{below}/{stem}.jpg"), caption.strip()))
        bad = {"gone": ("A picture that is not there", "missing"), "empty": ("nan", "caption_empty")}
        tree.picture(f"{below}/empty.jpg")
        for stem, (_, reason) in bad.items():
            tree.rejects[f"{name}/{stem}.jpg"] = reason
        write(tree.captions, [*captions.items(), *((s, c) for s, (c, _) in bad.items())])
        return tree

    return make


def _write_roco(path: Path, pairs) -> None:
    write_csv(path, [["ID", "Caption"], *[[stem, caption] for stem, caption in pairs]], "utf-8-sig")


def _write_lines(path: Path, pairs) -> None:
    path.write_text("".join(json.dumps({"image": f"{s}.jpg", "caption": c}) + "\n" for s, c in pairs))


def _write_conversations(path: Path, pairs) -> None:
    turns = [
        {"image": f"{s}.jpg", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": c}]}
        for s, c in pairs
    ]
    path.write_text(json.dumps(turns))


def _write_quilt(path: Path, pairs) -> None:
    write_csv(
        path, [["", "caption", "image_path", "subset"], *[["0", c, f"{s}.jpg", "quilt"] for s, c in pairs]]
    )


def _write_mm(path: Path, pairs) -> None:
    write_csv(path, [["", "image", "atributes", "caption"], *[["0", f"{s}.jpg", "[]", c] for s, c in pairs]])


def _figures(root: Path) -> Tree:
    tree = Tree("llava_med_hq_60k_set", root / "raw", root / "llava_med_instruct_fig_captions.json")
    entries = [
        {
            "pair_id": "1_f1",
            "fig_caption": "Chest radiograph.",
            "in_text_mention": [{"tokens": "See Fig. 1."}, {}],
        },
        {"pair_id": "2_f1", "fig_caption": float("nan"), "in_text_mention": [{"tokens": "An MRI shows it."}]},
        {"pair_id": "3_f1", "fig_caption": "A plot.", "in_text_mention": None},
        {"pair_id": "4_f1", "fig_caption": "Gone.", "in_text_mention": []},
        {"fig_caption": "No name"},
    ]
    tree.captions.write_text(json.dumps({"train": entries[:2], "rest": entries[2:]}))
    one = lambda text: [(text, "original")]
    tree.good("1_f1.jpg", "images", one("Chest radiograph."), key="1_f1.jpg:caption", modality="X-ray")
    tree.good("3_f1.jpg", "images", one("A plot."), key="3_f1.jpg:caption", modality="")
    tree.good("1_f1.jpg", "images", one("See Fig. 1."), key="1_f1.jpg:mention", modality="")
    tree.good("2_f1.jpg", "images", one("An MRI shows it."), key="2_f1.jpg:mention", modality="MRI")
    tree.rejects["llava_med_hq_60k_set/4_f1.jpg:caption"] = "missing"
    tree.rejects["llava_med_hq_60k_set/unnamed, llava_med_instruct_fig_captions.json rest entry 2"] = (
        "annotation"
    )
    for key in ("1_f1.jpg:caption", "3_f1.jpg:caption", "1_f1.jpg:mention", "2_f1.jpg:mention"):
        entry = tree.expected[f"llava_med_hq_60k_set/{key}"]
        tree.joined.append((entry["image"], entry["captions"][0][0]))
    return tree


def _retina1(root: Path) -> Tree:
    tree = Tree("retina_part1", root / "raw", root / "csvs")
    tree.captions.mkdir(parents=True)
    header = ["", "filename", "captions", "sentence_level_captions"]
    for table in ("03_IDRiD", "05_1000x39"):
        rows = [header]
        for i in range(2):
            path, texts = f"{table}/{i}.jpg", [f"A fundus photograph {i} {k}" for k in range(10)]
            rows.append(["0", path, repr(texts), f"fundus of grade {i}"])
            stored = [*llm(*(f"{t}." for t in texts)), (f"fundus of grade {i}.", "template")]
            tree.good(path, "Retina-Datasets", stored, modality="Fundus")
            whole = [*texts, f"fundus of grade {i}"]
            tree.joined.append((tree.picture(f"Retina-Datasets/{path}"), join(whole, "_all_retina_merged_")))
        write_csv(tree.captions / f"{table}.csv", rows)
    for table in (
        "06_DEN",
        "39_MM_Retinal_dataset",
        "28_OIA-DDR_revised",
        "07_LAG_revised",
        "01_EYEPACS_revised",
    ):
        write_csv(tree.captions / f"{table}.csv", [header, ["0", "never.jpg", "['x']", "never read"]])
    return tree


def _retina2(root: Path) -> Tree:
    tree = Tree("retina_part2", root / "raw", root / "06_DEN.csv")
    rows = [["", "image", "atributes", "categories"]]
    for path, categories, caption in (
        ("06_DEN/1.jpg", ["52-year-old woman", "drusen", "H35.3//x"], "fundus image of drusen"),
        ("06_DEN/2.jpg", ["macular hole", "vitreous traction"], "fundus image of vitreous traction"),
        ("06_DEN/3.jpg", ["61-year-old man"], "fundus image of 61-year-old man"),
    ):
        rows.append(["0", path, "[]", repr(categories)])
        tree.good(path, "Retina-Datasets", [(caption, "template")], modality="Fundus")
        tree.joined.append((tree.picture(f"Retina-Datasets/{path}"), caption))
    rows += [["0", "06_DEN/none.jpg", "[]", "[]"], ["0", "06_DEN/gone.jpg", "[]", "['drusen']"]]
    tree.picture("Retina-Datasets/06_DEN/none.jpg")
    tree.rejects |= {
        "retina_part2/06_DEN/none.jpg": "caption_empty",
        "retina_part2/06_DEN/gone.jpg": "missing",
    }
    write_csv(tree.captions, rows)
    return tree


BUILDERS: dict[str, Callable[[Path], Tree]] = {
    "radimagenet": _listed(
        "radimagenet", "radimagenet", "_radimagenet_",
        ["radiology_ai/CT/lung/a 1.jpg", "radiology_ai/MR/knee/b.jpg", "radiology_ai/US/kidney/c.jpg"],
        "radimagenet_with_captions_training_set.csv", modality=["CT", "MRI", "Ultrasound"],
    ),
    "chexpert": _listed(
        "chexpert", "CheXpert-v1.0-small", "_chexpert_",
        [f"train/patient0000{i}/study1/view1_frontal.jpg" for i in range(3)],
        "chexpert_with_captions_only_frontal_view.csv", modality="X-ray",
        patient=[f"patient0000{i}" for i in range(3)],
    ),
    "mimic_cxr": _mimic,
    "openi": _openi,
    "chest_xray8": _listed(
        "chest_xray8", "chest_xray8/images", "_chestxray8_", [f"0000000{i}_000.png" for i in range(3)],
        "Chest-Xray8_with_captions.csv", modality="X-ray", patient=[f"0000000{i}" for i in range(3)],
    ),
    "roco": _free("roco", "ROCOV2/train", "train_captions.csv", _write_roco),
    "pmc_clip": _free(
        "pmc_clip", "caption_T060_filtered_top4_sep_v0_subfigures", "pmc_oa.jsonl", _write_lines
    ),
    "llava_med_alignment_set": _free(
        "llava_med_alignment_set", "llava_med/images", "llava_med_alignment_500k_filtered.json",
        _write_conversations,
    ),
    "llava_med_hq_60k_set": _figures,
    "quilt": _free("quilt", "Quilt/quilt_1m", "quilt_1M_lookup.csv", _write_quilt, modality="Histopathology"),
    "retina_part1": _retina1,
    "retina_part2": _retina2,
    "retina_part3": _free("retina_part3", "Retina-Datasets", "39_MM_Retinal_dataset.csv", _write_mm, modality="Fundus"),
}  # fmt: skip


def write_tars(tree: Tree, folder: Path, per_tar: int = 2) -> None:
    """The tars that the original's script makes of a tree: members 000001.jpg and 000001.txt, bytes unchanged."""
    folder.mkdir(parents=True)
    for first in range(0, len(tree.joined), per_tar):
        with tarfile.open(folder / f"dataset-{first // per_tar + 1:06d}.tar", "w") as tar:
            for number, (image, text) in enumerate(tree.joined[first : first + per_tar], first + 1):
                for name, data in ((f"{number:06d}.jpg", image), (f"{number:06d}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
