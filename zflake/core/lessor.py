"""The lessor: how a delegator decides on a lease request, given what the store holds.

Two rules carry the uniqueness of every leased ID:

1. A window begins at or above the machine's fence and ends at the new fence.  A grant never lowers a
   fence; a release does, to no less than what may have been minted.
2. A decision is either an answer, read off the record as it is stored, or a `Swap` to be tried.  Whoever
   tries one reads the store again, whatever came of it (done, lost the race, unknown), and decides again.
   A swap that went through shows as a record whose token is the request's own: a repeat.  So a reply never
   leaves before its record is durable, never speaks of an attempt, and a lost reply costs nothing.

`now` is the timeline's tick.  A clock that is wrong makes a lease come early or late, never twice.

What no rule can save is a store that forgets.  Where it may have (`floor_after_loss`), or where a renewal shows
that it has (`witnessed`), a floor rises above every window that may have been forgotten, and nothing is
granted below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from zflake.core.layout import Layout
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
POOL = 64
OFFER = 4 * POOL
"""How many machines with the lowest fences `acquire` needs to see, at most."""
REST_MS: Final = 60_000
"""How long a store that may have lost windows rests at least; a ttl, where that is longer."""
MARGIN_MS: Final = 10_000
"""And so much longer, for a timeline that was ahead of the clocks that are left."""
MAX_AHEAD_MS: Final = 3_600_000
"""How far ahead of all clocks a lost window may lie that is waited for.  The holder of one further ahead
follows this timeline from now on, and its window is reached when that gets there."""


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
        return _grant(meta, repeat)
    free = [record for record in lowest if max(record.fence, meta.floor) <= now]
    if not free:
        soonest = max(lowest[0].fence, meta.floor) if lowest else now + meta.ttl
        wait_ms = ticks_to_ms(meta, soonest - now)
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
    if record.token is not None and record.token == request.next:
        return _grant(meta, record)
    if record.token is None or record.token != request.token:
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
    return Swap(new, meta.version)


def release(meta: Meta, now: int, request: Release, *, record: Record) -> Answer | Swap:
    """Decide on a release: what the holder can't have minted in becomes free at once.

    `record` is the store's record of `request.machine`.  The answer to a release that a store confirms is
    `Released`.  A repeat finds its token gone and is told `lost`, which means the same to a holder that has
    closed its mint: this tenancy is over.
    """
    if record.token is None or record.token not in (request.token, request.next):
        return _lost(request.machine)
    minted = record.tenancy_start if request.last is None else request.last + 1
    fence = min(record.fence, max(minted, record.tenancy_start, now))
    return Swap(replace(record, fence=fence, gen=record.gen + 1, token=None), meta.version)


def witnessed(meta: Meta, now: int, latest: int, request: Renew, *, record: Record) -> Meta | None:
    """The meta to put in place where a renewal shows that the store has forgotten a grant; else None.

    Only a holder of this very store's can: its renewal names it.  That is so where the holder's gen is above the record's, or the same with another token.  A window that
    ends below the floor was forgotten by a loss that is known already.  While the store rests from one, a
    witness lifts the floor no further than its own window demands; after that, this is a new loss.

    `latest` is the latest tick that any clock of the cluster shows: the timeline, the wall, the marks.  The
    version is for the caller to draw: the store's forgotten past may have had the next one.
    """
    newer = request.gen > record.gen or (request.gen == record.gen and record.token != request.token)
    repeat = record.token is not None and record.token == request.next
    ours = request.store_id == meta.store_id and request.machine < meta.layout.machines
    if repeat or not ours or not newer or request.end is None or request.end <= meta.floor:
        return None
    end = min(request.end, latest + ms_to_ticks(meta.layout, MAX_AHEAD_MS))
    if now < meta.floor:
        floor = end + ms_to_ticks(meta.layout, MARGIN_MS)
    else:
        floor = rest_until(meta.layout, max(latest, end), meta.ttl)
    floor = min(floor, meta.layout.end_tick)
    return replace(meta, floor=floor) if floor > meta.floor else None


def floor_after_loss(meta: Meta, latest: int, ttl: int) -> int:
    """The floor where the store may have lost what it promised.

    `latest` is as in `witnessed`; `ttl` is that from now on, where it changes with this.
    """
    return max(meta.floor, rest_until(meta.layout, latest, max(ttl, meta.ttl)))


def latest_tick(layout: Layout, tick: int, marks_us: Sequence[int]) -> int:
    """The later of `tick` and of the marks (µs since the Unix epoch), but for those too far ahead to be waited for."""
    most = tick + ms_to_ticks(layout, MAX_AHEAD_MS)
    return max([tick, *(min((us - layout.epoch_us) // layout.tick_us, most) for us in marks_us)])


def rest_until(layout: Layout, latest: int, ttl: int) -> int:
    """The floor above every window that can have been granted while no clock showed more than `latest`."""
    rest = max(ms_to_ticks(layout, REST_MS), ttl) + ms_to_ticks(layout, MARGIN_MS)
    return min(latest + 1 + rest, layout.end_tick)


def ms_to_ticks(layout: Layout, ms: int) -> int:
    """So many milliseconds in ticks, rounded up."""
    return -(-ms // layout.tick_ms)


def resting_ms(meta: Meta, now: int) -> int:
    """For how long nothing is granted yet, in milliseconds."""
    return ticks_to_ms(meta, meta.floor - now)


def resting_s(meta: Meta, now: int) -> int:
    """The same in seconds, rounded up, for people."""
    return -(-resting_ms(meta, now) // 1000)


def ticks_to_ms(meta: Meta, ticks: int) -> int:
    """How long to wait for `ticks` to pass, in milliseconds, rounded up."""
    return max(0, ticks) * meta.layout.tick_ms


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
    return Refusal(
        Refused.TOO_EARLY,
        f"machine {record.machine} has its window until tick {record.fence} already",
        ticks_to_ms(meta, start + 1 - meta.ttl - now),
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
