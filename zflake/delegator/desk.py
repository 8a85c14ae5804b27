"""The lease desk: settles lease requests against the store, in a thread beside the router loop.

Requests that are waiting commit together, each with its own outcome.  Every round reads what the store
holds, has the lessor decide, and tries the swaps that come of it; what was tried is read again in the next
round, whatever became of it.  So an answer to a grant only ever comes off the store.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from zflake.core import lessor
from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Mark,
    Meta,
    Record,
    Refusal,
    Refused,
    Released,
    Renew,
    Request,
    Swap,
    Trace,
    Traced,
)
from zflake.errors import StoreError
from zflake.stores.contract import Store

BATCH: Final = 256
"""How many requests commit together, at most."""
ROUNDS: Final = 8
"""How often a request that loses its race is decided again."""
FAILURES: Final = 2
"""After how many failures of the store a batch is given up."""
RETRY_MS: Final = 500
MAX_ACQUIRES: Final = 5_000
MAX_BACKLOG: Final = 10_000
"""How many requests may wait for the store, acquires the fewer; the next ones are `overloaded`."""
MAX_TRACES: Final = 1_000
QUIET_US: Final = 10_000_000
"""How often a failure of the store that goes on is logged again."""
MARK_S: Final = 1.0
PRUNE_US: Final = 10_000_000
"""How often provenance is bounded, and so many spans at a time."""
PRUNE: Final = 2_000
KEPT_SPANS: Final = 500_000
KEPT_MS: Final = 400 * 86_400_000
"""Provenance: this many spans, one for each unbroken tenancy, and for this long."""
STALE_US: Final = 2_000_000
"""A request that sat for longer is dropped: whoever sent it has sent it again."""

_log = logging.getLogger("zflake.lease")


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request on its way through the desk."""

    request: Request | Trace
    arrived_us: int
    prefix: list[bytes]
    msgid: int


class Settled(NamedTuple):
    """What came of a request: the answer, and the record as it is stored where the request changed it."""

    answer: Answer | Traced
    record: Record | None


