"""A job: IDs are taken from a cluster of real processes while faults strike it, one after another.

Here is what all jobs do alike: they start workers and clients, note what a fault met and when it was over, wait
without losing sight of the clients, and say what a client or a daemon complained of.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

from tests.jobs.takers import Orders, Taker
from tests.system.daemons import POLL_S, WAIT_S, Daemon, Daemons, TookTooLong, names_of

Report: TypeAlias = Callable[[str], None]

ROUTES: Final = ("auto", "auto", "auto", "broker")
"""The routes of the clients, of which there are four."""
REPORT_S: Final = 10.0
"""Seconds between two lines of progress."""
JOB_S: Final = 3600.0
"""Seconds that a job may go on after its last fault."""


@dataclass
class Fault:
    """One fault."""

    what: str
    at: int
    """How many IDs had been taken when it struck."""
    over: int = 0
    """How many when it was over, or what it took away came back."""

    @property
    def violations(self) -> list[str]:
        """That no IDs were taken while it lasted, if so: it proved nothing."""
        return [] if 0 < self.at < self.over else [f"no IDs were taken while: {self.what}"]


class Job:
    """One cluster and its clients; what is special to a kind of job is left to the classes derived from this."""

    routes: Sequence[str] = ROUTES
    prefix: str = ""
    """The beginning of the names of all that a job starts."""

    def __init__(self, daemons: Daemons, draw: random.Random, report: Report) -> None:
        self.daemons, self.draw, self.report = daemons, draw, report
        self.delegators: list[Daemon] = []
        self.workers: list[Daemon] = []
        self.gone: list[Daemon] = []
        """Workers that were killed, or told to stop."""
        self.clients: list[Taker] = []
        self.faults: list[Fault] = []
        self.violations: list[str] = []
        self.before = 0
        """IDs that were taken before this job began, for the lines of progress."""
        self._reported = time.monotonic()

    # --- what is special to a kind of job ---

    @property
    def endpoints(self) -> list[str]:
        """The endpoints of the delegators."""
        raise NotImplementedError

    def holders(self) -> Collection[str]:
        """The names of those who hold a lease now."""
        raise NotImplementedError

    def look(self) -> None:
        """Do what is to be done again and again while the job waits."""

    # --- parts ---

    def start_worker(self) -> Daemon:
        flags = [flag for endpoint in self.endpoints for flag in ("--delegator", endpoint)]
        worker = self.daemons.worker(*flags, name=f"{self.prefix}worker-{len(self.workers) + 1}")
        self.workers.append(worker)
        return worker

    def join(self, within_s: float = WAIT_S) -> Daemon:
        """Start a worker, and wait until it holds a machine ID."""
        worker = self.start_worker()
        self.wait(lambda: worker.name in self.holders(), f"{worker.name} to get a machine ID", within_s)
        return worker

    def start_clients(self, **how: Any) -> None:
        """Start a client for each route; `how` is the rest of their `Orders`."""
        for k, route in enumerate(self.routes):
            name = f"{self.prefix}client-{k}"
            out = str(self.daemons.folder / f"{name}.runs")
            orders = Orders(self.endpoints, route, self.draw.randrange(2**32), out, **how)
            self.clients.append(Taker.start(self.daemons, name, orders))
        self.wait(lambda: all(client.taken for client in self.clients), "each client's first ID")

    @property
    def present(self) -> list[Daemon]:
        """The workers that ought to run."""
        return [worker for worker in self.workers if worker not in self.gone]

    @property
    def taken(self) -> int:
        return sum(client.taken for client in self.clients)

    def kill(self, worker: Daemon) -> None:
        self.gone.append(worker)
        worker.kill()

    def leave(self, daemon: Daemon) -> None:
        """Tell a daemon to stop."""
        self.gone.append(daemon)
        if code := daemon.terminate():
            self.violations.append(f"{daemon.name} ended with exit code {code}")

    def stop(self, delegators: Iterable[Daemon]) -> None:
        """End the clients, then the workers and these delegators."""
        for client in self.clients:
            client.process.kill()
        for daemon in (*reversed(self.present), *delegators):
            self.leave(daemon)

    # --- pace ---

    def pause(self, seconds: float) -> None:
        over = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= over, "time to pass")

    def wait(self, condition: Callable[[], Any], what: str, within_s: float = WAIT_S) -> Any:
        """Wait until `condition` gives something true, which is returned."""
        deadline = time.monotonic() + within_s
        while True:
            self.look()
            if result := condition():
                return result
            if time.monotonic() > deadline:
                raise TookTooLong(f"{what}: not within {within_s:g} s, at {self.taken} IDs")
            if crashed := [c.process for c in self.clients if c.process.popen.poll() is not None]:
                raise AssertionError(f"{crashed[0].name} ended: {crashed[0].log()[-1000:]}")
            if time.monotonic() - self._reported >= REPORT_S:
                self._reported = time.monotonic()
                self.report(f"{self.before + self.taken:,} IDs")
            time.sleep(2 * POLL_S)

    def wait_for_ids(self, ids: int, what: str, within_s: float = WAIT_S) -> None:
        self.wait(lambda: self.taken >= ids, what, within_s)


class SoleDelegator(Job):
    """A job on one delegator at a time, and the SQLite file of its folder."""

    ttl_s: ClassVar[int]
    machines: int
    """How many machine IDs there are to lease."""

    @property
    def delegator(self) -> Daemon:
        """The present one."""
        return self.delegators[-1]

    @property
    def endpoints(self) -> list[str]:
        return [self.delegators[0].address]

    def holders(self) -> list[str]:
        return names_of(self.delegator)

    def begin(
        self, *, machines: int = 0, via: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Daemon:
        """Start a delegator where the one before it was."""
        daemon = self.daemons.delegator(
            *("--machines", f"0-{(machines or self.machines) - 1}"),
            name=f"{self.prefix}delegator-{len(self.delegators) + 1}",
            bind=self.endpoints[0] if self.delegators else "tcp://127.0.0.1:*",
            new=not (self.daemons.folder / "store.db").exists(),
            ttl=f"{self.ttl_s}s",
            via=via,
            env=env,
        )
        self.delegators.append(daemon)
        return daemon

    def await_renewals(self) -> None:
        """Wait until every worker has renewed with the present delegator after now."""
        delegator = self.delegator
        before = len(delegator.leases("renewed"))
        self.wait(
            lambda: len({lease[1] for lease in delegator.leases("renewed")[before:]}) >= len(self.present),
            f"renewals by {delegator.name}",
        )


def told(title: str, lines: Iterable[str], violations: Sequence[str], sound: str) -> str:
    """A result in lines, which end with what was violated, or with `sound`."""
    end = [*(f"VIOLATION: {violation}" for violation in violations), "FAILED" if violations else sound]
    return "\n  ".join([title, *lines, *end])


def complaints(daemons: Iterable[Daemon], expected: Sequence[str] = ()) -> list[str]:
    """Lines that daemons should not have logged: errors, except those with `expected` words, and worse."""
    return [
        f"{daemon.name} logged {event['message']}"
        for daemon in daemons
        for event in daemon.events()
        if event["level"] in ("critical", "stray")
        or "trace" in event
        or (event["level"] == "error" and not any(words in event["message"] for words in expected))
    ]
