"""Histories by the thousand: over all cores, in parts, each failure with the seed that replays it."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.sim import cluster
from tests.sim.checker import Violation
from tests.sim.figures import Figures

PART: Final = 200
"""How many histories a process lives through before it reports."""


def live(part: tuple[int, int]) -> Figures:
    """Live through the histories of `count` seeds from `first` on."""
    first, count = part
    total = Figures()
    with cluster.watched():
        for seed in range(first, first + count):
            try:
                total.add(cluster.run(seed))
            except Exception as error:  # noqa: BLE001  (whatever it is, the seed replays it)
                total.histories += 1
                total.failures.append((seed, f"{type(error).__name__}: {error}"))
    return total


def run(
    first: int, histories: int, jobs: int, report: Callable[[int, Figures], None] | None = None
) -> Figures:
    """Live through many histories in `jobs` processes; `report` is told the next seed and each part."""
    total, end = Figures(), first + histories
    parts = [(begin, min(PART, end - begin)) for begin in range(first, end, PART)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for (begin, count), part in zip(parts, pool.imap(live, parts), strict=True):
            total.add(part)
            if report is not None:
                report(begin + count, part)
    return total


def main(*, histories: int, first: int, jobs: int | None, state: Path | None) -> int:
    """`scripts/soak sim`: with a `state` folder it goes on where the last run with it stopped."""
    kept = None if state is None else state / "sim.json"
    total = Figures()
    if kept is not None and kept.exists():
        values = json.loads(kept.read_text())
        first, figures = values["next"], values["figures"]
        total = Figures(**figures | {name: Counter(figures[name]) for name in ("faults", "counts")})
        say(f"going on at seed {first}; {total.histories:,} histories were done before")
    began = time.monotonic()

    def report(seed: int, part: Figures) -> None:
        total.add(part)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"next": seed, "figures": vars(total)}))
        for failed, why in part.failures:
            say(f"\nseed {failed}: {why}")
        done = seed - first
        rate = done / (time.monotonic() - began)
        say(f"\r{done:,} of {histories:,} histories, {rate:.0f}/s, next seed {seed} ", end="")

    try:
        run(first, histories, jobs or os.cpu_count() or 1, report)
    except KeyboardInterrupt:
        say("\nstopped")
    say("")
    print(total)  # noqa: T201
    return 1 if total.failures else 0


def replay(seed: int, *, trace: bool) -> int:
    """Live through one history again, telling what happens where `trace` says so."""
    with cluster.watched():
        try:
            figures = cluster.run(seed, print if trace else None)
        except BrokenPipeError:  # whoever read the trace has seen enough
            sys.stdout = None
            return 1
        except Exception as error:  # noqa: BLE001
            if not isinstance(error, Violation):
                traceback.print_exc()
            print(f"seed {seed}: {type(error).__name__}: {error}")  # noqa: T201
            return 1
    print(f"seed {seed}: all is well; {figures.ids:,} IDs checked")  # noqa: T201
    return 0


def say(line: str, end: str = "\n") -> None:
    print(line, end=end, file=sys.stderr, flush=True)  # noqa: T201
