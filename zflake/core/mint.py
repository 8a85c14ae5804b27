"""The mint: IDs out of the windows of one tenancy.

Three rules make its IDs unique, whatever the clock does:

1. (tick, sequence) strictly increases, from the first ID to the last.
2. Every tick it mints in lies in a window that was granted to it.
3. State advances before an ID is handed out.

The clock's tick, an argument, chooses where in the windows to mint.  A clock that goes back makes the mint
stay in its last tick until that is full; one that leaps ahead skips ticks.  Neither repeats anything.

The generators hold the same rules without a lock, a tick at a time (`core/ticks.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

from zflake.core.layout import Layout
from zflake.errors import LayoutError

Run: TypeAlias = tuple[int, int, int]
"""`(first, step, count)`: the IDs first, first + step, ... of one tick, `count` of them."""
Window: TypeAlias = tuple[int, int]
"""The half-open range `[start, end)` of ticks."""


def first_open(windows: Iterable[Window], now: int) -> int | None:
    """The first tick, `now` or later, that one of the windows (in order) holds; None if none does.

    By rule 2 the holder may mint in `now` exactly if the answer is `now`.
    """
    for start, end in windows:
        if now < end:
            return start if now < start else now  # noqa: FURB136  (max() takes as long as all the rest)
    return None


class Mint:
    """The sequence machine of one machine ID in one tenancy.

    Ticks count from the layout's epoch.  Not thread-safe: its owner serialises the calls.

    Raises `LayoutError` if the layout has no such machine.
    """

    __slots__ = (
        "_full",
        "_machine_bits",
        "_sequence",
        "_sequence_shift",
        "_tick",
        "_time_shift",
        "_windows",
        "end",
        "layout",
        "machine",
    )

    def __init__(self, layout: Layout, machine: int) -> None:
        self.layout = layout
        self.machine = layout.check_machine(machine)
        self._machine_bits = machine << layout.machine_shift
        self._time_shift = layout.time_shift
        self._sequence_shift = layout.sequence_shift
        self._full = layout.ids_per_tick
        self._windows: deque[Window] = deque()
        self.end = 0
        """The exclusive end of the last window, 0 before the first."""
        self._tick = -1  # the last tick minted in
        self._sequence = self._full  # the next free sequence number in it

    def grant(self, start: int, end: int) -> None:
        """Add the window `[start, end)`, which must lie after all earlier ones and inside the layout.

        Raises `LayoutError` if it does not: to mint in it could repeat IDs.
        """
        if not self.end <= start < end <= self.layout.end_tick:
            raise LayoutError(
                f"window [{start}, {end}) on machine {self.machine} is empty, overlaps an earlier one "
                f"(which ended at {self.end}) or leaves the layout (which ends at {self.layout.end_tick})"
            )
        self.end = end
        if self._windows and self._windows[-1][1] == start:
            start = self._windows.pop()[0]
        self._windows.append((start, end))

    def take(self, now: int, count: int) -> Run | None:
        """Mint up to `count` IDs (at least 1) at tick `now`: one run, inside one tick.

        None when nothing can be minted at `now`; `opens` then says when it can.  Raises `LayoutError` if
        `count` is less than 1.
        """
        if now > self._tick:
            windows = self._windows
            while windows and windows[0][1] <= now:
                windows.popleft()
            if first_open(windows, now) != now:
                return None
            self._tick = tick = now
            sequence = 0
        else:
            # The same tick again, or the clock went back: the tick was inside a window when it began.
            tick = self._tick
            sequence = self._sequence
        minted = self._full - sequence
        if minted == 0:
            return None
        if count < minted:
            if count < 1:
                raise LayoutError(f"can't mint {count} IDs")
            minted = count
        self._sequence = sequence + minted
        first = tick << self._time_shift | self._machine_bits | sequence << self._sequence_shift
        return first, 1 << self._sequence_shift, minted

    def opens(self, now: int) -> int | None:
        """The first tick, `now` or later, at which `take` gives IDs; None if no window is left."""
        if now <= self._tick:
            if self._sequence < self._full:
                return now
            now = self._tick + 1
        return first_open(self._windows, now)

    def covers(self, now: int) -> bool:
        """Whether tick `now` lies inside a window."""
        return first_open(self._windows, now) == now

    def spend(self, tick: int) -> None:
        """Count all ticks up to `tick` as minted in to the full, by another mint of this tenancy's windows."""
        if tick > self._tick:
            self._tick = tick
            self._sequence = self._full

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that are left, in order, none of them adjacent to the next."""
        return tuple(self._windows)

    @property
    def last(self) -> int | None:
        """The last tick minted in, None if nothing was minted."""
        return None if self._tick < 0 else self._tick

    def close(self) -> int | None:
        """Mint nothing any more; gives `last`, the bound that a release states."""
        self._windows.clear()
        self._sequence = self._full
        self.end = self.layout.end_tick  # no window fits behind it
        return self.last
