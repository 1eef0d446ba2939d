"""DINOv2 weights out of an ONNX export of its backbone, as a state dict with Hugging Face's names.

An export keeps the names of vectors and convolutions but not those of matrices: each anonymous MatMul is named after
the bias that is added to its result. The graph is only read, never run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from unimed_jax.convert import tables
from unimed_jax.convert.positions import resize_positions
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip, zoo


def read_onnx(path: str | Path, prefix: str = "backbone.") -> dict[str, np.ndarray]:
    """The state dict of the Dinov2Model below `prefix`.

    Raises:
        UsageError: when the `onnx` package is not installed.
        DataError: when the file is unreadable or is no such export.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as e:
        raise UsageError(
            "reading ONNX files needs the onnx package", "pip install 'unimed-jax[quickstart]'"
        ) from e
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}") from e
    except Exception as e:  # protobuf's own errors share no base class with onnx's
        raise DataError(f"{path} is no ONNX file: {e}", "download it again") from e
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    state |= {k.removeprefix(prefix): v for k, v in _named_matrices(graph, arrays) if k.startswith(prefix)}
    state["embeddings.position_embeddings"] = _positions(arrays, where=str(path))
    return state


def _named_matrices(graph, arrays: dict[str, np.ndarray]):
    """Yields (weight key, [out in] matrix) of every MatMul whose result gets a named bias."""
    users: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        weights = [name for name in node.input if name in arrays]
        biases = [
            name
            for user in users.get(node.output[0], [])
            if user.op_type == "Add"
            for name in user.input
            if name in arrays and name.endswith(".bias")
        ]
        if weights and biases:
            yield biases[0].removesuffix(".bias") + ".weight", arrays[weights[0]].T


def _positions(arrays: dict[str, np.ndarray], *, where: str) -> np.ndarray:
    """The position table [1 t d]: constants split by the export into class token and square grid."""
    anonymous = [
        a for name, a in arrays.items() if name.startswith("onnx::") and a.ndim == 3 and a.shape[0] == 1
    ]
    heads = [a for a in anonymous if a.shape[1] == 1]
    grids = [a for a in anonymous if a.shape[1] > 1]
    if len(heads) != 1 or len(grids) != 1:
        raise DataError(
            f"{where} holds no DINOv2 position table", "the file must be an export of a Dinov2 backbone"
        )
    return np.concatenate([heads[0], grids[0]], axis=1)


def vision_from_dinov2_onnx(path: str | Path, image_size: int = 224) -> clip.Params:
    """DINOv2-S/14 as our vision tower without projection: LayerScale folded, positions resized to `image_size` px.

    Returns:
        {"vision": {...}}, float32, for the vision config of `zoo.get("dinov2-s14-minilm")`.

    Raises:
        UsageError: when the `onnx` package is not installed or image_size is no multiple of 14.
        DataError: when the file is no export of this model.
    """
    m = zoo.get("dinov2-s14-minilm")
    m.vision = dataclasses.replace(m.vision, image_size=image_size)
    state = read_onnx(path)
    name = "embeddings.position_embeddings"
    state[name] = resize_positions(state[name][0], image_size // m.vision.patch_size)[None]
    return {"vision": tables.to_params(state, tables.HF_DINOV2, m, where=str(path))}
