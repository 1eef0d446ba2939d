"""UniMed-CLIP ViT-B/16: the published recipe at a global batch of 2048.

`:all` trains on every source under data.root instead of the 13 parts of UniMed.
"""

from __future__ import annotations

from unimed_jax.config import UNIMED_WEIGHTS, Data, Duration, Optim, Source, Train
from unimed_jax.errors import UsageError
from unimed_jax.models import zoo


def get_config(arg: str = "") -> Train:
    if arg not in ("", "all"):
        raise UsageError(f"unimed_b16 has no variant {arg!r}", "use :all or none")
    model = zoo.get("unimed-clip-vit-b16")
    return Train(
        name="unimed_b16",
        batch_size=2048,  # 16 devices of 128
        duration=Duration(epochs=10),
        model=model,
        data=Data(sources=() if arg else tuple(Source(name=n, weight=w) for n, w in UNIMED_WEIGHTS.items())),
        optim=Optim(lr=5e-4, weight_decay=0.2, warmup=Duration(steps=2000)),
    )
