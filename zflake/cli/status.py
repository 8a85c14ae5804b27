"""What `zflake status` asks and shows."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from zflake.client.conversation import Ask
from zflake.client.transport import Transport
from zflake.core.layout import Layout
from zflake.errors import ProtocolError, Timeout
from zflake.wire.messages import Method, exception_of

WIDE = 200
WORKER_S = 0.3
"""How long one worker has to say how it is."""


def ask_status(endpoint: str, timeout_s: float) -> dict[str, Any]:
    """What a daemon says of itself; a delegator's leases with each worker's own figures, where it answers.

    Raises `Timeout` where nobody answers, `ProtocolError` where it is no daemon of zflake's.
    """
    transport = Transport()
    try:
        return _ask_all(transport, endpoint, timeout_s)
    finally:
        transport.close()


def _ask_all(transport: Transport, endpoint: str, timeout_s: float) -> dict[str, Any]:
    response = transport.ask(Ask(endpoint, Method.CLUSTER_STATUS, (), timeout_s))
    if response is None:
        raise Timeout(f"no answer from {endpoint} within {timeout_s:g} s; is it running?")
    if response.error is not None:
        raise exception_of(response.error)
    if not isinstance(response.result, dict) or "service" not in response.result:
        raise ProtocolError(f"{endpoint} does not answer as a daemon of zflake's")
    facts: dict[str, Any] = response.result
    for lease in facts.get("leases", ()):
        if lease["address"]:
            answer = transport.ask(Ask(lease["address"], Method.CLUSTER_STATUS, (), min(WORKER_S, timeout_s)))
            lease["worker"] = answer.result if answer is not None and answer.error is None else None
    return facts


def show_status(facts: dict[str, Any]) -> None:
    """Print what `ask_status` gave, for people."""
    # Where nobody looks at it, a table has no reason to be narrow.
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDE)
    for name, value in _headlines(facts):
        console.print(f"[bold]{name:<10}[/] {value}")
    if facts["service"] == "delegator":
        console.print()
        console.print(lease_table(facts["leases"]))


def lease_table(leases: list[dict[str, Any]]) -> Table:
    """A table of leases and what their holders do."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("machine", "name", "address", "process", "window ends in", "IDs", "errors", "state"):
        table.add_column(
            heading, justify="right" if heading in ("machine", "pid", "IDs", "errors") else "left"
        )
    for lease in leases:
        worker = lease.get("worker")
        own = (
            (f"{worker['ids']:,}", f"{sum(worker['errors'].values()):,}", worker["state"])
            if worker
            else ("", "", "no answer" if lease["address"] else "embedded")
        )
        table.add_row(
            str(lease["machine"]),
            lease["name"],
            lease["address"],
            f"{lease['pid']}@{lease['host']}",
            f"{lease['ends_in_ms'] / 1000:.1f} s",
            *own,
        )
    return table


def _headlines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        (facts["service"], f"{facts['address']}  zflake {facts['version']}, pid {facts['pid']}"),
        ("up for", f"{facts['uptime_ms'] / 1000:.0f} s"),
    ]
    if facts["layout"] is not None:
        layout = Layout.from_map(facts["layout"])
        lines.append(
            ("layout", f"{layout.name} ({layout}), epoch {layout.epoch:%FT%TZ}, ends {layout.overflows:%F}")
        )
    if facts["service"] == "worker":
        machine = "none" if facts["machine"] is None else str(facts["machine"])
        lines += [
            ("machine", f"{machine} ({facts['state'].lower()})"),
            ("minted", f"{facts['ids']:,} IDs in {facts['requests']:,} requests; {facts['parked']} parked"),
            ("errors", _counts(facts["errors"])),
        ]
        return lines
    first, last = facts["machines"]
    lines += [
        ("store", f"{facts['store']}  (id {facts['store_id']})"),
        ("machines", f"{first} to {last}, {len(facts['leases'])} held; ttl {facts['ttl_ms'] / 1000:g} s"),
        ("requests", f"{_counts(facts['requests'])}; {facts['backlog']} wait for the store"),
        ("errors", _counts(facts["errors"])),
        ("timeline", f"{facts['lead_ms'] / 1000:+.3f} s against the delegator's wall clock"),
    ]
    if facts["granting_in_ms"]:
        lines.append(
            (
                "granting",
                f"nothing for {facts['granting_in_ms'] / 1000:.0f} s: the store was empty (see --new)",
            )
        )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"
