"""Tensors of a PyTorch file as strided views of its storages, with every offset, size and stride checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from unimed_jax.convert import pickle_reader, torch_names
from unimed_jax.convert.mapped import MAX_BYTES, MAX_DIMS, FileMap, shown
from unimed_jax.convert.pickle_reader import Known
from unimed_jax.convert.plain import Invalid

MAX_TENSORS = 100_000
MAX_SHARED = 16  # tensors may together show this many times the file's size
_PLACEHOLDER = np.zeros(())


def _refuse_metadata(rest: list) -> None:
    """Refuses what changes a tensor's values beside its storage: torch's bits for minus and for complex conjugate."""
    match rest:
        case [] | [None]:
            return
        case [dict(metadata)]:
            said = [k for k, v in metadata.items() if k not in ("neg", "conj") or v is not False]
        case _:
            raise Invalid("a tensor with more arguments than torch writes")
    if said:
        raise Invalid(f"a tensor's values are not those of its storage: {shown(said[0])} is set")


class _Storage(pickle_reader.Shell):
    """A flat run of numbers in the file."""

    name = "a storage"
    __slots__ = ("dtype", "nbytes", "start")

    def __init__(self, start: int, nbytes: int, dtype: np.dtype):
        self.start, self.nbytes, self.dtype = start, nbytes, dtype

    def build(self, state: Any) -> None:
        raise Invalid("a storage has a state")


class Builder:
    """What `pickle_reader.load` needs to make the tensors of one file.

    Args:
        file: holds the storages.
        place: first byte of the storage with this key and number of bytes; raises Invalid when there is none. None:
            only checks, tensors are placeholders.
        script: whether the names of a TorchScript archive are allowed.
    """

    def __init__(self, file: FileMap, place: Callable[[str, int], int] | None, *, script: bool = False):
        self.file, self.place, self.script = file, place, script
        self.left = MAX_SHARED * file.size  # bytes that tensors may still show
        self.tensors_left = MAX_TENSORS
        self.seen: dict[str, int] = {}  # bytes of each storage named so far
        self.known: dict[str, Any] = {**torch_names.COMMON, **{n: Known(n) for n in torch_names.STORAGES}}
        self.known |= {
            f"torch._utils.{n}": Known(f"torch._utils.{n}", c) for n, c in self._rebuilders().items()
        }
        if script:
            self.known |= torch_names.SCRIPT

    def find(self, name: str) -> Any:
        """What a name stands for; None when it is not allowed."""
        if self.script and name.startswith("__torch__."):
            return Known(name, new=True)
        return self.known.get(name)

    def storage(self, pid: Any) -> _Storage:
        """The storage that a persistent id names: ("storage", type, key, location, number of elements).

        Raises:
            Invalid: when it names none, or one of another size.
        """
        match pid:
            # Types first: comparing with an array is no yes or no.
            case (str(tag), Known(name=kind), str(key), str() | None, int(count), *rest) if (
                tag == "storage"
                and kind in torch_names.STORAGES
                and len(rest) <= 1
                and all(r is None for r in rest)
            ):
                pass
            case _:
                raise Invalid("a persistent id names no storage")
        dtype = torch_names.STORAGES[kind]
        nbytes = count * dtype.itemsize
        if not 0 <= nbytes <= self.file.size:
            raise Invalid(f"storage {shown(key)} cannot have {shown(count)} values")
        if self.seen.setdefault(key, nbytes) != nbytes:
            raise Invalid(f"storage {shown(key)} has two sizes")
        return _Storage(self.place(key, nbytes) if self.place else 0, nbytes, dtype)

    def _rebuilders(self) -> dict[str, Any]:
        return {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_v3,
            "_rebuild_parameter": torch_names.parameter,
            "_rebuild_parameter_with_state": torch_names.parameter,
        }

    def _tensor(self, args: tuple) -> np.ndarray:
        match args:
            case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest):
                _refuse_metadata(rest[2:])  # after requires_grad and hooks
                return self._view(storage, storage.dtype, offset, shape, strides)
        raise Invalid("a tensor without storage, offset, size and stride")

    def _tensor_v3(self, args: tuple) -> np.ndarray:
        match args:
            case (_Storage() as s, int(offset), tuple(shape), tuple(strides), _, _, str(name), *rest) if (
                name in torch_names.DTYPES
            ):
                _refuse_metadata(rest)
                return self._view(s, torch_names.DTYPES[name], offset, shape, strides)
        raise Invalid("a tensor without storage, offset, size, stride and type")

    def _view(self, s: _Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
        """The strided view that torch would make; offset and strides count elements."""
        if (
            len(shape) != len(strides)
            or len(shape) > MAX_DIMS
            or not torch_names.are_sizes((offset, *shape, *strides))
        ):
            raise Invalid(f"a tensor has no possible shape: {shown((offset, shape, strides))}")
        if math.prod(n for n in shape if n) * dtype.itemsize > MAX_BYTES:
            raise Invalid(f"a tensor is impossibly large: {shown(shape)}")
        count, stored = math.prod(shape), s.nbytes // dtype.itemsize
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if offset > stored or (count and last >= stored):
            raise Invalid(f"a tensor {shown(shape)} reaches outside its storage of {stored} values")
        if count > stored:
            raise Invalid(f"a tensor {shown(shape)} repeats a storage of {stored} values")
        self.tensors_left -= 1
        if self.tensors_left < 0:
            raise Invalid(f"it has more than {MAX_TENSORS} tensors")
        self.left -= count * dtype.itemsize
        if self.left < 0:
            raise Invalid(f"its tensors together have more than {MAX_SHARED} times the bytes of the file")
        if self.place is None:
            return _PLACEHOLDER
        step = dtype.itemsize  # the stride of an axis of length 1 means nothing and may be anything
        steps = tuple(step * (stride if n > 1 else 1) for n, stride in zip(shape, strides, strict=True))
        return self.file.view(s.start + offset * step, dtype, shape, steps)
