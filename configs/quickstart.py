"""LiT on real towers: DINOv2 ViT-S/14 and MiniLM-L6, both frozen, two projections trained on `minimed`.

`unimed-jax quickstart` fetches and converts the towers and passes them as init.vision and init.text.
"""

from __future__ import annotations

from unimed_jax.config import Checkpoint, Data, Duration, Eval, Loss, Optim, Source, Train
from unimed_jax.errors import UsageError
from unimed_jax.models import zoo

# The other shipped tasks have one class or too few subjects on the test split: shown nowhere, scored never.
TASKS = ("modality",)


def get_config(arg: str = "") -> Train:
    if arg:
        raise UsageError(f"quickstart has no variant {arg!r}")
    model = zoo.get("dinov2-s14-minilm")
    model.text.dropout = 0.0  # a frozen tower in inference mode, computed once
    return Train(
        name="quickstart",
        batch_size=96,
        duration=Duration(steps=600),
        model=model,
        # Strong crops and jitter: three scanners and two people must not be what the heads learn.
        data=Data(
            sources=(Source(name="minimed", captions="uniform"),),
            views=3,
            crop_scale=(0.35, 1.0),
            color_jitter=0.4,
            threads=2,
        ),
        loss=Loss(tile=96, dedup="mask"),  # a small set: several images of a batch share a caption
        optim=Optim(
            lr=2e-3,
            weight_decay=0.05,
            warmup=Duration(steps=50),
            freeze=(r"vision/(?!proj).*", r"text/(?!proj).*"),
        ),
        eval=Eval(tasks=TASKS, batch_size=32),
        checkpoint=Checkpoint(every=Duration(steps=300), keep=2),
        log_every=20,
    )
