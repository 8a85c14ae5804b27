"""A worker's figures, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from zflake.daemon.health import counts_by
from zflake.worker.server import Worker


def measure(worker: Worker) -> Iterator[Metric]:
    """The worker's figures now; safe to call from any thread."""
    handler, requests = worker.handler, worker.handler.requests
    yield CounterMetricFamily("zflake_worker_ids", "IDs minted.", handler.ids)
    yield CounterMetricFamily("zflake_worker_requests", "Requests taken in.", requests.taken)
    yield counts_by("zflake_worker_errors", "Requests answered with an error.", "code", requests.errors)
    yield CounterMetricFamily(
        "zflake_worker_dropped",
        "Messages that could not be answered, and answers that could not be delivered.",
        requests.dropped,
    )
    yield GaugeMetricFamily("zflake_worker_parked", "Requests that wait for the next tick.", handler.parked)
    yield GaugeMetricFamily(
        "zflake_worker_serving", "1 while a window is open, 0 otherwise.", int(worker.liveness.is_ready)
    )
    machine = GaugeMetricFamily("zflake_worker_machine", "The machine ID that is held.")
    if worker.machine is not None:
        machine.add_metric([], worker.machine)
    yield machine
