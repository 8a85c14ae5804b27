"""A client of a job, a process of its own: takes IDs, and writes down each run of them and each error.

`python -m tests.jobs.takers ORDERS`, with `Orders` as a JSON object.  OUT gets a record for each run: its first ID
and its length, little-endian uint64; OUT.errors a line for each call that failed, after when that was (seconds of
the monotonic clock).  The client goes on until it is killed, or its parent is gone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

import zflake
from tests.jobs.checker import RECORD, Runs, runs_in, runs_of
from tests.system.daemons import Daemons, Process

LISTS: Final = (1, 1, 1, 1, 2, 10, 100, 1_000, 5_000, 20_000)
"""Sizes of calls for lists of IDs, each as likely as the others; 1 is `next_id`."""
RUNS: Final = (1, 7, 100, 1_000, *(4_096,) * 4, *(16_384,) * 4)
"""Sizes of calls for runs."""
BITES: Final = 50
"""Calls a second that a client makes at least that is held to a rate."""
MOST: Final = 100
"""IDs that such a client takes at a time, whatever its rate is."""


@dataclass
class Orders:
    """The orders of a client."""

    endpoints: list[str]
    route: str
    seed: int
    out: str
    rate: int = 0
    """IDs that it may take in a second; 0: as many as it can get."""
    lists: bool = False
    """Whether it takes lists of IDs, as callers do, or runs, as many as there can be."""
    timeout_s: float = 30.0
    """Seconds that a call has: longer than any outage that the faults make, and than a commit on a slow disk."""


def take(client: zflake.Client, orders: Orders) -> None:
    """Take IDs until the parent is gone."""
    draw, parent = random.Random(orders.seed), os.getppid()
    bite = max(1, min(MOST, orders.rate // BITES)) if orders.rate else max(LISTS)
    sizes = [size for size in (LISTS if orders.lists else RUNS) if size <= bite]
    taken, began = 0, time.monotonic()
    out = Path(orders.out)
    with out.open("ab", buffering=0) as runs, out.with_suffix(".errors").open("a", buffering=1) as errors:
        while os.getppid() == parent:
            size = draw.choice(sizes)
            try:
                got = _get(client, size, lists=orders.lists)
            except Exception as error:  # noqa: BLE001  (whatever it is, it must not be)
                errors.write(f"{time.monotonic():.3f} after {taken} IDs, asking for {size}: {error!r}\n")
                continue
            runs.write(got.astype("<u8").tobytes())
            if (sum_ := int(got[:, 1].sum())) != size:
                errors.write(f"{time.monotonic():.3f} after {taken} IDs: asked for {size}, got {sum_}\n")
            taken += size
            if orders.rate:
                time.sleep(max(0.0, began + taken / orders.rate - time.monotonic()))


def _get(client: zflake.Client, size: int, *, lists: bool) -> Runs:
    if lists:
        return runs_in([client.next_id()] if size == 1 else client.next_ids(size))
    return runs_of(client._take(size))


@dataclass
class Taker:
    """A client under way, and what it has written."""

    process: Process
    path: Path
    route: str
    _read: int = field(default=0, init=False)
    _taken: int = field(default=0, init=False)

    @classmethod
    def start(cls, daemons: Daemons, name: str, orders: Orders) -> Taker:
        command = [sys.executable, "-m", "tests.jobs.takers", json.dumps(asdict(orders))]
        return cls(daemons.process(command, name), Path(orders.out), orders.route)

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
        return path.read_text().splitlines() if path.exists() else ["0 it never began"]


if __name__ == "__main__":
    given = Orders(**json.loads(sys.argv[1]))
    with zflake.Client(given.endpoints, route=given.route, timeout=given.timeout_s) as client:
        take(client, given)
