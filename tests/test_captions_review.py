"""Files of captions: templates, the page that reviews them, what decisions change, and the way into records."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from unimed_jax.captioning import checks, review
from unimed_jax.cli import captions as cli
from unimed_jax.cli import data as cli_data
from unimed_jax.data import label_captions, shards
from unimed_jax.data.label_captions import Label, LabelCaptions, Triplet
from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

TABLE = """modality,anatomy,finding,synonyms
X-ray,chest,pneumonia,airspace consolidation
X-ray,chest,pleural effusion,
CT,chest,normal,
Fundus,retina,diabetic retinopathy,
Histopathology,colon,adenocarcinoma,
MRI,knee,meniscal tear,
Ultrasound,thyroid,benign nodule,
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def made(table: Path) -> Path:
    """Template captions of the table, three a label."""
    out = table.with_name("captions.json")
    assert cli.run(["template", str(table), "--out", str(out), "-k", "3"]) == 0
    return out


def test_templates_are_marked_and_pass_every_rule(table, tmp_path, capsys):
    out = tmp_path / "c.json"
    assert cli.run(["template", str(table), "--out", str(out), "-k", "14"]) == 0
    assert "98 captions of 7 labels, kind template" in capsys.readouterr().out
    found = label_captions.read(out)
    assert found.generator["kind"] == "template"
    assert {c["kind"] for x in found.labels for c in x.captions} == {"template"}
    checker = checks.Checker([x.triplet for x in found.labels])
    assert [checker.take(c["text"], x.triplet) for x in found.labels for c in x.captions] == [None] * 98


def test_templates_that_do_not_suffice_are_reported(table, tmp_path):
    with pytest.raises(SomeInputsFailed, match="captions of 7 labels are missing"):
        cli.run(["template", str(table), "--out", str(tmp_path / "c.json"), "-k", "40"])
    rows = list(csv.DictReader((tmp_path / "c.json.errors.csv").open()))
    missing = {r["finding"]: int(r["missing"]) for r in rows}
    assert missing["pneumonia"] < missing["pleural effusion"]  # a synonym gives as many again
    labels = label_captions.read(tmp_path / "c.json").labels
    assert all(len(x.captions) + missing[x.triplet.finding] == 40 for x in labels)


def test_json_and_csv_say_the_same(made, tmp_path):
    found = label_captions.read(made)
    label_captions.write(tmp_path / "c.csv", found)
    again = label_captions.read(tmp_path / "c.csv")
    assert [x.triplet for x in again.labels] == [x.triplet for x in found.labels]
    assert [x.captions for x in again.labels] == [x.captions for x in found.labels]
    first = (tmp_path / "c.csv").read_bytes()
    label_captions.write(tmp_path / "c.csv", again)
    assert (tmp_path / "c.csv").read_bytes() == first


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.quotes: list[str] = []
        self._quoted = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "q":
            self._quoted = True
            self.quotes.append("")

    def handle_endtag(self, tag):
        self._quoted = self._quoted and tag != "q"

    def handle_data(self, data):
        if self._quoted:
            self.quotes[-1] += data


def hostile() -> LabelCaptions:
    evil = "<script>alert(1)</script> \" onclick='x' </q><img src=http://192.0.2.1> pneumonia"
    triplet = Triplet(modality="X-ray", anatomy="chest</h2><b>", finding="pneumonia")
    return LabelCaptions(labels=[Label(triplet=triplet, captions=[{"text": evil, "kind": "llm"}])])


