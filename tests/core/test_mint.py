"""The mint: (tick, sequence) strictly increases inside granted windows, whatever the clock does."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake.core.layout import PRESETS, Field, Layout
from zflake.core.mint import Mint, Run
from zflake.errors import LayoutError

thorough = settings(deadline=None, max_examples=150)

# Small enough that a few takes fill a tick and a few windows reach the layout's end.
SMALL = Layout("small", (Field("time", 7), Field("machine", 2), Field("sequence", 3)))
SWAPPED = Layout("swapped", (Field("time", 7), Field("sequence", 3), Field("machine", 2)))
FULL = SMALL.ids_per_tick

layouts = st.sampled_from([SMALL, SWAPPED])
ticks = st.integers(-3, SMALL.end_tick + 5)
takes = st.lists(st.tuples(ticks, st.integers(1, FULL + 2)))


@st.composite
def windows(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Windows in order, adjacent or apart, some of them reaching the layout's end."""
    bounds = sorted(draw(st.lists(st.integers(0, SMALL.end_tick), min_size=2, max_size=8)))
    pairs = pairwise(bounds)
    keep = draw(st.lists(st.booleans(), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    return [(a, b) for (a, b), kept in zip(pairs, keep, strict=True) if kept and a < b]


def ids(run: Run) -> list[int]:
    first, step, count = run
    return [first + i * step for i in range(count)]


def granted(layout: Layout, machine: int, *spans: tuple[int, int]) -> Mint:
    mint = Mint(layout, machine)
    for start, end in spans:
        mint.grant(start, end)
    return mint


# --- the three rules, for any clock ---


@thorough
@given(layouts, st.integers(0, 3), windows(), takes)
def test_tick_and_sequence_strictly_increase_whatever_the_clock_does(
    layout: Layout, machine: int, spans: list[tuple[int, int]], takes: list[tuple[int, int]]
) -> None:
    mint = granted(layout, machine, *spans)
    last = (-1, 0)
    for now, count in takes:
        run = mint.take(now, count)
        for id_ in ids(run) if run else []:
            read = layout.decompose(id_)
            assert read.machine == machine
            assert (read.tick, read.sequence) > last
            assert any(start <= read.tick < end for start, end in spans)
            last = (read.tick, read.sequence)
    assert mint.last == (None if last[0] < 0 else last[0])


@thorough
@given(st.data(), layouts, windows())
def test_windows_that_arrive_while_minting_change_none_of_it(
    data: st.DataObject, layout: Layout, spans: list[tuple[int, int]]
) -> None:
    mint = Mint(layout, 1)
    arrived: list[tuple[int, int]] = []
    minted: list[int] = []
    for span in [*spans, None]:
        for _ in range(data.draw(st.integers(0, 4))):
            run = mint.take(data.draw(ticks), data.draw(st.integers(1, FULL + 2)))
            minted += ids(run) if run else []
        assert all(any(s <= layout.decompose(i).tick < e for s, e in arrived) for i in minted)
        if span is not None:
            arrived.append(span)
            mint.grant(*span)
            assert mint.end == span[1]
    order = [(read.tick, read.sequence) for read in map(layout.decompose, minted)]
    assert order == sorted(set(order))


@thorough
@given(layouts, windows(), takes)
def test_a_run_lies_within_one_tick_and_gives_no_more_than_asked(
    layout: Layout, spans: list[tuple[int, int]], takes: list[tuple[int, int]]
) -> None:
    mint = granted(layout, 2, *spans)
    for now, count in takes:
        run = mint.take(now, count)
        if run is not None:
            assert 1 <= run[2] <= count
            reads = [layout.decompose(id_) for id_ in ids(run)]
            assert {read.tick for read in reads} == {mint.last}
            first = reads[0].sequence
            assert [read.sequence for read in reads] == list(range(first, first + run[2]))


@thorough
@given(layouts, windows(), takes, ticks)
def test_opens_names_the_first_tick_that_mints(
    layout: Layout, spans: list[tuple[int, int]], takes: list[tuple[int, int]], now: int
) -> None:
    def replayed() -> Mint:
        mint = granted(layout, 0, *spans)
        for then, count in takes:
            mint.take(then, count)
        return mint

    opens = replayed().opens(now)
    for tick in range(now, layout.end_tick + 2 if opens is None else opens):
        assert replayed().take(tick, 1) is None
    if opens is not None:
        assert opens >= now
        assert replayed().take(opens, 1) is not None


@thorough
@given(layouts, windows(), st.lists(ticks), ticks)
def test_asking_when_it_opens_changes_nothing(
    layout: Layout, spans: list[tuple[int, int]], asked: list[int], now: int
) -> None:
    one, two = granted(layout, 0, *spans), granted(layout, 0, *spans)
    for tick in asked:
        one.opens(tick)
        one.covers(tick)
    assert one.take(now, 3) == two.take(now, 3)


@thorough
@given(windows(), ticks)
def test_it_covers_exactly_the_ticks_of_its_windows(spans: list[tuple[int, int]], now: int) -> None:
    mint = granted(SMALL, 0, *spans)
    assert mint.covers(now) == any(start <= now < end for start, end in spans)
    assert (mint.take(now, 1) is not None) == mint.covers(now)


# --- within a tick ---


def test_a_full_tick_mints_nothing_more_until_the_next() -> None:
    mint = granted(SMALL, 3, (10, 20))
    run = mint.take(10, 1_000)
    assert run == (SMALL.compose(10, 3, 0), 1, FULL)
    assert mint.take(10, 1) is None
    assert mint.opens(10) == 11
    assert mint.take(11, 1) == (SMALL.compose(11, 3, 0), 1, 1)


def test_a_run_takes_just_what_is_left_of_the_tick() -> None:
    mint = granted(SMALL, 3, (10, 20))
    mint.take(10, FULL - 2)
    assert mint.take(10, 5) == (SMALL.compose(10, 3, FULL - 2), 1, 2)


def test_a_run_steps_over_a_machine_field_that_lies_below_the_sequence() -> None:
    mint = granted(SWAPPED, 3, (10, 20))
    mint.take(10, 2)
    assert mint.take(10, 3) == (SWAPPED.compose(10, 3, 2), 4, 3)


def test_a_tick_of_every_preset_mints_all_of_its_sequence() -> None:
    for layout in PRESETS.values():
        machine = layout.machines - 1
        mint = granted(layout, machine, (layout.end_tick - 1, layout.end_tick))
        run = mint.take(layout.end_tick - 1, 1 << 20)
        assert run is not None
        assert run[2] == layout.ids_per_tick
        assert ids(run)[-1] == layout.compose(layout.end_tick - 1, machine, layout.ids_per_tick - 1)


def test_a_clock_that_went_back_stays_in_the_last_tick_until_that_is_full() -> None:
    mint = granted(SMALL, 0, (10, 20))
    mint.take(15, 1)
    assert mint.take(3, 2) == (SMALL.compose(15, 0, 1), 1, 2)
    assert mint.take(12, 100) == (SMALL.compose(15, 0, 3), 1, FULL - 3)
    assert mint.take(12, 1) is None
    assert mint.opens(12) == 16


def test_a_clock_that_leaps_skips_ticks_and_starts_each_at_sequence_0() -> None:
    mint = granted(SMALL, 0, (10, 20))
    mint.take(10, 3)
    assert mint.take(18, 3) == (SMALL.compose(18, 0, 0), 1, 3)


# --- windows ---


def test_the_last_tick_of_a_window_mints_and_its_end_does_not() -> None:
    mint = granted(SMALL, 0, (10, 20))
    assert mint.take(9, 1) is None
    assert mint.opens(9) == 10
    assert mint.take(19, 1) is not None
    assert mint.take(20, 1) is None
    assert mint.opens(20) is None


def test_a_leap_past_a_window_still_finds_the_next() -> None:
    mint = granted(SMALL, 0, (10, 20), (30, 40), (50, 60))
    assert mint.take(25, 1) is None
    assert mint.opens(25) == 30
    assert mint.take(55, 1) is not None


def test_adjacent_windows_are_as_one() -> None:
    mint = granted(SMALL, 0, (10, 20), (20, 30))
    assert len(mint.windows) == 1
    assert mint.take(19, FULL) is not None
    assert mint.opens(19) == 20
    assert mint.take(20, 1) is not None
    assert mint.end == 30


def test_windows_apart_stay_apart() -> None:
    mint = granted(SMALL, 0, (10, 20), (21, 30))
    assert not mint.covers(20)
    assert mint.take(20, 1) is None
    assert mint.opens(20) == 21


@pytest.mark.parametrize(
    ("start", "end"),
    [(25, 25), (30, 25), (10, 20), (5, 8), (19, 25), (0, 40), (-5, 30)],
    ids=["empty", "reversed", "again", "before", "overlapping", "around", "negative"],
)
def test_a_window_that_is_empty_overlaps_or_goes_back_is_refused(start: int, end: int) -> None:
    mint = granted(SMALL, 0, (10, 20))
    with pytest.raises(LayoutError):
        mint.grant(start, end)
    assert mint.end == 20
    assert not mint.covers(20)
    assert mint.opens(0) == 10


def test_a_first_window_may_begin_at_the_epoch_and_not_before() -> None:
    with pytest.raises(LayoutError):
        Mint(SMALL, 0).grant(-1, 5)
    assert granted(SMALL, 0, (0, 1)).take(0, 1) == (0, 1, 1)


def test_a_window_behind_one_that_has_run_out_is_refused_too() -> None:
    mint = granted(SMALL, 0, (10, 20))
    assert mint.take(30, 1) is None
    with pytest.raises(LayoutError):
        mint.grant(15, 40)
    mint.grant(20, 40)
    assert mint.take(30, 1) is not None


def test_no_window_leaves_the_layout() -> None:
    mint = granted(SMALL, 0, (10, 20))
    with pytest.raises(LayoutError):
        mint.grant(20, SMALL.end_tick + 1)
    mint.grant(20, SMALL.end_tick)
    assert mint.take(SMALL.end_tick - 1, 100) is not None
    assert mint.take(SMALL.end_tick, 1) is None
    assert mint.opens(SMALL.end_tick - 1) is None


def test_without_a_window_nothing_is_minted() -> None:
    mint = Mint(SMALL, 0)
    assert (mint.end, mint.last) == (0, None)
    for now in (-1, 0, 1, SMALL.end_tick):
        assert mint.take(now, 1) is None
        assert mint.opens(now) is None
        assert not mint.covers(now)


@pytest.mark.parametrize("machine", [-1, SMALL.machines])
def test_a_machine_that_the_layout_lacks_has_no_mint(machine: int) -> None:
    with pytest.raises(LayoutError):
        Mint(SMALL, machine)


# --- close ---


@thorough
@given(windows(), takes, ticks)
def test_a_closed_mint_mints_nothing_ever(
    spans: list[tuple[int, int]], takes: list[tuple[int, int]], now: int
) -> None:
    mint = granted(SMALL, 0, *spans)
    last = None
    for then, count in takes:
        if mint.take(then, count):
            last = mint.last
    assert mint.close() == last
    assert mint.close() == last
    for tick in range(-1, SMALL.end_tick + 2):
        assert mint.take(tick, 1) is None
    assert mint.opens(now) is None
    assert not mint.covers(now)


def test_a_closed_mint_takes_no_window() -> None:
    for spans in ([], [(10, 20)]):
        mint = granted(SMALL, 0, *spans)
        mint.close()
        for window in ((20, 30), (30, SMALL.end_tick), (SMALL.end_tick - 1, SMALL.end_tick)):
            with pytest.raises(LayoutError):
                mint.grant(*window)


def test_a_mint_that_minted_nothing_closes_with_no_last_tick() -> None:
    mint = granted(SMALL, 0, (10, 20))
    mint.take(5, 1)
    mint.take(25, 1)
    assert mint.last is None
    assert mint.close() is None


def test_a_mint_closes_with_the_last_tick_minted_in_and_not_with_the_clocks() -> None:
    mint = granted(SMALL, 0, (10, 20), (30, 40))
    mint.take(12, 1)
    mint.take(11, FULL)
    mint.take(25, 1)
    assert mint.close() == 12
