"""The holder's clock: the timeline on a local clock that never steps."""

from __future__ import annotations

from itertools import pairwise

from zflake.clock import local_us
from zflake.core.layout import PRESETS
from zflake.holder.clock import HolderClock

LAYOUT = PRESETS["snowcloud"]
NOW_US = (LAYOUT.epoch_ms + 5000) * 1000 + 999


class Hand:
    """The local clock under the test's hand, and a holder's clock that runs on it."""

    def __init__(self) -> None:
        self.us = 1_000_000
        self.clock = HolderClock(lambda: self.us)


def test_the_local_clock_counts_microseconds_and_never_steps_back() -> None:
    readings = [local_us() for _ in range(1000)]
    assert all(a <= b for a, b in pairwise(readings))
    assert 0 < readings[-1] - readings[0] < 10_000_000


def test_a_clock_that_learned_nothing_is_in_no_tick() -> None:
    clock = Hand().clock
    assert not clock.known
    assert (clock.timeline_us(), clock.tick(LAYOUT)) == (None, -1)


def test_a_clock_goes_on_from_what_it_learned() -> None:
    hand = Hand()
    clock = hand.clock
    clock.exchange(NOW_US, hand.us, step=False)
    assert clock.known
    assert (clock.timeline_us(), clock.tick(LAYOUT)) == (NOW_US, 5000)
    hand.us += 1
    assert (clock.timeline_us(), clock.tick(LAYOUT)) == (NOW_US + 1, 5001)


def test_a_tick_before_the_epoch_is_negative_and_in_no_window() -> None:
    hand = Hand()
    hand.clock.exchange(LAYOUT.epoch_ms * 1000 - 1, hand.us, step=False)
    assert hand.clock.tick(LAYOUT) == -1
