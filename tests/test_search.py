"""The verb search: exact neighbours, ties, slabs, refusals, and its outputs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_model
from PIL import Image

from unimed_jax import config, infer, parallel
from unimed_jax.cli import embed as embed_verb
from unimed_jax.cli import search as verb
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import embedding_table, search


def vectors(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def index(path: Path, z: np.ndarray, dtype: str = "float16", *, sha: str = "abc", prefix: str = "r") -> Path:
    facts = embedding_table.Facts(
        content="image", dim=z.shape[1], dtype=dtype, model={"name": "m", "sha256": sha, "dtype": "float32"}
    )
    rows = [{"id": f"{prefix}{i}", "modality": "CT"} for i in range(len(z))]
    with embedding_table.Writer(path, facts) as f:
        f.write(embedding_table.table(facts, rows, z))
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("slab", [7, 64, 1000])
def test_equals_a_sort_of_all_scores(dtype, slab):
    z, q = vectors(300).astype(dtype), vectors(5, seed=1)
    scores, rows = search.top_k(q, (z[i : i + 50] for i in range(0, 300, 50)), 11, slab=slab)
    every = q.astype(np.float64) @ z.T.astype(np.float64)
    expected = np.argsort(-every, axis=1, kind="stable")[:, :11]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(every, expected, 1), atol=1e-6)


def test_rows_may_stay_on_the_device(tmp_path):
    z, q = vectors(100).astype(np.float16), vectors(2, seed=1)
    held = search.on_device(embedding_table.Index(index(tmp_path / "e.parquet", z)), slab=30)
    assert [len(h) for h in held] == [25, 25, 25, 25]
    held = search.on_device(embedding_table.Index(tmp_path / "e.parquet"), slab=15)
    assert [len(h) for h in held] == [15] * 7
    for a, b in zip(search.top_k(q, held, 200, rows=100), search.top_k(q, [z], 200), strict=True):
        assert a.shape == (2, 100)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_float16_keeps_cosines_within_its_rounding():
    z, q = vectors(2000, 512), vectors(3, 512, seed=1)
    exact, _ = search.top_k(q, [z], 20)
    stored, _ = search.top_k(q, [z.astype(np.float16)], 20)
    assert 0 < np.abs(exact - stored).max() < 2**-11


def test_of_equal_rows_the_first_wins_within_and_across_slabs():
    z = np.zeros((100, 8), np.float32)
    z[:, 1] = 1
    z[[13, 14, 55, 99], :2] = [[1, 0]]
    for slab in (4, 50, 100):
        _, rows = search.top_k(z[13:14], [z], 6, slab=slab)
        assert rows.tolist() == [[13, 14, 55, 99, 0, 1]]


def test_more_queries_than_one_block_and_fewer_rows_than_k():
    z = vectors(40)
    scores, rows = search.top_k(np.tile(z, (8, 1)), [z], 50)
    assert rows.shape == scores.shape == (320, 40)
    assert rows[:, 0].tolist() == list(range(40)) * 8
    assert all(sorted(line) == list(range(40)) for line in rows.tolist())


def test_rows_that_are_not_finite_come_last():
    z = vectors(10)
    z[3] = np.nan
    scores, rows = search.top_k(vectors(1, seed=2), [z], 10)
    assert 3 not in rows[0, :9]
    assert scores[0, -1] == -np.inf


def test_one_compilation_for_all_slabs():
    before = search._step._cache_size()
    search.top_k(vectors(2, 24), [vectors(1000, 24)], 5, slab=64)
    assert search._step._cache_size() == before + 1


def test_rows_shared_over_devices():
    mesh = parallel.make_mesh(config.Mesh(), jax.devices())
    z, q = vectors(301), vectors(4, seed=1)
    a = search.top_k(q, [z], 9, slab=64)
    b = search.top_k(q, [z], 9, slab=64, mesh=mesh)
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)


def test_several_files_are_one_index_read_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_table, "GROUP", 10)
    z = vectors(75).astype(np.float16)
    index(tmp_path / "e-00000-of-00002.parquet", z[:33])
    index(tmp_path / "e-00001-of-00002.parquet", z[33:], prefix="s")
    for place in (tmp_path, tmp_path / "e.parquet", tmp_path / "*.parquet"):
        found = embedding_table.Index(place)
        assert len(found) == 75
        slabs = list(found.slabs(20))
        assert [len(s) for s in slabs] == [20, 20, 20, 15]
        np.testing.assert_array_equal(np.concatenate(slabs), z)
    assert [r["id"] for r in found.rows([40, 2, 33, 2])] == ["s7", "r2", "s0", "r2"]
    assert found.find("s7") == 40
    np.testing.assert_array_equal(found.vector(40), z[40].astype(np.float32))
    hits = search.search(found, found.vector(40)[None], 3)[0]
    assert (hits[0]["id"], hits[0]["rank"], hits[0]["row"]) == ("s7", 1, 40)
    index(tmp_path / "other.parquet", z, sha="def")
    with pytest.raises(DataError, match="different models"):
        embedding_table.Index(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and a folder with pictures and their index; names are relative to it."""
    folder = tmp_path_factory.mktemp("search")
    model = small_model.loaded(folder).save(folder / "m")
    (folder / "in").mkdir()
    for i in range(12):
        Image.fromarray(small_model.pictures(1, size=40, seed=i)[0]).save(folder / "in" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        embed_verb.run(["in", "--model", str(model), "--out", "e.parquet"])
    return model, folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made[1])
    return made[0]


