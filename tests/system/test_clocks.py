"""Wall clocks that are wrong, or step: no ID twice, no ID out of order, and refused where they can't be right."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import pytest

import zflake
from tests.conftest import Connect
from tests.jobs.checker import check_runs, check_stores, runs_of, ticks_of
from tests.jobs.load import Load
from tests.system.daemons import Daemon, Daemons, status_of, until
from tests.system.faketime import HOUR_S, YEAR_S, WrongClock, clean_up_after, need_faketime
from zflake.core.layout import DEFAULT

Clocks: TypeAlias = Callable[..., WrongClock]

REST_S: Final = 70
NEAR_S: Final = 5.0
ORDER_MS: Final = 50
"""Milliseconds that a holder's time may be behind: the flight of its best exchange, on a machine that is busy."""
IN_2040_S: Final = 14 * YEAR_S


@pytest.fixture
def clocks(daemons: Daemons) -> Iterator[Clocks]:
    """Makes wall clocks for the test's daemons, which end with them."""
    need_faketime(daemons.folder)
    numbers = itertools.count()
    yield lambda off_s=0: WrongClock(daemons.folder / f"clock-{next(numbers)}", off_s)
    for process in daemons.end():
        clean_up_after(process.pid)


def _lead_s(delegator: Daemon) -> float:
    return float(status_of(delegator.address).get("lead_ms", 0)) / 1000


def _ahead_s(load: Load) -> float:
    """How far the latest ID's time is ahead of the true time."""
    load.go_on()
    tick = max(ticks_of([taker.runs[-1] for taker in load.takers.values()]))
    return DEFAULT.epoch_ms / 1000 + tick / 1000 - time.time()


def _assert_refused(delegator: Daemon, *words: str) -> None:
    assert delegator.wait() != 0
    line = delegator.log().splitlines()[-1]
    assert all(word in line for word in words), line


def test_a_delegator_whose_wall_clock_steps_goes_on_as_if_it_did_not(
    daemons: Daemons, clocks: Clocks
) -> None:
    clock = clocks()
    delegator = daemons.delegator(ttl="4s", env=clock.env)
    worker = daemons.worker(to=delegator)
    until(lambda: worker.said("holding machine"), "the worker to hold a machine ID")
    with Load([worker]) as load:
        load.go_on()
        for off_s in (HOUR_S, IN_2040_S, -HOUR_S, 0):
            clock.set(off_s)
            until(lambda: abs(_lead_s(delegator) + clock.off_s) < NEAR_S, f"the lead past {off_s} s")
            assert abs(_ahead_s(load)) < 0.5
        gaps = [b - a for a, b in itertools.pairwise(load.ticks())]
        assert max(gaps) < 1_000, "the worker never stood still"
        assert min(gaps) >= 0
    assert delegator.said("ahead of the wall clock") == 1
    assert load.check([delegator]).violations == []
    assert load.lost() == []


