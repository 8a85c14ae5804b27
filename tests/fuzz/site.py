"""The site: daemons under fire, honest peers beside them, and the sockets that a hostile peer has.

Two delegators, on SQLite and on memory, with a worker each; a static worker; a worker of a delegator that lies; and
clients that take IDs all the while, and must not notice.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import zmq

import zflake
from tests.jobs.takers import Orders, Taker
from tests.system.daemons import Daemon, Daemons, Process, ready_at, resident_mb, status_of, until
from zflake.core.layout import DEFAULT

TTL_S: Final = 6
MACHINES: Final = {"sqlite": "0-499", "memory": "500-999"}
"""Machine IDs by delegator, apart, so that all IDs can be compared with each other."""
STATIC: Final = 1_010
GROWTH_MB: Final = 64.0
"""Megabytes that a process may grow by, however long it runs: what it has in queues and buffers, each of which ends, as
in a flood, and the arenas that the interpreter keeps after the largest message."""
SPAN_MB: Final = 2e-3
"""Megabytes for each tenancy beside that, on a store in memory: it keeps what it granted, and names of 255 characters."""
LAPSED: Final = "no IDs until it is renewed"
"""The end of a worker's warning that its lease was not renewed in time; that a delegator was slow to answer is none, on a
machine with other work."""
RATE: Final = 200
"""IDs a second of an honest client: it is there to notice, not to load."""


class Security(Protocol):
    """What makes a connection: the daemons' flags, the clients' arguments, the sockets' options."""

    def flags(self, role: str, /) -> Sequence[str]:
        """Options of a daemon of this role."""

    def dress(self, socket: zmq.Socket[bytes], role: str, server: str, /) -> None:
        """Set the options of a stranger's socket, before it connects to this server, or binds as one."""


class Open:
    """A cluster without keys."""

    def flags(self, _role: str) -> Sequence[str]:
        return ()

    def dress(self, _socket: zmq.Socket[bytes], _role: str, _server: str) -> None:
        pass


@dataclass
class Watch:
    """A daemon's log, read as it grows, and its memory."""

    daemon: Daemon
    before_mb: float
    grown_mb: float = 0.0
    _at: int = 0
    _rest: bytes = b""

    def fresh(self) -> Iterator[dict[str, Any]]:
        """The events that it has logged since the last call."""
        with self.daemon.log_path.open("rb") as log:
            log.seek(self._at)
            new = log.read()
        self._at += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                yield {"level": "stray", "message": line.decode(errors="replace")}

    def look(self, *, honest: bool) -> Iterator[str]:
        """What is wrong with it."""
        if not self.daemon.alive:
            yield f"{self.daemon.name} ended with {self.daemon.popen.returncode}: {self.daemon.log()[-2_000:]}"
            return
        for event in self.fresh():
            harm = honest and event["message"].endswith(LAPSED)
            if harm or event["level"] not in ("info", "debug", "warning") or "trace" in event:
                yield f"{self.daemon.name} logged {event['message']} {event.get('trace', '')}"
        self.grown_mb = max(self.grown_mb, resident_mb(self.daemon.pid) - self.before_mb)


