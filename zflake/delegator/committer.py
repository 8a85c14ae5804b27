"""The committer: settles lease requests against the store.

Requests that come together commit together, each with its own outcome.  Every round reads what the store
holds, has the lessor decide, and tries the swaps that come of it; what was tried is read again in the next
round, whatever became of it.  So an answer to a grant only ever comes off the store.

The committer also follows meta, and raises the floor before anything else is decided if the store may have
forgotten: core/loss.py says when.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from zflake.core import lessor, loss
from zflake.core.lease import (
    VERSIONS,
    Acquire,
    Answer,
    Grant,
    Meta,
    Record,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
    Swap,
    Trace,
    Traced,
)
from zflake.delegator.clock import DelegatorClock
from zflake.errors import StoreError
from zflake.stores.contract import Store

ROUNDS: Final = 8
"""Times that a request is decided again after it lost its race."""
FAILURES: Final = 2
"""Failures of the store after which a batch is given up."""
RETRY_MS: Final = 500
"""Milliseconds after which a request that was not settled may be sent again."""

_log = logging.getLogger("zflake.lease")


class Settled(NamedTuple):
    """The outcome of a request: the answer, and the record as it is stored if the request changed it."""

    answer: Answer | Traced
    record: Record | None


def unavailable(failure: StoreError | None) -> Refusal:
    """The answer to a request that the store did not settle; None: it lost its races."""
    why = f"lost the write race {ROUNDS} times" if failure is None else str(failure)
    return Refusal(
        Refused.UNAVAILABLE, f"the store did not settle the request ({why}); send it again", RETRY_MS
    )


class Committer:
    """Settles requests by the rules of the lessor; used by one thread at a time.

    `pick(n)` draws a number from 0 to n - 1.  `complain` is told of failures of the store.
    """

    def __init__(
        self,
        store: Store,
        meta: Meta,
        clock: DelegatorClock,
        *,
        pick: Callable[[int], int] = secrets.randbelow,
        complain: Callable[[StoreError], None],
    ) -> None:
        self._store = store
        self.meta = meta
        """The store's meta, as it was last read."""
        self._clock = clock
        self._pick = pick
        self._complain = complain
        self._past: set[int] = set()  # the versions that meta had before
        self.failure: StoreError | None = None
        """Why the last batch was given up; None if it was settled."""

    def settle(self, requests: Sequence[Request | Trace]) -> list[Settled]:
        """Settle requests together; one that the store does not settle is `unavailable`."""
        settled: dict[int, Settled] = {}
        tried: dict[int, Record] = {}
        failures = 0
        self.failure = None
        for attempt in range(ROUNDS):
            try:
                # A swap fails for good once meta has moved on; and if others may have moved it, a refusal
                # by what it was would be wrong.
                if attempt or not self._store.exclusive:
                    self.follow_meta()
                swaps = self._decide(requests, tried, settled)
                if not swaps:
                    break
                tried.update({i: swap.new for i, swap in swaps.items()})
                self._store.swap(list(swaps.values()), self._clock.mark())
            except StoreError as error:
                # The swaps that were tried may have happened.  The next round reads the outcome, if the store
                # can be read at all.
                self._complain(error)
                failures += 1
                if failures == FAILURES:
                    self.failure = error
                    break
        unsettled = Settled(unavailable(self.failure), None)
        return [settled.get(i, unsettled) for i in range(len(requests))]

    def follow_meta(self) -> None:
        """Read meta anew, and raise the floor if the store has lost what it promised.

        Raises `StoreError` if it is another store, was emptied, or the cluster was moved away.
        """
        meta = self._store.meta()
        if meta is None or meta.store_id != self.meta.store_id:
            raise StoreError(
                f"{self._store.url} was emptied or replaced while in use: nothing is granted any more. Bring it back as it"
                " was, or restart all delegators, without --new: it then rests until every lost window has ended"
            )
        if meta.moved:
            raise StoreError(
                f"{self._store.url} was moved to {meta.moved}: stop this delegator and start on that"
            )
        incarnation = self._store.incarnation(meta)
        if loss.is_lost(self.meta, self._past, meta, incarnation):
            self._rest(meta, incarnation)
            return
        if meta.floor > self.meta.floor and (rest_s := loss.resting_s(meta, self._clock.tick())):
            _log.warning(
                "another delegator found that %s may have lost leases that still run. Nothing is granted for %d s",
                self._store.url,
                rest_s,
            )
        self._adopt(meta)

    def _decide(
        self, requests: Sequence[Request | Trace], tried: dict[int, Record], settled: dict[int, Settled]
    ) -> dict[int, Swap]:
        """Settle what the store answers already; gives the swaps to try for the others."""
        now = self._clock.tick()
        open_ = {i: request for i, request in enumerate(requests) if i not in settled}
        tokens = [request.next for request in open_.values() if isinstance(request, Acquire)]
        machines = [request.machine for request in open_.values() if isinstance(request, Renew | Release)]
        repeats = dict(zip(tokens, self._store.by_tokens(tokens), strict=True))
        records = dict(zip(machines, self._store.by_machines(machines), strict=True))
        swaps: dict[int, Swap] = {}
        lowest: Sequence[Record] | None = None
        taken: set[int] = set()
        for i, request in open_.items():
            record: Record | None
            if isinstance(request, Trace):
                settled[i] = Settled(self._store.trace(request.machine, request.tick), None)
                continue
            if isinstance(request, Acquire):
                record = repeats[request.next]
                if record is None and lowest is None:
                    meta = self.meta
                    lowest = self._store.lowest(meta.first_machine, meta.last_machine, lessor.OFFER)
                free = [r for r in lowest or () if r.machine not in taken]
                decision = lessor.acquire(
                    self.meta, now, request, repeat=record, lowest=free, pick=self._pick
                )
                if isinstance(decision, Refusal):
                    self._store.look_anew()  # for the next who asks
            elif isinstance(request, Renew):
                record = records[request.machine]
                self._hear_witness(request, record)
                decision = lessor.renew(self.meta, now, request, record=record)
            else:
                record = records[request.machine]
                if record == tried.get(i):
                    # A released record keeps no token that a repeat could show; that it is the one that was
                    # tried says as much.
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
        """Raise the floor if the renewal shows that the store has forgotten a grant."""
        clock = self._clock
        while new := loss.witnessed(self.meta, clock.tick(), clock.latest(), request, record=record):
            self._raise_floor(
                self.meta,
                replace(new, version=self._pick(VERSIONS)),
                f"has lost leases: machine {request.machine} was renewed by a grant (gen {request.gen}) that it does "
                "not know of",
            )
            self.follow_meta()

    def _adopt(self, meta: Meta) -> None:
        if meta.version != self.meta.version:
            self._past.add(self.meta.version)
        self.meta = meta

    def _rest(self, meta: Meta, incarnation: str) -> None:
        marks_us = [mark.timeline_us for mark in self._store.marks()]
        latest = loss.latest_tick(meta.layout, self._clock.latest(), marks_us)
        known = self.meta
        new = loss.after_loss(
            meta, incarnation, latest, ttl=known.ttl, floor=known.floor, version=self._pick(VERSIONS)
        )
        why = "is not what it was (it was restarted, restored or failed over): it may have lost leases that still run"
        if not self._raise_floor(meta, new, why):
            raise StoreError(f"{self._store.url} is not what it was, and others are writing to it")

    def _raise_floor(self, old: Meta, new: Meta, why: str) -> bool:
        """Put `new`, whose floor is higher, in the place of `old`; False if another delegator has changed meta."""
        if not self._store.swap_meta(old, new):
            return False
        self._adopt(new)
        rest_s = loss.resting_s(new, self._clock.tick())
        _log.warning("%s %s. Nothing is granted for %d s", self._store.url, why, rest_s)
        return True
