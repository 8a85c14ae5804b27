"""A worker's answers: requests in, responses out, no socket and no clock of its own.

`ids.next` mints in the current tick.  Once that is used up, requests are parked until the next one begins, and no
longer.  The peers that wait share it: each gets what it asks for, or as much as any other.  A peer's share goes to its
own requests in the same way, a run for each, if a short one.  So a peer that asks for more, or more often, takes
nothing from another.  Requests that the tick, or their peer's share of it, has no ID for are told `overloaded`, the
newest first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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


def shares(wanted: Sequence[int], there: int) -> list[int]:
    """How much each may have of what is `there`: what it wants, or as much as any other."""
    given = [0] * len(wanted)
    # Whoever wants least is served first: what it leaves is the others'.
    for served, place in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        given[place] = min(wanted[place], there // (len(wanted) - served))
        there -= given[place]
    return given


class Handler(Generic[A]):
    """Answers the requests of all clients from one mint.

    `describe` gives what the worker says of itself, beside its figures.  `peer_of` names the peer that an asker belongs
    to: the requests of one peer share what it gets.
    """

    def __init__(
        self, hold: Hold, describe: Callable[[], dict[str, Any]], peer_of: Callable[[A], Hashable]
    ) -> None:
        self.ids = 0
        """IDs minted since the start."""
        self.draining = False
        """Whether ID requests are refused, since the lease is about to be given back."""
        self._hold = hold
        self._timeline_us = hold.clock.timeline_us
        self._describe = describe
        self._peer_of = peer_of
        self.parked = 0
        """Requests that wait for the next tick."""
        self._parked: dict[Hashable, list[Parked[A]]] = {}  # by peer, none of which has an empty list
        self._ousted: list[tuple[A, bytes]] = []  # answers to those that made room for another peer's
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
        answers, self._ousted = self._ousted, []
        if not self._parked or (wait_us := self.wait_us()):
            return answers
        mint = self._hold.mint
        peers, self._parked, self.parked = self._parked.values(), {}, 0
        in_time = [[parked for parked in peer if parked.deadline_us > local_us] for peer in peers]
        answers += [
            (p.asker, self._expire(p.msgid)) for peer in peers for p in peer if p.deadline_us <= local_us
        ]
        wanted = [sum(parked.asked for parked in peer) for peer in in_time]
        # None: the window was lost, or the clock stepped back.  Then there is nothing to share, and all are told so.
        there = sum(wanted) if mint is None or wait_us is None else mint.layout.ids_per_tick
        for peer, share in zip(in_time, shares(wanted, there), strict=True):
            served = peer[:share]
            counts = shares([parked.asked for parked in served], share)
            for (asker, msgid, _, _), count in zip(served, counts, strict=True):
                answers.append((asker, self._mint(msgid, count) or self._refuse_for_now(msgid, local_us)))
            answers += [(parked.asker, self._overload(parked.msgid)) for parked in peer[share:]]
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
            "parked": self.parked,
            "dropped": requests.dropped,
            "errors": requests.errors.total(),
        }

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
        if not self._parked and (answer := self._mint(msgid, count)) is not None:
            return answer
        mint = self._hold.mint
        if mint is None or self.wait_us() is None:
            return self._refuse_for_now(msgid, local_us)
        peer = self._peer_of(asker)
        if self.parked >= mint.layout.ids_per_tick and not self._make_room(peer):
            return self._overload(msgid)
        self._parked.setdefault(peer, []).append(Parked(asker, msgid, count, deadline_us))
        self.parked += 1
        return None

    def _make_room(self, peer: Hashable) -> bool:
        """Refuse the newest request of the peer that has most of them parked; False if that would be this peer."""
        most = max(self._parked.values(), key=len)
        if len(most) <= len(self._parked.get(peer, ())) + 1:
            return False
        ousted = most.pop()
        self.parked -= 1
        self._ousted.append((ousted.asker, self._overload(ousted.msgid)))
        return True

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

    def _overload(self, msgid: int) -> bytes:
        mint = self._hold.mint
        why = "the next tick has no ID left for this request: too many wait for it"
        return self._refuse(msgid, Code.OVERLOADED, why, 1 if mint is None else mint.layout.tick_ms)

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
