"""UniMed-CLIP ViT-L/14 at 336 pixels: the published recipe at a global batch of 2048.

`:all` trains on every source under data.root instead of the 13 parts of UniMed.
"""

from __future__ import annotations

from unimed_jax.config import UNIMED_WEIGHTS, Data, Duration, Optim, Source, Train
from unimed_jax.errors import UsageError
from unimed_jax.models import zoo


def get_config(arg: str = "") -> Train:
    if arg not in ("", "all"):
        raise UsageError(f"unimed_l14_336 has no variant {arg!r}", "use :all or none")
    model = zoo.get("unimed-clip-vit-l14-336")
    model.remat = "full"  # 128 images a device do not fit into 80 GB otherwise
    return Train(
        name="unimed_l14_336",
        batch_size=2048,  # 16 devices of 128
        duration=Duration(epochs=10),
        model=model,
        data=Data(sources=() if arg else tuple(Source(name=n, weight=w) for n, w in UNIMED_WEIGHTS.items())),
        optim=Optim(lr=4e-4, weight_decay=0.2, warmup=Duration(steps=2000)),
    )
