"""The promises that clients keep while parts of a cluster freeze, drown, restart, or are not what they should be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import zmq

import zflake
from tests.conftest import Script
from tests.engines.several import Watch
from tests.system import flood
from tests.system.conftest import Cluster, start_cluster
from tests.system.daemons import (
    WAIT_S,
    Daemon,
    Daemons,
    complaint,
    counts_of,
    environment,
    names_of,
    printed,
    ready_at,
    status_of,
    until,
)
from zflake.client.balancer import ROUTES
from zflake.core.layout import DEFAULT
from zflake.wire.codec import decode_response, encode_request

BUDGET_S: Final = 5.0


def _await_worker(worker: Daemon, delegator: Daemon) -> None:
    until(lambda: worker.name in ready_at(delegator), f"{worker.name} to be ready")


# --- frozen ---


def _ask_all(endpoint: str, requests: int, sent: threading.Barrier) -> list[tuple[Any, float]]:
    """Ask over as many lone REQ sockets at once; the answers, and after how many seconds each came."""
    answers: list[tuple[Any, float]] = []
    sockets: list[zmq.Socket[bytes]] = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        poller = zmq.Poller()
        for k in range(requests):
            req = context.socket(zmq.REQ)
            sockets.append(req)
            req.connect(endpoint)
            poller.register(req, zmq.POLLIN)
            req.send(encode_request(k, "ids.next", (1, int(BUDGET_S * 1000))))
        sent.wait(WAIT_S)
        began = time.monotonic()
        while len(answers) < requests and time.monotonic() < began + BUDGET_S + 2.0:
            for req, _ in poller.poll(50):
                answers.append((decode_response(req.recv()), time.monotonic() - began))
                poller.unregister(req)
    finally:
        for req in sockets:
            req.close(linger=0)
        context.term()
    return answers


def test_with_one_of_two_workers_frozen_every_brokered_request_is_answered(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2)
    frozen, other = cluster.workers
    frozen.signal(signal.SIGSTOP)
    sent = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(_ask_all, cluster.delegator.address, 50, sent) for _ in range(4)]
        answers = [answer for asked in asking for answer in asked.result()]
    assert len(answers) == 200
    assert [response.error for response, _ in answers if response.error] == []
    assert max(seconds for _, seconds in answers) < BUDGET_S
    assert len({response.result[0] for response, _ in answers}) == 200
    facts = status_of(cluster.delegator.address)
    assert facts["broker"]["requeued"] > 0, "the frozen worker had some of them"
    assert ready_at(cluster.delegator) == {other.name}
    # Thawed, it is given requests again, and what it answers too late goes to no client.
    frozen.signal(signal.SIGCONT)
    _await_worker(frozen, cluster.delegator)
    strays = until(
        lambda: status_of(cluster.delegator.address).get("broker", {}).get("strays"), "the late answers"
    )
    assert strays <= facts["broker"]["requeued"]


# --- flooded ---


@pytest.mark.timeout(120)
def test_a_flood_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = flood.run(tmp_path, 3.0)
    assert not result.violations, str(result)


# --- restarted ---


def test_rolling_restarts_fail_no_call_by_any_route(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2)
    delegator = cluster.delegator
    replaced: list[Daemon] = []
    ids: list[int] = []

    def take(client: zflake.Client) -> None:
        ids.extend([client.next_id(), *client.next_ids(10)])

    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for route in ROUTES:
            client = zflake.Client(delegator.address, route=route, timeout=BUDGET_S)
            calls[route] = partial(take, stack.enter_context(client))
        watch = stack.enter_context(Watch(calls, pause_s=0.001))
        watch.go_on()
        for old in cluster.workers:
            assert old.terminate() == 0
            replaced.append(daemons.worker(name=f"new-{old.name}", to=delegator))
            _await_worker(replaced[-1], delegator)
            watch.go_on()
        for how in (signal.SIGTERM, signal.SIGKILL):
            delegator.signal(how)
            assert delegator.wait() == (0 if how is signal.SIGTERM else -how)
            delegator = daemons.delegator(
                name=f"after-{how.name}", bind=delegator.address, new=False, ttl="30s"
            )
            for worker in replaced:
                _await_worker(worker, delegator)
            watch.go_on()
    assert watch.errors == []
    assert max(watch.slowest.values()) < BUDGET_S
    assert len(set(ids)) == len(ids)


# --- strangers at an endpoint ---


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(4096):
                self.request.sendall(data)


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _tcp_server(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _nonsense() -> Iterator[str]:
    """A ZeroMQ service that answers everything, and never as zflake would."""
    with zmq.Context() as context:
        script = Script(context, lambda *_: b"Hello, world")
        try:
            yield script.address
        finally:
            script.stop()


class _Quiet(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


STRANGERS: Final[dict[str, Callable[[], contextlib.AbstractContextManager[str]]]] = {
    "echo": lambda: _tcp_server(_Quiet(("127.0.0.1", 0), _Echo)),
    "web": lambda: _tcp_server(ThreadingHTTPServer(("127.0.0.1", 0), _Web)),
    "nonsense": _nonsense,
}


@pytest.fixture(params=STRANGERS)
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The endpoint of a service that is not zflake's."""
    with STRANGERS[request.param]() as endpoint:
        yield endpoint


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_of_a_stranger_is_told_where_it_went(stranger: str, route: str) -> None:
    with (
        zflake.Client(stranger, route=route, timeout=0.3) as client,
        pytest.raises((zflake.Timeout, zflake.ProtocolError)) as caught,
    ):
        client.next_id()
    assert stranger in str(caught.value)


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_gets_past_a_stranger_among_its_endpoints(
    stranger: str, route: str, cluster: Cluster
) -> None:
    began = time.monotonic()
    with zflake.Client([stranger, cluster.delegator.address], route=route, timeout=BUDGET_S) as client:
        assert len({client.next_id() for _ in range(20)}) == 20
    assert time.monotonic() - began < BUDGET_S


