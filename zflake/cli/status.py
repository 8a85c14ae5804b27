"""`zflake status`: a cluster's state, once or live."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zflake.cli.ask import ask_pages
from zflake.core.layout import Layout
from zflake.errors import ConfigError, ProtocolError, Timeout
from zflake.keys import Keys
from zflake.wire.methods import Method

WIDE = 200
LOOK_S = 1.0
"""Seconds between two looks of a live view."""


def ask_status(endpoint: str, timeout_s: float, keys: Keys | None = None) -> dict[str, Any]:
    """A daemon's state, as PROTOCOL.md describes `cluster.status`, with the leases of all pages.

    Raises `Timeout` if no daemon answers, `ProtocolError` if it is not a zflake daemon.
    """
    first, *others = ask_pages(endpoint, Method.CLUSTER_STATUS, timeout_s, keys)
    for facts in (first, *others):
        if not isinstance(facts, dict) or "service" not in facts or type(facts.get("leases", [])) is not list:
            raise ProtocolError(f"{endpoint} does not answer as a daemon of zflake's")
    if others:
        leases = {lease["machine"]: lease for facts in (first, *others) for lease in facts["leases"]}
        first["leases"] = list(leases.values())
        first["next"] = None
    return dict(first)


def show_status(facts: dict[str, Any]) -> None:
    """Print what `ask_status` gave, for people."""
    console = plain_console()
    for name, value in _headlines(facts):
        console.print(Text.assemble((f"{name:<10}", "bold"), f" {value}"))
    if facts["service"] == "delegator":
        if len(facts["delegators"]) > 1:
            console.print()
            console.print(delegator_table(facts["delegators"]))
        console.print()
        console.print(lease_table(facts["leases"]))


def plain_console() -> Console:
    """The terminal, which shows texts as they are: a worker may be named `[/bold]`, or `:bee:`."""
    # Without a terminal a table has no reason to be narrow.
    width = None if sys.stdout.isatty() else WIDE
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


def delegator_table(delegators: list[dict[str, Any]]) -> Table:
    """A table of the delegators on one store."""
    table = _table("delegator", "address", "last mark", "its wall clock")
    for there in delegators:
        table.add_row(
            there["name"],
            there["address"],
            f"{there['marked_ms_ago'] / 1000:.1f} s ago",
            f"{-there['lead_ms'] / 1000:+.3f} s against the timeline",
        )
    return table


def lease_table(leases: list[dict[str, Any]], rates: Mapping[int, float] | None = None) -> Table:
    """A table of leases and what their holders do; `rates` are IDs a second, by machine."""
    figures = {"IDs": "ids", "in flight": "in_flight", "parked": "parked", "errors": "errors"}
    headings = [*figures]
    if rates is not None:
        headings.insert(1, "IDs/s")
    right = ("machine", "window ends in", *headings)
    table = _table("machine", "name", "address", "process", "window ends in", *headings, "", right=right)
    for lease in leases:
        worker = lease["worker"]
        cells = [""] * len(headings)
        if worker is not None:
            cells = [f"{worker[key]:,}" for key in figures.values()]
            if rates is not None:
                cells.insert(1, f"{rates.get(lease['machine'], 0.0):,.0f}")
        table.add_row(
            str(lease["machine"]),
            _who(lease),
            lease["address"],
            f"{lease['pid']}@{lease['host']}",
            f"{lease['ends_in_ms'] / 1000:.1f} s",
            *cells,
            "ready" if worker else "not there" if lease["address"] else "serves no clients",
        )
    return table


def _who(lease: dict[str, Any]) -> str:
    key = lease.get("key")
    return f"{lease['name']} (key {key})" if key else str(lease["name"])


def _table(*headings: str, right: Collection[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        # On a narrow terminal an address is folded, never cut: it is what people copy.
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


class Rates:
    """Rates between one look and the next."""

    def __init__(self) -> None:
        self._at_us = 0
        self._ids: dict[int, int] = {}
        self._requests: Mapping[str, int] = {}
        self.ids: dict[int, float] = {}
        """IDs a second, by machine."""
        self.requests: dict[str, float] = {}
        """The delegator's requests a second, by method."""

    def update(self, facts: dict[str, Any]) -> None:
        """Take in what a delegator says now."""
        # By the delegator's clock: it gives the same figures for up to a second.
        if facts["now_us"] == self._at_us:
            return
        passed_s = max(facts["now_us"] - self._at_us, 1) / 1e6
        ids = {lease["machine"]: lease["worker"]["ids"] for lease in facts["leases"] if lease["worker"]}
        self.ids = _rates(ids, self._ids, passed_s)
        self.requests = _rates(facts["requests"], self._requests, passed_s)
        self._ids, self._requests, self._at_us = ids, facts["requests"], facts["now_us"]


