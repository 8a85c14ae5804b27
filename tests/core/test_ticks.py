"""The ticks that threads and signal handlers share: begun once, in order, and covered by `last`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zflake.core import mint
from zflake.core import ticks as module
from zflake.core.layout import PRESETS, Field, Layout
from zflake.core.mint import Mint
from zflake.core.ticks import Ticks, exhaust
from zflake.errors import LayoutError

SMALL = Layout("small", (Field("time", 7), Field("machine", 2), Field("sequence", 3)))
SWAPPED = Layout("swapped", (Field("time", 7), Field("sequence", 3), Field("machine", 2)))
FULL = SMALL.ids_per_tick


def ticks_of(*windows: tuple[int, int], layout: Layout = SMALL) -> Ticks:
    ticks = Ticks(layout, 1)
    ticks.windows = windows
    return ticks


def take(ticks: Ticks, now: int, count: int = FULL) -> list[int]:
    tick = ticks.at(now)
    return [] if tick is None else list(islice(tick.ids, count))


@given(st.sampled_from([SMALL, SWAPPED]), st.lists(st.integers(-3, 130)))
def test_they_are_a_mint_that_claims_whole_ticks(layout: Layout, clock: list[int]) -> None:
    windows = ((3, 20), (20, 25), (40, 90), (120, 128))
    ticks = ticks_of(*windows, layout=layout)
    whole = Mint(layout, 1)
    for window in windows:
        whole.grant(*window)
    for now in sorted(clock):
        run = whole.take(now, FULL)
        wanted = [] if run is None else list(range(run[0], run[0] + run[1] * run[2], run[1]))
        assert take(ticks, now) == wanted
        assert ticks.last == whole.last
        assert ticks.opens(now) == whole.opens(now)


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(1, 5)), max_size=60))
def test_ids_strictly_ascend_whatever_the_clock_does(takes: list[tuple[int, int]]) -> None:
    ticks = ticks_of((3, 90))
    ids = [id_ for now, count in takes for id_ in take(ticks, now, count)]
    assert all(a < b for a, b in pairwise(ids))
    assert all(3 <= SMALL.decompose(id_).tick < 90 and SMALL.decompose(id_).machine == 1 for id_ in ids)


def test_an_iterator_in_hand_gives_nothing_once_a_later_tick_has_begun() -> None:
    ticks = ticks_of((0, 50))
    held_up = ticks.at(5)
    assert held_up is not None
    first = next(held_up.ids)
    assert SMALL.decompose(first).tick == 5
    later = take(ticks, 6, 1)
    assert SMALL.decompose(later[0]).tick == 6
    assert list(held_up.ids) == []


def test_nothing_of_an_old_tick_is_minted_once_the_window_is_over() -> None:
    ticks = ticks_of((0, 50))
    assert len(take(ticks, 49, 1)) == 1
    assert ticks.at(50) is None
    assert ticks.opens(50) is None


def test_a_clock_that_went_back_goes_on_in_the_last_tick() -> None:
    ticks = ticks_of((0, 50))
    assert SMALL.decompose(take(ticks, 20, 1)[0]).sequence == 0
    assert SMALL.decompose(take(ticks, 10, 1)[0]) == SMALL.decompose(SMALL.compose(20, 1, 1))
    assert ticks.opens(10) == 21


def test_what_comes_after_another_tenancy_begins_behind_it() -> None:
    ticks = Ticks(SMALL, 1, after=9)
    ticks.windows = ((5, 50),)
    assert ticks.last is None
    assert take(ticks, 9) == []
    assert ticks.opens(9) == 10
    assert SMALL.decompose(take(ticks, 10, 1)[0]).tick == 10


def test_a_machine_that_the_layout_has_not_is_refused() -> None:
    with pytest.raises(LayoutError):
        Ticks(SMALL, 4)


# --- close ---


def test_what_close_says_covers_all_that_any_iterator_gave_or_could_have_given() -> None:
    ticks = ticks_of((0, 50))
    in_hand = [tick for now in (3, 7, 7, 11) if (tick := ticks.at(now))]
    given = [next(tick.ids) for tick in in_hand[-1:]]
    last = ticks.close()
    assert last == 11
    rest = [id_ for tick in in_hand for id_ in tick.ids]
    assert max(SMALL.decompose(id_).tick for id_ in given + rest) <= last
    assert rest == []
    assert ticks.close() == ticks.last == last


def test_closed_ticks_begin_none() -> None:
    for before in ([], [3], [3, 127]):
        ticks = ticks_of((0, SMALL.end_tick))
        for now in before:
            take(ticks, now, 1)
        assert ticks.close() == (before[-1] if before else None)
        assert [ticks.at(now) for now in (0, 3, 64, 127, 128, 1000)] == [None] * 6
        assert ticks.opens(0) is None


@pytest.mark.parametrize("nested", [lambda t: take(t, 6, 3), lambda t: take(t, 8, 3), lambda t: t.close()])
def test_whoever_is_interrupted_while_beginning_a_tick_goes_on_from_what_he_finds(
    monkeypatch: pytest.MonkeyPatch, nested: Callable[[Ticks], Any]
) -> None:
    ticks = ticks_of((0, 50))
    got: list[Any] = []

    def interrupted(*args: Any) -> int | None:
        monkeypatch.setattr(module, "first_open", real)
        got.append(nested(ticks))
        return real(*args)

    real = mint.first_open
    take(ticks, 5, 1)
    monkeypatch.setattr(module, "first_open", interrupted)
    mine = take(ticks, 6)
    inner = got[0] if isinstance(got[0], list) else []
    assert len({*mine, *inner}) == len(mine) + len(inner)
    assert not mine or not inner or mine[0] > inner[-1]
    if not inner:
        assert (mine, got) == ([], [5])


def test_a_tick_is_begun_by_one_thread_only() -> None:
    layout = PRESETS["snowcloud"]
    for _ in range(20):
        ticks = Ticks(layout, 1)
        ticks.windows = ((0, 1000),)
        start = threading.Barrier(4)
        runs: list[list[int]] = []

        def run(ticks: Ticks = ticks, start: threading.Barrier = start, runs: list[Any] = runs) -> None:
            start.wait()
            runs.append([id_ for now in range(50) for id_ in take(ticks, now, 3)])

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id_ for run in runs for id_ in run}) == sum(map(len, runs))
        assert all(a < b for run in runs for a, b in pairwise(run))


@pytest.mark.parametrize("base", [0, (1 << 62) - 2, (1 << 64) - 4096])
def test_an_exhausted_iterator_stays_so_however_large_its_numbers(base: int) -> None:
    for taken in (0, 1, 4096):
        ids = iter(range(base, base + 4096))
        for _ in range(taken):
            next(ids)
        exhaust(ids, 4096)
        assert list(ids) == []
        exhaust(ids, 4096)
        assert list(ids) == []
