"""The 13 sources of UniMed, from the annotation files that its authors published and each data set's own folders.

Every source is one row of `LAYOUTS`: which files hold its annotations and how they are read, where its pictures lie,
and how captions, labels, modality and patient follow from a row. What the original's scripts drop (labels, paths) is
kept; what they abort on (a missing picture, a cell that is no list) is rejected and listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unimed_jax.data.record import Caption, Example, hash_patient
from unimed_jax.data.sources import annotation_files, pictures, unimed_rows
from unimed_jax.data.sources.annotation_files import Row
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError

Captions = Callable[[Sequence[str], str], list[Caption]]


@dataclass(slots=True, frozen=True, kw_only=True)
class Layout:
    """How one source lies on the disk.

    Attributes:
        annotations: names of its files, in the order in which `rows` takes them; empty: every CSV of a folder.
        rows: reads them.
        pictures: folder of the pictures below --raw, as the original's scripts expect it.
        captions: a row's cells and its key to captions.
        labels: number of the cell that lists labels, -1 for none.
        modality: of all pictures, or a function of (path, first caption).
        patient: regex whose first group identifies the patient in a path.
        licence: a note; the data set's own terms count.
        about: for the data card and the help.
    """

    annotations: tuple[str, ...]
    rows: Callable[[Sequence[Path]], Iterator[Row]]
    pictures: str
    captions: Captions
    labels: int = -1
    modality: str | Callable[[str, str], str] = ""
    patient: str = ""
    licence: str
    about: str

    def modality_of(self, path: str, captions: Sequence[Caption]) -> str:
        """The modality of a picture, empty for unknown."""
        if isinstance(self.modality, str):
            return self.modality
        return self.modality(path, captions[0].text if captions else "")


@dataclass(slots=True, frozen=True, kw_only=True)
class Item:
    """One row that becomes a record."""

    key: str
    row: Row
    patient: str = ""  # hashed
    split: str = "train"

    @property
    def where(self) -> str:
        """The row's place in its file."""
        return self.row.where


@dataclass(slots=True, frozen=True, kw_only=True)
class Unimed:
    """One of UniMed's sources as a record source.

    Args:
        name: of the source, a key of LAYOUTS.
        raw: folder of the raw data: of the pictures, or the one that holds the original's folder of them.
        captions: the annotation file, or the folder with it.
        salt: secret that goes into the hashes of patients.
        hide_names: store hashes of paths instead of the paths.
    """

    name: str
    raw: Path = field(repr=False)
    captions: Path = field(repr=False)
    salt: str = field(default="", repr=False)
    hide_names: bool = False

    @property
    def licence(self) -> str:
        """A note on the data set's terms."""
        return LAYOUTS[self.name].licence

    @property
    def description(self) -> str:
        """What the source is."""
        return LAYOUTS[self.name].about

    def items(self) -> Sequence[Item]:
        """Every row of the annotation files; a picture's second row has "#2" in its key, and so on.

        Raises:
            DataError: for a missing folder or file, or a file of another format.
        """
        if not self._pictures().is_dir():
            raise DataError(f"no folder {self._pictures()}", "--raw names the folder of the raw data")
        layout, salt = LAYOUTS[self.name], self.salt or self.name
        times: Counter[str] = Counter()
        used: set[str] = set()
        found = []
        for row in layout.rows(self._files()):
            name = f"unnamed, {row.where}" if annotation_files.path_fault(row.path) else row.path
            name = hash_patient(name, salt) if self.hide_names else name
            key = name = f"{name}:{row.suffix}" if row.suffix else name
            while key in used:
                times[name] += 1
                key = f"{name}#{times[name] + 1}"
            used.add(key)
            patient = re.search(layout.patient, row.path) if layout.patient else None
            found.append(Item(key=key, row=row, patient=hash_patient(patient[1], salt) if patient else ""))
        return found

    def example(self, item: Item) -> Example:
        """Reads one picture; its bytes are stored as they are.

        Raises:
            Reject: for a row that cannot be used, or a picture that is too large.
            OSError: for a missing picture.
        """
        layout, row = LAYOUTS[self.name], item.row
        if fault := row.fault or annotation_files.path_fault(row.path):
            raise Reject("annotation", f"{row.where}: {fault if row.fault else f'path: {fault}'}")
        captions = layout.captions(row.cells, item.key)
        labels = annotation_files.texts(row.cells[layout.labels], "labels") if layout.labels >= 0 else []
        path = self._pictures() / row.path
        pictures.check(path)
        return Example(
            key=item.key,
            image=path.read_bytes(),
            captions=tuple(captions),
            labels=tuple(f"finding:{words}" for x in labels if (words := " ".join(x.split()))),
            modality=layout.modality_of(row.path, captions),
            patient=item.patient,
            split=item.split,
        )

    def _pictures(self) -> Path:
        below = Path(self.raw) / LAYOUTS[self.name].pictures
        return below if below.is_dir() else Path(self.raw)

    def _files(self) -> list[Path]:
        """The annotation files, whether their folder or the only one of them was named."""
        given, names = Path(self.captions), LAYOUTS[self.name].annotations
        if given.is_dir():
            return [given / n for n in names] or [given]
        if not given.exists():
            raise DataError(
                f"no annotation file {given}", f"--captions names {' and '.join(names) or 'a folder'}"
            )
        if len(names) == 1:
            return [given]
        raise UsageError(
            f"source {self.name} has {'several annotation files' if names else 'a folder of annotation files'}",
            f"--captions FOLDER{f' with {chr(44).join(names)}' if names else ''}",
        )


