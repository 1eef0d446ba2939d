"""Saved training states: written in the background by Orbax, verified at every restore.

One folder per step with the items `params`, `opt` (optimizer and step), `ema` when there is one, and `meta`, a JSON
with the settings, versions, digests and one fingerprint per leaf. Orbax alone does three things silently that are
fatal here, so this wrapper adds them: it restores flipped bits and wrong types (fingerprints and strict lists), it
reports a failed save one save late (`poll` after each step), and it deletes the old step before the new one is known
to be on the disk (files are synced first).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unimed_jax.errors import DataError
from unimed_jax.train import fingerprint, hygiene

META_VERSION = 1
DAMAGED = "damaged"  # folder beside the steps for what failed its check
_TRASH = ".trash-"
# A quota and a limit on file sizes are full disks to whoever has them.
_FULL_WORDS = ("no space left", "resource_exhausted", "quota exceeded", "file too large")


class Damaged(DataError):
    """A saved state that cannot be read or whose values are not those that were saved."""


class Checkpointer:
    """Saves and restores states under one folder.

    A state is a dict: "params", perhaps "ema", and anything else (step, optimizer), as trees of arrays.

    Args:
        folder: where the steps live; made when missing.
        keep: how many of the newest steps stay, at least 2.

    Raises:
        DataError: when the folder cannot be written.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> state = {"step": jnp.int32(3), "params": {"w": jnp.ones(2)}}
        >>> with Checkpointer(tempfile.mkdtemp()) as saved:
        ...     saved.save(3, state, {})
        ...     saved.wait()
        ...     int(saved.restore(abstract(state))[0]["step"])
        3
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder = Path(folder).absolute()
        self.keep = max(2, keep)
        self._pending: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for old in self.folder.glob(f"{_TRASH}*"):
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as e:
            raise DataError(
                f"cannot write checkpoints in {self.folder}: {e.strerror}", "choose another --workdir"
            ) from e
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # pruned here, after the newest is synced
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            save_root_metadata=False,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(quietly=kind is not None)

    # -- saving -------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts saving a state; the copy to host memory is done when this returns. The same step twice is a no-op.

        Raises:
            DataError: when this or the previous save failed (disk full, no permission); older steps are untouched.
        """
        self.wait()
        if step in self.steps():
            return
        items = _items(state)
        leaves = {name: fingerprint.fingerprint(tree) for name, tree in items.items()}
        body = {**meta, "meta_version": META_VERSION, "step": step, "versions": versions(), "leaves": leaves}
        body["sha256"] = _digest(body)
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}  # type: ignore[call-arg]
        self._pending = step
        with self._failures():
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(body)))  # type: ignore[call-arg]

    def poll(self) -> None:
        """Looks after a running save, without waiting for it; call after each step.

        Raises:
            DataError: when the save failed; the older steps are untouched and another `save` may be tried.
        """
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()  # joins the thread, which is over: an error that came just now is seen too

    def wait(self) -> None:
        """Waits until a running save is on the disk.

        Raises:
            DataError: when it failed.
        """
        if self._pending is None:
            return
        with self._failures():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._settle()

    def close(self, *, quietly: bool = False) -> None:
        """Finishes a running save and frees the background threads; `quietly` while another error is on its way."""
        try:
            self.wait()
        except DataError as e:
            if not quietly:
                raise
            hygiene.say(e.line())
        finally:
            self._manager.close()

    def _settle(self) -> None:
        """The pending save is complete: sync it, then let go of the oldest steps."""
        step = self._pending
        if step not in self.steps():
            raise OSError(f"step {step} was not written")
        self._pending = None
        if jax.process_index() != 0:
            return
        _sync(self.folder / str(step))
        _sync_one(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        # Renamed first: a kill in the middle of the deletion must not leave half a step under a step's name.
        trash = self.folder / f"{_TRASH}{step}"
        os.replace(self.folder / str(step), trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns whatever Orbax raises into one line, and starts it anew: after an error its list of steps is wrong."""
        try:
            yield
        except Exception as e:
            step, self._pending = self._pending, None
            if step is not None and jax.process_index() == 0:
                for unfinished in self.folder.glob(f"{step}.*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            if jax.process_count() == 1:  # opening it is a barrier, and the peers are not here
                with contextlib.suppress(Exception):
                    self._manager.close()
                self._manager = self._open()
            kept = self.latest()
            raise DataError(
                f"saving step {step} in {self.folder} failed: {_reason(e)}; "
                + (f"step {kept} is kept" if kept is not None else "no older step exists"),
                "free some space or repair the folder, then run the same command again",
            ) from e

    # -- restoring ----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The finished steps on the disk, oldest first."""
        return _steps(self.folder)

    def latest(self) -> int | None:
        """The newest finished step, None when there is none."""
        return max(self.steps(), default=None)

    def restore(self, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores the newest state that passes its check, onto the shardings of `wanted`.

        Args:
            wanted: the state as `jax.ShapeDtypeStruct`s with shardings; any mesh will do.

        Returns:
            The state and its meta. Damaged steps on the way are moved to the folder "damaged".

        Raises:
            DataError: when the tree differs (four lists), or when no step is intact.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore_step(step, wanted)
            except Damaged as e:
                hygiene.say(f"{e.line()}; trying an older step")
                self._quarantine(step)
        self.refuse_damaged_only()
        raise DataError(f"{self.folder}: no saved step", "start in a new --workdir")

    def refuse_damaged_only(self) -> None:
        """Keeps a run whose states are all damaged from starting anew over what is left of it.

        Raises:
            DataError: when there are damaged steps and no other.
        """
        damaged = sorted(p.name for p in (self.folder / DAMAGED).glob("*"))
        if damaged and not self.steps():
            raise DataError(
                f"{self.folder}: all saved steps ({', '.join(damaged)}) are damaged",
                "start in a new --workdir",
            )

    def restore_step(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores exactly this step.

        Raises:
            Damaged: when it cannot be read or a fingerprint differs.
            DataError: when the tree differs.
        """
        where = f"checkpoint {self.folder / str(step)}"
        meta = self._agree(lambda: read_meta(self.folder / str(step)))
        items = _items(wanted)
        for name in meta["leaves"]:
            if name not in items:
                raise DataError(
                    f"{where} has an item {name} that this config does not", "set optim.ema_decay as it was"
                )
        for name in items:
            described = {p: fingerprint.describe(x) for p, x in fingerprint.leaf_paths(items[name]).items()}
            fingerprint.require_same_tree(meta["leaves"].get(name, {}), described, f"{where} ({name})")
        restored = self._agree(lambda: _read_items(self.folder / str(step), items))
        for name, tree in restored.items():
            _verify(tree, meta["leaves"][name], f"{where} ({name})")
        if jax.process_index() == 0:
            _sync(self.folder / str(step))  # a kill may have come between the last save and its sync
        return _state(restored, wanted), meta

    def _agree(self, read: Any) -> Any:
        """Runs `read`; when it fails on one process it fails on all, so that all fall back to the same step."""
        error: Damaged | None = None
        value = None
        try:
            value = read()
        except Damaged as e:
            error = e
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if np.any(failed) and error is None:
                error = Damaged(f"another process cannot read its part of {self.folder}")
        if error is not None:
            raise error
        return value

    def _quarantine(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.folder / DAMAGED
            target.mkdir(exist_ok=True)
            name = next(
                n for n in (f"{step}", *(f"{step}-{i}" for i in range(1, 1000))) if not (target / n).exists()
            )
            os.replace(self.folder / str(step), target / name)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"quarantined {step}")
        self._manager.reload()  # it remembers the step, and would not save it again


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
    tree = _read_items(path, {name: _nested(shapes)})[name]
    _verify(tree, meta["leaves"][name], f"checkpoint {path} ({name})")
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
        steps = _steps(base)
        if step is not None and step in steps:
            return base / str(step)
        if step is None and steps:
            return base / str(max(steps))
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
            isinstance(meta, dict)
            and meta.get("sha256") == _digest(meta)
            and isinstance(meta["leaves"], dict)
        )
    except (OSError, ValueError, KeyError, RecursionError) as e:
        raise Damaged(f"checkpoint {step_folder}: its meta cannot be read ({type(e).__name__})") from e
    if not ok:
        raise Damaged(f"checkpoint {step_folder}: its meta does not have the digest it was saved with")
    if meta["meta_version"] > META_VERSION:
        raise DataError(f"checkpoint {step_folder} was made by a newer unimed_jax", "update the package")
    return meta


def abstract(state: Any, shardings: Any = None) -> Any:
    """Shapes, types and shardings of a state without its values (concrete leaves keep their own sharding)."""
    if shardings is not None:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state
    )


def versions() -> dict[str, str]:
    """What a result depends on beside the settings: package versions, devices, cores."""
    import importlib.metadata as im

    names = ("unimed-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found: dict[str, str] = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(im.PackageNotFoundError):
            found[name] = im.version(name)
    devices = jax.devices()
    found |= {
        "device": devices[0].device_kind,
        "devices": str(len(devices)),
        "hosts": str(jax.process_count()),
    }
    found["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return found


# -- trees <-> items ------------------------------------------------------------------------------------------------


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """Splits a state into items; all become nested dicts, so that a file does not depend on optax's classes."""
    rest = {k: v for k, v in state.items() if k not in ("params", "ema")}
    items = {k: state[k] for k in ("params", "ema") if k in state} | ({"opt": rest} if rest else {})
    return {name: _nested(fingerprint.leaf_paths(tree)) for name, tree in items.items()}


def _state(items: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Puts restored items back into the structure of `wanted`."""
    rest = {k: v for k, v in wanted.items() if k not in ("params", "ema")}
    out: dict[str, Any] = {}
    for name, structure in (("params", wanted["params"]), ("ema", wanted.get("ema")), ("opt", rest)):
        if name in items:
            values = fingerprint.leaf_paths(items[name])
            leaves = [values[path] for path in fingerprint.leaf_paths(structure)]
            tree = jax.tree.unflatten(jax.tree.structure(structure), leaves)
            out |= tree if name == "opt" else {name: tree}
    return out


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = leaf
    return out


def _read_items(step_folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Reads trees of arrays onto the given abstract ones.

    Raises:
        Damaged: for anything Orbax finds wrong.
    """
    out, damage = {}, ""
    for name, tree in items.items():
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                out[name] = reader.restore(step_folder / name, args=ocp.args.StandardRestore(tree))  # type: ignore[call-arg]
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            damage = f"checkpoint {step_folder} ({name}) cannot be read: {_reason(e)}"
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


def _verify(tree: Any, saved: dict[str, str], where: str) -> None:
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


# -- files ----------------------------------------------------------------------------------------------------------


def _steps(folder: Path) -> list[int]:
    """Orbax gives a step its final name only when it is complete."""
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _digest(meta: dict[str, Any]) -> str:
    body = {k: v for k, v in meta.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reason(e: BaseException) -> str:
    text = " ".join(str(e).split())
    full = any(words in text.lower() for words in _FULL_WORDS) or getattr(e, "errno", None) == errno.ENOSPC
    return "the disk is full" if full else f"{type(e).__name__}: {text[:200]}"


def _sync(folder: Path) -> None:
    for base, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync_one(Path(base, name))
        _sync_one(Path(base))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
