"""The timeline in this process: the rules of core/timeline.py with the clocks of this machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import Mark
from zflake.core.timeline import LEAD_US, Carrier, Marks, tick_of
from zflake.holder.clock import local_us

COMPARE_US: Final = 1_000_000

_log = logging.getLogger("zflake.delegator")


def wall_us() -> int:
    """Microseconds since the Unix epoch on this machine's wall clock."""
    return time.time_ns() // 1000


class Timepiece:
    """Tells the timeline's now; `name` is what its marks are written under, `address` goes with them.

    May be used by several threads.
    """

    def __init__(self, carrier: Carrier, layout: Layout, name: str, address: str = "") -> None:
        self._carrier = carrier
        self._lock = threading.Lock()  # guards changes of the carrier; reading it needs none
        self._layout = layout
        self._name = name
        self._address = address
        self._marks = Marks(name)
        self._compare_at_us = 0
        self._warned = False

    def now_us(self) -> int:
        """Microseconds since the Unix epoch."""
        return self._carrier.now_us(local_us())

    def tick(self) -> int:
        """The layout's tick now."""
        return tick_of(self._layout, self.now_us())

    def latest(self) -> int:
        """The latest tick that any clock here shows, the wall clock included."""
        return tick_of(self._layout, max(self.now_us(), wall_us()))

    def mark(self) -> Mark:
        """The mark to write now."""
        return Mark(self._name, self.now_us(), self.lead_us, self._address)

    def follow(self, marks: Sequence[Mark]) -> None:
        """Take in the marks of all delegators, as they stand in the store: the latest that runs leads."""
        moved_us = self._marks.read(marks)
        if moved_us is not None:
            with self._lock:
                self._carrier.raise_to(moved_us, local_us())

    @property
    def marks(self) -> Sequence[Mark]:
        """All delegators' marks as they were last read."""
        return self._marks.latest

    @property
    def lead_us(self) -> int:
        """How far the timeline was ahead of the wall when that was last looked at; negative: behind."""
        return self._carrier.lead_us

    def service(self, now_local_us: int) -> None:
        """Look at the wall clock, every `COMPARE_US`."""
        if now_local_us < self._compare_at_us:
            return
        self._compare_at_us = now_local_us + COMPARE_US
        with self._lock:
            self._carrier.compare(wall_us(), now_local_us)
        ahead = self.lead_us > LEAD_US
        if ahead and not self._warned:
            _log.warning(
                "the timeline is %.0f s ahead of the wall clock, which went back; IDs carry the timeline's time",
                self.lead_us / 1e6,
            )
        self._warned = ahead
