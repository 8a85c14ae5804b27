"""The timeline as a holder sees it: behind by no more than a flight, never ahead, never needlessly back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake.core.layout import DEFAULT, PRESETS
from zflake.core.lease import Mark
from zflake.core.timeline import HORIZON_US, SLEW, Estimator, Marks, tick_of, us_until

thorough = settings(deadline=None, max_examples=150)

TRUE_US = 1_700_000_000_000_000
"""The timeline's now when the local clock shows 0."""
MS = 1_000

flights = st.integers(0, 500 * MS)
pauses = st.integers(0, 900 * MS)


def follower(*exchanges: tuple[int, int]) -> Estimator:
    """An estimator after exchanges of (local time of arrival, how far its offset lies below TRUE_US)."""
    estimator = Estimator()
    for received, late in exchanges:
        estimator.exchange(TRUE_US + received - late, received, step=False)
    return estimator


AWAY: Final = HORIZON_US + 1
"""The local time at which a first exchange counts no more."""


def slewing() -> Estimator:
    """An estimator that was right at 0, and at `AWAY` has learned that it is 100 ms ahead."""
    return follower((0, 0), (AWAY, 100 * MS))


def lag(estimator: Estimator, local_us: int) -> int:
    """How far its now lies behind TRUE_US + local."""
    return TRUE_US + local_us - estimator.at(local_us)


# --- the estimate ---


@thorough
@given(st.lists(st.tuples(pauses, flights), min_size=1, max_size=40), st.integers(0, 5_000 * MS))
def test_a_holder_is_behind_by_no_more_than_one_flight_and_never_ahead(
    beats: list[tuple[int, int]], later: int
) -> None:
    estimator = Estimator()
    local, arrived = 0, []
    for pause, flight in beats:
        local += pause
        arrived.append((local, flight))
        # Sent at timeline TRUE_US + local - flight, received at local.
        estimator.exchange(TRUE_US + local - flight, local, step=False)
        newest = [flight for at, flight in arrived if at >= local - HORIZON_US]
        assert 0 <= lag(estimator, local) <= min(newest)
    assert 0 <= lag(estimator, local + later) <= arrived[-1][1]


@thorough
@given(st.lists(st.tuples(pauses, flights), min_size=1, max_size=40))
def test_with_steps_the_offset_is_the_largest_of_the_last_two_seconds(beats: list[tuple[int, int]]) -> None:
    estimator = Estimator()
    local, arrived = 0, []
    for pause, flight in beats:
        local += pause
        arrived.append((local, flight))
        estimator.exchange(TRUE_US + local - flight, local, step=True)
        assert lag(estimator, local) == min(f for at, f in arrived if at >= local - HORIZON_US)


def test_an_exchange_has_a_say_for_two_seconds_and_not_longer() -> None:
    for age, expected in ((HORIZON_US, 1 * MS), (HORIZON_US + 1, 9 * MS)):
        estimator = follower((0, 1 * MS))
        estimator.exchange(TRUE_US + age - 9 * MS, age, step=True)
        assert lag(estimator, age) == expected


def test_exchanges_with_several_delegators_are_pooled() -> None:
    # One delegator sits far away, the other near; the near one decides, in whichever order they answer.
    for near_first in (True, False):
        estimator = Estimator()
        for i in range(10):
            flight = 2 * MS if (i % 2 == 0) == near_first else 80 * MS
            estimator.exchange(TRUE_US + i * 100 * MS - flight, i * 100 * MS, step=False)
            assert i == 0 or lag(estimator, i * 100 * MS) == 2 * MS


def test_without_an_exchange_there_is_no_time() -> None:
    estimator = Estimator()
    assert not estimator.known
    with pytest.raises(AssertionError):
        estimator.at(0)
    estimator.exchange(TRUE_US, 0, step=False)
    assert estimator.known
    assert estimator.at(5) == TRUE_US + 5


def test_the_memory_of_exchanges_is_bounded_by_the_horizon() -> None:
    estimator = Estimator()
    for i in range(1_000):  # ever slower flights: each one may still become the largest
        estimator.exchange(TRUE_US + i * 10 * MS - i, i * 10 * MS, step=False)
    assert len(estimator._exchanges) <= HORIZON_US // (10 * MS) + 1


