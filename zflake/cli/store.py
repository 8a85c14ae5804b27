"""What `zflake store` does: look at a store, restore one from a backup, set its time back."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

from zflake.cli.ids import iso
from zflake.core import lessor
from zflake.core.layout import UNIX_EPOCH, Layout
from zflake.core.lease import Meta
from zflake.core.timeline import LEAD_US
from zflake.delegator.setup import check_moved, listen
from zflake.delegator.setup import rewind as rewind_store
from zflake.errors import StoreError
from zflake.stores import Store, name_of, open_store


def facts_of(url: str) -> dict[str, Any]:
    """What a store says of itself.  Raises `StoreError` where it can't be read, or was never initialised."""
    store = open_store(url, read_only=True)
    try:
        meta, contents = _meta_of(store), store.contents()
        records, marks = list(contents.records), list(contents.marks)
        layout = meta.layout
        now_us = max([time.time_ns() // 1000, *(mark.now_us for mark in marks)])
        now = (now_us - layout.epoch_us) // layout.tick_us
        highest = max((record.fence for record in records), default=0)
        return {
            "store": store.url,
            "store_id": meta.store_id,
            "schema": meta.schema,
            "version": meta.version,
            "layout": layout.name,
            "fields": str(layout),
            "epoch": iso(layout.epoch),
            "ttl_ms": meta.ttl * layout.tick_ms,
            "machines": [meta.first_machine, meta.last_machine],
            "used": len(records),
            "held": sum(record.token is not None and record.fence > now for record in records),
            "highest_fence": iso(layout.time_of(highest)) if records else None,
            "floor": iso(layout.time_of(meta.floor)) if meta.floor else None,
            "moved_to": meta.moved or None,
            "granting_in_ms": lessor.resting_ms(meta, now),
            "marks": {mark.delegator: _iso(mark.now_us) for mark in marks},
            "is_as_it_was": store.incarnation() == meta.incarnation,
            "spans": len(list(contents.spans)),
            "spans_since": iso(layout.time_of(contents.since)) if contents.since else None,
        }
    finally:
        store.close()


def show_facts(facts: dict[str, Any]) -> None:
    """Print what `facts_of` gave, for people."""
    first, last = facts["machines"]
    lines = {
        "store": f"{facts['store']}  (id {facts['store_id']}, schema {facts['schema']}, version {facts['version']})",
        "layout": f"{facts['layout']} ({facts['fields']}), epoch {facts['epoch']}",
        "ttl": f"{facts['ttl_ms'] / 1000:g} s",
        "machines": f"{first} to {last}; {facts['used']} ever used, {facts['held']} held",
        "fences": f"up to {facts['highest_fence']}" if facts["used"] else "none",
        "floor": f"{facts['floor']}: nothing is granted for windows before" if facts["floor"] else "none",
        "marks": ", ".join(f"{name} {at}" for name, at in facts["marks"].items()) or "none",
        "record": f"{facts['spans']} spans"
        + (f", complete since {facts['spans_since']}" * bool(facts["spans_since"])),
    }
    for name, value in lines.items():
        print(f"{name:<9}  {value}")
    if facts["moved_to"]:
        print(f"This cluster was moved to {facts['moved_to']}: delegators are refused here.")
    elif not facts["is_as_it_was"]:
        print(
            "This store is not what it was when it was last used: the next delegator will rest before it grants."
        )


def restore(backup: str, url: str) -> str:
    """Fill the store `url` from another one; says what was done.

    Raises `StoreError` where `backup` can't be read or `url` is a cluster's store already.
    """
    source = open_store(backup, read_only=True)
    try:
        meta, contents = _meta_of(source), source.contents()
        target = open_store(url)
        try:
            if target.meta() is not None:
                raise StoreError(
                    f"{target.url} is a cluster's store already: move it away first, or name another one"
                )
            # Of no incarnation that a store can have: whoever starts on it knows that it was restored.  What
            # was copied away since lives on there, and is waited for like all that a backup does not know.
            target.initialise(replace(meta, incarnation="", moved=""), contents)
        finally:
            target.close()
    finally:
        source.close()
    rest = lessor.rest_until(meta.layout, 0, meta.ttl) - 1
    return (
        f"restored {target.url} from {source.url}: {len(list(contents.records))} machine IDs. A delegator that starts on it "
        f"grants nothing for the first {_seconds(meta.layout, rest)} s"
    )


def copy(url: str, to: str) -> str:
    """Move what is in the store `url` to the new store `to`; says what was done.

    From the first moment on `url` refuses delegators; where the copy fails it is given free again.  One that was
    killed half way can be made again, to the same `to`.

    Raises `StoreError` where a delegator still uses `url`, or `to` is a cluster's store already.
    """
    _must_be_there(url)
    source = open_store(url)
    try:
        found = _meta_of(source)
        if listen(source, "") is not None:
            raise _in_use(source)
        if found.moved != name_of(to):  # else it was begun before, and broken off
            check_moved(source, found)
        target = open_store(to)
        try:
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
        finally:
            target.close()
    finally:
        source.close()
    return (
        f"moved {len(list(contents.records))} machine IDs from {source.url} to {target.url}: start the delegators on "
        "that now; the old store refuses them"
    )


def rewind(url: str) -> str:
    """Set the store's marks back to the wall clock where they are ahead of it; says what was done.

    Raises `StoreError` where the store can't be used, or a delegator uses it.
    """
    _must_be_there(url)
    store = open_store(url)
    try:
        meta = _meta_of(store)
        wall_us = time.time_ns() // 1000
        mark_us = max((mark.now_us for mark in store.marks()), default=0)
        if mark_us <= wall_us + LEAD_US:
            return (
                f"nothing to do: the last mark of {store.url} is {_iso(mark_us)}, which is not ahead of this clock"
                + _floor_of(meta, wall_us)
            )
        if listen(store, "") is not None:
            raise _in_use(store)
        ended = rewind_store(store, meta, wall_us)
        report = (
            f"set the time of {store.url} back from {_iso(mark_us)} to {_iso(wall_us)}; "
            f"{ended} leases that reached far ahead were ended, and their machine IDs rest until then"
        )
        return report + _floor_of(meta, wall_us)
    finally:
        store.close()


def _meta_of(store: Store) -> Meta:
    meta = store.meta()
    if meta is None:
        raise StoreError(f"{store.url} holds no cluster")
    return meta


def _must_be_there(url: str) -> None:
    """Raise `StoreError` where there is no store; to open one otherwise may make it."""
    store = open_store(url, read_only=True)
    try:
        _meta_of(store)
    finally:
        store.close()


def _in_use(store: Store) -> StoreError:
    return StoreError(f"{store.url} is in use: its marks move. Stop all delegators first")


def _holds(target: Store, meta: Meta) -> bool:
    """Whether a copy that failed is there all the same: a write without an answer may have happened."""
    with contextlib.suppress(StoreError):
        found = target.meta()
        return found is not None and found.store_id == meta.store_id
    return False


def _floor_of(meta: Meta, wall_us: int) -> str:
    if meta.floor <= (wall_us - meta.layout.epoch_us) // meta.layout.tick_us:
        return ""
    return (
        f". Nothing is granted before {iso(meta.layout.time_of(meta.floor))} all the same: that floor was set when the"
        " store may have forgotten leases, and stays. If it was set by a wrong clock, begin with a new store"
    )


def _iso(now_us: int) -> str:
    return iso(UNIX_EPOCH + timedelta(microseconds=now_us))


def _seconds(layout: Layout, ticks: int) -> int:
    return -(-ticks * layout.tick_ms // 1000)
