"""What a user names becomes what is scored: lists, folders, the slices of a series as one volume."""

from __future__ import annotations

from pathlib import Path

import closed_folder
import numpy as np
import pytest
import test_medical
from PIL import Image

from unimed_jax.data import found, medical, series, tables
from unimed_jax.errors import DataError

pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')


def names(items) -> list[list[str]]:
    return [[p.name for p in i.files] for i in items]


def write_slice(path: Path, k: int, **header) -> Path:
    """A CT slice whose pixels all are k x 100; the instance numbers run against the positions."""
    ds = pydicom.dcmread(test_medical.sample("CT_small.dcm"))
    ds.ImagePositionPatient, ds.InstanceNumber = [0, 0, -100 + 2.5 * k], 100 - k
    for name, value in header.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    pixels = np.full(ds.pixel_array.shape, k * 100, np.int16)
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path)
    return path


@pytest.fixture
def scan(tmp_path) -> Path:
    """Six slices, named against their order, and a scout of the same series across them."""
    for i, k in enumerate((5, 2, 0, 4, 1, 3)):
        write_slice(tmp_path / "a" / f"{i}", k)
    write_slice(tmp_path / "a" / "scout", 9, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    return tmp_path


def test_slices_of_a_series_are_one_volume_from_foot_to_head(scan):
    got = found.find([scan])
    assert names(got.inputs) == [["2", "4", "1", "5", "3", "0"], ["scout"]]
    assert (got.files, got.volumes) == (7, 1)
    assert got.notes == ["6 DICOM files are the slices of 1 volume"]


def test_slices_choose_from_the_volume(scan):
    volume = found.find([scan]).inputs[0]
    pick = lambda text: list(found.frames(volume, slices=medical.Slices.parse(text), window=(250, 500)))
    middle = pick("middle")
    assert [f.file.name for f in middle] == ["5"]
    picture = middle[0].read()
    assert (picture.frame, picture.frames) == (3, 6)
    lung = [f.read().data.mean() for f in pick("all")]
    assert lung == sorted(lung)
    assert [f.read().frame for f in pick("every:4")] == [0, 4]


def test_numbers_order_a_sectional_series_without_positions(tmp_path):
    for k in (2, 0, 1):
        write_slice(tmp_path / f"{k}.dcm", k, ImagePositionPatient=None, ImageOrientationPatient=None)
    assert names(found.find([tmp_path]).inputs) == [["2.dcm", "1.dcm", "0.dcm"]]


@pytest.mark.parametrize(
    "headers",
    [
        [{"SeriesInstanceUID": "1.2.1"}, {"SeriesInstanceUID": "1.2.2"}],
        [{"PatientID": "a"}, {"PatientID": "b"}],  # a careless anonymiser gives all the same UIDs
        [{"ImagePositionPatient": [0, 0, 0]}] * 2,  # twice the same place and number
        [{"ImagePositionPatient": None, "Modality": "CR"}] * 2,  # two views
        [{"SeriesInstanceUID": None}] * 2,
    ],
)
def test_what_is_no_volume_stays_single_pictures(tmp_path, headers):
    for k, header in enumerate(headers):
        write_slice(tmp_path / f"{k}.dcm", k, **header, **({"InstanceNumber": 1} if k else {}))
    if headers[0] == {"ImagePositionPatient": [0, 0, 0]}:
        write_slice(tmp_path / "0.dcm", 0, ImagePositionPatient=[0, 0, 0], InstanceNumber=1)
    assert names(found.find([tmp_path]).inputs) == [["0.dcm"], ["1.dcm"]]


def test_orientations_that_were_rounded_differently_are_one(tmp_path):
    """0.125 lies between two hundredths: noise must not cut the volume in two."""
    for k in range(4):
        turned = [1, 0, 0, 0, 0.9921567, 0.125 + (1e-6 if k % 2 else -1e-6)]
        write_slice(tmp_path / f"{k}.dcm", k, ImageOrientationPatient=turned)
    write_slice(tmp_path / "other.dcm", 1, ImageOrientationPatient=[1, 0, 0, 0, 0.98, 0.199])
    inputs = found.find([tmp_path]).inputs
    assert names(inputs) == [["0.dcm", "1.dcm", "2.dcm", "3.dcm"], ["other.dcm"]]


def test_folders_keep_slices_apart(scan):
    """Slices that someone sorted into folders, or copied, are not put together."""
    (scan / "b").mkdir()
    for name in "25":
        (scan / "a" / name).rename(scan / "b" / name)
    assert names(found.find([scan]).inputs) == [["4", "1", "3", "0"], ["scout"], ["2", "5"]]


def test_named_slices_are_scored_by_themselves(scan):
    got = found.find([scan / "a" / "0", scan / "a" / "2", scan])
    assert names(got.inputs) == [["0"], ["2"], ["4", "1", "5", "3"], ["scout"]]
    assert got.repeated == 2
    assert "2 files named again, scored once" in got.notes


def test_damaged_slices_are_left_to_the_reader(scan):
    (scan / "a" / "2").write_bytes((scan / "a" / "2").read_bytes()[:700])
    (scan / "empty.dcm").touch()
    got = names(found.find([scan]).inputs)
    assert ["empty.dcm"] in got
    assert sum(len(x) for x in got) == 8


def test_long_headers_are_read_to_their_end(tmp_path):
    """Private data before the place of the slice, longer than what is read at first."""
    for k in range(3):
        write_slice(tmp_path / f"{k}.dcm", k)
        ds = pydicom.dcmread(tmp_path / f"{k}.dcm")
        ds.add_new(0x00090010, "LO", "SOMEBODY")
        ds.add_new(0x00091001, "OB", bytes(100_000))
        ds.save_as(tmp_path / f"{k}.dcm")
    assert names(found.find([tmp_path]).inputs) == [["0.dcm", "1.dcm", "2.dcm"]]


def test_the_order_does_not_depend_on_threads(scan):
    files = found.find_files([scan])
    assert series.volumes(files, threads=1) == series.volumes(files, threads=8)


def test_no_series_without_pydicom(scan, monkeypatch):
    monkeypatch.setattr(series.dicom, "need", lambda name: (_ for _ in ()).throw(DataError("absent")))
    assert [len(x) for x in names(found.find([scan]).inputs)] == [1] * 7


# ---- lists


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)
    return path


