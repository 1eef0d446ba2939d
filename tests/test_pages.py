"""The pages that commands write, in a browser: narrow and wide, complete, silent, and with nothing asked for."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_model
from browser import CHROMIUM, Browser
from PIL import Image

from unimed_jax.cli import data, predict, report
from unimed_jax.cli import eval as evaluate
from unimed_jax.errors import SomeInputsFailed

pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
pytest.importorskip("matplotlib", reason='pip install "unimed-jax[report]"')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

WIDTHS = (1280, 420)
CLASSES = ["normal chest radiograph", "pneumonia", "pleural effusion"]
# What each page must show.
SHOWN = {
    "predictions": "h1, h2, dl, table, .tiles, .bar, .two img",
    "suite": "h1, h2, h3, table, table.matrix, .tiles, .plots svg, .shot img",
    "compared": "h1, h2, h3, table, table.matrix, .tiles, .plots svg, .shot img",
    "records": "h1, dl, figure img, figcaption",
    "overlap": "h1, dl, h2, figure img, figcaption",
}
# Every picture, those that load only when they are scrolled to, too, and everything folded open.
LOADED = """(async () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const lost = [];
  for (const i of document.images) { i.scrollIntoView(); await i.decode().catch(() => lost.push(i.alt)); }
  scrollTo(0, 0);
  return lost.concat([...document.images].filter(i => !i.naturalWidth && !lost.includes(i.alt)).map(i => i.alt));
})()"""
SCRIPTS = """[...document.querySelectorAll('*')].filter(e => e.tagName == 'SCRIPT'
  || [...e.attributes].some(a => a.name.startsWith('on'))).map(e => e.outerHTML.slice(0, 200))"""
# What ends right of the window, but for what a reader can scroll to.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
NAME = "a picture with a rather long name, as archives give them"


def pictures(root: Path) -> list[dict[str, str]]:
    """Eighteen pictures in folders that are named like their class; rows for lists of them."""
    rng, listed = np.random.default_rng(0), []
    for i in range(18):
        path = root / CLASSES[i % 3] / f"{NAME}_{i:032x}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        small.resize((210, 180), Image.Resampling.BICUBIC).save(path)
        listed.append({"file": f"{path.parent.name}/{path.name}", "label": CLASSES[i % 3]})
        listed[-1] |= {k: str(int(i % 3 == j or not i % 4)) for j, k in enumerate(CLASSES)}
    return listed


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory, compilation_cache) -> dict[str, Path]:
    """Every page, by name."""
    root = tmp_path_factory.mktemp("pages")
    made = {name: root / f"{name}.html" for name in SHOWN}
    models = [small_model.loaded(root / f"w{i}", seed=i, batch_size=8).save(root / f"m{i}") for i in (0, 1)]
    rows = pictures(root / "set")
    listed = table(root / "set" / "list.csv", rows)
    (root / "set" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")

    words = ["--list", listed, root / "set" / "cut.png", "--model", models[0], "--labels", ",".join(CLASSES)]
    words += ["--out", root / "p.csv", "--report", made["predictions"], "--saliency", "attention", "--ci", 50]
    with pytest.raises(SomeInputsFailed):
        predict.run([*map(str, words)])

    folders = {"name": "chest-radiographs", "modality": "X-ray", "classes": CLASSES}
    folders |= {"layout": {"kind": "folders", "folder": "."}}
    findings = {"name": "chest-findings", "modality": "X-ray", "classes": CLASSES, "multilabel": True}
    findings |= {"layout": {"kind": "csv", "file": "list.csv", "image": "file", "label": CLASSES}}
    (root / "suite.json").write_text(json.dumps({"name": "chest", "sets": [folders, findings]}))
    for i, model in enumerate(models):
        words = ["--suite", root / "suite.json", "--data-root", root / "set", "--model", model, "--ci", 50]
        evaluate.run([*map(str, words), "--out", str(root / f"r{i}"), *(["--report"] if i == 0 else [])])
    made["suite"] = root / "r0" / "report.html"
    report.run([str(root / "r0"), "--compare", str(root / "r1"), "--out", str(made["compared"])])

    records = [
        {"file": r["file"], "caption": f"Radiograph of the chest: {r['label']}. " * 4, "modality": "X-ray"}
        for r in rows
    ]
    words = ["build", "folder", "--raw", root / "set", "--captions", table(root / "captions.csv", records)]
    assert data.run([*map(str, words), "--out", str(root / "records")]) == 0
    data.run(["show", str(root / "records"), "-n", "8", "--html", str(made["records"])])
    shutil.copytree(root / "set" / CLASSES[0], root / "again")
    data.run(["overlap", str(root / "set" / CLASSES[0]), str(root / "again"), "--html", str(made["overlap"])])
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        found.call("Emulation.setScrollbarsHidden", hidden=True)  # as a phone's, which take no width
        yield found


def faults(browser: Browser, path: Path) -> list[str]:
    """What a page does that none may: asks for more than itself, runs scripts, overflows, or lacks pictures."""
    browser.asked.clear()
    browser.said.clear()
    address, found = path.as_uri(), []
    browser.open(address)
    browser.wait(f"document.readyState == 'complete' && location.href == {json.dumps(address)}")
    for width in WIDTHS:
        browser.resize(width, 900)
        found += [f"{width}: no picture: {lost}" for lost in browser.js(LOADED)]
        if (wide := browser.js("document.documentElement.scrollWidth")) > width:
            found.append(f"{width}: {wide} pixels wide")
        found += [f"{width}: outside: {element}" for element in browser.js(OUTSIDE)]
    found += [f"asked: {a}" for a in browser.asked if a != address and not a.startswith("data:")]
    found += [f"script: {element}" for element in browser.js(SCRIPTS)]
    return found + [f"said: {text}" for text in browser.said]


@pytest.mark.parametrize("name", SHOWN)
def test_a_page(browser, pages, name):
    assert faults(browser, pages[name]) == []
    for what in SHOWN[name].split(", "):
        assert browser.js(f"document.querySelectorAll({json.dumps(what)}).length"), what
    assert browser.js("document.title")
    assert browser.js("document.images.length") >= 6


def test_faults_are_found(browser, tmp_path):
    (tmp_path / "beside.css").write_text("p{color:red}")
    body = (
        "<div style='width:600px'>wide</div><section style='overflow:hidden'><p style='width:1500px'>cut</p></section>"
        "<img src='data:image/png;base64,AAAA'><link rel=stylesheet href=beside.css><b onclick='1'>b</b>"
    )
    (tmp_path / "page.html").write_text(f"<!doctype html><title>x</title>{body}<script>1</script>")
    found = faults(browser, tmp_path / "page.html")
    assert [f.split(": ")[:2] for f in found if f[0] in "14"] == [
        ["1280", "no picture"],
        ["1280", "outside"],
        ["420", "no picture"],
        ["420", "608 pixels wide"],
        ["420", "outside"],
        ["420", "outside"],
    ]
    assert [f for f in found if f.startswith("asked")] == [f"asked: {(tmp_path / 'beside.css').as_uri()}"]
    assert len([f for f in found if f.startswith("script")]) == 2
