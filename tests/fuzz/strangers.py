"""Strangers: peers of a daemon that send what they should not, and count what they are owed for it.

An episode is one stranger's visit, with its own `Random`.  The tactics:

requests     each method, its params spoilt by type and by edge values; spoilt messages; bytes; frames
leases       acquire, ready, heartbeats, renewals, release; between them the same spoilt
answers      a registered worker whose answers come forged, twice, to other tags, in bundles, before the sound one
identities   peers by the dozen with identities such as ROUTERs make, and each other's
bytes        TCP connections that speak ZMTP, more or less

Each request that can be read is to be answered, by a result or a sound error, once, behind the envelope in which it
came; and each ID that comes back is kept, to be compared with all the others.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import zmq

from tests.fuzz.site import Site, soon
from tests.fuzz.values import LIE, Values, greeting, pack
from tests.system.daemons import status_of
from zflake.core.layout import Layout
from zflake.core.mint import Mint
from zflake.core.timeline import tick_of
from zflake.errors import ProtocolError, ZflakeError
from zflake.wire.codec import (
    BUNDLE_HEAD,
    REQUEST_HEAD,
    RESPONSE_HEAD,
    BadRequest,
    Response,
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_result,
)
from zflake.wire.frames import MAX_REQUEST_BYTES, split
from zflake.wire.ids import check_run
from zflake.wire.methods import Code, Method

SETTLE_S: Final = 8.0
"""Seconds in which all that is owed must have come: a request may wait its own time, then for a worker's end."""
ASKED: Final = range(3_000_000_000, 4_000_000_000)
"""Msgids of requests that are sound on purpose; no other is drawn from there."""
Owed = tuple[tuple[bytes, ...], int | None]
"""Envelope and msgid of an answer."""


class Wrong(Exception):  # noqa: N818
    """Something that must hold did not; in which episode, if not in the present one."""

    def __init__(self, what: str, episode: int | None = None) -> None:
        super().__init__(what)
        self.episode = episode


class Tally:
    """What the whole run has seen."""

    def __init__(self) -> None:
        self.sent = 0
        self.answers = Counter[str]()
        self.runs = array("Q")
        """First ID and length of each run that a daemon gave."""
        self.missing = 0
        """Answers that did not come."""


def owed(frames: list[bytes], service: str) -> Owed | None:
    """The answer that these frames are owed by a daemon; None if they are to be dropped."""
    message = split([b"identity", *frames])
    if message is None:
        return None
    prefix, body = message
    if service == "delegator" and body[:2] in (RESPONSE_HEAD, BUNDLE_HEAD):
        return None
    try:
        msgid, _, _ = decode_request(body)
    except BadRequest as error:
        return (tuple(prefix[1:]), error.msgid) if error.answerable else None
    return tuple(prefix[1:]), msgid


def checked(body: bytes) -> Response:
    """A daemon's answer; raises `Wrong` if it is not sound."""
    try:
        response = decode_response(body)
    except ProtocolError as error:
        raise Wrong(f"an answer that is none: {error}, {body[:80]!r}") from error
    if response.error is not None and response.error.code not in set(Code):
        raise Wrong(f"an error of no known code: {response.error}")
    return response


