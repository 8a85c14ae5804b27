"""The sockets that a worker answers at: one that clients connect to, and one to each delegator.

None of them is the lease's: a flood of requests may delay a heartbeat, never a renewal.
"""

from __future__ import annotations

from typing import Final

import zmq

from zflake import clock
from zflake.wire.codec import REQUEST_HEAD
from zflake.wire.dispatch import Requests
from zflake.wire.endpoint import Endpoint
from zflake.wire.frames import MAX_REQUEST_BYTES
from zflake.wire.sockets import NOW, UNTAKEN, Intake, connected, send
from zflake.worker.link import Answers, Link

RECEIVE_MS: Final = 1
"""Milliseconds that `receive` waits if it is told to."""


class Channel(Intake):
    """A socket that requests come in by and answers go out by; `requests` counts the answers that are lost."""

    def __init__(self, socket: zmq.Socket[bytes], requests: Requests) -> None:
        super().__init__(socket)
        socket.setsockopt(zmq.RCVTIMEO, RECEIVE_MS)
        self.socket = socket
        self._requests = requests

    def answer(self, prefix: list[bytes], answer: bytes) -> None:
        """Answer a request, at the next `flush` at the latest."""
        if not send(self.socket, prefix, answer):
            self._requests.dropped += 1

    def flush(self) -> None:
        """Nothing: only a link's answers wait."""


class LinkChannel(Channel):
    """A DEALER to one delegator, for brokered requests; its owner calls `service` at input and at `wake_us`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, link: Link, requests: Requests
    ) -> None:
        super().__init__(
            connected(context, zmq.DEALER, endpoint, unread=UNTAKEN, most_bytes=MAX_REQUEST_BYTES), requests
        )
        self.socket.setsockopt(zmq.LINGER, 500)  # `worker.leave` may still wait to be sent
        self._link = link

    @property
    def wake_us(self) -> int:
        """When `service` is due (local clock)."""
        return self._link.wake_us

    def service(self, local_us: int) -> None:
        """Say what is due."""
        self._say(self._link.poll(local_us))

    def leave(self) -> None:
        """Say that this worker takes no more requests."""
        self._say(self._link.leave())

    def receive(self, flags: int = NOW) -> list[bytes] | None:
        """The next brokered request, as `Intake` gives it; the answers that wait are sent before it waits for one."""
        frames = self._next_request(NOW)
        if frames is None and flags != NOW:
            self.flush()
            frames = self._next_request(flags)
        return frames

    def answer(self, prefix: list[bytes], answer: bytes) -> None:
        """Answer a brokered request, at the next `flush` at the latest."""
        self._send(self._link.answer(prefix, answer))

    def flush(self) -> None:
        """Send the answers that wait."""
        self._send(self._link.flush())

    def _next_request(self, flags: int) -> list[bytes] | None:
        while (frames := super().receive(flags)) is not None:
            body = frames[-1]
            if body[:2] == REQUEST_HEAD:
                return frames
            self._link.receive(body, clock.local_us())
        return None

    def _say(self, body: bytes | None) -> None:
        if body is not None and not send(self.socket, [b""], body):
            self._link.unsent()

    def _send(self, message: Answers | None) -> None:
        if message is not None and not send(self.socket, message.prefix, message.body):
            self._requests.dropped += message.answers
