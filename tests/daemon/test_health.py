"""Probes and metrics over real HTTP, of a loop that the test stands in for."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from zflake.daemon import Liveness, liveness
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


def ask(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
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


def test_a_port_in_use_is_a_clear_error(server: HealthServer) -> None:
    with pytest.raises(ConfigError, match=f"can't serve HTTP at 127.0.0.1:{server.server_port}"):
        HealthServer(("127.0.0.1", server.server_port), Liveness(), measure)


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
