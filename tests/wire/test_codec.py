"""The codec: any bytes are a message or a `ProtocolError`, at a cost that their length bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake.errors import ProtocolError
from zflake.wire.codec import (
    MAX_MSGID,
    MAX_REQUEST_ITEMS,
    MAX_SHOWN,
    BadRequest,
    Response,
    WireError,
    decode_bundle,
    decode_request,
    decode_response,
    encode_bundle,
    encode_error,
    encode_packed,
    encode_request,
    encode_result,
    pack_result,
    packer,
    printable,
    show,
)
from zflake.wire.frames import MAX_REQUEST_BYTES

thorough = settings(deadline=None, max_examples=150)

msgids = st.integers(0, MAX_MSGID)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
    max_leaves=10,
)
retries = st.none() | st.integers(0, 2**64 - 1)

DECODERS: list[Callable[[bytes], Any]] = [decode_request, decode_response]
both = pytest.mark.parametrize("decode", DECODERS, ids=["request", "response"])

REQUEST = encode_request(7, "ids.next", [1, 1000])
RESULT = encode_result(7, {"machine": 5, "token": b"\0" * 16, "layout": {"fields": [["time", 42]]}})
ERROR = encode_error(7, "lease_expired", "ask another", 250)


pack = packer()


def refused(body: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        decode_request(body)
    return caught.value


# --- round trips ---


@thorough
@given(msgids, st.text(), st.lists(values, max_size=6))
def test_a_request_comes_out_as_it_went_in(msgid: int, method: str, params: list[Any]) -> None:
    assert decode_request(encode_request(msgid, method, params)) == (msgid, method, params)


@thorough
@given(msgids, values)
def test_a_result_comes_out_as_it_went_in(msgid: int, result: Any) -> None:
    assert decode_response(encode_result(msgid, result)) == Response(msgid, None, result)


@thorough
@given(st.none() | msgids, st.text(), st.text(), retries)
def test_an_error_comes_out_as_it_went_in(
    msgid: int | None, code: str, message: str, retry_after_ms: int | None
) -> None:
    body = encode_error(msgid, code, message, retry_after_ms)
    error = WireError(printable(code), printable(message), retry_after_ms)
    assert decode_response(body) == Response(msgid, error, None)
    assert printable(error.message) == error.message


@thorough
@given(values)
def test_the_fast_packer_packs_the_same_bytes(value: Any) -> None:
    assert [pack(value), pack(value)] == [msgpack.packb(value)] * 2


# --- whatever comes in ---


def is_message_or_protocol_error(body: bytes, decode: Callable[[bytes], Any]) -> None:
    with suppress(ProtocolError):
        assert isinstance(decode(body), tuple)


@both
@thorough
@given(body=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(decode: Callable[[bytes], Any], body: bytes) -> None:
    is_message_or_protocol_error(body, decode)


@both
@thorough
@given(message=st.lists(values, max_size=5))
def test_any_array_is_a_message_or_a_protocol_error(
    decode: Callable[[bytes], Any], message: list[Any]
) -> None:
    is_message_or_protocol_error(pack(message), decode)


@both
@thorough
@given(body=st.sampled_from([REQUEST, RESULT, ERROR]), at=st.integers(0), byte=st.integers(0, 255))
def test_a_message_with_a_wrong_byte_is_a_message_or_a_protocol_error(
    decode: Callable[[bytes], Any], body: bytes, at: int, byte: int
) -> None:
    at %= len(body)
    is_message_or_protocol_error(body[:at] + bytes([byte]) + body[at + 1 :], decode)


@pytest.mark.parametrize("body", [REQUEST, RESULT, ERROR], ids=["request", "result", "error"])
@both
def test_a_message_cut_anywhere_is_refused(decode: Callable[[bytes], Any], body: bytes) -> None:
    for cut in range(len(body)):
        with pytest.raises(ProtocolError):
            decode(body[:cut])


@both
def test_bytes_behind_the_message_are_refused(decode: Callable[[bytes], Any]) -> None:
    for body in (REQUEST, RESULT):
        with pytest.raises(ProtocolError, match="ExtraData"):
            decode(body + b"\xc0")


@pytest.mark.parametrize(
    "level", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01"], ids=["array", "map", "array of 16 bits"]
)
@both
def test_ten_thousand_levels_of_nesting_are_refused(decode: Callable[[bytes], Any], level: bytes) -> None:
    for body in (level * 10_000, level * 10_000 + b"\xc0", REQUEST[:-4] + b"\x91" + level * 10_000 + b"\xc0"):
        with pytest.raises(ProtocolError):
            decode(body)


@pytest.mark.parametrize("head", ["c6", "c9", "db", "dd", "df"], ids=["bin", "ext", "str", "array", "map"])
@pytest.mark.parametrize("length", ["ffffffff", "7fffffff", "0000ffff"])
@both
def test_a_declared_length_costs_nothing_that_was_not_sent(
    decode: Callable[[bytes], Any], head: str, length: str
) -> None:
    body = bytes.fromhex(head + length)
    assert peak_of(decode, body) < 1_000_000
    assert peak_of(decode, b"\x94\x00\x01\xa4ping" + body) < 1_000_000


@pytest.mark.parametrize("head", ["dd0000ffff", "dcffff", "dd000000ff", "dc0100"])
def test_nested_arrays_that_declare_more_than_they_hold_stay_cheap(head: str) -> None:
    # Each level allocates what it declares, before its first element is read.
    level = bytes.fromhex(head)
    body = (b"\x94\x00\x01\xa8ids.next" + level * 1000).ljust(MAX_REQUEST_BYTES, b"\xc0")
    assert peak_of(decode_request, body) < 4_000_000


def peak_of(decode: Callable[[bytes], Any], body: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_array_in_a_request_has_a_longest_length() -> None:
    assert decode_request(encode_request(1, "m", [0] * MAX_REQUEST_ITEMS))[2] == [0] * MAX_REQUEST_ITEMS
    refused(encode_request(1, "m", [0] * (MAX_REQUEST_ITEMS + 1)))
    refused(encode_request(1, "m", [{str(i): 0 for i in range(MAX_REQUEST_ITEMS + 1)}]))


def test_a_packed_result_makes_the_response_that_the_result_makes() -> None:
    result = {"workers": [{"machine": 5}], "now_us": 7}
    for msgid in (0, 127, 128, 2**16, MAX_MSGID):
        assert encode_packed(msgid, pack_result(result)) == encode_result(msgid, result)


# --- requests ---


@pytest.mark.parametrize(
    "message",
    [
        None,
        True,
        7,
        "ping",
        b"ping",
        {},
        {"a": 0, "b": 1, "c": "ping", "d": []},
        [],
        [0],
        [0, 1],
        [0, 1, "ping"],
        [0, 1, "ping", [], None],
        [3, 1, "ping", []],
        [-1, 1, "ping", []],
        [None, 1, "ping", []],
        [False, 1, "ping", []],
        [0.0, 1, "ping", []],
        [[0], 1, "ping", []],
        [msgpack.Timestamp(0), 1, "ping", []],
        [0, None, "ping", []],
        [0, True, "ping", []],
        [0, 1.0, "ping", []],
        [0, -1, "ping", []],
        [0, MAX_MSGID + 1, "ping", []],
        [0, 2**64 - 1, "ping", []],
        [0, "1", "ping", []],
        [0, [1], "ping", []],
        [0, 1, b"ping", []],
        [0, 1, None, []],
        [0, 1, 5, []],
        [0, 1, ["ping"], []],
        [0, 1, "ping", None],
        [0, 1, "ping", {}],
        [0, 1, "ping", "[]"],
        [0, 1, "ping", 0],
        [0, 1, "ping", msgpack.ExtType(5, b"")],
    ],
    ids=repr,
)
def test_what_is_no_request_is_refused_and_may_be_answered(message: Any) -> None:
    assert refused(pack(message)).answerable


@pytest.mark.parametrize("msgid", [0, 1, MAX_MSGID])
def test_every_msgid_in_the_range_is_taken(msgid: int) -> None:
    assert decode_request(encode_request(msgid, "ping", [])) == (msgid, "ping", [])


def test_a_map_key_that_is_no_string_is_refused() -> None:
    for key in (b"\x01", b"\xc3", b"\xc0", b"\x90", b"\xcb" + b"\0" * 8):
        refused(b"\x94\x00\x01\xa4ping\x91\x81" + key + b"\xc0")


def test_a_string_that_is_not_utf_8_is_refused() -> None:
    refused(b"\x94\x00\x01\xa4\xff\xff\xff\xff\x90")
    refused(b"\x94\x00\x01\xa4ping\x91\xa3\xed\xa0\x80")  # a surrogate


@pytest.mark.parametrize(
    ("message", "msgid"),
    [
        ([0, 5], 5),
        ([0, 5, "ping", {}], 5),
        ([0, MAX_MSGID, None, None, None], MAX_MSGID),
        (["x", 5, "ping", []], 5),
        ([0, -1, "ping", []], None),
        ([0, True, "ping", []], None),
        ([0, "5", "ping", []], None),
        ([0], None),
        ({"msgid": 5}, None),
    ],
    ids=repr,
)
def test_a_refusal_carries_the_msgid_that_could_be_read(message: Any, msgid: int | None) -> None:
    assert refused(pack(message)).msgid == msgid


@pytest.mark.parametrize(
    "message",
    [
        [1, 5, None, 1],
        [1, 5, ["bad_request", "no", None], None],
        [1],
        [1, 5, "ping", []],
        [2, "ping", []],
        [2, 5, "ping", []],
        [2],
    ],
    ids=repr,
)
def test_responses_and_notifications_are_never_answered(message: list[Any]) -> None:
    error = refused(pack(message))
    assert not error.answerable
    assert error.msgid is None


@pytest.mark.parametrize("kind", [True, 1.0, 2.0], ids=repr)
def test_only_the_integers_1_and_2_make_a_response_or_a_notification(kind: Any) -> None:
    assert refused(pack([kind, 5, None, 1])).answerable


# --- responses ---


@pytest.mark.parametrize(
    "message",
    [
        None,
        {},
        "abcd",
        [],
        [1, 5, None],
        [1, 5, None, 1, 1],
        [0, 5, "ping", []],
        [2, 5, None, 1],
        [True, 5, None, 1],
        [1.0, 5, None, 1],
        [None, 5, None, 1],
        [1, -1, None, 1],
        [1, MAX_MSGID + 1, None, 1],
        [1, True, None, 1],
        [1, "5", None, 1],
        [1, 5, False, 1],
        [1, 5, 0, 1],
        [1, 5, "no", None],
        [1, 5, [], None],
        [1, 5, ["code", "message"], None],
        [1, 5, ["code", "message", None, None], None],
        [1, 5, {"code": 1, "message": 2, "retry_after_ms": 3}, None],
        [1, 5, [b"code", "message", None], None],
        [1, 5, [3, "message", None], None],
        [1, 5, ["code", None, None], None],
        [1, 5, ["code", "message", -1], None],
        [1, 5, ["code", "message", True], None],
        [1, 5, ["code", "message", 1.5], None],
        [1, 5, ["code", "message", "1"], None],
    ],
    ids=repr,
)
def test_what_is_no_response_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_response(pack(message))


def test_an_error_hides_the_result_beside_it() -> None:
    assert decode_response(pack([1, 5, ["lost", "m", None], 3])).result is None


def test_a_response_without_a_msgid_is_read_if_it_carries_an_error() -> None:
    assert decode_response(encode_error(None, "bad_request", "m")).msgid is None
    with pytest.raises(ProtocolError, match="has a msgid"):
        decode_response(pack([1, None, None, [1, 1, 1]]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("worker 1 \u5de5 \U0001f41d", "worker 1 \u5de5 \U0001f41d"),
        ("a\tb\n", r"a\tb\n"),
        ("\x1b[31m\x9b\x7f", r"\x1b[31m\x9b\x7f"),
        ("\u202e\u2028\ud800", r"\u202e\u2028\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()


# --- messages for people ---


@thorough
@given(values)
def test_a_shown_value_is_short(value: Any) -> None:
    assert len(show(value)) <= MAX_SHOWN


def test_a_value_of_any_depth_can_be_shown() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(show(deep)) <= MAX_SHOWN
    while deep:
        (deep,) = deep  # freed level by level


def test_a_huge_value_is_shown_short() -> None:
    for value in ("x" * 10**6, b"x" * 10**6, list(range(10**6)), 10**4000, {str(i): i for i in range(10**5)}):
        assert len(show(value)) <= MAX_SHOWN


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=60)), max_size=64))
def test_a_bundle_comes_back_as_it_went(answers: list[tuple[bytes, bytes]]) -> None:
    assert decode_bundle(encode_bundle(answers)) == answers


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\x92\x03" + tail))
def test_any_bytes_are_a_bundle_or_a_protocol_error(body: bytes) -> None:
    with suppress(ProtocolError):
        assert all(type(part) is bytes for pair in decode_bundle(body) for part in pair)
