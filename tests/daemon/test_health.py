"""Probes and metrics over real HTTP, of a loop that the test stands in for."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from tests.conftest import until
from zflake.daemon import Liveness, health, liveness
from zflake.daemon.health import HealthServer
from zflake.errors import ConfigError


def measure() -> Iterator[Metric]:
    yield GaugeMetricFamily("zflake_test", "A figure.", 42)


@pytest.fixture
def beating() -> Liveness:
    return Liveness()


@pytest.fixture
def server(beating: Liveness) -> Iterator[HealthServer]:
    with HealthServer(("127.0.0.1", 0), beating, measure) as serving:
        yield serving


def ask(server: HealthServer, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, server.port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    said = response.status, response.read().decode()
    connection.close()
    return said


def test_a_daemon_is_ready_only_while_it_can_serve(server: HealthServer, beating: Liveness) -> None:
    assert ask(server, "/readyz")[0] == 503
    beating.turn(ready=True)
    assert ask(server, "/readyz") == (200, "ok\n")
    beating.turn(ready=False)
    assert ask(server, "/readyz")[0] == 503
    beating.turn(ready=True)
    beating.stop()
    assert ask(server, "/readyz")[0] == 503


def test_a_loop_that_hangs_does_not_live(
    server: HealthServer, beating: Liveness, monkeypatch: pytest.MonkeyPatch
) -> None:
    beating.turn(ready=True)
    assert ask(server, "/livez") == (200, "ok\n")
    monkeypatch.setattr(liveness, "ALIVE_S", 0.0)
    assert ask(server, "/livez") == (503, "not ok\n")
    assert ask(server, "/readyz")[0] == 503


def test_metrics_are_prometheus_text(server: HealthServer) -> None:
    status, text = ask(server, "/metrics")
    assert status == 200
    assert "zflake_test 42.0\n" in text
    assert "process_resident_memory_bytes" in text


def test_head_is_answered_without_a_body(server: HealthServer) -> None:
    assert ask(server, "/livez", "HEAD") == (200, "")


def test_another_path_says_which_there_are(server: HealthServer) -> None:
    assert ask(server, "/") == (404, "/livez, /readyz, /metrics\n")


def test_an_ipv6_address_is_served_as_well(beating: Liveness) -> None:
    with HealthServer(("::1", 0), beating, measure) as server:
        assert ask(server, "/livez", host="::1") == (200, "ok\n")
    with HealthServer(("::", 0), beating, measure) as server:
        assert ask(server, "/livez", host="::1") == ask(server, "/livez") == (200, "ok\n")


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_idle_connections_cost_neither_threads_nor_descriptors_without_bound(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 3600)
    ask(server, "/livez")
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(1000)]
        assert ask(server, "/livez") == (200, "ok\n")
        assert len(server.connections) <= health.MAX_CONNECTIONS
        assert [peer.recv(1) for peer in idle[: -health.MAX_CONNECTIONS]] == [b""] * (
            1000 - health.MAX_CONNECTIONS
        ), "the oldest are closed"
        assert threading.active_count() == threads
    until(lambda: not server.connections)


def test_a_peer_that_lets_a_byte_come_now_and_then_has_no_longer_than_others(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.1)
    with connect(server) as slow:

        def is_cut() -> bool:
            try:
                slow.sendall(b"G")
            except OSError:
                return True
            return False

        until(is_cut)


def test_a_peer_that_reads_no_answer_has_no_longer_than_others(
    beating: Liveness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.1)
    much = [GaugeMetricFamily(f"zflake_{number}", "A figure." * 1000, 1) for number in range(1000)]
    with HealthServer(("127.0.0.1", 0), beating, lambda: much) as server, connect(server) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        until(lambda: server.connections)
        until(lambda: not server.connections)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GET",
        b"\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"POST /livez HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\0\xff" * 9,
        b"\xff\xfe \0 \xfd\r\n\r\n",
        b"A" * 10 * health.MAX_HEAD_BYTES,
    ],
    ids=range(8),
)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_nonsense_and_a_peer_that_goes_are_no_news(
    server: HealthServer,
    body: bytes,
    reset: bool,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connect(server) as peer:
        peer.sendall(body)
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(server, "/livez") == (200, "ok\n")
    until(lambda: not server.connections)
    assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_what_is_no_request_is_told_what_is_one(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 3600)
    assert ask(server, "/livez", "POST")[0] == 400
    with connect(server) as peer:
        peer.sendall(b"A" * (health.MAX_HEAD_BYTES + 1))
        assert peer.recv(100).startswith(b"HTTP/1.1 400 ")


def test_the_server_s_own_errors_go_to_the_daemon_s_own_log(
    beating: Liveness, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> list[Metric]:
        raise RuntimeError("boom")

    with (
        caplog.at_level(logging.ERROR, "zflake.health"),
        HealthServer(("127.0.0.1", 0), beating, fail) as server,
    ):
        assert ask(server, "/metrics") == (500, "see the log\n")
        server._loop.call_soon_threadsafe(fail)
        until(lambda: len(caplog.records) > 1)
    assert {(record.name, record.exc_info is not None) for record in caplog.records} == {
        ("zflake.health", True)
    }
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_a_clear_error(server: HealthServer) -> None:
    with pytest.raises(ConfigError, match=f"can't serve HTTP at 127.0.0.1:{server.port}"):
        HealthServer(("127.0.0.1", server.port), Liveness(), measure)


def test_it_ends_also_if_it_is_told_to_before_it_has_begun(beating: Liveness) -> None:
    for _ in range(50):
        with HealthServer(("127.0.0.1", 0), beating, measure) as server:
            pass
        assert server._loop.is_closed()


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[socket.socket]:
    path = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield notify


def test_systemd_hears_of_ready_once_and_of_the_end(systemd: socket.socket) -> None:
    beating = Liveness()
    beating.turn(ready=False)
    beating.turn(ready=True)
    beating.turn(ready=True)
    beating.stop()
    assert [systemd.recv(100), systemd.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_the_watchdog_is_fed_from_the_loop(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    beating = Liveness()
    beating.turn(ready=False)
    assert systemd.recv(100) == b"WATCHDOG=1"


def test_another_process_watchdog_is_left_alone(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    Liveness().turn(ready=False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)
