"""The timeline in this process: the rules of core/timeline.py with the clocks and the store that are handed in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.lease import Mark
from zflake.core.timeline import LEAD_US, MAX_BACK_US, Marks, Timeline, cold_start_us, tick_of
from zflake.errors import ConfigError
from zflake.stores.contract import Store

COMPARE_US: Final = 1_000_000
"""Microseconds between looks at the wall clock."""
LISTEN_S: Final = 3.0
"""Seconds without a move of any mark after which no delegator runs: one that does moves its mark every second."""
LISTEN_STEPS: Final = 60
"""Looks in that time; a delegator that joins is behind by the time between two, and a round trip, at most."""

_log = logging.getLogger("zflake.delegator")


def listen(store: Store, own: str, sleep: Callable[[float], object] = time.sleep) -> int | None:
    """The now of the delegators that run on this store already; None if no mark moves for `LISTEN_S`.

    `own` is the name of this delegator's own mark.
    """
    if store.exclusive:
        return None
    marks = Marks(own)
    marks.read(store.marks())
    quiet = 0
    while quiet < LISTEN_STEPS:
        sleep(LISTEN_S / LISTEN_STEPS)
        quiet = quiet + 1 if marks.read(store.marks()) is None else 0
        if marks.running_us is not None:
            return marks.running_us
    return None


def begin_timeline(
    store: Store,
    name: str,
    *,
    accept_clock: bool,
    local_us: Callable[[], int] = clock.local_us,
    wall_us: Callable[[], int] = clock.wall_us,
    sleep: Callable[[float], object] = time.sleep,
) -> Timeline:
    """The timeline at the start of the delegator whose marks are written under `name`.

    If other delegators run, theirs is joined, whatever this wall clock shows.  Otherwise it begins at the later of
    wall clock and marks; with `accept_clock` at the wall clock, whatever the marks say.

    Raises `ConfigError` if the wall clock can't be right, or is to be accepted while other delegators run.
    """
    running_us = listen(store, name, sleep)
    # The clocks are read after the marks: what the store takes to give them would be added otherwise.
    marks_us = [mark.timeline_us for mark in store.marks()]
    if running_us is not None:
        if accept_clock:
            raise ConfigError("--accept-clock: other delegators are running on this store; stop them first")
        # Any later mark counts, too; but one that is far ahead is of a clock that was wrong.
        later = (mark_us for mark_us in marks_us if mark_us < running_us + MAX_BACK_US)
        return Timeline(max([running_us, *later]), local_us())
    if accept_clock:
        _log.warning("--accept-clock: the timeline begins at the wall clock, whatever it was before")
        return Timeline(wall_us(), local_us())
    return Timeline(cold_start_us(wall_us(), marks_us), local_us())


class DelegatorClock:
    """Tells the timeline's now; marks are written under `name`, and `address` goes with them.

    `local_us` and `wall_us` read this machine's clocks.  May be used by several threads.
    """

    def __init__(
        self,
        timeline: Timeline,
        layout: Layout,
        name: str,
        address: str = "",
        *,
        local_us: Callable[[], int] = clock.local_us,
        wall_us: Callable[[], int] = clock.wall_us,
    ) -> None:
        self._timeline = timeline
        self._lock = threading.Lock()  # guards changes of the timeline; reading it needs none
        self._layout = layout
        self._name = name
        self.address = address
        """Where this delegator can be reached."""
        self.local_us = local_us
        """Reads the local clock."""
        self._wall_us = wall_us
        self.marks = Marks(name)
        """All delegators' marks."""
        self._compare_at_us = 0
        self._warned = False

    def timeline_us(self) -> int:
        """The timeline's now, in microseconds since the Unix epoch."""
        return self._timeline.at(self.local_us())

    def tick(self) -> int:
        """The layout's tick now."""
        return tick_of(self._layout, self.timeline_us())

    def latest(self) -> int:
        """The latest tick that any clock here shows, the wall clock included."""
        return tick_of(self._layout, max(self.timeline_us(), self._wall_us()))

    def mark(self) -> Mark:
        """The mark to write now."""
        return Mark(self._name, self.timeline_us(), self.lead_us, self.address)

    def follow(self, marks: Sequence[Mark]) -> None:
        """Take in the marks of all delegators, as the store holds them: the latest that moved leads."""
        moved_us = self.marks.read(marks)
        if moved_us is not None:
            with self._lock:
                self._timeline.raise_to(moved_us, self.local_us())

    @property
    def lead_us(self) -> int:
        """Microseconds that the timeline was ahead of the wall at the last look; negative: behind."""
        return self._timeline.lead_us

    def service(self, local_us: int) -> None:
        """Look at the wall clock, every `COMPARE_US`."""
        if local_us < self._compare_at_us:
            return
        self._compare_at_us = local_us + COMPARE_US
        with self._lock:
            self._timeline.compare(self._wall_us(), local_us)
        ahead = self.lead_us > LEAD_US
        if ahead and not self._warned:
            _log.warning(
                "the timeline is %.0f s ahead of the wall clock, which went back; IDs carry the timeline's time",
                self.lead_us / 1e6,
            )
        self._warned = ahead
