"""PyTorch's zip checkpoints and TorchScript archives, read without torch and without running anything in them.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html. `NAME/data.pkl` describes the objects,
`NAME/data/N` holds one storage each, uncompressed; a tensor is a strided view of a storage. Code in TorchScript
archives is never looked at: their modules are opened as tables of attributes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from unimed_jax.convert import pickle_reader, torch_legacy, zip_directory
from unimed_jax.convert.mapped import FileMap, Mapped, shown
from unimed_jax.convert.pickle_reader import MAX_PICKLE
from unimed_jax.convert.plain import Invalid
from unimed_jax.convert.torch_tensors import Builder
from unimed_jax.errors import DataError

RESAVE = "torch.save(torch.load(f, weights_only=True), g) writes the current format"
_CHUNK = 2**24
MAX_NAME = (
    300  # characters of a tensor's name: many tensors below one long key must not each hold a copy of it
)
_KEY = re.compile(r"[0-9A-Za-z_]{1,64}")

# What a file that is no torch archive begins with (at which byte), and what to say of it.
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x93NUMPY", "is a NumPy file, not a checkpoint", "give the checkpoint"),
    (257, b"ustar", "is a tar archive, torch's format before 0.2", RESAVE),
    (0, b"\x1f\x8b", "is packed with gzip", "unpack it first"),
    (0, b"\x89HDF", "is an HDF5 file", "give a PyTorch or safetensors file"),
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the weights", "git lfs pull fetches the file"),
    (0, b"<", "is a web page, not the weights", "download the file itself"),
    (8, b"{", "is a safetensors file by another name", "rename it to end in .safetensors"),
)


class TorchFile:
    """One opened checkpoint.

    Args:
        path: the file.
        kind: "zip" for what torch.save writes, "legacy" for what it wrote before torch 1.6, "torchscript" for what
            torch.jit.save writes.
        tree: its content: dict, list, tuple, str, bytes, int, float, bool, None and read-only arrays.
        file: the map below the arrays.
    """

    def __init__(self, path: Path, kind: str, tree: Any, file: FileMap):
        self.path, self.kind, self.tree, self._file = path, kind, tree, file

    def tensors(self, tree: Any = None) -> Mapped:
        """All arrays below nested dicts, by their keys joined with "."; of a TorchScript module: its state dict.

        What is no array is named in `left_out`; of a module, whose plain attributes are no weights, only lists of
        arrays.

        Args:
            tree: a part of `self.tree`; all of it when None.

        Raises:
            DataError: when two of them get the same name, or one of more than 300 characters.
        """
        found: dict[str, np.ndarray] = {}
        others: list[str] = []
        for name, value in _named(self.tree if tree is None else tree, ""):
            if len(name) > MAX_NAME:
                raise DataError(f"{self.path} holds a name of {len(name)} characters: {shown(name)}", RESAVE)
            if not isinstance(value, np.ndarray):
                if self.kind != "torchscript" or _holds_array(value):
                    others.append(shown(name).strip("'"))
                continue
            if name in found:
                raise DataError(f"{self.path} holds {shown(name)} twice", "save it again")
            found[name] = value
        return Mapped(self.path, found, [self._file], left_out=others)

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        self._file.release()


def _named(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Everything below nested dicts that is no dict; and a dict whose own name is too long already, not its content."""
    if not isinstance(tree, dict) or len(prefix) > MAX_NAME + 1:
        yield prefix.removesuffix("."), tree
        return
    for key, value in tree.items():
        yield from _named(value, f"{prefix}{key}.")


def _holds_array(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_array, value.values() if isinstance(value, dict) else value))
    return isinstance(value, np.ndarray)


def open_torch(path: str | Path, *, verify_crc: bool = False) -> TorchFile:
    """Opens a checkpoint; nothing but its description is read until an array is used.

    Args:
        path: `.pt`, `.pth`, `.bin`: what torch.save or torch.jit.save wrote.
        verify_crc: also compare every storage with its checksum, which reads the whole file.

    Raises:
        DataError: for another format, damage, or content that is no plain checkpoint: named, never executed.
    """
    file = FileMap(path)
    if torch_legacy.magic_of(file):
        return TorchFile(file.path, "legacy", torch_legacy.read(file), file)
    if file.bytes(0, 4) != b"PK\3\4":
        _refuse_other(file)
    records = zip_directory.read(file)
    found = [n for n in records if n == "data.pkl" or (n.endswith("/data.pkl") and n.count("/") == 1)]
    if len(found) != 1:
        raise DataError(
            f"{path} is a zip archive without one data.pkl, not a PyTorch checkpoint", "give the checkpoint"
        )
    archive = _Archive(file, records, found[0].removesuffix("data.pkl"), verify_crc)
    archive.check_layout()
    data = archive.small("data.pkl", MAX_PICKLE)
    tree = pickle_reader.load(data, str(path), archive.builder.find, archive.builder.storage)
    return TorchFile(file.path, archive.kind, tree, file)


