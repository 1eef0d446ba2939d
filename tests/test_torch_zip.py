"""PyTorch files without torch: the same tensors as torch.load gives, and nothing in a file ever runs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import PROTO, archive, call, integer, name, several, storage, table, tensor, text

from unimed_jax.convert.torch_zip import open_torch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def as_numpy(t) -> np.ndarray:
    import ml_dtypes

    if t.dtype is torch.bfloat16:
        return t.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.detach().numpy()


def assert_tree(ours, theirs) -> None:
    """Equal content; tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        wanted = as_numpy(theirs)
        assert isinstance(ours, np.ndarray)
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
        assert ours.tobytes() == wanted.tobytes()
        assert not ours.flags.writeable
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for k in theirs:
            assert_tree(ours[k], theirs[k])
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is (list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_tree(a, b)
    else:
        value = theirs.item() if isinstance(theirs, np.generic) else theirs
        assert (type(ours), ours) == (type(value), value)


def refusal(path: Path, *words: str) -> str:
    return hostile.refusal(open_torch, path, *words)


KINDS = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32,
]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_dtype(tmp_path, dtype):
    values = (torch.arange(24) % 7).to(dtype).reshape(2, 3, 4)
    torch.save(
        {"x": values, "zero-dim": values[0, 0, 1].clone(), "empty": values[:0].clone()}, tmp_path / "a.pt"
    )
    assert_tree(open_torch(tmp_path / "a.pt").tree, torch.load(tmp_path / "a.pt"))


def views() -> dict:
    base = torch.arange(60.0)
    return {
        "base": base,
        "middle": base[7:19],
        "transposed": base.reshape(3, 4, 5).permute(2, 0, 1),
        "every other": base[1::2],
        "row of a column": base.reshape(6, 10)[:, 3:4],
        "windows": base.as_strided((5, 3), (2, 1), 4),
        "one of each": base[:1].reshape(1, 1, 1).as_strided((1, 1, 1), (999, 5, 1)),
        "scalar": base[59],
        "empty": base[60:],
        "empty middle": base.reshape(6, 10)[:, 4:4],
        "parameter": torch.nn.Parameter(base[2:5]),
        "no grad": torch.nn.Parameter(base[2:5].clone(), requires_grad=False),
    }


def test_strided_and_shared_tensors(tmp_path):
    torch.save(views(), tmp_path / "a.pt")
    opened = open_torch(tmp_path / "a.pt")
    assert_tree(opened.tree, torch.load(tmp_path / "a.pt"))
    assert np.shares_memory(opened.tree["base"], opened.tree["middle"])
    assert list(opened.tensors()) == list(views())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    tree = {
        **views(),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "long": 2**70,
    }
    torch.save({"a": tree, "b": b"\0\xff"}, tmp_path / "a.pt", pickle_protocol=protocol)
    ours = open_torch(tmp_path / "a.pt").tree
    assert ours["b"] == b"\0\xff"
    assert ours["a"].pop("dtype") == "torch.float16"
    assert ours["a"].pop("device") == "cpu"
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)["a"]
    del theirs["dtype"], theirs["device"]
    assert_tree(ours["a"], theirs)


def test_attributes_of_a_tensor_are_left_out(tmp_path):
    p, t = torch.nn.Parameter(torch.ones(3)), torch.zeros(2)
    p.no_decay, t.note = True, "x"
    torch.save({"p": p, "t": t}, tmp_path / "a.pt")
    assert_tree(open_torch(tmp_path / "a.pt").tree, {"p": p, "t": t})


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 2, bias=False)
        self.ln = torch.nn.LayerNorm(8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])
        self.proj = torch.nn.Parameter(torch.randn(8, 4))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.scale, self.words = 0.5, [1, 2]

    def forward(self, x):
        y = self.ln(self.conv(x).flatten(2).mean(-1))
        for layer in self.layers:
            y = layer(y)
        return y @ self.proj * self.scale


