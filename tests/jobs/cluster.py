"""The jobs on one delegator and its SQLite file: the cluster job, and the main job, which is a short one of its kind.

The cluster job takes as many IDs as processes can make, in parts, while everything fails that can.  A delegator,
three workers and four clients, each a process of its own, with one machine ID more than there are workers.  A
folder keeps the store, the logs, the runs and a state file, so that a job of a billion IDs can be done in parts,
each a cluster on the store that the last one left.  Faults come one after another, in an order that a seed draws,
each once before any comes again.

The main job is one part.  Its clients take lists of IDs as callers do, half of them through the delegator.  There
are no more machine IDs than workers, so that a worker that joins must take over a machine ID that another has
minted with.  Its few faults strike at shares of the IDs.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.jobs.checker import Verdict, check_runs, read_runs
from tests.jobs.job import JOB_S, ROUTES, Fault, Report, SoleDelegator, complaints, told
from tests.jobs.kills import LAUNCHER
from tests.jobs.outages import unexcused
from tests.system import faketime
from tests.system.daemons import Daemon, Daemons, status_of

WORKERS: Final = 3
TTL_S: Final = 2
PART: Final = 100_000_000
IDS_PER_S: Final = 100_000
"""IDs a second that the main job takes at most: it must last until all faults have struck."""
LEAST_S: Final = 10.0
HALF: Final = "half"
"""Half of the clients by the route `auto`, which finds the workers, and half by `broker`."""
FAILPOINTS: Final = (
    "renew: before COMMIT",
    "renew: after COMMIT",
    "renew: before the marker",
    "answer: after the log",
    "answer: before the send",
    "answer: after the send",
)
STATE: Final = "state.json"
EXPECTED_ERRORS: Final = ("was moved or replaced while in use", "the disk", "disk I/O error")
"""Words of the errors that a delegator may log: its store was taken away, or its disk was full."""


KILL_WORKER: Final = "worker killed and replaced"
KILL_DELEGATOR: Final = "delegator killed and restarted"
FREEZE_WORKER: Final = "worker frozen while its machine ID is taken over"
MAIN: Final = ((0.10, KILL_WORKER), (0.35, KILL_DELEGATOR), (0.50, FREEZE_WORKER), (0.80, KILL_DELEGATOR))
"""The faults of the main job, each with the share of the IDs that are taken before."""


@dataclass(frozen=True)
class Plan:
    """The shape of a job."""

    rate: int = 0
    """IDs that each client may take in a second; 0: as many as it can get."""
    faults: Sequence[tuple[float, str]] = ()
    """Faults to inject, in this order, all of them, each with the share of a part's IDs that are taken before;
    none: as many as there is time for, in any order."""
    routes: Sequence[str] = ROUTES
    spare: int = 1
    """Machine IDs beyond those that the workers need."""
    lists: bool = False
    """Whether clients take lists of IDs, as callers do, or runs."""


@dataclass
class State:
    """How far a job has come."""

    parts: int = 0
    ids: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    by_route: Counter[str] = field(default_factory=Counter)
    brokered: int = 0
    """Requests that delegators passed on, except those of their last instants before a kill."""
    left: list[str] = field(default_factory=list)
    """The faults that are to come before any comes again."""
    violations: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> State:
        """The state that a folder keeps; that of a job not begun if it keeps none."""
        path = folder / STATE
        if not path.exists():
            return cls()
        kept = json.loads(path.read_text())
        return cls(**kept | {name: Counter(kept[name]) for name in ("faults", "by_route")})

    def save(self, folder: Path) -> None:
        fresh = folder / f"{STATE}.new"
        fresh.write_text(json.dumps(vars(self), indent=1))
        fresh.replace(folder / STATE)


@dataclass
class Result:
    """The outcome of a job so far; sound if nothing is in `violations`."""

    name: str
    wanted: int
    state: State
    verdict: Verdict = field(default_factory=Verdict)
    kept_mb: float = 0.0
    peak_mb: float = 0.0

    @property
    def violations(self) -> list[str]:
        return self.state.violations

    def __str__(self) -> str:
        state = self.state
        rate = state.ids / max(state.seconds, 1e-9)
        lines = [
            f"{state.seconds:.1f} s, {rate:,.0f} IDs/s, starts and faults and all",
            *(f"fault: {what}, {count} times" for what, count in sorted(state.faults.items())),
            str(self.verdict),
            f"kept on disk: {self.kept_mb:.1f} MB; this process at most: {self.peak_mb:.0f} MB",
            *(f"route {route}: {count:,} IDs" for route, count in sorted(state.by_route.items())),
            f"brokered: {state.brokered:,} requests",
            *(f"machine {machine}: {ids:,} IDs" for machine, ids in sorted(self.verdict.by_machine.items())),
        ]
        title = f"{self.name}: {state.ids:,} of {self.wanted:,} IDs, parts: {state.parts}"
        sound = "all distinct, all inside their windows, no client saw an error"
        return told(title, lines, self.violations, sound)


def run(
    folder: Path,
    ids: int,
    plan: Plan = Plan(),
    *,
    part: int = PART,
    parts: int | None = None,
    seed: int = 1,
    report: Report = lambda _: None,
    name: str = "cluster job",
) -> Result:
    """Go on with the job in a folder until it has so many IDs, or has done so many parts more."""
    state = State.load(folder)
    result = check(folder, ids, state, name)
    done = 0
    while state.ids < ids and not state.violations and (parts is None or done < parts):
        with Daemons(folder) as daemons:
            job = Part(daemons, state, plan, random.Random(f"{seed}/{state.parts}"), report)
            began = time.monotonic()
            try:
                job.run(min(part, ids - state.ids))
            finally:
                state.seconds += time.monotonic() - began
                state.violations += job.violations
                state.save(folder)
                job.clean_up()
        state.parts += 1
        done += 1
        result = check(folder, ids, state, name)
        state.save(folder)
        report(f"part {state.parts}: {state.ids:,} IDs, {len(state.violations)} violations")
    return result


def run_main(
    folder: Path, ids: int, *, route: str = HALF, seed: int = 1, report: Report = lambda _: None
) -> Result:
    """Do the main job in an empty folder."""
    rate = int(ids / len(ROUTES) / max(LEAST_S, ids / IDS_PER_S))
    routes = ("auto", "auto", "broker", "broker") if route == HALF else (route,) * len(ROUTES)
    plan = Plan(rate, MAIN, routes, spare=0, lists=True)
    result = run(folder, ids, plan, part=ids, seed=seed, report=report, name="main job")
    result.state.violations += wrong_ways(result)
    return result


def wrong_ways(result: Result) -> list[str]:
    """Routes that no client went, or that none was to go."""
    state = result.state
    found = [f"no IDs were taken by route {route}" for route, ids in state.by_route.items() if not ids]
    if "broker" in state.by_route and not state.brokered:
        found.append("clients took IDs by route broker, and no delegator passed a request on")
    # By `auto` a request is brokered only if no worker answers.
    if "broker" not in state.by_route and state.brokered > result.wanted // 100:
        found.append(f"{state.brokered} requests were brokered, though workers could be asked directly")
    return found


def check(folder: Path, ids: int, state: State, name: str = "cluster job") -> Result:
    """Check all that a folder keeps, that of a part which was broken off included."""
    runs = read_runs(sorted(folder.glob("*.runs")))
    verdict = check_runs(sorted(folder.glob("*-delegator-*.log")), runs)
    state.ids = verdict.ids
    state.violations += [violation for violation in verdict.violations if violation not in state.violations]
    return Result(
        name,
        ids,
        state,
        verdict,
        kept_mb=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    )


class Part(SoleDelegator):
    """One part: a cluster from its start to its end, and the faults in it."""

    ttl_s = TTL_S

    def __init__(
        self, daemons: Daemons, state: State, plan: Plan, draw: random.Random, report: Report
    ) -> None:
        super().__init__(daemons, draw, report)
        self.routes, self.before = plan.routes, state.ids
        # A part that was broken off leaves its files; the next one has other names.
        self.prefix = f"part-{state.parts}-{os.getpid()}-"
        self._state, self._plan = state, plan
        self.machines = WORKERS + plan.spare
        self._kinds: dict[str, Callable[[], None]] = {
            KILL_WORKER: self._kill_worker,
            FREEZE_WORKER: self._freeze_worker,
            KILL_DELEGATOR: self._kill_delegator,
            "delegator told to stop and restarted": self._stop_delegator,
            "delegator killed between a commit and its answer": self._kill_at_failpoint,
            "delegator frozen past the windows": self._freeze_delegator,
            "client frozen": self._freeze_client,
            "store moved away and back": self._move_store,
            "disk full for a while": self._fill_disk,
        }
        if plan.faults:
            return
        if faketime.why_not(daemons.folder):
            report("CLOCKS ARE NOT STEPPED: the package libfaketime is not there, or does not work here")
        else:
            self._kinds["wall clock of the delegator stepped"] = self._step_clock

    def run(self, ids: int) -> None:
        """Start, have faults strike until there are so many IDs, stop."""
        self._start()
        state, given = self._state, list(self._plan.faults)
        while given or (not self._plan.faults and self.taken < ids):
            if not given and not state.left:
                state.left = self.draw.sample(list(self._kinds), len(self._kinds))
            share, what = given.pop(0) if given else (0.0, state.left.pop(0))
            self.wait_for_ids(int(share * ids), f"{share:.0%} of all IDs", JOB_S)
            self._strike(what)
        self.wait_for_ids(ids, "all IDs", JOB_S)
        self._count_brokered()
        self.stop([self.delegator])
        for client in self.clients:
            state.by_route[client.route] += client.taken
            self.violations += unexcused(client.process.name, client.errors)
        self.violations += complaints((*self.delegators, *self.workers), EXPECTED_ERRORS)

    def _strike(self, what: str) -> None:
        fault = Fault(what, self.taken)
        self.report(f"{self.before + fault.at:,} IDs: {what}")
        self._kinds[what]()
        fault.over = self.taken
        # It struck a cluster at work, and that works again.
        self.wait_for_ids(fault.over + 1, f"IDs after: {what}")
        self._state.faults[what] += 1
        self.faults.append(fault)
        self.violations += fault.violations

    def clean_up(self) -> None:
        """End what still runs, and remove what it leaves behind outside the folder."""
        for process in self.daemons.end():
            faketime.clean_up_after(process.pid)

    # --- faults ---

    def _kill_worker(self) -> None:
        self.kill(self.draw.choice(self.present))
        self.join()

    def _freeze_worker(self) -> None:
        frozen = self.draw.choice(self.present)
        frozen.signal(signal.SIGSTOP)
        guests = [
            self.join() for _ in range(self._plan.spare + 1)
        ]  # the last gets the frozen one's machine ID
        frozen.signal(signal.SIGCONT)
        self.wait(lambda: frozen.said("lost machine"), "the frozen worker to find its lease lost")
        for guest in guests:
            self.leave(guest)
        self.wait(lambda: frozen.name in self.holders(), "the frozen worker to serve again")

    def _kill_delegator(self) -> None:
        self._count_brokered()
        self.delegator.kill()
        self.pause(self.draw.uniform(0.0, 0.7 * TTL_S))
        self._restart()

    def _stop_delegator(self) -> None:
        self._count_brokered()
        self.leave(self.delegator)
        self._restart()

    def _kill_at_failpoint(self) -> None:
        point = self.draw.choice(FAILPOINTS)
        self.delegator.kill()
        victim = self._restart(via=(LAUNCHER, point, str(self.draw.randint(1, 3))))
        victim.signal(signal.SIGUSR1)
        self.wait(lambda: not victim.alive, f"it to be killed at {point}")
        if victim.wait() != -signal.SIGKILL:
            self.violations.append(f"{victim.name} ended with exit code {victim.wait()}")
        self._restart()

    def _freeze_delegator(self) -> None:
        self.delegator.signal(signal.SIGSTOP)
        self.pause(1.2 * TTL_S)
        self.delegator.signal(signal.SIGCONT)
        self.await_renewals()

    def _freeze_client(self) -> None:
        client = self.draw.choice(self.clients).process
        client.signal(signal.SIGSTOP)
        self.pause(0.5)
        client.signal(signal.SIGCONT)

    def _move_store(self) -> None:
        store = self.daemons.folder / "store.db"
        refused = self._unavailable()
        store.rename(store.with_suffix(".away"))
        self.wait(lambda: self._unavailable() > refused, "grants to be refused")
        self.pause(self.draw.uniform(0.0, 0.5 * TTL_S))
        store.with_suffix(".away").rename(store)
        self.await_renewals()

    def _fill_disk(self) -> None:
        delegator = self.delegator
        _, most = resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE)
        # Room for what it has to say; the log of commits grows past that in no time.
        size = delegator.log_path.stat().st_size + 20_000
        refused = self._unavailable()
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (size, most))
        self.wait(lambda: self._unavailable() > refused, "grants to be refused")
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (most, most))
        self.await_renewals()

    def _step_clock(self) -> None:
        clock = faketime.WrongClock(
            self.daemons.folder / f"clock-{len(self.delegators)}", faketime.HOUR_S // 2
        )
        self.delegator.kill()
        self._restart(env=clock.env)
        for off_s in (faketime.HOUR_S, -faketime.HOUR_S, 14 * faketime.YEAR_S):
            clock.set(off_s)
            self.pause(0.3)
        self.await_renewals()
        clock.set(0)

    # --- parts ---

    def _start(self) -> None:
        store = self.daemons.folder / "store.db"
        if (away := store.with_suffix(".away")).exists():  # the last part was broken off just then
            away.rename(store)
        self._restart()
        for _ in range(WORKERS):
            self.join()
        self.start_clients(rate=self._plan.rate, lists=self._plan.lists)

    def _restart(self, via: Sequence[str] = (), env: dict[str, str] | None = None) -> Daemon:
        delegator = self.begin(via=via, env=env)
        self.wait(delegator.find_address, f"{delegator.name} to serve")
        self.await_renewals()
        return delegator

    def _unavailable(self) -> int:
        return int(status_of(self.endpoints[0]).get("errors", {}).get("unavailable", 0))

    def _count_brokered(self) -> None:
        """Note what the present delegator has passed on: it is about to go, and its count with it."""
        self._state.brokered += status_of(self.endpoints[0]).get("broker", {}).get("brokered", 0)
