"""The directory: who holds a lease, as this delegator last saw it stored, and who is there to serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from zflake.core.lease import Record
from zflake.delegator.directory import MISSED_US, Directory
from zflake.wire.cluster import Ready


def record(machine: int, gen: int = 1, fence: int = 100, *, held: bool = True) -> Record:
    return Record(machine, fence, gen, token(gen) if held else None)


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


def test_a_window_that_has_run_out_is_forgotten_by_the_next_sweep_until_it_is_renewed() -> None:
    directory = Directory([record(1, fence=100)])
    assert len(directory.held(99)) == 1
    assert directory.held(100) == []
    assert directory.count == 1
    directory.sweep(100, 0)
    assert directory.count == 0
    directory.learn(record(1, gen=2, fence=200))
    assert len(directory.held(100)) == 1


# --- workers ---

LOAD: Final = {"requests": 1, "ids": 2, "parked": 3, "dropped": 4, "errors": 5}
NOW: Final = 50
"""A tick inside the window of `record`."""


def token(gen: int) -> bytes:
    """The token of `record` at that gen."""
    return b"%16d" % gen


def there(*machines: int) -> Directory:
    """A directory whose workers have just arrived, each under its machine ID's digits."""
    directory = Directory(record(machine) for machine in machines)
    for machine in machines:
        assert directory.register(b"%d" % machine, Ready(machine, token(1)), NOW, 0)
    return directory


def present(directory: Directory, local_us: int = 0, now: int = NOW) -> list[int]:
    return [worker.machine for _, worker in directory.workers(now, local_us)]


def test_a_holder_is_no_worker_until_it_has_shown_its_token() -> None:
    directory = Directory([record(1), record(2)])
    assert present(directory) == []
    assert directory.register(b"x", Ready(2, token(1)), NOW, 0)
    ((lease, worker),) = directory.workers(NOW, 0)
    assert lease == record(2)
    assert (worker.identity, worker.machine, worker.load) == (b"x", 2, dict.fromkeys(LOAD, 0))


@pytest.mark.parametrize(
    "wrong", [token(2), b"", token(1)[:-1], token(1) + b"\0", bytes(16), b"\xff" * 16], ids=range(6)
)
def test_a_wrong_token_lets_nobody_in(wrong: bytes) -> None:
    directory = Directory([record(1)])
    assert not directory.register(b"x", Ready(1, wrong), NOW, 0)
    assert not directory.proves(b"x", wrong)
    assert present(directory) == []


def test_a_token_of_another_machine_or_of_one_that_nobody_holds_lets_nobody_in() -> None:
    directory = Directory([record(1, gen=1), record(2, gen=2)])
    for machine in (2, 3, 2**63 - 1):
        assert not directory.register(b"x", Ready(machine, token(1)), NOW, 0)
    directory.learn(record(1, gen=2, held=False))
    assert not directory.register(b"x", Ready(1, token(1)), NOW, 0)
    assert present(directory) == []


def test_a_token_that_was_renewed_since_lets_nobody_in_and_its_successor_does() -> None:
    directory = Directory([record(1, gen=1)])
    directory.learn(record(1, gen=2, fence=200))
    assert not directory.register(b"x", Ready(1, token(1)), NOW, 0)
    assert directory.register(b"x", Ready(1, token(2)), NOW, 0)


def test_a_lease_whose_window_has_ended_lets_nobody_in() -> None:
    directory = Directory([record(1, fence=100)])
    assert not directory.register(b"x", Ready(1, token(1)), 100, 0)
    assert directory.register(b"x", Ready(1, token(1)), 99, 0)


def test_a_wrong_token_does_not_put_out_the_worker_that_is_there() -> None:
    directory = there(1)
    assert not directory.register(b"stranger", Ready(1, token(9)), NOW, 0)
    assert not directory.register(b"1", Ready(1, token(9)), NOW, 0)
    assert present(directory) == [1]


def test_a_renewal_keeps_a_worker_and_a_new_tenancy_puts_it_out() -> None:
    directory = there(1)
    directory.learn(record(1, gen=2, fence=200))
    assert present(directory) == [1]
    assert directory.sweep(NOW, 0) == []
    directory.learn(replace(record(1, gen=3, fence=300), tenancy_start=150))
    assert present(directory) == []
    assert directory.sweep(NOW, 0) == [b"1"]
    assert not directory.proves(b"1", token(1))


