"""What a delegator says of itself and of its cluster: the results of hello, cluster.workers and cluster.status."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from zflake.core import lessor
from zflake.core.lease import Record
from zflake.delegator.broker import Broker
from zflake.delegator.desk import LeaseDesk
from zflake.delegator.directory import Directory
from zflake.delegator.timepiece import Timepiece
from zflake.holder.clock import local_us
from zflake.version import __version__
from zflake.wire.messages import PROTOCOL_VERSION

GONE_US: Final = 60_000_000
"""After how long without a mark a delegator is shown no more."""


@dataclass
class Figures:
    """What the process has done since it started."""

    requests: Counter[str] = field(default_factory=Counter)
    """Requests taken in, by method."""
    errors: Counter[str] = field(default_factory=Counter)
    """Errors answered, by code."""
    dropped: int = 0
    """Messages that could not be answered, and answers that nobody took."""


@dataclass(frozen=True)
class Report:
    """The parts of a delegator that others want to know of."""

    address: str
    store_url: str
    started_us: int
    timepiece: Timepiece
    desk: LeaseDesk
    directory: Directory
    broker: Broker
    figures: Figures
    leases_at: Callable[[], int]
    """Up to which tick the leases are known here."""

    def ping(self) -> dict[str, Any]:
        """The timeline's now."""
        return {"now_us": self.timepiece.now_us()}

    def hello(self) -> dict[str, Any]:
        """Who this is."""
        meta = self.desk.meta
        return {
            "service": "delegator",
            "protocol": PROTOCOL_VERSION,
            "version": __version__,
            "layout": meta.layout.to_map(),
            "store_id": meta.store_id,
            "address": self.address,
            "pid": os.getpid(),
            "uptime_ms": (local_us() - self.started_us) // 1000,
            **self.ping(),
        }

    def workers(self) -> dict[str, Any]:
        """The directory."""
        now = self.timepiece.tick()
        there = self.directory.workers(self.leases_at(), local_us())
        workers = [self._lease(record, now) for record, _ in there if record.holder.address]
        return {"workers": workers, **self.ping()}

    def status(self) -> dict[str, Any]:
        """Everything, for people and monitoring."""
        now, meta = self.timepiece.tick(), self.desk.meta
        return self.hello() | {
            "store": self.store_url,
            "ttl_ms": meta.ttl * meta.layout.tick_ms,
            "machines": [meta.first_machine, meta.last_machine],
            "outage": None if (outage := self.desk.outage) is None else outage.message,
            "granting_in_ms": lessor.resting_ms(meta, now),
            "lead_ms": self.timepiece.lead_us // 1000,
            "delegators": list(self._delegators()),
            "leases": list(self._leases(now)),
            "broker": {
                "workers": self.broker.open,
                "queued": self.broker.queued,
                **vars(self.broker.figures),
            },
            "backlog": self.desk.backlog,
            "stale": self.desk.stale,
            "dropped": self.figures.dropped,
            "requests": dict(self.figures.requests),
            "errors": dict(self.figures.errors),
        }

    def _delegators(self) -> Iterator[dict[str, Any]]:
        """Who has been writing marks of late, this one first."""
        now_us, own = self.timepiece.now_us(), self.timepiece.mark()
        others = [mark for mark in self.timepiece.marks if mark.delegator != own.delegator]
        for mark in [own, *others]:
            if now_us - mark.now_us < GONE_US:
                yield {
                    "name": mark.delegator,
                    "address": mark.address,
                    "marked_ms_ago": max(0, now_us - mark.now_us) // 1000,
                    "lead_ms": mark.lead_us // 1000,
                }

    def _leases(self, now: int) -> Iterator[dict[str, Any]]:
        known_at = self.leases_at()
        present = {record.machine: there for record, there in self.directory.workers(known_at, local_us())}
        for record in self.directory.held(known_at):
            there = present.get(record.machine)
            worker = None
            if there is not None:
                worker = there.load | {"in_flight": self.broker.in_flight(there.identity)}
            yield self._lease(record, now) | {"worker": worker}

    def _lease(self, record: Record, now: int) -> dict[str, Any]:
        return {
            "machine": record.machine,
            "address": record.holder.address,
            "name": record.holder.name,
            "host": record.holder.host,
            "pid": record.holder.pid,
            "gen": record.gen,
            "ends_in_ms": max(0, record.fence - now) * self.desk.meta.layout.tick_ms,
        }