LAYOUTS: dict[str, Layout] = {
    "radimagenet": Layout(
        annotations=("radimagenet_with_captions_training_set.csv",),
        rows=unimed_rows.literal_paths(1, 2),
        pictures="radimagenet",
        captions=unimed_rows.listed,
        labels=0,
        modality=unimed_rows.by_folder,
        licence="on request from RadImageNet, research use",
        about="RadImageNet: CT, MRI and ultrasound slices; captions of their class by a language model",
    ),
    "chexpert": Layout(
        annotations=("chexpert_with_captions_only_frontal_view.csv",),
        rows=unimed_rows.literal_paths(1, 2),
        pictures="CheXpert-v1.0-small",
        captions=unimed_rows.listed,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(patient\d+)(?:/|$)",
        licence="Stanford University's research use agreement",
        about="CheXpert: frontal chest X-rays; captions of their labels by a language model",
    ),
    "mimic_cxr": Layout(
        annotations=("mimic_cxr_with_captions_and_reports_only_frontal_view.csv",),
        rows=unimed_rows.literal_paths(1, 2, 3),
        pictures="mimic-cxr-jpg",
        captions=unimed_rows.with_report,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(p\d{8})(?:/|$)",
        licence="PhysioNet credentialed health data licence",
        about="MIMIC-CXR-JPG: frontal chest X-rays; their reports, and captions of their labels by a language model",
    ),
    "openi": Layout(
        annotations=("filter_cap.json", "openai_refined_concepts.json"),
        rows=unimed_rows.openi,
        pictures="openI/image",
        captions=unimed_rows.original_first,
        modality="X-ray",
        patient=r"^(?:CXR)?(\d+)_",
        licence="National Library of Medicine, public",
        about="Open-i: chest X-rays; their reports, and three rewrites of each by a language model",
    ),
    "chest_xray8": Layout(
        annotations=("Chest-Xray8_with_captions.csv",),
        rows=unimed_rows.literal_paths(1, 2),
        pictures="chest_xray8/images",
        captions=unimed_rows.listed,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(\d{8})_\d+",
        licence="NIH Clinical Center, open",
        about="ChestX-ray8: chest X-rays; captions of their labels by a language model",
    ),
    "roco": Layout(
        annotations=("train_captions.csv",),
        rows=unimed_rows.plain(0, 1, ".jpg"),
        pictures="ROCOV2/train",
        captions=unimed_rows.one,
        modality=unimed_rows.by_caption,
        licence="Creative Commons, by article; some non-commercial",
        about="ROCOv2: radiology figures of open-access articles with their captions",
    ),
    "pmc_clip": Layout(
        annotations=("pmc_oa.jsonl",),
        rows=unimed_rows.lines,
        pictures="caption_T060_filtered_top4_sep_v0_subfigures",
        captions=unimed_rows.one,
        modality=unimed_rows.by_caption,
        licence="Creative Commons, by article",
        about="PMC-OA: subfigures of open-access articles with their captions",
    ),
    "llava_med_alignment_set": Layout(
        annotations=("llava_med_alignment_500k_filtered.json",),
        rows=unimed_rows.conversations,
        pictures="llava_med/images",
        captions=unimed_rows.one,
        modality=unimed_rows.by_caption,
        licence="CC BY-NC 4.0",
        about="LLaVA-Med alignment: figures of open-access articles with their captions",
    ),
    "llava_med_hq_60k_set": Layout(
        annotations=("llava_med_instruct_fig_captions.json",),
        rows=unimed_rows.figures,
        pictures="images",
        captions=unimed_rows.one,
        modality=unimed_rows.by_caption,
        licence="CC BY-NC 4.0",
        about="LLaVA-Med instruct: figures with their captions, and again with the sentences that mention them",
    ),
    "quilt": Layout(
        annotations=("quilt_1M_lookup.csv",),
        rows=unimed_rows.plain(2, 1),
        pictures="Quilt/quilt_1m",
        captions=unimed_rows.one,
        modality="Histopathology",
        licence="gated, research use",
        about="Quilt-1M: histopathology frames of teaching videos and others with what is said about them",
    ),
    "retina_part1": Layout(
        annotations=(),
        rows=unimed_rows.retina_folder,
        pictures="Retina-Datasets",
        captions=unimed_rows.with_template,
        modality="Fundus",
        licence="each data set's own",
        about="Retina part 1: fundus photographs of many public sets; captions of their labels by a language model",
    ),
    "retina_part2": Layout(
        annotations=("06_DEN.csv",),
        rows=unimed_rows.plain("image", "categories"),
        pictures="Retina-Datasets",
        captions=unimed_rows.category,
        modality="Fundus",
        licence="public repository",
        about="Retina part 2: DeepEyeNet's fundus photographs; captions made of their keywords",
    ),
    "retina_part3": Layout(
        annotations=("39_MM_Retinal_dataset.csv",),
        rows=unimed_rows.plain("image", "caption"),
        pictures="Retina-Datasets",
        captions=unimed_rows.one,
        modality="Fundus",
        licence="research use",
        about="Retina part 3: MM-Retinal's fundus photographs with the captions of their books",
    ),
}
