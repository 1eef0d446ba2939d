"""What torch.save wrote before version 1.6: four pickles in a row, then the storages, one after the other.

Many older Hugging Face `pytorch_model.bin` files are of this kind. There are no checksums.
"""

from __future__ import annotations

from typing import Any, NoReturn

from unimed_jax.convert import pickle_reader
from unimed_jax.convert.mapped import FileMap, shown
from unimed_jax.convert.pickle_reader import MAX_PICKLE
from unimed_jax.convert.plain import Invalid
from unimed_jax.convert.torch_tensors import Builder
from unimed_jax.errors import DataError

_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_FRAME = b"\x95" + len(_NUMBER).to_bytes(8, "little")
# The first of the pickles, in each protocol that can be asked for; torch's own choice is 2.
MAGICS = (
    b"\x80\x02" + _NUMBER,
    b"\x80\x03" + _NUMBER,
    b"\x80\x04" + _FRAME + _NUMBER,
    b"\x80\x05" + _FRAME + _NUMBER,
)
_VERSION = 1001
_COUNT = 8  # bytes before each storage: its number of values


def magic_of(file: FileMap) -> bytes:
    """What the file begins with when it is of this kind; empty when it is another."""
    return next((m for m in MAGICS if file.bytes(0, len(m)) == m), b"")


def read(file: FileMap) -> Any:
    """The content: as `torch_zip.TorchFile.tree`.

    Raises:
        DataError: for damage, or content that is no plain checkpoint: named, never executed.
    """
    data, where = file.bytes(0, MAX_PICKLE), str(file.path)
    version, at = pickle_reader.load_first(data, where, {}.get, start=len(magic_of(file)))
    system, body = pickle_reader.load_first(data, where, {}.get, start=at)
    if version != _VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        _refuse(file, f"version {shown(version)} in byte order {shown(system)}")
    # The storages come last: a first pass learns their sizes, the second one makes the views.
    dry = Builder(file, None)
    _, at = pickle_reader.load_first(data, where, dry.find, dry.storage, start=body)
    keys, at = pickle_reader.load_first(data, where, {}.get, start=at)
    places = _places(file, keys, dry.seen, at)

    def place(key: str, nbytes: int) -> int:
        if key not in places:
            raise Invalid(f"there is no storage {shown(key)}")
        return places[key]

    builder = Builder(file, place)
    return pickle_reader.load_first(data, where, builder.find, builder.storage, start=body)[0]


def _refuse(file: FileMap, why: str) -> NoReturn:
    raise DataError(f"{file.path} is no readable checkpoint: {why}", "download or save it again")


def _places(file: FileMap, keys: Any, sizes: dict[str, int], at: int) -> dict[str, int]:
    """First byte of every storage; together they fill the rest of the file exactly."""
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or set(keys) != set(sizes):
        _refuse(file, "its list of storages is not that of its tensors")
    if len(keys) != len(sizes):
        _refuse(file, "it lists a storage twice")
    places: dict[str, int] = {}
    for key in keys:
        count, nbytes = int.from_bytes(file.bytes(at, _COUNT), "little"), sizes[key]
        if (count == 0) != (nbytes == 0) or (
            count and (nbytes % count or nbytes // count not in (1, 2, 4, 8))
        ):
            _refuse(file, f"storage {shown(key)} has {count} values in {nbytes} bytes")
        places[key] = at + _COUNT
        at += _COUNT + nbytes
    if at != file.size:
        _refuse(file, f"its storages end at byte {at} of {file.size}")
    return places
