"""The worker's handler: what each request is answered, and that no ID is answered twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any, Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.daemon.tools import failure, result
from zflake.core.layout import PRESETS, Field, Layout
from zflake.core.mint import Mint
from zflake.holder.clock import HolderClock
from zflake.wire.codec import Response, decode_response, encode_error, encode_request, encode_result
from zflake.wire.ids import MAX_COUNT, MAX_TIMEOUT_MS
from zflake.worker.handler import LEAVING_MS, Handler, shares

EPOCH_MS: Final = 1_577_836_800_000
# Eight IDs a tick: a few requests use it up.
SMALL = Layout("small", (Field("time", 41), Field("machine", 10), Field("sequence", 3)), EPOCH_MS)
FULL: Final = SMALL.ids_per_tick
SECOND: Final = 1_000_000
REQUEST = [b"", b"client", b""]

thorough = settings(deadline=None, max_examples=100)


class FixedClock(HolderClock):
    """The timeline at the time that the test chooses."""

    us: int | None = None

    def timeline_us(self) -> int | None:
        return self.us


class Hold:
    """A machine ID with a window that the test chooses, and a clock that only the test moves."""

    store_id: str | None = "here"
    state = "HELD"
    token = b""
    is_open = True

    def __init__(self, layout: Layout = SMALL, window: tuple[int, int] | None = (0, 1 << 40)) -> None:
        self.mint: Mint | None = Mint(layout, 5)
        self.clock = FixedClock(lambda: 0)
        if window:
            self.mint.grant(*window)

    def retry_after_ms(self, _local_us: int) -> int:
        return 250


class World:
    """A handler in a time that only the test moves; the local clock is the timeline's less an hour."""

    def __init__(self, hold: Hold | None = None) -> None:
        self.hold = hold or Hold()
        self.us = EPOCH_MS * 1000 + 1_000_500
        self.local_us = 7 * SECOND
        self.handler: Handler[list[bytes]] = Handler(self.hold, lambda: {"name": "me"}, itemgetter(0))
        self._msgid = 0

    @property
    def us(self) -> int | None:
        """The timeline's now."""
        return self.hold.clock.us

    @us.setter
    def us(self, us: int | None) -> None:
        self.hold.clock.us = us

    def tick(self, ticks: float = 1) -> None:
        assert self.us is not None
        self.us += int(ticks * 1000)
        self.local_us += int(max(0, ticks) * 1000)

    def ask(self, method: str, *params: Any, age_us: int = 0, name: bytes = b"client") -> Response | None:
        """The answer, or None where the request was parked or dropped."""
        self._msgid += 1
        body = encode_request(self._msgid, method, params)
        answer = self.handler.handle([name, b""], body, self.local_us - age_us, self.local_us)
        if answer is None:
            return None
        response = decode_response(answer)
        assert response.msgid == self._msgid
        return response

    def next(self, count: int = 1, timeout_ms: int = 1000, **more: Any) -> Response | None:
        return self.ask("ids.next", count, timeout_ms, **more)

    def use_up(self) -> None:
        assert len(ids(self.next(FULL))) == FULL

    def turn(self) -> dict[bytes, Response]:
        return {prefix[0]: decode_response(answer) for prefix, answer in self.handler.turn(self.local_us)}


@pytest.fixture
def world() -> World:
    return World()


def ids(response: Response | None) -> list[int]:
    first, step, count = result(response)
    return list(range(first, first + step * count, step))


def code(response: Response | None) -> str:
    return failure(response).code


# --- ids.next ---


def test_ids_carry_the_ticks_time_and_the_machine_and_ascend(world: World) -> None:
    got = ids(world.next(3)) + ids(world.next(2))
    assert [(d.tick, d.machine, d.sequence) for d in map(SMALL.decompose, got)] == [
        (1000, 5, n) for n in range(5)
    ]


def test_a_run_is_short_where_the_tick_holds_no_more(world: World) -> None:
    assert len(ids(world.next(5))) == 5
    assert len(ids(world.next(5))) == FULL - 5


def test_the_most_that_may_be_asked_is_answered_with_one_tick(world: World) -> None:
    assert len(ids(world.next(MAX_COUNT, MAX_TIMEOUT_MS))) == FULL


