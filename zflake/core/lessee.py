"""The lessee: how a holder takes a lease, keeps it, and gives it back.

              GRANT                LAPSE
  ACQUIRING ---------> HELD <==============> LAPSED        CLOSE (from anywhere)
      ^                 |        GRANT         |           ---------------------> RELEASED
      +-----------------+----------------------+
                      LOST

Three rules:

1. A token is drawn once for each thing wanted and kept through every retry, on every endpoint, until a
   grant or `lost` answers it.  Anything else (a time-out, `too_early`, `unavailable`) is no answer.
2. A grant counts only if its token is the one that was drawn.  Any other is dropped, never released:
   it runs out by itself.
3. A lessee that lapses renews; it acquires only when told `lost`.  Were a late window a reason to acquire,
   a slow network would burn every machine ID there is.

The lessee does no I/O.  Its owner sends what `poll` gives, hands it the answers, and mints from `mint`.
Time is handed in: `local_us` on a clock that never steps (microseconds), and the timeline's tick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Holder,
    Refusal,
    Refused,
    Release,
    Renew,
    Request,
    Token,
)
from zflake.core.mint import Mint
from zflake.errors import ProtocolError

RETRY_US: Final = 1_000_000
"""Microseconds before an unanswered request is sent again, to the next endpoint; fewer if a short ttl leaves
less time."""
LAPSED_US: Final = 200_000
"""Microseconds over which lessees spread their renewals if the timeline has left all of them behind at once."""
MAX_HINT_US: Final = 2_000_000
"""Microseconds that a refusal can keep a lessee waiting that can't mint: a machine may be given back, a lease lost,
a floor lowered long before the delegator expected it."""


class State(Enum):
    """The state of a tenancy."""

    ACQUIRING = auto()
    """No machine ID yet, or none any more."""
    HELD = auto()
    """A window holds the timeline's now: the mint mints."""
    LAPSED = auto()
    """A machine ID, but no window that holds now: renewing."""
    RELEASED = auto()
    """Closed for good."""


class Event(Enum):
    """The events that move a tenancy."""

    GRANT = auto()
    LAPSE = auto()
    LOST = auto()
    CLOSE = auto()


_WITH_MACHINE: Final = {
    Event.GRANT: State.HELD,
    Event.LAPSE: State.LAPSED,
    Event.LOST: State.ACQUIRING,
    Event.CLOSE: State.RELEASED,
}
TRANSITIONS: Final[Mapping[State, Mapping[Event, State]]] = {
    State.ACQUIRING: {Event.GRANT: State.HELD, Event.LOST: State.ACQUIRING, Event.CLOSE: State.RELEASED},
    State.HELD: _WITH_MACHINE,
    State.LAPSED: _WITH_MACHINE,
    State.RELEASED: {},
}


