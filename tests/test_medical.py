"""DICOM, NIfTI and image files: the order of operations, codings, refusals, and no identifier anywhere."""

from __future__ import annotations

import hashlib
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimed_jax.data import dicom, limits, medical, windows
from unimed_jax.errors import DataError, UsageError

pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')


def sample(name: str) -> Path:
    from pydicom.data import get_testdata_file

    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip("pip install pydicom-data")
    return Path(str(found))


def only(path: Path, **options) -> medical.Picture:
    (picture,) = medical.read(path, **options)
    return picture


# file: sha256 of the decoded pixels (first 8 digits), shape, lowest, highest. The same picture in several codings
# has the same digits.
PIXELS = {
    "CT_small.dcm": ("7a481f6f", (128, 128), 128, 2191),
    "MR_small.dcm": ("88617aaa", (64, 64), 127, 2145),
    "MR_small_RLE.dcm": ("88617aaa", (64, 64), 127, 2145),
    "MR_small_implicit.dcm": ("88617aaa", (64, 64), 127, 2145),
    "MR_small_jp2klossless.dcm": ("88617aaa", (64, 64), 127, 2145),
    "MR_small_jpeg_ls_lossless.dcm": ("88617aaa", (64, 64), 127, 2145),
    "MR_small_bigendian.dcm": ("6d00b5d8", (64, 64), 127, 2145),  # the same values in the other byte order
    "J2K_pixelrep_mismatch.dcm": ("1296350a", (512, 512), -2000, 1896),
    "image_dfl.dcm": ("1f5f1b1c", (512, 512), 0, 255),
    "examples_palette.dcm": ("66e6c512", (350, 800), 0, 255),
    "examples_rgb_color.dcm": ("a64f021b", (240, 320, 3), 0, 255),
    "examples_overlay.dcm": ("679f753a", (300, 484), 0, 1123),
    "RG1_UNCR.dcm": ("26721b21", (1955, 1841), 874, 26479),
    "RG1_J2KR.dcm": ("26721b21", (1955, 1841), 874, 26479),
    "RG3_UNCR.dcm": ("85480a02", (1760, 1760), 0, 1023),
    "US1_UNCR.dcm": ("e1689202", (480, 640, 3), 0, 255),
    "US1_J2KR.dcm": ("e1689202", (480, 640, 3), 0, 255),
    "gdcm-US-ALOKA-16.dcm": ("ee2a4d13", (480, 640), 0, 64512),
    "bad_sequence.dcm": ("ef7120dd", (512, 512), 13, 2267),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_decoded_exactly(name):
    path = sample(name)
    digits, shape, low, high = PIXELS[name]
    pixels = dicom._pixels(path, pydicom.dcmread(path), 0, 1, pydicom)
    assert (pixels.shape, pixels.min(), pixels.max()) == (shape, low, high)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:8] == digits


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("RG1_UNCR.dcm", "RG1_J2KR.dcm"),
        ("MR2_UNCR.dcm", "MR2_J2KR.dcm"),
        ("MR_small.dcm", "MR_small_bigendian.dcm"),
        ("emri_small.dcm", "emri_small_big_endian.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
    ],
)
def test_the_coding_does_not_change_the_picture(a, b):
    first, second = only(sample(a)), only(sample(b))
    assert (first.data == second.data).all()
    assert (first.square(96) == second.square(96)).all()


def test_rescale_then_window():
    """CT in Hounsfield units: slope 1, intercept -1024; the lung window of the caller."""
    path = sample("CT_small.dcm")
    picture = only(path, window=windows.parse_window("lung"))
    hu = pydicom.dcmread(path).pixel_array.astype(float) - 1024
    share = np.clip((hu - (-600 - 0.5)) / (1500 - 1) + 0.5, 0, 1)
    assert (picture.data == np.floor(share * 255 + 0.5)).all()
    assert (picture.window, picture.modality, picture.inverted) == ("option", "CT", False)


def test_monochrome1_is_inverted_after_the_window():
    path = sample("RG1_UNCR.dcm")
    picture = only(path)
    raw = pydicom.dcmread(path).pixel_array.astype(float)  # window 15000 / 30000 in the file
    share = np.clip((raw - 14999.5) / 29999 + 0.5, 0, 1)
    assert (picture.data == 255 - np.floor(share * 255 + 0.5)).all()
    assert picture.inverted
    assert picture.window == "file"
    # Air around the body is dark once inverted: the picture's corner against its centre.
    assert picture.data[:50, :50].mean() < picture.data[900:1000, 850:950].mean()


def test_the_first_of_two_windows_is_used():
    path = sample("examples_overlay.dcm")  # centres 450 and 200, widths 790 and 443
    raw = pydicom.dcmread(path).pixel_array.astype(float)
    assert (only(path).data == windows.apply(raw, 450, 790)).all()


