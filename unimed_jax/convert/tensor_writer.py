"""safetensors files written one tensor at a time, so that the weights are in memory once.

Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.errors import DataError


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes float32 tensors in the order of their names, whatever order they come in, and waits for the disk.

    Args:
        file: target, replaced when it exists; the caller writes beside and renames.
        shapes: of every tensor, by name.
        tensors: (name, array), each name once.
        metadata: for the header.

    Raises:
        DataError: when the tensors are not those of `shapes`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = set(shapes)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if name not in left or tuple(tensor.shape) != tuple(shapes[name]):
                raise DataError(f"{file.name}: tensor {name} {list(tensor.shape)} was not announced")
            left.remove(name)
            f.seek(8 + len(text) + header[name]["data_offsets"][0])
            f.write(np.ascontiguousarray(tensor, "<f4").data)
        f.flush()
        os.fsync(f.fileno())
    if left:
        raise DataError(f"{file.name}: {len(left)} tensors were announced and never came: {sorted(left)[0]}")
