"""Files of torch before 1.6: bare pickles and storages in a row, opened by the same closed interpreter."""

from __future__ import annotations

import struct
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import PROTO, call, integer, name, storage, table, tensor, text
from test_torch_zip import Net, assert_tree, views

from unimed_jax.convert import torch_legacy
from unimed_jax.convert.torch_zip import open_torch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SYSTEM = b"}(" + text("protocol_version") + b"M\xe9\x03" + text("little_endian") + b"\x88u"
FOUR = struct.pack("<4f", 1, 2, 3, 4)


def refusal(path: Path, *words: str) -> str:
    return hostile.refusal(open_torch, path, *words)


def legacy(
    path: Path,
    body: bytes,
    *,
    version: bytes = integer(1001),
    system: bytes = SYSTEM,
    keys: bytes = b"]" + text("0") + b"a",
    data: bytes = struct.pack("<q", 4) + FOUR,
) -> Path:
    pickles = (PROTO + p + b"." for p in (version, system, body, keys))
    path.write_bytes(torch_legacy.MAGICS[0] + b"".join(pickles) + data)
    return path


def test_what_torch_writes(tmp_path):
    net = Net()
    tx = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    tx.step()
    tree = {
        "views": views(),
        "state_dict": net.state_dict(),
        "optimizer": tx.state_dict(),
        "epoch": 3,
        "é": [1, (None,)],
    }
    tree |= {
        "half": torch.arange(5).half(),
        "b16": torch.arange(5.0).bfloat16(),
        "bool": torch.tensor([True, False]),
    }
    torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    opened = open_torch(tmp_path / "a.pt")
    assert opened.kind == "legacy"
    assert_tree(opened.tree, torch.load(tmp_path / "a.pt"))
    assert np.shares_memory(opened.tree["views"]["base"], opened.tree["views"]["middle"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_be_asked_for(tmp_path, protocol):
    tree = {"w": torch.arange(6.0).reshape(2, 3), "epoch": 3}
    file = tmp_path / "a.pt"
    torch.save(tree, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    opened = open_torch(file)
    assert opened.kind == "legacy"
    assert_tree(opened.tree, tree)


def test_every_cut_is_refused(tmp_path):
    whole = legacy(tmp_path / "a.pt", table(w=tensor())).read_bytes()
    assert open_torch(tmp_path / "a.pt").tree["w"].tolist() == [1, 2, 3, 4]
    for n in range(1, len(whole)):
        (tmp_path / "b.pt").write_bytes(whole[:n])
        refusal(tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(whole + b"\0")
    refusal(tmp_path / "b.pt", "its storages end at byte")


BAD = {
    "a payload": (
        {"body": call(name("os", "system"), text("touch marker"))},
        "contains os.system; not executed",
    ),
    "a payload as version": (
        {"version": call(name("os", "system"), text("x"))},
        "contains os.system; not executed",
    ),
    "a payload as system": (
        {"system": call(name("os", "system"), text("x"))},
        "contains os.system; not executed",
    ),
    "a payload as keys": (
        {"keys": call(name("os", "system"), text("x"))},
        "contains os.system; not executed",
    ),
    "a harmless name as version": (
        {"version": name("collections", "OrderedDict") + b")R"},
        "OrderedDict; not executed",
    ),
    "another version": ({"version": integer(1002)}, "version 1002"),
    "a big-endian machine": ({"system": SYSTEM.replace(b"\x88", b"\x89")}, "byte order"),
    "no system": ({"system": b"]"}, "byte order"),
    "no keys": ({"keys": b"]", "data": b""}, "list of storages"),
    "keys that are no list": ({"keys": text("0")}, "list of storages"),
    "keys that are no text": ({"keys": b"]K\0a"}, "list of storages"),
    "another key": ({"keys": b"]" + text("1") + b"a"}, "list of storages"),
    "a key twice": ({"keys": b"]" + text("0") + b"a" + text("0") + b"a"}, "twice"),
    "too many values": ({"data": struct.pack("<q", 5) + FOUR}, "5 values in 16 bytes"),
    "2**63 values": ({"data": struct.pack("<Q", 2**63) + FOUR}, "values in 16 bytes"),
    "no values": ({"data": struct.pack("<q", 0) + FOUR}, "0 values in 16 bytes"),
    "a storage beyond the file": ({"body": table(w=tensor(storage(count=integer(2**40))))}, "cannot have"),
    "a tensor beyond its storage": ({"body": table(w=tensor(shape=(5,)))}, "reaches outside"),
}


@pytest.mark.parametrize("fault", BAD)
def test_damage_is_refused(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    parts, word = BAD[fault]
    refusal(legacy(tmp_path / "a.pt", **{"body": table(w=tensor()), **parts}), word)
    assert not (tmp_path / "marker").exists()
