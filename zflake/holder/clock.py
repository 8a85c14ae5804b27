"""A holder's clock: a local clock that never steps, and the offset to the timeline."""

from __future__ import annotations

from collections.abc import Callable

from zflake.core.layout import Layout
from zflake.core.timeline import Estimator, tick_of


class HolderClock(Estimator):
    """The timeline's now, as the messages of delegators show it; `local_us` reads the local clock."""

    __slots__ = ("_local_us",)

    def __init__(self, local_us: Callable[[], int]) -> None:
        super().__init__()
        self._local_us = local_us

    def timeline_us(self) -> int | None:
        """Microseconds since the Unix epoch; None while the clock is not `known`."""
        return self.at(self._local_us()) if self.known else None

    def tick(self, layout: Layout) -> int:
        """The layout's tick now; -1, which no window holds, while the clock is not `known`."""
        timeline_us = self.timeline_us()
        return -1 if timeline_us is None else tick_of(layout, timeline_us)
