"""MedMNIST's 2D sets, out of the `.npz` files as their authors publish them (data/medmnist.py).

Pictures become PNG, which loses nothing. A split is read in its own order, so no more than a few pictures are held,
however large the file is; training shuffles the records anyway.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unimed_jax.data import label_captions, medmnist
from unimed_jax.data.record import Caption, Example
from unimed_jax.data.sources.annotation_files import path_fault
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError

_NONE = "no finding"  # of a picture without any: as tables of captions and the evaluator's tasks call it
_open = threading.local()  # the array that this thread reads from: a shard's pictures lie side by side


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One picture; `made` changes when the pictures of its split do."""

    key: str
    split: str
    file: str  # below raw
    index: int
    captions: tuple[Caption, ...]
    labels: tuple[str, ...]
    modality: str
    made: str

    @property
    def run(self) -> str:
        """Pictures of one array are read in its order."""
        return f"{self.file}/{self.split}"

    @property
    def where(self) -> str:
        """Where the picture stands."""
        return f"{self.file} {self.split} row {self.index}"


@dataclass(slots=True, frozen=True, kw_only=True)
class MedMnist:
    """The record source `medmnist`.

    Args:
        raw: an `.npz`, or a folder of them.
        name: of the source.
        set: which of MedMNIST's sets a file is whose name does not say it.
        label_captions: file of captions by label, used instead of templates; its findings are the names of the classes.
        licence: a note on the licence; default: each set's own.
        description: for the data card.
    """

    raw: Path = field(repr=False)
    name: str = "medmnist"
    set: str = ""
    label_captions: str = field(default="", repr=False)
    licence: str = "by set: CC BY 4.0, DermaMNIST CC BY-NC 4.0"
    description: str = "2D sets of MedMNIST v2 (Yang et al., Scientific Data 10:41, 2023)."

    def items(self) -> Sequence[Row]:
        """Every picture of every file and split, once all files were found whole.

        Raises:
            DataError: for a file that is none of the 2D sets, damaged or badly named, labels that do not fit the set,
                or classes without captions in `label_captions`.
        """
        rows: list[Row] = []
        for file in self._files():
            rows += self._rows(file)
        return rows

    def example(self, item: Row) -> Example:
        """Reads one picture.

        Raises:
            Reject: when the array ends before it.
        """
        raw = Path(self.raw)
        try:
            pixels = _pictures(raw if raw.is_file() else raw / item.file, item)[item.index]
        except EOFError as e:
            raise Reject("unreadable", str(e)) from e
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return Example(
            key=item.key,
            image=out.getvalue(),
            captions=item.captions,
            labels=item.labels,
            modality=item.modality,
            split=item.split,
        )

    def _files(self) -> list[Path]:
        raw = Path(self.raw)
        if raw.is_file():
            return [raw]
        if not raw.is_dir():
            raise DataError(f"no folder or .npz {raw}", "--raw names it")
        found = sorted(p for p in raw.iterdir() if p.suffix == ".npz")
        if not found:
            raise DataError(f"no .npz in {raw}", "medmnist.com says where the files are")
        return found

    def _rows(self, file: Path) -> Iterator[Row]:
        if fault := path_fault(file.name):
            raise DataError(f"the file {file.name!a}: {fault}", "rename it")
        name = self.set or medmnist.name_of(file)
        about = medmnist.known(name, f"{name!r}" if self.set else str(file))
        labelled = None
        if self.label_captions:
            labelled = label_captions.read(Path(self.label_captions)).by_key()
            if not about.modality:
                raise DataError(
                    f"{name} has none of the six modalities, so captions by label have no place for it",
                    "leave label_captions out: templates describe it",
                )
        seen: dict[tuple[int, ...], tuple[tuple[Caption, ...], tuple[str, ...]]] = {}
        for split in medmnist.SPLITS:
            labels = medmnist.labels(file, split, about)
            shape, checksum = medmnist.check_pictures(file, split)
            if shape[0] != len(labels):
                raise DataError(f"{file}: {split} has {shape[0]} pictures and {len(labels)} labels")
            for i, row in enumerate(labels.tolist()):
                values = tuple(row)
                if values not in seen:  # one object each: a set has few different ones
                    seen[values] = _said(name, about, values, labelled, f"{file.name} {split} row {i}")
                captions, named = seen[values]
                yield Row(
                    key=f"{file.stem}/{split}/{i:06d}",
                    split=split,
                    file=file.name,
                    index=i,
                    captions=captions,
                    labels=named,
                    modality=about.modality,
                    made=checksum,
                )


def _said(
    name: str,
    about: medmnist.MedSet,
    values: tuple[int, ...],
    labelled: Mapping[label_captions.Key, label_captions.Label] | None,
    where: str,
) -> tuple[tuple[Caption, ...], tuple[str, ...]]:
    """The captions and labels of a picture with these labels."""
    classes = list(about.classes)
    chosen = values if not about.multilabel else [k for k, value in enumerate(values) if value]
    shown = [classes[k] for k in chosen]
    task = "finding" if about.multilabel else name
    named = tuple(f"{task}:{c}" for c in shown or [_NONE])
    if labelled is None:
        return tuple(Caption(text=t, kind="template") for t in medmnist.sentences(about, shown)), named
    found = label_captions.choose(labelled, about.modality, about.anatomy, shown or [_NONE], where)
    return label_captions.texts(found), named


def _pictures(file: Path, item: Row) -> medmnist.Pictures:
    key = (str(file), item.split, item.made)
    if getattr(_open, "key", None) != key:
        if hasattr(_open, "pictures"):
            _open.pictures.close()
        _open.pictures, _open.key = medmnist.Pictures(file, item.split), key
    return _open.pictures
