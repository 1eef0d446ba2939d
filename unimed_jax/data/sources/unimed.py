"""The 13 sources of UniMed, from the annotation files that its authors published and each data set's own folders.

Every source is one row of `LAYOUTS`: which files hold its annotations and how they are read, where its pictures lie,
and how captions, labels, modality and patient follow from a row. What the original's scripts drop (labels, paths) is
kept; what they abort on (a missing picture, a cell that is no list) is rejected and listed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax.data import limits
from unimed_jax.data.record import Caption, Example, hash_patient
from unimed_jax.data.sources import annotation_files, modality
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


@dataclass(slots=True, frozen=True, kw_only=True)
class Item:
    """One row that becomes a record."""

    key: str
    row: Row
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
        seen: Counter[str] = Counter()
        found = []
        for row in LAYOUTS[self.name].rows(self._files()):
            key = f"unnamed, {row.where}" if annotation_files.path_fault(row.path) else row.path
            key = hash_patient(key, self.salt or self.name) if self.hide_names else key
            key = f"{key}:{row.suffix}" if row.suffix else key
            seen[key] += 1
            found.append(Item(key=key if seen[key] == 1 else f"{key}#{seen[key]}", row=row))
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
        if path.stat().st_size > limits.MAX_FILE_BYTES:
            raise Reject("too_large", f"the file has more than {limits.MAX_FILE_BYTES} bytes")
        kind = layout.modality
        patient = re.search(layout.patient, row.path) if layout.patient else None
        return Example(
            key=item.key,
            image=path.read_bytes(),
            captions=tuple(captions),
            labels=tuple(f"finding:{x.strip()}" for x in labels if x.strip()),
            modality=kind if isinstance(kind, str) else kind(row.path, captions[0].text if captions else ""),
            patient=hash_patient(patient[1], self.salt or self.name) if patient else "",
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


# -- rows -------------------------------------------------------------------------------------------------------------


def _literal_paths(*columns: int) -> Callable[[Sequence[Path]], Iterator[Row]]:
    """CSV by position: column 0 spells a list whose first item is the path; the others are kept for later."""

    def rows(paths: Sequence[Path]) -> Iterator[Row]:
        for where, cells in annotation_files.csv_rows(paths[0], (0, *columns)):
            if cells is None:
                yield Row("", fault="it has too few columns", where=where)
                continue
            try:
                path = annotation_files.texts(cells[0], "the path")[0]
            except (Reject, IndexError) as e:
                yield Row("", fault=getattr(e, "detail", "") or "it names no picture", where=where)
            else:
                yield Row(path, tuple(cells[1:]), where=where)

    return rows


def _plain(
    path: int | str, caption: int | str, suffix: str = ""
) -> Callable[[Sequence[Path]], Iterator[Row]]:
    """CSV with one path and one caption a row."""

    def rows(paths: Sequence[Path]) -> Iterator[Row]:
        for where, cells in annotation_files.csv_rows(paths[0], (path, caption)):
            if cells is None:
                yield Row("", fault="it has too few columns", where=where)
            else:
                yield Row(cells[0] + suffix if cells[0] else "", (cells[1],), where=where)

    return rows


def _openi(paths: Sequence[Path]) -> Iterator[Row]:
    """Reports and their rewrites, which two files list in the same order."""
    reports = _list_of(annotation_files.read_json(paths[0]), "annotations", paths[0])
    rewrites = _list_of(annotation_files.read_json(paths[1]), "refined_captions", paths[1])
    if len(reports) != len(rewrites):
        raise DataError(
            f"{paths[0]} has {len(reports)} entries and {paths[1]} {len(rewrites)}: they belong together by position",
            "download both again",
        )
    for i, (report, rewritten) in enumerate(zip(reports, rewrites, strict=True)):
        where = f"{paths[0].name} entry {i}"
        name, caption = (report.get(k) if isinstance(report, dict) else None for k in ("image_id", "caption"))
        if not isinstance(name, str) or not isinstance(caption, str) or not isinstance(rewritten, list):
            yield Row("", fault="it has no image_id, caption or list of rewrites", where=where)
        else:
            yield Row(f"{name}.png", (caption, *map(str, rewritten)), where=where)


def _list_of(value: Any, name: str, file: Path) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{file} has no list {name!r}", "give the annotation file as it was published")
    return found


def _lines(paths: Sequence[Path]) -> Iterator[Row]:
    """JSON lines of {image, caption}."""
    for where, value in annotation_files.json_lines(paths[0]):
        yield _pair(value, "image", "caption", where)


def _pair(value: Any, name: str, text: str, where: str) -> Row:
    path, caption = (value.get(k) if isinstance(value, dict) else None for k in (name, text))
    if not isinstance(path, str) or not isinstance(caption, str):
        return Row("", fault=f"it has no {name} or {text}", where=where)
    return Row(path, (caption,), where=where)


def _conversations(paths: Sequence[Path]) -> Iterator[Row]:
    """A list of {image, conversations}; the caption is what the second turn says."""
    value = annotation_files.read_json(paths[0])
    if not isinstance(value, list):
        raise DataError(f"{paths[0]} holds no list", "give the annotation file as it was published")
    for i, entry in enumerate(value):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        said = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
        caption = said.get("value") if isinstance(said, dict) else None
        path = entry.get("image") if isinstance(entry, dict) else None
        yield _pair({"image": path, "caption": caption}, "image", "caption", f"{paths[0].name} entry {i}")


def _figures(paths: Sequence[Path]) -> Iterator[Row]:
    """Lists of {pair_id, fig_caption, in_text_mention}: first all captions, then all sentences that mention a figure.

    What is null was never there, and is no row.
    """
    value = annotation_files.read_json(paths[0])
    if not isinstance(value, dict):
        raise DataError(f"{paths[0]} holds no table of lists", "give the annotation file as it was published")
    entries = [
        (f"{paths[0].name} {name} entry {i}", entry)
        for name, part in value.items()
        for i, entry in enumerate(part if isinstance(part, list) else [part])
    ]
    for kind, text in (("caption", _figure_caption), ("mention", _mention)):
        for where, entry in entries:
            name = entry.get("pair_id") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                if kind == "caption":
                    yield Row("", fault="it has no pair_id", where=where)
            elif (words := text(entry)) is not None:
                yield Row(f"{name}.jpg", (words,), suffix=kind, where=where)


def _figure_caption(entry: dict[str, Any]) -> str | None:
    found = entry.get("fig_caption")
    return found if isinstance(found, str) else None  # JSON's NaN is a number


def _mention(entry: dict[str, Any]) -> str | None:
    found = entry.get("in_text_mention")
    first = found[0] if isinstance(found, list) and found else None
    tokens = first.get("tokens") if isinstance(first, dict) else None
    return tokens if isinstance(tokens, str) else None


# The original reads every CSV of its folder but these, which are sources of their own or were left out.
_NOT_PART_1 = (
    "06_DEN",
    "39_MM_Retinal_dataset",
    "28_OIA-DDR_revised",
    "07_LAG_revised",
    "01_EYEPACS_revised",
)


def _retina_folder(paths: Sequence[Path]) -> Iterator[Row]:
    tables = sorted(p for p in paths[0].glob("*.csv") if p.stem not in _NOT_PART_1)
    if not tables:
        raise DataError(f"{paths[0]} has no CSV of retina part 1", "--captions names the folder of the CSVs")
    for file in tables:
        columns = ("filename", "captions", "sentence_level_captions")
        for where, cells in annotation_files.csv_rows(file, columns):
            if cells is None:
                yield Row("", fault="it has too few columns", where=where)
            else:
                yield Row(cells[0], tuple(cells[1:]), where=where)


# -- captions ---------------------------------------------------------------------------------------------------------


def _sentences(texts: Iterable[str], kind: str) -> list[Caption]:
    """Captions with one final period each, as the original's tars have them."""
    return [Caption(text=f"{words}.", kind=kind) for t in texts if (words := t.strip().strip(". "))]