def test_a_request_that_finds_the_tick_used_up_waits_for_the_next_one(world: World) -> None:
    world.use_up()
    assert world.next(3) is None
    assert world.handler.parked == 1
    assert world.handler.wait_us() == 500
    assert world.turn() == {}
    world.tick(0.4)
    assert world.turn() == {}
    world.tick(0.1)
    assert world.handler.wait_us() == 0
    assert [SMALL.decompose(i).tick for i in ids(world.turn()[b"client"])] == [1001] * 3
    assert world.handler.parked == 0


def test_an_answer_to_a_parked_request_goes_back_by_its_own_envelope_and_msgid(world: World) -> None:
    world.use_up()
    for number in (17, 4):
        body = encode_request(number, "ids.next", [1, 9])
        assert world.handler.handle([b"%d" % number, b"hop", b""], body, 0, 0) is None
    world.tick()
    answers = world.handler.turn(0)
    assert [(prefix, decode_response(body).msgid) for prefix, body in answers] == [
        ([b"17", b"hop", b""], 17),
        ([b"4", b"hop", b""], 4),
    ]


@pytest.mark.parametrize(
    ("asked", "shares"),
    [
        ([8, 8], [4, 4]),
        ([8, 8, 8], [2, 3, 3]),
        ([1, 8], [1, 7]),
        ([8, 1], [7, 1]),
        ([2, 8, 3], [2, 3, 3]),
        ([100] * FULL, [1] * FULL),
    ],
)
def test_parked_requests_share_the_next_tick(world: World, asked: list[int], shares: list[int]) -> None:
    world.use_up()
    for number, count in enumerate(asked):
        assert world.next(count, name=b"%d" % number) is None
    world.tick()
    answers = world.turn()
    assert [len(ids(answers[b"%d" % number])) for number in range(len(asked))] == shares


@given(st.lists(st.integers(1, 20), min_size=1, max_size=FULL))
@thorough
def test_every_parked_request_gets_at_least_one_id_and_at_most_what_it_asked_for(asked: list[int]) -> None:
    world = World()
    world.use_up()
    for number, count in enumerate(asked):
        world.next(count, name=b"%d" % number)
    world.tick()
    answers = world.turn()
    got = [ids(answers[b"%d" % number]) for number in range(len(asked))]
    assert all(1 <= len(run) <= count for run, count in zip(got, asked, strict=True))
    assert len({i for run in got for i in run}) == sum(map(len, got)) <= FULL


def test_a_peer_with_many_requests_gets_no_more_than_one_with_a_single_request(world: World) -> None:
    world.use_up()
    for _ in range(3):
        assert world.next(100, name=b"greedy") is None
    assert world.next(100, name=b"modest") is None
    assert world.next(1, name=b"small") is None
    world.tick()
    got: dict[bytes, list[int]] = {}
    for prefix, answer in world.handler.turn(world.local_us):
        got.setdefault(prefix[0], []).append(len(ids(decode_response(answer))))
    assert got == {b"greedy": [1, 1, 2], b"modest": [3], b"small": [1]}


