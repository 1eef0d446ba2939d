"""Phantom: procedural pictures that stand for six imaging modalities. Synthetic; no number on it means anything.

It needs no download and no licence, is the same on every machine, and costs milliseconds a picture. It serves
tests and benchmarks, and is the fall-back when nothing else can be had. Patients have several pictures, the split
is by patient, and all captions are true of the picture that they belong to.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unimed_jax.data.record import Caption, Example

PER_PATIENT = 4  # pictures
# Split of a modality's first, second, ... patient, repeated; small sets have a test patient, too.
SPLIT_CYCLE = ("train", "test", "train", "val", "train", "train", "test", "train", "train", "train")


@dataclass(slots=True, frozen=True)
class Item:
    """One picture still to be drawn."""

    key: str
    split: str
    index: int


@dataclass(slots=True, frozen=True, kw_only=True)
class Picture:
    """What a modality's artist returns: values in 0..1 and the facts that are visible in them."""

    pixels: np.ndarray  # f64[h w] or f64[h w 3]
    labels: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(slots=True, frozen=True, kw_only=True)
class Phantom:
    """The record source `phantom` (see data/shards.py): n pictures of size x size pixels.

    Example:
        >>> source = Phantom(n=24, size=64)
        >>> example = source.example(source.items()[1])
        >>> example.modality, example.simulated, example.captions[0].text
        ('CT', True, 'axial CT slice of the abdomen')
    """

    n: int = 600
    size: int = 96  # pixels
    seed: int = 0
    name: str = field(default="phantom", init=False)
    licence: str = field(default="Apache-2.0, as this package", init=False)
    description: str = field(
        default="SYNTHETIC: drawn by a program, no patient and no scanner behind it. For tests and benchmarks; "
        "scores on it say nothing about medical images.",
        init=False,
    )

    def items(self) -> Sequence[Item]:
        """All pictures; neighbours belong to different modalities."""
        return [
            Item(f"phantom/{i:06d}", SPLIT_CYCLE[self._nth(i) % len(SPLIT_CYCLE)], i) for i in range(self.n)
        ]

    def _nth(self, index: int) -> int:
        """The number of the picture's patient within its modality."""
        return index // (len(ARTISTS) * PER_PATIENT)

    def example(self, item: Item) -> Example:
        """Draws one picture: a pure function of (seed, index, size)."""
        modality = list(ARTISTS)[item.index % len(ARTISTS)]
        patient = f"{modality}/{self._nth(item.index)}"
        kind = list(ARTISTS).index(modality)
        body = np.random.default_rng([self.seed, 1, kind, self._nth(item.index)])
        view = np.random.default_rng([self.seed, 2, item.index])
        picture = ARTISTS[modality](self.size, body, view)
        data, image_format = _encode(picture.pixels)
        return Example(
            key=item.key,
            image=data,
            image_format=image_format,
            height=self.size,
            width=self.size,
            captions=tuple(
                Caption(text=text, kind="template" if i else "original")
                for i, text in enumerate(picture.captions)
            ),
            labels=picture.labels,
            modality=modality,
            source=self.name,
            patient=f"phantom-{patient}".lower().replace("/", "-"),
            split=item.split,
            simulated=True,
        )


def _encode(pixels: np.ndarray) -> tuple[bytes, str]:
    """Grey pictures as PNG, coloured ones as JPEG: both decoders are at work."""
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
    out = io.BytesIO()
    if image.mode == "L":
        image.save(out, "PNG", compress_level=1)
        return out.getvalue(), "png"
    image.save(out, "JPEG", quality=90)
    return out.getvalue(), "jpeg"


