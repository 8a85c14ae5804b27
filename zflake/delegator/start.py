"""A delegator's start: the store's settings and the command line's are brought together before anything is granted."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from zflake import clock
from zflake.core import loss
from zflake.core.layout import DEFAULT, Layout
from zflake.core.lease import VERSIONS, Meta
from zflake.core.timeline import Timeline, tick_of
from zflake.delegator.clock import DelegatorClock
from zflake.delegator.moves import check_moved, rewind
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Store

DEFAULT_TTL_MS: Final = 30_000
MIN_TTL_MS: Final = 1_000
TRIES: Final = 8
"""Times that a change of the settings is tried while other delegators change them."""
FORGET_MARKS_US: Final = 86_400_000_000
"""Microseconds after which the mark of a delegator that has gone is forgotten."""

_log = logging.getLogger("zflake.delegator")


@dataclass(frozen=True, slots=True)
class Wishes:
    """An operator's wishes about the store; None: as the store says, or the default."""

    layout: Layout | None = None
    """Without regard to its epoch, which `epoch_ms` states."""
    epoch_ms: int | None = None
    ttl_ms: int | None = None
    machines: tuple[int, int] | None = None
    """First and last leased machine ID, both included."""
    new: bool = False
    """Whether the operator knows that this store replaces none on which a cluster ever ran."""

    def layout_on(self, base: Layout) -> Layout:
        """The wished layout, or else `base`, with the wished epoch if there is one."""
        layout = self.layout or base
        return layout if self.epoch_ms is None else layout.with_epoch(self.epoch_ms)


def start(
    store: Store,
    wishes: Wishes,
    timeline: Timeline,
    *,
    name: str,
    address: str,
    accept_clock: bool,
    local_us: Callable[[], int] = clock.local_us,
    wall_us: Callable[[], int] = clock.wall_us,
) -> tuple[Meta, DelegatorClock]:
    """The meta to lease by and the clock to lease by it, once both stand in the store.

    Raises what `settle_meta` raises.
    """
    meta = settle_meta(store, wishes, timeline.at(local_us()))
    if accept_clock:
        rewind(store, meta, timeline.at(local_us()))
    delegator_clock = DelegatorClock(timeline, meta.layout, name, address, local_us=local_us, wall_us=wall_us)
    tidy_marks(store, delegator_clock.timeline_us())
    store.swap([], delegator_clock.mark())
    return meta, delegator_clock


def settle_meta(store: Store, wishes: Wishes, timeline_us: int) -> Meta:
    """The meta to lease by: the store's, changed as far as it may be, or a first one.

    A store without a meta may be a new cluster's, or the ruins of one whose holders still mint.  The store can't
    tell, so nothing is granted until every window that such a cluster could have granted has ended, unless
    `wishes.new` says that there was none.  The same goes for a store that is not what it was, whatever the
    wishes.

    Raises `ConfigError` if a wish contradicts the store or the layout, `StoreError` if the store fails.
    """
    meta = store.meta()
    if meta is None:
        try:
            return _initialise(store, wishes, timeline_us)
        except StoreError:
            meta = store.meta()
            if meta is None:  # else another delegator was the first, just now
                raise
    if wishes.new:
        _log.warning("--new does nothing: %s has been initialised before", store.url)
    for _ in range(TRIES):
        check_moved(store, meta)
        if (settled := _change(store, meta, wishes, timeline_us)) is not None:
            return settled
        # Another delegator has changed it, which may come to the same.
        meta = store.meta() or meta
    raise StoreError(f"{store.url}: others keep changing the store's settings; start again")


def _change(store: Store, meta: Meta, wishes: Wishes, timeline_us: int) -> Meta | None:
    """Meta as it is to be, written if it is not so yet; None if another delegator was faster."""
    _check_layout(store, meta.layout, wishes)
    first, last = _machines(meta.layout, wishes) or (meta.first_machine, meta.last_machine)
    wished = replace(
        meta,
        ttl=meta.ttl if wishes.ttl_ms is None else _ttl(meta.layout, wishes.ttl_ms),
        first_machine=first,
        last_machine=last,
        incarnation=store.incarnation(meta),
    )
    if wished == meta:
        return meta
    lost = loss.is_lost(meta, (), meta, wished.incarnation)
    if lost:
        latest = _latest(store, meta.layout, timeline_us)
        wished = loss.after_loss(
            wished, wished.incarnation, latest, ttl=meta.ttl, floor=0, version=secrets.randbelow(VERSIONS)
        )
    else:
        wished = replace(wished, version=meta.version + 1)
    if not store.swap_meta(meta, wished):
        return None
    if lost:
        _log.warning(
            "%s is not what it was when it was last used (restored, replaced or moved here): it may have lost "
            "leases that still run. Nothing is granted for %d s",
            store.url,
            loss.resting_s(wished, tick_of(wished.layout, timeline_us)),
        )
    if (wished.ttl, first, last) != (meta.ttl, meta.first_machine, meta.last_machine):
        _log.warning("the store's settings changed: ttl %d ticks, machines %d to %d", wished.ttl, first, last)
    return wished


def tidy_marks(store: Store, timeline_us: int) -> None:
    """Forget the marks of delegators that have long gone; the latest mark stays."""
    marks_us = [mark.timeline_us for mark in store.marks()]
    before_us = min(timeline_us - FORGET_MARKS_US, max(marks_us, default=0))
    if any(mark_us < before_us for mark_us in marks_us):
        store.forget_marks(before_us)


def check_wishes(wishes: Wishes) -> None:
    """Raise `ConfigError` if the wishes contradict each other, as far as that shows without a store."""
    layout = wishes.layout or DEFAULT
    if wishes.ttl_ms is not None:
        _ttl(layout, wishes.ttl_ms)
    if wishes.layout is not None:
        _machines(layout, wishes)


def _initialise(store: Store, wishes: Wishes, timeline_us: int) -> Meta:
    if store.half_filled:
        raise ConfigError(f"a copy into {store.url} was broken off: make it again, to the same URL")
    layout = wishes.layout_on(DEFAULT)
    now = tick_of(layout, timeline_us)
    if not 0 <= now < layout.end_tick:
        raise ConfigError(
            f"layout {layout.name} goes from {layout.epoch.isoformat()} to {layout.overflows.isoformat()}, "
            "and it is not that time now: take another --epoch, or set the clock"
        )
    ttl = _ttl(layout, DEFAULT_TTL_MS if wishes.ttl_ms is None else wishes.ttl_ms)
    first, last = _machines(layout, wishes) or (0, layout.machines - 1)
    new = wishes.new and not store.had_data
    floor = loss.first_floor(layout, _latest(store, layout, timeline_us), ttl, new=new)
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
    rest_s = loss.resting_s(meta, now)
    if new:
        _log.info("made a new store: %s", store.url)
    elif store.had_data:
        _log.warning(
            "%s is gone, and a new one is in its place: nothing is granted for %d s%s",
            store.url,
            rest_s,
            ". --new does nothing: there was a store here, as the marker beside it says"
            if wishes.new
            else "",
        )
    else:
        _log.warning(
            "%s was empty. In case it replaces one that was lost, nothing is granted for %d s; "
            "if there was no such store, stop, delete this one, and start with --new",
            store.url,
            rest_s,
        )
    return meta


def _latest(store: Store, layout: Layout, timeline_us: int) -> int:
    return loss.latest_tick(
        layout, tick_of(layout, timeline_us), [mark.timeline_us for mark in store.marks()]
    )


def _check_layout(store: Store, layout: Layout, wishes: Wishes) -> None:
    wished = wishes.layout_on(layout)
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
