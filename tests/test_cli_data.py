"""cli/data.py and data/sources/: the data verb as a user meets it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unimed_jax.cli import data as cli
from unimed_jax.cli.main import main
from unimed_jax.data import medical, windows
from unimed_jax.data.record import hash_patient
from unimed_jax.data.shards import Shards, find_sources
from unimed_jax.data.sources import SOURCES, open_source
from unimed_jax.data.sources.folder import Folder
from unimed_jax.data.validate import Reject
from unimed_jax.errors import DataError, UsageError


def png(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.png").write_bytes(png(ord(name)))
    return folder


def table(folder, text, name="table.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


GOOD = """file,caption,caption2,labels,modality,patient,split
a.png,A chest film.,PA view.,region:chest; view:PA,X-ray,Jane Doe,train
b.png,"A CT, axial",,"[""plane:axial""]",CT,Joe,test
c.png,Eye,,,Fundus,,train
"""


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    assert cli.run(["build", "phantom", "--out", str(root), "--set", "n=48", "--set", "size=32"]) == 0
    return root


def outcome(capsys, *argv):
    """Runs the whole command: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as e:
        main(["data", *map(str, argv)])
    out, err = capsys.readouterr()
    return e.value.code, out, err


# --- build ----------------------------------------------------------------------------------------------------------


def test_build_a_folder(raw, tmp_path, capsys):
    path = table(tmp_path, GOOD)
    args = ["build", "folder", "--raw", raw, "--captions", path, "--out", tmp_path / "out", "--name", "mine"]
    code, out, err = outcome(capsys, *args, "--set", "licence=CC BY 4.0", "--set", "salt=s3")
    assert (code, err) == (0, "")
    assert "mine: test 1, train 2 records; rejected: none" in out
    records = {e.key: e for split in ("train", "test") for e in Shards(tmp_path / "out/mine", split)}
    a, b, c = (records[f"mine/{k}.png"] for k in "abc")
    assert [x.text for x in a.captions] == ["A chest film.", "PA view."]
    assert (a.labels, a.modality, a.patient) == (
        ("region:chest", "view:PA"),
        "X-ray",
        hash_patient("Jane Doe", "s3"),
    )
    assert (b.labels, b.split, [x.text for x in b.captions]) == (("plane:axial",), "test", ["A CT, axial"])
    assert (c.labels, c.patient, c.image) == ((), "", png(ord("c")))
    card = (find_sources(tmp_path / "out")["mine"] / "README.md").read_text()
    assert "CC BY 4.0" in card


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", '\ufefffile,captions\na.png,"[""one"", {""text"": ""two"", ""kind"": ""report""}]"\n'),
        (
            "t.tsv",
            'file\tcaption\tkind\tcaptions\na.png\tone\toriginal\t[{"text": "two", "kind": "report"}]\n',
        ),
        ("t.jsonl", '{"file": "a.png", "captions": ["one", {"text": "two", "kind": "report"}]}\n\n'),
    ],
)
def test_kinds_of_tables(raw, tmp_path, name, text):
    (row,) = Folder(raw=raw, captions=table(tmp_path, text, name)).items()
    assert [(c.text, c.kind) for c in row.captions] == [("one", "original"), ("two", "report")]
    assert (row.key, row.split) == ("a.png", "train")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("file,caption\n/etc/passwd,x\n", "line 2: file is '/etc/passwd'"),
        ("file,caption\na/../../x.png,x\n", "line 2: file is"),
        ("file,caption\n,x\n", "line 2: file is ''"),
        ("file,caption,modality\na.png,x,x-ray\n", "modality is 'x-ray'. Did you mean \"X-ray\""),
        ("file,capton\na.png,x\n", "unknown column 'capton'. Did you mean \"caption\""),
        ("caption\nx\n", "no column file"),
        ("file,labels\na.png,x\n", "no column caption"),
        ("file,caption\na.png\n", "line 2 has another number of columns"),
        ("file,caption\na.png,x,y\n", "line 2 has another number of columns"),
        ('file,caption\na.png,"x\n', "malformed"),
        ("file,captions\na.png,[1]\n", "captions holds 1"),
        ('file,captions\na.png,"{""a"": 1}"\n', "no JSON list"),
        ("file,captions\na.png,__import__('os')\n", "is no JSON"),
        ("", "no column file"),
    ],
)
def test_bad_tables_are_refused_with_their_line(raw, tmp_path, capsys, text, cause):
    path = table(tmp_path, text)
    code, _, err = outcome(
        capsys, "build", "folder", "--raw", raw, "--captions", path, "--out", tmp_path / "out"
    )
    assert code == 3
    assert cause in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").rglob("unimed-*"))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"file": "a.png", "caption": "x"}\n{"file": "b.p', "line 2 is no JSON"),
        (
            '{"file": "a.png", "caption": "x", "caption": "y"}\n',
            "line 1 is no JSON: the key 'caption' is there",
        ),
        ("5\n", "line 1 is no JSON object"),
    ],
)
def test_bad_json_lines_are_refused_with_their_line(raw, tmp_path, text, cause):
    with pytest.raises(DataError, match=cause):
        Folder(raw=raw, captions=table(tmp_path, text, "t.jsonl")).items()


