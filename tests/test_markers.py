"""data/markers.py: captions that UniMed's tars join in one text come apart, and only those."""

from __future__ import annotations

import collections
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from unimed_jax import config
from unimed_jax.cli import data as cli_data
from unimed_jax.data import captions, markers, record, shards, validate, verify
from unimed_jax.data.export import export
from unimed_jax.data.record import Caption, Example
from unimed_jax.data.validate import Reject, clean_captions

BY_TEXT = {m.text: m for m in markers.MARKERS}


def join(texts, marker: str, report: str | None = None) -> str:
    """As the writers of the reference do: outer periods off (RadImageNet: not), a period, the marker.

    With a report (MIMIC-CXR) a second marker follows, and the report or "noreportpresent".
    """
    keep = marker == "_radimagenet_"
    joined = "".join((t if keep else t.strip(".")) + "." + marker for t in texts)
    return joined if report is None else joined + marker + report


def read_like_the_reference(text: str, marker: str, rng) -> str:
    """The caption choice of the original loader for MIMIC-CXR and for the sources of ten captions."""
    parts = text.split(marker)
    if marker == "_mimiccxr_" and parts[-1] != "noreportpresent":
        return parts[-1]
    return parts[:10][rng.integers(len(parts[:10]))]


def sentences(k: int) -> list[str]:
    return [f"Sentence {i} about a heart." for i in range(k)]


@pytest.mark.parametrize("marker", BY_TEXT)
@pytest.mark.parametrize("k", range(1, 12))
@pytest.mark.parametrize("named", [True, False])
def test_split_is_the_inverse_of_join(marker, k, named):
    known = BY_TEXT[marker]
    source = known.source if named else ""
    want = sentences(k)
    for report in ["FINDINGS: a rib. No effusion", "noreportpresent"] if known.report else [None]:
        found = markers.split(join(want, marker, report), source)
        kinds = [*known.head, *[known.kind] * k][:k]
        if marker == "_all_retina_merged_" and k == 11:
            kinds[10] = "template"
        expected = list(zip(want, kinds, strict=True))
        if report and report != "noreportpresent":
            expected.append((report, "report"))
        assert [(c.text, c.kind) for c in found] == expected
        assert {c.kind for c in found} <= set(config.CAPTION_KINDS)
        assert markers.dropped(join(want, marker, report), source) == (report == "noreportpresent")


def test_the_table_covers_the_sources_of_unimed():
    named = [m.source for m in markers.MARKERS if m.source]
    assert set(named) <= set(config.UNIMED_SOURCES)
    assert len(set(named)) == len(named) == 6
    assert [m.text for m in markers.MARKERS].index("_dr_") < [m.text for m in markers.MARKERS].index(
        "_mimiccxr_"
    )


@pytest.mark.parametrize(
    ("marker", "source"),
    [("_chexpert_", "chexpert"), ("_mimiccxr_", "mimic_cxr"), ("_openi_", "openi"), ("_dr_", "merged")],
)
def test_no_draw_is_ever_empty(marker, source):
    """The case of the original: 39.9 % of the draws say nothing at 3 captions, 10.1 % at 9. Here: none of 10^5."""
    rng, policy, draws = np.random.default_rng(0), captions.default_policy(source), 0
    silent: collections.Counter[int] = collections.Counter()
    for k in range(1, 11):
        for report in ["noreportpresent", "FINDINGS: a rib."] if marker == "_mimiccxr_" else [None]:
            text = join(sentences(k), marker, report)
            silent[k] += sum(
                markers.is_placeholder(read_like_the_reference(text, marker, rng)) for _ in range(500)
            )
            stored = clean_captions([Caption(text=text)], source=source)
            assert len(stored) == k + (report == "FINDINGS: a rib.")
            n = 1300 if report else 2600
            drawn = collections.Counter(stored[captions.draw(stored, policy, rng)].text for _ in range(n))
            draws += n
            assert not any(markers.is_placeholder(t) or marker in t for t in drawn)
            expected = (
                ["FINDINGS: a rib."]
                if report == "FINDINGS: a rib."
                else sentences(1)
                if policy == "first"
                else sentences(k)
            )
            assert sorted(drawn) == sorted(expected)
    assert draws == 26_000  # times four sources: more than 10^5
    assert silent[3] > 50  # the defect that is mended here, shown on the original's rule
    assert marker != "_mimiccxr_" or silent[10] == 0


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        # RadImageNet keeps a caption's own period: ".."
        ("A liver.._radimagenet_A cyst._radimagenet_", "radimagenet", ["A liver.", "A cyst."]),
        # what stands for nothing, in every place
        ("nan._chexpert_A heart._chexpert_._chexpert_", "chexpert", ["A heart."]),
        ("NaN", "", []),
        ("._mimiccxr__mimiccxr_noreportpresent", "mimic_cxr", []),
        ("_mimiccxr_A report without captions", "mimic_cxr", ["A report without captions"]),
        ("A heart._mimiccxr__mimiccxr_nan", "mimic_cxr", ["A heart."]),
        ("A heart._mimiccxr_B._mimiccxr_the report", "mimic_cxr", ["A heart.", "B.", "the report"]),
        ("A fundus._medicat_nothingpresent._medicat_", "", ["A fundus."]),
        # white space around markers, as a table may add
        (" A heart. _chexpert_ An eye. _chexpert_\n", "chexpert", ["A heart.", "An eye."]),
        # a source's own marker always cuts; another's never does
        ("A heart_chexpert_an eye", "chexpert", ["A heart", "an eye"]),
        ("A file._dr_1 of._openi_ two", "chexpert", ["A file._dr_1 of._openi_ two"]),
        # sources with one free caption are never cut
        ("From grade._dr_3", "pmc_clip", ["From grade._dr_3"]),
        ("The set _chexpert_.", "quilt", ["The set _chexpert_."]),
        # unknown sources: only where a joined text has its marker
        ("The file eye_dr_3.png shows a disc", "mine", ["The file eye_dr_3.png shows a disc"]),
        ("Fig 1 of_openi_set. A heart", "", ["Fig 1 of_openi_set. A heart"]),
        ("eye_dr_3 has oedema._dr_No oedema._dr_", "mine", ["eye_dr_3 has oedema.", "No oedema."]),
        ("A heart._chexpert_An eye._dr_A lid._dr_._chexpert_", "mine", ["A heart.", "An eye.", "A lid."]),
        # and everything else is left alone
        ("an_ordinary_ caption...", "", ["an_ordinary_ caption..."]),
    ],
)  # fmt: skip
def test_markers_and_words(text, source, expected):
    assert [c.text for c in markers.split(text, source)] == expected


