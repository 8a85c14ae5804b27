"""The door of a daemon: how many peers may be connected, so that it keeps descriptors and memory for its own needs.

At the limit of descriptors libzmq fails to accept and tries again without a pause, and the daemon can't reopen its store
or reach anything.  So the door is shut before that, and opened again once some peers have gone.  Shut, the kernel passes
over those who knock (they knock again by themselves); who is inside stays.  To unbind the socket would end every
connection that came by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import socket
import struct
import time
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

MAX_PEERS: Final = 20_000
"""Peers that may be connected at most; an idle one costs 27 kB."""
RESERVE: Final = 512
"""Descriptors that peers do not get: for the store, other sockets and files, and those who are let in before the door is
shut, whom the kernel has accepted already (`BACKLOG`)."""
LOG_S: Final = 10.0
"""Seconds between two log lines on the door, at least."""

_EVENTS: Final = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_ATTACH_FILTER: Final = 26
_DETACH_FILTER: Final = 27
# SO_ATTACH_FILTER and SO_DETACH_FILTER of Linux, and a filter that drops each packet; see socket(7).
_DROP: Final = struct.pack("HBBI", 0x06, 0, 0, 0)

_log = logging.getLogger("zflake.daemon")


def most_peers(descriptors: int) -> int:
    """The number of peers for which there is room in a process with so many descriptors."""
    return min(MAX_PEERS, max(descriptors - RESERVE, descriptors // 2))


class Crowd:
    """The peers that are connected, by descriptor, and whether any more may come: `most` at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.full = False
        """Whether the door is to be shut: from `most` peers on, until a sixteenth of them has gone."""
        self._peers: set[int] = set()

    def __len__(self) -> int:
        return len(self._peers)

    def come(self, descriptor: int) -> None:
        """Take in that a peer has been let in."""
        self._peers.add(descriptor)
        self.full = self.full or len(self._peers) >= self.most

    def go(self, descriptor: int) -> None:
        """Take in that a peer has gone."""
        self._peers.discard(descriptor)
        self.full = self.full and len(self._peers) > self.most - max(1, self.most // 16)


class Door:
    """The door of one ROUTER; `watch` it before it binds.

    Its owner's loop polls it, and calls `take` with what the poll found.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.crowd = Crowd(MAX_PEERS if soft == resource.RLIM_INFINITY else most_peers(soft))
        self._monitor = context.socket(zmq.PAIR)
        self._listener: socket.socket | None = None
        self._shut = False
        self._quiet_until = 0.0

    def watch(self, router: zmq.Socket[bytes]) -> None:
        """Follow who comes to this ROUTER and goes."""
        where = f"inproc://door-{id(self)}"
        # libzmq's thread would wait for a reader that is behind, and all peers with it.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.setsockopt(zmq.LINGER, 0)
        router.monitor(where, _EVENTS)
        self._monitor.connect(where)

    def register(self, poller: zmq.Poller) -> None:
        """Have `poller` watch this door."""
        poller.register(self._monitor, zmq.POLLIN)

    def take(self, events: dict[object, int]) -> None:
        """Take in what a poll found, and shut or open the door if that is due."""
        if self._monitor not in events:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
                match event["event"]:
                    case zmq.EVENT_ACCEPTED:
                        self.crowd.come(event["value"])
                    case zmq.EVENT_DISCONNECTED:
                        self.crowd.go(event["value"])
                    case zmq.EVENT_LISTENING:
                        self._listener = socket.socket(fileno=os.dup(event["value"]))
        if self.crowd.full != self._shut:
            self._shut = self.crowd.full
            self._turn()

    def close(self) -> None:
        """Let go of what it watches; the ROUTER is closed after this."""
        if self._listener is not None:
            self._listener.close()
        self._monitor.close()

    def _turn(self) -> None:
        if self._listener is None or self._listener.family == socket.AF_UNIX:
            return  # only processes of this machine come there, if the path's folder lets them
        try:
            if self._shut:
                filter_ = ctypes.create_string_buffer(_DROP)
                program = struct.pack("HP", 1, ctypes.addressof(filter_))
                self._listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
            else:
                self._listener.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
        except OSError as error:
            self._say("can't keep more peers out: %s", error.strerror)
            return
        if self._shut:
            self._say(
                "%d peers are connected, and no more are let in until some have gone; if they are all wanted, "
                "raise the limit of open files, up to %d peers",
                len(self.crowd),
                MAX_PEERS,
            )
        else:
            self._say("%d peers are connected; more are let in again", len(self.crowd))

    def _say(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_S
            _log.warning(message, *args)