class Stranger:
    """One DEALER, what it is owed, and the requests that are brokered to it."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        name = episode.draw.randbytes(12)
        episode.values.peers.append(name)
        self.socket = episode.site.socket(zmq.DEALER, "stranger", episode.address, name)
        self.owed = Counter[Owed]()
        self.brokered: deque[list[bytes]] = deque()
        self._answers: dict[int, Response] = {}
        self._counts: dict[int, int] = {}

    def send(self, frames: list[bytes]) -> None:
        """Send, and note what is owed for it."""
        if max(map(len, frames)) > MAX_REQUEST_BYTES:
            return  # that would close the connection
        deadline = soon(SETTLE_S)
        while True:
            try:
                self.socket.send_multipart(frames, zmq.NOBLOCK)
                break
            except zmq.Again:
                self._episode.attend(1)
                if time.monotonic() > deadline:
                    raise Wrong(f"{self._episode.target} takes nothing in") from None
        self._episode.tally.sent += 1
        if (answer := owed(frames, self._episode.service)) is not None:
            self.owed[answer] += 1

    def request(self, method: str, *params: Any) -> int:
        """Send a sound request; gives its msgid."""
        msgid = self._episode.next_msgid()
        if method == Method.IDS_NEXT:
            self._counts[msgid] = params[0]
        self.send([b"", encode_request(msgid, method, params)])
        return msgid

    def ask(self, method: str, *params: Any) -> Response:
        """Send a sound request and wait for its answer."""
        msgid = self.request(method, *params)
        self._answers.pop(msgid, None)
        deadline = soon(SETTLE_S)
        while msgid not in self._answers:
            self._episode.attend(5)
            if time.monotonic() > deadline:
                raise Wrong(f"{self._episode.target} does not answer {method} {params}")
        return self._answers.pop(msgid)

    def drain(self) -> None:
        """Take in what has come."""
        while True:
            try:
                *envelope, body = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if body[:2] == REQUEST_HEAD:
                self.brokered.append([*envelope, body])
                continue
            response = checked(body)
            key = tuple(envelope), response.msgid
            if self.owed[key] <= 0:
                raise Wrong(f"an answer that nobody is owed: {envelope} {body[:200]!r}")
            self.owed[key] -= 1
            if not self.owed[key]:
                del self.owed[key]
            self._note(response)

    def _note(self, response: Response) -> None:
        tally, msgid = self._episode.tally, response.msgid
        tally.answers["results" if response.error is None else response.error.code] += 1
        if msgid is None:
            return
        if msgid in ASKED:
            self._answers[msgid] = response
        count = self._counts.pop(msgid, None)
        result = response.result
        if count == LIE or type(result) is not list:
            return
        # Spoilt requests may be sound ones of another count.
        first, _, length = check_run(result, count or 1_000_000)
        tally.runs.extend((first, length))


class Episode:
    """A visit to one target; `messages` is how many it sends, about."""

    def __init__(
        self,
        site: Site,
        target: str,
        draw: random.Random,
        tally: Tally,
        attend: Callable[[], None],
        *,
        messages: int,
    ) -> None:
        self.site, self.target, self.draw, self.tally, self.messages = site, target, draw, tally, messages
        self.service, self.daemon = site.targets[target]
        self.address = self.daemon.address
        self.values = Values(draw)
        self.store_id = site.store_ids.get(target.removesuffix("-worker"), "")
        self._attend = attend
        self._strangers: list[Stranger] = []
        self._workers: list[FalseWorker] = []
        self._msgid = ASKED.start

    def play(self, tactic: str) -> None:
        """Do it, then wait until all is settled."""
        try:
            getattr(self, f"_{tactic}")()
            for worker in self._workers:
                worker.end()
            self._settle()
        finally:
            for stranger in self._strangers:
                stranger.socket.close(linger=0)

    def next_msgid(self) -> int:
        self._msgid += 1
        return self._msgid

    def attend(self, wait_ms: int) -> None:
        """Take in what has come to anybody here, or wait so long for it."""
        if wait_ms:
            if not self.daemon.alive:
                raise Wrong("it has ended")
            poller = zmq.Poller()
            for stranger in self._strangers:
                poller.register(stranger.socket, zmq.POLLIN)
            poller.poll(wait_ms)
        for stranger in self._strangers:
            stranger.drain()
        for worker in self._workers:
            worker.serve()
        self._attend()

    def stranger(self) -> Stranger:
        self._strangers.append(Stranger(self))
        return self._strangers[-1]

    # --- tactics ---

    def _requests(self) -> None:
        some = [self.stranger() for _ in range(3)]
        values = self.values
        for _ in self._many():
            self.draw.choice(some).send(values.frames(values.body()))

    def _leases(self) -> None:
        stranger, values = self.stranger(), self.values
        machines: dict[bytes, tuple[int, int]] = {}
        for n in self._many():
            if n % 40 == 0:
                token = self.draw.randbytes(16)
                holder = [values.name(), values.name(), 1, values.address()]
                answer = stranger.ask(Method.LEASE_ACQUIRE, token, *holder)
                if answer.error is None:
                    machines[token] = answer.result["machine"], answer.result["gen"]
                    values.tokens.append(token)
            method = self.draw.choice((Method.LEASE_RENEW, Method.LEASE_RELEASE, *Method))
            params = values.params(method)
            if machines and method in (Method.LEASE_RENEW, Method.LEASE_RELEASE):
                token = self.draw.choice(list(machines))
                machine, gen = machines[token]
                params[:2] = machine, token
                if method == Method.LEASE_RENEW:
                    params[2:] = gen, self.draw.choice((token, self.draw.randbytes(16)))
            params = values.spoil(params) if values.chance(0.7) else params
            body = pack([0, values.msgid(), method.value, params])
            stranger.send([b"", values.spoil_bytes(body) if values.chance(0.1) else body])

    def _answers(self) -> None:
        worker = FalseWorker.start(self, self.stranger())
        clients = [self.stranger() for _ in range(2)]
        other = self.stranger()
        for _ in self._many():
            match self.draw.randrange(10):
                case 0 | 1 | 2 | 3 | 4:
                    count = self.draw.choice((1, 1, 10, 5_000, LIE))
                    self.draw.choice(clients).request(
                        Method.IDS_NEXT, count, self.draw.choice((50, 200)), self.store_id or None
                    )
                case 5:
                    other.send(self.values.frames(self.values.body()))
                case 6:
                    other.send(worker.forgery() if worker is not None else [b""])
                case _:
                    if worker is None or not worker.act():
                        worker = FalseWorker.start(self, self.stranger())

    def _identities(self) -> None:
        values = self.values
        some: list[bytes] = []
        for n in self._many():
            if n % 5 == 0:
                # Two of one identity: only one of them is heard, so neither is owed anything.
                name = some[-1] if some and values.chance(0.3) else values.identity()
                some.append(name)
                with contextlib.closing(self.site.socket(zmq.DEALER, "stranger", self.address, name)) as peer:
                    for _ in range(5):
                        with contextlib.suppress(zmq.Again):
                            frames = [frame[:MAX_REQUEST_BYTES] for frame in values.frames(values.body())]
                            peer.send_multipart(frames, zmq.NOBLOCK)
                            self.tally.sent += 1
                    peer.poll(1)
        self.stranger().ask(Method.PING)

    def _bytes(self) -> None:
        # Frames that are too long come this way only: a libzmq that closes a socket while its peer hangs up in the midst
        # of a large message aborts (session_base.cpp, clean_pipes), and that would be this process.
        host, port = self.address.removeprefix("tcp://").split(":")
        for _ in range(max(1, self.messages // 10)):
            body = greeting(self.values, self.values.body)
            self.tally.sent += 1
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as peer:
                for at in range(0, len(body), 5_000):
                    peer.sendall(body[at : at + 5_000])
                peer.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", self.draw.randrange(2), 0)
                )
            self._attend()
        self.stranger().ask(Method.PING)

    # --- inside ---

    def _many(self) -> Iterator[int]:
        began = self.tally.sent
        n = 0
        while self.tally.sent - began < self.messages:
            yield n
            n += 1
            if n % 16 == 0:
                self.attend(0)

    def _settle(self) -> None:
        for stranger in list(self._strangers):
            stranger.ask(Method.PING)  # behind all else in its pipe
        deadline = soon(SETTLE_S)
        while any(stranger.owed for stranger in self._strangers) and time.monotonic() < deadline:
            self.attend(20)
        self.tally.missing += sum(stranger.owed.total() for stranger in self._strangers)
        stale = sum(
            status_of(delegator.address).get("stale", 0) for delegator in self.site.delegators.values()
        )
        if self.tally.missing > stale:
            some = [answer for stranger in self._strangers for answer in stranger.owed][:3]
            raise Wrong(
                f"{self.tally.missing} requests were not answered, such as {some}; {stale} were too old to be"
            )


class FalseWorker:
    """A worker with a lease of its own, whose sound answers are sound, and whose others must count for nothing."""

    def __init__(self, episode: Episode, stranger: Stranger, grant: dict[str, Any]) -> None:
        self._episode, self._stranger = episode, stranger
        self._machine, self._token, self._gen = grant["machine"], grant["token"], grant["gen"]
        self._shown = self._token
        layout = Layout.from_map(grant["layout"])
        self._mint = Mint(layout, self._machine)
        self._mint.grant(grant["start"], grant["end"])
        self._offset_us = grant["now_us"] - time.monotonic_ns() // 1_000
        self._waiting: list[tuple[bytes, int, int]] = []
        self._seen: deque[list[bytes]] = deque(maxlen=8)
        self._beat_at = 0.0
        self._closed = False  # by an answer of its own

    @classmethod
    def start(cls, episode: Episode, stranger: Stranger) -> FalseWorker | None:
        """A worker with a machine ID; None if there is none to be had now."""
        token = episode.draw.randbytes(16)
        answer = stranger.ask(Method.LEASE_ACQUIRE, token, "false", "host", 1, "")
        if answer.error is not None:
            return None
        worker = cls(episode, stranger, answer.result)
        if stranger.ask(Method.WORKER_READY, worker._machine, token).error is not None:
            return None
        episode._workers.append(worker)
        return worker

    def act(self) -> bool:
        """Do something of one's own; False at the end."""
        draw, stranger, values = self._episode.draw, self._stranger, self._episode.values
        if self._closed or draw.randrange(12) == 0:
            self._closed = False
            stranger.request(Method.WORKER_READY, self._machine, self._shown)
            return True
        match draw.randrange(11):
            case 1:
                load = dict.fromkeys(("requests", "ids", "parked", "dropped", "errors"), 1)
                params = [load, self._shown]
                spoilt = values.spoil(params)
                # A heartbeat with the token, or nothing that a release could be made of.
                stranger.send([b"", pack([0, values.msgid(), Method.WORKER_HEARTBEAT.value, spoilt])])
            case 2:
                following = draw.randbytes(16)
                answer = stranger.ask(Method.LEASE_RENEW, self._machine, self._token, self._gen, following)
                if answer.error is None:
                    self._token, self._gen = following, answer.result["gen"]
                    with contextlib.suppress(ZflakeError):
                        self._mint.grant(answer.result["start"], answer.result["end"])
            case 3 if values.chance(0.1):
                self.end()
                stranger.ask(Method.WORKER_LEAVE, self._shown)
                last = self._mint.close()
                stranger.ask(Method.LEASE_RELEASE, self._machine, self._token, None, last)
                self._episode._workers.remove(self)
                return False
            case _:
                stranger.send(self.forgery())
        return True

    def forgery(self) -> list[bytes]:
        """An answer that is to count for nothing: of another tag, token, msgid, or one that has come before."""
        draw, values = self._episode.draw, self._episode.values
        forged = values.forged_run()
        tag, msgid, _ = (
            draw.choice(self._waiting) if self._waiting else (draw.randbytes(16), values.msgid(), 1)
        )
        proof = self._shown + tag
        body = encode_result(msgid, forged)
        match draw.randrange(9):
            case 0:
                return [tag, b"", body]
            case 1:
                return [draw.randbytes(16) + tag, b"", body]
            case 2:
                return [self._shown + draw.randbytes(16), b"", body]
            case 3:
                return [proof, b"", encode_result(msgid ^ 1, forged)]
            case 4:
                return [proof, b"", pack([1, msgid, values.value(), forged])[:-1]]
            case 5:
                return [proof, proof, b"", body] if values.chance(0.5) else [b"", body]
            case 6 if self._seen:
                return draw.choice(self._seen)
            case 7:
                pairs = [(tag, body), (proof, b"\xc1"), (self._shown, body), (b"", b""), (proof, body[:-1])]
                return [b"", values.bundle(draw.sample(pairs, draw.randrange(6)))]
        return (
            [values.blob(), b"", body]
            if values.chance(0.5)
            else [b"", values.bundle([(values.blob(), body)] * 64)]
        )

    def serve(self) -> None:
        """Answer what was brokered, most of it at once and soundly."""
        stranger, draw, values = self._stranger, self._episode.draw, self._episode.values
        if time.monotonic() >= self._beat_at:
            self._beat_at = soon(0.2)
            load = dict.fromkeys(("requests", "ids", "parked", "dropped", "errors"), 1)
            stranger.request(Method.WORKER_HEARTBEAT, load, self._shown)
        while stranger.brokered:
            *envelope, body = stranger.brokered.popleft()
            msgid, method, (count, *_) = decode_request(body)
            if len(envelope) != 2 or method != Method.IDS_NEXT:
                raise Wrong(f"a worker was sent {envelope} {body!r}")
            self._waiting.append((envelope[0], msgid, count))
        if len(self._waiting) > 1 and values.chance(0.3):
            answers = [self._sound(*self._waiting.pop()) for _ in range(len(self._waiting))]
            stranger.send([b"", pack([3, [[frames[0], frames[2]] for frames in answers]])])
            self._seen.extend(answers)
        while self._waiting:
            match draw.randrange(6):
                case 0:
                    stranger.send(self.forgery())
                case 1:
                    break  # later
                case _:
                    self._answer()

    def end(self) -> None:
        """Answer all that waits."""
        self._episode.attend(0)
        while self._waiting:
            self._answer()

    def _answer(self) -> None:
        answer = self._sound(*self._waiting.pop())
        self._stranger.send(answer)
        self._seen.append(answer)

    def _sound(self, tag: bytes, msgid: int, count: int) -> list[bytes]:
        """The answer of a sound worker: a run of a window of its own, or that it has none."""
        values, proof = self._episode.values, self._shown + tag
        if count == LIE and msgid in ASKED:
            # Its own; a worker may lie about IDs, and hurts those who believe it.
            return [proof, b"", pack([1, msgid, None, values.value()])]
        timeline_us = time.monotonic_ns() // 1_000 + self._offset_us
        run = self._mint.take(tick_of(self._mint.layout, timeline_us), count)
        if run is None or values.chance(0.1):
            self._closed = True
            return [proof, b"", encode_error(msgid, Code.LEASE_EXPIRED, "no window", 20)]
        return [proof, b"", encode_result(msgid, run)]


TACTICS: Final[dict[str, dict[str, int]]] = {
    "delegator": {"requests": 8, "leases": 5, "answers": 9, "identities": 2, "bytes": 2},
    "worker": {"requests": 16, "identities": 2, "bytes": 2},
}
"""Tactics by the service of the target, and their weights."""