def test_a_training_checkpoint(tmp_path):
    """The layout of the released files: numpy scalars, the optimizer's two groups, the scaler."""
    net = torch.nn.DataParallel(Net())
    decay = [p for p in net.parameters() if p.ndim > 1]
    tx = torch.optim.AdamW(
        [{"params": [net.module.ln.bias], "weight_decay": 0.0}, {"params": decay}], lr=1e-3
    )
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    tx.param_groups[0]["lr"] = np.float64(0.25)
    tx.step()
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    saved = {
        "epoch": 3, "name": "run é", "state_dict": net.state_dict(), "optimizer": tx.state_dict(), "scaler": scaler,
        "epoch_step": np.int64(41), "ok": np.bool_(True), "half": np.float16(0.5),
    }  # fmt: skip
    torch.save(saved, tmp_path / "a.pt")
    opened = open_torch(tmp_path / "a.pt", verify_crc=True)
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert_tree(opened.tree, theirs)
    assert opened.kind == "zip"
    assert opened.tree["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert list(opened.tensors(opened.tree["state_dict"])) == list(saved["state_dict"])
    assert "optimizer.state.0.exp_avg" in opened.tensors()

    with zipfile.ZipFile(tmp_path / "a.pt") as z:
        body = z.read("a/data.pkl")
    assert b"numpy._core.multiarray" in body
    old = body.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")  # as written under numpy 1
    again = hostile.rewritten(tmp_path / "a.pt", tmp_path / "b.pt", {"data.pkl": old})
    assert_tree(open_torch(again).tree, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive(tmp_path, how):
    net = Net().eval()
    jit = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.randn(1, 3, 4, 4))
    jit = jit.half()
    jit.save(str(tmp_path / "a.pt"))
    opened = open_torch(tmp_path / "a.pt")
    assert opened.kind == "torchscript"
    assert_tree(dict(sorted(opened.tensors().items())), dict(sorted(jit.state_dict().items())))
    assert opened.tree["training"] is False
    if how == "script":
        assert opened.tree["words"] == [1, 2]

    with zipfile.ZipFile(tmp_path / "a.pt") as z:
        code = [n.split("/", 1)[1] for n in z.namelist() if "/code/" in n]
    assert code
    bad = dict.fromkeys(code, b"import os; os.system('false') )( not even Python")
    bad["constants.pkl"] = PROTO + call(name("os", "system"), text("false")) + b"."
    again = hostile.rewritten(tmp_path / "a.pt", tmp_path / "b.pt", bad)
    assert_tree(dict(sorted(open_torch(again).tensors().items())), dict(sorted(jit.state_dict().items())))


def test_script_classes_only_in_script_archives(tmp_path):
    body = name("__torch__", "M") + b")\x81" + table(w=tensor()) + b"b"
    refusal(archive(tmp_path / "a.pt", body), "contains __torch__.M; not executed")
    opened = open_torch(archive(tmp_path / "b.pt", body, {"constants.pkl": b"\x80\x02)."}))
    assert opened.tensors()["w"].tolist() == [1, 2, 3, 4]
    refusal(archive(tmp_path / "c.pt", call(name("__torch__", "M")), {"constants.pkl": b""}), "not executed")
    refusal(archive(tmp_path / "d.pt", name("__torch__", "M"), {"constants.pkl": b""}), "as a value")


@pytest.mark.parametrize("top", ["archive/", "unimed_clip_vit_b16/", "a b/", ""])
def test_older_layouts(tmp_path, top):
    path = archive(
        tmp_path / "x.pt",
        table(w=tensor()),
        {"byteorder": b"little", ".data/serialization_id": b"1"},
        top=top,
    )
    assert open_torch(path).tree["w"].tolist() == [1, 2, 3, 4]


def test_text_and_pairs_of_python_2(tmp_path):
    pairs = b"](" + several(b"U\x01a", tensor()) + b"](" + b"T\x01\0\0\0b" + integer(5) + b"ee"
    ours = open_torch(archive(tmp_path / "a.pt", call(name("collections", "OrderedDict"), pairs))).tree
    assert list(ours) == ["a", "b"]
    assert ours["b"] == 5


def test_a_file_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(views(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_tree(open_torch(tmp_path / "a.pt", verify_crc=True).tree, views())


def large(path: Path, size: int) -> Path:
    """One storage of `size` zero bytes that take no room on the disk, in 64-bit sizes as beyond 4 GB."""
    pkl = PROTO + table(w=tensor(storage(count=integer(size // 4)), shape=(size // 4,))) + b"."
    directory, at = b"", 0
    with path.open("wb") as f:
        for key, content, n in (("a/data.pkl", pkl, len(pkl)), ("a/data/0", b"", size)):
            wide = n > 2**32 - 2
            extra = struct.pack("<HHQQ", 1, 16, n, n) if wide else b""
            short = 0xFFFFFFFF if wide else n
            f.write(
                struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, short, short, len(key), len(extra))
            )
            f.write(key.encode() + extra + content)
            f.seek(n - len(content), os.SEEK_CUR)
            directory += struct.pack(
                "<4s6H3I5H2I",
                b"PK\1\2",
                45,
                45,
                0,
                0,
                0,
                0,
                0,
                short,
                short,
                len(key),
                len(extra),
                0,
                0,
                0,
                0,
                at,
            )
            directory += key.encode() + extra
            at = f.tell()
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), at)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(directory), 1)
        full = min(at, 0xFFFFFFFF)
        f.write(
            directory
            + end64
            + locator
            + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(directory), full, 0)
        )
    return path


def test_a_file_beyond_4_gb(tmp_path):
    path = large(tmp_path / "a.pt", 5 * 2**30)
    w = open_torch(path).tree["w"]
    assert w.nbytes == 5 * 2**30
    assert w[-1] == 0
    assert w[:: len(w) // 7].sum() == 0


def large_safetensors(path: Path, size: int) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    hostile.safetensors(path, header)
    os.truncate(path, 8 + len(header) + size)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_opening_reads_nothing_and_release_gives_back(tmp_path, kind):
    write, opening = {
        "torch": (large, "open_torch(path).tensors()"),
        "safetensors": (large_safetensors, "open_safetensors(path)"),
    }[kind]
    code = f"""
    import sys
    from unimed_jax.convert.tensor_file import open_safetensors
    from unimed_jax.convert.torch_zip import open_torch
    def resident():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024
    path, before = {str(write(tmp_path / "a", 200 * 2**20))!r}, resident()
    f = {opening}
    opened = resident() - before
    w = f["w"]
    assert w.sum() == 0
    read = resident() - before
    f.release()
    released = resident() - before
    assert w[12345] == 0
    assert not {{"torch", "jax"}} & sys.modules.keys()
    print(opened, read, released)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    opened, read, released = map(int, done.stdout.split())
    assert opened < 10
    assert read > 150
    assert released < 20


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_bits_that_change_the_values_are_refused(tmp_path, kind):
    """A view with torch's minus bit: its storage holds the other sign."""
    base, path = torch.arange(1.0, 5.0), tmp_path / "a.pt"
    negative = torch._neg_view(base)
    torch.save({"x": negative, "y": base}, path, _use_new_zipfile_serialization=kind == "zip")
    assert torch.load(path)["x"].tolist() == [-1, -2, -3, -4]
    refusal(path, "a tensor's values are not those of its storage: 'neg' is set")
    torch.save({"x": negative.resolve_neg()}, path, _use_new_zipfile_serialization=kind == "zip")
    assert open_torch(path).tree["x"].tolist() == [-1, -2, -3, -4]


HOOKS = name("collections", "OrderedDict") + b")R"
NO_BITS = {"none": (), "null": (b"N",), "empty": (b"}",), "false": (table(neg=b"\x89", conj=b"\x89"),)}
BITS = {
    "minus": ((table(neg=b"\x88"),), "'neg' is set"),
    "conjugate": ((table(conj=b"\x88"),), "'conj' is set"),
    "unknown": ((table(tilted=b"\x89"),), "'tilted' is set"),
    "no yes or no": ((table(neg=b"K\0"),), "'neg' is set"),
    "no table": ((text("neg"),), "more arguments"),
    "two tables": ((b"}", b"}"), "more arguments"),
}


def rebuilt(tmp_path: Path, version: str, more: tuple[bytes, ...]) -> Path:
    kind = (name("torch", "float32"),) if version == "v3" else ()
    shape = (integer(0), several(integer(4)), several(integer(1)))
    function = name("torch._utils", f"_rebuild_tensor_{version}")
    body = call(function, storage(), *shape, b"\x89", HOOKS, *kind, *more)
    return archive(tmp_path / "a.pt", table(x=body))


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("case", [*NO_BITS, *BITS])
def test_metadata_of_a_tensor(tmp_path, version, case):
    if case in NO_BITS:
        found = open_torch(rebuilt(tmp_path, version, NO_BITS[case])).tree["x"]
        assert found.shape == (4,)
    else:
        more, words = BITS[case]
        refusal(rebuilt(tmp_path, version, more), words)


def test_what_is_no_tensor_is_named(tmp_path):
    x = torch.arange(3.0)
    inner = {
        "w": x,
        "list": [x, x],
        "note": "fine\n\x1b[31m",
        "none": None,
        "deep": {"n": 3, "w": x},
        "bad\n\x1b": 1,
    }
    torch.save({"epoch": 3, "model": inner}, tmp_path / "a.pt")
    opened = open_torch(tmp_path / "a.pt")
    found = opened.tensors(opened.tree["model"])
    assert list(found) == ["w", "deep.w"]
    assert found.left_out == ("list", "note", "none", "deep.n", r"bad\n\x1b")
    assert opened.tensors().left_out[0] == "epoch"