def _rates(counts: Mapping[Any, int], before: Mapping[Any, int], passed_s: float) -> dict[Any, float]:
    # A worker that was not there at the last look has no rate yet.
    return {key: max(0, count - before.get(key, count)) / passed_s for key, count in counts.items()}


def live_view(facts: dict[str, Any], rates: Rates) -> Group:
    """A delegator and its workers, with what goes on a second."""
    first, last = facts["machines"]
    broker = facts["broker"]
    brokered = rates.requests.get(Method.IDS_NEXT, 0.0)
    layout = Layout.from_map(facts["layout"]).name
    up, lead_s = _duration(facts["uptime_ms"]), facts["lead_ms"] / 1000
    lines = [
        (
            f"{sum(rates.ids.values()):,.0f} IDs/s from {broker['workers']} workers; "
            f"{len(facts['leases'])} of {last - first + 1:,} machines held; {facts['backlog']} wait for the store"
        ),
        f"broker: {brokered:,.0f} requests/s, {broker['queued']:,} queued, {_not_served(broker)}",
        f"errors: {_counts(facts['errors'])}",
        "",
    ]
    head = Text.assemble((facts["address"], "bold"), f"  {layout}, up {up}, timeline {lead_s:+.3f} s")
    return Group(head, *map(Text, lines), lease_table(facts["leases"], rates.ids))


def watch(endpoint: str, timeout_s: float, keys: Keys | None = None) -> None:
    """Show a delegator live, on a terminal, until interrupted; an outage of it is shown, and waited out."""
    rates = Rates()
    with Live(console=plain_console(), auto_refresh=False, screen=True, transient=True) as live:
        while True:
            try:
                facts = ask_status(endpoint, timeout_s, keys)
                if facts["service"] != "delegator":
                    raise ConfigError(f"{endpoint} is a {facts['service']}; --watch takes a delegator")
                rates.update(facts)
                live.update(live_view(facts, rates), refresh=True)
            except Timeout as error:
                live.update(Text(str(error), style="red"), refresh=True)
            time.sleep(LOOK_S)


def _headlines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield facts["service"], f"{facts['address']}  zflake {facts['version']}, pid {facts['pid']}"
    yield "up for", _duration(facts["uptime_ms"])
    if facts["layout"] is not None:
        layout = Layout.from_map(facts["layout"])
        yield "layout", f"{layout.name} ({layout}), epoch {layout.epoch:%FT%TZ}, ends {layout.overflows:%F}"
    if facts["service"] == "worker":
        machine = "none" if facts["machine"] is None else str(facts["machine"])
        yield "machine", f"{machine} ({facts['state'].lower()})"
        yield "minted", f"{facts['ids']:,} IDs in {facts['requests']:,} requests; {facts['parked']} parked"
        yield "errors", _counts(facts["errors"])
        return
    first, last = facts["machines"]
    yield "store", f"{facts['store']}  (id {facts['store_id']})"
    yield "machines", f"{first} to {last}, {len(facts['leases'])} held; ttl {facts['ttl_ms'] / 1000:g} s"
    yield "requests", f"{_counts(facts['requests'])}; {facts['backlog']} wait for the store"
    yield "errors", _counts(facts["errors"])
    if facts.get("denied"):
        yield "denied", _counts({name or "unknown keys": count for name, count in facts["denied"].items()})
    yield "timeline", f"{facts['lead_ms'] / 1000:+.3f} s against the delegator's wall clock"
    broker = facts["broker"]
    so_far = f"so far {broker['brokered']:,} brokered, {_not_served(broker)}"
    yield "broker", f"{broker['workers']} workers, {broker['queued']} queued; {so_far}"
    if facts.get("outage"):
        yield "granting", f"nothing now: {facts['outage']}"
    if facts["granting_in_ms"]:
        rest_s = facts["granting_in_ms"] / 1000
        yield "granting", f"nothing for {rest_s:.0f} s: the store is new, or may have forgotten leases"


def _not_served(broker: dict[str, int]) -> str:
    words = {"requeued": "taken back", "refused": "refused", "expired": "expired", "strays": "strays"}
    return ", ".join(f"{broker[key]:,} {word}" for key, word in words.items())


def _duration(ms: int) -> str:
    return str(timedelta(seconds=ms // 1000))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"