def test_without_a_window_padding_does_not_stretch_the_picture(tmp_path):
    ds = pydicom.dcmread(sample("CT_small.dcm"))
    pixels = ds.pixel_array.copy()
    pixels[:40] = -2000  # the file's own padding value
    ds.PixelData = pixels.tobytes()
    ds.save_as(tmp_path / "padded.dcm")
    inside = pixels[40:].astype(float)
    low, high = np.percentile(inside, [0.5, 99.5])
    expected = np.floor(np.clip((inside - low) / (high - low), 0, 1) * 255 + 0.5)
    picture = only(tmp_path / "padded.dcm")
    assert picture.window == "percentile"
    assert (picture.data[40:] == expected).all()
    assert (picture.data[:40] == 0).all()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", lambda x: np.clip((x - 99.5) / 99 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 100) / 100 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 100) / 100))),
    ],
)
def test_window_functions_follow_the_standard(function, expected):
    x = np.arange(0, 201, dtype=float)[None]
    assert (windows.apply(x, 100, 100, function) == np.floor(expected(x) * 255 + 0.5)).all()


def test_a_window_of_width_one_is_a_threshold():
    assert windows.apply(np.array([[9.0, 10.0]]), 10, 1).tolist() == [[0, 255]]


def test_frames():
    path = sample("examples_ybr_color.dcm")  # 30 frames of colour ultrasound, YBR_FULL_422
    everything = pydicom.dcmread(path)
    middle = only(path)
    assert (middle.frame, middle.frames, middle.window) == (15, 30, "colour")
    assert (middle.data == pydicom.pixels.pixel_array(everything, index=15)).all()
    ten = medical.read(path, slices=medical.Slices.parse("every:10"))
    assert [p.frame for p in ten] == [0, 10, 20]
    assert len(medical.read(path, slices=medical.Slices.parse("all"))) == 30


def test_windows_of_single_frames_are_found():
    """An enhanced CT keeps slope and window in its functional groups."""
    path = sample("eCT_Supplemental.dcm")
    ds = pydicom.dcmread(path)
    group = ds.PerFrameFunctionalGroupsSequence[0]
    shared = ds.SharedFunctionalGroupsSequence[0]
    find = lambda name: (group if name in group else shared)[name][0]
    slope, voi = find("PixelValueTransformationSequence"), find("FrameVOILUTSequence")
    hu = ds.pixel_array[0] * float(slope.RescaleSlope) + float(slope.RescaleIntercept)
    first = medical.read(path, slices=medical.Slices(1))[0]
    assert first.window == "file"
    centre, width = dicom._first(voi.WindowCenter), dicom._first(voi.WindowWidth)
    assert (first.data == windows.apply(hu, centre, width)).all()


@pytest.mark.parametrize(
    ("name", "bits"), [("examples_palette.dcm", 16), ("gdcm-US-ALOKA-16.dcm", 16), ("OBXXXX1A.dcm", 16)]
)
def test_palettes_become_colours(name, bits):
    path = sample(name)
    ds = pydicom.dcmread(path)
    colours = pydicom.pixels.apply_color_lut(ds.pixel_array, ds)
    assert (only(path).data == colours >> (bits - 8)).all()


def test_16_bit_colour_keeps_its_upper_byte():
    pixels = pydicom.dcmread(sample("SC_rgb_16bit.dcm")).pixel_array
    assert (only(sample("SC_rgb_16bit.dcm")).data == pixels >> 8).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("liver.dcm", "holds a segmentation"),
        ("rtdose.dcm", "holds a dose grid"),
        ("badVR.dcm", "holds a dose grid"),
        ("MR_truncated.dcm", "cannot decode the pixels"),
        ("OT-PAL-8-face.dcm", "cannot decode the pixels"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "cannot decode the pixels .transfer syntax JPEG 2000"),
        ("nested_priv_SQ.dcm", "no picture"),
        ("rtplan.dcm", "treatment plan"),
        ("DICOMDIR", "DICOM directory"),
    ],
)
def test_files_without_a_picture_are_refused(name, words):
    with pytest.raises(DataError, match=words) as e:
        medical.read(sample(name))
    assert e.value.cause.startswith(sample(name).name)


def test_a_missing_decoder_names_the_pip_line(monkeypatch):
    path = sample("MR_small_jpeg_ls_lossless.dcm")
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(DataError, match="JPEG-LS Lossless") as e:
        medical.read(path)
    assert "unimed-jax[medical]" in e.value.remedy


