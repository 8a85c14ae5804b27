"""Tests of one module that run side by side: clusters that mostly wait, each in a thread and a folder of its own.

`beside` decorates them; a module that has such tests imports the fixture `outcomes` as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeAlias

import pytest

from tests.system.daemons import Daemons

Scenario: TypeAlias = Callable[[Daemons], None]
Outcomes: TypeAlias = Mapping[str, Future[None]]

SIDE_BY_SIDE: Final = 4


def beside(scenario: Scenario) -> Callable[[Outcomes], None]:
    """Make a test of a scenario, which may be under way with others of its module."""

    def test(outcomes: Outcomes) -> None:
        outcomes[scenario.__name__].result()

    test.scenario = scenario  # type: ignore[attr-defined]
    return test


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """What becomes of the module's scenarios, as far as they were selected; they begin with the first."""
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    scenarios: dict[str, Scenario] = {
        item.name: item.function.scenario  # type: ignore[attr-defined]
        for item in mine
        if hasattr(getattr(item, "function", None), "scenario")
    }
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        running: dict[str, Future[None]] = {}
        for k, (name, scenario) in enumerate(scenarios.items()):
            daemons = stack.enter_context(Daemons(tmp_path_factory.mktemp(f"beside-{k}")))
            running[name] = pool.submit(_run, scenario, daemons)
        yield running
        for outcome in running.values():
            outcome.cancel()
        # Whoever waits for one of these, waits no longer.
        stack.close()


def _run(scenario: Scenario, daemons: Daemons) -> None:
    try:
        scenario(daemons)
    finally:
        daemons.end()