def test_missing_folders_and_tables(raw, tmp_path):
    with pytest.raises(DataError, match="cannot read the table"):
        Folder(raw=raw, captions=tmp_path / "none.csv").items()
    with pytest.raises(DataError, match="no folder"):
        Folder(raw=tmp_path / "none", captions=table(tmp_path, GOOD)).items()


def test_rejects_and_max_bad(raw, tmp_path, capsys):
    (raw / "b.png").write_bytes(b"")
    args = ["build", "folder", "--raw", raw, "--captions", table(tmp_path, GOOD), "--out", tmp_path / "out"]
    code, _, err = outcome(capsys, *args)
    assert code == 3
    assert "1 of 3 items of folder were rejected (empty_file 1)" in err
    assert "--max-bad=0.334" in err
    code, out, _ = outcome(capsys, *args, "--max_bad=0.334")
    assert code == 0
    assert "rejected: empty_file 1" in out


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["build", "fantom", "--out", "o"], "no source 'fantom'. Did you mean \"phantom\""),
        (["build", "folder", "--out", "o"], "source folder needs --raw, --captions"),
        (["build", "folder", "--otu", "o"], 'data: unknown argument --otu. Did you mean "--out"?'),
        (["build", "phantom", "--out", "o", "--set", "sise=3"], 'Did you mean "size"'),
        (["build", "phantom", "--out", "o", "--set", "n=many"], "n='many' is not of type int"),
        (["build", "phantom", "--out", "o", "--set", "n"], "--set n is not KEY=VALUE"),
        (["build", "phantom", "--out", "o", "--workers", "0"], "--workers is 0"),
        (
            ["build", "phantom", "--out", "o", "--shard", "2"],
            'unknown argument --shard. Did you mean "--shards"',
        ),
        (["build", "phantom"], "--out"),
        (["frobnicate"], "frobnicate"),
        ([], "required"),
        (["show", "x", "-n", "0"], "-n is 0"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(capsys, tmp_path, monkeypatch, argv, cause):
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(capsys, *argv)
    assert (code, out) == (2, "")
    assert cause in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sources_table():
    assert set(SOURCES) >= {"folder", "minimed", "phantom"}
    assert open_source("phantom", {"n": "7", "size": 16}).name == "phantom"
    with pytest.raises(UsageError, match="not of type bool"):
        open_source("folder", {"raw": "r", "captions": "c", "hide_names": "maybe"})
    source = open_source("folder", {"raw": "r", "captions": "c", "hide_names": "true"})
    assert isinstance(source, Folder)
    assert source.hide_names is True


# --- check, stats, show ---------------------------------------------------------------------------------------------


def test_check(phantom, capsys):
    code, out, err = outcome(capsys, "check", phantom, "--full")
    assert (code, err) == (0, "")
    assert "phantom: 2 shards, 48 records (every record read)" in out
    code, out, _ = outcome(capsys, "check", phantom, "--json")
    assert code == 0
    assert json.loads(out) == {
        "ok": True,
        "full": False,
        "sources": ["phantom"],
        "shards": 2,
        "records": 48,
        "problems": [],
    }


def test_check_of_damaged_records_lists_them_and_exits_3(tmp_path, capsys):
    cli.run(["build", "phantom", "--out", str(tmp_path), "--set", "n=48", "--set", "size=32"])
    shard = next(tmp_path.rglob("unimed-test.array_record-00000-of-00001"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    capsys.readouterr()
    assert outcome(capsys, "check", tmp_path)[0] == 0  # sizes and counts are right
    code, out, err = outcome(capsys, "check", tmp_path, "--full")
    assert code == 3
    assert "sha256 differs from the manifest's" in out
    assert "problems under" in err
    assert err.count("\n") == 1
    code, out, _ = outcome(capsys, "check", tmp_path, "--full", "--json")
    assert code == 3
    assert shard.name in json.loads(out)["problems"][0]


@pytest.mark.parametrize("verb", ["check", "stats", "show"])
def test_missing_and_empty_folders(verb, tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        code, out, err = outcome(capsys, verb, folder)
        assert (code, out) == (3, "")
        assert err.count("\n") == 1


def test_stats(phantom, capsys):
    code, out, _ = outcome(capsys, "stats", phantom)
    assert code == 0
    assert "48 pictures, 0 of them there more than once" in out
    for word in ("Histopathology", "patients", "there before", "95 %", "words <=8", "tokens not counted"):
        assert word in out
    assert "similar" not in out
    code, out, _ = outcome(capsys, "stats", phantom, "--duplicates", "--distance", "8")
    assert code == 0
    assert "0 more with the pixels of an earlier one" in out
    assert outcome(capsys, "stats", phantom, "--duplicates", "--distance", "99")[0] == 2
    found = json.loads(outcome(capsys, "stats", phantom, "--json", "--workers=2")[1])
    assert sum(row["images"] for row in found["rows"]) == 48
    assert {row["modality"] for row in found["rows"]} == {
        "CT",
        "Fundus",
        "Histopathology",
        "MRI",
        "Ultrasound",
        "X-ray",
    }


def test_show(phantom, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    code, out, _ = outcome(capsys, "show", phantom, "-n", 4, "--split", "test", "--html", page)
    assert code == 0
    assert out.count("phantom/0") == 4
    assert "train" not in out
    assert "phantom-" not in out  # patients are not shown
    text = page.read_text()
    assert text.count("<img") == text.count("data:image/jpeg;base64,") == 4
    assert "<h1>Records</h1>" in text
    assert "http" not in text
    code, _, err = outcome(capsys, "show", phantom, "--source", "other")
    assert code == 3
    assert "no record of source other" in err


def test_show_escapes_what_is_stored(raw, tmp_path, capsys):
    path = table(tmp_path, 'file,caption\na.png,"<script>alert(1)</script> [red]x[/red]"\n')
    cli.run(["build", "folder", "--raw", str(raw), "--captions", str(path), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    out = outcome(capsys, "show", tmp_path / "out", "--html", tmp_path / "p.html")[1]
    assert "[red]x[/red]" in out
    assert "<script" not in (tmp_path / "p.html").read_text()


def test_help_is_light():
    code = (
        "import sys\nfrom unimed_jax.cli import data\ntry:\n    data.run(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'torch', 'grain', 'transformers', 'tensorflow_datasets', 'tensorflow'}\n"
        "bad = heavy & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "build" in done.stdout


def test_help_names_a_default_once_and_only_where_there_is_one(capsys):
    with pytest.raises(SystemExit):
        cli.run(["build", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "processes (default: 1)" in text
    assert "may be rejected (default: 0.001) --set" in text  # its own words are enough
    assert not re.search(r"default: (None|False|True|\[\]|)\)", text)


def test_the_installed_command(phantom):
    done = subprocess.run(
        [sys.executable, "-m", "unimed_jax", "data", "check", phantom],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_range_of_shards(raw, tmp_path, capsys):
    captions = table(raw, GOOD)
    build = ("build", "folder", "--raw", str(raw), "--captions", str(captions), "--out", str(tmp_path / "o"))
    code, out, _ = outcome(capsys, *build, "--shard-range", "0:1")
    assert code == 0
    assert out.startswith("folder: 1 of 2 shards are written\n")
    for wrong in ("1", "a:b", "1:2:3"):
        code, _, err = outcome(capsys, *build, "--shard-range", wrong)
        assert (code, "is no range" in err) == (2, True)
    assert outcome(capsys, *build, "--shard-range", "0:1", "--force")[0] == 2
    code, out, _ = outcome(capsys, *build)
    assert code == 0
    assert "train 2, test 1" in out or "test 1, train 2" in out


def test_studies_are_stored_as_the_window_shows_them(tmp_path):
    from pydicom.data import get_testdata_file

    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(str(get_testdata_file(name)), raw / name)
    (raw / "cut.dcm").write_bytes((raw / "CT_small.dcm").read_bytes()[:700])
    rows = "".join(f"{name},A slice,{m}\n" for name, m in (("CT_small.dcm", ""), ("MR_small.dcm", "CT")))
    captions = table(raw, f"file,caption,modality\n{rows}cut.dcm,A slice,\n")
    stored = {}
    for window in ("", "lung"):
        source = open_source("folder", {"raw": str(raw), "captions": str(captions), "window": window})
        ct, mr, cut = source.items()
        example = source.example(ct)
        stored[window] = np.asarray(Image.open(io.BytesIO(example.image)))
        (picture,) = medical.read(raw / "CT_small.dcm", window=windows.parse_window(window))
        np.testing.assert_array_equal(stored[window], picture.data)
        assert (example.modality, source.example(mr).modality) == ("CT", "CT")  # the table's word counts
        with pytest.raises(Reject, match="decode_error") as e:
            source.example(cut)
        assert "cut" not in e.value.detail
        for name in (b"CompressedSamples", b"1CT1"):  # the patient of the test file
            assert name in (raw / "CT_small.dcm").read_bytes()
            assert name not in example.image
    assert not np.array_equal(stored[""], stored["lung"])
    with pytest.raises(UsageError, match="no window 'long'"):
        open_source("folder", {"raw": str(raw), "captions": str(captions), "window": "long"})


def test_a_table_in_parquet(raw, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"file": ["a.png", "b.png"], "captions": [["One", "Two"], ["Three"]], "patient": [None, "p"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    a, b = Folder(raw=raw, captions=tmp_path / "t.parquet").items()
    assert [c.text for c in a.captions] == ["One", "Two"]
    assert (a.patient, b.where) == ("", "t.parquet row 2")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cut\.parquet is malformed: ArrowInvalid"):
        Folder(raw=raw, captions=tmp_path / "cut.parquet").items()
    pq.write_table(pa.table({"fil": ["a.png"]}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match="unknown column 'fil'"):
        Folder(raw=raw, captions=tmp_path / "u.parquet").items()
