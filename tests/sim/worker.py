"""A simulated worker: the real tenant, mint, estimator and handler, and a thin mirror of keeper and link.

The mirror has the keeper's timing: hello first, one request outstanding, the next endpoint where no answer
comes in time, pings between lease requests; and the link's: ready, beats, leave.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from tests.sim.checker import WatchedMint
from tests.sim.world import Host, Process
from zflake.core.lease import Answer, Grant, Holder, Refusal, Refused, Release, Released, Request, Token
from zflake.core.mint import Mint
from zflake.core.tenant import RETRY_US, State, Tenant
from zflake.core.timeline import Estimator, tick_of
from zflake.errors import ProtocolError
from zflake.holder.keeper import PATIENCE_US
from zflake.wire.messages import Method
from zflake.worker.handler import Handler

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.delegator import Delegator

BEAT_US: Final = 250_000


class Worker(Process):
    """One life of a worker's process: one holder.  It is what its handler calls a `Hold`, too."""

    def __init__(self, cluster: Cluster, number: int, host: Host) -> None:
        super().__init__(cluster.world, host, f"w{number}")
        self.cluster = cluster
        self.number = number
        """The holder's, which the checker knows it by; no two have the same."""
        self.identity = b"w%d" % number
        self.address = f"tcp://10.0.1.{number % 250}:{1 + number}"
        rng = cluster.world.rng
        self.tenant = Tenant(
            Holder(self.name, "host", number, self.address),
            draw_token=self._draw_token,
            jitter=rng.random,
        )
        self.estimator = Estimator()
        self.store_id: str | None = None
        self.releasing: Release | None = None
        self.released_at_us: int | None = None
        self._turn = rng.randrange(cluster.weather.delegators)
        self._connection = 0
        self._msgid = 0
        self._pending: Request | Method | None = None
        self._answer_by_us = 0
        self._greeted = False
        self._heard_us = 0
        self._ping_at_us = 0
        self._hold_until_us = 0
        self._known_as: dict[int, int] = {}
        self.handler = Handler(self, self.now_us, dict)
        cluster.workers_by_address[self.address] = self
        cluster.workers_by_identity[self.identity] = self
        self.start()

    def start(self) -> None:
        """Let the loops run."""
        self._alarm_us = 1 << 62
        self._service()
        if self.cluster.weather.clients:
            self.world.after(int(self.world.rng.random() * BEAT_US), self, self._beat)

    # --- what the handler needs, as of a keeper ---

    @property
    def mint(self) -> Mint | None:
        return self.tenant.mint

    @property
    def retry_after_ms(self) -> int:
        return 50

    def now_us(self) -> int | None:
        return self.estimator.now_us(self.host.local_us()) if self.estimator.known else None

    def _tick(self, mint: Mint) -> int:
        now_us = self.now_us()
        return -1 if now_us is None else tick_of(mint.layout, now_us)

    def _draw_token(self) -> Token:
        token = self.world.rng.randbytes(16)
        self.cluster.checker.drew(token)
        return token

    # --- the keeper ---

    @property
    def _delegator(self) -> Delegator | None:
        return self.cluster.delegators[self._turn]

    def _connect_next(self) -> None:
        self._turn = (self._turn + 1) % len(self.cluster.delegators)
        self._connection += 1
        self._pending = None
        self._greeted = False

    def _service(self) -> None:
        """What the keeper does whenever something came, or is due."""
        if self.releasing is not None:
            return  # it only waits for an answer any more
        local_us = self.host.local_us()
        if self._pending is not None and local_us >= self._answer_by_us:
            self._connect_next()
        tenant = self.tenant
        mint = tenant.mint
        if mint is not None and self.estimator.known:
            before = tenant.state
            tenant.observe(self._tick(mint), local_us)
            if self.world.tracing and before is not tenant.state:
                self.note(f"{before.name} -> {tenant.state.name}")
        if self._pending is None and local_us >= self._hold_until_us:
            self._send_due(local_us)
        if self._pending is not None:
            wake_us = self._answer_by_us
        else:
            wake_us = max(min(tenant.send_at_us, self._ping_at_us), self._hold_until_us)
        if wake_us < self._alarm_us or self._alarm_us <= local_us:
            self._alarm_us = max(wake_us, local_us + 1_000)
            self.at_local(self._alarm_us, self._alarm, self._alarm_us)

    def _alarm(self, alarm_us: int) -> None:
        if alarm_us == self._alarm_us:
            self._alarm_us = 1 << 62
            self._service()
            self._pump()

    def _send_due(self, local_us: int) -> None:
        self.cluster.checker.acting = self.number
        if not self._greeted:
            self._send(Method.HELLO, local_us)
        elif request := self.tenant.poll(local_us):
            self._send(request, local_us)
        elif local_us >= self._ping_at_us:
            self._send(Method.PING, local_us)

    def _send(self, what: Request | Method, local_us: int) -> None:
        self._msgid += 1
        self._pending = what
        self._answer_by_us = local_us + self.tenant.retry_us
        self._ping_at_us = local_us + self.cluster.weather.ping_us
        delegator = self._delegator
        if delegator is not None and not delegator.dead:
            self.world.send(self, delegator, delegator.hear, self, (self._connection, self._msgid), what)

    def hear(self, ticket: tuple[int, int], answer: Answer | str | None, now_us: int) -> None:
        """Take in what a delegator answered."""
        if self._pending is None or ticket != (self._connection, self._msgid):
            if isinstance(answer, Grant) and self.cluster.weather.stale_grants:
                # The keeper hands on no such answer; a tenant must bear it all the same.
                self._receive(answer, self.host.local_us())
            return
        local_us = self.host.local_us()
        pending, self._pending = self._pending, None
        if pending is Method.HELLO:
            assert isinstance(answer, str)
            mint = self.tenant.mint
            if mint is not None and answer != self.store_id:
                if self.tenant.state is State.HELD or local_us < self._heard_us + PATIENCE_US:
                    self._hold_until_us = local_us + RETRY_US
                    self._connect_next()
                    self._service()
                    return
                self.note("gives its lease up: nobody of its cluster answers")
                assert isinstance(mint, WatchedMint)
                mint.books.over = True
                self.tenant.receive(Refusal(Refused.LOST, "its store is gone"), local_us, -1)
            self.store_id = answer
            self._greeted = True
        if self._greeted:
            self._heard_us = local_us
            self.estimator.exchange(now_us, local_us, step=self.tenant.state is not State.HELD)
        if isinstance(pending, Release):
            if isinstance(answer, Released):
                self.cluster.checker.was_released(pending, answer)
            elif isinstance(answer, Refusal) and answer.reason is Refused.LOST:
                self.cluster.checker.was_not_released(self.number, pending)
            if not isinstance(answer, Refusal) or answer.reason is Refused.LOST:
                self.released_at_us = self.world.now_us
                self.die()
        elif not isinstance(pending, Method):
            assert isinstance(answer, Answer)
            self._receive(answer, local_us)
            if (
                isinstance(answer, Refusal)
                and answer.reason is Refused.UNAVAILABLE
                and self.cluster.weather.delegators > 1
            ):
                self._connect_next()
        self._service()
        self._pump()

    def _receive(self, answer: Answer, local_us: int) -> None:
        checker, tenant = self.cluster.checker, self.tenant
        checker.acting = self.number
        before, token = tenant.mint, tenant.token
        layout = answer.layout if isinstance(answer, Grant) else before.layout if before else None
        now = -1
        if layout is not None and (now_us := self.now_us()) is not None:
            now = tick_of(layout, now_us)
        if isinstance(answer, Grant):
            checker.told(answer)
        try:
            settled = tenant.receive(answer, local_us, now)
        except ProtocolError as error:
            checker.refused(str(error))
            return
        if before is not None and tenant.mint is not before and not isinstance(answer, Refusal):
            checker.gave_up(self.number, before.machine)
        if settled and isinstance(answer, Refusal):
            self.note("is lost")
            assert isinstance(before, WatchedMint)
            checker.lost(before.books, token)
        if settled and isinstance(answer, Grant):
            self._follow_edges(answer)

    def _follow_edges(self, grant: Grant) -> None:
        """Mint where mistakes by one show: in the window's last tick, and in the one after it."""
        if not self.cluster.weather.edges or self.world.rng.random() > self.cluster.weather.edges:
            return
        now_us = self.now_us()
        if now_us is None:
            return
        layout = grant.layout
        for tick in (grant.start, grant.end - 1, grant.end):
            wait_us = layout.epoch_us + tick * layout.tick_us - now_us
            if wait_us >= 0:
                self.at_local(self.host.local_us() + wait_us + 1, self.take, 2)

    # --- minting ---

    def _pump(self) -> None:
        """Mint now and then, as an application would."""
        if self.world.rng.random() < self.cluster.weather.thirst:
            self.take(1 + int(self.world.rng.random() ** 3 * 20))

    def take(self, count: int) -> None:
        """Mint up to so many IDs now."""
        mint = self.tenant.mint
        if mint is not None and (now_us := self.now_us()) is not None:
            rng, weather = self.world.rng, self.cluster.weather
            if weather.stale_clock and rng.random() < weather.stale_clock:
                # A thread that was stopped between its look at the clock and its mint.
                now_us -= int(rng.random() ** 3 * 4_000_000)
                self.world.faults["stale clock"] += 1
            mint.take(tick_of(mint.layout, now_us), count)

    # --- the links ---

    def _beat(self) -> None:
        self.world.after(BEAT_US, self, self._beat)
        mint = self.tenant.mint
        for number, delegator in enumerate(self.cluster.delegators):
            if delegator is None or delegator.dead:
                continue
            if self.tenant.state is not State.HELD or mint is None:
                if self._known_as.pop(number, None) is not None:
                    self.world.send(self, delegator, delegator.left, self)
            elif self._known_as.get(number) != mint.machine:
                self._known_as[number] = mint.machine
                self.world.send(self, delegator, delegator.introduced, self, mint.machine, self.tenant.token)
            else:
                self.world.send(self, delegator, delegator.beat, self, self.handler.load())

    def beaten(self, delegator: Delegator, known: bool, now_us: int) -> None:
        """A delegator answers a beat."""
        if known:
            step = self.tenant.state is not State.HELD
            self.estimator.exchange(now_us, self.host.local_us(), step=step)
        else:
            self._known_as.pop(delegator.number, None)

    def brokered(self, delegator: Delegator, envelope: list[bytes], body: bytes) -> None:
        """A request comes by a delegator."""
        self._handle((delegator, envelope), body)

    def asked(self, client: Process, prefix: bytes, body: bytes) -> None:
        """A request comes from a client."""
        self.cluster.routes["direct"] += 1
        self._handle((client, prefix), body)

    def _handle(self, asker: Any, body: bytes) -> None:
        local_us = self.host.local_us()
        answer = self.handler.handle(asker, body, local_us, local_us)
        if answer is not None:
            self._answer(asker, answer)
        else:
            self.world.after(self.handler.wait_us() + 1, self, self._turn_parked)

    def _turn_parked(self) -> None:
        for asker, answer in self.handler.turn(self.host.local_us()):
            self._answer(asker, answer)
        if self.handler.parked:
            self.world.after(max(1_000, self.handler.wait_us() + 1), self, self._turn_parked)

    def _answer(self, asker: Any, answer: bytes) -> None:
        who, envelope = asker
        if who.name.startswith("d"):
            self.world.send(self, who, who.answered, self.identity, envelope, answer)
            self.cluster.stranger_hears(who, self.identity, envelope, answer)
        else:
            self.world.send(self, who, self.cluster.client_hears, who, answer)

    # --- its end, and its doubles ---

    def leave(self) -> None:
        """Stop minting for good and give the machine ID back, for as long as the process has for that."""
        if self.releasing is not None:
            return
        self.handler.draining = True
        self.cluster.checker.acting = self.number
        last = None if self.tenant.mint is None else self.tenant.mint.last
        self.releasing = self.tenant.close()
        self.note(f"leaves; last tick {last}")
        if self.releasing is None:
            self.die()
            return
        self._send(self.releasing, self.host.local_us())
        self.world.after(2_000_000, self, self.die)

    def fork(self, number: int) -> Worker:
        """A child process: it has a holder of its own, and nothing of its parent's."""
        return Worker(self.cluster, number, self.host)

    def double(self, number: int, host: Host) -> Worker:
        """A copy with all that this one knows, as a restored snapshot of its machine would be."""
        clone = copy.copy(self)
        clone.number, clone.name, clone.identity = number, f"w{number}", b"w%d" % number
        clone.host = host
        checker = self.cluster.checker
        checker.cloned(self.number, number)
        clone.tenant = copy.copy(self.tenant)
        clone.tenant._draw_token = clone._draw_token
        if isinstance(self.tenant.mint, WatchedMint):
            mint = _copied(self.tenant.mint)
            mint.books = checker.begin_copy(mint.books, number)
            clone.tenant.mint = mint
        clone.estimator = _copied(self.estimator)
        clone.handler = Handler(clone, clone.now_us, dict)
        clone._known_as = {}
        clone.address = f"tcp://10.0.1.{number % 250}:{1 + number}"
        self.cluster.workers_by_address[clone.address] = clone
        self.cluster.workers_by_identity[clone.identity] = clone
        clone._connect_next()
        clone.start()
        return clone


def _copied(thing: Any) -> Any:
    """A copy of an object with slots, and of its deques."""
    other = object.__new__(type(thing))
    for kind in type(thing).__mro__:
        for name in getattr(kind, "__slots__", ()):
            value = getattr(thing, name)
            setattr(other, name, deque(value) if isinstance(value, deque) else value)
    return other
