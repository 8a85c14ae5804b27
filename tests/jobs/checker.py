"""Whether all IDs of a job are distinct and inside granted windows, from what clients and delegators wrote down.

Delegators log each grant and each release before the answer leaves; clients write each run of IDs.  Neither the
delegators' stores nor the workers are asked.  A run is one interval, so up to a tick's IDs cost 16 bytes and one
comparison.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tests.system.daemons import read_events
from zflake.core.layout import DEFAULT, Layout
from zflake.core.mint import Run

Ids: TypeAlias = npt.NDArray[np.uint64]
Runs: TypeAlias = npt.NDArray[np.uint64]
"""A row for each run: its first ID and its length."""
Lease: TypeAlias = tuple[str, int, int, int, int]
"""`(verb, machine, gen, start, end)`; if the verb is `released`, the last is the new fence."""
Windows: TypeAlias = dict[int, list[tuple[int, int]]]
"""The windows of each machine, ascending: `[start, end)` as truncated by releases."""

RECORD: Final = 16
"""Bytes of one run in a file: first and count, each a little-endian uint64."""
EXAMPLES: Final = 3
"""Examples that a violation names, at most."""


@dataclass
class Verdict:
    """The findings of a check; sound if nothing is in `violations`."""

    ids: int = 0
    windows: int = 0
    runs: int = 0
    seconds: float = 0.0
    """How long the check took."""
    by_machine: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"checked: {self.runs:,} runs in {self.windows:,} windows, in {self.seconds:.1f} s"


def leases_in(logs: Iterable[Path]) -> Iterator[Lease]:
    """The leases that delegators logged."""
    for log in logs:
        for event in read_events(log):
            if (lease := event.get("lease")) is not None:
                yield tuple(lease)


def windows_of(leases: Iterable[Lease], verdict: Verdict) -> Windows:
    """The windows that were granted, truncated where they were released; notes those that overlap."""
    records: dict[tuple[int, int], Lease] = {}
    for lease in leases:
        verb, machine, gen, start, end = lease
        known = records.setdefault((machine, gen), lease)
        # A repeat is logged again, under the verb of the request that repeated it.
        if known[3:] != (start, end) or (known[0] == "released") != (verb == "released"):
            verdict.violations.append(f"machine {machine} gen {gen} was written twice: {known}, {lease}")
    windows: Windows = {}
    for _, (verb, machine, _, start, end) in sorted(records.items()):
        granted = windows.setdefault(machine, [])
        if verb == "released":
            granted[:] = [(s, min(e, end)) for s, e in granted if s < end]
        else:
            granted.append((start, end))
    for machine, granted in windows.items():
        granted.sort()
        for (start, end), (next_start, next_end) in itertools.pairwise(granted):
            if next_start < end:
                verdict.violations.append(
                    f"machine {machine}: windows [{start}, {end}) and [{next_start}, {next_end}) overlap"
                )
    return windows


def runs_of(runs: Iterable[Run]) -> Runs:
    """Runs as the wire has them; their steps are the layout's."""
    return np.array([(first, count) for first, _, count in runs], dtype=np.uint64).reshape(-1, 2)


def runs_in(ids: Sequence[int], layout: Layout = DEFAULT) -> Runs:
    """IDs as runs, whatever the order in which they came."""
    each = np.sort(np.array(ids, dtype=np.uint64))
    ticks = each >> np.uint64(layout.time_shift)
    goes_on = (np.diff(each) == np.uint64(1 << layout.sequence_shift)) & (np.diff(ticks) == 0)
    starts = np.flatnonzero(np.concatenate([[True], ~goes_on])[: each.size])
    return np.stack([each[starts], np.diff(starts, append=each.size).astype(np.uint64)], axis=1)


def read_runs(files: Iterable[Path]) -> Runs:
    """The runs in files; a record that is cut off at the end of one was never taken in."""
    parts = [np.empty((0, 2), dtype=np.uint64)]
    for path in files:
        whole = path.stat().st_size // RECORD
        parts.append(np.fromfile(path, dtype="<u8", count=2 * whole).astype(np.uint64).reshape(-1, 2))
    return np.concatenate(parts)


