"""The socket under a lease conversation.

It is the lease's own, with one request outstanding, so that no flood of ID requests can delay a renewal.  A
connection that the conversation gives up is closed with whatever was under way on it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.lease import TOKEN_BYTES, Holder
from zflake.errors import Unavailable
from zflake.holder.clock import HolderClock
from zflake.holder.lease import LeaseConversation
from zflake.wire.endpoint import Endpoint
from zflake.wire.sockets import Curve, Dialer, no_keys

LOOK_US: Final = 50_000
"""Microseconds between looks whether the delegator refuses the connection."""

_log = logging.getLogger("zflake.lease")


class LeaseClient:
    """Keeps the machine ID of `lease`, for one thread.

    Its poll loop polls `socket`, which is another one after each failure of a peer, and calls `service` when something
    came in, and at `wake_us`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Sequence[Endpoint],
        holder: Holder,
        curves: Callable[[], Sequence[Curve | None]] = no_keys,
        *,
        layout: Layout | None = None,
    ) -> None:
        self.lease = LeaseConversation(
            endpoints,
            holder,
            clock=HolderClock(clock.local_us),
            draw_token=lambda: secrets.token_bytes(TOKEN_BYTES),
            jitter=random.random,
            first=secrets.randbelow(len(endpoints)),  # each delegator gets its share
            layout=layout,
        )
        self._context = context
        self._curves = curves
        self._connection = self.lease.connection
        self._dialer = self._dial()
        self._look_at_us = 0

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """The socket of the present connection."""
        return self._dialer.socket

    @property
    def wake_us(self) -> int:
        """When `service` is due though nothing came in (local clock)."""
        return self.lease.wake_us

    def service(self, local_us: int) -> None:
        """Take in what came, send what is due.

        Raises `LayoutError` if the delegator's layout is not the one that this holder was told to use.
        """
        self._receive()
        try:
            if local_us >= self._look_at_us:
                self._look_at_us = local_us + LOOK_US
                if (refusal := self._dialer.refusal()) is not None:
                    self.lease.refuse(refusal, local_us)
            body = self.lease.poll(local_us)
            if self._connection != self.lease.connection:
                fresh = self._dial()
                self._dialer.close()
                self._dialer, self._connection = fresh, self.lease.connection
        except Unavailable as error:  # what was to be sent is as good as lost, and sent again
            self.lease.complain(local_us, "%s", error)
            return
        if body is not None:
            with contextlib.suppress(zmq.Again):  # as good as a lost message: it is sent again
                self.socket.send_multipart([b"", body], zmq.NOBLOCK)

    def release(self, deadline_us: int) -> None:
        """Stop minting for good and give the machine ID back, until `deadline_us` (local clock) at most."""
        request = self.lease.release()
        while self.lease.releasing and (left_us := deadline_us - clock.local_us()) > 0:
            self.service(clock.local_us())
            wait_us = min(left_us, max(0, self.wake_us - clock.local_us()))
            self.socket.poll(max(1, wait_us // 1000))
            self._receive()
        if request is not None and self.lease.releasing:
            why = "no delegator answers" if self.lease.refusal is None else self.lease.refusal.message
            _log.warning(
                "machine %d was not given back, and rests until its window ends: %s", request.machine, why
            )

    def close(self) -> None:
        """Close the socket."""
        self._dialer.close()

    def _dial(self) -> Dialer:
        # One message is under way at a time: let it wait for the peer.
        return Dialer(self._context, zmq.DEALER, self.lease.endpoint, self._curves(), queue=True)

    def _receive(self) -> None:
        while self._connection == self.lease.connection:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.lease.receive(frames[-1], clock.local_us())
