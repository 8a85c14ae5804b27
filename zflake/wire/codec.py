"""One MessagePack-RPC message to a body frame, and back.

    request   [0, msgid, method, params]
    response  [1, msgid, error, result]     error: nil, or [code, message, retry_after_ms]
    bundle    [3, [[tag, response], ...]]   zflake's own: a worker's answers to several brokered requests

Any bytes decode to a message or raise `ProtocolError`, in memory bounded by their length.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from zflake.errors import ProtocolError

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2
"""MessagePack-RPC has notifications; zflake has none."""
BUNDLE: Final = 3

REQUEST_HEAD: Final = b"\x94\x00"
RESPONSE_HEAD: Final = b"\x94\x01"
BUNDLE_HEAD: Final = b"\x92\x03"
"""The first bytes of each kind of body, in MessagePack: enough to tell them apart without unpacking them."""
_NO_ERROR: Final = b"\xc0"
MAX_MSGID: Final = 2**32 - 1
MAX_REQUEST_ITEMS: Final = 256
"""Items of the longest array or map in a request.

An array that declares more than it holds costs as much as if it held it, for every level of nesting.
"""
MAX_RESPONSE_ITEMS: Final = 2**20
"""Items of the longest array or map in a response: as many as `MAX_RESPONSE_BYTES` can hold."""
MAX_SHOWN: Final = 60
"""Characters of a wrong value that an error message repeats."""

Call: TypeAlias = tuple[int, str, list[Any]]
"""`(msgid, method, params)` of a request as it came in; what params hold is not checked yet."""


@dataclass(frozen=True, slots=True)
class WireError:
    """The error of a response; its texts are printable."""

    code: str
    message: str
    retry_after_ms: int | None = None


class Response(NamedTuple):
    """A response as it came in.  `msgid` is None if the peer could not read the request's."""

    msgid: int | None
    error: WireError | None
    result: Any


class BadRequest(ProtocolError):  # noqa: N818  (a condition of the peer's)
    """A body that is no request; `msgid` is what could be read of it.

    `answerable` is False for a response or a notification, which must not be answered.
    """

    def __init__(self, message: str, *, msgid: int | None = None, answerable: bool = True) -> None:
        super().__init__(message)
        self.msgid = msgid
        self.answerable = answerable


def show(value: object) -> str:
    """A peer's value for a message: short, and safe even if `repr` itself would recurse too deep."""
    text = _repr.repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def printable(text: str) -> str:
    """A text with nothing in it that a terminal would obey: such characters are spelt out, as in a literal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_repr: Final = reprlib.Repr()
_repr.maxlevel = 2


_packb: Final[Callable[[Any], bytes]] = msgpack.packb
_unpackb: Final = msgpack.unpackb
# ExtraData, StackError and FormatError are ValueErrors; an unhashable map key is a TypeError.
_UNPACKABLE: Final = (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException)


def packer() -> Callable[[Any], bytes]:
    """A function that packs faster than `msgpack.packb`, for use by one thread."""
    pack: Callable[[Any], bytes] = msgpack.Packer().pack
    return pack


def encode_request(msgid: int, method: str, params: list[Any] | tuple[Any, ...]) -> bytes:
    """The body of a request."""
    return _packb((REQUEST, msgid, method, params))


def encode_result(msgid: int, result: Any) -> bytes:
    """The body of a response that carries a result."""
    return _packb((RESPONSE, msgid, None, result))


def pack_result(result: Any) -> bytes:
    """A result that several responses are to carry, for `encode_packed`."""
    return _packb(result)


def encode_packed(msgid: int, packed: bytes) -> bytes:
    """The body of a response that carries what `pack_result` gave."""
    return b"".join((RESPONSE_HEAD, _packb(msgid), _NO_ERROR, packed))


def encode_error(msgid: int | None, code: str, message: str, retry_after_ms: int | None = None) -> bytes:
    """The body of a response that carries an error."""
    return _packb((RESPONSE, msgid, (code, message, retry_after_ms), None))


def encode_bundle(answers: list[tuple[bytes, bytes]]) -> bytes:
    """The body of a bundle: answers to brokered requests, each behind its tag."""
    return _packb((BUNDLE, answers))


def decode_bundle(body: bytes) -> list[tuple[bytes, bytes]]:
    """The answers in a bundle, each behind its tag; raises `ProtocolError` if it is none."""
    try:
        kind, answers = _unpackb(body, max_array_len=MAX_REQUEST_ITEMS, max_map_len=0)
        pairs = [(tag, answer) for tag, answer in answers]
    except _UNPACKABLE as why:
        raise ProtocolError(f"not a bundle: {_reason(why)}") from why
    if not _is_kind(kind, BUNDLE) or not all(type(part) is bytes for pair in pairs for part in pair):
        raise ProtocolError("a bundle is [3, [[tag, response], ...]], the inner values being bytes")
    return pairs


def decode_request(body: bytes) -> Call:
    """The request in `body`; raises `BadRequest` if there is none."""
    try:
        message = _unpackb(body, max_array_len=MAX_REQUEST_ITEMS, max_map_len=MAX_REQUEST_ITEMS)
    except _UNPACKABLE as error:
        raise BadRequest(f"not one MessagePack value: {_reason(error)}") from error
    try:
        kind, msgid, method, params = message
        if (
            type(kind) is type(msgid) is int
            and kind == REQUEST
            and 0 <= msgid <= MAX_MSGID
            and type(method) is str
            and type(params) is list
        ):
            return msgid, method, params
    except (TypeError, ValueError):
        pass  # it does not have four elements
    raise _no_request(message)


def decode_response(body: bytes) -> Response:
    """The response in `body`; raises `ProtocolError` if there is none."""
    try:
        message = _unpackb(body, max_array_len=MAX_RESPONSE_ITEMS, max_map_len=MAX_RESPONSE_ITEMS)
    except _UNPACKABLE as why:
        raise ProtocolError(f"not one MessagePack value: {_reason(why)}") from why
    if type(message) is not list or len(message) != 4 or not _is_kind(message[0], RESPONSE):  # noqa: PLR2004
        raise ProtocolError("a response is an array [1, msgid, error, result]")
    _, msgid, error, result = message
    if msgid is not None and not _is_msgid(msgid):
        raise ProtocolError(f"a response's msgid is a number from 0 to 2**32 - 1, not {show(msgid)}")
    if error is None:
        if msgid is None:
            raise ProtocolError("a response that carries a result has a msgid")
        return Response(msgid, None, result)
    match error:
        case [str(code), str(message), retry_after_ms] if retry_after_ms is None or _is_number(
            retry_after_ms
        ):
            return Response(msgid, WireError(printable(code), printable(message), retry_after_ms), None)
    raise ProtocolError(f"a response's error is [code, message, retry_after_ms], not {show(error)}")


def _no_request(message: Any) -> BadRequest:
    rule = "a request is [0, msgid, method, params]: a number from 0 to 2**32 - 1, a string, an array"
    if type(message) is not list or not message:
        return BadRequest(rule)
    msgid = message[1] if len(message) > 1 and _is_msgid(message[1]) else None
    answerable = not (_is_kind(message[0], RESPONSE) or _is_kind(message[0], NOTIFICATION))
    return BadRequest(rule, msgid=msgid if answerable else None, answerable=answerable)


def _reason(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}{': ' if text else ''}{text[:80]}"


def _is_kind(value: object, kind: int) -> bool:
    return type(value) is int and value == kind  # and not True, which equals 1


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_msgid(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_MSGID