def test_the_page_stands_alone_and_texts_stay_texts(made, tmp_path):
    cli.run(["review", str(made), "--out", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    found = label_captions.read(made)
    assert page.quotes == [c["text"] for x in found.labels for c in x.captions]
    assert not [t for t, a in page.tags if a.keys() & {"src", "href"}]
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    evil = Page(review.page(hostile()))
    assert evil.quotes == [hostile().labels[0].captions[0]["text"]]
    assert [t for t, _ in evil.tags].count("script") == 1
    assert not [t for t, _ in evil.tags if t in ("img", "b")]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the page")
def test_long_words_do_not_make_the_page_wider_than_a_phone(tmp_path):
    triplet = Triplet(modality="X-ray", anatomy="chest", finding="pneumonia" * 20, synonyms=("x" * 200,))
    label = Label(triplet=triplet, captions=[{"text": "A film of " + "pneumonia" * 20, "kind": "llm"}])
    (tmp_path / "page.html").write_text(review.page(LabelCaptions(labels=[label])))
    with Browser(tmp_path / "profile", width=420) as browser:
        browser.open((tmp_path / "page.html").as_uri())
        browser.wait("document.getElementById('count') && document.getElementById('count').textContent")
        assert browser.js("document.documentElement.scrollWidth") <= 420


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the page")
def test_the_page_in_a_browser_saves_what_was_clicked(made, tmp_path):
    cli.run(["review", str(made), "--out", str(tmp_path / "page.html")])
    found = label_captions.read(made)
    ids = [review.caption_id(x, c["text"]) for x in found.labels for c in x.captions]
    # What the page hands to the browser as a download, kept as text.
    listen = "URL.createObjectURL = blob => { blob.text().then(t => window.saved = t); return '#' }"
    press = "(id, what) => document.querySelector(`#${id} button[value=${what}]`).click()"
    with Browser(tmp_path / "profile") as browser:
        browser.open((tmp_path / "page.html").as_uri())
        browser.wait("document.getElementById('count') && document.getElementById('count').textContent")
        for name, what in ((ids[0], "accept"), (ids[1], "strike"), (ids[2], "strike"), (ids[2], "strike")):
            browser.js(f"({press})({json.dumps(name)}, {json.dumps(what)})")
        assert (
            browser.js("document.getElementById('count').textContent") == "1 accepted, 1 struck, 19 undecided"
        )
        assert (
            browser.js(f"getComputedStyle(document.querySelector('#{ids[1]} q')).textDecorationLine")
            == "line-through"
        )
        browser.shoot(tmp_path / "page.png")
        browser.open((tmp_path / "page.html").as_uri() + "?again")  # decisions outlive the tab
        browser.wait("location.search === '?again' && document.querySelectorAll('li.strike').length === 1")
        browser.js(listen + "; document.getElementById('save').click()")
        browser.wait("window.saved")
        (tmp_path / "d.json").write_text(browser.js("window.saved"))
        assert not [a for a in browser.asked if not a.startswith("file:")]
        assert not browser.said
    assert review.read_decisions(tmp_path / "d.json", found) == {ids[0]: "accept", ids[1]: "strike"}


def decide(captions: Path, decisions: dict[str, str]) -> Path:
    values = {
        "format": review.FORMAT,
        "version": review.VERSION,
        "captions_sha256": review.digest(label_captions.read(captions)),
        "decisions": decisions,
    }
    path = captions.with_name("decisions.json")
    path.write_text(json.dumps(values))
    return path


def test_struck_captions_go_and_the_file_says_so(made, tmp_path, capsys):
    found = label_captions.read(made)
    ids = [review.caption_id(found.labels[0], c["text"]) for c in found.labels[0].captions]
    decisions = decide(made, {ids[0]: "strike", ids[1]: "accept"})
    cli.run(["apply", str(made), str(decisions), "--out", str(tmp_path / "kept.json")])
    assert "20 captions stay (1 accepted, 1 struck, 19 undecided)" in capsys.readouterr().out
    kept = label_captions.read(tmp_path / "kept.json")
    assert kept.labels[0].captions == found.labels[0].captions[1:]
    assert kept.generator["review"]["struck"] == 1
    with pytest.raises(SomeInputsFailed, match="6 labels have no caption left"):
        cli.run(["apply", str(made), str(decisions), "--out", str(tmp_path / "few.json"), "--accepted-only"])
    assert [len(x.captions) for x in label_captions.read(tmp_path / "few.json").labels] == [
        1,
        0,
        0,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captions_sha256": "0" * 64}, "belongs to other captions"),
        ({"version": 9}, "holds no decisions"),
        ({"decisions": {"c0": "strike"}}, "'c0' is no caption"),
        ({"decisions": []}, "holds no decisions"),
    ],
)
def test_decisions_that_do_not_fit(made, change, said):
    path = decide(made, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        review.read_decisions(path, label_captions.read(made))


HEAD = '{"format": "unimed_jax.label_captions", "version": 1'
LABEL = '"modality": "CT", "anatomy": "a", "finding": "b"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "no file of captions"),
        (HEAD + "}", "labels is no list"),
        (HEAD + ', "labels": [{"modality": "CT"}]}', "label 0 has no anatomy"),
        (
            HEAD + f', "labels": [{{{LABEL}, "captions": [{{"text": "c", "kind": "x"}}]}}]}}',
            "kind that is none of",
        ),
        (
            HEAD + f', "labels": [{{{LABEL}, "captions": []}}, {{{LABEL}, "captions": []}}]}}',
            "has a label twice",
        ),
        (HEAD + ', "labels": [], "labels": []}', "the key 'labels' is there twice"),
        (
            HEAD + f', "labels": [{{{LABEL}, "captions": [{{"text": "\\ud800 a film", "kind": "llm"}}]}}]}}',
            "not UTF-8",
        ),
        (
            HEAD + f', "labels": [{{{LABEL}, "captions": [{{"text": "=cmd()", "kind": "llm"}}]}}]}}',
            "begins with '='",
        ),
    ],
)
def test_bad_files_of_captions(text, said, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=said):
        label_captions.read(tmp_path / "c.json")


