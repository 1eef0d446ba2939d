"""Generated JPEGs with the spectrum of photographs, which the benchmarks of input and evaluation read."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from unimed_jax.data.record import Caption, Example
from unimed_jax.data.shards import Item

WORDS = ("chest", "film", "without", "effusion", "frontal", "view", "of", "lung")
MODALITIES = ("CT", "MRI")


class Noise:
    """A record source of power-law noise: quality 90, 4:2:0, in colour or gray.

    Args:
        name: of the source.
        n: records.
        pixels: of a side.
        gray: one channel in the files.
        distinct: different pictures; further records repeat them.
    """

    licence, description = "", "generated for a benchmark"

    def __init__(self, name: str, n: int, pixels: int, *, gray: bool = False, distinct: int = 64):
        self.name, self.n, self.pixels, self.gray, self.distinct = name, n, pixels, gray, distinct
        self._made: dict[int, bytes] = {}

    def items(self) -> list[Item]:
        return [Item(f"{self.name}/{i}") for i in range(self.n)]

    def example(self, item: Item) -> Example:
        i = int(item.key.rsplit("/", 1)[1])
        words = " ".join(np.random.default_rng(i).choice(WORDS, 30))
        return Example(
            key=item.key,
            image=self.jpeg(i % self.distinct),
            captions=(Caption(text=words), Caption(text=words[:60])),
            modality=MODALITIES[i % 2],
        )

    def jpeg(self, i: int) -> bytes:
        if i not in self._made:
            rng = np.random.default_rng([self.gray, i])
            image = np.stack([power_law(self.pixels, rng) for _ in range(1 if self.gray else 3)], axis=-1)
            out = io.BytesIO()
            Image.fromarray(image.squeeze()).save(out, "JPEG", quality=90)
            self._made[i] = out.getvalue()
        return self._made[i]


def power_law(pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with an amplitude of 1 / frequency, as u8[h w]."""
    f = np.hypot(np.fft.fftfreq(pixels)[:, None], np.fft.rfftfreq(pixels)[None])
    f[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((pixels, pixels))) / f
    image = np.fft.irfft2(spectrum, (pixels, pixels))
    return np.clip(128 + 50 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8)
