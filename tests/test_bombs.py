"""Files that are small on the disk and huge in memory: refused, and the process that met them stays below 1 GB."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import small_model
from PIL import Image

from unimed_jax.data import limits
from unimed_jax.data.shards import Shards, array_record_module

MB = 2**20
LIMIT = 1000 * MB  # of a whole process with its imports, of which jax, flax and pydicom take about 300

# The high-water mark of this program alone: getrusage would count the process that started it, too (the mark of
# a fork lives on after exec).
COMMAND = "from unimed_jax.cli import main; main.main(sys.argv[1:])"
CHILD = """
import re, sys
try:
    exec(sys.stdin.read())
finally:
    mark = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
    print("peak", mark[1] if mark else -1, file=sys.stderr)
"""


def run(*argv: str | Path, code: str = COMMAND) -> tuple[subprocess.CompletedProcess[str], int]:
    """The command in a process of its own; also its peak of resident memory in bytes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, argv)],
        input=code,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, int(done.stderr.rsplit("peak ", 1)[1]) * 1024


def zeros(n: int, *, raw: bool = False) -> bytes:
    """n zero bytes, deflated: about a thousandth."""
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS)
    piece = bytes(MB)
    whole, rest = divmod(n, MB)
    return (
        b"".join(squeeze.compress(piece) for _ in range(whole))
        + squeeze.compress(bytes(rest))
        + squeeze.flush()
    )


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A whole, valid PNG of zeros."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = 1 + width * bits // 8 * (3 if colour == 2 else 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zeros(row * height)) + chunk(b"IEND", b"")


def tiff(width: int, height: int) -> bytes:
    """A whole, valid TIFF of zeros in one deflated strip."""
    body = zeros(width * height * 3)
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8 + len(body)), (259, 3, 1, 8), (262, 3, 1, 2),
        (273, 4, 1, 8), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(body)),
    ]  # fmt: skip
    after = 8 + len(body)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (
        b"II*\0" + struct.pack("<I", after + 6) + body + struct.pack("<HHH", 8, 8, 8)
        + struct.pack("<H", len(tags)) + entries + bytes(4)
    )  # fmt: skip


