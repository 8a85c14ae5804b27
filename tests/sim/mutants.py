"""Every guard of the protocol taken out in turn, to see that the simulation or the exploration misses it.

A mutant is a change of source text.  It is made while its module is imported, in a process of its own; where
the old text is not there exactly once, that fails loudly, so that no mutant outlives the code it changes.

`scripts/soak mutants` searches anew what catches each and writes MUTANTS.md; the test repeats just that.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final, NamedTuple

TABLE: Final = Path(__file__).with_name("MUTANTS.md")
SEEDS: Final = 6_000
"""How many histories a search tries, at most."""
STATES: Final = 150_000
"""How many states the exploration visits for a mutant, at most."""
LESSOR: Final = "zflake.core.lessor"
LESSEE: Final = "zflake.core.lessee"
MINT: Final = "zflake.core.mint"
TIMELINE: Final = "zflake.core.timeline"
LOSS: Final = "zflake.core.loss"
LEASE: Final = "zflake.holder.lease"
EXECUTOR: Final = "zflake.delegator.executor"
CLOCK: Final = "zflake.delegator.clock"
COMMITTER: Final = "zflake.delegator.committer"
START: Final = "zflake.delegator.start"
BROKER: Final = "zflake.delegator.broker"
KEYED: Final = "zflake.stores.keyed"
DISK: Final = "tests.sim.disk"
# A fork is the simulation's own.
WORKER: Final = "tests.sim.worker"


EXPLORED: Final = "exploration: "


class Change(NamedTuple):
    """Put `new` in place of `old` in a module's source."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A guard that is missing."""

    name: str
    section: str
    """Of the design."""
    changes: tuple[Change, ...]
    explored: bool = False
    """Whether the exploration is to catch it; else a history."""


def _mutant(name: str, section: str, module: str, *texts: str, explored: bool = False) -> Mutant:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Mutant(name, section, tuple(Change(module, old, new) for old, new in pairs), explored)


