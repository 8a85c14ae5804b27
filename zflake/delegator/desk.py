"""The lease desk: has lease requests settled by the ledger, in a thread beside the router loop.

Requests that wait go to the ledger together.  Beside them it keeps house every second: writes the mark, reads
what other delegators have changed, and bounds the provenance.

While the store fails only the house-keeping tries it.  Requests are refused at once: each that waited for a
store that does not answer would keep all others waiting.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from zflake.core import lessor
from zflake.core.lease import Acquire, Grant, Mark, Meta, Record, Refusal, Released, Request, Trace
from zflake.delegator.ledger import Ledger, Settled, unavailable
from zflake.errors import StoreError
from zflake.stores.contract import Store

BATCH: Final = 256
"""How many requests commit together, at most."""
MAX_ACQUIRES: Final = 5_000
MAX_BACKLOG: Final = 10_000
"""How many requests may wait for the store, acquires the fewer; the next ones are `overloaded`."""
MAX_TRACES: Final = 1_000
MARK_US: Final = 1_000_000
"""How often the mark is written, and what others have changed is read."""
HURRY_US: Final = 100_000
"""How often that is read at most when a worker comes that is not known here yet."""
QUIET_US: Final = 10_000_000
"""How often a failure of the store is logged, at most."""
PRUNE_US: Final = 10_000_000
"""How often provenance is bounded, and so many spans at a time."""
PRUNE: Final = 2_000
KEPT_SPANS: Final = 500_000
KEPT_MS: Final = 400 * 86_400_000
"""Provenance: this many spans, one for each unbroken tenancy, and for this long."""
STALE_US: Final = 2_000_000
"""A request that sat for longer is dropped: whoever sent it has sent it again."""
OVERDUE_US: Final = 1_500_000
"""After how long a store that has not answered is taken for one that fails."""
SHARE: Final = 20
"""Reading all leases takes one part in so many of the thread's time, at most."""

