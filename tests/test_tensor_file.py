"""safetensors read strictly: what the library writes opens bit for bit, everything odd is refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import hostile
import ml_dtypes
import numpy as np
import pytest
from hostile import safetensors

from unimed_jax.convert import tensor_file
from unimed_jax.convert.tensor_file import open_safetensors, open_sharded
from unimed_jax.errors import DataError


def refusal(path: Path, *words: str) -> str:
    return hostile.refusal(open_safetensors, path, *words)


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


# --- what the library writes


def test_every_dtype(tmp_path):
    from safetensors.numpy import save_file

    kinds = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16]
    state = {str(np.dtype(k)): np.arange(6).astype(k).reshape(2, 3) for k in kinds}
    state |= {
        "zero-dim": np.array(2.5, np.float32),
        "empty": np.zeros((0, 5), np.float32),
        "é/ü": np.ones(1, np.float32),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "np"})
    opened = open_safetensors(tmp_path / "a.safetensors")
    assert opened.keys() == state.keys()
    assert opened.metadata == {"format": "np"}
    assert opened.path == tmp_path / "a.safetensors"
    for name, wanted in state.items():
        assert (opened[name].dtype, opened[name].shape) == (wanted.dtype, wanted.shape)
        assert opened[name].tobytes() == wanted.tobytes()
        assert not opened[name].flags.writeable
        assert opened[name].flags.c_contiguous
    opened.release()
    assert opened["float32"].tobytes() == state["float32"].tobytes()


@pytest.mark.torch
def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.arange(6.0)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16}
    save_file({k: values.to(v) for k, v in kinds.items()}, tmp_path / "a.safetensors")
    opened = open_safetensors(tmp_path / "a.safetensors")
    for k in kinds:
        np.testing.assert_array_equal(opened[k].astype(np.float32), values.numpy())


def test_a_file_without_tensors(tmp_path):
    assert len(open_safetensors(safetensors(tmp_path / "a.safetensors", b"{}"))) == 0


def test_data_need_not_be_aligned(tmp_path):
    header = json.dumps({"b": entry(1, 9), "a": entry(0, 1, [1], "U8")}).encode()
    opened = open_safetensors(
        safetensors(tmp_path / "a.safetensors", header, b"\7" + struct.pack("<2f", 1, 2))
    )
    assert opened["b"].tolist() == [1, 2]
    assert list(opened) == ["b", "a"]


# --- what it does not


DATA = b"\0" * 16
ENTRIES = {
    "a hole before": ({"a": entry(4, 16)}, "a hole before tensor 'a'"),
    "a hole between": ({"a": entry(0, 4), "b": entry(8, 16)}, "a hole before tensor 'b'"),
    "an overlap": ({"a": entry(0, 12), "b": entry(8, 16)}, "an overlap before tensor 'b'"),
    "the same bytes twice": ({"a": entry(0, 16), "b": entry(0, 16)}, "an overlap"),
    "bytes left over": ({"a": entry(0, 12)}, "4 bytes follow"),
    "nothing but data": ({}, "16 bytes follow"),
    "an end outside": ({"a": entry(0, 20)}, "ends at byte 20 of 16"),
    "an end at 2**62": ({"a": entry(0, 2**62)}, "ends at byte"),
    "an end before its begin": ({"a": entry(16, 0, [0])}, "no possible place"),
    "a size that is not the shape's": ({"a": entry(0, 16, [5])}, "cannot have 16 bytes"),
    "a size that is not the type's": ({"a": entry(0, 16, [4], "F64")}, "cannot have 16 bytes"),
    "an unknown type": ({"a": entry(0, 16, [4], "F31")}, "unknown type 'F31'"),
    "a type that is a number": ({"a": {**entry(0, 16), "dtype": 32}}, "unknown type 32"),
    "a type that is a list": ({"a": {**entry(0, 16), "dtype": ["F32"]}}, "unknown type"),
    "a negative shape": ({"a": entry(0, 16, [-4])}, "no possible shape"),
    "two negative sizes": ({"a": entry(0, 16, [-2, -2])}, "no possible shape"),
    "a shape of fractions": ({"a": entry(0, 16, [4.0])}, "no possible shape"),
    "a shape of truths": ({"a": entry(0, 4, [True])}, "no possible shape"),
    "a shape that is a number": ({"a": {**entry(0, 16), "shape": 4}}, "no possible shape"),
    "a shape that overflows to its size": ({"a": entry(0, 16, [2**62, 2, 2])}, "impossibly large"),
    "an overflow behind a zero": ({"a": entry(0, 0, [0, 2**40, 2**40]), "b": entry(0, 16)}, "impossibly large"),
    "a size of 10**30": ({"a": entry(0, 16, [10**30])}, "no possible shape"),
    "a thousand dimensions": ({"a": entry(0, 16, [1] * 1000 + [4])}, "no possible shape"),
    "one offset": ({"a": {**entry(0, 16), "data_offsets": [16]}}, "no possible place"),
    "three offsets": ({"a": {**entry(0, 16), "data_offsets": [0, 8, 16]}}, "no possible place"),
    "a negative offset": ({"a": {**entry(0, 16), "data_offsets": [-16, 0]}}, "no possible place"),
    "offsets as text": ({"a": {**entry(0, 16), "data_offsets": ["0", "16"]}}, "no possible place"),
    "a field more": ({"a": {**entry(0, 16), "note": 1}}, "needs exactly"),
    "a field fewer": ({"a": {"dtype": "F32", "shape": [4]}}, "needs exactly"),
    "an entry that is a list": ({"a": [0, 16]}, "needs exactly"),
    "metadata of numbers": ({"__metadata__": {"n": 1}, "a": entry(0, 16)}, "no table of strings"),
    "metadata that is a list": ({"__metadata__": ["n"], "a": entry(0, 16)}, "no table of strings"),
    "metadata that is a tensor": ({"__metadata__": entry(0, 16)}, "no table of strings"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ENTRIES)
def test_entries_that_cannot_be(tmp_path, fault):
    header, word = ENTRIES[fault]
    refusal(safetensors(tmp_path / "a.safetensors", json.dumps(header).encode(), DATA), word)


A = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
HEADERS = {
    "an equal key": (b"{" + A + b"," + A + b"}", "holds 'a' twice"),
    "an equal key by escape": (b"{" + A + b"," + A.replace(b'"a"', rb'"\u0061"') + b"}", "holds 'a' twice"),
    "an equal field": (b"{" + A.replace(b'"shape"', b'"shape":[9],"shape"') + b"}", "holds 'shape' twice"),
    "equal metadata": (b'{"__metadata__":{"x":"1","x":"2"},' + A + b"}", "holds 'x' twice"),
    "two metadata": (b'{"__metadata__":{},"__metadata__":{},' + A + b"}", "twice"),
    "a list": (b"[" + A[4:] + b"]", "no JSON object"),
    "a number": (b"5", "no JSON object"),
    "space before": (b" {" + A + b"}", "no JSON object"),
    "an open brace": (b"{" + A, "no JSON"),
    "text after": (b"{" + A + b"} x", "no JSON"),
    "not UTF-8": (b"{" + A.replace(b"a", b"\xff", 1) + b"}", "not UTF-8"),
    "NaN": (b"{" + A.replace(b"[4]", b"[NaN]") + b"}", "NaN is no number"),
    "infinity": (b"{" + A.replace(b"[4]", b"[Infinity]") + b"}", "Infinity is no number"),
    "a number of 5000 digits": (b"{" + A.replace(b"[4]", b"[" + b"9" * 5000 + b"]") + b"}", "no JSON"),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "half a character in a name": (b"{" + A.replace(b'"a"', rb'"\ud800"') + b"}", "half a character"),
    "half a character in the metadata": (rb'{"__metadata__":{"x":"\udfff"},' + A + b"}", "half a character"),
    "nothing": (b"", "no JSON object"),
    "zeros": (b"\0" * 64, "no JSON object"),
    "a pickle": (b"\x80\x02cos\nsystem\n.", "no JSON object"),
    "a million values": (b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", "values"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_cannot_be(tmp_path, fault):
    header, word = HEADERS[fault]
    refusal(safetensors(tmp_path / "a.safetensors", header, DATA), word)


def test_names_stay_on_one_line(tmp_path):
    name = "a\nb\x1b[2J" + "x" * 5000
    header = json.dumps({name: entry(0, 16, [-1])}).encode()
    assert refusal(safetensors(tmp_path / "a.safetensors", header, DATA), "no possible shape").isprintable()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_a_few_bytes(tmp_path, size):
    (tmp_path / "a.safetensors").write_bytes((struct.pack("<Q", 2) + b"{}")[:size])
    refusal(tmp_path / "a.safetensors", "is empty" if size == 0 else "no complete safetensors")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{" + A + b"}" + DATA)
    refusal(tmp_path / "a.safetensors", "no complete safetensors")


def test_a_header_over_100_mb(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as f:  # takes no room on the disk
        f.write(struct.pack("<Q", tensor_file.MAX_HEADER + 1) + b"{}")
        f.truncate(2 * tensor_file.MAX_HEADER)
    refusal(path, "over the limit of 100000000")


def test_every_cut_is_refused(tmp_path):
    whole = safetensors(tmp_path / "a.safetensors", b"{" + A + b"}", DATA).read_bytes()
    for n in range(len(whole)):
        (tmp_path / "b.safetensors").write_bytes(whole[:n])
        refusal(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(whole + b"\0")
    refusal(tmp_path / "b.safetensors", "1 bytes follow")


def test_too_many_tensors(tmp_path):
    header = json.dumps({str(i): entry(0, 0) for i in range(100_001)}).encode()
    refusal(safetensors(tmp_path / "a.safetensors", header), "100001 tensors are over the limit of 100000")


def test_missing_files_and_folders(tmp_path):
    refusal(tmp_path / "absent.safetensors", "does not exist")
    refusal(tmp_path, "no regular file")


# --- several files


def sharded(tmp_path: Path, weight_map: dict | None = None, kind: str = "safetensors") -> Path:
    from safetensors.numpy import save_file

    for i in range(2):
        state = {f"{n}{i}": np.full(3, i, np.float32) for n in "ab"}
        save_file(state, tmp_path / f"model-0000{i}-of-00002.safetensors", metadata={"format": "pt"})
    files = {f"{n}{i}": f"model-0000{i}-of-00002.{kind}" for i in range(2) for n in "ab"}
    index = {"metadata": {"total_size": 48}, "weight_map": files | (weight_map or {})}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "model.safetensors.index.json"


def test_shards_are_one_mapping(tmp_path):
    opened = open_sharded(sharded(tmp_path))
    assert {k: v.tolist() for k, v in opened.items()} == {
        "a0": [0, 0, 0], "b0": [0, 0, 0], "a1": [1, 1, 1], "b1": [1, 1, 1]
    }  # fmt: skip
    assert opened.metadata == {"format": "pt"}
    opened.release()
    assert opened["a1"].tolist() == [1, 1, 1]


@pytest.mark.torch
def test_shards_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    for i in range(2):
        torch.save({f"w{i}": torch.full((2,), float(i))}, tmp_path / f"pytorch_model-{i}.bin")
    index = {"weight_map": {f"w{i}": f"pytorch_model-{i}.bin" for i in range(2)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_sharded(tmp_path / "pytorch_model.bin.index.json")
    assert {k: v.tolist() for k, v in opened.items()} == {"w0": [0, 0], "w1": [1, 1]}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"a0": "../model.safetensors"}, "no file beside it"),
        ({"a0": "/etc/passwd"}, "no file beside it"),
        ({"a0": "..\\model.safetensors"}, "no file beside it"),
        ({"a0": ".safetensors"}, "no file beside it"),
        ({"a0": "x.py"}, "no file beside it"),
        ({"a0": "x/../y.safetensors"}, "no file beside it"),
        ({"a0": "a\n.safetensors"}, "no file beside it"),
        ({"a0": 5}, "no weight_map"),
        ({"a0": "absent.safetensors"}, "absent.safetensors does not exist"),
        ({"a0": "model-00001-of-00002.safetensors"}, "first 'a0'"),
        ({"c": "model-00001-of-00002.safetensors"}, "1 tensors are missing, 0 unexpected, first 'c'"),
    ],
)
def test_an_index_that_lies(tmp_path, change, word):
    with pytest.raises(DataError) as e:
        open_sharded(sharded(tmp_path, change))
    assert word in e.value.line()
    assert str(tmp_path) in e.value.line()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", '{"a":1,"a":1}', "\0"]
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "a.index.json").write_text(text)
    hostile.refusal(open_sharded, tmp_path / "a.index.json")


def test_an_index_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_INDEX", 10)
    hostile.refusal(open_sharded, sharded(tmp_path), "over the limit of 10")
