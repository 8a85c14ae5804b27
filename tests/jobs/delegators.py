"""A job for several delegators: a cluster on one store, the faults that strike it, and the check of what was taken.

What is special to a store, its servers and what can happen to them, is in engines.py.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

from tests.jobs import job
from tests.jobs.checker import Lease, Verdict, check_eras, read_runs
from tests.jobs.job import JOB_S, Report
from tests.jobs.outages import (
    End,
    Outage,
    cut_short,
    gaps_of,
    outages_between,
    tick_at,
    tick_of,
    unexcused,
)
from tests.servers import Server, free_port
from tests.system.daemons import WAIT_S, Daemon, Daemons, status_of
from zflake.core.loss import MARGIN_MS, REST_MS

DELEGATORS: Final = 3
WORKERS: Final = 6
TIMEOUT_S: Final = 5.0
"""Seconds that a client's call has."""
AGAIN_S: Final = 15.0
"""How long it may take at most, on a busy machine, until leases are granted again."""
DUE_S: Final = 7.0
"""Seconds past a third of a ttl, after which a holder renews; they count instead if that is later."""
REST_S: Final = (REST_MS + MARGIN_MS) / 1000
"""How long a store rests that may have forgotten, if no ttl is longer than `REST_MS`."""
LOST: Final = re.compile(r"lost machine (\d+)")

Strike: TypeAlias = Callable[[str], None]
"""Has a fault strike, which is told its name."""


@dataclass(kw_only=True)
class Fault(job.Fault):
    """One fault, and what came of it; it is over when what it took away comes back."""

    tick: int
    """When it struck."""
    since_s: float
    """The time to measure from (monotonic clock): when it struck, or enough of what it took away came back."""
    within_s: float
    """Seconds from then until leases are granted again, at most."""
    before: int
    """How many leases had been logged by then."""
    stops: bool = False
    """Whether all windows may end before it is over."""
    granted_s: float | None = None
    """Seconds until the next lease was granted."""
    settled_s: float | None = None
    """Seconds until every holder had been granted one."""

    @property
    def violations(self) -> list[str]:
        """Those of any fault, and that it took too long until leases were granted again, if so."""
        found = super().violations
        if self.granted_s is not None and self.granted_s > self.within_s:
            found.append(f"no lease for {self.granted_s:.1f} s after: {self.what}")
        return found


@dataclass
class Result:
    """The outcome of a job; sound if nothing is in `violations`."""

    engine: str
    wanted: int
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    faults: list[Fault] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    grants: Counter[str] = field(default_factory=Counter)
    """Grants of each delegator."""
    notes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ids = self.verdict.ids
        lines = [
            f"{self.seconds:.1f} s, {ids / max(self.seconds, 1e-9):,.0f} IDs/s, faults and all",
            *(self._fault_line(what) for what in sorted({fault.what for fault in self.faults})),
            *(f"{name}: {count:,} grants" for name, count in sorted(self.grants.items())),
            *self._outage_lines(),
            *(f"{note}, {count} times" for note, count in sorted(self.notes.items())),
            str(self.verdict),
        ]
        title = f"engine job on {self.engine}: {ids:,} of {self.wanted:,} IDs"
        sound = "all distinct, all inside their windows, no call failed while a window was open"
        return job.told(title, lines, self.violations, sound)

    def _outage_lines(self) -> list[str]:
        if not (outages := self.outages):
            return []
        longest_s = max(end - start for start, end in (outage.gap for outage in outages)) / 1000
        failed = sum(outage.failed for outage in outages)
        return [
            f"no window, {len(outages)} times, for {longest_s:.1f} s at most; {failed} calls failed",
            f"  the last ID {max(outage.ended_ms for outage in outages)} ms before at most",
            f"  the next one {max(outage.began_ms for outage in outages)} ms after at most",
        ]

    def _fault_line(self, what: str) -> str:
        faults = [fault for fault in self.faults if fault.what == what]
        granted = max((f.granted_s for f in faults if f.granted_s is not None), default=None)
        settled = max((f.settled_s for f in faults if f.settled_s is not None), default=None)
        return (
            f"fault: {what}, {len(faults)} times"
            + ("" if granted is None else f"; granted again after {granted:.1f} s at most")
            + ("" if settled is None else f", to all after {settled:.1f} s")
        )


