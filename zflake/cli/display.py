"""`zflake up` shows its cluster: a line now and then, or a terminal that is redrawn."""

from __future__ import annotations

import time
from typing import Any, Final, Self

from rich.live import Live

from zflake.cli.status import Rates, live_view

REPORT_S: Final = 10.0
"""Seconds between lines, without a terminal to redraw."""


class Lines:
    """Figures for a log: a line now and then."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, facts: dict[str, Any]) -> None:
        """Print a line of the status `facts`, every `REPORT_S`."""
        if not facts or time.monotonic() - self._said_at < REPORT_S:
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


class Redrawn:
    """Figures for a terminal, redrawn in place."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._live = Live(auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, facts: dict[str, Any]) -> None:
        """Redraw the view of the status `facts`."""
        if facts:
            self._rates.update(facts)
            self._live.update(live_view(facts, self._rates), refresh=True)
