"""Every guard of the protocol taken out in turn, to see that the simulation or the exploration misses it.

A mutant is a change of source text.  It is made while its module is imported, in a process of its own; where
the old text is not there exactly once, that fails loudly, so that no mutant outlives the code it changes.

`scripts/soak mutants` searches anew what catches each and writes MUTANTS.md; the test repeats just that.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Final, NamedTuple

TABLE: Final = Path(__file__).with_name("MUTANTS.md")
SEEDS: Final = 10_000
"""How many histories a search tries, at most."""
STATES: Final = 150_000
"""How many states the exploration visits for a mutant, at most."""
EXPLORED: Final = "exploration: "


class Change(NamedTuple):
    """Put `new` in place of `old` in a module's source."""

    module: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A guard that is missing; `section` is that of the design."""

    name: str
    section: str
    changes: list[Change]


def _mutants(diff: str) -> list[Mutant]:
    """The mutants of a diff: `# module`, `@@ section @@ name`, then old lines and the new ones in their place.

    A change need not begin or end where a line does.
    """
    mutants: list[Mutant] = []
    module = old = ""
    for kind, lines in itertools.groupby(diff.strip().splitlines(), key=lambda line: line[0]):
        text = "\n".join(line[1:] for line in lines)
        match kind:
            case "#":
                module = text.strip()
            case "@":
                section, _, name = text.removeprefix("@ ").partition(" @@ ")
                mutants.append(Mutant(name, section, []))
            case "-":
                old = text
            case "+":
                mutants[-1].changes.append(Change(module, old, text))
    return mutants


MUTANTS: Final = _mutants("""
# zflake.core.lessor
@@ 3 @@ release without the token check
-if record.token not in (request.token, request.next):
+if record.token is None:
@@ 3 @@ release not bounded by the tenancy's start
-minted = record.tenancy_start if request.last is None else request.last + 1
+minted = now if request.last is None else request.last + 1
-max(minted, record.tenancy_start, now)
+max(minted, now)
@@ 3 @@ release fence below the last tick minted in
-else request.last + 1
+else request.last
@@ 3 @@ release fence below now
-max(minted, record.tenancy_start, now)
+max(minted, record.tenancy_start)
@@ 3 @@ release frees nothing
-fence = min(record.fence, max(minted, record.tenancy_start, now))
+fence = record.fence
@@ 3 @@ release raises the fence
-fence = min(record.fence, max(minted, record.tenancy_start, now))
+fence = max(record.fence, minted, now)
@@ 3 @@ empty window accepted
-if start < end:
+if start <= end:
@@ 3.1 (1) @@ window starts below the fence
-start = max(now, record.fence, meta.floor)
+start = max(now, meta.floor)
@@ 3.4 @@ floor skipped
-start = max(now, record.fence, meta.floor)
+start = max(now, record.fence)
-if max(record.fence, meta.floor) <= now]
+if record.fence <= now]
@@ 3 @@ window longer than a ttl
-end = min(now + meta.ttl, meta.layout.end_tick)
+end = min(max(now, record.fence) + meta.ttl, meta.layout.end_tick)
@@ 3 @@ window leaves the layout
-end = min(now + meta.ttl, meta.layout.end_tick)
+end = now + meta.ttl
@@ 3 @@ acquire takes a machine that is not free
-free = [record for record in lowest if max(record.fence, meta.floor) <= now]
+free = list(lowest)
@@ 3 @@ acquire's repeat not recognised
-if repeat is not None:
+if repeat is None and False:
@@ 3 @@ renewal without the token check
-if record.token != request.token:
+if False:
@@ 3 @@ renewal's repeat not recognised
-    if record.token == request.next:
-        return _grant(meta, record)
+
@@ 3 @@ token not rotated
-token=request.next, start=start, span_start=span_start
+token=record.token, start=start, span_start=span_start
@@ 3 @@ renewal of a machine that is not leased any more
-if not meta.first_machine <= record.machine <= meta.last_machine:
+if False:
# zflake.delegator.committer
@@ 3.1 (2) @@ reply before the commit
-                tried.update({i: swap.new for i, swap in swaps.items()})
+                tried.update({i: swap.new for i, swap in swaps.items()})
+                settled.update({i: Settled(lessor._grant(self.meta, s.new), s.new)
+                                for i, s in swaps.items() if s.new.token})
@@ 3.1 (2) @@ reply from the attempt
-                self._store.swap(list(swaps.values()), self._clock.mark())
+                self._store.swap(list(swaps.values()), self._clock.mark())
+                settled.update({i: Settled(lessor._grant(self.meta, s.new), s.new)
+                                for i, s in swaps.items() if s.new.token})
@@ 3 @@ one batch gives a machine twice
-free = [r for r in lowest or () if r.machine not in taken]
+free = list(lowest or ())
-                self._store.swap(list(swaps.values()), self._clock.mark())
+                self._store.swap(list(swaps.values()), self._clock.mark())
+                settled.update({i: Settled(lessor._grant(self.meta, s.new), s.new)
+                                for i, s in swaps.items() if s.new.token})
# zflake.stores.keyed
@@ 3 @@ compared without the gen
-            ("machine", machine): old.gen or Found.NOTHING,
+
@@ 3 @@ compared without meta's version
-            META: swap.version,
+
# zflake.core.loss
@@ 3.4 @@ witness ignored
-newer = request.gen > record.gen or (request.gen == record.gen and shown != granted)
+newer = False
# zflake.delegator.start
@@ 3.4 @@ incarnation ignored
-        incarnation=store.incarnation(meta),
+
# zflake.core.loss
- or found.incarnation != incarnation
+
# tests.sim.disk
-meta.incarnation == self.life
+True
# zflake.delegator.start
@@ 3.4 @@ an empty store taken for a new one
-new = wishes.new and not store.had_data
+new = True
@@ 3.4 @@ --new believed though there was a store
-new = wishes.new and not store.had_data
+new = wishes.new
# zflake.core.loss
@@ 3.4 @@ no rest after a loss
-rest = max(layout.ms_to_ticks(REST_MS), ttl) + layout.ms_to_ticks(MARGIN_MS)
+rest = 0
@@ 3.4 @@ rest shorter than what a fast clock has granted
-rest = max(layout.ms_to_ticks(REST_MS), ttl) + layout.ms_to_ticks(MARGIN_MS)
+rest = ttl
# zflake.core.lessor
@@ 3.5 @@ provenance covers a gap
-span_start = record.span_start if start == record.fence else start
+span_start = record.span_start
# zflake.stores.keyed
@@ 3.5 @@ provenance not cut by a release
-if span.end > at:
+if False:
# zflake.delegator.clock
@@ 3.3 @@ mark from the window's end
-return Mark(self._name, self.timeline_us(),
+return Mark(self._name, self.timeline_us() + 1_000_000,
# zflake.delegator.committer
@@ 3.3 @@ mark never written
-self._store.swap(list(swaps.values()), self._clock.mark())
+self._store.swap(list(swaps.values()))
# zflake.delegator.executor
-self._store.swap([], self.clock.mark())
+self._store.swap([])
# zflake.delegator.start
-store.swap([], delegator_clock.mark())
+store.swap([])
# zflake.core.timeline
@@ 3.3 @@ cold start without the marks
-return max(wall_us, mark_us)
+return wall_us
@@ 3.3 @@ timeline follows the wall while it runs
-self._base = (timeline_us, local_us, self.lead_us > 0)
+self._base = (max(timeline_us, wall_us), local_us, self.lead_us > 0)
# zflake.core.lessee
@@ 3 @@ retry with a new token
-if self._next is None:
+if True:
@@ 3.1 (4) @@ unexpected grant accepted
-if answer.token != self._next:
+if answer.token == self.token:
@@ 3.1 (4) @@ unexpected grant released
-                return False
-            self._accept
+                self._stray = answer
+                return False
+            self._accept
-        self.send_at_us = local_us + self.retry_us
+        self.send_at_us = local_us + self.retry_us
+        if stray := vars(self).pop("_stray", None):
+            return Release(stray.machine, stray.token, None, None)
@@ 3.1 (5) @@ late window taken for a loss
-        third_us = self._third_us = grant.ttl
+        if grant.end <= now:
+            self._forget(local_us)
+            return
+        third_us = self._third_us = grant.ttl
@@ 3.1 (6) @@ too_early taken for a loss
-if answer.reason is Refused.LOST and self.mint is not None:
+if answer.reason in (Refused.LOST, Refused.TOO_EARLY) and self.mint is not None:
@@ 3 @@ lost holder keeps its mint
-            if answer.reason is Refused.LOST and self.mint is not None:
-                self._forget(local_us)
+            if answer.reason is Refused.LOST and self.mint is not None:
@@ 3.1 (4) @@ released holder takes a grant
-        if self.state is State.RELEASED:
-            return False
+        self.state = self.state
@@ 3 @@ last tick taken from the clock
-lapsed = not self.mint.covers(now)
+lapsed, self._clock = not self.mint.covers(now), now
-self._next, self.mint.close())
+self._next, (self.mint.close(), getattr(self, "_clock", None))[1])
@@ 3 @@ release forgets what is pending
-Release(self.mint.machine, self.token, self._next, self.mint.close())
+Release(self.mint.machine, self.token, None, self.mint.close())
# tests.sim.worker
@@ 3.1 (3) @@ fork inherits
-        return Worker(self.cluster, number, self.host)
+        child = Worker(self.cluster, number, self.host)
+        child.lease.clock, child.lease.lessee = self.lease.clock, copy.copy(self.lease.lessee)
+        if isinstance(self.lease.mint, WatchedMint):
+            child.lease.lessee.mint = mint = copy.copy(self.lease.mint)
+            mint._windows = deque(mint._windows)
+        return child
# zflake.holder.lease
@@ 5 @@ old answers count
-if self._pending is not None and response.msgid == self._msgid:
+if self._pending is not None:
@@ 3.4 @@ a delegator of another cluster is asked to renew
-if self.mint is not None and hello.store_id != self.store_id:
+if False:
@@ 3 @@ a release that is refused is given up
-            self._hold_until_us = local_us + RELEASE_RETRY_US
-            self._go_on()
-            return
+            self._release = None
+            return
@@ 3.4 @@ no hello before the lease is spoken of
-        if not self._greeted:
-            return self._ask(Method.HELLO, local_us)
+        self._greeted = True
# zflake.core.mint
@@ 3.1 (1) @@ window's end taken for its last tick
-        if now < end:
+        if now <= end:
-windows[0][1] <= now:
+windows[0][1] < now:
@@ 3.1 (1) @@ mints where no window is
-if first_open(windows, now) != now:
+if not windows:
@@ 3.1 (3) @@ mint goes back with the clock
-        if now > self._tick:
-            windows
+        if now != self._tick:
+            windows
@@ 3.1 (3) @@ sequence begins again inside a tick
-sequence = self._sequence
+sequence = 0
@@ 3.1 (3) @@ state does not advance
-        self._sequence = sequence + minted
+        self._sequence = sequence
@@ 3.1 (3) @@ run leaves its tick
-if count < minted:
+if True:
@@ 3 @@ closed mint mints
-        self._windows.clear()
-        self._sequence = self._full
+
# zflake.core.lessor
@@ 3.1 (1) @@ overlapping window accepted, and given
-start = max(now, record.fence, meta.floor)
+start = max(now, record.start, meta.floor)
# zflake.delegator.committer
@@ 3 @@ what a rollback made unused is never found
-self._store.look_anew()
+pass
# zflake.delegator.broker
@@ 5 @@ answers without the worker's token
-        job = peer.jobs.get(envelope[0]) if peer is not None and len(envelope) == 2 else None
+        envelope[0] = envelope[0][-TAG_BYTES:]
+        job = peer.jobs.get(envelope[0]) if peer is not None and len(envelope) == 2 else None
-peer.jobs[peer.token + tag] = job
+peer.jobs[tag] = job
@@ 5 @@ answer counted twice
-        del peer.jobs[envelope[0]]
-        if response.error
+        if response.error
""")
BY_NAME: Final = {mutant.name: mutant for mutant in MUTANTS}


class Catch(NamedTuple):
    """What caught a mutant."""

    by: str
    """Which seed's history, or which exploration."""
    after: str
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


