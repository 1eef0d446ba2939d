"""Pictures that two sets share, or one set holds twice: an audit of training against evaluation.

Four kinds of evidence, the strongest first; a pair is named once, by the strongest that it has:

- `bytes`: the stored files are equal (SHA-256);
- `pixels`: the decoded pictures are equal, in whatever format;
- `phash`: perceptual hashes differ in at most some bits (data/phash.py), which may be by chance;
- `embedding`: a model sees them as nearly the same, which neighbouring slices of a volume are, too.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float

from unimed_jax.data import phash
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import embed, search
from unimed_jax.evaluate.inputs import Inputs, Item
from unimed_jax.evaluate.streams import read_all
from unimed_jax.infer import Loaded

KINDS = ("bytes", "pixels", "phash", "embedding")
MOST = 20  # pairs listed for one picture and one kind, the closest first; all are counted
COSINE = 0.98
_DEEPEST = 256  # copies of a picture behind which a model's neighbours are still looked for

Progress = Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class Prints:
    """What identifies the pictures of one set."""

    name: str
    ids: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the input that holds it
    stored: list[str] = field(default_factory=list)  # SHA-256 of the stored bytes
    pixels: list[bytes] = field(default_factory=list)  # digest of shape and values
    hashes: list[tuple[int, ...]] = field(default_factory=list)  # none for a picture of nearly one gray
    errors: list[dict[str, str]] = field(default_factory=list)  # set, input, reason

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def flat(self) -> int:
        """Pictures of nearly one gray."""
        return sum(not h for h in self.hashes)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures, as positions in their sets."""

    kind: str
    a: int
    b: int
    bits: int | None = None  # in which the hashes differ
    cosine: float | None = None


@dataclass(slots=True, kw_only=True)
class Audit:
    """What was found."""

    a: Prints
    b: Prints
    itself: bool  # one set against itself; pairs have a < b
    distance: int
    cosine: float | None
    model: dict[str, str] | None = None
    pairs: list[Pair] = field(default_factory=list)  # those that are listed
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> pairs, pictures of b

    @property
    def shared(self) -> int:
        """Pictures of b with any pair."""
        return len({p.b for p in self.pairs})

    @property
    def errors(self) -> list[dict[str, str]]:
        """Pictures that could not be read, of both sets."""
        return self.a.errors if self.itself else [*self.a.errors, *self.b.errors]

    def rows(self) -> list[dict[str, Any]]:
        """The pairs with names, the strongest kind first, then the order of b."""
        order = sorted(
            self.pairs, key=lambda p: (KINDS.index(p.kind), p.b, p.bits or 0, -(p.cosine or 0), p.a)
        )
        return [
            {"kind": p.kind, "bits": p.bits, "cosine": p.cosine, "a": self.a.ids[p.a], "b": self.b.ids[p.b]}
            for p in order
        ]

    def json(self) -> dict[str, Any]:
        """Counts, settings and pairs."""
        sets = {"a": self.a} if self.itself else {"a": self.a, "b": self.b}
        return {
            "format": "unimed_jax.overlap",
            "version": 1,
            "sets": {
                k: {"name": s.name, "pictures": len(s), "flat": s.flat, "failed": len(s.errors)}
                for k, s in sets.items()
            },
            "settings": {
                "distance": self.distance,
                "cosine": self.cosine,
                "model": self.model,
                "listed": MOST,
            },
            "shared": self.shared,
            "counts": self.counts,
            "pairs": self.rows(),
        }


def fingerprint(inputs: Inputs, *, threads: int = 4, progress: Progress | None = None) -> Prints:
    """Reads and decodes every picture once; those that cannot be read are listed.

    Raises:
        DataError: when none can be read.
    """
    out = Prints(name=inputs.name)
    for done, (number, found) in enumerate(
        read_all(inputs, range(len(inputs)), _print, threads, hashed=True), 1
    ):
        if isinstance(found, DataError):
            out.errors.append({"set": out.name, "input": inputs.title(number), "reason": found.cause})
        else:
            for item, (pixels, hashes) in found:
                out.ids.append(item.id)
                out.numbers.append(number)
                out.stored.append(item.sha256)
                out.pixels.append(pixels)
                out.hashes.append(hashes)
        if progress:
            progress(done, len(inputs))
    if not len(out):
        first = out.errors[0]["reason"] if out.errors else "there is none"
        raise DataError(f"no picture of {out.name} can be read, the first: {first}")
    return out


