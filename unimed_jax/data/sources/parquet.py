"""Parquet files that hold the pictures themselves, as data sets on Hugging Face do.

A picture is a column of bytes, or of {bytes, path}. Row groups are read in sequence, a few rows at a time: memory is
that of a page (what the writer has compressed as one, at most a row group), and a row group's records lie side by side
in a shard.

    image     the column of pictures; default: `image`, or the only one that holds bytes
    caption   columns of text or lists of text, with commas between them; default: caption, captions or text
    report    columns of texts that are reports
    label     columns whose values become labels, "column:value"; numbers of classes by the names that the file has
    finding   a column of findings (a list, or with ";" between), for `label_captions` with `anatomy` and `modality`
    modality  one of config.MODALITIES, or a column of them
    split     a column; default: what the file's name (holdout-00000-of-00004.parquet) or its folder says, else train
    key, patient   columns; default: file and row number, and none
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax import config
from unimed_jax.data import files, label_captions, limits
from unimed_jax.data.record import Caption, Example, hash_patient
from unimed_jax.data.sources import parquet_rows
from unimed_jax.data.sources.annotation_files import path_fault
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError, did_you_mean

_TEXTS = ("caption", "captions", "text")
_SPLITS = {"validation": "val", "valid": "val", "dev": "val"}
_SHARD = re.compile(
    r"(?:^|/)([a-z][a-z0-9_]*)-\d{5}-of-\d{5}"
)  # as `datasets` names them, whatever the split
_SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-])")


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One row; `made` changes when the file or the captions of labels do."""

    key: str
    split: str
    file: str  # below raw
    group: int  # row group
    index: int  # in the row group
    number: int = field(repr=False)  # in the file
    made: str

    @property
    def run(self) -> str:
        """A row group is read in its order."""
        return f"{self.file}/{self.group}"

    @property
    def where(self) -> str:
        """Where the row stands."""
        return f"{self.file} row {self.number}"


