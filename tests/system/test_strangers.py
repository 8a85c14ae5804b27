"""The promises of daemons to peers that are not zflake's: answers if there is a request, and no harm otherwise."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import msgpack
import pytest
import zmq

import zflake
from tests.conftest import Connect
from tests.system.conftest import Cluster
from tests.system.daemons import WAIT_S, Daemon, resident_mb, status_of, until

GROWTH_MB: Final = 40.0
"""Megabytes that hostile input may make a daemon grow by: a few full socket buffers, and no more."""


def _request(method: Any, params: Any) -> bytes:
    packed: bytes = msgpack.packb([0, 7, method, params])
    return packed


def _nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


NEXT: Final = _request("ids.next", [1, 1000])
PARAMS: Final[list[Any]] = [[], [1], [1, 2, 3], {}, None, "params", [[1], [2]], [True, True]]
REQUESTS: Final[list[Any]] = [
    [],
    [0],
    [0, 1],
    [0, 1, "ping"],
    [0, -1, "ping", []],
    [0, 2**32, "ping", []],
    {},
    0,
    None,
    "x",
]
BODIES: Final[dict[str, list[bytes]]] = {
    "nothing": [b""],
    "truncated msgpack": [NEXT[:k] for k in range(1, len(NEXT))],
    "more than one value": [NEXT + b"\x00", NEXT + NEXT],
    "10,000 nested arrays": [_nested(10_000), NEXT[:-3] + _nested(10_000)],
    "huge lengths": [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ],
    "nested huge lengths": [b"\xdd\x00\xff\xff\xff" * 1000],
    "huge counts": [
        _request("ids.next", [count, 1000])
        for count in (0, -1, 10**9, 2**63, 2**64 - 1, -(2**63), 1.5, "1", None)
    ],
    "huge budgets": [
        _request("ids.next", [1, budget]) for budget in (-1, 2**63, 2**64 - 1, 1e300, "1000", None)
    ],
    "wrong params": [_request("ids.next", params) for params in PARAMS],
    "wrong requests": [msgpack.packb(request) for request in REQUESTS],
    "unknown methods": [
        _request(method, []) for method in ("", "nope", "ids.next ", "x" * 60_000, 5, None, b"ping")
    ],
    "leases of strangers": [
        _request("lease.acquire", [b"", "", "", 0, ""]),
        _request("lease.acquire", [bytes(16), "x" * 10_000, "", -1, "tcp://*:1"]),
        _request("lease.acquire", [bytes(16), "\x1b[2J", "", 0, ""]),
        _request("lease.renew", [2**63, bytes(16), 0, bytes(16)]),
        _request("lease.renew", [10**6, bytes(16), 1, bytes(16)]),
        _request("lease.release", [1, bytes(16), None, 2**64 - 1]),
        _request("lease.release", [-1, None, None, None]),
    ],
    "forged answers": [msgpack.packb([1, 7, None, [1, 1, 1]]), msgpack.packb([2, "ids.next", [1, 1]])],
    "a full frame": [b"\xc6\x00\x00\xff\x00" + bytes(0xFF00), bytes(65_536)],
    "more than a full frame": [bytes(65_537), bytes(10_000_000)],
}
"""Bodies that are no sound request to either daemon."""


def _random_bodies() -> Iterator[bytes]:
    draw = random.Random(2020)
    for _ in range(2_000):
        yield draw.randbytes(draw.choice((1, 2, 8, 40, 300)))
    for _ in range(2_000):
        spoilt = bytearray(NEXT)
        spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        yield bytes(spoilt)


@pytest.fixture(params=["delegator", "worker"])
def victim(request: pytest.FixtureRequest, cluster: Cluster) -> Daemon:
    return cluster.delegator if request.param == "delegator" else cluster.workers[0]


@pytest.fixture
def unharmed(cluster: Cluster, victim: Daemon) -> Iterator[None]:
    """After the test the daemon serves as before, has not grown much, and has logged no exception."""
    logged = len(victim.events())
    before = resident_mb(victim.pid)
    yield
    until(lambda: status_of(victim.address).get("pid") == victim.pid, "the daemon to answer")
    with zflake.Client(cluster.delegator.address) as client:
        assert len(set(client.next_ids(100))) == 100
    for worker in cluster.workers:
        with zflake.Client(worker.address, route="direct") as client:
            client.next_id()
    assert resident_mb(victim.pid) - before < GROWTH_MB
    bad = [
        e for e in victim.events()[logged:] if e["level"] in ("error", "critical", "stray") or "trace" in e
    ]
    assert not bad, bad


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_no_request_does_no_harm(kind: str, victim: Daemon, connect: Connect) -> None:
    for body in BODIES[kind]:
        peer = connect(victim.address)
        for frames in ([b"", body], [body], [b"a", b"", body], [b"", body, b""]):
            peer.send(*frames)
        # Behind it in the same pipe, unless that was closed for it.
        fine = connect(victim.address)
        assert fine.ask("ping").error is None


@pytest.mark.usefixtures("unharmed")
def test_random_bytes_do_no_harm(victim: Daemon, connect: Connect) -> None:
    peer = connect(victim.address)
    for body in _random_bodies():
        peer.send(b"", body)
    draw = random.Random(1)
    for _ in range(500):
        peer.send(*(draw.randbytes(draw.randrange(20)) for _ in range(draw.randrange(1, 12))))
    assert connect(victim.address).ask("ping").error is None


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "frames",
    [
        [b"x"] * 1_000,
        [b""] * 1_000,
        [b"x"] * 998 + [b"", NEXT],
        [b"", *[NEXT] * 999],
        [b"x"] * 5 + [b"", NEXT],
    ],
    ids=["full", "empty", "envelopes", "bodies", "one envelope too many"],
)
def test_a_thousand_frames_do_no_harm(frames: list[bytes], victim: Daemon, connect: Connect) -> None:
    peer = connect(victim.address)
    for _ in range(20):
        peer.send(*frames)
    assert peer.ask("ping").error is None, "the same connection serves on"


@pytest.mark.usefixtures("unharmed")
def test_bytes_that_are_not_even_zmtp_do_no_harm(victim: Daemon) -> None:
    host, port = victim.address.removeprefix("tcp://").split(":")
    greeting = b"\xff\0\0\0\0\0\0\0\1\x7f"
    draw = random.Random(5)
    for garbage in (
        b"GET / HTTP/1.1\r\nHost: zflake\r\n\r\n",
        b"\0" * 1_000,
        b"\xff" * 100_000,
        greeting + bytes(1_000),
        greeting + b"\3\1NULL" + b"\0" * 48 + b"\x04\xff\xff\xff\xff\xff\xff\xff\xff" + b"x" * 1_000,
        draw.randbytes(100_000),
        b"",
    ):
        for _ in range(10):
            with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
                try:
                    stranger.sendall(garbage)
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                except OSError:
                    pass  # it hung up on us, as it may


@pytest.mark.usefixtures("unharmed")
def test_who_asks_and_never_listens_costs_no_memory(victim: Daemon, connect: Connect) -> None:
    peer = connect(victim.address)
    body = _request("cluster.status", [])
    deadline = time.monotonic() + 3.0
    for _ in range(20_000):
        try:
            peer.socket.send_multipart([b"", body], zmq.NOBLOCK)
        except zmq.Again:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)


def _first_identity() -> int:
    """The number that libzmq gives the first peer without an identity, in a process that did not seed it."""
    code = (
        "import zmq; c = zmq.Context(); r = c.socket(zmq.ROUTER); d = c.socket(zmq.DEALER); r.bind('inproc://x');"
        "d.connect('inproc://x'); d.send(b''); print(int.from_bytes(r.recv()[1:]))"
    )
    return int(subprocess.check_output([sys.executable, "-c", code]))


@pytest.mark.usefixtures("unharmed")
def test_a_stranger_that_takes_the_identities_to_come_ends_no_daemon(
    victim: Daemon, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    first = _first_identity()
    with contextlib.ExitStack() as stack:
        for number in range(first + 40, first + 140):
            squatter = stack.enter_context(context.socket(zmq.DEALER))
            squatter.setsockopt(zmq.ROUTING_ID, b"\0" + (number % 2**32).to_bytes(4))
            assert _pinged(squatter, victim)
        for _ in range(2_000):
            with context.socket(zmq.DEALER) as nobody:
                assert _pinged(nobody, victim)


def _pinged(peer: zmq.Socket[bytes], daemon: Daemon) -> bool:
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(daemon.address)
    peer.send_multipart([b"", _request("ping", [])])
    return bool(peer.poll(int(WAIT_S * 1000)))


@pytest.mark.usefixtures("unharmed")
def test_a_request_that_can_be_read_is_answered_with_its_error(victim: Daemon, connect: Connect) -> None:
    peer = connect(victim.address)
    for body, expected, msgid in (
        (_request("ids.next", [10**9, 1000]), "bad_request", 7),
        (_request("ids.next", ["one", 1000]), "bad_request", 7),
        (_request("nope", []), "unknown_method", 7),
        (_request("ping", [1]), "bad_request", 7),
        (_request("ping", "no array"), "bad_request", 7),
        (NEXT[:-1], "bad_request", None),
        (b"\xc1", "bad_request", None),
        (_nested(10_000), "bad_request", None),
    ):
        peer.send(b"", body)
        response = peer.receive()
        assert response is not None
        assert response.error is not None
        assert (response.error.code, response.msgid) == (expected, msgid), body[:40]


# --- a client that is no library ---


def test_a_bare_req_socket_and_msgpack_are_a_client(
    cluster: Cluster, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    def ask(endpoint: str, method: str, params: list[Any]) -> Any:
        with context.socket(zmq.REQ) as req:
            req.connect(endpoint)
            req.send(msgpack.packb([0, 1, method, params]))
            assert req.poll(int(WAIT_S * 1000))
            return msgpack.unpackb(req.recv())

    (worker, *_) = ask(cluster.delegator.address, "cluster.workers", [])[3]["workers"]
    kind, msgid, error, (first, step, count) = ask(worker["address"], "ids.next", [50, 1000])
    assert (kind, msgid, error) == (1, 1, None)
    assert 1 <= count <= 50
    assert first > 0
    assert step == 1
    for daemon in cluster.all:
        kind, msgid, error, result = ask(daemon.address, "no.such.method", [])
        assert (kind, msgid, error[0], result) == (1, 1, "unknown_method", None)
