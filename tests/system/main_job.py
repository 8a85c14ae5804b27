"""The main job: many IDs through a cluster whose parts are killed, replaced and frozen meanwhile.

A delegator, three workers and four clients, each a process of its own; two of the clients ask workers
directly, two have the delegator pass their requests on, unless all are told to go by one route.  There are no more machine IDs than
workers, so that whoever joins must take over a machine ID that somebody else has minted with.  Faults are
paced by progress: each strikes at a share of the IDs, and the clients go on taking.

    worker killed     SIGKILL; its replacement gets its machine ID once the window has run out
    delegator killed  SIGKILL, twice; it comes back on the same file and the same port
    worker frozen     SIGSTOP for longer than its window; another takes its machine ID over meanwhile, so
                      that it finds its lease lost, waits, and takes the machine ID when the other leaves
"""

from __future__ import annotations

import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.system.checker import check
from tests.system.daemons import POLL_S, WAIT_S, Daemon, Daemons, Process, TookTooLong, names_of, status_of
from zflake.core.layout import DEFAULT

CLIENTS: Final = 4
HALF: Final = "half"
"""Half of the clients by the route `auto`, which finds the workers, and half by `broker`."""
MACHINES: Final = "0-2"
TTL_S: Final = 2
OUTAGES_S: Final = (0.3, 1.2)
"""How long the delegator is away, its start not counted; with that the second may outlast some windows."""
IDS_PER_S: Final = 100_000
"""How fast a big job may go, at most: it must last until all faults have struck."""
LEAST_S: Final = 10.0
JOB_S: Final = 600.0
"""By how much longer than planned a job may take."""
REPORT_S: Final = 5.0


@dataclass
class Fault:
    """One fault: what, and how many IDs had been taken when it struck and when it was over."""

    what: str
    at: int
    over: int = 0


@dataclass
class Result:
    """What became of a job; sound where nothing is in `violations`."""

    expected: int
    ids: int = 0
    seconds: float = 0.0
    check_seconds: float = 0.0
    windows: int = 0
    by_route: Counter[str] = field(default_factory=Counter)
    brokered: int = 0
    """How many requests went through a delegator, those of its last instants before a kill aside."""
    by_machine: Counter[int] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"main job: {self.ids:,} of {self.expected:,} IDs in {self.seconds:.1f} s",
            *(f"  fault: {f.what}, at {f.at:,} IDs, over at {f.over:,}" for f in self.faults),
            f"  windows checked: {self.windows}, in {self.check_seconds:.1f} s",
            *(f"  route {route}: {count:,} IDs" for route, count in sorted(self.by_route.items())),
            f"  brokered: {self.brokered:,} requests",
            *(f"  machine {machine}: {count:,} IDs" for machine, count in sorted(self.by_machine.items())),
            *(f"  VIOLATION: {violation}" for violation in self.violations),
            f"  {'FAILED' if self.violations else 'all distinct, all inside their windows, no client saw an error'}",
        ]
        return "\n".join(lines)