def _listed(cells: Sequence[str], _: str) -> list[Caption]:
    """Labels in the first cell, captions of their class in the second."""
    return _sentences(annotation_files.texts(cells[1], "captions"), "llm")


def _with_report(cells: Sequence[str], key: str) -> list[Caption]:
    return [*_listed(cells, key), Caption(text=cells[2].strip(), kind="report")]


def _one(cells: Sequence[str], _: str) -> list[Caption]:
    return [Caption(text=cells[0].strip())]


def _original_first(cells: Sequence[str], _: str) -> list[Caption]:
    return _sentences(cells[:1], "original") + _sentences(cells[1:], "llm")


def _with_template(cells: Sequence[str], _: str) -> list[Caption]:
    return _sentences(annotation_files.texts(cells[0], "captions"), "llm") + _sentences(
        cells[1:2], "template"
    )


def _category(cells: Sequence[str], key: str) -> list[Caption]:
    """The last category that is neither an age nor a code; else one of them, chosen by the key instead of by chance."""
    found = [c.strip() for c in annotation_files.texts(cells[0], "categories") if c.strip()]
    if not found:
        raise Reject("caption_empty", "no category")
    said = [c for c in found if "year" not in c and "//" not in c]
    drawn = found[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(found)]
    return [Caption(text=f"fundus image of {said[-1] if said else drawn}", kind="template")]


# -- modality ---------------------------------------------------------------------------------------------------------

_RADIMAGENET = {"CT": "CT", "MR": "MRI", "MRI": "MRI", "US": "Ultrasound"}


def _by_folder(path: str, _: str) -> str:
    """RadImageNet's folders say it: radiology_ai/MR/..."""
    return next((_RADIMAGENET[p] for p in path.split("/") if p in _RADIMAGENET), "")


