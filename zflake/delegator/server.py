"""The delegator's process: one ROUTER, one store, one poll loop, and the lease desk's thread."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from typing import Any, Final

import zmq

from zflake.core.lease import Refusal, Renew
from zflake.daemon import Alarm, Pulse
from zflake.delegator.broker import TAG_BYTES, Broker
from zflake.delegator.desk import LeaseDesk, Ticket
from zflake.delegator.directory import MISSED_US, Directory
from zflake.delegator.ledger import Settled
from zflake.delegator.report import Figures, Report
from zflake.delegator.setup import (
    Wishes,
    check_wishes,
    listen,
    rewind,
    settle_meta,
    start_timeline,
    tidy_marks,
)
from zflake.delegator.timepiece import Timepiece, wall_us
from zflake.errors import ProtocolError, StoreError
from zflake.holder.clock import local_us
from zflake.stores import check_url, open_store
from zflake.wire.codec import (
    BUNDLE_HEAD,
    RESPONSE_HEAD,
    BadRequest,
    decode_bundle,
    decode_request,
    encode_error,
    encode_result,
)
from zflake.wire.endpoint import Endpoint, check_bind
from zflake.wire.frames import split
from zflake.wire.messages import (
    STORE_REQUESTS,
    Code,
    Method,
    check_beat,
    check_next,
    check_no_params,
    check_ready,
    store_result,
)
from zflake.wire.sockets import NOW, Intake, address_of, bound_router, send

QUIET_US: Final = 10_000
TURN_US: Final = 1_000
"""For how long messages are taken in before the rest of the loop gets its turn."""
IDLE_MS: Final = 500
SWEEP_US: Final = 50_000
"""How often is looked for requests and workers whose time is over."""
STALL_US: Final = 200_000
"""A turn of the loop that took longer was a stop: the workers are not to blame for what they missed."""
DRAIN_US: Final = 500_000
GONE_MS: Final = 500
"""After how long clients may come back to a delegator that shuts down: it may be a restart."""
DRAIN_S: Final = 2.0

WORKERS_OWN: Final = frozenset({Method.WORKER_READY, Method.WORKER_BEAT, Method.WORKER_LEAVE})

_log = logging.getLogger("zflake.delegator")


@dataclass(frozen=True, slots=True)
class DelegatorConfig:
    """What a delegator is told at its start."""

    bind: Endpoint
    store: str
    """The store's URL."""
    wishes: Wishes = field(default_factory=Wishes)
    accept_clock: bool = False
    """Whether the wall clock is right, however far it is from what the store knows."""
    insecure: bool = False
    """Whether binding an address that other machines reach is meant."""


