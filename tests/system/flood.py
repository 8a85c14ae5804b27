"""The flood: far more clients than a delegator can serve, and what they must not do to it.

One delegator, one worker, whose windows are short, and 200 clients with thousands of requests under way for
some seconds.  Memory stays bounded, who is too many is told so, the lease is renewed in time all along, and
soon after the flood a lone client is served as fast as before.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zflake
from tests.system.daemons import POLL_S, WAIT_S, Daemon, Daemons, ready_at, resident_mb, until

CLIENTS: Final = 200
TTL_S: Final = 2
GROWTH_MB: Final = 64.0
"""Megabytes that a daemon may grow by in a flood, however long it lasts: queues and buffers, all of which end."""
CALLS: Final = 30
RECOVERY_S: Final = 1.0
"""Within what time after the flood a lone client must be served as before."""
SLOWER: Final = 5.0
FAST_S: Final = 0.005
"""As fast as before: in at most so many times the median from before, or so quickly that it does not matter."""
LOOK_S: Final = 0.2
REPORT_S: Final = 5.0


@dataclass
class Result:
    """The outcome of a flood; withstood if nothing is in `violations`."""

    seconds: float
    answers: Counter[str] = field(default_factory=Counter)
    """Requests, under `sent`; their answers, under `ids` or the error's code."""
    grown_mb: dict[str, float] = field(default_factory=dict)
    """Megabytes that each daemon had grown by at the most."""
    renewals: int = 0
    before_s: float = 0.0
    after_s: float = 0.0
    """A lone client's median time for an ID, before the flood and after it."""
    recovery_s: float = 0.0
    """How long after the flood's end that was so."""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        answers = ", ".join(f"{what} {count:,}" for what, count in sorted(self.answers.items()))
        lines = [
            f"flood: {CLIENTS} clients for {self.seconds:g} s",
            f"  requests and answers: {answers}",
            f"  grown at the most: {', '.join(f'{who} by {mb:.0f} MB' for who, mb in self.grown_mb.items())}",
            f"  renewals meanwhile: {self.renewals}, with windows of {TTL_S} s",
            (
                f"  a lone client: {self.before_s * 1e3:.2f} ms for an ID before, {self.after_s * 1e3:.2f} ms after, "
                f"from {self.recovery_s:.2f} s after the flood's end on"
            ),
            *(f"  VIOLATION: {violation}" for violation in self.violations),
            f"  {'FAILED' if self.violations else 'memory bounded, no window ran out, full speed again'}",
        ]
        return "\n".join(lines)


def run(folder: Path, seconds: float, *, report: Callable[[str], None] = lambda _: None) -> Result:
    """Flood a cluster of its own in an empty folder."""
    result = Result(seconds)
    with Daemons(folder) as daemons:
        delegator = daemons.delegator(name="delegator", ttl=f"{TTL_S}s")
        worker = daemons.worker(name="worker", to=delegator)
        until(lambda: ready_at(delegator), "the worker to be there")
        with zflake.Client(delegator.address, route="broker", timeout=WAIT_S) as lone:
            result.before_s = _median_s(lone, CALLS)
            _flood(daemons, delegator, worker, result, report)
            _recover(lone, result)
        for daemon in (worker, delegator):
            if code := daemon.terminate():
                result.violations.append(f"{daemon.name} ended with exit code {code}")
            bad = [e for e in daemon.events() if e["level"] not in ("info", "debug") or "trace" in e]
            result.violations += [f"{daemon.name} logged {event['message']}" for event in bad]
    _judge(result)
    return result


def _flood(
    daemons: Daemons, delegator: Daemon, worker: Daemon, result: Result, report: Callable[[str], None]
) -> None:
    flooder = str(Path(__file__).with_name("flooder.py"))
    both = (delegator, worker)
    before_mb = {daemon.name: resident_mb(daemon.pid) for daemon in both}
    renewed = len(delegator.leases("renewed"))
    process = daemons.process(
        [sys.executable, flooder, delegator.address, str(CLIENTS), str(result.seconds)], "flooder"
    )
    began = reported = time.monotonic()
    while process.alive:
        if time.monotonic() > began + result.seconds + WAIT_S:
            raise AssertionError(f"the flooder does not end: {process.log()[-1000:]}")
        for daemon in both:
            if not daemon.alive:
                raise AssertionError(f"{daemon.name} ended: {daemon.log()[-1000:]}")
            grown = resident_mb(daemon.pid) - before_mb[daemon.name]
            result.grown_mb[daemon.name] = max(grown, result.grown_mb.get(daemon.name, 0.0))
        if time.monotonic() - reported >= REPORT_S:
            reported = time.monotonic()
            report(f"grown: {', '.join(f'{who} by {mb:.0f} MB' for who, mb in result.grown_mb.items())}")
        time.sleep(POLL_S)
    if process.wait():
        raise AssertionError(f"the flooder crashed: {process.log()[-1000:]}")
    result.renewals = len(delegator.leases("renewed")) - renewed
    facts: dict[str, Any] = json.loads(process.out())
    result.answers.update(facts)


def _recover(lone: zflake.Client, result: Result) -> None:
    """Wait until a lone client is served as before."""
    ended = time.monotonic()
    fast_s = max(FAST_S, SLOWER * result.before_s)
    while True:
        result.recovery_s = time.monotonic() - ended
        result.after_s = _median_s(lone, CALLS)
        if result.after_s <= fast_s:
            return
        if result.recovery_s > WAIT_S:
            result.violations.append(f"the lone client is still slow {WAIT_S:g} s after the flood")
            return


def _median_s(client: zflake.Client, calls: int) -> float:
    took = []
    for _ in range(calls):
        begun = time.perf_counter()
        client.next_id()
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def _judge(result: Result) -> None:
    say = result.violations.append
    if not result.answers["ids"]:
        say("no client in the flood got an ID")
    if not result.answers["overloaded"] + result.answers["timeout"]:
        say("no client was told that it is too much: that was no flood")
    if result.answers["unavailable"]:
        say(f"{result.answers['unavailable']} were told that there is no worker, which was there all along")
    for who, mb in result.grown_mb.items():
        if mb > GROWTH_MB:
            say(f"{who} grew by {mb:.0f} MB")
    # A window is renewed at a third of its length; less than half as often would be no margin.
    if result.renewals < result.seconds / TTL_S:
        say(f"the lease was renewed {result.renewals} times in {result.seconds:g} s")
    if result.recovery_s > RECOVERY_S:
        say(f"full speed came {result.recovery_s:.1f} s after the flood's end, not within {RECOVERY_S:g} s")
