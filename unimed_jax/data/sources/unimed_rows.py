"""How the annotation files of UniMed's sources become rows, captions and modalities; unimed.py says which uses what."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.data import files, markers
from unimed_jax.data.record import Caption
from unimed_jax.data.sources import annotation_files, modality
from unimed_jax.data.sources.annotation_files import Row
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

# -- rows -------------------------------------------------------------------------------------------------------------


def literal_paths(*columns: int) -> Callable[[Sequence[Path]], Iterator[Row]]:
    """CSV by position: column 0 spells a list whose first item is the path; the others are kept for later."""

    def row(cells: list[str], where: str) -> Row:
        try:
            path = annotation_files.texts(cells[0], "the path")[0]
        except (Reject, IndexError) as e:
            return Row("", fault=getattr(e, "detail", "") or "it names no picture", where=where)
        # All rows of a class have the same captions, which are kept once.
        return Row(path, tuple(map(sys.intern, cells[1:])), where=where)

    return lambda paths: annotation_files.csv_rows(paths[0], (0, *columns), row)


def plain(path: int | str, caption: int | str, suffix: str = "") -> Callable[[Sequence[Path]], Iterator[Row]]:
    """CSV with one path and one caption a row."""

    def row(cells: list[str], where: str) -> Row:
        return Row(cells[0] + suffix if cells[0] else "", (cells[1],), where=where)

    return lambda paths: annotation_files.csv_rows(paths[0], (path, caption), row)


def openi(paths: Sequence[Path]) -> Iterator[Row]:
    """Reports and their rewrites, which two files list in the same order."""
    reports = _list_of(_json(paths[0]), "annotations", paths[0])
    rewrites = _list_of(_json(paths[1]), "refined_captions", paths[1])
    if len(reports) != len(rewrites):
        raise DataError(
            f"{paths[0]} has {len(reports)} entries and {paths[1]} {len(rewrites)}: they belong together by position",
            "download both again",
        )
    for i, (report, rewritten) in enumerate(zip(reports, rewrites, strict=True)):
        where = f"{paths[0].name} entry {i}"
        entry: dict[str, Any] = report if isinstance(report, dict) else {}
        more: list[Any] = rewritten if isinstance(rewritten, list) else [None]
        name, texts = entry.get("image_id"), [entry.get("caption"), *more]
        if not all(isinstance(x, str) for x in (name, *texts)):
            yield Row("", fault="it has no image_id, caption or list of rewrites", where=where)
        else:
            yield Row(f"{name}.png", tuple(texts), where=where)


def _json(path: Path) -> Any:
    return files.read_json(path, "download it again", missing="--captions names it")


def _list_of(value: Any, name: str, file: Path) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{file} has no list {name!r}", "give the annotation file as it was published")
    return found


def lines(paths: Sequence[Path]) -> Iterator[Row]:
    """JSON lines of {image, caption}."""
    for where, value in annotation_files.json_lines(paths[0]):
        yield _pair(value, "image", "caption", where)


def _pair(value: Any, name: str, text: str, where: str) -> Row:
    path, caption = (value.get(k) if isinstance(value, dict) else None for k in (name, text))
    if not isinstance(path, str) or not isinstance(caption, str):
        return Row("", fault=f"it has no {name} or {text}", where=where)
    return Row(path, (caption,), where=where)


def conversations(paths: Sequence[Path]) -> Iterator[Row]:
    """A list of {image, conversations}; the caption is what the second turn says."""
    value = _json(paths[0])
    if not isinstance(value, list):
        raise DataError(f"{paths[0]} holds no list", "give the annotation file as it was published")
    for i, entry in enumerate(value):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        said = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
        caption = said.get("value") if isinstance(said, dict) else None
        path = entry.get("image") if isinstance(entry, dict) else None
        yield _pair({"image": path, "caption": caption}, "image", "caption", f"{paths[0].name} entry {i}")


def figures(paths: Sequence[Path]) -> Iterator[Row]:
    """Lists of {pair_id, fig_caption, in_text_mention}: first all captions, then all sentences that mention a figure.

    What is null was never there, and is no row.
    """
    value = _json(paths[0])
    if not isinstance(value, dict):
        raise DataError(f"{paths[0]} holds no table of lists", "give the annotation file as it was published")
    entries = [
        (f"{paths[0].name} {name} entry {i}", entry)
        for name, part in value.items()
        for i, entry in enumerate(part if isinstance(part, list) else [part])
    ]
    for kind, find in (("caption", lambda entry: entry.get("fig_caption")), ("mention", _mention)):
        for where, entry in entries:
            name = entry.get("pair_id") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                if kind == "caption":
                    yield Row("", fault="it has no pair_id", where=where)
                continue
            said = find(entry)
            if isinstance(said, str):
                yield Row(f"{name}.jpg", (said,), suffix=kind, where=where)
            elif said is not None and said == said:  # JSON's NaN stands for a missing text
                yield Row(f"{name}.jpg", suffix=kind, fault=f"its {kind} is no text", where=where)


def _mention(entry: dict[str, Any]) -> Any:
    found = entry.get("in_text_mention")
    first = found[0] if isinstance(found, list) and found else found or None
    return first.get("tokens") if isinstance(first, dict) else first


# The original reads every CSV of its folder but these, which are sources of their own or were left out.
_NOT_PART_1 = (
    "06_DEN",
    "39_MM_Retinal_dataset",
    "28_OIA-DDR_revised",
    "07_LAG_revised",
    "01_EYEPACS_revised",
)


def retina_folder(paths: Sequence[Path]) -> Iterator[Row]:
    """Every CSV of a folder that belongs to part 1, in the order of their names."""
    tables = sorted(p for p in paths[0].glob("*.csv") if p.stem not in _NOT_PART_1)
    if not tables:
        raise DataError(f"{paths[0]} has no CSV of retina part 1", "--captions names the folder of the CSVs")
    columns = ("filename", "captions", "sentence_level_captions")
    for file in tables:
        yield from annotation_files.csv_rows(
            file, columns, lambda c, where: Row(c[0], tuple(c[1:]), where=where)
        )


# -- captions ---------------------------------------------------------------------------------------------------------


def _sentences(texts: Iterable[str], kind: str) -> list[Caption]:
    """Captions with one final period each, as the original's tars have them."""
    return [Caption(text=markers.one_period(f"{t}."), kind=kind) for t in texts if t.strip(" .\t\r\n")]