def test_a_delegator_restarted_with_another_wall_clock_goes_on_from_its_mark_or_refuses(
    daemons: Daemons, clocks: Clocks
) -> None:
    clock = clocks()
    delegators = [daemons.delegator(ttl="1s", env=clock.env)]
    worker = daemons.worker(to=delegators[0])
    until(lambda: worker.said("holding machine"), "the worker to hold a machine ID")

    def restart(off_s: int, *flags: str) -> Daemon:
        clock.set(off_s)
        delegators[-1].terminate()
        delegator = daemons.delegator(*flags, bind=delegators[0].address, new=False, ttl="1s", env=clock.env)
        delegators.append(delegator)
        return delegator

    def serves(delegator: Daemon) -> float:
        until(lambda: delegator.leases("renewed") or delegator.leases("acquired"), "a grant")
        return _ahead_s(load)

    with Load([worker]) as load:
        load.go_on()
        assert abs(serves(restart(-HOUR_S // 2))) < 2.0
        assert abs(_lead_s(delegators[-1]) - HOUR_S / 2) < NEAR_S

        _assert_refused(restart(-2 * HOUR_S), "--accept-clock", "before the last time")

        assert abs(serves(restart(HOUR_S // 2)) - HOUR_S / 2) < 2.0

        _assert_refused(restart(2 * YEAR_S), "--accept-clock", "past the last time")
        assert abs(serves(restart(2 * YEAR_S, "--accept-clock")) - 2 * YEAR_S) < 2.0

        # And back: windows that lie two years ahead are given up.
        _assert_refused(restart(0), "--accept-clock")
        assert abs(serves(restart(0, "--accept-clock"))) < 2.0
        assert worker.said("lost machine") == 1

        # The same by the command, and no word at the start.
        assert abs(serves(restart(2 * YEAR_S, "--accept-clock")) - 2 * YEAR_S) < 2.0
        delegators[-1].terminate()
        rewind = ["-m", "zflake", "store", "rewind", f"sqlite:///{daemons.folder}/store.db"]
        rewinding = daemons.process([sys.executable, *rewind])
        assert rewinding.wait() == 0, rewinding.log()
        assert abs(serves(restart(0))) < 2.0
    assert worker.said("lost machine") == 2
    (taker,) = load.takers.values()
    verdict = check_runs([d.log_path for d in delegators], runs_of(taker.runs))
    assert verdict.violations == []


def test_holders_of_a_store_that_was_lost_are_served_again_after_its_rest(
    daemons: Daemons, clocks: Clocks
) -> None:
    clock = clocks()
    delegators = [daemons.delegator("--machines", "0-0", ttl="1s", env=clock.env)]
    worker = daemons.worker(to=delegators[0])
    until(lambda: worker.said("holding machine"), "the worker to hold a machine ID")
    with Load([worker]) as load:
        load.go_on()
        delegators[0].kill()
        for path in daemons.folder.glob("store.db*"):
            path.unlink()

        def restart(off_s: int) -> Daemon:
            clock.set(off_s)
            flags = ("--machines", "0-0")
            return daemons.delegator(*flags, bind=delegators[0].address, new=False, ttl="1s", env=clock.env)

        delegators.append(resting := restart(0))
        until(lambda: _refusals(resting), "a request to be refused")
        assert status_of(resting.address)["granting_in_ms"] > 1000
        assert not resting.leases("renewed") + resting.leases("acquired")
        resting.kill()
    delegators.append(restart(REST_S + 5))
    until(lambda: worker.said("going over to the one"), "the worker to give its lease up")
    with Load([worker]) as after:
        after.go_on("after the rest")
    stores = [[d.log_path for d in of_store] for of_store in (delegators[:1], delegators[1:])]
    assert check_stores(stores, runs_of(load.runs + after.runs)).violations == []


def _refusals(delegator: Daemon) -> int:
    return sum(status_of(delegator.address).get("errors", {}).values())


def test_workers_an_hour_off_mint_in_the_order_in_which_they_are_asked(
    daemons: Daemons, clocks: Clocks, connect: Connect
) -> None:
    delegator = daemons.delegator(ttl="2s")
    off = [clocks(off_s) for off_s in (-HOUR_S, HOUR_S)]
    workers = [daemons.worker(to=delegator, env=clock.env) for clock in off]
    until(lambda: all(w.said("holding machine") for w in workers), "both to hold machine IDs")
    asked = [connect(worker.address) for worker in workers]
    runs: list[tuple[int, int, int]] = []
    for k in range(4_000):
        if k == 2_000:
            for clock in off:
                clock.set(-clock.off_s)
        response = asked[k % 2].ask("ids.next", 1, 2000)
        assert response.error is None
        runs.append(tuple(response.result))
    ticks = ticks_of(runs)
    assert max(a - b for a, b in itertools.pairwise(ticks)) <= ORDER_MS
    assert abs(DEFAULT.epoch_ms + ticks[-1] - time.time() * 1000) < 500
    assert check_runs([delegator.log_path], runs_of(runs)).violations == []


def test_a_static_worker_whose_clock_is_set_back_repeats_nothing_and_ascends(
    daemons: Daemons, clocks: Clocks
) -> None:
    clock = clocks()
    worker = daemons.worker("--machine", "7", env=clock.env)
    with zflake.Client(worker.address, route="direct") as client:
        ids = client.next_ids(1000)
        clock.set(-10)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            ids += client.next_ids(200)
            time.sleep(0.001)
    assert worker.said("the wall clock went back"), "it did not see the step"
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    ahead_ms = DEFAULT.epoch_ms + (ids[-1] >> DEFAULT.time_shift) - clock.time() * 1000
    assert 9_000 < ahead_ms < 10_100, "it goes on in the time that it had"
