"""Shared fixtures, and the promise that nothing here reaches the network."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest

# Before anything imports jax: tests compare numbers, on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything works with the network cable out: only loopback and local sockets may connect."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise OSError(f"a test tried to reach the network: {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real weights (minilm/, dinov2/); skips when they were never fetched."""
    from unimed_jax.data.minimed import fetch

    folder = fetch.assets_dir()
    if folder is None:
        pytest.skip("real weights are not in the cache: make assets")
    return folder