# --- forward and backward ---


@pytest.mark.parametrize("step", [True, False])
def test_it_steps_forward_with_or_without_leave_to_step_back(step: bool) -> None:
    estimator = follower((0, 40 * MS))
    estimator.exchange(TRUE_US + 100 * MS, 100 * MS, step=step)
    assert lag(estimator, 100 * MS) == 0


def test_it_slews_backward_by_a_tenth_of_the_time_that_passes() -> None:
    estimator = slewing()
    assert lag(estimator, AWAY) == 0
    for passed in (10 * MS, 50 * MS, 500 * MS, 990 * MS):
        assert lag(estimator, AWAY + passed) == passed // SLEW
    for passed in (1_000 * MS, 1_001 * MS, 10_000 * MS):
        assert lag(estimator, AWAY + passed) == 100 * MS


def test_a_slew_read_often_is_as_fast_as_one_read_once() -> None:
    estimator = slewing()
    for passed in range(0, 10 * MS, 3):  # each too short for a whole microsecond of correction
        estimator.at(AWAY + passed)
    assert lag(estimator, AWAY + 10 * MS) == 10 * MS // SLEW


def test_a_slew_goes_on_through_further_exchanges() -> None:
    estimator = follower((0, 0))
    for passed in range(0, 1_000 * MS, 10 * MS):
        estimator.exchange(TRUE_US + AWAY + passed - 100 * MS, AWAY + passed, step=False)
    assert lag(estimator, AWAY + 1_000 * MS) == 100 * MS


def test_a_slew_begins_with_the_exchange_that_calls_for_it_and_not_before() -> None:
    # A long quiet stretch before is no credit: spent at once, it would set now back by a tenth of it.
    estimator = follower((0, 0))
    away = 3_600_000 * MS
    before = estimator.at(away)
    estimator.exchange(TRUE_US + away - 60_000 * MS, away, step=False)
    assert estimator.at(away) == before


def test_a_second_slew_gets_no_credit_from_the_first() -> None:
    estimator = follower((0, 0))
    first = HORIZON_US + 1
    estimator.exchange(TRUE_US + first - MS, first, step=False)
    assert lag(estimator, first + 100 * MS) == MS
    second = first + 100_000 * MS
    before = estimator.at(second)
    estimator.exchange(TRUE_US + second - 500 * MS, second, step=False)
    assert estimator.at(second) == before


def test_a_step_forward_stands_though_nobody_read_the_time_before_the_fall() -> None:
    estimator = follower((0, 50 * MS), (100 * MS, 0))
    away = 100 * MS + HORIZON_US + 1
    estimator.exchange(TRUE_US + away - 20 * MS, away, step=False)
    assert lag(estimator, away) == 0
    assert lag(estimator, away + 100 * MS) == 10 * MS


def test_a_local_time_from_before_the_slew_is_not_put_ahead_by_it() -> None:
    # A thread may read its local clock, and ask for the time only after an exchange came in between.
    estimator = slewing()
    assert lag(estimator, AWAY - 10 * MS) == 0
    assert lag(estimator, AWAY) == 0


def test_with_leave_it_steps_back_at_once() -> None:
    estimator = follower((0, 0))
    estimator.exchange(TRUE_US + AWAY - 3_600_000 * MS, AWAY, step=True)
    assert lag(estimator, AWAY) == 3_600_000 * MS


def test_leave_to_step_ends_a_slew() -> None:
    estimator = slewing()
    estimator.exchange(TRUE_US + AWAY + MS - 100 * MS, AWAY + MS, step=True)
    assert lag(estimator, AWAY + MS) == 100 * MS


def test_a_rise_to_above_the_offset_ends_a_slew() -> None:
    estimator = slewing()
    assert lag(estimator, AWAY + 100 * MS) == 10 * MS
    estimator.exchange(TRUE_US + AWAY + 100 * MS - 5 * MS, AWAY + 100 * MS, step=False)
    assert lag(estimator, AWAY + 100 * MS) == 5 * MS
    assert lag(estimator, AWAY + 1_000 * MS) == 5 * MS


