"""Fetches the weights of a named model once, checks them against their pins, and makes one self-contained folder.

The only place that reaches the Hugging Face hub. What a pin does not say is asked for: `trust_first` takes what the
hub gives today and records revision and digest in the folder, so that a second machine can be given the same pins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimed_jax import config, model_folder
from unimed_jax.convert import card, native, source
from unimed_jax.data import files
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import origins, zoo
from unimed_jax.models.origins import File

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What `fetch` made.

    Attributes:
        folder: the model folder, or for a part the folder with the tower file.
        files: each file's repository, name, revision and sha256 as fetched.
    """

    folder: Path
    files: dict[str, dict[str, str]]


def fetch(
    name: str,
    out: str | Path,
    *,
    revision: str = "",
    sha256: str = "",
    trust_first: bool = False,
    tokenizer: str | Path = "",
    force: bool = False,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Downloads the files of a name, verifies them and converts them into a model folder.

    Args:
        name: of `origins.ORIGINS`.
        out: target folder.
        revision: commit of the weights' repository; must agree with a known pin.
        sha256: digest of the weights; must agree with a known pin.
        trust_first: where a pin is not known, take what the hub has now and record it.
        tokenizer: a local tokenizer to use instead of fetching one.
        force: replace an existing model folder.
        endpoint: of the hub; default the user's `HF_ENDPOINT`, else huggingface.co.
        progress: called with one line a file.

    Raises:
        UsageError: for an unknown name, a missing pin without `trust_first`, or a pin other than the known one.
        DataError: when the hub cannot be reached, a file differs from its pin, or the weights do not fit the name.
    """
    origin = origins.get(name)
    out = Path(out)
    if not origin.tower:
        files.refuse_folder(out, model_folder.OWN_FILES, force=force, what="model folder")
    elif os.path.lexists(out) and not (force and out.is_dir()):
        raise UsageError(f"{out} exists", "choose another folder, or --force to replace its files")
    wanted = {"weights": _pinned(name, origin.weights, revision=revision, sha256=sha256)}
    if origin.tokenizer and not tokenizer:
        wanted["tokenizer"] = origin.tokenizer
    _refuse_unpinned(name, out, wanted, trust_first=trust_first)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.fetch-") as scratch:
        paths, pins = {}, {}
        for role, file in wanted.items():
            paths[role], pinned = _download(file, Path(scratch) / role, endpoint)
            pins[role] = dataclasses.asdict(pinned)
            if progress:
                progress(f"{pinned.repo} {pinned.name} at {pinned.revision[:12]}: sha256 {pinned.sha256}")
        words = tokenizer or paths.get("tokenizer")
        make = _make_part if origin.tower else _make_model
        make(name, paths["weights"], words, out, pins, force)
    return Fetched(folder=out, files=pins)


def _pinned(name: str, file: File, *, revision: str, sha256: str) -> File:
    for kind, given, digits in (("revision", revision, 40), ("sha256", sha256, 64)):
        known = getattr(file, kind)
        if given and not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", given):  # a branch moves: it pins nothing
            raise UsageError(f"--{kind} {given} is no pin", f"give all {digits} hexadecimal digits")
        if given and known and given.lower() != known:
            raise UsageError(
                f"--{kind} {given} is not the known {kind} of {name}, {known}",
                f"leave --{kind} out, or convert a file of your own: unimed-jax convert FILE DIR --model {name}",
            )
    return dataclasses.replace(
        file, revision=(file.revision or revision).lower(), sha256=(file.sha256 or sha256).lower()
    )


def _refuse_unpinned(name: str, out: Path, files: dict[str, File], *, trust_first: bool) -> None:
    lacks = [f"{', '.join(f.missing)} of {f.repo}/{f.name}" for f in files.values() if f.missing]
    if lacks and not trust_first:
        raise UsageError(
            f"{name}: no public pin is known for {'; '.join(lacks)}",
            f"give --revision and --sha256 (and --tokenizer FILE), or accept and record what the hub has today: "
            f"unimed-jax models fetch {name} --out {out} --trust-first-download",
        )


def _download(file: File, folder: Path, endpoint: str | None) -> tuple[Path, File]:
    """The file and its complete pins."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub import errors as hub_errors

    if constants.HF_HUB_OFFLINE:
        raise DataError(
            "HF_HUB_OFFLINE is set: nothing is fetched", "unset it for this one command, or copy the folder"
        )
    try:
        with _silent():
            revision = file.revision or str(HfApi(endpoint=endpoint).model_info(file.repo).sha)
            path = Path(
                hf_hub_download(file.repo, file.name, revision=revision, local_dir=folder, endpoint=endpoint)
            )
    except hub_errors.GatedRepoError as e:
        raise DataError(
            f"{file.repo} asks for its terms to be accepted", "accept them on its page, log in"
        ) from e
    except Exception as e:  # its own errors, those of its HTTP client and of the system: there is no file
        reason = " ".join("".join(c if c.isprintable() else " " for c in str(e)).split())[:200]
        raise DataError(
            f"{file.repo}/{file.name} cannot be fetched: {reason}",
            "check the network and the names, or copy the file here and use unimed-jax convert",
        ) from e
    found = files.file_sha256(path)
    if file.sha256 and found != file.sha256:
        raise DataError(
            f"{file.repo}/{file.name} at {revision[:12]} has sha256 {found}, not {file.sha256}",
            "the file was changed on the way or at its origin: do not use it",
        )
    return path, dataclasses.replace(file, revision=revision, sha256=found)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The hub's library tells every retry twice; a refusal is one line here. Progress bars stay."""
    known = ("huggingface_hub", *logging.root.manager.loggerDict)
    loggers = [logging.getLogger(n) for n in known if n.split(".")[0] == "huggingface_hub"]
    before = [x.disabled for x in loggers]
    with warnings.catch_warnings(action="ignore"):
        try:
            for x in loggers:
                x.disabled = True
            yield
        finally:
            for x, was in zip(loggers, before, strict=True):
                x.disabled = was


def _make_model(
    name: str, weights: Path, words: str | Path | None, out: Path, files: dict[str, Any], force: bool
) -> None:
    opened = source.open_source(weights, model=name)
    tokenizer = model_folder.open_tokenizer(Path(words), opened.model) if words else None
    origin, pins = origins.get(name), files["weights"]
    about = card.Origin(
        file=pins["name"],
        sha256=pins["sha256"],
        format=opened.format,
        repo=pins["repo"],
        revision=pins["revision"],
        licence=origin.licence,
        note=(origin.about, f"use: {origin.use}"),
    )
    said = {k: v for k, v in dataclasses.asdict(about).items() if v} | _facts(name, files)
    model_folder.save(out, opened.model, opened.leaves(), tokenizer, force=force, extra={"origin": said})


def _make_part(
    name: str, weights: Path, words: str | Path | None, out: Path, files: dict[str, Any], force: bool
) -> None:
    """A tower file beside its tokenizer, for `init.vision` and `init.text`; files are replaced one by one."""
    del force
    tower = origins.get(name).tower
    opened = source.open_source(weights, model=zoo.PARTS[name])
    tokenizer = model_folder.open_tokenizer(Path(words), opened.model) if words else None
    meta = {"origin": _facts(name, files), tower: config.to_dict(getattr(opened.model, tower))}
    native.save_tower({tower: opened.params()[tower]}, out / f"{tower}.safetensors", meta)
    if tokenizer:
        tokenizer.save(out)


def _facts(name: str, files: dict[str, Any]) -> dict[str, Any]:
    origin = origins.get(name)
    return {"name": name, "licence": origin.licence, "use": origin.use, "files": files}
