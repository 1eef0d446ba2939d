"""The verb predict over two processes of one job: the same bytes as from one, and nothing half written."""

from __future__ import annotations

import csv
import json
import sys
import textwrap
from pathlib import Path

import job
import pytest
import small_model
from PIL import Image

from unimed_jax.cli import predict as verb
from unimed_jax.errors import SomeInputsFailed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, 40 pictures, one bad file in each half of them, and the truth."""
    folder = tmp_path_factory.mktemp("job")
    small_model.loaded(folder).save(folder / "m")
    (folder / "in").mkdir()
    for i in range(40):
        Image.fromarray(small_model.pictures(1, size=40, seed=i)[0]).save(folder / "in" / f"{i:02d}.png")
    for name in ("05bad.png", "35bad.png"):
        (folder / "in" / name).write_text("no picture")
    truth = [f"in/{i:02d}.png,{'ct' if i % 3 else 'mri'},p{i // 2}" for i in range(40)]
    (folder / "truth.csv").write_text("\n".join(["file,label,patient", *truth]) + "\n")
    (folder / "findings.csv").write_text(
        "\n".join(["file,red,green", *(f"in/{i:02d}.png,{i % 2},{i % 3 // 2}" for i in range(40))]) + "\n"
    )
    prompts = {k: {"positive": [f"{k} picture"], "negative": ["normal picture"]} for k in ("red", "green")}
    (folder / "pairs.json").write_text(json.dumps({"name": "pairs", "findings": prompts}))
    return folder


def command(place: Path, out: Path, *options: str) -> list[str]:
    table = ["--out", str(out / "p.csv"), "--report", str(out / "p.html")]
    return [str(place / "in"), "--model", str(place / "m"), *table, *options]


def made(out: Path) -> dict[str, str]:
    """Every output without what tells when and from which working tree it was made."""
    found = {p.name: p.read_text() for p in sorted(out.iterdir())}
    record = json.loads(found["p.run.json"])
    lines = [x for x in found["p.html"].splitlines() if record["created"] not in x]
    del record["created"], record["code"]
    return found | {"p.run.json": json.dumps(record), "p.html": "\n".join(lines)}


@pytest.mark.parametrize(
    "options",
    [
        ["--labels", "ct,mri", "--truth", "truth.csv", "--saliency", "gradient"],
        ["--prompts", "pairs.json", "--multilabel", "--truth", "findings.csv"],
    ],
)
def test_two_processes_give_the_bytes_of_one(place, tmp_path, options):
    pytest.importorskip("jinja2", reason='pip install "unimed-jax[report]"')
    options = [str(place / x) if x.endswith((".csv", ".json")) else x for x in options]
    with pytest.raises(SomeInputsFailed, match="2 of 42 files failed"):
        verb.run(command(place, tmp_path / "one", *options))
    both = [[sys.executable, "-m", "unimed_jax", "predict", *command(place, tmp_path / "two", *options)]] * 2
    done = job.finished(both)
    assert [code for code, *_ in done] == [4, 4], done
    assert "2 of 42 files failed" in done[1][2]
    assert "wrote" in done[0][1]
    assert done[1][1] == ""
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    assert one.keys() == {"p.csv", "p.errors.csv", "p.html", "p.metrics.json", "p.run.json"}
    assert len(list(csv.reader((tmp_path / "one" / "p.csv").open()))) == 41
    assert one == two


def test_processes_that_see_other_files_refuse(place, tmp_path):
    commands = [
        [sys.executable, "-m", "unimed_jax", "predict", *command(place, tmp_path / "o")] for _ in "ab"
    ]
    for c in commands:
        c += ["--labels", "ct,mri"]
    commands[1][4] = str(place / "in" / "00.png")
    done = job.finished(commands)
    assert [code for code, *_ in done] == [3, 3], done
    assert all("see different data" in said for *_, said in done)
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize("kind", ["refusal", "death"])
def test_a_process_that_fails_ends_the_other_and_leaves_nothing(place, tmp_path, kind):
    """Its disk goes away while it reads, or it is killed there."""
    code = f"""
    import os, signal, sys
    from unimed_jax.cli import main
    from unimed_jax.errors import DataError
    from unimed_jax.evaluate import predict
    plain = predict.reading.read

    def read(*args, **kwargs):
        for n, event in enumerate(plain(*args, **kwargs)):
            if n == 3 and os.environ["JAX_PROCESS_ID"] == "1":
                if {kind!r} == "death":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise DataError("the disk is gone", "mount it")
            yield event

    predict.reading.read = read
    main.main(["predict", *sys.argv[1:]])
    """
    both = [[sys.executable, "-c", textwrap.dedent(code), *command(place, tmp_path / "o"), "--labels", "a,b"]]
    codes, _, said = zip(*job.finished(both * 2), strict=True)
    assert list((tmp_path / "o").iterdir()) == []
    if kind == "refusal":
        assert codes == (3, 3)
        assert all("the disk is gone" in s for s in said)
    else:
        assert codes[0] not in (0, 4)
        assert codes[1] == -9