@pytest.mark.parametrize("kind", ["web", "nonsense"])
def test_the_tool_says_in_one_line_that_a_stranger_is_one(kind: str) -> None:
    with STRANGERS[kind]() as endpoint:
        for argv in (["next"], ["status"]):
            assert endpoint in complaint(*argv, "--to", endpoint, "--timeout", "300ms")


def test_a_worker_gets_past_the_strangers_among_its_delegators(daemons: Daemons) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger()) for stranger in STRANGERS.values()]
        delegator = daemons.delegator()
        address = delegator.address
        delegator.kill()
        flags = [flag for endpoint in strangers for flag in ("--delegator", endpoint)]
        worker = daemons.worker(*flags, "--delegator", address)

        def has_met_one() -> bool:
            warnings = [event["message"] for event in worker.events() if event["level"] == "warning"]
            return any(stranger in warning for warning in warnings for stranger in strangers)

        until(has_met_one, "it to meet a stranger")
        delegator = daemons.delegator(name="again", bind=address, new=False)
        _await_worker(worker, delegator)
        with zflake.Client(delegator.address, route="broker") as client:
            assert len(set(client.next_ids(100))) == 100
        assert worker.terminate() == 0


def test_a_worker_that_takes_a_worker_for_its_delegator_says_so_and_serves_nobody(
    cluster: Cluster, daemons: Daemons
) -> None:
    (other, *_) = cluster.workers
    worker = daemons.worker(to=other)
    assert worker.address
    until(lambda: worker.said("rejected delegator"), "it to say so")
    (warning,) = (event["message"] for event in worker.events() if event["level"] == "warning")
    assert other.address in warning
    with (
        zflake.Client(worker.address, route="direct", timeout=0.5) as client,
        pytest.raises((zflake.LeaseExpired, zflake.Timeout)) as caught,
    ):
        client.next_id()
    assert worker.address in str(caught.value)
    assert worker.name not in names_of(cluster.delegator)
    with zflake.Client(other.address, route="direct") as client:
        client.next_id()
    assert worker.terminate() == 0


# --- addresses that are wrong ---


