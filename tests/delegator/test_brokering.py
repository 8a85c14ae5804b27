"""Brokering for real: a delegator and workers with real sockets, and strangers that forge answers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Connect, Peer, serving, until
from tests.daemon.tools import ANY, delegating, failure, result
from zflake.core.layout import PRESETS
from zflake.delegator.broker import CREDIT
from zflake.delegator.server import Delegator
from zflake.delegator.start import Wishes
from zflake.wire.cluster import LOAD
from zflake.wire.codec import (
    Response,
    decode_request,
    encode_bundle,
    encode_error,
    encode_request,
    encode_result,
)
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.methods import Code
from zflake.worker.server import Worker, WorkerConfig

LAYOUT: Final = PRESETS["snowcloud"]
FORGED: Final = [1, 1, 1]
HONEST: Final = [4096, 1, 1]
SOON_S: Final = 3.0
"""A second or so, on a machine that has much else to do."""

_numbers = count(1)


def working(delegator: str, name: str = "w") -> contextlib.AbstractContextManager[Worker]:
    config = WorkerConfig([parse_endpoint(delegator)], ANY, name=name)
    return serving(lambda waker: Worker(config, waker))


def status(peer: Peer) -> Any:
    return result(peer.ask("cluster.status"))


def listed(peer: Peer) -> list[str]:
    return [worker["name"] for worker in result(peer.ask("cluster.workers"))["workers"]]


def ready(peer: Peer, workers: int) -> None:
    until(lambda: status(peer)["broker"]["workers"] == workers, f"{workers} workers at the broker")


class Played:
    """A worker that the test plays: it holds a real lease, and answers when the test says so."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.token = self.shown = os.urandom(16)
        name = f"played-{next(_numbers)}"
        granted = peer.ask("lease.acquire", self.token, name, "host", 1, "tcp://127.0.0.1:9")
        self.machine: int = result(granted)["machine"]

    def ready(self) -> Response:
        self.shown = self.token
        return self.peer.ask("worker.ready", self.machine, self.token)

    def beat(self) -> Response:
        return self.peer.ask("worker.beat", dict.fromkeys(LOAD, 0), self.shown)

    def leave(self) -> Response:
        return self.peer.ask("worker.leave", self.shown)

    def take(self) -> tuple[bytes, int]:
        """The next brokered request: what its answer goes under, and its msgid."""
        while True:
            assert self.peer.socket.poll(5000)
            frames = self.peer.socket.recv_multipart()
            if frames[-1][:2] == b"\x94\x00":
                tag, empty, body = frames
                msgid, method, _ = decode_request(body)
                assert (len(tag), empty, method) == (16, b"", "ids.next")
                return self.shown + tag, msgid


@pytest.fixture
def played(connect: Connect, delegator: Delegator) -> Played:
    played = Played(connect(delegator.address))
    assert played.ready().error is None
    return played


# --- what it is for ---


def test_a_lone_req_gets_ids_of_the_workers_from_the_delegator(
    connect: Connect, delegator: Delegator, peer: Peer
) -> None:
    with working(delegator.address, "w1"), working(delegator.address, "w2"):
        ready(peer, 2)
        client = connect(delegator.address, zmq.REQ)
        ids: list[int] = []
        for number in range(100):
            client.send(encode_request(number, "ids.next", [3, 2000]))
            first, step, minted = result(client.receive())
            assert 1 <= minted <= 3
            ids += range(first, first + step * minted, step)
        assert len(set(ids)) == len(ids)
        leases = {lease["machine"]: lease["worker"] for lease in status(peer)["leases"]}
        assert {LAYOUT.decompose(id_).machine for id_ in ids} == set(leases)
        until(lambda: status(peer)["broker"]["brokered"] == 100)
        until(lambda: sum(lease["worker"]["ids"] for lease in status(peer)["leases"]) == len(ids))
        assert sorted(listed(peer)) == ["w1", "w2"]
    # They left: at once, and before their leases ran out.
    assert listed(peer) == []
    assert status(peer)["broker"]["workers"] == 0
    refusal = failure(peer.ask("ids.next", 1, 1000))
    assert refusal.code == "unavailable"
    assert refusal.retry_after_ms


