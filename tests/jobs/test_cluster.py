"""The main job and the cluster job, small; and that their checks catch what they are there to catch."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.jobs import cluster, job
from tests.jobs.checker import runs_of
from tests.jobs.cluster import Plan, Result, State, wrong_ways
from tests.jobs.outages import unexcused
from tests.jobs.takers import Taker
from tests.system.daemons import Daemons
from zflake.core.layout import DEFAULT


@pytest.mark.timeout(240)
def test_the_main_job_ends_with_every_id_distinct_and_inside_its_window(tmp_path: Path) -> None:
    result = cluster.run_main(tmp_path, 300_000, seed=random.randrange(1000))
    assert not result.violations, str(result)
    state = result.state
    assert state.ids == sum(result.verdict.by_machine.values()) == sum(state.by_route.values()) >= 300_000
    assert min(state.by_route["auto"], state.by_route["broker"]) > 50_000
    assert state.brokered > 100
    assert state.faults.total() == len(cluster.MAIN)
    assert result.verdict.windows > 20


def plan(*faults: str) -> Plan:
    return Plan(rate=15_000, faults=[(0.0, fault) for fault in faults])


@pytest.mark.timeout(120)
def test_the_cluster_job_ends_with_every_id_distinct_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    part = 100_000
    first = cluster.run(
        tmp_path,
        10 * part,
        plan("delegator killed between a commit and its answer", "store moved away and back"),
        part=part,
        parts=1,
    )
    assert not first.violations, str(first)
    assert part <= first.state.ids < 10 * part
    ids = first.state.ids + part  # how far it came by then depends on how long the faults took
    again = cluster.run(tmp_path, ids, plan("disk full for a while"), part=ids)
    assert not again.violations, str(again)
    assert again.state.ids == sum(again.verdict.by_machine.values()) >= ids
    assert again.state.parts == 2
    assert len(again.state.faults) == 3
    assert again.verdict.windows > first.verdict.windows > 1


# --- the conditions of a job ---


def test_an_error_that_a_client_saw_is_caught_and_that_it_never_began(tmp_path: Path) -> None:
    client = Taker(None, tmp_path / "client-0.runs", "auto")  # type: ignore[arg-type]
    assert unexcused("client-0", client.errors) == ["client-0 saw an error it never began"]
    errors = tmp_path / "client-0.errors"
    errors.write_text("7.123 after 5 IDs: Timeout('...')\n")
    assert unexcused("client-0", client.errors) == ["client-0 saw an error after 5 IDs: Timeout('...')"]
    errors.write_text("")
    assert unexcused("client-0", client.errors) == []


@pytest.mark.parametrize("how", ["crash", "end"])
def test_a_client_that_ends_is_caught_at_once(how: str, daemons: Daemons) -> None:
    running = job.Job(daemons, random.Random(1), print)
    code = "raise RuntimeError('crash')" if how == "crash" else ""
    process = daemons.process([sys.executable, "-c", code], "client-0")
    running.clients.append(Taker(process, daemons.folder / "none.runs", "auto"))
    with pytest.raises(AssertionError, match="client-0 ended"):
        running.wait(lambda: False, "nothing")


def test_what_a_daemon_logged_is_caught_unless_it_was_to_be_expected(tmp_path: Path) -> None:
    class Logged:
        name = "delegator"

        def __init__(self, *events: dict[str, str]) -> None:
            self._events = events

        def events(self) -> tuple[dict[str, str], ...]:
            return self._events

    lines = [
        {"level": "info", "message": "serves"},
        {"level": "error", "message": "the disk is full"},
        {"level": "error", "message": "a fault"},
        {"level": "stray", "message": "a warning of Python's"},
        {"level": "info", "message": "an exception", "trace": "..."},
    ]
    found = job.complaints([Logged(*lines)], expected=["the disk"])  # type: ignore[list-item]
    assert found == [
        "delegator logged a fault",
        "delegator logged a warning of Python's",
        "delegator logged an exception",
    ]


def test_a_route_that_no_client_went_is_caught() -> None:
    half, all_auto = Counter(auto=50, broker=50), Counter(auto=100)

    def ways(by_route: Counter[str], brokered: int = 0) -> list[str]:
        return wrong_ways(Result("main job", 100, State(by_route=by_route, brokered=brokered)))

    assert ways(half, 9) == []
    assert ways(all_auto) == []
    assert len(ways(half)) == len(ways(all_auto, 9)) == len(ways(Counter(auto=100, broker=0), 9)) == 1


def test_what_a_broken_off_part_took_is_checked_with_the_rest(tmp_path: Path) -> None:
    lease = ["acquired", 5, 1, 1_000, 3_000]
    (tmp_path / "part-0-delegator-1.log").write_text(json.dumps({"message": "", "lease": lease}) + "\n")
    for k, tick in enumerate((1_000, 2_000, 2_000)):
        runs_of([(DEFAULT.compose(tick, 5, 0), 1, 10)]).astype("<u8").tofile(tmp_path / f"part-{k}.runs")
        result = cluster.check(tmp_path, 100, cluster.State.load(tmp_path))
        assert result.state.ids == 10 * (k + 1)
        assert len(result.violations) == (k == 2)


def test_a_job_that_was_told_of_a_violation_does_not_forget_it(tmp_path: Path) -> None:
    state = cluster.State(parts=3, ids=5, violations=["it was so"])
    state.faults["a fault"] += 1
    state.save(tmp_path)
    assert cluster.State.load(tmp_path) == state
    assert cluster.run(tmp_path, 100).violations == ["it was so"]
