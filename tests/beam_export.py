"""Run by tests/test_beam.py in a process that finds Apache Beam: a folder by the command, and sources that break."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from unimed_jax.cli.main import main
from unimed_jax.data import beam
from unimed_jax.data.phantom import Phantom
from unimed_jax.data.record import Example
from unimed_jax.data.shards import Item
from unimed_jax.errors import DataError, UnimedError


@dataclass(frozen=True)
class Fails:
    """The phantom, whose first readings of some items fail as no item should."""

    marks: str
    times: int
    kind: type[Exception]
    name: str = "phantom"
    licence: str = ""
    description: str = ""

    @property
    def fingerprint(self) -> str:
        return "the same whatever fails"

    def items(self) -> list[Item]:
        return [Item(f"{i:03d}") for i in range(60)]

    def example(self, item: Item) -> Example:
        if item.key in ("007", "033"):
            for k in range(self.times):
                mark = Path(self.marks) / f"{item.key}-{k}"
                if not mark.exists():
                    mark.touch()
                    raise self.kind("broken for now")
        phantom = Phantom(n=60, size=40)
        found = phantom.example(phantom.items()[int(item.key)])
        return Example(key=item.key, image=found.image, captions=found.captions, modality=found.modality)


def fails(out: str, marks: str, times: str, kind: str, runner: str) -> int:
    source = Fails(marks, int(times), {"fault": RuntimeError, "data": DataError}[kind])
    try:
        beam.export(source, out, [f"--runner={runner}"], shards=3)
    except UnimedError as e:
        print(f"{type(e).__name__}: {e.line()}")
        return e.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.argv[1] == "fails":
        sys.exit(fails(*sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