def test_what_is_split_holds_no_marker_any_more():
    """Random joins of joins, in random sources: one pass is enough, and no word is lost."""
    rng = np.random.default_rng(1)
    names = list(BY_TEXT)
    for _ in range(2000):
        words = [f"w{i}{rng.choice(['', '.', '..', ' .'])}" for i in range(rng.integers(1, 9))]
        text = "".join(w + rng.choice([".", "", " "]) + rng.choice([*names, "", "_"]) for w in words)
        source = str(rng.choice(["", "mine", "chexpert", "mimic_cxr", "pmc_clip"]))
        found = markers.split(text, source)
        assert not any(markers.find(c.text, source) for c in found)
        assert "".join(c.text for c in found).count("w") == len(words)


def test_rejects_look_at_the_parts_not_at_the_joined_text():
    long = join(["A heart " * 300] * 10, "_chexpert_")  # 24,000 characters in all
    assert len(clean_captions([Caption(text=long)], source="chexpert")) == 10
    with pytest.raises(Reject, match="caption_empty"):
        clean_captions([Caption(text="nan._chexpert_._chexpert_")], source="chexpert")
    with pytest.raises(Reject, match="caption_control"):
        clean_captions([Caption(text="a\a._dr_b._dr_")])


@dataclasses.dataclass
class Old:
    """A source whose captions come out of UniMed's tars."""

    texts: tuple[str, ...]
    name: str = "mimic_cxr"
    licence: str = ""
    description: str = ""

    def items(self):
        return [shards.Item(f"{i}", "train") for i in range(len(self.texts))]

    def example(self, item):
        out = io.BytesIO()
        Image.new("L", (8, 8 + int(item.key))).save(out, "PNG")
        text = self.texts[int(item.key)]
        return Example(key=item.key, image=out.getvalue(), captions=(Caption(text=text),))


def test_an_export_takes_captions_apart_and_counts_them(tmp_path, monkeypatch):
    texts = (
        join(sentences(3), "_mimiccxr_", "noreportpresent"),
        join(sentences(2), "_mimiccxr_", "The report."),
        "One plain caption",
    )
    manifest = export(Old(texts), tmp_path / "out")
    assert manifest.counts["train"] == {
        "records": 3, "modality unknown": 3, "format png": 3, "captions": 7, "captions llm": 5,
        "captions report": 1, "captions original": 1, "joined captions": 2, "placeholder captions": 1,
    }  # fmt: skip
    stored = {e.key: e.captions for e in shards.Shards(tmp_path / "out" / "mimic_cxr", "train")}
    assert stored["mimic_cxr/1"][-1] == Caption(text="The report.", kind="report")
    assert "joined captions 2, placeholder captions 1" in (
        tmp_path / "out" / "mimic_cxr" / "1.0.0" / "README.md"
    ).read_text(encoding="utf-8")
    assert verify.check(tmp_path / "out").ok
    # Records of an export that did not know the markers are found.
    monkeypatch.setattr(validate, "clean_captions", lambda captions, *_, **__: tuple(captions))
    export(Old(texts), tmp_path / "older")
    monkeypatch.undo()
    problems = verify.check(tmp_path / "older").problems
    assert len(problems) == 2
    assert all("joined in one by _mimiccxr_" in p for p in problems)


def test_the_command_says_how_many(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.new("L", (8, 8)).save(raw / "a.png")
    row = {"file": "a.png", "caption": join(sentences(3), "_chexpert_"), "caption2": "nan"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    flags = [f"--raw={raw}", f"--captions={tmp_path / 't.jsonl'}", f"--out={tmp_path / 'out'}"]
    assert cli_data.run(["build", "folder", *flags, "--name=old"]) == 0
    assert "joined captions: 1; placeholder captions: 1" in capsys.readouterr().out
    blob = shards.Shards(tmp_path / "out" / "old", "train").raw(0)
    assert [c.text for c in record.decode(blob).captions] == sentences(3)


@pytest.mark.parametrize("piece", ["a_dr_", "a._dr_", "_dr_", " _chexpert_. ", "a_mimiccxr_"])
def test_long_texts_cost_time_in_proportion(piece):
    """A quadratic rule took over a minute for four megabytes; a thousandfold length takes no millionfold time."""
    import time

    def seconds(n: int) -> float:
        text = piece * (n // len(piece))
        begin = time.process_time()
        markers.find(text)
        markers.split(text)
        return time.process_time() - begin

    short = min(seconds(20_000) for _ in range(3))
    assert seconds(2_000_000) < 100 * 20 * max(short, 0.001)
