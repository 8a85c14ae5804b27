"""The lessor: how a delegator decides on a lease request, given what the store holds.

Three rules carry the uniqueness of every leased ID:

1. A window begins at or above the machine's fence and ends at the new fence.  A grant never lowers a
   fence; a release does, to no less than what may have been minted.
2. A decision is either an answer, read off the record as it is stored, or a `Swap` to be tried.  The caller
   tries it, reads the store again whatever came of that (done, lost the race, unknown), and decides again.
   A swap that went through shows as a record whose token is the request's own: a repeat.  So a reply never
   leaves before its record is durable, never speaks of an attempt, and a lost reply costs nothing.

`now` is the timeline's tick.  A clock that is wrong makes a lease come early or late, never twice.

3. Where there are keys, a lease is bound to the one that acquired it.  A token that another key shows is nobody's:
   who stole it neither gets the holder's window nor gives it back.

These rules can't save a store that forgets: loss.py has the floor that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Meta,
    Record,
    Refusal,
    Refused,
    Release,
    Renew,
    Swap,
)

# Racing delegators rarely pick the same machine out of this many, and a machine rests as long as it can.
POOL: Final = 64
OFFER: Final = 4 * POOL
"""Machines with the lowest fences that `acquire` needs to see, at most."""


def acquire(
    meta: Meta,
    now: int,
    request: Acquire,
    *,
    repeat: Record | None,
    lowest: Sequence[Record],
    pick: Callable[[int], int],
) -> Answer | Swap:
    """Decide on an acquire.

    `repeat` is the record whose token is the request's, if there is one.  `lowest` are the records with the
    lowest fences of the leased range, ascending, never-used ones included: `OFFER` of them, or all there
    are.  `pick(n)` draws a number from 0 to n - 1.
    """
    if repeat is not None:
        if repeat.holder.key != request.holder.key:
            return _lost(repeat.machine)
        return _grant(meta, repeat)
    free = [record for record in lowest if max(record.fence, meta.floor) <= now]
    if not free:
        soonest = max(lowest[0].fence, meta.floor) if lowest else now + meta.ttl
        wait_ms = meta.layout.ticks_to_ms(soonest - now)
        why = f"all machines from {meta.first_machine} to {meta.last_machine} are held or resting"
        if now < meta.floor:
            why = "the store may have lost leases that still run: nothing is granted until these have ended"
        return Refusal(
            Refused.NO_FREE_MACHINE, f"{why}; the wait is {-(-wait_ms // 1000)} s at least", wait_ms
        )
    record = free[pick(min(POOL, max(1, len(free) // 4)))]
    window = _next_window(meta, now, record)
    if isinstance(window, Refusal):
        return window
    start, end = window
    return Swap(
        record,
        Record(
            machine=record.machine,
            fence=end,
            gen=record.gen + 1,
            token=request.next,
            start=start,
            tenancy_start=start,
            holder=request.holder,
            span_start=start,
        ),
        meta.version,
    )


def renew(meta: Meta, now: int, request: Renew, *, record: Record) -> Answer | Swap:
    """Decide on a renewal: the window that follows, never a longer one.

    `record` is the store's record of `request.machine`.
    """
    if record.token is None or record.holder.key != request.key:
        return _lost(request.machine)
    if record.token == request.next:
        return _grant(meta, record)
    if record.token != request.token:
        return _lost(request.machine)
    if not meta.first_machine <= record.machine <= meta.last_machine:
        # The operator took this machine out of the leased range; a static holder may be using it soon.
        return _lost(request.machine)
    window = _next_window(meta, now, record)
    if isinstance(window, Refusal):
        return window
    start, end = window
    span_start = record.span_start if start == record.fence else start
    new = replace(
        record, fence=end, gen=record.gen + 1, token=request.next, start=start, span_start=span_start
    )
    return Swap(record, new, meta.version)


def release(meta: Meta, now: int, request: Release, *, record: Record) -> Answer | Swap:
    """Decide on a release: what the holder can't have minted in becomes free at once.

    `record` is the store's record of `request.machine`.  The answer to a release that a store confirms is
    `Released`.  A repeat finds its token gone and is told `lost`, which means the same to a holder that has
    closed its mint: this tenancy is over.
    """
    if record.token is None or record.holder.key != request.key:
        return _lost(request.machine)
    if record.token not in (request.token, request.next):
        return _lost(request.machine)
    minted = record.tenancy_start if request.last is None else request.last + 1
    fence = min(record.fence, max(minted, record.tenancy_start, now))
    # A tenancy in which nothing was minted leaves no provenance, or strangers that acquire and release without end fill the store.
    cut = record.tenancy_start if request.last is None else fence
    return Swap(record, replace(record, fence=fence, gen=record.gen + 1, token=None), meta.version, cut)


def _next_window(meta: Meta, now: int, record: Record) -> tuple[int, int] | Refusal:
    start = max(now, record.fence, meta.floor)
    end = min(now + meta.ttl, meta.layout.end_tick)
    if start < end:
        return start, end
    if start >= meta.layout.end_tick:
        return Refusal(
            Refused.EXHAUSTED,
            f"layout {meta.layout.name} ended at {meta.layout.overflows.isoformat()}: it has no ticks left",
        )
    why = f"machine {record.machine} has its window until tick {record.fence} already"
    if record.fence < meta.floor:
        why = f"the store may have lost leases that still run: no window begins before tick {meta.floor}"
    return Refusal(
        Refused.TOO_EARLY,
        why,
        meta.layout.ticks_to_ms(start + 1 - meta.ttl - now),
    )


def _grant(meta: Meta, record: Record) -> Grant:
    assert record.token is not None
    return Grant(
        machine=record.machine,
        gen=record.gen,
        start=record.start,
        end=record.fence,
        token=record.token,
        layout=meta.layout,
        ttl=meta.ttl,
        store_id=meta.store_id,
    )


def _lost(machine: int) -> Refusal:
    return Refusal(Refused.LOST, f"the lease on machine {machine} has moved on; acquire afresh")
