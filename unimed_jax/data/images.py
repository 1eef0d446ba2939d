"""Pictures: bytes to uint8 arrays, and the only home of interpolation rules and of mean and standard deviation.

Written rules, the same in training and evaluation:

- The format is found from the bytes, never from the file name; only `FORMATS` are read.
- Gray pictures stay one channel until the end (decoding and resizing one channel and repeating it is bit-equal to
  doing it three times). Alpha is dropped, not blended. CMYK and palettes are converted as Pillow does.
- 16-bit (and 32-bit) gray is stretched from the picture's own value range to 0..255, because medical detectors
  rarely fill their container. 16-bit colour is reduced to its high byte (Pillow).
- The first frame of an animation or multi-page file is the picture.
- EXIF orientation is ignored: pixels are taken as stored, as the reference does.
- A truncated picture is an error.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from unimed_jax.data import limits
from unimed_jax.errors import DataError

# Our own limits are stricter and raise; Pillow's warning would only be printed beside our refusal.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# name: (mean, standard deviation) of the channels of a picture scaled to 0..1
NORMALIZE: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
_WIDE = ("I", "F")  # Pillow's modes of more than 8 bits a pixel start with these
_GRAY = {"L", "1"}
_BAND = 256  # rows that are converted at once


class TooLarge(DataError):
    """A picture or file beyond the limits of data/limits.py."""


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > limits.MAX_IMAGE_PIXELS:
        raise TooLarge(
            f"{where or 'the picture'} has {width} x {height} pixels, more than {limits.MAX_IMAGE_PIXELS}",
            "scale it down or cut it into tiles first",
        )


def open_image(data: bytes, *, where: str = "") -> Image.Image:
    """Opens and fully decodes a picture as `load_image` does; pictures of more than 8 bits come back as mode L.

    Raises:
        TooLarge: see `load_image`.
        DataError: see `load_image`; also for values that are not finite.
    """
    image = load_image(data, where=where)
    return _to_8_bits(image) if image.mode.startswith(_WIDE) else image


def load_image(data: bytes, *, where: str = "") -> Image.Image:
    """Opens and fully decodes a picture in its own mode.

    Args:
        data: the bytes of a file.
        where: what to call the picture in an error, e.g. a path.

    Raises:
        TooLarge: beyond the limits, found from the header before any pixel is decoded.
        DataError: for bytes that are no complete picture of an allowed format.
    """
    if len(data) > limits.MAX_FILE_BYTES:
        raise TooLarge(f"{where or 'the picture'} has {len(data)} bytes, more than {limits.MAX_FILE_BYTES}")
    if not data:
        raise DataError(f"{where or 'the picture'} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, where)
        image.load()
    except DataError:
        raise
    except Image.DecompressionBombError as e:
        raise TooLarge(f"{where or 'the picture'}: {e}") from e
    except Exception as e:  # a damaged file makes Pillow's readers raise an open set of exceptions
        reason = (
            f"unknown format (read: {', '.join(FORMATS)})"
            if isinstance(e, Image.UnidentifiedImageError)
            else e
        )
        raise DataError(f"{where or 'the picture'} cannot be decoded: {reason}") from e
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):  # also where any value is NaN
        raise DataError("the picture has pixels that are not finite")
    scale = 255.0 / (high - low) if high > low else 0.0
    out = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _BAND):  # the largest picture takes 512 MB as float64, more than once
        out[top : top + _BAND] = np.rint((values[top : top + _BAND].astype(np.float64) - low) * scale)
    return Image.fromarray(out)


def image_format(data: bytes) -> str:
    """The format by the content, in lower case ('jpeg', 'png', ...).

    Raises:
        TooLarge: for so many pixels that Pillow does not even look at them.
        DataError: for bytes of no allowed format.
    """
    name = _open(io.BytesIO(data)).format or ""
    return "jpeg" if name == "MPO" else name.lower()


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise TooLarge(f"the picture: {e}") from e
    except Exception as e:  # as in `open_image`
        raise DataError("the picture has an unknown format or a damaged header") from e


def pixels_of(file: BinaryIO) -> int:
    """The number of pixels that the header of a picture promises; nothing is decoded.

    Raises:
        TooLarge: for so many pixels that Pillow does not even look at them.
        DataError: for bytes of no allowed format.
    """
    return math.prod(_open(file).size)


def size_of(data: bytes) -> tuple[int, int]:
    """The (width, height) that the header of a picture promises; nothing is decoded.

    Raises:
        TooLarge: for so many pixels that Pillow does not even look at them.
        DataError: for bytes of no allowed format.
    """
    return _open(io.BytesIO(data)).size


def _fast_jpeg(data: bytes, where: str) -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"] | None:
    """Decodes with simplejpeg where its pixels equal Pillow's (gray and YCbCr); None = let Pillow decide."""
    if not data.startswith(b"\xff\xd8\xff") or len(data) > limits.MAX_FILE_BYTES:
        return None
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)  # pyright: ignore[reportAssignmentType]
        if space not in ("Gray", "YCbCr"):
            return None
        _check_size(int(width), int(height), where)
        if space == "Gray":
            return simplejpeg.decode_jpeg(data, "GRAY")[:, :, 0]
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # damaged or unusual: Pillow accepts it or says what is wrong
        return None


