"""A holder's conversation with the delegators about its lease: bytes and time in, bytes, endpoint and time out.

One request is outstanding at a time.  A request without an answer is sent again, with the same token, to the next
endpoint.  Each connection begins with `hello`: a delegator of another cluster knows nothing of this lease, and
would call it lost.  Between lease requests come pings, several a second: each answer carries the timeline's now,
which the holder's clock runs on.

The owner has a socket.  It sends what `poll` gives to `endpoint`, over a new connection whenever `connection` has
changed, and hands each answer to `receive`.  It calls `poll` after every answer, and at `wake_us`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import Answer, Grant, Holder, Refusal, Refused, Release, Released, Request, Token
from zflake.core.lessee import RETRY_US, Lessee, State
from zflake.core.mint import Mint
from zflake.errors import LayoutError, ProtocolError
from zflake.holder.clock import HolderClock
from zflake.wire import fields
from zflake.wire.cluster import check_hello
from zflake.wire.codec import MAX_MSGID, Response, decode_response, encode_request
from zflake.wire.endpoint import Endpoint
from zflake.wire.leases import lease_answer, lease_call
from zflake.wire.methods import Code, Method

PING_US: Final = 250_000
"""Microseconds between pings."""
ABANDON_US: Final = 10_000_000
"""Microseconds without an answer from its own cluster after which a holder whose windows have ended gives up its
lease, if a delegator of another cluster answers."""
MAX_PATIENCE_US: Final = 8_000_000
"""Microseconds that an answer is waited for at most, after silence before."""
RELEASE_RETRY_US: Final = 200_000
"""Microseconds after which a release that was refused is sent again."""
LOG_INTERVAL_US: Final = 10_000_000
"""Microseconds between log lines of one outage."""

STORE_GONE: Final = Refusal(Refused.LOST, "its store is gone")

_log = logging.getLogger("zflake.lease")


class LeaseConversation:
    """A leased machine ID: `mint` mints while a window is open, `clock` says the timeline's now.

    `first` is the index of the endpoint to begin with; `draw_token` and `jitter` are as the `Lessee` wants them.
    A `layout` is insisted on.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        holder: Holder,
        *,
        clock: HolderClock,
        draw_token: Callable[[], Token],
        jitter: Callable[[], float],
        first: int = 0,
        layout: Layout | None = None,
        ping_us: int = PING_US,
    ) -> None:
        self.clock = clock
        self.lessee = Lessee(holder, draw_token=draw_token, jitter=jitter, layout=layout)
        self.refusal: Refusal | None = None
        """The last refusal of the present request; None if there was none, or if a delegator has not answered since."""
        self.connection = 0
        """Number of the connection that `poll` speaks of; one more after each that was given up."""
        self._endpoints = endpoints
        self._turn = first
        self._layout = layout
        self._ping_us = ping_us
        self._release: Release | None = None  # begun and not settled
        self._msgid = 0
        self._pending: Request | Method | None = None
        self._answer_by_us = 0
        self._sent_us = 0
        self._denials = 0  # in a row
        self._silences = 0  # requests in a row that had no answer in time
        self._trip_us = 0  # what the last answer took
        self._greeted = False
        self._greeted_from: str | None = None  # the store of the delegator that was greeted last
        self._heard_us = 0  # when a delegator of the lease's cluster answered last
        self._ping_at_us = 0
        self._hold_until_us = 0
        self._quiet_until_us = 0
        self._followed = self.lessee.state  # as it was at the last poll

    # --- the machine ID, as a `Hold` ---

    @property
    def mint(self) -> Mint | None:
        """The mint of the current tenancy; None while there is none."""
        return self.lessee.mint

    @property
    def is_open(self) -> bool:
        """Whether a window held the timeline's now at the last `poll`."""
        return self.lessee.state is State.HELD

    @property
    def token(self) -> Token:
        """The newest token of the current tenancy; empty before a first grant."""
        return self.lessee.token

    @property
    def store_id(self) -> str | None:
        """The store that the lease is recorded in."""
        # Not what the greeting said, if the grant says it: since then the delegator may have come back with another.
        return self.lessee.store_id or self._greeted_from

    @property
    def state(self) -> str:
        """The name of the lessee's state."""
        return self.lessee.state.name

    def retry_after_ms(self, local_us: int) -> int:
        """Milliseconds that a caller should wait while no window is open: 50 to 1,000."""
        return max(50, min(1000, (self.wake_us - local_us) // 1000))

    # --- the owner's side ---

    @property
    def endpoint(self) -> Endpoint:
        """The delegator that is being asked."""
        return self._endpoints[self._turn]

    @property
    def wake_us(self) -> int:
        """When `poll` is due though no answer came (local clock)."""
        if self._pending is not None:
            return self._answer_by_us
        if self._release is not None:
            return self._hold_until_us
        return max(min(self.lessee.send_at_us, self._ping_at_us), self._hold_until_us)

    @property
    def releasing(self) -> bool:
        """Whether the machine ID is still being given back."""
        return self._release is not None

    def poll(self, local_us: int) -> bytes | None:
        """The request to send now, if one is due."""
        if self._pending is not None and local_us >= self._answer_by_us:
            self.refusal = None
            self._silences += 1
            self.complain(local_us, "%s does not answer", self.endpoint)
            self._go_on()
        self._follow(local_us)
        if self._pending is not None or local_us < self._hold_until_us:
            return None
        if self._release is not None:
            return self._ask(self._release, local_us)
        if self.lessee.state is State.RELEASED:
            return None
        if not self._greeted:
            return self._ask(Method.HELLO, local_us)
        if request := self.lessee.poll(local_us):
            return self._ask(request, local_us)
        if local_us >= self._ping_at_us:
            return self._ask(Method.PING, local_us)
        return None

    def receive(self, body: bytes, local_us: int) -> None:
        """Take in an answer that came over the current connection.

        Raises `LayoutError` if the delegator's layout is not the one that this holder was told to use.
        """
        try:
            response = decode_response(body)
            if self._pending is not None and response.msgid == self._msgid:
                self._take(response, local_us)
        except ProtocolError as error:
            self.complain(local_us, "%s: %s", self.endpoint, error)

    def refuse(self, why: str, local_us: int) -> None:
        """Note that the delegator refuses this holder's key, and ask the next one."""
        self.complain(local_us, "the delegator at %s refuses this key: %s", self.endpoint, why)
        self.refusal = Refusal(Refused.DENIED, f"{self.endpoint}: {why}")
        self._denials += 1
        if self.denied:
            self._hold_until_us = local_us + RETRY_US
        self._go_on()

    @property
    def denied(self) -> bool:
        """Whether every delegator refuses this holder's key."""
        return self._denials >= len(self._endpoints)

    def release(self) -> Release | None:
        """Stop minting for good; `poll` gives the machine ID back from now on, while `releasing`.

        If no delegator answers in time, the lease runs out by itself.
        """
        self._release = self.lessee.close()
        self._pending = self.refusal = None
        self._hold_until_us = 0
        return self._release

    # --- inside ---

    def _go_on(self) -> None:
        """Give the connection up, and ask the next endpoint."""
        self._turn = (self._turn + 1) % len(self._endpoints)
        self.connection += 1
        self._pending = None
        self._greeted = False

    def _ask(self, what: Request | Method, local_us: int) -> bytes:
        method, params = (what, []) if isinstance(what, Method) else lease_call(what)
        self._msgid = (self._msgid + 1) & MAX_MSGID
        self._pending = what
        self._sent_us = local_us
        self._answer_by_us = local_us + self._patience_us()
        self._ping_at_us = local_us + self._ping_us
        return encode_request(self._msgid, method, params)

    def _patience_us(self) -> int:
        """Microseconds to wait for an answer.

        A short ttl leaves little time, and a connection takes several trips to make.  So a holder that has heard
        nothing from any endpoint waits twice as long at the next ones, and never less than the last trip took.
        """
        doubled = self.lessee.retry_us << min(8, self._silences // len(self._endpoints))
        return min(max(doubled, 3 * self._trip_us), MAX_PATIENCE_US)

    def _take(self, response: Response, local_us: int) -> None:
        pending, self._pending = self._pending, None
        self._silences, self._trip_us = 0, local_us - self._sent_us
        if response.error is not None and response.error.code == Code.DENIED:
            self.refuse(response.error.message, local_us)
            return
        self._denials = 0
        if pending is Method.HELLO:
            self._greet(response, local_us)
        # Only a delegator's word is the timeline.
        if self._greeted and (timeline_us := fields.timeline_us(response.result)) is not None:
            self._heard_us = local_us
            self.clock.exchange(timeline_us, local_us, step=not self.is_open)
        if pending is not None and not isinstance(pending, Method):
            self._settle(pending, response, local_us)

    def _greet(self, response: Response, local_us: int) -> None:
        try:
            hello = check_hello(response.error, response.result, service="delegator")
        except ProtocolError as error:
            self._pass_over(local_us, error)
            return
        if self.mint is not None and hello.store_id != self.store_id:
            if self.is_open or local_us < self._heard_us + ABANDON_US:
                # The lease is unknown there, or worse, another's: a renewal would be told `lost`.
                self._pass_over(local_us, ProtocolError("it belongs to another cluster"))
                return
            _log.warning(
                "machine %d: no delegator of its cluster answers, and its windows have ended; going over to the one at %s",
                self.mint.machine,
                self.endpoint,
            )
            self.lessee.receive(STORE_GONE, local_us, -1)
        if self._layout is not None and hello.layout is not None and not hello.layout.same_ids(self._layout):
            theirs, ours = hello.layout, self._layout
            mismatch = LayoutError(
                f"the delegator at {self.endpoint} leases layout {theirs.name} ({theirs}, epoch "
                f"{theirs.epoch.isoformat()}), not {ours.name} ({ours}, epoch {ours.epoch.isoformat()}): "
                "leave the layout and its epoch out to take the delegator's"
            )
            if self.mint is None:
                raise mismatch
            # With a machine in hand, one wrong endpoint among others is no reason to stop.
            self._pass_over(local_us, mismatch)
            return
        self._greeted_from = hello.store_id
        self._greeted = True
        self._heard_us = local_us

    def _pass_over(self, local_us: int, error: Exception) -> None:
        self._hold_until_us = local_us + RETRY_US
        self.complain(local_us, "rejected delegator %s: %s", self.endpoint, error)
        self._go_on()

    def _settle(self, request: Request, response: Response, local_us: int) -> None:
        if response.error is not None and response.error.code == Code.OTHER_CLUSTER:
            # It came back with another store, and this connection has not noticed: ask anew who it is.
            self._greeted = False
        method, _ = lease_call(request)
        answer = lease_answer(method, response.error, response.result)
        if isinstance(request, Release):
            self._end_release(answer, local_us)
            return
        before = self.mint
        now = self.clock.tick(answer.layout) if isinstance(answer, Grant) else -1
        self.lessee.receive(answer, local_us, now)
        if isinstance(answer, Refusal):
            self._refused(answer, before, local_us)
        elif isinstance(answer, Grant):
            self._quiet_until_us = 0
            self.refusal = None
            if before is None:
                _log.info("holding machine %d, layout %s", answer.machine, answer.layout.name)
            _log.debug("machine %d: window [%d, %d)", answer.machine, answer.start, answer.end)

    def _end_release(self, answer: Answer, local_us: int) -> None:
        if isinstance(answer, Refusal) and answer.reason is not Refused.LOST:
            # The store did not settle it: it may do so, or another delegator may, in the time that is left.
            self.refusal = answer
            self._hold_until_us = local_us + RELEASE_RETRY_US
            self._go_on()
            return
        self._release = self.refusal = None
        if isinstance(answer, Released):
            _log.info("gave machine %d back", answer.machine)

    def _refused(self, refusal: Refusal, before: Mint | None, local_us: int) -> None:
        if refusal.reason is Refused.LOST and before is not None:
            _log.warning("lost machine %d: %s", before.machine, refusal.message)
            self._greeted = False
            return
        self.refusal = refusal
        if refusal.reason is not Refused.TOO_EARLY:
            self.complain(local_us, "%s: %s: %s", self.endpoint, refusal.reason, refusal.message)
        if refusal.reason is Refused.UNAVAILABLE and len(self._endpoints) > 1:
            self._go_on()

    def _follow(self, local_us: int) -> None:
        mint, before = self.mint, self._followed
        if mint is not None and self.clock.known:
            self.lessee.observe(self.clock.tick(mint.layout), local_us)
            match before, self.lessee.state:
                case State.HELD, State.LAPSED:
                    _log.warning(
                        "machine %d: the window has run out; no IDs until it is renewed", mint.machine
                    )
                case State.LAPSED, State.HELD:
                    _log.info("machine %d: a window is open again", mint.machine)
        self._followed = self.lessee.state

    def complain(self, local_us: int, message: str, *args: object) -> None:
        """Log what goes wrong, once in a while."""
        if local_us >= self._quiet_until_us:
            self._quiet_until_us = local_us + LOG_INTERVAL_US
            _log.warning(message, *args)
