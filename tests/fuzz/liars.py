"""Liars: servers of workers and of clients, which get answers that no sound daemon gives.

`Liar` is the delegator of one worker.  It is sound as long as nobody says otherwise, so that the worker holds a lease;
an episode makes it lie, and pushes requests and answers that were not asked for down the worker's connections.

`Slot` is delegator and worker in one, for one client, generator or tool after the other.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import zmq

from tests.fuzz.site import TTL_S, Site, bound_at, soon
from tests.fuzz.strangers import SETTLE_S, Tally, Wrong, checked
from tests.fuzz.values import ADDRESSES, Values, pack
from zflake.core.layout import DEFAULT
from zflake.core.timeline import tick_of
from zflake.errors import ProtocolError
from zflake.wire.codec import (
    BUNDLE_HEAD,
    REQUEST_HEAD,
    BadRequest,
    decode_bundle,
    decode_request,
    encode_error,
    encode_result,
)
from zflake.wire.frames import MAX_REQUEST_BYTES, split
from zflake.wire.ids import check_run
from zflake.wire.methods import Code, Method

STORE: Final = "the liar's store"
TTL: Final = TTL_S * 1_000


def now_us() -> int:
    return time.time_ns() // 1_000


def hello(address: str) -> dict[str, Any]:
    return {
        "service": "delegator",
        "protocol": 1,
        "version": "0",
        "layout": DEFAULT.to_map(),
        "store_id": STORE,
        "address": address,
        "pid": 1,
        "uptime_ms": 1,
        "now_us": now_us(),
    }


def lease(machine: int, address: str) -> dict[str, Any]:
    return {
        "machine": machine,
        "address": address,
        "name": "w",
        "host": "h",
        "pid": 1,
        "gen": 1,
        "ends_in_ms": 1_000,
    }


def status(address: str) -> dict[str, Any]:
    load = dict.fromkeys(("requests", "ids", "parked", "dropped", "errors", "in_flight"), 1)
    counts = ("workers", "queued", "brokered", "requeued", "expired", "refused", "strays")
    delegator = {"name": "d", "address": address, "marked_ms_ago": 1, "lead_ms": 1}
    return hello(address) | {
        "requests": {"ids.next": 1, "ping": 2},
        "errors": {"timeout": 1},
        "dropped": 0,
        "store": "sqlite:///x",
        "ttl_ms": 1,
        "machines": [0, 9],
        "outage": None,
        "granting_in_ms": 0,
        "lead_ms": 0,
        "delegators": [delegator, delegator],
        "leases": [lease(5, address) | {"worker": load}, lease(6, "") | {"worker": None}],
        "broker": dict.fromkeys(counts, 1),
        "backlog": 0,
        "stale": 0,
    }


class Liar:
    """A delegator of one worker's.  `windows` is what it has granted, soundly or not."""

    def __init__(self, site: Site, tally: Tally) -> None:
        self.socket = site.socket(zmq.ROUTER, "delegator", site.liar)
        site.liar = bound_at(self.socket)
        self._site = site
        self.tally = tally
        self.values: Values | None = None
        """The lies' source; None while it is sound."""
        self.owed = Counter[tuple[tuple[bytes, ...], int | None]]()
        self.windows: list[tuple[int, int]] = []
        self.firsts: list[int] = []
        """First IDs of the runs that the worker answered with."""
        self.link = self.lease = b""
        """The identities of the worker's two connections."""
        self._end = 0
        self._gen = self._machine = 0
        self._granted: dict[bytes, dict[str, Any]] = {}

    def attend(self) -> None:
        """Answer what has come."""
        while True:
            try:
                identity, *envelope, body = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if body[:2] == REQUEST_HEAD:
                self._answer(identity, envelope, body)
            elif body[:2] == BUNDLE_HEAD:
                for proof, answer in decode_bundle(body):
                    self._take((proof[16:], b""), answer)
            elif len(envelope) == 2:  # the tag, behind the token, and the empty frame
                self._take((envelope[0][16:], b""), body)
            else:
                self._take(tuple(envelope), body)

    def play(self, draw: random.Random, messages: int, attend: Callable[[], None]) -> None:
        """Lie for so many messages."""
        self._wait(lambda: self.link and self.lease, attend, "the worker that is lied to registers")
        self.values = values = Values(draw)
        began, n = self.tally.sent, 0
        try:
            while self.tally.sent - began < messages:
                self._push(values)
                n += 1
                if n % 16 == 0:
                    attend()
        finally:
            self.values = None
        self._wait(lambda: not self.owed, attend, "the worker that is lied to answers what it owes")

    # --- inside ---

    def _wait(self, condition: Callable[[], Any], attend: Callable[[], None], what: str) -> None:
        deadline = soon(4 * SETTLE_S)
        while not condition():
            if not self._site.workers["lied-to"].alive:
                raise Wrong("the worker that is lied to has ended")
            self.socket.poll(5)
            attend()
            if time.monotonic() > deadline:
                raise Wrong(f"{what}: not in time; {list(self.owed)[:3]}")

    def _push(self, values: Values) -> None:
        """Send what was not asked for: a brokered request, or an answer, to either connection."""
        draw = values.draw
        if draw.randrange(10) == 0:
            body = values.response(draw.randrange(40), {"now_us": now_us()})
            self._send(draw.choice((self.link, self.lease)), [b"", body])
            return
        if draw.randrange(3) == 0:
            body = pack([0, values.msgid(), Method.IDS_NEXT.value, values.params(Method.IDS_NEXT)])
        else:
            body = values.body()
        frames = [draw.randbytes(16), b"", body]
        if draw.randrange(8) == 0:
            frames = values.frames(body)
        self._send(self.link, frames)

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        if max(map(len, frames)) > MAX_REQUEST_BYTES:
            return  # that would close the connection
        self.tally.sent += 1
        self.socket.send_multipart([identity, *frames])
        if identity != self.link or frames[-1][:2] != REQUEST_HEAD:
            return
        # A DEALER has no identity of the peer's before the frames, so `split` sees them as they are.
        if (message := split(frames)) is None:
            return
        prefix, body = message
        try:
            msgid, _, _ = decode_request(body)
        except BadRequest as error:
            if not error.answerable:
                return
            msgid_ = error.msgid
        else:
            msgid_ = msgid
        self.owed[tuple(prefix), msgid_] += 1

    def _take(self, envelope: tuple[bytes, ...], body: bytes) -> None:
        response = checked(body)
        key = envelope, response.msgid
        if self.owed[key] <= 0:
            raise Wrong(
                f"the worker that is lied to answers what it was not asked: {envelope} {body[:100]!r}"
            )
        self.owed[key] -= 1
        if not self.owed[key]:
            del self.owed[key]
        self.tally.answers["results" if response.error is None else response.error.code] += 1
        if type(response.result) is list:
            self.firsts.append(check_run(response.result, 1_000_000)[0])

    def _answer(self, identity: bytes, envelope: list[bytes], body: bytes) -> None:
        msgid, method, params = decode_request(body)
        if method.startswith("worker."):
            if identity != self.link:
                # It connected anew, since it got no sound answer for a while: what it had not answered is lost.
                self.link = identity
                self.owed.clear()
        else:
            self.lease = identity
        sound = self._sound(method, params)
        answer = encode_result(msgid, sound)
        values = self.values
        # Time is lied about last: the worker would not be there for the rest.
        if values is not None and values.chance(0.3):
            answer = values.response(msgid, sound)
            self._note(answer)
        if values is None or not values.chance(0.03):
            self._send(identity, [*envelope, answer])

    def _sound(self, method: str, params: list[Any]) -> dict[str, Any]:
        match method:
            case Method.HELLO:
                return hello("")
            case Method.LEASE_ACQUIRE:
                return self._grant(method, params[0])
            case Method.LEASE_RENEW:
                return self._grant(method, params[3])
            case Method.LEASE_RELEASE:
                return {"machine": params[0], "fence": params[3] or 0, "now_us": now_us()}
        return {"now_us": now_us()}

    def _grant(self, method: str, token: bytes) -> dict[str, Any]:
        known = self._granted.get(token)
        if known is None:
            now = tick_of(DEFAULT, now_us())
            # The next tenancy has another machine ID, so that its window need not begin after the last one.
            fresh = method == Method.LEASE_ACQUIRE
            self._machine += fresh
            start = now if fresh else max(now, self._end)
            self._end = max(start, now + TTL) + 1
            self._gen += 1
            self.windows.append((start, self._end))
            known = {
                "machine": self._machine % DEFAULT.machines,
                "gen": self._gen,
                "start": start,
                "end": self._end,
                "token": token,
                "layout": DEFAULT.to_map(),
                "ttl": TTL,
                "store_id": STORE,
            }
            self._granted = {token: known}
        return known | {"now_us": now_us()}

    def _note(self, answer: bytes) -> None:
        """A spoilt grant may be one all the same."""
        try:
            result = checked(answer).result
        except Wrong:
            return
        if type(result) is dict and type(result.get("start")) is type(result.get("end")) is int:
            self.windows.append((result["start"], result["end"]))


