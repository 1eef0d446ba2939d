"""The guard that keeps the tests off the network works here and in a process that a test starts."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

CODE = "import socket; socket.socket().connect(('192.0.2.1', 80))"  # an address reserved for documentation


def test_no_test_reaches_the_network():
    with pytest.raises(OSError, match="a test tried to reach the network"):
        socket.socket().connect(("192.0.2.1", 80))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert "a test tried to reach the network" in done.stderr
