"""data/images.py: pixels equal to Pillow's and to torchvision's rules, and refusals of everything else."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unimed_jax.data import images, limits
from unimed_jax.errors import DataError

MODES = ("L", "LA", "RGB", "RGBA", "P", "PA-like", "CMYK", "1")


def picture(height, width, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    if mode == "P":
        return image.quantize(37)
    if mode == "PA-like":  # a palette with a transparent entry
        image = image.quantize(20)
        image.info["transparency"] = 3
        return image
    return image.convert(mode)


def data_of(image, kind="PNG", **options):
    out = io.BytesIO()
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(out, kind, **options)
    return out.getvalue()


def encoded(height, width, mode, seed=0):
    return data_of(picture(height, width, mode, seed), "TIFF" if mode == "CMYK" else "PNG")


# --- the reference, written straight from torchvision's documented behaviour ---------------------------------------


def reference_eval(image, size):
    """Resize(size, BICUBIC) on the shorter side, CenterCrop(size), then convert("RGB")."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    crop_top = round((new_h - size) / 2.0)
    crop_left = round((new_w - size) / 2.0)
    return np.asarray(image.crop((crop_left, crop_top, crop_left + size, crop_top + size)).convert("RGB"))


def reference_train(image, size, box):
    """convert("RGB") first, then crop and resize."""
    top, left, h, w = box
    image = image.convert("RGB").crop((left, top, left + w, top + h))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


