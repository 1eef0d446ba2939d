"""Tables of the terminal: columns as wide as their longest cell."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, cells filled up to the width of their column, two blanks between.

    Example:
        >>> aligned([("task", "n"), ("mri_plane", "3")])
        ['task       n', 'mri_plane  3']
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
