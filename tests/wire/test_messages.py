"""Messages: behind these checks every value of a peer's has its type and its range."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake import errors
from zflake.core.layout import PRESETS, Field, Layout
from zflake.core.lease import (
    Acquire,
    Grant,
    Holder,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
)
from zflake.wire.cluster import LOAD, check_heartbeat, check_leave, check_ready
from zflake.wire.codec import WireError, decode_request, decode_response, encode_request, encode_result
from zflake.wire.dispatch import METHODS
from zflake.wire.fields import MAX_TEXT, no_params, timeline_us
from zflake.wire.ids import MAX_COUNT, MAX_TIMEOUT_MS, check_next, check_run
from zflake.wire.leases import (
    check_acquire,
    check_release,
    check_renew,
    check_trace,
    lease_answer,
    lease_call,
    store_result,
)
from zflake.wire.methods import Code, Method, exception_of

thorough = settings(deadline=None, max_examples=200)

MAX_INT: Final = 2**63 - 1
A, B = bytes(range(16)), bytes(range(16, 32))
ADDRESS: Final = "tcp://127.0.0.1:7411"
LEASES: Final = (Method.LEASE_ACQUIRE, Method.LEASE_RENEW, Method.LEASE_RELEASE)

tokens = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, MAX_INT)
names = st.text(max_size=MAX_TEXT).filter(str.isprintable)
addresses = st.sampled_from(
    ["", ADDRESS, "tcp://[::1]:7411", "ipc:///run/zflake/w", "tcp://host-7.example:1"]
)
layouts = st.sampled_from(list(PRESETS.values()))

requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(Acquire, tokens, st.builds(Holder, names, names, numbers, addresses)),
    st.builds(Renew, numbers, tokens, numbers, tokens, st.none() | numbers, st.none() | names),
    st.builds(Release, numbers, tokens, st.none() | tokens, st.none() | numbers),
)


def deep() -> list[Any]:
    """Nested as deep as MessagePack's decoder lets through, which is more than `repr` takes."""
    value: list[Any] = []
    for _ in range(1000):
        value = [value]
    return value


# What is wrong for a number, a text and a token alike.
WRONG: Final[list[Any]] = [
    True,
    1.0,
    math.nan,
    [],
    [1],
    {},
    msgpack.ExtType(5, b"1"),
    msgpack.Timestamp(1),
    deep(),
]
NO_NUMBER: Final = [*WRONG, False, "1", b"1", -1, MAX_INT + 1, 2**64 - 1]
NO_TOKEN: Final = [*WRONG, 1, "x" * 16, b"", A[:-1], A + b"x", bytes(32), bytearray(A)]
NO_TEXT: Final = [
    *WRONG,
    None,
    1,
    b"name",
    "x" * (MAX_TEXT + 1),
    *(
        f"na{character}me"
        for character in (
            "\0\a\b\t\n\v\f\r\x1b\x7f\x80\x85\x9b\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{LINE SEPARATOR}"
            "\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH NO-BREAK SPACE}"
        )
    ),
]
NO_ADDRESS: Final = [
    *NO_TEXT,
    "worker-1",
    "127.0.0.1:7411",
    "tcp://127.0.0.1",
    "tcp://127.0.0.1:*",
    "tcp://*:7411",
    "tcp://0.0.0.0:7411",
    "tcp://[::]:7411",
    "inproc://w",
    "ipc://",
]


def shown(value: Any) -> str:
    return ascii(value)[:30] if type(value) is not list or len(value) != 1 or value[0] == 1 else "deep"


def refused(check: Callable[..., object], *arguments: Any) -> None:
    with pytest.raises(errors.ProtocolError) as caught:
        check(*arguments)
    assert len(str(caught.value)) < 500  # it travels back, and into logs


# --- ids.next ---


@pytest.mark.parametrize("params", [[1, 0], [1, 1], [MAX_COUNT, MAX_TIMEOUT_MS]])
def test_a_count_and_a_time_in_range_are_taken(params: list[Any]) -> None:
    assert check_next(params) == (*params, None)
    assert check_next([*params, "store"]) == (*params, "store")


@pytest.mark.parametrize("params", [[], [1], [1, 1000, None, None]], ids=repr)
def test_a_wrong_number_of_params_is_refused(params: list[Any]) -> None:
    refused(check_next, params)


