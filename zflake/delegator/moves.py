"""A cluster's move: a store is copied to another, restored from a backup, or set back in time.

No delegator may use the store meanwhile.  Each function says in a sentence what it did.
"""

from __future__ import annotations

import logging
import math
from contextlib import closing, suppress
from dataclasses import replace

from zflake import clock
from zflake.core import loss
from zflake.core.layout import iso, iso_us
from zflake.core.lease import Meta, Swap
from zflake.core.timeline import LEAD_US, tick_of
from zflake.delegator.clock import listen
from zflake.errors import ConfigError, StoreError
from zflake.stores import Store, name_of, open_store

_log = logging.getLogger("zflake.delegator")


def check_moved(store: Store, meta: Meta) -> None:
    """Raise `ConfigError` if the cluster was moved away from this store."""
    if meta.moved:
        raise ConfigError(f"{store.url} was moved to {meta.moved}: start on that store")


def rewind(store: Store, meta: Meta, to_us: int) -> int:
    """Set the store's time back to `to_us` (µs since the Unix epoch), after a clock far ahead was once believed.

    Every fence stays: no tick that was granted is granted again.  Tenancies whose windows lie far ahead are
    ended, since they could not be renewed for as long: their holders are told `lost`, and acquire afresh.
    Gives how many these were.

    Raises `StoreError` if the store fails; the rewind can then be repeated.
    """
    now = tick_of(meta.layout, to_us)
    far = now + meta.ttl + meta.layout.ms_to_ticks(loss.MARGIN_MS)
    ahead = [record for record in store.held(now) if record.fence > far]
    swaps = [Swap(record, replace(record, gen=record.gen + 1, token=None), meta.version) for record in ahead]
    store.set_marks(to_us)
    ended = sum(store.swap(swaps)) if swaps else 0
    if ended < len(ahead):
        raise StoreError(f"{store.url}: another process is writing to it; stop all delegators first")
    if ahead:
        _log.warning("gave up %d tenancies whose windows lie ahead of the clock; their fences stay", ended)
    return ended


def restore(backup: str, url: str) -> str:
    """Fill the store `url` from another one; says what was done.

    Raises `StoreError` if `backup` can't be read or `url` is a cluster's store already.
    """
    with closing(open_store(backup, read_only=True)) as source:
        meta, contents = meta_of(source), source.contents()
        with closing(open_store(url)) as target:
            if target.meta() is not None:
                raise StoreError(
                    f"{target.url} is a cluster's store already: move it away first, or name another one"
                )
            # No store has an empty incarnation: a delegator that starts on it knows that it was restored.  A
            # cluster that was copied away since lives on there, and is waited for like all that a backup lacks.
            target.initialise(replace(meta, incarnation="", moved=""), contents)
    rest_ms = meta.layout.ticks_to_ms(loss.rest_until(meta.layout, 0, meta.ttl) - 1)
    return (
        f"restored {target.url} from {source.url}: {len(contents.records)} machine IDs. A delegator that starts on it "
        f"grants nothing for the first {math.ceil(rest_ms / 1000)} s"
    )


def copy(url: str, to: str) -> str:
    """Move what is in the store `url` to the new store `to`; says what was done.

    From the first moment on `url` refuses delegators; if the copy fails, it is freed again.  One that was
    killed half way can be made again, to the same `to`.

    Raises `StoreError` if a delegator still uses `url`, or `to` is a cluster's store already.
    """
    _must_be_there(url)
    with closing(open_store(url)) as source:
        found = meta_of(source)
        _must_be_idle(source)
        if found.moved != name_of(to):  # else it was begun before, and broken off
            check_moved(source, found)
        with closing(open_store(to)) as target:
            if target.meta() is not None:
                check_moved(source, found)
                raise StoreError(f"{target.url} is a cluster's store already: name a new one")
            meta = replace(found, moved="")
            moved = replace(found, version=found.version + 1, moved=target.url)
            if not source.swap_meta(found, moved):
                raise StoreError(f"{source.url} was written to meanwhile: stop all delegators first")
            try:
                contents = source.contents()
                target.initialise(replace(meta, incarnation=target.incarnation()), contents)
            except BaseException:
                if not _holds(target, meta):
                    if not source.swap_meta(moved, replace(meta, version=moved.version + 1)):
                        raise StoreError(
                            f"{source.url} was written to meanwhile, and stays marked as moved"
                        ) from None
                    raise
    return (
        f"moved {len(contents.records)} machine IDs from {source.url} to {target.url}: start the delegators on "
        "that now; the old store refuses them"
    )


