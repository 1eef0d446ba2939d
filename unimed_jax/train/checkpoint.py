"""Saved training states: written in the background by Orbax, verified at every restore.

One folder per step with the items `params`, `opt` (optimizer and step), `ema` when there is one, and `meta`, a JSON
with the settings, versions, digests and one fingerprint per leaf. Orbax alone does three things silently that are
fatal here, so this wrapper adds them: it restores flipped bits and wrong types (fingerprints and strict lists), it
reports a failed save one save late (`poll` after each step), and it deletes the old step before the new one is known
to be on the disk (files are synced first).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unimed_jax.data import files, limits
from unimed_jax.errors import DataError
from unimed_jax.models import clip
from unimed_jax.train import fingerprint, hygiene, saved_states

DAMAGED = "damaged"  # folder beside the steps for what failed its check
_TRASH = ".trash-"


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
        body = {
            **meta,
            "meta_version": saved_states.META_VERSION,
            "step": step,
            "versions": versions(),
            "leaves": leaves,
        }
        body["sha256"] = saved_states.digest(body)
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
        files.sync(self.folder)
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
                f"saving step {step} in {self.folder} failed: {saved_states.reason(e)}; "
                + (f"step {kept} is kept" if kept is not None else "no older step exists"),
                "free some space or repair the folder, then run the same command again",
            ) from e

    # -- restoring ----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The finished steps on the disk, oldest first."""
        return saved_states.steps(self.folder)

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
            except saved_states.Damaged as e:
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
        meta = self._agree(lambda: saved_states.read_meta(self.folder / str(step)))
        items = _items(wanted)
        for name in meta["leaves"]:
            if name not in items:
                raise DataError(
                    f"{where} has an item {name} that this config does not", "set optim.ema_decay as it was"
                )
        for name in items:
            described = {p: fingerprint.describe(x) for p, x in fingerprint.leaf_paths(items[name]).items()}
            fingerprint.require_same_tree(meta["leaves"].get(name, {}), described, f"{where} ({name})")
        restored = self._agree(lambda: saved_states.read_items(self.folder / str(step), items))
        for name, tree in restored.items():
            saved_states.verify(tree, meta["leaves"][name], f"{where} ({name})")
        if jax.process_index() == 0:
            _sync(self.folder / str(step))  # a kill may have come between the last save and its sync
        return _state(restored, wanted), meta

    def _agree(self, read: Any) -> Any:
        """Runs `read`; when it fails on one process it fails on all, so that all fall back to the same step."""
        error: saved_states.Damaged | None = None
        value = None
        try:
            value = read()
        except saved_states.Damaged as e:
            error = e
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if np.any(failed) and error is None:
                error = saved_states.Damaged(f"another process cannot read its part of {self.folder}")
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
    found["cores"] = str(limits.cores())
    return found


# -- trees <-> items ------------------------------------------------------------------------------------------------


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """Splits a state into items; all become nested dicts, so that a file does not depend on optax's classes."""
    rest = {k: v for k, v in state.items() if k not in ("params", "ema")}
    items = {k: state[k] for k in ("params", "ema") if k in state} | ({"opt": rest} if rest else {})
    return {name: clip.unflatten(fingerprint.leaf_paths(tree)) for name, tree in items.items()}


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


# -- files ----------------------------------------------------------------------------------------------------------


def _sync(folder: Path) -> None:
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            files.sync(Path(base, name))
        files.sync(Path(base))
