"""The worker's process: one ROUTER for ID requests, one machine ID, one poll loop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import zmq

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.lease import Holder
from zflake.daemon import Door, Liveness, Waker
from zflake.daemon.gate import Gate
from zflake.errors import ConfigError
from zflake.holder.hold import Hold
from zflake.holder.lease_client import LeaseClient
from zflake.holder.static import StaticHold
from zflake.keys import AUTHORIZED, Callers, Keys, curves_of
from zflake.version import __version__
from zflake.wire.callers import Caller
from zflake.wire.endpoint import Endpoint, check_bind, parse_endpoint
from zflake.wire.fields import check_name
from zflake.wire.frames import split
from zflake.wire.sockets import NOW, address_of, bound_router
from zflake.worker.channel import Channel, GatedChannel, LinkChannel
from zflake.worker.handler import Handler
from zflake.worker.link import Link

TURN_US: Final = 1_000
"""Microseconds for which requests are answered before the rest of the loop gets its turn."""
IDLE_US: Final = 500_000
"""Microseconds of the poll loop's longest sleep."""
ALONE_US: Final = 10_000
"""Microseconds of requests at one channel only, after which the loop lingers there."""
DRAIN_US: Final = 250_000
"""Microseconds for which a worker that was told to stop answers the requests that are on their way."""
STALL_US: Final = 100_000
"""Microseconds of oversleeping that mean that the process was stopped; messages of that time take as long, at
most, to turn up."""
CLOSE_S: Final = 1.0
"""Seconds that the sockets to the delegators may take to close."""
RELEASE_US: Final = 2_000_000
"""Microseconds that giving the lease back may take."""

Asker: TypeAlias = tuple[Channel, list[bytes]]
"""Where an answer goes: out by this channel, behind this prefix."""

_log = logging.getLogger("zflake.worker")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A worker's settings; endpoints and layout are checked already."""

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
    """Whether binding an address that other machines reach is meant, though there are no keys."""
    keys: Keys | None = None