@dataclass(slots=True, frozen=True, kw_only=True)
class Parquet:
    """The record source `parquet`; the module says what the columns are.

    Args:
        raw: a file, or a folder read with everything below it.
        name: of the source.
        image: column of pictures.
        caption: columns of captions.
        report: columns of reports.
        label: columns of labels.
        modality: of all pictures, or a column.
        split: column of splits.
        key: column of unique keys.
        patient: column of patients, of which only a salted hash is stored.
        label_captions: file of captions by label.
        anatomy: of all pictures, for `label_captions`.
        finding: column of findings, for `label_captions`.
        salt: secret that goes into the hashes of patients.
        licence: a note on the licence.
        description: for the data card.
    """

    raw: Path = field(repr=False)
    name: str = "parquet"
    image: str = ""
    caption: str = ""
    report: str = ""
    label: str = ""
    modality: str = ""
    split: str = ""
    key: str = ""
    patient: str = ""
    label_captions: str = field(default="", repr=False)
    anatomy: str = ""
    finding: str = ""
    salt: str = field(default="", repr=False)
    licence: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        given = [bool(x) for x in (self.label_captions, self.anatomy, self.finding)]
        if any(given) and not (all(given) and self.modality):
            raise UsageError(
                "captions by label need label_captions, anatomy, finding and modality",
                "give all four with --set",
            )

    def items(self) -> Sequence[Row]:
        """Every row of every file, files in the order of their names.

        Raises:
            DataError: for a folder or file that cannot be read, a file that lacks a column, a key that is none, or a
                finding without captions.
        """
        said = ""
        if self.label_captions:
            label_captions.read(Path(self.label_captions))  # says what is wrong with it
            said = files.file_sha256(Path(self.label_captions))[:16]
        rows: list[Row] = []
        for file in self._files():
            rows += self._rows(file, said)
        return rows

    def example(self, item: Row) -> Example:
        """Reads one row; the picture's bytes are stored as they are.

        Raises:
            Reject: for a row that cannot be read, or a picture that is not in the table.
            DataError: for a file that has become another since `items`, and is no Parquet.
        """
        raw = Path(self.raw)
        path = raw if raw.is_file() else raw / item.file
        columns = _columns(self, path, item.made)
        values = parquet_rows.row(path, item.made, item.group, item.index, tuple(columns.all))
        captions = [
            Caption(text=text, kind=kind)
            for kind, names in (("original", columns.caption), ("report", columns.report))
            for name in names
            for text in _texts(values[name], name)
        ]
        labels = [
            f"{name}:{value}"
            for name in columns.label
            for value in _values(values[name], columns.names.get(name))
        ]
        modality = self.modality if self.modality in config.MODALITIES else values.get(self.modality) or ""
        if labelled := self._labelled(item.made):
            findings = _findings(values[self.finding], columns.names.get(self.finding))
            chosen = label_captions.choose(labelled, str(modality), self.anatomy, findings, item.where)
            captions += label_captions.texts(chosen)
            labels += [f"finding:{x.triplet.finding}" for x in chosen]
        return Example(
            key=item.key,
            image=_bytes(values[columns.image]),
            captions=tuple(captions),
            labels=tuple(dict.fromkeys(labels)),
            modality=str(modality),
            patient=hash_patient("".join(_values(values.get(self.patient), None)), self.salt or self.name),
            split=item.split,
        )

    def _labelled(self, made: str) -> Mapping[label_captions.Key, label_captions.Label] | None:
        return _label_captions(self.label_captions, made) if self.label_captions else None

    def _files(self) -> list[Path]:
        raw = Path(self.raw)
        if raw.is_file():
            return [raw]
        if not raw.is_dir():
            raise DataError(f"no folder or file {raw}", "--raw names it")
        found = files.below(raw, lambda name: name.endswith(".parquet"))
        if not found:
            raise DataError(f"no .parquet below {raw}", "--raw names the folder of the tables")
        return found

    def _rows(self, file: Path, said: str) -> Iterator[Row]:
        import pyarrow as pa

        raw = Path(self.raw)
        name = file.name if raw.is_file() else file.relative_to(raw).as_posix()
        if fault := path_fault(name):
            raise DataError(f"the table {name!a}: {fault}", "rename it")
        try:
            made = f"{parquet_rows.footer(file)} {said}".strip()
            columns = _columns(self, file, made)
            wanted = [c for c in (self.key, self.split, self.finding) if c]
            if self.finding and self.modality not in config.MODALITIES:
                wanted.append(self.modality)
            table = parquet_rows.open_file(file)
            number = 0
            for group in range(table.num_row_groups):
                cells = parquet_rows.values(table, group, wanted)
                for index, values in enumerate(cells):
                    where = f"{name} row {number}"
                    self._check_finding(values, columns, made, where)
                    yield Row(
                        key=self._key(values, where)
                        if self.key
                        else f"{name.removesuffix('.parquet')}/{number:07d}",
                        split=_split(values.get(self.split), name),
                        file=name,
                        group=group,
                        index=index,
                        number=number,
                        made=made,
                    )
                    number += 1
        except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
            raise parquet_rows.unreadable(file, e) from e

    def _key(self, values: Mapping[str, Any], where: str) -> str:
        key = str(values[self.key] if values[self.key] is not None else "").strip()
        if fault := path_fault(key):
            raise DataError(f"{where}: the key {key[:80]!a}: {fault}", f"another column than {self.key}")
        return key

    def _check_finding(self, values: Mapping[str, Any], columns: _Columns, made: str, where: str) -> None:
        if labelled := self._labelled(made):
            fixed = self.modality in config.MODALITIES
            modality = self.modality if fixed else str(values[self.modality] or "")
            findings = _findings(values[self.finding], columns.names.get(self.finding))
            label_captions.choose(labelled, modality, self.anatomy, findings, where)


@dataclass(slots=True, frozen=True)
class _Columns:
    """Which columns of a file are what; `names` has the class names of those that hold numbers of classes."""

    image: str
    caption: tuple[str, ...]
    report: tuple[str, ...]
    label: tuple[str, ...]
    more: tuple[str, ...]
    names: dict[str, tuple[str, ...]] = field(hash=False)

    @property
    def all(self) -> list[str]:
        """Every column that is read, each once."""
        return list(dict.fromkeys((self.image, *self.caption, *self.report, *self.label, *self.more)))


