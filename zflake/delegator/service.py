"""A delegator's answers: messages and time in, messages out.  It knows no socket.

ids.next                 goes to the broker, and comes back from a worker
lease.*, cluster.trace   go to the executor, which asks the store; a later turn collects the answer
worker.*                 change the directory, and which workers the broker gives requests
cluster.workers, .status are answered at once, from what is kept for all who ask
the rest                 is answered at once, by the report

The owner hands each message that comes to `receive`, calls `turn` in every turn of its loop, sends what `collect` gives,
and tells `unsent` what it could not send.  Times are in microseconds on the delegator's local clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

from zflake.core.lease import Acquire, Refusal, Renew, Request, Token, Trace, bound
from zflake.delegator.broker import OVERLOADED_MS, Broker, Outgoing
from zflake.delegator.directory import MISSED_US, Directory
from zflake.delegator.executor import LeaseExecutor, Ticket
from zflake.delegator.limits import AcquireLimits
from zflake.delegator.report import Kept, Report
from zflake.errors import ProtocolError
from zflake.keys import Callers
from zflake.wire.callers import ANYONE, Caller, Role
from zflake.wire.cluster import Heartbeat, Ready
from zflake.wire.codec import BUNDLE_HEAD, RESPONSE_HEAD, decode_bundle, encode_packed, encode_result
from zflake.wire.dispatch import Dispatcher, Requests, told
from zflake.wire.frames import split
from zflake.wire.ids import NextIds
from zflake.wire.leases import store_result
from zflake.wire.methods import Code, Method

SWEEP_US: Final = 50_000
"""Microseconds between looks for requests and workers whose time is over."""
RESTART_MS: Final = 500
"""Milliseconds after which clients may come back to a delegator that shuts down: it may be a restart."""
BEHIND_MS: Final = 1_000
"""Milliseconds until a holder may ask again, if too many requests were waiting for the store."""
UNTAKEN_MS: Final = 50
"""Milliseconds until a peer may ask again that has not taken the large answers which it asked for."""

Prefix: TypeAlias = list[bytes]
"""The prefix that goes before an answer: the caller's identity, its envelope, an empty frame."""


