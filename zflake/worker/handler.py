"""A worker's answers: requests in, responses out, no socket and no clock of its own.

`ids.next` mints in the current tick.  Once that is used up, requests are parked until the next one begins,
and then share it: each gets a run, if a short one.  No request is parked twice: if the next tick could not
give each waiting request an ID, the newest are told `overloaded` at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from zflake.core.timeline import tick_of, us_until
from zflake.holder.hold import Hold
from zflake.wire.callers import ANYONE, Caller, sees_all
from zflake.wire.codec import packer
from zflake.wire.dispatch import Dispatcher, Requests, told
from zflake.wire.ids import NextIds
from zflake.wire.methods import PROTOCOL_VERSION, Code, Method

LEAVING_MS: Final = 10_000
"""Milliseconds for which clients should not come back to a worker that shuts down."""

A = TypeVar("A")
"""A reply address of the caller's; it comes back with the answer, unchanged."""


class Parked(NamedTuple, Generic[A]):
    """An `ids.next` that waits for the next tick."""

    asker: A
    msgid: int
    asked: int
    deadline_us: int


class Handler(Generic[A]):
    """Answers the requests of all clients from one mint.

    `describe` gives what the worker says of itself, beside its figures.
    """

    def __init__(self, hold: Hold, describe: Callable[[], dict[str, Any]]) -> None:
        self.ids = 0
        """IDs minted since the start."""
        self.draining = False
        """Whether ID requests are refused, since the lease is about to be given back."""
        self._hold = hold
        self._timeline_us = hold.clock.timeline_us
        self._describe = describe
        self._parked: list[Parked[A]] = []
        self._pack = packer()
        self.requests = Requests()
        self._dispatcher: Dispatcher[A] = Dispatcher(
            "worker",
            {
                Method.IDS_NEXT: self._next,
                Method.HELLO: told(self._hello),
                Method.PING: told(self._ping),
                Method.CLUSTER_STATUS: told(self._status),
            },
            self.requests,
        )
        self.handle = self._dispatcher.dispatch
        self._refuse = self._dispatcher.refuse

    def turn(self, local_us: int) -> list[tuple[A, bytes]]:
        """The answers to what was parked, once the tick that it waits for has begun."""
        if not self._parked or self.wait_us():  # None: the window was lost, or the clock stepped back
            return []
        mint = self._hold.mint
        parked, self._parked = self._parked, []
        answers = []
        left = 0 if mint is None else mint.layout.ids_per_tick
        for answered, (asker, msgid, asked, deadline_us) in enumerate(parked):
            if deadline_us <= local_us:
                answer = self._expire(msgid)
            else:
                share = max(1, min(asked, left // (len(parked) - answered)))
                answer = self._mint(msgid, share) or self._refuse_for_now(msgid, local_us)
                left -= share
            answers.append((asker, answer))
        return answers

    def wait_us(self) -> int | None:
        """Microseconds until there is an ID to give; None if this tick and the next have none."""
        mint, timeline_us = self._hold.mint, self._timeline_us()
        if mint is None or timeline_us is None:
            return None
        now = tick_of(mint.layout, timeline_us)
        opens = mint.opens(now)
        return None if opens is None or opens > now + 1 else us_until(mint.layout, opens, timeline_us)

    def load(self) -> dict[str, int]:
        """The figures that a heartbeat carries."""
        requests = self.requests
        return {
            "requests": requests.taken,
            "ids": self.ids,
            "parked": len(self._parked),
            "dropped": requests.dropped,
            "errors": requests.errors.total(),
        }

    @property
    def parked(self) -> int:
        """Requests that wait for the next tick."""
        return len(self._parked)

    def _next(
        self, asker: A, msgid: int, request: NextIds, arrived_us: int, local_us: int, _caller: Caller
    ) -> bytes | None:
        count, timeout_ms, store_id = request
        deadline_us = arrived_us + timeout_ms * 1000
        if store_id is not None and self._hold.store_id not in (None, store_id):
            return self._refuse(msgid, Code.OTHER_CLUSTER, "this worker belongs to another cluster")
        if deadline_us <= local_us:
            return self._expire(msgid)
        if self.draining:
            why = "this worker is shutting down; ask another"
            return self._refuse(msgid, Code.UNAVAILABLE, why, LEAVING_MS)
        parked = self._parked
        if not parked and (answer := self._mint(msgid, count)) is not None:
            return answer
        mint = self._hold.mint
        if mint is None or self.wait_us() is None:
            return self._refuse_for_now(msgid, local_us)
        if len(parked) >= mint.layout.ids_per_tick:
            why = f"{len(parked)} requests wait for the next tick, which has no more IDs"
            return self._refuse(msgid, Code.OVERLOADED, why, mint.layout.tick_ms)
        parked.append(Parked(asker, msgid, count, deadline_us))
        return None

    def _mint(self, msgid: int, count: int) -> bytes | None:
        mint, timeline_us = self._hold.mint, self._timeline_us()
        if mint is None or timeline_us is None:
            return None
        layout = mint.layout
        now = (timeline_us - layout.epoch_us) // layout.tick_us  # tick_of(), without the call
        run = mint.take(now, count)
        if run is None:
            return None
        self.ids += run[2]
        return self._pack((1, msgid, None, run))

    def _expire(self, msgid: int) -> bytes:
        return self._refuse(msgid, Code.TIMEOUT, "the time ran out; nothing was minted")

    def _refuse_for_now(self, msgid: int, local_us: int) -> bytes:
        why = "this worker holds no open window; ask another"
        return self._refuse(msgid, Code.LEASE_EXPIRED, why, self._hold.retry_after_ms(local_us))

    def _ping(self, _caller: Caller = ANYONE) -> dict[str, Any]:
        return {"now_us": self._timeline_us()}

    def _hello(self, caller: Caller = ANYONE) -> dict[str, Any]:
        mint = self._hold.mint
        hello = {
            "service": "worker",
            "protocol": PROTOCOL_VERSION,
            "layout": None if mint is None else mint.layout.to_map(),
            "store_id": self._hold.store_id,
            **self._ping(),
        }
        if sees_all(caller):
            machine = None if mint is None else mint.machine
            hello |= {"machine": machine, "state": self._hold.state, **self._describe()}
        return hello

    def _status(self, _caller: Caller) -> dict[str, Any]:
        return self._hello() | self.load() | {"errors": dict(self.requests.errors)}
