"""The zip archive around a checkpoint: every lie in it is found before anything is believed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import archive, integer, storage, table, tensor, text

from unimed_jax.convert import torch_tensors, torch_zip, zip_directory
from unimed_jax.convert.torch_zip import open_torch
from unimed_jax.errors import DataError


def refusal(path: Path, *words: str) -> str:
    return hostile.refusal(open_torch, path, *words)


def good(tmp_path: Path) -> bytearray:
    return bytearray(archive(tmp_path / "good.pt", table(w=tensor())).read_bytes())


def changed(tmp_path: Path, at: int, form: str, value: int) -> Path:
    raw = good(tmp_path)
    struct.pack_into(form, raw, at, value)
    (tmp_path / "bad.pt").write_bytes(raw)
    return tmp_path / "bad.pt"


def central(tmp_path: Path, record: str = "archive/data/0") -> int:
    """Where the directory's entry of a record begins."""
    return good(tmp_path).rindex(record.encode()) - 46


def local(tmp_path: Path, record: str = "archive/data/0") -> int:
    return good(tmp_path).index(record.encode()) - 30


def test_the_untouched_archive_opens(tmp_path):
    assert open_torch(changed(tmp_path, 0, "<4s", b"PK\3\4")).tree["w"].tolist() == [1, 2, 3, 4]


CENTRAL = {
    "encrypted": (8, "<H", 1, "encrypted"),
    "strongly encrypted": (8, "<H", 1 << 6, "encrypted"),
    "compressed": (10, "<H", 8, "not where its directory says"),
    "another checksum": (16, "<I", 5, "two checksums"),
    "smaller than it is": (20, "<I", 12, "stored in 12 bytes"),
    "larger than the file": (20, "<I", 10**6, "stored in"),
    "on another disk": (34, "<H", 1, "several parts"),
    "outside the file": (42, "<I", 10**6, "outside the file"),
    "in the directory": (42, "<I", 330, "not where"),
    "over another record": (42, "<I", 0, "not where"),
    "64 bits but none there": (20, "<I", 0xFFFFFFFF, "64-bit size"),
    "name longer than the directory": (28, "<H", 60000, "directory is damaged"),
    "no name": (28, "<H", 0, "directory is damaged"),
    "no entry": (0, "<4s", b"PK\1\3", "directory is damaged"),
    "name without end": (46, "<4s", b"\xff\xfe..", "name cannot be read"),
    "name with a path": (46, "<4s", b"../a", "no plain name"),
    "an absolute name": (46, "<4s", b"/etc", "no plain name"),
}


@pytest.mark.parametrize("lie", CENTRAL)
def test_a_lie_in_the_directory(tmp_path, lie):
    at, form, value, word = CENTRAL[lie]
    refusal(changed(tmp_path, central(tmp_path) + at, form, value), word)


LOCAL = {
    "encrypted": (6, "<H", 1, "encrypted"),
    "compressed": (8, "<H", 8, "not where"),
    "another checksum": (14, "<I", 5, "two checksums"),
    "another size": (18, "<I", 12, "two sizes"),
    "another full size": (22, "<I", 12, "two sizes"),
    "another name": (30, "<4s", b"evil", "not where"),
    "longer extra": (28, "<H", 60000, "runs past the end"),
    "extra over the next record": (28, "<H", 30, "overlaps"),
}


@pytest.mark.parametrize("lie", LOCAL)
def test_a_lie_in_a_local_header(tmp_path, lie):
    at, form, value, word = LOCAL[lie]
    refusal(changed(tmp_path, local(tmp_path) + at, form, value), word)


END = {
    "another disk": (4, "<H", 1, "several parts"),
    "one record fewer": (8, "<I", 0x00020002, "bytes follow the last record"),
    "one record more": (8, "<I", 0x00040004, "do not fit"),
    "65535 records": (8, "<I", 0xFFFFFFFF, "do not fit"),
    "another size": (12, "<I", 5, "does not end where"),
    "another start": (16, "<I", 5, "does not end where"),
    "a start outside": (16, "<I", 0xFFFFFFFF, "does not end where"),
    "a longer comment": (20, "<H", 5, "bytes follow its end"),
}


@pytest.mark.parametrize("lie", END)
def test_a_lie_at_the_end(tmp_path, lie):
    at, form, value, word = END[lie]
    refusal(changed(tmp_path, len(good(tmp_path)) - 22 + at, form, value), word)


def zip64(
    raw: bytes, *, records: int = 3, start: int | None = None, size: int | None = None, at: int | None = None
):
    """A plain archive with the 64-bit directory end that torch writes."""
    _, _, _, _, _, n_size, n_start, _ = struct.unpack("<4s4H2IH", raw[-22:])
    place = len(raw) - 22
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, 798, 45, 0, 0, records, records, n_size if size is None else size,
        n_start if start is None else start,
    )  # fmt: skip
    return raw[:-22] + end64 + struct.pack("<4sIQI", b"PK\6\7", 0, place if at is None else at, 1) + raw[-22:]


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        ({}, ""),
        ({"records": 2}, "disagree"),
        ({"records": 2**40}, "disagree"),
        ({"start": 5}, "disagree"),
        ({"size": 2**60}, "disagree"),
        ({"at": 2**60}, "not where it should be"),
        ({"at": 0}, "not where it should be"),
    ],
)
def test_the_64_bit_end(tmp_path, lie, word):
    path = tmp_path / "a.pt"
    path.write_bytes(zip64(bytes(good(tmp_path)), **lie))
    if word:
        refusal(path, word)
    else:
        assert open_torch(path).tree["w"].tolist() == [1, 2, 3, 4]