def _refuse_other(file: FileMap) -> NoReturn:
    for at, magic, words, remedy in _OTHERS:
        if file.bytes(at, len(magic)) == magic:
            raise DataError(f"{file.path} {words}", remedy)
    if file.bytes(0, 1) == b"\x80" and file.size <= MAX_PICKLE:
        # A bare pickle is refused in any case; a name in it that could do harm is worth saying.
        pickle_reader.load(file.bytes(0, file.size), str(file.path), Builder(file, None).find)
    if file.bytes(0, 1) == b"\x80":
        raise DataError(f"{file.path} is a bare pickle, not a PyTorch checkpoint", RESAVE)
    raise DataError(f"{file.path} is no PyTorch checkpoint", "give a .pt, .pth, .bin or .safetensors file")


class _Archive:
    """The records of one archive, and the names that its data.pkl may use."""

    def __init__(
        self, file: FileMap, records: dict[str, zip_directory.Record], prefix: str, verify_crc: bool
    ):
        self.file, self.records, self.prefix, self.verify_crc = file, records, prefix, verify_crc
        script = f"{prefix}constants.pkl" in records or any(n.startswith(f"{prefix}code/") for n in records)
        self.kind = "torchscript" if script else "zip"
        self.checked: set[str] = set()
        self.builder = Builder(file, self.place, script=script)

    def small(self, name: str, limit: int) -> bytes:
        """The whole of a record that is read at once."""
        record = self.records[self.prefix + name]
        self._check_stored(record)
        if record.size > limit:
            raise DataError(f"{self.file.path}: {name} of {record.size} bytes is over the limit of {limit}")
        data = self.file.bytes(record.start, record.size)
        if record.crc and zlib.crc32(data) != record.crc:  # torch can be told to write none: 0
            self._wrong_crc(record)
        return data

    def _check_stored(self, record: zip_directory.Record) -> None:
        if record.method != 0:
            raise DataError(
                f"{self.file.path}: {shown(record.name)} is compressed, torch stores it plainly", RESAVE
            )

    def _wrong_crc(self, record: zip_directory.Record) -> NoReturn:
        raise DataError(
            f"{self.file.path}: {shown(record.name)} does not match its checksum", "download or save it again"
        )

    def check_layout(self) -> None:
        """Refuses what this program cannot read rightly: other byte orders, unknown versions."""
        order = self.small("byteorder", 16) if f"{self.prefix}byteorder" in self.records else b"little"
        if order != b"little":
            raise DataError(
                f"{self.file.path} has byte order {shown(order)}, not little", "save it on another machine"
            )
        version = self.small("version", 16) if f"{self.prefix}version" in self.records else b"3"
        if not version.strip().isdigit():
            raise DataError(f"{self.file.path} has no readable version: {shown(version)}", "save it again")

    def place(self, key: str, nbytes: int) -> int:
        """Where a storage begins."""
        record = self.records.get(f"{self.prefix}data/{key}") if _KEY.fullmatch(key) else None
        if record is None:
            raise Invalid(f"there is no storage {shown(key)}")
        self._check_stored(record)
        if nbytes != record.size:
            raise Invalid(f"storage {shown(key)} has {record.size} bytes, not {nbytes}")
        if self.verify_crc and key not in self.checked:
            self._verify(record)
            self.checked.add(key)
        return record.start

    def _verify(self, record: zip_directory.Record) -> None:
        crc = 0
        for at in range(record.start, record.start + record.size, _CHUNK):
            crc = zlib.crc32(self.file.bytes(at, min(_CHUNK, record.start + record.size - at)), crc)
            self.file.release()
        if record.crc and crc != record.crc:
            self._wrong_crc(record)
