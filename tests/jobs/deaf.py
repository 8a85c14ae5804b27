"""Peers that ask as fast as they can and read nothing, or say nothing at all: a process of its own.

`crowd.py` starts it as `python deaf.py ENDPOINT PEERS SECONDS METHOD...`; without a method the peers are idle.  They
speak ZMTP over plain sockets, for libzmq itself would read.  One that is cut off comes again.  Prints how many bytes were
sent and how many peers were cut off.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import selectors
import socket
import sys
import time
from typing import Final

from zflake.wire.codec import encode_request

GREETING: Final = b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
READY: Final = b"\5READY\x0bSocket-Type\0\0\0\6DEALER"
AT_ONCE: Final = 100
"""Requests that a peer sends in its turn."""


class Deaf:
    """One peer; it reads only as much as it must to be let in."""

    def __init__(self, address: tuple[str, int], requests: bytes) -> None:
        self.socket = socket.socket()
        # What the kernel holds is to be the delegator's part, not this one's.
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 4096)
        self.socket.setblocking(False)
        self.socket.connect_ex(address)
        self.wants = selectors.EVENT_WRITE
        self._requests = requests
        self._left = GREETING + bytes([4, len(READY)]) + READY
        self._heard: bytes | None = b""

    def turn(self) -> int:
        """Go on; gives the bytes that were sent.  Raises `OSError` if the peer was cut off."""
        sent = 0
        if not self._left:
            if self._heard is not None:
                data = self.socket.recv(256)
                if not data:
                    raise ConnectionResetError
                self._heard += data
                if b"READY" not in self._heard:
                    return 0
                self._heard = None
            self._left = self._requests
        with contextlib.suppress(BlockingIOError):
            sent = self.socket.send(self._left)
            self._left = self._left[sent:]
        self.wants = selectors.EVENT_WRITE
        if not self._left and self._heard is not None:
            self.wants = selectors.EVENT_READ
        elif not self._requests:
            self.wants = 0
        return sent


def raise_limit() -> None:
    """Have as many descriptors as the system allows: each peer takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def crowd(endpoint: str, peers: int, seconds: float, methods: list[str]) -> dict[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    numbers = itertools.count()
    bodies = [encode_request(next(numbers), method, ()) for _ in range(AT_ONCE) for method in methods]
    requests = b"".join(b"\1\0" + bytes([0, len(body)]) + body for body in bodies)
    selector = selectors.DefaultSelector()
    counts = {"sent": 0, "cut": 0}

    def come() -> None:
        peer = Deaf((host, int(port)), requests)
        selector.register(peer.socket, peer.wants, peer)

    until = time.monotonic() + seconds
    waiting = peers
    while time.monotonic() < until:
        for _ in range(min(waiting, 50)):
            come()
            waiting -= 1
        if not selector.get_map():
            break
        for key, _ in selector.select(0.01):
            peer: Deaf = key.data
            try:
                counts["sent"] += peer.turn()
            except BlockingIOError:
                continue
            except OSError:
                selector.unregister(peer.socket)
                peer.socket.close()
                counts["cut"] += 1
                waiting += 1
                continue
            if peer.wants:
                selector.modify(peer.socket, peer.wants, peer)
            else:
                selector.unregister(peer.socket)
                _kept.append(peer)
    time.sleep(max(0.0, until - time.monotonic()))
    return counts


_kept: list[Deaf] = []


if __name__ == "__main__":
    raise_limit()
    print(json.dumps(crowd(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])))  # noqa: T201
