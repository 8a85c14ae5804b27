"""A cluster whose delegator dies by SIGKILL at one point after another, and comes back on its store each time.

Each delegator is run by failpoints.py.  It is armed once every worker has renewed with it, so that each
point is passed by a cluster at rest; the workers, and those who take IDs from them, go on throughout.
"""

from __future__ import annotations

import itertools
import random
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.jobs.checker import Lease, Verdict, judge, leases_in, runs_of, windows_of
from tests.jobs.load import Load
from tests.system.daemons import Daemon, Daemons, names_of, until
from tests.system.failpoints import DELEGATOR_POINTS
from zflake.core.layout import DEFAULT

TTL_S: Final = 1
WORKERS: Final = 3
MACHINES: Final = 8
ONCE: Final = ("meta", "mark", "acquire", "release")
"""Points that are passed once only, since one fault leads there once."""
LAUNCHER: Final = "tests.system.failpoints"


@dataclass
class Result:
    """The outcome; sound if nothing is in `violations`."""

    points: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"kills: {len(self.points)} kills, {self.verdict.ids:,} IDs in {self.verdict.windows} windows",
            *(f"  VIOLATION: {violation}" for violation in self.violations),
            f"  {'FAILED' if self.violations else 'no window granted twice, each to a holder, no ID twice, no lease lost'}",
        ]
        return "\n".join(lines)