@thorough
@given(st.integers(0, 2**64 - 1), st.integers(1, 2**40), st.integers(1, MAX_COUNT), st.integers(0, MAX_COUNT))
def test_a_run_is_taken_where_it_fits_64_bits_and_what_was_asked(
    first: int, step: int, count: int, more: int
) -> None:
    if first + step * (count - 1) < 2**64:
        assert check_run([first, step, count], count + more) == (first, step, count)
        if count > 1:
            refused(check_run, [first, step, count], count - 1)
    else:
        refused(check_run, [first, step, count], count)


def test_the_last_id_of_64_bits_is_an_id() -> None:
    assert check_run([2**64 - 1, 1, 1], 1) == (2**64 - 1, 1, 1)
    assert check_run([2**64 - 2, 1, 2], 2) == (2**64 - 2, 1, 2)
    refused(check_run, [2**64 - 1, 1, 2], 2)


@pytest.mark.parametrize(
    "result",
    [
        None,
        7,
        "run",
        b"run",
        {},
        [],
        [1],
        [1, 1],
        [1, 1, 1, 1],
        [[1, 1, 1]],
        [1, 1, 0],
        [1, 1, -1],
        [1, 0, 2],
        [1, -1, 2],
        [-1, 1, 1],
        [5, -5, 2],
        [1, 1, 11],
        [2**64, 1, 1],
    ],
    ids=repr,
)
def test_what_is_no_run_is_refused(result: Any) -> None:
    refused(check_run, result, 10)


@pytest.mark.parametrize("wrong", [*WRONG, None, "1"], ids=shown)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_of_anything_but_integers_is_refused(place: int, wrong: Any) -> None:
    run: list[Any] = [1, 1, 1]
    run[place] = wrong
    refused(check_run, run, 10)


@pytest.mark.parametrize("params", [[None], [0], [[]], [deep()], [0] * 200], ids=shown)
def test_a_method_without_params_takes_none(params: list[Any]) -> None:
    no_params([])
    refused(no_params, params)


# --- lease requests ---


@thorough
@given(requests)
def test_a_lease_request_comes_out_of_the_wire_as_it_went_in(request: Request) -> None:
    method, params = lease_call(request)
    _, name, received = decode_request(encode_request(1, method, params))
    assert METHODS[Method(name)].check(received) == request


def test_every_method_has_its_rule() -> None:
    assert set(METHODS) == set(Method)


NEXT: Final = [1, 1000, "store"]
ACQUIRE: Final = [A, "worker-1", "host-1", 4711, ADDRESS]
RENEW: Final = [5, A, 1, B, 9, "here"]
RELEASE: Final = [5, A, None, None]
TRACE: Final = [5, 9]
READY: Final = [5, A]

FIELDS: Final = [
    (check_next, NEXT, 0, [*NO_NUMBER, None, 0, MAX_COUNT + 1]),
    (check_next, NEXT, 1, [*NO_NUMBER, None, MAX_TIMEOUT_MS + 1]),
    (check_next, NEXT, 2, [1, b"store", [], True]),
    (check_acquire, ACQUIRE, 0, [*NO_TOKEN, None]),
    (check_acquire, ACQUIRE, 1, NO_TEXT),
    (check_acquire, ACQUIRE, 2, NO_TEXT),
    (check_acquire, ACQUIRE, 3, [*NO_NUMBER, None]),
    (check_acquire, ACQUIRE, 4, NO_ADDRESS),
    (check_renew, RENEW, 0, [*NO_NUMBER, None]),
    (check_renew, RENEW, 1, [*NO_TOKEN, None]),
    (check_renew, RENEW, 2, [*NO_NUMBER, None]),
    (check_renew, RENEW, 3, [*NO_TOKEN, None]),
    (check_renew, RENEW, 4, NO_NUMBER),
    (check_renew, RENEW, 5, [text for text in NO_TEXT if text is not None]),
    (check_trace, TRACE, 0, [*NO_NUMBER, None]),
    (check_trace, TRACE, 1, [*NO_NUMBER, None]),
    (check_release, RELEASE, 0, [*NO_NUMBER, None]),
    (check_release, RELEASE, 1, [*NO_TOKEN, None]),
    (check_release, RELEASE, 2, NO_TOKEN),
    (check_release, RELEASE, 3, NO_NUMBER),
    (check_ready, READY, 0, [*NO_NUMBER, None]),
    (check_ready, READY, 1, [*NO_TOKEN, None]),
]


