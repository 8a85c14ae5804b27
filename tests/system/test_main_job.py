"""The main job, small; and that its checker catches what it is there to catch."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.system import main_job
from tests.system.checker import Lease, Verdict, check, windows_of
from tests.system.main_job import Fault, Result, idle_faults, wrong_ways
from zflake.core.layout import DEFAULT, PRESETS, Layout

WINDOWS: Final = [
    ("acquired", 5, 1, 1_000, 3_000),
    ("renewed", 5, 2, 3_000, 3_700),
    ("acquired", 9, 1, 1_500, 3_500),
]


@pytest.mark.timeout(240)
def test_the_main_job_ends_with_every_id_distinct_and_inside_its_window(tmp_path: Path) -> None:
    result = main_job.run(tmp_path, 300_000, seed=random.randrange(1000))
    assert not result.violations, str(result)
    assert result.ids == sum(result.by_machine.values()) == 300_000
    assert result.by_route == {"auto": 150_000, "broker": 150_000}
    assert result.brokered > 100
    assert len(result.faults) == 4
    assert result.windows > 20


# --- the checker ---


class Job:
    """What a sound job would have left behind, to be spoilt."""

    def __init__(self, folder: Path, leases: list[Lease], layout: Layout = DEFAULT) -> None:
        self.folder, self.layout = folder, layout
        self.leases = list(leases)
        self.ids = [
            [
                layout.compose(tick, machine, sequence)
                for tick in range(start, end, 7)
                for sequence in range(3)
            ]
            for _, machine, _, start, end in leases
        ]
        for ids in self.ids:
            random.Random(1).shuffle(ids)
        self.expected = sum(map(len, self.ids))

    def check(self, part: int = 500) -> Verdict:
        log = self.folder / "delegator.log"
        lines = [{"message": "serves"}, *({"message": "", "lease": lease} for lease in self.leases)]
        log.write_text("\n".join(map(json.dumps, lines)) + '\n{"message": "cut o')
        files = []
        for k, ids in enumerate(self.ids):
            files.append(self.folder / f"{k}.ids")
            np.array(ids, dtype="<u8").tofile(files[-1])
        return check([log], files, self.layout, expected=self.expected, part=part)

    def violation(self, **how: Any) -> str:
        (violation,) = self.check(**how).violations
        return violation


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, WINDOWS)


@pytest.mark.parametrize("part", [10, 500, 10**9])
@pytest.mark.parametrize("layout", [DEFAULT, PRESETS["clawflake"], PRESETS["sonyflake"]], ids=str)
def test_a_sound_job_passes_in_parts_of_any_size(tmp_path: Path, part: int, layout: Layout) -> None:
    job = Job(tmp_path, WINDOWS, layout)
    verdict = job.check(part)
    assert verdict.violations == []
    assert verdict.ids == job.expected
    assert verdict.windows == 3
    assert verdict.by_machine == {5: len(job.ids[0]) + len(job.ids[1]), 9: len(job.ids[2])}


@pytest.mark.parametrize("part", [10, 10**9])
def test_a_planted_duplicate_is_caught(job: Job, part: int) -> None:
    job.ids[2][0] = job.ids[0][-1]
    assert f"1 IDs came again, such as [{job.ids[0][-1]}]" in job.violation(part=part)


@pytest.mark.parametrize(
    ("tick", "machine"), [(999, 5), (3_700, 5), (1_499, 9), (3_500, 9), (2_000, 6), (2_000, 0), (0, 5)]
)
def test_an_id_outside_every_window_is_caught(job: Job, tick: int, machine: int) -> None:
    job.ids[0][0] = stranger = DEFAULT.compose(tick, machine, 100)
    assert f"1 IDs lie outside every granted window, such as [{stranger}]" in job.violation()


def test_an_id_beyond_all_layouts_is_caught(job: Job) -> None:
    job.ids[0][0] = 2**64 - 1
    assert "1 IDs lie outside" in job.violation()


def test_ids_without_any_window_are_caught(job: Job) -> None:
    job.leases = []
    assert f"{job.expected} IDs lie outside" in job.violation()


def test_a_missing_id_is_caught(job: Job) -> None:
    job.ids[1].pop()
    assert job.violation() == f"{job.expected - 1} IDs were taken, not {job.expected}"


def test_an_id_too_many_is_caught(job: Job) -> None:
    job.ids[1].append(DEFAULT.compose(3_001, 5, 4_000))
    assert job.violation() == f"{job.expected + 1} IDs were taken, not {job.expected}"


def test_a_file_that_ends_inside_an_id_is_caught(job: Job, tmp_path: Path) -> None:
    job.check()
    with (tmp_path / "0.ids").open("ab") as ids:
        ids.write(b"123")
    verdict = check(
        [tmp_path / "delegator.log"],
        sorted(tmp_path.glob("*.ids")),
        DEFAULT,
        expected=job.expected,
    )
    assert verdict.violations == ["0.ids ends inside an ID"]


@pytest.mark.parametrize(("start", "end"), [(3_699, 4_000), (900, 1_001), (2_000, 2_001), (0, 9_999)])
def test_overlapping_windows_are_caught(job: Job, start: int, end: int) -> None:
    job.leases.append(("acquired", 5, 3, start, end))
    assert any("overlap" in violation for violation in job.check().violations)


def test_two_windows_of_one_generation_are_caught(job: Job) -> None:
    job.leases.append(("renewed", 5, 2, 3_700, 4_000))
    assert "machine 5 gen 2 was written twice" in job.violation()


def test_a_grant_that_is_logged_again_is_one_window(job: Job) -> None:
    job.leases.append(("renewed", 5, 2, 3_000, 3_700))
    assert job.check().violations == []


def test_a_release_truncates_its_window_for_the_next_holder(job: Job) -> None:
    job.leases += [("released", 9, 2, 1_500, 3_499), ("acquired", 9, 3, 3_499, 4_000)]
    assert job.check().violations == []
    verdict = Verdict()
    assert windows_of(job.leases, verdict)[9] == [(1_500, 3_499), (3_499, 4_000)]
    assert verdict.violations == []


def test_an_id_in_the_part_that_was_given_back_is_caught(job: Job) -> None:
    job.leases.append(("released", 9, 2, 1_500, 3_490))
    late = sum(id_ >> DEFAULT.time_shift >= 3_490 for id_ in job.ids[2])
    assert late
    assert f"{late} IDs lie outside" in job.violation()


def test_what_a_release_gave_back_does_not_go_to_two(job: Job) -> None:
    job.leases += [("released", 9, 2, 1_500, 3_499), ("acquired", 9, 3, 3_498, 4_000)]
    assert "overlap" in job.violation()


# --- the job's own conditions ---


class FakeProcess:
    name = "client-0"

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def wait(self) -> int:
        return self.code

    def log(self) -> str:
        return "Traceback"


def _taker(folder: Path, errors: str, code: int = 0) -> main_job.Taker:
    path = folder / "client-0.ids"
    path.write_bytes(b"")
    path.with_suffix(".errors").write_text(errors)
    return main_job.Taker(FakeProcess(code), path, "auto")  # type: ignore[arg-type]


def test_an_error_that_a_client_saw_is_caught(tmp_path: Path) -> None:
    assert main_job.complaints([], [_taker(tmp_path, "")]) == []
    (complaint,) = main_job.complaints([], [_taker(tmp_path, "after 5 IDs: Timeout('...')\n")])
    assert "client-0 saw an error after 5 IDs" in complaint


def test_a_client_that_crashed_is_caught(tmp_path: Path) -> None:
    (complaint,) = main_job.complaints([], [_taker(tmp_path, "", code=1)])
    assert "client-0 ended with exit code 1" in complaint


def test_a_fault_without_ids_is_caught() -> None:
    fault = Fault("killed", at=10, over=20)
    assert idle_faults(Result(100, faults=[fault])) == []
    for idle in (replace(fault, at=0), replace(fault, over=10), replace(fault, over=101)):
        assert idle_faults(Result(100, faults=[idle])) == ["no IDs were taken while killed"]


def test_a_route_that_nobody_went_is_caught() -> None:
    half = Counter(auto=50, broker=50)
    assert wrong_ways(Result(100, by_route=half, brokered=9)) == []
    assert wrong_ways(Result(100, by_route=Counter(auto=100))) == []
    for wrong in (
        Result(100, by_route=half),
        Result(100, by_route=Counter(auto=100), brokered=9),
        Result(100, by_route=Counter(auto=100, broker=0), brokered=9),
    ):
        assert len(wrong_ways(wrong)) == 1
