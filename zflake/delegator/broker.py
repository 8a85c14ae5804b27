"""The broker: takes ID requests from clients to workers, and the answers back.  It knows no socket.

Three rules:

1. A client's envelope never leaves the broker.  A request travels under a tag, 16 random bytes, and an
   answer counts only from the worker that was given that tag, behind that worker's token, and once.  Everything
   else is counted and dropped: a peer may take the identity of a worker that has gone, and be given what was meant
   for that one, and a stranger's forged answer would be a duplicate key.
2. A worker has so much credit and no more: the requests that a frozen one can swallow are bounded, and are given
   to others as soon as it is found missing.  A later answer of its comes under a tag that is not in use.
3. A request waits no longer than its budget, in a queue that has an end.

The broker leaves what is to be sent in `outbox`.  Times are in microseconds on the delegator's local clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from zflake.core.lease import Token
from zflake.errors import ProtocolError
from zflake.wire.codec import Response, decode_response, encode_error, encode_request
from zflake.wire.methods import Code, Method

CREDIT: Final = 64
"""Requests that one worker may have under way."""
MAX_QUEUE: Final = 4096
"""Requests that may wait for a worker."""
OVERLOADED_MS: Final = 20
"""Milliseconds after which a client that found the queue full may come again."""
NO_WORKER_MS: Final = 250
"""The same for a client that found no worker at all."""
TAG_BYTES: Final = 16

# Answers that say something of the worker, not of the request: another worker may do better.
ELSEWHERE: Final = frozenset({Code.LEASE_EXPIRED, Code.UNAVAILABLE})


@dataclass(slots=True, eq=False)
class Job:
    """One client's request on its way."""

    client: list[bytes]
    """The client's envelope, up to and including the empty frame."""
    msgid: int
    count: int
    deadline_us: int


@dataclass(slots=True, eq=False)
class Peer:
    """A worker as the broker sees it."""

    identity: bytes
    token: Token = b""
    """The proof that each of its answers begins with."""
    key: str = ""
    """The key by which they come."""
    jobs: dict[bytes, Job] = field(default_factory=dict)
    """The requests that it has under way, by the proof and the tag that are to come back."""
    open: bool = False
    """Whether it takes more."""


class Outgoing(NamedTuple):
    """A message for the router to send."""

    prefix: list[bytes]
    body: bytes
    worker: bytes | None
    """The worker to `lose` if it can't be sent; None for an answer to a peer that asked."""


@dataclass
class BrokerCounts:
    """Counts of the broker's work since it started."""

    brokered: int = 0
    """Requests that a worker answered."""
    requeued: int = 0
    """Requests taken back from a worker that went missing or could not serve."""
    expired: int = 0
    """Requests whose budget ended here."""
    refused: int = 0
    """Requests that found the queue full, or no worker."""
    strays: int = 0
    """Answers that no client waits for: forged, late or repeated."""


