"""State loss: how a delegator tells that its store may have forgotten a grant, and what it does then.

A store forgets when it is emptied, restored from a copy, or failed over to a replica that lagged.  The holders of
the forgotten windows go on minting, so no rule of the lessor's is safe until those windows have ended.  One number
guards against that: meta's *floor*, below which no window begins.

1. A loss raises the floor above every window that any clock of the cluster can have granted: the latest tick
   that one of them shows, the longest ttl, and a margin for a timeline that ran ahead of all that are left.
2. A loss shows in three ways: the store's incarnation is not the one that meta names (`is_lost`), meta itself is
   one of the past (`is_lost`), or a holder shows a grant that the record lacks (`witnessed`).
3. The floor is durable before anything is granted again, and no delegator lowers it: only an operator may, who knows that
   it is wrong.

Nothing ends a rest: the timeline reaches the floor.  Until then `lessor.acquire` refuses, and `lessor.renew` grants
no window that begins below the floor.

A first start is the same case: an empty store may be new, or the ruins of a lost one (`first_floor`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import Meta, Record, Renew
from zflake.core.timeline import tick_of

REST_MS: Final = 60_000
"""Milliseconds that a store rests at least after a loss; a longer ttl counts instead."""
MARGIN_MS: Final = 10_000
"""Milliseconds on top of that, for a timeline that was ahead of the clocks that are left."""
MAX_AHEAD_MS: Final = 3_600_000
"""Milliseconds ahead of all other clocks that a mark is believed, at most."""
REACH: Final = 2
"""The ttls ahead of all clocks that a witness is believed, at most: anyone may claim a lease, and each window was
granted one ttl ahead.  A holder that is told `lost` mints in no window, however far ahead."""


def is_lost(known: Meta, past: Collection[int], found: Meta, incarnation: str) -> bool:
    """Whether the store has lost what it promised since meta was `known`.

    `past` are the versions that meta had before, `found` is meta as the store holds it now, and `incarnation` is
    the store's own.  A version that was left behind, or a lower floor, shows an older copy of the data.
    """
    return found.version in past or found.floor < known.floor or found.incarnation != incarnation


def after_loss(found: Meta, incarnation: str, latest: int, *, ttl: int, floor: int, version: int) -> Meta:
    """The meta to write once the store has lost what it promised.

    `latest` is the latest tick of all clocks, as `latest_tick` gives it; `ttl` the longest in use, `floor` the
    highest known.  `version` is drawn at random: the forgotten past may have had the next one.
    """
    rest = rest_until(found.layout, latest, max(ttl, found.ttl))
    return replace(found, version=version, incarnation=incarnation, floor=max(found.floor, floor, rest))


def first_floor(layout: Layout, latest: int, ttl: int, *, new: bool) -> int:
    """The floor of a store that has no meta: 0 if it is known to be `new`, else that of a loss."""
    return 0 if new else rest_until(layout, latest, ttl)


def witnessed(meta: Meta, now: int, latest: int, request: Renew, *, record: Record) -> Meta | None:
    """Meta with the floor that a renewal demands, if it shows that the store has forgotten a grant; else None.

    A renewal is a witness if it names this very store, and its gen is above the record's, or the same with another
    token or another end (a late copy of an acquire that the store forgot is granted a window anew).  Of a machine ID
    that was leased by another key it is none: who has one key must not rest the others' cluster.  A window that ends below the floor was forgotten by a loss that is known already.  While the store
    rests, a witness lifts the floor no further than its own window demands; after that, this is a new loss.

    `latest` is as in `after_loss`; the caller draws the version.
    """
    granted, shown = (record.token, record.fence), (request.token, request.end)
    newer = request.gen > record.gen or (request.gen == record.gen and shown != granted)
    repeat = record.token is not None and record.token == request.next
    ours = request.store_id == meta.store_id and request.machine < meta.layout.machines
    theirs = record.holder.key not in ("", request.key)
    if repeat or theirs or not ours or not newer or request.end is None or request.end <= meta.floor:
        return None
    end = min(request.end, latest + REACH * meta.ttl)
    if now < meta.floor:
        floor = min(end + meta.layout.ms_to_ticks(MARGIN_MS), meta.layout.end_tick)
    else:
        floor = rest_until(meta.layout, max(latest, end), meta.ttl)
    return replace(meta, floor=floor) if floor > meta.floor else None


def latest_tick(layout: Layout, tick: int, marks_us: Sequence[int]) -> int:
    """The latest of `tick` and the marks (µs since the Unix epoch); a mark counts as `MAX_AHEAD_MS` ahead at most."""
    most = tick + layout.ms_to_ticks(MAX_AHEAD_MS)
    return max([tick, *(min(tick_of(layout, us), most) for us in marks_us)])


def rest_until(layout: Layout, latest: int, ttl: int) -> int:
    """The floor above every window that can have been granted while no clock showed more than `latest`."""
    rest = max(layout.ms_to_ticks(REST_MS), ttl) + layout.ms_to_ticks(MARGIN_MS)
    return min(latest + 1 + rest, layout.end_tick)


def resting_ms(meta: Meta, now: int) -> int:
    """Milliseconds until the store grants machine IDs again, and windows begin; 0 if it grants now."""
    return meta.layout.ticks_to_ms(meta.floor - now)


def resting_s(meta: Meta, now: int) -> int:
    """The same in seconds, rounded up, for people."""
    return -(-resting_ms(meta, now) // 1000)
