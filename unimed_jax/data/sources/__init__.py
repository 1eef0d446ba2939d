"""The sources that records are built from, by name; each is imported when it is used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from unimed_jax import config
from unimed_jax.data.shards import RecordSource
from unimed_jax.errors import UsageError, did_you_mean


class Entry(NamedTuple):
    """Where a source's class is, a line of help, and options that its name fixes."""

    module: str
    cls: str
    help: str
    fixed: Mapping[str, str] = MappingProxyType({})


_HERE = "unimed_jax.data.sources"
SOURCES: dict[str, Entry] = {
    "folder": Entry(f"{_HERE}.folder", "Folder", "your own images: --raw DIR --captions TABLE.csv"),
    "medmnist": Entry(
        f"{_HERE}.medmnist", "MedMnist", "2D sets of MedMNIST: --raw, an .npz or a folder of them"
    ),
    "minimed": Entry(
        "unimed_jax.data.minimed", "Minimed", "real images of six modalities out of public packages"
    ),
    "parquet": Entry(
        f"{_HERE}.parquet", "Parquet", "Parquet files that hold the pictures: --raw FILE_OR_DIR"
    ),
    "phantom": Entry("unimed_jax.data.phantom", "Phantom", "synthetic pictures, for tests and benchmarks"),
    "webdataset": Entry(f"{_HERE}.webdataset", "Webdataset", "tars of pictures and texts: --raw DIR"),
    **{
        name: Entry(f"{_HERE}.unimed", "Unimed", "of UniMed: --raw DIR --captions FILE", {"name": name})
        for name in config.UNIMED_SOURCES
    },
}


def open_source(name: str, options: Mapping[str, Any]) -> RecordSource:
    """Makes a source from its options; text is converted to the type that the option has.

    Args:
        name: one of SOURCES.
        options: arguments of the source's class, e.g. {"raw": "/data", "captions": "table.csv"}.

    Raises:
        UsageError: for an unknown source, an unknown or missing option, or a value of the wrong type.

    Example:
        >>> len(open_source("phantom", {"n": "12"}).items())
        12
    """
    if name not in SOURCES:
        raise UsageError(
            f"no source {name!r}.{did_you_mean(name, SOURCES)}", f"there are: {', '.join(SOURCES)}"
        )
    entry = SOURCES[name]
    make = getattr(importlib.import_module(entry.module), entry.cls)
    every = inspect.signature(make, eval_str=True).parameters
    parameters = {k: p for k, p in every.items() if k not in entry.fixed}
    for option in options:
        if option not in parameters:
            raise UsageError(
                f"source {name} has no option {option!r}.{did_you_mean(option, parameters)}",
                f"its options: {', '.join(parameters)}",
            )
    missing = [p for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UsageError(
            f"source {name} needs {', '.join('--' + p.name for p in missing)}",
            "docs/data.md describes each source",
        )
    given = {k: _convert(name, k, v, parameters[k].annotation) for k, v in options.items()}
    return make(**entry.fixed, **given)


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _convert(source: str, option: str, value: Any, kind: Any) -> Any:
    """Text from the command line to the annotated type."""
    if not isinstance(value, str):
        return value
    try:
        if kind is bool:
            return _BOOLS[value.lower()]
        return kind(value) if kind in (int, float, Path) else value
    except (KeyError, ValueError) as e:
        raise UsageError(f"source {source}: {option}={value!r} is not of type {kind.__name__}") from e
