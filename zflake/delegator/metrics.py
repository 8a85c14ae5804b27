"""A delegator's figures, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from zflake.daemon.health import counts_by
from zflake.delegator.server import Delegator


def measure(delegator: Delegator) -> Iterator[Metric]:
    """The delegator's figures now; safe to call from any thread."""
    service, executor = delegator.service, delegator.executor
    requests, broker, meta = service.requests, service.broker, executor.meta
    yield counts_by("zflake_delegator_requests", "Requests taken in.", "method", requests.by_method)
    yield counts_by("zflake_delegator_errors", "Requests answered with an error.", "code", requests.errors)
    yield counts_by("zflake_delegator_denied", "Requests denied, by the key's name.", "key", requests.denied)
    what = "Requests refused for a limit of their key, by its name."
    yield counts_by("zflake_delegator_limited", what, "key", requests.limited)
    yield CounterMetricFamily(
        "zflake_delegator_handshakes_refused",
        "Connections refused, of keys that are not authorized.",
        delegator.refused,
    )
    yield CounterMetricFamily(
        "zflake_delegator_dropped",
        "Messages that could not be answered, and answers that could not be delivered.",
        requests.dropped,
    )
    yield CounterMetricFamily(
        "zflake_delegator_stale", "Lease requests dropped for their age.", executor.stale
    )
    what = "What became of ID requests that clients sent here."
    yield counts_by("zflake_delegator_brokered", what, "outcome", vars(broker.counts))
    yield GaugeMetricFamily("zflake_delegator_queued", "ID requests that wait for a worker.", broker.queued)
    yield GaugeMetricFamily("zflake_delegator_workers", "Workers that take brokered requests.", broker.open)
    yield GaugeMetricFamily(
        "zflake_delegator_backlog", "Lease requests that wait for the store.", executor.backlog
    )
    usable = int(executor.outage is None)
    yield GaugeMetricFamily(
        "zflake_delegator_store_usable", "1 while the store can be used, 0 otherwise.", usable
    )
    leases = service.directory.count
    yield GaugeMetricFamily("zflake_delegator_leases", "Machine IDs that are held.", leases)
    lead_s = executor.clock.lead_us / 1e6
    yield GaugeMetricFamily(
        "zflake_delegator_lead_seconds", "How far the timeline is ahead of the wall.", lead_s
    )
    machines = meta.last_machine - meta.first_machine + 1
    yield GaugeMetricFamily("zflake_delegator_machines", "Machine IDs that are leased out.", machines)
