"""The lease keeper: takes a machine ID from a delegator, renews it, and gives it back.

It has a socket of its own, with one request outstanding, so that no flood of ID requests can delay a
renewal.  A request without an answer is sent again, with the same token, to the next endpoint; the old
socket is closed with whatever was under way on it.

Between lease requests it pings, several times a second: each answer carries the timeline's now, which is
what the holder's clock runs on.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
from collections.abc import Sequence
from typing import Final

import zmq

from zflake.core.layout import Layout
from zflake.core.lease import TOKEN_BYTES, Grant, Holder, Refusal, Refused, Release, Released, Request
from zflake.core.mint import Mint
from zflake.core.tenant import RETRY_US, State, Tenant
from zflake.errors import LayoutError, ProtocolError
from zflake.holder.clock import Clock, local_us
from zflake.wire.codec import Response, decode_response, encode_request
from zflake.wire.endpoint import Endpoint
from zflake.wire.messages import Code, Method, check_hello, lease_answer, lease_call, now_of
from zflake.wire.sockets import connected

PING_US: Final = 250_000
PATIENCE_US: Final = 10_000_000
"""For how long a lease without a window is kept for a cluster of which nobody answers, where others do."""
MAX_PATIENCE_US: Final = 8_000_000
"""How long an answer is waited for at most, where none came in time before."""
QUIET_US: Final = 10_000_000
"""How often an outage that goes on is logged again."""

_log = logging.getLogger("zflake.lease")


class LeaseKeeper:
    """A leased machine ID: `mint` mints while a window is open, `clock` says the timeline's now.

    The owner polls `socket` for input, and calls `service` then and at `wake_us` (local clock).
    Used by one thread.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Sequence[Endpoint],
        holder: Holder,
        *,
        layout: Layout | None = None,
    ) -> None:
        self.clock = Clock()
        self.tenant = Tenant(
            holder,
            draw_token=lambda: secrets.token_bytes(TOKEN_BYTES),
            jitter=random.random,
            layout=layout,
        )
        self.store_id: str | None = None
        """The store that the lease is recorded in."""
        self.refusal: Refusal | None = None
        """Why the lease request that is being repeated was refused last; None where nobody answers it."""
        self._context = context
        self._endpoints = endpoints
        self._layout = layout
        self._turn = secrets.randbelow(len(endpoints))  # each delegator gets its share
        self._msgid = 0
        self._pending: Request | Method | None = None
        self._answer_by_us = 0
        self._sent_us = 0
        self._silences = 0  # how many requests in a row had no answer in time
        self._trip_us = 0  # how long the last answer took
        self._greeted = False
        self._heard_us = 0  # when somebody of the lease's cluster answered last
        self._ping_at_us = 0
        self._hold_until_us = 0
        self._quiet_until_us = 0
        self._connect()

    @property
    def mint(self) -> Mint | None:
        """The mint of the current tenancy; None where there is none."""
        return self.tenant.mint

    @property
    def is_open(self) -> bool:
        """Whether a window held the timeline's now when `service` last looked."""
        return self.tenant.state is State.HELD

    @property
    def wake_us(self) -> int:
        """When `service` wants to be called though nothing came in (local clock)."""
        if self._pending is not None:
            return self._answer_by_us
        return max(min(self.tenant.send_at_us, self._ping_at_us), self._hold_until_us)

    @property
    def retry_after_ms(self) -> int:
        """How long a caller should wait where no window is open."""
        return max(50, min(1000, (self.wake_us - local_us()) // 1000))

    def service(self, now_local_us: int) -> None:
        """Take in what came, send what is due.

        Raises `LayoutError` where the delegator's layout is not the one that this holder was told to use.
        """
        before = self.tenant.state
        self._receive()
        if self._pending is not None and now_local_us >= self._answer_by_us:
            self.refusal = None
            self._silences += 1
            self._complain(now_local_us, "%s does not answer", self._endpoint)
            self._connect_next()
        self._follow(before)
        if self._pending is None and now_local_us >= self._hold_until_us:
            self._send_due(now_local_us)

    def release(self, deadline_us: int) -> None:
        """Stop minting for good and give the machine ID back, until `deadline_us` (local clock) at most.

        Where no delegator answers in time, the lease runs out by itself.
        """
        request = self.tenant.close()
        if request is None:
            return
        self._send(request, local_us())
        while self._pending is not None and (left_us := deadline_us - local_us()) > 0:
            # Whether it was heard or not, it may be said again.
            left_us = min(left_us, max(0, self._answer_by_us - local_us()))
            self.socket.poll(max(1, left_us // 1000))
            self._receive()
            if self._pending is not None and local_us() >= self._answer_by_us:
                self._connect_next()
                self._send(request, local_us())
        if self._pending is not None:
            _log.warning("machine %d was not given back: it rests until its window ends", request.machine)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close(linger=0)

    @property
    def _endpoint(self) -> Endpoint:
        return self._endpoints[self._turn]

    def _connect_next(self) -> None:
        self.socket.close(linger=0)
        self._turn = (self._turn + 1) % len(self._endpoints)
        self._connect()

    def _connect(self) -> None:
        # One message is under way at a time: let it wait for the peer.
        self.socket: zmq.Socket[bytes] = connected(self._context, zmq.DEALER, self._endpoint, queue=True)
        self._pending = None
        self._greeted = False

    def _send_due(self, now_local_us: int) -> None:
        if not self._greeted:
            self._send(Method.HELLO, now_local_us)
        elif request := self.tenant.poll(now_local_us):
            self._send(request, now_local_us)
        elif now_local_us >= self._ping_at_us:
            self._send(Method.PING, now_local_us)

    def _send(self, what: Request | Method, now_local_us: int) -> None:
        method, params = (what, []) if isinstance(what, Method) else lease_call(what)
        self._msgid = (self._msgid + 1) & 0xFFFF_FFFF
        with contextlib.suppress(zmq.Again):  # the same as a lost message: it is sent again
            self.socket.send_multipart([b"", encode_request(self._msgid, method, params)], zmq.NOBLOCK)
        self._pending = what
        self._sent_us = now_local_us
        self._answer_by_us = now_local_us + self._patience_us()
        self._ping_at_us = now_local_us + PING_US

    def _patience_us(self) -> int:
        """How long to wait for an answer.

        A short ttl leaves little time, and a connection takes several trips to make.  So who has heard nothing
        from any endpoint waits twice as long at the next ones, and nobody waits less than the last trips took.
        """
        doubled = self.tenant.retry_us << min(8, self._silences // len(self._endpoints))
        return max(min(doubled, MAX_PATIENCE_US), min(3 * self._trip_us, MAX_PATIENCE_US))

    def _receive(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            received_us = local_us()
            try:
                response = decode_response(frames[-1])
                if self._pending is not None and response.msgid == self._msgid:
                    self._take(response, received_us)
            except ProtocolError as error:
                self._complain(received_us, "%s: %s", self._endpoint, error)

    def _take(self, response: Response, received_us: int) -> None:
        pending, self._pending = self._pending, None
        self._silences, self._trip_us = 0, received_us - self._sent_us
        if pending is Method.HELLO:
            self._greet(response, received_us)
        # Only what a delegator says is the timeline.
        if self._greeted and (now_us := now_of(response.result)) is not None:
            self._heard_us = received_us
            self.clock.exchange(now_us, received_us, step=self.tenant.state is not State.HELD)
        if pending is not None and not isinstance(pending, Method):
            self._settle(pending, response, received_us)

    def _greet(self, response: Response, received_us: int) -> None:
        try:
            hello = check_hello(response.error, response.result, service="delegator")
        except ProtocolError as error:
            self._pass_over(received_us, error)
            return
        if self.tenant.mint is not None and hello.store_id != self.store_id:
            if self.tenant.state is State.HELD or received_us < self._heard_us + PATIENCE_US:
                # There the lease is unknown, or worse, another's: a renewal would be told `lost`.
                self._pass_over(received_us, ProtocolError("it belongs to another cluster"))
                return
            _log.warning(
                "machine %d: nobody of its cluster answers, and its windows have ended; going over to the one at %s",
                self.tenant.mint.machine,
                self._endpoint,
            )
            self.tenant.receive(Refusal(Refused.LOST, "its store is gone"), received_us, -1)
        if self._layout is not None and hello.layout is not None and not hello.layout.same_ids(self._layout):
            theirs, ours = hello.layout, self._layout
            mismatch = LayoutError(
                f"the delegator at {self._endpoint} leases layout {theirs.name} ({theirs}, epoch "
                f"{theirs.epoch.isoformat()}), not {ours.name} ({ours}, epoch {ours.epoch.isoformat()}): "
                "leave the layout and its epoch out to take the delegator's"
            )
            if self.tenant.mint is None:
                raise mismatch
            # With a machine in hand, one wrong endpoint among others is no reason to stop.
            self._pass_over(received_us, mismatch)
            return
        self.store_id = hello.store_id
        self._greeted = True
        self._heard_us = received_us

    def _pass_over(self, now_local_us: int, error: Exception) -> None:
        self._hold_until_us = now_local_us + RETRY_US
        self._complain(now_local_us, "%s is no delegator for us: %s", self._endpoint, error)
        self._connect_next()

    def _settle(self, request: Request, response: Response, received_us: int) -> None:
        if response.error is not None and response.error.code == Code.OTHER_CLUSTER:
            # It came back with another store, and this socket has not noticed: hear who it is now.
            self._greeted = False
        method, _ = lease_call(request)
        answer = lease_answer(method, response.error, response.result)
        if isinstance(request, Release) and isinstance(answer, Released):
            _log.info("gave machine %d back", answer.machine)
        if isinstance(request, Release):
            if isinstance(answer, Refusal) and answer.reason is not Refused.LOST:
                _log.warning("machine %d was not given back: %s", request.machine, answer.message)
            return
        before = self.tenant.mint
        layout = answer.layout if isinstance(answer, Grant) else before.layout if before else None
        now = -1 if layout is None else self.clock.tick(layout)
        self.tenant.receive(answer, received_us, now)
        if isinstance(answer, Refusal):
            self._refused(answer, before, received_us)
        elif isinstance(answer, Grant):
            self._quiet_until_us = 0
            self.refusal = None
            # Not what was said in the greeting: since then the delegator may have come back with another store.
            self.store_id = answer.store_id or self.store_id
            if before is None:
                _log.info("holding machine %d, layout %s", answer.machine, answer.layout.name)
            _log.debug("machine %d: window [%d, %d)", answer.machine, answer.start, answer.end)

    def _refused(self, refusal: Refusal, before: Mint | None, received_us: int) -> None:
        if refusal.reason is Refused.LOST and before is not None:
            _log.warning("lost machine %d: %s", before.machine, refusal.message)
            self._greeted = False
            return
        self.refusal = refusal
        if refusal.reason is not Refused.TOO_EARLY:
            self._complain(received_us, "%s: %s: %s", self._endpoint, refusal.reason, refusal.message)
        if refusal.reason is Refused.UNAVAILABLE and len(self._endpoints) > 1:
            self._connect_next()

    def _follow(self, before: State) -> None:
        mint = self.tenant.mint
        if mint is None or not self.clock.known:
            return
        self.tenant.observe(self.clock.tick(mint.layout), local_us())
        match before, self.tenant.state:
            case State.HELD, State.LAPSED:
                _log.warning("machine %d: the window has run out; no IDs until it is renewed", mint.machine)
            case State.LAPSED, State.HELD:
                _log.info("machine %d: a window is open again", mint.machine)

    def _complain(self, now_local_us: int, message: str, *args: object) -> None:
        if now_local_us >= self._quiet_until_us:
            self._quiet_until_us = now_local_us + QUIET_US
            _log.warning(message, *args)