# --- drawing: the picture is the square -1..1, x to the right, y down ---------------------------------------------


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def _ellipse(size: int, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """An ellipse of ones with an edge about two pixels wide."""
    x, y = _grid(size)
    c, s = np.cos(angle), np.sin(angle)
    u, v = (x - cx) * c + (y - cy) * s, -(x - cx) * s + (y - cy) * c
    distance = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
    return np.clip((1 - distance) * min(rx, ry) * size / 4 + 0.5, 0, 1)


def _dot(mask: np.ndarray, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> None:
    """Adds a small ellipse to a mask, in place, touching only the square around it."""
    size = len(mask)
    x, y = _grid(size)
    r = max(rx, ry) + 2 / size
    box = tuple(
        slice(max(0, int((c - r + 1) * size / 2)), max(0, int((c + r + 1) * size / 2) + 1)) for c in (cy, cx)
    )
    dx, dy = x[box] - cx, y[box] - cy
    c, s = np.cos(angle), np.sin(angle)
    distance = np.sqrt(((dx * c + dy * s) / rx) ** 2 + ((dy * c - dx * s) / ry) ** 2)
    mask[box] = np.maximum(mask[box], np.clip((1 - distance) * min(rx, ry) * size / 3 + 0.5, 0, 1))


def _paint(canvas: np.ndarray, mask: np.ndarray, value: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """Covers the canvas with a value, or a colour, where the mask is one."""
    if canvas.ndim == 3:
        mask = mask[..., None]
    return canvas * (1 - mask) + mask * np.asarray(value)


def _clouds(size: int, rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of mean 0 and about unit variance, with about `cells` bumps across."""
    coarse = rng.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64) * 1.4


def _grain(size: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    return rng.standard_normal((size, size)) * strength


def _has(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


# --- the six artists ----------------------------------------------------------------------------------------------


def _xray(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """A frontal projection: bright spine, ribs and heart, dark lungs; half of the patients have a nodule."""
    x, y = _grid(size)
    nodule, on_left = _has(body), _has(body)
    width = body.uniform(0.34, 0.42)
    shift, tilt = view.uniform(-0.06, 0.06, 2)
    canvas = 0.12 + 0.5 * _ellipse(size, shift, 0.15, 0.95, 1.15)
    for side in (-1, 1):
        canvas = _paint(
            canvas, _ellipse(size, shift + side * 0.42, 0.0, width, 0.72, side * 0.12 + tilt), 0.22
        )
    ribs = np.cos((y + 0.35 * np.abs(x - shift) ** 1.5) * body.uniform(26, 30) + view.uniform(0, 6)) > 0.55
    canvas += 0.13 * ribs * _ellipse(size, shift, 0.0, 0.86, 0.8)
    canvas = _paint(
        canvas, 0.8 * _ellipse(size, shift + 0.14, 0.33, body.uniform(0.28, 0.36), 0.34, 0.5), 0.72
    )
    canvas = _paint(canvas, 0.75 * _ellipse(size, shift, 0.0, 0.09, 1.3), 0.85)
    if nodule:  # the patient's left is on the right of the picture
        cx = shift + (0.5 if on_left else -0.45)
        canvas = _paint(canvas, 0.85 * _ellipse(size, cx, view.uniform(-0.45, -0.15), 0.12, 0.12), 0.9)
    side = "left" if on_left else "right"
    finding = f"a nodule in the {side} lung" if nodule else "no nodule"
    return Picture(
        pixels=canvas + _grain(size, view, 0.015),
        labels=("region:chest", "view:frontal", "finding:lesion" if nodule else "finding:normal"),
        captions=(
            "frontal chest X-ray",
            f"chest radiograph with {finding}",
            f"an X-ray of the chest, frontal view, showing {finding}",
        ),
    )


_WINDOWS = {"soft tissue": (-160, 240), "bone": (-500, 1300)}


def _ct(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """An axial slice of the abdomen in Hounsfield units, seen through one of two windows."""
    lesion = _has(body)
    rx, ry = body.uniform(0.8, 0.92), body.uniform(0.58, 0.68)
    dx, dy = view.uniform(-0.04, 0.04, 2)
    hu = np.full((size, size), -1000.0)
    hu = _paint(hu, _ellipse(size, dx, dy, rx, ry), -100)  # fat
    hu = _paint(hu, _ellipse(size, dx, dy, rx - 0.08, ry - 0.08), 40)
    hu = _paint(hu, _ellipse(size, dx - 0.38, dy - 0.08, 0.36, 0.32, 0.3), 105)  # liver
    hu = _paint(hu, _ellipse(size, dx + 0.5, dy - 0.02, 0.17, 0.24, -0.4), 125)  # spleen
    for side in (-1, 1):
        hu = _paint(hu, _ellipse(size, dx + side * 0.34, dy + 0.28, 0.11, 0.15), 160)  # kidneys
    hu = _paint(hu, _ellipse(size, dx + 0.18, dy - 0.3, 0.2, 0.14), -700)  # stomach gas
    hu = _paint(hu, _ellipse(size, dx, dy + 0.36, 0.14, 0.13), 500)  # vertebra
    hu = _paint(hu, _ellipse(size, dx, dy + 0.36, 0.06, 0.05), 30)
    hu = _paint(hu, _ellipse(size, dx + 0.04, dy + 0.16, 0.06, 0.06), 180)  # aorta
    if lesion:
        hu = _paint(hu, _ellipse(size, dx - 0.45 + view.uniform(-0.08, 0.08), dy - 0.05, 0.12, 0.11), -30)
    window = list(_WINDOWS)[int(view.integers(len(_WINDOWS)))]
    low, high = _WINDOWS[window]
    finding = "a dark lesion in the liver" if lesion else "a liver without a lesion"
    return Picture(
        pixels=(hu + _grain(size, view, 12.0) - low) / (high - low),
        labels=(
            "plane:axial",
            "region:abdomen",
            f"window:{window}",
            "finding:lesion" if lesion else "finding:normal",
        ),
        captions=(
            "axial CT slice of the abdomen",
            f"computed tomography of the abdomen, axial plane, {window} window",
            f"abdominal CT in the {window} window",
            f"axial CT scan with {finding}",
        ),
    )


def _mri(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """A brain in one of three planes, T1-like or T2-like contrast."""
    plane = ("axial", "coronal", "sagittal")[int(view.integers(3))]
    t1 = _has(body)
    skin, white, grey, fluid = (0.9, 0.75, 0.55, 0.1) if t1 else (0.6, 0.3, 0.5, 0.95)
    turn = view.uniform(-0.06, 0.06)
    rx, ry = {"axial": (0.68, 0.86), "coronal": (0.72, 0.74), "sagittal": (0.88, 0.74)}[plane]
    grow = body.uniform(0.95, 1.03)
    rx, ry = rx * grow, ry * grow
    canvas = np.zeros((size, size))
    canvas = _paint(canvas, _ellipse(size, 0, 0, rx, ry, turn), skin)
    canvas = _paint(canvas, _ellipse(size, 0, 0, rx - 0.06, ry - 0.06, turn), 0.05)  # skull
    brain = _ellipse(size, 0, 0, rx - 0.11, ry - 0.11, turn)
    canvas = _paint(canvas, brain, grey)
    folds = 0.12 * _clouds(size, body, 14)
    canvas = _paint(
        canvas, np.clip(_ellipse(size, 0, 0, rx - 0.22, ry - 0.22, turn) + folds, 0, 1) * brain, white
    )
    if plane == "sagittal":
        canvas = _paint(canvas, _ellipse(size, -0.02, -0.02, 0.36, 0.12, -0.1), fluid)
        canvas = _paint(canvas, _ellipse(size, 0.42, 0.42, 0.22, 0.16, 0.2), grey)  # cerebellum
        canvas = _paint(canvas, _ellipse(size, 0.1, 0.6, 0.09, 0.42, -0.25), white)  # brain stem
    else:
        canvas = _paint(
            canvas, _ellipse(size, 0, 0, 0.012, ry - 0.13, turn), fluid
        )  # between the hemispheres
        long = 0.26 if plane == "axial" else 0.13
        for side in (-1, 1):
            canvas = _paint(canvas, _ellipse(size, side * 0.13, -0.05, 0.07, long, side * 0.35 + turn), fluid)
    weighting = "T1" if t1 else "T2"
    return Picture(
        pixels=np.abs(canvas + _grain(size, view, 0.03)),
        labels=(f"plane:{plane}", "region:brain", f"sequence:{weighting}"),
        captions=(
            f"{plane} MRI of the brain",
            f"{weighting}-weighted magnetic resonance image of the brain, {plane} plane",
            f"brain MRI, {plane} slice, {weighting} contrast",
        ),
    )


def _ultrasound(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """A sector with speckle; half of the patients have a cyst: dark, with a bright shadow behind it."""
    x, y = _grid(size)
    cyst = _has(body)
    depth = np.sqrt(x**2 + (y + 1.15) ** 2)
    fan = (np.abs(np.arctan2(x, y + 1.15)) < 0.62) & (depth > 0.3) & (depth < 2.0)
    echo = 0.42 + 0.05 * _clouds(size, body, 6) - 0.1 * (depth - 1)
    echo = _paint(echo, 0.7 * _ellipse(size, view.uniform(-0.1, 0.1), 0.55, 0.7, 0.05, 0.1), 0.85)
    if cyst:
        cx, cy = view.uniform(-0.2, 0.2), view.uniform(-0.2, 0.1)
        echo = _paint(echo, 0.6 * _ellipse(size, cx * 1.3, cy + 0.42, 0.17, 0.3), 0.8)
        echo = _paint(echo, _ellipse(size, cx, cy, 0.22, 0.2), 0.04)
    speckle = (
        np.sqrt(view.standard_normal((size, size)) ** 2 + view.standard_normal((size, size)) ** 2) / 1.25
    )
    finding = "a cyst" if cyst else "no cyst"
    return Picture(
        pixels=fan * echo * speckle,
        labels=("finding:lesion" if cyst else "finding:normal",),
        captions=(
            "ultrasound image",
            f"B-mode ultrasound with {finding}",
            f"a sonogram, sector scan, showing {finding}",
        ),
    )


def _histopathology(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """Pink tissue with violet nuclei: few, small and alike, or many, large and unlike each other."""
    tumour = _has(body)
    tint = body.uniform(-0.03, 0.03, 3)
    canvas = np.array([0.90, 0.68, 0.80]) + tint + 0.05 * _clouds(size, view, 9)[..., None] * [0.6, 1.2, 0.8]
    count, radius, spread = (60, 0.085, 0.35) if tumour else (22, 0.06, 0.1)
    nuclei = np.zeros((size, size))
    for cx, cy, u, angle, squash in view.uniform(-1, 1, (count, 5)):
        r, stretch = radius * (1 + spread * u), 1.25 + 0.2 * squash
        _dot(nuclei, cx, cy, r * stretch, r / stretch, angle * 3)
    canvas = _paint(canvas, 0.9 * nuclei, np.array([0.36, 0.22, 0.55]) + tint)
    cells = "crowded large nuclei, as in a tumour" if tumour else "few small regular nuclei"
    return Picture(
        pixels=canvas + _grain(size, view, 0.02)[..., None],
        labels=("stain:H&E", "finding:lesion" if tumour else "finding:normal"),
        captions=(
            "H&E stained histopathology image",
            f"histopathology slide, haematoxylin and eosin, with {cells}",
            f"microscopy of H&E stained tissue showing {cells}",
        ),
    )


def _fundus(size: int, body: np.random.Generator, view: np.random.Generator) -> Picture:
    """An orange disc with optic disc, macula and vessels; half of the patients have drusen."""
    x, y = _grid(size)
    drusen, right_eye = _has(body), _has(view)
    nasal = 1 if right_eye else -1  # the optic disc is on the nasal side
    dx, dy = view.uniform(-0.04, 0.04, 2)
    shade = 1 - 0.25 * (x**2 + y**2) + 0.04 * _clouds(size, body, 5)
    tint = body.uniform(-0.05, 0.05)
    canvas = shade[..., None] * np.array([0.85 + tint, 0.42 + tint, 0.16])
    canvas = _paint(
        canvas, 0.45 * _ellipse(size, dx - nasal * 0.15, dy, 0.22, 0.22), (0.5, 0.2, 0.08)
    )  # macula
    ox, oy = dx + nasal * 0.5, dy
    along = (ox - x) * nasal  # from the optic disc towards the macula
    bow = np.sqrt(np.clip(along + 0.1, 0, None))
    vessels, spots = np.zeros((size, size)), np.zeros((size, size))
    for i, bend in enumerate(body.uniform(0.5, 1.6, 6)):
        course = oy + (-1) ** i * (0.12 + bend * 0.55 * bow)
        np.maximum(vessels, 1.4 - np.abs(y - course) * size / 2.6, out=vessels)
    canvas = _paint(canvas, 0.6 * np.clip(vessels, 0, 1) * (along > -0.1), (0.45, 0.08, 0.06))
    canvas = _paint(canvas, _ellipse(size, ox, oy, 0.15, 0.17), (0.98, 0.85, 0.55))
    if drusen:
        for cx, cy in view.uniform(-0.3, 0.3, (14, 2)):
            _dot(spots, dx - nasal * 0.15 + cx, dy + cy, 0.04, 0.04)
        canvas = _paint(canvas, 0.9 * spots, (0.98, 0.9, 0.45))
    eye = "right" if right_eye else "left"
    finding = "drusen" if drusen else "no drusen"
    return Picture(
        pixels=canvas * _ellipse(size, 0, 0, 0.96, 0.96)[..., None],
        labels=(f"laterality:{eye}", "finding:lesion" if drusen else "finding:normal"),
        captions=(
            "colour fundus photograph",
            f"fundus photograph of the {eye} eye with {finding}",
            f"retinal image, {eye} eye, showing {finding}",
        ),
    )


ARTISTS: dict[str, Callable[[int, np.random.Generator, np.random.Generator], Picture]] = {
    "X-ray": _xray,
    "CT": _ct,
    "MRI": _mri,
    "Ultrasound": _ultrasound,
    "Histopathology": _histopathology,
    "Fundus": _fundus,
}
