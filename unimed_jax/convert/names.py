"""Lists of names from files, for one line of a terminal: layers drawn together, escaped, bounded."""

from __future__ import annotations

import re
from collections import defaultdict

from unimed_jax.convert.mapped import shown

MAX_WORD = 200  # characters of one name as it stands; longer ones are cut like unprintable ones
MAX_LINE = 8000  # characters of a list


def plain(name: str) -> str:
    r"""A name as it is when it is short and printable, else quoted, escaped and cut.

    Example:
        >>> plain("a.b"), plain("a" + chr(27))
        ('a.b', "'a\\x1b'")
    """
    return name if len(name) <= MAX_WORD and name.isprintable() else shown(name)


def some(names: list[str], most: int = 6) -> str:
    """Names on one line; those that differ only in their layer are drawn together.

    Example:
        >>> some(["layer.0.w", "layer.1.w", "layer.3.w", "b"])
        'layer.{0-1,3}.w, b'
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name in map(plain, names):
        number = re.search(r"(?<=\.)[0-9]{1,9}(?=\.)", name)
        # The first number counts layers; later ones are part of the name (proj.0, proj.2).
        parts = (name[: number.start()], name[number.end() :]) if number else (name, "")
        groups[parts].append(int(number[0]) if number else -1)
    words, left = [], MAX_LINE
    for (head, tail), numbers in groups.items():
        word = f"{head}{'' if numbers[0] < 0 else _ranges(numbers)}{tail}"
        left -= len(word) + 2
        if len(words) == most or left < 0:
            break
        words.append(word)
    more = f" and {len(groups) - len(words)} more" if len(groups) > len(words) else ""
    return ", ".join(words) + more


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    words = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]
    return "{" + ",".join(words[:40]) + (",..." if len(words) > 40 else "") + "}"
