"""Saved training states, read and verified: which there are, what they say of themselves, and their arrays.

`checkpoint` writes them. Whatever Orbax finds wrong becomes one line, and every leaf is compared with the fingerprint
that was saved beside it: Orbax alone restores flipped bits and wrong types without a word.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unimed_jax.errors import DataError
from unimed_jax.models import clip
from unimed_jax.train import fingerprint

META_VERSION = 1
# A quota and a limit on file sizes are full disks to whoever has them.
_FULL_WORDS = ("no space left", "resource_exhausted", "quota exceeded", "file too large")


class Damaged(DataError):
    """A saved state that cannot be read or whose values are not those that were saved."""


def load_params(
    folder: str | Path, *, step: int | None = None, ema: bool | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads only the parameters of a saved state, verified, as a nested dict of numpy arrays.

    Args:
        folder: a run folder, its `checkpoints` folder, or one step's folder.
        step: which step; the newest by default.
        ema: the averaged parameters (True), the plain ones (False), or averaged where they were kept (None).

    Returns:
        (params, meta); `meta["config"]` has the settings of the run.

    Raises:
        DataError: when there is none, it is damaged, or the asked kind is not in it.
    """
    path = find_step(folder, step)
    meta = read_meta(path)
    has = "ema" in meta["leaves"]
    name = "ema" if (has if ema is None else ema) else "params"
    if name not in meta["leaves"]:
        raise DataError(f"checkpoint {path} keeps no averaged parameters", "read the plain ones")
    shapes = {p: _parse(d) for p, d in meta["leaves"][name].items()}
    tree = read_items(path, {name: clip.unflatten(shapes)})[name]
    verify(tree, meta["leaves"][name], f"checkpoint {path} ({name})")
    return jax.tree.map(np.asarray, tree), meta


def find_step(folder: str | Path, step: int | None = None) -> Path:
    """The folder of one saved step, given a run folder, its `checkpoints` folder or the step's folder itself.

    Raises:
        DataError: when there is none.
    """
    folder = Path(folder).absolute()
    if folder.name.isdigit() and (folder / "meta").is_dir():
        return folder
    for base in (folder / "checkpoints", folder):
        there = steps(base)
        if step is not None and step in there:
            return base / str(step)
        if step is None and there:
            return base / str(max(there))
    raise DataError(
        f"no checkpoint {'' if step is None else f'of step {step} '}in {folder}", "give a run folder"
    )


def read_meta(step_folder: Path) -> dict[str, Any]:
    """The JSON saved beside a state, checked against its own digest.

    Raises:
        Damaged: when it is missing, unreadable or altered.
    """
    try:
        meta = json.loads((step_folder / "meta" / "metadata").read_bytes())
        ok = (
            isinstance(meta, dict) and meta.get("sha256") == digest(meta) and isinstance(meta["leaves"], dict)
        )
    except (OSError, ValueError, KeyError, RecursionError) as e:
        raise Damaged(f"checkpoint {step_folder}: its meta cannot be read ({type(e).__name__})") from e
    if not ok:
        raise Damaged(f"checkpoint {step_folder}: its meta does not have the digest it was saved with")
    if meta["meta_version"] > META_VERSION:
        raise DataError(f"checkpoint {step_folder} was made by a newer unimed_jax", "update the package")
    return meta


def read_items(step_folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Reads trees of arrays onto the given abstract ones.

    Raises:
        Damaged: for anything Orbax finds wrong.
    """
    out, damage = {}, ""
    for name, tree in items.items():
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                out[name] = reader.restore(step_folder / name, args=ocp.args.StandardRestore(tree))
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            damage = f"checkpoint {step_folder} ({name}) cannot be read: {reason(e)}"
        if damage:  # here, where nothing holds the exception any more
            _forget_quietly()
            raise Damaged(damage)
    return out


def _forget_quietly() -> None:
    """Frees the reads that Orbax began beside one that failed; each would print pages when Python frees it later."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    before, log.disabled, sys.unraisablehook = log.disabled, True, lambda _: None
    try:
        gc.collect()
    finally:
        log.disabled, sys.unraisablehook = before, hook


def verify(tree: Any, saved: dict[str, str], where: str) -> None:
    """Compares every leaf with its saved fingerprint.

    Raises:
        Damaged: naming the leaves that differ.
    """
    found = fingerprint.fingerprint(tree)
    wrong = sorted(p for p in found if found[p] != saved.get(p))
    if wrong:
        raise Damaged(
            f"{where}: {len(wrong)} of {len(found)} leaves are not what was saved: {', '.join(wrong[:4])}"
            + (" ..." if len(wrong) > 4 else "")
        )


def _parse(description: str) -> jax.ShapeDtypeStruct:
    dtype, _, rest = description.partition("[")
    shape = rest.split("]")[0]
    # A sharding of its own: that of the file may need devices that are not here.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), np.dtype(dtype), sharding=here)


def steps(folder: Path) -> list[int]:
    """The saved steps in a folder, oldest first: Orbax gives a step its final name only when it is complete."""
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def digest(meta: dict[str, Any]) -> str:
    """The SHA-256 of a meta without its own digest."""
    body = {k: v for k, v in meta.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def reason(e: BaseException) -> str:
    """An exception of Orbax or TensorStore in a few words."""
    text = " ".join(str(e).split())
    full = any(words in text.lower() for words in _FULL_WORDS) or getattr(e, "errno", None) == errno.ENOSPC
    return "the disk is full" if full else f"{type(e).__name__}: {text[:200]}"