@pytest.mark.parametrize(("check", "params", "place", "wrong"), FIELDS)
def test_every_kind_of_wrong_value_in_every_place_is_refused(
    check: Callable[[list[Any]], Request], params: list[Any], place: int, wrong: list[Any]
) -> None:
    check(params)
    for value in wrong:
        refused(check, [*params[:place], value, *params[place + 1 :]])


@pytest.mark.parametrize(
    ("check", "params"),
    [
        (check_acquire, ACQUIRE),
        (check_renew, RENEW[:4]),
        (check_renew, RENEW),
        (check_release, RELEASE),
        (check_trace, TRACE),
        (check_ready, READY),
    ],
)
def test_a_param_too_few_or_too_many_is_refused(
    check: Callable[[list[Any]], Request], params: list[Any]
) -> None:
    for wrong in ([], params[:-1], params[3:], [*params, None], [params]):
        refused(check, wrong)


def test_a_renewal_may_leave_its_end_out() -> None:
    assert check_renew(RENEW[:4]) == check_renew([*RENEW[:4], None, None])
    assert check_renew(RENEW[:4]) == replace(check_renew(RENEW), end=None, store_id=None)


def test_the_longest_text_and_the_largest_number_are_taken() -> None:
    text = "\N{SNOWFLAKE}" * MAX_TEXT
    assert check_acquire([A, text, text, MAX_INT, ""]).holder == Holder(text, text, MAX_INT, "")
    assert check_release([MAX_INT, A, B, MAX_INT]) == Release(MAX_INT, A, B, MAX_INT)


def test_a_name_with_spaces_of_any_script_is_taken() -> None:
    for name in ("", "worker 1", "Arbeiter für Köln", "工人一号", "🐝"):
        assert check_acquire([A, name, name, 0, ""]).holder.name == name


# --- workers ---


@thorough
@given(numbers, tokens)
def test_a_worker_that_is_ready_comes_out_of_the_wire_as_it_went_in(machine: int, token: bytes) -> None:
    _, _, params = decode_request(encode_request(1, Method.WORKER_READY, [machine, token]))
    assert check_ready(params) == (machine, token)


BEAT: Final = dict.fromkeys(LOAD, 7)


@thorough
@given(st.fixed_dictionaries(dict.fromkeys(LOAD, numbers)), tokens)
def test_a_beat_comes_out_of_the_wire_as_it_went_in(load: dict[str, int], token: bytes) -> None:
    _, _, params = decode_request(encode_request(1, Method.WORKER_HEARTBEAT, [load, token]))
    assert check_heartbeat(params) == (load, token)


@pytest.mark.parametrize("key", LOAD)
def test_a_beat_with_a_wrong_or_no_number_is_refused(key: str) -> None:
    for value in [*NO_NUMBER, None]:
        refused(check_heartbeat, [BEAT | {key: value}, A])
    refused(check_heartbeat, [{other: 7 for other in LOAD if other != key}, A])


@pytest.mark.parametrize("load", [None, 7, [7] * 5, "load", deep()], ids=shown)
def test_a_beat_whose_load_is_no_map_is_refused(load: Any) -> None:
    refused(check_heartbeat, [load, A])


@pytest.mark.parametrize("params", [[], [BEAT], [BEAT, None], [BEAT, b"short"], [BEAT, A, A]], ids=shown)
def test_a_beat_without_one_token_is_refused(params: list[Any]) -> None:
    refused(check_heartbeat, params)


@pytest.mark.parametrize("params", [[], [None], [b"short"], ["x" * 16], [A, A]], ids=shown)
def test_a_leave_without_one_token_is_refused(params: list[Any]) -> None:
    refused(check_leave, params)


def test_of_a_beat_only_what_is_known_is_kept() -> None:
    # It is shown to people, and kept: nothing of a peer's own making.
    assert check_heartbeat([BEAT | {"new": "\x1b[31m", 5: 6}, A]) == (BEAT, A)


# --- lease answers ---