class Job(job.Job):
    """One job on one store; what is special to that is left to the classes derived from this."""

    name: ClassVar[str]
    ttl_s: ClassVar[int] = 10
    faults: list[Fault]  # type: ignore[assignment]

    def __init__(
        self, daemons: Daemons, ids: int, *, draw: random.Random, rate: int, ttl_s: int | None, report: Report
    ) -> None:
        super().__init__(daemons, draw, report)
        self.result = Result(self.name, ids, faults=self.faults, violations=self.violations)
        self.servers: list[Server] = []
        self.url = ""
        self.leases: list[Lease] = []
        """The leases that delegators logged, in the order in which it was read."""
        self.eras: list[tuple[int, int]] = [(0, 0)]
        """The lease, and the tick, at which each life of the store began that has forgotten something of the one before."""
        self.forgotten: set[int] = set()
        """The leases that a life of the store has forgotten, by their places in `leases`."""
        self._ended: list[End] = []
        self._rate, self._ttl_s = rate, ttl_s or self.ttl_s
        self._endpoints = [f"tcp://127.0.0.1:{free_port()}" for _ in range(DELEGATORS)]
        self._present: list[Daemon] = []  # of the delegators, one for each endpoint
        self._read: dict[Path, int] = {}
        self._offset_us = 0

    @property
    def endpoints(self) -> list[str]:
        return self._endpoints

    def holders(self) -> dict[str, int]:
        """The names of those who hold a lease now, and their machine IDs."""
        return {lease["name"]: lease["machine"] for lease in self._status().get("leases", ())}

    # --- what is special to a store ---

    def start_servers(self) -> str:
        """Start the servers; gives the URL of the store."""
        raise NotImplementedError

    def faults_of_store(self) -> Mapping[str, Strike]:
        """The faults of the servers."""
        raise NotImplementedError

    # --- the job ---

    def run(self, faults: Sequence[str] | None, *, patient: bool) -> None:
        """Start, have faults strike until there are so many IDs, stop."""
        self._start()
        known: dict[str, Strike] = {
            "worker killed and replaced": self._kill_worker,
            **{
                f"delegator {k + 1} killed and restarted": partial(self._kill_delegator, k)
                for k in range(DELEGATORS)
            },
            **self.faults_of_store(),
        }
        left = list(faults or ())
        first = True
        while left or (faults is None and (first or self.taken < self.result.wanted)):
            if not left:
                left = self.draw.sample(list(known), len(known))
                first = False
            what = left.pop(0)
            known[what](what)
            self._settle(patient=patient)
        self.wait_for_ids(self.result.wanted, "all IDs", JOB_S)
        self.result.seconds = time.monotonic() - self._began
        self.stop(self._present)
        self.look()
        self._complain()

    def check(self) -> Result:
        """Check what was taken against what was granted."""
        result = replace(self.result, violations=[*self.result.violations])
        runs = read_runs(sorted(self.daemons.folder.glob("*.runs")))
        bounds = [*(begin for begin, _ in self.eras), len(self.leases)]
        eras = [self.leases[i:j] for i, j in itertools.pairwise(bounds)]
        result.verdict = check_eras(eras, runs)
        result.violations += result.verdict.violations
        if (ids := result.verdict.ids) < result.wanted:
            result.violations.append(f"{ids} IDs were taken, not {result.wanted}")
        result.outages = outages_between(gaps_of(self.leases, self._ended, self.forgotten), runs)
        result.violations += cut_short(result.outages)
        result.violations += unforeseen(result.outages, result.faults)
        for client in self.clients:
            result.violations += unexcused(
                client.process.name, client.errors, result.outages, self._offset_us
            )
        for fault in result.faults:
            result.violations += fault.violations
        return result

    # --- faults ---

    def _kill_worker(self, what: str) -> None:
        victim = self.draw.choice(self.present)
        holders = self.wait(self.holders, "a delegator to answer")
        self.strike(what)
        self.kill(victim)
        self.look()
        self._ended.append((holders[victim.name], self.tick(), len(self.leases)))
        self.join(WAIT_S + REST_S)
        self.back()

    def _kill_delegator(self, k: int, what: str) -> None:
        self.do_without(what, self._present[k].kill)
        self._start_delegator(k)

    def do_without(self, what: str, kill: Callable[[], object]) -> None:
        """Kill one of several, and wait until the others have granted a lease; then it may come back."""
        fault = self.strike(what)
        kill()
        self.wait(lambda: fault.granted_s is not None, f"a lease from those that are left: {what}")
        self.pause(self.draw.uniform(0.0, 1.0))
        self.back()

    def strike(self, what: str, *, within_s: float = AGAIN_S, stops: bool = False) -> Fault:
        """Note that a fault strikes now."""
        self.look()
        fault = Fault(
            what,
            self.taken,
            tick=self.tick(),
            since_s=time.monotonic(),
            within_s=max(within_s, self._ttl_s / 3 + DUE_S),
            before=len(self.leases),
            stops=stops,
        )
        self.faults.append(fault)
        self.report(f"{fault.at:,} IDs: {what}")
        return fault

    def back(self) -> None:
        """Note that what the fault took away comes back."""
        self.faults[-1].over = self.taken

    def _settle(self, *, patient: bool) -> None:
        """Wait until all is as it was before the fault."""
        fault = self.faults[-1]
        if patient:
            self.wait(lambda: fault.settled_s is not None, "leases for every worker", WAIT_S + REST_S)
            self.wait(self._is_at_rest, "all delegators to grant, all workers to hold", WAIT_S + REST_S)
        # Last, for windows may have run out meanwhile: the next fault is to strike while IDs are taken.
        before = [client.taken for client in self.clients]
        self.wait(
            lambda: (
                all(c.taken > taken for c, taken in zip(self.clients, before, strict=True))
                or (not patient and self.taken > sum(before))
            ),
            f"IDs for each client after: {fault.what}",
            WAIT_S + REST_S,
        )
        self.report(
            f"{self.taken:,} IDs: over"
            + ("" if fault.granted_s is None else f", granted again after {fault.granted_s:.1f} s")
        )

    def _is_at_rest(self) -> bool:
        names = {worker.name for worker in self.present}
        statuses = map(status_of, self.endpoints)
        return all(
            status.get("granting_in_ms") == 0 and names <= {lease["name"] for lease in status["leases"]}
            for status in statuses
        )

    # --- parts ---

    def _start(self) -> None:
        self.url = self.start_servers()
        self.report(f"servers of {self.name} run: {self.url}")
        for k in range(DELEGATORS):
            self._start_delegator(k)
        for _ in range(WORKERS):
            self.start_worker()
        self.wait(lambda: self.holders().keys() >= {w.name for w in self.workers}, "all workers to hold")
        status = self.wait(self._status, "a delegator to answer")
        self._offset_us = int(status["now_us"] - time.monotonic() * 1e6)
        self.start_clients(rate=self._rate, timeout_s=TIMEOUT_S)
        self._began = time.monotonic()

    def _start_delegator(self, k: int) -> None:
        daemon = self.daemons.delegator(
            *("--store", self.url),
            name=f"delegator-{k + 1}-{len(self.delegators)}",
            bind=self.endpoints[k],
            new=not self.delegators,
            ttl=f"{self._ttl_s}s",
        )
        self.delegators.append(daemon)
        self._present[k : k + 1] = [daemon]
        self.wait(daemon.find_address, f"{daemon.name} to serve")

    def _status(self) -> dict[str, Any]:
        """The status of a delegator that answers; empty if none does."""
        return next(filter(None, map(status_of, self.endpoints)), {})

    def tick(self) -> int:
        """The timeline's now."""
        return tick_at(time.monotonic(), self._offset_us)

    def said(self, words: str) -> int:
        """How many lines of the delegators' logs have these words."""
        return sum(daemon.said(words) for daemon in self.delegators)

    def _complain(self) -> None:
        daemons = [*self.delegators, *self.workers]
        self.violations += job.complaints(daemons, expected=[""])
        if errors := sum(event["level"] == "error" for daemon in daemons for event in daemon.events()):
            self.result.notes["a delegator logged an error of a store that was away"] += errors
        self._note_losses()

    def _note_losses(self) -> None:
        """Note who was told that its lease is lost, which only a store that has forgotten may say."""
        ahead_ms = self.tick() - tick_of(datetime.now(UTC))
        losses = 0
        for worker in self.workers:
            for event in worker.events():
                if found := LOST.match(event["message"]):
                    losses += 1
                    tick = tick_of(datetime.fromisoformat(event["time"])) + ahead_ms
                    logged = max(begin for begin, since in self.eras if since <= tick)
                    self._ended.append((int(found[1]), tick, logged))
        if losses and len(self.eras) == 1:
            self.violations.append(f"workers were told {losses} times that their leases are lost")
        elif losses:
            self.result.notes["a holder was told that its lease is lost"] += losses

    def look(self) -> None:
        """Take in what delegators have logged since, and note what it says of the last fault."""
        for daemon in self.delegators:
            path = daemon.log_path
            if path.stat().st_size <= (offset := self._read.get(path, 0)):
                continue
            with path.open("rb") as log:
                log.seek(offset)
                fresh = log.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read[path] = offset + len(whole)
            for line in whole.splitlines():
                if b'"lease"' in line and (lease := json.loads(line).get("lease")):
                    self.leases.append(tuple(lease))
                    self.result.grants[daemon.name.rpartition("-")[0]] += lease[0] != "released"
        if not self.faults or (fault := self.faults[-1]).settled_s is not None:
            return
        granted = {lease[1] for lease in self.leases[fault.before :] if lease[0] != "released"}
        after_s = time.monotonic() - fault.since_s
        if granted and fault.granted_s is None:
            fault.granted_s = after_s
        if granted and len(granted) >= len(self.present):
            fault.settled_s = after_s


def unforeseen(outages: Iterable[Outage], faults: Sequence[Fault]) -> list[str]:
    """The outages that the fault before them does not explain."""
    found = []
    for outage in outages:
        start, end = outage.gap
        before = [fault for fault in faults if fault.tick <= start]
        if not before or not before[-1].stops:
            after = before[-1].what if before else "nothing at all"
            found.append(f"no window for {(end - start) / 1000:.1f} s after: {after}")
    return found
