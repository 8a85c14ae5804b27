"""The crowd: peers that ask and read nothing, and idle ones, and what they must not do to those who hold leases.

One delegator, with many leases that are renewed at a third of their ttl.  A crowd asks for the largest answers as fast as it
can and reads none; then another one is connected and says nothing.  No lease lapses, memory stays bounded, the delegator
does not spin, and a client that comes meanwhile is served.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq

import zflake
from tests.jobs.deaf import raise_limit
from tests.system.daemons import WAIT_S, Daemon, Daemons, Process, ready_at, resident_mb, until
from zflake.wire.codec import decode_response, encode_request

LEASES: Final = 1_000
TTL_S: Final = 10
ROUNDS_S: Final = TTL_S / 3
"""Seconds in which each lease is renewed once."""
LINES: Final = 500
"""Connections over which the leases are renewed; holders have one each, and a delegator takes from each in turn."""
ALONE_S: Final = 8.0
"""Seconds without a crowd, to compare with."""
GROWTH_MB: Final = 1_000.0
"""Megabytes that a crowd may cost."""
IDLE_CPU: Final = 0.8
"""Part of a core that the delegator may use while the crowd comes and is idle, beside renewing leases; one that spins
uses all of it."""


@dataclass
class Phase:
    """What was measured in a while."""

    what: str
    renewals: list[float] = field(default_factory=list)
    """Seconds that each renewal took."""
    lapsed: int = 0
    grown_mb: float = 0.0
    kernel_mb: float = 0.0
    cpu: float = 0.0
    client_s: list[float] = field(default_factory=list)
    """Seconds that a fresh client took for its first ID."""
    deaf: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        took = sorted(self.renewals) or [0.0]
        return (
            f"  {self.what}: {len(self.renewals)} renewals, median {statistics.median(took) * 1e3:.1f} ms, "
            f"99 % {took[int(len(took) * 0.99)] * 1e3:.1f} ms, longest {took[-1] * 1e3:.0f} ms, {self.lapsed} lapsed; "
            f"grown by {self.grown_mb:.0f} MB, all of the kernel's TCP buffers {self.kernel_mb:.0f} MB, {self.cpu:.2f} of a core; "
            f"a fresh client's first ID {max(self.client_s, default=0.0):.2f} s at most; {self.deaf or ''}"
        )


@dataclass
class Result:
    """The outcome; withstood if nothing is in `violations`."""

    phases: list[Phase] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"crowd: {LEASES} leases, ttl {TTL_S} s", *map(str, self.phases)]
        lines += [f"  VIOLATION: {violation}" for violation in self.violations]
        return "\n".join(lines)


class Leases:
    """Leases over few sockets, each renewed once in `ROUNDS_S`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._lines = [context.socket(zmq.DEALER) for _ in range(LINES)]
        for line in self._lines:
            line.setsockopt(zmq.LINGER, 0)
            line.connect(address)
        self._poller = zmq.Poller()
        for line in self._lines:
            self._poller.register(line, zmq.POLLIN)
        self._held: dict[int, dict[str, Any]] = {}
        self._ends: dict[int, float] = {}
        self._asked: dict[int, tuple[float, str, list[Any]]] = {}
        self._turn = 0

    def acquire(self) -> None:
        """Take them all."""
        for number in range(LEASES):
            self._ask(number, "lease.acquire", [os.urandom(16), f"holder-{number}", "host", 1, ""])
        until(lambda: self.receive() and not self._asked, "the leases")

    def renew(self, until_s: float) -> Iterator[tuple[float, int]]:
        """Renew them in turn until then; gives how long each renewal took, and how many windows ran out unrenewed."""
        due = time.monotonic()
        while (now := time.monotonic()) < until_s:
            while now >= due:
                due += ROUNDS_S / LEASES
                number = self._turn = (self._turn + 1) % LEASES
                if number not in self._asked:
                    held = self._held[number]
                    params = [held["machine"], held["token"], held["gen"], os.urandom(16)]
                    self._ask(number, "lease.renew", params)
            for number, (asked_at, method, params) in list(self._asked.items()):
                if now - asked_at > 1.0:  # as good as lost: the same again
                    self._ask(number, method, params)
            yield from self.receive()

    def receive(self) -> list[tuple[float, int]]:
        """Take answers in."""
        came = []
        for line, _ in self._poller.poll(1):
            while line.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                response = decode_response(line.recv_multipart()[-1])
                assert response.msgid is not None
                now, asked = time.monotonic(), self._asked.get(response.msgid)
                if asked is None or (
                    response.error is None and response.result["token"] not in (asked[2][0], asked[2][-1])
                ):
                    continue  # the answer to what was sent again, and answered before
                del self._asked[response.msgid]
                if response.error is not None:
                    assert response.error.code in ("too_early", "unavailable", "overloaded"), response.error
                    continue
                lapsed = int(now > self._ends.get(response.msgid, now))
                self._held[response.msgid] = response.result
                left_ticks = response.result["end"] - response.result["start"]
                assert left_ticks <= TTL_S * 1000
                # The next window follows the one before: what is left of that comes on top.
                began = max(now, self._ends.get(response.msgid, now))
                self._ends[response.msgid] = began + left_ticks / 1000
                came.append((now - asked[0], lapsed))
        return came

    def _ask(self, number: int, method: str, params: list[Any]) -> None:
        self._asked[number] = (time.monotonic(), method, params)
        self._lines[number % LINES].send_multipart([b"", encode_request(number, method, params)], zmq.NOBLOCK)


