"""The worker's process: one ROUTER for ID requests, one machine ID, one poll loop."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import zmq

from zflake.core.layout import Layout
from zflake.core.lease import Holder
from zflake.daemon import Alarm, Pulse
from zflake.errors import ConfigError
from zflake.holder.clock import local_us
from zflake.holder.keeper import LeaseKeeper
from zflake.holder.static import StaticHold
from zflake.version import __version__
from zflake.wire.endpoint import Endpoint, check_bind, parse_endpoint
from zflake.wire.frames import split
from zflake.wire.messages import check_name
from zflake.wire.sockets import NOW, Intake, address_of, bound_router, send
from zflake.worker.handler import Figures, Handler
from zflake.worker.link import Link

TURN_US: Final = 1_000
"""For how long requests are answered before the rest of the loop gets its turn."""
IDLE_US: Final = 500_000
"""The longest sleep of the poll loop."""
QUIET_US: Final = 10_000
DRAIN_US: Final = 250_000
"""How long requests that are on their way when the worker is told to stop are still answered."""
STALL_US: Final = 100_000
"""A loop that overslept by more was stopped; what came in meanwhile takes as long, at most, to turn up."""
CLOSE_S: Final = 1.0
"""How long the sockets to the delegators may take to close."""
RELEASE_US: Final = 2_000_000

_log = logging.getLogger("zflake.worker")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is told at its start; endpoints and layout are checked already."""

    delegators: Sequence[Endpoint]
    bind: Endpoint
    advertise: Endpoint | None = None
    """Where clients reach this worker, if not where it binds; a port of `*` stands for the bound one."""
    name: str = ""
    machine: int | None = None
    """The machine ID of a static worker; None: lease one."""
    layout: Layout | None = None
    """The layout to insist on; a static worker needs one."""
    insecure: bool = False
    """Whether binding an address that other machines reach is meant."""


