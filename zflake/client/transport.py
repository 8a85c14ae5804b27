"""The client's sockets: each is a REQ to one endpoint, and serves one thread at a time.

A call checks a socket out of the pool and gives it back once the answer has come.  If no answer comes, the
transport closes the socket, and drops a late answer with it; the connections that lay idle beside it may be as dead,
and are closed as well.  No socket crosses a fork: the child starts with none, once its owner has called `after_fork`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import zmq

from zflake.client.conversation import CONNECT_S, Ask, Outcome
from zflake.errors import AuthError, Closed, ProtocolError
from zflake.keys import Keys, curves_of
from zflake.wire.codec import REQUEST, Response, decode_response, packer
from zflake.wire.endpoint import Endpoint, parse_endpoint
from zflake.wire.sockets import Curve, Dialer, check_descriptors

MAX_IDLE: Final = 64
"""Number of idle sockets to one endpoint that are kept for the next calls."""
MAX_SOCKETS: Final = 16_384
"""Number of sockets in one context at most; libzmq's own default is 1,023."""
UNUSED_S: Final = 60.0
"""Seconds after its last use in which an endpoint's sockets are closed, once another endpoint needs one."""
SOON_MS: Final = 2
"""Milliseconds within which nearly all answers come; to wait for those in the socket itself is quickest."""


class Line:
    """A REQ, with one request under way at a time; of no use after an answer did not come."""

    __slots__ = ("_msgid", "_pack", "_recv", "_send", "_socket", "asked_at", "dialer")

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self.asked_at = 0.0
        """When its last request was sent (monotonic, s)."""
        self._socket: zmq.Socket[bytes] | None = None  # once the peer has taken the connection
        self._pack = packer()
        self._msgid = 0

    def ask(self, ask: Ask) -> Outcome:
        """The outcome of one request."""
        _, method, params, timeout_s, _, _ = ask
        self.asked_at = now = time.monotonic()
        deadline = now + timeout_s
        self._msgid = msgid = (self._msgid + 1) & 0xFFFF_FFFF
        try:
            if self._socket is None and (refusal := self._connect(timeout_s)) is not None:
                return AuthError(f"the connection was refused: {refusal}")
            self._send(self._pack((REQUEST, msgid, method, params)))
            try:
                body = self._recv()
            except zmq.Again:
                body = self._wait(deadline)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EFSM:
                raise
            return ProtocolError("the last answer had more than one frame")
        try:
            response = decode_response(body)
        except ProtocolError as nonsense:
            return nonsense
        if response.msgid != msgid and response.msgid is not None:
            return ProtocolError(f"request {msgid} was answered with the answer to request {response.msgid}")
        return response

    def _wait(self, deadline: float) -> bytes:
        # Not with RCVTIMEO, which each signal to the process would start again.
        while (left_ms := int((deadline - time.monotonic()) * 1000)) > 0:
            if self.dialer.socket.poll(left_ms):
                return self._recv(zmq.NOBLOCK)
        raise zmq.Again

    def _connect(self, timeout_s: float) -> str | None:
        """Wait until the peer has taken the connection; gives why, if it refuses."""
        if (refusal := self.dialer.wait(min(CONNECT_S, timeout_s))) is not None:
            return refusal
        self._socket = socket = self.dialer.socket
        self._send, self._recv = socket.send, socket.recv
        # If the peer went away after its last answer, the send fails at once: as good as no answer.
        socket.setsockopt(zmq.SNDTIMEO, 0)
        socket.setsockopt(zmq.RCVTIMEO, SOON_MS)
        return None