def run(
    folder: Path, seconds: float, *, peers: int, idle: int, report: Callable[[str], None] = lambda _: None
) -> Result:
    """Let a crowd come to a delegator of its own in an empty folder."""
    result = Result()
    raise_limit()
    with Daemons(folder) as daemons, zmq.Context() as context:
        delegator = daemons.delegator(name="delegator", ttl=f"{TTL_S}s", env={})
        daemons.worker(name="worker", to=delegator)
        until(lambda: ready_at(delegator), "the worker to be there")
        leases = Leases(context, delegator.address)
        leases.acquire()
        plan = [
            ("alone", 0, ALONE_S, []),
            (f"{peers} deaf peers", peers, seconds, ["cluster.status", "cluster.workers"]),
        ]
        plan.append((f"{idle} idle peers", idle, max(ALONE_S, seconds / 2), []))
        for what, count, lasting, methods in plan:
            report(what)
            arguments = [delegator.address, str(count), str(lasting), *methods]
            path = str(Path(__file__).with_name("deaf.py"))
            crowd = (
                daemons.process([sys.executable, path, *arguments], what.replace(" ", "-")) if count else None
            )
            phase = _measure(what, delegator, leases, lasting)
            result.phases.append(phase)
            if crowd is not None:
                _end(crowd, phase)
            _judge(result, phase, idle=not methods)
        for socket in leases._lines:
            socket.close()
    return result


def _end(crowd: Process, phase: Phase) -> None:
    crowd.wait()
    phase.deaf = json.loads(crowd.out())


def _measure(what: str, delegator: Daemon, leases: Leases, seconds: float) -> Phase:
    phase = Phase(what)
    before_mb, cpu, began = resident_mb(delegator.pid), _cpu_s(delegator.pid), time.monotonic()
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            phase.grown_mb = max(phase.grown_mb, resident_mb(delegator.pid) - before_mb)
            phase.kernel_mb = max(phase.kernel_mb, _kernel_mb())
            asked = time.monotonic()
            with zflake.Client(delegator.address, timeout=WAIT_S) as client:
                client.next_id()
            phase.client_s.append(time.monotonic() - asked)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for took, lapsed in leases.renew(began + seconds):
            phase.renewals.append(took)
            phase.lapsed += lapsed
        over.set()
        looking.result()
    phase.cpu = (_cpu_s(delegator.pid) - cpu) / (time.monotonic() - began)
    return phase


def _judge(result: Result, phase: Phase, *, idle: bool) -> None:
    if phase.lapsed:
        result.violations.append(f"{phase.what}: {phase.lapsed} windows ran out")
    if phase.grown_mb > GROWTH_MB:
        result.violations.append(f"{phase.what}: the delegator grew by {phase.grown_mb:.0f} MB")
    if idle and phase.cpu > IDLE_CPU:
        result.violations.append(f"{phase.what}: the delegator used {phase.cpu:.2f} of a core")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kernel_mb() -> float:
    """Megabytes that the kernel has in TCP buffers, of this machine in all."""
    words = Path("/proc/net/sockstat").read_text().split("TCP:")[1].split()
    return int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
