"""The released variants at full size: in, out, in again, in every format, compared bit for bit.

    python tools/round_trips.py
    python tools/round_trips.py --model unimed-clip-vit-b16 --folder /big/disk

Each variant is a training checkpoint of random float32 weights, made key by key from the released file's names and
shapes (tests/golden/state_dicts.json) and written with torch.save. It becomes a model folder; the folder becomes every
format that holds the whole model, and each of those a model folder again, whose weights must have the same sha256;
the `.pt` must hold the original's tensors under its names. The vision tower alone goes through hf-vision.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from checkpoints import golden

from unimed_jax import conversion, model_folder
from unimed_jax.convert import native, outputs, source
from unimed_jax.data.files import file_sha256
from unimed_jax.models import clip

RELEASED = ("unimed-clip-vit-b16", "unimed-clip-vit-l14-336", "unimed-clip-vit-l14-336-large-text")


def write_checkpoint(shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """A training checkpoint of random tensors, as distributed training saves it."""
    import torch

    rng = np.random.default_rng(0)
    state = {f"module.{k}": torch.from_numpy(rng.standard_normal(s, np.float32)) for k, s in shapes.items()}
    torch.save({"epoch": 10, "name": "random", "state_dict": state}, file)


def same_tensors(a: Path, b: Path) -> None:
    """Refuses two checkpoints whose tensors differ in name, shape or a single bit."""
    ours, theirs = source.open_source(a), source.open_source(b)
    assert set(ours.state) == set(theirs.state), f"{a} and {b} have other names"
    for name in ours.state:
        x, y = np.ascontiguousarray(ours.state[name]), np.ascontiguousarray(theirs.state[name])
        assert x.shape == y.shape, f"{name}: {x.shape} and {y.shape}"
        assert np.array_equal(x.reshape(-1).view(np.uint32), y.reshape(-1).view(np.uint32)), name
        ours.release()
        theirs.release()


def round_trips(name: str, folder: Path) -> dict[str, str]:
    """Format -> what came back equal."""
    _, shapes = golden()[name]
    given, first = folder / "given.pt", folder / "first"
    write_checkpoint(shapes, given)
    conversion.convert(conversion.Request(src=str(given), dst=str(first)))
    digest = file_sha256(first / model_folder.WEIGHTS)
    m = source.open_source(given).model
    found = {
        "native": f"{len(shapes)} tensors of {sum(np.prod(s, dtype=int) for s in shapes.values()):,} values"
    }
    for to in [to for to in outputs.possible(m) if to != "native"]:
        there, back = folder / (f"{to}.pt" if outputs.WRITERS[to].is_file else to), folder / "back"
        conversion.convert(conversion.Request(src=str(first), dst=str(there), to=to))
        if outputs.WRITERS[to].towers == ("vision",):
            tower = folder / "back.safetensors"
            conversion.convert(conversion.Request(src=str(there), dst=str(tower)))
            got = clip.flatten(native.load_tower(tower)[0])
            want = clip.flatten(model_folder.read(first)[1])
            for leaf, value in got.items():
                assert np.array_equal(value.view(np.uint32), np.asarray(want[leaf]).view(np.uint32)), leaf
            found[to] = f"{len(got)} leaves of the vision tower equal"
            tower.unlink()
        else:
            conversion.convert(conversion.Request(src=str(there), dst=str(back)))
            assert file_sha256(back / model_folder.WEIGHTS) == digest, f"{to} does not come back equal"
            found[to] = "model.safetensors equal"
            shutil.rmtree(back)
        if to == "unimed":
            same_tensors(given, there)
            found[to] += ", its tensors those of the given file"
        shutil.rmtree(there) if there.is_dir() else there.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(RELEASED), choices=RELEASED)
    parser.add_argument(
        "--folder", default=None, help="where to work (9 GB for the largest); default: the temporary folder"
    )
    parser.add_argument("--json", default="", help="write the findings here, too")
    args = parser.parse_args()
    found = {}
    for name in args.model:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.folder) as temp:
            found[name] = round_trips(name, Path(temp))
        print(f"{name}  ({time.perf_counter() - begin:.0f} s)")
        for to, words in found[name].items():
            print(f"  {to:10} {words}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
