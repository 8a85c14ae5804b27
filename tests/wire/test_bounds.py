"""What one peer can make the other side hold: a few messages, whether anyone wants them or not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import zmq

from tests.conftest import WAIT_S
from zflake.wire import sockets
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.frames import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES
from zflake.wire.sockets import UNREAD, UNREAD_ANSWERS, UNTAKEN, address_of, bound_router, connecting

KERNELS: Final = 16 * 1024 * 1024
"""Bytes that the kernel may have of either side's: the sender's part is the sender's."""
ANY: Final = parse_endpoint("tcp://127.0.0.1:*", to_bind=True)


@pytest.fixture
def stack(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[contextlib.ExitStack]:
    """For sockets, which are closed in the end."""
    context.linger = 0
    with contextlib.ExitStack() as stack:
        yield stack


def stuffed(send: Callable[[], Any], most: int) -> int:
    """How many messages can be sent to a side that reads none; `most` is more than it should be."""
    sent, until = 0, time.monotonic() + WAIT_S
    quiet_until = time.monotonic() + 0.5
    while sent < most and time.monotonic() < min(until, quiet_until):
        try:
            send()
        except zmq.Again:
            time.sleep(0.005)
            continue
        sent += 1
        quiet_until = time.monotonic() + 0.5
    return sent


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER])
def test_a_server_can_not_fill_an_idle_client(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, stack: contextlib.ExitStack
) -> None:
    server = stack.enter_context(context.socket(zmq.ROUTER))
    server.setsockopt(zmq.ROUTER_MANDATORY, 1)
    server.setsockopt(zmq.SNDHWM, 1)
    server.setsockopt(zmq.SNDBUF, 4096)
    server.bind("tcp://127.0.0.1:*")
    endpoint = parse_endpoint(address_of(server))
    client = stack.enter_context(connecting(context, kind, endpoint))
    client.connect(endpoint.text)
    client.send_multipart([b"", b"hello"] if kind == zmq.DEALER else [b"hello"])
    identity = server.recv_multipart()[0]
    size = MAX_RESPONSE_BYTES
    most = 2 * (UNREAD_ANSWERS + KERNELS // size)
    sent = stuffed(lambda: server.send_multipart([identity, b"", bytes(size)], zmq.NOBLOCK), most)
    assert sent < UNREAD_ANSWERS + KERNELS // size


def test_a_peer_can_not_fill_a_server_that_is_busy(
    context: zmq.Context[zmq.Socket[bytes]], stack: contextlib.ExitStack
) -> None:
    server = stack.enter_context(bound_router(context, ANY))
    peer = stack.enter_context(context.socket(zmq.DEALER))
    peer.setsockopt(zmq.SNDHWM, 1)
    peer.setsockopt(zmq.SNDBUF, 4096)
    peer.connect(address_of(server))
    size = MAX_REQUEST_BYTES
    sent = stuffed(lambda: peer.send_multipart([b"", bytes(size)], zmq.NOBLOCK), 1_000)
    assert sent * size < (2 * UNREAD) * size + 8 * sockets.KERNEL_BYTES


def test_a_server_keeps_so_many_answers_for_a_peer_that_reads_none_and_no_fewer_than_are_promised(
    context: zmq.Context[zmq.Socket[bytes]], stack: contextlib.ExitStack
) -> None:
    server = stack.enter_context(bound_router(context, ANY))
    peer = stack.enter_context(context.socket(zmq.DEALER))
    peer.setsockopt(zmq.RCVHWM, 1)
    peer.setsockopt(zmq.RCVBUF, 4096)
    peer.connect(address_of(server))
    peer.send_multipart([b"", b"hello"])
    identity = server.recv_multipart()[0]

    def send() -> None:
        assert sockets.send(server, [identity, b""], bytes(1000)) or _again()

    kept = 2 * 2 * sockets.KERNEL_BYTES // 1000
    sent = stuffed(send, 3_000)
    assert UNTAKEN // 2 <= sent < 2 * UNTAKEN + kept
    with contextlib.suppress(zmq.Again):
        for _ in range(sent):
            peer.setsockopt(zmq.RCVTIMEO, 1000)
            peer.recv_multipart()
    assert sockets.send(server, [identity, b""], b"again")


def _again() -> bool:
    raise zmq.Again