def listed(cells: Sequence[str], _: str) -> list[Caption]:
    """Labels in the first cell, captions of their class in the second."""
    return _sentences(annotation_files.texts(cells[1], "captions"), "llm")


def with_report(cells: Sequence[str], key: str) -> list[Caption]:
    """As `listed`, and a report in the third cell."""
    return [*listed(cells, key), Caption(text=cells[2].strip(), kind="report")]


def one(cells: Sequence[str], _: str) -> list[Caption]:
    """One free caption."""
    return [Caption(text=cells[0].strip())]


def original_first(cells: Sequence[str], _: str) -> list[Caption]:
    """The author's text, then its rewrites."""
    return _sentences(cells[:1], "original") + _sentences(cells[1:], "llm")


def with_template(cells: Sequence[str], _: str) -> list[Caption]:
    """Captions in the first cell, a sentence from a template in the second."""
    return _sentences(annotation_files.texts(cells[0], "captions"), "llm") + _sentences(
        cells[1:2], "template"
    )


def category(cells: Sequence[str], key: str) -> list[Caption]:
    """The last category that is neither an age nor a code; else one of them, chosen by the key instead of by chance."""
    found = [c.strip() for c in annotation_files.texts(cells[0], "categories") if c.strip()]
    if not found:
        raise Reject("caption_empty", "no category")
    said = [c for c in found if "year" not in c and "//" not in c]
    drawn = found[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(found)]
    return [Caption(text=f"fundus image of {said[-1] if said else drawn}", kind="template")]


# -- modality ---------------------------------------------------------------------------------------------------------

_RADIMAGENET = {"CT": "CT", "MR": "MRI", "MRI": "MRI", "US": "Ultrasound"}


def by_folder(path: str, _: str) -> str:
    """RadImageNet's folders say it: radiology_ai/MR/..."""
    return next((_RADIMAGENET[p] for p in path.split("/") if p in _RADIMAGENET), "")


def by_caption(_: str, caption: str) -> str:
    """What a caption of the literature names."""
    return modality.named(caption)
