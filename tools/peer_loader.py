"""The peer of tools/bench_data.py, in a process of its own: a web-dataset tar, Pillow and torchvision's transforms.

As PyTorch trainings read: webdataset opens the tar and decodes with Pillow, torchvision crops and resizes; no
tokenizer, and uint8 tensors instead of normalised floats, so it is an upper bound for such a loader. webdataset and
torchvision come from .venv/peers (tests/peers.txt); where they are missing, the standard library reads the tar and
Pillow alone does the rest, and the first line of the output says so.

    python tools/peer_loader.py FILE.tar SIZE     # prints its name; then one line of JSON for each line on stdin
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import io
import json
import math
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


def torch_loader(tar: str, size: int) -> tuple[str, Callable[[], Iterator[Any]]]:
    import torch

    if torch.version.cuda is None:
        # torchvision's binary does not load beside a CPU build of torch; its transforms need the names only.
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    import torchvision
    import webdataset
    from torchvision import transforms

    torch.set_num_threads(1)
    cubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, interpolation=cubic)
    change = transforms.Compose([crop, transforms.PILToTensor()])

    def once() -> Iterator[Any]:
        data = webdataset.WebDataset(tar, shardshuffle=False).decode("pilrgb")
        return iter(data.to_tuple("jpg", "txt").map_tuple(change, str).batched(32))

    name = f"webdataset {webdataset.__version__}, Pillow, torchvision {torchvision.__version__}"
    return name, once


def plain_loader(tar: str, size: int) -> tuple[str, Callable[[], Iterator[Any]]]:
    def once() -> Iterator[Any]:
        with tarfile.open(tar) as f:
            for member in f:
                file = f.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    yield crop(Image.open(io.BytesIO(file.read())).convert("RGB"), size)

    return "tarfile and Pillow (webdataset or torchvision is missing: make env)", once


def crop(image: Image.Image, size: int) -> bytes:
    area, aspect = random.uniform(*SCALE), math.exp(random.uniform(*map(math.log, RATIO)))
    w = min(image.width, round(math.sqrt(image.width * image.height * area * aspect)))
    h = min(image.height, round(math.sqrt(image.width * image.height * area / aspect)))
    left, top = random.randint(0, image.width - w), random.randint(0, image.height - h)
    box = (left, top, left + w, top + h)
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC).tobytes()


def main() -> None:
    tar, size = sys.argv[1], int(sys.argv[2])
    try:
        name, once = torch_loader(tar, size)
    except ImportError:
        name, once = plain_loader(tar, size)
    for _ in once():  # warm
        pass
    print(name, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in once():
            pass
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


if __name__ == "__main__":
    main()