MUTANTS: Final = (
    # --- the lessor ---
    _mutant(
        "release without the token check",
        "3",
        LESSOR,
        "if record.token is None or record.token not in (request.token, request.next):",
        "if False:",
    ),
    _mutant(
        "release not bounded by the tenancy's start",
        "3",
        LESSOR,
        "minted = record.tenancy_start if request.last is None else request.last + 1",
        "minted = now if request.last is None else request.last + 1",
        "max(minted, record.tenancy_start, now)",
        "max(minted, now)",
        explored=True,
    ),
    _mutant(
        "release fence below the last tick minted in",
        "3",
        LESSOR,
        "else request.last + 1",
        "else request.last",
    ),
    _mutant(
        "release fence below now",
        "3",
        LESSOR,
        "max(minted, record.tenancy_start, now)",
        "max(minted, record.tenancy_start)",
        explored=True,
    ),
    _mutant(
        "release frees nothing",
        "3",
        LESSOR,
        "fence = min(record.fence, max(minted, record.tenancy_start, now))",
        "fence = record.fence",
    ),
    _mutant(
        "release raises the fence",
        "3",
        LESSOR,
        "fence = min(record.fence, max(minted, record.tenancy_start, now))",
        "fence = max(record.fence, minted, now)",
    ),
    _mutant("empty window accepted", "3", LESSOR, "if start < end:", "if start <= end:"),
    _mutant(
        "window starts below the fence",
        "3.1 (1)",
        LESSOR,
        "start = max(now, record.fence, meta.floor)",
        "start = max(now, meta.floor)",
    ),
    _mutant(
        "floor skipped",
        "3.4",
        LESSOR,
        "start = max(now, record.fence, meta.floor)",
        "start = max(now, record.fence)",
        "if max(record.fence, meta.floor) <= now]",
        "if record.fence <= now]",
    ),
    _mutant(
        "window longer than a ttl",
        "3",
        LESSOR,
        "end = min(now + meta.ttl, meta.layout.end_tick)",
        "end = min(max(now, record.fence) + meta.ttl, meta.layout.end_tick)",
    ),
    _mutant(
        "window leaves the layout",
        "3",
        LESSOR,
        "end = min(now + meta.ttl, meta.layout.end_tick)",
        "end = now + meta.ttl",
    ),
    _mutant(
        "acquire takes a machine that is not free",
        "3",
        LESSOR,
        "free = [record for record in lowest if max(record.fence, meta.floor) <= now]",
        "free = list(lowest)",
    ),
    _mutant(
        "acquire's repeat not recognised",
        "3",
        LESSOR,
        "if repeat is not None:",
        "if repeat is None and False:",
    ),
    _mutant(
        "renewal without the token check",
        "3",
        LESSOR,
        "if record.token is None or record.token != request.token:",
        "if record.token is None:",
    ),
    _mutant(
        "renewal's repeat not recognised",
        "3",
        LESSOR,
        "if record.token is not None and record.token == request.next:\n        return _grant(meta, record)",
        "",
    ),
    _mutant(
        "token not rotated",
        "3",
        LESSOR,
        "token=request.next, start=start, span_start=span_start",
        "token=record.token, start=start, span_start=span_start",
    ),
    _mutant(
        "renewal of a machine that is not leased any more",
        "3",
        LESSOR,
        "if not meta.first_machine <= record.machine <= meta.last_machine:",
        "if False:",
    ),
    # --- the executor and the store ---
    _mutant(
        "reply before the commit",
        "3.1 (2)",
        COMMITTER,
        "                tried.update({i: swap.new for i, swap in swaps.items()})\n",
        "                tried.update({i: swap.new for i, swap in swaps.items()})\n"
        "                settled.update({i: Settled(lessor._grant(self.meta, s.new), s.new)"
        " for i, s in swaps.items() if s.new.token})\n",
    ),
    _mutant(
        "reply from the attempt",
        "3.1 (2)",
        COMMITTER,
        "                self._store.swap(list(swaps.values()), self._mark())\n",
        "                self._store.swap(list(swaps.values()), self._mark())\n"
        "                settled.update({i: Settled(lessor._grant(self.meta, s.new), s.new)"
        " for i, s in swaps.items() if s.new.token})\n",
    ),
    _mutant(
        "one batch gives a machine twice",
        "3",
        COMMITTER,
        "free = [r for r in lowest or () if r.machine not in taken]",
        "free = list(lowest or ())",
        "self._store.swap(list(swaps.values()), self._mark())",
        "settled.update({i: Settled(lessor._grant(self.meta, swaps[i].new), swaps[i].new) for (i, ok) in zip("
        "swaps, self._store.swap(list(swaps.values()), self._mark())) "
        "if swaps[i].new.token})",
    ),
    _mutant(
        "compared without the gen",
        "3",
        KEYED,
        '            ("machine", machine): old.gen or Found.NOTHING,\n',
        "",
    ),
    _mutant(
        "compared without meta's version",
        "3",
        KEYED,
        "            META: swap.version,\n",
        "",
    ),
    _mutant(
        "witness ignored",
        "3.4",
        LOSS,
        "newer = request.gen > record.gen or (request.gen == record.gen and record.token != request.token)",
        "newer = False",
    ),
    Mutant(
        "incarnation ignored",
        "3.4",
        (
            Change(
                START,
                "        incarnation=store.incarnation(meta),\n",
                "",
            ),
            Change(LOSS, " or found.incarnation != incarnation", ""),
            Change(DISK, "meta.incarnation == self.life", "True"),
        ),
    ),
    _mutant(
        "an empty store taken for a new one",
        "3.4",
        START,
        "new = wishes.new and not store.had_data",
        "new = True",
    ),
    _mutant(
        "--new believed though there was a store",
        "3.4",
        START,
        "new = wishes.new and not store.had_data",
        "new = wishes.new",
    ),
    _mutant(
        "no rest after a loss",
        "3.4",
        LOSS,
        "rest = max(layout.ms_to_ticks(REST_MS), ttl) + layout.ms_to_ticks(MARGIN_MS)",
        "rest = 0",
    ),
    _mutant(
        "rest shorter than what a fast clock has granted",
        "3.4",
        LOSS,
        "rest = max(layout.ms_to_ticks(REST_MS), ttl) + layout.ms_to_ticks(MARGIN_MS)",
        "rest = ttl",
    ),
    _mutant(
        "provenance covers a gap",
        "3.5",
        LESSOR,
        "span_start = record.span_start if start == record.fence else start",
        "span_start = record.span_start",
    ),
    _mutant(
        "provenance not cut by a release",
        "3.5",
        KEYED,
        "if span.end > fence:",
        "if False:",
    ),
    # --- the timeline ---
    _mutant(
        "mark from the window's end",
        "3.3",
        CLOCK,
        "return Mark(self._name, self.timeline_us(),",
        "return Mark(self._name, self.timeline_us() + 1_000_000,",
    ),
    Mutant(
        "mark never written",
        "3.3",
        (
            Change(
                COMMITTER,
                "self._store.swap(list(swaps.values()), self._mark())",
                "self._store.swap(list(swaps.values()))",
            ),
            Change(EXECUTOR, "self._store.swap([], self._clock.mark())", "self._store.swap([])"),
            Change(START, "store.swap([], delegator_clock.mark())", "store.swap([])"),
        ),
    ),
    _mutant(
        "cold start without the marks", "3.3", TIMELINE, "return max(wall_us, mark_us)", "return wall_us"
    ),
    _mutant(
        "timeline follows the wall while it runs",
        "3.3",
        TIMELINE,
        "self._base = (timeline_us, local_us, self.lead_us > 0)",
        "self._base = (max(timeline_us, wall_us), local_us, self.lead_us > 0)",
    ),
    # --- the lessee ---
    _mutant("retry with a new token", "3", LESSEE, "if self._next is None:\n", "if True:\n"),
    _mutant(
        "unexpected grant accepted",
        "3.1 (4)",
        LESSEE,
        "if answer.token != self._next:",
        "if answer.token == self.token:",
    ),
    _mutant(
        "unexpected grant released",
        "3.1 (4)",
        LESSEE,
        "                return False\n            self._accept",
        "                self._stray = answer\n                return False\n            self._accept",
        "        self.send_at_us = local_us + self.retry_us\n",
        "        self.send_at_us = local_us + self.retry_us\n"
        '        if stray := vars(self).pop("_stray", None):\n'
        "            return Release(stray.machine, stray.token, None, None)\n",
    ),
    _mutant(
        "late window taken for a loss",
        "3.1 (5)",
        LESSEE,
        "        third_us = self._third_us = grant.ttl",
        "        if grant.end <= now:\n            self._forget(local_us)\n            return\n"
        "        third_us = self._third_us = grant.ttl",
    ),
    _mutant(
        "too_early taken for a loss",
        "3.1 (6)",
        LESSEE,
        "if answer.reason is Refused.LOST and self.mint is not None:",
        "if answer.reason in (Refused.LOST, Refused.TOO_EARLY) and self.mint is not None:",
    ),
    _mutant(
        "lost holder keeps its mint",
        "3",
        LESSEE,
        "if answer.reason is Refused.LOST and self.mint is not None:\n                self._forget(local_us)\n",
        "if answer.reason is Refused.LOST and self.mint is not None:\n",
    ),
    _mutant(
        "released holder takes a grant",
        "3.1 (4)",
        LESSEE,
        "if self.state is State.RELEASED:\n            return False\n",
        "self.state = self.state\n",
    ),
    _mutant(
        "last tick taken from the clock",
        "3",
        LESSEE,
        "lapsed = not self.mint.covers(now)",
        "lapsed, self._clock = not self.mint.covers(now), now",
        "self._next, self.mint.close())",
        'self._next, (self.mint.close(), getattr(self, "_clock", None))[1])',
    ),
    _mutant(
        "release forgets what is pending",
        "3",
        LESSEE,
        "Release(self.mint.machine, self.token, self._next, self.mint.close())",
        "Release(self.mint.machine, self.token, None, self.mint.close())",
    ),
    _mutant(
        "fork inherits",
        "3.1 (3)",
        WORKER,
        "return Worker(self.cluster, number, self.host)",
        "child = Worker(self.cluster, number, self.host)\n"
        "        child.lease.clock, child.lease.lessee = self.lease.clock, copy.copy(self.lease.lessee)\n"
        "        if isinstance(self.lease.mint, WatchedMint):\n"
        "            child.lease.lessee.mint = _copied(self.lease.mint)\n"
        "        return child",
    ),
    # --- the conversation about the lease ---
    _mutant(
        "old answers count",
        "5",
        LEASE,
        "if self._pending is not None and response.msgid == self._msgid:",
        "if self._pending is not None:",
    ),
    _mutant(
        "a delegator of another cluster is asked to renew",
        "3.4",
        LEASE,
        "if self.mint is not None and hello.store_id != self.store_id:",
        "if False:",
    ),
    _mutant(
        "a release that is refused is given up",
        "3",
        LEASE,
        "            self._hold_until_us = local_us + RELEASE_RETRY_US\n            self._go_on()\n            return\n",
        "            self._release = None\n            return\n",
    ),
    _mutant(
        "no hello before the lease is spoken of",
        "3.4",
        LEASE,
        "if not self._greeted:\n            return self._ask(Method.HELLO, local_us)",
        "self._greeted = True",
    ),
    # --- the mint ---
    _mutant(
        "window's end taken for its last tick",
        "3.1 (1)",
        MINT,
        "        if now < end:\n",
        "        if now <= end:\n",
        "windows[0][1] <= now:",
        "windows[0][1] < now:",
    ),
    _mutant(
        "mints where no window is",
        "3.1 (1)",
        MINT,
        "if first_open(windows, now) != now:",
        "if not windows:",
    ),
    _mutant(
        "mint goes back with the clock",
        "3.1 (3)",
        MINT,
        "if now > self._tick:\n            windows",
        "if now != self._tick:\n            windows",
    ),
    _mutant(
        "sequence begins again inside a tick",
        "3.1 (3)",
        MINT,
        "sequence = self._sequence\n",
        "sequence = 0\n",
    ),
    _mutant(
        "state does not advance",
        "3.1 (3)",
        MINT,
        "        self._sequence = sequence + minted\n",
        "        self._sequence = sequence\n",
    ),
    _mutant("run leaves its tick", "3.1 (3)", MINT, "if count < minted:", "if True:"),
    _mutant(
        "closed mint mints",
        "3",
        MINT,
        "        self._windows.clear()\n        self._sequence = self._full\n",
        "",
    ),
    _mutant(
        "overlapping window accepted, and given",
        "3.1 (1)",
        LESSOR,
        "start = max(now, record.fence, meta.floor)",
        "start = max(now, record.start, meta.floor)",
    ),
    # --- the broker ---
    _mutant(
        "answers by anybody",
        "5",
        BROKER,
        "job = peer.jobs.get(envelope[0]) if peer is not None and len(envelope) == 2 else None",
        "peer = next((p for p in self._peers.values() if envelope[0] in p.jobs), None)\n"
        "        job = peer.jobs.get(envelope[0]) if peer is not None and len(envelope) == 2 else None",
    ),
    _mutant(
        "answer counted twice",
        "5",
        BROKER,
        "        del peer.jobs[envelope[0]]\n        if response.error",
        "        if response.error",
    ),
)
BY_NAME: Final = {mutant.name: mutant for mutant in MUTANTS}


