"""`Client`: IDs for blocking code."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Self, TypeVar

from zflake.client.balancer import ROUTES, Balancer
from zflake.client.conversation import Ask, Conversation, Outcome, Pause, begin, fetch_layout, proceed, take
from zflake.client.transport import Transport
from zflake.core.layout import Layout
from zflake.core.mint import Run
from zflake.errors import ConfigError
from zflake.keys import open_keys
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint

T = TypeVar("T")


class Client:
    """Takes IDs from a cluster.

    `endpoints` is one endpoint or several, of delegators or of workers.  The client asks a delegator for the
    list of workers, and then asks those directly; if none of them answers, a delegator passes requests on.
    `route` may insist on one way: `direct` or `broker`.  `timeout` is the budget of a whole call in seconds,
    retries on other endpoints included.  `keys` is the client's folder of keys, in a cluster that has them; by
    default the one that the environment variable ZFLAKE_KEYS names.

    Safe to share between threads, and usable in the child of a fork.  Connects at the first call.

    Raises `ConfigError` if an endpoint can't be read, the timeout is not positive, the route is unknown, or the folder
    holds no keys.
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] = DEFAULT_DELEGATOR,
        *,
        timeout: float = 5.0,
        route: str = "auto",
        keys: str | os.PathLike[str] | None = None,
    ) -> None:
        seeds = (
            list(endpoints)
            if isinstance(endpoints, Iterable) and not isinstance(endpoints, str)
            else [endpoints]
        )
        if not seeds or not all(isinstance(seed, str) for seed in seeds):
            raise ConfigError("a client takes one endpoint, or a list of one or more")
        if route not in ROUTES:
            raise ConfigError(f"unknown route {route!r}: use one of {', '.join(ROUTES)}")
        if not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise ConfigError(f"timeout is {timeout!r}: use a positive number of seconds")
        self._timeout = timeout
        self._balancer = Balancer(
            dict.fromkeys(parse_endpoint(seed).text for seed in seeds),
            route,
            now=time.monotonic,
            draw=random.random,
            caller=threading.get_ident,
        )
        self._transport = Transport(open_keys(keys))
        _all.add(self)

    def next_id(self) -> int:
        """One ID, greater than the worker's earlier ones.

        Raises `Timeout`, `Unavailable`, `LeaseExpired` or `Overloaded` once the timeout is spent,
        `ProtocolError` if an endpoint is not zflake's, `Closed` after `close`; at once `AuthError` if the cluster refuses
        the key, and `Unavailable` if this process is short of descriptors.
        """
        return self._take(1)[0][0]

    def next_ids(self, count: int) -> list[int]:
        """Exactly `count` IDs (1 or more), ascending as long as one worker gave them all.

        Raises what `next_id` raises, and `ConfigError` if `count` is not a positive whole number.  IDs that
        came before an error are thrown away.
        """
        if type(count) is not int or count < 1:
            raise ConfigError(f"count is {count!r}: use a whole number of 1 or more")
        ids: list[int] = []
        for first, step, length in self._take(count):
            ids.extend(range(first, first + step * length, step))
        return ids

    def layout(self) -> Layout:
        """The layout of this cluster's IDs; the first call asks for it.

        Raises what `next_id` raises.
        """
        return self._drive(fetch_layout(self._balancer, self._timeout))

    def close(self) -> None:
        """Close the connections; calls after this raise `Closed`."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, count: int) -> list[Run]:
        ask = begin(self._balancer, count, self._timeout)
        if ask is None:
            return self._drive(take(self._balancer, count, self._timeout))
        then = proceed(self._balancer, count, self._timeout, ask, self._transport.ask(ask))
        return then if isinstance(then, list) else self._drive(then)

    def _drive(self, talk: Conversation[T]) -> T:
        outcome: Outcome = None
        try:
            while True:
                step = talk.send(outcome)
                if isinstance(step, Ask):
                    outcome = self._transport.ask(step)
                    continue
                outcome = None
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                else:
                    over = threading.Event()
                    self._balancer.when_over(step.refresh, over.set)
                    over.wait(step.timeout_s)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            # An exception may come from outside, such as a signal handler's; other callers must not wait for it.
            talk.close()


_all: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_all):
        client._balancer.after_fork()  # noqa: SLF001
        client._transport.after_fork()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
