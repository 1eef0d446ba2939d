"""safetensors files, one or sharded, checked more strictly than the format's own library does.

Format: https://huggingface.co/docs/safetensors. The library (0.8) accepts equal keys and any number of tensors.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from unimed_jax.convert import torch_zip
from unimed_jax.convert.mapped import MAX_BYTES, MAX_DIMS, FileMap, Mapped, shown
from unimed_jax.errors import DataError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_TENSORS = 100_000
MAX_MARKS = 2_000_000  # brackets and commas of a header: bounds what parsing it costs
MAX_INDEX = 32 * 2**20  # bytes of a *.index.json
MAX_SHARDS = 1000
_REMEDY = "download or save it again"
_FIELDS = {"dtype", "shape", "data_offsets"}
_SHARD_NAME = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin|pt|pth)")
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
        "U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F32": "<f4", "F64": "<f8",
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}  # fmt: skip


def open_safetensors(path: str | Path) -> Mapped:
    """The tensors of a safetensors file as read-only views in the file's own types.

    Raises:
        DataError: unless the file is complete and exactly what its header says: known types, sizes that agree, data
            without holes, overlaps or bytes left over, no name twice, at most 100 000 tensors.
    """
    file = FileMap(path)
    size = int.from_bytes(file.bytes(0, 8), "little")
    if file.size < 10 or size > file.size - 8:
        _refuse(path, f"its header should have {size} bytes, the file has {file.size}")
    if size > MAX_HEADER:
        _refuse(path, f"a header of {size} bytes is over the limit of {MAX_HEADER}")
    header = _header(path, file.bytes(8, size))
    metadata = _metadata(path, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        _refuse(path, f"{len(header)} tensors are over the limit of {MAX_TENSORS}")
    if not _is_text("".join([*header, *metadata, *metadata.values()])):
        _refuse(path, "its header holds half a character")
    start, views, spans = 8 + size, {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > file.size - start:
            _refuse(path, f"tensor {shown(name)} ends at byte {end} of {file.size - start}")
        spans.append((begin, end, name))
        views[name] = (start + begin, dtype, shape)
    _check_tiling(path, sorted(spans), file.size - start)
    return Mapped(path, {name: file.view(*v) for name, v in views.items()}, [file], metadata)


def read_with_metadata(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Copies of all tensors of a safetensors file, half-precision ones as float32, and its string metadata.

    Raises:
        DataError: as `open_safetensors`.
    """
    mapped = open_safetensors(path)
    halves = ("float16", "bfloat16")
    # Copies: whoever holds them outlives the file, which may be cut or overwritten in place.
    state = {k: np.array(v, np.float32 if v.dtype.name in halves else v.dtype) for k, v in mapped.items()}
    mapped.release()
    return state, mapped.metadata


def _refuse(path: str | Path, why: str) -> NoReturn:
    raise DataError(f"{path} is no complete safetensors file: {why}", _REMEDY)


def _header(path: str | Path, raw: bytes) -> dict[str, Any]:
    try:
        return _parse(raw)
    except _Duplicate as e:
        raise DataError(f"{path} holds {shown(e.args[0])} twice", "save it again") from None
    except ValueError as e:
        _refuse(path, f"its header cannot be read, {e}")


def _parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`, without equal keys, at a bounded price.

    Raises:
        _Duplicate: for equal keys.
        ValueError: for anything else that is wrong; the words say what.
    """
    if not raw.startswith(b"{"):
        raise ValueError("it is no JSON object")
    if sum(raw.count(c) for c in (b"{", b"[", b",")) > MAX_MARKS:
        raise ValueError(f"it has more than {MAX_MARKS} values")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 at byte {e.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"it is no JSON: {str(e)[:100]}") from None


class _Duplicate(Exception):
    """Not a ValueError: the parser's own errors are those."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _is_text(text: str) -> bool:
    """Whether it can be printed; JSON can spell half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _metadata(path: str | Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "its __metadata__ is no table of strings")
    return metadata


def _entry(path: str | Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape and byte range of one tensor, each checked by itself and against the others."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _refuse(path, f"tensor {shown(name)} needs exactly {', '.join(sorted(_FIELDS))}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"tensor {shown(name)} has the unknown type {shown(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        _refuse(path, f"tensor {shown(name)} has no possible shape: {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"tensor {shown(name)} has no possible place: {shown(offsets)}")
    # Zeros must not hide a product that overflows elsewhere.
    if math.prod(n for n in shape if n) * dtype.itemsize > MAX_BYTES:
        _refuse(path, f"tensor {shown(name)} is impossibly large: {shown(shape)}")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        _refuse(path, f"tensor {shown(name)} {shape} {entry['dtype']} cannot have {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_BYTES for v in values)


def _check_tiling(path: str | Path, spans: list[tuple[int, int, str]], size: int) -> None:
    reached = 0
    for begin, end, name in spans:
        if begin != reached:
            _refuse(path, f"{'a hole' if begin > reached else 'an overlap'} before tensor {shown(name)}")
        reached = end
    if reached != size:
        _refuse(path, f"{size - reached} bytes follow the last tensor")


def open_sharded(index_json: str | Path) -> Mapped:
    """The tensors that a `*.index.json` spreads over several files beside it.

    Raises:
        DataError: when the index is damaged, names a file elsewhere, or does not agree with the files.
    """
    index = Path(index_json)
    files = _weight_map(index)
    views: dict[str, np.ndarray] = {}
    shards: list[Mapped] = []
    for file in sorted(set(files.values())):
        path = index.parent / file
        shard = (
            open_safetensors(path) if file.endswith(".safetensors") else torch_zip.open_torch(path).tensors()
        )
        wanted = {name for name, f in files.items() if f == file}
        missing, extra = sorted(wanted - shard.keys()), sorted(shard.keys() - wanted)
        if missing or extra:
            raise DataError(
                f"{index} and {file} disagree: {len(missing)} tensors are missing, {len(extra)} unexpected, "
                f"first {shown([*missing, *extra][0])}",
                "download all files of one revision",
            )
        views.update(shard)
        shards.append(shard)
    left_out = [name for s in shards for name in s.left_out]
    return Mapped(index, views, [m for s in shards for m in s.maps], shards[0].metadata, left_out)


def _weight_map(index: Path) -> dict[str, str]:
    file = FileMap(index)
    if file.size > MAX_INDEX:
        raise DataError(f"{index} has {file.size} bytes, over the limit of {MAX_INDEX}", _REMEDY)
    try:
        files = _parse(file.bytes(0, file.size).strip()).get("weight_map")
    except _Duplicate as e:
        raise DataError(f"{index} holds {shown(e.args[0])} twice", _REMEDY) from None
    except ValueError as e:
        raise DataError(f"{index} is no readable index: {e}", _REMEDY) from None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise DataError(f"{index} has no weight_map from tensor names to files", _REMEDY)
    for name in sorted(set(files.values())):
        if not _SHARD_NAME.fullmatch(name):
            raise DataError(f"{index} names {shown(name)}, which is no file beside it", _REMEDY)
    if len(files) > MAX_TENSORS or len(set(files.values())) > MAX_SHARDS:
        raise DataError(f"{index} names too many tensors or files", _REMEDY)
    return files
