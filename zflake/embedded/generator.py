"""Generators: IDs minted in this very process, by a leased machine ID or by an assigned one.

An ID is taken from the range iterator of the tick that was begun last, as long as that tick lasts: one look
at the clock, one at memory that a fork wipes, one step of an iterator.  At the tick's turn, and wherever
anything has changed, the way leads through `_take`, which looks around, begins a tick, or waits.

There is no lock on these ways.  Threads, and signal handlers that interrupt them anywhere, meet in the chain
of `Ticks` only (ticks.py has the rules), and in the chain of sessions, which is made in the same manner.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from threading import Lock
from time import monotonic_ns
from typing import Final, NoReturn, Self

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.ticks import Ticks
from zflake.core.timeline import tick_of, us_until
from zflake.embedded import session as sessions
from zflake.embedded.fork import MINE, UNTIL, Page, new_page, own_page
from zflake.embedded.session import EXIT_S, Session
from zflake.errors import Closed, ConfigError, LayoutError, Overloaded
from zflake.holder.static import StaticHold
from zflake.keys import open_keys
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint
from zflake.wire.fields import check_name

IDLE_S: Final = 600.0
"""Seconds without an ID after which a lease is given back."""
SLICE_NS: Final = 500_000_000
"""Nanoseconds of the longest sleep without a look around."""
NAP_US: Final = 20_000
"""Microseconds of the longest wait that is simply slept; during a longer one there may be news."""

_NEVER: Final = (0, 0)


class _Generator:
    """The common part of both kinds: the quick way to an ID, and no copies."""

    # What `next_id` reads: a page's time to look around again, and the IDs until then.
    _until: Page | tuple[int, int] = _NEVER
    _ids: Iterator[int] = iter(())

    def __init__(self) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise ConfigError(
                "generators need an interpreter with the GIL: run this one with PYTHON_GIL=1, or take a Client"
            )
        self._closed = False

    def next_id(self) -> int:
        """One ID, greater than all that this generator gave before in the same tenancy.

        Raises what the class says.
        """
        if monotonic_ns() < self._until[UNTIL]:
            for id_ in self._ids:
                return id_
        return self.next_ids(1)[0]

    def next_ids(self, count: int) -> list[int]:
        """Exactly `count` IDs (1 or more), ascending.

        Raises what `next_id` raises, and `ConfigError` if `count` is no positive whole number.  IDs that
        were minted before an error are given up, and never used.
        """
        if type(count) is not int or count < 1:
            raise ConfigError(f"count is a whole number of at least 1, not {count!r}")
        while True:
            here = own_page()
            ids: list[int] = []
            if monotonic_ns() < self._until[UNTIL]:
                ids = list(islice(self._ids, count))
            while len(ids) < count:
                ids += self._take(count - len(ids))
            # Otherwise a signal handler forked in the midst, and these are the parent's.  No handler can come
            # between this test and the return.
            if here[MINE]:
                return ids

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Mint nothing any more; calls after this raise `Closed`."""
        self._closed = True
        self._until = _NEVER

    def _take(self, count: int) -> list[int]:
        """At least one and at most `count` IDs, of one tick, after a wait if that is needed."""
        raise NotImplementedError

    def _mint(self, ticks: Ticks, offset_us: int, page: Page, count: int) -> list[int]:
        """Up to `count` IDs of the tick that it is; none if that is used up, or no window holds it."""
        read_ns = (
            monotonic_ns()
        )  # before the other clock: a thread that is held up in between looks again sooner
        timeline_us = clock.local_us() + offset_us
        layout = ticks.layout
        tick = ticks.at(tick_of(layout, timeline_us))
        if tick is None:
            return []
        ids = list(islice(tick.ids, count))
        if ids:
            # A thread that writes these late, over a later tick's, does no harm: the earlier IDs are used up.
            self._ids = tick.ids
            self._until = page
            page[UNTIL] = read_ns + us_until(layout, tick.number + 1, timeline_us) * 1000
            if not page[MINE]:
                page[UNTIL] = 0  # a signal handler forked in the midst: this was the parent's page
        return ids

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(
            f"a {kind} can't be copied or pickled, since its copy would hand out the same IDs: "
            f"make a new {kind} in each process, and share this one between threads"
        )