def rewind_url(url: str, *, floor: bool = False) -> str:
    """Set the store's marks back to the wall clock if they are ahead of it; says what was done.

    With `floor` the operator knows that no lease runs which reaches further ahead than this clock allows: a floor
    above that is brought down to where a loss just now would put it.

    Raises `StoreError` if the store can't be used, or a delegator uses it.
    """
    _must_be_there(url)
    with closing(open_store(url)) as store:
        meta, wall_us = meta_of(store), clock.wall_us()
        done = _rewind_marks(store, meta, wall_us)
        return f"{done}{(_lower_floor if floor else _tell_floor)(store, meta, wall_us)}"


def _rewind_marks(store: Store, meta: Meta, wall_us: int) -> str:
    mark_us = max((mark.timeline_us for mark in store.marks()), default=0)
    if mark_us <= wall_us + LEAD_US:
        return f"nothing to do: the last mark of {store.url} is {iso_us(mark_us)}, which is not ahead of this clock"
    _must_be_idle(store)
    ended = rewind(store, meta, wall_us)
    return (
        f"set the time of {store.url} back from {iso_us(mark_us)} to {iso_us(wall_us)}; "
        f"{ended} leases that reached far ahead were ended, and their machine IDs rest until then"
    )


def _lower_floor(store: Store, meta: Meta, wall_us: int) -> str:
    now = tick_of(meta.layout, wall_us)
    lower = replace(meta, floor=loss.rest_until(meta.layout, now, meta.ttl), version=meta.version + 1)
    if meta.floor <= lower.floor:
        return ". The floor is no higher than after a loss just now: it stays"
    _must_be_idle(store)
    if not store.swap_meta(meta, lower):
        raise StoreError(f"{store.url} was written to meanwhile: stop all delegators first")
    return (
        f". Lowered the floor from {iso(meta.layout.time_of(meta.floor))}: a delegator that starts now grants nothing"
        f" for {loss.resting_s(lower, now)} s"
    )


def meta_of(store: Store) -> Meta:
    """The store's meta; raises `StoreError` if it has none."""
    meta = store.meta()
    if meta is None:
        raise StoreError(f"{store.url} holds no cluster")
    return meta


def _must_be_there(url: str) -> None:
    """Raise `StoreError` if there is no store: to open it without a look first may make it."""
    with closing(open_store(url, read_only=True)) as store:
        meta_of(store)


def _must_be_idle(store: Store) -> None:
    """Raise `StoreError` if a delegator uses the store."""
    if listen(store, "") is not None:
        raise StoreError(f"{store.url} is in use: its marks move. Stop all delegators first")


def _holds(target: Store, meta: Meta) -> bool:
    """Whether a copy that failed is there all the same: a write without an answer may have happened."""
    with suppress(StoreError):
        return meta_of(target).store_id == meta.store_id
    return False


def _tell_floor(_store: Store, meta: Meta, wall_us: int) -> str:
    if meta.floor <= tick_of(meta.layout, wall_us):
        return ""
    return (
        f". Nothing is granted before {iso(meta.layout.time_of(meta.floor))} all the same: that floor was set when the"
        " store may have forgotten leases. If a wrong clock or a forged message set it, bring it down with --floor"
    )