class _Sockets:
    """The contexts and sockets of a transport; they outlive it until they are closed.

    A context resolves host names in the one thread that also moves its messages, and may take seconds for a
    name that does not resolve: each endpoint with a host name has a context of its own, while it has sockets.
    """

    def __init__(self) -> None:
        self._contexts: dict[str, zmq.Context[zmq.Socket[bytes]]] = {}
        self._open: dict[Dialer, str] = {}

    def connect(self, endpoint: Endpoint, curves: Sequence[Curve | None]) -> Dialer:
        key = endpoint.text if endpoint.is_name else ""
        context = self._contexts.get(key)
        if context is None:
            check_descriptors()
            context = self._contexts[key] = zmq.Context()
            context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        dialer = Dialer(context, zmq.REQ, endpoint, curves)
        self._open[dialer] = key
        return dialer

    def close(self, dialer: Dialer) -> None:
        key = self._open.pop(dialer, "")
        dialer.close()
        if key and key not in self._open.values():
            # The context may be waiting for a name server, and the caller should not.
            threading.Thread(target=self._contexts.pop(key).term, daemon=True).start()

    def close_all(self) -> None:
        for dialer in list(self._open):
            self.close(dialer)
        for context in self._contexts.values():
            context.term()


class Transport:
    """A pool of lines, safe to share between threads; a forked child may use it after `after_fork`."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._closed = False
        self._reset()

    def ask(self, ask: Ask) -> Outcome:
        """Send one request and wait for its outcome.

        Raises `Closed` after `close`, and `Unavailable` if this process has nothing left to connect with: that says
        nothing of the endpoint.
        """
        try:
            line = self._check_out(ask)
        except zmq.ZMQError as error:
            return ProtocolError(f"can't connect: {error.strerror}")
        outcome = None
        try:
            outcome = line.ask(ask)
        finally:
            if type(outcome) is Response:
                self._give_back(ask.endpoint, line)
            else:
                self._discard(line)
                if outcome is None and ask.timeout_s >= CONNECT_S:
                    self._drop_idle(ask.endpoint, line.asked_at)
        return outcome

    def close(self) -> None:
        """Close all sockets; the sockets of calls under way in other threads close when those calls end."""
        with self._lock:
            self._closed = True
            for lines in self._idle.values():
                while lines:
                    self._sockets.close(lines.pop().dialer)
        self._finish_if_unused()

    def after_fork(self) -> None:
        """Drop all sockets, which a forked child must neither use nor close."""
        self._finish.detach()
        _inherited.append((self._sockets, self._idle))
        self._reset()

    def _check_out(self, ask: Ask) -> Line:
        with self._lock:
            if self._closed:
                raise Closed("this client is closed: make a new one")
            # Counted first: a signal handler that closes meanwhile must not end the context, or it would wait for
            # the socket of the very thread that it interrupts.
            self._out += 1
            try:
                if lines := self._idle[ask.endpoint]:
                    return lines.pop()
                for other in list(self._idle):
                    self._drop_idle(other, time.monotonic() - UNUSED_S)
                curves = curves_of(self._keys, ask.key)()
                return Line(self._sockets.connect(parse_endpoint(ask.endpoint), curves))
            except BaseException:
                self._out -= 1
                raise

    def _give_back(self, endpoint: str, line: Line) -> None:
        with self._lock:
            lines = self._idle[endpoint]
            if not self._closed and len(lines) < MAX_IDLE:
                self._out -= 1
                lines.append(line)
                return
        self._discard(line)

    def _drop_idle(self, endpoint: str, before: float) -> None:
        """Close the idle lines to an endpoint that were last used before that time."""
        with self._lock:
            lines = self._idle.pop(endpoint, [])
            if kept := [line for line in lines if line.asked_at >= before]:
                self._idle[endpoint] = kept
            for line in lines:
                if line.asked_at < before:
                    self._sockets.close(line.dialer)

    def _discard(self, line: Line) -> None:
        with self._lock:
            self._sockets.close(line.dialer)
            self._out -= 1
        self._finish_if_unused()

    def _finish_if_unused(self) -> None:
        if self._closed and self._out == 0:
            self._finish()

    def _reset(self) -> None:
        # Guards all below.  A signal handler may ask for an ID while its own thread holds it, so it is an RLock.
        self._lock = threading.RLock()
        self._idle: defaultdict[str, list[Line]] = defaultdict(list)
        self._out = 0
        self._sockets = _Sockets()
        # The garbage collector takes a forgotten transport apart in any order, and a context would wait for
        # ever for sockets that are still open: this finalizer closes the sockets first.
        self._finish = weakref.finalize(self, self._sockets.close_all)
        self._finish.atexit = False


_inherited: list[object] = []
"""The sockets that a forked child dropped, for good: to free one would close it."""
