"""A simulated client: the real conversation and balancer, driven in virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.world import Process
from zflake.client.balancer import Balancer
from zflake.client.conversation import Ask, Conversation, Outcome, Pause, begin, proceed, take
from zflake.core.mint import Run
from zflake.errors import ProtocolError, ZflakeError
from zflake.wire.codec import Response, decode_response, encode_request

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

BUDGET_S = 5.0


class Client(Process):
    """Makes one call after the other."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        world = cluster.world
        super().__init__(world, cluster.hosts[number % len(cluster.hosts)], f"c{number}")
        self.cluster = cluster
        self.in_a_row = 0
        """How many calls have succeeded since one failed."""
        self.failed: ZflakeError | None = None
        self.identity = b"c%d" % number
        self._msgid = 0
        self._asking = 0
        self._count = 0
        self._talk = self._take()
        self._route = world.rng.choice(("auto", "direct", "broker", "broker"))
        self._balancer = self._new_balancer()
        cluster.peers[self.identity] = self
        world.after(world.rng.randrange(1_000_000), self, self._call)

    def forget(self) -> None:
        """Be restarted, as far as the balancer goes."""
        self._balancer = self._new_balancer()

    def _new_balancer(self) -> Balancer:
        return Balancer(
            self.cluster.endpoints,
            self._route,
            now=self._now_s,
            draw=self.world.rng.random,
            caller=lambda: self,
        )

    def _now_s(self) -> float:
        return self.host.local_us() / 1e6

    def _call(self) -> None:
        self._count = 1 + int(self.world.rng.random() ** 3 * 30)
        self._talk = self._take()
        self._go_on(None)

    def _take(self) -> Conversation[list[Run]]:
        """Take IDs as `zflake.Client` does."""
        call = self._balancer, self._count, BUDGET_S
        ask = begin(*call)
        if ask is None:
            return (yield from take(*call))
        then = proceed(*call, ask, (yield ask))
        return then if isinstance(then, list) else (yield from then)

    def _go_on(self, outcome: Outcome) -> None:
        self._asking = 0
        try:
            step = self._talk.send(outcome)
        except StopIteration as end:
            self.cluster.checker.served(self.cluster.plan.layout, end.value, self._count)
            self.in_a_row += 1
        except ZflakeError as error:
            if self.world.tracing:
                self.note(f"call failed: {error}")
            self.failed = error
            self.in_a_row = 0
        else:
            if isinstance(step, Ask):
                self._ask(step)
            else:
                assert isinstance(step, Pause)  # a client makes one call at a time, and waits for no other
                self.world.after(int(step.seconds * 1e6) + 1, self, self._go_on, None)
            return
        self.world.after(100_000 + self.world.rng.randrange(700_000), self, self._call)

    def _ask(self, ask: Ask) -> None:
        self._msgid += 1
        self._asking = self._msgid
        body = encode_request(self._msgid, ask.method, ask.params)
        target = self.cluster.at(ask.endpoint)
        if self.world.tracing:
            self.note(
                f"asks {target.name if target else ask.endpoint} {ask.method} for {ask.timeout_s:.3f} s"
            )
        if target is not None and not target.dead:
            self.world.send(self, target, target.asked, self, body)
        self.world.after(int(ask.timeout_s * 1e6) + 1, self, self._give_up, self._msgid)

    def _give_up(self, msgid: int) -> None:
        if msgid == self._asking:
            self._go_on(None)

    def hear(self, body: bytes) -> None:
        """Take an answer in."""
        outcome: Outcome
        try:
            outcome = decode_response(body)
        except ProtocolError as error:
            outcome = error
        else:
            if outcome.msgid != self._asking:
                return
        if self._asking:
            if self.world.tracing:
                self.note(f"hears {_show(outcome)}")
            self._go_on(outcome)


def _show(outcome: Outcome) -> str:
    if isinstance(outcome, Response):
        if outcome.error is not None:
            return f"{outcome.error.code}: {outcome.error.message}"
        # A store's ID is another in each run: a trace is the same.
        return (
            "hello"
            if isinstance(outcome.result, dict) and "store_id" in outcome.result
            else str(outcome.result)
        )
    return str(outcome)
