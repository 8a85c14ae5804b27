"""A session: one lease in this process, from the first ID that it is taken for to its being given back.

It has a thread of its own, which alone uses the lease client and its sockets.  Callers mint by `ticks` and
`offset_us`, which the thread puts there for them to read; they never wait for a lock of its.

A session ends once: closed by its owner, after long idleness, at the interpreter's exit, by a fault, or,
in a forked child, by the fork: there it was its parent's, and is left alone.  A caller that wants IDs after that
begins the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import zmq

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.lease import Holder, Refusal, Refused
from zflake.core.mint import Mint
from zflake.core.ticks import Ticks
from zflake.embedded.fork import MINE, UNTIL, new_page
from zflake.embedded.waiting import News
from zflake.errors import AuthError, LeaseExpired, NoFreeMachine, Timeout, Unavailable, ZflakeError
from zflake.holder.lease import LeaseConversation
from zflake.holder.lease_client import LeaseClient
from zflake.keys import Keys, curves_of
from zflake.wire.endpoint import Endpoint
from zflake.wire.sockets import check_descriptors

RELEASE_US: Final = 2_000_000
"""Microseconds that giving a lease back may take."""
EXIT_S: Final = 2.5
"""Seconds that the interpreter's exit waits for leases to be given back."""
IDLE_MS: Final = 500
"""Milliseconds of the thread's longest sleep."""
TOGETHER_TICKS: Final = 1000
"""Ticks that the last tick of a tenancy may be ahead for the next one to go on after it."""

_log = logging.getLogger("zflake.lease")