def test_one_peer_s_many_requests_cost_another_no_id(world: World) -> None:
    world.use_up()
    for _ in range(FULL - 1):
        assert world.next(1, name=b"greedy") is None
    assert world.next(100, name=b"modest") is None
    world.tick()
    told = [(prefix[0], decode_response(answer)) for prefix, answer in world.handler.turn(world.local_us)]
    assert [len(ids(response)) for name, response in told if name == b"modest"] == [FULL // 2]
    greedy = [response for name, response in told if name == b"greedy"]
    assert [len(ids(response)) for response in greedy[: FULL // 2]] == [1] * (FULL // 2)
    refusals = [failure(response) for response in greedy[FULL // 2 :]]
    assert {(r.code, r.retry_after_ms) for r in refusals} == {("overloaded", SMALL.tick_ms)}
    assert [response.msgid for response in greedy] == sorted(response.msgid or 0 for response in greedy)


def test_when_no_more_can_wait_the_peer_with_most_requests_loses_its_newest(world: World) -> None:
    world.use_up()
    for _ in range(FULL):
        assert world.next(name=b"greedy") is None
    for number in range(FULL // 2 - 1):
        assert world.next(name=b"%d" % number) is None, "one of greedy's makes room"
        ((prefix, answer),) = world.handler.turn(world.local_us)
        response = decode_response(answer)
        assert (prefix[0], response.msgid, code(response)) == (b"greedy", 1 + FULL - number, "overloaded")
    assert world.handler.parked == FULL
    assert code(world.next(name=b"greedy")) == "overloaded"
    world.tick()
    answers = [decode_response(answer) for _, answer in world.handler.turn(world.local_us)]
    assert [len(ids(response)) for response in answers] == [1] * FULL
    assert world.handler.parked == 0


def test_peers_that_have_as_many_requests_as_each_other_take_no_places(world: World) -> None:
    world.use_up()
    for number in range(FULL):
        assert world.next(name=b"%d" % number) is None
    assert code(world.next(name=b"late")) == "overloaded"
    assert world.turn() == {}


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(0, 60))
@thorough
def test_shares_are_what_is_wanted_or_as_much_as_any_other_and_nothing_is_left_over(
    wanted: list[int], there: int
) -> None:
    given = shares(wanted, there)
    assert sum(given) == min(there, sum(wanted))
    short = [share for share, want in zip(given, wanted, strict=True) if share < want]
    assert all(share <= want for share, want in zip(given, wanted, strict=True))
    assert all(max(given) - share <= 1 for share in short)


def test_nobody_overtakes_a_parked_request(world: World) -> None:
    world.use_up()
    assert world.next(name=b"early") is None
    world.tick()
    assert world.next(name=b"late") is None
    answers = world.turn()
    assert ids(answers[b"early"]) < ids(answers[b"late"])


def test_more_requests_than_the_next_tick_has_ids_are_overloaded_with_a_time_to_come_back(
    world: World,
) -> None:
    world.use_up()
    assert all(world.next() is None for _ in range(FULL))
    refusal = failure(world.next())
    assert (refusal.code, refusal.retry_after_ms) == ("overloaded", SMALL.tick_ms)
    assert world.handler.parked == FULL


def test_a_request_with_no_time_left_is_a_timeout_and_mints_nothing(world: World) -> None:
    assert code(world.next(timeout_ms=0)) == "timeout"
    assert world.handler.ids == 0


def test_a_request_whose_time_ran_out_before_it_was_read_mints_nothing(world: World) -> None:
    assert code(world.next(timeout_ms=1000, age_us=SECOND)) == "timeout"
    assert code(world.next(timeout_ms=1000, age_us=60 * SECOND)) == "timeout"
    assert world.handler.ids == 0
    assert len(ids(world.next(timeout_ms=1000, age_us=SECOND - 1))) == 1


def test_a_parked_request_whose_time_runs_out_mints_nothing_and_leaves_its_share(world: World) -> None:
    world.use_up()
    world.next(FULL, 1, name=b"hasty")
    world.next(FULL, 1000, name=b"patient")
    world.tick()
    answers = world.turn()
    assert code(answers[b"hasty"]) == "timeout"
    assert len(ids(answers[b"patient"])) == FULL


# --- no window ---


def expired(response: Response | None) -> None:
    refusal = failure(response)
    assert (refusal.code, refusal.retry_after_ms) == ("lease_expired", Hold().retry_after_ms(0))


def lose(world: World, what: str) -> None:
    if what == "the machine ID":
        world.hold.mint = None
    else:
        world.us = None


LOST: Final = ["the machine ID", "the time"]


@pytest.mark.parametrize("what", LOST)
def test_without_a_machine_id_or_a_time_the_lease_has_expired(world: World, what: str) -> None:
    lose(world, what)
    expired(world.next())


@pytest.mark.parametrize("window", [None, (0, 1000), (1002, 9999)])
def test_outside_its_windows_the_lease_has_expired(window: tuple[int, int] | None) -> None:
    expired(World(Hold(window=window)).next())


def test_a_window_that_opens_with_the_next_tick_is_waited_for() -> None:
    world = World(Hold(window=(1001, 2000)))
    assert world.next() is None
    world.tick()
    assert len(ids(world.turn()[b"client"])) == 1


def test_the_last_tick_of_a_window_used_up_parks_nobody() -> None:
    world = World(Hold(window=(0, 1001)))
    world.use_up()
    expired(world.next())
    assert world.handler.parked == 0


@pytest.mark.parametrize("what", LOST)
def test_whoever_is_parked_when_the_lease_goes_is_told_so(world: World, what: str) -> None:
    world.use_up()
    for _ in range(FULL - 1):
        world.next(name=b"a")
    world.next(FULL, name=b"b")
    lose(world, what)
    answers = world.handler.turn(world.local_us)
    assert len(answers) == FULL
    for _, answer in answers:
        expired(decode_response(answer))


def test_a_clock_that_leaps_back_parks_nobody_for_longer_than_a_tick(world: World) -> None:
    world.use_up()
    world.tick(-100)
    expired(world.next())


def test_a_clock_that_went_back_goes_on_in_the_last_tick(world: World) -> None:
    before = ids(world.next(3))
    world.tick(-100)
    assert ids(world.next(2))[0] > before[-1]


def test_a_draining_worker_is_unavailable_and_says_for_how_long(world: World) -> None:
    world.handler.draining = True
    refusal = failure(world.next())
    assert (refusal.code, refusal.retry_after_ms) == ("unavailable", LEAVING_MS)
    assert world.handler.ids == 0


# --- the other methods ---


def test_ping_tells_the_time(world: World) -> None:
    assert result(world.ask("ping")) == {"now_us": world.us}


def test_hello_says_service_layout_and_machine(world: World) -> None:
    said = result(world.ask("hello"))
    assert (said["service"], said["protocol"], said["machine"], said["name"]) == ("worker", 1, 5, "me")
    assert Layout.from_map(said["layout"]).same_ids(SMALL)


def test_hello_without_a_lease_has_neither_layout_nor_machine(world: World) -> None:
    world.hold.mint = None
    said = result(world.ask("hello"))
    assert (said["layout"], said["machine"]) == (None, None)


@pytest.mark.parametrize(
    "method", ["", "ids", "ids.next ", "lease.acquire", "cluster.workers", "__init__", "x" * 9000, "\x00\n"]
)
def test_an_unknown_method_is_refused(world: World, method: str) -> None:
    refusal = failure(world.ask(method))
    assert refusal.code == "unknown_method"
    assert len(refusal.message) < 400


@pytest.mark.parametrize("method", ["hello", "ping"])
def test_methods_that_take_nothing_refuse_params(world: World, method: str) -> None:
    assert code(world.ask(method, 1)) == "bad_request"


def test_a_page_of_the_status_is_all_of_it(world: World) -> None:
    assert result(world.ask("cluster.status", 7)).keys() == result(world.ask("cluster.status")).keys()


def test_the_figures_count_what_happened(world: World) -> None:
    world.next(5)
    world.next(5)  # short: 3
    world.next(1)  # parked
    world.next(timeout_ms=0)
    world.ask("nonsense")
    world.handler.handle(REQUEST, b"\xc1", 0, 0)
    world.handler.handle(REQUEST, encode_result(1, None), 0, 0)
    figures = {
        "requests": 8,
        "ids": FULL,
        "dropped": 1,
        "parked": 1,
        "errors": {"timeout": 1, "unknown_method": 1, "bad_request": 1},
    }
    assert figures.items() <= result(world.ask("cluster.status")).items()
    world.tick()
    world.turn()
    assert world.handler.ids == FULL + 1


# --- malformed requests ---

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
methods = st.sampled_from(["ids.next", "hello", "ping", "cluster.status", "lease.acquire"]) | st.text(
    max_size=9
)


def handled(world: World, body: bytes) -> Response | None:
    """Handle a body as a server would, and hold the handler to: an answer, or a place among the counted."""
    handler = world.handler
    before = (handler.requests.dropped, handler.parked)
    answer = handler.handle(REQUEST, body, world.local_us, world.local_us)
    if answer is not None:
        assert (handler.requests.dropped, handler.parked) == before
        return decode_response(answer)
    assert handler.requests.dropped + handler.parked == sum(before) + 1
    return None


@given(st.binary(max_size=200) | values.map(msgpack.packb))
@thorough
def test_anything_in_place_of_a_request_is_answered_or_counted(body: bytes) -> None:
    response = handled(World(), body)
    if response is not None and response.error is not None:
        assert response.error.code in {"bad_request", "unknown_method", "timeout"}


@given(st.integers(0, 2**32 - 1), methods, values)
@thorough
def test_wrong_params_are_answered_and_mint_nothing(msgid: int, method: str, params: Any) -> None:
    world = World()
    response = handled(world, msgpack.packb((0, msgid, method, params)))
    assert response is not None
    assert response.msgid == msgid
    right = (
        method == "ids.next"
        and isinstance(params, list)
        and len(params) == 2
        and all(type(p) is int for p in params)
        and 1 <= params[0] <= MAX_COUNT
        and 1 <= params[1] <= MAX_TIMEOUT_MS
    )
    assert (world.handler.ids > 0) == right


def test_a_count_out_of_range_is_a_bad_request(world: World) -> None:
    assert code(world.next(MAX_COUNT + 1)) == "bad_request"
    assert world.handler.ids == 0


@pytest.mark.parametrize("depth", [1, 100, 500, 900, 1000, 1015, 1020, 1021, 1022, 1023, 10_000])
def test_nested_arrays_are_a_bad_request_at_any_depth(world: World, depth: int) -> None:
    nested = b"\x91" * depth + b"\x05"
    for body in (
        nested,
        b"\x94\x00\x07\xa8ids.next\x92" + nested + b"\x01",
        b"\x94\x00\x07\xa4ping\x91" + nested,
        b"\x94\x00\x07" + nested + b"\x90",
        b"\x94" + nested + b"\x07\xa4ping\x90",
    ):
        assert code(handled(world, body)) == "bad_request"


def test_a_response_and_a_notification_get_no_answer(world: World) -> None:
    for body in (encode_result(1, {}), encode_error(1, "timeout", ""), msgpack.packb([2, "ping", []])):
        assert handled(world, body) is None
    assert world.handler.requests.dropped == 3


# --- uniqueness ---


def traffic(seed: int, world: World) -> Iterator[list[int]]:
    """Random requests while the clock does as it likes; gives the runs that were answered."""
    rng = random.Random(seed)
    granted = 0
    for _ in range(200):
        match rng.randrange(12):
            case 0 | 1:
                world.tick(rng.choice([0.1, 0.5, 1, 1, 1, 2, 50]))
            case 2:
                world.tick(-rng.choice([0.3, 1, 3, 500]))
            case 3 if world.hold.mint is not None and rng.random() < 0.5:
                assert world.us is not None
                now = (world.us // 1000) - EPOCH_MS
                start = max(granted, now) + rng.randrange(3)
                granted = start + rng.randrange(1, 50)
                world.hold.mint.grant(start, granted)
            case 4 | 5:
                for answer in world.turn().values():
                    if answer.error is None:
                        yield ids(answer)
            case _:
                response = world.next(
                    rng.choice([1, 1, 2, 8, 100]), rng.choice([1, 5, 1000]), name=rng.randbytes(8)
                )
                if response is not None and response.error is None:
                    yield ids(response)


def minted(seed: int) -> int:
    """How many IDs random traffic got, each of them above the one before."""
    world = World(Hold(window=None))
    world.us = EPOCH_MS * 1000
    got = [i for run in traffic(seed, world) for i in run]
    assert all(a < b for a, b in pairwise(got))
    assert len(got) == world.handler.ids
    return len(got)


@given(st.integers(0, 2**32))
@thorough
def test_no_id_is_answered_twice_and_ids_ascend_whatever_the_clock_does(seed: int) -> None:
    minted(seed)


def test_random_traffic_does_get_ids() -> None:
    assert sum(map(minted, range(20))) > 100


@pytest.mark.parametrize("layout", PRESETS.values(), ids=PRESETS)
def test_every_layout_fills_its_tick_and_goes_on_in_the_next(layout: Layout) -> None:
    world = World(Hold(layout, (0, layout.end_tick)))
    assert world.us is not None
    first = ids(world.next(MAX_COUNT))
    assert len(first) == layout.ids_per_tick
    assert world.next(MAX_COUNT) is None
    world.tick(layout.tick_ms)
    second = ids(world.turn()[b"client"])
    assert [layout.decompose(i).sequence for i in (second[0], second[-1])] == [0, layout.ids_per_tick - 1]
    assert layout.decompose(second[0]).tick == layout.decompose(first[0]).tick + 1


def test_a_request_for_another_cluster_is_refused(world: World) -> None:
    for store_id in ("here", None):
        assert ids(world.ask("ids.next", 1, 1000, store_id))
    assert code(world.ask("ids.next", 1, 1000, "elsewhere")) == "other_cluster"


def test_a_static_worker_serves_any_cluster(world: World) -> None:
    world.hold.store_id = None
    assert ids(world.ask("ids.next", 1, 1000, "elsewhere"))
