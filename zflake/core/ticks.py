"""The ticks of one tenancy, shared by threads, and by signal handlers that interrupt them anywhere.

Three rules:

1. A tick is begun as a whole, once, by the first that comes.  Its IDs are then taken one by one from a range
   iterator, which gives each number to one caller only: that is one step of the interpreter.
2. Before an ID of a later tick is taken, the iterator of the earlier one is exhausted for good.  So a
   thread that was held up with it in hand can neither repeat an ID nor break the order.
3. `last` is the last tick begun.  It covers all that could still come out of any iterator.

There is no lock, since a signal handler would wait for ever for one that its own thread holds.  The ticks
form a chain, in which each names the one that follows it.  A caller that begins a tick makes it, and hangs it
onto the end by `dict.setdefault`, which only one can do; the others find it there, and go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from zflake.core.layout import Layout
from zflake.core.mint import Window, first_open

_NEXT: Final = 0


class Tick:
    """One tick that was begun: its number, what is left of its IDs, and, once there is one, its follower."""

    __slots__ = ("following", "ids", "last", "number")

    def __init__(self, number: int, ids: Iterator[int], last: int | None) -> None:
        self.number = number
        self.ids = ids
        self.last = last
        """The last tick that IDs were minted in, up to this one."""
        self.following: dict[int, Tick] = {}


class Ticks:
    """The sequence of the ticks minted in by one machine ID in one tenancy.

    `windows` is for the owner to replace, as more are granted.  All methods may be called by any thread at
    any time.  With `after`, nothing is minted in ticks up to that one.
    """

    __slots__ = ("_newest", "layout", "machine", "windows")

    def __init__(self, layout: Layout, machine: int, *, after: int = -1) -> None:
        self.layout = layout
        self.machine = layout.check_machine(machine)
        self.windows: tuple[Window, ...] = ()
        # Not always the very newest: a reader follows the chain from here to its end.
        self._newest = Tick(after, iter(range(0)), None)

    def at(self, now: int) -> Tick | None:
        """The tick to take IDs from when the clock shows `now`; None if no window holds it.

        That is `now` itself; or the last one, if the clock has not come further, or went back.
        """
        while True:
            tick = self._follow()
            if now <= tick.number:
                return tick if tick.number < self.layout.end_tick else None
            if first_open(self.windows, now) != now:
                return None
            tick.following.setdefault(_NEXT, Tick(now, self._ids_of(now), now))

    def opens(self, now: int) -> int | None:
        """The first tick, `now` or later, that has not been begun yet and can be; None if there is none."""
        return first_open(self.windows, max(now, self._follow().number + 1))

    @property
    def last(self) -> int | None:
        """The last tick begun, None if there was none."""
        return self._follow().last

    def close(self) -> int | None:
        """Begin nothing any more, and hand out nothing; gives `last`, the bound that a release states."""
        end = self.layout.end_tick
        while (tick := self._follow()).number < end:
            tick.following.setdefault(_NEXT, Tick(end, iter(range(0)), tick.last))
        return tick.last

    def _follow(self) -> Tick:
        tick = self._newest
        while tick.following:
            exhaust(tick.ids, self.layout.ids_per_tick)
            tick = tick.following[_NEXT]
        self._newest = tick
        return tick

    def _ids_of(self, number: int) -> Iterator[int]:
        layout = self.layout
        first = layout.compose(number, self.machine, 0)
        step = 1 << layout.sequence_shift
        return iter(range(first, first + layout.ids_per_tick * step, step))


def exhaust(ids: Iterator[int], length: int) -> None:
    """Let a range iterator of that length, or less, give no more numbers; one step of the interpreter."""
    ids.__setstate__(length)  # type: ignore[attr-defined]
