"""One shard: written beside its place, read back, digested, synced and renamed; then its sidecar, in the same way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimed_jax.data import markers, record, reduce, validate
from unimed_jax.data.files import encodable, file_sha256, sync
from unimed_jax.data.record import Example
from unimed_jax.data.shards import RecordSource, array_record_module
from unimed_jax.data.text import Tokenizer
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, Fault, UnimedError

# One record a chunk: records are read at random. Pictures do not get smaller by compressing them again.
OPTIONS = "group_size:1,uncompressed"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left", "file too large", "quota exceeded", "resource_exhausted")


@dataclass(slots=True, frozen=True, kw_only=True)
class Job:
    """A shard to write; `digest` stands for everything that it is made from."""

    path: Path
    split: str
    items: tuple[Any, ...]
    keys: tuple[str, ...]
    digest: str
    max_side: int = 0  # pixels of the longer side that are stored at most; 0 = any
    attempt: str = ""  # where several may write the same shard at once: each beside the others

    @property
    def part(self) -> Path:
        """Where the shard grows until it is whole."""
        attempt = f".{self.attempt}" if self.attempt else ""
        return self.path.with_name(f".{self.path.name}{attempt}.part")

    @property
    def sidecar(self) -> Path:
        """The file that says what the shard holds."""
        return self.path.with_name(self.path.name + ".json")


def finished(job: Job) -> dict[str, Any] | None:
    """The sidecar of a shard that an earlier run has finished from the same input; None = write it."""
    try:
        sidecar = json.loads(job.sidecar.read_text(encoding="utf-8"))
        if sidecar["digest"] == job.digest and sidecar["bytes"] == job.path.stat().st_size:
            return sidecar
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_shard(source: RecordSource, job: Job, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Writes one shard and its sidecar; returns the sidecar.

    Raises:
        DataError: when the disk is full or the shard cannot be written; nothing is left under its name.
        Fault: when the source itself breaks.
    """
    module = array_record_module()
    part, said = job.part, job.part.with_name(f"{job.part.name.removesuffix('.part')}.json.part")
    rejects: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    try:
        writer = module.ArrayRecordWriter(str(part), OPTIONS)
        for item, key in zip(job.items, job.keys, strict=True):
            try:
                example, notes = _read(source, item, key, job, tokenizer)
                blob = record.encode(example)
            except Reject as e:
                rejects.append({"key": key, "split": job.split, "reason": e.reason, "detail": e.detail})
                continue
            writer.write(blob)
            counts.update(_count(example))
            counts.update(notes)
        writer.close()
        count = counts["records"]
        _read_back(module, part, count)
        sidecar = {
            "file": job.path.name,
            "count": count,
            "bytes": part.stat().st_size,
            "sha256": file_sha256(part),
            "digest": job.digest,
            "counts": dict(sorted(counts.items())),
            "rejects": rejects,
        }
        sync(part)
        said.write_text(encodable(json.dumps(sidecar, ensure_ascii=False, indent=1)) + "\n", encoding="utf-8")
        sync(said)
        os.replace(part, job.path)
        os.replace(said, job.sidecar)
        return sidecar
    except (UnimedError, KeyboardInterrupt):
        raise
    except Exception as e:  # array_record raises plain RuntimeError for a failed write
        raise write_error(job.path, e) from e
    finally:
        for beside in (part, said):
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def _read(
    source: RecordSource, item: Any, key: str, job: Job, tokenizer: Tokenizer | None
) -> tuple[Example, Counter[str]]:
    """One example as it is stored, and what had to be done to its picture and captions."""
    try:
        example = source.example(item)
    except (Reject, UnimedError):
        raise
    except FileNotFoundError as e:
        raise Reject("missing", e.strerror or "no such file") from e
    except OSError as e:
        raise Reject("unreadable", e.strerror or type(e).__name__) from e
    except Exception as e:
        raise Fault(f"source {source.name} broke on {key}: {type(e).__name__}: {e}") from e
    if example.split != job.split:
        raise Fault(f"source {source.name} lists {key} in split {job.split} and reads it as {example.split}")
    example = replace(example, key=key, source=source.name)
    notes = markers.tally(example.captions, source.name)
    example, reduced = reduce.apply(example, job.max_side)
    if reduced:
        notes[reduced] += 1
    example = validate.finish(example, tokenizer.count if tokenizer else None)
    if sum(map(len, (example.image, *(c.text for c in example.captions)))) > record.limits.MAX_RECORD_BYTES:
        raise Reject("too_large", f"more than {record.limits.MAX_RECORD_BYTES} bytes in one record")
    return example, notes


def _count(example: Example) -> Iterator[str]:
    yield "records"
    yield f"modality {example.modality or 'unknown'}"
    yield f"format {example.image_format}"
    if example.simulated:
        yield "simulated"
    for caption in example.captions:
        yield "captions"
        yield f"captions {caption.kind}"


def _read_back(module: Any, path: Path, count: int) -> None:
    reader = module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != count:
        raise DataError(f"shard {path} has {found} records after {count} were written", "run it again")


def write_error(path: Path, e: Exception) -> DataError:
    """What a failed write means to a user."""
    text = str(e).lower()
    if getattr(e, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS):
        free = shutil.disk_usage(path.parent).free // 2**20
        return DataError(
            f"the disk is full, {path} cannot be written ({free} MiB free)",
            "free some space and run the same command again: finished shards are kept",
        )
    return DataError(f"{path} cannot be written: {type(e).__name__}: {e}", "run the same command again")
