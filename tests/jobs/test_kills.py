"""Daemons die by SIGKILL around each commit and each reply: nothing is granted twice, and nothing leaks.

`scripts/soak kills` goes through every point, and later passings of it.
"""

from __future__ import annotations

import signal
from typing import Final

from tests.jobs import kills
from tests.jobs.checker import Lease
from tests.jobs.kills import LAUNCHER, leaked
from tests.jobs.load import Load
from tests.system.daemons import Daemons, names_of, status_of, until
from tests.system.failpoints import STATEMENTS, WORKER_POINTS

TRIED: Final = [
    *(f"renew: {where}" for where in (*STATEMENTS, "before the marker", "after the swap")),
    *(f"{kind}: {where} COMMIT" for kind in ("release", "meta") for where in ("before", "after")),
    *("acquire: after COMMIT", "acquire: after the swap", "mark: after COMMIT"),
    *(f"answer: {where} the {what}" for what in ("log", "send") for where in ("before", "after")),
]


def test_a_delegator_killed_at_any_point_grants_nothing_twice_and_loses_nobody(daemons: Daemons) -> None:
    result = kills.run(daemons.folder, [(point, 1) for point in TRIED])
    assert result.violations == []
    assert len(result.points) == len(TRIED)
    assert result.verdict.ids > 1000


def test_a_delegator_killed_while_it_makes_its_store_makes_it_at_the_next_start(daemons: Daemons) -> None:
    for where in STATEMENTS[:-1]:
        victim = daemons.delegator(via=(LAUNCHER, f"initialise: {where}", "1"))
        assert victim.wait() == -signal.SIGKILL, where
    delegator = daemons.delegator(ttl="1s")
    worker = daemons.worker(to=delegator)
    with Load([worker]) as load:
        load.go_on()
    assert load.check([delegator]).violations == []


def test_workers_killed_around_their_renewals_leave_machine_ids_that_others_take_over(
    daemons: Daemons,
) -> None:
    delegator = daemons.delegator("--machines", f"0-{len(WORKER_POINTS) - 1}", ttl="1s")
    victims = [daemons.worker(to=delegator, via=(LAUNCHER, point, "3")) for point in WORKER_POINTS]
    until(lambda: len(names_of(delegator)) == len(victims), "all machine IDs to be held")
    with Load(victims) as load:
        load.go_on()
        for victim in victims:
            victim.signal(signal.SIGUSR1)
        for victim, point in zip(victims, WORKER_POINTS, strict=True):
            assert victim.wait() == -signal.SIGKILL, point
            load.leave(victim)
        heirs = [daemons.worker(to=delegator) for _ in victims]
        for heir in heirs:
            load.follow(heir)
        load.go_on("after they took over")
        assert len(status_of(delegator.address)["leases"]) == len(heirs)
    verdict = load.check([delegator])
    assert verdict.violations == []
    assert len(verdict.by_machine) == len(WORKER_POINTS)
    assert load.lost() == []


def test_a_grant_that_no_holder_was_told_of_is_caught() -> None:
    leases: list[Lease] = [("acquired", 1, 1, 0, 10), ("renewed", 1, 2, 10, 20), ("renewed", 1, 4, 30, 40)]
    assert leaked(leases[:2]) == []
    assert leaked(leases) == ["machine 1: gens [3] were granted to no holder"]
