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


def test_a_seed_replays_its_history() -> None:
    traces: list[list[str]] = [[], []]
    with cluster.watched():
        for trace in traces:
            cluster.run(7, trace.append)
    assert len(traces[0]) > 10
    assert traces[0] == traces[1]


def test_the_patience_of_the_real_conversation_is_that_of_the_histories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces: list[list[str]] = [[], []]
    with cluster.watched():
        cluster.run(4, traces[0].append)
        monkeypatch.setattr(lease, "MAX_PATIENCE_US", 300_000)
        cluster.run(4, traces[1].append)
    assert traces[0] != traces[1]
