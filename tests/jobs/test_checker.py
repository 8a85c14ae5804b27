"""The checker of jobs catches what it is there to catch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Final

import pytest

from tests.jobs.checker import Lease, Verdict, check_runs, read_runs, runs_in, runs_of, windows_of
from zflake.core.layout import DEFAULT, PRESETS, Layout
from zflake.core.mint import Run

LEASES: Final[list[Lease]] = [
    ("acquired", 5, 1, 1_000, 3_000),
    ("renewed", 5, 2, 3_000, 3_700),
    ("acquired", 9, 1, 1_500, 3_500),
]


class Job:
    """The leavings of a sound job, to be spoilt."""

    def __init__(self, folder: Path, layout: Layout = DEFAULT) -> None:
        self.log = folder / "delegator.log"
        self.layout = layout
        self.leases = list(LEASES)
        full = layout.ids_per_tick
        self.runs = [
            self.run(tick, machine, sequence, count)
            for _, machine, _, start, end in LEASES
            for tick in range(start, end, 7)
            for sequence, count in ((0, 5), (5, 1), (6, full - 6))
        ]
        random.Random(1).shuffle(self.runs)

    def run(self, tick: int, machine: int, sequence: int, count: int) -> Run:
        return self.layout.compose(tick, machine, sequence), 1 << self.layout.sequence_shift, count

    def check(self) -> Verdict:
        lines = [{"message": "serves"}, *({"message": "", "lease": lease} for lease in self.leases)]
        self.log.write_text("\n".join(map(json.dumps, lines)) + '\n{"message": "cut o')
        return check_runs([self.log], runs_of(self.runs), self.layout)

    def violation(self) -> str:
        (violation,) = self.check().violations
        return violation


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture(params=[DEFAULT, PRESETS["clawflake"], PRESETS["sonyflake"]], ids=str)
def any_job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    """One for each order of the fields."""
    return Job(tmp_path, request.param)


def test_a_sound_job_passes(any_job: Job) -> None:
    verdict = any_job.check()
    assert verdict.violations == []
    assert verdict.ids == sum(count for _, _, count in any_job.runs) == sum(verdict.by_machine.values())
    assert verdict.windows == 3
    assert set(verdict.by_machine) == {5, 9}


# --- IDs ---


@pytest.mark.parametrize(("sequence", "count", "again"), [(0, 1, 1), (4, 2, 2), (5, 1, 1), (3, 9, 9)])
def test_ids_that_come_again_inside_a_run_are_caught(
    any_job: Job, sequence: int, count: int, again: int
) -> None:
    any_job.runs.append(any_job.run(1_007, 5, sequence, count))
    assert any_job.violation().startswith(f"{again} IDs came again")


def test_a_long_run_over_several_short_ones_is_caught_once_for_each_id(job: Job) -> None:
    job.runs = [job.run(1_001, 5, sequence, 2) for sequence in (0, 10, 20)]
    job.runs.append(job.run(1_001, 5, 0, 30))
    assert job.violation().startswith("6 IDs came again")


@pytest.mark.parametrize(
    ("tick", "machine"), [(999, 5), (3_700, 5), (1_499, 9), (3_500, 9), (2_000, 6), (2_000, 0), (0, 5)]
)
def test_a_run_outside_every_window_is_caught(job: Job, tick: int, machine: int) -> None:
    job.runs.append(stranger := job.run(tick, machine, 0, 10))
    assert job.violation() == f"1 runs lie outside every granted window, such as from {[stranger[0]]}"


def test_an_id_beyond_all_layouts_is_caught(job: Job) -> None:
    job.runs.append((2**64 - 1, 1, 1))
    assert any(violation.startswith("1 runs lie outside") for violation in job.check().violations)


def test_runs_without_any_window_are_caught(job: Job) -> None:
    job.leases = []
    assert job.violation().startswith(f"{len(job.runs)} runs lie outside")


@pytest.mark.parametrize(("sequence", "count"), [(4_095, 2), (0, 4_097), (0, 0)])
def test_a_run_that_leaves_its_tick_is_caught(job: Job, sequence: int, count: int) -> None:
    job.runs = [job.run(1_001, 5, sequence, count)]
    assert any("leave their tick" in violation for violation in job.check().violations)


def test_a_record_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "0.runs"
    path.write_bytes(runs_of([(7, 1, 3), (9, 1, 1)]).astype("<u8").tobytes()[:-1])
    assert read_runs([path]).tolist() == [[7, 3]]


def test_a_list_of_ids_is_as_many_runs_as_it_has_gaps(job: Job) -> None:
    ids = [
        first + k
        for first, _, count in (
            job.run(1_001, 5, 0, 3),
            job.run(1_001, 5, 9, 1),
            job.run(1_002, 1023, 4_094, 2),
        )
        for k in range(count)
    ]
    after = DEFAULT.compose(1_003, 0, 0)
    assert after == ids[-1] + 1, "the next tick's first"
    expected = [[ids[0], 3], [ids[3], 1], [ids[4], 2], [after, 1]]
    assert runs_in([*ids, after]).tolist() == expected
    assert runs_in([after, *reversed(ids)]).tolist() == expected
    assert runs_in([7]).tolist() == [[7, 1]]
    assert runs_in([]).tolist() == []


def test_an_id_that_a_list_holds_twice_is_caught(job: Job) -> None:
    first, _, _ = job.run(1_001, 5, 0, 1)
    twice = runs_in([first, first + 1, first + 1, first + 2])
    job.runs = [(int(start), 1, int(count)) for start, count in twice]
    assert job.violation().startswith("1 IDs came again")


# --- windows ---


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
    job.runs = [job.run(3_489, 9, 0, 1), job.run(3_490, 9, 0, 1)]
    assert job.violation().startswith("1 runs lie outside")


def test_what_a_release_gave_back_does_not_go_to_two(job: Job) -> None:
    job.leases += [("released", 9, 2, 1_500, 3_499), ("acquired", 9, 3, 3_498, 4_000)]
    assert "overlap" in job.violation()
