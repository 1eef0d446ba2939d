"""The training stream in blocks of rows: what one reader thread or process makes in one go."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from unimed_jax.data import captions, images, mixture, shards, workers
from unimed_jax.data.record import Example
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UnimedError

# Rows: enough to hide the cost of handing them over, few enough to keep all threads at work on the batch that is
# needed first.
MAX_BLOCK = 32
# Records read in a row: a picture drives everything else out of the processor's caches, after which reading one record
# and drawing its caption takes three times as long.
_TOGETHER = 8
BAD_RECORD = "unimed-jax data check finds all such records; export the source again"


class Records(Protocol):
    """The records of one source: a shards.Shards, or any list of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(slots=True, kw_only=True)
class Blocks:
    """The rows of one process as an endless sequence of blocks; picklable, so that worker processes can read it.

    Block i belongs to step i // per_step. Blocks are an implementation detail: their size changes no row.
    """

    mixture: mixture.Mixture
    sources: tuple[Records, ...]
    policies: tuple[str, ...]
    tokenizer: Tokenizer
    context_length: int  # tokens
    image_size: int  # pixels
    transform: dict[str, Any]  # arguments of images.train_image
    batch_size: int  # global rows
    first_row: int  # of this process within the global batch
    rows: int  # of this process
    block: int  # rows a block
    views: int = 0  # fixed crops a record; 0 = a fresh one each epoch
    per_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.per_step = -(-self.rows // self.block)

    def __len__(self) -> int:
        return workers.ENDLESS

    def __repr__(self) -> str:
        return f"Blocks({', '.join(self.mixture.names)})"

    def positions(self, index: int) -> range:
        """The places in the stream that a block holds."""
        step, part = divmod(index, self.per_step)
        first = part * self.block
        start = step * self.batch_size + self.first_row + first
        return range(start, start + min(self.block, self.rows - first))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draws = [self.mixture.locate(p) for p in self.positions(index)]
        n = len(draws)
        image = np.empty((n, self.image_size, self.image_size, 3), np.uint8)
        texts: list[str] = []
        for first in range(0, n, _TOGETHER):
            some = draws[first : first + _TOGETHER]
            names = self.mixture.names
            examples = [read_record(self.sources[d.source], d.record, names[d.source]) for d in some]
            texts += [self.caption(e, d) for e, d in zip(examples, some, strict=True)]
            for row, (e, d) in enumerate(zip(examples, some, strict=True), first):
                image[row] = self.picture(e, d)
        return {
            "image": image,
            "tokens": np.asarray(self.tokenizer.encode(texts, self.context_length), np.int32),
            "source": np.array([d.source for d in draws], np.int32),
            "mask": np.ones(n, bool),
            "caption_id": np.array([caption_id(t) for t in texts], np.int32),
        }

    def picture(self, example: Example, draw: mixture.Draw) -> UInt8[np.ndarray, "h w 3"]:
        """The crop of a draw.

        With fixed views it depends neither on the seed nor on more of the epoch than the view, and view 0 is the
        picture that evaluation sees.

        Raises:
            DataError: naming the source, the record and its key.
        """
        name, seed = self.mixture.names[draw.source], self.mixture.seed
        if self.views:
            draw, seed = draw._replace(epoch=draw.epoch % self.views), 0
        with blaming(self.sources[draw.source], draw.record, name, example.key):
            if self.views and draw.epoch == 0:
                return images.eval_image(example.image, self.image_size)
            rng = mixture.generator(seed, name, draw, "image")
            return images.train_image(example.image, self.image_size, rng, **self.transform)

    def caption(self, example: Example, draw: mixture.Draw) -> str:
        """The caption of a draw.

        Raises:
            DataError: naming the source, the record and its key.
        """
        name = self.mixture.names[draw.source]
        with blaming(self.sources[draw.source], draw.record, name, example.key):
            rng = mixture.generator(self.mixture.seed, name, draw, "caption")
            return example.captions[captions.draw(example.captions, self.policies[draw.source], rng)].text


def read_record(source: Records, index: int, name: str) -> Example:
    """Returns one record.

    Raises:
        DataError: naming the source and the record, and the shard where that is known.
    """
    with blaming(source, index, name):
        return source[index]


@contextlib.contextmanager
def blaming(source: Records, index: int, name: str, key: str = "") -> Iterator[None]:
    """Turns whatever goes wrong inside into a DataError that names the record: source, number, key and shard."""
    try:
        yield
    except Exception as e:  # decoders and record readers raise an open set of exceptions
        where = f"source {name} record {index}" + (f" (key {key})" if key else "")
        if isinstance(source, shards.Shards):
            where = f"{where} in {source.where(index)}"
        cause = e.cause if isinstance(e, UnimedError) else f"{type(e).__name__}: {e}"
        raise DataError(
            f"{where}: {cause}", e.remedy if isinstance(e, UnimedError) and e.remedy else BAD_RECORD
        ) from e


def caption_id(text: str) -> int:
    """Returns 31 bits that identify a caption's text, equal on every machine.

    Example:
        >>> caption_id("a chest film") == caption_id("a chest film") != caption_id("a fundus image")
        True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF
