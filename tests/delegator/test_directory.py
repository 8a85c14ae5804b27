"""The directory: who holds a lease, as this delegator last saw it stored."""

from __future__ import annotations

from zflake.core.lease import Record
from zflake.delegator.directory import Directory


def record(machine: int, gen: int = 1, fence: int = 100, *, held: bool = True) -> Record:
    return Record(machine, fence, gen, b"%16d" % gen if held else None)


def test_it_begins_with_what_the_store_held_and_lists_by_machine() -> None:
    directory = Directory([record(7), record(2)])
    assert [r.machine for r in directory.held(50)] == [2, 7]


def test_a_newer_record_takes_the_place_of_an_older_one_and_never_the_other_way() -> None:
    directory = Directory([])
    directory.learn(record(1, gen=3, fence=300))
    directory.learn(record(1, gen=2, fence=900))
    assert [r.fence for r in directory.held(0)] == [300]
    directory.learn(record(1, gen=4, fence=400))
    assert [r.fence for r in directory.held(0)] == [400]


def test_a_release_takes_a_machine_out_and_an_old_one_does_not() -> None:
    directory = Directory([record(1, gen=5)])
    directory.learn(record(1, gen=4, held=False))
    assert len(directory.held(0)) == 1
    directory.learn(record(1, gen=6, held=False))
    assert directory.held(0) == []


def test_a_window_that_has_run_out_is_forgotten_until_it_is_renewed() -> None:
    directory = Directory([record(1, fence=100)])
    assert len(directory.held(99)) == 1
    assert directory.held(100) == []
    assert directory.held(0) == []
    directory.learn(record(1, gen=2, fence=200))
    assert len(directory.held(100)) == 1