def test_a_played_worker_sees_a_tag_and_no_client_and_what_is_left_of_the_budget(
    connect: Connect, delegator: Delegator, played: Played
) -> None:
    client = connect(delegator.address)
    client.send(b"secret", b"hop", b"", encode_request(7, "ids.next", [9, 1000]))
    assert played.peer.socket.poll(5000)
    tag, empty, body = played.peer.socket.recv_multipart()
    assert empty == b""
    msgid, _, (asked, left_ms) = decode_request(body)
    assert (msgid, asked) == (7, 9)
    assert 0 < left_ms <= 1000
    assert b"secret" not in tag + body
    played.peer.send(played.token + tag, b"", encode_result(7, HONEST))
    assert client.socket.poll(5000)
    assert client.socket.recv_multipart() == [b"secret", b"hop", b"", encode_result(7, HONEST)]


# --- strangers ---


def test_an_answer_counts_only_from_the_worker_that_holds_the_tag_and_once(
    connect: Connect, delegator: Delegator, peer: Peer, played: Played
) -> None:
    stranger, rival = connect(delegator.address), Played(connect(delegator.address))
    client = connect(delegator.address)
    msgid = client.request("ids.next", 1, 20_000)
    tag, _ = played.take()
    assert rival.ready().error is None  # a worker as well, which was not given this request
    forged = encode_result(msgid, FORGED)
    # The very tag and the very msgid, by somebody else.
    strays = 0
    for forger in (stranger, rival.peer, client):
        for envelope in (
            [tag, b""],
            [b""],
            [tag, tag, b""],
            [bytes(16), b""],
            [played_identity(delegator), tag, b""],
        ):
            forger.send(*envelope, forged)
            strays += 1
        forger.send(b"", encode_bundle([(tag, forged), (bytes(16), forged)]))
        strays += 2
    # The very worker, by anything but its token and the tag.
    for envelope in (
        [b""],
        [tag[16:], b""],
        [os.urandom(16) + tag[16:], b""],
        [tag[:-1], b""],
        [bytes(16), b""],
        [tag, b"x", b""],
        [played_identity(delegator), b""],
    ):
        played.peer.send(*envelope, forged)
        strays += 1
    played.peer.send(tag, b"", encode_result(msgid + 1, FORGED))
    played.peer.send(tag, b"", forged[:-1])
    strays += 2
    # Not by the status, which may be as old as a worker that is missing.
    until(lambda: delegator.service.broker.counts.strays == strays, f"{strays} strays")
    played.peer.send(tag, b"", encode_result(msgid, HONEST))
    played.peer.send(tag, b"", forged)
    response = client.receive()
    assert result(response) == HONEST
    assert response
    assert response.msgid == msgid
    until(lambda: status(peer)["broker"]["strays"] == strays + 1, "the repeated answer")
    assert client.receive(0.02) is None


def test_several_answers_may_come_in_one_message(
    connect: Connect, delegator: Delegator, peer: Peer, played: Played
) -> None:
    client = connect(delegator.address)
    asked = [client.request("ids.next", 1, 20_000) for _ in range(5)]
    taken = [played.take() for _ in asked]
    answers = [(tag, encode_result(msgid, [msgid, 1, 1])) for tag, msgid in taken]
    played.peer.send(b"", encode_bundle([*answers, answers[0]]))
    received = [client.receive() for _ in asked]
    assert [(r.msgid, r.result) for r in received if r] == [(msgid, [msgid, 1, 1]) for msgid in asked]
    until(lambda: status(peer)["broker"]["strays"] == 1, "the repeated answer")
    for nonsense in (b"\x92\x03", b"\x92\x03\x07", encode_bundle([])[:-1], b"\x92\x03\x91\x92\x01\x02"):
        played.peer.send(b"", nonsense)
    assert peer.ask("ping").error is None
    until(lambda: status(peer)["dropped"] == 4, "the nonsense")


def played_identity(delegator: Delegator) -> bytes:
    """A worker's identity at the delegator, which strangers are taken to guess."""
    return next(iter(delegator.service.directory._workers))