def test_a_release_puts_a_worker_out() -> None:
    directory = there(1, 2)
    directory.learn(record(1, gen=2, held=False))
    assert present(directory) == [2]
    assert directory.sweep(NOW, 0) == [b"1"]


def test_a_worker_that_lapsed_is_out_and_must_introduce_itself_again() -> None:
    directory = there(1)
    assert present(directory, now=99) == [1]
    assert present(directory, now=100) == []
    assert directory.sweep(99, 0) == []
    assert directory.sweep(100, 0) == [b"1"]
    directory.learn(record(1, gen=2, fence=200))
    assert not directory.proves(b"1", token(1))
    assert directory.register(b"1", Ready(1, token(2)), 100, 0)


def test_a_worker_that_missed_its_beats_is_out_at_once_and_given_by_one_sweep() -> None:
    directory = there(1, 2)
    directory.hear(b"2", LOAD, 1)
    assert present(directory, MISSED_US - 1) == [1, 2]
    assert present(directory, MISSED_US) == [2]
    assert directory.sweep(NOW, MISSED_US - 1) == []
    assert directory.sweep(NOW, MISSED_US) == [b"1"]
    assert directory.sweep(NOW, MISSED_US) == []
    assert not directory.proves(b"1", token(1))
    assert directory.register(b"1", Ready(1, token(1)), NOW, MISSED_US)
    assert present(directory, MISSED_US) == [1, 2]


def test_a_worker_proves_itself_by_the_token_that_it_registered_with() -> None:
    directory = there(1, 2)
    assert not directory.proves(b"1", token(2))
    assert not directory.proves(b"1", b"")
    assert not directory.proves(b"x", token(1))
    directory.learn(record(1, gen=2, fence=200))
    assert directory.proves(b"1", token(1)), "it may not have heard of the renewal yet"
    assert directory.register(b"1", Ready(1, token(2)), NOW, 0)
    assert directory.proves(b"1", token(2))
    assert not directory.proves(b"1", token(1))


def test_a_beat_keeps_a_worker_and_says_how_it_is() -> None:
    directory = there(1)
    for beat in range(1, 20):
        directory.hear(b"1", LOAD | {"ids": beat}, beat * 250_000)
        assert directory.sweep(NOW, beat * 250_000) == []
    ((_, worker),) = directory.workers(NOW, 20 * 250_000)
    assert worker.load == LOAD | {"ids": 19}


def test_a_stranger_s_beat_is_nobody_s() -> None:
    directory = there(1)
    directory.hear(b"x", LOAD, 5)
    assert directory.sweep(NOW, MISSED_US) == [b"1"]


def test_who_leaves_is_out_at_once_and_not_given_by_a_sweep() -> None:
    directory = there(1, 2)
    directory.drop(b"1")
    directory.drop(b"x")
    assert present(directory) == [2]
    assert directory.sweep(NOW, 0) == []
    assert not directory.proves(b"1", token(1))
    assert len(directory.held(NOW)) == 2  # the lease runs on


def test_the_time_that_the_delegator_was_stopped_is_nobody_s_fault_and_no_more_than_it() -> None:
    directory = there(1)
    stop_us = 60_000_000
    directory.excuse(stop_us)
    assert directory.sweep(NOW, stop_us + MISSED_US - 1) == []
    assert present(directory, stop_us + MISSED_US - 1) == [1]
    assert directory.sweep(NOW, stop_us + MISSED_US) == [b"1"]


def test_a_worker_that_registers_again_takes_the_place_of_its_former_connection() -> None:
    directory = there(1, 2)
    assert directory.identity_of(1) == b"1"
    assert directory.register(b"again", Ready(1, token(1)), NOW, 10)
    assert directory.identity_of(1) == b"again"
    assert not directory.proves(b"1", token(1))
    assert [worker.identity for _, worker in directory.workers(NOW, 20)] == [b"again", b"2"]
    directory.drop(b"1")
    assert present(directory) == [1, 2]
    assert directory.register(b"again", Ready(2, token(1)), NOW, 20)
    assert directory.identity_of(1) is None
    assert present(directory) == [2]


def test_workers_are_listed_by_machine() -> None:
    assert present(there(7, 2, 5)) == [2, 5, 7]
