"""`Client` over real sockets: threads, forks, strangers, the dead, and nobody at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
import zmq

from tests.client.answers import LAYOUT, directory, hello
from tests.conftest import Scripts, serving, until
from tests.embedded.conftest import ANY, in_child
from tests.embedded.conftest import delegator as leasing
from zflake import Client, Closed, ConfigError, ProtocolError, Timeout
from zflake.client.balancer import Refresh
from zflake.client.conversation import Ask
from zflake.wire.codec import decode_request, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig

NOBODY: Final = "tcp://127.0.0.1:1"


@pytest.fixture(scope="module")
def delegator() -> Iterator[str]:
    with leasing() as delegator:
        yield delegator.address


@pytest.fixture(scope="module")
def workers(delegator: str) -> Iterator[list[str]]:
    config = WorkerConfig([parse_endpoint(delegator)], ANY)
    with (
        serving(lambda alarm: Worker(config, alarm)) as one,
        serving(lambda alarm: Worker(config, alarm)) as two,
        Client(delegator) as ids,
    ):
        until(lambda: ids.next_id() and len(_machines(delegator)) == 2)
        yield [one.address, two.address]


def _machines(delegator: str) -> set[int]:
    """The machines of which a few fresh clients get IDs."""
    machines = set()
    for _ in range(8):
        with Client(delegator) as ids:
            machines.add(LAYOUT.decompose(ids.next_id()).machine)
    return machines


@pytest.fixture
def ids(delegator: str, workers: list[str]) -> Iterator[Client]:
    with Client(delegator) as ids:
        yield ids


def took(call: Callable[[], Any], *errors: type[Exception]) -> float:
    start = time.monotonic()
    with pytest.raises(errors):
        call()
    return time.monotonic() - start


# --- asking ---


def test_ids_ascend_and_carry_a_machine_of_the_cluster(ids: Client) -> None:
    got = [ids.next_id() for _ in range(200)]
    assert got == sorted(set(got))
    assert len({LAYOUT.decompose(i).machine for i in got}) == 1


@pytest.mark.parametrize("count", [1, 2, 4096, 4097, 50_000])
def test_exactly_as_many_come_as_were_asked(ids: Client, count: int) -> None:
    got = ids.next_ids(count)
    assert len(set(got)) == len(got) == count
    assert got == sorted(got)


@pytest.mark.parametrize("count", [0, -1, "x", 1.5, True, None, [1]])
def test_a_count_that_is_none_is_refused(ids: Client, count: Any) -> None:
    with pytest.raises(ConfigError, match="count"):
        ids.next_ids(count)


def test_a_worker_may_be_asked_alone(workers: list[str]) -> None:
    with Client(workers[0], route="direct") as one, Client(workers[1]) as two:
        machines = {LAYOUT.decompose(client.next_id()).machine for client in (one, two)}
        assert len(machines) == 2


def test_the_layout_is_the_clusters(ids: Client) -> None:
    assert ids.layout().same_ids(LAYOUT)


def test_many_threads_share_a_client_and_get_distinct_ids(ids: Client) -> None:
    threads, each = 16, 60
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(lambda: [ids.next_id() for _ in range(each)]) for _ in range(threads)]
        runs = [future.result(20) for future in futures]
        many = [future.result(20) for future in [pool.submit(ids.next_ids, 5000) for _ in range(4)]]
    assert all(run == sorted(run) for run in runs)
    assert len({i for run in runs + many for i in run}) == threads * each + 4 * 5000


def test_a_forked_child_may_use_the_client_and_close_it(ids: Client) -> None:
    def work() -> list[int]:
        taken = [*(ids.next_id() for _ in range(50)), *ids.next_ids(500)]
        ids.close()
        return taken

    before = ids.next_ids(10)
    child = in_child(os.fork, work)
    after = ids.next_ids(200)
    assert len({*before, *child, *after}) == 10 + 550 + 200


def test_a_fork_in_the_midst_of_calls_leaves_both_sides_working(ids: Client) -> None:
    stop = threading.Event()
    taken: list[int] = []

    def take() -> None:
        while not stop.is_set():
            taken.append(ids.next_id())

    with ThreadPoolExecutor(4) as pool:
        takers = [pool.submit(take) for _ in range(4)]
        try:
            for _ in range(4):
                mark = len(taken)
                until(lambda: len(taken) > mark + 50)  # noqa: B023
                taken += in_child(os.fork, lambda: [ids.next_id() for _ in range(20)])
            mark = len(taken)
            until(lambda: len(taken) > mark + 50)
        finally:
            stop.set()
    assert [taker.exception() for taker in takers] == [None] * 4
    assert len(set(taken)) == len(taken)


# --- closing ---


def test_after_close_every_call_is_refused(delegator: str, workers: list[str]) -> None:
    ids = Client(delegator)
    ids.next_id()
    ids.close()
    ids.close()
    for call in (ids.next_id, lambda: ids.next_ids(3)):
        assert took(call, Closed) < 0.5


def test_a_client_that_was_never_used_closes(delegator: str) -> None:
    Client(delegator).close()
    with Client(NOBODY):
        pass


def test_close_in_the_midst_of_calls_ends_them(delegator: str, workers: list[str]) -> None:
    ids = Client(delegator)

    def take() -> None:
        while True:
            ids.next_id()

    with ThreadPoolExecutor(6) as pool:
        takers = [pool.submit(take) for _ in range(6)]
        until(lambda: ids._transport._idle)
        ids.close()
        assert [type(taker.exception(5)) for taker in takers] == [Closed] * 6
    assert not ids._transport._sockets._open


# --- what it refuses at once ---


@pytest.mark.parametrize(
    "endpoints",
    [
        [],
        "",
        "127.0.0.1:7410",
        "tcp://127.0.0.1",
        "tcp://*:7410",
        "http://x:1",
        "tcp://x:0",
        ["tcp://x:1", "y"],
    ],
)
def test_endpoints_that_are_none_are_refused(endpoints: Any) -> None:
    with pytest.raises(ConfigError):
        Client(endpoints)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", None])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Client(NOBODY, timeout=timeout)


def test_a_route_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="route"):
        Client(NOBODY, route="scenic")


# --- the absent, the dead, and strangers ---


@pytest.mark.parametrize("timeout", [0.1, 0.8])
def test_nobody_there_is_a_timeout_within_about_the_budget(timeout: float) -> None:
    with Client([NOBODY, "tcp://127.0.0.1:2"], timeout=timeout) as ids:
        assert timeout * 0.8 < took(ids.next_id, Timeout) < timeout + 0.4
        assert took(ids.next_id, TimeoutError) < timeout + 0.4


def test_a_peer_that_never_answers_is_a_timeout_within_about_the_budget(script: Scripts) -> None:
    with Client(script(lambda *_: None).address, timeout=0.5) as ids:
        assert took(ids.next_id, Timeout) < 0.9


def _worker(method: str, params: list[Any], msgid: int) -> bytes:
    if method == "hello":
        return encode_result(msgid, hello("worker"))
    return encode_result(msgid, [msgid, 1, 1])


def test_many_threads_with_a_new_client_read_the_directory_once(
    script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = 12
    live = script(_worker)
    waiting: list[Refresh] = []

    def answer(method: str, params: list[Any], msgid: int) -> bytes:
        if method == "hello":
            until(lambda: len(waiting) == threads - 1)
            return encode_result(msgid, hello("delegator"))
        return encode_result(msgid, directory(live.address))

    peer = script(answer)
    with Client(peer.address, timeout=20.0) as ids, ThreadPoolExecutor(threads) as pool:
        when_over = ids._balancer.when_over

        def wait(refresh: Refresh, wake: Callable[[], object]) -> None:
            waiting.append(refresh)
            when_over(refresh, wake)

        monkeypatch.setattr(ids._balancer, "when_over", wait)
        futures = [pool.submit(ids.next_id) for _ in range(threads)]
        assert all(future.result(20) > 0 for future in futures)
    assert [method for method, _ in peer.asked] == ["hello", "cluster.workers"]


class _StopCallError(BaseException):
    """As a signal handler raises it."""


def test_a_call_that_an_exception_ends_lets_the_next_one_read_the_directory(
    script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = script(_worker)
    with Client(peer.address, timeout=20.0) as ids, ThreadPoolExecutor(1) as pool:

        def stop(_: Ask) -> None:
            raise _StopCallError

        # The exception is kept, and keeps the call's frames: the conversation ends because it is closed.
        with monkeypatch.context() as patch:
            patch.setattr(ids._transport, "ask", stop)
            with pytest.raises(_StopCallError) as kept:
                ids.next_id()
        start = time.monotonic()
        assert pool.submit(ids.next_id).result(20) > 0
        assert time.monotonic() - start < 0.5, "it waited for the call that was given up"
        assert kept.value is not None


def test_a_signal_handler_may_take_an_id_while_its_thread_reads_the_directory(script: Scripts) -> None:
    main = threading.get_ident()
    taken: list[int] = []

    def answer(method: str, params: list[Any], msgid: int) -> bytes:
        if len(peer.asked) == 1:
            signal.pthread_kill(main, signal.SIGUSR1)
        return _worker(method, params, msgid)

    peer = script(answer)
    with Client(peer.address, timeout=3.0) as ids:
        before = signal.signal(signal.SIGUSR1, lambda *_: taken.append(ids.next_id()))
        try:
            start = time.monotonic()
            ids.next_id()
            until(lambda: bool(taken))
            assert time.monotonic() - start < 0.9
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_a_worker_that_goes_away_is_left_for_another(delegator: str, workers: list[str]) -> None:
    config = WorkerConfig((), ANY, machine=1000, layout=LAYOUT)
    with Client([delegator, NOBODY], timeout=3.0) as ids:
        with serving(lambda alarm: Worker(config, alarm)) as third:
            ids._balancer.layout = LAYOUT
            ids._balancer.update({third.address: ""}, [])
            assert LAYOUT.decompose(ids.next_id()).machine == 1000
        assert LAYOUT.decompose(ids.next_id()).machine != 1000


def test_an_answer_with_frames_that_nobody_asked_for_is_taken_or_a_protocol_error(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    rep = context.socket(zmq.REP)
    port = rep.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if rep.poll(5):
                msgid, method, params = decode_request(rep.recv())
                rep.send_multipart([_worker(method, params, msgid), b"more", b"and more"])
        rep.close(linger=0)

    with ThreadPoolExecutor(1) as pool, Client(f"tcp://127.0.0.1:{port}", timeout=2.0) as ids:
        pool.submit(serve)
        try:
            for _ in range(3):
                with contextlib.suppress(ProtocolError):
                    assert ids.next_id() > 0
        finally:
            stop.set()


def test_a_late_answer_is_never_taken_for_a_later_ones(script: Scripts) -> None:
    late = threading.Event()
    served: list[int] = []

    def answer(method: str, params: list[Any], msgid: int) -> bytes:
        if method == "hello":
            return _worker(method, params, msgid)
        served.append(len(served) + 1)
        if served[-1] == 1:
            late.wait(5)
        return encode_result(msgid, [served[-1], 1, 1])

    peer = script(answer)
    with Client(peer.address, timeout=0.3) as ids:
        took(ids.next_id, Timeout)
        late.set()
        got = [ids.next_id() for _ in range(3)]
    assert 1 not in got
    assert got == sorted(set(got))
