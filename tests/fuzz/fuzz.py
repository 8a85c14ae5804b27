"""The fuzzer's run: episodes, one after another, each with a `Random` of its own that the seed and its number make.

What must hold: no process ends, none logs an error, none grows beyond a bound; each request that can be read is answered;
the honest workers' leases are renewed in time, the honest clients get IDs, and all IDs that anybody got are distinct and
inside granted windows; clients that are lied to raise zflake's own errors only, in time; the tool says one line that can
be printed; and afterwards all serve a fresh client at once.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from tests.fuzz import victims
from tests.fuzz.liars import Liar, Slot
from tests.fuzz.site import STATIC, TTL_S, Open, Security, Site, bound_at, soon
from tests.fuzz.strangers import TACTICS, Episode, Tally, Wrong
from tests.fuzz.values import Values
from tests.jobs.checker import Lease, Verdict, check_eras, leases_in, read_runs
from tests.system.daemons import Daemons, Process, status_of
from zflake.core.layout import DEFAULT
from zflake.errors import ZflakeError

MESSAGES: Final = 300
"""Messages of an episode, about."""
TARGETS: Final = {
    "sqlite": 40,
    "memory": 40,
    "sqlite-worker": 40,
    "memory-worker": 16,
    "static": 40,
    "link": 40,
}
LIED_TO_KINDS: Final = {"client": 3, "generator": 1, "tool": 3}
"""Targets and their weights; these are of clients, which take longest."""
CALLS: Final = {"client": 5, "generator": 1, "tool": 8}
"""Calls of each client of an episode."""
LOOK_S: Final = 0.5
REPORT_S: Final = 10.0


@dataclass
class Result:
    """The outcome; sound if nothing is in `violations`."""

    seed: int
    messages: int = 0
    seconds: float = 0.0
    by_target: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    """The ends of the calls of clients that were lied to."""
    grown_mb: dict[str, float] = field(default_factory=dict)
    renewals: dict[str, int] = field(default_factory=dict)
    ids: int = 0
    honest: int = 0
    episode: int | None = None
    """The episode in which a violation was found."""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def counts(of: Counter[str]) -> str:
            return ", ".join(f"{what} {count:,}" for what, count in sorted(of.items()))

        lines = [
            f"fuzz: {self.messages:,} messages in {self.seconds:.1f} s, {self.messages / self.seconds:,.0f}/s, seed {self.seed}",
            f"  to: {counts(self.by_target)}",
            f"  answers: {counts(self.answers)}",
            f"  calls of clients that were lied to ended with: {counts(self.raised)}",
            f"  grown at the most: {', '.join(f'{who} by {mb:.0f} MB' for who, mb in self.grown_mb.items())}",
            f"  renewals of honest workers: {self.renewals}, with windows of {TTL_S} s",
            f"  {self.ids:,} IDs checked, {self.honest:,} of them of honest clients",
            *(f"  VIOLATION: {violation}" for violation in self.violations),
        ]
        if self.violations and self.episode is not None:
            again = f"./scripts/soak fuzz --seed {self.seed} --messages {max(self.messages, 1)}"
            lines.append(
                f"  found in episode {self.episode}; again: {again}, or with --episode {self.episode} that one alone"
            )
        return "\n".join([*lines, f"  {'FAILED' if self.violations else 'no harm done, all recovered'}"])


def run(
    folder: Path,
    messages: int,
    *,
    seed: int = 1,
    episode: int | None = None,
    report: Callable[[str], None] = lambda _: None,
    security: Security | None = None,
    via: Sequence[str] = (),
    targets: Sequence[str] = (),
) -> Result:
    """Fuzz a site of its own in an empty folder, with so many messages; or with one `episode` alone.

    `via` is a module, and its arguments, that runs each process under fire; `targets` are all if none is named.
    """
    result = Result(seed)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 16_384)
    try:
        with Daemons(folder) as daemons:
            site = Site(daemons, security or Open(), context, "tcp://127.0.0.1:*", via)
            fuzz = Fuzz(site, result, report)
            fuzz.run(messages, episode, targets)
    finally:
        context.destroy(linger=0)  # and all sockets with it, which `fuzz` still has
    return result


def episodes(seed: int, targets: Sequence[str] = ()) -> Iterator[tuple[int, str, random.Random]]:
    """Number, target and `Random` of each episode, for ever; first one to each target."""
    plan, weights = random.Random(seed), TARGETS | LIED_TO_KINDS
    every = list(weights)
    for number in itertools.count():
        (target,) = [every[number]] if number < len(every) else plan.choices(every, list(weights.values()))
        if not targets or target in targets:
            yield number, target, random.Random(f"{seed}/{number}")


class Fuzz:
    """One run."""

    def __init__(self, site: Site, result: Result, report: Callable[[str], None]) -> None:
        self.site, self.result, self.report = site, result, report
        self.tally = Tally()
        self.liar = Liar(site, self.tally)
        self._victims: Victims
        self._look_at = self._report_at = 0.0

    def run(self, messages: int, only: int | None, targets: Sequence[str]) -> None:
        result, tally = self.result, self.tally
        number = None
        try:
            self.site.start(result.seed)
            self._victims = Victims(self.site, tally, result.raised)
            began = time.monotonic()
            for number, target, draw in episodes(result.seed, targets):
                if tally.sent >= messages or (only is not None and number > only):
                    break
                if only is None or number == only:
                    self._play(number, target, draw)
                    result.by_target[target] += tally.sent - result.by_target.total()
                    self._watch()
            result.seconds = time.monotonic() - began
            self._rest()
            number = None
            self._recover()
            self._check(began)
        except Wrong as wrong:
            result.violations.append(str(wrong))
            result.episode = number if wrong.episode is None else wrong.episode
        finally:
            result.messages, result.answers = tally.sent, tally.answers
            result.seconds = result.seconds or 1.0
            result.grown_mb = {watch.daemon.name: watch.grown_mb for watch in self.site.watches}
            self._last_look()

    # --- inside ---

    def _attend(self) -> None:
        self.liar.attend()
        self._victims.attend()

    def _play(self, number: int, target: str, draw: random.Random) -> None:
        messages = draw.randrange(MESSAGES // 3, MESSAGES * 5 // 3)
        if target == "link":
            self.liar.play(draw, messages, self._attend)
        elif target in LIED_TO_KINDS:
            # They wait for the most part: what comes next goes on beside them.
            self._rest()
            self._victims.begin(target, number, draw)
        else:
            tactics = TACTICS[self.site.targets[target][0]]
            (tactic,) = draw.choices(list(tactics), list(tactics.values()))
            try:
                Episode(self.site, target, draw, self.tally, self._attend, messages=messages).play(tactic)
            except Wrong as wrong:
                raise Wrong(f"{target}, {tactic}: {wrong}", wrong.episode) from wrong
            except ZflakeError as error:
                raise Wrong(f"{target}, {tactic}: an answer that is none: {error!r}") from error

    def _rest(self) -> None:
        """Wait until no call of a victim is under way."""
        while self._victims.busy:
            self._victims.attend(20)
            self.liar.attend()

    def _watch(self) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            if wrong := self.site.look():
                self.result.violations += wrong[1:]
                raise Wrong(wrong[0])
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            self.report(f"{self.tally.sent:,} messages, {self.tally.answers.total():,} answers")

    def _last_look(self) -> None:
        """What the logs say of a violation that showed elsewhere first."""
        self.result.violations += [w for w in self.site.look() if w not in self.result.violations]

    def _recover(self) -> None:
        """Wait until the worker that was lied to holds a lease again, then ask all."""
        lied_to = self.site.workers["lied-to"]
        self._victims.end()
        deadline, looked_at = soon(30.0), 0.0
        self.liar.link = b""
        while not self.liar.link:
            self.liar.socket.poll(10)
            self._attend()
            if time.monotonic() > deadline:
                raise Wrong("the worker that was lied to does not recover")
        while time.monotonic() < deadline and (facts := self._status(lied_to.address)).get("state") != "HELD":
            looked_at += 1
        if facts.get("state") != "HELD":
            raise Wrong(f"the worker that was lied to does not recover: {facts}")
        if wrong := self.site.recovered():
            raise Wrong("; ".join(wrong))

    def _status(self, address: str) -> dict[str, Any]:
        until = soon(0.1)
        while time.monotonic() < until:
            self.liar.socket.poll(5)
            self._attend()
        return status_of(address)

    def _check(self, began: float) -> None:
        """Look at all that was written down, now that no more comes."""
        site, result, say = self.site, self.result, self.result.violations.append
        takers, site.takers = site.takers, []
        for taker in takers:
            taker.process.kill()
            result.violations += taker.errors
        passed_s = time.monotonic() - began
        for name in site.held:
            result.renewals[name] = site.renewals(name)
            # One comes at a third of its window; less than half as often would be no margin.
            if result.renewals[name] < passed_s / TTL_S:
                say(f"the lease of {name} was renewed {result.renewals[name]} times in {passed_s:.0f} s")
        honest = read_runs(taker.path for taker in takers)
        strangers = np.array(self.tally.runs, dtype=np.uint64).reshape(-1, 2)
        static: Lease = ("acquired", STATIC, 1, 0, DEFAULT.end_tick)
        leases = itertools.chain(leases_in(d.log_path for d in site.delegators.values()), [static])
        verdict: Verdict = check_eras([leases], np.concatenate([honest, strangers]))
        result.ids, result.honest = verdict.ids, int(honest[:, 1].sum())
        result.violations += verdict.violations
        if not result.honest:
            say("no honest client got an ID")
        for first in self.liar.firsts:
            tick, machine = first >> DEFAULT.time_shift, first >> DEFAULT.machine_shift & DEFAULT.machines - 1
            if not any(start <= tick < end for start, end in self.liar.windows):
                say(
                    f"the worker that was lied to minted {first} (machine {machine}) outside what it was granted"
                )
                break


class Victims:
    """Clients, generators and tools in processes of their own, each with a server of its own that lies to it."""

    def __init__(self, site: Site, tally: Tally, raised: Counter[str]) -> None:
        self._control = site.socket(zmq.ROUTER, "delegator", "tcp://127.0.0.1:*")
        control = bound_at(self._control)
        self._raised = raised
        self._calls: dict[bytes, list[dict[str, Any]]] = {}
        """The calls that are left to each victim, the one under way last."""
        self._kind, self._number, self._deadline = "", 0, 0.0
        processes = {"client": 1, "generator": 1, "tool": 2}
        self._processes: list[Process] = [
            site.victims(kind, control) for kind, many in processes.items() for _ in range(many)
        ]
        self._slots = {
            kind: [Slot(site, tally) for _ in range(victims.SLOTS[kind] * many)]
            for kind, many in processes.items()
        }
        self._names: dict[str, list[bytes]] = {kind: [] for kind in processes}
        deadline = soon(30.0)
        while any(len(self._names[kind]) < len(slots) for kind, slots in self._slots.items()):
            if not self._control.poll(100) and time.monotonic() > deadline:
                raise Wrong(f"the victims do not come: {[p.log()[-500:] for p in self._processes]}")
            while self._control.poll(0):
                name, body = self._control.recv_multipart()
                self._names[json.loads(body)["kind"]].append(name)

    def begin(self, kind: str, number: int, draw: random.Random) -> None:
        """Have each victim of a kind make some calls, and lie to it meanwhile, in `attend`."""
        self._kind, self._number, self._deadline = kind, number, soon(120.0)
        for name, slot in zip(self._names[kind], self._slots[kind], strict=True):
            own = random.Random(draw.random())
            slot.values = Values(own)
            self._calls[name] = [order(kind, slot.address, own) for _ in range(CALLS[kind])]
            self._order(name)

    @property
    def busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self._calls)

    def attend(self, wait_ms: int = 0) -> None:
        """Lie, and take in how calls ended."""
        if not self._calls:
            return
        slots = self._slots[self._kind]
        if wait_ms:
            poller = zmq.Poller()
            for socket in (self._control, *(slot.socket for slot in slots)):
                poller.register(socket, zmq.POLLIN)
            poller.poll(wait_ms)
        for slot in slots:
            slot.attend()
        while self._control.poll(0):
            name, body = self._control.recv_multipart()
            outcome, last = json.loads(body), self._calls[name].pop()
            self._raised[f"{self._kind}: {outcome['raised']}"] += 1
            if outcome["wrong"]:
                raise Wrong(f"{self._kind} {last}: {outcome['wrong']}", self._number)
            self._order(name)
        if time.monotonic() > self._deadline or not all(p.alive for p in self._processes):
            logs = [p.log()[-2_000:] for p in self._processes]
            raise Wrong(f"a {self._kind} hangs, or has ended: {logs}", self._number)

    def end(self) -> None:
        for process in self._processes:
            # A generator's thread logs what it gives up for; anything else is an exception of nobody's.
            if "Traceback" in (log := process.log()):
                raise Wrong(f"{process.name} said: {log[-2_000:]}")
            process.kill()

    def _order(self, name: bytes) -> None:
        if self._calls[name]:
            self._control.send_multipart([name, json.dumps(self._calls[name][-1]).encode()])
        else:
            del self._calls[name]


def order(kind: str, endpoint: str, draw: random.Random) -> dict[str, Any]:
    """What a victim is to do."""
    timeout = draw.choice((0.05, 0.2, 0.3))
    counts = [draw.choice((0, 1, 1, 2, 500, 5_000)) for _ in range(draw.randrange(1, 4))]
    found: dict[str, Any] = {"kind": kind, "endpoint": endpoint, "timeout": timeout, "counts": counts}
    if kind == "client":
        found["route"] = draw.choice(("auto", "direct", "broker"))
    if kind == "tool":
        found["counts"] = []
        ids = [str(DEFAULT.compose(draw.randrange(10**12), 1, 0)) for _ in range(draw.randrange(1, 3))]
        json_ = draw.choice(([], ["--json"]))
        argv = draw.choice(
            (
                ["status", *json_],
                ["trace", *ids, *json_],
                ["next", "-n", "3", "--format", draw.choice(("int", "hex", "base32", "json"))],
            )
        )
        found["argv"] = [*argv, "--to", endpoint, "--timeout", f"{int(timeout * 1000)}ms"]
    return found
