from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from unimed_jax import config
from unimed_jax.data import export, pipeline, shards, text, workers
from unimed_jax.data.blocks import Blocks, caption_id
from unimed_jax.data.mixture import Draw, Mixture, draws_per_epoch, generator, keys_of, permute
from unimed_jax.data.phantom import Phantom
from unimed_jax.data.record import Caption
from unimed_jax.errors import DataError, UsageError

SIZE = 16  # pixels: these tests are about order, not about pictures


# --- the order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000])
def test_permutation_is_a_bijection_that_depends_on_the_seed(n):
    orders = np.array([[permute(i, n, keys_of(seed, "test", 0)) for i in range(n)] for seed in range(20)])
    assert (np.sort(orders, axis=1) == np.arange(n)).all()
    if n >= 100:
        assert len({tuple(o) for o in orders}) == 20
        # Not the identity in disguise: neighbours are as far apart as in a random order, a third of n.
        assert abs(np.abs(np.diff(orders, axis=1)).mean() - n / 3) < 0.03 * n
        assert (np.diff(orders, axis=1) == 1).sum() < 60  # 20 in expectation


@pytest.mark.parametrize("n", [2, 6, 13])
def test_every_place_is_as_likely_for_every_index(n):
    seeds = 3000
    orders = np.array([[permute(i, n, keys_of(s, "test", 1)) for i in range(n)] for s in range(seeds)])
    counts = np.stack([(orders == place).sum(axis=0) for place in range(n)])
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    free = (n - 1) ** 2
    assert chi2 < free + 5 * np.sqrt(2 * free)
    # Pairs of neighbours, too: no index follows another in the order more often than by chance.
    pairs = collections.Counter((a, b) for o in orders for a, b in itertools.pairwise(o.tolist()))
    expected = seeds * (n - 1) / (n * (n - 1))
    assert max(abs(c - expected) for c in pairs.values()) < 5.5 * np.sqrt(expected)


def test_permutation_of_a_very_large_set_stays_inside_and_is_quick():
    keys = keys_of(0, "large", 0)
    n = 3_000_000_017
    found = [permute(i, n, keys) for i in range(2000)]
    assert len(set(found)) == 2000
    assert 0 <= min(found) < 0.01 * n
    assert 0.99 * n < max(found) < n


def mix(sizes=(30, 7, 100), weights=(1.0, 1.0, 1.0), mode="size", seed=3) -> Mixture:
    draws = draws_per_epoch(sizes, weights, mode)
    return Mixture(names=tuple(f"s{i}" for i in range(len(sizes))), sizes=sizes, draws=draws, seed=seed)


def test_equal_weights_read_every_record_exactly_once_an_epoch():
    m = mix()
    for epoch in range(3):
        span = range(epoch * m.epoch_examples, (epoch + 1) * m.epoch_examples)
        found = [m.locate(p) for p in span]
        assert {d.epoch for d in found} == {epoch}
        assert sorted(d[:2] for d in found) == [(s, r) for s, n in enumerate(m.sizes) for r in range(n)]


def test_epochs_and_seeds_are_ordered_differently():
    m = mix()
    n = m.epoch_examples
    orders = [[m.locate(e * n + i)[:2] for i in range(n)] for e in range(3)]
    orders.append([mix(seed=4).locate(i)[:2] for i in range(n)])
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize("weights", [(3.0, 1.0, 0.5), (0.3, 2.5, 1.0)])
def test_uneven_weights_still_cover_each_source_evenly(weights):
    m = mix(weights=weights)
    counts = collections.Counter()
    epochs = collections.Counter()
    n_epochs = 6
    for p in range(n_epochs * m.epoch_examples):
        d = m.locate(p)
        counts[d.source, d.record] += 1
        epochs[d.source, d.record, d.epoch] += 1
    assert set(epochs.values()) == {1}  # within one pass over a source no record comes twice
    for s, (size, weight) in enumerate(zip(m.sizes, weights, strict=True)):
        seen = [counts[s, r] for r in range(size)]
        assert max(seen) - min(seen) <= 1
        assert sum(seen) == n_epochs * m.draws[s] == n_epochs * max(1, round(weight * size))


