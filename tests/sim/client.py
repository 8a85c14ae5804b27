"""A simulated client: the real conversation and balancer, driven in virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.world import Process
from zflake.client.balancer import Balancer
from zflake.client.conversation import Ask, Conversation, Outcome, Pause, begin, settle, take
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
        self._prefix = b"c%d" % number
        self._msgid = 0
        self._asking = 0
        self._count = 0
        self._first: Ask | None = None
        self._talk: Conversation[list[Run]] | None = None
        self._route = world.rng.choice(("auto", "direct", "broker", "broker"))
        self._balancer = self._new_balancer()
        cluster.clients_by_prefix[self._prefix] = self
        world.after(world.rng.randrange(1_000_000), self, self._call)

    def forget(self) -> None:
        """Be restarted, as far as the balancer goes."""
        self._balancer = self._new_balancer()

    def _new_balancer(self) -> Balancer:
        return Balancer(
            [f"tcp://10.0.0.{n + 1}:7410" for n in range(self.cluster.plan.delegators)],
            self._route,
            now=self._now_s,
            draw=self.world.rng.random,
            caller=lambda: self,
        )

    def _now_s(self) -> float:
        return self.host.local_us() / 1e6

    def _call(self) -> None:
        self._count = 1 + int(self.world.rng.random() ** 3 * 30)
        self._talk = None
        self._first = begin(self._balancer, self._count, BUDGET_S)
        if self._first is not None:
            self._ask(self._first)
            return
        self._talk = take(self._balancer, self._count, BUDGET_S)
        self._go_on(None)

    def _go_on(self, outcome: Outcome) -> None:
        self._asking = 0
        try:
            if self._talk is None:
                assert self._first is not None
                run = settle(self._balancer, self._first, outcome)
                self._talk = take(self._balancer, self._count, BUDGET_S, self._first, run)
                outcome = None
            step = self._talk.send(outcome)
        except StopIteration as end:
            self._served(end.value)
            return
        except ZflakeError as error:
            if self.world.tracing:
                self.note(f"call failed: {error}")
            self.failed = error
            self.in_a_row = -1
            self._done()
            return
        if isinstance(step, Ask):
            self._ask(step)
        else:
            assert isinstance(step, Pause)  # a client makes one call at a time, and waits for no other
            self.world.after(int(step.seconds * 1e6) + 1, self, self._go_on, None)

    def _served(self, runs: list[Run]) -> None:
        self.cluster.checker.served(self.cluster.plan.layout, runs, self._count)
        self.cluster.served += self._count
        self._done()

    def _done(self) -> None:
        self.in_a_row += 1
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
            self.world.send(self, target, target.asked, self, self._prefix, body)
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