@thorough
@given(
    st.builds(
        Grant,
        machine=st.integers(0, 63),  # which every preset has
        gen=numbers,
        start=numbers,
        end=numbers,
        token=tokens,
        layout=layouts,
        ttl=st.integers(1, MAX_INT),
    ),
    numbers,
    st.sampled_from([Method.LEASE_ACQUIRE, Method.LEASE_RENEW]),
)
def test_a_grant_comes_out_of_the_wire_as_it_went_in(grant: Grant, now_us: int, method: Method) -> None:
    response = decode_response(encode_result(1, store_result(grant, now_us)))
    assert lease_answer(method, response.error, response.result) == grant
    assert timeline_us(response.result) == now_us


@given(st.builds(Released, numbers, numbers), numbers)
def test_a_release_s_answer_comes_out_of_the_wire_as_it_went_in(released: Released, now_us: int) -> None:
    response = decode_response(encode_result(1, store_result(released, now_us)))
    assert lease_answer(Method.LEASE_RELEASE, response.error, response.result) == released
    assert timeline_us(response.result) == now_us


GRANT: Final = store_result(Grant(5, 1, 1000, 31_000, A, PRESETS["snowcloud"], 30_000), 1_767_225_600_000_000)
RELEASED: Final = store_result(Released(5, 1000), 1_767_225_600_000_000)


@pytest.mark.parametrize(
    ("method", "sound", "key", "wrong"),
    [
        *((Method.LEASE_RENEW, GRANT, key, NO_NUMBER) for key in ("machine", "gen", "start", "end", "ttl")),
        (Method.LEASE_ACQUIRE, GRANT, "token", NO_TOKEN),
        *((Method.LEASE_RELEASE, RELEASED, key, NO_NUMBER) for key in ("machine", "fence")),
    ],
)
def test_an_answer_with_a_wrong_or_no_value_is_refused(
    method: Method, sound: dict[str, Any], key: str, wrong: list[Any]
) -> None:
    for value in [*wrong, None]:
        refused(lease_answer, method, None, {**sound, key: value})
    refused(lease_answer, method, None, {other: sound[other] for other in sound if other != key})


def test_a_grant_whose_ttl_leaves_no_time_to_renew_is_refused() -> None:
    refused(lease_answer, Method.LEASE_ACQUIRE, None, {**GRANT, "ttl": 0})


def test_a_grant_of_a_machine_that_its_layout_has_not_is_refused() -> None:
    assert lease_answer(Method.LEASE_ACQUIRE, None, {**GRANT, "machine": 1023})
    refused(lease_answer, Method.LEASE_ACQUIRE, None, {**GRANT, "machine": 1024})


