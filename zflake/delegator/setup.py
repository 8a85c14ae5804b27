"""What a store says and what the command line says, brought together before anything is granted."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from zflake.core import lessor
from zflake.core.layout import DEFAULT, Layout
from zflake.core.lease import READER, SCHEMA, VERSIONS, Mark, Meta, Swap
from zflake.core.timeline import MAX_BACK_US, Carrier, Marks, cold_start_us, tick_of
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Store

DEFAULT_TTL_MS: Final = 30_000
MIN_TTL_MS: Final = 1_000
TRIES: Final = 8
LISTEN_S: Final = 3.0
"""A delegator that runs moves its mark every second."""
LISTEN_STEPS: Final = 60
"""Looks in that time; a delegator that joins is behind by the time between two, and a round trip, at most."""
FORGET_MARKS_US: Final = 86_400_000_000
"""How old the mark of a delegator that has gone may get."""

_log = logging.getLogger("zflake.delegator")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a delegator was told about its store; None: what the store says, or the default."""

    layout: Layout | None = None
    """Without regard to its epoch, which `epoch_ms` states."""
    epoch_ms: int | None = None
    ttl_ms: int | None = None
    machines: tuple[int, int] | None = None
    """First and last leased machine ID, both included."""
    new: bool = False
    """Whether the operator knows that no cluster ever ran on what this store replaces."""


def listen(store: Store, own: str, sleep: Callable[[float], object] = time.sleep) -> int | None:
    """The now of the delegators that run on this store already; None if no mark moves for `LISTEN_S`.

    `own` is the name of this delegator's own mark.
    """
    if store.exclusive:
        return None
    marks = Marks(own)
    marks.read(store.marks())
    quiet = 0
    while quiet < LISTEN_STEPS:
        sleep(LISTEN_S / LISTEN_STEPS)
        quiet = quiet + 1 if marks.read(store.marks()) is None else 0
        if marks.running_us is not None:
            return marks.running_us
    return None


def start_timeline(
    marks: Sequence[Mark], *, accept_clock: bool, wall_us: int, local_us: int, running_us: int | None = None
) -> Carrier:
    """The timeline at the start of this delegator.

    The clocks are to be read after the marks: what the store takes to give them would be added otherwise.
    Where others run (`running_us`, as `listen` says) theirs is joined, whatever this wall clock shows.  With
    `accept_clock` it begins at the wall clock, whatever the marks say; `rewind` then makes that stand.

    Raises `ConfigError` where the wall clock can't be right, or is to be accepted while others run.
    """
    if running_us is not None and accept_clock:
        raise ConfigError("--accept-clock: other delegators are running on this store; stop them first")
    if running_us is not None:
        # What was used of the timeline by others, too; a mark far ahead is of a clock that was wrong.
        later = (mark.now_us for mark in marks if mark.now_us < running_us + MAX_BACK_US)
        return Carrier(max(running_us, *later), local_us)
    if accept_clock:
        _log.warning("--accept-clock: the timeline begins at the wall clock, whatever it was before")
        return Carrier(wall_us, local_us)
    return Carrier(cold_start_us(wall_us, [mark.now_us for mark in marks]), local_us)


def settle_meta(store: Store, wishes: Wishes, now_us: int) -> Meta:
    """The meta to lease by: the store's, changed where it may be, or a first one.

    A store without a meta may be a new cluster's, or the ruins of one whose holders still mint.  Nobody can
    tell, so nothing is granted until every window that such a cluster could have granted has ended, unless
    `wishes.new` says that there was none.  The same goes for a store that is not what it was, whatever the
    wishes.

    Raises `ConfigError` where a wish contradicts the store or the layout, `StoreError` where the store
    fails.
    """
    meta = store.meta()
    if meta is None:
        try:
            return _initialise(store, wishes, now_us)
        except StoreError:
            meta = store.meta()
            if meta is None:  # else another delegator was the first, just now
                raise
    if wishes.new:
        _log.warning("--new does nothing: %s has been initialised before", store.url)
    for _ in range(TRIES):
        check_moved(store, meta)
        if (settled := _change(store, meta, wishes, now_us)) is not None:
            return settled
        # Another delegator has changed it, which may come to the same.
        meta = store.meta() or meta
    raise StoreError(f"{store.url}: others keep changing the store's settings; start again")


def _change(store: Store, meta: Meta, wishes: Wishes, now_us: int) -> Meta | None:
    """Meta as it is to be, written where it is not so yet; None where somebody else was faster."""
    _check_layout(store, meta.layout, wishes)
    first, last = _machines(meta.layout, wishes) or (meta.first_machine, meta.last_machine)
    wished = replace(
        meta,
        ttl=meta.ttl if wishes.ttl_ms is None else _ttl(meta.layout, wishes.ttl_ms),
        first_machine=first,
        last_machine=last,
        incarnation=store.incarnation(),
        schema=max(meta.schema, SCHEMA),
        reader=max(meta.reader, READER),
    )
    if wished == meta:
        return meta
    wished = replace(wished, version=meta.version + 1)
    lost = wished.incarnation != meta.incarnation
    if lost:
        floor = lessor.floor_after_loss(meta, _latest(store, meta.layout, now_us), wished.ttl)
        wished = replace(wished, floor=floor, version=secrets.randbelow(VERSIONS))
    if not store.swap_meta(meta, wished):
        return None
    if lost:
        _log.warning(
            "%s is not what it was when it was last used (restored, replaced or moved here): it may have lost "
            "leases that still run. Nothing is granted for %d s",
            store.url,
            lessor.resting_s(wished, tick_of(wished.layout, now_us)),
        )
    if (wished.ttl, first, last) != (meta.ttl, meta.first_machine, meta.last_machine):
        _log.warning("the store's settings changed: ttl %d ticks, machines %d to %d", wished.ttl, first, last)
    return wished


