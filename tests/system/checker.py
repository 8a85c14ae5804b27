"""Whether all IDs of a job are distinct and inside granted windows, from what clients and delegators wrote down.

Delegators log each grant and each release before the answer leaves; clients write each ID.  Neither the
delegators' stores nor the workers are asked.  IDs are checked in parts, by ranges of their values: a
duplicate falls into one part, whoever took it, and memory is bounded by the size of a part.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tests.system.daemons import read_events
from zflake.core.layout import Layout

Ids: TypeAlias = npt.NDArray[np.uint64]
Lease: TypeAlias = tuple[str, int, int, int, int]
"""`(verb, machine, gen, start, end)`; the last is the new fence where the verb is `released`."""
Windows: TypeAlias = dict[int, list[tuple[int, int]]]
"""By machine, ascending: `[start, end)` as truncated by releases."""

PART: Final = 4_000_000
"""How many IDs are checked at a time, about."""
BLOCK: Final = 1_000_000
EXAMPLES: Final = 3


@dataclass
class Verdict:
    """What a check found; sound where nothing is in `violations`."""

    ids: int = 0
    windows: int = 0
    by_machine: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def check(
    logs: Iterable[Path], ids: Sequence[Path], layout: Layout, *, expected: int, part: int = PART
) -> Verdict:
    """Check the IDs in raw files of little-endian uint64 against the delegators' logs."""
    verdict = Verdict()
    windows = windows_of(leases_in(logs), verdict)
    verdict.windows = sum(map(len, windows.values()))
    check_ids(ids, windows, layout, verdict, part=part)
    if verdict.ids != expected:
        verdict.violations.append(f"{verdict.ids} IDs were taken, not {expected}")
    return verdict


def leases_in(logs: Iterable[Path]) -> Iterator[Lease]:
    """What delegators logged about leases."""
    for log in logs:
        for event in read_events(log):
            if (lease := event.get("lease")) is not None:
                yield _lease(lease)


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


def check_ids(
    files: Sequence[Path], windows: Windows, layout: Layout, verdict: Verdict, *, part: int = PART
) -> None:
    """Note in `verdict` how many IDs there are, which come twice, and which lie outside every window."""
    index = WindowIndex(windows, layout)
    total = sum(path.stat().st_size // 8 for path in files)
    for path in files:
        if path.stat().st_size % 8:
            verdict.violations.append(f"{path.name} ends inside an ID")
    duplicates: list[int] = []
    outside: list[int] = []
    counts = Counter[str]()
    for low, high in _bounds(windows, layout, -(-total // part)):
        ids = np.sort(_between(files, low, high))
        verdict.ids += len(ids)
        again = ids[1:][ids[1:] == ids[:-1]]
        strangers = ids[~index.covers(ids)]
        counts["duplicate"] += len(again)
        counts["outside"] += len(strangers)
        duplicates += again[:EXAMPLES].tolist()
        outside += strangers[:EXAMPLES].tolist()
        machines, sizes = np.unique(index.machines(ids), return_counts=True)
        verdict.by_machine.update(dict(zip(machines.tolist(), sizes.tolist(), strict=True)))
    if duplicates:
        verdict.violations.append(f"{counts['duplicate']} IDs came again, such as {duplicates[:EXAMPLES]}")
    if outside:
        verdict.violations.append(
            f"{counts['outside']} IDs lie outside every granted window, such as {outside[:EXAMPLES]}"
        )


class WindowIndex:
    """Windows as sorted arrays: the key of a tick on a machine is `machine * span + tick`."""

    def __init__(self, windows: Windows, layout: Layout) -> None:
        self._layout = layout
        self._span = np.uint64(layout.end_tick + 1)  # an end may be one past the last tick
        pairs = [
            (machine * int(self._span) + start, machine * int(self._span) + end)
            for machine, granted in sorted(windows.items())
            for start, end in granted
        ]
        self._starts = np.array([start for start, _ in pairs], dtype=np.uint64)
        self._ends = np.array([end for _, end in pairs], dtype=np.uint64)

    def machines(self, ids: Ids) -> Ids:
        layout = self._layout
        return (ids >> np.uint64(layout.machine_shift)) & np.uint64(layout.machines - 1)

    def covers(self, ids: Ids) -> npt.NDArray[np.bool_]:
        if not len(self._starts):
            return np.zeros(len(ids), dtype=np.bool_)
        keys = self.machines(ids) * self._span + (ids >> np.uint64(self._layout.time_shift))
        at = np.searchsorted(self._starts, keys, side="right")
        covered: npt.NDArray[np.bool_] = (at > 0) & (keys < self._ends[np.maximum(at, 1) - 1])
        return covered


def _bounds(windows: Windows, layout: Layout, parts: int) -> list[tuple[int, int]]:
    """Ranges `[low, high]` that together hold every uint64, about alike in ticks granted."""
    ticks = [tick for granted in windows.values() for window in granted for tick in window] or [0]
    first, last = min(ticks), max(ticks)
    cuts = sorted(
        {(first + (last - first) * k // parts) << layout.time_shift for k in range(1, max(1, parts))} - {0}
    )
    return list(zip([0, *cuts], [*(cut - 1 for cut in cuts), 2**64 - 1], strict=True))


def _between(files: Sequence[Path], low: int, high: int) -> Ids:
    found = [np.empty(0, dtype=np.uint64)]
    for path in files:
        for offset in range(0, path.stat().st_size // 8 * 8, BLOCK * 8):
            ids = np.fromfile(path, dtype="<u8", count=BLOCK, offset=offset).astype(np.uint64, copy=False)
            found.append(ids[(ids >= np.uint64(low)) & (ids <= np.uint64(high))])
    return np.concatenate(found)


def _lease(values: list[Any]) -> Lease:
    verb, machine, gen, start, end = values
    return str(verb), int(machine), int(gen), int(start), int(end)
