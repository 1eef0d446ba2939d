"""A tiny model on the procedural phantom set: seconds on a CPU, for tests. Its scores mean nothing."""

from __future__ import annotations

from unimed_jax.config import Checkpoint, Data, Duration, Loss, Optim, Train
from unimed_jax.errors import UsageError
from unimed_jax.models import zoo


def get_config(arg: str = "") -> Train:
    if arg:
        raise UsageError(f"phantom_tiny has no variant {arg!r}")
    return Train(
        name="phantom_tiny",
        batch_size=16,
        duration=Duration(steps=20),
        model=zoo.get("tiny"),
        data=Data(threads=2),
        loss=Loss(tile=16),
        optim=Optim(lr=1e-3, warmup=Duration(steps=4)),
        checkpoint=Checkpoint(every=Duration(steps=5)),
        log_every=1,
        watchdog_s=120,
    )