def check_moved(store: Store, meta: Meta) -> None:
    """Raise `ConfigError` where the cluster was moved away from this store."""
    if meta.moved:
        raise ConfigError(f"{store.url} was moved to {meta.moved}: start on that store")


def tidy_marks(store: Store, now_us: int) -> None:
    """Forget the marks of delegators that have long gone; the latest mark stays."""
    before_us = min(now_us - FORGET_MARKS_US, max((mark.now_us for mark in store.marks()), default=0))
    if any(mark.now_us < before_us for mark in store.marks()):
        store.forget_marks(before_us)


def rewind(store: Store, meta: Meta, wall_us: int) -> int:
    """Set the store's time back to the wall clock, after a clock far ahead was once believed.

    Every fence stays: no tick that was granted is granted again.  Tenancies whose windows lie far ahead are
    ended, since they could not be renewed for as long: their holders are told `lost`, and acquire afresh.
    Gives how many these were.

    Raises `StoreError` where the store fails; it may be said again then.
    """
    now = tick_of(meta.layout, wall_us)
    far = now + meta.ttl + lessor.ms_to_ticks(meta.layout, lessor.MARGIN_MS)
    ahead = [record for record in store.held(now) if record.fence > far]
    swaps = [Swap(replace(record, gen=record.gen + 1, token=None), meta.version) for record in ahead]
    store.set_marks(wall_us)
    ended = sum(store.swap(swaps)) if swaps else 0
    if ended < len(ahead):
        raise StoreError(f"{store.url}: somebody else is writing to it; stop all delegators first")
    if ahead:
        _log.warning("gave up %d tenancies whose windows lie ahead of the clock; their fences stay", ended)
    return ended


def check_wishes(wishes: Wishes) -> None:
    """Raise `ConfigError` where the wishes contradict each other, as far as can be told without a store."""
    layout = wishes.layout or DEFAULT
    if wishes.ttl_ms is not None:
        _ttl(layout, wishes.ttl_ms)
    if wishes.layout is not None:
        _machines(layout, wishes)


def _initialise(store: Store, wishes: Wishes, now_us: int) -> Meta:
    if store.half_filled:
        raise ConfigError(f"a copy into {store.url} was broken off: make it again, to the same URL")
    layout = wishes.layout or DEFAULT
    if wishes.epoch_ms is not None:
        layout = layout.with_epoch(wishes.epoch_ms)
    now = tick_of(layout, now_us)
    if not 0 <= now < layout.end_tick:
        raise ConfigError(
            f"layout {layout.name} goes from {layout.epoch.isoformat()} to {layout.overflows.isoformat()}, "
            "and it is not that time now: take another --epoch, or set the clock"
        )
    ttl = _ttl(layout, DEFAULT_TTL_MS if wishes.ttl_ms is None else wishes.ttl_ms)
    first, last = _machines(layout, wishes) or (0, layout.machines - 1)
    new = wishes.new and not store.had_data
    floor = 0 if new else lessor.rest_until(layout, _latest(store, layout, now_us), ttl)
    meta = Meta(
        secrets.token_hex(16),
        layout,
        ttl,
        first,
        last,
        floor,
        version=secrets.randbelow(VERSIONS),
        incarnation=store.incarnation(),
    )
    store.initialise(meta)
    if new:
        _log.info("made a new store: %s", store.url)
    elif store.had_data:
        _log.warning(
            "%s is gone, and a new one is in its place: nothing is granted for %d s%s",
            store.url,
            lessor.resting_s(meta, tick_of(meta.layout, now_us)),
            ". --new does nothing: there was a store here, as the marker beside it says"
            if wishes.new
            else "",
        )
    else:
        _log.warning(
            "%s was empty. In case it replaces one that was lost, nothing is granted for %d s; "
            "where there was no such store, stop, delete this one, and start with --new",
            store.url,
            lessor.resting_s(meta, tick_of(meta.layout, now_us)),
        )
    return meta


def _latest(store: Store, layout: Layout, now_us: int) -> int:
    return lessor.latest_tick(layout, tick_of(layout, now_us), [mark.now_us for mark in store.marks()])


def _check_layout(store: Store, layout: Layout, wishes: Wishes) -> None:
    wished = wishes.layout or layout
    epoch_ms = wished.epoch_ms if wishes.layout and wishes.epoch_ms is None else wishes.epoch_ms
    wished = wished.with_epoch(layout.epoch_ms if epoch_ms is None else epoch_ms)
    if not wished.same_ids(layout):
        raise ConfigError(
            f"{store.url} has layout {layout.name} ({layout}, epoch {layout.epoch.isoformat()}), not "
            f"{wished.name} ({wished}, epoch {wished.epoch.isoformat()}): a store keeps its layout for good. "
            "Leave --layout and --epoch out, or take another store"
        )


def _ttl(layout: Layout, ttl_ms: int) -> int:
    if ttl_ms < MIN_TTL_MS or ttl_ms % layout.tick_ms:
        raise ConfigError(
            f"a ttl is at least {MIN_TTL_MS} ms and a whole number of ticks "
            f"({layout.tick_ms} ms in layout {layout.name}), not {ttl_ms} ms"
        )
    return ttl_ms // layout.tick_ms


def _machines(layout: Layout, wishes: Wishes) -> tuple[int, int] | None:
    if wishes.machines is None:
        return None
    first, last = wishes.machines
    if not 0 <= first <= last < layout.machines:
        raise ConfigError(
            f"machines {first}-{last} do not fit layout {layout.name}, which has 0-{layout.machines - 1}"
        )
    return first, last
