"""Seeds and mutations for `fuzz_readers.py`: files as they are written, and ways of damaging them with a purpose."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np

INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
               2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
Mutate = Callable[[random.Random, bytes], bytes]


# --- seeds


def torch_seeds() -> list[bytes]:
    """Checkpoints as torch writes them: strided views, types, an optimizer, numpy numbers."""
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    tx = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net(torch.ones(2, 3)).sum().backward()
    tx.step()
    base = torch.arange(24.0)
    trees = [
        {
            "state_dict": net.state_dict(),
            "optimizer": tx.state_dict(),
            "epoch": np.int64(3),
            "lr": np.float64(0.5),
        },
        {
            "t": base.reshape(4, 6).t(),
            "v": base[3:9],
            "b": base.to(torch.bfloat16),
            "p": torch.nn.Parameter(base[:2]),
        },
        {
            "u": base.to(torch.uint16),
            "e": base[:0],
            "z": base[5],
            "s": torch.Size([2]),
            "x": [1, (2.5, None, "é", True)],
        },
    ]
    return [_saved(torch.save, tree, pickle_protocol=p) for tree in trees for p in (2, 4)]


def legacy_seeds() -> list[bytes]:
    """The same as torch wrote it before version 1.6."""
    import torch

    trees = [torch.load(io.BytesIO(raw), weights_only=False) for raw in torch_seeds()[::2]]
    return [_saved(torch.save, tree, _use_new_zipfile_serialization=False) for tree in trees]


def script_seeds() -> list[bytes]:
    """A small scripted module, in float32 and float16."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(3, 4)
            self.sizes = [1, 2]

        def forward(self, x):
            return self.lin(x)

    return [_saved(torch.jit.save, torch.jit.script(net)) for net in (Net(), Net().half())]


def _saved(save: Callable, value: object, **options) -> bytes:
    out = io.BytesIO()
    save(value, out, **options)
    return out.getvalue()


def safetensors_seeds() -> list[bytes]:
    """Several types, shapes and metadata."""
    from safetensors.numpy import save

    a = np.arange(12, dtype=np.float32)
    tensors = {
        "a": a.reshape(3, 4),
        "h": a.astype(np.float16),
        "i": a.astype(np.int64),
        "e": a[:0],
        "z": np.array(3),
    }
    return [save(tensors, metadata={"format": "pt"}), save({f"layer.{i}.w": a for i in range(20)}), save({})]


def index_seeds() -> list[bytes]:
    """An index over two files that stand beside it."""
    files = {f"{n}{i}": f"part-{i}.safetensors" for i in range(2) for n in "ab"}
    return [json.dumps({"metadata": {"total_size": 48}, "weight_map": files}).encode()]


# --- mutations