@dataclass
class Site:
    """The processes, once all of them serve."""

    daemons: Daemons
    security: Security
    context: zmq.Context[zmq.Socket[bytes]]
    liar: str
    """Where the delegator that lies is bound."""
    via: Sequence[str] = ()
    """A module that runs each process under fire, with its arguments, in place of the interpreter."""
    delegators: dict[str, Daemon] = field(default_factory=dict)
    workers: dict[str, Daemon] = field(default_factory=dict)
    takers: list[Taker] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    store_ids: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    """The machine ID of each honest leased worker."""

    @property
    def targets(self) -> dict[str, tuple[str, Daemon]]:
        """Service and process of all that strangers connect to."""
        return {n: ("delegator", d) for n, d in self.delegators.items()} | {
            n: ("worker", d) for n, d in self.workers.items()
        }

    def start(self, seed: int) -> None:
        flags = self.security.flags
        stores = {"sqlite": f"sqlite:///{self.daemons.folder}/store.db", "memory": "memory:"}
        for name, url in stores.items():
            self.delegators[name] = self.daemons.delegator(
                *("--store", url, "--machines", MACHINES[name], *flags("delegator")),
                name=name,
                ttl=f"{TTL_S}s",
                via=self.via,
            )
        start = self.daemons.worker
        for name, delegator in self.delegators.items():
            self.workers[f"{name}-worker"] = start(
                *flags("worker"), name=f"{name}-worker", to=delegator, via=self.via
            )
        static = ("--machine", str(STATIC), "--layout", DEFAULT.name)
        self.workers["static"] = start(*static, *flags("delegator"), name="static", via=self.via)
        self.workers["lied-to"] = start(*flags("worker"), name="lied-to", to=self.liar, via=self.via)
        for name, delegator in self.delegators.items():
            until(partial(ready_at, delegator), f"the worker of {name}")
        for worker in self.workers.values():
            until(worker.find_address, f"{worker.name} to serve")
        self.held = {
            f"{name}-worker": status_of(delegator.address)["leases"][0]["machine"]
            for name, delegator in self.delegators.items()
        }
        self.store_ids = {n: status_of(d.address)["store_id"] for n, d in self.delegators.items()}
        self.watches = [Watch(daemon, resident_mb(daemon.pid)) for _, daemon in self.targets.values()]
        for k, (name, route) in enumerate((("sqlite", "auto"), ("sqlite", "broker"), ("memory", "broker"))):
            out = str(self.daemons.folder / f"taker-{k}.runs")
            orders = Orders([self.delegators[name].address], route, seed + k, out, rate=RATE, lists=True)
            self.takers.append(Taker.start(self.daemons, f"taker-{k}", orders))
        until(lambda: all(taker.taken for taker in self.takers), "each honest client's first ID")

    def look(self) -> list[str]:
        """What is wrong now."""
        wrong = [w for watch in self.watches for w in watch.look(honest=watch.daemon.name in self.held)]
        for watch in self.watches:
            allowed = GROWTH_MB
            if watch.daemon.name == "memory":
                allowed += SPAN_MB * status_of(watch.daemon.address).get("requests", {}).get(
                    "lease.acquire", 0
                )
            if watch.grown_mb > allowed:
                wrong.append(f"{watch.daemon.name} grew by {watch.grown_mb:.0f} MB, more than {allowed:.0f}")
        for taker in self.takers:
            if taker.errors:
                wrong.append(f"an honest client ({taker.route}): {taker.errors[0]}")
            if not taker.process.alive:
                wrong.append(f"an honest client ended: {taker.process.log()[-1_000:]}")
        return wrong

    def recovered(self) -> list[str]:
        """What does not serve a fresh client at once, now that the fire is over."""
        wrong = []
        routes = [(d, route) for d in self.delegators.values() for route in ("auto", "broker")]
        routes += [(worker, "direct") for worker in self.workers.values()]
        for daemon, route in routes:
            with zflake.Client(daemon.address, route=route, timeout=2.0) as fresh:
                try:
                    fresh.next_ids(10)
                except zflake.ZflakeError as error:
                    wrong.append(f"{daemon.name} does not serve a fresh client ({route}): {error!r}")
        return wrong

    def renewals(self, name: str) -> int:
        """How often the lease of an honest worker was renewed so far, each time under another generation."""
        delegator = self.delegators[name.removesuffix("-worker")]
        return len({lease[2] for lease in delegator.leases("renewed") if lease[1] == self.held[name]})

    def socket(self, kind: int, role: str, server: str, identity: bytes = b"") -> zmq.Socket[bytes]:
        """A socket to a server (DEALER), or of a server at that endpoint (ROUTER)."""
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        if identity:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        self.security.dress(socket, role, server)
        if kind == zmq.ROUTER:
            socket.bind(server)
        else:
            socket.connect(server)
        return socket

    def victims(self, kind: str, control: str) -> Process:
        """A process of clients that are lied to."""
        argv = [sys.executable, "-m", *self.via, "tests.fuzz.victims", kind, control]
        return self.daemons.process(argv, f"victims-{kind}")


def bound_at(socket: zmq.Socket[bytes]) -> str:
    """The endpoint of a bound socket."""
    last = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    return last.rstrip(b"\0").decode()


def soon(seconds: float) -> float:
    """A deadline on the monotonic clock."""
    return time.monotonic() + seconds
