"""The delegator's process: one ROUTER, one store, one poll loop, and the lease executor's thread."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from typing import Final

import zmq

from zflake import clock
from zflake.daemon import Door, Liveness, Waker
from zflake.daemon.gate import Gate
from zflake.delegator.clock import begin_timeline
from zflake.delegator.directory import Directory
from zflake.delegator.executor import LeaseExecutor
from zflake.delegator.service import SWEEP_US, Service
from zflake.delegator.start import Wishes, check_wishes, start
from zflake.errors import StoreError
from zflake.keys import AUTHORIZED, Callers, Keys
from zflake.stores import check_url, open_store
from zflake.wire.callers import ANYONE
from zflake.wire.endpoint import Endpoint, check_bind
from zflake.wire.sockets import LARGE_BYTES, NOW, Intake, LargeAnswers, address_of, bound_router, send

BROKERING_US: Final = 10_000
"""Microseconds after an ID request for which the loop lingers at its socket."""
TURN_US: Final = 1_000
"""Microseconds for which messages are taken in before the rest of the loop gets its turn."""
IDLE_MS: Final = 500
"""Milliseconds of the poll loop's longest sleep."""
STOPPED_US: Final = 200_000
"""Microseconds of oversleeping that mean that the process was stopped: the workers are not to blame for what they
missed."""
ANSWERS_US: Final = 500_000
"""Microseconds for which a delegator that was told to stop still passes answers on."""
STORE_STOP_S: Final = 2.0
"""Seconds that the store may take at the end."""

_log = logging.getLogger("zflake.delegator")


@dataclass(frozen=True, slots=True)
class DelegatorConfig:
    """A delegator's settings."""

    bind: Endpoint
    store: str
    """The store's URL."""
    wishes: Wishes = field(default_factory=Wishes)
    accept_clock: bool = False
    """Whether the wall clock is right, however far it is from the store's time."""
    insecure: bool = False
    """Whether binding an address that other machines reach is meant, though there are no keys."""
    keys: Keys | None = None


class Delegator:
    """One delegator: `run` serves until `waker` says stop.

    Raises `ConfigError` if it can't bind or the flags contradict the store, `StoreError` if the store can't be used.
    """

    def __init__(self, config: DelegatorConfig, waker: Waker) -> None:
        self._waker = waker
        self.liveness = Liveness()
        self._woke_us = clock.local_us()
        keys = config.keys
        authorized = check_config(config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with contextlib.ExitStack() as undo:
            undo.callback(self._context.destroy, linger=0)
            self._gate = None if authorized is None else Gate(self._context, authorized)
            # Before the store is touched: a delegator that can't serve changes nothing.
            self._door = Door(self._context)
            curve = None if keys is None else keys.as_server()
            self._router = bound_router(self._context, config.bind, curve, self._door.watch)
            self._router.setsockopt(zmq.RCVTIMEO, TURN_US // 1000)
            self._intake = Intake(self._router, keyed=keys is not None)
            self._large = LargeAnswers(self._router)
            self.address = address_of(self._router)
            self._store = store = open_store(config.store)
            undo.callback(store.close)
            host, accept_clock = socket.gethostname(), config.accept_clock
            # Others may be on the same host, and after a restart this is another.
            name = host if store.exclusive else f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
            timeline = begin_timeline(store, name, accept_clock=accept_clock)
            meta, self.clock = start(
                store, config.wishes, timeline, name=name, address=self.address, accept_clock=accept_clock
            )
            held = store.held(self.clock.tick())
            undo.pop_all()
        self.executor = LeaseExecutor(store, meta, self.clock, wake=waker.wake)
        self.service = Service(
            self.executor, Directory(held), secrets.token_bytes, authorized, self._large.has_room
        )
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        if self._gate is not None:
            self._gate.register(self._poller)
        waker.register(self._poller)
        self._door.register(self._poller)

    def run(self) -> None:
        """Serve until told to stop, then drain: settle and answer what waits, close."""
        try:
            self.executor.start()
            meta = self.executor.meta
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
            while not self._waker.stopping:
                self.liveness.turn(ready=True)
                self._tick()
            self.liveness.stop()
            self._drain()
        finally:
            self._door.close()
            self._router.close()
            if self._gate is not None:
                self._gate.close()
            self._context.term()

    @property
    def refused(self) -> int:
        """Connections refused, of keys that are not authorized."""
        return 0 if self._gate is None else self._gate.refused

    def _tick(self) -> bool:
        """One turn of the loop; False if there is more to take in than it had time for."""
        service = self.service
        poll_ms = SWEEP_US // 1000 if service.broker.open or service.draining else IDLE_MS
        events = dict(self._poller.poll(poll_ms))
        # A request may have come at any time since the loop overslept.
        woke_us = clock.local_us()
        overslept_us = max(0, woke_us - self._woke_us - poll_ms * 1000)
        self._woke_us = woke_us
        if overslept_us > STOPPED_US:
            service.directory.excuse(overslept_us)
        self._waker.take(events)
        if self._gate is not None:
            self._gate.take(events, woke_us)
        self._door.take(events)
        service.turn(woke_us)
        emptied = self._router not in events or self._receive(woke_us - overslept_us)
        self._flush()
        if self.executor.fault is not None:
            raise StoreError(
                f"the lease executor broke down: {self.executor.fault!r}"
            ) from self.executor.fault
        self.clock.service(woke_us)
        return emptied

    def _receive(self, arrived_us: int) -> bool:
        """Take in what has come, for `TURN_US` at most; True if that was all.

        While ID requests are under way this waits for the next message in the socket, for as long: a poll
        over all that the loop looks at would cost more than to pass a request on.
        """
        service, intake, woke_us = self.service, self._intake, self._woke_us
        until_us = woke_us + TURN_US
        flags = 0 if woke_us < service.brokered_at_us + BROKERING_US else NOW
        while clock.local_us() < until_us:
            self._flush()
            frames = intake.receive(flags)
            if frames is None:
                return True
            caller = ANYONE if self._gate is None else self._gate.caller(intake.sender)
            service.receive(frames, arrived_us, woke_us, caller)
        return False

    def _flush(self) -> None:
        """Send what the service has left to be sent, and what follows from what could not be sent."""
        service = self.service
        while messages := service.collect():
            for message in messages:
                prefix, body, _ = message
                is_large = len(body) >= LARGE_BYTES
                if not (self._large.send(prefix, body) if is_large else send(self._router, prefix, body)):
                    service.unsent(message, clock.local_us())

    def _drain(self) -> None:
        self.service.draining = True
        until_us = clock.local_us() + ANSWERS_US
        while (not self._tick() or self.service.broker.busy) and clock.local_us() < until_us:
            pass
        if self.executor.stop(STORE_STOP_S):
            self.service.turn(clock.local_us())
            self._flush()
            self._store.close()
        else:
            _log.error("the store does not answer: left without waiting for it")
        _log.info("delegator at %s has stopped", self.address)


def check_config(config: DelegatorConfig) -> Callers | None:
    """Raise `ConfigError` if the settings can't be right; gives who is authorized, in a cluster with keys."""
    check_bind(config.bind, insecure=config.insecure or config.keys is not None)
    check_wishes(config.wishes)
    check_url(config.store)
    return None if config.keys is None else Callers(config.keys.folder / AUTHORIZED)
