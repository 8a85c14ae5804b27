"""The lease executor: has lease requests settled by the committer, in a thread beside the router loop.

Requests that wait go to the committer together.  Beside them the executor keeps house every second: it writes the
mark, reads what other delegators have changed, and bounds the provenance.

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from zflake.core.lease import Acquire, Meta, Record, Refusal, Release, Request, Trace
from zflake.delegator.clock import DelegatorClock
from zflake.delegator.committer import Committer, Settled, unavailable
from zflake.errors import StoreError
from zflake.stores.contract import Store

BATCH: Final = 256
"""Requests that commit together, at most."""
MAX_ACQUIRES: Final = 5_000
"""Requests that may wait for the store before an acquire is `overloaded`."""
MAX_BACKLOG: Final = 10_000
"""The same for renewals and releases."""
MAX_TRACES: Final = 1_000
"""The same for traces."""
MARK_US: Final = 1_000_000
"""Microseconds between writes of the mark, and between reads of what others have changed."""
HURRY_US: Final = 100_000
"""Microseconds between such reads, at least, while workers come that are not known here yet."""
LOG_INTERVAL_US: Final = 10_000_000
"""Microseconds between log lines of one failure of the store."""
PRUNE_US: Final = 10_000_000
"""Microseconds between rounds of pruning, if a round has not left some for the next."""
PRUNE: Final = 2_000
"""Spans that a round of pruning forgets, at most."""
KEPT_SPANS: Final = 500_000
"""Spans of provenance that are kept, one for each unbroken tenancy.  Half of them are dealt out to the machines: one
that has more than its part is thinned out, lest a flood of tenancies push out all that was before."""
SLACK: Final = 8
"""Divisor of a machine's part of the spans by which it may be over that part before it is thinned out."""
KEPT_MS: Final = 400 * 86_400_000
"""Milliseconds for which they are kept."""
STALE_US: Final = 2_000_000
"""Microseconds after which a waiting request is dropped: its sender has sent it again."""
OVERDUE_US: Final = 1_500_000
"""Microseconds without an answer after which a store counts as failing."""
SHARE: Final = 20
"""Divisor of the thread's time that reading all leases may take."""