def webp(side: int) -> bytes:
    """A WebP of a small picture whose header names another size; the format allows 16383 at most."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(out, "WEBP", lossless=True)
    data = bytearray(out.getvalue())
    at = data.index(b"VP8L") + 9  # after the length and the signature byte: two sides of 14 bits each
    flags = struct.unpack_from("<I", data, at)[0] >> 28
    struct.pack_into("<I", data, at, (side - 1) | (side - 1) << 14 | flags << 28)
    return bytes(data)


def gif(side: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", side, side, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, side, side, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHH", 1000, 0, 54, 40, side, side, 1, 24) + bytes(24 + 900)


def frame(side: int) -> bytes:
    """A deflated DICOM file with one gray frame of 16 bits."""
    pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    from pydicom.data import get_testdata_file

    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    ds.Rows = ds.Columns = side
    ds.PixelData = bytes(2 * side * side)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def dicom(inflated: int) -> bytes:
    """A deflated DICOM file with so many bytes after its header."""
    pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    from pydicom.data import get_testdata_file

    path = get_testdata_file("image_dfl.dcm", download=False)
    if path is None:
        pytest.skip("pip install pydicom-data")
    assert pydicom.dcmread(path).Rows == 512
    head = Path(str(path)).read_bytes()
    return head[: 144 + struct.unpack("<I", head[140:144])[0]] + zeros(inflated, raw=True)


def nifti(shape: tuple[int, int, int], code: int, bits: int) -> bytes:
    """A gzipped NIfTI volume of zeros."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", head, 70, code, bits)
    struct.pack_into("<8f", head, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", head, 108, 352)
    struct.pack_into("<h", head, 254, 1)  # an orientation: the axes as they are
    for row, place in enumerate((280, 296, 312)):
        struct.pack_into("<4f", head, place, *(float(i == row) for i in range(3)), 0.0)
    head[344:348] = b"n+1\0"
    n = shape[0] * shape[1] * shape[2] * bits // 8
    squeeze = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    piece = bytes(MB)
    parts = [squeeze.compress(bytes(head))] + [squeeze.compress(piece) for _ in range(-(-n // MB))]
    return b"".join(parts) + squeeze.flush()


BOMBS: dict[str, Callable[[], bytes]] = {
    "colour.png": lambda: png(20_000, 20_000),  # 1.2 GB
    "gray16.png": lambda: png(30_000, 10_000, 16, 0),  # 600 MB, and 2.4 GB as float64
    "strip.tif": lambda: tiff(17_000, 17_000),  # 867 MB
    "side.webp": lambda: webp(16_383),  # 1 GB
    "side.gif": lambda: gif(65_535),  # 4 GB
    "rows.bmp": lambda: bmp(40_000),
    "rows.ppm": lambda: b"P6 40000 40000 255\n" + bytes(900),
}  # fmt: skip
MEDICAL: dict[str, Callable[[], bytes]] = {
    "deflated.dcm": lambda: dicom(700 * MB),
    "plane.nii.gz": lambda: nifti((9_000, 9_000, 2), 2, 8),
    "deep.nii.gz": lambda: nifti((30, 7_500, 7_500), 2, 8),  # 1.7 GB, of which a plane is 56 MB
}


def sparse(path: Path) -> None:
    """A file beyond the limit that takes no room."""
    with path.open("wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n")
        f.truncate(limits.MAX_FILE_BYTES + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All bombs, a file of more than 512 MB, and one good picture."""
    made = tmp_path_factory.mktemp("bombs") / "raw"
    made.mkdir()
    for name, build in BOMBS.items():
        (made / name).write_bytes(build())
    sparse(made / "file.png")
    Image.new("RGB", (40, 40), (200, 9, 9)).save(made / "good.png")
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    return small_model.loaded(made).save(made / "m")


def test_the_bombs_are_bombs(folder):
    """Each is small on the disk, and Pillow agrees with its header: a program that decodes it takes what it says."""
    for name in BOMBS:
        path = folder / name
        assert path.stat().st_size < 8 * MB
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                assert image.width * image.height > 4 * limits.MAX_IMAGE_PIXELS
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    assert (folder / "file.png").stat().st_size > limits.MAX_FILE_BYTES
    assert (folder / "file.png").stat().st_blocks < 100


def test_export_refuses_bombs_in_little_memory(folder, tmp_path):
    (folder / "inside.png").write_bytes(png(8000, 8000, 16, 0))  # 64 million pixels of 16 bits are allowed
    names = sorted(p.name for p in folder.iterdir())
    table = tmp_path / "t.csv"
    table.write_text("file,caption\n" + "".join(f"{n},a picture\n" for n in names))
    out = tmp_path / "out"
    done, peak = run(
        "data", "build", "folder", "--raw", folder, "--captions", table, "--out", out, "--max-bad=1"
    )
    (folder / "inside.png").unlink()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"too_large {len(BOMBS) + 1}" in done.stdout
    rejects = [
        json.loads(line) for line in (out / "folder" / "1.0.0" / "rejects.jsonl").read_text().splitlines()
    ]
    assert sorted(r["key"].split("/")[1] for r in rejects) == sorted([*BOMBS, "file.png"])
    records = Shards(out / "folder", "train")
    assert sorted(records[i].key for i in range(len(records))) == ["folder/good.png", "folder/inside.png"]
    print(f"{peak / MB:.0f} MB")
    assert peak < LIMIT, f"{peak / MB:.0f} MB"


def test_predict_refuses_bombs_in_little_memory(folder, model, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    for name, build in MEDICAL.items():
        (study / name).write_bytes(build())
    out = tmp_path / "p.csv"
    done, peak = run(
        "predict", folder, study, folder / "rows.ppm", "--model", model, "--labels", "ct,mri", "--out", out
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    with (tmp_path / "p.errors.csv").open(newline="") as f:
        errors = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(f)}
    assert set(errors) == {*BOMBS, *MEDICAL, "file.png"}
    for name, reason in errors.items():
        assert "too many pixels" in reason or "too large" in reason or "inflates to more" in reason, (
            name,
            reason,
        )
    with out.open(newline="") as f:
        assert [Path(row["file"]).name for row in csv.DictReader(f)] == ["good.png"]
    print(f"{peak / MB:.0f} MB")
    assert peak < LIMIT, f"{peak / MB:.0f} MB"


def test_the_largest_permitted_pictures_fit(tmp_path):
    """Read one after the other by a program without jax; `predict` reads four at once, each in its own memory."""
    (tmp_path / "gray.png").write_bytes(png(8000, 8000, 16, 0))
    (tmp_path / "colour.tif").write_bytes(tiff(8000, 8000))
    (tmp_path / "volume.nii.gz").write_bytes(nifti((5600, 5600, 1), 64, 64))
    (tmp_path / "frame.dcm").write_bytes(frame(5600))
    code = (
        "from pathlib import Path; from unimed_jax.data import medical\n"
        "shapes = [q.square(32).shape for p in sys.argv[1:] for q in medical.read(Path(p))]\n"
        "assert shapes == [(32, 32, 3)] * 4"
    )
    done, peak = run(*sorted(tmp_path.iterdir()), code=code)
    assert done.returncode == 0, done.stderr
    print(f"{peak / MB:.0f} MB")
    assert peak < LIMIT, f"{peak / MB:.0f} MB"


def test_a_record_that_inflates_is_refused_unread(folder, tmp_path):
    """A shard of 64 KB whose one record has 512 MB, with a manifest that agrees."""
    table = tmp_path / "t.csv"
    table.write_text("file,caption\ngood.png,a picture\n")
    out = tmp_path / "out"
    done, _ = run("data", "build", "folder", "--raw", folder, "--captions", table, "--out", out)
    assert done.returncode == 0, done.stderr
    version = out / "folder" / "1.0.0"
    manifest = json.loads((version / "manifest.json").read_text())
    info = manifest["splits"]["train"]["shards"][0]
    shard = version / info["file"]
    writer = array_record_module().ArrayRecordWriter(str(shard), "group_size:1,zstd")
    writer.write(bytes(512 * MB))
    writer.close()
    assert shard.stat().st_size < MB
    info["bytes"] = shard.stat().st_size
    (version / "manifest.json").write_text(json.dumps(manifest))
    done, peak = run("data", "check", out, "--full")
    assert done.returncode == 3
    assert f"shard {shard} is compressed" in done.stdout
    assert peak < 400 * MB, f"{peak / MB:.0f} MB"
