"""What nobody may run or believe: payloads, bombs and damage inside a checkpoint's data.pkl."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import hostile
import pytest
from hostile import MARK, archive, call, integer, name, several, storage, table, tensor, text

from unimed_jax.convert import pickle_reader
from unimed_jax.convert.torch_zip import open_torch


def refusal(path: Path, *words: str) -> str:
    return hostile.refusal(open_torch, path, *words)


GUARD = "marker"


class Payload:
    def __init__(self, function, *args):
        self.made = (function, args)

    def __reduce__(self):
        return self.made


def payloads(marker: Path) -> dict[str, bytes]:
    """Bodies of data.pkl that create the marker when run, and the name that must be refused."""
    shell, code = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    nested = call(name("builtins", "getattr"), name("builtins", "print"), text("__self__"))
    return {
        "os.system": call(name("os", "system"), shell),
        "posix.system": call(name("posix", "system"), shell),
        "builtins.eval": call(name("builtins", "eval"), code),
        "__builtin__.eval": call(name("__builtin__", "eval"), code),
        "builtins.exec": call(name("builtins", "exec"), code),
        "subprocess.Popen": call(
            name("subprocess", "Popen"), b"](" + text("touch") + text(str(marker)) + b"e"
        ),
        "builtins.getattr": call(nested, text("open")),
        "importlib.import_module": call(name("importlib", "import_module"), text("os")),
        "argparse.Namespace": name("argparse", "Namespace") + b")\x81" + table(a=b"K\1") + b"b",
        "runpy.run_path": call(name("runpy", "run_path"), text(str(marker))),
        "torch.load": call(name("torch", "load"), text(str(marker))),
        "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), b"C\1a"),
        "torch.hub.load": call(name("torch.hub", "load"), text("a/b"), text("c")),
        "torch._utils._rebuild_sparse_tensor": call(name("torch._utils", "_rebuild_sparse_tensor")),
        "numpy.load": call(name("numpy", "load"), text("x")),
        "numpy.core.multiarray._reconstruct": name("numpy.core.multiarray", "_reconstruct"),
        "collections.defaultdict": call(name("collections", "defaultdict"), name("os", "system")),
        "os.popen": text("os") + text("popen") + b"\x93" + several(shell) + b"R",  # STACK_GLOBAL
        "os.execv": MARK + b"U\1a" + b"ios\nexecv\n",  # INST
        "os.abort": MARK + name("os", "abort") + b"o",  # OBJ
        "__torch__.os.system": call(name("__torch__", "os.system"), shell),
        "torch.float32.__class__": name("torch.float32", "__class__"),
        "collections.OrderedDict.fromkeys": name("collections", "OrderedDict.fromkeys"),
    }


@pytest.mark.parametrize("wanted", payloads(Path(GUARD)))
def test_a_payload_is_named_and_never_run(tmp_path, wanted):
    marker = tmp_path / GUARD
    body = payloads(marker)[wanted]
    refusal(archive(tmp_path / "a.pt", body), f"contains {wanted}; not executed")
    refusal(archive(tmp_path / "b.pt", table(state_dict=table(w=tensor()), x=body)), f"contains {wanted};")
    assert not marker.exists()


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_payload_by_torch_save(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    marker = tmp_path / GUARD
    evil = {"a": torch.ones(2), "b": Payload(os.system, f"touch {marker}"), "c": Payload(eval, "1")}
    torch.save(evil, tmp_path / "a.pt", pickle_protocol=protocol)
    refusal(tmp_path / "a.pt", f"contains {os.system.__module__}.system; not executed")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(evil["b"], protocol))
    refusal(tmp_path / "raw.pkl", "system; not executed")
    torch.save(evil, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refusal(tmp_path / "old.pt", f"contains {os.system.__module__}.system; not executed")
    assert not marker.exists()


def test_hidden_names_stay_on_one_line(tmp_path):
    line = refusal(
        archive(tmp_path / "a.pt", text("os\nsystem") + text("\x1b[2J" + "x" * 300) + b"\x93"), "not executed"
    )
    assert line.isprintable()


OPCODES = {
    "EXT1": b"\x82\1", "EXT2": b"\x83\1\0", "EXT4": b"\x84\1\0\0\0", "PERSID": b"Pos.system\n", "INT": b"I1\n",
    "LONG": b"L1L\n", "STRING": b"S'os'\n", "UNICODE": b"Vos\n", "OBJ": MARK + b"o", "NEWOBJ_EX": b"))}\x92",
    "DUP": b"N2", "FROZENSET": MARK + b"\x91", "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40), "NEXT_BUFFER": b"\x97",
}  # fmt: skip


@pytest.mark.parametrize("opcode", OPCODES)
def test_instructions_that_are_not_needed(tmp_path, opcode):
    refusal(archive(tmp_path / "a.pt", OPCODES[opcode]), opcode)


def doubling(kind: bytes, n: int) -> bytes:
    """A value that holds its predecessor twice, n times."""
    out = b"]" if kind == b"l" else b")"
    for i in range(n):
        put = b"r" + struct.pack("<I", i)
        get = b"j" + struct.pack("<I", i)
        out += put + (b"0](" + get + get + b"e" if kind == b"l" else b"0" + get + get + b"\x86")
    return out


BOMBS = {
    "a million laughs in lists": (doubling(b"l", 60), "values"),
    "a million laughs in tuples": (doubling(b"t", 60), "values"),
    "laughs behind a bad call": (call(name("torch", "Size"), doubling(b"l", 60)), "torch.Size"),
    "laughs as a shape": (
        call(name("torch._utils", "_rebuild_tensor_v2"), storage(), b"K\0", doubling(b"t", 60), b")"),
        "no possible shape"),
    "laughs as a persistent id": (doubling(b"t", 60) + b"Q", "names no storage"),
    "laughs as a key": (b"}" + doubling(b"t", 60) + b"Ns", "as a key"),
    "nested lists": (b"]" * 200 + b"a" * 199, "nested"),
    "nested tuples": (b")" + b"\x85" * 100_000, "nested"),
    "levels that were seen before": (b"](" + b"]q\0" + b"](h\0eq\0" * 500 + b"e", "nested"),
    "a list in itself": (b"]q\0h\0a", "holds itself"),
    "a dict in itself": (b"}q\0" + text("a") + b"h\0s", "holds itself"),
    "a tuple in its own list": (b"]q\0" + b"h\0\x85ah\0" + b"\x86", ""),
    "one text a million times": (
        b"](" + name("_codecs", "encode") + b"q\0" + text("x" * 2**20) + b"q\1" + text("latin1") + b"q\2"
        + b"h\0h\1h\2\x86R" * 5000 + b"e", "too often"),
    "one table in many objects": (
        b"](" + b"}(" + b"".join(text(f"{i}") + b"N" for i in range(5000)) + b"uq\0" + name("__torch__", "A") + b"q\1"
        + b"h\1)\x81h\0b" * 5000 + b"e", "too often"),
    "a million instructions": (b"(" + b"N" * (pickle_reader.MAX_STEPS + 1) + b"t", "instructions"),
    "a text over the limit": (text("x" * (2**20 + 1)), "text of"),
    "a text longer than the file": (b"X\xff\xff\xff\x7f", "over the limit"),
    "a text of 2**63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f", "over the limit"),
    "a negative text": (b"T\xff\xff\xff\xff", "negative"),
    "an integer over the limit": (b"\x8a\x80" + b"\1" * 128, "integer of 128 bytes"),
    "an integer of 2 GB": (b"\x8b\xff\xff\xff\x7f", "integer of"),
    "a negative integer length": (b"\x8b\xff\xff\xff\xff", "integer of"),
    "a frame of 2**60 bytes": (b"\x95" + struct.pack("<Q", 2**60), "cut short"),
    "a name without end": (b"c" + b"x" * 5000, "no end"),
    "memo at 2**32": (b"Nr\xff\xff\xff\xff0j\xfe\xff\xff\xff", "not there yet"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_at_once(tmp_path, bomb):
    body, word = BOMBS[bomb]
    refusal(archive(tmp_path / "a.pt", body, {"constants.pkl": b""}), word)


def rebuilt(*args: bytes) -> bytes:
    return call(name("torch._utils", "_rebuild_tensor_v2"), *args)


DAMAGED = {
    "reaches past its storage": (tensor(shape=(5,)), "reaches outside"),
    "begins past its storage": (tensor(offset=5, shape=(0,)), "reaches outside"),
    "offset and size": (tensor(offset=2, shape=(3,)), "reaches outside"),
    "stride": (tensor(shape=(2, 2), strides=(3, 1)), "reaches outside"),
    "huge stride": (tensor(shape=(2,), strides=(2**61,)), "reaches outside"),
    "negative stride": (tensor(offset=3, strides=(-1,)), "no possible shape"),
    "negative offset": (tensor(offset=-1), "no possible shape"),
    "negative size": (tensor(shape=(-1,)), "no possible shape"),
    "overflowing sizes": (tensor(shape=(2**40, 2**40), strides=(0, 0)), "impossibly large"),
    "overflow behind a zero": (tensor(shape=(0, 2**40, 2**40), strides=(1, 1, 1)), "impossibly large"),
    "sizes of 2**200": (tensor(shape=(2**200,)), "no possible shape"),
    "repeats its storage": (tensor(shape=(1000, 4), strides=(0, 1)), "repeats"),
    "size and stride differ": (tensor(shape=(2, 2), strides=(1,)), "no possible shape"),
    "33 dimensions": (tensor(shape=(1,) * 33, strides=(1,) * 33), "no possible shape"),
    "sizes that are text": (rebuilt(storage(), b"K\0", several(text("4")), several(b"K\1")), "no possible shape"),
    "sizes that are a list": (rebuilt(storage(), b"K\0", b"]K\4a", several(b"K\1")), "without storage"),
    "no storage": (rebuilt(text("0"), b"K\0", several(b"K\4"), several(b"K\1")), "without storage"),
    "no arguments": (rebuilt(), "without storage"),
    "a storage as a value": (storage(), "as a value"),
    "a function as a value": (name("torch._utils", "_rebuild_parameter"), "as a value"),
    "too many values in a storage": (storage(count=integer(5)), "has 16 bytes"),
    "too few values in a storage": (storage(count=integer(3)), "has 16 bytes"),
    "another type of storage": (storage(kind=name("torch", "DoubleStorage")), "has 16 bytes"),
    "a count below zero": (storage(count=integer(-4)), "cannot have -4 values"),
    "a count of 2**200": (storage(count=integer(2**200)), "cannot have"),
    "two sizes of a storage": (b"](" + tensor() + tensor(storage(count=integer(2)), shape=(2,)) + b"e", "two sizes"),
    "an unknown type of storage": (storage(kind=name("torch", "QInt8Storage")), "torch.QInt8Storage; not executed"),
    "a type that is none": (storage(kind=name("torch", "Size")), "names no storage"),
    "no such storage": (storage(key=text("7")), "no storage '7'"),
    "a path as a key": (storage(key=text("../data.pkl")), "no storage"),
    "an absolute path as a key": (storage(key=text("/etc/passwd")), "no storage"),
    "a number as a key": (storage(key=b"K\0"), "names no storage"),
    "a persistent id of text": (text("0") + b"Q", "names no storage"),
    "a short persistent id": (several(text("storage"), text("0")) + b"Q", "names no storage"),
    "a module's persistent id": (several(text("module"), b"N", text("a"), text("b")) + b"Q", "names no storage"),
    "a parameter of nothing": (call(name("torch._utils", "_rebuild_parameter")), "without a tensor"),
    "a key twice": (b"}(" + text("a") + b"N" + text("a") + b"Nu", "twice"),
    "a key without value": (b"}(" + text("a") + b"u", "no dict"),
    "items for a list": (b"](" + text("a") + b"Nu", "no dict"),
    "values for a tuple": (b")Na", "no list"),
    "applying a text": (text("a") + b")R", "not executed"),
    "applying a type": (name("torch", "FloatStorage") + b")R", "torch.FloatStorage; not executed"),
    "making a type": (name("collections", "OrderedDict") + b")\x81", "not executed"),
    "a state for a tuple": (b"))b", "state"),
    "a state for a tensor": (tensor() + b"}b", "state"),
    "nothing": (b"", "value is missing"),
    "two values": (b"NN", "left over"),
    "an open mark": (b"N(", "missing"),
    "tuple without mark": (b"t", "mark is missing"),
    "popping below a mark": (b"N(0", "value is missing"),
    "an early end": (b"N.N", "bytes follow"),
    "another protocol": (b"\x80\x09N", "protocol"),
    "a numpy object": (call(name("numpy", "dtype"), text("O8")), "no number"),
    "a numpy record": (call(name("numpy", "dtype"), b"]"), "no number"),
    "a big-endian number": (
        call(name("numpy", "dtype"), text("f8")) + several(b"K\3", text(">"), b"N") + b"b", "little-endian"),
    "a number without bytes": (
        call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8")), b"C\1a"), "its bytes"),
    "bytes that are no latin1": (call(name("_codecs", "encode"), text("\u20ac"), text("latin1")), "latin1"),
    "another codec": (call(name("_codecs", "encode"), text("a"), text("rot13")), "latin1"),
    "a tensor as a persistent id": (tensor() + b"Q", "names no storage"),
    "a tensor as its tag": (
        several(tensor(), name("torch", "FloatStorage"), text("0"), text("cpu"), integer(4)) + b"Q",
        "names no storage"),
    "a tensor as its view": (
        several(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), integer(4), tensor()) + b"Q",
        "names no storage"),
    "a tensor as a codec": (call(name("_codecs", "encode"), text("a"), tensor()), "latin1"),
    "a tensor as a byte order": (
        call(name("numpy", "dtype"), text("f8")) + several(b"K\3", tensor()) + b"b", "little-endian"),
    "a tensor as arguments": (tensor() + tensor() + b"R", "not executed"),
    "a tensor as a class's arguments": (name("collections", "OrderedDict") + tensor() + b"\x81", "not executed"),
    "a tensor as a key": (b"}" + tensor() + b"Ns", "as a key"),
    "a tensor as a name": (tensor() + tensor() + b"\x93", "no text"),
    "a tensor as pairs": (call(name("collections", "OrderedDict"), tensor()), "no pairs"),
    "a tensor as a size": (call(name("torch", "Size"), tensor()), "no sizes"),
    "a tensor as a device": (call(name("torch", "device"), tensor()), "no name"),
    "a tensor as a type": (call(name("numpy", "dtype"), tensor()), "no number"),
    "a tensor as a number's bytes": (
        call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f4")), tensor()), "its bytes"),
    "text that is not UTF-8": (b"X\1\0\0\0\xff", "UTF-8"),
    "half a surrogate": (text("\ud800"), "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_inside_is_refused(tmp_path, damage):
    body, word = DAMAGED[damage]
    refusal(archive(tmp_path / "a.pt", body), word)
    refusal(archive(tmp_path / "b.pt", table(w=tensor(), x=body)))


def test_tensors_cannot_repeat_a_storage_without_end(tmp_path):
    many = b"](" + tensor() + b"q\0" + b"0" + tensor() * 2000 + b"e"
    refusal(archive(tmp_path / "a.pt", many, {"data/0": b"\0" * 4_000_000}), "has 4000000 bytes")
    whole = tensor(storage(count=integer(10**6)), shape=(10**6,))
    refusal(archive(tmp_path / "b.pt", b"](" + whole * 40 + b"e", {"data/0": b"\0" * 4_000_000}), "16 times")


@pytest.mark.parametrize("leaf", [b"h\1", b"K\1"], ids=["tensors", "numbers"])
def test_names_below_long_keys_are_not_copied_out(tmp_path, leaf):
    """Each of many values below five keys of a megabyte would have a name of five megabytes."""
    inner = b"}" + MARK + b"".join(integer(i) + leaf for i in range(100)) + b"u"
    for _ in range(5):
        inner = b"}" + text("x" * 2**20) + inner + b"s"
    file = archive(tmp_path / "a.pt", tensor() + b"q\1" + b"0" + inner)
    opened = open_torch(file)
    tracemalloc.start()
    try:
        hostile.refusal(lambda _: opened.tensors(), file, "a name of 1048576 characters")
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_names_of_nested_dicts_have_a_limit(tmp_path):
    deep = b"}" + text("b" * 148) + tensor() + b"s"
    assert list(open_torch(archive(tmp_path / "a.pt", b"}" + text("a" * 151) + deep + b"s")).tensors()) == [
        "a" * 151 + "." + "b" * 148
    ]
    file = archive(tmp_path / "b.pt", b"}" + text("a" * 152) + deep + b"s")
    hostile.refusal(lambda f: open_torch(f).tensors(), file, "a name of 301 characters")