def test_weight_mode_gives_shares_whatever_the_sizes():
    m = mix(sizes=(500, 20, 80), weights=(1.0, 2.0, 1.0), mode="weight")
    assert m.epoch_examples == 600
    assert m.draws == (150, 300, 150)
    # The mixture is even along the stream, not only at the end of an epoch.
    first = collections.Counter(m.locate(p).source for p in range(200))
    assert 80 <= first[1] <= 120
    with pytest.raises(UsageError, match="mixture"):
        draws_per_epoch([1], [1.0], "sizes")


def test_temperature_lies_between_sizes_and_equal_shares():
    sizes, weights = (1_000_000, 10_000, 100), (1.0, 1.0, 3.0)
    at = lambda t: draws_per_epoch(sizes, weights, "temperature", t)
    assert at(2.0) == pytest.approx([1_010_100 * m / 1130 for m in (1000, 100, 30)], abs=1)
    even = draws_per_epoch(sizes, (1.0, 1.0, 1.0), "temperature", 1.0)
    assert even == draws_per_epoch(sizes, (1.0, 1.0, 1.0), "size")
    assert at(1e9) == pytest.approx(draws_per_epoch(sizes, weights, "weight"), abs=20)
    assert [sum(at(t)) for t in (1, 2, 5)] == pytest.approx([sum(sizes)] * 3, abs=2)


def test_adding_a_source_leaves_the_augmentation_of_the_others_alone():
    numbers = [generator(0, "a", Draw(s, 5, 1), "image").random() for s in (0, 1)]
    assert numbers[0] == numbers[1]  # the name counts, not the place in the list


