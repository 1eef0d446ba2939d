"""Files of captions that belong to labels: which texts a picture with a label (modality, anatomy, finding) may carry.

JSON holds everything that is known about their making; CSV, one row a caption, holds the texts, kinds and origin:

    {"format": "unimed_jax.label_captions", "version": 1, "generator": {...},
     "labels": [{"modality": "X-ray", "anatomy": "chest", "finding": "pneumonia", "synonyms": [...],
                 "captions": [{"text": "...", "kind": "llm", ...}], ...}]}
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax import config
from unimed_jax.data import files, limits, validate
from unimed_jax.data.record import Caption
from unimed_jax.errors import DataError, did_you_mean

FORMAT = "unimed_jax.label_captions"
VERSION = 1
COLUMNS = ("modality", "anatomy", "finding", "synonyms", "text", "kind", "model", "seed", "reply_sha256")
MAX_LABEL_CHARS = 200
_FORMULA = "=+-@\t\r|"  # a cell that begins with one of them runs in a spreadsheet
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """A label: what is seen, where, and by which modality."""

    modality: str  # one of config.MODALITIES
    anatomy: str
    finding: str
    synonyms: tuple[str, ...] = ()
    where: str = field(default="", repr=False, compare=False)

    @property
    def key(self) -> Key:
        """What makes two labels the same: letters' case, width and white space do not count."""
        return label_key(self.modality, self.anatomy, self.finding)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.modality} / {self.anatomy} / {self.finding}"

    def json(self) -> dict[str, Any]:
        """The label as files hold it."""
        return {
            "modality": self.modality,
            "anatomy": self.anatomy,
            "finding": self.finding,
            "synonyms": list(self.synonyms),
        }


@dataclass(slots=True, kw_only=True)
class Label:
    """A label with its captions, each {"text", "kind"} and what is known of its making."""

    triplet: Triplet
    captions: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class LabelCaptions:
    """A file of captions."""

    labels: list[Label]
    generator: dict[str, Any] = field(default_factory=dict)

    def by_key(self) -> dict[Key, Label]:
        """The labels by what makes them the same."""
        return {label.triplet.key: label for label in self.labels}


def label_key(modality: str, anatomy: str, finding: str) -> Key:
    """The identity of a label.

    Example:
        >>> label_key("X-ray", " Chest", "Pleural  Effusion")
        ('x-ray', 'chest', 'pleural effusion')
    """
    modality, anatomy, finding = (_folded(x) for x in (modality, anatomy, finding))
    return modality, anatomy, finding


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def make_triplet(values: dict[str, Any], where: str) -> Triplet:
    """A label out of a row's cells or a file's object; synonyms are a list, or a text with ";" between them.

    Raises:
        DataError: naming the place, for a missing, overlong or unprintable part or an unknown modality.
    """
    parts = {}
    for part in ("modality", "anatomy", "finding"):
        parts[part] = _part(values.get(part), part, where)
        if not parts[part]:
            raise DataError(f"{where} has no {part}", "a label is modality, anatomy and finding")
    modalities = {m.casefold(): m for m in config.MODALITIES}
    modality = modalities.get(parts["modality"].casefold())
    if modality is None:
        hint = did_you_mean(parts["modality"], config.MODALITIES)
        raise DataError(
            f"{where}: modality is {parts['modality']!r}.{hint}", f"one of {', '.join(config.MODALITIES)}"
        )
    given = values.get("synonyms") or ()
    if not isinstance(given, (str, list, tuple)):
        raise DataError(f"{where}: synonyms are no text and no list")
    listed = given.split(";") if isinstance(given, str) else given
    synonyms = tuple(s for x in listed if (s := _part(x, "synonyms", where)))
    return Triplet(**(parts | {"modality": modality}), synonyms=synonyms, where=where)