SIZES = [(64, 64), (37, 90), (91, 40), (33, 32), (32, 33), (300, 20), (7, 5)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_eval_image_is_bit_equal_to_the_reference(mode, height, width):
    data = encoded(height, width, mode)
    expected = reference_eval(Image.open(io.BytesIO(data)), 32)
    got = images.eval_image(data, 32)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(images.eval_image(Image.open(io.BytesIO(data)), 32), expected)


@pytest.mark.parametrize("mode", MODES)
def test_train_image_is_bit_equal_to_the_reference(mode):
    for seed in range(5):
        data = encoded(60 + 11 * seed, 75, mode, seed)
        args = {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}
        box = images.crop_box(60 + 11 * seed, 75, np.random.default_rng(seed), **args)
        got = images.train_image(data, 32, np.random.default_rng(seed), **args)
        np.testing.assert_array_equal(got, reference_train(Image.open(io.BytesIO(data)), 32, box))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_pixels_equal_pillows(mode, progressive, subsampling):
    for height, width in [(64, 64), (37, 53), (1, 9), (16, 301), (250, 131)]:
        for quality in (30, 90, 100):
            image = picture(height, width, mode)
            data = data_of(image, "JPEG", quality=quality, progressive=progressive, subsampling=subsampling)
            assert images._fast_jpeg(data, "") is not None
            decoded = Image.open(io.BytesIO(data))
            np.testing.assert_array_equal(images.decode(data), np.asarray(decoded))
            if min(height, width) > 20:
                np.testing.assert_array_equal(images.eval_image(data, 24), reference_eval(decoded, 24))


def test_unusual_jpegs_go_through_pillow():
    cmyk = data_of(picture(40, 50, "CMYK"), "JPEG")
    assert images._fast_jpeg(cmyk, "") is None
    np.testing.assert_array_equal(
        images.decode(cmyk), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    )
    np.testing.assert_array_equal(
        images.eval_image(cmyk, 24), reference_eval(Image.open(io.BytesIO(cmyk)), 24)
    )
    rgb = data_of(picture(40, 50), "JPEG", keep_rgb=True)  # stored without YCbCr
    np.testing.assert_array_equal(images.decode(rgb), np.asarray(Image.open(io.BytesIO(rgb)).convert("RGB")))


def test_gray_stays_one_channel_and_equals_the_colour_road():
    for mode in ("L", "LA", "1"):
        data = encoded(50, 40, mode)
        pixels = images.decode(data)
        assert pixels.shape == (50, 40)
        np.testing.assert_array_equal(
            images.to_rgb(pixels), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        )
    assert images.decode(encoded(50, 40, "P")).shape == (50, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("low", "high"), [(0, 65535), (100, 4195), (30000, 30001)])
def test_16_bit_gray_is_stretched_from_its_value_range(kind, low, high):
    values = np.linspace(low, high, 40 * 30).round().astype(np.uint16).reshape(40, 30)
    data = data_of(Image.fromarray(values), kind)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    pixels = images.decode(data)
    expected = np.rint((values.astype(np.float64) - low) * (255.0 / (high - low)))
    np.testing.assert_array_equal(pixels, expected)
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_array_equal(images.eval_image(data, 24), reference_eval(Image.fromarray(pixels), 24))


def test_flat_wide_pictures_are_black_and_infinite_ones_refused():
    assert images.decode(data_of(Image.fromarray(np.full((5, 5), 900, np.uint16)))).max() == 0
    nan = Image.fromarray(np.array([[0.0, np.nan], [1.0, 2.0]], np.float32))
    with pytest.raises(DataError, match="not finite"):
        images.decode(data_of(nan, "TIFF"))


def test_exif_orientation_is_ignored():
    image = picture(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = data_of(image, "JPEG", exif=exif), data_of(image, "JPEG")
    np.testing.assert_array_equal(images.decode(turned), images.decode(plain))
    np.testing.assert_array_equal(images.eval_image(turned, 24), images.eval_image(plain, 24))


def test_the_first_frame_is_the_picture():
    frames = [picture(20, 20, "L", seed) for seed in (1, 2)]
    data = data_of(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.decode(data), np.asarray(frames[0]))


def test_the_content_decides_the_format():
    kinds = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
    assert [images.image_format(data_of(picture(8, 8), kind)) for kind in kinds] == [k.lower() for k in kinds]


# --- the random crop -----------------------------------------------------------------------------------------------


def test_crop_box_follows_torchvisions_draws():
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(4000):
        top, left, h, w = images.crop_box(400, 400, rng, scale=(0.3, 0.5), ratio=(0.5, 2.0))
        assert 0 <= top <= 400 - h
        assert 0 <= left <= 400 - w
        areas.append(h * w / 400**2)
        ratios.append(math.log(w / h))
    assert 0.295 < min(areas) < max(areas) < 0.505
    assert abs(np.mean(areas) - 0.4) < 0.005  # uniform in area
    assert abs(np.mean(ratios)) < 0.03  # log-uniform, symmetric
    assert abs(np.std(ratios) - 2 * math.log(2) / math.sqrt(12)) < 0.02


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 400, (0, 134, 100, 133)), (400, 100, (134, 0, 133, 100)), (100, 150, (0, 8, 100, 133))],
)
def test_crop_box_falls_back_to_the_clipped_centre(height, width, box):
    # From an aspect of 1.5 on, every draw at scale 0.9-1 fails ten times.
    rng = np.random.default_rng(1)
    for _ in range(20):
        got = images.crop_box(height, width, rng, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
        top, left, h, w = got
        assert (h, w) == box[2:]
        assert (top, left) == ((height - h) // 2, (width - w) // 2)


def test_fall_back_rate_of_square_and_four_to_three_pictures():
    def rate(height, width):
        rng = np.random.default_rng(2)
        seen = [
            images.crop_box(height, width, rng, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(1500)
        ]
        return sum(box == (0, 0, height, width) for box in seen) / len(seen)

    assert abs(rate(1000, 1000) - 0.13) < 0.04  # measured on torchvision: 13 % and 36 %
    assert abs(rate(900, 1200) - 0.36) < 0.05


def test_same_generator_state_same_picture():
    data = data_of(picture(80, 90), "JPEG")
    options = {"scale": (0.4, 1.0), "hflip": True, "jitter": 0.4}
    one = images.train_image(data, 32, np.random.default_rng([1, 2]), **options)
    np.testing.assert_array_equal(one, images.train_image(data, 32, np.random.default_rng([1, 2]), **options))
    assert (one != images.train_image(data, 32, np.random.default_rng([1, 3]), **options)).any()


def test_flip_and_jitter():
    data = data_of(picture(64, 64))
    plain = images.train_image(data, 32, np.random.default_rng(0))
    flipped = [images.train_image(data, 32, np.random.default_rng(s), hflip=True) for s in range(40)]
    unflipped = [images.train_image(data, 32, np.random.default_rng(s)) for s in range(40)]
    mirrored = [np.array_equal(f, u[:, ::-1]) for f, u in zip(flipped, unflipped, strict=True)]
    same = [np.array_equal(f, u) for f, u in zip(flipped, unflipped, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 8 < sum(mirrored) < 32
    bright = [images.train_image(data, 32, np.random.default_rng(s), jitter=0.5).mean() for s in range(40)]
    assert np.std(bright) > 10
    assert abs(np.mean(bright) - plain.mean()) < 20


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_truncated_picture_is_an_error(kind, mode):
    data = data_of(picture(200, 200, mode), kind)
    for share in (0.01, 0.3, 0.6, 0.9):
        cut = data[: int(len(data) * share)]
        for read in (images.decode, lambda d: images.eval_image(d, 32)):
            with pytest.raises(DataError):
                read(cut)


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"GIF89a"]
)
def test_what_is_no_picture_is_refused_by_name(data):
    with pytest.raises(DataError, match="scan 7"):
        images.decode(data, where="scan 7")
    with pytest.raises(DataError, match="scan 7"):
        images.eval_image(data, 32, where="scan 7")


def test_formats_outside_the_list_are_refused():
    with pytest.raises(DataError, match="unknown format"):
        images.decode(data_of(picture(20, 20), "ICO"))
    with pytest.raises(DataError):
        images.image_format(data_of(picture(20, 20), "ICO"))


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (15300, 15300), (65535, 65535)])
def test_image_bombs_are_refused_before_they_are_decoded(width, height):
    with pytest.raises(images.TooLarge):
        images.decode(png_header(width, height))
    with pytest.raises(images.TooLarge):
        images.eval_image(png_header(width, height), 32)


def test_a_jpeg_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(images.TooLarge, match="101 x 100"):
        images.decode(data_of(picture(100, 101), "JPEG"))


def test_files_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(images.TooLarge, match="bytes"):
            images.decode(data_of(picture(100, 100), kind))


def test_extreme_aspect_ratios():
    data = data_of(picture(1, 2000, "L"))
    np.testing.assert_array_equal(
        images.eval_image(data, 32), reference_eval(Image.open(io.BytesIO(data)), 32)
    )
    assert images.train_image(data, 32, np.random.default_rng(0)).shape == (32, 32, 3)
    line = data_of(Image.new("L", (1, 65000)))
    with pytest.raises(images.TooLarge, match="resized to 336"):  # 336 x 21 million pixels
        images.eval_image(line, 336)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_never_raise_anything_else():
    rng = np.random.default_rng(5)
    sources = [
        data_of(picture(48, 48, m), k)
        for k in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
        for m in ("L", "RGB")
    ]
    outcomes = {"decoded": 0, "refused": 0}
    for i in range(1500):
        data = bytearray(sources[i % len(sources)])
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            assert images.decode(bytes(data)).dtype == np.uint8
            outcomes["decoded"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100


def test_normalize_table():
    assert set(images.NORMALIZE) == {"openai", "imagenet", "half"}
    assert images.NORMALIZE["openai"] == (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )


def test_a_drawing_survives_the_eval_transform():
    # A square in the middle stays in the middle, whatever the side that is cropped.
    for size in ((90, 60), (60, 90)):
        image = Image.new("L", size)
        x, y = size[0] // 2, size[1] // 2
        ImageDraw.Draw(image).rectangle((x - 10, y - 10, x + 9, y + 9), fill=255)
        got = images.eval_image(data_of(image), 60)[:, :, 0]
        assert got[30, 30] == 255
        ys, xs = np.nonzero(got > 127)
        assert (ys.min(), ys.max(), xs.min(), xs.max()) == (20, 39, 20, 39)
