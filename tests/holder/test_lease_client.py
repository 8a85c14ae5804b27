"""The socket under a lease conversation: connections that are given up, a delegator that comes late, a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Script, Scripts, until
from tests.holder.test_lease import Desk, Scene
from zflake import clock
from zflake.core.lease import Holder
from zflake.holder.lease_client import LeaseClient
from zflake.wire.codec import encode_request
from zflake.wire.endpoint import parse_endpoint

ME: Final = Holder("me", "here", 7)
NOWHERE: Final = "tcp://127.0.0.1:1"


class Table(Desk):
    """A scripted delegator for a real socket."""

    def __init__(self) -> None:
        super().__init__(Scene())

    def __call__(self, method: str, params: list[Any], msgid: int) -> bytes | None:
        self._scene.local_us = clock.local_us()
        return self.answer(encode_request(msgid, method, params))


@pytest.fixture
def make(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., LeaseClient]]:
    made: list[LeaseClient] = []

    def make(*places: Script | str) -> LeaseClient:
        texts = [place if isinstance(place, str) else place.address for place in places]
        made.append(LeaseClient(context, [parse_endpoint(text) for text in texts], ME))
        return made[-1]

    yield make
    for client in made:
        client.close()


def serve(client: LeaseClient, condition: Callable[[], Any]) -> None:
    def served() -> Any:
        client.service(clock.local_us())
        return condition() or (client.socket.poll(2) and condition())

    until(served)


def give_up(client: LeaseClient) -> None:
    """Let the answer under way be given up, and the next request be due."""
    client.lease._answer_by_us = client.lease._hold_until_us = 0
    client.service(clock.local_us())


def test_it_takes_a_lease_over_its_socket_and_gives_it_back(
    make: Callable[..., LeaseClient], script: Scripts
) -> None:
    table = Table()
    client = make(script(table))
    serve(client, lambda: client.lease.is_open)
    client.release(clock.local_us() + 5_000_000)
    assert [method for method, _ in table.asked] == ["hello", "lease.acquire", "lease.release"]


def test_each_client_begins_at_an_endpoint_of_its_own(
    make: Callable[..., LeaseClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(below: int) -> int:
        drawn.append(below)
        return 1

    monkeypatch.setattr("zflake.holder.lease_client.secrets.randbelow", draw)
    client = make(NOWHERE, "tcp://127.0.0.1:2")
    assert (drawn, client.lease.endpoint.port) == ([2], 2)


def test_a_connection_that_is_given_up_is_closed_with_what_was_under_way(
    make: Callable[..., LeaseClient], script: Scripts
) -> None:
    table = Table()
    table.silent = True
    client = make(script(table))
    serve(client, lambda: table.calls("lease.acquire"))
    before = client.socket
    give_up(client)
    assert before.closed
    assert client.socket is not before
    table.silent = False
    serve(client, lambda: client.lease.is_open)


def test_a_delegator_that_comes_later_is_found(
    make: Callable[..., LeaseClient], script: Scripts, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    probe = context.socket(zmq.ROUTER)
    address = f"tcp://127.0.0.1:{probe.bind_to_random_port('tcp://127.0.0.1')}"
    probe.close(linger=0)
    client = make(address)
    client.service(clock.local_us())
    give_up(client)

    def binds() -> bool:
        try:
            script(Table(), address)
        except zmq.ZMQError:  # the system has not let go of the port yet
            return False
        return True

    until(binds)
    serve(client, lambda: client.lease.is_open)


@pytest.mark.parametrize(
    ("refuse", "why"), [(None, "no delegator answers"), (("unavailable", 500), "because")]
)
def test_release_gives_up_by_its_deadline_and_says_why(
    make: Callable[..., LeaseClient],
    script: Scripts,
    caplog: pytest.LogCaptureFixture,
    refuse: tuple[str, int | None] | None,
    why: str,
) -> None:
    table = Table()
    client = make(script(table))
    serve(client, lambda: client.lease.is_open)
    table.silent, table.refuse = refuse is None, refuse
    began = time.monotonic()
    client.release(clock.local_us() + 300_000)
    assert 0.25 < time.monotonic() - began < 1.5
    assert "machine 3 was not given back" in caplog.text
    assert why in caplog.text


def test_a_release_of_nothing_waits_for_no_answer(make: Callable[..., LeaseClient]) -> None:
    client = make(NOWHERE)
    began = time.monotonic()
    client.release(clock.local_us() + 5_000_000)
    assert time.monotonic() - began < 1
