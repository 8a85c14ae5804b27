"""Times without a window: when there were any, how IDs ended before them and began after them, who failed in them.

A client may only be refused while no holder has a window that holds the timeline's now.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

import numpy as np

from tests.jobs.checker import EXAMPLES, Lease, Runs
from zflake.core.layout import DEFAULT

SERVED_MS: Final = 2_000
"""How long before the end of the last window IDs may have been taken last."""
BACK_MS: Final = 5_000
"""How long after the beginning of the next one a call may still fail, and no ID be taken."""

Gap: TypeAlias = tuple[int, int]
"""`[start, end)` in ticks: a time that no window holds."""
End: TypeAlias = tuple[int, int, int]
"""A holder that minted no more, killed or told that its lease is lost: its machine ID, the tick, and how many
leases had been logged that may be its own."""


@dataclass
class Outage:
    """A time without a window, and how IDs ended before it and began after it."""

    gap: Gap
    ended_ms: int
    """How long before it the last ID was taken."""
    began_ms: int
    """How long after it the next one was."""
    failed: int = 0
    """How many calls failed."""


def gaps_of(leases: Sequence[Lease], ended: Iterable[End] = (), forgotten: Container[int] = ()) -> list[Gap]:
    """The times that no window of anybody who mints holds, from the first to the last.

    `forgotten` are the leases, by their places, that the store knows nothing of: who holds one is in no directory.
    """
    ended = list(ended)
    windows = []
    for i, (verb, machine, _, start, end) in enumerate(leases):
        ends = [end, *(tick for its, tick, logged in ended if its == machine and i < logged)]
        if verb != "released" and i not in forgotten and start < min(ends):
            windows.append((start, min(ends)))
    gaps: list[Gap] = []
    reached: int | None = None
    for start, end in sorted(windows):
        if reached is not None and start > reached:
            gaps.append((reached, start))
        reached = end if reached is None else max(reached, end)
    return gaps


def outages_between(gaps: Iterable[Gap], runs: Runs) -> list[Outage]:
    """The gaps, with what the runs say of them."""
    ticks = np.sort((runs[:, 0] >> np.uint64(DEFAULT.time_shift)).astype(np.int64))
    outages = []
    for start, end in gaps:
        before, after = ticks[ticks < start], ticks[ticks >= end]
        ended = start - int(before[-1]) if before.size else start
        outages.append(Outage((start, end), ended, int(after[0]) - end if after.size else end))
    return outages


def cut_short(outages: Iterable[Outage]) -> list[str]:
    """The windows that were not used to their ends, or from their beginnings on."""
    found = []
    for outage in outages:
        if outage.ended_ms > SERVED_MS:
            found.append(
                f"no IDs in the last {outage.ended_ms} ms of a window, while no holder was granted another"
            )
        if outage.began_ms > BACK_MS:
            found.append(f"no IDs in the first {outage.began_ms} ms of windows after there were none")
    return found


def unexcused(
    name: str, errors: Iterable[str], outages: Sequence[Outage] = (), offset_us: int = 0
) -> list[str]:
    """The failed calls of a client's that no outage explains; those that one does are counted there."""
    found = []
    for error in errors:
        at, _, what = error.partition(" ")
        tick = tick_at(float(at), offset_us)
        for outage in outages:
            if outage.gap[0] <= tick < outage.gap[1] + BACK_MS:
                outage.failed += 1
                break
        else:
            found.append(f"{name} saw an error {what}")
    rest = [f"and {len(found) - EXAMPLES} more"] if len(found) > EXAMPLES else []
    return [*found[:EXAMPLES], *rest]


def tick_of(time: datetime) -> int:
    """The tick of a wall clock's time."""
    return int(time.timestamp() * 1000 - DEFAULT.epoch_ms) // DEFAULT.tick_ms


def tick_at(monotonic_s: float, offset_us: int) -> int:
    """The tick of the monotonic clock's time, the timeline being so far ahead of that."""
    return int(monotonic_s * 1e6 + offset_us - DEFAULT.epoch_us) // DEFAULT.tick_us
