"""The store of a simulated cluster: a `MemoryStore` whose contents outlive its clients, and may be lost.

A `Connection` is what a delegator holds.  All connections share one disk, so whatever the contract says of
one store holds between them, too; what may go wrong on the way is added here:

slow        other processes run between the call and its effect, and between its effect and the answer
outage      every call fails
unknown     a swap fails, and has happened, has not, or will happen later
crash       the process dies in the middle: before the effect, or after it and before the answer
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from tests.sim.checker import Checker
from tests.sim.world import Process, World
from zflake.core.lease import Mark, Meta, Record, Swap
from zflake.errors import StoreError
from zflake.stores.keyed import META, Key, Thing
from zflake.stores.memory import MemoryStore


class Crashed(BaseException):
    """The process that made this call has died meanwhile."""


class Disk(MemoryStore):
    """What is durable.  The checker is told of each record and meta that is written, and of the time it was."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self.checker = checker
        self.life = "life 0"
        self.losses = 0
        """How often it went back without anything to show for it."""
        self.shared = False
        self.out = False

    def snapshot(self) -> dict[str, Any]:
        """All that is durable, as it is now."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name.startswith("_")}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Be what a snapshot was."""
        vars(self).update(copy.deepcopy(snapshot))

    def apply(self, swaps: Sequence[Swap], mark: Mark | None, used_us: int | None = None) -> list[bool]:
        """Swap at once, for a delegator whose now was `used_us`."""
        meta = self.meta()
        known = meta is not None and meta.incarnation == self.life
        done = MemoryStore.swap(self, swaps if known else (), mark)
        if used_us is not None:
            self.checker.used(used_us)
        return done if known else [False] * len(swaps)

    def _write(self, key: Key, thing: Thing | None) -> None:
        if isinstance(thing, Meta):
            self.checker.settled(thing)
        elif isinstance(thing, Record):
            self.checker.stored(self.by_machine(thing.machine), thing)
        super()._write(key, thing)


class Connection(Disk):
    """A delegator's view of the disk: it shares the disk's contents, and adds what goes wrong."""

    __slots__ = ("_clock", "_disk", "_process", "_unused_from", "_world")

    def __init__(self, world: World, process: Process, disk: Disk, clock: Callable[[], int]) -> None:
        self.__dict__ = disk.__dict__
        self._unused_from = {}  # what this process has seen
        self._world = world
        self._process = process
        self._disk = disk
        self._clock = clock

    @property
    def exclusive(self) -> bool:  # type: ignore[override]
        return not self._disk.shared

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        return self._disk.life

    def _get(self, keys: Sequence[Key]) -> list[Any]:
        # Records do not wait: what may happen meanwhile happens before the next call that does.
        if self.out or META in keys:
            self._reach()
        return super()._get(keys)

    def _keys(self, low: Key, high: Key, *, limit: int = 0, last: bool = False) -> list[Key]:
        self._reach()
        return super()._keys(low, high, limit=limit, last=last)

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        self._reach()
        return super().swap_meta(old, new)

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        world, disk, process = self._world, self._disk, self._process
        rng, weather = world.rng, world.weather
        used_us = self._clock()
        self._reach()
        if not swaps:
            return disk.apply(swaps, mark, used_us)
        if weather.crash and rng.random() < weather.crash:
            happened = rng.random() < 0.5
            world.fault("crash in a swap", process.name, "after it" if happened else "before it")
            if happened:
                disk.apply(swaps, mark, used_us)
            process.die()
            raise Crashed
        if weather.unknown and rng.random() < weather.unknown:
            kind = rng.randrange(3)
            world.fault("unknown outcome", process.name, ("before", "after", "later")[kind])
            if kind == 1:
                disk.apply(swaps, mark, used_us)
            elif kind == 2:
                world.after(int(rng.random() * 3_000_000), None, self._late, swaps, mark, disk.losses)
            raise StoreError("it is unknown whether that was written")
        done = disk.apply(swaps, mark, used_us)
        self._may_wait("after")
        return done

    def close(self) -> None:
        """What is durable stays."""

    def _late(self, swaps: Sequence[Swap], mark: Mark | None, losses: int) -> None:
        if losses != self._disk.losses:
            return  # gens come twice then, which nobody can tell apart: a limit that the README states
        done = self._disk.apply(swaps, mark)
        if self._world.tracing:
            self._process.note(f"a swap of unknown outcome comes through late: {done}")

    def _reach(self) -> None:
        if self._disk.out:
            self._world.faults["store out of reach"] += 1
            raise StoreError("the store is out of reach")
        self._may_wait("before")

    def _may_wait(self, when: str) -> None:
        world = self._world
        if not world.weather.slow or world.rng.random() >= world.weather.slow:
            return
        wait_us = int(world.rng.random() ** 3 * world.weather.slow_us)
        world.faults["slow store"] += 1
        if world.tracing:
            self._process.note(f"waits for the store for {wait_us / 1e3:.1f} ms, {when} the call")
        world.elapse(wait_us)
        if self._process.dead:
            raise Crashed
