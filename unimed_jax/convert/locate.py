"""The weights of a file or folder, and what the configs beside them say; no tensor is looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax import config
from unimed_jax.convert import configs, openclip_config, own_files
from unimed_jax.convert.mapped import shown
from unimed_jax.data.text import FILES
from unimed_jax.errors import DataError, UsageError

# The first file that is there is the folder's weights.
_OPENCLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HF_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(slots=True, kw_only=True)
class Found:
    """Weights and what lies beside them."""

    path: Path  # what the user gave
    weights: Path
    hints: configs.Hints = field(default_factory=dict)
    model: config.Model | None = None  # of a native folder
    tokenizer: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def in_folder(folder: Path, prefer: str) -> Found:
    """The weights of a folder, by the configs that it holds.

    Args:
        folder: of OpenCLIP, of transformers, a model folder, or one with a single weight file.
        prefer: "native", "openclip" or "hf", when a folder holds several; else "".

    Raises:
        UsageError: when it holds no weights, or several and no config.
        DataError: for a config that is damaged or says what we do not have.
    """
    kinds: dict[str, Callable[[Path, Path], Found | None]] = {
        "native": _native_folder,
        "openclip": _openclip_folder,
        "hf": _hf_folder,
    }
    if prefer and prefer not in kinds:
        raise UsageError(f"prefer is {prefer!r}", f"one of {', '.join(kinds)}")
    for name, read in kinds.items():
        if (not prefer or name == prefer) and (found := read(folder, folder)):
            return found
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(files) == 1 and not prefer:
        return Found(path=folder, weights=files[0], tokenizer=_tokenizer(folder))
    what = f"{len(files)} weight files and no config" if files else "no weights"
    raise UsageError(
        f"{folder} holds {what} that says which is the {prefer + ' ' if prefer else ''}model",
        f"give one file: {', '.join(p.name for p in files[:6])}" if files else "give another folder",
    )


def beside_file(file: Path) -> Found:
    """A file alone, or one that its folder's config describes.

    Raises:
        DataError: for a config that is damaged or says what we do not have.
    """
    folder = file.parent
    for names, read in (
        ((own_files.WEIGHTS,), _native_folder),
        (_OPENCLIP_FILES, _openclip_folder),
        (_HF_FILES, _hf_folder),
    ):
        if file.name in names and (found := read(folder, file)):
            found.weights = file
            return found
    return Found(path=file, weights=file)


def _native_folder(folder: Path, path: Path) -> Found | None:
    file, weights = folder / own_files.CONFIG, folder / own_files.WEIGHTS
    spec = configs.read_json(file) if file.is_file() else {}
    if not own_files.is_own(spec) or not weights.is_file():
        return None
    m = own_files.architecture(spec, folder)
    return Found(path=path, weights=weights, model=m, tokenizer=_tokenizer(folder))


def _openclip_folder(folder: Path, path: Path) -> Found | None:
    file = folder / openclip_config.NAME
    weights = next((folder / n for n in _OPENCLIP_FILES if (folder / n).is_file()), None)
    if not file.is_file() or weights is None:
        return None
    spec = configs.read_json(file)
    hints = _hints(openclip_config.read, spec, file)
    text = spec["model_cfg"]["text_cfg"]
    beside = folder / "config.json"  # of the BERT inside, where the folder carries it
    if text.get("hf_model_name") and beside.is_file():
        bert = configs.read_json(beside)
        if bert.get("model_type") == "bert":
            said = _hints(configs.hf, bert, beside)
            hints = {k: v for k, v in said.items() if k != "text.context_length"} | hints
    facts = {k: text[k] for k in ("hf_model_name", "hf_tokenizer_name") if _is_name(text.get(k))}
    return Found(path=path, weights=weights, hints=hints, tokenizer=_tokenizer(folder), facts=facts)


def _hf_folder(folder: Path, path: Path) -> Found | None:
    spec = configs.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = next((folder / n for n in _HF_FILES if (folder / n).is_file()), None)
    if "model_type" not in spec or weights is None:
        return None
    hints = _hints(configs.hf, spec, folder / "config.json")
    pictures = folder / "preprocessor_config.json"
    if pictures.is_file() and "vision.act" in hints:
        strict = spec["model_type"] != "dinov2"  # it only starts a training here, and crops 224 of 256 pixels
        read = functools.partial(configs.preprocessor, strict=strict)
        hints |= _hints(read, configs.read_json(pictures), pictures)
    return Found(path=path, weights=weights, hints=hints, tokenizer=_tokenizer(folder))


def _hints(
    read: Callable[[Mapping[str, Any], str], configs.Hints], spec: Mapping[str, Any], file: Path
) -> configs.Hints:
    """What a config says; values of types that no library writes are the file's fault."""
    try:
        return read(spec, str(file))
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as e:
        raise DataError(
            f"{file} holds a value of a wrong type: {shown(str(e))}", "download or save it again"
        ) from e


def _is_name(value: Any) -> bool:
    """Whether a config's value may stand in our reports and cards; a hub name or path is one short line."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200


def _tokenizer(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)