class Lessee:
    """One holder's side of the lease protocol.

    `draw_token` gives 16 random bytes, `jitter` a number in [0, 1) that spreads the renewals of holders
    that started together.  A `layout` that the owner insists on is checked against each grant.
    """

    def __init__(
        self,
        holder: Holder,
        *,
        draw_token: Callable[[], Token],
        jitter: Callable[[], float],
        layout: Layout | None = None,
    ) -> None:
        self.state = State.ACQUIRING
        self.token: Token = b""
        """The token in the record of the current tenancy, as far as is known; empty before a first grant."""
        self.store_id: str | None = None
        """The store of the current tenancy's record, as the grants say; None if they don't, or without a tenancy."""
        self.send_at_us = 0
        """When `poll` will have something to send (local clock)."""
        self.retry_us = RETRY_US
        """Microseconds before an unanswered request is sent again."""
        self.mint: Mint | None = None
        """The current tenancy's mint; another object after every loss."""
        self._holder = holder
        self._draw_token = draw_token
        self._jitter = jitter
        self._layout = layout
        self._gen = 0
        self._next: Token | None = None  # drawn and not settled
        self._third_us = MAX_HINT_US  # of the ttl

    def poll(self, local_us: int) -> Request | None:
        """The request that is due now, if one is.

        Until something settles it, it is due again after `RETRY_US` at the latest; the owner sends each
        repeat to the next of its endpoints.
        """
        if self.state is State.RELEASED or local_us < self.send_at_us:
            return None
        self.send_at_us = local_us + self.retry_us
        if self._next is None:
            self._next = self._draw_token()
        if self.mint is None:
            return Acquire(self._next, self._holder)
        return Renew(self.mint.machine, self.token, self._gen, self._next, self.mint.end, self.store_id)

    def receive(self, answer: Answer, local_us: int, now: int) -> bool:
        """Take an answer of the delegator's in; `now` is the timeline's tick, which matters for a grant only.

        True if it settled the outstanding request.  A refusal must be the answer to the newest request
        sent; a grant is known by its token, whichever repeat it answers.

        Raises `ProtocolError` for a grant that no sound delegator gives (an overlapping window, another
        layout): the tenancy is given up, and the next `poll` acquires afresh.
        """
        if self.state is State.RELEASED:
            return False
        if isinstance(answer, Grant):
            if answer.token != self._next:
                return False
            self._accept(answer, local_us, now)
            return True
        if isinstance(answer, Refusal):
            if answer.reason is Refused.LOST and self.mint is not None:
                self._forget(local_us)
                return True
            if answer.retry_after_ms is not None:
                most_us = self._third_us if self.state is State.HELD else MAX_HINT_US
                wait_us = min(answer.retry_after_ms * 1000, int(most_us * (0.5 + self._jitter())))
                self.send_at_us = local_us + wait_us
        return False

    def observe(self, now: int, local_us: int) -> None:
        """Follow the timeline: HELD while a window holds `now`, LAPSED otherwise.

        A lessee that lapses without having asked for the next window (the timeline went forward) asks at once.
        """
        if self.mint is None or self.state is State.RELEASED:
            return
        lapsed = not self.mint.covers(now)
        if lapsed and self.state is State.HELD and self._next is None:
            self.send_at_us = min(self.send_at_us, local_us + int(LAPSED_US * self._jitter()))
        self._move(Event.LAPSE if lapsed else Event.GRANT)

    def close(self) -> Release | None:
        """Stop minting for good; gives the release to send, or None if nothing is held."""
        if self.state is State.RELEASED:
            return None
        self._move(Event.CLOSE)
        if self.mint is None:
            return None
        return Release(self.mint.machine, self.token, self._next, self.mint.close())

    def _accept(self, grant: Grant, local_us: int, now: int) -> None:
        try:
            self._check(grant)
            if self.mint is None:
                self.mint = Mint(grant.layout, grant.machine)
            self.mint.grant(grant.start, grant.end)
        except ValueError as error:
            self._forget(local_us + RETRY_US)
            raise ProtocolError(f"dropped the grant of machine {grant.machine}: {error}") from error
        self.token, self._gen, self._next = grant.token, grant.gen, None
        self.store_id = grant.store_id or None
        third_us = self._third_us = grant.ttl * grant.layout.tick_ms * 1000 // 3
        self.retry_us = min(RETRY_US, third_us // 2)
        if grant.end > now:
            self.send_at_us = local_us + int(third_us * (0.9 + 0.2 * self._jitter()))
        else:
            self.send_at_us = local_us + int(RETRY_US * (0.5 + self._jitter()))
        self._move(Event.GRANT)
        if not self.mint.covers(now):
            self._move(Event.LAPSE)

    def _check(self, grant: Grant) -> None:
        if self._layout is not None and not self._layout.same_ids(grant.layout):
            raise ValueError(
                f"its layout is {grant.layout} since {grant.layout.epoch_ms} ms, "
                f"this holder was told {self._layout} since {self._layout.epoch_ms} ms"
            )
        if self.mint is not None and (
            grant.machine != self.mint.machine or not grant.layout.same_ids(self.mint.layout)
        ):
            raise ValueError("a renewal may not change machine or layout")

    def _forget(self, send_at_us: int) -> None:
        if self.mint is not None:
            self.mint.close()
        self.mint = self.store_id = None
        self._next = None
        self.send_at_us = send_at_us
        self._move(Event.LOST)

    def _move(self, event: Event) -> None:
        # A missing key is an error in this module: no peer can cause one.
        self.state = TRANSITIONS[self.state][event]
