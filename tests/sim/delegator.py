"""A simulated delegator: the real start, executor and service, between a simulated loop, network and disk.

Nothing here decides anything: it carries bytes, lets time pass, and shows the checker what the timeline does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.sim.client import Client
from tests.sim.disk import Connection, Crashed
from tests.sim.world import Process
from zflake.core.lease import Refusal, Refused
from zflake.delegator.clock import begin_timeline
from zflake.delegator.directory import Directory
from zflake.delegator.executor import LeaseExecutor
from zflake.delegator.service import Service
from zflake.delegator.start import Wishes, start
from zflake.errors import ConfigError, StoreError
from zflake.wire.codec import decode_request, decode_response

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

SECOND_US: Final = 1_000_000
SWEEP_US: Final = 200_000
"""Microseconds between turns of a loop to which nothing comes."""


class Delegator(Process):
    """One life of a delegator's process.

    Raises `StoreError` or `ConfigError` if it can't start.
    """

    def __init__(self, cluster: Cluster, number: int, wishes: Wishes, *, accept_clock: bool) -> None:
        super().__init__(cluster.world, cluster.hosts[number], f"d{number}")
        self.cluster = cluster
        cluster.started.append(self)
        self.number = number
        self.address = cluster.endpoints[number]
        host, checker, rng = self.host, cluster.checker, cluster.world.rng
        store = Connection(cluster.world, self, cluster.disk, lambda: self.timeline.at(host.local_us()))

        def cold_us() -> int:
            checker.cold_start(host.wall_us())
            return host.wall_us()

        self.timeline = begin_timeline(
            store,
            self.name,
            accept_clock=accept_clock,
            local_us=host.local_us,
            wall_us=cold_us,
            sleep=self._sleep,
        )
        checker.started(self.timeline.at(host.local_us()), accepted=accept_clock)
        meta, self.clock = start(
            store,
            wishes,
            self.timeline,
            name=self.name,
            address=self.address,
            accept_clock=accept_clock,
            local_us=host.local_us,
            wall_us=host.wall_us,
        )
        self.executor = LeaseExecutor(store, meta, self.clock, wake=self._wake, pick=rng.randrange)
        self.service = Service(self.executor, Directory(store.held(self.clock.tick())), rng.randbytes)
        self._working = False
        self.world.after(int(rng.random() * SECOND_US), self, self._every_second)
        if cluster.plan.clients:
            self.world.after(SWEEP_US, self, self._sweep)
        self.note(f"starts at {self.clock.tick()}")

    # --- the executor's thread ---

    def _work(self) -> None:
        """A turn of the executor, which may wait for the store; requests that come meanwhile wait for the next."""
        self._working = True
        try:
            self.executor.turn(0)
        except Crashed:
            return
        self._working = False
        if self.executor.backlog:
            self._work_soon(100)

    def _work_soon(self, wait_us: int) -> None:
        if not self._working:
            self._working = True
            self.world.after(wait_us, self, self._work)

    def _wake(self) -> None:
        if self.world.tracing:
            for ticket, (answer, _) in self.executor._done:
                self.note(f"{ticket.prefix[0].decode()} {_show(ticket.request)} -> {_show(answer)}")
        self.world.after(0, self, self._turn)

    def _sleep(self, seconds: float) -> None:
        self.world.elapse(int(seconds * 1e6))
        if self.dead:
            raise Crashed

    # --- the loop ---

    def receive(self, frames: list[bytes]) -> None:
        """Take in a message, its sender's identity first."""
        local_us = self.host.local_us()
        if self.world.rng.random() < 0.05:
            self.cluster.checker.timeline(self.clock.timeline_us())
        self.service.turn(local_us)
        self.service.receive(frames, local_us, local_us)
        if self.executor.backlog:
            self._work_soon(100 + int(self.world.rng.random() * 2_000))
        self._flush()

    def asked(self, client: Client, body: bytes) -> None:
        """A client asks something."""
        msgid, method, _ = decode_request(body)
        if method == "ids.next":
            self.cluster.checker.counts["brokered"] += 1
        self.cluster.checker.asked(id(self), client.identity, msgid)
        self.receive([client.identity, b"", body])

    def _turn(self) -> None:
        self.service.turn(self.host.local_us())
        self._flush()

    def _sweep(self) -> None:
        self.world.after(SWEEP_US, self, self._sweep)
        self._turn()

    def _every_second(self) -> None:
        self.world.after(SECOND_US, self, self._every_second)
        self._work_soon(0)
        self.clock.service(self.host.local_us())
        self.cluster.checker.timeline(self.clock.timeline_us())

    def _flush(self) -> None:
        cluster = self.cluster
        while messages := self.service.collect():
            for message in messages:
                identity, body = message.prefix[0], message.body
                peer = cluster.peers.get(identity.partition(b"/")[0])
                if isinstance(peer, Client):
                    cluster.checker.answered(id(self), identity, decode_response(body).msgid or 0)
                    self.world.send(self, peer, peer.hear, body)
                elif peer is None or peer.dead:
                    self.service.unsent(message, self.host.local_us())
                else:
                    told = (self, identity, message.prefix[1:], body, cluster.checker.life)
                    self.world.send(self, peer, peer.hear, *told)
                    if message.worker is not None:
                        cluster.stranger_sees(self, message.prefix[1], body)


def begin(cluster: Cluster, number: int, wishes: Wishes, *, accept_clock: bool = False) -> Delegator | None:
    """Start a delegator; None if it refuses to, or can't."""
    try:
        return Delegator(cluster, number, wishes, accept_clock=accept_clock)
    except (StoreError, ConfigError) as error:
        cluster.world.note(f"d{number}", f"does not start: {error}")
    except Crashed:
        pass
    return None


def _show(what: Any) -> str:
    if isinstance(what, Refusal):
        wait = "" if what.retry_after_ms is None else f", {what.retry_after_ms} ms"
        return f"{what.reason}{wait}" if what.reason is not Refused.UNAVAILABLE else "unavailable"
    fields = []
    for name in what.__slots__:
        value = getattr(what, name)
        if name in ("layout", "holder", "ttl", "store_id"):
            continue
        fields.append(f"{name}={value.hex()[:6] if isinstance(value, bytes) else value}")
    return f"{type(what).__name__}({', '.join(fields)})"
