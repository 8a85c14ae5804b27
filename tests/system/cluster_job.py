"""The cluster job: as many IDs as processes can make, in parts, while everything fails that can.

A delegator, three workers and four clients, each a process of its own, with one machine ID more than there
are workers.  Clients write down runs of IDs, 16 bytes for up to a tick's; the check is one of intervals.  A
folder keeps the store, the logs, the runs and a state file, so that a job of a billion IDs can be done in
parts, each a cluster on the store that the last one left.

Faults come one after another, in an order that a seed draws, each once before any comes again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.system import faketime
from tests.system.daemons import POLL_S, WAIT_S, Daemon, Daemons, Process, TookTooLong, names_of, status_of
from tests.system.kills import LAUNCHER
from tests.system.runs import RECORD, check_runs, read_runs

CLIENTS: Final = ("auto", "auto", "auto", "broker")
WORKERS: Final = 3
MACHINES: Final = f"0-{WORKERS}"
TTL_S: Final = 2
PART: Final = 100_000_000
REPORT_S: Final = 10.0
PART_S: Final = 3600.0
"""How long a part may take, faults and all."""
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
"""What a delegator may log as an error: its store was taken away, or its disk was full."""


@dataclass
class State:
    """How far a job has come."""

    parts: int = 0
    ids: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    """The faults that are to come before any comes again."""
    violations: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> State:
        """The state that a folder keeps; that of a job not begun where it keeps none."""
        path = folder / STATE
        if not path.exists():
            return cls()
        kept = json.loads(path.read_text())
        return cls(**kept | {"faults": Counter(kept["faults"])})

    def save(self, folder: Path) -> None:
        fresh = folder / f"{STATE}.new"
        fresh.write_text(json.dumps(vars(self), indent=1))
        fresh.replace(folder / STATE)


@dataclass
class Result:
    """What became of a job so far; sound where nothing is in `violations`."""

    wanted: int
    state: State
    windows: int = 0
    runs: int = 0
    check_seconds: float = 0.0
    kept_mb: float = 0.0
    peak_mb: float = 0.0
    by_machine: Counter[int] = field(default_factory=Counter)

    @property
    def violations(self) -> list[str]:
        return self.state.violations

    def __str__(self) -> str:
        state = self.state
        rate = state.ids / max(state.seconds, 1e-9)
        lines = [
            f"cluster job: {state.ids:,} of {self.wanted:,} IDs in {state.parts} parts",
            f"  {state.seconds:.1f} s, {rate:,.0f} IDs/s, starts and faults and all",
            *(f"  fault: {what}, {count} times" for what, count in sorted(state.faults.items())),
            f"  checked: {self.runs:,} runs in {self.windows:,} windows, in {self.check_seconds:.1f} s",
            f"  kept on disk: {self.kept_mb:.1f} MB; this process at most: {self.peak_mb:.0f} MB",
            *(f"  machine {machine}: {count:,} IDs" for machine, count in sorted(self.by_machine.items())),
            *(f"  VIOLATION: {violation}" for violation in self.violations),
            f"  {'FAILED' if self.violations else 'all distinct, all inside their windows, no client saw an error'}",
        ]
        return "\n".join(lines)


def run(
    folder: Path,
    ids: int,
    *,
    part: int = PART,
    parts: int | None = None,
    seed: int = 1,
    rate: int = 0,
    faults: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Result:
    """Go on with the job in a folder until it has so many IDs, or has done so many parts more.

    `rate` is what each client may take in a second (0: all it can get); `faults` are injected in this order,
    all of them (none: as many as there is time for, in any order).
    """
    state = State.load(folder)
    result = check(folder, ids, state)
    done = 0
    while state.ids < ids and not state.violations and (parts is None or done < parts):
        with Daemons(folder) as daemons:
            job = Part(daemons, state, random.Random(f"{seed}/{state.parts}"), rate, report)
            began = time.monotonic()
            try:
                job.run(min(part, ids - state.ids), faults)
            finally:
                state.seconds += time.monotonic() - began
                state.save(folder)
                job.clean_up()
        state.parts += 1
        done += 1
        result = check(folder, ids, state)
        state.save(folder)
        report(f"part {state.parts}: {state.ids:,} IDs, {len(state.violations)} violations")
    return result


def check(folder: Path, ids: int, state: State) -> Result:
    """Check all that a folder keeps, that of a part which was broken off included."""
    began = time.monotonic()
    runs = read_runs(sorted(folder.glob("*.runs")))
    verdict = check_runs(sorted(folder.glob("*-delegator-*.log")), runs)
    state.ids = verdict.ids
    state.violations += [violation for violation in verdict.violations if violation not in state.violations]
    return Result(
        ids,
        state,
        windows=verdict.windows,
        runs=len(runs),
        check_seconds=time.monotonic() - began,
        kept_mb=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        by_machine=verdict.by_machine,
    )


class Taker:
    """A client and the runs that it writes."""

    def __init__(self, process: Process, path: Path, route: str) -> None:
        self.process, self.path, self.route = process, path, route
        self._read = self._taken = 0

    @property
    def taken(self) -> int:
        """How many IDs it has."""
        size = self.path.stat().st_size // RECORD * RECORD if self.path.exists() else 0
        if size > self._read:
            words = np.fromfile(self.path, dtype="<u8", count=(size - self._read) // 8, offset=self._read)
            self._taken += int(words[1::2].sum())
            self._read = size
        return self._taken

    @property
    def errors(self) -> list[str]:
        path = self.path.with_suffix(".errors")
        return path.read_text().splitlines() if path.exists() else ["it never began"]


class Part:
    """One part: a cluster from its start to its end, and the faults in it."""

    def __init__(
        self, daemons: Daemons, state: State, draw: random.Random, rate: int, report: Callable[[str], None]
    ) -> None:
        self.delegators: list[Daemon] = []
        self.workers: list[Daemon] = []
        self.clients: list[Taker] = []
        self._daemons, self._state, self._draw = daemons, state, draw
        self._rate, self._report = rate, report
        self._bind = "tcp://127.0.0.1:*"
        self._started = 0
        self._faked = not faketime.why_not(daemons.folder)
        self._reported = time.monotonic()
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed and replaced": self._kill_worker,
            "worker frozen while its machine ID is taken over": self._freeze_worker,
            "delegator killed and restarted": self._kill_delegator,
            "delegator told to stop and restarted": self._stop_delegator,
            "delegator killed between a commit and its answer": self._kill_at_failpoint,
            "delegator frozen past the windows": self._freeze_delegator,
            "client frozen": self._freeze_client,
            "store moved away and back": self._move_store,
            "disk full for a while": self._fill_disk,
        }
        if self._faked:
            self.faults["wall clock of the delegator stepped"] = self._step_clock
        else:
            report("CLOCKS ARE NOT STEPPED: the package libfaketime is not there, or does not work here")

    def run(self, ids: int, faults: Sequence[str]) -> None:
        """Start, have faults strike until there are so many IDs, stop."""
        self._start()
        state, given = self._state, list(faults)
        while given or (not faults and self._taken() < ids):
            if not given and not state.left:
                state.left = self._draw.sample(list(self.faults), len(self.faults))
            what = given.pop(0) if given else state.left.pop(0)
            before = self._taken()
            self._report(f"{state.ids + before:,} IDs: {what}")
            self.faults[what]()
            state.faults[what] += 1
            # It struck a cluster at work, and that works again.
            self._wait_for(self._taken() + 1, "IDs after a fault")
            if self._taken() <= before + 1:
                state.violations.append(f"no IDs were taken while: {what}")
        self._wait_for(ids, "all IDs", PART_S)
        for client in self.clients:
            client.process.kill()
        for daemon in (*reversed(self.workers), self.delegators[-1]):
            if daemon.alive and (code := daemon.terminate()):
                self._state.violations.append(f"{daemon.name} ended with exit code {code}")
        self._complain()

    def clean_up(self) -> None:
        """End what still runs, and remove what it leaves behind outside the folder."""
        for process in self._daemons.end():
            faketime.clean_up_after(process.pid)

    # --- faults ---

    def _kill_worker(self) -> None:
        self._draw.choice(self._present()).kill()
        self._join()

    def _freeze_worker(self) -> None:
        frozen = self._draw.choice(self._present())
        frozen.signal(signal.SIGSTOP)
        guests = [self._join(), self._join()]  # the free machine ID, and the frozen one's
        frozen.signal(signal.SIGCONT)
        self._wait(lambda: frozen.said("lost machine"), "the frozen worker to find its lease lost")
        for guest in guests:
            if code := guest.terminate():
                self._state.violations.append(f"{guest.name} ended with exit code {code}")
        self._wait(lambda: frozen.name in names_of(self.delegators[-1]), "the frozen worker to serve again")

    def _kill_delegator(self) -> None:
        self.delegators[-1].kill()
        self._pause(self._draw.uniform(0.0, 0.7 * TTL_S))
        self._restart()

    def _stop_delegator(self) -> None:
        if code := self.delegators[-1].terminate():
            self._state.violations.append(f"{self.delegators[-1].name} ended with exit code {code}")
        self._restart()

    def _kill_at_failpoint(self) -> None:
        point = self._draw.choice(FAILPOINTS)
        self.delegators[-1].kill()
        victim = self._restart(via=(LAUNCHER, point, str(self._draw.randint(1, 3))))
        victim.signal(signal.SIGUSR1)
        self._wait(lambda: not victim.alive, f"it to be killed at {point}")
        if victim.wait() != -signal.SIGKILL:
            self._state.violations.append(f"{victim.name} ended with exit code {victim.wait()}")
        self._restart()

    def _freeze_delegator(self) -> None:
        delegator = self.delegators[-1]
        delegator.signal(signal.SIGSTOP)
        self._pause(1.2 * TTL_S)
        delegator.signal(signal.SIGCONT)
        self._renewed(delegator)

    def _freeze_client(self) -> None:
        client = self._draw.choice(self.clients).process
        client.signal(signal.SIGSTOP)
        self._pause(0.5)
        client.signal(signal.SIGCONT)

    def _move_store(self) -> None:
        store = self._daemons.folder / "store.db"
        refused = self._unavailable()
        store.rename(store.with_suffix(".away"))
        self._wait(lambda: self._unavailable() > refused, "grants to be refused")
        self._pause(self._draw.uniform(0.0, 0.5 * TTL_S))
        store.with_suffix(".away").rename(store)
        self._renewed(self.delegators[-1])

    def _fill_disk(self) -> None:
        delegator = self.delegators[-1]
        _, most = resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE)
        # Room for what it has to say; the log of commits grows past that in no time.
        size = delegator.log_path.stat().st_size + 20_000
        refused = self._unavailable()
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (size, most))
        self._wait(lambda: self._unavailable() > refused, "grants to be refused")
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (most, most))
        self._renewed(delegator)

    def _step_clock(self) -> None:
        clock = faketime.WrongClock(self._daemons.folder / f"clock-{self._started}", faketime.HOUR_S // 2)
        self.delegators[-1].kill()
        delegator = self._restart(env=clock.env)
        for off_s in (faketime.HOUR_S, -faketime.HOUR_S, 14 * faketime.YEAR_S):
            clock.set(off_s)
            self._pause(0.3)
        self._renewed(delegator)
        clock.set(0)

    # --- parts ---

    def _start(self) -> None:
        store = self._daemons.folder / "store.db"
        if (away := store.with_suffix(".away")).exists():  # the last part was broken off just then
            away.rename(store)
        self._restart(*(() if store.exists() else ("--new",)), await_renewals=False)
        for _ in range(WORKERS):
            self._join()
        for k, route in enumerate(CLIENTS):
            path = self._daemons.folder / f"{self._prefix}-client-{k}.runs"
            seed = str(self._draw.randrange(2**32))
            argv = [self._bind, route, seed, str(self._rate), str(path)]
            process = self._daemons.process(
                [sys.executable, "-m", "tests.system.run_taker", *argv], f"{self._prefix}-client-{k}"
            )
            self.clients.append(Taker(process, path, route))
        self._wait(lambda: all(client.taken for client in self.clients), "each client's first ID")

    @property
    def _prefix(self) -> str:
        # A part that was broken off leaves its files; the next one has other names.
        return f"part-{self._state.parts}-{os.getpid()}"

    def _restart(
        self,
        *flags: str,
        await_renewals: bool = True,
        via: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> Daemon:
        self._started += 1
        delegator = self._daemons.delegator(
            *("--machines", MACHINES, *flags),
            name=f"{self._prefix}-delegator-{self._started}",
            bind=self._bind,
            new=False,
            ttl=f"{TTL_S}s",
            via=via,
            env=env,
        )
        self.delegators.append(delegator)
        self._wait(delegator.find_address, f"{delegator.name} to serve")
        self._bind = delegator.address
        if await_renewals:
            self._renewed(delegator)
        return delegator

    def _join(self) -> Daemon:
        self._started += 1
        worker = self._daemons.worker(name=f"{self._prefix}-worker-{self._started}", to=self._bind)
        self.workers.append(worker)
        self._wait(lambda: worker.name in names_of(self.delegators[-1]), f"{worker.name} to get a machine ID")
        return worker

    def _present(self) -> list[Daemon]:
        return [worker for worker in self.workers if worker.alive]

    def _renewed(self, delegator: Daemon) -> None:
        """Wait until every worker has renewed with it after now."""
        before = len(delegator.leases("renewed"))
        needed = len(self._present())
        self._wait(
            lambda: len({lease[1] for lease in delegator.leases("renewed")[before:]}) >= needed,
            f"renewals by {delegator.name}",
        )

    def _unavailable(self) -> int:
        return int(status_of(self._bind).get("errors", {}).get("unavailable", 0))

    def _taken(self) -> int:
        return sum(client.taken for client in self.clients)

    def _complain(self) -> None:
        found = self._state.violations
        for client in self.clients:
            found += [f"{client.process.name} saw an error {error}" for error in client.errors[:3]]
        for daemon in (*self.delegators, *self.workers):
            for event in daemon.events():
                fault = event["level"] in ("critical", "stray") or "trace" in event
                error = event["level"] == "error"
                if fault or (error and not any(words in event["message"] for words in EXPECTED_ERRORS)):
                    found.append(f"{daemon.name} logged {event['message']}")

    # --- pace ---

    def _pause(self, seconds: float) -> None:
        over = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() >= over, "time to pass")

    def _wait_for(self, ids: int, what: str, within_s: float = WAIT_S) -> None:
        self._wait(lambda: self._taken() >= ids, what, within_s)

    def _wait(self, condition: Callable[[], Any], what: str, within_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise TookTooLong(f"{what}: not within {within_s:g} s, at {self._taken()} IDs")
            if crashed := [c.process for c in self.clients if c.process.popen.poll()]:
                raise AssertionError(f"{crashed[0].name} crashed: {crashed[0].log()[-1000:]}")
            if time.monotonic() - self._reported >= REPORT_S:
                self._reported = time.monotonic()
                self._report(f"{self._state.ids + self._taken():,} IDs")
            time.sleep(5 * POLL_S)