class Session:
    """One lease, kept by a thread of its own from `start` on.

    `wanted` says whether a generator is left to mint; after `idle_us` without a tick begun the lease is given
    back (None: never).
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        name: str,
        layout: Layout | None,
        idle_us: int | None,
        wanted: Callable[[], bool],
        keys: Keys | None = None,
    ) -> None:
        self.ticks: Ticks | None = None
        """Where to mint; None while there is no machine ID."""
        self.offset_us: int | None = None
        """Microseconds from the local clock to the timeline's now; None while that is not known."""
        self.retry_after_ms = 0
        """Milliseconds that a caller should wait while no window is open."""
        self.failure: BaseException | None = None
        """The error that ended the thread, if one did."""
        self.told = False
        """Whether a caller has heard of the failure."""
        self.over = False
        """Whether it hands out no more IDs."""
        self.done = False
        """Whether the lease has been given back, too, as far as that was possible."""
        self.news = News()
        """Spread with every turn of the thread."""
        self.page = new_page()
        self.following: dict[int, Session] = {}
        """The session that follows it, at 0."""
        self._endpoints = endpoints
        self._name = name
        self._layout = layout
        self._keys = keys
        self._idle_us = idle_us
        self._wanted = wanted
        self._refusal: Refusal | None = None
        self._held = False
        self._mint: Mint | None = None
        self._started = False
        self._runner: dict[int, object] = {}
        self._kept: tuple[object, ...] = ()  # a forked child must keep it from the collector
        self._stopping = False
        self._bell: socket.socket | None = None
        self._used_us = 0
        self._used_tick: int | None = None

    @property
    def inherited(self) -> bool:
        """Whether it is the parent's, in a forked child."""
        return not self.page[MINE]

    def start(self) -> None:
        """Have a thread keep the lease.

        A signal handler may come while its own thread is in here.  It then starts one, too, rather than
        wait; of the two the first to run stays.

        Raises `Unavailable` if the system has no thread or no descriptors to give.
        """
        if self._started:
            return
        check_descriptors()
        try:
            threading.Thread(target=self._run, name="zflake-lease", daemon=True).start()
        except RuntimeError as error:
            raise Unavailable(f"can't start the thread that keeps the lease: {error}") from error
        self._started = True

    def stop(self) -> None:
        """Have the thread give the lease back and end; `done` says when it has."""
        self._stopping = True
        if not self._started:
            self.over = self.done = True
        bell = self._bell
        if bell is not None:
            with contextlib.suppress(OSError):  # it has been told often enough, or has ended
                bell.send(b"!")

    def wait_done(self, deadline_s: float) -> None:
        """Wait for `done`, until `deadline_s` (monotonic clock) at most."""
        while not self.done and (left_s := deadline_s - time.monotonic()) > 0:
            self.news.wait(self.news.count, 0 if self.done else left_s)

    def complaint(self) -> ZflakeError:
        """Why there is no ID for a caller whose time is over."""
        if self.failure is not None:
            return _told(self.failure)
        refusal = self._refusal
        retry_after = self.retry_after_ms / 1000
        if refusal is not None and refusal.retry_after_ms is not None:
            retry_after = refusal.retry_after_ms / 1000
        if self.ticks is not None or (self._held and refusal is None):
            why = "answers" if refusal is None else f"grants the next one ({refusal.message})"
            return LeaseExpired(
                f"the window has run out, and no delegator at {self._where} {why}", retry_after=retry_after
            )
        if refusal is None:
            return Timeout(f"no delegator at {self._where} answers", retry_after=retry_after)
        kinds = {Refused.NO_FREE_MACHINE: NoFreeMachine, Refused.DENIED: AuthError}
        return kinds.get(refusal.reason, Unavailable)(refusal.message, retry_after=retry_after)

    @property
    def _where(self) -> str:
        return ", ".join(map(str, self._endpoints))

    # --- in the thread ---

    def _run(self) -> None:
        me = object()
        if self._runner.setdefault(0, me) is not me:
            return
        _live.add(self)
        _release_at_exit()
        # `_ending` tells the callers first: a context may take as long to close as a name server that is away.
        with contextlib.ExitStack() as later, self._ending():
            ear, self._bell = socket.socketpair()
            later.enter_context(ear)
            later.enter_context(self._bell)
            self._bell.setblocking(False)  # noqa: FBT003
            ear.setblocking(False)  # noqa: FBT003
            context = later.enter_context(zmq.Context())
            with contextlib.closing(self._client(context)) as client:
                self._kept = (context, client, ear)
                try:
                    self._keep(client, ear)
                except BaseException as error:
                    self.failure = error  # before it is over: a caller that finds that shall know why
                    raise
                finally:
                    self._give_back(client)
        self._kept = ()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Say that the lease has ended, and why if that is an error."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            bug = None if isinstance(error, ZflakeError) else error
            _log.warning("the lease's thread has ended: %s", error, exc_info=bug)
            self.failure = error
        finally:
            self.over = True
            if self.ticks is not None:
                self.ticks.close()
            self.done = True
            _live.discard(self)
            self.news.spread()

    def _client(self, context: zmq.Context[zmq.Socket[bytes]]) -> LeaseClient:
        host, pid = socket.gethostname(), os.getpid()
        holder = Holder(self._name or f"{host}-{pid}", host, pid)
        return LeaseClient(context, self._endpoints, holder, curves_of(self._keys), layout=self._layout)

    def _keep(self, client: LeaseClient, ear: socket.socket) -> None:
        self._used_us = clock.local_us()
        while not self._stopping and self._wanted() and not self._is_idle():
            poller = zmq.Poller()
            poller.register(client.socket, zmq.POLLIN)
            poller.register(ear, zmq.POLLIN)
            sleep_ms = -((clock.local_us() - client.wake_us) // 1000)
            poller.poll(max(0, min(IDLE_MS, sleep_ms)))
            client.service(clock.local_us())
            self._follow(client.lease)
            if client.lease.denied and client.lease.mint is None:
                raise self.complaint()
            self.news.spread()

    def _follow(self, lease: LeaseConversation) -> None:
        """Show callers what the lease has now."""
        mint = lease.mint
        if mint is not self._mint:
            self._mint = mint
            last = None if self.ticks is None else self.ticks.close()
            self.ticks = None if mint is None else _ticks_of(mint, last)
        if mint is not None and self.ticks is not None:
            self.ticks.windows = mint.windows
            self._held = True
        timeline_us = lease.clock.timeline_us()
        self.offset_us = None if timeline_us is None else timeline_us - clock.local_us()
        self._refusal = lease.refusal
        self.retry_after_ms = lease.retry_after_ms(clock.local_us())

    def _is_idle(self) -> bool:
        if self._idle_us is None:
            return False
        last = None if self.ticks is None else self.ticks.last
        # A generator that waits for a first lease is not idle, nor is one that has not taken from it yet.
        if last != self._used_tick or self.news.wanted or not self._held:
            self._used_tick = last
            self._used_us = clock.local_us()
        return clock.local_us() - self._used_us >= self._idle_us

    def _give_back(self, client: LeaseClient) -> None:
        self.over = True
        last = None if self.ticks is None else self.ticks.close()
        # Callers have all of a tick that they begin: what is left of it is for no other holder.
        mint = client.lease.mint
        if last is not None and mint is not None and mint is self._mint:
            mint.spend(last)
        client.release(clock.local_us() + RELEASE_US)


def _ticks_of(mint: Mint, last: int | None) -> Ticks:
    """The ticks of a new tenancy; after those of the one before, if they are of one timeline."""
    start = mint.windows[0][0]
    after = last if last is not None and last <= start + TOGETHER_TICKS else -1
    return Ticks(mint.layout, mint.machine, after=after)


def _told(failure: BaseException) -> ZflakeError:
    """The failure of the thread, as an error of the caller's own."""
    if isinstance(failure, ZflakeError):
        error = type(failure)(str(failure), retry_after=failure.retry_after)
    else:
        error = Unavailable(f"the thread that keeps the lease has failed: {failure!r}")
    error.__cause__ = failure
    return error


_live: set[Session] = set()
# A forked child must neither use nor close the sessions that it inherits.
_inherited: list[Session] = []
_exit_hooks: set[int] = set()
exiting = False
"""Whether the interpreter ends: a lease taken now would not be given back."""


def _release_all() -> None:
    live = [session for session in list(_live) if not session.inherited]
    for session in live:
        session.stop()
    deadline_s = time.monotonic() + EXIT_S
    for session in live:
        session.wait_done(deadline_s)


def _at_exit() -> None:
    global exiting  # noqa: PLW0603
    exiting = True
    _release_all()


def _release_at_exit() -> None:
    # The forked children of multiprocessing end without the interpreter's own exit.
    util = sys.modules.get("multiprocessing.util")
    if util is not None and os.getpid() not in _exit_hooks:
        _exit_hooks.add(os.getpid())
        util.Finalize(None, _release_all, exitpriority=0)


def _after_fork() -> None:
    for session in list(_live):
        session.page[MINE] = session.page[UNTIL] = 0
        _inherited.append(session)
    _live.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
