"""Pictures of many inputs in order, read by several threads ahead of who needs them, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unimed_jax.data import found
from unimed_jax.errors import DataError
from unimed_jax.evaluate import batches, reading
from unimed_jax.evaluate.inputs import Files, Inputs, Item, file_item

_AHEAD = 4  # inputs read ahead, for each thread


@dataclass(frozen=True, slots=True)
class Lost:
    """Something that cannot be read."""

    title: str
    error: DataError


@dataclass(frozen=True, slots=True)
class End:
    """An input is finished."""


def squares(
    inputs: Inputs, numbers: Sequence[int], size: int, threads: int
) -> Iterator[tuple[Item, UInt8[np.ndarray, "size size 3"]] | Lost | End]:
    """The evaluation pictures of some inputs, in their order, with an `End` after each input.

    Of a file that breaks off, the pictures before the break are there, and it is `Lost` as well.
    """
    if not isinstance(inputs, Files):
        for number, items in read_all(inputs, numbers, lambda item: item.square(size), threads):
            if isinstance(items, DataError):
                yield Lost(inputs.title(number), items)
            else:
                yield from items
            yield End()
        return
    chosen = [inputs.inputs[n] for n in numbers]
    source = lambda item, hold: inputs.frames(item, size, hold)
    for _, event in reading.read(
        chosen, source, size, ahead=_AHEAD * threads, threads=threads, keep=lambda *_: ""
    ):
        if isinstance(event, reading.Ready):
            yield file_item(event.file, event.picture), event.square
        elif isinstance(event, found.Failed):
            yield Lost(str(event.file), event.error)
        else:
            yield End()


def read_all(
    inputs: Inputs, numbers: Sequence[int], make: Callable[[Item], Any], threads: int, *, hashed: bool = False
) -> Iterator[tuple[int, list[tuple[Item, Any]] | DataError]]:
    """(number, its items with `make` of each) in order, or the refusal; some are read ahead, in parallel.

    An item comes without its picture: `make` keeps of it what is needed.
    """

    def work(number: int) -> list[tuple[Item, Any]] | DataError:
        try:
            return [
                (dataclasses.replace(item, data=b""), make(item))
                for item in inputs.read(number, hashed=hashed)
            ]
        except DataError as e:
            return e

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="read") as pool,
        closing(batches.map_ahead(pool, work, numbers, ahead=_AHEAD * threads)) as results,
    ):
        yield from zip(numbers, results, strict=True)