class Delegator:
    """One delegator: `run` serves until `alarm` says stop.

    Raises `ConfigError` where it can't bind or the flags contradict the store, `StoreError` where the
    store can't be used.
    """

    def __init__(self, config: DelegatorConfig, alarm: Alarm) -> None:
        self._alarm = alarm
        self.pulse = Pulse()
        self._woke_us = started_us = local_us()
        check_bind(config.bind, insecure=config.insecure)
        check_wishes(config.wishes)
        check_url(config.store)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            # Before the store is touched: a delegator that can't serve changes nothing.
            self._router = bound_router(self._context, config.bind)
            self._router.setsockopt(zmq.RCVTIMEO, TURN_US // 1000)
            self._intake = Intake(self._router)
            self._store = open_store(config.store)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        try:
            address, name = address_of(self._router), self._take_name()
            running_us = listen(self._store, name)
            marks = self._store.marks()
            now_us, now_local_us = wall_us(), local_us()
            carrier = start_timeline(
                marks,
                accept_clock=config.accept_clock,
                wall_us=now_us,
                local_us=now_local_us,
                running_us=running_us,
            )
            meta = settle_meta(self._store, config.wishes, carrier.now_us(now_local_us))
            if config.accept_clock:
                rewind(self._store, meta, now_us)
            self.timepiece = Timepiece(carrier, meta.layout, name, address)
            tidy_marks(self._store, self.timepiece.now_us())
            self._store.swap([], self.timepiece.mark())
        except BaseException:
            self._context.destroy(linger=0)
            self._store.close()
            raise
        self.directory = Directory(self._store.held(self.timepiece.tick()))
        self.desk = LeaseDesk(
            self._store,
            meta,
            now=self.timepiece.tick,
            latest=self.timepiece.latest,
            local_us=local_us,
            ring=alarm.ring,
            mark=self.timepiece.mark,
            follow=self.timepiece.follow,
        )
        self.broker = Broker(lambda: secrets.token_bytes(TAG_BYTES))
        self.figures = Figures()
        self._report = Report(
            address=address,
            store_url=self._store.url,
            started_us=started_us,
            timepiece=self.timepiece,
            desk=self.desk,
            directory=self.directory,
            broker=self.broker,
            figures=self.figures,
            leases_at=self._leases_at,
        )
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        alarm.register(self._poller)
        self._draining = False
        self._known_at = self.timepiece.tick()
        self._sweep_at_us = 0
        self._leaving: dict[bytes, int] = {}
        self._brokered_at_us = 0

    @property
    def address(self) -> str:
        """Where it serves."""
        return self._report.address

    def _take_name(self) -> str:
        """What to write the mark under: others may be on the same host, and after a restart this is another."""
        host = socket.gethostname()
        return host if self._store.exclusive else f"{host}-{os.getpid()}-{secrets.token_hex(3)}"

    def run(self) -> None:
        """Serve until told to stop, then drain: settle and answer what waits, close."""
        try:
            self.desk.start()
            meta = self.desk.meta
            _log.info(
                "delegator serves at %s: layout %s, store %s, ttl %d ms, machines %d to %d",
                self.address,
                meta.layout.name,
                self._store.url,
                meta.ttl * meta.layout.tick_ms,
                meta.first_machine,
                meta.last_machine,
                extra={"address": self.address},
            )
            while not self._alarm.stopping:
                self.pulse.beat(ready=True)
                self._tick()
            self.pulse.stop()
            self._drain()
        finally:
            self._router.close()
            self._context.term()

    def _tick(self) -> bool:
        """One turn of the loop; False where there is more to take in than it had time for."""
        poll_ms = SWEEP_US // 1000 if self.broker.open or self._draining else IDLE_MS
        events = dict(self._poller.poll(poll_ms))
        # A request may have come at any time since the loop overslept.
        woke_us = local_us()
        overslept_us = max(0, woke_us - self._woke_us - poll_ms * 1000)
        self._woke_us = woke_us
        if overslept_us > STALL_US:
            self.directory.excuse(overslept_us)
        emptied = self._router not in events or self._receive(woke_us - overslept_us)
        self._alarm.hear(events)
        self._answer_settled()
        self._sweep(woke_us)
        self._flush()
        if self.desk.fault is not None:
            raise StoreError(f"the lease desk broke down: {self.desk.fault!r}") from self.desk.fault
        self.timepiece.service(woke_us)
        return emptied

    def _sweep(self, now_local_us: int) -> None:
        if now_local_us < self._sweep_at_us:
            return
        self._sweep_at_us = now_local_us + SWEEP_US
        for identity in self.directory.sweep(self._leases_at(), now_local_us):
            self.broker.lose(identity, now_local_us)
        for identity, until_us in list(self._leaving.items()):
            if until_us <= now_local_us:  # it had the time to answer what it had
                del self._leaving[identity]
                if not self.directory.is_present(identity):
                    self.broker.lose(identity, now_local_us)
        self.broker.sweep(now_local_us)

    def _leases_at(self) -> int:
        """Up to which tick the leases are known here.

        While the store fails, workers may renew through another delegator: who beats is there.
        """
        if self.desk.outage is None:
            self._take_held()  # what was read at the end of an outage was read before that was over
            self._known_at = self.timepiece.tick()
        return self._known_at

    def _flush(self) -> None:
        """Send what the broker has left to be sent."""
        broker = self.broker
        while broker.outbox:
            outbox, broker.outbox = broker.outbox, []
            for prefix, body, worker in outbox:
                if send(self._router, prefix, body):
                    continue
                if worker is None:
                    self.figures.dropped += 1
                else:
                    self.directory.leave(worker)
                    broker.lose(worker, local_us())

    def _drain(self) -> None:
        self._draining = True
        until_us = local_us() + DRAIN_US
        while (not self._tick() or self.broker.busy) and local_us() < until_us:
            pass
        if self.desk.stop(DRAIN_S):
            self._answer_settled()
            self._store.close()
        else:
            _log.error("the store does not answer: left without waiting for it")
        _log.info("delegator at %s has stopped", self.address)

    # --- requests ---

    def _receive(self, arrived_us: int) -> bool:
        """Take in what has come, for `TURN_US` at most; True where that was all.

        While ID requests are under way this waits for the next message in the socket, for as long: a poll
        over all that the loop looks at would cost more than to pass a request on.
        """
        until_us = self._woke_us + TURN_US
        linger = self._woke_us < self._brokered_at_us + QUIET_US
        while local_us() < until_us:
            self._flush()
            frames = self._intake.receive(0 if linger else NOW)
            if frames is None:
                return True
            message = split(frames)
            if message is None:
                self.figures.dropped += 1
                continue
            prefix, body = message
            if body[:2] in (RESPONSE_HEAD, BUNDLE_HEAD):  # only workers send any
                self._take_answers(prefix, body)
                continue
            answer = self._handle(prefix, body, arrived_us)
            if answer is not None:
                self._send(prefix, answer)
        return False

    def _take_answers(self, prefix: list[bytes], body: bytes) -> None:
        identity, now_us = prefix[0], self._woke_us
        if body[:2] == RESPONSE_HEAD:
            self.broker.answer(identity, prefix[1:], body, now_us)
        else:
            try:
                for tag, answer in decode_bundle(body):
                    self.broker.answer(identity, [tag, b""], answer, now_us)
            except ProtocolError:
                self.figures.dropped += 1
        self.directory.see(identity, now_us)

    def _handle(self, prefix: list[bytes], body: bytes, arrived_us: int) -> bytes | None:
        try:
            msgid, method, params = decode_request(body)
            if method == "ids.next":
                return self._broker(prefix, msgid, params, arrived_us)
            if method in WORKERS_OWN:
                return self._hear(prefix, msgid, method, params)
            if (check := STORE_REQUESTS.get(method)) is not None:
                self.figures.requests[method] += 1
                request = check(params)
                store_id = request.store_id if isinstance(request, Renew) else None
                if store_id is not None and store_id != self.desk.meta.store_id:
                    return self._refuse(
                        msgid, Code.OTHER_CLUSTER, "that lease was granted by another cluster's store"
                    )
                if (outage := self.desk.outage) is not None:
                    return self._refuse(msgid, Code.UNAVAILABLE, outage.message, outage.retry_after_ms)
                if self.desk.submit(Ticket(request, arrived_us, prefix, msgid)):
                    return None
                return self._refuse(msgid, Code.OVERLOADED, "the store is behind; ask again", 1000)
            return self._other(msgid, method, params)
        except BadRequest as error:
            if not error.answerable:
                self.figures.dropped += 1
                return None
            return self._refuse(error.msgid, Code.BAD_REQUEST, str(error))
        except ProtocolError as error:
            return self._refuse(msgid, Code.BAD_REQUEST, str(error))

    def _broker(self, prefix: list[bytes], msgid: int, params: list[Any], arrived_us: int) -> bytes | None:
        count, timeout_ms, store_id = check_next(params)
        self.figures.requests["ids.next"] += 1
        self._brokered_at_us = self._woke_us
        if store_id is not None and store_id != self.desk.meta.store_id:
            return self._refuse(msgid, Code.OTHER_CLUSTER, "this delegator belongs to another cluster")
        if self._draining:
            return self._refuse(msgid, Code.UNAVAILABLE, "this delegator is shutting down", GONE_MS)
        self.broker.submit(prefix, msgid, count, arrived_us + timeout_ms * 1000, self._woke_us)
        return None

    def _hear(self, prefix: list[bytes], msgid: int, method: str, params: list[Any]) -> bytes:
        """Take in what a worker says of itself."""
        identity, now_us = prefix[0], self._woke_us
        self.figures.requests[method] += 1
        if method == Method.WORKER_READY:
            machine, token = check_ready(params)
            if not self.directory.arrive(identity, machine, token, self._leases_at(), now_us):
                self.desk.hurry()
                return self._refuse(
                    msgid, Code.NOT_READY, f"that is not the token of machine {machine}'s lease"
                )
            self.broker.join(identity, now_us)
        elif method == Method.WORKER_BEAT:
            known = self.directory.hear(identity, check_beat(params), now_us)
            if not known or not self.broker.is_open(identity):
                return self._refuse(msgid, Code.NOT_READY, "say worker.ready first")
        else:
            check_no_params(params)
            self.directory.leave(identity)
            self.broker.leave(identity)
            self._leaving[identity] = now_us + MISSED_US
        return encode_result(msgid, self._report.ping())

    def _other(self, msgid: int, method: str, params: list[Any]) -> bytes:
        answers = {
            Method.HELLO: self._report.hello,
            Method.PING: self._report.ping,
            Method.CLUSTER_WORKERS: self._report.workers,
            Method.CLUSTER_STATUS: self._report.status,
        }
        if method not in answers:
            return self._refuse(msgid, Code.UNKNOWN_METHOD, f"a delegator has no method {method[:60]!r}")
        check_no_params(params)
        self.figures.requests[method] += 1
        return encode_result(msgid, answers[Method(method)]())

    def _answer_settled(self) -> None:
        for ticket, settled in self.desk.collect():
            if settled.record is not None:
                self.directory.learn(settled.record)
            self._send(ticket.prefix, self._store_answer(ticket.msgid, settled))
        self._take_held()

    def _take_held(self) -> None:
        if (held := self.desk.collect_held()) is not None:
            self.directory.replace(held)

    def _store_answer(self, msgid: int, settled: Settled) -> bytes:
        answer = settled.answer
        if isinstance(answer, Refusal):
            return self._refuse(msgid, Code(answer.reason.value), answer.message, answer.retry_after_ms)
        return encode_result(msgid, store_result(answer, self.timepiece.now_us()))

    def _refuse(
        self, msgid: int | None, code: Code, message: str, retry_after_ms: int | None = None
    ) -> bytes:
        self.figures.errors[code] += 1
        return encode_error(msgid, code, message, retry_after_ms)

    def _send(self, prefix: list[bytes], answer: bytes) -> None:
        if not send(self._router, prefix, answer):
            self.figures.dropped += 1