def test_a_missing_package_names_the_pip_line(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(dicom.importlib, "import_module", absent)
    with pytest.raises(DataError, match="needs pydicom") as e:
        medical.read(sample("CT_small.dcm"))
    assert "unimed-jax[medical]" in e.value.remedy


def test_a_deflated_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    """A few KB that would become more than may be, also where the header hides the place at which it begins."""
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 4 << 20)
    ds = pydicom.dcmread(sample("image_dfl.dcm"))
    ds.save_as(tmp_path / "small.dcm")
    assert only(tmp_path / "small.dcm").data.shape == (512, 512)
    raw = (tmp_path / "small.dcm").read_bytes()
    end = 144 + struct.unpack("<I", raw[140:144])[0]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(6)) + squeeze.flush()
    elsewhere = struct.pack("<I", end + len(bomb) - 144)  # where the small file's own stream follows
    command = struct.pack("<HHII", 0, 0, 4, 0)
    bombs = {
        "plain": raw[:end] + bomb,
        "no preamble": raw[132:end] + bomb,
        "another length": raw[:140] + elsewhere + raw[144:end] + bomb + raw[end:],
        "command": raw[:end] + command + bomb,
    }
    for name, data in bombs.items():
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(data)
        with pytest.raises(DataError, match="inflates to more than"):
            medical.read(path)


def test_huge_dimensions_are_refused_before_decoding(tmp_path):
    ds = pydicom.dcmread(sample("CT_small.dcm"))
    ds.Rows = ds.Columns = 60000
    ds.save_as(tmp_path / "wide.dcm")
    with pytest.raises(DataError, match="60000 x 60000 pixels are too many"):
        medical.read(tmp_path / "wide.dcm")


def test_too_many_frames_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "MAX_FRAMES", 10)
    with pytest.raises(DataError, match="30 frames are too many"):
        medical.read(sample("examples_ybr_color.dcm"), slices=medical.Slices(1))


def test_random_damage_never_escapes_as_another_exception(tmp_path):
    rng = np.random.default_rng(0)
    whole, lines = sample("CT_small.dcm").read_bytes(), []
    for i in range(150):
        raw = bytearray(whole)
        if i % 3 == 0:
            raw = raw[: int(rng.integers(len(raw)))]
        for _ in range(int(rng.integers(1, 6))):
            if raw:
                raw[int(rng.integers(min(len(raw), 8000)))] = int(rng.integers(256))
        (tmp_path / "x.dcm").write_bytes(raw)
        try:
            for p in medical.read(tmp_path / "x.dcm"):
                assert p.square(16).shape == (16, 16, 3)
        except DataError as e:
            lines.append(e.line())
    assert len(lines) > 50
    assert not any("\n" in line for line in lines)


# fmt: off
IDENTIFYING = [
    "PatientName", "PatientID", "OtherPatientNames", "OtherPatientIDs", "PatientAddress", "PatientComments",
    "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName",
    "OperatorsName", "StudyDescription", "StudyID", "SeriesDescription", "AccessionNumber", "StationName",
    "ProtocolName", "DeviceSerialNumber", "ImageComments", "Occupation", "RequestingPhysician",
    "AdditionalPatientHistory", "EthnicGroup", "PatientBirthName", "PatientMotherBirthName", "MilitaryRank",
    "BranchOfService", "MedicalRecordLocator", "RequestedProcedureDescription", "BodyPartExamined",
]
# fmt: on


