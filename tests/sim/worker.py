"""A simulated worker: the real lease conversation, links and handler, between a simulated loop and network.

Nothing here decides anything: it carries bytes, lets time pass, and shows the checker what holders do.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Final, TypeAlias

from tests.sim.checker import Checker, Violation, WatchedMint
from tests.sim.client import Client
from tests.sim.delegator import Delegator
from tests.sim.world import Host, Process
from zflake.core.lease import Answer, Grant, Holder, Refusal, Refused, Release, Released, Token
from zflake.core.lessee import Lessee
from zflake.core.timeline import tick_of
from zflake.errors import ProtocolError
from zflake.holder.clock import HolderClock
from zflake.holder.lease import STORE_GONE, LeaseConversation
from zflake.wire.codec import REQUEST_HEAD, decode_response
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.leases import lease_answer
from zflake.wire.methods import Method
from zflake.worker.handler import Handler
from zflake.worker.link import Link

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

NEVER_US: Final = 1 << 62

Asker: TypeAlias = tuple[Client | Delegator, list[bytes]]


class WatchedLessee(Lessee):
    """A lessee that shows the checker what it is told; its holder's pid is its number."""

    worker: Worker

    def receive(self, answer: Answer, local_us: int, now: int) -> bool:
        worker, checker = self.worker, self.worker.checker
        checker.acting = worker.number
        before, token = self.mint, self.token
        assert before is None or isinstance(before, WatchedMint)
        if isinstance(answer, Grant):
            checker.told(answer)
        if answer is STORE_GONE:
            worker.note("gives its lease up: no delegator of its cluster answers")
            assert before is not None
            before.books.over = True
            return super().receive(answer, local_us, now)
        try:
            settled = super().receive(answer, local_us, now)
        except ProtocolError as error:
            raise Violation(f"disjoint: a holder refused its grant: {error}") from error
        if isinstance(answer, Refusal):
            if settled:
                worker.note("is lost")
                assert before is not None
                checker.lost(before.books, token, worker.told_in_life)
        elif before is not None and self.mint is not before:
            raise Violation(f"lost: {worker.name} gave up machine {before.machine}, which is its own")
        elif settled and isinstance(answer, Grant):
            worker.follow_edges(answer)
        return settled


