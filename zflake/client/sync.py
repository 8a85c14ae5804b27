"""`Client`: IDs for blocking code."""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from zflake.client import conversation
from zflake.client.balancer import ROUTES, Balancer
from zflake.client.conversation import Ask, Budget, Conversation, Outcome, ask_ids, attempt_s, run_of
from zflake.client.transport import Transport
from zflake.core.layout import Layout
from zflake.core.mint import Run
from zflake.errors import ConfigError, ProtocolError
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint


class Client:
    """Takes IDs from a cluster.

    `endpoints` is one endpoint or several, of delegators or of workers.  A delegator is asked where the
    workers are, and those are then asked directly; where none of them answers, delegators pass requests on.
    `route` may insist on one way: `direct` or `broker`.  `timeout` is the whole budget of a call in seconds,
    retries on other endpoints included.

    Safe to share between threads, and usable in the child of a fork.  Connects at the first call.

    Raises `ConfigError` for endpoints that are none, a timeout that is not positive, an unknown route.
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] = DEFAULT_DELEGATOR,
        *,
        timeout: float = 5.0,
        route: str = "auto",
    ) -> None:
        seeds = (
            list(endpoints)
            if isinstance(endpoints, Iterable) and not isinstance(endpoints, str)
            else [endpoints]
        )
        if not seeds or not all(isinstance(seed, str) for seed in seeds):
            raise ConfigError("a client takes an endpoint, or a list of at least one")
        if route not in ROUTES:
            raise ConfigError(f"no route {route!r}: take one of {', '.join(ROUTES)}")
        if not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise ConfigError(f"a timeout is a positive number of seconds, not {timeout!r}")
        self._timeout = timeout
        self._attempt_s = attempt_s(timeout)
        self._balancer = Balancer(
            dict.fromkeys(parse_endpoint(seed).text for seed in seeds),
            route,
            now=time.monotonic,
            draw=random.random,
        )
        self._transport = Transport()
        _all.add(self)

    def next_id(self) -> int:
        """One ID, greater than the worker's earlier ones.

        Raises `Timeout`, `Unavailable`, `LeaseExpired` or `Overloaded` once the timeout is spent,
        `ProtocolError` where an endpoint is not zflake's, `Closed` after `close`.
        """
        return self._take(1)[0][0]

    def next_ids(self, count: int) -> list[int]:
        """Exactly `count` IDs (1 or more), ascending as long as one worker gave them all.

        Raises what `next_id` raises, and `ConfigError` where `count` is no positive whole number.  IDs that
        had come before an error are given up: they are used by nobody.
        """
        if type(count) is not int or count < 1:
            raise ConfigError(f"count is a whole number of at least 1, not {count!r}")
        ids: list[int] = []
        for first, step, length in self._take(count):
            ids.extend(range(first, first + step * length, step))
        return ids

    def layout(self) -> Layout:
        """The layout of this cluster's IDs; asked for at the first call.

        Raises what `next_id` raises.
        """
        layout: Layout = self._drive(conversation.introduce(self._balancer, self._budget(time.monotonic())))
        return layout

    def close(self) -> None:
        """Close the connections; calls after this raise `Closed`."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, count: int) -> list[Run]:
        begun = None
        started_at = time.monotonic()
        # Nearly all calls end here: the worker that answered last answers again.
        worker = self._balancer.favourite(started_at)
        if worker is not None:
            ask = ask_ids(worker, count, self._attempt_s, self._balancer.store_id)
            outcome = self._ask(ask)
            run = run_of(outcome, ask)
            if isinstance(run, tuple) and run[2] == count:
                return [run]
            begun = (ask, run)
        runs: list[Run] = self._drive(
            conversation.take(self._balancer, count, self._budget(started_at), begun)
        )
        return runs

    def _ask(self, ask: Ask) -> Outcome:
        try:
            return self._transport.ask(ask)
        except ProtocolError as error:
            return error

    def _budget(self, started_at: float) -> Budget:
        return Budget(self._timeout, time.monotonic, started_at)

    def _drive(self, talk: Conversation) -> Any:
        outcome: Outcome = None
        try:
            while True:
                step = talk.send(outcome)
                if isinstance(step, Ask):
                    outcome = self._ask(step)
                else:
                    outcome = None
                    time.sleep(step.seconds)
        except StopIteration as end:
            return end.value


_all: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_all):
        client._balancer.unlock()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
