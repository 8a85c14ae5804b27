"""The delegator's process over real sockets: every method, every kind of garbage, a store that is behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest
import zmq

from tests.conftest import Bell, Connect, Peer, serving, until
from tests.daemon.tools import ANY, NEW, delegating, failure, result
from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import Mark, Swap
from zflake.delegator import executor
from zflake.delegator.server import Delegator, DelegatorConfig
from zflake.delegator.start import Wishes
from zflake.errors import ConfigError
from zflake.wire.codec import encode_request, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.frames import MAX_REQUEST_BYTES
from zflake.wire.methods import Method

WHO: Final = ("w", "host", 42, "tcp://127.0.0.1:9")


def token(number: int) -> bytes:
    return number.to_bytes(16, "big")


def refused(config: DelegatorConfig, match: str) -> None:
    bell = Bell()
    with pytest.raises(ConfigError, match=match):
        Delegator(config, bell)
    bell.close()


# --- the methods ---


def test_hello_says_who_it_is_and_its_layout(delegator: Delegator, peer: Peer) -> None:
    said = peer.ask("hello").result
    assert (said["service"], said["protocol"], said["address"]) == ("delegator", 1, delegator.address)
    assert Layout.from_map(said["layout"]).same_ids(PRESETS["snowcloud"])


def test_ping_tells_the_timelines_now_which_goes_on(peer: Peer) -> None:
    first, second = (peer.ask("ping").result["now_us"] for _ in range(2))
    assert 0 < second - first < 5_000_000


def test_a_lease_from_acquire_over_renewal_to_release(peer: Peer) -> None:
    granted = peer.ask("lease.acquire", token(1), *WHO).result
    assert granted["token"] == token(1)
    assert granted["end"] - granted["start"] == granted["ttl"] == 30_000
    assert granted["now_us"]
    machine = granted["machine"]
    renewed = until(lambda: peer.ask("lease.renew", machine, token(1), 1, token(2)).result)
    assert (renewed["start"], renewed["gen"], renewed["token"]) == (granted["end"], 2, token(2))
    released = peer.ask("lease.release", machine, token(2), None, granted["start"]).result
    assert released["machine"] == machine
    assert released["fence"] < renewed["start"]


def test_a_repeat_of_an_acquire_is_the_same_window(
    peer: Peer, connect: Connect, delegator: Delegator
) -> None:
    keys = ("machine", "gen", "start", "end")
    answers = [p.ask("lease.acquire", token(1), *WHO).result for p in (peer, connect(delegator.address))]
    assert [answers[0][key] for key in keys] == [answers[1][key] for key in keys]


def test_a_token_that_is_not_the_records_is_lost(peer: Peer) -> None:
    for method, *params in (
        ("lease.renew", 3, token(8), 1, token(9)),
        ("lease.release", 3, token(8), None, None),
        ("lease.renew", 2**63 - 1, token(8), 1, token(9)),
    ):
        assert failure(peer.ask(method, *params)).code == "lost"


def test_the_directory_lists_who_serves_until_its_release(
    connect: Connect, delegator: Delegator, peer: Peer
) -> None:
    assert peer.ask("cluster.workers").result["workers"] == []
    granted = peer.ask("lease.acquire", token(1), *WHO).result
    embedded = connect(delegator.address)
    other = embedded.ask("lease.acquire", token(2), "embedded", "host", 1, "").result["machine"]
    embedded.ask("worker.ready", other, token(2))  # has no address
    assert peer.ask("cluster.workers").result["workers"] == []  # it has not said that it is there
    assert peer.ask("worker.ready", granted["machine"], token(1)).error is None
    (listed,) = peer.ask("cluster.workers").result["workers"]
    assert (listed["name"], listed["host"], listed["pid"], listed["address"]) == WHO
    assert listed["machine"] == granted["machine"]
    assert 0 < listed["ends_in_ms"] <= 30_000
    assert len(peer.ask("cluster.status").result["leases"]) == 2
    peer.ask("lease.release", granted["machine"], token(1), None, None)
    assert peer.ask("cluster.workers").result["workers"] == []


def test_status_counts_what_was_asked(peer: Peer) -> None:
    peer.ask("ping")
    peer.ask("lease.acquire", token(1), *WHO)
    peer.ask("nonsense")
    peer.send(b"no envelope")
    peer.send(b"", encode_result(1, None))
    peer.send(b"", msgpack.packb([2, "ping", []]))
    said = until(lambda: (s := peer.ask("cluster.status").result)["dropped"] == 2 and s)
    assert said["broker"]["strays"] == 1
    assert said["requests"]["ping"] == 1
    assert said["requests"]["lease.acquire"] == 1
    assert said["errors"] == {"unknown_method": 1}
    assert (said["store"], said["ttl_ms"], said["machines"]) == ("memory:", 30_000, [0, 1023])
    assert said["granting_in_ms"] == 0
    assert said["outage"] is None


WRONG: Final[dict[str, list[Any]]] = {
    "hello": [1],
    "ping": [None],
    "cluster.workers": [[]],
    "cluster.status": [-1],
    "cluster.trace": [3],
    "lease.acquire": [b"short", *WHO],
    "lease.renew": [-1, token(1), 1, token(2)],
    "lease.release": [3, token(1), 0, None],
    "ids.next": [0, 1000],
    "worker.ready": [3, "x" * 16],
    "worker.beat": [{"ids": 1}, token(1)],
    "worker.leave": [],
    "worker.callers": [1],
}
"""Params of each method that its check refuses."""


@pytest.mark.parametrize("method", Method)
def test_wrong_params_are_bad_requests_and_lease_nothing(peer: Peer, method: str) -> None:
    assert failure(peer.ask(method, *WRONG[method])).code == "bad_request"
    assert peer.ask("cluster.status").result["leases"] == []


# --- garbage ---


def test_garbage_of_every_kind_does_not_stop_it(connect: Connect, delegator: Delegator, peer: Peer) -> None:
    garbage: list[list[bytes]] = [
        [b""] * 1000,
        [b"x"] * 1000,
        [b"x"],
        [b"", b""],
        [b"a", b"b", b"c", b"d", b"e", b"", encode_request(1, "ping", [])],
        [b"", encode_request(1, "lease.acquire", [token(1), *WHO])[:-1]],
        [b"", b"\xc1"],
        [b"", b"x" * (MAX_REQUEST_BYTES + 1)],
    ]
    garbage += [[os.urandom(n % 30) for _ in range(n % 4 + 1)] for n in range(300)]
    for frames in garbage:
        stranger = connect(delegator.address) if len(frames[-1]) > MAX_REQUEST_BYTES else peer
        stranger.send(*frames)
    assert peer.ask("lease.acquire", token(1), *WHO).result["machine"] >= 0
    until(lambda: peer.ask("cluster.status").result["dropped"] > 100)


def test_a_lone_req_is_answered(connect: Connect, delegator: Delegator) -> None:
    peer = connect(delegator.address, zmq.REQ)
    peer.send(encode_request(5, "ping", []))
    assert result(peer.receive())


def test_an_asker_who_has_gone_is_counted_and_nothing_else(
    connect: Connect, delegator: Delegator, peer: Peer
) -> None:
    gone = connect(delegator.address)
    for number in range(50):
        gone.request("lease.acquire", token(number), *WHO)
    gone.socket.close(linger=0)
    assert peer.ask("ping").result


# --- a store that is behind, or fails ---


@pytest.fixture
def gate(delegator: Delegator, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A store whose writes wait until the gate is set."""
    gate = threading.Event()
    swap = delegator._store.swap

    def slow(swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        assert gate.wait(20)
        return swap(swaps, mark)

    monkeypatch.setattr(delegator._store, "swap", slow)
    yield gate
    gate.set()


def test_while_the_store_is_behind_the_rest_is_answered(gate: threading.Event, peer: Peer) -> None:
    msgid = peer.request("lease.acquire", token(1), *WHO)
    for _ in range(5):
        assert peer.ask("ping").result
    gate.set()
    response = peer.receive()
    assert result(response)["machine"] >= 0
    assert response
    assert response.msgid == msgid


def test_a_backlog_that_is_full_is_overloaded(
    gate: threading.Event, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "MAX_ACQUIRES", 10)
    first = peer.request("lease.acquire", token(0), *WHO)
    until(
        lambda: (
            (s := peer.ask("cluster.status").result)["requests"].get("lease.acquire") and s["backlog"] == 0
        )
    )
    sent = [peer.request("lease.acquire", token(n), *WHO) for n in range(1, 15)]
    for _ in range(4):
        refusal = failure(peer.receive())
        assert refusal.code == "overloaded"
        assert refusal.retry_after_ms
    until(lambda: peer.ask("cluster.status").result["backlog"] == 10)
    gate.set()
    granted = [peer.receive() for _ in range(11)]
    assert [g and g.msgid for g in granted] == [first, *sent[:10]]
    assert len({g.result["machine"] for g in granted if g}) == 11


def test_what_waits_when_it_is_told_to_stop_is_answered(connect: Connect) -> None:
    peers: list[Peer] = []

    def make(waker: Any) -> Delegator:
        delegator = Delegator(DelegatorConfig(ANY, "memory:", NEW), waker)
        peers.append(connect(delegator.address))
        for number in range(20):
            peers[0].request("lease.acquire", token(number), *WHO)
        until(lambda: delegator._router.poll(1))
        waker.stopping = True
        return delegator

    with serving(make):
        for _ in range(20):
            assert result(peers[0].receive())


# --- its start ---


def test_a_port_in_use_is_refused(delegator: Delegator) -> None:
    refused(DelegatorConfig(parse_endpoint(delegator.address), "memory:", NEW), "can't bind")


def test_an_address_that_strangers_reach_needs_insecure() -> None:
    bind = parse_endpoint("tcp://0.0.0.0:*", to_bind=True)
    refused(DelegatorConfig(bind, "memory:", NEW), "--insecure")
    with delegating(bind=bind, insecure=True):
        pass


def test_a_store_of_no_known_engine_is_refused() -> None:
    refused(DelegatorConfig(ANY, "floppy:a", NEW), "store")


def test_a_store_that_is_not_new_rests_before_it_grants(connect: Connect) -> None:
    with delegating(wishes=Wishes()) as delegator:
        peer = connect(delegator.address)
        refusal = failure(peer.ask("lease.acquire", token(1), *WHO))
        assert refusal.code == "no_free_machine"
        assert 60_000 < (refusal.retry_after_ms or 0) <= 70_001
        assert 60_000 < peer.ask("cluster.status").result["granting_in_ms"] <= 70_001


def test_a_restart_on_the_same_store_knows_the_holders_and_their_layout(
    connect: Connect, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    layout = PRESETS["wide"]
    with delegating(url, Wishes(layout=layout, new=True)) as delegator:
        before = connect(delegator.address).ask("lease.acquire", token(1), *WHO).result
    with delegating(url, Wishes()) as delegator:
        peer = connect(delegator.address)
        assert Layout.from_map(peer.ask("hello").result["layout"]).same_ids(layout)
        (lease,) = peer.ask("cluster.status").result["leases"]
        assert (lease["machine"], lease["worker"]) == (before["machine"], None)
        assert peer.ask("worker.ready", before["machine"], token(1)).error is None
        (listed,) = peer.ask("cluster.workers").result["workers"]
        assert listed["machine"] == before["machine"]
        repeat = peer.ask("lease.acquire", token(1), *WHO).result
        assert [repeat[k] for k in ("machine", "start", "end")] == [
            before[k] for k in ("machine", "start", "end")
        ]
    refused(DelegatorConfig(ANY, url, Wishes(layout=PRESETS["twitter"])), "keeps its layout")
