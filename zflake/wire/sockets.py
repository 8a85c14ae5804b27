"""ZeroMQ sockets with the options that the protocol needs, set before they bind or connect."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from zflake.errors import ConfigError, Unavailable
from zflake.wire.endpoint import Endpoint
from zflake.wire.frames import MAX_FRAMES, MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES

RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000
ZAP_DOMAIN: Final = "zflake"
"""What a server's handshakes are asked under; without a domain libzmq would ask nobody, and let everybody in."""

# libzmq counts messages, for each peer.  It learns only after each half of a mark that some were taken, so of a mark only
# half is certain.
UNTAKEN: Final = 256
"""Answers and brokered requests that may wait for one peer; a further one is dropped.  Half of it is more than a peer
that takes its answers can have waiting: a worker's credit, or a pipeline of 64 requests, with heartbeats beside them."""
UNTAKEN_BYTES: Final = 128 * 1024
"""Bytes in answers of `LARGE_BYTES` or more that may wait for one peer before it gets no further one; a page of leases may
have 20 kB.  An answer that was sent counts until pyzmq's thread has said so."""
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
"""Descriptors that must be free before a context or a socket is made.  With a monitor they take nine, and other threads some
meanwhile."""
BACKLOG: Final = 256
"""Connections that the kernel accepts before libzmq does."""
HANDSHAKE_MS: Final = 10_000
"""Milliseconds that a peer has for its handshake."""


class Curve(NamedTuple):
    """The keys of a connection, in Z85."""

    public: str
    secret: str
    server: str = ""
    """The public key of the server to connect to; empty for the server itself."""


def no_keys() -> tuple[None]:
    """What a `Dialer` tries in a cluster without keys."""
    return (None,)


def bound_router(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: Endpoint,
    curve: Curve | None = None,
    watch: Callable[[zmq.Socket[bytes]], None] = lambda _: None,
) -> zmq.Socket[bytes]:
    """A server's ROUTER, handed to `watch` before it binds.

    With `curve`, whose keys are the server's, peers prove their keys, and a ZAP handler in the context decides on them.

    Raises `ConfigError` if it can't bind (port in use, no such address).
    """
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
    if curve is not None:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt_string(zmq.CURVE_SECRETKEY, curve.secret)
        router.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
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