def test_a_list_names_files_and_folders_relative_to_itself(scan, tmp_path):
    picture(tmp_path / "x" / "é.png")
    listing = tmp_path / "x" / "list.csv"
    listing.write_text(f"Image,Patient\né.png,p1\n../a,p2\n{scan / 'a' / '1'},p3\nnone.png,\n")
    got = found.find([listing])
    assert names(got.inputs) == [["é.png"], ["2", "4", "1", "5", "3", "0"], ["scout"], ["none.png"]]
    assert names(found.find([], [listing]).inputs) == names(got.inputs)
    assert [e.group for e in got.lists[0].entries] == ["p1", "p2", "p3", ""]
    assert (got.lists[0].has_label, got.lists[0].has_group) == (False, True)


def test_latin_1_is_read_and_said(tmp_path):
    picture(tmp_path / "é.png")
    (tmp_path / "l.csv").write_bytes(
        "file;label\n".replace(";", ",").encode() + "é.png,fièvre\n".encode("latin-1")
    )
    got = found.find([tmp_path / "l.csv"])
    assert names(got.inputs) == [["é.png"]]
    assert got.lists[0].entries[0].label == "fièvre"
    assert got.notes == ["l.csv is not UTF-8 and was read as Latin-1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("file\n", "names no pictures"),
        ("fil,label\na,b\n", 'has no column .file.. Did you mean "fil"'),
        ("file,path\na,b\n", "the columns 'file' and 'path', which mean the same"),
        ("label,file\na\n,\nb,\n", "line 2 and 1 more lines name no file"),
        ('file\n"a\n', "is no CSV"),
        ("file;label\na;b\n", "has ';' between its columns"),
        ("\ufefffile,label\na,b\n".encode("utf-16"), "is UTF-16"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, words):
    (tmp_path / "l.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        tables.read_list(tmp_path / "l.csv")


def test_a_name_with_a_zero_byte_is_an_unreadable_file(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"file\na\0b.png\n")
    (item,) = found.find([tmp_path / "l.csv"]).inputs
    (failed,) = found.frames(item)
    assert isinstance(failed, found.Failed)
    assert "cannot be read" in failed.error.cause


def test_a_folder_that_cannot_be_listed_is_an_input_that_cannot_be_read(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 9), 7).save(tmp_path / folder / "x.png")
    closed_folder.close(tmp_path / "b", monkeypatch)
    good, closed = found.find([tmp_path]).inputs
    assert (good.files, closed.files) == ((tmp_path / "a" / "x.png",), (tmp_path / "b",))
    (failed,) = found.frames(closed)
    assert isinstance(failed, found.Failed)
    assert "b: is no file that can be read" in failed.error.cause


def test_missing_paths_and_nothing_found(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        found.find([tmp_path / "x.csv"])
    with pytest.raises(DataError, match="no pictures in") as e:
        found.find([tmp_path])
    assert ".svs" in e.value.remedy
