"""A delegator's account of itself and of its cluster: the results of hello, cluster.workers and cluster.status."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from zflake.core import loss
from zflake.core.lease import Record
from zflake.delegator.broker import Broker
from zflake.delegator.directory import Directory
from zflake.delegator.executor import LeaseExecutor
from zflake.keys import Callers
from zflake.version import __version__
from zflake.wire.callers import ANYONE, Caller, sees_all
from zflake.wire.codec import pack_result
from zflake.wire.dispatch import METHODS, Requests
from zflake.wire.methods import PROTOCOL_VERSION, Method

KEPT_US: Final = 1_000_000
"""Microseconds for which a result is kept for others that ask."""
GONE_US: Final = 60_000_000
"""Microseconds without a mark after which a delegator is shown no more."""


class Kept:
    """Results that are built and packed once for all who ask, until the directory changes, for `KEPT_US` at most.

    They cost far more to build than to ask for, and anyone may ask.
    """

    def __init__(self, directory: Directory) -> None:
        self.turn = 0
        """How often the results were dropped."""
        self._directory = directory
        self._packed: dict[object, bytes] = {}
        self._changes = self._until_us = 0

    def get(self, key: object, build: Callable[[], Any], local_us: int) -> bytes:
        """The packed result under that key."""
        if local_us >= self._until_us or self._changes != self._directory.changes:
            self._packed.clear()
            self._changes, self._until_us = self._directory.changes, local_us + KEPT_US
            self.turn += 1
        packed = self._packed.get(key)
        if packed is None:
            packed = self._packed[key] = pack_result(build())
        return packed


@dataclass(frozen=True)
class Report:
    """The parts of a delegator that people and peers want to know of; to ask changes none of them."""

    executor: LeaseExecutor
    directory: Directory
    broker: Broker
    requests: Requests
    authorized: Callers | None
    """Those who may come; None in a cluster without keys."""
    leases_at: Callable[[], int]
    """Gives the tick up to which the leases are known here."""
    started_us: int

    def ping(self, _caller: Caller = ANYONE) -> dict[str, Any]:
        """The timeline's now."""
        return {"now_us": self.executor.clock.timeline_us()}

    def heard(self) -> dict[str, Any]:
        """The answer to a worker's sign of life; in a cluster with keys it says when to ask for the callers again."""
        return self.ping() if self.authorized is None else self.ping() | {"version": self.authorized.version}

    def callers(self, _caller: Caller = ANYONE) -> dict[str, Any]:
        """Those who may ask a worker for IDs, and the version of that list."""
        authorized = self.authorized
        if authorized is None:
            return self.heard() | {"callers": []}
        roles = METHODS[Method.IDS_NEXT].callers
        callers = [[c.key, c.name, str(c.role)] for c in authorized.by_key.values() if c.role in roles]
        return self.heard() | {"callers": callers}

    def name_of(self, key: str) -> str:
        """The name that people know a key by; the key itself if it is not authorized now."""
        caller = None if self.authorized is None else self.authorized.by_key.get(key)
        return key if caller is None else caller.name

    def hello(self, caller: Caller = ANYONE) -> dict[str, Any]:
        """The delegator's identity: its layout and its store, and for those who see all also its process."""
        clock, meta = self.executor.clock, self.executor.meta
        hello = {
            "service": "delegator",
            "protocol": PROTOCOL_VERSION,
            "layout": meta.layout.to_map(),
            "store_id": meta.store_id,
            **self.ping(),
        }
        if sees_all(caller):
            hello |= {
                "version": __version__,
                "address": clock.address,
                "pid": os.getpid(),
                "uptime_ms": (clock.local_us() - self.started_us) // 1000,
            }
        return hello

    def workers(self, turn: int) -> dict[str, Any]:
        """The directory: of more workers than fit on a page, those whose `turn` it is."""
        clock = self.executor.clock
        now = clock.tick()
        there = self.directory.workers(self.leases_at(), clock.local_us(), turn)
        workers = [
            self._lease(record, now, record.holder.key) for record, _ in there if record.holder.address
        ]
        return {"workers": workers, **self.ping()}

    def status(self, at: int) -> dict[str, Any]:
        """Everything, for people and monitoring, with the page of the leases that begins at `at`."""
        clock, meta = self.executor.clock, self.executor.meta
        now = clock.tick()
        return self.hello() | {
            "store": self.executor.store_url,
            "ttl_ms": meta.ttl * meta.layout.tick_ms,
            "machines": [meta.first_machine, meta.last_machine],
            "outage": None if (outage := self.executor.outage) is None else outage.message,
            "granting_in_ms": loss.resting_ms(meta, now),
            "lead_ms": clock.lead_us // 1000,
            "delegators": list(self._delegators()),
            "held": self.directory.count,
            "leases": list(self._leases(now, at)),
            "next": self.directory.end_of(at),
            "broker": {
                "workers": self.broker.open,
                "queued": self.broker.queued,
                **vars(self.broker.counts),
            },
            "backlog": self.executor.backlog,
            "stale": self.executor.stale,
            "dropped": self.requests.dropped,
            "requests": dict(self.requests.by_method),
            "errors": dict(self.requests.errors),
            "denied": dict(self.requests.denied),
            "limited": dict(self.requests.limited),
        }

    def _delegators(self) -> Iterator[dict[str, Any]]:
        """The delegators that have written marks of late, this one first."""
        clock = self.executor.clock
        timeline_us, own = clock.timeline_us(), clock.mark()
        others = [mark for mark in clock.marks.latest if mark.delegator != own.delegator]
        for mark in [own, *others]:
            if timeline_us - mark.timeline_us < GONE_US:
                yield {
                    "name": mark.delegator,
                    "address": mark.address,
                    "marked_ms_ago": max(0, timeline_us - mark.timeline_us) // 1000,
                    "lead_ms": mark.lead_us // 1000,
                }

    def _leases(self, now: int, at: int) -> Iterator[dict[str, Any]]:
        known_at, local_us = self.leases_at(), self.executor.clock.local_us()
        for record in self.directory.held(known_at, at):
            worker, load = self.directory.worker(record.machine, known_at, local_us), None
            if worker is not None:
                load = worker.load | {"in_flight": self.broker.in_flight(worker.identity)}
            yield self._lease(record, now, self.name_of(record.holder.key)) | {"worker": load}

    def _lease(self, record: Record, now: int, key: str) -> dict[str, Any]:
        """A lease as it is shown, with its key, or the key's name, in a cluster that has keys."""
        shown = {"key": key} if key else {}
        return shown | {
            "machine": record.machine,
            "address": record.holder.address,
            "name": record.holder.name,
            "host": record.holder.host,
            "pid": record.holder.pid,
            "gen": record.gen,
            "ends_in_ms": max(0, record.fence - now) * self.executor.meta.layout.tick_ms,
        }