def connecting(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    endpoint: Endpoint,
    curve: Curve | None = None,
    *,
    queue: bool = False,
    unread: int = UNREAD_ANSWERS,
    most_bytes: int = MAX_RESPONSE_BYTES,
) -> zmq.Socket[bytes]:
    """A REQ or DEALER (`kind`) that is to connect to one peer.

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
        raise _no_socket(error) from error
    asking.setsockopt(zmq.LINGER, 0)
    asking.setsockopt(zmq.IMMEDIATE, int(not queue))
    asking.setsockopt(zmq.MAXMSGSIZE, most_bytes)
    asking.setsockopt(zmq.RCVHWM, unread)
    asking.setsockopt(zmq.SNDHWM, unread)
    asking.setsockopt(zmq.RCVBUF, KERNEL_BYTES)
    asking.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    asking.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    asking.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
    if curve is not None:
        asking.setsockopt_string(zmq.CURVE_PUBLICKEY, curve.public)
        asking.setsockopt_string(zmq.CURVE_SECRETKEY, curve.secret)
        asking.setsockopt_string(zmq.CURVE_SERVERKEY, curve.server)
    return asking


def _no_socket(error: zmq.ZMQError) -> Unavailable:
    return Unavailable(f"this process can't have another socket: {error.strerror}")


_HANDSHAKES: Final = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_MISMATCH: Final = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
BROKEN_OFF: Final = 3
"""Handshakes broken off, at least, that mean a wrong key: the end of a server breaks one off as well."""


class Dialer:
    """Connects a REQ or DEALER to one peer, by the first of `curves` that has the peer's key.

    `socket` is another one after each wrong key.  A peer that refuses says so by ending the handshake, which only the
    socket's monitor shows: `refusal` and `wait` look there, until `done` or `close`.  `options` are those of `connecting`,
    and so are the errors.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        endpoint: Endpoint,
        curves: Sequence[Curve | None],
        **options: Any,
    ) -> None:
        self._make = partial(connecting, context, kind, endpoint, **options)
        self._endpoint = endpoint
        self._curves = itertools.cycle(curves)
        self._keys = 0 if None in curves else len(curves)
        self._broken_off = 0
        self._monitor: zmq.Socket[bytes] | None
        self.socket, self._monitor = self._dial()

    def refusal(self) -> str | None:
        """Why the peer refuses every key that was tried; None while it may yet take the connection.

        Raises `Unavailable` if this process is short of what another try takes.
        """
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "it does not know this key, or not any more"
            if event["value"] == _MISMATCH:
                return "one side has keys and the other has none"
            # libzmq learns no more if the server's key is another one.
            self._broken_off += 1
            if self._keys and self._broken_off >= max(BROKEN_OFF, self._keys):
                return "its own key is none of those that are trusted here"
            if self._keys > 1:
                fresh, monitor = self._dial()
                self.close()
                self.socket, self._monitor = fresh, monitor
        return None

    def wait(self, timeout_s: float) -> str | None:
        """Wait until the peer has taken the connection; gives why, if it refuses.

        Raises `zmq.Again` if it does neither within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        refusal = None
        while refusal is None and (left_ms := int((deadline - time.monotonic()) * 1000)) > 0:
            poller = zmq.Poller()
            poller.register(self.socket, zmq.POLLOUT)
            poller.register(self._monitor, zmq.POLLIN)
            if self.socket in dict(poller.poll(left_ms)):
                self.done()
                return None
            refusal = self.refusal()
        if refusal is None:
            raise zmq.Again
        return refusal

    def done(self) -> None:
        """Note that the peer has taken the connection."""
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None

    def close(self, *, linger_ms: int = 0) -> None:
        """Close the socket; what it has still to send has so many milliseconds."""
        self.done()
        self.socket.close(linger=linger_ms)

    def _dial(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        with contextlib.ExitStack() as undo:
            socket = self._make(curve=next(self._curves))
            undo.callback(socket.close, linger=0)
            try:
                monitor = socket.get_monitor_socket(_HANDSHAKES)
            except zmq.ZMQError as error:
                raise _no_socket(error) from error
            undo.callback(monitor.close, linger=0)
            socket.connect(self._endpoint.text)
            undo.pop_all()
        return socket, monitor


# Plain numbers: to combine zmq's flags, which are enums, takes as long as to send a frame.
NOW: Final = int(zmq.NOBLOCK)
SKIPPED_AT_ONCE: Final = 256
_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)


class Intake:
    """The input of a socket, message by message.

    Of a message with more frames than the protocol knows only the first ones are kept, and it is skipped in
    pieces: one peer with a million frames must not keep the others waiting.

    Of a `keyed` socket `sender` is the key by which the last message came.
    """

    __slots__ = ("_first", "_more", "_recv", "_skipping", "sender")

    def __init__(self, socket: zmq.Socket[bytes], *, keyed: bool = False) -> None:
        self.sender = ""
        self._recv = socket.recv
        self._first = self._receive_keyed if keyed else socket.recv
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
            frames = [self._first(flags)]
        except zmq.Again:
            return None
        while more(zmq.RCVMORE):
            frames.append(recv())
            if len(frames) == MAX_FRAMES:
                self._skipping = True
                self._skip()
                break
        return frames

    def _receive_keyed(self, flags: int) -> bytes:
        frame = self._recv(flags, copy=False)
        self.sender = str(frame.get("User-Id"))
        return frame.bytes

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
    """Sends answers of `LARGE_BYTES` or more by a ROUTER; a peer has few of them, until it takes them.

    They are `UNTAKEN_BYTES` and one more.  A peer that asks and reads nothing would else have `UNTAKEN` of them.
    """

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        self._router = router
        self._untaken: dict[bytes, list[tuple[zmq.MessageTracker, int]]] = {}
        self._sweep_at = SWEEP_AT

    def has_room(self, identity: bytes) -> bool:
        """Whether this peer may be sent one more."""
        untaken = self._untaken.get(identity)
        if untaken is None:
            return True
        untaken[:] = [(tracker, size) for tracker, size in untaken if not tracker.done]
        if not untaken:
            del self._untaken[identity]
        return sum(size for _, size in untaken) < UNTAKEN_BYTES

    def send(self, prefix: list[bytes], body: bytes) -> bool:
        """Send an answer, never waiting; False if the peer has gone or takes no more."""
        identity = prefix[0]
        if not self.has_room(identity):
            return False
        frame = zmq.Frame(body, track=True, copy=False, copy_threshold=0)
        if not send(self._router, prefix, frame, False):  # noqa: FBT003
            return False
        self._untaken.setdefault(identity, []).append((frame.tracker, len(body)))
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
