"""Proof that a conversion kept the model: PyTorch modules made of the file's own tensors, beside ours.

PyTorch's side (`convert/torch_towers.py`) uses none of the conversion tables. What both frameworks get is fixed:
pictures, texts, float32. What no file says and the user named (the activation of a bare state dict) is the same on
both sides, so a wrong name is not found; that single values are right is shown by their bits, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from unimed_jax import config
from unimed_jax.convert import torch_towers
from unimed_jax.convert.source import Source
from unimed_jax.convert.torch_towers import Encode
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError

# Largest absolute difference of an entry of an embedding that is not normalised, whatever its size: a full-size B/16
# with entries up to 3.3 differs by 4e-6.
LIMIT = 1e-4
TEXTS = (
    "a frontal chest radiograph with an enlarged heart",
    "axial CT of the abdomen",
    "T2-weighted MRI of the brain",
    "ultrasound of the thyroid gland; a nodule of 12 mm",
    "H&E stained section of colon, 20x",
    "fundus photograph of the right eye",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one tower is from PyTorch's.

    Attributes:
        tower: "vision" or "text".
        value: largest absolute difference over all entries of the embeddings, which are not normalised.
        scale: largest absolute entry of PyTorch's embeddings; for the report only.
        n: pictures or texts.
    """

    tower: str
    value: float
    scale: float
    n: int

    @property
    def ok(self) -> bool:
        """Whether it is within `LIMIT`; a NaN is not."""
        return self.value <= LIMIT


def fixed_pictures(size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Pictures for a comparison: a ramp, stripes, and noise at two scales; always the same."""
    rng = np.random.default_rng(20241210)
    y, x = np.mgrid[:size, :size]
    ramp = np.stack([x, y, (x + y) / 2], -1) * (255 / max(size - 1, 1))
    stripes = np.where((x // 7 + y // 5) % 2, 230.0, 20.0)[..., None] * np.ones(3)
    noise = rng.integers(0, 256, (size, size, 3)).astype(np.float64)
    coarse = np.kron(rng.integers(0, 256, (-(-size // 8), -(-size // 8), 3)), np.ones((8, 8, 1)))[
        :size, :size
    ]
    return np.stack([ramp, stripes, noise, coarse]).astype(np.uint8)


def fixed_tokens(t: config.Text, tokenizer: Tokenizer | None) -> Int32[np.ndarray, "n t"]:
    """Token ids for a comparison: of `TEXTS`, or made up when there is no tokenizer; padded to 32 at most (BERT)."""
    width = t.context_length if t.kind == "clip" else min(32, t.context_length)
    if tokenizer is not None:
        return tokenizer.encode(TEXTS, width)
    rng = np.random.default_rng(20241210)
    last = t.vocab_size - 1  # the largest id is where CLIP pools
    ids = np.full((len(TEXTS), width), 0 if t.kind == "clip" else t.pad_id, np.int32)
    for row, length in zip(ids, np.linspace(3, width, len(TEXTS)).astype(int), strict=True):
        row[:length] = rng.integers(1 + t.pad_id, last, length)
        row[length - 1] = last if t.eot_id < 0 else t.eot_id
    return ids


def compare(
    reference: Source, encode_image: Encode, encode_text: Encode, *, tokenizer: Tokenizer | None = None
) -> list[Difference]:
    """Encodes the same pictures and texts with PyTorch, from the file's tensors, and with our functions.

    Args:
        reference: the file; of each of its towers one difference is returned.
        encode_image: ours, u8[n h w 3] -> f32[n d], not normalised.
        encode_text: ours, i32[n t] -> f32[n d], not normalised.
        tokenizer: for real texts; without it, token ids are made up.

    Raises:
        UsageError: when PyTorch is not installed.
        DataError: when the file's tensors do not load strictly into the modules of its format.
    """
    m = reference.model
    theirs = torch_towers.encoders(reference)
    pictures, tokens = fixed_pictures(m.vision.image_size), fixed_tokens(m.text, tokenizer)
    given = {"vision": (pictures, encode_image), "text": (tokens, encode_text)}
    found = []
    for tower in reference.towers:
        rows, ours = given[tower]
        expected, got = np.asarray(theirs[tower](rows)), np.asarray(ours(rows))
        if expected.shape != got.shape:
            raise DataError(
                f"{reference.path}: PyTorch gives {tower} embeddings {list(expected.shape)}, we give {list(got.shape)}"
            )
        value = float(np.max(np.abs(expected.astype(np.float64) - got)))
        found.append(Difference(tower=tower, value=value, scale=float(np.abs(expected).max()), n=len(rows)))
    return found


def require(found: list[Difference], where: str) -> None:
    """Refuses a conversion whose outputs differ.

    Raises:
        DataError: when a difference is above `LIMIT` or not a number.
    """
    bad = [d for d in found if not d.ok]
    if bad:
        words = ", ".join(f"{d.tower} {d.value:.2g} (embeddings up to {d.scale:.2g})" for d in bad)
        raise DataError(
            f"{where}: our outputs differ from PyTorch's by more than {LIMIT:g}: {words}",
            "its own config asks for something that we compute otherwise: please report it",
        )
