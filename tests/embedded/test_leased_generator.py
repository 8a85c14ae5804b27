"""`LeasedGenerator` against real delegators: its lease is taken, kept, given back, lost, and waited for."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import zmq

from tests.conftest import Connect, Scripts, until
from tests.embedded.conftest import Calls, delegator, in_child, interrupt, libc_fork, taking
from zflake import (
    Closed,
    ConfigError,
    Field,
    Layout,
    LayoutError,
    LeasedGenerator,
    LeaseExpired,
    NoFreeMachine,
    Overloaded,
    Timeout,
    Unavailable,
    layouts,
)
from zflake.core.lease import Renew
from zflake.embedded import session as sessions
from zflake.embedded.session import Session
from zflake.holder.lease_client import LeaseClient
from zflake.wire.codec import encode_error, encode_result
from zflake.wire.leases import lease_call
from zflake.wire.methods import PROTOCOL_VERSION

SNOWCLOUD: Final = layouts["snowcloud"]
FULL: Final = SNOWCLOUD.ids_per_tick
NOBODY: Final = "tcp://127.0.0.1:1"

E = TypeVar("E", bound=Exception)


@pytest.fixture
def ids(shared: str) -> Iterator[LeasedGenerator]:
    with LeasedGenerator(shared) as ids:
        yield ids


def machines(ids: list[int]) -> set[int]:
    return {SNOWCLOUD.decompose(id_).machine for id_ in ids}


def took(call: Callable[[], Any], error: type[Exception]) -> tuple[float, Any]:
    start = time.monotonic()
    with pytest.raises(error) as raised:
        call()
    return time.monotonic() - start, raised.value


def error_of(call: Callable[[], object], kind: type[E]) -> E | None:
    """The error of that kind that a call raised; None if it did not."""
    try:
        call()
    except kind as error:
        return error
    return None


def no_thread_left() -> bool:
    return not any(thread.name == "zflake-lease" for thread in threading.enumerate())


# --- minting ---


def test_the_first_id_takes_a_lease_and_nothing_before_it_does() -> None:
    with delegator(machines=(7, 7)) as serves, LeasedGenerator(serves.address) as ids:
        assert (ids.machine, ids.layout) == (None, None)
        until(no_thread_left)  # of an earlier generator
        first = ids.next_id()
        assert SNOWCLOUD.decompose(first).machine == ids.machine == 7
        assert ids.layout is not None
        assert ids.layout.same_ids(SNOWCLOUD)
        assert ids.next_id() > first


def test_the_layout_is_the_delegators(shared: str) -> None:
    sonyflake = layouts["sonyflake"]
    with delegator(layout=sonyflake) as serves, LeasedGenerator([serves.address]) as ids:
        got = ids.next_ids(600)
        assert got == sorted(set(got))
        assert {sonyflake.decompose(id_).machine for id_ in got} == {ids.machine}
    with LeasedGenerator(shared, layout=SNOWCLOUD) as ids:
        assert ids.layout is SNOWCLOUD
        ids.next_id()


def test_a_layout_that_is_not_the_delegators_is_said_at_every_call(shared: str) -> None:
    with LeasedGenerator(shared, layout=layouts["sonyflake"]) as ids:
        for call in (ids.next_id, lambda: ids.next_ids(3), ids.next_id):
            seconds, error = took(call, LayoutError)
            assert seconds < 3
            assert "snowcloud" in str(error)


@pytest.mark.parametrize(
    "told",
    [
        {"endpoints": "localhost"},
        {"endpoints": []},
        {"endpoints": [1]},
        {"endpoints": 7410},
        {"endpoints": "tcp://*:7410"},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("inf")},
        {"timeout": "5"},
        {"timeout": True},
        {"idle": 0},
        {"idle": float("nan")},
        {"name": "a\nb"},
        {"name": "x" * 300},
        {"layout": "snowcloud"},
    ],
    ids=str,
)
def test_what_makes_no_generator_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LeasedGenerator(**told)


def test_the_cluster_is_told_its_name(shared: str, script: Scripts) -> None:
    for name, shown in (("billing", "billing"), ("", f"-{os.getpid()}")):
        peer = script(_greets)
        with LeasedGenerator(peer.address, name=name, timeout=0.01) as ids:
            took(ids.next_id, Timeout)
            until(functools.partial(peer.calls, "lease.acquire"))
        _, who, _, pid, address = peer.calls("lease.acquire")[0]
        assert who.endswith(shown)
        assert (pid, address) == (os.getpid(), "")


def _greets(method: str, _params: list[Any], msgid: int) -> bytes | None:
    if method != "hello":
        return None
    hello = {"service": "delegator", "protocol": PROTOCOL_VERSION, "layout": SNOWCLOUD.to_map()}
    return encode_result(msgid, {**hello, "now_us": time.time_ns() // 1000})


# --- giving back ---


def test_close_gives_the_lease_back_at_once_and_refuses_every_call_after() -> None:
    with delegator(machines=(3, 3)) as serves:
        one, two = (LeasedGenerator(serves.address) for _ in range(2))
        before = one.next_ids(100)
        start = time.monotonic()
        one.close()
        one.close()
        assert time.monotonic() - start < 1
        for call in (one.next_id, lambda: one.next_ids(3)):
            assert took(call, Closed)[0] < 0.5
        assert one.machine is None
        after = two.next_ids(100)
        assert time.monotonic() - start < 2
        assert min(after) > max(before)
        two.close()


def test_a_generator_that_was_never_used_closes() -> None:
    start = time.monotonic()
    LeasedGenerator(NOBODY).close()
    with LeasedGenerator(NOBODY) as ids:
        pass
    took(ids.next_id, Closed)
    assert time.monotonic() - start < 1


def test_close_ends_calls_that_wait() -> None:
    ids = LeasedGenerator(NOBODY, timeout=30)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(ids.next_id) for _ in range(4)]
        until(lambda: len(ids._session.news._waiting) == 4)
        start = time.monotonic()
        ids.close()
        assert all(isinstance(call.exception(5), Closed) for call in calls)
        assert time.monotonic() - start < 3


def test_a_forgotten_generator_gives_its_lease_back() -> None:
    with delegator(machines=(3, 3)) as serves:
        LeasedGenerator(serves.address).next_id()
        gc.collect()
        until(no_thread_left)
        with LeasedGenerator(serves.address, timeout=2) as ids:
            ids.next_id()


def test_a_lease_that_is_long_idle_is_given_back_and_the_next_id_takes_another() -> None:
    with (
        delegator(machines=(3, 3)) as serves,
        LeasedGenerator(serves.address, idle=0.3) as one,
        LeasedGenerator(serves.address, timeout=8) as two,
    ):
        got = one.next_ids(10)
        until(lambda: one.machine is None)
        got += two.next_ids(10)
        two.close()
        got += one.next_ids(10)
        assert got == sorted(set(got))


def test_as_long_as_ids_are_taken_a_lease_is_not_idle() -> None:
    with delegator() as serves, LeasedGenerator(serves.address, idle=0.5) as ids:
        ids.next_id()
        session, end = ids._session, time.monotonic() + 1.2
        until(lambda: ids.next_id() and time.monotonic() > end)
        assert ids._session is session
        until(lambda: session.done)


def test_without_an_idle_time_it_is_never_given_back(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LeasedGenerator(shared, idle=None) as ids:
        ids.next_id()
        session = ids._session
        turns = session.news.count
        monkeypatch.setattr(session, "_used_us", 0)
        until(lambda: session.news.count > turns + 2)
        assert not session.over


def test_who_holds_an_iterator_while_the_lease_is_given_back_repeats_nothing() -> None:
    """The iterator that a held-up thread has in hand is of a tick that the release keeps for it."""
    with delegator(machines=(3, 3)) as serves, LeasedGenerator(serves.address, idle=0.3) as one:
        got = [one.next_id()]
        session, in_hand = one._session, one._ids
        ticks = session.ticks
        assert ticks is not None
        # Even where nothing had exhausted it: the fence must lie behind the tick that was begun.
        got += list(in_hand)
        until(lambda: session.done)
        got += list(in_hand)
        with LeasedGenerator(serves.address) as two:
            after = two.next_ids(2 * FULL)
        assert len({*got, *after}) == len(got) + len(after)
        assert min(after) > max(got)
        assert list(in_hand) == []


def test_a_release_states_the_last_tick_begun_however_little_of_it_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated: list[int | None] = []
    real = LeaseClient.release

    def release(client: LeaseClient, deadline_us: int) -> None:
        mint = client.lease.mint
        stated.append(None if mint is None else mint.last)
        real(client, deadline_us)

    monkeypatch.setattr(LeaseClient, "release", release)
    with delegator() as serves:
        for taken in (1, 5000):
            with LeasedGenerator(serves.address) as ids:
                last = SNOWCLOUD.decompose(ids.next_ids(taken)[-1]).tick
                assert ids._session.ticks is not None
                begun = ids._session.ticks.last
            assert begun == last == stated.pop()
        with LeasedGenerator(serves.address) as ids:
            ids._current()
            until(lambda: ids.machine is not None)
        assert stated == [None], "nothing was minted"


# --- when there is no window ---


def test_nobody_there_is_a_timeout_with_a_hint() -> None:
    with LeasedGenerator(NOBODY, timeout=0.2) as ids:
        for _ in range(2):
            seconds, error = took(ids.next_id, Timeout)
            assert 0.15 < seconds < 2
            assert error.retry_after > 0
            assert NOBODY in str(error)


def test_close_does_not_wait_for_a_context_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = LeasedGenerator(NOBODY, timeout=0.2)
    with pytest.raises(Timeout):
        ids.next_id()
    may_end = threading.Event()  # a name server that is away keeps a context for as long
    destroy = zmq.Context.destroy
    monkeypatch.setattr(zmq.Context, "destroy", lambda context: may_end.wait(10) and destroy(context))
    ids.close()
    assert ids._session.done
    may_end.set()


def test_no_free_machine_says_when_there_may_be_one() -> None:
    with (
        delegator(machines=(3, 3)) as serves,
        LeasedGenerator(serves.address) as one,
        LeasedGenerator(serves.address, timeout=0.3) as two,
    ):
        one.next_id()
        seconds, error = took(two.next_id, NoFreeMachine)
        assert 0.25 < seconds < 2
        assert 20 < error.retry_after <= 30
        one.close()
        until(lambda: error_of(two.next_id, NoFreeMachine) is None)


def test_a_delegator_that_can_not_reach_its_store_is_unavailable(script: Scripts) -> None:
    def answer(method: str, params: list[Any], msgid: int) -> bytes | None:
        return _greets(method, params, msgid) or encode_error(msgid, "unavailable", "the disk is full", 700)

    with LeasedGenerator(script(answer).address, timeout=0.2) as ids:
        _, error = took(ids.next_id, Unavailable)
        assert "the disk is full" in str(error)
        assert error.retry_after == 0.7


def test_calls_that_wait_for_a_delegator_are_served_as_soon_as_it_comes(tmp_path: Path) -> None:
    with delegator() as serves:
        endpoint = serves.address
    ids = LeasedGenerator(endpoint, timeout=20)
    with ids, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(ids.next_id) for _ in range(4)]
        until(lambda: len(ids._session.news._waiting) == 4)
        with delegator(bind=endpoint):
            assert len({call.result(10) for call in calls}) == 4
            ids.close()


def test_when_the_delegator_is_gone_it_serves_to_the_end_of_its_window_and_again_after(
    tmp_path: Path,
) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    with delegator(store, ttl_ms=1000) as serves:
        endpoint = serves.address
        ids = LeasedGenerator(endpoint, timeout=1)
        got = [ids.next_id()]
        before = ids.machine

    def take() -> None:
        got.append(ids.next_id())

    gone = time.monotonic()
    with ids:
        error = until(lambda: error_of(take, LeaseExpired))
        assert 1 < time.monotonic() - gone < 6
        assert error.retry_after is not None
        with delegator(store, endpoint, new=False):
            until(lambda: error_of(take, LeaseExpired) is None)
            assert ids.machine == before
            got += ids.next_ids(10)
            ids.close()
    assert got == sorted(set(got))


def test_a_lost_lease_is_replaced_and_nobody_sees_more_than_a_delay(connect: Connect) -> None:
    with delegator(ttl_ms=1000) as serves, LeasedGenerator(serves.address) as ids:
        got = ids.next_ids(10)
        ticks, session = ids._session.ticks, ids._session
        assert ticks is not None
        # A copy of this process, such as a cloned machine, renews with the token that both have.
        client = session._kept[1]
        assert isinstance(client, LeaseClient)
        lessee = client.lease.lessee
        renew = Renew(ticks.machine, lessee.token, lessee._gen, os.urandom(16), ticks.windows[-1][1])
        method, params = lease_call(renew)
        assert connect(serves.address).ask(method, *params).error is None
        until(lambda: got.append(ids.next_id()) or session.ticks is not ticks)  # type: ignore[func-returns-value]
        assert ticks.at(ticks.last or 0) is None, "what was lost mints no more"
        got += ids.next_ids(10)
        assert ids._session is session
    assert got == sorted(set(got))


def test_a_fault_in_the_thread_reaches_the_caller_and_the_next_call_begins_anew(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LeasedGenerator(shared, timeout=20) as ids:
        ids.next_id()
        real = LeaseClient.service

        def fault(*_: Any) -> None:
            raise RuntimeError("a fault of the test's")

        monkeypatch.setattr(LeaseClient, "service", fault)
        session = ids._session
        until(lambda: session.done)
        begin = Session.start

        def start(session: Session) -> None:
            begin(session)
            until(lambda: session.done)  # the thread has failed before the caller looks

        monkeypatch.setattr(Session, "start", start)
        for _ in range(3):
            seconds, error = took(ids.next_id, Unavailable)
            assert seconds < 3
            assert "a fault of the test's" in str(error)
            assert isinstance(error.__cause__, RuntimeError)
        monkeypatch.setattr(Session, "start", begin)
        monkeypatch.setattr(LeaseClient, "service", real)
        error_of(ids.next_id, Unavailable)
        ids.next_id()


def test_calls_under_way_hear_of_a_fault_too(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    come, go = threading.Event(), threading.Event()

    def fault(*_: Any) -> None:
        come.set()
        go.wait(10)
        raise RuntimeError("a fault of the test's")

    monkeypatch.setattr(LeaseClient, "service", fault)
    ids = LeasedGenerator(shared, timeout=20)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ids.next_id) for _ in range(3)]
        until(lambda: len(ids._session.news._waiting) == 3)
        go.set()
        assert all(isinstance(call.exception(5), Unavailable) for call in calls)
    ids.close()


def test_no_thread_to_be_had_is_said(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with LeasedGenerator(shared) as ids:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            took(ids.next_id, Unavailable)
        ids.next_id()


# --- threads and signal handlers ---


def test_threads_that_are_first_together_take_one_lease_and_after_an_idle_time_another() -> None:
    with delegator() as serves:
        for _ in range(3):
            start = threading.Barrier(8)

            def take(ids: LeasedGenerator, start: threading.Barrier = start) -> int:
                start.wait()
                return ids.next_id()

            with LeasedGenerator(serves.address, idle=0.05) as ids, ThreadPoolExecutor(8) as pool:
                for _ in range(2):
                    got = list(pool.map(take, [ids] * 8))
                    assert len(set(got)) == 8
                    assert len(machines(got)) == 1
                    until(no_thread_left)


@pytest.mark.parametrize("ended", [False, True], ids=["the very first call", "the first after an idle time"])
def test_a_handler_may_mint_at_every_step_of_a_call_that_takes_a_lease(shared: str, ended: bool) -> None:
    for at in range(0, 2_000, 7):
        calls = Calls()
        with LeasedGenerator(shared, timeout=3) as ids:
            if ended:
                ids._session.stop()
            call = functools.partial(calls.make, ids.next_id)
            happened = interrupt(call, at, call)
            calls.make(ids.next_id)
        calls.check()
        assert len(machines(calls.ids)) == 1
        if not happened:
            break
    assert 50 < at < 1_900


def test_a_handler_may_mint_at_every_step_of_close(shared: str) -> None:
    for at in range(0, 2_000, 11):
        calls = Calls()
        ids = LeasedGenerator(shared, timeout=3)
        calls.make(ids.next_id)
        start = time.monotonic()
        call = functools.partial(calls.make, ids.next_id)
        happened = interrupt(ids.close, at, functools.partial(error_of, call, Closed))
        assert time.monotonic() - start < 2
        calls.check()
        took(ids.next_id, Closed)
        until(no_thread_left)
        if not happened:
            break
    assert 10 < at < 1_900


# --- forks ---


@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_takes_a_lease_of_its_own(ids: LeasedGenerator, used: bool) -> None:
    before = ids.next_ids(10) if used else []
    children = [in_child(os.fork, lambda: [ids.next_id(), *ids.next_ids(50)]) for _ in range(3)]
    after = ids.next_ids(5000)
    got = [*before, *after, *(id_ for child in children for id_ in child)]
    assert len(set(got)) == len(before) + 5000 + 3 * 51
    assert len(machines(got)) == 4
    assert machines(after) == {ids.machine}


# Its ticks last longer than a test: what the parent's iterator has is good all the time.
SLOW: Final = Layout("slow", SNOWCLOUD.fields, tick_ms=60_000)


def test_a_child_takes_nothing_of_a_tick_that_its_parent_is_in() -> None:
    with delegator(layout=SLOW, ttl_ms=600_000) as serves, LeasedGenerator(serves.address) as ids:
        before = ids.next_ids(10)
        child = in_child(os.fork, lambda: [ids.next_id(), *ids.next_ids(3)])
        after = ids.next_ids(10)
    assert len({*before, *child, *after}) == 24
    assert len({SLOW.decompose(id_).machine for id_ in before + child}) == 2


def test_nor_does_a_child_of_a_fork_that_python_knows_nothing_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a lease of its own; but here it must not try: it has inherited the locks of threads that
    are not there, and Python, not having heard of the fork, has not made them new."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("no thread")

    with delegator(layout=SLOW, ttl_ms=600_000) as serves, LeasedGenerator(serves.address) as ids:
        before = ids.next_ids(10)

        def work() -> list[int]:
            monkeypatch.setattr(threading.Thread, "start", start)
            assert ids.machine is None
            for call in (ids.next_id, lambda: ids.next_ids(3), ids.next_id):
                took(call, Unavailable)
            ids.close()
            took(ids.next_id, Closed)
            return []

        for _ in range(3):
            in_child(libc_fork, work)
        assert ids.next_id() > before[-1]


def test_a_fork_in_the_midst_of_calls_leaves_both_sides_working(ids: LeasedGenerator) -> None:
    with taking(ids) as taken:
        until(lambda: len(taken) > 50)
        children = [in_child(os.fork, lambda: ids.next_ids(200)) for _ in range(6)]
        done = len(taken)
        until(lambda: len(taken) > done + 50)
    assert len({*taken, *(id_ for child in children for id_ in child)}) == len(taken) + 6 * 200


def test_the_child_of_a_child_takes_one_too(ids: LeasedGenerator) -> None:
    got = ids.next_ids(3)

    def work() -> list[int]:
        return [*ids.next_ids(3), *in_child(os.fork, lambda: ids.next_ids(3))]

    got += in_child(os.fork, work)
    assert len(set(got)) == 9
    assert len(machines(got)) == 3


def test_the_child_of_a_closed_generator_is_refused(shared: str) -> None:
    ids = LeasedGenerator(shared)
    ids.next_id()
    ids.close()

    def work() -> list[int]:
        took(ids.next_id, Closed)
        ids.close()
        return []

    in_child(os.fork, work)


def test_closing_in_the_child_leaves_the_parents_lease_alone(ids: LeasedGenerator) -> None:
    before = ids.next_id()

    def work() -> list[int]:
        start = time.monotonic()
        ids.close()
        assert time.monotonic() - start < 1, "there is nothing to give back"
        took(ids.next_id, Closed)
        gc.collect()
        return []

    in_child(os.fork, work)
    session = ids._session
    turns = session.news.count
    until(lambda: session.news.count > turns + 2)
    assert ids.next_id() > before
    assert session.failure is None


def _child_of_multiprocessing(ids: LeasedGenerator | None, endpoint: str, answers: Any) -> None:
    ids = ids or LeasedGenerator(endpoint)
    answers.put(ids.next_ids(100))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_of_multiprocessing_take_leases_and_give_them_back(method: str) -> None:
    with delegator(machines=(0, 2)) as serves, LeasedGenerator(serves.address) as ids:
        got = ids.next_ids(100)
        context: Any = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        for _ in range(4):  # one after another: more than there are machines, were none given back
            args = (ids if method == "fork" else None, serves.address, answers)
            child = context.Process(target=_child_of_multiprocessing, args=args)
            child.start()
            got += answers.get()
            child.join(20)
            assert child.exitcode == 0
        assert len(set(got)) == 500
        assert len(machines(got)) <= 3


def test_a_process_that_ends_gives_its_leases_back() -> None:
    code = (
        "import sys, zflake, threading\n"
        "ids = zflake.LeasedGenerator(sys.argv[1])\n"
        "print(ids.next_id())\n"
        "late = threading.Thread(target=lambda: print(ids.next_id()))\n"
        "threading.Timer(0.1, late.start).start()\n"
    )
    with delegator(machines=(3, 3)) as serves:
        got = []
        start = time.monotonic()
        for _ in range(3):
            command = [sys.executable, "-W", "error", "-c", code, serves.address]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
            assert done.stderr == ""
            got += [int(line) for line in done.stdout.split()]
        assert got == sorted(set(got))
        assert len(got) == 6
        assert time.monotonic() - start < 15


def test_a_forked_child_that_ends_as_any_process_does_leaves_its_parents_lease_alone() -> None:
    code = (
        "import os, sys, time, zflake\n"
        "ids = zflake.LeasedGenerator(sys.argv[1])\n"
        "print(ids.next_id(), flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(ids.next_id(), flush=True)\n"
        "    sys.exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "print(ids.next_id())\n"
    )
    with delegator(machines=(0, 1)) as serves:
        command = [sys.executable, "-c", code, serves.address]
        for _ in range(2):
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
            got = [int(line) for line in done.stdout.split()]
            assert len(machines(got[:2])) == 2
            assert machines(got[::2]) != machines(got[1:2])
            assert got[0] < got[2]


def test_a_tick_that_is_used_up_and_lasts_is_said() -> None:
    slow = Layout("slow", (Field("time", 30), Field("machine", 3), Field("sequence", 2)), tick_ms=60_000)
    with delegator(layout=slow, ttl_ms=600_000) as serves, LeasedGenerator(serves.address) as ids:
        ids.next_ids(1)
        ids._timeout_ns = 100_000_000
        error = until(lambda: error_of(ids.next_id, Overloaded))
        assert 0 < error.retry_after <= 60


def test_no_session_outlives_its_test() -> None:
    until(no_thread_left)
    assert not sessions._live
    assert all(isinstance(session, Session) for session in sessions._inherited)