@functools.lru_cache(64)
def _columns(source: Parquet, file: Path, made: str) -> _Columns:
    """The columns of a file; `made` stands for its content.

    Raises:
        DataError: when one is not there, or the picture or the caption is not to be found.
    """
    schema = parquet_rows.open_file(file).schema_arrow
    pictures = [f.name for f in schema if parquet_rows.holds_bytes(f.type)]
    listed = ", ".join(schema.names)[:300]
    if not source.image and "image" not in pictures and len(pictures) != 1:
        raise DataError(
            f"{file} has {len(pictures)} columns that hold bytes", f"--set image=COLUMN, one of: {listed}"
        )
    image = source.image or ("image" if "image" in pictures else pictures[0])
    caption = _listed(source.caption) or tuple(t for t in _TEXTS if t in schema.names)[:1]
    fixed = source.modality in ("", *config.MODALITIES)
    more = tuple(
        c for c in (source.patient, source.finding, "" if fixed else source.modality) if c
    )  # key and split are read before
    found = _Columns(
        image,
        caption,
        _listed(source.report),
        _listed(source.label),
        more,
        parquet_rows.class_names(schema.metadata or {}),
    )
    for column in (*found.all, *filter(None, (source.key, source.split))):
        if column not in schema.names:
            known = (*schema.names, *(config.MODALITIES if column == source.modality else ()))
            hint = did_you_mean(column, known)
            raise DataError(f"{file} has no column {column!r}.{hint}", f"there are: {listed}")
        if (times := schema.names.count(column)) > 1:
            raise DataError(f"{file} has {times} columns that are called {column!r}", "rename one of them")
    if image not in pictures:
        raise DataError(f"{file}: column {image!r} is {schema.field(image).type}", "pictures are bytes")
    if not (caption or found.report or source.label_captions):
        raise DataError(f"{file} has no column of captions", f"--set caption=COLUMN, one of: {listed}")
    return found


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (c.strip() for c in text.split(","))))


@functools.lru_cache(4)
def _label_captions(path: str, made: str) -> Mapping[label_captions.Key, label_captions.Label]:
    return label_captions.read(Path(path)).by_key()


def _split(value: Any, name: str) -> str:
    """A row's split.

    Example:
        >>> _split(None, "data/holdout-00000-of-00002.parquet"), _split("validation", "x.parquet"), _split(None, "x")
        ('holdout', 'val', 'train')
    """
    if value is None:
        found = _SHARD.findall(name) or _SPLIT.findall(name)
        value = found[-1] if found else "train"
    text = str(value).strip().lower()
    return _SPLITS.get(text, text)


def _bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        named = isinstance(value, dict) and value.get("path")
        raise Reject("missing", "the table has the picture's path only" if named else "no picture")
    if len(data) > limits.MAX_FILE_BYTES:
        raise Reject("too_large", f"the picture has more than {limits.MAX_FILE_BYTES} bytes")
    return data


def _texts(value: Any, column: str) -> Iterator[str]:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise Reject("annotation", f"column {column} holds {type(text).__name__}, no text")


def _values(value: Any, names: tuple[str, ...] | None) -> Iterator[str]:
    """Cells as text without the empty ones; numbers of classes by name, -1 is none."""
    for one in value if isinstance(value, list) else [value]:
        if names and isinstance(one, int) and not isinstance(one, bool):
            if one >= len(names):
                raise Reject("annotation", f"class {one} of {len(names)}")
            if one >= 0:
                yield names[one]
        elif (
            one is not None and one == one and str(one).strip()
        ):  # NaN, an empty cell of numbers, is not itself
            yield str(one).strip()


def _findings(value: Any, names: tuple[str, ...] | None) -> list[str]:
    return [part for text in _values(value, names) for part in text.split(";")]
