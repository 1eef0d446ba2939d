"""Both towers from random weights on `minimed`: what minutes of training on a CPU reach without pretraining.

`:all` trains on every source under data.root: a small model on your own records.
"""

from __future__ import annotations

from unimed_jax.config import (
    Checkpoint,
    Data,
    Duration,
    Eval,
    Loss,
    Model,
    Optim,
    Source,
    Text,
    Train,
    Vision,
)
from unimed_jax.errors import UsageError


def get_config(arg: str = "") -> Train:
    if arg not in ("", "all"):
        raise UsageError(f"quickstart_scratch has no variant {arg!r}", "use :all or none")
    return Train(
        name="quickstart_scratch",
        batch_size=96,
        duration=Duration(steps=150),
        model=Model(
            name="quickstart-scratch",
            embed_dim=192,
            dtype="float32",
            vision=Vision(
                image_size=96,
                patch_size=16,
                width=192,
                depth=6,
                heads=3,
                mlp_dim=768,
                act="gelu",
                ln_pre=False,
            ),
            text=Text(
                context_length=32, max_positions=32, width=192, depth=3, heads=3, mlp_dim=768, proj="linear"
            ),
        ),
        data=Data(
            sources=() if arg else (Source(name="minimed", captions="uniform"),),
            crop_scale=(0.5, 1.0),
            color_jitter=0.3,
            threads=2,
        ),
        loss=Loss(tile=96, dedup="mask"),
        optim=Optim(lr=1e-3, warmup=Duration(steps=30), clip_norm=1.0),
        eval=Eval(tasks=("modality",), batch_size=64),
        checkpoint=Checkpoint(every=Duration(steps=75), keep=2),
        log_every=10,
    )