_log = logging.getLogger("zflake.lease")


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request on its way through the desk."""

    request: Request | Trace
    arrived_us: int
    prefix: list[bytes]
    msgid: int


class LeaseDesk:
    """Settles lease requests: `settle` at once, or `submit` and later `collect` through the thread.

    `now` gives the timeline's tick, `latest` the latest that any clock here shows, `local_us` a clock for the
    age of requests, `ring` is called in the thread when there is something to collect.  `mark`, if given,
    goes with every commit and is written every `MARK_US`; `follow` takes in what marks there are then.
    """

    def __init__(
        self,
        store: Store,
        meta: Meta,
        *,
        now: Callable[[], int],
        local_us: Callable[[], int],
        ring: Callable[[], None],
        latest: Callable[[], int] | None = None,
        mark: Callable[[], Mark] | None = None,
        follow: Callable[[Sequence[Mark]], None] | None = None,
        pick: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._store = store
        self._ledger = Ledger(
            store, meta, now=now, latest=latest or now, mark=mark, pick=pick, complain=self._complain
        )
        self._now = now
        self._local_us = local_us
        self._ring = ring
        self._mark = mark
        self._follow = follow
        self._house_at_us = local_us() + MARK_US
        self._prune_at_us = self._look_at_us = 0
        self._hurry = threading.Event()
        self._failure: StoreError | None = None
        self._failing_since_us: int | None = None
        self._busy_since_us: int | None = None
        self._failures = 0  # those that were not logged
        self._quiet_until_us = 0
        # Renewals and releases come first: a rush of acquires must not cost anybody the lease that he has.
        self._waiting: queue.PriorityQueue[tuple[int, int, Ticket | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._done: deque[tuple[Ticket, Settled]] = deque()
        self._held: Sequence[Record] | None = None
        self._thread = threading.Thread(target=self._run, name="lease-desk", daemon=True)
        self.stale = 0
        """How many requests were dropped for their age."""
        self.fault: BaseException | None = None
        """What ended the thread, where that was not `stop`: nothing will be settled any more."""

    @property
    def meta(self) -> Meta:
        """What holds for the whole store, as it was last read."""
        return self._ledger.meta

    def settle(self, requests: Sequence[Request | Trace]) -> list[Settled]:
        """Settle requests together; one that the store does not settle is `unavailable`."""
        return self._ledger.settle(requests)

    # --- the router loop's side ---

    @property
    def outage(self) -> Refusal | None:
        """What to answer at once while the store fails, or does not answer; None while all is well."""
        if (failure := self._failure) is not None:
            return unavailable(failure)
        busy_since_us = self._busy_since_us
        if busy_since_us is not None and self._local_us() - busy_since_us > OVERDUE_US:
            return unavailable(StoreError(f"{self._store.url} has not answered for a while"))
        return None

    def start(self) -> None:
        """Start the thread; from now on it alone uses the store."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> bool:
        """Hand a request in; False where too many of its kind wait already."""
        match ticket.request:
            case Trace():
                rank, most = 2, MAX_TRACES
            case Acquire():
                rank, most = 1, MAX_ACQUIRES
            case _:
                rank, most = 0, MAX_BACKLOG
        if self.backlog >= most:
            return False
        self._waiting.put((rank, next(self._numbers), ticket))
        return True

    @property
    def backlog(self) -> int:
        """How many requests wait."""
        return self._waiting.qsize()

    def collect(self) -> list[tuple[Ticket, Settled]]:
        """What was settled since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def collect_held(self) -> Sequence[Record] | None:
        """All leases, where they were read since the last call; only where others may be granting as well."""
        held, self._held = self._held, None
        return held

    def hurry(self) -> None:
        """Have the leases read soon: a worker speaks of one that is not known here."""
        if not self._store.exclusive:
            self._hurry.set()

    def stop(self, timeout_s: float) -> bool:
        """Settle what waits, then end the thread; False where the store keeps it for longer."""
        self._waiting.put((3, next(self._numbers), None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread's side ---

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.fault = error
            self._ring()
            raise

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            fresh = []
            for ticket in batch:
                if self._local_us() - ticket.arrived_us > STALE_US:
                    self.stale += 1
                else:
                    fresh.append(ticket)
            if fresh:
                settled = self._settle_unless_out([ticket.request for ticket in fresh])
                for ticket, outcome in zip(fresh, settled, strict=True):
                    _record_grant(ticket.request, outcome)
                self._done.extend(zip(fresh, settled, strict=True))
                self._ring()
            with self._busy():
                self._keep_house()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since_us = self._local_us()
        try:
            yield
        finally:
            self._busy_since_us = None

    def _settle_unless_out(self, requests: Sequence[Request | Trace]) -> list[Settled]:
        if self._failure is not None:
            return [Settled(unavailable(self._failure), None)] * len(requests)
        with self._busy():
            settled = self.settle(requests)
            if self._ledger.failure is None or not self._can_read() or len(requests) == 1:
                return settled
        # It fails at one of them: the others shall not suffer for that.
        return [settled for request in requests for settled in self._settle_unless_out([request])]

    def _can_read(self) -> bool:
        """Whether the store works at all; where it does not, that is an outage from now on."""
        try:
            self._ledger.read_meta()
        except StoreError as error:
            self._fail(error)
            return False
        return True

    def _keep_house(self) -> None:
        now_us = self._local_us()
        hurried = self._hurry.is_set() and now_us >= self._look_at_us
        if now_us < self._house_at_us and not hurried:
            return
        self._hurry.clear()
        works = self._failure is None
        try:
            if now_us >= self._house_at_us:
                self._house_at_us = now_us + MARK_US
                works = False
                if self._mark is not None:
                    self._store.swap([], self._mark())
                self._ledger.read_meta()
                works = True
            if works and not self._store.exclusive:
                # After an outage the leases come first: others may have renewed them meanwhile.
                self._look(now_us, hurried=hurried or self._failure is not None)
            if works:
                self._recover()
                self._prune(now_us)
        except StoreError as error:
            self._complain(error)
            if not works or self._failure is not None:
                self._fail(error)

    def _fail(self, error: StoreError) -> None:
        self._failure = error
        if self._failing_since_us is None:
            self._failing_since_us = self._local_us()

    def _recover(self) -> None:
        self._failure = None
        if self._failing_since_us is not None:
            failed_us = self._local_us() - self._failing_since_us
            _log.warning("%s can be used again, after %.1f s", self._store.url, failed_us / 1e6)
            if failed_us >= MARK_US:  # the next one is news; but a store that comes and goes fills no log
                self._quiet_until_us = 0
        self._failing_since_us = None

    def _look(self, now_us: int, *, hurried: bool) -> None:
        """Read what others have written: their marks, and the leases that they have granted."""
        if self._follow is not None:
            self._follow(self._store.marks())
        if now_us < self._look_at_us and not hurried:
            return
        began = time.monotonic()
        self._held = self._store.held(self._now())
        took_us = int((time.monotonic() - began) * 1e6)
        self._look_at_us = now_us + max(HURRY_US, SHARE * took_us)
        self._ring()

    def _prune(self, now_us: int) -> None:
        if now_us >= self._prune_at_us:
            self._prune_at_us = now_us + PRUNE_US
            before = self._now() - lessor.ms_to_ticks(self.meta.layout, KEPT_MS)
            self._store.prune(before, KEPT_SPANS, PRUNE)

    def _complain(self, error: StoreError) -> None:
        """Log a failure of the store; while they go on, one every now and then."""
        now_us = self._local_us()
        if now_us < self._quiet_until_us:
            self._failures += 1
            return
        self._quiet_until_us = now_us + QUIET_US
        more = f" ({self._failures} more failures since the last line)" if self._failures else ""
        self._failures = 0
        _log.error("%s%s", error, more)

    def _next_batch(self) -> list[Ticket] | None:
        """What waits, up to `BATCH`; nothing where the house is to be kept first; None at the end."""
        wait_us = HURRY_US if not self._store.exclusive else MARK_US
        try:
            _, _, first = self._waiting.get(timeout=wait_us / 1e6)
        except queue.Empty:
            return []
        if first is None:
            return None
        batch = [first]
        while len(batch) < BATCH:
            try:
                waiting = self._waiting.get_nowait()
            except queue.Empty:
                break
            _, _, ticket = waiting
            if ticket is None:
                self._waiting.put(waiting)  # this batch first
                break
            batch.append(ticket)
        return batch


def _record_grant(request: Request | Trace, settled: Settled) -> None:
    """Log what was granted before anyone is told of it: the log is complete whenever the process dies."""
    answer, record = settled
    if isinstance(answer, Grant) and record is not None:
        verb = "acquired" if isinstance(request, Acquire) else "renewed"
        _log.info(
            "machine %d %s: window [%d, %d)",
            answer.machine,
            verb,
            answer.start,
            answer.end,
            extra={"lease": [verb, answer.machine, answer.gen, answer.start, answer.end]},
        )
    elif isinstance(answer, Released) and record is not None:
        _log.info(
            "machine %d released: free from %d",
            answer.machine,
            answer.fence,
            extra={"lease": ["released", answer.machine, record.gen, record.start, answer.fence]},
        )