@thorough
@given(
    st.lists(
        st.tuples(
            pauses, st.integers(-60_000 * MS, 60_000 * MS), st.lists(st.integers(0, 50 * MS), max_size=4)
        ),
        min_size=1,
        max_size=25,
    )
)
def test_now_never_goes_back_without_leave_and_moves_at_nine_tenths_at_least(
    beats: list[tuple[int, int, list[int]]],
) -> None:
    estimator = Estimator()
    local, shown, shown_at = 0, None, 0
    for pause, error, reads in beats:
        local += pause
        estimator.exchange(TRUE_US + local + error, local, step=False)
        for wait in [0, *reads]:
            local += wait
            now = estimator.at(local)
            if shown is not None:
                assert now - shown >= (local - shown_at) * (SLEW - 1) // SLEW
            shown, shown_at = now, local


# --- marks ---


def test_a_mark_that_moves_once_may_be_a_dead_delegators_last_write() -> None:
    marks = Marks("me")
    assert marks.read([Mark("me", 5), Mark("other", 100)]) is None
    assert marks.read([Mark("me", 6), Mark("other", 100)]) is None
    assert marks.read([Mark("me", 7), Mark("other", 1_100)]) == 1_100
    assert marks.running_us is None
    assert marks.read([Mark("me", 8), Mark("other", 2_100)]) == 2_100
    assert marks.running_us == 2_100


def test_one_move_of_each_of_two_delegators_proves_neither() -> None:
    marks = Marks("me")
    marks.read([Mark("a", 1), Mark("b", 1)])
    assert marks.read([Mark("a", 2), Mark("b", 1)]) == 2
    assert marks.read([Mark("a", 2), Mark("b", 9)]) == 9
    assert marks.running_us is None


def test_a_mark_that_was_not_there_before_has_not_moved() -> None:
    marks = Marks("me")
    marks.read([])
    assert marks.read([Mark("other", 100)]) is None
    assert marks.read([Mark("other", 101)]) == 101


def test_the_latest_of_those_that_run_is_the_timeline() -> None:
    marks = Marks("me")
    for at in (1, 2, 3):
        marks.read([Mark("a", 100 * at), Mark("b", 90 * at), Mark("gone", 10**9)])
    assert marks.running_us == 300


# --- ticks ---


def test_a_tick_begins_exactly_when_it_is_due() -> None:
    sonyflake = PRESETS["sonyflake"]
    due = (sonyflake.epoch_ms + 7 * 10) * 1000
    assert tick_of(sonyflake, due) == 7
    assert tick_of(sonyflake, due - 1) == 6
    assert tick_of(sonyflake, due + 9_999) == 7
    assert tick_of(sonyflake, due + 10_000) == 8


def test_us_until_is_what_is_left_and_nothing_once_it_has_begun() -> None:
    due = (DEFAULT.epoch_ms + 1000) * 1000
    assert us_until(DEFAULT, 1000, due - 1) == 1
    assert us_until(DEFAULT, 1000, due) == 0
    assert us_until(DEFAULT, 1000, due + 1) == 0
    assert us_until(DEFAULT, 1001, due) == 1000


@thorough
@given(
    st.sampled_from(sorted(PRESETS)),
    st.integers(0, 10**13),
    st.integers(0, TRUE_US * 2),
    st.integers(1, 10**6),
)
def test_waiting_until_a_tick_arrives_in_it_and_waiting_less_does_not(
    name: str, tick: int, now_us: int, less: int
) -> None:
    layout = PRESETS[name]
    wait = us_until(layout, tick, now_us)
    assert tick_of(layout, now_us + wait) >= tick
    if wait:
        assert tick_of(layout, now_us + wait) == tick
        assert tick_of(layout, now_us + wait - min(less, wait)) < tick


@thorough
@given(st.sampled_from(sorted(PRESETS)), st.integers(0, TRUE_US * 2))
def test_a_tick_is_the_one_that_the_layout_reads_off_a_datetime(name: str, now_us: int) -> None:
    layout = PRESETS[name]
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)
    assert tick_of(layout, now_us) == layout.tick_of(when)
