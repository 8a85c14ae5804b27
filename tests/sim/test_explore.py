"""Every order of events in a small scope, and no invariant breaks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.sim.explore import SCOPES, explore

BUDGET_S = 30.0
STATES = 100_000
"""In each scope; together half a million at least."""


@pytest.mark.timeout(300)
def test_no_order_of_events_breaks_an_invariant(tell: Callable[[str], None]) -> None:
    began = time.monotonic()
    results = {}
    for done, scope in enumerate(SCOPES, 1):
        until = began + BUDGET_S * done / len(SCOPES)  # what one scope does not need is for the others
        results[scope.name] = explore(scope, STATES, going_on=lambda until=until: time.monotonic() < until)  # type: ignore[misc]
    states = sum(result.states for result in results.values())
    depths = ", ".join(
        f"{name} {result.states:,} to depth {result.depth}" for name, result in results.items()
    )
    tell(f"explored {states:,} states in {time.monotonic() - began:.0f} s: {depths}")
    assert {name: result.violation for name, result in results.items() if result.violation} == {}
    assert states > 10_000 * len(SCOPES), "this machine is too slow for a proof"
