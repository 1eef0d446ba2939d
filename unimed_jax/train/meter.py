"""How fast a run is: images per second, share of the time spent waiting for data, model FLOPs utilisation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import jax

from unimed_jax import config
from unimed_jax.models import flops

# Dense bf16 FLOP/s of one device by the start of its `device_kind`, from the makers' data sheets; longest match wins.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v3": 61.5e12,  # a JAX device is one of two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device, None when unknown (as for CPUs, whose peak depends on clocks and instruction sets).

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
        (989000000000000.0, None)
    """
    found = [k for k in PEAK_FLOPS if device_kind.startswith(k)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


@dataclass(slots=True, kw_only=True)
class Meter:
    """Counts steps and waiting time between two readings.

    Args:
        cfg: batch size and architecture.
        text_length: mean tokens a caption that count as work; default: the context length.
    """

    cfg: config.Train
    text_length: int | None = None
    _since: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _waited: float = 0.0

    def step(self, waited_s: float) -> None:
        """One step was dispatched after waiting this long for its batch."""
        self._steps += 1
        self._waited += waited_s

    def read(self) -> dict[str, float]:
        """The numbers since the last reading, which starts a new interval."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        out: dict[str, float] = {}
        if self._steps:
            rate = self.cfg.batch_size * self._steps / elapsed
            out = {
                "images_per_s": rate,
                "step_s": elapsed / self._steps,
                "data_wait": min(1.0, self._waited / elapsed),
            }
            peak = peak_flops(jax.devices()[0].device_kind)
            if peak:
                work = rate * flops.train_flops(self.cfg.model, self.text_length)
                out["mfu"] = work / (peak * jax.device_count())
        self.restart()
        return out

    def restart(self) -> None:
        """Starts a new interval: what came before (compiling, saving, evaluating) does not count."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