def _print(item: Item) -> tuple[bytes, tuple[int, ...]]:
    return phash.prints(item.pixels())


def audit(
    a: Inputs,
    b: Inputs | None = None,
    *,
    distance: int = phash.DISTANCE,
    loaded: Loaded | None = None,
    cosine: float = COSINE,
    threads: int = 4,
    progress: Progress | None = None,
) -> Audit:
    """Finds the pictures of `b` that `a` has, too; without `b` the pictures that `a` has more than once.

    Args:
        a: usually what was trained on.
        b: usually what is evaluated on.
        distance: bits in which perceptual hashes may differ; below 0 = this kind is not asked for.
        loaded: a model for the last kind; None = without it.
        cosine: of two embeddings, from which they count as nearly the same.
        threads: pictures read in parallel.
        progress: called with (done, all) inputs, for each set and stage.

    Raises:
        UsageError: for a distance or cosine out of range.
        DataError: when no picture of a set can be read, or far too many are similar.
    """
    if distance > phash.FURTHEST:
        raise UsageError(f"distance is {distance}", f"0 to {phash.FURTHEST} bits, or below 0 for none")
    if not -1 <= cosine <= 1:
        raise UsageError(f"cosine is {cosine}", "-1 to 1")
    prints_a = fingerprint(a, threads=threads, progress=progress)
    prints_b = fingerprint(b, threads=threads, progress=progress) if b is not None else prints_a
    out = Audit(
        a=prints_a, b=prints_b, itself=b is None, distance=distance, cosine=cosine if loaded else None
    )
    out.model = {"name": loaded.cfg.name, "sha256": loaded.digest} if loaded else None
    stages: list[tuple[str, Iterator[_Found]]] = [
        ("bytes", _equal(out, "bytes")),
        ("pixels", _equal(out, "pixels")),
    ]
    if distance >= 0:
        stages.append(("phash", _similar(out)))
    if loaded is not None:
        stages.append(("embedding", _seen(out, loaded, a, b, threads, progress)))
    for kind, found in stages:
        total, pictures = 0, 0
        for pairs, count in found:
            out.pairs += pairs
            total += count
            pictures += 1
        out.counts[kind] = {"pairs": total, "pictures": pictures}
    return out


# Of one picture of b: its pairs, at most `MOST`, and how many there are. Each kind implies the following one, except
# the last, so that pairs that are new are those which the kind before does not have.
_Found = tuple[list[Pair], int]


def _groups(values: Sequence[Any]) -> dict[Any, list[int]]:
    places: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(value, []).append(i)
    return places


def _before(out: Audit, group: Sequence[int], j: int) -> int:
    """How many of a group of a's pictures are compared with picture j: in one set only those before it."""
    return bisect.bisect_left(group, j) if out.itself else len(group)


def _equal(out: Audit, kind: str) -> Iterator[_Found]:
    """Equal bytes; or equal pixels of different bytes."""
    a, b = out.a, out.b
    stored, pixels = _groups(a.stored), _groups(a.pixels)
    for j in range(len(b)):
        mine = stored.get(b.stored[j], [])
        same = _before(out, mine, j)
        if kind == "bytes":
            if same:
                yield [Pair(kind, i, j) for i in mine[: min(same, MOST)]], same
            continue
        group = pixels.get(b.pixels[j], [])
        count = _before(out, group, j)
        if count > same:
            other = (i for i in group[:count] if a.stored[i] != b.stored[j])
            yield [Pair(kind, i, j) for i in islice(other, MOST)], count - same


def _similar(out: Audit) -> Iterator[_Found]:
    """Hashes that differ little, of different pixels; pictures of equal pixels are looked up once."""
    a, b = out.a, out.b
    groups_a, groups_b = _groups(a.pixels), _groups(b.pixels)
    rows_a, rows_b = list(groups_a.values()), list(groups_b.values())
    found = _nearby([a.hashes[r[0]] for r in rows_a], [b.hashes[r[0]] for r in rows_b], out.distance)
    for k, close in found.items():
        near = [
            (n, rows_a[i])
            for i, n in sorted(close.items(), key=lambda x: (x[1], x[0]))
            if a.pixels[rows_a[i][0]] != b.pixels[rows_b[k][0]]
        ]
        for j in rows_b[k]:
            count = sum(_before(out, rows, j) for _, rows in near)
            if count:
                every = (
                    Pair("phash", i, j, bits=n) for n, rows in near for i in rows[: _before(out, rows, j)]
                )
                yield list(islice(every, MOST)), count


