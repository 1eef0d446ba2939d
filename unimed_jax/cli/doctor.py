"""`unimed-jax doctor`: what is installed, what the devices can do, what is cached."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import time
from typing import Any

from unimed_jax.cli.args import Parser
from unimed_jax.data import limits

CORE = [
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "tensorflow-datasets"),
    *("transformers", "ml_collections", "numpy", "pillow", "simplejpeg", "tokenizers", "safetensors"),
]
EXTRAS = {
    "beam": ("apache_beam",),
    "captions": ("openai",),
    "demo": ("gradio",),
    "medical": ("pydicom", "gdcm", "nibabel", "tifffile"),
    "quickstart": ("onnx",),
    "report": ("jinja2", "matplotlib"),
    "torch": ("torch",),
    "train": ("tensorboardX",),
}


def run(argv: list[str]) -> int:
    """Prints the state of this installation; exit 0 unless the devices cannot compute."""
    parser = Parser("unimed-jax doctor", description="Versions, devices, a compile test, extras and caches.")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse(argv)
    facts = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "extras": extras(),
        "caches": caches(),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for title, table in facts.items():
        print(title)
        for k, v in table.items():
            print(f"  {k:<22} {v}")
    return 0


def versions() -> dict[str, str]:
    """Installed versions of the core packages."""
    out = {"unimed-jax": importlib.metadata.version("unimed-jax"), "python": platform.python_version()}
    for name in CORE:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "MISSING"
    return out


def machine() -> dict[str, Any]:
    """Cores and operating system, as this process may use them."""
    return {"system": f"{platform.system()} {platform.machine()}", "cores": limits.cores()}


def devices() -> dict[str, str]:
    """Each device, and one measured matmul on the first: proof that compilation and execution work."""
    import jax
    import jax.numpy as jnp

    out = {}
    for d in jax.devices():
        stats = d.memory_stats() or {}
        limit = stats.get("bytes_limit")
        out[f"{d.platform}:{d.id}"] = d.device_kind + (f", {limit / 2**30:.0f} GiB" if limit else "")
    n = 1024 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jnp.ones((n, n), dtype)
    matmul = jax.jit(lambda a: a @ a)
    start = time.perf_counter()
    matmul(x).block_until_ready()
    first = time.perf_counter() - start
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        times.append(time.perf_counter() - start)
    out["compile and run"] = f"{first:.2f} s"
    out[f"matmul {dtype.__name__}"] = f"{2 * n**3 / min(times) / 1e12:.3f} TFLOP/s at {n} x {n}"
    return out


def extras() -> dict[str, str]:
    """Optional parts: installed, or the line that installs them."""
    return {
        name: "installed"
        if all(importlib.util.find_spec(m) for m in modules)
        else f'not installed: pip install "unimed-jax[{name}]"'
        for name, modules in EXTRAS.items()
    }


def caches() -> dict[str, str]:
    """Where things are kept between runs."""
    from unimed_jax.data.minimed.fetch import cache_dir

    home = cache_dir()
    size = sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) if home.is_dir() else 0
    return {str(home): f"{size / 2**20:.0f} MiB"}
