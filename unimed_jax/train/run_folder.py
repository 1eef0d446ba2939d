"""The run folder: one run at a time, its settings, and what may change when it continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed_jax import config
from unimed_jax.data import files, lock, shards
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError

# Settings that may differ when a run continues: they do not change which numbers are computed, or (mesh) only their
# last bits. A field stands for all below it. data.root and data.tokenizer are held by digests instead.
MAY_CHANGE = (
    "checkpoint",
    "data.features",
    "data.prefetch",
    "data.root",
    "data.threads",
    "data.tokenizer",
    "data.workers",
    "eval",
    "log_every",
    "max_bad_steps",
    "mesh",
    "name",
    "watchdog_s",
    "writers",
)
WITH_EXTEND = ("duration",)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes a run folder and holds it for this process; kill -9 lets go of it, also on a machine that is gone.

    Raises:
        DataError: when another run is at work there, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"cannot write in {workdir}: {e.strerror}", "choose another --workdir") from e
    # A pre-empted job starts again on another machine: the lock that it left there must not need a person.
    with lock.held(workdir / ".lock", steal=True):
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames, so that a reader sees the old or the new file.

    Raises:
        DataError: when it cannot be written.
    """
    try:
        files.write_text(path, json.dumps(value, indent=1) + "\n")
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}", "free some space or choose another folder"
        ) from e


def refuse_drift(saved: dict[str, Any], cfg: config.Train, *, extend: bool, where: str) -> list[str]:
    """Compares the settings of a saved state with those asked for; returns the permitted changes as text.

    Raises:
        DataError: with the differences, when one changes the result.
    """
    try:
        old = config.from_dict(config.Train, saved)
    except UsageError as e:
        raise DataError(
            f"{where} was made by another version of unimed_jax: {e.cause}", "use that version"
        ) from e
    allowed = MAY_CHANGE + (WITH_EXTEND if extend else ())
    permitted, refused = [], []
    for path, (before, now) in config.diff(old, cfg).items():
        fine = any(path == a or path.startswith(f"{a}.") for a in allowed)
        (permitted if fine else refused).append(f"{path} was {_short(before)}, is {_short(now)}")
    if refused:
        more = (
            " (--extend permits another duration)" if any(r.startswith("duration") for r in refused) else ""
        )
        raise DataError(
            f"{where} was made with other settings: {'; '.join(refused)}",
            f"restore them to continue, or start in another --workdir{more}",
        )
    return permitted


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def manifests(sources: Sequence[shards.Shards]) -> dict[str, str]:
    """The sha256 of each source's manifest, which itself holds the sha256 of every shard."""
    return {s.name: hashlib.sha256((s.folder / shards.MANIFEST).read_bytes()).hexdigest() for s in sources}


def refuse_other_tokenizer(cfg: config.Train, tokenizer: Tokenizer, sources: Sequence[shards.Shards]) -> None:
    """Refuses a tokenizer that does not fit the model or the records.

    Raises:
        DataError: when its vocabulary is larger than the embedding table, its padding token is another one, or the
            records were exported with another tokenizer.
    """
    text = cfg.model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is {text.vocab_size}",
            "give the tokenizer that belongs to the model: --config.data.tokenizer=...",
        )
    if tokenizer.pad_id != text.pad_id:
        raise DataError(
            f"the tokenizer pads with {tokenizer.pad_id}, model.text.pad_id is {text.pad_id}",
            "give the tokenizer that belongs to the model: --config.data.tokenizer=...",
        )
    for source in sources:
        theirs = source.manifest.tokenizer
        if theirs and theirs != tokenizer.digest:
            raise DataError(
                f"source {source.name} was exported with another tokenizer (sha256 {theirs[:12]}, now "
                f"{tokenizer.digest[:12]}): its token counts do not hold",
                "use the tokenizer.json beside the records, or export them again",
            )


def refuse_other_data(saved: dict[str, Any], digests: dict[str, Any], where: str) -> None:
    """Refuses to continue on other records or with another tokenizer.

    Args:
        saved: the meta of a saved state.
        digests: {"tokenizer": ..., "manifests": {source: ...}} of this run.
        where: of the saved state, for the message.

    Raises:
        DataError: naming what differs.
    """
    if saved.get("tokenizer") != digests["tokenizer"]:
        raise DataError(
            f"{where} was made with another tokenizer (sha256 {str(saved.get('tokenizer'))[:12]}, "
            f"now {digests['tokenizer'][:12]})",
            "give the run's own tokenizer: --config.data.tokenizer=...",
        )
    old, new = saved.get("manifests", {}), digests["manifests"]
    other = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if other:
        raise DataError(
            f"{where} was made on other records of {', '.join(other)}",
            "restore the exported data, or start in another --workdir",
        )


def git_revision() -> str:
    """The commit of the checkout that this package runs from, with "+" when it has changes; "" when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    ask = lambda *words: subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    try:
        return ask("rev-parse", "HEAD") + (
            "+" if ask("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""