def test_nothing_that_strangers_send_reaches_a_client_while_real_workers_serve(
    connect: Connect, context: zmq.Context[zmq.Socket[bytes]], delegator: Delegator, peer: Peer
) -> None:
    with working(delegator.address):
        ready(peer, 1)
        identity = played_identity(delegator)
        client = connect(delegator.address)
        client.ask("ping")
        strangers = [connect(delegator.address), connect(delegator.address)]
        # One that claims to be the worker, by its routing identity.
        mask = context.socket(zmq.DEALER)
        mask.setsockopt(zmq.ROUTING_ID, identity)
        mask.setsockopt(zmq.LINGER, 0)
        mask.connect(delegator.address)
        seen: set[bytes] = set()
        try:
            for _ in range(150):
                tags = [
                    tag
                    for peer_ in list(delegator.service.broker._peers.values())
                    for tag in list(peer_.jobs)
                ]
                seen.update(tags)
                msgid = client.request("ids.next", 1, 5000)
                forged = encode_result(msgid, FORGED)
                guesses = [*list(seen)[-3:], os.urandom(16), identity]
                for stranger in strangers:
                    stranger.send(b"", forged)
                    for guess in guesses:
                        stranger.send(guess, b"", forged)
                        stranger.send(identity, guess, b"", forged)
                    stranger.send(b"", encode_error(msgid, Code.TIMEOUT, "m"))
                with contextlib.suppress(zmq.Again):
                    mask.send_multipart([guesses[0], b"", forged], zmq.NOBLOCK)
                first, _, _ = result(client.receive())
                assert first != FORGED[0]
                machine = delegator.service.directory._workers[identity].machine
                assert LAYOUT.decompose(first).machine == machine
        finally:
            mask.close(linger=0)
        assert client.receive(0.02) is None
        until(lambda: status(peer)["broker"]["strays"] > 150)


def test_who_shows_no_lease_s_token_is_no_worker(
    connect: Connect, delegator: Delegator, peer: Peer, played: Played
) -> None:
    stranger = Played(connect(delegator.address))
    asks: list[Callable[[], Response]] = [
        lambda: stranger.peer.ask("worker.ready", played.machine, os.urandom(16)),
        lambda: stranger.peer.ask("worker.ready", played.machine, bytes(16)),
        lambda: stranger.peer.ask("worker.ready", played.machine, stranger.token),
        lambda: stranger.peer.ask("worker.ready", stranger.machine + 1, stranger.token),
        lambda: stranger.peer.ask("worker.ready", 2**63 - 1, stranger.token),
        stranger.beat,
    ]
    for ask in asks:
        refusal = failure(ask())
        assert refusal.code == "not_ready"
        assert played.token.hex() not in refusal.message
    assert stranger.leave().error is None  # of itself, whoever that is
    assert played.peer.ask("worker.leave", stranger.token).error is None  # and of nobody else
    assert status(peer)["broker"]["workers"] == 1
    client = connect(delegator.address)
    for _ in range(CREDIT):
        client.request("ids.next", 1, 5000)
    for _ in range(CREDIT):
        tag, msgid = played.take()
        played.peer.send(tag, b"", encode_result(msgid, HONEST))
    for _ in range(CREDIT):
        assert result(client.receive()) == HONEST
    assert stranger.peer.receive(0.02) is None


def test_who_takes_the_identity_of_a_worker_that_died_is_not_taken_for_it(
    connect: Connect, delegator: Delegator, peer: Peer
) -> None:
    client = connect(delegator.address)

    def take_over() -> tuple[Played, Peer, int] | None:
        """A worker that died, and a stranger that is given a request in its place, unless the death was seen first."""
        worker = Played(connect(delegator.address, zmq.DEALER, b"worker"))
        assert worker.ready().error is None
        worker.peer.socket.close(linger=0)
        stranger = connect(delegator.address, zmq.DEALER, b"worker")
        stranger.request("ping")
        if stranger.receive(0.1):
            msgid = client.request("ids.next", 1, 20_000)
            if stranger.socket.poll(500):
                return worker, stranger, msgid
            failure(client.receive())
        return None

    worker, stranger, msgid = until(take_over, "a stranger in a worker's place")
    tag, _, _ = stranger.socket.recv_multipart()
    forged = encode_result(msgid, FORGED)
    with working(delegator.address, "w"):
        for guess in (b"", os.urandom(16)):
            stranger.send(guess + tag, b"", forged)
            stranger.send(b"", encode_bundle([(guess + tag, forged)]))
            assert stranger.ask("worker.leave", guess or bytes(16)).error is None
        while listed(peer) != ["w"]:  # nor do its messages keep the worker there
            beat = stranger.ask("worker.beat", dict.fromkeys(LOAD, 0), os.urandom(16))
            assert failure(beat).code == "not_ready"
            stranger.send(tag, b"", forged)
        first, *_ = result(client.receive())
        assert first != FORGED[0]
        assert LAYOUT.decompose(first).machine != worker.machine
    assert client.receive(0.02) is None


