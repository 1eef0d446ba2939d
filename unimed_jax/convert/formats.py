"""Which format a state dict is in, by its names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from unimed_jax.convert import mapping, tables
from unimed_jax.convert.mapping import Table
from unimed_jax.errors import DataError

SCALARS = ("logit_scale", "logit_bias")  # of the whole model, in every format
# Keys that belong to no tower, and why they are not taken.
_IGNORED = (
    (r"input_resolution|context_length|vocab_size", "number beside OpenAI's weights"),
    (r"(.*\.)?attn_mask", "attention mask buffer"),
    (r"(.*\.)?position_ids", "position_ids buffer"),
)
# format: tables that its towers may have
_FORMATS = {
    "hf-vision": ("hf_clip_vision",),
    "hf-clip": ("hf_clip_vision", "hf_clip_text"),
    "hf-bert": ("hf_bert",),
    "hf-dinov2": ("hf_dinov2",),
    "openclip": (
        "openclip_vision",
        "timm_vision",
        "openclip_clip_text",
        "openclip_custom_clip_text",
        "openclip_hf_text",
    ),
    "unimed": ("openclip_vision", "unimed_text"),
    "native": ("native_vision", "native_text"),
}


def find_tables(keys: Iterable[str]) -> dict[str, Table]:
    """The format of each tower that the keys belong to; most keys decide.

    Raises:
        DataError: when no tower is known, or two that never come together.
    """
    keys = list(keys)
    found: dict[str, Table] = {}
    for tower in ("vision", "text"):
        votes = {
            name: sum(re.fullmatch(t.marks, k) is not None for k in keys)
            for name, t in tables.TABLES.items()
            if t.tower == tower
        }
        best = max(votes, key=lambda name: votes[name])
        if votes[best]:
            found[tower] = tables.TABLES[best]
    if not found:
        raise DataError(
            f"no tower is known by these names: {mapping.some(sorted(keys), 8) or 'the file is empty'}",
            "CLIP, OpenCLIP, UniMed-CLIP, timm ViT, BERT and DINOv2 state dicts are read",
        )
    return found


def format_of(found: Mapping[str, Table]) -> str:
    """The name of the format that the towers' tables make together.

    Raises:
        DataError: for towers that no format holds together.
    """
    names = {tower: next(n for n, t in tables.TABLES.items() if t is table) for tower, table in found.items()}
    for format_, pairs in _FORMATS.items():
        if all(name in pairs for name in names.values()):
            return format_
    raise DataError(f"towers of different formats in one file: {', '.join(sorted(names.values()))}")


def split(keys: Iterable[str], found: Mapping[str, Table]) -> tuple[dict[str, list[str]], list[str]]:
    """Each tower's own keys, and those that belong to none (the scalars among them)."""
    parts: dict[str, list[str]] = {tower: [] for tower in found}
    rest: list[str] = []
    for key in keys:
        owner = next((t for t, table in found.items() if re.fullmatch(table.owns, key)), None)
        (rest if owner is None or key in SCALARS else parts[owner]).append(key)
    return parts, rest


def ignored(key: str) -> str | None:
    """Why a key that belongs to no tower is not taken; None when it is no known one."""
    return next((why for pattern, why in _IGNORED if re.fullmatch(pattern, key)), None)
