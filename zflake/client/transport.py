"""The client's sockets: a REQ to one endpoint each, used by one thread at a time.

A call checks a socket out of the pool and gives it back once its answer has come.  A socket whose answer
did not come is closed, and a late answer with it.  No socket crosses a fork: the child starts with none.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Final

import zmq

from zflake.client.conversation import CONNECT_S, Ask
from zflake.errors import Closed, ProtocolError
from zflake.wire.codec import REQUEST, Response, decode_response, packer
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.sockets import connected

MAX_IDLE: Final = 64
"""How many sockets to one endpoint are kept for the next calls."""
MAX_SOCKETS: Final = 16_384


class Line:
    """A connected REQ, with one request under way at a time.

    Once an answer has failed to come it is of no more use.
    """

    __slots__ = ("_connected", "_msgid", "_pack", "_recv", "_send", "_timeout_s", "socket")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._send = socket.send
        self._recv = socket.recv
        self._pack = packer()
        self._msgid = 0
        self._timeout_s = -1.0
        self._connected = False
        # A peer that went away after its last answer: as good as no answer.
        socket.setsockopt(zmq.SNDTIMEO, 0)

    def ask(self, ask: Ask) -> Response | None:
        """The answer to one request, or None where none comes in time."""
        _, method, params, timeout_s = ask
        self._msgid = msgid = (self._msgid + 1) & 0xFFFF_FFFF
        try:
            if not self._connected:
                timeout_s -= self._connect(timeout_s)
            if timeout_s != self._timeout_s:
                # Setting an option costs a call into libzmq: the usual time-out is set once.
                self.socket.setsockopt(zmq.RCVTIMEO, max(1, int(timeout_s * 1000)))
                self._timeout_s = timeout_s
            self._send(self._pack((REQUEST, msgid, method, params)))
            response = decode_response(self._recv())
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EFSM:
                raise
            raise ProtocolError("its last answer had more than one frame") from error
        if response.msgid != msgid and response.msgid is not None:
            raise ProtocolError(f"an answer to request {response.msgid} came to request {msgid}")
        return response

    def _connect(self, timeout_s: float) -> float:
        """Wait until the peer has taken the connection; gives the seconds that took."""
        begun = time.monotonic()
        if not self.socket.poll(int(min(CONNECT_S, timeout_s) * 1000), zmq.POLLOUT):
            raise zmq.Again
        self._connected = True
        return time.monotonic() - begun


class Transport:
    """A pool of lines, safe to share between threads and usable after a fork."""

    def __init__(self) -> None:
        self._closed = False
        self._reset()
        _all.add(self)

    def ask(self, ask: Ask) -> Response | None:
        """Send one request and wait for its answer; None where none comes in time.

        Raises `Closed` after `close`, `ProtocolError` where the answer is not zflake's.
        """
        line = self._check_out(ask.endpoint)
        try:
            response = line.ask(ask)
        except BaseException as error:
            self._discard(line)
            if isinstance(error, ProtocolError):
                raise ProtocolError(f"{ask.endpoint}: {error}") from error
            raise
        if response is None:
            self._discard(line)
        else:
            self._give_back(ask.endpoint, line)
        return response

    def close(self) -> None:
        """Close all sockets; those of calls under way in other threads when these end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = [line for lines in self._idle.values() for line in lines]
            self._idle.clear()
            last = self._out == 0
        for line in idle:
            line.socket.close(linger=0)
        if last:
            self._context.term()

    def _check_out(self, endpoint: str) -> Line:
        with self._lock:
            if self._closed:
                raise Closed("this client is closed")
            self._out += 1
            lines = self._idle.get(endpoint)
            if lines:
                return lines.pop()
        try:
            return Line(connected(self._context, zmq.REQ, parse_endpoint(endpoint)))
        except BaseException:
            with self._lock:
                self._out -= 1
            raise

    def _give_back(self, endpoint: str, line: Line) -> None:
        with self._lock:
            lines = self._idle.get(endpoint)
            if lines is None:
                lines = self._idle[endpoint] = []
            if not self._closed and len(lines) < MAX_IDLE:
                self._out -= 1
                lines.append(line)
                return
        self._discard(line)

    def _discard(self, line: Line) -> None:
        line.socket.close(linger=0)
        with self._lock:
            self._out -= 1
            last = self._closed and self._out == 0
        if last:
            self._context.term()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # guards _idle, _out and _closed
        self._idle: dict[str, list[Line]] = {}
        self._out = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)

    def _forked(self) -> None:
        _inherited.append((self._context, self._idle))
        self._reset()


_all: weakref.WeakSet[Transport] = weakref.WeakSet()
# What a forked child inherits must be neither used nor closed by it.
_inherited: list[object] = []


def _after_fork() -> None:
    for transport in list(_all):
        transport._forked()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