def run(
    folder: Path,
    points: Sequence[tuple[str, int]],
    *,
    lanes: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> Result:
    """Kill at each point, the n-th time that it is passed, in several clusters side by side."""

    def lane(k: int) -> Result:
        own = folder / f"lane-{k}"
        own.mkdir()
        with Daemons(own) as daemons:
            return Kills(daemons, report).run(points[k::lanes])

    total = Result()
    with ThreadPoolExecutor(lanes) as pool:
        for result in pool.map(lane, range(lanes)):
            total.points += result.points
            total.violations += result.violations
            total.verdict.ids += result.verdict.ids
            total.verdict.windows += result.verdict.windows
    return total


def every_point(rounds: int, seed: int) -> list[tuple[str, int]]:
    """Each point of a running delegator, in random order, at random passings."""
    draw = random.Random(seed)
    points = [point for point in DELEGATOR_POINTS if not point.startswith("initialise")]
    drawn = [
        (point, 1 if point.startswith(ONCE) else draw.randint(1, 4))
        for _ in range(rounds)
        for point in points
    ]
    draw.shuffle(drawn)
    return drawn


class Kills:
    """The engine."""

    def __init__(self, daemons: Daemons, report: Callable[[str], None] = lambda _: None) -> None:
        self.result = Result()
        self.delegators: list[Daemon] = []
        self.workers: list[Daemon] = []
        self._daemons = daemons
        self._report = report
        self._unlogged: list[Lease] = []
        self._numbers = itertools.count(1)
        self._bind = "tcp://127.0.0.1:*"

    def run(self, points: Iterable[tuple[str, int]]) -> Result:
        """Kill at each of these points, one after another."""
        with Load() as load:
            for k, (point, times) in enumerate(points):
                if k == 0:
                    self._start(load)
                self._kill_at(point, times, load)
            self._delegator()
            self._renewed()
            load.go_on("after all kills")
            self._finish(load)
        return self.result

    def _start(self, load: Load) -> None:
        delegator = self._delegator(new=True)
        until(delegator.find_address, "the delegator to serve")
        self._bind = delegator.address
        for _ in range(WORKERS):
            self.workers.append(self._daemons.worker(to=delegator))
        self._await_holders()
        for worker in self.workers:
            load.follow(worker)
        load.go_on()
        delegator.kill()

    def _kill_at(self, point: str, times: int, load: Load) -> None:
        kind = point.partition(":")[0]
        # Other settings than those of the last start, whichever they were.
        most = MACHINES - 2 - len(self.result.points) % 2
        flags = ("--machines", f"0-{most}") if kind == "meta" else ()
        victim = self._delegator(point, *flags, times=times)
        guests: list[Daemon] = []
        if kind != "meta":
            self._renewed()
            if kind == "release":
                guests = [self._daemons.worker(to=self._bind)]
                self._await_holders(guests)
            victim.signal(signal.SIGUSR1)
            if kind == "mark":  # which is written if there is nothing else to commit
                self._signal_workers(signal.SIGSTOP)
            if kind == "acquire":
                guests = [self._daemons.worker(to=self._bind)]
            for guest in guests if kind == "release" else ():
                guest.signal(signal.SIGTERM)
        code = victim.wait()
        self._signal_workers(signal.SIGCONT)
        assert code == -signal.SIGKILL, f"{point} was not passed, {code}:\n{victim.log()[-2000:]}"
        self.result.points.append(f"{point} ({times})")
        self._report(f"killed at {point}, passing {times}")
        self._note_releases()
        if kind == "acquire":
            # The guests get what the dead one had granted them, or another; then they go.
            again = self._delegator()
            until(again.find_address, "the delegator to serve again")
            self._await_holders(guests)
            for guest in guests:
                load.follow(guest).go_on(f"to a guest, after {point}")
                load.leave(guest)
                load.workers.remove(guest)
                if code := guest.terminate():
                    self.result.violations.append(f"{guest.name} ended with exit code {code}")
            again.kill()
        for guest in guests:
            guest.wait()

    def _finish(self, load: Load) -> None:
        result = self.result
        last = self.delegators[-1]
        until(lambda: len(names_of(last)) == WORKERS, "only the workers to hold machine IDs")
        result.violations += [f"{name} was told that its lease is lost" for name in load.lost()]
        leases = [*leases_in(d.log_path for d in self.delegators), *self._unlogged]
        verdict = result.verdict
        windows = windows_of(leases, verdict)
        judge(runs_of(load.runs), windows, DEFAULT, verdict)
        result.violations += verdict.violations
        result.violations += leaked(leases)
        if not verdict.ids:
            result.violations.append("no IDs were taken")
        used = {lease[1] for lease in leases}
        if len(used) > MACHINES:
            result.violations.append(f"{len(used)} machine IDs were used")

    # --- parts ---

    def _delegator(self, point: str = "", *flags: str, times: int = 1, new: bool = False) -> Daemon:
        flags = flags or ("--machines", f"0-{MACHINES - 1}")
        daemon = self._daemons.delegator(
            *flags,
            name=f"delegator-{next(self._numbers)}",
            bind=self._bind,
            new=new or not self.workers,
            ttl=f"{TTL_S}s",
            via=(LAUNCHER, point, str(times)) if point else (),
        )
        self.delegators.append(daemon)
        return daemon

    def _renewed(self) -> None:
        """Wait until every worker has a grant by the latest delegator."""
        last = self.delegators[-1]
        until(lambda: len({lease[1] for lease in last.leases("renewed")}) >= WORKERS, "all workers to renew")

    def _await_holders(self, guests: Iterable[Daemon] = ()) -> None:
        names = {worker.name for worker in (*self.workers, *guests)}
        last = self.delegators[-1]
        until(lambda: names <= set(names_of(last)), f"{names} to hold machine IDs")

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self.workers:
            worker.signal(number)

    def _note_releases(self) -> None:
        """Note the releases that the dead delegator had committed and not logged yet."""
        logged = {(lease[1], lease[2]) for lease in leases_in(d.log_path for d in self.delegators)}
        logged |= {(lease[1], lease[2]) for lease in self._unlogged}
        sql = "SELECT machine, gen, start, fence FROM machine WHERE token IS NULL"
        # Not for writing: the last connection to close a database moves its log into the main file.
        with closing(sqlite3.connect(f"file:{self._daemons.folder}/store.db?mode=ro", uri=True)) as db:
            for machine, gen, start, fence in db.execute(sql):
                if (machine, gen) not in logged:
                    self._unlogged.append(("released", machine, gen, start, fence))


def leaked(leases: Iterable[Lease]) -> list[str]:
    """Generations that no delegator ever logged: grants that went to no holder."""
    told: dict[int, set[int]] = defaultdict(set)
    for _, machine, gen, _, _ in leases:
        told[machine].add(gen)
    return [
        f"machine {machine}: gens {sorted(missing)} were granted to no holder"
        for machine, gens in told.items()
        if (missing := set(range(1, max(gens))) - gens)
    ]
