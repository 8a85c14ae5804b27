"""`StaticGenerator`, and what both kinds promise of the quick way to an ID: threads, signal handlers, forks."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.embedded.conftest import AnyGenerator, Calls, in_child, interrupt, libc_fork, storm, taking
from zflake import Closed, ConfigError, Field, Layout, LayoutError, StaticGenerator, clock, layouts
from zflake.embedded import generator
from zflake.holder import static

SNOWCLOUD = layouts["snowcloud"]
FULL = SNOWCLOUD.ids_per_tick


@pytest.fixture
def ids() -> Iterator[StaticGenerator]:
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        yield ids


class Hands:
    """The local clock, under the test's hand; whoever sleeps moves it."""

    def __init__(self) -> None:
        self.us = 1_000_000

    def sleep(self, seconds: float) -> None:
        self.us += int(seconds * 1e6) + 1


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(clock, "local_us", lambda: hands.us)
    monkeypatch.setattr(generator, "monotonic_ns", lambda: hands.us * 1000)
    monkeypatch.setattr(time, "sleep", hands.sleep)
    return hands


# --- minting ---


@pytest.mark.parametrize("name", sorted(layouts))
def test_ids_ascend_and_say_machine_and_time(name: str) -> None:
    before = time.time()
    with StaticGenerator(layouts[name], 5) as ids:
        got = [ids.next_id() for _ in range(300)] + ids.next_ids(300)
        assert got == sorted(set(got))
        assert (ids.layout, ids.machine) == (layouts[name], 5)
    read = [layouts[name].decompose(id_) for id_ in got]
    assert {each.machine for each in read} == {5}
    # Those that it was not asked for in time are missing: all of a tick that were left.
    assert abs(read[-1].time.timestamp() - before) < 5


@pytest.mark.parametrize("count", [1, 2, FULL, FULL + 1, 3 * FULL + 7])
def test_exactly_as_many_come_as_were_asked(either: AnyGenerator, count: int) -> None:
    got = [*either.next_ids(count), *either.next_ids(count), either.next_id()]
    assert len(got) == 2 * count + 1
    assert got == sorted(set(got))
    assert {SNOWCLOUD.decompose(id_).machine for id_ in got} == {either.machine}


@pytest.mark.parametrize("count", [0, -1, "x", 1.5, True, None, [1]])
def test_a_count_that_is_none_is_refused(ids: StaticGenerator, count: Any) -> None:
    with pytest.raises(ConfigError, match="count"):
        ids.next_ids(count)


def test_it_mints_as_fast_as_the_layout_allows_and_no_faster(hands: Hands) -> None:
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        got = ids.next_ids(10 * FULL)
    ticks = {SNOWCLOUD.decompose(id_).tick for id_ in got}
    assert len(ticks) == 10
    assert max(ticks) - min(ticks) == 9


def test_the_tick_of_its_start_is_left_to_whoever_had_the_machine_before(hands: Hands) -> None:
    hold = static.StaticHold(SNOWCLOUD, 5)
    first = hold.clock.tick(SNOWCLOUD)
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        assert SNOWCLOUD.decompose(ids.next_id()).tick > first


def test_a_new_tick_begins_at_sequence_zero_and_not_before_its_time(hands: Hands) -> None:
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        first = SNOWCLOUD.decompose(ids.next_id())
        hands.us -= hands.us % 1000  # at whatever place of the tick: the same tick again, or the one after
        second = SNOWCLOUD.decompose(ids.next_id())
        assert (second.tick, second.sequence) > (first.tick, first.sequence)
        hands.us += 5_000
        third = SNOWCLOUD.decompose(ids.next_id())
        assert third.sequence == 0
        assert 4 <= third.tick - second.tick <= 6


def test_a_clock_that_goes_back_repeats_nothing(hands: Hands) -> None:
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        got = ids.next_ids(10)
        hands.us -= 3_000
        got += ids.next_ids(10)
        hands.us -= 3_000
        got += ids.next_ids(FULL)
    assert got == sorted(set(got))


