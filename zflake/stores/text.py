"""Meta, records and spans as text, for the engines that have keys and values and no columns.

Numbers that an engine compares are decimal, zero-padded to `WIDTH`, so that their order is the text's.
"""

from __future__ import annotations

import json
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import Holder, Mark, Meta, Record, Span
from zflake.stores.contract import check_schema

WIDTH: Final = 20


def pad(number: int) -> str:
    """A number whose order as text is its own."""
    return f"{number:0{WIDTH}d}"


def meta_to_text(meta: Meta) -> str:
    """Meta as JSON."""
    return json.dumps(
        {
            "zflake": meta.schema,
            "reader": meta.reader,
            "store_id": meta.store_id,
            "layout": meta.layout.to_map(),
            "ttl": meta.ttl,
            "machines": [meta.first_machine, meta.last_machine],
            "floor": meta.floor,
            "version": meta.version,
            "incarnation": meta.incarnation,
            "moved": meta.moved,
        }
    )


def meta_from_text(text: str, url: str) -> Meta:
    """Meta of what `meta_to_text` gave; raises `StoreError` for a schema that can't be read."""
    values = json.loads(text)
    schema, reader = values["zflake"], values.get("reader", 0)
    check_schema(url, schema, reader, "name another")
    first, last = values["machines"]
    layout, ttl, floor = Layout.from_map(values["layout"]), values["ttl"], values["floor"]
    life = values["version"], values["incarnation"], values["moved"]
    return Meta(values["store_id"], layout, ttl, first, last, floor, *life, schema, reader)


def holder_to_text(holder: Holder) -> str:
    """A holder as JSON."""
    return json.dumps([holder.name, holder.host, holder.pid, holder.address])


def holder_from_text(text: str) -> Holder:
    """The holder of what `holder_to_text` gave."""
    parts: list[Any] = json.loads(text)
    return Holder(*parts)


def record_to_text(record: Record) -> str:
    """`gen fence token span_start rest`: what a script compares comes first, the rest is JSON."""
    token = "-" if record.token is None else record.token.hex()
    rest = json.dumps([record.start, record.tenancy_start, json.loads(holder_to_text(record.holder))])
    return f"{record.gen} {pad(record.fence)} {token} {pad(record.span_start)} {rest}"


def record_from_text(machine: int, text: str) -> Record:
    """The record of what `record_to_text` gave."""
    gen, fence, token, span_start, rest = text.split(" ", 4)
    start, tenancy_start, holder = json.loads(rest)
    shown = None if token == "-" else bytes.fromhex(token)  # noqa: S105  (no password)
    return Record(
        machine, int(fence), int(gen), shown, start, tenancy_start, Holder(*holder), int(span_start)
    )


def mark_to_text(mark: Mark) -> str:
    """`now_us lead_us address`."""
    return f"{pad(mark.now_us)} {mark.lead_us} {mark.address}"


def mark_from_text(delegator: str, text: str) -> Mark:
    """The mark of what `mark_to_text` gave."""
    now_us, lead_us, address = text.split(" ", 2)
    return Mark(delegator, int(now_us), int(lead_us), address)


def span_of(machine: int, start: str, end: str, holder: str) -> Span:
    """A span of the texts of its parts."""
    return Span(machine, int(start), int(end), holder_from_text(holder))
