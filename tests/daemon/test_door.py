"""A daemon's door: shut before peers have taken what the daemon needs, open again once some have gone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Connect, serving, until
from tests.daemon.tools import delegating, result
from zflake.core.layout import DEFAULT
from zflake.daemon import door
from zflake.daemon.door import MAX_PEERS, RESERVE, Crowd, most_peers
from zflake.delegator.server import Delegator
from zflake.wire import sockets
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig


def test_the_reserve_is_for_the_daemon_and_few_descriptors_are_shared_with_the_peers() -> None:
    assert most_peers(1024) == 1024 - RESERVE
    assert most_peers(64) == 32
    assert most_peers(10**6) == MAX_PEERS
    assert sockets.BACKLOG <= RESERVE // 2, (
        "those whom the kernel has accepted come in after the door is shut"
    )


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(0, 120))))
def test_the_door_is_shut_at_the_most_and_not_opened_before_some_have_gone(
    most: int, moves: list[tuple[bool, int]]
) -> None:
    crowd, inside = Crowd(most), set[int]()
    for comes, descriptor in moves:
        was_full = crowd.full
        if comes:
            crowd.come(descriptor)
            inside.add(descriptor)
        else:
            crowd.go(descriptor)
            inside.discard(descriptor)
        assert len(crowd) == len(inside)
        if len(inside) >= most:
            assert crowd.full
        if was_full and not crowd.full:
            assert len(inside) <= most - max(1, most // 16)
        if not inside:
            assert not crowd.full


def test_one_peer_that_comes_and_goes_does_not_move_the_door() -> None:
    crowd = Crowd(64)
    for descriptor in range(64):
        crowd.come(descriptor)
    moves = []
    for _ in range(100):
        crowd.go(5)
        moves.append(crowd.full)
        crowd.come(5)
    assert all(moves)


# --- real sockets ---


@contextlib.contextmanager
def connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            each = stack.enter_context(socket.socket())
            each.setblocking(False)
            each.connect_ex((host.strip("[]"), int(port)))
            made.append(each)
        yield made


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_PEERS", 20)


@pytest.mark.usefixtures("few")
def test_a_full_delegator_serves_who_is_there_and_takes_others_once_there_is_room(
    context: zmq.Context[zmq.Socket[bytes]], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with delegating() as delegator:
        inside = connect(delegator.address)
        result(inside.ask("ping"))
        with connections(delegator.address, 19):
            until(lambda: delegator._door.crowd.full, "the door to be shut")
            outside = connect(delegator.address)
            asked = outside.request("ping")
            assert outside.receive(0.3) is None
            for _ in range(10):
                result(inside.ask("ping"))
            assert len(delegator._door.crowd) == 20
        answer = outside.receive()
        assert answer is not None
        assert answer.msgid == asked
        assert delegator.address == sockets.address_of(delegator._router), "at the port that it had"
    said = [record.message for record in caplog.records if "peers are connected" in record.message]
    assert len(said) == 1, "and the other way not within ten seconds"


@pytest.mark.usefixtures("few")
def test_a_full_worker_serves_who_is_there(connect: Connect) -> None:
    bind = parse_endpoint("tcp://127.0.0.1:*", to_bind=True)
    config = WorkerConfig((), bind, machine=5, layout=DEFAULT)
    with serving(lambda waker: Worker(config, waker)) as worker:
        inside = connect(worker.address)
        result(inside.ask("ping"))
        with connections(worker.address, 19):
            until(lambda: worker._door.crowd.full, "the door to be shut")
            outside = connect(worker.address)
            outside.request("ping")
            assert outside.receive(0.3) is None
            result(inside.ask("ids.next", 1, 1000))
        assert outside.receive() is not None


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:*", "ipc://{}"])
def test_peers_are_counted_however_they_go(
    bind: str, connect: Connect, tmp_path_factory: pytest.TempPathFactory
) -> None:
    endpoint = parse_endpoint(bind.format(tmp_path_factory.mktemp("d") / "s"), to_bind=True)
    with delegating(bind=endpoint) as delegator:
        peers = [connect(delegator.address) for _ in range(5)]
        for peer in peers:
            result(peer.ask("ping"))
        until(lambda: len(delegator._door.crowd) == 5)
        peers[0].socket.close(linger=0)
        peers[1].send(b"", b"x" * 100_000)  # for which it is cut off, and comes again
        until(lambda: len(delegator._door.crowd) == 4)
        for peer in peers[1:]:
            peer.socket.close(linger=0)
        until(lambda: not len(delegator._door.crowd))


def test_a_peer_that_never_speaks_or_never_listens_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 300)
    monkeypatch.setattr(sockets, "STUCK_MS", 1_000)
    with delegating() as delegator:
        with connections(delegator.address, 3):
            until(lambda: len(delegator._door.crowd) == 3)
            until(lambda: not len(delegator._door.crowd), "the ones that never speak to be let go")
        _never_listens(delegator)


def _never_listens(delegator: Delegator) -> None:
    host, port = delegator.address.removeprefix("tcp://").rsplit(":", 1)
    greeting = b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\5READY\x0bSocket-Type\0\0\0\6DEALER"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(greeting + bytes([4, len(ready)]) + ready)
        heard = b""
        while b"READY" not in heard:
            heard += deaf.recv(100)
        hello = bytes.fromhex("94000aa568656c6c6f90")
        deaf.settimeout(0.1)
        with contextlib.suppress(OSError):
            while True:
                deaf.sendall((b"\1\0" + bytes([0, len(hello)]) + hello) * 50)
        until(lambda: not len(delegator._door.crowd), "the one that never listens to be let go")