class LeaseDesk:
    """Settles lease requests: `settle` at once, or `submit` and later `collect` through the thread.

    `now` gives the timeline's tick, `latest` the latest that any clock here shows, `local_us` a clock for the age of requests, `ring` is called in the
    thread when there is something to collect.  `mark`, if given, goes with every commit, and is written
    every `MARK_S` where there is none.
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
        pick: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._store = store
        self.meta = meta
        """What holds for the whole store, as it was last read; written by the thread."""
        self._now = now
        self._latest = latest or now
        self._local_us = local_us
        self._ring = ring
        self._mark = mark
        self._pick = pick
        self._prune_at_us = 0
        self._complaint = ""
        self._quiet_until_us = 0
        # Renewals and releases come first: a rush of acquires must not cost anybody the lease that he has.
        self._waiting: queue.PriorityQueue[tuple[int, int, Ticket | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._done: deque[tuple[Ticket, Settled]] = deque()
        self._thread = threading.Thread(target=self._run, name="lease-desk", daemon=True)
        self.stale = 0
        """How many requests were dropped for their age."""
        self.fault: BaseException | None = None
        """What ended the thread, where that was not `stop`: nothing will be settled any more."""

    # --- the router loop's side ---

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

    def stop(self, timeout_s: float) -> bool:
        """Settle what waits, then end the thread; False where the store keeps it for longer."""
        self._waiting.put((3, next(self._numbers), None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread's side ---

    def settle(self, requests: Sequence[Request | Trace]) -> list[Settled]:
        """Settle requests together; one that the store does not settle is `unavailable`."""
        settled: dict[int, Settled] = {}
        tried: dict[int, Record] = {}
        failures = 0
        for attempt in range(ROUNDS):
            try:
                if attempt:  # a swap fails for good where meta has moved on
                    self._read_meta()
                swaps = self._decide(requests, tried, settled)
                if not swaps:
                    break
                tried.update({i: swap.new for i, swap in swaps.items()})
                self._store.swap(list(swaps.values()), self._mark() if self._mark else None)
            except StoreError as error:
                # Whatever was tried may have happened.  The next round reads the outcome, if the store
                # can be read at all.
                self._complain(error)
                failures += 1
                if failures == FAILURES:
                    break
        unsettled = Settled(
            Refusal(Refused.UNAVAILABLE, "the store did not settle the request; send it again", RETRY_MS),
            None,
        )
        return [settled.get(i, unsettled) for i in range(len(requests))]

    def _decide(
        self, requests: Sequence[Request | Trace], tried: dict[int, Record], settled: dict[int, Settled]
    ) -> dict[int, Swap]:
        """Settle what the store answers already; gives the swaps to try for the others."""
        now = self._now()
        swaps: dict[int, Swap] = {}
        lowest: Sequence[Record] | None = None
        taken: set[int] = set()
        for i, request in enumerate(requests):
            if i in settled:
                continue
            record: Record | None
            if isinstance(request, Trace):
                settled[i] = Settled(self._store.trace(request.machine, request.tick), None)
                continue
            if isinstance(request, Acquire):
                record = self._store.by_token(request.next)
                if record is None and lowest is None:
                    meta = self.meta
                    lowest = self._store.lowest(meta.first_machine, meta.last_machine, lessor.OFFER)
                free = [r for r in lowest or () if r.machine not in taken]
                decision = lessor.acquire(
                    self.meta, now, request, repeat=record, lowest=free, pick=self._pick
                )
            elif isinstance(request, Renew):
                record = self._store.by_machine(request.machine)
                self._hear_witness(request, record)
                decision = lessor.renew(self.meta, now, request, record=record)
            else:
                record = self._store.by_machine(request.machine)
                if record == tried.get(i):
                    # No token is left by which a release would know itself; its record is its own all the same.
                    settled[i] = Settled(Released(record.machine, record.fence), record)
                    continue
                decision = lessor.release(self.meta, now, request, record=record)
            if isinstance(decision, Swap):
                taken.add(decision.new.machine)
                swaps[i] = decision
            else:
                settled[i] = Settled(decision, record if isinstance(decision, Grant) else None)
        return swaps

    def _hear_witness(self, request: Renew, record: Record) -> None:
        """Have a renewal raise the floor that shows that the store has forgotten a grant."""
        while new := lessor.witnessed(self.meta, self._now(), self._latest(), request, record=record):
            swapped = self._store.swap_meta(new)
            self._read_meta()
            if swapped:
                _log.warning(
                    "%s has lost leases: machine %d was renewed as of gen %d, where the store knows of gen %d. "
                    "Nothing is granted for %d s",
                    self._store.url,
                    request.machine,
                    request.gen,
                    record.gen,
                    -(-lessor.ticks_to_ms(new, new.floor - self._now()) // 1000),
                )

    def _read_meta(self) -> None:
        meta = self._store.meta()
        if meta is None or meta.store_id != self.meta.store_id:
            raise StoreError(f"{self._store.url} was emptied or replaced while in use")
        self.meta = meta

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.fault = error
            self._ring()
            raise

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._prune()
            if not batch:
                self._write_mark()
                continue
            fresh = []
            for ticket in batch:
                if self._local_us() - ticket.arrived_us > STALE_US:
                    self.stale += 1
                else:
                    fresh.append(ticket)
            if not fresh:
                continue
            settled = self.settle([ticket.request for ticket in fresh])
            for ticket, outcome in zip(fresh, settled, strict=True):
                _record_grant(ticket.request, outcome)
            self._done.extend(zip(fresh, settled, strict=True))
            self._ring()

    def _prune(self) -> None:
        if self._local_us() < self._prune_at_us:
            return
        self._prune_at_us = self._local_us() + PRUNE_US
        before = self._now() - lessor.ms_to_ticks(self.meta.layout, KEPT_MS)
        try:
            self._store.prune(before, KEPT_SPANS, PRUNE)
        except StoreError as error:
            self._complain(error)

    def _write_mark(self) -> None:
        if self._mark is None:
            return
        try:
            self._store.swap([], self._mark())
            self._read_meta()
        except StoreError as error:
            self._complain(error)

    def _complain(self, error: StoreError) -> None:
        """Log a failure of the store; one that goes on, every now and then."""
        now_us = self._local_us()
        if str(error) != self._complaint or now_us >= self._quiet_until_us:
            self._complaint, self._quiet_until_us = str(error), now_us + QUIET_US
            _log.error("%s", error)

    def _next_batch(self) -> list[Ticket] | None:
        """What waits, up to `BATCH`; nothing after `MARK_S` without a request; None at the end."""
        try:
            _, _, first = self._waiting.get(timeout=MARK_S)
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