def apply(mutant: Mutant) -> None:
    """Change the modules, which must not have been imported yet."""
    loaded = [change.module for change in mutant.changes if change.module in sys.modules]
    assert not loaded, f"imported before they could be changed: {loaded}"
    compiled = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, module: str) -> CodeType | None:
        changes = [change for change in mutant.changes if change.module == module]
        if not changes:
            return compiled(loader, module)
        path = loader.get_filename(module)
        return compile(changed(Path(path).read_text(), changes), path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]


def live(first: int, count: int) -> Catch | None:
    """Try histories until something breaks."""
    from tests.sim import soak  # noqa: PLC0415  (what it imports is changed first)

    for seed in range(first, first + count):
        for _, why in soak.live((seed, 1)).failures:
            kind, _, text = why.partition(": ")
            invariant = text.partition(":")[0] if kind == "Violation" else f"crash: {kind}"
            return Catch(f"seed {seed}", f"{seed - first + 1:,} histories", invariant)
    return None


def visit(scope: str) -> Catch | None:
    """Explore one scope, or all of them, until something breaks."""
    from tests.sim import explore  # noqa: PLC0415

    for each in explore.SCOPES:
        if scope in ("", each.name):
            result = explore.explore(each, STATES)
            if result.violation:
                why = result.violation.partition(":")[0]
                return Catch(f"{EXPLORED}{each.name}", f"{result.states:,} states", why)
    return None


