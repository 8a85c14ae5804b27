"""`zflake up` shows its cluster: a line now and then, or a terminal that is redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.live import Live

from zflake.cli.status import Rates, live_view, plain_console

REPORT_S: Final = 10.0
"""Seconds between lines, without a terminal to redraw."""


class Lines:
    """Figures for a log: a line now and then."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._said_at = 0.0

    def show(self, facts: dict[str, Any]) -> None:
        """Print a line of the status `facts`, every `REPORT_S`."""
        if time.monotonic() - self._said_at < REPORT_S:
            return
        first, self._said_at = not self._said_at, time.monotonic()
        self._rates.update(facts)
        if not first:
            minted = sum(lease["worker"]["ids"] for lease in facts["leases"] if lease["worker"])
            rate = sum(self._rates.ids.values())
            print(
                f"{facts['broker']['workers']} workers, {minted:,} IDs minted, {rate:,.0f} a second",
                flush=True,
            )


@contextmanager
def redrawn() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows status facts on a terminal, in place of the ones before."""
    rates = Rates()
    with Live(console=plain_console(), auto_refresh=False, redirect_stdout=False) as live:

        def show(facts: dict[str, Any]) -> None:
            rates.update(facts)
            live.update(live_view(facts, rates), refresh=True)

        yield show