@pytest.fixture(params=["closed", "silent", "stranger"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address at which no worker can be reached."""
    if request.param == "stranger":
        with _nonsense() as endpoint:
            yield endpoint
        return
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "closed":
            server.close()
        yield address


def test_a_worker_out_of_reach_is_reached_through_the_broker(unreachable: str, daemons: Daemons) -> None:
    delegator = daemons.delegator()
    worker = daemons.worker("--advertise", unreachable, to=delegator)
    _await_worker(worker, delegator)
    for route in ("auto", "broker"):
        began = time.monotonic()
        with zflake.Client(delegator.address, route=route, timeout=BUDGET_S) as client:
            ids = [client.next_id() for _ in range(20)]
            ids += client.next_ids(10_000)
        assert len(set(ids)) == 10_020
        assert time.monotonic() - began < BUDGET_S
    with (
        zflake.Client(delegator.address, route="direct", timeout=0.8) as client,
        pytest.raises((zflake.Timeout, zflake.Unavailable, zflake.ProtocolError)) as caught,
    ):
        client.next_id()
    assert unreachable in str(caught.value)


def test_two_workers_of_one_address_give_distinct_ids(daemons: Daemons) -> None:
    delegator = daemons.delegator()
    first = daemons.worker(to=delegator)
    second = daemons.worker("--advertise", first.address, to=delegator)
    for worker in (first, second):
        _await_worker(worker, delegator)
    ids: list[int] = []
    for route in ROUTES:
        with zflake.Client(delegator.address, route=route, timeout=BUDGET_S) as client:
            ids += [client.next_id() for _ in range(100)]
            ids += client.next_ids(20_000)
    assert len(set(ids)) == len(ids)
    assert len({DEFAULT.decompose(id_).machine for id_ in ids}) == 2, "the broker knows both"
    assert printed("status", "--to", delegator.address).count(first.address) == 2


# --- the tool ---


@pytest.mark.parametrize("route", ROUTES)
def test_next_takes_ids_by_every_route(route: str, cluster: Cluster) -> None:
    before = counts_of(cluster.delegator.address)["broker"]["brokered"]
    ids = printed("next", "-n", "5000", "--route", route, "--to", cluster.delegator.address)
    assert len(set(ids.split())) == 5000
    brokered = counts_of(cluster.delegator.address)["broker"]["brokered"] - before
    assert bool(brokered) == (route == "broker")


def test_next_by_the_broker_of_a_worker_is_one_clear_line(cluster: Cluster) -> None:
    (worker, *_) = cluster.workers
    line = complaint("next", "--route", "broker", "--to", worker.address, "--timeout", "500ms")
    assert "needs a delegator" in line
    assert worker.address in line


def test_status_tells_what_the_broker_and_each_worker_do(cluster: Cluster) -> None:
    to = ("--to", cluster.delegator.address)
    facts = json.loads(printed("status", "--json", *to))
    assert facts["broker"]["workers"] == 2
    assert {"queued", "brokered", "requeued", "refused", "expired", "strays"} <= set(facts["broker"])
    for lease in facts["leases"]:
        assert {"ids", "in_flight", "parked", "errors"} <= set(lease["worker"])
    shown = printed("status", *to)
    assert "2 workers" in shown
    assert shown.count(" ready") == 2


ON_TERMINAL: Final = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if the tests themselves run in the background
os.close(os.open(os.ttyname(0), os.O_RDWR))  # a session's first terminal is the one whose Ctrl-C it hears
os.execv(sys.executable, [sys.executable, "-m", "zflake", *sys.argv[1:]])
"""


class Terminal:
    def __init__(self, *argv: str) -> None:
        self.screen = b""
        self._master, slave = os.openpty()
        fcntl.ioctl(
            slave, termios.TIOCSWINSZ, struct.pack("HHHH", 200, 200, 0, 0)
        )  # holds all leases of the shared cluster
        os.set_blocking(self._master, False)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment({"TERM": "xterm"}),
            start_new_session=True,
        )
        os.close(slave)

    def shows(self, *words: str) -> bool:
        """Whether all these words have come, since the last `press`."""
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.screen += data
        return all(word.encode() in self.screen for word in words)

    def press(self, key: bytes) -> None:
        self.screen = b""
        os.write(self._master, key)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _ended(terminal: Terminal) -> bool:
    terminal.shows()  # a full terminal would hold it up
    return terminal.process.poll() is not None


def test_status_watch_shows_the_workers_until_ctrl_c(cluster: Cluster) -> None:
    with closing(Terminal("status", "--watch", "--to", cluster.delegator.address)) as terminal:
        names = [worker.name for worker in cluster.workers]
        until(lambda: terminal.shows(*names, "broker:", "IDs/s", "ready"), "the table of workers")
        terminal.press(b"")
        until(lambda: terminal.shows(*names), "the next look")
        terminal.press(b"\x03")
        until(lambda: _ended(terminal), "the end")
        assert terminal.process.returncode == 0
        assert not terminal.shows("Traceback")
        assert not terminal.shows("Aborted")


def test_status_watch_waits_out_an_outage(daemons: Daemons) -> None:
    delegator = daemons.delegator()
    argv = ("status", "--watch", "--timeout", "300ms", "--to", delegator.address)
    with closing(Terminal(*argv)) as terminal:
        until(lambda: terminal.shows("broker:"), "the first look")
        delegator.kill()
        terminal.press(b"")
        until(lambda: terminal.shows("no answer from"), "the outage to be shown")
        again = daemons.delegator(name="again", bind=delegator.address, new=False)
        assert again.address == delegator.address
        terminal.press(b"")
        until(lambda: terminal.shows("broker:"), "the delegator to be shown again")
        terminal.press(b"\x03")
        until(lambda: _ended(terminal), "the end")
        assert terminal.process.returncode == 0


# --- a store that is gone for good ---


def test_a_client_goes_on_where_its_cluster_goes_on_with_another_store(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=1, ttl="1s")
    delegator, (worker,) = cluster.delegator, cluster.workers
    clients = [zflake.Client(delegator.address, route=route, timeout=10) for route in ROUTES]
    before = [client.next_id() for client in clients]
    for daemon in cluster.all:
        daemon.kill()
    for path in daemons.folder.glob("store.db*"):
        path.unlink()
    second = daemons.delegator(ttl="1s", bind=delegator.address)
    daemons.worker("--bind", worker.address, to=second)
    after = [client.next_id() for client in clients]
    assert len({*before, *after}) == 2 * len(ROUTES)
    for client in clients:
        client.close()
