"""The engine job, short; and that its checks catch what they are there to catch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.jobs import delegators, engines, outages
from tests.jobs.checker import RECORD, runs_of
from tests.jobs.delegators import Fault, Result
from tests.jobs.outages import Outage
from tests.servers import Etcd
from zflake.core.layout import DEFAULT

RATE: Final = 2_500
IDS: Final = 50_000
STRIKE: Final = Fault(
    "a fault", at=1_000, tick=9_000, since_s=0.0, within_s=15.0, before=0, over=2_000, granted_s=1.0
)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_on_etcd_ids_go_on_while_a_minority_is_killed_and_again_after_a_majority_was(tmp_path: Path) -> None:
    faults = [
        "etcd node 1 killed and restarted",
        "delegator 1 killed and restarted",
        "two etcd nodes killed, and back after all windows",
    ]
    result = engines.run(tmp_path, "etcd", IDS, rate=RATE, faults=faults, ttl_s=5).check()
    assert not result.violations, str(result)
    assert len(result.outages) == 1, str(result)
    assert [fault.what for fault in result.faults] == faults
    assert all(fault.settled_s is not None for fault in result.faults)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_redis_that_was_failed_over_or_restarted_is_rested_from(tmp_path: Path) -> None:
    faults = ["Redis failed over to a replica that lacks a lease", "Redis killed and restarted"]
    result = engines.run(tmp_path, "redis", IDS, rate=RATE, faults=faults, patient=False).check()
    assert not result.violations, str(result)
    assert not result.outages, str(result)
    assert result.notes["all delegators rested"] == 2
    assert result.notes["a lease that the replica lacked"] >= 1


@pytest.mark.long
@pytest.mark.timeout(120)
def test_on_postgresql_nobody_notices_that_it_is_killed_and_spoilt_files_are_noticed(tmp_path: Path) -> None:
    faults = ["PostgreSQL killed and restarted"]
    job = engines.run(tmp_path, "postgresql", IDS, rate=RATE, faults=faults)
    result = job.check()
    assert not result.violations, str(result)
    assert result.verdict.ids >= IDS
    assert result.outages == []
    (fault,) = result.faults
    assert fault.settled_s is not None
    run = job.clients[0].path.read_bytes()[:RECORD]
    job.clients[0].path.with_name("forged.runs").write_bytes(run)
    spoilt = job.check()
    again = spoilt.verdict.ids - result.verdict.ids
    assert spoilt.violations[0].startswith(f"{again} IDs came again")
    job.result.wanted = spoilt.verdict.ids + 1
    assert f"{spoilt.verdict.ids} IDs were taken, not {spoilt.verdict.ids + 1}" in job.check().violations


# --- what is not as it should be ---


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_an_etcd_that_loses_commits_is_not_killed_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(Etcd, "version", lambda: "3.5.1")
    with pytest.raises(outcome, match="NOT TESTED"):
        Etcd.need_durable()


def test_gaps_are_the_times_without_a_window() -> None:
    leases = [
        ("acquired", 1, 1, 1_000, 3_000),
        ("acquired", 2, 1, 1_500, 3_500),
        ("renewed", 1, 2, 6_000, 8_000),
        ("released", 1, 3, 6_000, 7_000),
        ("renewed", 2, 2, 7_000, 9_000),
    ]
    assert outages.gaps_of(leases) == [(3_500, 6_000)]
    # The holder of machine 2 was killed when two leases had been logged, and another took it later.
    assert outages.gaps_of(leases, [(2, 2_000, 2)]) == [(3_000, 6_000)]
    # One of machine 1 was killed in its second window.
    assert outages.gaps_of(leases, [(1, 6_500, 5)]) == [(3_500, 6_000), (6_500, 7_000)]


def test_a_lease_that_is_forgotten_fills_no_gap() -> None:
    leases = [
        ("acquired", 1, 1, 1_000, 3_000),
        ("acquired", 2, 1, 1_500, 3_500),
        ("acquired", 1, 1, 6_000, 8_000),
    ]
    assert outages.gaps_of(leases, forgotten={1}) == [(3_000, 6_000)]


def test_an_outage_is_measured_by_the_ids_on_both_sides() -> None:
    runs = runs_of([(DEFAULT.compose(tick, 1, 0), 1, 1) for tick in (9_000, 9_990, 12_300)])
    (outage,) = outages.outages_between([(10_000, 12_000)], runs)
    assert (outage.ended_ms, outage.began_ms) == (10, 300)
    assert outages.cut_short([outage]) == []
    none = np.empty((0, 2), dtype=np.uint64)
    assert len(outages.cut_short(outages.outages_between([(10_000, 12_000)], none))) == 2


@pytest.mark.parametrize(
    ("ended_ms", "began_ms", "words"), [(5_000, 0, "last 5000"), (0, 9_000, "first 9000")]
)
def test_windows_that_were_not_used_are_caught(ended_ms: int, began_ms: int, words: str) -> None:
    (violation,) = outages.cut_short([Outage((10_000, 12_000), ended_ms, began_ms)])
    assert words in violation


def test_an_outage_that_no_fault_explains_is_caught() -> None:
    found = [Outage((10_000, 12_000), 0, 0)]
    stops = replace(STRIKE, stops=True)
    assert delegators.unforeseen(found, [STRIKE, stops]) == []
    assert delegators.unforeseen(found, [stops, STRIKE]) == ["no window for 2.0 s after: a fault"]
    assert delegators.unforeseen(found, [replace(stops, tick=11_000)]) == [
        "no window for 2.0 s after: nothing at all"
    ]


def test_a_call_that_failed_while_a_window_was_open_is_caught() -> None:
    outage = Outage((10_000, 12_000), 0, 0)
    offset_us = DEFAULT.epoch_us
    errors = [f"{at} Timeout()" for at in ("9.999", "10.001", "16.999", "17.001")]
    found = outages.unexcused("client-1", errors, [outage], offset_us)
    assert found == ["client-1 saw an error Timeout()"] * 2
    assert outage.failed == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (replace(STRIKE, at=0), "no IDs"),
        (replace(STRIKE, over=1_000), "no IDs"),
        (replace(STRIKE, granted_s=15.1), "no lease for 15.1 s"),
    ],
)
def test_a_fault_that_struck_nobody_or_lasted_is_caught(fault: Fault, words: str) -> None:
    assert STRIKE.violations == []
    (violation,) = fault.violations
    assert words in violation


def test_a_result_says_what_it_found() -> None:
    result = Result("etcd", 100, faults=[STRIKE], outages=[Outage((0, 1_500), 3, 20, 4)])
    assert "a fault, 1 times; granted again after 1.0 s at most" in str(result)
    assert "no window, 1 times, for 1.5 s at most; 4 calls failed" in str(result)
    assert str(result).endswith("no call failed while a window was open")
    result.violations.append("it was so")
    assert str(result).endswith("VIOLATION: it was so\n  FAILED")