def hits(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out)["hits"]


def test_a_picture_finds_itself(here, capsys):
    assert verb.run(["--index", "e.parquet", "--image", "in/7.png", "--model", str(here), "--json"]) == 0
    found = hits(capsys)
    assert found[0]["file"] == "in/7.png"
    assert found[0]["score"] == pytest.approx(1, abs=1e-3)
    assert len(found) == 10


def test_text_ranks_as_the_model_does(here, capsys):
    verb.run(["--index", "e.parquet", "--text", "a chest x-ray", "--model", str(here), "-k", "12", "--json"])
    loaded = infer.load(here)
    expected = (
        loaded.encode_image([f"in/{i}.png" for i in range(12)]) @ loaded.encode_text(["a chest x-ray"]).T
    )[:, 0]
    found = {h["file"]: h["score"] for h in hits(capsys)}
    assert found == pytest.approx({f"in/{i}.png": s for i, s in enumerate(expected.tolist())}, abs=6e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_more_hits_than_rows_take_no_memory(here, capsys):
    verb.run(["--index", "e.parquet", "--like", "in/3.png", "-k", str(10**12), "--json"])
    assert len(hits(capsys)) == 11


def test_like_needs_no_model_and_leaves_itself_out(here, capsys):
    verb.run(["--index", "e.parquet", "--like", "in/3.png", "-k", "11", "--json"])
    found = hits(capsys)
    assert len(found) == 11
    assert "in/3.png" not in {h["id"] for h in found}
    assert [h["rank"] for h in found] == list(range(1, 12))
    with pytest.raises(UsageError, match="no row with the id"):
        verb.run(["--index", "e.parquet", "--like", "in/99.png"])


def answers(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out)["queries"]


def test_several_queries_are_one_pass_and_equal_those_alone(here, capsys, monkeypatch, tmp_path):
    passes, real = [], search.top_k
    monkeypatch.setattr(search, "top_k", lambda q, *a, **o: passes.append(len(q)) or real(q, *a, **o))
    texts = ["a chest x-ray", "axial ct slice", "retinal fundus"]
    common = ["--index", "e.parquet", "--model", str(here), "-k", "4", "--json"]
    verb.run([*common, *(x for t in texts for x in ("--text", t))])
    together = answers(capsys)
    assert passes == [3]
    assert [a["query"] for a in together] == [{"text": t} for t in texts]
    for t, a in zip(texts, together, strict=True):
        verb.run([*common, "--text", t])
        alone = hits(capsys)
        assert [h["id"] for h in a["hits"]] == [h["id"] for h in alone]
        assert [h["score"] for h in a["hits"]] == pytest.approx([h["score"] for h in alone], abs=1e-6)
    verb.run([*common, "--image", "in/1.png", "in/2.png", "--image", "in/9.png"])
    assert [a["hits"][0]["file"] for a in answers(capsys)] == ["in/1.png", "in/2.png", "in/9.png"]
    verb.run(["--index", "e.parquet", "--like", "in/3.png", "--like", "in/4.png", "-k", "11", "--json"])
    for own, a in zip(("in/3.png", "in/4.png"), answers(capsys), strict=True):
        assert len(a["hits"]) == 11
        assert own not in {h["id"] for h in a["hits"]}


def test_a_list_of_queries_mixes_kinds_and_its_outputs_name_them(here, capsys, tmp_path):
    table, out, page = tmp_path / "q.csv", tmp_path / "h.csv", tmp_path / "h.html"
    Image.open("in/7.png").save(tmp_path / "mine.png")
    table.write_text('note,like,text,image\nx,in/3.png,,\ny,,"=a chest, x-ray",\nz,,,mine.png\n')
    common = ["--index", "e.parquet", "--model", str(here), "-k", "3", "--queries", str(table)]
    verb.run([*common, "--out", str(out), "--html", str(page)])
    printed = capsys.readouterr().out
    assert printed.startswith("like: in/3.png\nrank  score")
    with out.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["kind"], r["query"], r["rank"]) for r in rows[::3]] == [
        ("like", "in/3.png", "1"),
        ("text", "'=a chest, x-ray", "1"),
        ("image", "mine.png", "1"),
    ]
    assert rows[6]["file"] == "in/7.png"
    text = page.read_text()
    assert text.count("<h2>") == 3
    assert text.count("data:image/jpeg;base64,") == 9
    with pytest.raises(UsageError, match=r"q\.csv"):
        verb.run([*common, "--out", str(table), "--force"])
    table.write_text("text\na chest x-ray\n")
    verb.run([*common, "--json"])
    assert len(answers(capsys)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name\nx\n", "no column text, image, like"),
        ("text\n", "has no queries"),
        ("text,like\na,\nb,c\n", "line 3 has text and like"),
        ("note,text\nx,\n", "line 2 has no query"),
        ("image\nnone.png\n", "none.png"),
        ("like\nin/99.png\n", "no row with the id"),
    ],
)
def test_lists_that_hold_no_queries_are_refused(here, tmp_path, content, words):
    table = tmp_path / "q.csv"
    table.write_text(content)
    with pytest.raises((DataError, UsageError)) as e:
        verb.run(["--index", "e.parquet", "--model", str(here), "--queries", str(table)])
    assert words in e.value.line()
    assert "\n" not in e.value.line()


