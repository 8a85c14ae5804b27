"""`zflake store info`: what a store says of itself."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from zflake import clock
from zflake.cli.ask import readable
from zflake.core import loss
from zflake.core.layout import iso, iso_us
from zflake.core.timeline import tick_of
from zflake.delegator.moves import meta_of
from zflake.stores import open_store


def facts_of(url: str) -> dict[str, Any]:
    """A store's state.  Raises `StoreError` if it can't be read, or was never initialised."""
    with closing(open_store(url, read_only=True)) as store:
        meta, contents = meta_of(store), store.contents()
        records, marks = list(contents.records), list(contents.marks)
        layout = meta.layout
        now = tick_of(layout, max([clock.wall_us(), *(mark.timeline_us for mark in marks)]))
        highest = max((record.fence for record in records), default=0)
        facts = {
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
            "granting_in_ms": loss.resting_ms(meta, now),
            "marks": {mark.delegator: iso_us(mark.timeline_us) for mark in marks},
            "is_as_it_was": store.incarnation() == meta.incarnation,
            "spans": len(list(contents.spans)),
            "spans_since": iso(layout.time_of(contents.since)) if contents.since else None,
        }
    shown: dict[str, Any] = readable(facts)
    return shown


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
