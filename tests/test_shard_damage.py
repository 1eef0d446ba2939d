"""Every kind of damage to every shard of an export: the check names it, a read is right or an error, training stops."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_shards import write_raw

from unimed_jax import config
from unimed_jax.cli import data as cli_data
from unimed_jax.data import pipeline
from unimed_jax.data.export import export
from unimed_jax.data.record import Example
from unimed_jax.data.shards import Manifest, Shards
from unimed_jax.data.text import Tokenizer, train_wordpiece
from unimed_jax.errors import DataError

BATCH = 8


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    bad = bytearray(data)
    bad[at] ^= 1 << rng.randrange(8)
    return bytes(bad)


def _zero(data: bytes, at: int) -> bytes:
    bad = data[:at] + bytes(4096) + data[at + 4096 :]
    return bad if bad != data else _zero(data, 0)  # not where there are only zeros


# name: (bytes, place inside a picture, generator) -> damaged bytes
MUTATIONS = {
    "truncated": lambda data, at, rng: data[: rng.randrange(1, len(data))],
    "tail cut": lambda data, at, rng: data[: -rng.randrange(1, 64)],
    "junk appended": lambda data, at, rng: data + rng.randbytes(rng.randrange(1, 4096)),
    "empty": lambda data, at, rng: b"",
    "bit flipped in a picture": _flip,
    "4 KB zeroed from a picture on": lambda data, at, rng: _zero(data, at),
    "bit flipped anywhere": lambda data, at, rng: _flip(data, rng.randrange(len(data)), rng),
    "4 KB zeroed anywhere": lambda data, at, rng: _zero(data, rng.randrange(len(data) - 4096)),
}
OTHER_SIZE = ("truncated", "tail cut", "junk appended", "empty")
IN_A_RECORD = ("bit flipped in a picture", "4 KB zeroed from a picture on")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """60 pictures in two splits of three shards each."""
    folder = tmp_path_factory.mktemp("damage")
    source = write_raw(folder / "raw")
    words = ["A frontal chest radiograph, number 0123456789.", "An X-ray of the chest."]
    export(source, folder / "records", shards=3, tokenizer=train_wordpiece(words * 9, 120, folder))
    return folder / "records"


@pytest.fixture(scope="module")
def clean(root) -> dict[str, list[Example]]:
    opened = {split: Shards(root / "demo", split) for split in ("train", "test")}
    return {split: [records[i] for i in range(len(records))] for split, records in opened.items()}


def batches(root: Path) -> list[str]:
    """The digests of the batches of an epoch of training."""
    c = config.Train(batch_size=BATCH, duration=config.Duration(epochs=1))
    c.model.vision.image_size, c.model.text.context_length = 16, 12
    c.data = config.Data(root=str(root))
    p = pipeline.make(c, tokenizer=Tokenizer(root / "tokenizer.json"))
    with contextlib.closing(p.batches()) as stream:
        found = [next(stream) for _ in range(p.steps_per_epoch)]
    return [
        hashlib.sha256(b"".join(np.asarray(b[k]).tobytes() for k in sorted(b))).hexdigest() for b in found
    ]


@pytest.fixture(scope="module")
def stream(root) -> list[str]:
    return batches(root)


@pytest.mark.parametrize("how", MUTATIONS)
def test_damage_of_any_shard_is_named(how, root, clean, stream, tmp_path, capsys):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    folder, rng = copy / "demo" / "1.0.0", random.Random(how)
    every = [
        (split, i, s) for split, infos in Manifest.read(folder).splits.items() for i, s in enumerate(infos)
    ]
    assert len(every) == 6
    for split, number, shard in every:
        path = folder / shard.file
        good = path.read_bytes()
        first = sum(s.count for s in Manifest.read(folder).splits[split][:number])
        row = rng.randrange(shard.count)
        at = good.index(clean[split][first + row].image) + rng.randrange(200)
        path.write_bytes(MUTATIONS[how](good, at, rng))

        with pytest.raises(DataError, match="problem") as e:
            cli_data.run(["check", str(copy), "--full"])
        assert e.value.exit_code == 3
        listed = capsys.readouterr().out.splitlines()[:-1]  # the last line counts
        assert listed
        assert all(str(path) in line for line in listed)
        if how in IN_A_RECORD:
            # The file's own index may lie in the zeroed part: then the shard does not open at all.
            unopened = "cannot be opened" in listed[0] or "the manifest says" in listed[0]
            assert unopened or any(re.search(rf"{shard.file} record {row}\b", line) for line in listed)
            assert not unopened or how != "bit flipped in a picture"

        wrong = _read(copy / "demo", split, clean[split], shard.file, first, shard.count)
        if how in OTHER_SIZE:
            with pytest.raises(DataError, match=re.escape(shard.file)):
                Shards(copy / "demo", split)
        if how in IN_A_RECORD:
            assert row in wrong
        if split == "train" and wrong:
            with pytest.raises(DataError, match=re.escape(shard.file)) as e:
                batches(copy)
            assert e.value.exit_code == 3
        else:
            assert batches(copy) == stream  # damage in another split, or in bytes that no record has
        path.write_bytes(good)
    assert cli_data.run(["check", str(copy), "--full"]) == 0


def _read(folder: Path, split: str, clean: list[Example], file: str, first: int, count: int) -> set[int]:
    """The records of the damaged shard that cannot be read; all others must be those of the clean export."""
    try:
        records = Shards(folder, split)
    except DataError:
        return set(range(count))
    wrong, causes = set(), []
    for i, want in enumerate(clean):
        try:
            got = records[i]
        except DataError as e:
            causes.append(e.cause)
            wrong.add(i - first)
        else:
            assert got == want
    assert all(file in cause for cause in causes)
    assert wrong <= set(range(count))
    return wrong
