"""Histories that once went wrong, told as the kind that they are: a seed means another history tomorrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import pytest

from tests.sim import cluster
from tests.sim.cluster import Cluster
from tests.sim.fault_plan import SMALL, TODAY_US, FaultPlan
from zflake.core.lease import Mark, Swap

CALM: Final = FaultPlan(
    layout=SMALL,
    ttl_ms=1_000,
    machines=(0, 3),
    workers=2,
    delegators=2,
    clients=0,
    wall_us=TODAY_US,
    fault_us=0,
    ping_us=250_000,
    thirst=0.3,
    edges=0.0,
)
SECOND_US: Final = 1_000_000
HOUR_US: Final = 3_600 * SECOND_US


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    with cluster.watched():
        yield


def test_a_late_write_of_a_dead_delegator_sets_no_timeline_back() -> None:
    sim = Cluster(1, plan=CALM)
    world = sim.world
    world.run(2 * SECOND_US)
    sim._stop_delegators()
    (mark, *_) = (mark for mark in sim.disk.marks() if mark.delegator == "d1")
    late = Mark("d1", mark.timeline_us + SECOND_US // 2)
    world.run(20 * SECOND_US)
    write: Callable[..., object] = sim.disk.apply
    world.after(SECOND_US, None, write, [], late)
    sim._start_delegator(0)
    (delegator,) = sim.serving
    assert abs(delegator.clock.timeline_us() - delegator.host.wall_us()) < SECOND_US


def test_a_delegator_that_runs_is_joined_whatever_the_wall_clock_shows() -> None:
    sim = Cluster(1, plan=CALM)
    sim.world.run(2 * SECOND_US)
    first, second = sim.serving
    second.die()
    sim.hosts[1].step_wall(HOUR_US)
    sim._start_delegator(1)
    _, joined = sim.serving
    assert abs(joined.clock.timeline_us() - first.clock.timeline_us()) < SECOND_US


def test_a_worker_with_a_window_far_ahead_hears_soon_that_its_lease_was_lost() -> None:
    sim = Cluster(1, plan=replace(CALM, delegators=1, workers=1))
    world, (worker,) = sim.world, sim.workers
    world.run(2 * SECOND_US)
    (delegator,) = sim.serving
    # One renewal is granted by a timeline an hour ahead, and then the timeline is right again.
    right, mint = delegator.clock._timeline, worker.lease.lessee.mint
    sim.checker.cold_start(delegator.host.wall_us() + 2 * HOUR_US)
    delegator.clock._timeline = type(right)(
        delegator.clock.timeline_us() + HOUR_US, delegator.host.local_us()
    )
    while mint is not None and mint.end < delegator.clock.tick():
        world.run(world.true_us + SECOND_US // 10)
    delegator.clock._timeline = right
    world.run(world.true_us + 5 * SECOND_US)
    assert worker.lease.lessee.state.name == "LAPSED"
    # Somebody ends that tenancy, as a rewind does, which keeps the fence.
    (record,) = sim.disk.contents().records
    meta = sim.disk.meta()
    assert meta is not None
    ended = replace(record, gen=record.gen + 1, token=None)
    assert sim.disk.apply([Swap(record, ended, meta.version)], None) == [True]
    world.run(world.true_us + 5 * SECOND_US)
    assert worker.lease.lessee.state.name == "HELD"


@pytest.mark.parametrize("loss", ["rollback noticed", "rollback unnoticed"])
def test_machine_ids_that_a_rollback_made_unused_are_leased_again(loss: str) -> None:
    sim = Cluster(1, plan=replace(CALM, delegators=1, workers=5))  # one more than there are machine IDs
    world = sim.world
    empty = sim.disk.snapshot()
    world.run(2 * SECOND_US)
    assert len(sim.disk.held(sim.serving[0].clock.tick())) == 4
    for worker in list(sim.workers):
        worker.die()
    sim.disk.restore(empty)
    sim.disk.life = "life 1" if loss == "rollback noticed" else "life 0"
    sim.checker.store_lost({}, sim.disk.meta(), noticed=loss == "rollback noticed")
    for _ in range(4):
        sim._start_worker()
    world.run(world.true_us + 80 * SECOND_US)
    assert [worker.lease.state for worker in sim.workers[-4:]] == ["HELD"] * 4


def test_on_a_good_network_each_holder_acquires_once_and_never_lapses() -> None:
    told: list[str] = []
    sim = Cluster(1, told.append, plan=CALM)
    sim.world.run(20 * SECOND_US)
    assert sum(" Acquire(" in line for line in told) == CALM.workers
    assert sum(" Renew(" in line for line in told) > 20 * CALM.workers
    assert not [line for line in told if "-> LAPSED" in line]
