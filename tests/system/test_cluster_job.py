"""The cluster job, small; and that its checks catch what they are there to catch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.system import cluster_job
from tests.system.checker import Verdict
from tests.system.runs import Runs, judge, read_runs, runs_of
from zflake.core.layout import DEFAULT, PRESETS, Layout
from zflake.core.mint import Run

WINDOWS: Final = {5: [(1_000, 3_000), (3_000, 3_700)], 9: [(1_500, 3_500)]}


@pytest.mark.timeout(120)
def test_the_cluster_job_ends_with_every_id_distinct_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    part = 100_000
    first = cluster_job.run(
        tmp_path,
        10 * part,
        part=part,
        parts=1,
        rate=15_000,
        faults=["delegator killed between a commit and its answer", "store moved away and back"],
    )
    assert not first.violations, str(first)
    assert part <= first.state.ids < 10 * part
    ids = first.state.ids + part  # how far it came by then depends on how long the faults took
    again = cluster_job.run(tmp_path, ids, part=ids, rate=15_000, faults=["disk full for a while"])
    assert not again.violations, str(again)
    assert again.state.ids == sum(again.by_machine.values()) >= ids
    assert again.state.parts == 2
    assert len(again.state.faults) == 3
    assert again.windows > first.windows > 1


# --- the check of runs ---


def _sound(layout: Layout) -> list[Run]:
    step = 1 << layout.sequence_shift
    full = layout.ids_per_tick
    runs = [
        (layout.compose(tick, machine, sequence), step, count)
        for machine, windows in WINDOWS.items()
        for start, end in windows
        for tick in range(start, end, 7)
        for sequence, count in ((0, 5), (5, 1), (6, full - 6))
    ]
    random.Random(1).shuffle(runs)
    return runs


def _violations(runs: Runs, layout: Layout = DEFAULT) -> list[str]:
    verdict = Verdict()
    judge(runs, WINDOWS, layout, verdict)
    return verdict.violations


@pytest.mark.parametrize("layout", [DEFAULT, PRESETS["clawflake"], PRESETS["sonyflake"]], ids=str)
def test_sound_runs_pass(layout: Layout) -> None:
    runs = _sound(layout)
    verdict = Verdict()
    judge(runs_of(runs), WINDOWS, layout, verdict)
    assert verdict.violations == []
    assert verdict.ids == sum(count for _, _, count in runs) == sum(verdict.by_machine.values())
    assert verdict.windows == 3


@pytest.mark.parametrize("layout", [DEFAULT, PRESETS["clawflake"], PRESETS["sonyflake"]], ids=str)
@pytest.mark.parametrize(("sequence", "count", "again"), [(0, 1, 1), (4, 2, 2), (5, 1, 1), (3, 9, 9)])
def test_ids_that_come_again_inside_a_run_are_caught(
    layout: Layout, sequence: int, count: int, again: int
) -> None:
    runs = [*_sound(layout), (layout.compose(1_007, 5, sequence), 1 << layout.sequence_shift, count)]
    (violation,) = _violations(runs_of(runs), layout)
    assert violation.startswith(f"{again} IDs came again")


def test_a_long_run_over_several_short_ones_is_caught_once_for_each_id() -> None:
    runs = [(DEFAULT.compose(1_001, 5, sequence), 1, 2) for sequence in (0, 10, 20)]
    runs.append((DEFAULT.compose(1_001, 5, 0), 1, 30))
    (violation,) = _violations(runs_of(runs))
    assert violation.startswith("6 IDs came again")


@pytest.mark.parametrize(
    ("tick", "machine"), [(999, 5), (3_700, 5), (1_499, 9), (3_500, 9), (2_000, 6), (0, 0)]
)
def test_a_run_outside_every_window_is_caught(tick: int, machine: int) -> None:
    (violation,) = _violations(runs_of([*_sound(DEFAULT), (DEFAULT.compose(tick, machine, 0), 1, 10)]))
    assert violation.startswith("1 runs lie outside every granted window")


@pytest.mark.parametrize(("sequence", "count"), [(4_095, 2), (0, 4_097), (0, 0)])
def test_a_run_that_leaves_its_tick_is_caught(sequence: int, count: int) -> None:
    runs = np.array([(DEFAULT.compose(1_001, 5, sequence), count)], dtype=np.uint64)
    assert any("leave their tick" in violation for violation in _violations(runs))


def test_a_record_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "0.runs"
    path.write_bytes(runs_of([(7, 1, 3), (9, 1, 1)]).astype("<u8").tobytes()[:-1])
    assert read_runs([path]).tolist() == [[7, 3]]


def test_what_a_broken_off_part_took_is_checked_with_the_rest(tmp_path: Path) -> None:
    lease = ["acquired", 5, 1, 1_000, 3_000]
    (tmp_path / "part-0-delegator-1.log").write_text(json.dumps({"message": "", "lease": lease}) + "\n")
    for k, tick in enumerate((1_000, 2_000, 2_000)):
        runs_of([(DEFAULT.compose(tick, 5, 0), 1, 10)]).astype("<u8").tofile(tmp_path / f"part-{k}.runs")
        result = cluster_job.check(tmp_path, 100, cluster_job.State.load(tmp_path))
        assert result.state.ids == 10 * (k + 1)
        assert len(result.violations) == (k == 2)


def test_a_job_that_was_told_of_a_violation_does_not_forget_it(tmp_path: Path) -> None:
    state = cluster_job.State(parts=3, ids=5, violations=["it was so"])
    state.faults["a fault"] += 1
    state.save(tmp_path)
    assert cluster_job.State.load(tmp_path) == state
    assert cluster_job.run(tmp_path, 100).violations == ["it was so"]
