"""Values, messages and frames, drawn from the protocol and then spoilt.  Pure: all chance comes from one `Random`."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgpack

from zflake.core.layout import DEFAULT
from zflake.core.lease import TOKEN_BYTES
from zflake.wire.codec import BUNDLE, REQUEST, RESPONSE
from zflake.wire.dispatch import METHODS
from zflake.wire.frames import MAX_REQUEST_BYTES
from zflake.wire.methods import Code, Method

DEEP: Final = 10_000
"""Arrays within each other in the deepest values."""
FORGER: Final = 1_023
"""A machine ID that nobody has: an ID with it is one that no worker minted."""
LIE: Final = 777_777
"""A count by which a stranger asks for IDs that it will not believe."""
PATIENCE_MS: Final = 1_500
"""Milliseconds that a stranger's sound ID requests wait at most."""
KEPT: Final = 64
"""Messages of before that are spliced."""
ESCAPES: Final = (
    *(
        "\0",
        "\x1b[2J\x1b]0;x\7",
        "\r\n\n",
        "\u202e",
        "\u2028",
        "\ud800",
        "\U000e0001",
        "[/bold]",
        ":bee:",
        "<b>",
    ),
    *('"} x{y="', "%s%n", "../../x", "é", "\U0001f41d"),
)
"""Texts that do something to a terminal, a log, an encoding or a markup."""
ADDRESSES: Final = (
    *(
        "tcp://127.0.0.1:1",
        "tcp://*:1",
        "tcp://0.0.0.0:1",
        "tcp://[::]:1",
        "tcp://[::1]:1",
        "tcp://127.0.0.1:0",
    ),
    *(
        "tcp://127.0.0.1:99999",
        "ipc://x",
        "ipc:///" + "x" * 200,
        "ipc:///\x1b",
        "tcp://",
        "inproc://x",
        "tcp://é:1",
    ),
    *("pgm://1;2:3", "tcp://127.0.0.1:1;127.0.0.1:2", "tcp://a b:1", "http://127.0.0.1:1", "tcp://[::1"),
)


class Raw(NamedTuple):
    """A value as MessagePack's own bytes, which need not be sound."""

    bytes: bytes


def pack(value: Any) -> bytes:
    """MessagePack, of values that its own packer refuses as well."""
    match value:
        case Raw():
            return value.bytes
        case list():
            head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdc" + len(value).to_bytes(2)
            return head + b"".join(map(pack, value))
        case dict():
            pairs = b"".join(pack(key) + pack(each) for key, each in value.items())
            return b"\xde" + len(value).to_bytes(2) + pairs
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return packed