_log = logging.getLogger("zflake.lease")


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request on its way through the executor."""

    request: Request | Trace
    arrived_us: int
    prefix: list[bytes]
    msgid: int


class LeaseExecutor:
    """Settles lease requests: `settle` at once, or `submit` and later `collect` by `turn`s.

    The turns belong to one thread: the executor's own after `start`, or a simulation's.  `wake` is called in them when
    there is something to collect.
    """

    def __init__(
        self,
        store: Store,
        meta: Meta,
        clock: DelegatorClock,
        *,
        wake: Callable[[], None],
        pick: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._store = store
        self.store_url = store.url
        """Names the store to people."""
        self.clock = clock
        """The timeline that requests are settled by."""
        self._local_us = clock.local_us
        self._pick = pick
        self._committer = Committer(store, meta, clock, pick=pick, complain=self._complain)
        self.settle = self._committer.settle
        self._wake = wake
        self._house_at_us = self._local_us() + MARK_US
        self._prune_at_us = self._look_at_us = 0
        self._hurry = threading.Event()
        self._failure: StoreError | None = None
        self._failing_since_us: int | None = None
        self._busy_since_us: int | None = None
        self._unlogged = 0  # failures since the last line
        self._quiet_until_us = 0
        # Renewals and releases come first: a rush of acquires must not cost a holder the lease that it has.
        self._waiting: queue.PriorityQueue[tuple[int, int, Ticket | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._done: deque[tuple[Ticket, Settled]] = deque()
        self._held: Sequence[Record] | None = None
        self._thread = threading.Thread(target=self._run, name="lease-executor", daemon=True)
        self.stale = 0
        """Requests that were dropped for their age."""
        self.fault: BaseException | None = None
        """The error that ended the thread, if one did: nothing will be settled any more."""

    @property
    def meta(self) -> Meta:
        """The store's meta, as it was last read."""
        return self._committer.meta

    # --- the router loop's side ---

    @property
    def outage(self) -> Refusal | None:
        """The answer to give at once while the store fails, or does not answer; None while all is well."""
        if (failure := self._failure) is not None:
            return unavailable(failure)
        busy_since_us = self._busy_since_us
        if busy_since_us is not None and self._local_us() - busy_since_us > OVERDUE_US:
            return unavailable(StoreError(f"{self.store_url} has not answered for a while"))
        return None

    def start(self) -> None:
        """Start the thread; from now on it alone uses the store."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> bool:
        """Hand a request in; False if too many of its kind wait already."""
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
        """Requests that wait."""
        return self._waiting.qsize()

    def collect(self) -> list[tuple[Ticket, Settled]]:
        """The requests that were settled since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def collect_held(self) -> Sequence[Record] | None:
        """All leases, if they were read since the last call; only if other delegators may be granting as well."""
        held, self._held = self._held, None
        return held

    def hurry(self) -> None:
        """Have the leases read soon: a worker speaks of one that is not known here."""
        if not self._store.exclusive:
            self._hurry.set()

    def stop(self, timeout_s: float) -> bool:
        """Settle what waits, then end the thread; False if the store keeps it for longer."""
        self._waiting.put((3, next(self._numbers), None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread's side ---

    def turn(self, wait_s: float) -> bool:
        """Settle a batch of what waits, or wait so long for it, then keep house if that is due; False at the end."""
        ends = False
        fresh = []
        for ticket in self._next_batch(wait_s):
            if ticket is None:
                ends = True
            elif self._local_us() - ticket.arrived_us > STALE_US:
                self.stale += 1
            else:
                fresh.append(ticket)
        if fresh:
            settled = self._settle_unless_out([ticket.request for ticket in fresh])
            for ticket, outcome in zip(fresh, settled, strict=True):
                _record_lease(ticket.request, outcome)
            self._done.extend(zip(fresh, settled, strict=True))
            self._wake()
            self._thin([outcome.record for outcome in settled])
        if not ends:
            with self._busy():
                self._keep_house()
        return not ends

    def _run(self) -> None:
        wait_s = (MARK_US if self._store.exclusive else HURRY_US) / 1e6
        try:
            while self.turn(wait_s):
                pass
        except BaseException as error:
            self.fault = error
            self._wake()
            raise

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
            if self._committer.failure is None or not self._can_read() or len(requests) == 1:
                return settled
        # The store fails at one of them: the others shall not suffer for that.
        return [settled for request in requests for settled in self._settle_unless_out([request])]

    def _can_read(self) -> bool:
        """Whether the store works at all; if it does not, that is an outage from now on."""
        try:
            self._committer.follow_meta()
        except StoreError as error:
            self._fail(error)
            return False
        return True

    def _keep_house(self) -> None:
        local_us = self._local_us()
        due = local_us >= self._house_at_us
        hurried = self._hurry.is_set() and local_us >= self._look_at_us
        if not due and (not hurried or self._failure is not None):
            return
        self._hurry.clear()
        works = not due
        try:
            if due:
                self._house_at_us = local_us + MARK_US
                self._store.swap([], self.clock.mark())
                self._committer.follow_meta()
                works = True
            if not self._store.exclusive:
                # After an outage the leases come first: others may have renewed them meanwhile.
                self._look(local_us, hurried=hurried or self._failure is not None)
            self._recover()
            self._prune(local_us)
        except StoreError as error:
            self._complain(error)
            if not works or self._failure is not None:
                self._fail(error)

    def _fail(self, error: StoreError) -> None:
        self._failure = error
        if self._failing_since_us is None:
            self._failing_since_us = self._local_us()

    def _recover(self) -> None:
        if self._failing_since_us is not None:
            failed_us = self._local_us() - self._failing_since_us
            _log.warning("%s can be used again, after %.1f s", self.store_url, failed_us / 1e6)
            if failed_us >= MARK_US:  # the next one is news; but a store that comes and goes fills no log
                self._quiet_until_us = 0
        self._failing_since_us = self._failure = None

    def _look(self, local_us: int, *, hurried: bool) -> None:
        """Read what others have written: their marks, and the leases that they have granted."""
        self.clock.follow(self._store.marks())
        if local_us < self._look_at_us and not hurried:
            return
        began_us = self._local_us()
        self._held = self._store.held(self.clock.tick())
        took_us = self._local_us() - began_us
        self._look_at_us = local_us + max(HURRY_US, SHARE * took_us)
        self._wake()

    def _prune(self, local_us: int) -> None:
        if local_us >= self._prune_at_us:
            before = self.clock.tick() - self.meta.layout.ms_to_ticks(KEPT_MS)
            pruned = self._store.prune(before, KEPT_SPANS, PRUNE)
            self._prune_at_us = local_us + (PRUNE_US if pruned < PRUNE else 0)

    def _thin(self, written: Iterable[Record | None]) -> None:
        """Bound the provenance of the machines whose records have just begun a new span."""
        meta = self.meta
        keep = max(1, KEPT_SPANS // 2 // (meta.last_machine + 1 - meta.first_machine))
        # A machine has no more spans than its record has had writes.  Of those that may have too many each is looked
        # at after `chance` new ones on average, so that this costs a small part of what these did.
        chance = max(1, keep // SLACK)
        machines = {
            record.machine
            for record in written
            if record is not None
            and record.token is not None
            and record.start == record.span_start
            and record.gen > keep
            and self._pick(chance) == 0
        }
        if machines:
            try:
                with self._busy():
                    self._store.thin(machines, keep)
            except StoreError as error:
                self._complain(error)

    def _complain(self, error: StoreError) -> None:
        """Log a failure of the store; while they go on, one every now and then."""
        local_us = self._local_us()
        if local_us < self._quiet_until_us:
            self._unlogged += 1
            return
        self._quiet_until_us = local_us + LOG_INTERVAL_US
        more = f" ({self._unlogged} more failures since the last line)" if self._unlogged else ""
        self._unlogged = 0
        _log.error("%s%s", error, more)

    def _next_batch(self, wait_s: float) -> list[Ticket | None]:
        """The requests that wait, up to `BATCH`, with None after the last one ever; none if none comes in time."""
        batch: list[Ticket | None] = []
        with contextlib.suppress(queue.Empty):
            _, _, ticket = self._waiting.get(timeout=wait_s)
            batch.append(ticket)
            while len(batch) < BATCH:
                _, _, ticket = self._waiting.get_nowait()
                batch.append(ticket)
        return batch


def _record_lease(request: Request | Trace, settled: Settled) -> None:
    """Log what was granted before its holder is told of it: the log is complete whenever the process dies."""
    record = settled.record
    if record is None:
        return
    if isinstance(request, Release):
        verb, what = "released", f"free from {record.fence}"
    else:
        verb = "acquired" if isinstance(request, Acquire) else "renewed"
        what = f"window [{record.start}, {record.fence})"
    lease = [verb, record.machine, record.gen, record.start, record.fence]
    _log.info("machine %d %s: %s", record.machine, verb, what, extra={"lease": lease})
