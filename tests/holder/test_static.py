"""A static machine ID: one window, from the next tick on, by the wall clock."""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import pairwise

import pytest

from zflake import clock
from zflake.core.layout import CALENDAR_END_MS, PRESETS, Layout
from zflake.errors import ConfigError, LayoutError
from zflake.holder.static import EXCHANGE_US, StaticHold

LAYOUT = PRESETS["snowcloud"]


class Hands:
    """The wall clock and the local clock, both under the test's hand."""

    def __init__(self, wall_us: int) -> None:
        self.wall_us = wall_us
        self.local_us = 1_000_000

    def time_ns(self) -> int:
        return self.wall_us * 1000

    def pass_us(self, us: int) -> None:
        self.wall_us += us
        self.local_us += us


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands((LAYOUT.epoch_ms + 5000) * 1000 + 300)
    monkeypatch.setattr(time, "time_ns", hands.time_ns)
    monkeypatch.setattr(clock, "local_us", lambda: hands.local_us)
    return hands


def tick(hold: StaticHold) -> int:
    return hold.clock.tick(hold.mint.layout)


@pytest.mark.parametrize("layout", [LAYOUT, PRESETS["sonyflake"]], ids=["1 ms", "10 ms"])
def test_nothing_is_minted_in_the_tick_of_its_start(hands: Hands, layout: Layout) -> None:
    hold = StaticHold(layout, 5)
    now = tick(hold)
    assert hold.mint.take(now, 1) is None
    assert hold.mint.opens(now) == now + 1
    hands.pass_us(layout.tick_ms * 1000)
    run = hold.mint.take(tick(hold), 1)
    assert run is not None
    assert layout.decompose(run[0]).tick == now + 1


def test_its_window_reaches_to_the_layouts_end(hands: Hands) -> None:
    hold = StaticHold(LAYOUT, 5)
    assert hold.mint.covers(LAYOUT.end_tick - 1)
    assert hold.retry_after_ms(0) == LAYOUT.tick_ms


def test_the_machine_must_fit(hands: Hands) -> None:
    with pytest.raises(LayoutError, match="machine"):
        StaticHold(LAYOUT, LAYOUT.machines)


@pytest.mark.parametrize("when", [-10_000, 1 << 42])
def test_a_wall_clock_outside_the_layout_is_refused(hands: Hands, when: int) -> None:
    hands.wall_us = min(LAYOUT.epoch_ms + when, CALENDAR_END_MS - 1) * 1000
    with pytest.raises(ConfigError, match="set the clock"):
        StaticHold(LAYOUT, 5)


def test_time_never_goes_back_when_the_wall_clock_does(
    hands: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    hold = StaticHold(LAYOUT, 5)
    hands.wall_us -= 3_600_000_000
    seen = []
    for _ in range(40):
        hands.pass_us(EXCHANGE_US)
        hold.service(hands.local_us)
        seen.append(hold.clock.at(hands.local_us))
    assert all(a < b for a, b in pairwise(seen))
    assert seen[-1] > hands.wall_us + 3_500_000_000
    assert [record.message[:24] for record in caplog.records] == ["the wall clock went back"]


def test_a_wall_clock_set_forward_is_followed(hands: Hands) -> None:
    hold = StaticHold(LAYOUT, 5)
    hands.pass_us(EXCHANGE_US)
    hands.wall_us += timedelta(hours=1) // timedelta(microseconds=1)
    hold.service(hands.local_us)
    assert hold.clock.at(hands.local_us) == hands.wall_us


def test_the_wall_clock_is_read_no_more_often_than_needed(hands: Hands) -> None:
    hold = StaticHold(LAYOUT, 5)
    assert hold.wake_us == hands.local_us + EXCHANGE_US
    hands.wall_us += 1_000_000
    hold.service(hands.local_us + EXCHANGE_US - 1)
    assert hold.clock.at(hands.local_us) < hands.wall_us


def test_after_release_nothing_is_minted(hands: Hands) -> None:
    hold = StaticHold(LAYOUT, 5)
    hands.pass_us(1000)
    assert hold.mint.take(tick(hold), 1) is not None
    hold.release(0)
    for ahead in range(3):
        assert hold.mint.take(tick(hold) + ahead, 1) is None
    hold.close()