def test_the_newest_connection_of_a_worker_takes_the_place_of_the_others(
    connect: Connect, delegator: Delegator, peer: Peer, played: Played
) -> None:
    client = connect(delegator.address)
    client.request("ids.next", 1, 20_000)
    played.take()
    former = played.peer
    for _ in range(40):
        played.peer = connect(delegator.address)
        played.peer.request("worker.ready", played.machine, played.token)
        tag, msgid = played.take()
        assert status(peer)["broker"]["workers"] == 1
    played.peer.send(tag, b"", encode_result(msgid, HONEST))
    assert result(client.receive()) == HONEST
    msgids = [client.request("ids.next", 1, 20_000) for _ in range(9)]
    for _ in msgids:
        tag, msgid = played.take()
        played.peer.send(tag, b"", encode_result(msgid, HONEST))
    assert {answer.msgid for _ in msgids if (answer := client.receive())} == {*msgids}
    newest, played.peer = played.peer, former
    assert failure(played.beat()).code == "not_ready"
    played.peer = newest
    assert played.beat().error is None


def test_a_token_that_was_renewed_or_given_back_makes_no_worker(peer: Peer, played: Played) -> None:
    old, played.token = played.token, os.urandom(16)
    until(lambda: peer.ask("lease.renew", played.machine, old, 1, played.token).error is None)
    assert played.beat().error is None  # it is there already
    assert failure(peer.ask("worker.ready", played.machine, old)).code == "not_ready"
    assert played.ready().error is None
    peer.ask("lease.release", played.machine, played.token, None, None)
    assert failure(played.ready()).code == "not_ready"
    assert listed(peer) == []
    until(lambda: status(peer)["broker"]["workers"] == 0)
    assert failure(played.beat()).code == "not_ready"


# --- workers that go, and come again ---


def test_a_worker_that_dies_is_out_soon_and_what_it_had_goes_to_another(
    connect: Connect, delegator: Delegator, peer: Peer, played: Played
) -> None:
    client = connect(delegator.address)
    msgids = [client.request("ids.next", 1, 20_000) for _ in range(5)]
    for _ in msgids:
        played.take()
    with working(delegator.address, "w"):
        until(lambda: played.beat().error is None and status(peer)["broker"]["workers"] == 2)
        died = time.monotonic()
        played.peer.socket.close(linger=0)
        for _ in range(30):  # some of these can't be sent to it any more
            msgids.append(client.request("ids.next", 1, 20_000))
            status(peer)
        answers = [client.receive() for _ in msgids]
        assert sorted(answer.msgid or 0 for answer in answers if answer and not answer.error) == msgids
        until(lambda: listed(peer) == ["w"] and status(peer)["broker"]["workers"] == 1)
        assert time.monotonic() - died < SOON_S
        said = status(peer)
        assert {lease["name"][:6]: lease["worker"] is None for lease in said["leases"]} == {
            "played": True,
            "w": False,
        }
        assert said["broker"]["requeued"] >= 5
    assert client.receive(0.02) is None


def test_a_worker_that_leaves_is_out_at_once_and_its_lease_runs_on(peer: Peer, played: Played) -> None:
    assert len(listed(peer)) == 1
    assert played.leave().error is None
    assert listed(peer) == []
    said = status(peer)
    assert said["broker"]["workers"] == 0
    assert [lease["worker"] for lease in said["leases"]] == [None]
    assert failure(played.beat()).code == "not_ready"
    assert played.ready().error is None
    assert len(listed(peer)) == 1


def test_every_answer_to_a_worker_tells_the_time(played: Played) -> None:
    for answer in (played.ready(), played.beat(), played.leave()):
        assert answer.result["now_us"] > LAYOUT.epoch_us


def test_a_delegator_that_was_restarted_knows_its_workers_again(connect: Connect, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with contextlib.ExitStack() as workers:
        with delegating(url) as delegator:
            address = delegator.address
            for name in ("w1", "w2"):
                workers.enter_context(working(address, name))
            ready(connect(address), 2)
        with delegating(url, Wishes(), parse_endpoint(address, to_bind=True)):
            peer = connect(address)
            ready(peer, 2)
            assert sorted(listed(peer)) == ["w1", "w2"]
            client = connect(address, zmq.REQ)
            client.send(encode_request(1, "ids.next", [1, 2000]))
            assert result(client.receive())
            workers.close()  # who give their leases back to it


def test_what_is_under_way_when_the_delegator_stops_is_still_answered(connect: Connect) -> None:
    with delegating() as delegator:
        played = Played(connect(delegator.address))
        assert played.ready().error is None
        client = connect(delegator.address)
        msgid = client.request("ids.next", 1, 5000)
        tag, _ = played.take()
        delegator._waker.stopping = True
        until(lambda: delegator.service.draining)
        late = connect(delegator.address)
        late.request("ids.next", 1, 5000)
        assert failure(late.receive()).code == "unavailable"
        played.peer.send(tag, b"", encode_result(msgid, HONEST))
        assert result(client.receive()) == HONEST
