"""A TCP forwarder between daemons and a server, which does to their connections what networks do."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Self

CHUNK: Final = 1 << 16
TURN_S: Final = 0.005
BACKLOG: Final = 64


class Mode(Enum):
    """What becomes of bytes on their way."""

    PASS = auto()
    """They go through; answers `delay_s` after they came."""
    NO_ANSWERS = auto()
    """Requests arrive, answers are lost: to whoever asked, the outcome is unknown."""
    BLACK_HOLE = auto()
    """Nothing arrives on either side, and nobody is told."""
    STALL = auto()
    """Nothing arrives as long as this lasts; then all of it does, from those as well who have given up."""
    REFUSE = auto()
    """Connections are cut, new ones refused."""


@dataclass
class _Pair:
    """A connection from a client, and the one to the server that was made for it."""

    client: socket.socket
    server: socket.socket
    deaf: bool = False
    """Whether it has lost bytes: it is never made whole again, since what follows would be nonsense."""
    late: deque[tuple[float, bytes]] = field(default_factory=deque)
    """Answers, and when they go on."""


class Proxy:
    """Forwards connections to a port on loopback from one of its own, in a thread, as long as it is entered.

    What it does may change at any time.  A connection from which bytes were taken stays without answers when
    all pass again: whoever waits for one goes on waiting, until he gives up and connects anew.
    """

    def __init__(self, port: int) -> None:
        self._target = self._named = port
        self._mode = Mode.PASS
        self._delay_s = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.port: Final[int] = self._listener.getsockname()[1]
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pairs: dict[socket.socket, _Pair] = {}
        self._lock = threading.Lock()  # guards all of the above; the thread sleeps without it
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}")
        self.lost = 0
        """How many pieces of requests and answers were swallowed."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self.cut()
        self._listener.close()
        self._selector.close()

    def url(self, url: str) -> str:
        """The first server's URL with this proxy's port in the place of the server's."""
        return url.replace(f":{self._named}", f":{self.port}")

    def become(self, mode: Mode, *, delay_s: float = 0.0) -> None:
        """Treat bytes so from now on."""
        with self._lock:
            self._mode, self._delay_s = mode, delay_s
        if mode is Mode.REFUSE:
            self.cut()

    def point(self, port: int) -> None:
        """Forward to another server from now on; connections to the former one are cut."""
        with self._lock:
            self._target = port
        self.cut()

    def cut(self) -> None:
        """Cut all connections; new ones are made."""
        with self._lock:
            for pair in list(self._pairs.values()):
                self._drop(pair)

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stopping:
            if self._mode is Mode.STALL:
                time.sleep(TURN_S)
                continue
            events = self._selector.select(TURN_S)
            with self._lock:
                for key, _ in events:
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if source is self._listener:
                        self._accept()
                    elif (pair := self._pairs.get(source)) is not None:
                        self._move(source, pair)
                for pair in list(self._pairs.values()):
                    self._deliver(pair)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if self._mode is Mode.REFUSE:
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target), 1.0)
        except OSError:
            client.close()
            return
        pair = _Pair(client, server)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(1.0)
            self._pairs[end] = pair
            self._selector.register(end, selectors.EVENT_READ)

    def _move(self, source: socket.socket, pair: _Pair) -> None:
        from_client = source is pair.client
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self._drop(pair)
            return
        one_way = self._mode is Mode.NO_ANSWERS
        if self._mode is Mode.BLACK_HOLE or (one_way and not from_client) or (pair.deaf and not one_way):
            pair.deaf = True
            self.lost += 1
        elif from_client:
            self._send(pair, pair.server, data)
        else:
            pair.late.append((time.monotonic() + self._delay_s, data))

    def _deliver(self, pair: _Pair) -> None:
        while pair.late and pair.late[0][0] <= time.monotonic():
            self._send(pair, pair.client, pair.late.popleft()[1])

    def _send(self, pair: _Pair, to: socket.socket, data: bytes) -> None:
        try:
            to.sendall(data)
        except OSError:
            self._drop(pair)

    def _drop(self, pair: _Pair) -> None:
        for end in (pair.client, pair.server):
            if self._pairs.pop(end, None) is not None:
                self._selector.unregister(end)
            with contextlib.suppress(OSError):
                end.close()
        pair.late.clear()
