"""ZeroMQ sockets with the options that the protocol needs, set before they bind or connect."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Final

import zmq

from zflake.errors import ConfigError, Unavailable
from zflake.wire.endpoint import Endpoint
from zflake.wire.frames import MAX_FRAMES, MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES

RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000

# libzmq counts messages, for each peer.  It learns only after each half of a mark that some were taken, so of a mark only
# half is certain.
UNTAKEN: Final = 256
"""Answers and brokered requests that may wait for one peer; a further one is dropped.  Half of it is more than a peer
that takes its answers can have waiting: a worker's credit, or a pipeline of 64 requests, with heartbeats beside them."""
UNTAKEN_LARGE: Final = 8
"""Answers of `LARGE_BYTES` or more that may wait for one peer; a page of leases may have 20 kB.  One that was sent counts
until pyzmq's thread has said so."""
LARGE_BYTES: Final = 1024
SWEEP_AT: Final = 256
"""Peers with large answers at which a first look is taken whether they have got them."""
UNREAD: Final = 32
"""Messages of one peer that a server has not read; further ones wait in the kernel, and then at the peer."""
UNREAD_ANSWERS: Final = 4
"""Messages that a socket with one request under way has not read: one is wanted."""
KERNEL_BYTES: Final = 64 * 1024
"""Bytes that the kernel is asked to keep for one connection, in and out each; Linux takes twice as many."""
STUCK_MS: Final = 20_000
"""Milliseconds without progress after which a peer that takes no bytes is let go, with all that waits for it."""
DESCRIPTORS: Final = 16
"""Descriptors that must be free before a context or a socket is made.  Both together take seven, and other threads some
meanwhile."""
BACKLOG: Final = 256
"""Connections that the kernel accepts before libzmq does."""
HANDSHAKE_MS: Final = 10_000
"""Milliseconds that a peer has for its handshake."""


def bound_router(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: Endpoint,
    watch: Callable[[zmq.Socket[bytes]], None] = lambda _: None,
) -> zmq.Socket[bytes]:
    """A server's ROUTER, handed to `watch` before it binds.  Raises `ConfigError` if it can't bind (port in use, no such address)."""
    import ctypes  # noqa: PLC0415  (clients, which bind nothing, do without)

    # libzmq numbers the peers that bring no identity, and aborts the process if one of its numbers is the identity that
    # another peer chose.  It counts from rand(), which it never seeds: any peer would know the numbers to come.
    ctypes.CDLL(None).srand(secrets.randbits(32))
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 500)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a peer that left fails and is counted
    router.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
    router.setsockopt(zmq.SNDHWM, UNTAKEN)
    router.setsockopt(zmq.RCVHWM, UNREAD)
    router.setsockopt(zmq.SNDBUF, KERNEL_BYTES)
    router.setsockopt(zmq.RCVBUF, KERNEL_BYTES)
    router.setsockopt(zmq.TCP_MAXRT, STUCK_MS)
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
    router.setsockopt(zmq.BACKLOG, BACKLOG)
    # A peer whose machine vanished holds its connection, and a file descriptor, until this notices.
    router.setsockopt(zmq.TCP_KEEPALIVE, 1)
    router.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
    router.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    router.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    watch(router)
    try:
        router.bind(endpoint.text)
    except zmq.ZMQError as error:
        router.close(linger=0)
        raise ConfigError(f"can't bind {endpoint}: {error.strerror}") from error
    return router


