"""How a worker answers: requests in, responses out, no socket and no clock of its own.

`ids.next` mints in the current tick.  Once that is used up, requests are parked until the next one begins,
and then share it: each gets a run, if a short one.  Nobody is parked twice: where the next tick could not
give each waiting request an ID, the newest are told `overloaded` at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from zflake.core.layout import Layout
from zflake.core.mint import Mint
from zflake.core.timeline import tick_of, us_until
from zflake.errors import ProtocolError
from zflake.wire.codec import BadRequest, decode_request, encode_error, encode_result, packer
from zflake.wire.messages import PROTOCOL_VERSION, Code, Method, check_next, check_no_params

GONE_MS: Final = 10_000
"""For how long clients should not come back to a worker that shuts down."""


Asker: TypeAlias = Any
"""Whoever asked, in whatever form the caller knows him: it comes back with the answer."""


class Hold(Protocol):
    """What a handler needs of a machine ID, leased or static."""

    @property
    def mint(self) -> Mint | None:
        """The mint; None while there is no machine ID."""

    @property
    def store_id(self) -> str | None:
        """Whose cluster the machine ID belongs to; None where it belongs to none."""

    @property
    def retry_after_ms(self) -> int:
        """How long a caller should wait where no window is open."""


class Parked(NamedTuple):
    """An `ids.next` that waits for the next tick."""

    asker: Asker
    msgid: int
    asked: int
    deadline_us: int


@dataclass
class Figures:
    """What a worker has done since it started."""

    requests: int = 0
    ids: int = 0
    dropped: int = 0
    """Messages that were no requests and could not be answered, and answers whose asker had gone."""


class Handler:
    """Answers the requests of all clients from one mint.

    `now_us` gives the timeline's now (µs since the Unix epoch), or None while it is not known; `describe`
    gives what the worker says of itself, beside its figures.
    """

    def __init__(
        self, hold: Hold, now_us: Callable[[], int | None], describe: Callable[[], dict[str, Any]]
    ) -> None:
        self.figures = Figures()
        self.errors: Counter[str] = Counter()
        self.draining = False
        """Whether ID requests are refused, since the lease is about to be given back."""
        self._hold = hold
        self._now_us = now_us
        self._describe = describe
        self._parked: list[Parked] = []
        self._pack = packer()

    def handle(self, asker: Asker, body: bytes, arrived_us: int, local_us: int) -> bytes | None:
        """The answer to one request; None where it was parked, or must not be answered.

        `arrived_us` is when it came, and `local_us` what time it is, on the local clock.
        """
        self.figures.requests += 1
        try:
            msgid, method, params = decode_request(body)
            if method == "ids.next":
                count, timeout_ms, store_id = check_next(params)
                if store_id is not None and self._hold.store_id not in (None, store_id):
                    return self._refuse(msgid, Code.OTHER_CLUSTER, "this worker belongs to another cluster")
                return self._next(asker, msgid, count, arrived_us + timeout_ms * 1000, local_us)
            return self._other(msgid, method, params)
        except BadRequest as error:
            if not error.answerable:
                self.figures.dropped += 1
                return None
            return self._refuse(error.msgid, Code.BAD_REQUEST, str(error))
        except ProtocolError as error:
            return self._refuse(msgid, Code.BAD_REQUEST, str(error))

    def turn(self, local_us: int) -> list[tuple[Asker, bytes]]:
        """The answers to what was parked, once the tick that it waits for has begun."""
        mint = self._hold.mint
        # Who would wait for longer than the next tick (the clock was stepped back) is answered at once.
        if not self._parked or (mint is not None and 0 < self.wait_us() <= mint.layout.tick_us):
            return []
        parked, self._parked = self._parked, []
        answers = []
        left = 0 if mint is None else mint.layout.ids_per_tick
        for waiting in range(len(parked), 0, -1):
            asker, msgid, asked, deadline_us = parked[len(parked) - waiting]
            if deadline_us <= local_us:
                answers.append(
                    (asker, self._refuse(msgid, Code.TIMEOUT, "the time ran out; nothing was minted"))
                )
                continue
            share = max(1, min(asked, left // waiting))
            answer = self._mint(msgid, share)
            left -= share
            answers.append((asker, answer or self._refuse_for_now(msgid)))
        return answers

    def wait_us(self) -> int:
        """How long `turn` must wait for the next tick, in microseconds; only while something is parked."""
        mint, now_us = self._hold.mint, self._now_us()
        if mint is None or now_us is None:
            return 0
        opens = mint.opens(tick_of(mint.layout, now_us))
        return 0 if opens is None else us_until(mint.layout, opens, now_us)

    def load(self) -> dict[str, int]:
        """What a beat says of this worker."""
        figures = self.figures
        return {
            "requests": figures.requests,
            "ids": figures.ids,
            "parked": len(self._parked),
            "dropped": figures.dropped,
            "errors": self.errors.total(),
        }

    @property
    def parked(self) -> int:
        """How many requests wait for the next tick."""
        return len(self._parked)

    def _next(self, asker: Asker, msgid: int, count: int, deadline_us: int, local_us: int) -> bytes | None:
        if deadline_us <= local_us:
            return self._refuse(msgid, Code.TIMEOUT, "the time ran out; nothing was minted")
        if self.draining:
            return self._refuse(msgid, Code.UNAVAILABLE, "this worker is shutting down; ask another", GONE_MS)
        parked = self._parked
        if not parked and (answer := self._mint(msgid, count)) is not None:
            return answer
        mint, now_us = self._hold.mint, self._now_us()
        if mint is None or now_us is None:
            return self._refuse_for_now(msgid)
        now = tick_of(mint.layout, now_us)
        opens = mint.opens(now)
        if opens is None or opens > now + 1:
            return self._refuse_for_now(msgid)
        if len(parked) >= mint.layout.ids_per_tick:
            return self._refuse(
                msgid,
                Code.OVERLOADED,
                f"{len(parked)} requests wait for the next tick, which has no more IDs",
                mint.layout.tick_ms,
            )
        parked.append(Parked(asker, msgid, count, deadline_us))
        return None

    def _mint(self, msgid: int, count: int) -> bytes | None:
        mint, now_us = self._hold.mint, self._now_us()
        if mint is None or now_us is None:
            return None
        layout = mint.layout
        run = mint.take((now_us - layout.epoch_us) // layout.tick_us, count)  # tick_of(), without the call
        if run is None:
            return None
        self.figures.ids += run[2]
        return self._pack((1, msgid, None, run))

    def _refuse_for_now(self, msgid: int) -> bytes:
        return self._refuse(
            msgid,
            Code.LEASE_EXPIRED,
            "this worker holds no open window; ask another",
            self._hold.retry_after_ms,
        )

    def _refuse(
        self, msgid: int | None, code: Code, message: str, retry_after_ms: int | None = None
    ) -> bytes:
        self.errors[code] += 1
        return encode_error(msgid, code, message, retry_after_ms)

    def _other(self, msgid: int, method: str, params: list[Any]) -> bytes:
        answers = {Method.HELLO: self._hello, Method.PING: self._ping, Method.CLUSTER_STATUS: self._status}
        if method not in answers:
            return self._refuse(msgid, Code.UNKNOWN_METHOD, f"a worker has no method {method[:60]!r}")
        check_no_params(params)
        return encode_result(msgid, answers[Method(method)]())

    def _ping(self) -> dict[str, Any]:
        return {"now_us": self._now_us()}

    def _hello(self) -> dict[str, Any]:
        layout: Layout | None = None if self._hold.mint is None else self._hold.mint.layout
        return {
            "service": "worker",
            "protocol": PROTOCOL_VERSION,
            "layout": None if layout is None else layout.to_map(),
            "machine": None if self._hold.mint is None else self._hold.mint.machine,
            "store_id": self._hold.store_id,
            "now_us": self._now_us(),
            **self._describe(),
        }

    def _status(self) -> dict[str, Any]:
        return self._hello() | self.load() | {"errors": dict(self.errors)}
