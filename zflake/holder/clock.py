"""A holder's clock: a local clock that never steps, and the offset to the timeline."""

from __future__ import annotations

from collections.abc import Callable

from zflake.core.layout import Layout
from zflake.core.timeline import Estimator, tick_of


class HolderClock:
    """The timeline's now, as the messages of delegators show it; `local_us` reads the local clock."""

    __slots__ = ("_estimator", "_local_us")

    def __init__(self, local_us: Callable[[], int]) -> None:
        self._estimator = Estimator()
        self._local_us = local_us

    @property
    def known(self) -> bool:
        """Whether there is a now at all."""
        return self._estimator.known

    def exchange(self, sent_us: int, received_us: int, *, step: bool) -> None:
        """Learn from one message of a delegator's; see `Estimator.exchange`."""
        self._estimator.exchange(sent_us, received_us, step=step)

    def timeline_us(self) -> int | None:
        """Microseconds since the Unix epoch; None while the clock is not `known`."""
        estimator = self._estimator
        return estimator.timeline_us(self._local_us()) if estimator.known else None

    def tick(self, layout: Layout) -> int:
        """The layout's tick now; -1, which no window holds, while the clock is not `known`."""
        timeline_us = self.timeline_us()
        return -1 if timeline_us is None else tick_of(layout, timeline_us)
