"""`zflake trace`: who minted an ID."""

from __future__ import annotations

from typing import Any

from zflake.cli.ask import ask
from zflake.cli.ids import as_object
from zflake.core.layout import Layout, iso
from zflake.errors import ProtocolError
from zflake.keys import Keys
from zflake.wire.cluster import check_hello
from zflake.wire.methods import Method


def trace_ids(
    ids: list[int], endpoint: str, timeout_s: float, keys: Keys | None = None
) -> list[dict[str, Any]]:
    """The delegator's record of each ID, as `--json` shows it; `minted_by` is None if there is none.

    Raises `Timeout` if no delegator answers, `ProtocolError` if it is no delegator, `LayoutError` for an ID
    that is none of the cluster's layout.
    """
    layout = check_hello(None, ask(endpoint, Method.HELLO, (), timeout_s, keys), service="delegator").layout
    assert layout is not None
    found = []
    for fields in [layout.decompose(id_) for id_ in ids]:
        answer = ask(endpoint, Method.CLUSTER_TRACE, (fields.machine, fields.tick), timeout_s, keys)
        try:
            found.append(as_object(fields) | _read(answer, layout))
        except (AttributeError, KeyError, TypeError) as error:
            raise ProtocolError(f"{endpoint} sent a trace that can't be read: {error!r}") from error
    return found


def show_trace(facts: dict[str, Any]) -> None:
    """Print one of what `trace_ids` gave, for people."""
    print(facts["id"])
    print(f"  time       {facts['time']}")
    print(f"  machine    {facts['machine']}")
    by = facts["minted_by"]
    if by is not None:
        where = f" at {by['address']}" if by["address"] else ""
        where += f", by the key {by['key']}" if by["key"] else ""
        print(
            f"  minted by  {by['name'] or 'a holder without a name'}, process {by['pid']} on {by['host']}{where}"
        )
        print(f"  lease      from {by['from']} to {by['to']}")
    elif facts["time"] < facts["complete_since"]:
        print(f"  minted by  a holder before {facts['complete_since']}: the record no longer reaches so far")
    else:
        print(
            "  minted by  no holder of this cluster: another cluster or a static worker minted it, or it is no ID at all"
        )


def _read(answer: Any, layout: Layout) -> dict[str, Any]:
    span = answer["span"]
    minted_by = None
    if span is not None:
        minted_by = {key: span[key] for key in ("name", "host", "pid", "address", "key")} | {
            "from": iso(layout.time_of(span["start"])),
            "to": iso(layout.time_of(span["end"])),
        }
    return {"minted_by": minted_by, "complete_since": iso(layout.time_of(answer["since"]))}