def truncate(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def flip(rng: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def integers(rng: random.Random, raw: bytes) -> bytes:
    """Telling numbers over 1 to 8 bytes, in either byte order."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3))):
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice(INTERESTING) & (1 << 8 * size) - 1
        at = rng.randrange(max(1, len(out) - size))
        out[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
    return bytes(out)


def splice(rng: random.Random, raw: bytes) -> bytes:
    """Moves, repeats or drops a run of bytes."""
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    b = min(b, a + 512)
    at = rng.randrange(len(raw) + 1)
    return rng.choice(
        (raw[:at] + raw[a:b] + raw[at:], raw[:a] + raw[b:], raw[:at] + raw[a:b] + raw[at + b - a :])
    )


def zip_fields(rng: random.Random, raw: bytes) -> bytes:
    """A telling number into a field of a local header, of the directory or of its end."""
    out = bytearray(raw)
    sign = rng.choice((b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08"))
    places = [i for i in range(len(out) - 4) if out[i : i + 4] == sign]
    if not places:
        return flip(rng, raw)
    size = rng.choice((2, 4, 8))
    at = rng.choice(places) + rng.randrange(4, 60)
    near = int.from_bytes(out[at : at + size], "little") + rng.choice((-64, -1, 1, 64))
    value = rng.choice((*INTERESTING, near, rng.randrange(len(raw)))) & (1 << 8 * size) - 1
    out[at : at + size] = value.to_bytes(size, "little")
    return bytes(out[: max(len(raw), at)])


def records(rng: random.Random, raw: bytes) -> bytes:
    """The same archive with a record renamed, dropped, doubled, cut, packed or changed inside; checksums are right."""

    def change(content: list[tuple[str, bytes]]) -> None:
        i = rng.randrange(len(content))
        name, value = content[i]
        kind = rng.randrange(6)
        if kind == 0:
            del content[i]
        elif kind == 1:
            content[i] = (
                rng.choice((name[:-1], name + "x", "../" + name, "x/" + name, "/" + name, "é")),
                value,
            )
        elif kind == 2:
            content.insert(i, (name, value))
        elif kind == 3:
            content[i] = (name, value[: rng.randrange(len(value) + 1)])
        elif kind == 4 and value:
            content[i] = (name, flip(rng, value))
        else:
            content[i] = (name, value + b"\0" * rng.choice((1, 4, 100)))

    return _repacked(rng, raw, change)


def _repacked(rng: random.Random, raw: bytes, change: Callable[[list[tuple[str, bytes]]], None]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        content = [(n, z.read(n)) for n in z.namelist()]
    change(content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, value in content:
            packed = zipfile.ZIP_DEFLATED if rng.random() < 0.001 else zipfile.ZIP_STORED
            z.writestr(name, value, packed)
    return out.getvalue()


PAYLOADS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__torch__\nM\n", b"ctorch\nFloatStorage\n", b"(ios\nsystem\n",
    b"X\2\0\0\0osX\6\0\0\0system\x93", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"\x82\1", b"X\4\0\0\0true\x85R", b"\x85R", b"\x86R", b"\x81", b"b",
    b"Q", b"(t", b"(", b"t", b"R", b"0", b"]", b"}", b")", b"e", b"u", b"s", b"a", b"N", b"h\0", b"h\1", b"q\1",
    b"\x94", b"\x8a\1\xff", b"J\xff\xff\xff\xff", b"K\0",
)  # fmt: skip


def opcodes(rng: random.Random, body: bytes) -> bytes:
    """Drops, doubles, swaps, inserts and replaces whole instructions, and changes their numbers."""
    starts = [at or 0 for _, _, at in pickletools.genops(body)] + [len(body)]
    parts = [
        body[a:b] for a, b in itertools.pairwise(starts) if body[a] != 0x95
    ]  # a frame's length would be wrong
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(7)
        if kind == 0 and len(parts) > 1:
            del parts[i]
        elif kind == 1:
            parts.insert(j, parts[i])
        elif kind == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == 3:
            parts.insert(i, rng.choice(PAYLOADS))
        elif kind == 4:
            parts[i] = rng.choice(PAYLOADS)
        elif kind == 5 and len(parts[i]) > 1:
            parts[i] = parts[i][:1] + integers(rng, parts[i][1:])
        else:
            parts[i : i + 1] = parts[min(i, j) : min(i, j) + rng.randrange(1, 40)]
    return b"".join(parts)


def pickles(rng: random.Random, raw: bytes) -> bytes:
    """The same archive with another data.pkl and right checksums, so that the interpreter sees it."""

    def change(content: list[tuple[str, bytes]]) -> None:
        i = next(i for i, (name, _) in enumerate(content) if name.endswith("data.pkl"))
        how = rng.choice((opcodes, opcodes, opcodes, flip, integers, splice, truncate))
        content[i] = (content[i][0], how(rng, content[i][1]))

    return _repacked(rng, raw, change)


def legacy_pickles(rng: random.Random, raw: bytes) -> bytes:
    """The same file with one of its five pickles changed."""
    stream, starts = io.BytesIO(raw), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        starts.append(stream.tell())
    parts = [raw[a:b] for a, b in itertools.pairwise([*starts, len(raw)])]
    i = rng.choice((1, 2, 3, 3, 3, 3, 4))
    parts[i] = rng.choice((opcodes, opcodes, opcodes, flip, integers, splice))(rng, parts[i])
    return b"".join(parts)


WORDS = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**63, 10**30, 0.5, "", "F32", "BF16", "U8", "../x", [], [0], [2, 2], {},
    "\ud800",
)  # fmt: skip


def json_values(rng: random.Random, value: object) -> object:
    """One value somewhere in a JSON tree is replaced, dropped, doubled or moved by one."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice((key + "x", "__metadata__", "")): value[key]}
        return {**value, key: json_values(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], json_values(rng, value[i]), *value[i + rng.choice((1, 1, 1, 0)) :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -1, 1, 4, 8))
    return rng.choice(WORDS)


def safetensors_header(rng: random.Random, raw: bytes) -> bytes:
    """Another header whose length is right."""
    size = int.from_bytes(raw[:8], "little")
    header: object = json.loads(raw[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 2))):
        header = json_values(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.2 and text:
        text = rng.choice((flip, splice, integers))(rng, text)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def index_values(rng: random.Random, raw: bytes) -> bytes:
    return json.dumps(json_values(rng, json.loads(raw))).encode()


def whole(raw: bytes, original: bytes) -> bool:
    """Whether the mutations that parse a file, archive or JSON, still can."""
    try:
        if original[8:9] == b"{":
            return isinstance(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]), dict)
        if original[:1] == b"{":
            return isinstance(json.loads(raw), dict)
        if original[:1] == b"\x80":
            stream = io.BytesIO(raw)
            return all(list(pickletools.genops(stream)) for _ in range(5))
        with zipfile.ZipFile(io.BytesIO(raw)) as z:
            content = {n: z.read(n) for n in z.namelist()}
            return bool(
                list(pickletools.genops(next(v for n, v in content.items() if n.endswith("data.pkl"))))
            )
    except Exception:  # the standard library's readers raise anything
        return False


BYTES: tuple[Mutate, ...] = (truncate, flip, integers, splice)
# Reader -> its seeds, its mutations, and the name that its file must have.
READERS: dict[str, tuple[Callable[[], list[bytes]], tuple[Mutate, ...], str]] = {
    "torch": (torch_seeds, (*BYTES, zip_fields, zip_fields, records), "a.pt"),
    "legacy": (legacy_seeds, (*BYTES, *(legacy_pickles,) * 6), "a.pt"),
    "torchscript": (script_seeds, (*BYTES, zip_fields, records, pickles), "a.pt"),
    "pickle": (torch_seeds, (pickles,), "a.pt"),
    "safetensors": (safetensors_seeds, (*BYTES, *(safetensors_header,) * 4), "a.safetensors"),
    "index": (index_seeds, (*BYTES, index_values, index_values), "model.safetensors.index.json"),
}


def mutated(rng: random.Random, originals: list[bytes], mutations: tuple[Mutate, ...]) -> bytes:
    """One of the files, changed one to three times."""
    raw = original = rng.choice(originals)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = rng.choice(mutations)(rng, raw)
        if not whole(raw, original):
            break
    return raw
