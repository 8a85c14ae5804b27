"""Virtual time, hosts with clocks of their own, processes that pause and die, and a network between them.

Everything happens in one thread: an event is a call at a virtual time.  A process that waits (for a slow
store) lets the world go on by `World.elapse`, a loop inside the loop; so races come about without threads.
All times are in microseconds.  `World.true_us` is the true time, which no process ever sees.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final

from tests.sim.fault_plan import FINE

MILLION: Final = 1_000_000
DEEPEST: Final = 3
"""How many processes may wait for a slow store inside each other."""


class Host:
    """A machine's two clocks: the local one drifts, the wall clock drifts and steps."""

    def __init__(self, world: World, wall_us: int, local_us: int, ppm: int) -> None:
        self._world = world
        self._wall_us = wall_us
        self._local_us = local_us
        self._rate = MILLION + ppm

    def local_us(self) -> int:
        return self._local_us + self._world.true_us * self._rate // MILLION

    def wall_us(self) -> int:
        return self._wall_us + self._world.true_us * self._rate // MILLION

    def step_wall(self, by_us: int) -> None:
        self._wall_us += by_us

    def when(self, local_us: int) -> int:
        """The true time at which the local clock shows `local_us`, or a little later."""
        return -((self._local_us - local_us) * MILLION // self._rate)

    def copy(self) -> Host:
        return Host(self._world, self._wall_us, self._local_us, self._rate - MILLION)


class Process:
    """What lives on a host: it may be paused, and dies once."""

    def __init__(self, world: World, host: Host, name: str) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.dead = False
        self.paused_until_us = 0

    def die(self) -> None:
        self.dead = True

    def at_local(self, local_us: int, do: Callable[..., object], *args: Any) -> None:
        """Call `do` when the local clock shows `local_us`."""
        self.world.at(self.host.when(local_us), self, do, *args)

    def note(self, text: str) -> None:
        self.world.note(self.name, text)


class World:
    """The queue of what will happen, and the network's plan."""

    def __init__(self, rng: Random, trace: Callable[[str], None] | None = None) -> None:
        self.rng = rng
        self.true_us = 0
        self.tracing = trace is not None
        self.faults: Counter[str] = Counter()
        self._trace = trace
        self._queue: list[tuple[int, int, Process | None, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0
        self._depth = 0
        self.weather = FINE
        self.cut: set[tuple[str, str]] = set()

    def note(self, who: str, text: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.true_us / 1e6:11.6f} {who:<4} {text}")

    def fault(self, kind: str, who: str = "", text: str = "") -> None:
        """Count a fault, and tell of it."""
        self.faults[kind] += 1
        if self.tracing:
            self.note(who, f"*** {kind} {text}")

    def at(self, when_us: int, process: Process | None, do: Callable[..., object], *args: Any) -> None:
        """Call `do(*args)` at a true time, unless `process` is dead by then; a paused one is late."""
        self._count += 1
        when_us = max(when_us, self.true_us)
        heapq.heappush(self._queue, (when_us, self._count, process, do, args))

    def after(self, wait_us: int, process: Process | None, do: Callable[..., object], *args: Any) -> None:
        self.at(self.true_us + wait_us, process, do, *args)

    def run(self, until_us: int) -> None:
        """Let happen what happens until a true time."""
        queue = self._queue
        pop = heapq.heappop
        while queue and queue[0][0] <= until_us:
            event = pop(queue)
            when_us, _, process, do, args = event
            self.true_us = max(self.true_us, when_us)  # it was less where somebody waited in between
            if process is not None:
                if process.dead:
                    continue
                if process.paused_until_us > self.true_us:
                    heapq.heappush(queue, (process.paused_until_us, *event[1:]))
                    continue
            do(*args)
        self.true_us = max(self.true_us, until_us)

    def elapse(self, wait_us: int) -> None:
        """Let the others go on while the caller waits; at once where too many wait already."""
        if self._depth < DEEPEST:
            self._depth += 1
            try:
                self.run(self.true_us + wait_us)
            finally:
                self._depth -= 1

    def send(self, source: Process, target: Process, do: Callable[..., object], *args: Any) -> None:
        """Carry a message: `do(*args)` at the target, once, twice, late or never."""
        rng, weather = self.rng, self.weather
        if self.cut and (source.name, target.name) in self.cut:
            self.faults["cut off"] += 1
            return
        if weather.drop and rng.random() < weather.drop:
            self.fault("drop", source.name, f"to {target.name}: {do.__name__}")
            return
        flight_us = 40 + int(rng.random() * 400)
        if weather.delay and rng.random() < weather.delay:
            self.faults["delay"] += 1
            flight_us += int(rng.random() * weather.delay_us)
        self.at(self.true_us + flight_us, target, do, *args)
        if weather.duplicate and rng.random() < weather.duplicate:
            self.fault("duplicate", source.name, f"to {target.name}: {do.__name__}")
            again_us = int(rng.random() * (weather.delay_us or 20_000))
            self.at(self.true_us + flight_us + again_us, target, do, *args)
