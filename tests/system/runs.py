"""Runs of IDs, written down and checked as intervals: 16 bytes and one comparison for up to a tick's IDs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tests.system.checker import EXAMPLES, Lease, Verdict, WindowIndex, Windows, leases_in, windows_of
from zflake.core.layout import DEFAULT, Layout
from zflake.core.mint import Run

Runs: TypeAlias = npt.NDArray[np.uint64]
"""A row for each run: its first ID and its length."""

RECORD: Final = 16
"""The bytes of one run in a file: first and count, each a little-endian uint64."""


def runs_of(runs: Iterable[Run]) -> Runs:
    """Runs as the wire has them; their steps are the layout's."""
    return np.array([(first, count) for first, _, count in runs], dtype=np.uint64).reshape(-1, 2)


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
    """The same where a store took the place of one that was lost: it counts generations anew."""
    return check_eras(map(leases_in, stores), runs, layout)


def check_eras(eras: Iterable[Iterable[Lease]], runs: Runs, layout: Layout = DEFAULT) -> Verdict:
    """The same where what each store granted has been read already."""
    verdict = Verdict()
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
    return verdict


def judge(runs: Runs, windows: Windows, layout: Layout, verdict: Verdict) -> None:
    """Note in `verdict` how many IDs there are, which come twice, and which lie outside every window."""
    verdict.windows = sum(map(len, windows.values()))
    firsts, counts = runs[:, 0], runs[:, 1]
    verdict.ids = total = int(counts.sum())
    full = np.uint64(layout.ids_per_tick)
    index = WindowIndex(windows, layout)
    machines = index.machines(firsts)
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
    if (strangers := firsts[~index.covers(firsts)]).size:
        verdict.violations.append(
            f"{strangers.size} runs lie outside every granted window, such as from {strangers[:EXAMPLES].tolist()}"
        )
    for machine in np.unique(machines).tolist():
        verdict.by_machine[machine] = int(counts[machines == machine].sum())


def ticks_of(runs: Sequence[Run], layout: Layout = DEFAULT) -> list[int]:
    """The ticks of runs, in the order in which they came."""
    return [first >> layout.time_shift for first, _, _ in runs]
