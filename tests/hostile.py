"""Checkpoints put together byte by byte, for what a well-meaning library would never write."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from unimed_jax.errors import DataError

PROTO, STOP, MARK = b"\x80\x02", b".", b"("


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def several(*parts: bytes) -> bytes:
    """TUPLE."""
    return MARK + b"".join(parts) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    """REDUCE."""
    return function + several(*args) + b"R"


def storage(
    key: bytes = text("0"), kind: bytes = name("torch", "FloatStorage"), count: bytes = integer(4)
) -> bytes:
    """BINPERSID of a storage of four floats."""
    return several(text("storage"), kind, key, text("cpu"), count) + b"Q"


def tensor(
    source: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    """torch._utils._rebuild_tensor_v2."""
    sizes = (several(*map(integer, v)) for v in (shape, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    function = name("torch._utils", "_rebuild_tensor_v2")
    return call(function, storage() if source is None else source, integer(offset), *sizes, b"\x89", hooks)


def table(**values: bytes) -> bytes:
    """EMPTY_DICT and SETITEMS."""
    return b"}" + MARK + b"".join(text(k) + v for k, v in values.items()) + b"u"


def archive(
    path: Path,
    body: bytes,
    records: Mapping[str, bytes] | None = None,
    *,
    compress: tuple[str, ...] = (),
    top: str = "archive/",
) -> Path:
    """A zip checkpoint with this data.pkl and, unless told otherwise, one storage of four floats."""
    content = {"data.pkl": PROTO + body + STOP, "data/0": struct.pack("<4f", 1, 2, 3, 4), "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as z:
        for key, value in {**content, **(records or {})}.items():
            z.writestr(top + key, value, zipfile.ZIP_DEFLATED if key in compress else zipfile.ZIP_STORED)
    return path


def rewritten(src: Path, dst: Path, change: Mapping[str, bytes | None]) -> Path:
    """A copy of a zip archive in which records are replaced, added or, with None, dropped."""
    with zipfile.ZipFile(src) as old, zipfile.ZipFile(dst, "w") as new:
        top = old.namelist()[0].split("/")[0] + "/"
        content = {n.removeprefix(top): old.read(n) for n in old.namelist()} | dict(change)
        for key, value in content.items():
            if value is not None:
                new.writestr(top + key, value)
    return dst


def safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    """A safetensors file with this header, whatever it says."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def refusal(read: Callable[[Path], Any], path: Path, *words: str) -> str:
    """The line with which a file is refused; it names the file."""
    with pytest.raises(DataError) as e:
        read(path)
    line = e.value.line()
    assert "\n" not in line
    assert len(line) < 600
    assert str(path) in line
    for word in words:
        assert word in line, line
    return line