def _by_caption(_: str, caption: str) -> str:
    return modality.named(caption)


LAYOUTS: dict[str, Layout] = {
    "radimagenet": Layout(
        annotations=("radimagenet_with_captions_training_set.csv",),
        rows=_literal_paths(1, 2),
        pictures="radimagenet",
        captions=_listed,
        labels=0,
        modality=_by_folder,
        licence="on request from RadImageNet, research use",
        about="RadImageNet: CT, MRI and ultrasound slices; captions of their class by a language model",
    ),
    "chexpert": Layout(
        annotations=("chexpert_with_captions_only_frontal_view.csv",),
        rows=_literal_paths(1, 2),
        pictures="CheXpert-v1.0-small",
        captions=_listed,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(patient\d+)(?:/|$)",
        licence="Stanford University's research use agreement",
        about="CheXpert: frontal chest X-rays; captions of their labels by a language model",
    ),
    "mimic_cxr": Layout(
        annotations=("mimic_cxr_with_captions_and_reports_only_frontal_view.csv",),
        rows=_literal_paths(1, 2, 3),
        pictures="mimic-cxr-jpg",
        captions=_with_report,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(p\d{8})(?:/|$)",
        licence="PhysioNet credentialed health data licence",
        about="MIMIC-CXR-JPG: frontal chest X-rays; their reports, and captions of their labels by a language model",
    ),
    "openi": Layout(
        annotations=("filter_cap.json", "openai_refined_concepts.json"),
        rows=_openi,
        pictures="openI/image",
        captions=_original_first,
        modality="X-ray",
        patient=r"^(?:CXR)?(\d+)_",
        licence="National Library of Medicine, public",
        about="Open-i: chest X-rays; their reports, and three rewrites of each by a language model",
    ),
    "chest_xray8": Layout(
        annotations=("Chest-Xray8_with_captions.csv",),
        rows=_literal_paths(1, 2),
        pictures="chest_xray8/images",
        captions=_listed,
        labels=0,
        modality="X-ray",
        patient=r"(?:^|/)(\d{8})_\d+",
        licence="NIH Clinical Center, open",
        about="ChestX-ray8: chest X-rays; captions of their labels by a language model",
    ),
    "roco": Layout(
        annotations=("train_captions.csv",),
        rows=_plain(0, 1, ".jpg"),
        pictures="ROCOV2/train",
        captions=_one,
        modality=_by_caption,
        licence="Creative Commons, by article; some non-commercial",
        about="ROCOv2: radiology figures of open-access articles with their captions",
    ),
    "pmc_clip": Layout(
        annotations=("pmc_oa.jsonl",),
        rows=_lines,
        pictures="caption_T060_filtered_top4_sep_v0_subfigures",
        captions=_one,
        modality=_by_caption,
        licence="Creative Commons, by article",
        about="PMC-OA: subfigures of open-access articles with their captions",
    ),
    "llava_med_alignment_set": Layout(
        annotations=("llava_med_alignment_500k_filtered.json",),
        rows=_conversations,
        pictures="llava_med/images",
        captions=_one,
        modality=_by_caption,
        licence="CC BY-NC 4.0",
        about="LLaVA-Med alignment: figures of open-access articles with their captions",
    ),
    "llava_med_hq_60k_set": Layout(
        annotations=("llava_med_instruct_fig_captions.json",),
        rows=_figures,
        pictures="images",
        captions=_one,
        modality=_by_caption,
        licence="CC BY-NC 4.0",
        about="LLaVA-Med instruct: figures with their captions, and again with the sentences that mention them",
    ),
    "quilt": Layout(
        annotations=("quilt_1M_lookup.csv",),
        rows=_plain(2, 1),
        pictures="Quilt/quilt_1m",
        captions=_one,
        modality="Histopathology",
        licence="gated, research use",
        about="Quilt-1M: histopathology frames of teaching videos and others with what is said about them",
    ),
    "retina_part1": Layout(
        annotations=(),
        rows=_retina_folder,
        pictures="Retina-Datasets",
        captions=_with_template,
        modality="Fundus",
        licence="each data set's own",
        about="Retina part 1: fundus photographs of many public sets; captions of their labels by a language model",
    ),
    "retina_part2": Layout(
        annotations=("06_DEN.csv",),
        rows=_plain("image", "categories"),
        pictures="Retina-Datasets",
        captions=_category,
        modality="Fundus",
        licence="public repository",
        about="Retina part 2: DeepEyeNet's fundus photographs; captions made of their keywords",
    ),
    "retina_part3": Layout(
        annotations=("39_MM_Retinal_dataset.csv",),
        rows=_plain("image", "caption"),
        pictures="Retina-Datasets",
        captions=_one,
        modality="Fundus",
        licence="research use",
        about="Retina part 3: MM-Retinal's fundus photographs with the captions of their books",
    ),
}
