"""A worker's link to one delegator: says that it is there, and takes brokered requests.

Its socket is not the lease's: a flood of requests may delay a beat, never a renewal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import zmq

from zflake.core.lease import Token
from zflake.errors import ProtocolError
from zflake.holder.clock import Clock, local_us
from zflake.wire.codec import REQUEST_HEAD, decode_response, encode_bundle, encode_request
from zflake.wire.endpoint import Endpoint
from zflake.wire.messages import Method, now_of
from zflake.wire.sockets import NOW, Intake, connected, send

BEAT_US: Final = 250_000
MOST_ANSWERS: Final = 64
"""How many answers go in one message."""
LINGER_MS: Final = 1


class Link:
    """A DEALER to one delegator; its owner polls `socket`, and calls `service` then and every `BEAT_US`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, clock: Clock) -> None:
        self.socket: zmq.Socket[bytes] = connected(context, zmq.DEALER, endpoint)
        self.socket.setsockopt(zmq.RCVTIMEO, LINGER_MS)
        self._intake = Intake(self.socket)
        self.wake_us = 0
        """When `service` wants to be called again (local clock)."""
        self._clock = clock
        self._answers: list[tuple[bytes, bytes]] = []
        self._msgid = 0
        self._was_open = False
        self._known_as: int | None = None
        """The machine ID as which the delegator knows this worker."""

    def service(
        self,
        now_local_us: int,
        machine: int | None,
        token: Token,
        load: Callable[[], dict[str, int]],
        *,
        is_open: bool,
    ) -> None:
        """Say what is due: that this worker is ready, that it lives (with its `load`), or that it leaves."""
        if not is_open:
            self.leave()
        elif not self._was_open:
            self.wake_us = 0
        self._was_open = is_open
        if now_local_us < self.wake_us:
            return
        self.wake_us = now_local_us + BEAT_US
        if not is_open or machine is None:
            return
        if self._known_as != machine:
            said = self._say(Method.WORKER_READY, machine, token)
        else:
            said = self._say(Method.WORKER_BEAT, load())
        self._known_as = machine if said else None

    def leave(self) -> None:
        """Say that this worker takes no more requests."""
        if self._known_as is not None:
            self._say(Method.WORKER_LEAVE)
            self._known_as = None

    def receive(self, flags: int = NOW, *, step: bool) -> tuple[list[bytes], bytes] | None:
        """The next brokered request, its tag before it; None where nothing (more) has come in.

        With `flags` 0 it is waited for, for `LINGER_MS`.  `step` is for the clock, which learns from the
        delegator's answers.
        """
        while True:
            frames = self._intake.receive(flags)
            if frames is None:
                return None
            body = frames[-1]
            if body[:2] == REQUEST_HEAD:
                return frames[:-1], body
            self._take(body, step=step)

    def answer(self, prefix: list[bytes], answer: bytes) -> int:
        """Answer a brokered request, at the next `flush` at the latest; gives how many answers were lost.

        The delegator takes messages in from all its peers in turn.  Where those are many, what a worker has
        to say must not go one by one.
        """
        if len(prefix) != 2:  # noqa: PLR2004  (the tag and the empty frame; whatever else it is goes back as it came)
            return 0 if send(self.socket, prefix, answer) else 1
        self._answers.append((prefix[0], answer))
        return self.flush() if len(self._answers) == MOST_ANSWERS else 0

    def flush(self) -> int:
        """Send the answers that wait; gives how many were lost, since the delegator is away."""
        if not self._answers:
            return 0
        answers, self._answers = self._answers, []
        if len(answers) == 1:
            ((tag, answer),) = answers
            sent = send(self.socket, [tag, b""], answer)
        else:
            sent = send(self.socket, [b""], encode_bundle(answers))
        return 0 if sent else len(answers)

    def close(self) -> None:
        """Close the socket, once what it holds is sent or half a second has passed."""
        self.socket.close(linger=500)

    def _take(self, body: bytes, *, step: bool) -> None:
        received_us = local_us()
        with contextlib.suppress(ProtocolError):
            response = decode_response(body)
            if response.error is not None:
                # It was restarted, or has not seen the lease yet: introduce ourselves again.
                self._known_as = None
            elif (now_us := now_of(response.result)) is not None:
                self._clock.exchange(now_us, received_us, step=step)

    def _say(self, method: Method, *params: object) -> bool:
        self._msgid = (self._msgid + 1) & 0xFFFF_FFFF
        return send(self.socket, [b""], encode_request(self._msgid, method, params))
