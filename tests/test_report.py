"""The report: one page, complete, self-contained, and no text in it is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from unimed_jax.cli import report as verb
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import metrics, plots, report, results, tasks
from unimed_jax.evaluate.shown import thumbnail

pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
pytest.importorskip("matplotlib", reason='pip install "unimed-jax[report]"')
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags, attributes and text; complains about tags that do not match."""

    void = frozenset(["meta", "img", "br", "link", "path", "use", "rect"])

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def made(folder: Path, name: str = "organs", classes=("heart", "liver", EVIL)) -> results.Results:
    """Results of a model that does not exist, saved into a folder."""
    task = tasks.Task(
        name=name, classes={c: (f"{c} in a picture", f"the {c}") for c in classes}, description="Which organ"
    )
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    scores = rng.normal(size=(30, 3)) + 2 * np.eye(3)[labels]
    found = metrics.classification(
        scores, labels, list(classes), [f"p{i // 3}" for i in range(30)], resamples=100
    )
    example = {
        "key": "a/1",
        "label": classes[0],
        "scores": {classes[0]: 0.7, classes[1]: 0.2, classes[2]: 0.1},
        "prompts": [{"class": classes[0], "prompt": f"{EVIL} prompt", "cosine": 0.31}],
        "jpeg": thumbnail(np.zeros((8, 8, 3), np.uint8)),
        "simulated": False,
    }
    shown = [
        example | {"predicted": classes[0], "hit": True},
        example | {"predicted": classes[1], "hit": False},
    ]
    result = results.TaskResult(task=task, metrics=found, examples=shown, references={"1-NN pixels": found})
    whole = results.Results(
        model={"name": "model-x", "sha256": "ab" * 32, "dtype": "float32", "logit_scale": 10.0},
        data={"sources": {"set": {"split": "test", "records": 30}}, "evaluated": 30},
        code={"version": "0", "revision": "cd" * 20},
        settings={"resamples": 100, "seed": 0, "devices": 1},
        created="2026-01-02T03:04:05+00:00",
        tasks=[result],
    )
    whole.save(folder)
    return whole


@pytest.fixture
def run(tmp_path) -> Path:
    made(tmp_path / "eval" / "step_20")
    lines = [
        {"step": s, "loss": 5.0 / s, "lr": 1e-3, "logit_scale": 14.0 + s, "images_per_s": 100.0}
        for s in range(1, 21)
    ]
    lines += [{"step": s, "eval/organs": s / 40} for s in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 21, "lo')
    (tmp_path / "config.json").write_text(
        json.dumps({"name": "trial", "batch_size": 8, "optim": {"lr": 0.5, "freeze": ["a", "b"]}})
    )
    return tmp_path


def test_a_run_becomes_one_page(run):
    out = report.write(report.from_run(run), run / "r.html")
    page = Page(out.read_text())
    text = " ".join(" ".join(page.text).split())
    for word in (
        *(
            "trial: model-x",
            "Organs",
            "balanced accuracy",
            "AUROC",
            "1-NN pixels",
            "chance",
            "Confusion",
            "heart",
        ),
        *(
            "Training loss",
            "Zero-shot during training",
            "not a medical device",
            "abababababab",
            "cdcdcdcdcdcd",
        ),
        *("2026-01-02", "10 subjects", "a, b", "truth: heart", "the liver"),
    ):
        assert word in text, word
    assert page.tags.count("svg") == 1 + 5
    assert page.tags.count("img") == 2
    task = results.read(run / "eval/step_20")["tasks"][0]
    liver = task["auroc_per_class"]["liver"]
    assert f"{liver['value']:.3f} [{liver['low']:.3f}, {liver['high']:.3f}]" in text
    assert "recall AUROC" in text
    values = task["values"]
    for name in ("balanced_accuracy", "average_precision", "kappa", "f1"):
        assert f"{values[name]['value']:.3f} [{values[name]['low']:.3f}, {values[name]['high']:.3f}]" in text
    assert "the scores are no probabilities" in text
    assert "ECE (lower is better)" in text


def test_delong_stands_below_the_bootstrap(tmp_path):
    task = tasks.Task(name="two", classes={"a": ("x",), "b": ("y",)}, metric="auroc")
    labels = np.arange(40) % 2
    scores = np.random.default_rng(1).normal(size=(40, 2)) + np.eye(2)[labels]
    found = metrics.classification(scores, labels, ["a", "b"], resamples=50)
    whole = made(tmp_path / "other")
    whole.tasks = [results.TaskResult(task=task, metrics=found)]
    whole.save(tmp_path / "two")
    assert found.delong is not None
    text = " ".join(" ".join(Page(report.render(report.from_run(tmp_path / "two"))).text).split())
    shown = f"{found.delong.value:.3f} [{found.delong.low:.3f}, {found.delong.high:.3f}]"
    assert f"AUROC, DeLong's interval {shown}" in text
    assert f"- two: AUROC by DeLong {shown}" in (tmp_path / "two" / "results.md").read_text()
    assert ",auroc_delong," in (tmp_path / "two" / "results.csv").read_text()
    # results of a version that knew three metrics are still shown
    stored = results.read(tmp_path / "two")
    t = stored["tasks"][0]
    t["values"] = {k: t["values"][k] for k in metrics.METRICS}
    del t["chances"], t["auroc_delong"]
    (tmp_path / "two" / "results.json").write_text(json.dumps(stored))
    assert "AUROC" in report.render(report.from_run(tmp_path / "two"))


def test_nothing_is_loaded_from_elsewhere(run):
    page = Page(report.render(report.from_run(run)))
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), value
    assert "@import" not in report.render(report.from_run(run))
    assert not {"script", "iframe", "object", "link"} & set(page.tags)


