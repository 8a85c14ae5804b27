"""A delegator's figures, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from zflake.delegator.server import Delegator


def measure(delegator: Delegator) -> Iterator[Metric]:
    """The delegator's figures now; safe to call from any thread."""
    requests = CounterMetricFamily("zflake_delegator_requests", "Requests taken in.", labels=["method"])
    for method, count in dict(delegator.service.requests.by_method).items():
        requests.add_metric([method], count)
    yield requests
    errors = CounterMetricFamily(
        "zflake_delegator_errors", "Requests answered with an error.", labels=["code"]
    )
    for code, count in dict(delegator.service.requests.errors).items():
        errors.add_metric([code], count)
    yield errors
    yield CounterMetricFamily(
        "zflake_delegator_dropped",
        "Messages that could not be answered, and answers that could not be delivered.",
        delegator.service.requests.dropped,
    )
    yield CounterMetricFamily(
        "zflake_delegator_stale", "Lease requests dropped for their age.", delegator.executor.stale
    )
    broker = delegator.service.broker
    brokered = CounterMetricFamily(
        "zflake_delegator_brokered", "What became of ID requests that clients sent here.", labels=["outcome"]
    )
    for outcome, count in vars(broker.counts).items():
        brokered.add_metric([outcome], count)
    yield brokered
    yield GaugeMetricFamily("zflake_delegator_queued", "ID requests that wait for a worker.", broker.queued)
    yield GaugeMetricFamily("zflake_delegator_workers", "Workers that take brokered requests.", broker.open)
    yield GaugeMetricFamily(
        "zflake_delegator_backlog", "Lease requests that wait for the store.", delegator.executor.backlog
    )
    yield GaugeMetricFamily(
        "zflake_delegator_store_usable",
        "1 while the store can be used, 0 otherwise.",
        int(delegator.executor.outage is None),
    )
    yield GaugeMetricFamily(
        "zflake_delegator_leases", "Machine IDs that are held.", delegator.service.directory.count
    )
    yield GaugeMetricFamily(
        "zflake_delegator_lead_seconds",
        "How far the timeline is ahead of the wall.",
        delegator.clock.lead_us / 1e6,
    )
    meta = delegator.executor.meta
    yield GaugeMetricFamily(
        "zflake_delegator_machines",
        "Machine IDs that are leased out.",
        meta.last_machine - meta.first_machine + 1,
    )