def plant(path: Path) -> list[str]:
    """Copies a real DICOM with a tagged value in every place that identifies someone; returns the tags."""
    ds = pydicom.dcmread(sample("CT_small.dcm"))
    canaries: list[str] = []

    def canary() -> str:
        canaries.append(f"CANARY{len(canaries):02d}")
        return canaries[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword in IDENTIFYING:
            setattr(ds, keyword, canary())
        ds.Modality = "CT"
        # Values that are wrong for their type, so that the reader complains and quotes them.
        for tag, vr in (
            (0x00080018, "UI"),
            (0x0020000D, "UI"),
            (0x00100030, "DA"),
            (0x00101010, "AS"),
            (0x00080030, "TM"),
        ):
            ds.add(pydicom.DataElement(tag, "LO", canary()))
            ds[tag].VR = vr
        ds.add_new(0x00091001, "LO", canary())
        ds.add_new(0x00190010, "LO", canary())
        item = pydicom.Dataset()
        item.PatientName = canary()
        item.add_new(0x00080050, "SH", canary())
        ds.add_new(0x00081110, "SQ", [item])
        ds.add_new(0x00184000, "LT", canary())
        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        ds.save_as(path, enforce_file_format=False)
    return canaries


def test_no_identifier_leaves_the_reader(tmp_path, caplog, capfd):
    canaries = plant(tmp_path / "patient.dcm")
    assert len(canaries) == 40
    assert all(c.encode() in (tmp_path / "patient.dcm").read_bytes() for c in canaries)
    damaged = (tmp_path / "patient.dcm").read_bytes()[:-5000]
    (tmp_path / "cut.dcm").write_bytes(damaged)
    seen = []
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen.append(repr(only(tmp_path / "patient.dcm")))
        with pytest.raises(DataError) as e:
            medical.read(tmp_path / "cut.dcm")
        seen += [repr(e.value), e.value.line(), repr(e.value.__cause__)]
    seen += (
        [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records] + list(capfd.readouterr())
    )
    assert [c for c in canaries if any(c in s for s in seen)] == []


def test_pydicom_itself_still_logs_outside_the_reader(tmp_path, caplog):
    """Only our reads are scrubbed."""
    medical.read(sample("CT_small.dcm"))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("pydicom").warning("told (0010,0010)")
    assert "told" in caplog.text


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SRA", "AIL", "PSR"])
def test_nifti_is_shown_front_up_and_right_on_the_left_in_any_orientation(tmp_path, axes):
    nib = pytest.importorskip("nibabel", reason='pip install "unimed-jax[medical]"')
    ras = np.zeros((8, 12, 5), np.int16)
    ras[1, 10, :] = 100  # the first axis grows from the patient's left to the right
    ras[:, :, 2] += np.arange(8, dtype=np.int16)[:, None] * 10
    image = nib.Nifti1Image(ras, np.diag([2.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    )
    nib.save(turned, tmp_path / "v.nii.gz")
    picture = only(tmp_path / "v.nii.gz")
    assert (picture.kind, picture.frame, picture.frames) == ("nifti", 2, 5)
    plane = ras[:, :, 2].astype(float)
    expected = windows.stretch(plane).T[::-1, ::-1]  # rows: front first; columns: the patient's right first
    assert picture.data.shape == (12, 8)
    assert (picture.data == expected).all()


def test_nifti_slices_and_refusals(tmp_path):
    nib = pytest.importorskip("nibabel", reason='pip install "unimed-jax[medical]"')
    nib.save(nib.Nifti1Image(np.ones((4, 4, 6, 2), np.float32), np.eye(4)), tmp_path / "four.nii")
    assert len(medical.read(tmp_path / "four.nii", slices=medical.Slices(1))) == 6
    nib.save(nib.Nifti1Image(np.ones((4, 4), np.float32), np.eye(4)), tmp_path / "flat.nii")
    with pytest.raises(DataError, match=r"flat\.nii"):
        medical.read(tmp_path / "flat.nii")
    (tmp_path / "cut.nii").write_bytes((tmp_path / "four.nii").read_bytes()[:400])
    with pytest.raises(DataError, match=r"cut\.nii"):
        medical.read(tmp_path / "cut.nii")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGB", "jpg"), ("I;16", "png"), ("I;16", "tif"), ("P", "gif")]
)
def test_ordinary_images_take_the_evaluation_path(tmp_path, mode, suffix):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, (40, 60)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 255, (40, 60), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    picture = only(tmp_path / f"x.{suffix}")
    square = picture.square(32)
    assert picture.kind == "image"
    assert square.shape == (32, 32, 3)
    assert square.max() > 150  # 12 bits in a 16-bit container do not turn black


def test_the_content_decides_not_the_suffix(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    (tmp_path / "x.tif").write_bytes((tmp_path / "x.png").read_bytes())
    assert only(tmp_path / "x.tif").kind == "image"
    (tmp_path / "scan.png").write_bytes(sample("CT_small.dcm").read_bytes())
    assert only(tmp_path / "scan.png").modality == "CT"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"hello world" * 50, "no picture of a known format"),
        ("text.dcm", b"hello world" * 50, "text.dcm"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        medical.read(tmp_path / name)


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_a_picture_with_another_number_of_channels_is_refused_by_what_can_be_read(tmp_path, channels):
    tifffile = pytest.importorskip("tifffile", reason='pip install "unimed-jax[medical]"')
    pixels = np.zeros((16, 16, channels), np.uint8)
    tifffile.imwrite(tmp_path / "bands.tif", pixels, planarconfig="contig", photometric="minisblack")
    with pytest.raises(DataError, match=r"^bands.tif: is a TIFF of another form. Fix: 1, 3 or 4 channels"):
        medical.read(tmp_path / "bands.tif")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        medical.read(tmp_path / "none.dcm")


@pytest.mark.parametrize("text", ["lungs", "1,2,3", "x,y", "10,0", "nan,10"])
def test_bad_windows(text):
    with pytest.raises(UsageError, match="window"):
        windows.parse_window(text)


@pytest.mark.parametrize("text", ["every:0", "first", "every:-1", ""])
def test_bad_slices(text):
    with pytest.raises(UsageError, match="slices"):
        medical.Slices.parse(text)
