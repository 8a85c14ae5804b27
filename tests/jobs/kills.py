"""A cluster whose delegator dies by SIGKILL at one point after another, and comes back on its store each time.

Each delegator is run by failpoints.py.  It is armed once every worker has renewed with it, so that each
point is passed by a cluster at rest; the workers, and those who take IDs from them, go on throughout.
"""

from __future__ import annotations

import random
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.jobs.checker import Lease, Verdict, judge, leases_in, runs_of, windows_of
from tests.jobs.job import Report, SoleDelegator, told
from tests.jobs.load import Load
from tests.system.daemons import Daemon, Daemons
from tests.system.failpoints import DELEGATOR_POINTS
from zflake.core.layout import DEFAULT

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
        title = f"kills: {len(self.points)} kills, {self.verdict.ids:,} IDs in {self.verdict.windows} windows"
        sound = "no window granted twice, each to a holder, no ID twice, no lease lost"
        return told(title, [], self.violations, sound)


def run(
    folder: Path,
    points: Sequence[tuple[str, int]],
    *,
    lanes: int = 3,
    report: Report = lambda _: None,
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


class Kills(SoleDelegator):
    """The kills in one cluster."""

    ttl_s = 1
    machines = MACHINES

    def __init__(self, daemons: Daemons, report: Report) -> None:
        super().__init__(daemons, random.Random(), report)
        self.result = Result(violations=self.violations)
        self._unlogged: list[Lease] = []

    def run(self, points: Iterable[tuple[str, int]]) -> Result:
        """Kill at each of these points, one after another."""
        with Load() as load:
            self._start(load)
            for point, times in points:
                self._kill_at(point, times, load)
            self.begin()
            self.await_renewals()
            load.go_on("after all kills")
            self._finish(load)
        return self.result

    def _start(self, load: Load) -> None:
        delegator = self.begin()
        for _ in range(WORKERS):
            load.follow(self.join())
        load.go_on()
        delegator.kill()

    def _kill_at(self, point: str, times: int, load: Load) -> None:
        kind = point.partition(":")[0]
        # Other settings than those of the last start, whichever they were.
        machines = MACHINES - 1 - len(self.result.points) % 2 if kind == "meta" else MACHINES
        victim = self.begin(machines=machines, via=(LAUNCHER, point, str(times)))
        if kind != "meta":
            self.await_renewals()
            leaver = self.join() if kind == "release" else None
            victim.signal(signal.SIGUSR1)
            if kind == "mark":  # which is written if there is nothing else to commit
                self._signal_workers(signal.SIGSTOP)
            elif kind == "acquire":
                self.start_worker()
            elif leaver is not None:
                self.gone.append(leaver)
                leaver.signal(signal.SIGTERM)
        code = victim.wait()
        self._signal_workers(signal.SIGCONT)
        assert code == -signal.SIGKILL, f"{point} was not passed, {code}:\n{victim.log()[-2000:]}"
        self.result.points.append(f"{point} ({times})")
        self.report(f"killed at {point}, passing {times}")
        self._note_releases()
        if kind == "acquire":
            self._welcome(self.workers[-1], f"to a guest, after {point}", load)
        for worker in self.gone:
            worker.wait()

    def _welcome(self, guest: Daemon, what: str, load: Load) -> None:
        """See that a guest gets what the dead delegator had granted it, or another machine ID; then it goes."""
        delegator = self.begin()
        self.wait(lambda: guest.name in self.holders(), f"{guest.name} to get a machine ID")
        load.follow(guest).go_on(what)
        load.leave(guest)
        self.leave(guest)
        delegator.kill()

    def _finish(self, load: Load) -> None:
        self.wait(lambda: len(self.holders()) == WORKERS, "only the workers to hold machine IDs")
        violations, verdict = self.violations, self.result.verdict
        violations += [f"{name} was told that its lease is lost" for name in load.lost()]
        leases = [*leases_in(d.log_path for d in self.delegators), *self._unlogged]
        judge(runs_of(load.runs), windows_of(leases, verdict), DEFAULT, verdict)
        violations += verdict.violations
        violations += leaked(leases)
        if not verdict.ids:
            violations.append("no IDs were taken")
        used = {lease[1] for lease in leases}
        if len(used) > MACHINES:
            violations.append(f"{len(used)} machine IDs were used")

    # --- parts ---

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self.present:
            worker.signal(number)

    def _note_releases(self) -> None:
        """Note the releases that the dead delegator had committed and not logged yet."""
        logged = {(lease[1], lease[2]) for lease in leases_in(d.log_path for d in self.delegators)}
        logged |= {(lease[1], lease[2]) for lease in self._unlogged}
        sql = "SELECT machine, gen, start, fence FROM machine WHERE token IS NULL"
        # Not for writing: the last connection to close a database moves its log into the main file.
        with closing(sqlite3.connect(f"file:{self.daemons.folder}/store.db?mode=ro", uri=True)) as db:
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