class Broker:
    """Requests, the workers that may have them, and what is under way.  `draw(n)` gives n random bytes."""

    def __init__(self, draw: Callable[[int], bytes]) -> None:
        self.counts = BrokerCounts()
        self.outbox: list[Outgoing] = []
        self._draw = draw
        self._peers: dict[bytes, Peer] = {}
        self._line: OrderedDict[bytes, Peer] = OrderedDict()  # those that are open and have credit, in turn
        self._open = 0
        self._queue: deque[Job] = deque()

    def collect(self) -> list[Outgoing]:
        """The messages to send, which are the caller's from here on."""
        outbox = self.outbox
        if outbox:
            self.outbox = []
        return outbox

    # --- workers ---

    def join(self, identity: bytes, token: Token, local_us: int, key: str = "") -> None:
        """Give this worker requests from now on, or again; it is to show this token with each answer, by this key."""
        peer = self._peers.setdefault(identity, Peer(identity))
        if (peer.token, peer.key) != (token, key):
            peer.token, peer.key = token, key
            self._take_back(peer)  # the answers under way show another token
        if not peer.open:
            peer.open = True
            self._open += 1
        self._settle(peer)
        self._dispatch(local_us)

    def leave(self, identity: bytes) -> None:
        """Give this worker nothing more; what it has under way it may still answer."""
        peer = self._peers.get(identity)
        if peer is not None:
            self._close(peer)

    def lose(self, identity: bytes, local_us: int) -> None:
        """Forget a worker that has gone, and give what it had to others."""
        peer = self._peers.get(identity)
        if peer is None:
            return
        self._take_back(peer)
        self._close(peer)
        self._dispatch(local_us)

    def answer(
        self, identity: bytes, envelope: list[bytes], body: bytes, local_us: int, key: str = ""
    ) -> bool:
        """Take a worker's answer in, that came by `key`; `envelope` is the frames between its identity and the body.

        False if it counts for nothing.
        """
        peer = self._peers.get(identity)
        job = peer.jobs.get(envelope[0]) if peer is not None and len(envelope) == 2 else None  # noqa: PLR2004
        response = None if job is None else _read(body)
        if peer is None or peer.key != key or job is None or response is None or response.msgid != job.msgid:
            self.counts.strays += 1
            return False
        del peer.jobs[envelope[0]]
        if response.error is not None and response.error.code in ELSEWHERE:
            self._close(peer)  # until it says that it is ready again
            self._requeue([job])
        else:
            self.counts.brokered += 1
            self.outbox.append(Outgoing(job.client, body, None))
        self._settle(peer)
        self._dispatch(local_us)
        return True

    # --- clients ---

    def submit(self, client: list[bytes], msgid: int, count: int, deadline_us: int, local_us: int) -> None:
        """Take a client's request for `count` IDs in."""
        job = Job(client, msgid, count, deadline_us)
        if deadline_us <= local_us:
            self._expire(job)
        elif not self._open:
            self._refuse(job, Code.UNAVAILABLE, "no worker is ready", NO_WORKER_MS)
        elif len(self._queue) >= MAX_QUEUE:
            self._refuse(job, Code.OVERLOADED, f"{MAX_QUEUE} requests wait already", OVERLOADED_MS)
        else:
            self._queue.append(job)
            self._dispatch(local_us)

    # --- time ---

    def sweep(self, local_us: int) -> None:
        """Answer the requests that have outlived their budget; to be called every now and then."""
        for peer in list(self._peers.values()):
            for tag, job in list(peer.jobs.items()):
                if job.deadline_us <= local_us:
                    del peer.jobs[tag]
                    self._expire(job)
            self._settle(peer)
        waiting, self._queue = self._queue, deque()
        for job in waiting:
            if job.deadline_us <= local_us:
                self._expire(job)
            elif not self._open:
                self._refuse(job, Code.UNAVAILABLE, "no worker is ready any more", NO_WORKER_MS)
            else:
                self._queue.append(job)
        self._dispatch(local_us)

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is under way."""
        return bool(self._queue) or any(peer.jobs for peer in self._peers.values())

    @property
    def open(self) -> int:
        """Workers that take requests."""
        return self._open

    def is_open(self, identity: bytes) -> bool:
        """Whether this worker takes requests."""
        peer = self._peers.get(identity)
        return peer is not None and peer.open

    def in_flight(self, identity: bytes) -> int:
        """Requests that a worker has under way."""
        peer = self._peers.get(identity)
        return 0 if peer is None else len(peer.jobs)

    # --- inside ---

    def _close(self, peer: Peer) -> None:
        if peer.open:
            peer.open = False
            self._open -= 1
        self._line.pop(peer.identity, None)
        self._settle(peer)

    def _settle(self, peer: Peer) -> None:
        """Line a peer up that has credit; forget one that neither takes nor owes anything."""
        if peer.open:
            if len(peer.jobs) < CREDIT:
                self._line[peer.identity] = peer
        elif not peer.jobs:
            self._peers.pop(peer.identity, None)

    def _dispatch(self, local_us: int) -> None:
        while self._queue and self._line:
            _, peer = self._line.popitem(last=False)
            job = self._queue.popleft()
            if job.deadline_us <= local_us:
                self._expire(job)
            else:
                tag = self._draw(TAG_BYTES)
                peer.jobs[peer.token + tag] = job
                left_ms = max(1, (job.deadline_us - local_us) // 1000)
                body = encode_request(job.msgid, Method.IDS_NEXT, (job.count, left_ms))
                self.outbox.append(Outgoing([peer.identity, tag, b""], body, peer.identity))
            self._settle(peer)

    def _take_back(self, peer: Peer) -> None:
        self._requeue(list(peer.jobs.values()))
        peer.jobs.clear()

    def _requeue(self, jobs: list[Job]) -> None:
        self.counts.requeued += len(jobs)
        self._queue.extendleft(reversed(jobs))

    def _expire(self, job: Job) -> None:
        self.counts.expired += 1
        self._say(job, Code.TIMEOUT, "the time ran out before a worker answered", None)

    def _refuse(self, job: Job, code: Code, message: str, retry_after_ms: int) -> None:
        self.counts.refused += 1
        self._say(job, code, message, retry_after_ms)

    def _say(self, job: Job, code: Code, message: str, retry_after_ms: int | None) -> None:
        self.outbox.append(Outgoing(job.client, encode_error(job.msgid, code, message, retry_after_ms), None))


def _read(body: bytes) -> Response | None:
    try:
        return decode_response(body)
    except ProtocolError:
        return None
