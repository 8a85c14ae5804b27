"""The holder's clock: the timeline on a local clock that never steps."""

from __future__ import annotations

from itertools import pairwise

import pytest

from zflake.clock import local_us
from zflake.core.layout import PRESETS
from zflake.holder.clock import HolderClock

LAYOUT = PRESETS["snowcloud"]
NOW_US = (LAYOUT.epoch_ms + 5000) * 1000 + 999


def now_of(clock: HolderClock) -> int:
    now_us = clock.timeline_us()
    assert now_us is not None
    return now_us


class Hand:
    """The local clock, under the test's hand."""

    def __init__(self) -> None:
        self.us = 1_000_000

    def clock(self) -> HolderClock:
        return HolderClock(lambda: self.us)


@pytest.fixture
def at() -> Hand:
    return Hand()


def test_the_local_clock_counts_microseconds_and_never_steps_back() -> None:
    readings = [local_us() for _ in range(1000)]
    assert all(a <= b for a, b in pairwise(readings))
    assert 0 < readings[-1] - readings[0] < 10_000_000


def test_a_clock_that_learned_nothing_is_in_no_tick() -> None:
    assert not Hand().clock().known
    assert Hand().clock().tick(LAYOUT) == -1


def test_a_clock_goes_on_from_what_it_learned(at: Hand) -> None:
    clock = at.clock()
    clock.exchange(NOW_US, at.us, step=False)
    assert clock.known
    assert (now_of(clock), clock.tick(LAYOUT)) == (NOW_US, 5000)
    at.us += 1
    assert (now_of(clock), clock.tick(LAYOUT)) == (NOW_US + 1, 5001)


def test_a_tick_before_the_epoch_is_negative_and_in_no_window(at: Hand) -> None:
    clock = at.clock()
    clock.exchange(LAYOUT.epoch_ms * 1000 - 1, at.us, step=False)
    assert clock.tick(LAYOUT) == -1


def test_a_late_message_moves_nothing(at: Hand) -> None:
    clock = at.clock()
    clock.exchange(NOW_US, at.us, step=False)
    at.us += 500_000
    clock.exchange(NOW_US + 300_000, at.us, step=False)  # 200 ms under way
    assert now_of(clock) == NOW_US + 500_000


def test_a_timeline_that_is_ahead_is_followed_at_once(at: Hand) -> None:
    clock = at.clock()
    clock.exchange(NOW_US, at.us, step=False)
    clock.exchange(NOW_US + 60_000_000, at.us, step=False)
    assert now_of(clock) == NOW_US + 60_000_000


@pytest.mark.parametrize("step", [True, False])
def test_a_timeline_that_is_behind_is_stepped_to_only_where_no_window_holds(at: Hand, step: bool) -> None:
    clock = at.clock()
    clock.exchange(NOW_US, at.us, step=False)
    at.us += 3_000_000
    clock.exchange(NOW_US, at.us, step=step)
    assert (now_of(clock) == NOW_US) is step
    before = now_of(clock)
    at.us += 1000
    assert before < now_of(clock) <= before + 1000
