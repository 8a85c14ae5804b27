"""`/livez`, `/readyz` and `/metrics` over HTTP, in a thread of their own.

A probe reads what the loop has left behind and never waits for it: a loop that hangs shows as one that
does not live, not as a probe that hangs too.

One thread and a bounded number of file descriptors serve all peers.  A connection is good for one request, and has
`REQUEST_S` seconds in all, however often its peer lets a byte come.  The oldest connection makes room for a new one:
peers that hold many open can't keep a probe from its answer, which takes a moment.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from zflake.daemon.liveness import Liveness
from zflake.errors import ConfigError

REQUEST_S: Final = 5.0
"""Seconds that a connection lives at most, in which the request comes and the answer goes."""
MAX_CONNECTIONS: Final = 128
"""Connections that are open at once; one more closes the oldest."""
ACCEPTED: Final = 32
"""Connections accepted at a time; fewer than may be open, so that none is closed before it was read."""
WAITING_PROBES: Final = 1024
"""Connections that may wait to be accepted; the system makes those above wait for a second and more."""
MAX_HEAD_BYTES: Final = 8192

_PATHS: Final = b"/livez, /readyz, /metrics\n"

_log = logging.getLogger("zflake.health")


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


class _Exchange(asyncio.Protocol):
    """A connection: one request, one answer."""

    _transport: asyncio.Transport

    def __init__(self, server: HealthServer) -> None:
        self._server = server
        self._request = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        connections = self._server.connections
        connections[transport] = asyncio.get_running_loop().call_later(REQUEST_S, transport.abort)
        if len(connections) > MAX_CONNECTIONS:
            oldest = next(iter(connections))
            connections.pop(oldest).cancel()
            oldest.abort()

    def connection_lost(self, _error: Exception | None) -> None:
        if (deadline := self._server.connections.pop(self._transport, None)) is not None:
            deadline.cancel()

    def data_received(self, data: bytes) -> None:
        self._request += data
        head, end, _ = self._request.partition(b"\r\n\r\n")
        if end or len(self._request) > MAX_HEAD_BYTES:
            line = head.partition(b"\r\n")[0]
            status, kind, body = self._server.answer(line)
            said = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self._transport.write(said.encode() + (b"" if line.startswith(b"HEAD ") else body))
            self._transport.close()


class HealthServer:
    """Serves probes and metrics at `(host, port)`; a context manager.

    `measure` gives the metrics; it is called in this server's thread.

    Raises `ConfigError` if the address can't be bound.
    """

    def __init__(
        self, address: tuple[str, int], liveness: Liveness, measure: Callable[[], Iterable[Metric]]
    ) -> None:
        is_ipv6 = ":" in address[0]
        family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        try:
            # As ZeroMQ does it, `::` is every interface of IPv4 as well.
            self._listener = socket.create_server(address, family=family, dualstack_ipv6=is_ipv6)
        except OSError as error:
            raise ConfigError(f"can't serve HTTP at {address[0]}:{address[1]}: {error.strerror}") from error
        self.port: int = self._listener.getsockname()[1]
        self.connections: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        """The connections, oldest first, each with the timer that ends it."""
        self._liveness = liveness
        self._registry = CollectorRegistry()
        self._registry.register(_Facts(measure))
        ProcessCollector(registry=self._registry)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_complain)
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def answer(self, line: bytes) -> tuple[HTTPStatus, str, bytes]:
        """Status, type and body of the answer to a request line."""
        match line.split(b" "):
            case [b"GET" | b"HEAD", b"/livez", _]:
                return _said(good=self._liveness.is_alive)
            case [b"GET" | b"HEAD", b"/readyz", _]:
                return _said(good=self._liveness.is_alive and self._liveness.is_ready)
            case [b"GET" | b"HEAD", b"/metrics", _]:
                try:
                    return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)
                except Exception:  # noqa: BLE001  (the daemon goes on, whatever is wrong with a figure)
                    _log.exception("can't give the metrics")
                    return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"see the log\n"
            case [b"GET" | b"HEAD", _, _]:
                return HTTPStatus.NOT_FOUND, "text/plain", _PATHS
        return HTTPStatus.BAD_REQUEST, "text/plain", b"GET or HEAD " + _PATHS

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await self._loop.create_server(
            lambda: _Exchange(self), sock=self._listener, backlog=ACCEPTED
        )
        self._listener.listen(WAITING_PROBES)  # asyncio has one number for both
        await self._ending.wait()
        server.close()
        for transport in list(self.connections):
            transport.abort()
        await asyncio.sleep(0)


def _said(*, good: bool) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "text/plain", b"ok\n" if good else b"not ok\n"


def _complain(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the loop's, such as that no file descriptor is left, in the daemon's own format."""
    _log.error("%s", context["message"], exc_info=context.get("exception"))