def _nearby(
    a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]], distance: int
) -> dict[int, dict[int, int]]:
    """For each place in b: the places in a that are near with any of their hashes, and the least bits."""
    of_a = [i for i, hashes in enumerate(a) for _ in hashes]
    of_b = [j for j, hashes in enumerate(b) for _ in hashes]
    flat = [np.array([h for hashes in s for h in hashes], np.uint64) for s in (a, b)]
    out: dict[int, dict[int, int]] = {}
    near = phash.near(flat[0], flat[1], distance)
    for i, j, n in zip(*(x.tolist() for x in near), strict=True):
        close = out.setdefault(of_b[j], {})
        close[of_a[i]] = min(n, close.get(of_a[i], n))
    return out


def _seen(
    out: Audit, loaded: Loaded, a: Inputs, b: Inputs | None, threads: int, progress: Progress | None
) -> Iterator[_Found]:
    """Embeddings with a large cosine, of pictures that nothing else pairs; at most `MOST` of each are counted."""
    z_a = _embeddings(loaded, a, out.a, threads, progress)
    z_b = _embeddings(loaded, b, out.b, threads, progress) if b is not None else z_a
    k = min(len(z_a), MOST + 1 + _most_stronger(out))
    scores, rows = search.top_k(z_b, (z_a[i : i + search.SLAB] for i in range(0, len(z_a), search.SLAB)), k)
    assert out.cosine is not None
    found: dict[int, dict[int, float]] = {}
    for j in range(len(z_b)):
        for s, i in zip(scores[j].tolist(), rows[j].tolist(), strict=True):
            first, second = (min(i, j), max(i, j)) if out.itself else (i, j)
            if s >= out.cosine and not (out.itself and i == j) and not _stronger(out, first, second):
                found.setdefault(second, {}).setdefault(first, s)
    for j, near in sorted(found.items()):
        best = sorted(near.items(), key=lambda x: (-x[1], x[0]))[:MOST]
        yield [Pair("embedding", i, j, cosine=s) for i, s in best], len(best)


def _stronger(out: Audit, i: int, j: int) -> bool:
    """Whether anything but a model pairs two pictures, listed or not."""
    a, b = out.a, out.b
    if a.stored[i] == b.stored[j] or a.pixels[i] == b.pixels[j]:
        return True
    return any((x ^ y).bit_count() <= out.distance for x in a.hashes[i] for y in b.hashes[j])


def _most_stronger(out: Audit) -> int:
    """At most how many pictures of a are listed or counted with one of b: so many neighbours are no news."""
    copies = max(
        (len(g) for values in (out.a.stored, out.a.pixels) for g in _groups(values).values()), default=0
    )
    listed = max(
        Counter(x for p in out.pairs for x in ((p.a, p.b) if out.itself else (p.b,))).values(), default=0
    )
    return min(max(copies, listed), _DEEPEST)


def _embeddings(
    loaded: Loaded, inputs: Inputs, prints: Prints, threads: int, progress: Progress | None
) -> Float[np.ndarray, "n d"]:
    """Unit vectors in the order of the prints.

    Raises:
        DataError: when a picture that was read before cannot be read now.
    """
    numbers = list(dict.fromkeys(prints.numbers))
    ids, z = embed.vectors_of(loaded, inputs, numbers, threads=threads, progress=progress)
    if ids != prints.ids:
        raise DataError(f"{prints.name} has changed while it was read", "run it again")
    return z


def examples(
    out: Audit, a: Inputs, b: Inputs | None, count: int = 12
) -> dict[str, list[tuple[Pair, Item, Item]]]:
    """Some pairs of each kind with their pictures, the least certain first, each picture of b once."""
    chosen: dict[str, list[tuple[Pair, Item, Item]]] = {}
    doubt = lambda p: (-(p.bits or 0), p.cosine or 0.0, p.b)
    for kind in KINDS:
        seen: set[int] = set()
        for p in sorted((p for p in out.pairs if p.kind == kind), key=doubt):
            if p.b in seen or len(seen) == count:
                continue
            seen.add(p.b)
            pictures = _again(a, out.a, p.a), _again(b or a, out.b, p.b)
            chosen.setdefault(kind, []).append((p, *pictures))
    return chosen


def _again(inputs: Inputs, prints: Prints, place: int) -> Item:
    return next(item for item in inputs.read(prints.numbers[place]) if item.id == prints.ids[place])