def run(
    folder: Path,
    ids: int,
    *,
    route: str = HALF,
    seed: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run the job in an empty folder, and check it."""
    with Daemons(folder) as daemons:
        job = Job(daemons, ids, route, seed, report)
        job.run()
    job.result.violations += complaints(job.daemons_started, job.clients)
    job.result.violations += idle_faults(job.result)
    job.result.violations += wrong_ways(job.result)
    began = time.monotonic()
    verdict = check(
        [d.log_path for d in job.delegators], [c.ids_path for c in job.clients], DEFAULT, expected=ids
    )
    result = job.result
    result.check_seconds = time.monotonic() - began
    result.ids, result.windows, result.by_machine = verdict.ids, verdict.windows, verdict.by_machine
    result.violations += verdict.violations
    return result


@dataclass
class Taker:
    """A client of the job and what it writes."""

    process: Process
    ids_path: Path
    route: str

    @property
    def taken(self) -> int:
        return self.ids_path.stat().st_size // 8 if self.ids_path.exists() else 0

    @property
    def errors(self) -> list[str]:
        path = self.ids_path.with_suffix(".errors")
        return path.read_text().splitlines() if path.exists() else ["it never began"]


class Job:
    """The engine: starts everything, injects the faults, waits for the end."""

    def __init__(
        self, daemons: Daemons, ids: int, route: str, seed: int, report: Callable[[str], None]
    ) -> None:
        self.result = Result(ids)
        self.delegators: list[Daemon] = []
        self.workers: list[Daemon] = []
        self.clients: list[Taker] = []
        self._daemons = daemons
        self._routes = ("auto", "broker") * (CLIENTS // 2) if route == HALF else (route,) * CLIENTS
        self._seed = seed
        self._report = report
        self._planned_s = max(LEAST_S, ids / IDS_PER_S)
        self._ceiling_path = daemons.folder / "ceiling"
        self._milestone = 0.0  # the share of the IDs that may be taken before the next fault
        self._began = time.monotonic()
        self._reported = self._began

    @property
    def daemons_started(self) -> list[Daemon]:
        return [*self.delegators, *self.workers]

    def run(self) -> None:
        self._start()
        for share, fault in (
            (0.10, self._kill_worker),
            (0.35, self._kill_delegator),
            (0.50, self._freeze_worker),
            (0.80, self._kill_delegator),
        ):
            self._milestone = share
            self._wait_for_ids(int(share * self.result.expected) + 1)
            self._milestone = min(0.97, share + 0.25)
            fault()
        self._milestone = 1.0
        self._wait(lambda: not any(c.process.alive for c in self.clients), "the clients' end", JOB_S)
        self.result.seconds = time.monotonic() - self._began
        self._count_brokered()
        for client in self.clients:
            self.result.by_route[client.route] += client.taken
        for daemon in reversed(self.daemons_started):
            if daemon.alive and (code := daemon.terminate()):
                self.result.violations.append(f"{daemon.name} ended with exit code {code}")

    # --- faults ---

    def _kill_worker(self) -> None:
        victim = self.workers[0]
        fault = self._strike(f"{victim.name} killed and replaced")
        victim.kill()
        self._over(fault, self._join())

    def _kill_delegator(self) -> None:
        old = self.delegators[-1]
        away_s = OUTAGES_S[len(self.delegators) - 1]
        fault = self._strike(f"{old.name} killed and restarted")
        self._count_brokered()
        old.kill()
        self._pause(away_s)
        asked = self._restart_delegator(old.address)
        # It is back once all have renewed with it.
        holders = {worker.name for worker in self.workers if worker.alive}
        self._wait(lambda: len(asked.leases("renewed")) >= len(holders), f"renewals by {asked.name}")
        self._over(fault)

    def _freeze_worker(self) -> None:
        frozen = self.workers[1]
        freeze_s = max(1.5 * TTL_S, 0.05 * self._planned_s)
        fault = self._strike(f"{frozen.name} frozen for {freeze_s:.0f} s and more, its machine ID taken over")
        frozen.signal(signal.SIGSTOP)
        self._pause(freeze_s)
        guest = self._join()
        frozen.signal(signal.SIGCONT)
        self._wait(lambda: self._status().get("errors", {}).get("lost"), "the frozen worker to find it lost")
        code = guest.terminate()
        if code:
            self.result.violations.append(f"{guest.name} ended with exit code {code}")
        self._over(fault, frozen)

    # --- parts ---

    def _start(self) -> None:
        self._restart_delegator("tcp://127.0.0.1:*", "--new")
        for _ in range(3):
            self._join()
        self._ceiling_path.write_bytes(bytes(8))
        quotas = [(self.result.expected + k) // CLIENTS for k in range(CLIENTS)]
        taker = str(Path(__file__).with_name("taker.py"))
        for k, (quota, route) in enumerate(zip(quotas, self._routes, strict=True)):
            path = self._daemons.folder / f"client-{k}.ids"
            argv = [self.delegators[0].address, route, str(quota), str(self._seed * CLIENTS + k), str(path)]
            process = self._daemons.process(
                [sys.executable, taker, *argv, str(self._ceiling_path)], f"client-{k}"
            )
            self.clients.append(Taker(process, path, route))
        self._wait(lambda: all(client.taken for client in self.clients), "each client's first ID")
        self._began = self._reported = time.monotonic()

    def _restart_delegator(self, bind: str, *flags: str) -> Daemon:
        name = f"delegator-{len(self.delegators) + 1}"
        flags = ("--machines", MACHINES, *flags)
        daemon = self._daemons.delegator(*flags, name=name, bind=bind, new=False, ttl=f"{TTL_S}s")
        self.delegators.append(daemon)
        self._wait(daemon.find_address, f"{name} to serve")
        return daemon

    def _join(self) -> Daemon:
        worker = self._daemons.worker(name=f"worker-{len(self.workers) + 1}", to=self.delegators[-1].address)
        self.workers.append(worker)
        self._wait(lambda: worker.name in names_of(self.delegators[-1]), f"{worker.name} to get a machine ID")
        return worker

    def _status(self) -> dict[str, Any]:
        return status_of(self.delegators[-1].address)

    def _count_brokered(self) -> None:
        """Note what the present delegator has passed on: it is about to go, and its count with it."""
        self.result.brokered += self._status().get("broker", {}).get("brokered", 0)

    def _taken(self) -> int:
        return sum(client.taken for client in self.clients)

    def _strike(self, what: str) -> Fault:
        fault = Fault(what, self._taken())
        self.result.faults.append(fault)
        self._report(f"{fault.at:,} IDs: {what}")
        return fault

    def _over(self, fault: Fault, worker: Daemon | None = None) -> None:
        if worker is not None:
            self._wait(lambda: worker.name in names_of(self.delegators[-1]), f"{worker.name} to serve")
        fault.over = self._taken()
        self._report(f"{fault.over:,} IDs: over")

    # --- pace ---

    def _pause(self, seconds: float) -> None:
        over = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() >= over, "time to pass")

    def _wait(self, condition: Callable[[], Any], what: str, within_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise TookTooLong(f"{what}: not within {within_s:g} s, at {self._taken()} IDs")
            self._feed()
            if crashed := [c.process for c in self.clients if c.process.popen.poll()]:
                raise AssertionError(f"{crashed[0].name} crashed: {crashed[0].log()[-1000:]}")
            time.sleep(POLL_S)

    def _wait_for_ids(self, needed: int) -> None:
        self._wait(lambda: self._taken() >= needed, f"{needed} IDs", JOB_S)

    def _feed(self) -> None:
        """Let the clients have what the time passed and the next fault allow."""
        if not self.clients:
            return
        now = time.monotonic()
        share = min(self._milestone, (now - self._began) / self._planned_s)
        with self._ceiling_path.open("r+b", buffering=0) as ceiling:  # in place: the clients read it any time
            ceiling.write(struct.pack("<Q", int(share * self.result.expected / CLIENTS)))
        if now - self._reported >= REPORT_S:
            self._reported = now
            self._report(f"{self._taken():,} IDs after {now - self._began:.0f} s")


def complaints(daemons: list[Daemon], clients: list[Taker]) -> list[str]:
    """Errors that a client saw, or a daemon logged; exceptions that ended a client."""
    found = []
    for client in clients:
        name = client.process.name
        found += [f"{name} saw an error {error}" for error in client.errors]
        if code := client.process.wait():
            found.append(f"{name} ended with exit code {code}: {client.process.log()[-300:]}")
    for daemon in daemons:
        bad = [e for e in daemon.events() if e["level"] in ("error", "critical", "stray") or "trace" in e]
        found += [f"{daemon.name} logged {event['message']}" for event in bad]
    return found


def idle_faults(result: Result) -> list[str]:
    """Faults during which no IDs were taken: they proved nothing."""
    return [
        f"no IDs were taken while {fault.what}"
        for fault in result.faults
        if not 0 < fault.at < fault.over <= result.expected
    ]


def wrong_ways(result: Result) -> list[str]:
    """Routes that no client went, or that nobody was to go."""
    by_broker = "broker" in result.by_route
    found = [f"no IDs were taken by route {route}" for route, ids in result.by_route.items() if not ids]
    if by_broker and not result.brokered:
        found.append("clients took IDs by route broker, and no delegator passed a request on")
    # By `auto` a request is brokered only where no worker answers.
    if not by_broker and result.brokered > result.expected // 100:
        found.append(f"{result.brokered} requests were brokered, though workers could be asked directly")
    return found
