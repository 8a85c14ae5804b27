"""The worker's process: real sockets, garbage, the refusals at its start, the drain at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Bell, Connect, Peer, Script, Scripts, serving, until
from tests.daemon.tools import ANY, delegating, failure, result
from tests.proxy import Mode, Proxy
from zflake.core.layout import PRESETS
from zflake.daemon import Waker
from zflake.delegator.server import Delegator
from zflake.errors import ConfigError, LayoutError
from zflake.wire.codec import encode_request, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.frames import MAX_REQUEST_BYTES
from zflake.worker import server
from zflake.worker.server import Worker, WorkerConfig

LAYOUT: Final = PRESETS["snowcloud"]


def working(config: WorkerConfig) -> AbstractContextManager[Worker]:
    return serving(lambda waker: Worker(config, waker))


def static(**more: Any) -> WorkerConfig:
    return WorkerConfig(**{"delegators": (), "bind": ANY, "machine": 5, "layout": LAYOUT, **more})


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with working(static()) as worker:
        yield worker


@pytest.fixture
def peer(connect: Connect, worker: Worker) -> Peer:
    return connect(worker.address)


def one_id(peer: Peer) -> int:
    first: int = result(peer.ask("ids.next", 1, 5000))[0]
    return first


def refused(config: WorkerConfig, match: str, error: type[Exception] = ConfigError) -> None:
    bell = Bell()
    with pytest.raises(error, match=match):
        Worker(config, bell)
    bell.close()


def test_a_lone_req_gets_a_run(connect: Connect, worker: Worker) -> None:
    peer = connect(worker.address, zmq.REQ)
    peer.send(encode_request(9, "ids.next", [3, 1000]))
    first, step, count = result(peer.receive())
    assert (step, count) == (1, 3)
    assert LAYOUT.decompose(first).machine == 5


def test_a_static_worker_serves_without_a_delegator_and_says_so(peer: Peer) -> None:
    said = peer.ask("hello").result
    assert (said["state"], said["machine"], said["service"]) == ("STATIC", 5, "worker")
    assert one_id(peer) < one_id(peer)


def test_many_askers_at_once_get_distinct_ids_in_full_ticks(connect: Connect, worker: Worker) -> None:
    peers = [connect(worker.address) for _ in range(8)]
    for _ in range(50):
        for peer in peers:
            peer.request("ids.next", 1000, 5000)
    ids: list[int] = []
    for peer in peers:
        for _ in range(50):
            first, step, count = result(peer.receive())
            ids += range(first, first + step * count, step)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "frames",
    [
        [b""] * 1000,
        [b"x"] * 1000,
        [b"x"],
        [b"x", b"y", b"z"],
        [b""],
        [b"", b""],
        [b"a", b"b", b"c", b"d", b"", encode_request(1, "ping", [])],
        [b"", encode_request(1, "ping", []), b""],
        [b"", b"\xc1"],
        [b"", encode_result(1, None)],
        [b"", b"x" * (MAX_REQUEST_BYTES + 1)],
        [b"x" * (MAX_REQUEST_BYTES * 20), b"", b""],
    ],
    ids=range(12),
)
def test_garbage_does_not_stop_it(connect: Connect, worker: Worker, peer: Peer, frames: list[bytes]) -> None:
    stranger = connect(worker.address)
    for _ in range(3):
        stranger.send(*frames)
    assert one_id(peer) < one_id(peer)


def test_random_bytes_do_not_stop_it_and_are_counted(connect: Connect, worker: Worker, peer: Peer) -> None:
    stranger = connect(worker.address)
    for n in range(300):
        stranger.send(*(os.urandom(n % 40) for _ in range(n % 5 + 1)))
        stranger.send(b"", os.urandom(n % 40))
    one_id(peer)
    until(lambda: (said := peer.ask("cluster.status").result)["requests"] > 300 and said["dropped"] > 100)


def test_what_was_too_large_does_not_cut_others_off(connect: Connect, worker: Worker, peer: Peer) -> None:
    one_id(peer)
    connect(worker.address).send(b"", b"x" * (MAX_REQUEST_BYTES + 1))
    one_id(peer)


def test_an_asker_who_has_gone_is_counted_and_nothing_else(
    connect: Connect, worker: Worker, peer: Peer
) -> None:
    gone = connect(worker.address)
    for _ in range(200):
        gone.request("ids.next", 1_000_000, 5000)
    until(lambda: peer.ask("cluster.status").result["requests"] > 1)
    gone.socket.close(linger=0)
    one_id(peer)


# --- what it refuses at its start ---


def test_a_wildcard_bind_needs_an_address_to_advertise() -> None:
    bind = parse_endpoint("tcp://*:*", to_bind=True)
    refused(static(bind=bind, insecure=True), "--advertise")


@pytest.mark.parametrize(
    "bind", ["tcp://*:*", "tcp://0.0.0.0:*", "tcp://192.0.2.1:*", "tcp://example.org:7411"]
)
def test_an_address_that_strangers_reach_needs_insecure(bind: str) -> None:
    endpoint = parse_endpoint(bind, to_bind=True)
    refused(static(bind=endpoint, advertise=parse_endpoint("tcp://127.0.0.1:1")), "--insecure")


def test_the_bound_port_is_filled_in_to_what_is_advertised(connect: Connect) -> None:
    bind = parse_endpoint("tcp://0.0.0.0:*", to_bind=True)
    advertise = parse_endpoint("tcp://localhost:*", to_bind=True)
    with working(static(bind=bind, advertise=advertise, insecure=True)) as worker:
        assert worker.address.startswith("tcp://localhost:")
        peer = connect(worker.address.replace("localhost", "127.0.0.1"))
        one_id(peer)
        assert peer.ask("hello").result["address"] == worker.address


def test_an_advertised_port_stands_as_it_is() -> None:
    advertise = parse_endpoint("tcp://ids.example.org:80")
    with working(static(advertise=advertise)) as worker:
        assert worker.address == "tcp://ids.example.org:80"


def test_an_ipc_path_that_is_advertised_stands_as_it_is_and_serves(connect: Connect, tmp_path: Path) -> None:
    bind = parse_endpoint(f"ipc://{tmp_path}/worker", to_bind=True)
    for advertise in (None, bind):
        with working(static(bind=bind, advertise=advertise)) as worker:
            assert worker.address == bind.text
            one_id(connect(worker.address))
    refused(static(bind=bind, advertise=parse_endpoint("tcp://localhost:*", to_bind=True)), "has no port")


def test_a_port_in_use_is_refused(worker: Worker) -> None:
    refused(static(bind=parse_endpoint(worker.address)), "can't bind")


def test_an_ipc_path_that_is_served_is_not_taken_over(tmp_path: Path) -> None:
    bind = parse_endpoint(f"ipc://{tmp_path}/w", to_bind=True)
    with working(static(bind=bind)):
        refused(static(bind=bind), "in use")


def test_a_static_worker_needs_a_layout() -> None:
    refused(static(layout=None), "--layout")


def test_a_static_machine_must_fit_the_layout() -> None:
    refused(static(machine=LAYOUT.machines), "machine", LayoutError)


# --- with a lease ---


@pytest.fixture
def delegator() -> Iterator[Delegator]:
    with delegating() as delegator:
        yield delegator


def leased(delegator: Delegator, **more: Any) -> WorkerConfig:
    return WorkerConfig([parse_endpoint(delegator.address)], ANY, name="w1", **more)


def test_a_worker_takes_a_lease_serves_is_listed_and_gives_it_back(
    connect: Connect, delegator: Delegator
) -> None:
    directory = connect(delegator.address)
    with working(leased(delegator)) as worker:
        (listed,) = until(lambda: directory.ask("cluster.workers").result["workers"])
        assert (listed["address"], listed["name"]) == (worker.address, "w1")
        peer = connect(worker.address)
        until(lambda: peer.ask("ids.next", 1, 1000).error is None)
        said = peer.ask("hello").result
        assert (said["state"], said["machine"]) == ("HELD", listed["machine"])
    assert directory.ask("cluster.workers").result["workers"] == []


def test_a_worker_is_listed_again_though_its_old_connection_stays_silent_for_ever(
    connect: Connect, delegator: Delegator
) -> None:
    directory = connect(delegator.address)

    def listed() -> list[Any]:
        workers: list[Any] = directory.ask("cluster.workers").result["workers"]
        return workers

    port = parse_endpoint(delegator.address).port
    assert port is not None
    with Proxy(port) as network:
        endpoint = parse_endpoint(f"tcp://127.0.0.1:{network.port}")
        with working(WorkerConfig([endpoint], ANY)) as worker:
            until(listed)
            # What is sent meanwhile is swallowed, and with it all that is sent over the same connection ever after.
            network.become(Mode.BLACK_HOLE)
            until(lambda: not listed())
            network.become(Mode.PASS)
            assert until(listed)[0]["address"] == worker.address
            asked = connect(delegator.address)
            assert until(lambda: asked.ask("ids.next", 1, 1000).error is None), "it serves brokered requests"


def test_a_worker_without_a_delegator_says_that_it_holds_no_window(connect: Connect) -> None:
    config = WorkerConfig([parse_endpoint("tcp://127.0.0.1:1")], ANY)
    with working(config) as worker:
        refusal = failure(connect(worker.address).ask("ids.next", 1, 1000))
        assert refusal.code == "lease_expired"
        assert 50 <= (refusal.retry_after_ms or 0) <= 1000


def test_a_worker_that_was_told_another_layout_ends(delegator: Delegator) -> None:
    bell = Bell()
    worker = Worker(leased(delegator, layout=PRESETS["twitter"]), bell)
    with pytest.raises(LayoutError, match="leave the layout"):
        worker.run()
    bell.close()


# --- expired work and drain ---


def test_requests_that_sat_while_the_process_was_stopped_mint_nothing(connect: Connect) -> None:
    bell = Bell()
    worker = Worker(static(), bell)
    peer = connect(worker.address)
    worker._tick()
    worker._woke_us -= 3_000_000  # as after a SIGSTOP of three seconds
    peer.request("ids.next", 1, 1000)
    peer.request("ids.next", 1, 5000)
    until(lambda: worker._channels[0].socket.poll(1))

    def served() -> bool:
        worker._tick()
        return worker.handler.requests.taken == 2

    until(served)
    answers = [peer.receive(), peer.receive()]
    assert [a and a.error and a.error.code for a in answers] == ["timeout", None]
    bell.stopping = True
    worker.run()
    bell.close()


def test_what_is_queued_when_it_is_told_to_stop_is_answered(connect: Connect) -> None:
    asked = 40
    peers: list[Peer] = []

    def make(waker: Waker) -> Worker:
        worker = Worker(static(), waker)
        peers.append(connect(worker.address))
        # More than one tick holds: some of these are parked in the midst of the drain.
        for _ in range(asked):
            peers[0].request("ids.next", 4096, 5000)
        until(lambda: worker._channels[0].socket.poll(1))
        waker.stopping = True
        return worker

    with serving(make):
        assert result(peers[0].receive())
        for _ in range(asked - 1):
            assert peers[0].receive()


def test_whoever_asks_while_it_stops_is_sent_to_another(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DRAIN_US", 1_000_000)
    with working(static()) as worker:
        peer = connect(worker.address)
        one_id(peer)
        worker._waker.stopping = True
        refused = until(lambda: peer.ask("ids.next", 1, 1000).error)
    assert refused.code == "unavailable"


def test_a_stopped_worker_gives_back_its_machine_with_the_last_tick_it_minted_in(
    connect: Connect, script: Scripts
) -> None:
    tick = 100_000_000
    now_us = (LAYOUT.epoch_ms + tick) * 1000

    def answer(method: str, params: list[Any], msgid: int) -> bytes:
        match method:
            case "hello":
                return encode_result(
                    msgid,
                    {"service": "delegator", "protocol": 1, "layout": LAYOUT.to_map(), "now_us": now_us},
                )
            case "lease.release":
                return encode_result(msgid, {"machine": 3, "fence": 1, "now_us": now_us})
            case "lease.acquire" | "lease.renew":
                token = params[0] if method == "lease.acquire" else params[3]
                window = {"machine": 3, "gen": 1, "start": tick - 5, "end": tick + 60_000, "ttl": 60_000}
                return encode_result(
                    msgid, {**window, "token": token, "layout": LAYOUT.to_map(), "now_us": now_us}
                )
        return encode_result(msgid, {"now_us": now_us})

    delegator: Script = script(answer)

    with working(WorkerConfig([parse_endpoint(delegator.address)], ANY)) as worker:
        peer = connect(worker.address)
        until(lambda: peer.ask("ids.next", 1, 1000).error is None)
        last = LAYOUT.decompose(one_id(peer)).tick
    ((machine, token, pending, released_last),) = delegator.calls("lease.release")
    assert (machine, token, pending) == (3, delegator.calls("lease.acquire")[0][0], None)
    assert released_last == last
