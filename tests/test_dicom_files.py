"""Every file of pydicom's two test sets goes through `predict`: scored with these pixels, or refused with this line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import small_model

from unimed_jax.data import dicom
from unimed_jax.evaluate import predict, tasks

pydicom = pytest.importorskip("pydicom", reason='pip install "unimed-jax[medical]"')
GOLDEN = json.loads((Path(__file__).parent / "golden" / "dicom.json").read_text())


def roots() -> dict[str, Path]:
    import pydicom.data

    found = {"pydicom": Path(pydicom.data.__file__).parent / "test_files"}
    extra = importlib.util.find_spec("data_store")
    if extra and extra.submodule_search_locations:
        found["pydicom-data"] = Path(extra.submodule_search_locations[0]) / "data"
    return found


def test_every_file_is_scored_or_refused_as_recorded(tmp_path, monkeypatch):
    places = roots()
    if "pydicom-data" not in places:
        pytest.skip("pip install pydicom-data")
    files = {name: places[name.split("/")[0]] / name.split("/", 1)[1] for name in GOLDEN}
    there = {p for root in places.values() for p in root.rglob("*.dcm")}
    assert there <= set(files.values())  # none is left out

    decoded: dict[Path, dict] = {}
    original = dicom._pixels

    def record(path, ds, k, frames, module):
        pixels = original(path, ds, k, frames, module)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
        decoded[path] = {
            "shape": list(pixels.shape),
            "low": int(pixels.min()),
            "high": int(pixels.max()),
            "sha256": digest,
        }
        return pixels

    monkeypatch.setattr(dicom, "_pixels", record)
    loaded = small_model.loaded(tmp_path, batch_size=16)
    found = predict.predict(loaded, list(files.values()), tasks.from_labels(["ct", "mri"]))

    facts = {r["file"]: {k: r[k] for k in ("frame", "frames", "modality")} for r in found.rows}
    refused = {e["file"]: e["reason"] for e in found.errors}
    got = {}
    for name, path in files.items():
        if str(path) in facts:
            got[name] = decoded[path] | facts[str(path)]
        else:
            got[name] = {"refused": refused[str(path)].removeprefix(f"{path.name}: ")}
    assert got == GOLDEN
    assert len(found.rows) + len(found.errors) == len(GOLDEN) == 235
    assert all(abs(sum(r["scores"].values()) - 1) < 1e-6 for r in found.rows)
