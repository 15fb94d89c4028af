"""A port for the processes of a test to meet at."""

from __future__ import annotations

import random
import socket

PORTS = range(15_000, 32_000)
"""Below those the system gives to connections, which could take a port between our look and its use."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing is bound to, and that other tests are unlikely to choose."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
