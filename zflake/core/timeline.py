"""How a holder follows the cluster's one clock, the timeline, without reading a wall clock.

A holder's time is its local clock, which neither steps nor stops, plus an offset.  Every message from a
delegator carries the timeline's now, stamped when it was sent.  (sent - received) is the offset less the
message's flight, so the largest of the last two seconds' exchanges is the nearest to the truth, and behind
the timeline by no more than one flight.  The midpoint of request and reply (Cristian's rule) may overshoot,
and since a mint never goes back, each overshoot would stay.

The offset steps forward and slews backward.  Nothing that this module says can make a duplicate: windows
and the mint's last tick see to that.

All times are in microseconds: `sent_us` and the result since the Unix epoch, `local_us` and `received_us`
on the local clock.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from zflake.core.layout import Layout

HORIZON_US: Final = 2_000_000
"""How old an exchange may be, against the newest one, to have a say."""
SLEW: Final = 10
"""While the offset is too large, time passes 1/SLEW slower."""


class Estimator:
    """The offset between a local clock and the timeline, as a sequence of exchanges shows it."""

    __slots__ = ("_exchanges", "_offset_us", "_slewed_at_us", "_target_us")

    def __init__(self) -> None:
        self._exchanges: deque[tuple[int, int]] = deque()  # (received_us, offset_us), falling offsets
        self._offset_us: int | None = None
        self._target_us = 0
        self._slewed_at_us = 0

    @property
    def known(self) -> bool:
        """Whether there was an exchange at all; without one there is no time."""
        return self._offset_us is not None

    def exchange(self, sent_us: int, received_us: int, *, step: bool) -> None:
        """Learn that a delegator's now was `sent_us` before the local clock came to `received_us`.

        With `step` the offset takes its new value at once also where that is backward: right while no
        window holds the holder's now, since a holder far ahead of the timeline would else stay out for
        hours.
        """
        offset = sent_us - received_us
        recent = self._exchanges
        while recent and recent[0][0] < received_us - HORIZON_US:
            recent.popleft()
        while recent and recent[-1][1] <= offset:
            recent.pop()  # older and smaller: never again the largest
        recent.append((received_us, offset))
        steady = self._offset_us == self._target_us
        self._target_us = recent[0][1]
        if self._offset_us is None or step or self._target_us >= self._offset_us:
            self._offset_us = self._target_us
        elif steady:
            self._slewed_at_us = received_us

    def now_us(self, local_us: int) -> int:
        """The timeline's now when the local clock shows `local_us`; only after a first `exchange`."""
        offset = self._offset_us
        assert offset is not None
        if offset != self._target_us:
            offset = self._slew(local_us)
        return local_us + offset

    def _slew(self, local_us: int) -> int:
        assert self._offset_us is not None
        passed = max(0, local_us - self._slewed_at_us)
        correction = min(self._offset_us - self._target_us, passed // SLEW)
        # What is too short for a whole microsecond of correction counts at the next call.
        self._slewed_at_us += correction * SLEW
        self._offset_us -= correction
        return self._offset_us


def tick_of(layout: Layout, now_us: int) -> int:
    """The layout's tick at `now_us` (since the Unix epoch), rounded down."""
    return (now_us // 1000 - layout.epoch_ms) // layout.tick_ms


def us_until(layout: Layout, tick: int, now_us: int) -> int:
    """How many microseconds after `now_us` `tick` begins; 0 where it has begun."""
    return max(0, (layout.epoch_ms + tick * layout.tick_ms) * 1000 - now_us)
