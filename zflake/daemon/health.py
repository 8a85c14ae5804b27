"""`/livez`, `/readyz` and `/metrics` over HTTP, in a thread of their own.

A probe reads what the loop has left behind and never waits for it: a loop that hangs shows as one that
does not live, not as a probe that hangs too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from zflake.daemon.liveness import Liveness
from zflake.errors import ConfigError


def counts_by(name: str, what: str, label: str, counts: Mapping[str, int]) -> Metric:
    """A counter for each of `counts`, which another thread may add to meanwhile."""
    metric = CounterMetricFamily(name, what, labels=[label])
    for value, count in dict(counts).items():
        metric.add_metric([value], count)
    return metric


class _Facts(Collector):
    def __init__(self, measure: Callable[[], Iterable[Metric]]) -> None:
        self._measure = measure

    def collect(self) -> Iterable[Metric]:
        return self._measure()


class _Handler(BaseHTTPRequestHandler):
    timeout = 5
    server: HealthServer
    server_version = "zflake"
    sys_version = ""

    def do_GET(self) -> None:
        liveness = self.server.liveness
        match self.path:
            case "/livez":
                self._say(liveness.is_alive)
            case "/readyz":
                self._say(liveness.is_alive and liveness.is_ready)
            case "/metrics":
                self._send(HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.server.registry))
            case _:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"/livez, /readyz, /metrics\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _say(self, good: bool) -> None:  # noqa: FBT001
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, "text/plain", b"ok\n" if good else b"not ok\n")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: probes come every few seconds."""


class HealthServer(ThreadingHTTPServer):
    """Serves probes and metrics at `(host, port)`; a context manager.

    `measure` gives the metrics; it is called in this server's threads.

    Raises `ConfigError` if the address can't be bound.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], liveness: Liveness, measure: Callable[[], Iterable[Metric]]
    ) -> None:
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise ConfigError(f"can't serve HTTP at {address[0]}:{address[1]}: {error.strerror}") from error
        self.liveness = liveness
        self.registry = CollectorRegistry()
        self.registry.register(_Facts(measure))
        ProcessCollector(registry=self.registry)
        self._thread = threading.Thread(target=self.serve_forever, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