def test_no_text_becomes_markup(run):
    text = report.render(report.from_run(run))
    assert EVIL not in text
    assert "&lt;script&gt;" in text


def test_the_page_follows_the_theme_and_the_screen(run):
    text = report.render(report.from_run(run))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    svg = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert svg
    assert all("var(--ink)" in s and "#010203" not in s for s in svg)
    assert all(
        re.search(r"#(?!ffffff|000000)[0-9a-f]{6}\b", s) is None for s in svg
    )  # every colour is the page's


def test_the_same_input_gives_the_same_page(run):
    assert report.render(report.from_run(run)) == report.render(report.from_run(run))


def test_a_results_folder_alone_and_a_run_without_results(run, tmp_path):
    assert report.from_run(run / "eval" / "step_20")["curves"] == []
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "nan"}\n{"step": 3, "loss": 1.0}\n'
    )
    page = report.from_run(bare)
    assert page["tasks"] == []
    assert [title for title, _ in page["curves"]] == ["Training loss"]
    Page(report.render(page))


def test_undefined_values_are_shown_as_such(tmp_path):
    task = tasks.Task(name="one", classes={"a": ("x",), "b": ("y",)})
    found = metrics.classification(np.eye(2)[[0, 0]], np.zeros(2, int), ["a", "b"], resamples=10)
    whole = made(tmp_path / "other")
    whole.tasks = [results.TaskResult(task=task, metrics=found)]
    whole.save(tmp_path / "one")
    text = " ".join(Page(report.render(report.from_run(tmp_path / "one"))).text)
    assert "only one class occurs" in text
    assert "no records of: b" in text
    assert "nan" not in text.lower().split()


def test_long_curves_are_thinned_to_means():
    lines = [{"step": s, "loss": float(s)} for s in range(1, 5001)]
    steps, values = plots.series(lines, "loss")["loss"]
    assert len(steps) == len(values) <= plots.MAX_POINTS
    assert steps == values
    assert np.mean(values[:-1]) == pytest.approx(np.mean(steps[:-1]))
    assert plots.series(lines, "los") == {}


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        report.from_run(tmp_path / "none")
    with pytest.raises(DataError, match=r"neither results\.json nor metrics\.jsonl"):
        report.from_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        report.from_run(tmp_path)


def test_a_missing_extra_names_the_pip_line(run, monkeypatch):
    import sys

    page = report.from_run(run)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError) as e:
        report.render(page)
    assert "unimed-jax[report]" in e.value.remedy
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="matplotlib"):
        report.from_run(run)


def test_the_verb_writes_once(run, capsys):
    assert verb.run([str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists"):
        verb.run([str(run)])
    assert verb.run([str(run), "--out", str(run / "deep" / "r.html")]) == 0
    assert verb.run([str(run), "--force"]) == 0