class Service:
    """Answers the requests of workers, holders and clients; `draw` is the broker's.

    `callers` are those who may come, in a cluster with keys.  `has_room` says whether the peer of that identity has taken
    its large answers, so that it may have one more.
    """

    def __init__(
        self,
        executor: LeaseExecutor,
        directory: Directory,
        draw: Callable[[int], bytes],
        callers: Callers | None = None,
        has_room: Callable[[bytes], bool] = lambda _: True,
    ) -> None:
        self.broker = Broker(draw)
        self.collect = self.broker.collect
        self.directory = directory
        self.draining = False
        """Whether ID requests are refused, since the delegator shuts down."""
        self.brokered_at_us = 0
        """When an ID request came last."""
        self._executor = executor
        self._limits = AcquireLimits()
        self._clock = executor.clock
        self._known_at: int | None = None  # up to when the leases are known, while the store fails
        self._sweep_at_us = 0
        self._leaving: dict[bytes, int] = {}  # until when workers that left may answer what they have
        self._has_room = has_room
        self._kept = Kept(directory)
        self.requests = Requests()
        started_us = self._clock.local_us()
        self._report = report = Report(
            executor, directory, self.broker, self.requests, callers, self._leases_at, started_us=started_us
        )
        self._dispatcher: Dispatcher[Prefix] = Dispatcher(
            "delegator",
            {
                Method.IDS_NEXT: self._next,
                Method.LEASE_ACQUIRE: self._ask_store,
                Method.LEASE_RENEW: self._ask_store,
                Method.LEASE_RELEASE: self._ask_store,
                Method.WORKER_READY: self._ready,
                Method.WORKER_HEARTBEAT: self._heartbeat,
                Method.WORKER_LEAVE: self._leave,
                Method.WORKER_CALLERS: told(report.callers),
                Method.HELLO: told(report.hello),
                Method.PING: told(report.ping),
                Method.CLUSTER_WORKERS: self._workers,
                Method.CLUSTER_STATUS: self._status,
                Method.CLUSTER_TRACE: self._ask_store,
            },
            self.requests,
        )
        self._refuse = self._dispatcher.refuse

    def receive(self, frames: list[bytes], arrived_us: int, local_us: int, caller: Caller = ANYONE) -> None:
        """Take in a message of the `caller`, its sender's identity first, that came at `arrived_us`."""
        message = split(frames)
        if message is None:
            self.requests.dropped += 1
            return
        prefix, body = message
        if body[:2] in (RESPONSE_HEAD, BUNDLE_HEAD):  # only workers send any
            self._take_answers(prefix, body, local_us, caller)
            return
        answer = self._dispatcher.dispatch(prefix, body, arrived_us, local_us, caller)
        if answer is not None:
            self._say(prefix, answer)

    def turn(self, local_us: int) -> None:
        """Take in what the executor has done, answer what it has settled, and sweep if that is due."""
        outage = self._executor.outage
        # In this order: what was read at the end of an outage is there once that is over.
        if (held := self._executor.collect_held()) is not None:
            self.directory.replace(held)
        if outage is None:
            self._known_at = None
        elif self._known_at is None:
            self._known_at = self._clock.tick()
        for ticket, (answer, record) in self._executor.collect():
            if record is not None:
                self.directory.learn(record)
            if isinstance(answer, Refusal):
                code = Code(answer.reason.value)
                body = self._refuse(ticket.msgid, code, answer.message, answer.retry_after_ms)
            else:
                result = store_result(answer, self._clock.timeline_us(), self._report.name_of)
                body = encode_result(ticket.msgid, result)
            self._say(ticket.prefix, body)
        if local_us >= self._sweep_at_us:
            self._sweep_at_us = local_us + SWEEP_US
            self._sweep(local_us)

    def unsent(self, message: Outgoing, local_us: int) -> None:
        """Note that a message could not be sent: its receiver has gone, or takes no more."""
        if message.worker is None:
            self.requests.dropped += 1
        else:
            self.directory.drop(message.worker)
            self.broker.lose(message.worker, local_us)

    # --- inside ---

    def _leases_at(self) -> int:
        """The tick up to which this delegator knows the leases.

        It stays where it was while the store fails: workers may renew through another delegator, so a worker that
        sends heartbeats stays in the directory.
        """
        return self._clock.tick() if self._known_at is None else self._known_at

    def _sweep(self, local_us: int) -> None:
        for identity in self.directory.sweep(self._leases_at(), local_us):
            self.broker.lose(identity, local_us)
        for identity, until_us in list(self._leaving.items()):
            if until_us <= local_us:  # it had the time to answer what it had
                del self._leaving[identity]
                if not self.directory.is_registered(identity):
                    self.broker.lose(identity, local_us)
        self.broker.sweep(local_us)

    def _take_answers(self, prefix: list[bytes], body: bytes, local_us: int, caller: Caller) -> None:
        if caller is not ANYONE and caller.role is not Role.WORKER:
            self.requests.denied[caller.name] += 1
            return
        identity, key, answer = prefix[0], caller.key, self.broker.answer
        if body[:2] == RESPONSE_HEAD:
            counts: int = answer(identity, prefix[1:], body, local_us, key)
        else:
            try:
                answers = decode_bundle(body)
            except ProtocolError:
                self.requests.dropped += 1
                return
            counts = sum(answer(identity, [tag, b""], each, local_us, key) for tag, each in answers)
        if counts:
            self.directory.hear(identity, None, local_us)

    def _next(
        self, asker: Prefix, msgid: int, request: NextIds, arrived_us: int, local_us: int, caller: Caller
    ) -> bytes | None:
        count, timeout_ms, store_id = request
        self.brokered_at_us = local_us
        if store_id is not None and store_id != self._executor.meta.store_id:
            return self._refuse(msgid, Code.OTHER_CLUSTER, "this delegator belongs to another cluster")
        if self.draining:
            return self._refuse(msgid, Code.UNAVAILABLE, "this delegator is shutting down", RESTART_MS)
        key = caller.key
        if key and (under_way := self.broker.under_way(key)) >= caller.limits.requests:
            what = f"it has {under_way} ID requests under way here (requests)"
            return self._limit(msgid, caller, what, OVERLOADED_MS)
        self.broker.submit(asker, msgid, count, arrived_us + timeout_ms * 1000, local_us, key)
        return None

    def _ask_store(
        self,
        asker: Prefix,
        msgid: int,
        request: Request | Trace,
        arrived_us: int,
        local_us: int,
        caller: Caller,
    ) -> bytes | None:
        store_id = request.store_id if isinstance(request, Renew) else None
        if store_id is not None and store_id != self._executor.meta.store_id:
            return self._refuse(
                msgid, Code.OTHER_CLUSTER, "that lease was granted by another cluster's store"
            )
        if (outage := self._executor.outage) is not None:
            return self._refuse(msgid, Code.UNAVAILABLE, outage.message, outage.retry_after_ms)
        if caller.key and not isinstance(request, Trace):
            request = bound(request, caller.key)
            if isinstance(request, Acquire):
                count_held = partial(self.directory.held_by, caller.key, request.next, self._leases_at())
                if (over := self._limits.take(caller, count_held, local_us)) is not None:
                    return self._limit(msgid, caller, over.what, over.retry_after_ms)
        if self._executor.submit(Ticket(request, arrived_us, asker, msgid)):
            return None
        return self._refuse(msgid, Code.OVERLOADED, "the store is behind; ask again", BEHIND_MS)

    def _ready(
        self, asker: Prefix, msgid: int, ready: Ready, _arrived_us: int, local_us: int, caller: Caller
    ) -> bytes:
        identity, key = asker[0], caller.key
        before = self.directory.identity_of(ready.machine)
        if not self.directory.register(identity, ready, self._leases_at(), local_us, key):
            self._executor.hurry()
            why = f"that is not the token of machine {ready.machine}'s lease"
            return self._refuse(msgid, Code.NOT_READY, why)
        if before is not None and before != identity:
            self.broker.lose(before, local_us)
        self.broker.join(identity, ready.token, local_us, key)
        return self._heard(msgid)

    def _heartbeat(
        self,
        asker: Prefix,
        msgid: int,
        heartbeat: Heartbeat,
        _arrived_us: int,
        local_us: int,
        caller: Caller,
    ) -> bytes:
        identity = asker[0]
        proven = self.directory.proves(identity, heartbeat.token, caller.key)
        if not proven or not self.broker.is_open(identity):
            return self._refuse(msgid, Code.NOT_READY, "say worker.ready first")
        self.directory.hear(identity, heartbeat.load, local_us)
        return self._heard(msgid)

    def _leave(
        self, asker: Prefix, msgid: int, token: Token, _arrived_us: int, local_us: int, caller: Caller
    ) -> bytes:
        identity = asker[0]
        if self.directory.proves(identity, token, caller.key):
            self.directory.drop(identity)
            self.broker.leave(identity)
            self._leaving[identity] = local_us + MISSED_US
        return self._heard(msgid)

    def _workers(
        self, asker: Prefix, msgid: int, _none: None, _arrived_us: int, local_us: int, _caller: Caller
    ) -> bytes:
        return self._page(asker, msgid, "workers", lambda: self._report.workers(self._kept.turn), local_us)

    def _status(
        self, asker: Prefix, msgid: int, after: int, _arrived_us: int, local_us: int, _caller: Caller
    ) -> bytes:
        at = self.directory.page_at(after)
        return self._page(asker, msgid, at, lambda: self._report.status(at), local_us)

    def _page(self, asker: Prefix, msgid: int, key: object, build: Callable[[], Any], local_us: int) -> bytes:
        if not self._has_room(asker[0]):
            return self._refuse(msgid, Code.OVERLOADED, "take the answers before this one first", UNTAKEN_MS)
        return encode_packed(msgid, self._kept.get(key, build, local_us))

    def _limit(self, msgid: int, caller: Caller, what: str, retry_after_ms: int) -> bytes:
        self.requests.limited[caller.name] += 1
        return self._refuse(
            msgid, Code.OVERLOADED, f"the key {caller.name} is at a limit: {what}", retry_after_ms
        )

    def _heard(self, msgid: int) -> bytes:
        return encode_result(msgid, self._report.heard())

    def _say(self, prefix: list[bytes], body: bytes) -> None:
        self.broker.outbox.append(Outgoing(prefix, body, None))
