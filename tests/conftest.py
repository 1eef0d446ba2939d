"""Shared fixtures, and the promise that nothing here reaches the network."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import tracemalloc  # noqa: F401  pytest imports it in a garbage collection, which may fall into a patched __import__
from pathlib import Path

import pytest

# Before anything imports jax: tests compare numbers, on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = Path(__file__).resolve().parent / "offline"  # refuses to leave this machine

os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])])
if getattr(socket.socket.connect, "__module__", "") != "sitecustomize":
    sys.modules.pop("sitecustomize", None)
    sys.path.insert(0, str(OFFLINE))
    importlib.import_module("sitecustomize")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """For trainings that compile the same programs over and over, in several files: one cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "xla"))
        yield


@pytest.fixture(autouse=True)
def _no_network() -> None:
    """Everything works with the network cable out, in this process and in those that tests start."""
    assert getattr(socket.socket.connect, "__module__", "") == "sitecustomize"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real weights (minilm/, dinov2/); skips when they were never fetched."""
    from unimed_jax.data.minimed import fetch

    folder = fetch.assets_dir()
    if folder is None:
        pytest.skip("real weights are not in the cache: make assets")
    return folder