def raw(folder: Path, rows: str) -> list[str]:
    """A folder of pictures and its table; the arguments that build records of it."""
    (folder / "raw").mkdir(exist_ok=True)
    for i in range(3):
        data = io.BytesIO()
        Image.new("L", (24, 16), 60 * i).save(data, "PNG")
        (folder / "raw" / f"{i}.png").write_bytes(data.getvalue())
    (folder / "table.csv").write_text(rows)
    return ["build", "folder", "--raw", str(folder / "raw"), "--captions", str(folder / "table.csv"),
            "--out", str(folder / "records"), "--shards", "1"]  # fmt: skip


def test_pictures_get_the_captions_of_their_labels(made, tmp_path):
    rows = "file,modality,anatomy,finding,caption\n0.png,X-ray,Chest,Pneumonia; pleural  effusion,\n"
    rows += "1.png,CT,chest,normal,Thin slices.\n2.png,CT,,,A calibration phantom.\n"
    command = raw(tmp_path, rows)
    assert cli_data.run([*command, "--set", f"label_captions={made}"]) == 0
    records = shards.Shards(tmp_path / "records" / "folder", "train")
    by_key = {e.key.rpartition("/")[2]: e for e in (records[i] for i in range(len(records)))}
    labels = label_captions.read(made).labels
    texts = lambda *numbers: [c["text"] for n in numbers for c in labels[n].captions]
    assert [c.text for c in by_key["0.png"].captions] == texts(0, 1)
    assert {c.kind for c in by_key["0.png"].captions} == {"template"}
    assert by_key["0.png"].labels == ("finding:pneumonia", "finding:pleural effusion")
    assert [c.text for c in by_key["1.png"].captions] == ["Thin slices.", *texts(2)]
    assert [c.kind for c in by_key["1.png"].captions] == ["original"] + ["template"] * 3
    assert [c.text for c in by_key["2.png"].captions] == ["A calibration phantom."]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("file,modality,anatomy,finding\n0.png,X-ray,chest,pneumonea\n", r"line 2: label .* has no captions\. Did"),
        ("file,modality,finding\n0.png,X-ray,pneumonia\n", "has no column anatomy"),
        ("file,modality,anatomy,finding,extra\n0.png,X-ray,chest,pneumonia,\n", "unknown column 'extra'"),
    ],
)  # fmt: skip
def test_labels_without_captions_are_never_guessed(made, tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        cli_data.run([*raw(tmp_path, rows), "--set", f"label_captions={made}"])


def test_label_columns_need_the_captions(tmp_path):
    with pytest.raises(DataError, match="label_captions=FILE"):
        cli_data.run(raw(tmp_path, "file,modality,anatomy,finding,caption\n0.png,CT,chest,normal,x\n"))


@pytest.mark.parametrize(
    "option", [["-k", "0"], ["--min-words", "9", "--max-words", "3"], ["--out", "x.txt"]]
)
def test_impossible_settings(table, option):
    with pytest.raises(UsageError):
        cli.run(["template", str(table), "--out", str(table.with_name("c.json")), *option])