def test_rows_are_shared_over_all_devices_of_the_machine(here, capsys, monkeypatch):
    seen, real = [], search.top_k

    def spy(*args, mesh, **options):
        seen.append(mesh.size)
        return real(*args, mesh=mesh, **options)

    monkeypatch.setattr(search, "top_k", spy)
    verb.run(["--index", "e.parquet", "--like", "in/3.png", "-k", "3", "--json"])
    assert seen == [len(jax.local_devices())]
    assert len(hits(capsys)) == 3


def test_outputs(here, tmp_path, capsys):
    Path("in/5.png").rename("in/5.gone")
    try:
        out, page = tmp_path / "o" / "h.csv", tmp_path / "o" / "h.html"
        verb.run(
            [
                *("--index", "e.parquet", "--text", "<b>a", "--model", str(here), "-k", "12"),
                *("--out", str(out), "--html", str(page)),
            ]
        )
    finally:
        Path("in/5.gone").rename("in/5.png")
    with out.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["rank"] for r in rows] == [str(i) for i in range(1, 13)]
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 11
    assert text.count("no picture here") == 1
    assert "&lt;b&gt;a" in text
    assert "<b>a" not in text
    assert 'src="http' not in text
    printed = capsys.readouterr().out
    assert printed.startswith("rank  score")
    assert "not a medical device" in printed
    with pytest.raises(UsageError, match="exists"):
        verb.run(["--index", "e.parquet", "--like", "in/3.png", "--out", str(out)])


def test_the_picture_of_a_frame_is_that_frame(here, tmp_path):
    test_medical = pytest.importorskip("test_medical")
    pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
    from unimed_jax.data import medical
    from unimed_jax.evaluate import gallery

    movie = test_medical.sample("examples_ybr_color.dcm")
    shown = verb._thumbnail({"file": str(movie), "frame": 20, "key": ""}, {"window": "", "slices": "all"}, {})
    frames = medical.read(movie, slices=medical.Slices.parse("every:20"))
    assert shown == gallery.thumbnail(frames[1].data) != gallery.thumbnail(frames[0].data)


def test_a_page_about_records_shows_them(here, tmp_path):
    pytest.importorskip("array_record")
    from unimed_jax.data import export
    from unimed_jax.data.phantom import Phantom

    root = export.export(Phantom(n=80, size=40), tmp_path / "records") and tmp_path / "records"
    e = str(tmp_path / "r.parquet")
    embed_verb.run(["--data", str(root), "--split", "test", "--model", str(here), "--out", e])
    first = embedding_table.Index(e).rows([0])[0]
    for flags, pictures in (([], 0), (["--data", str(root)], 4)):
        page = tmp_path / f"{pictures}.html"
        verb.run(["--index", e, "--like", first["key"], "-k", "4", "--html", str(page), *flags])
        assert page.read_text().count("data:image/jpeg;base64,") == pictures
    with pytest.raises(UsageError, match="--data is for --html"):
        verb.run(["--index", e, "--like", first["key"], "--data", str(root)])


def test_another_model_is_refused_in_one_line(here, tmp_path):
    other = small_model.loaded(tmp_path, seed=1).save(tmp_path / "other")
    with pytest.raises(DataError, match="the index is of the model tiny") as e:
        verb.run(["--index", "e.parquet", "--text", "a", "--model", str(other)])
    assert "\n" not in e.value.line()
    assert e.value.exit_code == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--text", "a"], "need --model"),
        (["--like", "a", "-k", "0"], "at least 1"),
        (["--like", "a", "--image", "b"], "not allowed"),
        (["--like", "a", "--out", ".", "--force"], "is a folder"),
        ([], "required"),
    ],
)
def test_wrong_requests_are_refused(here, args, words):
    with pytest.raises(UsageError) as e:
        verb.run(["--index", "e.parquet", *args])
    assert words in e.value.line()


def test_no_index_is_refused(here):
    with pytest.raises(UsageError, match="no index"):
        verb.run(["--index", "nowhere.parquet", "--like", "a"])
    with pytest.raises(UsageError, match="--text is empty"):
        verb.run(["--index", "e.parquet", "--text", " ", "--model", str(here)])
