"""A process that runs out of descriptors: it is told so, never ended, and goes on once there are some."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Scripts, serving, until
from tests.embedded.conftest import ANY
from tests.embedded.conftest import delegator as leasing
from tests.holder.test_lease_client import Table
from zflake import Client, Unavailable, clock
from zflake.client import transport
from zflake.core.lease import Holder
from zflake.holder.lease_client import LeaseClient
from zflake.wire import sockets
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig

CHILD: Final = """
import os, resource, sys, time
import zflake

make = {
    "client": lambda: zflake.Client(sys.argv[2], timeout=20),
    "generator": lambda: zflake.LeasedGenerator(sys.argv[2], timeout=20),
}[sys.argv[1]]
opened = lambda: len(os.listdir("/proc/self/fd"))
before = opened()
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
for left in range(13):
    while opened() > before:  # what the last one had is closed in other threads
        time.sleep(0.01)
    with make() as ids:
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for _ in range(left):
            os.close(taken.pop())
        for _ in range(3):
            try:
                ids.next_id()
            except zflake.Unavailable as error:
                assert "ulimit -n" in str(error), error
            else:
                raise AssertionError(left)
        for descriptor in taken:
            os.close(descriptor)
        ids.next_id()
        print(left)
"""


@pytest.fixture(scope="module")
def delegator() -> Iterator[str]:
    with leasing() as serves:
        config = WorkerConfig([parse_endpoint(serves.address)], ANY)
        with serving(lambda waker: Worker(config, waker)), Client(serves.address) as ids:
            until(ids.next_id)
            yield serves.address


@pytest.mark.parametrize("kind", ["client", "generator"])
def test_with_any_few_descriptors_left_a_call_is_told_so_and_the_next_works_once_they_are_free(
    kind: str, delegator: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, delegator], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(left) for left in range(13)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Short of descriptors while there is something in the list."""
    shortage: list[bool] = []
    check = sockets.check_descriptors

    def checked() -> None:
        monkeypatch.setattr(sockets, "DESCRIPTORS", 10**6 if shortage else 16)
        check()

    for module in (sockets, transport):
        monkeypatch.setattr(module, "check_descriptors", checked)
    return shortage


def test_a_local_shortage_is_never_blamed_on_an_endpoint(delegator: str, short: list[bool]) -> None:
    with Client(delegator) as ids:
        ids.next_id()
        before = {e: (h.failures, h.ejected_until) for e, h in ids._balancer._health.items()}
        ids._transport.after_fork()  # no line is left
        short.append(True)
        for _ in range(5):
            with pytest.raises(Unavailable, match="ulimit"):
                ids.next_id()
        assert {e: (h.failures, h.ejected_until) for e, h in ids._balancer._health.items()} == before
        short.clear()
        ids.next_id()


def test_a_holder_that_can_not_connect_anew_keeps_its_lease_and_tries_again(
    context: zmq.Context[zmq.Socket[bytes]], script: Scripts, short: list[bool]
) -> None:
    table = Table()
    client = LeaseClient(context, [parse_endpoint(script(table).address)], Holder("me", "here", 7))

    def held() -> Any:
        client.service(clock.local_us())
        return client.lease.is_open

    until(held)
    connection = client.lease.connection
    client.lease._go_on()
    short.append(True)
    for _ in range(5):
        assert held()
    short.clear()
    asked = len(table.asked)
    until(lambda: held() and len(table.asked) > asked)
    assert client.lease.connection > connection
    client.close()
