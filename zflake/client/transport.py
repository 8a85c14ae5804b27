"""The client's sockets: a REQ to one endpoint each, used by one thread at a time.

A call checks a socket out of the pool and gives it back once its answer has come.  A socket whose answer
did not come is closed, and a late answer with it.  No socket crosses a fork: the child starts with none.
"""

from __future__ import annotations

import os
import threading
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

    __slots__ = ("_msgid", "_pack", "_rcvtimeo_ms", "_recv", "_send", "socket")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._send = socket.send
        self._recv = socket.recv
        self._pack = packer()
        self._msgid = 0
        self._rcvtimeo_ms = -1
        socket.setsockopt(zmq.SNDTIMEO, int(CONNECT_S * 1000))

    def ask(self, ask: Ask) -> Response | None:
        """The answer to one request, or None where none comes in time."""
        _, method, params, timeout_s = ask
        self._msgid = msgid = (self._msgid + 1) & 0xFFFF_FFFF
        timeout_ms = int(timeout_s * 1000) or 1
        if timeout_ms != self._rcvtimeo_ms:
            # Setting an option costs a call into libzmq: the usual time-out is set once.
            self.socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._rcvtimeo_ms = timeout_ms
        try:
            if timeout_s < CONNECT_S and not self.socket.poll(timeout_ms, zmq.POLLOUT):
                return None
            self._send(self._pack((REQUEST, msgid, method, params)))
            response = decode_response(self._recv())
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EFSM:
                raise
            raise ProtocolError("its last answer had more than one frame") from error
        if response.msgid not in (msgid, None):
            raise ProtocolError(f"an answer to request {response.msgid} came to request {msgid}")
        return response


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
        response = None
        try:
            response = line.ask(ask)
        except ProtocolError as error:
            raise ProtocolError(f"{ask.endpoint}: {error}") from error
        finally:
            self._give_back(ask.endpoint, line, usable=response is not None)
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

    def _give_back(self, endpoint: str, line: Line, *, usable: bool) -> None:
        with self._lock:
            self._out -= 1
            if usable and not self._closed:
                lines = self._idle.setdefault(endpoint, [])
                if len(lines) < MAX_IDLE:
                    lines.append(line)
                    return
            last = self._closed and self._out == 0
        line.socket.close(linger=0)
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