@pytest.mark.parametrize(
    "layout",
    [None, 5, "snowcloud", [], {}, deep(), {"name": deep()}, {"name": "x"}]
    + [
        {**PRESETS["snowcloud"].to_map(), key: value}
        for key, value in [
            ("name", "na\x1bme"),
            ("name", deep()),
            ("name", "x" * (MAX_TEXT + 1)),
            ("fields", None),
            ("fields", []),
            ("fields", deep()),
            ("fields", [["time", 42], ["machine", 10]]),
            ("fields", [["machine", 10], ["time", 42], ["sequence", 12]]),
            ("fields", [["time", 43], ["machine", 10], ["sequence", 12]]),
            ("fields", [["time", 42], ["machine", 10], ["sequence", True]]),
            ("fields", [["time", 42], ["machine", 10], ["sequence", 0]]),
            ("fields", [["time", 42], ["machine", 10], ["sequence", deep()]]),
            ("fields", "abc"),
            ("fields", ["x" * 10_000]),
            ("epoch_ms", -1),
            ("epoch_ms", 1.5),
            ("epoch_ms", 2**63),
            ("epoch_ms", deep()),
            ("tick_ms", 0),
            ("tick_ms", True),
            ("tick_ms", None),
            ("machine_parts", [["a", 3]]),
            ("machine_parts", None),
        ]
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_a_grant_without_a_sound_layout_is_refused(layout: Any) -> None:
    refused(lease_answer, Method.LEASE_ACQUIRE, None, {**GRANT, "layout": layout})


@pytest.mark.parametrize("method", LEASES)
def test_an_answer_that_is_no_map_is_refused(method: Method) -> None:
    for value in [*WRONG[:-4], None, 1, "x", b"x", deep(), {}]:
        refused(lease_answer, method, None, value)


@pytest.mark.parametrize("method", LEASES)
@pytest.mark.parametrize("reason", Refused)
@pytest.mark.parametrize("retry_after_ms", [None, 0, 250])
def test_a_refusal_is_what_its_code_says(method: Method, reason: Refused, retry_after_ms: int | None) -> None:
    error = WireError(reason.value, "why", retry_after_ms)
    assert lease_answer(method, error, None) == Refusal(reason, "why", retry_after_ms)


@pytest.mark.parametrize("code", [*(set(Code) - {Code(r.value) for r in Refused}), "new", "", "LOST"])
def test_an_error_that_decides_nothing_keeps_the_lease_request_open(code: str) -> None:
    refusal = lease_answer(Method.LEASE_RENEW, WireError(code, "why", 7), None)
    assert refusal == Refusal(Refused.UNAVAILABLE, "why", 7)


def test_every_reason_to_refuse_a_lease_has_its_code() -> None:
    assert {reason.value for reason in Refused} <= set(Code)


def test_an_answer_may_carry_keys_that_nobody_knows_yet() -> None:
    assert lease_answer(Method.LEASE_ACQUIRE, None, {**GRANT, "new": deep()}) == lease_answer(
        Method.LEASE_ACQUIRE, None, GRANT
    )
    assert lease_answer(Method.LEASE_RELEASE, None, {**RELEASED, "new": 1}) == Released(5, 1000)


def test_a_layout_of_one_s_own_travels() -> None:
    layout = Layout(
        "own", (Field("time", 40), Field("sequence", 4), Field("machine", 20)), 5, 10, (Field("a", 20),)
    )
    grant = Grant(2**20 - 1, 1, 5, 10, secrets.token_bytes(16), layout, 100)
    assert lease_answer(Method.LEASE_ACQUIRE, None, store_result(grant, 0)) == grant


# --- the time ---


@pytest.mark.parametrize("now_us", [0, 1, MAX_INT])
def test_a_result_s_now_is_read(now_us: int) -> None:
    assert timeline_us({"now_us": now_us}) == now_us


@pytest.mark.parametrize("value", [*NO_NUMBER, None], ids=shown)
def test_a_now_that_is_no_time_is_as_good_as_none(value: Any) -> None:
    assert timeline_us({"now_us": value}) is None


@pytest.mark.parametrize("result", [None, {}, [], 5, "x", [["now_us", 5]], deep()], ids=shown)
def test_a_result_without_a_now_has_none(result: Any) -> None:
    assert timeline_us(result) is None


# --- errors ---


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.BAD_REQUEST, errors.ProtocolError),
        (Code.UNKNOWN_METHOD, errors.ProtocolError),
        (Code.TIMEOUT, errors.Timeout),
        (Code.OVERLOADED, errors.Overloaded),
        (Code.UNAVAILABLE, errors.Unavailable),
        (Code.LEASE_EXPIRED, errors.LeaseExpired),
        (Code.LOST, errors.LeaseLost),
        (Code.TOO_EARLY, errors.Unavailable),
        (Code.NO_FREE_MACHINE, errors.NoFreeMachine),
        (Code.EXHAUSTED, errors.LayoutError),
        (Code.DENIED, errors.AuthError),
        (Code.NOT_READY, errors.Unavailable),
        ("new_code", errors.ProtocolError),
        ("", errors.ProtocolError),
    ],
)
def test_a_code_becomes_the_exception_that_the_caller_can_act_on(
    code: str, kind: type[errors.ZflakeError]
) -> None:
    error = exception_of(WireError(code, "what to do", 1500))
    assert type(error) is kind
    assert str(error) == "what to do"
    assert error.retry_after == 1.5


def test_no_code_is_forgotten() -> None:
    named = {code for code in Code if type(exception_of(WireError(code, "m"))) is not errors.ProtocolError}
    assert set(Code) - named == {Code.BAD_REQUEST, Code.UNKNOWN_METHOD, Code.OTHER_CLUSTER}


def test_an_error_without_a_hint_has_none() -> None:
    assert exception_of(WireError(Code.TIMEOUT, "m")).retry_after is None
    assert exception_of(WireError(Code.TIMEOUT, "m", 0)).retry_after == 0