class Slot:
    """The server of one client after the other, which it tells lies to."""

    def __init__(self, site: Site, tally: Tally) -> None:
        self.socket = site.socket(zmq.ROUTER, "delegator", "tcp://127.0.0.1:*")
        self.address = bound_at(self.socket)
        self.tally = tally
        self.values: Values | None = None

    def attend(self) -> None:
        """Answer what has come."""
        while True:
            try:
                identity, *envelope, body = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                msgid, method, params = decode_request(body)
            except ProtocolError as error:
                raise Wrong(f"a client sent what is no request: {error}, {body[:80]!r}") from error
            if self.values is not None:
                self._answer([identity, *envelope], msgid, method, params, self.values)

    def _answer(
        self, prefix: list[bytes], msgid: int, method: str, params: list[Any], values: Values
    ) -> None:
        draw = values.draw
        sound = self._sound(method, params, values)
        # Most clients must come past the greeting.
        if values.chance(0.85 if method == Method.HELLO else 0.45):
            body = encode_result(msgid, sound)
        else:
            body = values.response(msgid, sound)
        match draw.randrange(40):
            case 0:
                return
            case 1:
                prefix = [*prefix, draw.choice((b"", b"x"))]
            case 2:
                body = encode_result(msgid ^ 1, sound)
            case 3:
                body = encode_error(None, Code.BAD_REQUEST, values.text().encode(errors="replace").decode())
            case 4:
                body = draw.choice((b"\x94\x01\x01\xc0" + b"\xdd\x00\x0f\xff\xff" * 900, bytes(1 << 20)))
            case 5:
                self.socket.send_multipart([*prefix, body, b"more"])
        self.socket.send_multipart([*prefix, body])
        self.tally.sent += 1

    def _sound(self, method: str, params: list[Any], values: Values) -> Any:
        now = tick_of(DEFAULT, now_us())
        match method:
            case Method.HELLO:
                return hello(self.address)
            case Method.IDS_NEXT:
                return [DEFAULT.compose(now, 1, 0), 1, min(params[0], values.draw.choice((1, 100, 4_096)))]
            case Method.CLUSTER_WORKERS:
                addresses = [self.address] * 3 + [values.draw.choice(ADDRESSES)] * values.draw.randrange(2)
                return {"workers": [lease(k, each) for k, each in enumerate(addresses)], "now_us": now_us()}
            case Method.CLUSTER_STATUS:
                return status(self.address) | {"next": values.draw.choice((None, None, 6))}
            case Method.CLUSTER_TRACE:
                span = lease(1, self.address) | {"start": 0, "end": 10}
                return {"span": values.draw.choice((span, None)), "since": 0, "now_us": now_us()}
            case Method.LEASE_RELEASE:
                return {"machine": params[0], "fence": 0, "now_us": now_us()}
            case Method.LEASE_ACQUIRE | Method.LEASE_RENEW:
                token, end = (
                    (params[0], now) if method == Method.LEASE_ACQUIRE else (params[3], params[4] or now)
                )
                start = max(now, end)
                return {
                    "machine": 1,
                    "gen": 1,
                    "start": start,
                    "end": start + values.draw.choice((1, 50, 1_000)),
                    "token": token,
                    "layout": DEFAULT.to_map(),
                    "ttl": values.draw.choice((1, 50, 1_000)),
                    "store_id": STORE,
                    "now_us": now_us(),
                }
        return {"now_us": now_us()}