def check_runs(logs: Iterable[Path], runs: Runs, layout: Layout = DEFAULT) -> Verdict:
    """Check runs against what delegators logged."""
    return check_stores([logs], runs, layout)


def check_stores(stores: Iterable[Iterable[Path]], runs: Runs, layout: Layout = DEFAULT) -> Verdict:
    """The same if a store took the place of one that was lost: it counts generations anew."""
    return check_eras(map(leases_in, stores), runs, layout)


def check_eras(eras: Iterable[Iterable[Lease]], runs: Runs, layout: Layout = DEFAULT) -> Verdict:
    """The same if what each store granted has been read already."""
    verdict, began = Verdict(), time.monotonic()
    windows: Windows = {}
    for leases in eras:
        for machine, granted in windows_of(leases, verdict).items():
            earlier = windows.setdefault(machine, [])
            if earlier and granted and granted[0][0] < earlier[-1][1]:
                verdict.violations.append(
                    f"machine {machine}: a new store granted from {granted[0][0]}, before {earlier[-1][1]}"
                )
            earlier += granted
    judge(runs, windows, layout, verdict)
    verdict.seconds = time.monotonic() - began
    return verdict


def judge(runs: Runs, windows: Windows, layout: Layout, verdict: Verdict) -> None:
    """Note in `verdict` how many IDs there are, which come twice, and which lie outside every window."""
    verdict.windows, verdict.runs = sum(map(len, windows.values())), len(runs)
    firsts, counts = runs[:, 0], runs[:, 1]
    verdict.ids = total = int(counts.sum())
    full = np.uint64(layout.ids_per_tick)
    machines = (firsts >> np.uint64(layout.machine_shift)) & np.uint64(layout.machines - 1)
    sequences = (firsts >> np.uint64(layout.sequence_shift)) & (full - np.uint64(1))
    # By time, machine, sequence, whatever their order in the ID: a run is one interval of these numbers.
    ticks = firsts >> np.uint64(layout.time_shift)
    starts = (ticks * np.uint64(layout.machines) + machines) * full + sequences
    order = np.argsort(starts)
    starts, ends = starts[order], (starts + counts)[order]
    reached = np.maximum.accumulate(ends)
    again = starts[1:] < reached[:-1]
    distinct = int((ends[:1] - starts[:1]).sum())
    fresh = np.maximum(ends[1:], reached[:-1]) - np.maximum(starts[1:], reached[:-1])
    distinct += int(fresh.sum())
    if distinct != total or again.any():
        examples = firsts[order][1:][again][:EXAMPLES].tolist()
        verdict.violations.append(f"{total - distinct} IDs came again, in runs such as from {examples}")
    if (torn := firsts[(sequences + counts > full) | (counts < 1)]).size:
        verdict.violations.append(
            f"{torn.size} runs leave their tick, such as from {torn[:EXAMPLES].tolist()}"
        )
    if (strangers := firsts[~covered(machines, ticks, windows, layout)]).size:
        verdict.violations.append(
            f"{strangers.size} runs lie outside every granted window, such as from {strangers[:EXAMPLES].tolist()}"
        )
    for machine in np.unique(machines).tolist():
        verdict.by_machine[machine] = int(counts[machines == machine].sum())


def covered(machines: Ids, ticks: Ids, windows: Windows, layout: Layout) -> npt.NDArray[np.bool_]:
    """Whether a window holds each tick on its machine."""
    span = layout.end_tick + 1  # an end may be one past the last tick
    bounds = np.array(
        [
            (machine * span + start, machine * span + end)
            for machine, granted in sorted(windows.items())
            for start, end in granted
        ],
        dtype=np.uint64,
    ).reshape(-1, 2)
    if not bounds.size:
        return np.zeros(len(ticks), dtype=np.bool_)
    keys = machines * np.uint64(span) + ticks
    at = np.searchsorted(bounds[:, 0], keys, side="right")
    inside: npt.NDArray[np.bool_] = (at > 0) & (keys < bounds[np.maximum(at, 1) - 1, 1])
    return inside


def ticks_of(runs: Sequence[Run], layout: Layout = DEFAULT) -> list[int]:
    """The ticks of runs, in the order in which they came."""
    return [first >> layout.time_shift for first, _, _ in runs]