class Worker(Process):
    """One life of a worker's process: one holder."""

    def __init__(self, cluster: Cluster, number: int, host: Host) -> None:
        super().__init__(cluster.world, host, f"w{number}")
        self.cluster = cluster
        self.checker: Checker = cluster.checker
        self.told_in_life = 0
        self.number = number
        """The holder's, which the checker knows it by; no two have the same."""
        plan, rng = cluster.plan, cluster.world.rng
        self.lease = LeaseConversation(
            list(map(parse_endpoint, cluster.endpoints)),
            Holder(self.name, "host", number, f"tcp://10.0.1.1:{number}"),
            clock=HolderClock(host.local_us),
            draw_token=self._draw_token,
            jitter=rng.random,
            first=rng.randrange(plan.delegators),
            ping_us=plan.ping_us,
        )
        assert isinstance(self.lease.lessee, WatchedLessee)
        self.lease.lessee.worker = self
        self.releasing: Release | None = None
        self.released_at_us: int | None = None
        self._start()

    def _start(self) -> None:
        """Let the loop run."""
        self.identity = b"w%d" % self.number
        self.handler: Handler[Asker] = Handler(self.lease, dict, itemgetter(0))
        links = self.cluster.plan.delegators if self.cluster.plan.clients else 0
        self.links = [Link(self.lease, self.handler.load) for _ in range(links)]
        self.cluster.peers[self.identity] = self
        self._wake_us = NEVER_US
        self._loop()

    def _draw_token(self) -> Token:
        token = self.world.rng.randbytes(16)
        self.checker.acting = self.number
        self.checker.drew(token)
        return token

    # --- the loop ---

    def _loop(self) -> None:
        """A turn of the loop, after whatever came, or was due."""
        local_us = self.host.local_us()
        before = self.lease.state
        body = self.lease.poll(local_us)
        if self.world.tracing and before != self.lease.state:
            self.note(f"{before} -> {self.lease.state}")
        if body is not None:
            number = self.cluster.endpoints.index(self.lease.endpoint.text)
            self._send(number, [b"%s/%d" % (self.identity, self.lease.connection), b"", body])
        for number, link in enumerate(self.links):
            if (said := link.poll(local_us)) is not None and not self._send(
                number, [self._line(link), b"", said]
            ):
                link.unsent()
        wake_us = min([self.lease.wake_us, *(link.wake_us for link in self.links)])
        if wake_us < self._wake_us or self._wake_us <= local_us:
            self._wake_us = max(wake_us, local_us + 1_000)
            self.at_local(self._wake_us, self._woken, self._wake_us)

    def _woken(self, wake_us: int) -> None:
        if wake_us == self._wake_us:
            self._wake_us = NEVER_US
            self._loop()
            self._pump()

    def _line(self, link: Link) -> bytes:
        """The identity of a link's present connection."""
        return b"%s/link%d" % (self.identity, link.connection)

    def _send(self, number: int, frames: list[bytes]) -> bool:
        delegator = self.cluster.delegators[number]
        if delegator is None or delegator.dead:
            return False
        self.world.send(self, delegator, delegator.receive, frames)
        return True

    # --- what comes in ---

    def hear(
        self, delegator: Delegator, identity: bytes, prefix: list[bytes], body: bytes, life: int
    ) -> None:
        """Take in a message that was sent to `identity`, one of this worker's connections, in a life of the store."""
        self.told_in_life = life
        if b"/link" in identity:
            link = self.links[delegator.number]
            if identity != self._line(link):
                return  # of a connection that was closed
            if body[:2] == REQUEST_HEAD:
                self._handle((delegator, prefix), body)
            else:
                link.receive(body, self.host.local_us())
            return
        if identity != b"%s/%d" % (self.identity, self.lease.connection):
            self._hear_stale(body)  # of a connection that was closed
            return
        releasing = self.lease.releasing
        self.lease.receive(body, self.host.local_us())
        if releasing and not self.lease.releasing:
            self._released(body)
        self._loop()
        self._pump()

    def _hear_stale(self, body: bytes) -> None:
        """The conversation takes no such answer in; a lessee must bear it all the same."""
        response = decode_response(body)
        if self.cluster.plan.stale_grants and response.error is None and "token" in response.result:
            grant = lease_answer(Method.LEASE_RENEW, None, response.result)
            assert isinstance(grant, Grant)
            self.lease.lessee.receive(grant, self.host.local_us(), self.lease.clock.tick(grant.layout))

    def _released(self, body: bytes) -> None:
        assert self.releasing is not None
        response = decode_response(body)
        answer = lease_answer(Method.LEASE_RELEASE, response.error, response.result)
        if isinstance(answer, Released):
            self.checker.was_released(self.releasing, answer)
        elif isinstance(answer, Refusal) and answer.reason is Refused.LOST:
            self.checker.was_not_released(self.number, self.releasing)
        else:
            return
        self.released_at_us = self.world.true_us
        self.die()

    def asked(self, client: Client, body: bytes) -> None:
        """A request comes from a client."""
        self.checker.counts["direct"] += 1
        self._handle((client, []), body)

    def _handle(self, asker: Asker, body: bytes) -> None:
        local_us = self.host.local_us()
        answer = self.handler.handle(asker, body, local_us, local_us)
        if answer is not None:
            self._answer(asker, answer)
        else:
            self.world.after((self.handler.wait_us() or 0) + 1, self, self._turn_parked)

    def _turn_parked(self) -> None:
        for asker, answer in self.handler.turn(self.host.local_us()):
            self._answer(asker, answer)
        if self.handler.parked:
            self.world.after(max(1_000, (self.handler.wait_us() or 0) + 1), self, self._turn_parked)

    def _answer(self, asker: Asker, answer: bytes) -> None:
        who, prefix = asker
        if isinstance(who, Client):
            self.world.send(self, who, who.hear, answer)
            return
        link = self.links[who.number]
        for message in (link.answer(prefix, answer), link.flush()):
            if message is not None:
                frames = [self._line(link), *message.prefix, message.body]
                self.world.send(self, who, who.receive, frames)
                self.cluster.stranger_hears(who, frames)

    # --- minting ---

    def _pump(self) -> None:
        """Mint now and then, as an application would."""
        if self.world.rng.random() < self.cluster.plan.thirst:
            self.take(1 + int(self.world.rng.random() ** 3 * 20))

    def take(self, count: int) -> None:
        """Mint up to so many IDs now."""
        mint, timeline_us = self.lease.mint, self.lease.clock.timeline_us()
        if mint is not None and timeline_us is not None:
            rng, plan = self.world.rng, self.cluster.plan
            if plan.stale_clock and rng.random() < plan.stale_clock:
                # A thread that was stopped between its look at the clock and its mint.
                timeline_us -= int(rng.random() ** 3 * 4_000_000)
                self.world.faults["stale clock"] += 1
            mint.take(tick_of(mint.layout, timeline_us), count)

    def follow_edges(self, grant: Grant) -> None:
        """Mint where mistakes by one show: in the window's last tick, and in the one after it."""
        if not self.cluster.plan.edges or self.world.rng.random() > self.cluster.plan.edges:
            return
        timeline_us = self.lease.clock.timeline_us()
        if timeline_us is None:
            return
        layout = grant.layout
        for tick in (grant.start, grant.end - 1, grant.end):
            wait_us = layout.epoch_us + tick * layout.tick_us - timeline_us
            if wait_us >= 0:
                self.at_local(self.host.local_us() + wait_us + 1, self.take, 2)

    # --- its end, and its doubles ---

    def leave(self) -> None:
        """Stop minting for good and give the machine ID back, for as long as the process has for that."""
        if self.releasing is not None:
            return
        self.handler.draining = True
        last = None if self.lease.mint is None else self.lease.mint.last
        self.releasing = self.lease.release()
        self.note(f"leaves; last tick {last}")
        if self.releasing is None:
            self.die()
            return
        self.world.after(2_000_000, self, self.die)
        self._loop()

    def fork(self, number: int) -> Worker:
        """A child process: it has a holder of its own, and nothing of its parent's."""
        return Worker(self.cluster, number, self.host)

    def double(self, number: int, host: Host) -> Worker:
        """A copy with all that this one knows, as a restored snapshot of its machine would be."""
        clone = copy.copy(self)
        clone.number, clone.name, clone.host = number, f"w{number}", host
        self.checker.cloned(self.number, number)
        clone.lease = copy.copy(self.lease)
        holder_clock = clone.lease.clock = copy.copy(self.lease.clock)
        holder_clock._local_us = host.local_us
        holder_clock._exchanges = copy.copy(holder_clock._exchanges)
        lessee = clone.lease.lessee = copy.copy(self.lease.lessee)
        assert isinstance(lessee, WatchedLessee)
        lessee.worker = clone
        lessee._draw_token = clone._draw_token
        if isinstance(self.lease.mint, WatchedMint):
            lessee.mint = mint = copy.copy(self.lease.mint)
            mint._windows = deque(mint._windows)
            mint.books = replace(mint.books, holder=number)
        clone.lease._go_on()
        clone._start()
        return clone
