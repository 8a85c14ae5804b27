"""Whole clusters in virtual time: whatever fails, no ID comes twice, and afterwards all is served again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.sim import cluster, soak
from zflake.holder import lease

HISTORIES = 5_000


@pytest.mark.timeout(900)
def test_no_history_breaks_a_promise(tell: Callable[[str], None]) -> None:
    # Other seeds in each run.  Not from `random` itself, which the runner seeds.
    first = random.SystemRandom().randrange(10**12)
    tell(f"histories from seed {first} on:")
    total = soak.run(first, HISTORIES, 2)
    for line in str(total).splitlines():
        tell(line)
    assert total.histories == HISTORIES
    assert not total.failures, str(total)


def trace_of(seed: int) -> list[str]:
    lines: list[str] = []
    with cluster.watched():
        cluster.run(seed, lines.append)
    return lines


def test_a_seed_replays_its_history() -> None:
    trace = trace_of(7)
    assert len(trace) > 10
    assert trace_of(7) == trace


def test_the_patience_of_the_real_conversation_is_that_of_the_histories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = trace_of(4)
    monkeypatch.setattr(lease, "MAX_PATIENCE_US", 300_000)
    assert trace_of(4) != trace
