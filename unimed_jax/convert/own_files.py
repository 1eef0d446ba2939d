"""What our own files are called, and the architecture that a model folder's config.json gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimed_jax import config, config_rules
from unimed_jax.convert.mapped import shown
from unimed_jax.errors import DataError, UsageError

MODEL, VERSION = "unimed_jax.model", 1  # format of a model folder
TOWER = "unimed_jax.tower"  # format of a file with one tower, in its header
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def is_own(spec: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model folder, in any version."""
    return spec.get("format") == MODEL


def architecture(spec: Mapping[str, Any], folder: Path) -> config.Model:
    """The architecture that the config.json of a model folder gives.

    Args:
        spec: its content.
        folder: for messages.

    Raises:
        DataError: for another format or version, or an architecture that is none.
    """
    if not is_own(spec):
        raise DataError(
            f"{folder} is no unimed_jax model folder", "convert it first, or give the right folder"
        )
    if spec.get("version") != VERSION:
        raise DataError(
            f"{folder} has version {shown(spec.get('version'))}, this program reads {VERSION}", "update it"
        )
    try:
        m = config.from_dict(config.Model, spec.get("model", {}), where=f"{folder / CONFIG}: model")
        return config_rules.validate_model(m)
    except UsageError as e:  # the folder is wrong, not the request
        raise DataError(e.cause, e.remedy or "restore the folder, or update the program") from e
