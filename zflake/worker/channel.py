"""The sockets that a worker answers at: one that clients connect to, and one to each delegator.

None of them is the lease's: a flood of requests may delay a heartbeat, never a renewal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final

import zmq

from zflake import clock
from zflake.daemon.gate import Gate
from zflake.errors import Unavailable
from zflake.holder.lease import LOG_INTERVAL_US
from zflake.wire.callers import ANYONE, BROKER, Caller
from zflake.wire.codec import REQUEST_HEAD
from zflake.wire.dispatch import Requests
from zflake.wire.endpoint import Endpoint
from zflake.wire.frames import MAX_REQUEST_BYTES
from zflake.wire.sockets import NOW, UNTAKEN, Curve, Dialer, Intake, no_keys, send
from zflake.worker.link import Answers, Link

RECEIVE_MS: Final = 1
"""Milliseconds that `receive` waits if it is told to."""
LEAVE_MS: Final = 500
"""Milliseconds that a last `worker.leave` may take to be sent."""
LOOK_US: Final = 50_000
"""Microseconds between looks whether a delegator refuses the connection."""

_log = logging.getLogger("zflake.worker")


class Channel(Intake):
    """A socket that requests come in by and answers go out by; `requests` counts the answers that are lost."""

    caller: Caller = ANYONE
    """Whose message came last."""

    def __init__(self, socket: zmq.Socket[bytes], requests: Requests, *, keyed: bool = False) -> None:
        self._requests = requests
        self._use(socket, keyed=keyed)

    def _use(self, socket: zmq.Socket[bytes], *, keyed: bool = False) -> None:
        super().__init__(socket, keyed=keyed)
        socket.setsockopt(zmq.RCVTIMEO, RECEIVE_MS)
        self.socket = socket

    def answer(self, prefix: list[bytes], answer: bytes) -> None:
        """Answer a request, at the next `flush` at the latest."""
        if not send(self.socket, prefix, answer):
            self._requests.dropped += 1

    def peer_of(self, prefix: list[bytes]) -> Hashable:
        """The peer that sent a request behind this prefix."""
        return prefix[0]

    def flush(self) -> None:
        """Nothing: only a link's answers wait."""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class GatedChannel(Channel):
    """A ROUTER whose peers prove their keys."""

    def __init__(self, socket: zmq.Socket[bytes], requests: Requests, gate: Gate) -> None:
        super().__init__(socket, requests, keyed=True)
        self._gate = gate

    @property
    def caller(self) -> Caller:  # type: ignore[override]
        """Whose message came last, as far as the gate knows it now."""
        return self._gate.caller(self.sender)


class LinkChannel(Channel):
    """A DEALER to one delegator, for brokered requests; its owner calls `service` at input and at `wake_us`.

    `service` may put another socket in the place of `socket`; `curves` gives the keys that may be the delegator's.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: Endpoint,
        link: Link,
        requests: Requests,
        curves: Callable[[], Sequence[Curve | None]] = no_keys,
    ) -> None:
        self._link = link
        self._connection = link.connection
        self._context, self._endpoint, self._curves = context, endpoint, curves
        self._dialer = self._dial()
        self._look_at_us = self._quiet_until_us = 0
        super().__init__(self._dialer.socket, requests)
        self.caller = BROKER if link.keyed else ANYONE

    @property
    def wake_us(self) -> int:
        """When `service` is due (local clock)."""
        return self._link.wake_us

    def service(self, local_us: int) -> None:
        """Say what is due."""
        body = self._link.poll(local_us)
        try:
            if self._connection != self._link.connection:
                fresh = self._dial()
                self._dialer.close()
                self._dialer, self._connection = fresh, self._link.connection
            if local_us >= self._look_at_us:
                self._look(local_us)
        except Unavailable:  # the lease client says that this process is short of descriptors
            self._link.unsent()
            return
        if self._dialer.socket is not self.socket:
            self._use(self._dialer.socket)
        self._say(body)

    def _look(self, local_us: int) -> None:
        """See whether the delegator refuses the connection; the dialer tries another key then, if there is one."""
        self._look_at_us = local_us + LOOK_US
        refusal = self._dialer.refusal()
        if refusal is not None and local_us >= self._quiet_until_us:
            self._quiet_until_us = local_us + LOG_INTERVAL_US
            _log.warning("the delegator at %s refuses the connection: %s", self._endpoint, refusal)

    @property
    def callers(self) -> Mapping[str, Caller] | None:
        """Who may ask this worker, as the delegator says; None if that is not known, or while it does not answer."""
        return self._link.callers if self._link.hears else None

    def _dial(self) -> Dialer:
        return Dialer(
            self._context,
            zmq.DEALER,
            self._endpoint,
            self._curves(),
            unread=UNTAKEN,
            most_bytes=MAX_REQUEST_BYTES,
        )

    def close(self) -> None:
        """Close the socket, once what waits is sent."""
        self._dialer.close(linger_ms=LEAVE_MS)

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

    def peer_of(self, prefix: list[bytes]) -> Hashable:  # noqa: ARG002
        """The delegator: a tag tells nothing of the client that asked it."""
        return self

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