class Catch(NamedTuple):
    """What caught a mutant."""

    by: str
    """`history`, or which exploration."""
    seed: int
    """Of the history."""
    tried: int
    """How many histories, or states, a search tried until then."""
    invariant: str


def changed(source: str, changes: Sequence[Change]) -> str:
    """A module's source with its changes; raises `LookupError` where it is not what they were made for."""
    for change in changes:
        found = source.count(change.old)
        if found != 1:
            raise LookupError(f"{change.module} has this text {found} times, not once: {change.old!r}")
        source = source.replace(change.old, change.new)
    return source


# --- inside the mutant's process ---


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module from its changed source."""

    changes: Sequence[Change] = ()

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(changed(Path(path).read_text(), self.changes), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the modules that a mutant changes."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        changes = [change for change in self._mutant.changes if change.module == fullname]
        if not changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.changes = changes
        return importlib.util.spec_from_loader(fullname, loader)


def apply(mutant: Mutant) -> None:
    """Change the modules, which must not have been imported yet."""
    loaded = [change.module for change in mutant.changes if change.module in sys.modules]
    assert not loaded, f"imported before they could be changed: {loaded}"
    sys.meta_path.insert(0, _Finder(mutant))
    for change in mutant.changes:
        __import__(change.module)


def catch(mutant: Mutant, seeds: Iterable[int], scope: str | None) -> Catch | None:
    """Try histories, or explore (one `scope` or all), until something breaks; in a process of its own."""
    apply(mutant)
    logging.disable(logging.CRITICAL)
    if mutant.explored:
        from tests.sim import explore  # noqa: PLC0415  (what it imports is changed first)

        for each in explore.SCOPES:
            if scope not in (None, each.name):
                continue
            result = explore.explore(each, STATES)
            if result.violation:
                why = result.violation.partition(":")[0]
                return Catch(f"{EXPLORED}{each.name}", 0, result.states, why)
        return None
    from tests.sim import checker, cluster  # noqa: PLC0415

    with cluster.watched():
        for tried, seed in enumerate(seeds, 1):
            try:
                cluster.run(seed)
            except Exception as error:  # noqa: BLE001  (a crash is a catch)
                crash = not isinstance(error, checker.Violation)
                why = f"crash: {type(error).__name__}" if crash else str(error).partition(":")[0]
                return Catch("history", seed, tried, why)
    return None


# --- outside ---


def run(mutant: Mutant, first: int, count: int, scope: str | None = None) -> Catch | None:
    """Try `count` histories from seed `first` on in a process of its own, or explore."""
    command = [sys.executable, "-m", "tests.sim.mutants", mutant.name, str(first), str(count), scope or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(f"mutant {mutant.name!r}: {done.stderr[-1000:]}")
    found = json.loads(done.stdout)
    return None if found is None else Catch(*found)


def search(jobs: int) -> dict[str, Catch | None]:
    """What catches each mutant; seeds are tried from 0 on."""
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda mutant: run(mutant, 0, SEEDS), MUTANTS)
        return dict(zip(BY_NAME, found, strict=True))


def write(found: dict[str, Catch | None]) -> None:
    """Write the table."""
    rows = ["| missing guard | design | caught by | after | invariant |", "|---|---|---|---|---|"]
    for mutant in MUTANTS:
        caught = found[mutant.name]
        if caught is None:
            rows.append(f"| {mutant.name} | {mutant.section} | **nothing** | | |")
        elif caught.by == "history":
            after = f"{caught.tried:,} histories"
            rows.append(
                f"| {mutant.name} | {mutant.section} | seed {caught.seed} | {after} | {caught.invariant} |"
            )
        else:
            after = f"{caught.tried:,} states"
            rows.append(f"| {mutant.name} | {mutant.section} | {caught.by} | {after} | {caught.invariant} |")
    heading = (
        "# Mutants\n\nEach line takes one guard out of the protocol, and says what noticed. Written by "
        "`scripts/soak mutants`;\nthe invariants are those of checker.py and explore.py.\n\n"
    )
    rows += ["", f"{len(MUTANTS)} mutants, {sum(caught is not None for caught in found.values())} caught."]
    TABLE.write_text(heading + "\n".join(rows) + "\n")


def read() -> dict[str, list[str]]:
    """The table's rows by mutant: section, caught by, after, invariant."""
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows[1:]}


def main(jobs: int) -> int:
    """`scripts/soak mutants`: search anew, and write the table."""
    found = search(jobs)
    write(found)
    survivors = [name for name, caught in found.items() if caught is None]
    print(f"{len(found)} mutants, {len(survivors)} survive: {', '.join(survivors)}")  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("scope")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.count)
    print(json.dumps(catch(BY_NAME[arguments.name], seeds, arguments.scope or None)))  # noqa: T201