def _part(value: Any, part: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {part} is {value!r:.60}, which is no text")
    text = " ".join(unicodedata.normalize("NFC", value).split())
    if not text.isprintable() or len(text) > MAX_LABEL_CHARS or any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(
            f"{where}: {part} is not UTF-8, has control characters or more than {MAX_LABEL_CHARS} characters"
        )
    if text[:1] in tuple(_FORMULA):
        raise DataError(f"{where}: {part} begins with {text[0]!r}", "begin with a letter or digit")
    return text


def read_triplets(path: Path) -> list[Triplet]:
    """Reads a table of labels: columns modality, anatomy, finding and perhaps synonyms; .csv, or .tsv.

    Raises:
        DataError: for a table that cannot be read, an unknown column, a bad row, or a label that is there twice.
    """
    rows = _table(path, ("modality", "anatomy", "finding"), ("synonyms",))
    triplets = [make_triplet(values, where) for values, where in rows]
    if not triplets:
        raise DataError(f"{path} has no labels", "one row each, below the line with the columns")
    seen: dict[Key, str] = {}
    for t in triplets:
        if t.key in seen:
            raise DataError(f"{t.where} repeats the label of {seen[t.key]}: {t.name}", "keep one of them")
        seen[t.key] = t.where
    return triplets


def _table(path: Path, needed: Sequence[str], more: Sequence[str]) -> Iterable[tuple[dict[str, str], str]]:
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    try:
        if path.stat().st_size > limits.MAX_FILE_BYTES:
            raise DataError(f"{path} has more than {limits.MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
        columns = [c.strip() for c in reader.fieldnames or ()]
        reader.fieldnames = columns
        for column in columns:
            if column not in (*needed, *more):
                hint = did_you_mean(column, (*needed, *more))
                raise DataError(
                    f"{path.name}: unknown column {column!r}.{hint}", f"known: {', '.join((*needed, *more))}"
                )
        for column in needed:
            if column not in columns:
                raise DataError(f"{path.name} has no column {column}", f"needed: {', '.join(needed)}")
        rows = []
        for values in reader:
            if None in values or None in values.values():
                raise DataError(
                    f"{path.name} line {reader.line_num} has another number of columns than the header"
                )
            rows.append((values, f"{path.name} line {reader.line_num}"))
        return rows
    except OSError as e:
        what = f"{path} cannot be read ({e.strerror or type(e).__name__})"
        raise DataError(what, "check its name and permissions") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} is no CSV in UTF-8: {e}") from e


def read(path: Path) -> LabelCaptions:
    """Reads a file of captions, JSON or (.csv) a table.

    Raises:
        DataError: for a file that cannot be read, of another format, with a bad label or caption, or a label twice.
    """
    found = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    if len(found.by_key()) != len(found.labels):
        raise DataError(f"{path} has a label twice", "keep one of them")
    return found


def _read_csv(path: Path) -> LabelCaptions:
    labels: dict[Key, Label] = {}
    for values, where in _table(path, (*COLUMNS[:3], "text", "kind"), COLUMNS):
        triplet = make_triplet(values, where)
        label = labels.setdefault(triplet.key, Label(triplet=triplet))
        known = {k: v for k in ("model", "seed", "reply_sha256") if (v := values.get(k))}
        label.captions.append(_caption({"text": values["text"], "kind": values["kind"]} | known, where))
    return LabelCaptions(labels=list(labels.values()))


def _read_json(path: Path) -> LabelCaptions:
    values = files.read_json(path, "unimed-jax captions writes such files", most=limits.MAX_FILE_BYTES)
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} is no file of captions, version {VERSION}", "unimed-jax captions writes them"
        )
    labels = []
    for number, entry in enumerate(_list(values.get("labels"), f"{path.name}: labels")):
        where = f"{path.name} label {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is no object")
        triplet = make_triplet(entry, where)
        captions = [_caption(c, where) for c in _list(entry.get("captions"), f"{where}: captions")]
        more = {k: v for k, v in entry.items() if k not in (*triplet.json(), "captions")}
        labels.append(Label(triplet=triplet, captions=captions, more=more))
    generator = values.get("generator")
    return LabelCaptions(labels=labels, generator=generator if isinstance(generator, dict) else {})


def choose(
    labelled: Mapping[Key, Label], modality: str, anatomy: str, findings: Iterable[str], where: str
) -> list[Label]:
    """The labels of a picture, which all must have captions; none for a picture without finding.

    Raises:
        DataError: naming the place, for a label without captions.
    """
    chosen = []
    for finding in filter(None, (f.strip() for f in findings)):
        key = label_key(modality, anatomy, finding)
        label = labelled.get(key)
        if label is None or not label.captions:
            names = [" / ".join(k) for k in labelled]
            raise DataError(
                f"{where}: label {' / '.join(key)!r:.200} has no captions.{did_you_mean(' / '.join(key), names)}",
                "unimed-jax captions makes them; a row without finding needs none",
            )
        chosen.append(label)
    return chosen


def texts(chosen: Iterable[Label]) -> tuple[Caption, ...]:
    """The captions of labels as a record holds them."""
    return tuple(Caption(text=c["text"], kind=c["kind"]) for label in chosen for c in label.captions)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} is no list")
    return value


def _caption(value: Any, where: str) -> dict[str, Any]:
    text, kind = (value.get("text"), value.get("kind")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str) or not text.strip() or kind not in config.CAPTION_KINDS:
        kinds = ", ".join(config.CAPTION_KINDS)
        raise DataError(f"{where}: a caption has no text, or a kind that is none of {kinds}")
    if fault := validate.caption_fault(Caption(text=text, kind=kind)):
        raise DataError(f"{where}: a caption cannot be stored: {fault[1]}", "mend it, or leave it out")
    if text[0] in _FORMULA:
        raise DataError(f"{where}: a caption begins with {text[0]!r}", "begin with a letter or digit")
    return value


def write(path: Path, found: LabelCaptions) -> None:
    """Writes a file of captions at once, JSON or (.csv) a table; equal content gives equal bytes.

    Raises:
        DataError: when it cannot be written.
    """
    if path.suffix == ".csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for label in found.labels:
            shared = label.triplet.json() | {"synonyms": "; ".join(label.triplet.synonyms)}
            for caption in label.captions:
                values = found.generator | shared | caption
                writer.writerow({column: values.get(column, "") for column in COLUMNS})
        text = out.getvalue()
    else:
        labels = [x.triplet.json() | {"captions": x.captions} | x.more for x in found.labels]
        values = {"format": FORMAT, "version": VERSION, "generator": found.generator, "labels": labels}
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    with files.swapped(path) as beside:
        beside.write_text(text, encoding="utf-8")
        files.sync(beside)