def test_the_wall_clock_is_followed(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    wall_us = [time.time_ns() // 1000]
    monkeypatch.setattr(time, "time_ns", lambda: wall_us[0] * 1000)
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        before = SNOWCLOUD.decompose(ids.next_id()).tick
        wall_us[0] += 3_600_000_000
        hands.us += static.EXCHANGE_US
        assert SNOWCLOUD.decompose(ids.next_id()).tick - before >= 3_599_000


def test_past_the_layouts_end_it_refuses(hands: Hands) -> None:
    fields = (Field("time", 20), Field("machine", 3), Field("sequence", 2))
    end = Layout("short", fields, epoch_ms=time.time_ns() // 1_000_000 - (1 << 20) + 10)
    with StaticGenerator(end, 5) as ids:
        with pytest.raises(LayoutError, match="ended"):
            ids.next_ids(1000)
        with pytest.raises(LayoutError, match="ended"):
            ids.next_id()


# --- what it is told ---


def test_what_makes_no_generator_is_refused() -> None:
    with pytest.raises(LayoutError, match="machine"):
        StaticGenerator(SNOWCLOUD, SNOWCLOUD.machines)
    with pytest.raises(ConfigError, match=r"zflake\.layouts"):
        StaticGenerator("snowcloud", 1)  # type: ignore[arg-type]


def test_without_the_gil_nothing_is_minted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys._is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="GIL"):
        StaticGenerator(SNOWCLOUD, 1)


def test_after_close_every_call_is_refused(ids: StaticGenerator) -> None:
    ids.next_id()
    ids.close()
    ids.close()
    for call in (ids.next_id, lambda: ids.next_ids(3)):
        with pytest.raises(Closed):
            call()


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda g: copy.deepcopy({"in": [g]})]
)
def test_it_can_be_neither_copied_nor_pickled(either: AnyGenerator, duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=f"make a new {type(either).__name__} in each process"):
        duplicate(either)
    either.next_id()


# --- threads ---


def test_many_threads_get_distinct_ids_in_order(either: AnyGenerator) -> None:
    threads, each = 8, 50_000
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(lambda: [either.next_id() for _ in range(each)]) for _ in range(threads)]
        runs = [future.result(60) for future in futures]
        runs += [future.result(60) for future in [pool.submit(either.next_ids, 20_000) for _ in range(4)]]
    assert all(run == sorted(run) for run in runs)
    got = {id_ for run in runs for id_ in run}
    assert len(got) == threads * each + 4 * 20_000
    assert {SNOWCLOUD.decompose(id_).machine for id_ in got} == {either.machine}


def test_what_threads_see_of_each_other_is_in_order_too(ids: StaticGenerator) -> None:
    calls = [Calls() for _ in range(4)]
    for each in calls:
        each._clock = calls[0]._clock

    def run(calls: Calls) -> None:
        for _ in range(3000):
            calls.make(ids.next_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, calls))
    both = Calls()
    for each in calls:
        both.made += each.made
        both.ids += each.ids
    both.check()


# --- signal handlers ---


def handlers(ids: StaticGenerator, hands: Hands) -> dict[str, Callable[[], Any]]:
    def later() -> int:
        hands.us += 1_000
        return ids.next_id()

    def twice() -> list[int]:
        return [later(), later()]

    def leapt() -> int:
        ids._offset_us += 1_000  # the wall clock was set forward: another tick, though no time has passed
        return ids.next_id()

    return {
        "mints": ids.next_id,
        "mints in the next tick": later,
        "mints in two ticks": twice,
        "mints after a leap of the clock": leapt,
        "mints over many ticks": lambda: ids.next_ids(2 * FULL + 1),
    }


@pytest.mark.parametrize("fresh", [True, False], ids=["at a tick's turn", "inside a tick"])
@pytest.mark.parametrize("many", [1, 3, FULL + 2])
@pytest.mark.parametrize(
    "does",
    [
        "mints",
        "mints in the next tick",
        "mints in two ticks",
        "mints after a leap of the clock",
        "mints over many ticks",
    ],
)
def test_a_handler_may_mint_at_every_step_of_a_call(hands: Hands, does: str, many: int, fresh: bool) -> None:
    calls = Calls()
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        handler = functools.partial(calls.make, handlers(ids, hands)[does])
        call = functools.partial(calls.make, ids.next_id if many == 1 else lambda: ids.next_ids(many))
        calls.make(ids.next_id)
        at = 0
        while interrupt(call, at, handler):
            calls.make(ids.next_id)
            at += 1
            hands.us += 1_000 if fresh else 0
            assert at < 5_000
    assert at > 5
    calls.check()


