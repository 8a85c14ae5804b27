"""A holder's clock: a local clock that never steps, and the offset to the timeline."""

from __future__ import annotations

import time
from typing import Final

from zflake.core.layout import Layout
from zflake.core.timeline import Estimator, tick_of

# CLOCK_BOOTTIME goes on while the machine sleeps; where there is none, the monotonic clock is the best.
_LOCAL: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def local_us() -> int:
    """Microseconds on a clock that neither steps nor stops; its origin means nothing."""
    return time.clock_gettime_ns(_LOCAL) // 1000


class Clock:
    """The timeline's now, in microseconds since the Unix epoch and in ticks."""

    __slots__ = ("_estimator",)

    def __init__(self) -> None:
        self._estimator = Estimator()

    @property
    def known(self) -> bool:
        """Whether there is a now at all."""
        return self._estimator.known

    def exchange(self, sent_us: int, received_us: int, *, step: bool) -> None:
        """Learn from one message of a delegator's; see `Estimator.exchange`."""
        self._estimator.exchange(sent_us, received_us, step=step)

    def now_us(self) -> int | None:
        """Microseconds since the Unix epoch; None while the clock is not `known`."""
        estimator = self._estimator
        return estimator.now_us(local_us()) if estimator.known else None

    def tick(self, layout: Layout) -> int:
        """The layout's tick now; -1, which no window holds, while the clock is not `known`."""
        now_us = self.now_us()
        return -1 if now_us is None else tick_of(layout, now_us)