# --- outside ---


def run(mutant: Mutant, first: int = 0, count: int = 0, scope: str = "") -> Catch | None:
    """Try `count` histories from seed `first` on in a process of its own; without any, explore."""
    command = [sys.executable, "-m", "tests.sim.mutants", mutant.name, str(first), str(count), scope]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(f"mutant {mutant.name!r}: {done.stderr[-1000:]}")
    found = json.loads(done.stdout)
    return None if found is None else Catch(*found)


def search(mutant: Mutant) -> Catch | None:
    """What catches a mutant; seeds are tried from 0 on, then the exploration."""
    return run(mutant, 0, SEEDS) or run(mutant)


def catch_all(jobs: int, how: Callable[[Mutant], Catch | None]) -> dict[str, Catch | None]:
    """What catches each mutant."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(BY_NAME, pool.map(how, MUTANTS), strict=True))


def write(found: dict[str, Catch | None]) -> None:
    """Write the table."""
    rows = ["| missing guard | design | caught by | after | invariant |", "|---|---|---|---|---|"]
    for mutant in MUTANTS:
        caught = found[mutant.name] or ("**nothing**", "", "")
        rows.append("| " + " | ".join((mutant.name, mutant.section, *caught)) + " |")
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
    found = catch_all(jobs, search)
    write(found)
    survivors = [name for name, caught in found.items() if caught is None]
    print(f"{len(found)} mutants, {len(survivors)} survive: {', '.join(survivors)}")  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    _, name, first, count, scope = sys.argv
    apply(BY_NAME[name])
    caught = live(int(first), int(count)) if int(count) else visit(scope)
    print(json.dumps(caught))  # noqa: T201
