"""The cluster's one clock, the timeline: how a delegator carries it, and how a holder follows it.

Only a cold start, when no other delegator runs, sets the timeline by the wall clock.  From then on the delegator's
local clock, which neither steps nor stops, moves it: never stepped, never sped up, slowed a little while it is ahead
of the wall.  A delegator marks in the store how much of the timeline it has used, so that the timeline goes on there
after a restart, and others may follow: a mark that keeps moving is a delegator that runs, and the latest of them is
the timeline.

A holder never reads a wall clock.  Its time is its local clock plus an offset.  Every answer of a delegator that
is no error carries the timeline's now, stamped when it was sent.  (sent - received) is the offset less the
message's flight, so the largest of the last two seconds' exchanges is the nearest to the truth, and behind the
timeline by no more than one flight.  The midpoint of request and reply (Cristian's rule) may overshoot, and since
a mint never goes back, each overshoot would stay.

The offset steps forward and slews backward.  Nothing that this module says can make a duplicate: windows
and the mint's last tick see to that.

Three clocks, all in microseconds: `timeline_us` and `wall_us` count from the Unix epoch, `local_us` from anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import Mark
from zflake.errors import ConfigError

HORIZON_US: Final = 2_000_000
"""Microseconds that an exchange counts for, before the newest one."""
SLEW: Final = 10
"""Divisor of the rate at which time passes slower while the offset is too large."""
MAX_SLEEP_US: Final = 366 * 86_400 * 1_000_000
"""Microseconds past the last mark from which a cold start's wall clock looks wrong."""
MAX_BACK_US: Final = 3_600 * 1_000_000
"""Microseconds before the last mark from which it looks wrong, too."""
DRAG: Final = 10_000
"""Divisor of the rate (100 ppm) at which the timeline passes slower while it is ahead of the wall."""
PROOF: Final = 2
"""Moves of a mark that prove a running delegator."""
LEAD_US: Final = 10_000_000
"""Microseconds ahead of the wall from which the timeline's lead is worth a warning."""


def cold_start_us(wall_us: int, marks_us: Sequence[int]) -> int:
    """The beginning of the timeline when a delegator starts and no other is running.

    Raises `ConfigError` if the wall clock can't be right, judged by the marks.
    """
    mark_us = max(marks_us, default=wall_us)
    off_us = wall_us - mark_us
    if -MAX_BACK_US <= off_us <= MAX_SLEEP_US:
        return max(wall_us, mark_us)
    raise ConfigError(
        f"the wall clock is {abs(off_us) // 1_000_000:,} s {'past' if off_us > 0 else 'before'} the last time "
        "that this store knows of; set the clock, or say --accept-clock once if the clock is right"
    )


class Marks:
    """The marks of the other delegators, to tell those that run from those that have gone."""

    __slots__ = ("_moves", "_own", "latest")

    def __init__(self, own: str) -> None:
        self._own = own
        self._moves: dict[str, tuple[int, int]] = {}  # by delegator, its mark and how often that has moved
        self.latest: Sequence[Mark] = ()
        """All marks as they were last read, the own one included."""

    def read(self, marks: Sequence[Mark]) -> int | None:
        """Take the marks in; gives the latest of those that moved since they were last read, None if none did."""
        moved = []
        moves = {}
        for mark in marks:
            before_us, times = self._moves.get(mark.delegator, (mark.timeline_us, 0))
            if mark.timeline_us != before_us and mark.delegator != self._own:
                moved.append(mark.timeline_us)
                times += 1
            moves[mark.delegator] = mark.timeline_us, times
        self._moves = moves
        self.latest = marks
        return max(moved, default=None)

    @property
    def running_us(self) -> int | None:
        """The latest mark of the delegators that certainly run; None if none does.

        A mark that moves once may be the late write of a delegator that has died: a store that was slow, or a
        reader that was stopped between two looks, shows it as a move of this moment, however old it is.  One
        that moves again has a delegator behind it.
        """
        return max((mark_us for mark_us, times in self._moves.values() if times >= PROOF), default=None)


class Timeline:
    """The timeline in the hands of a delegator, from `start_us` on.

    May be read by one thread while another one compares or raises.
    """

    __slots__ = ("_base", "lead_us")

    def __init__(self, start_us: int, local_us: int) -> None:
        # (timeline, local clock, whether it drags), replaced as a whole: a reader sees all of it or none.
        self._base = (start_us, local_us, False)
        self.lead_us = 0
        """Microseconds that the timeline was ahead of the wall at the last comparison; negative: behind."""

    def at(self, local_us: int) -> int:
        """The timeline's now when the local clock shows `local_us`."""
        base_us, base_local_us, dragging = self._base
        passed_us = max(0, local_us - base_local_us)
        return base_us + passed_us - (passed_us // DRAG if dragging else 0)

    def raise_to(self, timeline_us: int, local_us: int) -> None:
        """Go on from `timeline_us`, another delegator's now, if that is later."""
        if timeline_us > self.at(local_us):
            self._base = (timeline_us, local_us, self._base[2])

    def compare(self, wall_us: int, local_us: int) -> None:
        """Look at the wall clock, to be slower while ahead of it.  Nothing steps."""
        timeline_us = self.at(local_us)
        self.lead_us = timeline_us - wall_us
        self._base = (timeline_us, local_us, self.lead_us > 0)


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
        """Learn that the timeline showed `sent_us` before the local clock came to `received_us`.

        With `step` the offset takes its new value at once even if that is backward: right while no window holds
        the holder's now, since a holder far ahead of the timeline would stay out for hours otherwise.
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

    def at(self, local_us: int) -> int:
        """The timeline's now when the local clock shows `local_us`; only after a first `exchange`."""
        offset_us = self._offset_us
        assert offset_us is not None
        if offset_us != self._target_us:
            passed_us = max(0, local_us - self._slewed_at_us)
            correction_us = min(offset_us - self._target_us, passed_us // SLEW)
            # A time too short for a whole microsecond of correction counts at the next call.
            self._slewed_at_us += correction_us * SLEW
            offset_us -= correction_us
            self._offset_us = offset_us
        return local_us + offset_us


def tick_of(layout: Layout, timeline_us: int) -> int:
    """The layout's tick at `timeline_us`, rounded down."""
    return (timeline_us - layout.epoch_us) // layout.tick_us


def us_until(layout: Layout, tick: int, timeline_us: int) -> int:
    """Microseconds from `timeline_us` until `tick` begins; 0 if it has begun."""
    return max(0, layout.epoch_us + tick * layout.tick_us - timeline_us)
