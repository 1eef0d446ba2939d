"""Truth from CSV files: matched to what was scored, every gap counted, and metrics as sklearn computes them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import small_model
from PIL import Image

from unimed_jax.cli import predict as verb
from unimed_jax.data import found, tables
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError
from unimed_jax.evaluate import multilabel, tasks, truth

TASK = tasks.from_labels(["ct", "mri"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return small_model.loaded(folder).save(folder / "m")


@pytest.fixture
def scans(tmp_path) -> Path:
    """Twelve pictures in two folders."""
    for i, pixels in enumerate(small_model.pictures(12, size=40)):
        path = tmp_path / "scans" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "scans"


def listing(path: Path, *lines: str) -> tables.Listing:
    path.write_text("\n".join(lines) + "\n")
    return tables.read_list(path)


def match(scans: Path, *lines: str, task=TASK, at: Path | None = None) -> truth.Truth:
    named = found.find([scans])
    lists = [listing((at or scans) / "t.csv", *lines)]
    return truth.match(named, lists, [scans], task)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


# ---- which row speaks of which picture


def test_names_are_relative_to_the_list_the_folder_or_absolute(scans, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    got = match(
        scans,
        "file,label",
        "a/00.png,ct",
        f"{scans}/b/01.png,mri",
        "../scans/a/02.png,mri",
        at=tmp_path / "elsewhere",
    )
    assert got.words == {0: "ct", 6: "mri", 1: "mri"}
    assert got.counts == {"pictures or volumes without truth": 9}


def test_a_name_in_several_folders_is_nobodys(scans, tmp_path):
    """Whose truth it is cannot be guessed: the first folder's would be taken for everybody's."""
    (scans / "b" / "00.png").write_bytes((scans / "a" / "02.png").read_bytes())
    folders = [scans / "a", scans / "b"]
    named = found.find(folders)
    lists = [listing(tmp_path / "t.csv", "file,label", "02.png,ct", "00.png,mri")]
    with pytest.raises(DataError, match=r"line 3 of the truth names '00.png', which is in several folders"):
        truth.match(named, lists, folders, TASK)
    beside = [listing(scans / "b" / "t.csv", "file,label", "00.png,mri")]
    got = truth.match(named, beside, folders, TASK)
    assert [named.inputs[n].files[0] for n in got.said] == [scans / "b" / "00.png"]


def test_a_folder_speaks_for_what_no_nearer_row_speaks_of(scans):
    got = match(scans, "file,label,patient", ".,mri,p0", "a,ct,p1", "a/00.png,mri,p2")
    assert [got.words[n] for n in range(12)] == ["mri", *["ct"] * 5, *["mri"] * 6]
    assert [got.groups[n] for n in (0, 1, 6)] == ["group p2", "group p1", "group p0"]
    assert got.counts == {}


def test_gaps_and_repetitions_are_counted(scans):
    got = match(
        scans, "file,label", "a/00.png,ct", "a/00.png,ct", "gone.png,mri", "a/02.png,", "a/04.png,mri"
    )
    assert got.notes == [
        "rows that repeat another: 1",
        "rows that name no picture here: 1",
        "rows without a label: 1",
        "pictures or volumes without truth: 10",
    ]


def test_what_is_uncertain_is_not_judged_and_counted(scans):
    got = match(
        scans, "file,label", "a,ct", "a/00.png,U", "a/02.png,-1", "b/01.png,uncertain", "b/03.png,mri"
    )
    assert sorted(got.words.values()) == ["ct"] * 4 + ["mri"]  # the folder does not speak for the two
    assert got.counts["pictures or volumes whose label is uncertain, not judged"] == 3
    u = tasks.from_labels(["u", "mri"])
    assert match(scans, "file,label", "a/00.png,u", task=u).words == {0: "u"}  # a class of this name
    with pytest.raises(DataError, match="calls every picture uncertain"):
        match(scans, "file,label", "a/00.png,u")
    task = multilabel.from_labels(["effusion", "mass"])
    lines = ["a/00.png,u,0", "a/02.png,-1.0,", "a/04.png,,1", "gone.png,u,u", "a/06.png,,"]
    found = match(scans, "file,effusion,mass", *lines, task=task)
    assert found.said == {0: (-1, 0), 2: (-1, 1)}
    assert found.counts == {
        "findings called uncertain, not judged": 2,
        "rows that name no picture here": 1,
        "rows without a label": 1,
        "pictures or volumes whose label is uncertain, not judged": 1,
        "pictures or volumes without truth": 10,
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file,label", "a/00.png,CT", "a/02.png,pet", "a/04.png,pet"], "no class: 'CT' x1, 'pet' x2"),
        (["file,label", "a/00.png,ct", "a/00.png,mri"], "t.csv line 2 and t.csv line 3 say different things"),
        (["file,label", "x.png,ct"], "names any of 12 pictures, the first is 'x.png'"),
        (["file,finding", "a/00.png,ct"], "no column with the truth"),
    ],
)
def test_impossible_truth_is_refused(scans, lines, words):
    with pytest.raises(DataError, match=words):
        match(scans, *lines)


def test_a_file_of_a_volume_speaks_for_the_volume(tmp_path):
    import test_found

    for k in range(4):
        test_found.write_slice(tmp_path / f"{k}.dcm", k)
    assert match(tmp_path, "file,label", "0.dcm,ct", "3.dcm,ct").words == {0: "ct"}
    with pytest.raises(DataError, match="different things"):
        match(tmp_path, "file,label", "0.dcm,ct", "3.dcm,mri")


def test_findings_by_column_or_by_name(scans):
    task = multilabel.from_labels(["effusion", "mass"])
    columns = match(scans, "file,Effusion,mass", "a/00.png,1,0", "a/02.png,-1,1.0", "a/04.png,,", task=task)
    assert columns.said == {0: (1, 0), 1: (-1, 1)}
    assert columns.words == {0: "effusion", 1: "mass"}
    assert columns.counts["rows without a label"] == 1
    partly = match(scans, "file,effusion", "a/00.png,0", task=task)
    assert partly.said == {0: (0, -1)}
    names = match(scans, "file,label", "a/00.png,effusion; mass", "a/02.png,mass", "a/04.png,", task=task)
    assert names.said == {0: (1, 1), 1: (0, 1)}
    with pytest.raises(DataError, match="a finding is 'maybe'"):
        match(scans, "file,mass", "a/00.png,maybe", task=task)
    with pytest.raises(DataError, match="no class: 'nodule' x1"):
        match(scans, "file,label", "a/00.png,nodule", task=task)
    chest = multilabel.load("chest_findings")
    clear = match(scans, "file,label", "a/00.png,no finding", task=chest)
    assert clear.words == {0: "none"}
    with pytest.raises(DataError, match="has findings and says 'no finding'"):
        match(scans, "file,label", "a/00.png,no finding;edema", task=chest)


# ---- metrics


def run(model: Path, *words: object) -> int:
    return verb.run([*map(str, words), "--model", str(model)])


def test_metrics_are_those_of_sklearn(model, scans, tmp_path, capsys):
    sklearn = pytest.importorskip("sklearn.metrics")
    labels = ["ct", "mri", "mri", "ct"] * 3
    files = [p.relative_to(scans).as_posix() for p in sorted(scans.rglob("*.png"))]
    lines = [f"{f},{k},SOMEBODY{i // 3}" for i, (f, k) in enumerate(zip(files, labels, strict=True))]
    (tmp_path / "truth.csv").write_text(
        "\n".join(["file,label,patient", *lines[:-1], "gone.png,ct,SOMEBODY9"])
    )
    out = tmp_path / "p.csv"
    words = [scans, "--labels", "ct,mri", "--truth", tmp_path / "truth.csv", "--ci", "50", "--out", out]
    assert run(model, *words, "--report", tmp_path / "p.html") == 0

    table = rows(out)
    assert [r["label"] for r in table] == [*labels[:-1], ""]
    known = table[:-1]
    stored = json.loads((tmp_path / "p.metrics.json").read_text())
    positive = [float(r["score: mri"]) for r in known]
    truths, said = [r["label"] for r in known], [r["predicted"] for r in known]
    value = lambda k: stored["values"][k]["value"]
    assert value("accuracy") == pytest.approx(sklearn.accuracy_score(truths, said))
    assert value("balanced_accuracy") == pytest.approx(sklearn.balanced_accuracy_score(truths, said))
    assert value("auroc") == pytest.approx(sklearn.roc_auc_score([t == "mri" for t in truths], positive))
    assert stored["confusion"] == sklearn.confusion_matrix(truths, said, labels=["ct", "mri"]).tolist()
    assert (stored["n"], stored["subjects"]) == (11, 4)
    assert stored["truth"] == {"rows that name no picture here": 1, "pictures or volumes without truth": 1}
    printed = capsys.readouterr().out
    for text in (
        "truth   11 pictures",
        "rows that name no picture here: 1",
        "balanced_accuracy",
        "11 pictures of 4",
    ):
        assert text in printed
    page = (tmp_path / "p.html").read_text()
    assert "Confusion" in page
    assert "truth: " in page
    assert page.count("data:image/jpeg;base64,") == 12
    for text in [page, (tmp_path / "p.run.json").read_text(), out.read_text(), printed]:
        assert "SOMEBODY" not in text


def test_a_list_holds_its_truth(model, scans, tmp_path, capsys):
    files = sorted(scans.rglob("*.png"))
    lines = [f"{f.relative_to(scans).as_posix()},{'ct' if i % 2 else 'mri'}" for i, f in enumerate(files)]
    (scans / "list.csv").write_text("\n".join(["path,class", *lines, "gone.png,ct", lines[0]]))
    out = tmp_path / "p.csv"
    with pytest.raises(SomeInputsFailed, match="1 of 13 files failed"):
        run(model, scans / "list.csv", "--labels", "ct,mri", "--ci", 0, "--out", out)
    assert [r["label"] for r in rows(out)] == ["mri", "ct"] * 6
    assert rows(tmp_path / "p.errors.csv")[0]["file"].endswith("gone.png")
    stored = json.loads((tmp_path / "p.metrics.json").read_text())
    assert stored["n"] == stored["subjects"] == 12
    assert stored["truth"] == {"rows that repeat another": 1}
    assert "1 file named again, scored once" in capsys.readouterr().out


def test_one_class_is_said_and_no_number_is_made_up(model, scans, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("file,label\na,ct\n")
    words = [scans / "a", "--labels", "ct,mri", "--truth", tmp_path / "t.csv", "--out", tmp_path / "p.csv"]
    assert run(model, *[w if w != scans / "a" else scans for w in words], "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["metrics"]["values"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "only one class occurs",
    }


def test_old_metrics_do_not_stay(model, scans, tmp_path):
    (tmp_path / "t.csv").write_text("file,label\n.,ct\n")
    common = [scans, "--labels", "ct,mri", "--ci", 0, "--out", tmp_path / "p.csv"]
    run(model, *common, "--truth", tmp_path / "t.csv")
    assert (tmp_path / "p.metrics.json").exists()
    run(model, *common, "--force")
    assert not (tmp_path / "p.metrics.json").exists()


def test_truth_is_checked_before_the_model_is_loaded(scans, tmp_path):
    (tmp_path / "t.csv").write_text("file,label\na,nonsense\n")
    with pytest.raises(DataError, match="'nonsense' x1"):
        run(
            tmp_path / "no-model",
            scans,
            "--labels",
            "ct,mri",
            "--truth",
            tmp_path / "t.csv",
            "--out",
            tmp_path / "p.csv",
        )
    assert not (tmp_path / "p.csv").exists()


# ---- findings


def test_findings_have_scores_of_their_own_and_metrics(model, scans, tmp_path, capsys):
    sklearn = pytest.importorskip("sklearn.metrics")
    files = [p.relative_to(scans).as_posix() for p in sorted(scans.rglob("*.png"))]
    lines = [f"{f},{i % 2},{-1 if i < 3 else (i // 2) % 2}" for i, f in enumerate(files)]
    (tmp_path / "t.csv").write_text("\n".join(["file,effusion,normal", *lines]))
    out = tmp_path / "p.csv"
    words = [scans, "--labels", "effusion,normal", "--modality", "xray", "--multilabel", "--out", out]
    assert run(model, *words, "--truth", tmp_path / "t.csv", "--ci", 20, "--report", tmp_path / "p.html") == 0
    table = rows(out)
    p = np.array([[float(r["score: effusion"]), float(r["score: normal"])] for r in table])
    assert np.abs(p.sum(1) - 1).max() > 1e-3  # they do not exclude each other
    for r, (first, second) in zip(table, p, strict=True):
        assert r["predicted"] == "; ".join(
            k for k, v in (("effusion", first), ("normal", second)) if v >= 0.5
        )
    stored = json.loads((tmp_path / "p.metrics.json").read_text())
    assert stored["findings"]["normal"]["n"] == 9
    assert stored["findings"]["effusion"]["values"]["auroc"]["value"] == pytest.approx(
        sklearn.roc_auc_score([i % 2 for i in range(12)], p[:, 0]), abs=1e-4
    )
    page = (tmp_path / "p.html").read_text()
    for text in ("mean over findings", "2 findings that do not exclude each other", "ROC"):
        assert text in page
    assert "auroc" in capsys.readouterr().out
    record = json.loads((tmp_path / "p.run.json").read_text())
    assert record["settings"]["multilabel"] is True
    assert set(record["prompts"]["classes"]["effusion"]) == {"positive", "negative"}


def test_the_kind_of_prompts_must_be_the_one_asked_for(model, scans, tmp_path):
    common = [scans, "--out", tmp_path / "p.csv"]
    with pytest.raises(UsageError, match="is about findings"):
        run(model, *common, "--task", "chest_findings")
    with pytest.raises(UsageError, match="has no prompts for and against"):
        run(model, *common, "--task", "modality", "--multilabel")