NUMBERS: Final[tuple[Any, ...]] = (
    *(0, 1, 2, -1, -32, -33, 127, 128, 255, 256, 1_000_000, 1_000_001, 3_600_000, 3_600_001),
    *(2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63)),
    *(0.0, -1.5, 1e300, float("inf"), float("nan"), True, False, None),
)
RAWS: Final = tuple(
    map(
        Raw,
        (
            *(b"\x91" * DEEP + b"\xc0", b"\x81\x01" * DEEP + b"\xc0", b"\x91" * 500 + b"\xc0", b"\xc1", b""),
            *(
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\xff\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
                b"\xdb\xff\xff\xff\xff",
            ),
            *(b"\xdd\x00\x0f\xff\xff" * 40, b"\xdc\x01\x00" * 300, b"\xdc\x01\x01" + b"\xc0" * 257),
            *(
                b"\x82\xa1x\x01\xa1x\x02",
                b"\x81\x90\x01",
                b"\x81\x80\x01",
                b"\x81\xc0\x01",
                b"\x81\xc4\x01x\x01",
            ),
            *(
                b"\xa2\xff\xfe",
                b"\xd4\x05x",
                b"\xd6\xff\0\0\0\0",
                b"\xd7\xff" + b"\xff" * 8,
                b"\xc7\x03\x01abc",
            ),
            *(b"\xd4\xffx", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xca\x7f\xc0\0\0"),
        ),
    )
)
"""Bytes in place of a value: nested, cut off, with false lengths, of extension types, with keys twice."""


class Values:
    """Draws for one episode.

    No renewal names the true store: it would bear witness of a loss, and the store would rest, which a stranger may
    bring about where there are no keys.
    """

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.tokens: list[bytes] = []
        """Of leases that nobody mints by."""
        self.peers: list[bytes] = []
        """Identities of others."""
        self._seen: deque[bytes] = deque(maxlen=KEPT)

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    # --- values ---

    def text(self) -> str:
        draw = self.draw
        match draw.randrange(8):
            case 0:
                return ""
            case 1:
                return draw.choice(ADDRESSES)
            case 2:
                return "x" * draw.choice((255, 256, 4_000, 30_000) if self.chance(0.1) else (1, 16, 255, 256))
            case 3:
                return str(draw.choice((*Method, *Code)))
            case 4 | 5:
                return draw.choice(ESCAPES)
        return "".join(
            chr(draw.choice((draw.randrange(128), draw.randrange(0x3000)))) for _ in range(draw.randrange(12))
        )

    def blob(self) -> bytes:
        return self.draw.randbytes(self.draw.choice((0, 1, 15, 16, 16, 17, 32, 40, 255)))

    def token(self) -> bytes:
        if self.tokens and self.chance(0.3):
            return self.draw.choice(self.tokens)
        return self.draw.randbytes(TOKEN_BYTES)

    def value(self, depth: int = 0) -> Any:
        """Any value, most of them at some edge."""
        kind = self.draw.randrange(12 if depth < 3 else 8)
        if kind < 4:
            return self.draw.choice(NUMBERS)
        if kind < 6:
            return self.text()
        if kind == 6:
            return self.blob()
        if kind == 7:
            return self.draw.choice(RAWS)
        if kind < 10:
            return [self.value(depth + 1) for _ in range(self.draw.choice((0, 1, 2, 3, 15, 16)))]
        return {
            self.draw.choice((self.text, self.blob, lambda: self.draw.choice(NUMBERS)))(): self.value(
                depth + 1
            )
            for _ in range(self.draw.randrange(4))
        }

    def spoil(self, value: Any) -> Any:
        """The same with one thing wrong somewhere."""
        draw = self.draw
        if isinstance(value, list) and value and self.chance(0.85):
            match draw.randrange(12):
                case 0:
                    return value[:-1]
                case 1:
                    return [*value, self.value()]
                case 2:
                    return draw.sample(value, len(value))
            at = draw.randrange(len(value))
            return [self.spoil(each) if k == at else each for k, each in enumerate(value)]
        if isinstance(value, dict) and value and self.chance(0.85):
            key = draw.choice(list(value))
            if draw.randrange(6) == 0:
                return {k: each for k, each in value.items() if k != key}
            return {k: self.spoil(each) if k == key else each for k, each in value.items()}
        return self.value()

    # --- messages ---

    def params(self, method: str) -> list[Any]:
        """Params that this method takes."""
        draw = self.draw
        machine = draw.choice((0, 1, 2, 5, 499, 500, 999, FORGER, 10**6))
        tick = draw.choice((0, 1, DEFAULT.end_tick - 1, DEFAULT.end_tick, draw.randrange(1 << 42)))
        match method:
            case Method.IDS_NEXT:
                count = draw.choice((1, 1, 1, 2, 10, 100, 4_096, 4_097, LIE, 1_000_000))
                others: list[Any] = draw.choice(([], [], [None], ["of another cluster"]))
                return [count, draw.choice((0, 1, 50, PATIENCE_MS)), *others]
            case Method.LEASE_ACQUIRE:
                return [
                    self.token(),
                    self.name(),
                    self.name(),
                    draw.choice((0, 1, 2**63 - 1)),
                    self.address(),
                ]
            case Method.LEASE_RENEW:
                witness: list[Any] = draw.choice(([], [None, None], [tick, None], [tick, "of another store"]))
                return [machine, self.token(), draw.choice((0, 1, 7, 2**63 - 1)), self.token(), *witness]
            case Method.LEASE_RELEASE:
                return [machine, self.token(), draw.choice((None, self.token())), draw.choice((None, tick))]
            case Method.WORKER_READY:
                return [machine, self.token()]
            case Method.WORKER_HEARTBEAT:
                load = ("requests", "ids", "parked", "dropped", "errors")
                return [{key: draw.choice((0, 1, 2**63 - 1)) for key in load}, self.token()]
            case Method.WORKER_LEAVE:
                return [self.token()]
            case Method.CLUSTER_STATUS:
                return draw.choice(([], [], [machine]))
            case Method.CLUSTER_TRACE:
                return [machine, tick]
        return []

    def name(self) -> str:
        return self.draw.choice(
            ("", "x", "w" * 255, "[/bold]", "é" * 9, '"} x{', "<script>", ":bee:", "a 'b' \\")
        )

    def address(self) -> str:
        """An address that a lease may have; nobody serves there."""
        return self.draw.choice(("", "", "", "tcp://127.0.0.1:1", "ipc://nowhere"))

    def msgid(self) -> int:
        return self.draw.choice((0, 1, 2**32 - 1, self.draw.randrange(2**31)))

    def request(self) -> bytes:
        """A request: sound, or with something wrong in it."""
        method: Any = self.draw.choice(list(METHODS)).value
        # A sound acquire takes a machine ID for a ttl.
        share = 0.7 if method != Method.LEASE_ACQUIRE else 0.97
        message = [REQUEST, self.msgid(), method, self.params(method)]
        if self.chance(share):
            # Most often in the params, which are what most checks are of.
            spoilt = self.spoil(message[3])
            message = [*message[:3], spoilt] if self.chance(0.75) else self.spoil(message)
        return self.keep(pack(message))

    def response(self, msgid: Any, result: Any) -> bytes:
        """A response that carries this result: sound, or with something wrong in it, or an error in its place."""
        match self.draw.randrange(10):
            case 0 | 1 | 2:
                return pack([RESPONSE, msgid, None, result])
            case 3:
                return pack([RESPONSE, msgid, self.error(), None])
            case 4:
                return pack(self.spoil([RESPONSE, msgid, self.error(), None]))
            case 5:
                return pack(self.spoil([RESPONSE, msgid, None, result]))
            case 6:
                return self.spoil_bytes(pack([RESPONSE, msgid, None, result]))
        return pack([RESPONSE, msgid, None, self.spoil(result)])

    def error(self) -> list[Any]:
        code = str(self.draw.choice((*Code, "no_such_code"))) if self.chance(0.9) else self.text()
        return [code, self.text(), self.draw.choice((None, 0, 1, 20, 2**63, 2**64 - 1))]

    def forged_run(self) -> list[Any]:
        """A run that no worker minted."""
        return [DEFAULT.compose(self.draw.randrange(1 << 41), FORGER, 0), 1, 1]

    def bundle(self, answers: Sequence[tuple[bytes, bytes]]) -> bytes:
        message: Any = [BUNDLE, [list(pair) for pair in answers]]
        return pack(self.spoil(message) if self.chance(0.5) else message)

    def spoil_bytes(self, body: bytes) -> bytes:
        """The same cut off, spliced, or with other bytes in it."""
        draw = self.draw
        at = draw.randrange(len(body) + 1)
        match draw.randrange(6):
            case 0:
                return body[:at]
            case 1:
                other = draw.choice(self._seen) if self._seen else b""
                return body[:at] + other[draw.randrange(len(other) + 1) :]
            case 2:
                return body[:at] + draw.randbytes(draw.choice((1, 1, 4, 9))) + body[at:]
            case 3:
                return body + body
            case 4:
                return body[at:]
        spoilt = bytearray(body or b"\0")
        for _ in range(draw.choice((1, 1, 2, 4))):
            spoilt[draw.randrange(len(spoilt))] = draw.choice(
                (0, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, draw.randrange(256))
            )
        return bytes(spoilt)

    def keep(self, body: bytes) -> bytes:
        """Remember a message, for splicing; those by which a machine ID is kept are not remembered."""
        if len(body) < 1_000:
            self._seen.append(body)
        return body

    def body(self) -> bytes:
        """Whatever: a request, a spoilt one, an answer to nothing, bytes."""
        match self.draw.randrange(10):
            case 0:
                return self.draw.randbytes(self.draw.choice((0, 1, 2, 8, 40, 300)))
            case 1 | 2:
                return self.spoil_bytes(self.request())
            case 3:
                return self.response(self.msgid(), self.forged_run())
            case 4:
                return pack(self.value())
        return self.request()

    # --- frames ---

    def frames(self, body: bytes) -> list[bytes]:
        """Frames around a body: an envelope, most often one that may be."""
        draw = self.draw
        match draw.randrange(24):
            case 0:
                return [body]
            case 1:
                return [b"", body, b""]
            case 2:
                return [b"", b"", body]
            case 3:
                # Behind too many frames another peer's request, or so it looks.
                filler = draw.choice((b"x", b"", body[:1_000]))
                sender = draw.choice(self.peers) if self.peers else b"x"
                many = draw.choice((2, 6, 7, 8, 1_000) if self.chance(0.2) else (4, 5, 6))
                return [*[filler] * many, sender, b"", body]
            case 4 | 5 | 6 | 7:
                return [
                    *(draw.randbytes(draw.choice((1, 5, 255))) for _ in range(draw.randrange(6))),
                    b"",
                    body,
                ]
            case 8:
                return (
                    [b"", draw.randbytes(draw.choice((MAX_REQUEST_BYTES, MAX_REQUEST_BYTES - 1)))]
                    if self.chance(0.2)
                    else [b""]
                )
        return [b"", body]

    def identity(self) -> bytes:
        """An identity of 1 to 255 bytes, such as ROUTERs make themselves, too."""
        draw = self.draw
        return draw.choice(
            (
                b"\0" + draw.randbytes(4),
                b"\0",
                b"\0" * 5,
                draw.randbytes(255),
                draw.randbytes(1),
                draw.randbytes(5),
            )
        )


def greeting(values: Values, method: Callable[[], bytes]) -> bytes:
    """What a peer of ZeroMQ's sends from its first byte on (ZMTP 3.1, no security), with something wrong in most cases."""
    draw = values.draw
    hello = (
        b"\xff"
        + bytes(8)
        + b"\x7f\x03"
        + draw.choice((b"\0", b"\1", b"\xff"))
        + b"NULL".ljust(20, b"\0")
        + bytes(32)
    )
    identity = draw.randbytes(draw.choice((0, 1, 5, 255, 256))) if values.chance(0.7) else values.identity()
    kind = draw.choice((b"DEALER", b"REQ", b"DEALER", b"ROUTER", b"PUB", b"", b"x" * 255))
    known = ((b"Socket-Type", kind), (b"Identity", identity))
    ready = b"\x05READY" + b"".join(bytes([len(n)]) + n + len(v).to_bytes(4) + v for n, v in known)
    sent = hello + b"\x06" + len(ready).to_bytes(8) + ready
    for _ in range(draw.randrange(4)):
        body = method()
        body += bytes(300_000) if values.chance(0.05) else b""
        size = draw.choice((len(body), len(body), len(body) + 1, 2**16 + 1, 2**63, 2**64 - 1))
        flags = draw.choice((2, 2, 2, 3, 6, 0xFF))
        sent += b"\x01\x00" + bytes([flags]) + size.to_bytes(8) + body
    if values.chance(0.5):
        return sent
    return values.spoil_bytes(sent)