def test_two_records_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
        z.writestr("a/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            z.writestr("a/data.pkl", b"\x80\x02).")
    refusal(tmp_path / "a.pt", "'a/data.pkl' twice")


def test_two_data_pkl_and_none(tmp_path):
    for i, names in enumerate((["a/data.pkl", "b/data.pkl"], ["a/version"], ["a/b/data.pkl"])):
        with zipfile.ZipFile(tmp_path / f"{i}.pt", "w") as z:
            for n in names:
                z.writestr(n, b"\x80\x02N.")
        refusal(tmp_path / f"{i}.pt", "without one data.pkl")


def test_overlapping_records(tmp_path):
    """A record inside another: the trick of the zip bombs that name one run of bytes a thousand times."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as z:
        z.writestr("archive/data/1", b"\0" * 16)
    raw = bytearray(
        archive(
            tmp_path / "a.pt", table(w=tensor()), {"data/0": inner.getvalue(), "data/1": b"\0" * 16}
        ).read_bytes()
    )
    hidden, entry = raw.index(b"archive/data/1") - 30, raw.rindex(b"archive/data/1") - 46
    struct.pack_into("<I", raw, entry + 42, hidden)
    (tmp_path / "a.pt").write_bytes(raw)
    refusal(tmp_path / "a.pt", "overlaps another")


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "version"])
def test_compressed_records_are_refused_unread(tmp_path, record):
    path = archive(tmp_path / "a.pt", table(w=tensor()), compress=(record,))
    refusal(path, "is compressed", torch_zip.RESAVE)


def test_a_zip_bomb(tmp_path):
    """A few kilobytes that would unpack to a hundred megabytes."""
    n = 25_000_000
    bomb = {"data/0": b"\0" * 4 * n}
    body = table(w=tensor(storage(count=integer(n)), shape=(n,)))
    path = archive(tmp_path / "a.pt", body, bomb, compress=("data/0",))
    assert path.stat().st_size < 200_000
    refusal(path, "cannot have 25000000 values")


def test_checksums(tmp_path):
    raw = good(tmp_path)
    raw[raw.index(struct.pack("<4f", 1, 2, 3, 4))] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    open_torch(tmp_path / "a.pt")  # a pass over the whole file only when asked for
    with pytest.raises(DataError, match=r"a\.pt: 'archive/data/0' does not match its checksum"):
        open_torch(tmp_path / "a.pt", verify_crc=True)
    raw = good(tmp_path)
    raw[raw.index(b"_rebuild")] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    refusal(tmp_path / "a.pt", "data.pkl' does not match its checksum")


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ({"byteorder": b"big"}, "byte order b'big'"),
        ({"byteorder": b"x" * 99}, "over the limit"),
        ({"version": b"latest"}, "no readable version"),
    ],
)
def test_layouts_that_cannot_be_read(tmp_path, records, word):
    refusal(archive(tmp_path / "a.pt", table(w=tensor()), records), word)


def test_other_formats_are_named(tmp_path):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        t.addfile(tarfile.TarInfo("sys_info"))
    npy = io.BytesIO()
    np.save(npy, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    cases = {
        "pickle": (pickle.dumps({"w": [1, 2]}), "bare pickle"),
        "long pickle": (pickle.dumps({"w": "x" * 2**21}), "over the limit"),
        "object array": (npy.getvalue(), "NumPy"),
        "tar": (tar.getvalue(), "tar archive"),
        "gzip": (b"\x1f\x8b\x08" + b"\0" * 20, "gzip"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, "HDF5"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        "html": (b"<!doctype html><html></html>", "web page"),
        "safetensors": (struct.pack("<Q", 2) + b"{}", "rename"),
        "noise": (bytes(range(1, 200)), "no PyTorch checkpoint"),
        "one byte": (b"P", "no PyTorch checkpoint"),
        "empty": (b"", "is empty"),
        "cut": (bytes(good(tmp_path))[:-30], "cut short"),
        "prefixed": (b"PK\3\4" + bytes(good(tmp_path)), "does not end where"),
        "followed": (bytes(good(tmp_path)) + b"x", "bytes follow"),
    }
    for key, (content, word) in cases.items():
        (tmp_path / "a.pt").write_bytes(content)
        assert refusal(tmp_path / "a.pt", word), key
    refusal(tmp_path / "absent.pt", "does not exist")
    refusal(tmp_path, "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "no regular file")


def test_two_names_for_one_tensor(tmp_path):
    opened = open_torch(
        archive(tmp_path / "a.pt", b"}(" + text("a.b") + tensor() + text("a") + table(b=tensor()) + b"u")
    )
    with pytest.raises(DataError, match=r"holds 'a\.b' twice"):
        opened.tensors()


def test_too_many_records(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_directory, "MAX_RECORDS", 2)
    refusal(archive(tmp_path / "a.pt", table(w=tensor())), "3 records are over the limit")


def test_a_directory_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_directory, "MAX_DIRECTORY", 100)
    refusal(archive(tmp_path / "a.pt", table(w=tensor())), "directory of 183 bytes is over the limit")


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_tensors, "MAX_TENSORS", 2)
    refusal(archive(tmp_path / "a.pt", b"](" + tensor() * 3 + b"e"), "more than 2 tensors")