class Worker:
    """One worker: `run` serves until `alarm` says stop.

    Raises `ConfigError` where it can't bind or the configuration contradicts itself, `LayoutError` where
    machine or layout do not fit.
    """

    def __init__(self, config: WorkerConfig, alarm: Alarm) -> None:
        self._config = config
        self._alarm = alarm
        self.pulse = Pulse()
        self._name = check_name(config.name) or f"{socket.gethostname()}-{os.getpid()}"
        self._started_us = local_us()
        self._woke_us = self._arrived_us = local_us()
        self._brokered_at_us = self._direct_at_us = 0
        check_addresses(config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Where delegators have names, a name server that is away would hold up all sockets of a context.
        self._outward: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._router = bound_router(self._context, config.bind)
            self._router.setsockopt(zmq.RCVTIMEO, TURN_US // 1000)
            self._intake = Intake(self._router)
            self.address = _advertised(config, address_of(self._router))
            self._hold = self._take_hold()
            delegators = () if config.machine is not None else config.delegators
            self._links = [Link(self._outward, delegator, self._hold.clock) for delegator in delegators]
        except BaseException:
            self._context.destroy(linger=0)
            self._outward.destroy(linger=0)
            raise
        self._handler = Handler(self._hold, self._hold.clock.now_us, self._describe)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        for link in self._links:
            self._poller.register(link.socket, zmq.POLLIN)
        self._alarm.register(self._poller)
        self._polled: zmq.Socket[bytes] | None = None
        # From when on the loop was stopped last, and until when what came meanwhile turns up.
        self._stalled_us = (0, 0)

    def run(self) -> None:
        """Serve until told to stop, then drain: answer what is queued, give the lease back, close."""
        try:
            _log.info("worker %s serves at %s", self._name, self.address, extra={"address": self.address})
            if isinstance(self._hold, StaticHold):
                _log.warning(
                    "static machine %d, layout %s: nobody checks that no other worker and no delegator uses it",
                    self.machine,
                    self._hold.mint.layout.name,
                )
            while not self._alarm.stopping:
                self._tick()
                self.pulse.beat(ready=self._hold.is_open)
            self.pulse.stop()
            self._drain()
        finally:
            self._hold.close()
            self._router.close()
            for link in self._links:
                link.close()
            self._context.term()
            closing = threading.Thread(target=self._outward.term, daemon=True)
            closing.start()
            closing.join(CLOSE_S)

    @property
    def figures(self) -> Figures:
        """What this worker has done."""
        return self._handler.figures

    @property
    def errors(self) -> Mapping[str, int]:
        """How many requests were answered with which error."""
        return self._handler.errors

    @property
    def parked(self) -> int:
        """How many requests wait for the next tick."""
        return self._handler.parked

    @property
    def machine(self) -> int | None:
        """The machine ID that is held."""
        mint = self._hold.mint
        return None if mint is None else mint.machine

    def _take_hold(self) -> LeaseKeeper | StaticHold:
        config = self._config
        if config.machine is None:
            holder = Holder(self._name, socket.gethostname(), os.getpid(), self.address)
            return LeaseKeeper(self._outward, config.delegators, holder, layout=config.layout)
        if config.layout is None:
            raise ConfigError("a static worker (--machine) needs a --layout")
        return StaticHold(config.layout, config.machine)

    def _tick(self) -> None:
        events = self._poll()
        # Lingering at one socket, the loop would keep those waiting who come to another.
        if self._router in events:
            self._answer(linger=self._woke_us > self._brokered_at_us + QUIET_US)
        for link in self._links:
            if link.socket in events:
                self._answer_link(link, linger=self._woke_us > self._direct_at_us + QUIET_US)
        self._alarm.hear(events)
        now_us = local_us()
        self._hold.service(now_us)
        self._service_links(now_us)
        self._answer_parked(now_us)

    def _service_links(self, now_us: int) -> None:
        for link in self._links:
            assert isinstance(self._hold, LeaseKeeper)
            link.service(
                now_us,
                self.machine,
                self._hold.tenant.token,
                self._handler.load,
                is_open=self._hold.is_open,
            )

    def _answer_link(self, link: Link, *, linger: bool) -> int:
        """Answer the brokered requests that have come over a link, as `_answer` does; gives how many."""
        answered = 0
        step = not self._hold.is_open
        linger = linger and len(self._links) == 1
        while True:
            message = link.receive(step=step)
            if message is None:
                self._handler.figures.dropped += link.flush()
                if not linger or self._handler.parked:
                    break
                message = link.receive(0, step=step)
                if message is None:
                    break
            answered += 1
            now_us = self._brokered_at_us = local_us()
            prefix, body = message
            asker = (link, prefix)
            answer = self._handler.handle(asker, body, self._arrived_us, now_us)
            if answer is not None:
                self._send(asker, answer)
            if now_us >= self._woke_us + TURN_US:
                self._handler.figures.dropped += link.flush()
                break
        return answered

    def _poll(self) -> dict[Any, int]:
        self._follow_keeper()
        wake_us = min([self._hold.wake_us, *(link.wake_us for link in self._links)])
        sleep_us = min(max(0, wake_us - local_us()), IDLE_US)
        poll_ms = -(-sleep_us // 1000)
        if self._handler.parked:
            # A poll's time-out is in whole milliseconds, and the tick's turn is not to be overslept.
            sleep_us = min(sleep_us, self._handler.wait_us())
            poll_ms = sleep_us // 1000
            if poll_ms == 0:
                time.sleep(sleep_us / 1e6)
        events = dict(self._poller.poll(poll_ms))
        # A request may have come at any time since the loop overslept: a process that was stopped must not
        # mint for callers who have long given up.
        woke_us = local_us()
        overslept_us = woke_us - self._woke_us - sleep_us
        self._woke_us = woke_us
        self._arrived_us = woke_us - max(0, overslept_us)
        if overslept_us > STALL_US:
            self._stalled_us = (self._arrived_us, woke_us + STALL_US)
        elif woke_us < self._stalled_us[1]:  # libzmq's own threads were stopped as well, and catch up now
            self._arrived_us = self._stalled_us[0]
        return events

    def _follow_keeper(self) -> None:
        current = self._hold.socket
        if current is not self._polled:
            if self._polled is not None:
                self._poller.unregister(self._polled)
            if current is not None:
                self._poller.register(current, zmq.POLLIN)
            self._polled = current

    def _answer(self, *, linger: bool) -> int:
        """Answer what has come in, for `TURN_US` at most; gives how many messages that were.

        With `linger` this waits for the next message in the socket, for as long: a poll over all that the
        loop looks at costs about as much as answering, and under load there is no need for one each time.
        """
        intake, handler, arrived_us = self._intake, self._handler, self._arrived_us
        until_us = self._woke_us + TURN_US
        answered = 0
        while True:
            # What is parked waits for a turn of the loop: no lingering then.
            frames = intake.receive(0 if linger and not handler.parked else NOW)
            if frames is None:
                return answered
            answered += 1
            now_us = self._direct_at_us = local_us()
            message = split(frames)
            if message is None:
                handler.figures.dropped += 1
            else:
                prefix, body = message
                answer = handler.handle(prefix, body, arrived_us, now_us)
                if answer is not None:
                    self._send(prefix, answer)
            if now_us >= until_us:
                return answered

    def _answer_parked(self, now_us: int) -> None:
        for asker, answer in self._handler.turn(now_us):
            self._send(asker, answer)
        for link in self._links:
            self._handler.figures.dropped += link.flush()

    def _send(self, asker: list[bytes] | tuple[Link, list[bytes]], answer: bytes) -> None:
        if isinstance(asker, list):
            lost = 0 if send(self._router, asker, answer) else 1
        else:
            link, prefix = asker
            lost = link.answer(prefix, answer)
        self._handler.figures.dropped += lost

    def _answer_all(self) -> int:
        return self._answer(linger=False) + sum(self._answer_link(link, linger=False) for link in self._links)

    def _drain(self) -> None:
        for link in self._links:
            link.leave()
        until_us = local_us() + DRAIN_US
        while (self._answer_all() or self._handler.parked) and local_us() < until_us:
            self._answer_parked(local_us())
        self._handler.draining = True  # whoever comes now is sent to another worker
        self._hold.release(local_us() + RELEASE_US)
        self._answer_parked(local_us())  # whoever is parked still is sent there too
        until_us = local_us() + DRAIN_US
        while (left_us := until_us - local_us()) > 0:
            self._poller.poll(max(1, left_us // 1000))
            self._arrived_us = self._woke_us = local_us()
            self._answer_all()
        _log.info("worker %s has stopped; it minted %d IDs", self._name, self._handler.figures.ids)

    def _describe(self) -> dict[str, Any]:
        hold = self._hold
        return {
            "version": __version__,
            "name": self._name,
            "address": self.address,
            "pid": os.getpid(),
            "uptime_ms": (local_us() - self._started_us) // 1000,
            "state": hold.tenant.state.name if isinstance(hold, LeaseKeeper) else "STATIC",
        }


def check_addresses(config: WorkerConfig) -> None:
    """Raise `ConfigError` where the worker may not bind, or clients could not connect."""
    check_bind(config.bind, insecure=config.insecure)
    if config.advertise is not None and config.advertise.is_wildcard:
        raise ConfigError(
            f"clients can't connect to {config.advertise}: advertise one host's name or address"
        )
    if config.advertise is None and config.bind.is_wildcard:
        raise ConfigError(
            f"{config.bind} is every interface, and no address that clients could connect to: say which with "
            "--advertise tcp://HOST:*"
        )


def _advertised(config: WorkerConfig, bound: str) -> str:
    if config.advertise is None:
        return bound
    port = parse_endpoint(bound).port
    return config.advertise.text if config.advertise.port else f"tcp://{config.advertise.host}:{port}"