class LeasedGenerator(_Generator):
    """Mints IDs in this process, by a machine ID that a delegator leases to it.

    `endpoints` is one delegator's endpoint or several.  The lease is taken at the first ID and renewed by a
    thread in the background.  It is given back by `close`, at the interpreter's exit, and after `idle`
    seconds without an ID (600 by default; None: never); the next ID takes a new one.  `timeout` is how long
    a call may wait while no window is open, in seconds.  `name` is for people who look at the cluster; by
    default it is made of host and process ID.  A `layout` is insisted on: a delegator with another one is
    refused.  `keys` is the generator's folder of keys, in a cluster that has them; by default the one that the
    environment variable ZFLAKE_KEYS names.

    Safe to share between threads, and with signal handlers.  After a fork the child takes a lease of its
    own at its first ID.  While no delegator answers it goes on to the end of its window.

    Raises `ConfigError` for endpoints that are none, times that are not positive, a name that can't be shown.

    Calls raise, once the timeout is spent, `LeaseExpired` if the window has run out and none is granted,
    `NoFreeMachine`, `Unavailable` if the delegator can't reach its store, `Timeout` if no delegator answers,
    most of them with `retry_after`; `Overloaded` if a long tick is used up.  `LayoutError` if the
    delegator's layout is not the one insisted on; `AuthError`, at once, if the cluster refuses the key; `Closed` after
    `close`.
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] = DEFAULT_DELEGATOR,
        *,
        timeout: float = 5.0,
        idle: float | None = IDLE_S,
        name: str = "",
        layout: Layout | None = None,
        keys: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if (patched := sys.modules.get("gevent.monkey")) and patched.is_module_patched("threading"):
            raise ConfigError("the thread that renews the lease can't run under gevent: take a zflake.Client")
        texts = [endpoints] if isinstance(endpoints, str) else list(_iterable(endpoints))
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError("a generator takes a delegator's endpoint, or a list of at least one")
        me = weakref.ref(self)
        self._timeout_ns = int(_seconds(timeout, "a timeout") * 1e9)
        self._layout = None if layout is None else _layout(layout)
        self._new_session = functools.partial(
            Session,
            [parse_endpoint(text) for text in dict.fromkeys(texts)],
            name=check_name(name),
            layout=self._layout,
            idle_us=None if idle is None else int(_seconds(idle, "an idle time") * 1e6),
            wanted=lambda: me() is not None,
            keys=open_keys(keys),
        )
        # Not always the newest: a reader follows the chain from here to its end.
        self._session = self._new_session()

    @property
    def layout(self) -> Layout | None:
        """The layout of the IDs; None as long as no lease has told it."""
        ticks = self._session.ticks
        if ticks is not None:
            self._layout = ticks.layout
        return self._layout

    @property
    def machine(self) -> int | None:
        """The machine ID that is held; None while there is none."""
        session = self._session
        ticks = session.ticks
        return None if ticks is None or session.over or session.inherited else ticks.machine

    def close(self) -> None:
        """Give the lease back, which takes 2.5 s at most; calls after this raise `Closed`."""
        super().close()
        session = self._follow()
        if not session.inherited:
            session.stop()
            session.wait_done(time.monotonic() + EXIT_S)

    def _take(self, count: int) -> list[int]:
        give_up_ns = None
        while True:
            session = self._current()
            seen = session.news.count
            if session.over:
                continue  # since then
            ticks, offset_us = session.ticks, session.offset_us
            opens_us = None
            if ticks is not None and offset_us is not None:
                ids = self._mint(ticks, offset_us, session.page, count)
                if ids:
                    return ids
                opens_us = _us_until_open(ticks, clock.local_us() + offset_us)
                if opens_us is not None and opens_us <= NAP_US:
                    time.sleep(opens_us / 1e6)
                    give_up_ns = None
                    continue
            now_ns = monotonic_ns()
            if give_up_ns is None:
                give_up_ns = now_ns + self._timeout_ns
            elif now_ns >= give_up_ns:
                if opens_us is None:
                    raise session.complaint()
                raise Overloaded(
                    "all IDs of this tick have been given, and the next one is not soon",
                    retry_after=opens_us / 1e6,
                )
            wait_ns = give_up_ns - now_ns
            wait_ns = min(wait_ns, SLICE_NS if opens_us is None else min(opens_us * 1000, SLICE_NS))
            session.news.wait(seen, wait_ns / 1e9)
            if session.inherited:
                give_up_ns = None  # a signal handler forked meanwhile: the child's time begins now

    def _current(self) -> Session:
        """The session to mint by, begun and started if there is none."""
        while True:
            session = self._follow()
            if self._closed:
                raise Closed("this generator is closed")
            if not session.over and not session.inherited:
                break
            if session.failure is not None and not session.told and not session.inherited:
                session.told = True
                raise session.complaint()
            if sessions.exiting:
                raise Closed("the interpreter is exiting")
            session.following.setdefault(0, self._new_session())
        session.start()
        return session

    def _follow(self) -> Session:
        session = self._session
        while session.following:
            session = session.following[0]
        self._session = session
        return session


class StaticGenerator(_Generator):
    """Mints IDs in this process, by an assigned machine ID, without a network.

    It depends on the wall clock and on you: no two generators may have the same machine ID at a time, a
    delegator's leased ones included, and none may be restarted after the wall clock was set back.  It mints
    from the tick after its start on, and never in one before its last.

    Safe to share between threads, and with signal handlers.  A forked child must make its own, with another
    machine ID: there, calls raise `ConfigError`.

    Raises `LayoutError` if the layout has no such machine, `ConfigError` if the wall clock is outside
    the layout.

    Calls raise `LayoutError` past the layout's end, and `Closed` after `close`.
    """

    def __init__(self, layout: Layout, machine: int) -> None:
        super().__init__()
        self._hold = StaticHold(_layout(layout), machine)
        self._ticks = Ticks(layout, machine)
        self._ticks.windows = self._hold.mint.windows
        self._page = new_page()
        self._offset_us = 0
        self._look_at_us = 0
        self._looking = Lock()
        self._look()

    @property
    def layout(self) -> Layout:
        """The layout of the IDs."""
        return self._ticks.layout

    @property
    def machine(self) -> int:
        """The machine ID."""
        return self._ticks.machine

    def close(self) -> None:
        """Mint nothing any more; calls after this raise `Closed`."""
        super().close()
        self._ticks.close()

    def _take(self, count: int) -> list[int]:
        while True:
            if self._closed:
                raise Closed("this generator is closed")
            if not self._page[MINE]:
                raise ConfigError(
                    f"this process was forked, and its parent mints with machine {self.machine}: make a "
                    "StaticGenerator with another machine after the fork"
                )
            self._look()
            ids = self._mint(self._ticks, self._offset_us, self._page, count)
            if ids:
                return ids
            opens_us = _us_until_open(self._ticks, clock.local_us() + self._offset_us)
            if opens_us is not None:
                time.sleep(min(opens_us, NAP_US) / 1e6)
            elif not self._closed:
                raise LayoutError(
                    f"layout {self.layout.name} ended at {self.layout.overflows.isoformat()}: it has no IDs left"
                )

    def _look(self) -> None:
        """Follow the wall clock, if that is due and no other thread, nor the one that was interrupted, is at it."""
        if clock.local_us() < self._look_at_us or not self._looking.acquire(blocking=False):
            return
        try:
            hold = self._hold
            hold.service(clock.local_us())
            self._look_at_us = hold.wake_us
            self._offset_us = (hold.clock.timeline_us() or 0) - clock.local_us()
        finally:
            self._looking.release()


def _us_until_open(ticks: Ticks, timeline_us: int) -> int | None:
    """Microseconds until a tick opens that has not been begun; None if none does in the windows there are."""
    opens = ticks.opens(tick_of(ticks.layout, timeline_us))
    return None if opens is None else us_until(ticks.layout, opens, timeline_us)


def _iterable(endpoints: Iterable[str]) -> Iterable[str]:
    return endpoints if isinstance(endpoints, Iterable) else ()


def _seconds(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{what} is a positive number of seconds, not {value!r}")
    return value


def _layout(layout: Layout) -> Layout:
    if not isinstance(layout, Layout):
        raise ConfigError(f"{layout!r} is no layout: take one of zflake.layouts, or make a zflake.Layout")
    return layout