@pytest.mark.parametrize("count", range(1, 17))
def test_process_slices_are_disjoint_and_complete(count):
    batch, m = 48 * count // np.gcd(48, count), mix()
    rows = batch // count
    steps = -(-3 * m.epoch_examples // batch)
    for block in (1, 5, 32):
        shares = [blocks(m, batch=batch, first=k * rows, rows=rows, block=block) for k in range(count)]
        found = [
            p
            for step in range(steps)
            for b in shares
            for i in range(b.per_step)
            for p in b.positions(step * b.per_step + i)
        ]
        assert found == list(range(steps * batch))  # in order too: the global batch is the same for any count


# --- the batches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> text.Tokenizer:
    source = Phantom(n=48, size=SIZE)
    lines = [c.text for i in source.items() for c in source.example(i).captions]
    return text.train_wordpiece(lines, 200, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def records(tokenizer):
    def one(seed: int, n: int):
        source = Phantom(n=n, size=SIZE + 8, seed=seed)
        found = [source.example(i) for i in source.items()]
        return [
            dataclasses.replace(
                e,
                captions=tuple(
                    Caption(text=c.text, kind=c.kind, tokens=tokenizer.count(c.text)) for c in e.captions
                ),
            )
            for e in found
        ]

    return (one(0, 31), one(1, 12))


def blocks(
    m: Mixture, sources=(), tokenizer=None, *, batch=8, first=0, rows=8, block=3, **transform
) -> Blocks:
    return Blocks(
        mixture=m,
        sources=tuple(sources),
        policies=("uniform",) * len(m.sizes),
        tokenizer=tokenizer,
        context_length=12,
        image_size=SIZE,
        transform={"scale": (0.5, 1.0), "ratio": (0.75, 1.33), "hflip": True, "jitter": 0.2} | transform,
        batch_size=batch,
        first_row=first,
        rows=rows,
        block=block,
    )


def stream(
    records, tokenizer, *, index=0, count=1, n_workers=0, threads=2, block=3, batch=8
) -> pipeline.Pipeline:
    m = mix(sizes=tuple(len(r) for r in records), weights=(1.0,) * len(records))
    rows = batch // count
    share = blocks(m, records, tokenizer, batch=batch, first=index * rows, rows=rows, block=block)
    return pipeline.Pipeline(mixture=m, batch_size=batch, blocks=share, threads=threads, workers=n_workers)


def take(source: pipeline.Pipeline, n: int, start: int = 0) -> list[dict[str, np.ndarray]]:
    with contextlib.closing(source.batches(start)) as batches:
        return list(itertools.islice(batches, n))


def digests(batches: list[dict[str, np.ndarray]]) -> list[str]:
    return [
        hashlib.sha256(
            b"".join(k.encode() + str(v.dtype).encode() + v.tobytes() for k, v in sorted(b.items()))
        ).hexdigest()
        for b in batches
    ]


@pytest.fixture(scope="module")
def expected(records, tokenizer):
    return take(stream(records, tokenizer, threads=1, block=8), 12)  # more than two epochs of 43 records


def test_batch_has_the_agreed_shapes_and_says_what_it_holds(expected, records, tokenizer):
    batch = expected[0]
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "image": ("uint8", (8, SIZE, SIZE, 3)),
        "tokens": ("int32", (8, 12)),
        "source": ("int32", (8,)),
        "mask": ("bool", (8,)),
        "caption_id": ("int32", (8,)),
    }
    assert batch["mask"].all()
    assert (batch["caption_id"] >= 0).all()
    m = mix(sizes=(31, 12), weights=(1.0, 1.0))
    for row in range(8):
        draw = m.locate(row)
        example = records[draw.source][draw.record]
        match = [c.text for c in example.captions if caption_id(c.text) == batch["caption_id"][row]]
        assert len(match) == 1
        assert (tokenizer.encode(match, 12)[0] == batch["tokens"][row]).all()
        assert batch["source"][row] == draw.source


@pytest.mark.parametrize(("threads", "block"), [(1, 1), (4, 3), (2, 32)])
def test_stream_is_the_same_for_any_number_of_threads_and_any_block(
    records, tokenizer, expected, threads, block
):
    assert digests(take(stream(records, tokenizer, threads=threads, block=block), 12)) == digests(expected)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_stream_is_the_same_for_any_number_of_worker_processes(records, tokenizer, expected, n_workers):
    assert digests(take(stream(records, tokenizer, n_workers=n_workers), 12)) == digests(expected)
    assert digests(take(stream(records, tokenizer, n_workers=n_workers), 3, start=7)) == digests(
        expected[7:10]
    )


@pytest.mark.parametrize("count", [2, 4, 8])
def test_stream_is_the_same_for_any_number_of_hosts(records, tokenizer, expected, count):
    shares = [take(stream(records, tokenizer, index=k, count=count), 12) for k in range(count)]
    joined = [{k: np.concatenate([s[i][k] for s in shares]) for k in shares[0][i]} for i in range(12)]
    assert digests(joined) == digests(expected)


@pytest.mark.parametrize("start", [1, 4, 5, 6, 11])
def test_restart_at_any_step_continues_exactly(records, tokenizer, expected, start):
    assert digests(take(stream(records, tokenizer), 12 - start, start)) == digests(expected[start:])


def test_captions_and_crops_change_from_epoch_to_epoch(records, tokenizer):
    share = stream(records, tokenizer).blocks
    example, draws = records[0][5], [Draw(0, 5, epoch) for epoch in range(12)]
    assert len({share.caption(example, d) for d in draws}) == len(example.captions)
    assert len({share.picture(example, d).tobytes() for d in draws}) == 12


def test_a_bad_record_stops_training_and_is_named(records, tokenizer):
    bad = dataclasses.replace(records[0][9], image=records[0][9].image[:50])
    broken = ([*records[0][:9], bad, *records[0][10:]], records[1])
    for n_workers in (0, 1):
        with pytest.raises(DataError, match=r"source s0 record 9 \(key phantom/000009\)") as e:
            take(stream(broken, tokenizer, n_workers=n_workers), 6)
        assert e.value.exit_code == 3
        assert "data check" in e.value.remedy
    silent = (
        [*records[0][:9], dataclasses.replace(bad, image=records[0][9].image, captions=()), *records[0][10:]],
    )
    with pytest.raises(DataError, match=r"record 9 .*no caption"):
        take(stream(silent, tokenizer), 6)


# --- worker processes ---------------------------------------------------------------------------------------------


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def shared_memory_of(*pids: int) -> set[str]:
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(re.findall(r"/dev/shm/(psm_\w+)", maps))


def left(names: set[str]) -> set[str]:
    return names & set(os.listdir("/dev/shm"))


PROGRAM = """
import itertools, multiprocessing, os, sys, time
import numpy as np
from unimed_jax.data import workers

class Slow:
    def __len__(self):
        return workers.ENDLESS
    def __getitem__(self, i):
        time.sleep(0.01)
        return {"x": np.full((256, 512), i % 7, np.uint8)}

if __name__ == "__main__":
    parts = workers.read(Slow(), start=0, threads=1, workers=2, ahead=8)
    next(parts)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    try:
        for part in parts:
            time.sleep(0.01)
            if os.path.exists("stop"):
                break
        del part
        parts.close()
        print("left", len(multiprocessing.active_children()), flush=True)
    except workers.Fault as e:
        print("fault", e.line(), flush=True)
        sys.exit(e.exit_code)
"""


@pytest.fixture
def trainer(tmp_path):
    """A program that reads through two workers; yields (process, pids of the workers)."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    pids = [int(p) for p in line.split()]
    assert len(pids) == 2, line + process.stdout.read()
    try:
        yield process, pids
    finally:
        for pid in (process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stdout.close()
        process.wait(10)


def test_workers_end_when_the_trainer_is_killed(trainer):
    process, pids = trainer
    shm = shared_memory_of(process.pid, *pids)
    process.kill()
    process.wait(10)
    end = time.monotonic() + 5
    while (any(map(running, pids)) or left(shm)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(running, pids))
    assert not left(shm)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_a_fault_with_its_exit_code(trainer, number):
    process, pids = trainer
    start = time.monotonic()
    os.kill(pids[1], number)
    out, _ = process.communicate(timeout=15)
    assert time.monotonic() - start < 5
    assert process.returncode == 70
    assert f"exit code -{int(number)} ({signal.Signals(number).name})" in out
    assert not any(map(running, pids))


def test_workers_ignore_the_signals_that_stop_a_trainer_and_close_cleanly(trainer, tmp_path):
    process, pids = trainer
    for number in (signal.SIGTERM, signal.SIGINT):
        for pid in pids:
            os.kill(pid, number)
    time.sleep(0.5)
    assert all(map(running, pids))
    shm = shared_memory_of(process.pid, *pids)
    (tmp_path / "stop").touch()
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "left 0" in out
    end = time.monotonic() + 5
    while left(shm) and time.monotonic() < end:  # Python's tracker removes what was on its way at the end
        time.sleep(0.05)
    assert not left(shm)


def test_a_script_without_main_guard_is_told_so(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from unimed_jax.data import workers\n"
        "from unimed_jax.errors import Fault\n"
        "try:\n    next(workers.read([1, 2], start=0, threads=1, workers=1, ahead=1))\n"
        "except Fault as e:\n    print(e.line())\n"
    )
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "exit code 1" in out.stdout
    assert "__main__" in out.stdout


def test_too_little_shared_memory_is_refused_before_the_start():
    with pytest.raises(UsageError, match="/dev/shm"):
        next(workers.read(range(1), start=0, threads=1, workers=1, ahead=1, nbytes=1 << 50))


def test_starting_workers_leaves_the_environment_alone_and_the_signal_mask_as_it_was(
    records, tokenizer, monkeypatch
):
    def refuse(*_):
        raise AssertionError("setenv while other threads may call getenv crashes the trainer")

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pytest.importorskip("grain")  # importing jax writes the environment
    with monkeypatch.context() as m:  # pytest writes the environment between tests
        for name in ("__setitem__", "__delitem__"):
            m.setattr(type(os.environ), name, refuse)
        take(stream(records, tokenizer, n_workers=1), 1)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


# --- prefetch and evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_device_prefetch_keeps_order_and_stays_n_ahead(n):
    done: list[int] = []
    ahead = []
    for i, x in enumerate(pipeline.device_prefetch(range(10), lambda x: done.append(x) or x, n)):
        assert x == i
        ahead.append(len(done) - 1 - i)
    assert max(ahead) == min(n, 9)


def test_device_prefetch_closes_its_source():
    closed = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    with contextlib.closing(pipeline.device_prefetch(endless(), lambda x: x, 2)) as ready:
        next(ready)
    assert closed


# --- from a config ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer) -> Path:
    """Two exported sources of 48 and 24 pictures."""
    out = tmp_path_factory.mktemp("data")
    tokenizer.save(out)
    for name, n in (("openi", 48), ("phantom", 24)):
        source = Renamed(Phantom(n=n, size=SIZE + 8), name)
        export.export(source, out, shards=2, tokenizer=tokenizer)
    return out


class Renamed:
    """A phantom under another source's name."""

    def __init__(self, source: Phantom, name: str):
        self.source, self.name = source, name
        self.licence, self.description, self.items = source.licence, source.description, source.items

    def example(self, item):
        return dataclasses.replace(self.source.example(item), source=self.name, key=f"{self.name}/{item.key}")


def config_of(root: Path, **data) -> config.Train:
    c = config.Train(batch_size=8, duration=config.Duration(epochs=2))
    c.model.vision.image_size, c.model.text.context_length = SIZE, 12
    c.data = config.Data(root=str(root), **data)
    return c


def test_every_source_under_the_root_with_its_own_caption_policy(root, tokenizer):
    c = config_of(root)
    p = pipeline.make(c, tokenizer=tokenizer)
    sizes = dict(zip(p.mixture.names, map(len, p.blocks.sources), strict=True))
    assert p.mixture.names == ("openi", "phantom")
    assert p.epoch_examples == sum(sizes.values())
    assert p.steps_per_epoch == -(-p.epoch_examples // 8)
    batches = take(p, p.steps_per_epoch)
    assert (np.concatenate([b["source"] for b in batches])[: p.epoch_examples] == 0).sum() == sizes["openi"]
    first = {caption_id(e.captions[0].text) for e in p.blocks.sources[0]}
    every = {caption_id(c.text) for e in p.blocks.sources[1] for c in e.captions}
    drawn = [collections.Counter(), collections.Counter()]
    for b in batches:
        for s, i in zip(b["source"], b["caption_id"], strict=True):
            drawn[s][int(i)] += 1
    assert set(drawn[0]) <= first  # OpenI always reads the original
    assert set(drawn[1]) <= every
    assert set(drawn[1]) - {caption_id(e.captions[0].text) for e in p.blocks.sources[1]}


def test_hosts_and_workers_from_a_config(root, tokenizer):
    c = config_of(root, sources=(config.Source(name="phantom", weight=2.0), config.Source(name="openi")))
    whole = take(pipeline.make(c, tokenizer=tokenizer), 5)
    c.data.workers = 1
    halves = [
        take(pipeline.make(c, tokenizer=tokenizer, process_index=k, process_count=2), 5) for k in range(2)
    ]
    joined = [{k: np.concatenate([h[i][k] for h in halves]) for k in whole[0]} for i in range(5)]
    assert digests(joined) == digests(whole)


def test_impossible_requests_are_refused(root, tokenizer, tmp_path):
    def refuse(kind, match, count=1, **data):
        c = config_of(root, **data) if "root" not in data else config_of(**data)
        c.batch_size = data.pop("batch_size", 8)
        with pytest.raises(kind, match=match):
            pipeline.make(c, tokenizer=tokenizer, process_count=count)

    refuse(UsageError, 'Did you mean "phantom"', sources=(config.Source(name="phantm"),))
    both = (config.Source(name="phantom"), config.Source(name="other", path="phantom"))
    refuse(UsageError, "sources phantom and other are the same records", sources=both)
    refuse(UsageError, "no caption policy", sources=(config.Source(name="phantom", captions="all"),))
    refuse(UsageError, "does not divide over 3", count=3)
    refuse(UsageError, "data.root is empty", root="")
    refuse(DataError, "no folder", root=tmp_path / "nowhere")
    refuse(DataError, "no source with a manifest", root=tmp_path)
    refuse(DataError, "no split", split="trian")
    c = config_of(root)
    c.batch_size = 1000
    with pytest.raises(UsageError, match=r"exceeds the .* examples of an epoch"):
        pipeline.make(c, tokenizer=tokenizer)


def test_a_damaged_record_names_shard_record_and_key(root, tokenizer, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    p = pipeline.make(config_of(copy), tokenizer=tokenizer)
    damaged = p.blocks.sources[0]
    assert isinstance(damaged, shards.Shards)
    shard = damaged.folder / damaged.shards[0].file
    data = bytearray(shard.read_bytes())
    middle = data.index(b"\x89PNG") + 40  # array_record checks itself: any change within a record is found
    data[middle : middle + 8] = bytes(b ^ 0xFF for b in data[middle : middle + 8])
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"source openi record \d+.*" + shard.name):
        take(p, p.steps_per_epoch)


def test_plan_counts_what_a_run_would_read(root, tokenizer):
    c = config_of(root, sources=(config.Source(name="phantom", weight=2.0), config.Source(name="openi")))
    c.model.text_groups = ((10, 0.5), (12, 0.5))
    p = pipeline.make(c, tokenizer=tokenizer)
    planned = pipeline.plan(c, steps=6)
    json.dumps(planned)
    a, b = planned["sources"]
    assert (a["name"], a["draws_per_epoch"], a["passes_per_epoch"]) == ("phantom", 2 * a["records"], 2.0)
    assert (b["captions"], b["passes_per_epoch"]) == ("first", 1.0)
    assert a["share"] + b["share"] == 1
    assert planned["epoch_examples"] == p.epoch_examples == a["draws_per_epoch"] + b["draws_per_epoch"]
    assert planned["total_steps"] == -(-2 * p.epoch_examples // 8)
    # The captions counted are those that training reads.
    tokens = np.stack([b["tokens"] for b in take(p, 6)])
    lengths = (tokens != tokenizer.pad_id).sum(axis=-1)
    assert planned["tokens"]["captions"] == lengths.size
    assert planned["tokens"]["mean"] == lengths.mean()
    assert sum(planned["tokens"]["up_to"].values()) == lengths.size
    assert planned["tokens"]["padding"] == pytest.approx((tokens == tokenizer.pad_id).mean())
    fit = np.sort(lengths, axis=-1)[:, 3] <= 10
    padding = 1 - lengths.sum() / np.where(fit, 4 * 10 + 4 * 12, 8 * 12).sum()
    assert planned["text_groups"] == pytest.approx({"batches": 6, "fit": fit.mean(), "padding": padding})
    c.optim.accum_steps = 2  # four rows a micro-batch of one device: it is cut without moving rows
    halves = np.sort(lengths.reshape(-1, 2, 2, 2).swapaxes(1, 2).reshape(12, 2, 2), axis=-1)
    fit = (halves[..., 0] <= 10).all(axis=-1)
    planned = pipeline.plan(c, steps=6, shards_of_batch=2)["text_groups"]
    assert (planned["batches"], planned["fit"]) == (12, fit.mean())
    c.model.text_groups = ()
    assert pipeline.plan(c)["text_groups"] == {}
