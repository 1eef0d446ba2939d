"""Python runs this at the start of every process of the tests: only loopback and local sockets may connect."""

import ipaddress
import socket

_connect = socket.socket.connect


def _guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise OSError(f"a test tried to reach the network: {host}")
    return _connect(self, address)


socket.socket.connect = _guarded
