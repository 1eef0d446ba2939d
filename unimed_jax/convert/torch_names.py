"""The names that PyTorch checkpoints may use, and what each stands for here: plain values, never torch's code."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from unimed_jax.convert import pickle_reader
from unimed_jax.convert.mapped import MAX_BYTES, shown
from unimed_jax.convert.pickle_reader import Known
from unimed_jax.convert.plain import Invalid

STORAGES: dict[str, np.dtype] = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Double": "<f8", "Long": "<i8", "Int": "<i4",
        "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?", "Untyped": "u1",
    }.items()
} | {"torch.storage.UntypedStorage": np.dtype("u1")}  # fmt: skip
DTYPES: dict[str, np.dtype] = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        "float32": "<f4", "float": "<f4", "float16": "<f2", "half": "<f2", "bfloat16": ml_dtypes.bfloat16,
        "float64": "<f8", "double": "<f8", "int64": "<i8", "long": "<i8", "int32": "<i4", "int": "<i4", "int16": "<i2",
        "short": "<i2", "int8": "i1", "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "bool": "?",
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    }.items()
}  # fmt: skip


class _NumpyType(pickle_reader.Shell):
    """A numpy.dtype, of a plain number in little-endian order."""

    name = "numpy.dtype"
    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", "|", "="):
            raise Invalid("a number is not in little-endian order")


def are_sizes(values: tuple) -> bool:
    """Whether all values can be sizes, offsets or strides."""
    return all(type(v) is int and 0 <= v <= MAX_BYTES for v in values)


def parameter(args: tuple) -> np.ndarray:
    """The tensor below a parameter.

    Raises:
        Invalid: when there is none.
    """
    match args:
        case (np.ndarray() as data, *_):
            return data
    raise Invalid("a parameter without a tensor")


def _with_type(args: tuple) -> np.ndarray:
    """A tensor with Python attributes, which are left out: (function, type, arguments, attributes)."""
    match args:
        case (Known(call=call, name=name), Known(), tuple(inner), _) if call and name.startswith(
            "torch._utils."
        ):
            return call(inner)
    raise Invalid("a tensor of an unknown type")


def _ordered_dict(args: tuple) -> dict:
    made: dict = {}
    match args:
        case ():
            return made
        case (list(pairs),) if all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            pickle_reader.set_items(made, [x for p in pairs for x in p])
            return made
    raise Invalid("an OrderedDict of no pairs")


def _size(args: tuple) -> tuple:
    match args:
        case (tuple(values),) if are_sizes(values):
            return values
    raise Invalid("a torch.Size of no sizes")


def _device(args: tuple) -> str:
    if 1 <= len(args) <= 2 and all(isinstance(a, (str, int)) for a in args):
        return ":".join(str(a) for a in args)
    raise Invalid("a torch.device of no name")


def _encode(args: tuple) -> bytes:
    match args:
        case (str(text), str(codec)) if codec in ("latin1", "latin-1"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                pass
    raise Invalid("bytes that are no latin1")


def _numpy_type(args: tuple) -> _NumpyType:
    match args:
        case (str(code), *_) if re.fullmatch(r"f[248]|[iu][1248]|b1", code):
            return _NumpyType(np.dtype(code))
    raise Invalid(f"a numpy type that is no number: {shown(args)}")


def _numpy_scalar(args: tuple) -> int | float | bool:
    match args:
        case (_NumpyType(dtype=dtype), bytes(raw)) if len(raw) == dtype.itemsize:
            return np.frombuffer(raw, dtype)[0].item()
    raise Invalid("a numpy number without its bytes")


def _listed(args: tuple) -> list:
    match args:
        case (list(values),):
            return values
    raise Invalid("a list without values")


def _first(args: tuple) -> Any:
    if len(args) != 2:
        raise Invalid("a value without its type")
    return args[0]


_CALLS: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._tensor._rebuild_from_type_v2": _with_type,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
COMMON: dict[str, Any] = (
    {name: Known(name, call) for name, call in _CALLS.items()}
    | {name: Known(name) for name in _TYPES}
    | {name: name for name in DTYPES}
)
SCRIPT: dict[str, Any] = {
    f"torch.jit._pickle.{name}": Known(f"torch.jit._pickle.{name}", call)
    for name, call in {
        "build_intlist": _listed,
        "build_doublelist": _listed,
        "build_boollist": _listed,
        "build_tensorlist": _listed,
        "restore_type_tag": _first,
    }.items()
}