def decode(data: bytes, *, where: str = "") -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]:
    """Decodes a picture as Pillow's `convert("RGB")` would, with gray kept as one channel.

    Raises:
        TooLarge: beyond the limits, found before any pixel is decoded.
        DataError: for bytes that are no complete picture of an allowed format.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (3, 2)).save(buffer, "PNG")
        >>> decode(buffer.getvalue()).shape
        (2, 3)
    """
    pixels = _fast_jpeg(data, where)
    if pixels is None:
        pixels = np.asarray(plain(open_image(data, where=where)))
    return pixels


def plain(image: Image.Image) -> Image.Image:
    """A picture of 8 bits as mode L where it is gray, else RGB."""
    if image.mode in _GRAY:
        return image.convert("L")
    if image.mode == "LA":
        return image.getchannel("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_rgb(pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Repeats a gray picture over three channels; leaves a colour one as it is."""
    if pixels.ndim == 3:
        return pixels
    out = np.empty((*pixels.shape, 3), np.uint8)
    for channel in range(3):  # less than half the time of np.repeat
        out[:, :, channel] = pixels
    return out


def one_channel(
    pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]:
    """A picture whose three channels are the same as one; others as they are."""
    return pixels[..., 0] if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:]).all() else pixels


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the (top, left, height, width) of a random resized crop.

    Ten tries of an area share uniform in `scale` and an aspect ratio log-uniform in `ratio`; then a centre crop with
    the ratio clipped to the range (torchvision's RandomResizedCrop, which the reference trains with).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def train_image(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: bool = False,
    jitter: float = 0.0,
    where: str = "",
) -> UInt8[np.ndarray, "size size 3"]:
    """A training picture: random resized crop (bicubic, antialiased by Pillow), optional flip and jitter.

    Args:
        data: the bytes of a file.
        size: pixels of the square result.
        rng: the only source of randomness; the same state gives the same picture.
        scale: share of the area that is kept.
        ratio: width / height of the crop before it is squashed to a square.
        hflip: mirror half of the pictures left to right.
        jitter: strength of brightness and contrast changes; factors are uniform in [1 - jitter, 1 + jitter].
        where: what to call the picture in an error.

    Raises:
        DataError: for bytes that are no complete picture.
    """
    pixels = decode(data, where=where)
    height, width = pixels.shape[:2]
    top, left, h, w = crop_box(height, width, rng, scale=scale, ratio=ratio)
    crop = Image.fromarray(np.ascontiguousarray(pixels[top : top + h, left : left + w]))
    image = crop.resize((size, size), Image.Resampling.BICUBIC)
    if hflip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter:
        brightness, contrast = rng.uniform(max(0.0, 1 - jitter), 1 + jitter, 2)
        image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
    return to_rgb(np.asarray(image))


def eval_crop(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the square of `eval_image` lies: (width, height) of the resized picture, and the square's (left, top).

    Example:
        >>> eval_crop(300, 200, 100)
        ((150, 100), (25, 0))
    """
    long = int(size * max(width, height) / min(width, height))
    new = (size, long) if width <= height else (long, size)
    return new, (round((new[0] - size) / 2), round((new[1] - size) / 2))


def eval_image(data: bytes | Image.Image, size: int, *, where: str = "") -> UInt8[np.ndarray, "size size 3"]:
    """An evaluation picture: shorter side to `size` (bicubic), centre crop, and only then RGB.

    The order matters: a palette picture is resized while it is one, which Pillow does with nearest neighbours, and
    alpha is premultiplied while resizing. Rounding as in torchvision's Resize and CenterCrop.

    Args:
        data: the bytes of a file, or a decoded picture.
        size: pixels of the square result.
        where: what to call the picture in an error.

    Raises:
        DataError: for bytes that are no complete picture, or sides so unequal that the resized one exceeds the limits.
    """
    if isinstance(data, Image.Image):
        image = _to_8_bits(data) if data.mode.startswith(_WIDE) else data
    else:
        pixels = _fast_jpeg(data, where)
        image = open_image(data, where=where) if pixels is None else Image.fromarray(pixels)
    width, height = image.size
    new, (left, top) = eval_crop(width, height, size)
    _check_size(*new, f"{where or 'the picture'} ({width} x {height}) resized to {size}")
    image = image.resize(new, Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    if image.mode in ("L", "LA", "1"):
        return to_rgb(np.asarray(image.getchannel(0) if image.mode == "LA" else image.convert("L")))
    return np.asarray(image.convert("RGB"))
