"""Your own images: a folder, and a table that says what is on each of them.

The table is CSV (or .tsv, .jsonl, .parquet) in UTF-8 with these columns; `file` and one kind of caption must be there:

    file      path below the folder
    caption   text; more of them in caption2, caption3, ...
    captions  instead: a JSON list of texts, or of {"text": ..., "kind": "report"}
    kind      of all captions of the row: original (default), report, template, llm
    labels    "plane:axial; region:brain", or a JSON list
    modality  one of config.MODALITIES
    patient   any identifier; only a salted hash of it is stored
    split     train (default), val, test, ...

With `label_captions`, a file of `unimed-jax captions`, captions are optional: a row's modality, `anatomy` and `finding`
(several with ";" between them) say which captions of the file it gets, after its own.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unimed_jax import config
from unimed_jax.data import files, label_captions, limits, windows
from unimed_jax.data.record import Caption, Example, hash_patient
from unimed_jax.data.sources import pictures
from unimed_jax.errors import DataError, did_you_mean

_COLUMNS = ("file", "caption", "captions", "kind", "labels", "modality", "patient", "split")
_LABEL_COLUMNS = ("anatomy", "finding")
_NUMBERED = re.compile(r"caption(\d+)")


Labelled = Mapping[label_captions.Key, label_captions.Label]


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    key: str
    split: str
    file: str
    captions: tuple[Caption, ...]
    labels: tuple[str, ...]
    modality: str
    patient: str
    where: str = field(repr=False)  # not part of the content: rows may move


@dataclass(slots=True, frozen=True, kw_only=True)
class Folder:
    """The record source `folder`: images below `raw`, described by the table `captions`.

    Args:
        raw: the folder of images.
        captions: the table.
        name: of the source.
        licence: a note on the licence.
        description: for the data card.
        salt: secret that goes into the hashes of patients; without one, short identifiers can be guessed.
        hide_names: store hashes of file names instead of the names, where these identify people.
        window: of DICOM and NIfTI: lung, brain, ... or CENTRE,WIDTH; default: the file's own.
        label_captions: file of captions by label, which the rows' modality, anatomy and finding choose from.
    """

    raw: Path = field(repr=False)
    captions: Path = field(repr=False)
    name: str = "folder"
    licence: str = ""
    description: str = ""
    salt: str = field(default="", repr=False)
    hide_names: bool = False
    window: str = ""
    label_captions: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        windows.parse_window(self.window)  # refused before anything is read

    def items(self) -> Sequence[Row]:
        """The rows of the table.

        Raises:
            DataError: for a missing folder or table, an unknown column or modality, a path that leaves the folder, or a
                label without captions in `label_captions`.
        """
        if not Path(self.raw).is_dir():
            raise DataError(f"no folder {self.raw}", "--raw names the folder of the images")
        labelled = label_captions.read(Path(self.label_captions)).by_key() if self.label_captions else None
        rows = read_table(Path(self.captions), labelled=labelled is not None)
        return [self._row(values, where, labelled) for values, where in rows]

    def _row(self, values: dict[str, str], where: str, labelled: Labelled | None) -> Row:
        file, modality = values.get("file", "").strip(), values.get("modality", "").strip()
        if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\0" in file:
            raise DataError(f"{where}: file is {file!r}", "give a path below --raw")
        if not file.isprintable():
            raise DataError(
                f"{where}: the file name is not UTF-8 or has control characters", "rename the file"
            )
        if modality and modality not in config.MODALITIES:
            hint = did_you_mean(modality, config.MODALITIES)
            raise DataError(
                f"{where}: modality is {modality!r}.{hint}", f"one of {', '.join(config.MODALITIES)}"
            )
        salt = self.salt or self.name
        findings = values.get("finding", "").split(";")
        chosen = label_captions.choose(labelled or {}, modality, values.get("anatomy", ""), findings, where)
        labels = _labels(values.get("labels", ""), where)
        found = (f"finding:{x.triplet.finding}" for x in chosen)
        return Row(
            key=hash_patient(file, salt) if self.hide_names else file,
            split=values.get("split", "").strip() or "train",
            file=file,
            captions=(*_captions(values, where), *label_captions.texts(chosen)),
            labels=(*labels, *(x for x in found if x not in labels)),
            modality=modality,
            patient=hash_patient(values.get("patient", "").strip(), salt),
            where=where,
        )

    def example(self, item: Row) -> Example:
        """Reads one image; its bytes are stored as they are, of DICOM and NIfTI the middle slice as PNG."""
        image, modality = pictures.stored(Path(self.raw) / item.file, windows.parse_window(self.window))
        return Example(
            key=item.key,
            image=image,
            captions=item.captions,
            labels=item.labels,
            modality=item.modality or modality,
            patient=item.patient,
            split=item.split,
        )


def read_table(path: Path, *, labelled: bool = False) -> Iterator[tuple[dict[str, str], str]]:
    """Yields (values by column, place) of every row; bytes that are not UTF-8 become lone surrogates.

    Args:
        path: the table.
        labelled: whether it says by anatomy and finding which captions a row gets.

    Raises:
        DataError: for a missing or malformed table, or an unknown column.
    """
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, labelled)
            return
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
            if path.suffix == ".jsonl":
                for number, line in enumerate(f, 1):
                    if line.strip():
                        values = _object(line, number)
                        _check_columns(values, path, labelled)
                        yield {k: _text(v) for k, v in values.items()}, f"{path.name} line {number}"
                return
            reader = csv.DictReader(f, dialect="excel-tab" if path.suffix == ".tsv" else "excel", strict=True)
            _check_columns(reader.fieldnames or (), path, labelled)
            for values in reader:
                if None in values or None in values.values():
                    raise ValueError(f"line {reader.line_num} has another number of columns than the header")
                yield values, f"{path.name} line {reader.line_num}"
    except OSError as e:
        raise DataError(f"cannot read the table {path} ({e.strerror})", "--captions names it") from e
    except (ValueError, TypeError, AttributeError, csv.Error) as e:
        raise DataError(
            f"the table {path} is malformed: {e}", "CSV with a header, or JSON lines, in UTF-8"
        ) from e


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        values = files.parse_json(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"line {number} is no JSON: {str(e)[:100]}") from e
    if not isinstance(values, dict):
        raise ValueError(f"line {number} is no JSON object")
    return values


def _parquet(path: Path, labelled: bool) -> Iterator[tuple[dict[str, str], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, path, labelled)
        number = 0
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield {k: _text(v) for k, v in values.items()}, f"{path.name} row {number}"
    except pa.ArrowException as e:
        raise ValueError(f"{type(e).__name__}: {str(e)[:100]}") from e


def _check_columns(columns: Any, path: Path, labelled: bool) -> None:
    known = _COLUMNS + _LABEL_COLUMNS * labelled
    for column in columns:
        if column in _LABEL_COLUMNS and not labelled:
            raise DataError(
                f"{path.name}: column {column} needs the captions of its labels", "--set label_captions=FILE"
            )
        if column not in known and not _NUMBERED.fullmatch(column):
            raise DataError(
                f"{path.name}: unknown column {column!r}.{did_you_mean(column, known)}",
                f"known: {', '.join(known)}, caption2, caption3, ...",
            )
    if "file" not in columns:
        raise DataError(f"{path.name} has no column file", "it names the image below --raw")
    if labelled:
        if lacking := [c for c in ("modality", *_LABEL_COLUMNS) if c not in columns]:
            raise DataError(
                f"{path.name} has no column {lacking[0]}", "modality, anatomy and finding choose captions"
            )
    elif not any(c in ("caption", "captions") or _NUMBERED.fullmatch(c) for c in columns):
        raise DataError(f"{path.name} has no column caption or captions")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _captions(values: dict[str, str], where: str) -> tuple[Caption, ...]:
    kind = values.get("kind", "").strip() or "original"
    numbered = sorted((int(m[1]), name) for name in values if (m := _NUMBERED.fullmatch(name)))
    texts = [values[name] for name in ("caption", *(n for _, n in numbered)) if values.get(name)]
    found = [Caption(text=text, kind=kind) for text in texts]
    for entry in _json_list(values.get("captions", ""), where):
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            found.append(Caption(text=entry["text"], kind=str(entry.get("kind", kind))))
        elif isinstance(entry, str):
            found.append(Caption(text=entry, kind=kind))
        else:
            raise DataError(f"{where}: captions holds {entry!r:.60}", 'texts, or {"text": ..., "kind": ...}')
    return tuple(found)


def _labels(text: str, where: str) -> tuple[str, ...]:
    if text.lstrip().startswith("["):
        return tuple(str(label) for label in _json_list(text, where))
    return tuple(label.strip() for label in text.split(";") if label.strip())


def _json_list(text: str, where: str) -> list[Any]:
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except ValueError as e:
        raise DataError(f"{where}: {text[:40]!r} is no JSON ({e})", 'e.g. ["a chest film", "PA view"]') from e
    if not isinstance(values, list):
        raise DataError(f"{where}: {text[:40]!r} is no JSON list", 'e.g. ["a chest film", "PA view"]')
    return values
