"""The socket under a worker's link to one delegator.

It is not the lease's: a flood of requests may delay a heartbeat, never a renewal.
"""

from __future__ import annotations

from typing import Final

import zmq

from zflake import clock
from zflake.wire.codec import REQUEST_HEAD
from zflake.wire.endpoint import Endpoint
from zflake.wire.sockets import NOW, Intake, connected, send
from zflake.worker.link import Answers, Link

LINGER_MS: Final = 1
"""Milliseconds that `receive` waits if it is told to."""


class LinkClient:
    """A DEALER to one delegator; its owner polls `socket`, and calls `service` then and at `wake_us`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, link: Link) -> None:
        self.socket: zmq.Socket[bytes] = connected(context, zmq.DEALER, endpoint)
        self.socket.setsockopt(zmq.RCVTIMEO, LINGER_MS)
        self._intake = Intake(self.socket)
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

    def receive(self, flags: int = NOW) -> tuple[list[bytes], bytes] | None:
        """The next brokered request, its tag before it; None if nothing (more) has come in.

        With `flags` 0 it is waited for, for `LINGER_MS`.
        """
        while (frames := self._intake.receive(flags)) is not None:
            body = frames[-1]
            if body[:2] == REQUEST_HEAD:
                return frames[:-1], body
            self._link.receive(body, clock.local_us())
        return None

    def answer(self, prefix: list[bytes], answer: bytes) -> int:
        """Answer a brokered request, at the next `flush` at the latest; gives how many answers were lost."""
        return self._send(self._link.answer(prefix, answer))

    def flush(self) -> int:
        """Send the answers that wait; gives how many were lost, since the delegator is away."""
        return self._send(self._link.flush())

    def close(self) -> None:
        """Close the socket, once what it holds is sent or half a second has passed."""
        self.socket.close(linger=500)

    def _say(self, body: bytes | None) -> None:
        if body is not None and not send(self.socket, [b""], body):
            self._link.unsent()

    def _send(self, message: Answers | None) -> int:
        if message is None or send(self.socket, message.prefix, message.body):
            return 0
        return message.answers
