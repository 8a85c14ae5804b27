"""Load on a cluster while something is done to it: takers in threads, and what came of it, checked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Final, Self

import zflake
from tests.jobs.checker import Verdict, check_runs, runs_of, ticks_of
from tests.system.daemons import Daemon, until
from zflake.core.layout import DEFAULT, Layout
from zflake.core.mint import Run

PAUSE_S: Final = 0.01
COUNT: Final = 50
TIMEOUT_S: Final = 0.4


class Taker:
    """A thread that takes IDs from one worker, and keeps the runs and the errors."""

    def __init__(self, endpoint: str) -> None:
        self.runs: list[Run] = []
        self.refused: Counter[str] = Counter()
        self._endpoint = endpoint
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def go_on(self, what: str = "") -> None:
        """Wait for IDs that were asked for after now."""
        mark = len(self.runs) + 2
        until(lambda: len(self.runs) > mark, f"IDs from {self._endpoint} {what}")

    def _take(self) -> None:
        with zflake.Client(self._endpoint, route="direct", timeout=TIMEOUT_S) as client:
            while not self._stopping.wait(PAUSE_S):
                try:
                    self.runs += client._take(COUNT)
                except zflake.ZflakeError as error:
                    self.refused[type(error).__name__] += 1


class Load:
    """A taker for each worker that it is told to follow."""

    def __init__(self, workers: Iterable[Daemon] = ()) -> None:
        self.takers: dict[str, Taker] = {}
        self.workers: list[Daemon] = []
        for worker in workers:
            self.follow(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for taker in self.takers.values():
            taker._stopping.set()
        for taker in self.takers.values():
            taker.stop()

    def follow(self, worker: Daemon) -> Taker:
        taker = self.takers[worker.name] = Taker(worker.address)
        self.workers.append(worker)
        return taker

    def leave(self, worker: Daemon) -> None:
        """Ask this one no more."""
        self.takers[worker.name].stop()
        self.workers.remove(worker)

    def go_on(self, what: str = "", *, only: Iterable[Daemon] | None = None) -> None:
        """Wait for IDs from each worker that were asked for after now."""
        for worker in self.workers if only is None else only:
            self.takers[worker.name].go_on(what)

    @property
    def runs(self) -> list[Run]:
        return [run for taker in self.takers.values() for run in taker.runs]

    def ticks(self) -> list[int]:
        return ticks_of(self.runs)

    def check(self, delegators: Iterable[Daemon]) -> Verdict:
        """The checker's verdict; the IDs of one worker must ascend as well."""
        verdict = check_runs([d.log_path for d in delegators], runs_of(self.runs))
        for name, taker in self.takers.items():
            firsts = [first for first, _, _ in taker.runs]
            if firsts != sorted(firsts):
                verdict.violations.append(f"the IDs of {name} do not ascend")
        return verdict

    def lost(self) -> list[str]:
        """The workers that were told that their leases are lost."""
        return [worker.name for worker in self.workers if worker.said("lost machine")]


def moments(load: Load, layout: Layout = DEFAULT) -> list[float]:
    """When the IDs say that they were minted, as `time.time()` counts."""
    return [(layout.epoch_ms + tick * layout.tick_ms) / 1000 for tick in load.ticks()]