def test_a_handler_may_close_at_every_step_of_a_call(hands: Hands) -> None:
    for at in range(5_000):
        ids = StaticGenerator(SNOWCLOUD, 5)
        calls = Calls()
        calls.make(ids.next_id)
        hands.us += 1_000
        try:
            interrupted = interrupt(functools.partial(calls.make, ids.next_id), at, ids.close)
        except Closed:
            interrupted = True
        if not interrupted:
            break
        last = ids._ticks.last
        assert last is not None
        assert all(SNOWCLOUD.decompose(id_).tick <= last for id_ in calls.ids)
        calls.check()
        with pytest.raises(Closed):
            ids.next_id()
    assert at > 5


def test_a_call_that_an_exception_ends_anywhere_loses_ids_and_no_more(hands: Hands) -> None:
    def raises() -> None:
        raise KeyboardInterrupt

    calls = Calls()
    with StaticGenerator(SNOWCLOUD, 5) as ids:
        for at in range(5_000):
            try:
                if not interrupt(lambda: calls.make(ids.next_id), at, raises):
                    break
            except KeyboardInterrupt:
                pass
            calls.make(ids.next_id)
            hands.us += 1_000
    assert at > 5
    calls.check()


def test_a_storm_of_handlers_neither_repeats_nor_blocks(either: AnyGenerator) -> None:
    calls = Calls()
    assert storm(calls, either, times=3_000) >= 3_000
    calls.check()


# --- forks ---


@pytest.mark.parametrize("fork", [os.fork, libc_fork], ids=["os.fork", "libc"])
@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_is_refused_and_told_what_to_do(
    ids: StaticGenerator, fork: Callable[[], int], used: bool
) -> None:
    if used:
        ids.next_id()

    def work() -> list[int]:
        for call in (ids.next_id, lambda: ids.next_ids(3), ids.next_id):
            with pytest.raises(ConfigError, match="another machine after the fork"):
                call()
        with StaticGenerator(SNOWCLOUD, 6) as other:
            return [other.next_id()]

    assert SNOWCLOUD.decompose(in_child(fork, work)[0]).machine == 6
    ids.next_id()


@pytest.mark.parametrize("many", [1, 3 * FULL])
@pytest.mark.parametrize("fork", [os.fork, libc_fork], ids=["os.fork", "libc"])
def test_a_fork_in_the_midst_of_a_call_gives_the_child_none_of_its_ids(
    fork: Callable[[], int], many: int
) -> None:
    def fork_at_each_line() -> list[int]:
        for at in range(1_000):
            ids = StaticGenerator(SNOWCLOUD, 5)
            pids: list[int] = []

            def call(ids: StaticGenerator = ids) -> None:
                ids.next_ids(many) if many > 1 else ids.next_id()

            try:
                happened = interrupt(call, at, lambda pids=pids: pids.append(fork()), real=True)  # type: ignore[misc]
                refused = False
            except ConfigError:
                happened = refused = True
            except BaseException:  # noqa: BLE001
                happened, refused = True, False
            if pids == [0]:  # pragma: no cover
                os._exit(0 if refused else 1)
            if not happened:
                break
            assert os.waitpid(pids[0], 0)[1] == 0, at
        return [at]

    # In a process with one thread: the C library's fork leaves the interpreter's locks as another one has them.
    assert in_child(os.fork, fork_at_each_line)[0] > 0


def test_threads_of_the_parent_go_on_while_children_are_forked(ids: StaticGenerator) -> None:
    def refused() -> list[int]:
        with pytest.raises(ConfigError):
            ids.next_id()
        return []

    with taking(ids) as taken:
        for _ in range(5):
            in_child(os.fork, refused)
    assert len(set(taken)) == len(taken) > 0
