"""The lease conversation with scripted delegators, in a time that only the test moves: one token through every retry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import Grant, Holder
from zflake.core.lessee import MAX_HINT_US, RETRY_US, State
from zflake.core.mint import Mint
from zflake.errors import LayoutError
from zflake.holder.clock import HolderClock
from zflake.holder.lease import (
    ABANDON_US,
    MAX_PATIENCE_US,
    PING_US,
    RELEASE_RETRY_US,
    LeaseConversation,
)
from zflake.wire.codec import decode_request, encode_error, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.methods import PROTOCOL_VERSION

LAYOUT: Final = PRESETS["snowcloud"]
TTL: Final = 30_000
TRIP_US: Final = 200
ME: Final = Holder("me", "here", 7, "tcp://127.0.0.1:9999")
AWAY: Final = None
"""A place at which no delegator answers."""


class Desk:
    """A scripted delegator: `refuse`, `raw` or `silent` come before granting."""

    def __init__(self, scene: Scene) -> None:
        self.service: Any = "delegator"
        self.store_id: Any = "here"
        self.protocol: Any = PROTOCOL_VERSION
        self.layout: Any = LAYOUT.to_map()
        self.grant_layout: Any = LAYOUT.to_map()
        self.refuse: tuple[str, int | None] | None = None
        self.raw: Any = None
        self.silent = False
        self.machine = 3
        self.asked: list[tuple[str, list[Any]]] = []
        self.end = 0
        self.granted: dict[bytes, dict[str, Any]] = {}
        self._scene = scene
        self._gen = 0

    def calls(self, method: str) -> list[list[Any]]:
        return [params for name, params in self.asked if name == method]

    def answer(self, body: bytes) -> bytes | None:
        msgid, method, params = decode_request(body)
        self.asked.append((method, params))
        now = {"now_us": self._scene.timeline_us}
        if method == "hello":
            about = {"service": self.service, "protocol": self.protocol, "layout": self.layout}
            return encode_result(msgid, {**about, "store_id": self.store_id, **now})
        if method == "ping":
            return encode_result(msgid, now)
        if self.silent:
            return None
        if self.raw is not None:
            return encode_result(msgid, self.raw)
        if self.refuse is not None:
            code, retry_after_ms = self.refuse
            return encode_error(msgid, code, "because", retry_after_ms)
        if method == "lease.renew" and params[5] not in (None, self.store_id):
            return encode_error(msgid, "other_cluster", "that lease is another store's")
        if method == "lease.release":
            return encode_result(msgid, {"machine": params[0], "fence": self._scene.tick, **now})
        token = params[0] if method == "lease.acquire" else params[3]
        if token not in self.granted:
            self._gen += 1
            start = self._scene.tick if method == "lease.acquire" else max(self._scene.tick, self.end)
            self.end = self._scene.tick + TTL
            self.granted[token] = {"gen": self._gen, "start": start, "end": self.end}
        grant = {"machine": self.machine, "token": token, "ttl": TTL, "layout": self.grant_layout}
        return encode_result(msgid, {**grant, **self.granted[token], **now})


class Scene:
    """Conversations, the delegators that they talk to, and the time."""

    def __init__(self) -> None:
        self.local_us = 5_000_000
        self._places: dict[str, Desk | None] = {}
        self._tokens = 0

    @property
    def timeline_us(self) -> int:
        return (LAYOUT.epoch_ms + 1_000_000) * 1000 + self.local_us

    @property
    def tick(self) -> int:
        return 1_000_000 + self.local_us // 1000

    def desk(self) -> Desk:
        return Desk(self)

    def lease(self, *desks: Desk | None, layout: Layout | None = None, first: int = 0) -> LeaseConversation:
        endpoints = []
        for desk in desks:
            endpoints.append(parse_endpoint(f"tcp://127.0.0.1:{7000 + len(self._places)}"))
            self._places[endpoints[-1].text] = desk
        return LeaseConversation(
            endpoints,
            ME,
            clock=HolderClock(lambda: self.local_us),
            draw_token=self._draw_token,
            jitter=lambda: 0.5,
            first=first,
            layout=layout,
        )

    def one(self, *, layout: Layout | None = None) -> tuple[Desk, LeaseConversation]:
        """A delegator, and a conversation with it."""
        desk = self.desk()
        return desk, self.lease(desk, layout=layout)

    def holding(self, *, layout: Layout | None = None) -> tuple[Desk, LeaseConversation, Mint]:
        """The same once it has a machine ID, with its mint."""
        desk, lease = self.one(layout=layout)
        return desk, lease, self.held(lease)

    def _draw_token(self) -> bytes:
        self._tokens += 1
        return self._tokens.to_bytes(16, "big")

    def serve(self, lease: LeaseConversation) -> None:
        """Let the conversation have its turns until it waits, or for a while."""
        for _ in range(20):
            body = lease.poll(self.local_us)
            if body is None:
                return
            desk = self._places[lease.endpoint.text]
            answer = None if desk is None else desk.answer(body)
            self.local_us += TRIP_US
            if answer is not None:
                lease.receive(answer, self.local_us)

    def until(self, lease: LeaseConversation, condition: Callable[[], Any]) -> None:
        """Let time pass until the condition holds."""
        for _ in range(2_000):
            self.serve(lease)
            if condition():
                return
            self.local_us = max(self.local_us + 1, lease.wake_us)
        pytest.fail("it never came to that")

    def held(self, lease: LeaseConversation) -> Mint:
        self.until(lease, lambda: lease.is_open)
        assert lease.mint is not None
        return lease.mint

    def due(self, lease: LeaseConversation) -> None:
        """Go on to when the next lease request is due."""
        self.local_us = max(self.local_us, lease.lessee.send_at_us)


@pytest.fixture
def scene() -> Scene:
    return Scene()


# --- taking and keeping ---


def test_it_greets_then_acquires_as_its_holder_and_mints_in_the_window(scene: Scene) -> None:
    desk, lease = scene.one()
    assert lease.mint is None
    mint = scene.held(lease)
    assert [method for method, _ in desk.asked] == ["hello", "lease.acquire"]
    token, *holder = desk.calls("lease.acquire")[0]
    assert len(token) == 16
    assert holder == ["me", "here", 7, "tcp://127.0.0.1:9999"]
    run = mint.take(lease.clock.tick(LAYOUT), 1)
    assert run is not None
    assert LAYOUT.decompose(run[0]).machine == 3
    assert (lease.token, lease.store_id, lease.state) == (token, "here", "HELD")


def test_it_pings_several_times_a_second_to_keep_its_clock(scene: Scene) -> None:
    desk, lease, _ = scene.holding()
    began_us = scene.local_us
    scene.until(lease, lambda: len(desk.calls("ping")) >= 8)
    assert scene.local_us - began_us < 9 * PING_US
    assert not desk.calls("lease.renew")


def test_it_renews_when_a_third_of_the_ttl_has_passed_and_mints_on(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    before, began_us = mint.end, scene.local_us
    scene.until(lease, lambda: desk.calls("lease.renew"))
    assert 0.25 < (scene.local_us - began_us) / (TTL * 1000) < 0.4
    machine, token, gen, pending, end, _ = desk.calls("lease.renew")[0]
    assert (machine, token, gen, end) == (3, desk.calls("lease.acquire")[0][0], 1, before)
    assert pending != token
    assert lease.mint is mint
    assert lease.is_open
    assert before < mint.end == desk.end


def test_a_request_without_an_answer_keeps_its_token_on_every_endpoint(scene: Scene) -> None:
    a, b = scene.desk(), scene.desk()
    a.silent = b.silent = True
    lease = scene.lease(a, b)
    connections = set()
    for desk in (a, b, a, b):
        before = len(desk.calls("lease.acquire"))
        scene.until(lease, partial(asked_more, desk, before))
        connections.add(lease.connection)
    assert len(connections) == 4, "what was under way on a connection is given up with it"
    b.silent = a.silent = False
    scene.held(lease)
    assert len({call[0] for desk in (a, b) for call in desk.calls("lease.acquire")}) == 1


def asked_more(desk: Desk, before: int) -> bool:
    return len(desk.calls("lease.acquire")) > before


@pytest.mark.parametrize(
    "refuse",
    [
        ("unavailable", 500),
        ("unavailable", None),
        ("overloaded", 1000),
        ("no_free_machine", 700),
        ("too_early", 400),
        ("timeout", None),
        ("no such code", 0),
        ("bad_request", None),
        ("lost", None),  # there was no lease
    ],
)
def test_a_refusal_that_is_no_answer_keeps_the_token(scene: Scene, refuse: tuple[str, int | None]) -> None:
    desk, lease = scene.one()
    desk.refuse = refuse
    scene.until(lease, lambda: len(desk.calls("lease.acquire")) >= 3)
    desk.refuse = None
    scene.held(lease)
    assert len({call[0] for call in desk.calls("lease.acquire")}) == 1


def test_a_renewal_keeps_its_token_too_and_shows_the_old_one(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    before, desk.silent = mint.end, True
    scene.until(lease, lambda: len(desk.calls("lease.renew")) >= 3)
    desk.silent = False
    scene.until(lease, lambda: mint.end > before)
    assert len({tuple(call) for call in desk.calls("lease.renew")}) == 1


def test_an_answer_to_an_older_request_settles_nothing(scene: Scene) -> None:
    desk, lease = scene.one()
    desk.silent = True
    scene.until(lease, lambda: desk.calls("lease.acquire"))
    grant = {"machine": 3, "gen": 1, "start": scene.tick, "end": scene.tick + TTL, "ttl": TTL}
    token = desk.calls("lease.acquire")[0][0]
    late = encode_result(lease._msgid - 1, {**grant, "token": token, "layout": LAYOUT.to_map()})
    lease.receive(late, scene.local_us)
    assert lease.mint is None
    assert lease.poll(scene.local_us) is None, "the answer is still waited for"


@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_endpoint_may_be_the_first_and_the_next_ones_follow(scene: Scene, first: int) -> None:
    desks = [scene.desk() for _ in range(3)]
    for desk in desks:
        desk.refuse = ("unavailable", 0)
    lease = scene.lease(*desks, first=first)
    for k in range(3):
        desk = desks[(first + k) % 3]
        while not desk.calls("lease.acquire"):
            body = lease.poll(scene.local_us)
            assert body is not None
            asked = scene._places[lease.endpoint.text]
            assert asked is desk
            answer = desk.answer(body)
            assert answer is not None
            lease.receive(answer, scene.local_us)
        assert sum(len(each.calls("lease.acquire")) for each in desks) == k + 1


def test_unavailable_sends_it_to_the_next_endpoint(scene: Scene) -> None:
    a, b = scene.desk(), scene.desk()
    a.refuse = ("unavailable", 0)
    scene.held(scene.lease(a, b))
    assert a.calls("lease.acquire") == b.calls("lease.acquire")


@pytest.mark.parametrize("code", ["too_early", "unavailable"])
@pytest.mark.parametrize(("hint_ms", "wait_us"), [(700, 700_000), (7_000, MAX_HINT_US)])
def test_the_time_to_wait_is_honoured_up_to_a_bound(
    scene: Scene, code: str, hint_ms: int, wait_us: int
) -> None:
    desk, lease = scene.one()
    desk.refuse = (code, hint_ms)
    scene.until(lease, lambda: desk.calls("lease.acquire"))
    began_us = scene.local_us
    scene.until(lease, lambda: len(desk.calls("lease.acquire")) == 2)
    assert wait_us <= scene.local_us - began_us < wait_us + PING_US
    assert desk.calls("ping"), "it keeps its clock meanwhile"


# --- loss ---


def test_lost_throws_the_mint_away_and_acquires_afresh(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    desk.refuse = ("lost", None)
    scene.due(lease)
    scene.until(lease, lambda: lease.mint is None)
    assert mint.take(lease.clock.tick(LAYOUT), 1) is None
    desk.refuse = None
    assert scene.held(lease) is not mint
    acquired = [call[0] for call in desk.calls("lease.acquire")]
    renewed = desk.calls("lease.renew")[0]
    assert len({*acquired, renewed[1], renewed[3]}) == 3


def test_a_holder_whose_window_ran_out_renews_and_does_not_acquire(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    desk.silent = True
    scene.local_us += TTL * 1000
    scene.serve(lease)
    assert lease.lessee.state is State.LAPSED
    assert mint.take(lease.clock.tick(LAYOUT), 1) is None
    desk.silent = False
    assert scene.held(lease) is mint
    assert len(desk.calls("lease.acquire")) == 1


@pytest.mark.parametrize("raw", ["nonsense", {}, {"layout": 7}], ids=repr)
def test_a_grant_that_is_none_is_survived(scene: Scene, raw: Any) -> None:
    desk, lease = scene.one()
    desk.raw = raw
    scene.until(lease, lambda: len(desk.calls("lease.acquire")) >= 2)
    assert lease.mint is None
    desk.raw = None
    scene.held(lease)


# --- whom it talks to ---


def test_a_worker_in_the_place_of_a_delegator_is_asked_for_no_lease(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    worker = scene.desk()
    worker.service = "worker"
    lease = scene.lease(worker)
    began_us = scene.local_us
    scene.until(lease, lambda: len(worker.calls("hello")) >= 4)
    assert scene.local_us - began_us > 2 * RETRY_US, "it hammers"
    assert not worker.calls("lease.acquire")
    assert "it is a worker" in caplog.text


@pytest.mark.parametrize("service", [None, 7, [], "stranger"])
def test_a_stranger_is_passed_over_for_a_delegator(scene: Scene, service: Any) -> None:
    stranger = scene.desk()
    stranger.service = service
    scene.held(scene.lease(stranger, scene.desk()))
    assert not stranger.calls("lease.acquire")


@pytest.mark.parametrize(
    ("protocol", "layout"), [(2, LAYOUT.to_map()), (None, LAYOUT.to_map()), (1, None), (1, {})]
)
def test_a_delegator_that_it_can_not_talk_to_is_passed_over(scene: Scene, protocol: Any, layout: Any) -> None:
    stranger = scene.desk()
    stranger.protocol, stranger.layout = protocol, layout
    scene.held(scene.lease(stranger, scene.desk(), layout=LAYOUT))
    assert not stranger.calls("lease.acquire")


def test_another_layout_than_it_was_told_ends_it_before_it_asks(scene: Scene) -> None:
    desk, lease = scene.one(layout=PRESETS["twitter"])
    with pytest.raises(LayoutError, match=r"leases layout snowcloud.*not twitter"):
        scene.serve(lease)
    assert not desk.calls("lease.acquire")


def test_with_a_machine_in_hand_a_delegator_of_another_layout_is_passed_over(scene: Scene) -> None:
    desk, lease, mint = scene.holding(layout=LAYOUT)
    desk.layout, desk.silent = PRESETS["twitter"].to_map(), True
    greeted = len(desk.calls("hello"))
    scene.until(lease, lambda: len(desk.calls("hello")) > greeted + 1)
    assert lease.mint is mint


def test_the_layout_that_it_was_told_is_taken_under_any_name(scene: Scene) -> None:
    scene.held(scene.lease(scene.desk(), layout=Layout("mine", LAYOUT.fields, LAYOUT.epoch_ms)))


def test_a_grant_of_another_layout_than_the_greeting_said_is_dropped(scene: Scene) -> None:
    desk, lease = scene.one(layout=LAYOUT)
    desk.grant_layout = PRESETS["wide"].to_map()
    scene.until(lease, lambda: len(desk.calls("lease.acquire")) >= 2)
    assert lease.mint is None


@pytest.mark.parametrize("body", [b"\xc1", b"", b"\x91" * 1010, b"\x94\x01\x01\xc0"])
def test_bytes_that_are_no_message_are_survived(scene: Scene, body: bytes) -> None:
    lease = scene.lease(scene.desk())
    assert lease.poll(scene.local_us) is not None
    lease.receive(body, scene.local_us)
    scene.held(lease)


@pytest.mark.parametrize("lapsed", [False, True])
def test_another_cluster_is_passed_over_while_the_own_one_may_be_back(scene: Scene, *, lapsed: bool) -> None:
    desk, lease, mint = scene.holding()
    desk.store_id = "there"
    if lapsed:  # the timeline has left its windows behind
        scene.local_us += 2 * TTL * 1000
        lease._heard_us = scene.local_us
    asked = len(desk.asked)
    lease._go_on()
    until_us = scene.local_us + min(TTL * 1000, ABANDON_US) // 2
    scene.until(lease, lambda: scene.local_us > until_us)
    assert {method for method, _ in desk.asked[asked:]} == {"hello"}
    assert lease.mint is mint
    assert lease.lessee.state is (State.LAPSED if lapsed else State.HELD)


def test_a_lease_whose_cluster_is_gone_is_given_up_for_another_in_the_end(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    desk, lease, gone = scene.holding()
    desk.store_id, desk.granted, desk.machine = "there", {}, 4
    asked = len(desk.asked)
    lease._go_on()
    scene.until(lease, lambda: lease.mint is not gone and lease.is_open)
    assert lease.mint is not None
    assert (lease.mint.machine, lease.store_id) == (4, "there")
    assert gone.take(scene.tick, 1) is None
    assert {method for method, _ in desk.asked[asked:]} <= {"hello", "ping", "lease.acquire"}
    assert "going over to the one at" in caplog.text


def test_a_renewal_that_another_store_answers_makes_it_ask_who_that_is(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    desk.store_id, desk.refuse = "there", ("other_cluster", None)
    asked = len(desk.asked)
    scene.due(lease)
    scene.until(lease, lambda: "hello" in [method for method, _ in desk.asked[asked:]])
    assert lease.mint is mint
    assert lease.is_open


def test_a_lease_is_of_the_store_that_its_grant_names_however_the_grant_came(scene: Scene) -> None:
    desk, lease = scene.one()
    desk.refuse = ("no_free_machine", 1000)
    scene.until(lease, lambda: lease.refusal is not None)
    ((token, *_),) = desk.calls("lease.acquire")
    late = Grant(3, 1, scene.tick, scene.tick + TTL, token, LAYOUT, TTL, "gone")
    lease.lessee.receive(late, scene.local_us, scene.tick)
    assert lease.store_id == "gone"
    desk.refuse, desk.machine = None, 4
    scene.until(lease, lambda: lease.mint is not None and lease.mint.machine == 4)
    assert lease.store_id == "here"


# --- patience ---


def test_silence_doubles_the_patience_with_each_round_of_all_endpoints(scene: Scene) -> None:
    lease = scene.lease(AWAY, AWAY)
    waits = []
    for _ in range(10):
        assert lease.poll(scene.local_us) is not None
        waits.append(lease.wake_us - scene.local_us)
        scene.local_us = lease.wake_us
    assert waits == [RETRY_US << i // 2 for i in range(6)] + [MAX_PATIENCE_US] * 4
    desk = scene.desk()
    heard = scene.lease(AWAY, desk)
    scene.until(heard, lambda: heard.is_open)
    assert heard._silences == 0


def test_an_answer_has_three_times_as_long_as_the_last_one_took(scene: Scene) -> None:
    lease = scene.lease(scene.desk())
    scene.held(lease)
    lease._trip_us = 1_500_000
    assert lease._patience_us() >= 3 * lease._trip_us
    lease._trip_us = 60_000_000
    assert lease._patience_us() == MAX_PATIENCE_US


# --- release ---


def test_release_gives_the_machine_back_with_the_last_tick_minted_in(scene: Scene) -> None:
    desk, lease, mint = scene.holding()
    now = lease.clock.tick(LAYOUT)
    assert mint.take(now, 1) is not None
    lease.release()
    assert lease.releasing
    scene.serve(lease)
    assert not lease.releasing
    assert desk.calls("lease.release") == [[3, desk.calls("lease.acquire")[0][0], None, now]]
    assert mint.take(now + 1, 1) is None
    asked = len(desk.asked)
    scene.local_us += TTL * 1000
    scene.serve(lease)
    assert len(desk.asked) == asked, "a released holder is silent"


def test_release_states_no_tick_if_nothing_was_minted(scene: Scene) -> None:
    desk, lease, _ = scene.holding()
    lease.release()
    scene.serve(lease)
    assert desk.calls("lease.release")[0][3] is None


def test_release_in_the_midst_of_a_renewal_shows_both_tokens(scene: Scene) -> None:
    desk, lease, _ = scene.holding()
    desk.silent = True
    scene.due(lease)
    scene.until(lease, lambda: desk.calls("lease.renew"))
    desk.silent = False
    lease.release()
    scene.serve(lease)
    _, token, _, pending, *_ = desk.calls("lease.renew")[0]
    assert desk.calls("lease.release")[0][1:3] == [token, pending]


def test_lost_ends_a_release(scene: Scene) -> None:
    desk, lease, _ = scene.holding()
    desk.refuse = ("lost", None)
    lease.release()
    scene.serve(lease)
    assert not lease.releasing


def test_a_release_that_is_not_settled_is_sent_again_to_the_next_endpoint(scene: Scene) -> None:
    a, b = scene.desk(), scene.desk()
    lease = scene.lease(a, b)
    scene.held(lease)
    a.refuse = ("unavailable", 60_000)
    lease.release()
    scene.serve(lease)
    assert lease.releasing
    assert lease.refusal is not None
    assert lease.wake_us <= scene.local_us + RELEASE_RETRY_US
    scene.until(lease, lambda: not lease.releasing)
    assert a.calls("lease.release") == b.calls("lease.release")


def test_a_release_without_an_answer_is_sent_again(scene: Scene) -> None:
    desk, lease, _ = scene.holding()
    desk.silent = True
    lease.release()
    scene.until(lease, lambda: len(desk.calls("lease.release")) == 2)
    desk.silent = False
    scene.until(lease, lambda: not lease.releasing)


def test_a_release_of_nothing_asks_no_delegator(scene: Scene) -> None:
    desk, lease = scene.one()
    assert lease.release() is None
    scene.serve(lease)
    assert not desk.asked


def test_a_caller_is_never_told_to_come_back_at_once_or_much_later(scene: Scene) -> None:
    desk, lease = scene.one()
    assert 50 <= lease.retry_after_ms(scene.local_us) <= 1000
    desk.refuse = ("unavailable", 60_000)
    scene.until(lease, lambda: desk.calls("lease.acquire"))
    assert 50 <= lease.retry_after_ms(scene.local_us) <= 1000