class Worker:
    """One worker: `run` serves until `waker` says stop.

    Raises `ConfigError` if it can't bind or the configuration contradicts itself, `LayoutError` if
    machine or layout do not fit.
    """

    def __init__(self, config: WorkerConfig, waker: Waker) -> None:
        self._config = config
        self._waker = waker
        self.liveness = Liveness()
        self._name = check_name(config.name) or f"{socket.gethostname()}-{os.getpid()}"
        self._started_us = self._woke_us = self._arrived_us = clock.local_us()
        authorized = check_config(config)
        keys = config.keys
        self._named: list[Mapping[str, Caller]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A name server that is away would hold up all sockets of a context: delegators may have names.
        self._outward: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with contextlib.ExitStack() as undo:
            undo.callback(self._context.destroy, linger=0)
            undo.callback(self._outward.destroy, linger=0)
            self._gate = None if keys is None else Gate(self._context, authorized)
            self._door = Door(self._context)
            curve = None if keys is None else keys.as_server()
            router = bound_router(self._context, config.bind, curve, self._door.watch)
            self.address = _advertised(config, address_of(router))
            self._hold, self._holding = self._take_hold()
            self.handler: Handler[Asker] = Handler(
                self._hold, self._describe, lambda asker: asker[0].peer_of(asker[1])
            )
            self._links = [
                LinkChannel(
                    self._outward,
                    delegator,
                    Link(self._hold, self.handler.load, keyed=keys is not None),
                    self.handler.requests,
                    curves_of(keys),
                )
                for delegator in (() if config.machine is not None else config.delegators)
            ]
            undo.pop_all()
        requests = self.handler.requests
        front = (
            Channel(router, requests) if self._gate is None else GatedChannel(router, requests, self._gate)
        )
        self._channels = [front, *self._links]
        self._busy_channel: Channel | None = None
        self._busy_since_us = 0  # from when on requests have come in by that channel only
        self._poller = zmq.Poller()
        if self._gate is not None:
            self._gate.register(self._poller)
        self._waker.register(self._poller)
        self._door.register(self._poller)
        self._polled: list[zmq.Socket[bytes] | None] = []
        # When the loop was stopped last, and until when messages of that time turn up.
        self._stalled_us = (0, 0)

    def run(self) -> None:
        """Serve until told to stop, then drain: answer what is queued, give the lease back, close."""
        try:
            _log.info("worker %s serves at %s", self._name, self.address, extra={"address": self.address})
            if self._config.layout is not None and self._config.machine is not None:
                _log.warning(
                    "static machine %d, layout %s: nothing checks that no other worker and no delegator uses it",
                    self._config.machine,
                    self._config.layout.name,
                )
            while not self._waker.stopping:
                self._tick()
                self.liveness.turn(ready=self._hold.is_open)
            self.liveness.stop()
            self._drain()
        finally:
            self._holding.close()
            self._door.close()
            for channel in self._channels:
                channel.close()
            if self._gate is not None:
                self._gate.close()
            self._context.term()
            closing = threading.Thread(target=self._outward.term, daemon=True)
            closing.start()
            closing.join(CLOSE_S)

    @property
    def machine(self) -> int | None:
        """The machine ID that is held."""
        mint = self._hold.mint
        return None if mint is None else mint.machine

    def _take_hold(self) -> tuple[Hold, LeaseClient | StaticHold]:
        config = self._config
        if config.machine is None:
            holder = Holder(self._name, socket.gethostname(), os.getpid(), self.address)
            client = LeaseClient(
                self._outward, config.delegators, holder, curves_of(config.keys), layout=config.layout
            )
            return client.lease, client
        if config.layout is None:
            raise ConfigError("a static worker (--machine) needs a --layout")
        static = StaticHold(config.layout, config.machine)
        return static, static

    def _tick(self) -> None:
        events = self._poll()
        # Lingering at one channel, the loop would keep those waiting that come to another.
        lingers = self._woke_us > self._busy_since_us + ALONE_US
        for channel in self._channels:
            if channel.socket in events:
                self._answer(channel, linger=lingers and channel is self._busy_channel)
        self._waker.take(events)
        self._door.take(events)
        local_us = clock.local_us()
        self._holding.service(local_us)
        for link in self._links:
            link.service(local_us)
        if self._gate is not None:
            self._follow_callers(self._gate)
            self._gate.take(events, local_us)
        self._answer_parked(local_us)

    def _poll(self) -> dict[Any, int]:
        self._follow_sockets()
        wake_us = min([self._holding.wake_us, *(link.wake_us for link in self._links)])
        sleep_us = min(max(0, wake_us - clock.local_us()), IDLE_US)
        poll_ms = -(-sleep_us // 1000)
        if self.handler.parked:
            # A poll's time-out is in whole milliseconds, and the tick's turn is not to be overslept.
            sleep_us = min(sleep_us, self.handler.wait_us() or 0)
            poll_ms = sleep_us // 1000
            if poll_ms == 0:
                time.sleep(sleep_us / 1e6)
        events = dict(self._poller.poll(poll_ms))
        # A request may have come at any time since the loop overslept: a process that was stopped must not
        # mint for callers that have long given up.
        woke_us = clock.local_us()
        overslept_us = woke_us - self._woke_us - sleep_us
        self._woke_us = woke_us
        self._arrived_us = woke_us - max(0, overslept_us)
        if overslept_us > STALL_US:
            self._stalled_us = (self._arrived_us, woke_us + STALL_US)
        elif woke_us < self._stalled_us[1]:  # libzmq's own threads were stopped as well, and catch up now
            self._arrived_us = self._stalled_us[0]
        return events

    def _follow_callers(self, gate: Gate) -> None:
        """Let those in whom a delegator names that answers; if none does, whom they named last."""
        named = [link.callers for link in self._links if link.callers is not None]
        if named and named != self._named:
            self._named = named
            gate.callers = {key: caller for callers in named for key, caller in callers.items()}

    def _follow_sockets(self) -> None:
        """Have the poller look at the sockets of now: a connection that died is replaced by its owner."""
        current = [self._holding.socket, *[channel.socket for channel in self._channels]]
        if current != self._polled:
            for socket in self._polled:
                if socket is not None:
                    self._poller.unregister(socket)
            for socket in current:
                if socket is not None:
                    self._poller.register(socket, zmq.POLLIN)
            self._polled = current

    def _answer(self, channel: Channel, *, linger: bool) -> int:
        """Answer what has come in by a channel, for `TURN_US` at most; gives how many messages that were.

        With `linger` this waits for the next message in the socket, for as long: a poll over all that the
        loop looks at costs about as much as answering, and under load there is no need for one each time.
        """
        handler, arrived_us = self.handler, self._arrived_us
        until_us = self._woke_us + TURN_US
        answered = 0
        # Parked requests wait for a turn of the loop: no lingering then.
        while (frames := channel.receive(0 if linger and not handler.parked else NOW)) is not None:
            answered += 1
            local_us = clock.local_us()
            message = split(frames)
            if message is None:
                handler.requests.dropped += 1
            else:
                prefix, body = message
                answer = handler.handle((channel, prefix), body, arrived_us, local_us, channel.caller)
                if answer is not None:
                    channel.answer(prefix, answer)
            if local_us >= until_us:
                break
        if answered and channel is not self._busy_channel:
            self._busy_channel, self._busy_since_us = channel, self._woke_us
        channel.flush()
        return answered

    def _answer_parked(self, local_us: int) -> None:
        for (channel, prefix), answer in self.handler.turn(local_us):
            channel.answer(prefix, answer)
        for channel in self._channels:
            channel.flush()

    def _answer_all(self) -> int:
        return sum(self._answer(channel, linger=False) for channel in self._channels)

    def _drain(self) -> None:
        for link in self._links:
            link.leave()
        until_us = clock.local_us() + DRAIN_US
        while (self._answer_all() or self.handler.parked) and clock.local_us() < until_us:
            self._answer_parked(clock.local_us())
        self.handler.draining = True  # requests that come now are sent to another worker
        self._holding.release(clock.local_us() + RELEASE_US)
        self._follow_sockets()
        self._answer_parked(clock.local_us())  # those that are parked still are sent there too
        until_us = clock.local_us() + DRAIN_US
        while (left_us := until_us - clock.local_us()) > 0:
            self._poller.poll(max(1, left_us // 1000))
            self._arrived_us = self._woke_us = clock.local_us()
            self._answer_all()
        _log.info("worker %s has stopped; it minted %d IDs", self._name, self.handler.ids)

    def _describe(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "name": self._name,
            "address": self.address,
            "pid": os.getpid(),
            "uptime_ms": (clock.local_us() - self._started_us) // 1000,
        }


def check_config(config: WorkerConfig) -> Callers | None:
    """Raise `ConfigError` if the worker may not bind, clients could not connect, or keys are missing.

    Gives who is authorized at a static worker with keys.
    """
    check_bind(config.bind, insecure=config.insecure or config.keys is not None)
    if config.advertise is not None and config.advertise.is_wildcard:
        raise ConfigError(
            f"clients can't connect to {config.advertise}: advertise one host's name or address"
        )
    if (
        config.advertise is not None
        and config.advertise.host
        and not config.advertise.port
        and not config.bind.host
    ):
        raise ConfigError(
            f"{config.bind} has no port for {config.advertise}: advertise a port, or the path itself"
        )
    if config.advertise is None and config.bind.is_wildcard:
        raise ConfigError(
            f"{config.bind} is every interface, and no address that clients could connect to: say which with "
            "--advertise tcp://HOST:*"
        )
    if config.keys is None:
        return None
    if config.machine is not None:
        return Callers(config.keys.folder / AUTHORIZED)
    config.keys.to()  # the delegators hear its first word, and tell it who is authorized
    return None


def _advertised(config: WorkerConfig, bound: str) -> str:
    if config.advertise is None:
        return bound
    if config.advertise.port or not config.advertise.host:
        return config.advertise.text
    return f"tcp://{config.advertise.host}:{parse_endpoint(bound).port}"