def check_descriptors() -> None:
    """Check that this process has the descriptors that a context and a socket take.

    libzmq aborts the process if it gets only some of them.

    Raises `Unavailable`.
    """
    opened: list[int] = []
    try:
        while len(opened) < DESCRIPTORS:
            opened += os.pipe()
    except OSError as error:
        raise Unavailable(
            f"this process has no {DESCRIPTORS} descriptors left, which a connection may take ({error.strerror}): "
            "raise its limit of open files (ulimit -n), or close some"
        ) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def connected(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    endpoint: Endpoint,
    *,
    queue: bool = False,
    unread: int = UNREAD_ANSWERS,
    most_bytes: int = MAX_RESPONSE_BYTES,
) -> zmq.Socket[bytes]:
    """A REQ or DEALER (`kind`) to one peer.

    A message that is sent while the peer is away is lost, or with `queue` waits until it is back.  The peer can make
    this process hold `unread` messages of `most_bytes` each, wanted or not.

    Raises `Unavailable` if this process is short of descriptors or sockets.

    One peer a socket, always: over several, messages are dealt out in turn, to the dead as well.
    No ZMTP heartbeats: on the connecting side they can abort the process (libzmq issue 3937).
    """
    check_descriptors()
    try:
        asking = context.socket(kind)
    except zmq.ZMQError as error:
        raise Unavailable(f"this process can't have another socket: {error.strerror}") from error
    asking.setsockopt(zmq.LINGER, 0)
    asking.setsockopt(zmq.IMMEDIATE, int(not queue))
    asking.setsockopt(zmq.MAXMSGSIZE, most_bytes)
    asking.setsockopt(zmq.RCVHWM, unread)
    asking.setsockopt(zmq.SNDHWM, unread)
    asking.setsockopt(zmq.RCVBUF, KERNEL_BYTES)
    asking.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    asking.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    asking.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
    asking.connect(endpoint.text)
    return asking


# Plain numbers: to combine zmq's flags, which are enums, takes as long as to send a frame.
NOW: Final = int(zmq.NOBLOCK)
SKIPPED_AT_ONCE: Final = 256
_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)


class Intake:
    """The input of a socket, message by message.

    Of a message with more frames than the protocol knows only the first ones are kept, and it is skipped in
    pieces: one peer with a million frames must not keep the others waiting.
    """

    __slots__ = ("_more", "_recv", "_skipping")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._recv = socket.recv
        self._more = socket.getsockopt
        self._skipping = False

    def receive(self, flags: int = NOW) -> list[bytes] | None:
        """The frames of the next message that has come in; None if there is none.

        With `flags` 0 it is waited for, as long as the socket's RCVTIMEO says.
        """
        if self._skipping and not self._skip():
            return None
        recv, more = self._recv, self._more
        try:
            frames = [recv(flags)]
        except zmq.Again:
            return None
        while more(zmq.RCVMORE):
            frames.append(recv())
            if len(frames) == MAX_FRAMES:
                self._skipping = True
                self._skip()
                break
        return frames

    def _skip(self) -> bool:
        for _ in range(SKIPPED_AT_ONCE):
            if not self._more(zmq.RCVMORE):
                self._skipping = False
                return True
            self._recv()
        return False


def send(socket: zmq.Socket[bytes], prefix: list[bytes], body: bytes | zmq.Frame, copy: bool = True) -> bool:  # noqa: FBT001, FBT002  (by keyword it costs more)
    """Send a message, never waiting; False if the peer has gone or takes no more.  A frame goes without a copy."""
    # Not send_multipart(), which costs more than its parts.
    try:
        for frame in prefix:
            socket.send(frame, _MORE)
        socket.send(body, NOW, copy)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise
        return False
    return True


class LargeAnswers:
    """Sends answers of `LARGE_BYTES` or more by a ROUTER: a peer has only so many, until it takes them.

    A peer that asks and reads nothing would else have `UNTAKEN` of them.
    """

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        self._router = router
        self._untaken: dict[bytes, list[zmq.MessageTracker]] = {}
        self._sweep_at = SWEEP_AT

    def has_room(self, identity: bytes) -> bool:
        """Whether this peer may be sent one more."""
        untaken = self._untaken.get(identity)
        if untaken is None:
            return True
        untaken[:] = [tracker for tracker in untaken if not tracker.done]
        if not untaken:
            del self._untaken[identity]
        return len(untaken) < UNTAKEN_LARGE

    def send(self, prefix: list[bytes], body: bytes) -> bool:
        """Send an answer, never waiting; False if the peer has gone or takes no more."""
        identity = prefix[0]
        if not self.has_room(identity):
            return False
        frame = zmq.Frame(body, track=True, copy=False, copy_threshold=0)
        if not send(self._router, prefix, frame, False):  # noqa: FBT003
            return False
        self._untaken.setdefault(identity, []).append(frame.tracker)
        if len(self._untaken) >= self._sweep_at:
            for each in list(self._untaken):
                self.has_room(each)
            self._sweep_at = 2 * len(self._untaken) + SWEEP_AT
        return True


def address_of(router: zmq.Socket[bytes]) -> str:
    """Where a bound socket can be reached: its endpoint with the port that the system chose."""
    address = router.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.rstrip(b"\0").decode()
