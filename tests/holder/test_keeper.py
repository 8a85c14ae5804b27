"""The lease keeper against scripted delegators: one token through every retry, no fright at any answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Script, Scripts, until
from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import Holder
from zflake.core.tenant import RETRY_US, State
from zflake.errors import LayoutError
from zflake.holder import clock, keeper
from zflake.holder.keeper import MAX_PATIENCE_US as PATIENCE_MOST_US
from zflake.holder.keeper import PATIENCE_US, LeaseKeeper
from zflake.wire.codec import encode_error, encode_request, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.messages import PROTOCOL_VERSION

LAYOUT: Final = PRESETS["snowcloud"]
TTL: Final = 30_000
ME: Final = Holder("me", "here", 7, "tcp://127.0.0.1:9999")


class Skewed:
    """The local clock, which the test sets forward: waits of seconds take none."""

    def __init__(self) -> None:
        self.ahead_us = 0

    def __call__(self) -> int:
        return time.monotonic_ns() // 1000 + self.ahead_us


@pytest.fixture(autouse=True)
def begins_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper begins anywhere among its endpoints; what follows is easier told where it begins with the first."""
    monkeypatch.setattr("zflake.holder.keeper.secrets.randbelow", lambda _: 0)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Skewed:
    local = Skewed()
    monkeypatch.setattr(keeper, "local_us", local)
    monkeypatch.setattr(clock, "local_us", local)
    return local


class Desk:
    """What a scripted delegator answers: `refuse` or `silent` come before granting."""

    def __init__(self, local: Skewed) -> None:
        self.service: Any = "delegator"
        self.store_id: Any = "here"
        self.protocol: Any = PROTOCOL_VERSION
        self.layout: Any = LAYOUT.to_map()
        self.grant_layout: Any = LAYOUT.to_map()
        self.refuse: tuple[str, int | None] | None = None
        self.raw: Any = None
        self.silent = False
        self.machine = 3
        self._local = local
        self._gen = 0
        self._granted: dict[bytes, dict[str, Any]] = {}
        self._end = 0

    @property
    def tick(self) -> int:
        return 1_000_000 + self._local() // 1000

    @property
    def now_us(self) -> int:
        return (LAYOUT.epoch_ms + 1_000_000) * 1000 + self._local()

    def __call__(self, method: str, params: list[Any], msgid: int) -> bytes | None:
        now = {"now_us": self.now_us}
        if method == "hello":
            return encode_result(
                msgid,
                {
                    "service": self.service,
                    "protocol": self.protocol,
                    "layout": self.layout,
                    "store_id": self.store_id,
                    **now,
                },
            )
        if method == "ping":
            return encode_result(msgid, now)
        if self.silent:
            return None
        if self.raw is not None:
            return encode_result(msgid, self.raw)
        if self.refuse is not None:
            code, retry_after_ms = self.refuse
            return encode_error(msgid, code, "because", retry_after_ms)
        if method == "lease.release":
            return encode_result(msgid, {"machine": params[0], "fence": self.tick, **now})
        token = params[0] if method == "lease.acquire" else params[3]
        if token not in self._granted:
            self._gen += 1
            start = self.tick if method == "lease.acquire" else max(self.tick, self._end)
            self._end = self.tick + TTL
            self._granted[token] = {"gen": self._gen, "start": start, "end": self._end}
        grant = {"machine": self.machine, "token": token, "ttl": TTL, "layout": self.grant_layout}
        return encode_result(msgid, {**grant, **self._granted[token], **now})


class Scene:
    """Keepers, with the delegators that they talk to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], script: Scripts, local: Skewed) -> None:
        self.local = local
        self.keepers: list[LeaseKeeper] = []
        self._context = context
        self._script = script

    def desk(self) -> tuple[Desk, Script]:
        desk = Desk(self.local)
        return desk, self._script(desk)

    def keeper(self, *scripts: Script | str, layout: Layout | None = None) -> LeaseKeeper:
        endpoints = [parse_endpoint(s if isinstance(s, str) else s.address) for s in scripts]
        self.keepers.append(LeaseKeeper(self._context, endpoints, ME, layout=layout))
        return self.keepers[-1]

    def until(self, keeper: LeaseKeeper, condition: Any, *, hurry: bool = False) -> None:
        """Serve the keeper until the condition holds; in a `hurry` its waits are skipped."""

        def serve() -> Any:
            keeper.service(self.local())
            if not condition():
                keeper.socket.poll(2)
                if hurry and keeper._pending is None:
                    self.local.ahead_us += max(0, keeper.wake_us - self.local())
            return condition()

        until(serve)

    def held(self, keeper: LeaseKeeper) -> None:
        self.until(keeper, lambda: keeper.tenant.state is State.HELD)

    def time_out(self, keeper: LeaseKeeper) -> None:
        """Let the answer under way be given up."""
        assert keeper._pending is not None
        self.local.ahead_us += max(RETRY_US, keeper._answer_by_us - self.local()) + 1
        keeper.service(self.local())

    def due(self, keeper: LeaseKeeper) -> None:
        """Go on to where the next lease request is due."""
        self.local.ahead_us += max(0, keeper.tenant.send_at_us - self.local() + 1)


@pytest.fixture
def scene(context: zmq.Context[zmq.Socket[bytes]], script: Scripts, local: Skewed) -> Iterator[Scene]:
    scene = Scene(context, script, local)
    yield scene
    for made in scene.keepers:
        made.close()


# --- taking and keeping ---


def test_it_greets_then_acquires_with_who_it_is_and_mints_in_the_window(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script)
    assert keeper.mint is None
    scene.held(keeper)
    assert [method for method, _ in script.asked] == ["hello", "lease.acquire"]
    token, *who = script.calls("lease.acquire")[0]
    assert len(token) == 16
    assert who == ["me", "here", 7, "tcp://127.0.0.1:9999"]
    assert keeper.mint is not None
    run = keeper.mint.take(keeper.clock.tick(LAYOUT), 1)
    assert run is not None
    assert LAYOUT.decompose(run[0]).machine == 3


def test_it_pings_several_times_a_second_to_keep_its_clock(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    start = scene.local()
    scene.until(keeper, lambda: len(script.calls("ping")) >= 8, hurry=True)
    assert scene.local() - start < 4_000_000
    assert len(script.calls("lease.renew")) == 0


def test_it_renews_when_a_third_of_the_ttl_has_passed_and_mints_on(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    mint, start = keeper.mint, scene.local()
    scene.until(keeper, lambda: script.calls("lease.renew"), hurry=True)
    assert 0.25 < (scene.local() - start) / (TTL * 1000) < 0.4
    assert mint is not None
    before = mint.end
    machine, token, gen, pending, end, _ = script.calls("lease.renew")[0]
    assert (machine, token, gen, end) == (3, script.calls("lease.acquire")[0][0], 1, before)
    assert pending != token
    scene.until(keeper, lambda: mint.end > before)
    assert keeper.mint is mint
    assert keeper.tenant.state is State.HELD
    assert mint.end == desk._end


def test_a_request_without_an_answer_keeps_its_token_on_every_endpoint(scene: Scene) -> None:
    (a, script_a), (b, script_b) = scene.desk(), scene.desk()
    a.silent = b.silent = True
    keeper = scene.keeper(script_a, script_b)
    for script in (script_a, script_b, script_a, script_b):
        before = len(script.calls("lease.acquire"))
        scene.until(keeper, lambda s=script, n=before: len(s.calls("lease.acquire")) > n)
        scene.time_out(keeper)
    b.silent = a.silent = False
    scene.held(keeper)
    tokens = {call[0] for script in (script_a, script_b) for call in script.calls("lease.acquire")}
    assert len(tokens) == 1


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
    ],
)
def test_a_refusal_that_is_no_answer_keeps_the_token(scene: Scene, refuse: tuple[str, int | None]) -> None:
    desk, script = scene.desk()
    desk.refuse = refuse
    keeper = scene.keeper(script)
    scene.until(keeper, lambda: len(script.calls("lease.acquire")) >= 3, hurry=True)
    desk.refuse = None
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)
    assert len({call[0] for call in script.calls("lease.acquire")}) == 1


def test_a_renewal_keeps_its_token_too_and_is_shown_the_old_one(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.silent = True
    scene.due(keeper)
    for _ in range(3):
        before = len(script.calls("lease.renew"))
        scene.until(keeper, lambda n=before: len(script.calls("lease.renew")) > n, hurry=True)
        scene.time_out(keeper)
    desk.silent = False
    assert keeper.mint is not None
    before = keeper.mint.end
    scene.until(keeper, lambda: keeper.mint and keeper.mint.end > before, hurry=True)
    assert len({tuple(call) for call in script.calls("lease.renew")}) == 1


def test_an_answer_that_comes_after_the_next_request_settles_nothing(scene: Scene) -> None:
    desk, script = scene.desk()
    desk.silent = True
    keeper = scene.keeper(script)
    scene.until(keeper, lambda: script.calls("lease.acquire"))
    pending = keeper._pending
    keeper._msgid += 1  # as though a newer request were under way
    desk.silent = False
    keeper.socket.send_multipart(
        [b"", encode_request(keeper._msgid - 1, "lease.acquire", script.calls("lease.acquire")[0])]
    )
    until(lambda: keeper.socket.poll(1))
    keeper.service(scene.local())
    assert keeper._pending is pending
    assert keeper.mint is None


@pytest.mark.parametrize("begins_at", [0, 1, 2])
def test_each_endpoint_may_be_the_first_and_the_next_ones_follow(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, begins_at: int
) -> None:
    desks, scripts = zip(*(scene.desk() for _ in range(3)), strict=True)
    for desk in desks:
        desk.refuse = ("unavailable", 0)
    drawn: list[int] = []

    def draw(most: int) -> int:
        drawn.append(most)
        return begins_at

    monkeypatch.setattr("zflake.holder.keeper.secrets.randbelow", draw)
    keeper = scene.keeper(*scripts)
    assert drawn == [3]
    for k in range(3):
        script = scripts[(begins_at + k) % 3]
        scene.until(keeper, lambda script=script: script.calls("lease.acquire"), hurry=True)
        asked = [len(each.calls("lease.acquire")) for each in scripts]
        assert sum(asked) == k + 1


def test_unavailable_sends_it_to_the_next_endpoint(scene: Scene) -> None:
    (a, script_a), (_, script_b) = scene.desk(), scene.desk()
    a.refuse = ("unavailable", 0)
    keeper = scene.keeper(script_a, script_b)
    scene.held(keeper)
    assert script_a.calls("lease.acquire") == script_b.calls("lease.acquire")


@pytest.mark.parametrize("code", ["too_early", "unavailable"])
def test_the_time_to_wait_is_honoured(scene: Scene, code: str) -> None:
    desk, script = scene.desk()
    desk.refuse = (code, 7000)
    keeper = scene.keeper(script)
    scene.until(keeper, lambda: keeper._greeted and keeper.tenant.send_at_us > scene.local() + 5_000_000)
    start = scene.local()
    scene.until(keeper, lambda: len(script.calls("lease.acquire")) == 2, hurry=True)
    assert 6_500_000 < scene.local() - start < 8_500_000
    assert script.calls("ping"), "it keeps its clock meanwhile"


# --- loss ---


def test_lost_throws_the_mint_away_and_acquires_afresh(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    mint = keeper.mint
    assert mint is not None
    desk.refuse = ("lost", None)
    scene.due(keeper)
    scene.until(keeper, lambda: keeper.mint is None)
    assert mint.take(keeper.clock.tick(LAYOUT), 1) is None
    desk.refuse = None
    scene.held(keeper)
    assert keeper.mint is not mint
    acquired = [call[0] for call in script.calls("lease.acquire")]
    renewed = script.calls("lease.renew")[0]
    assert len({*acquired, renewed[1], renewed[3]}) == 3


def test_lost_in_answer_to_an_acquire_is_survived(scene: Scene) -> None:
    desk, script = scene.desk()
    desk.refuse = ("lost", None)
    keeper = scene.keeper(script)
    scene.until(keeper, lambda: len(script.calls("lease.acquire")) >= 2, hurry=True)
    desk.refuse = None
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)


def test_a_holder_whose_window_ran_out_renews_and_does_not_acquire(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    mint = keeper.mint
    assert mint is not None
    desk.silent = True
    scene.local.ahead_us += TTL * 1000
    keeper.service(scene.local())
    assert _state(keeper) is State.LAPSED
    assert mint.take(keeper.clock.tick(LAYOUT), 1) is None
    desk.silent = False
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)
    assert keeper.mint is mint
    assert len(script.calls("lease.acquire")) == 1


@pytest.mark.parametrize(
    "raw",
    [
        None,
        7,
        [],
        {},
        {"machine": 3},
        {"machine": 5000, "layout": LAYOUT.to_map()},
        {
            "machine": 3,
            "gen": 1,
            "start": 9,
            "end": 3,
            "ttl": 5,
            "token": b"x" * 16,
            "layout": LAYOUT.to_map(),
        },
        {"layout": {"fields": [[]]}},
        {"layout": 7},
    ],
    ids=range(9),
)
def test_a_grant_that_is_none_is_survived(scene: Scene, raw: Any) -> None:
    desk, script = scene.desk()
    desk.raw = raw if raw is not None else "nonsense"
    keeper = scene.keeper(script)
    scene.until(keeper, lambda: len(script.calls("lease.acquire")) >= 2, hurry=True)
    assert keeper.mint is None
    desk.raw = None
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)


# --- whom it talks to ---


def test_a_worker_in_the_place_of_a_delegator_is_asked_for_no_lease(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    worker, script = scene.desk()
    worker.service = "worker"
    keeper = scene.keeper(script)
    start = scene.local()
    scene.until(keeper, lambda: len(script.calls("hello")) >= 4, hurry=True)
    assert scene.local() - start > 2 * RETRY_US, "it hammers"
    assert not script.calls("lease.acquire")
    assert "it is a worker" in caplog.text


@pytest.mark.parametrize("service", [None, 7, [], "stranger"])
def test_a_stranger_is_passed_over_for_a_delegator(scene: Scene, service: Any) -> None:
    stranger, script_a = scene.desk()
    stranger.service = service
    _, script_b = scene.desk()
    keeper = scene.keeper(script_a, script_b)
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)
    assert not script_a.calls("lease.acquire")


@pytest.mark.parametrize(
    ("protocol", "layout"), [(2, LAYOUT.to_map()), (None, LAYOUT.to_map()), (1, None), (1, {})]
)
def test_a_delegator_that_it_can_not_talk_to_is_passed_over(scene: Scene, protocol: Any, layout: Any) -> None:
    stranger, script_a = scene.desk()
    stranger.protocol, stranger.layout = protocol, layout
    _, script_b = scene.desk()
    keeper = scene.keeper(script_a, script_b, layout=LAYOUT)
    scene.until(keeper, lambda: keeper.tenant.state is State.HELD, hurry=True)
    assert not script_a.calls("lease.acquire")


def test_another_layout_than_it_was_told_ends_it_before_it_asks(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script, layout=PRESETS["twitter"])
    with pytest.raises(LayoutError, match=r"leases layout snowcloud.*not twitter"):
        scene.until(keeper, lambda: False)
    assert not script.calls("lease.acquire")


def test_the_layout_that_it_was_told_is_taken_under_any_name(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script, layout=Layout("mine", LAYOUT.fields, LAYOUT.epoch_ms))
    scene.held(keeper)


def test_a_grant_of_another_layout_than_the_greeting_said_is_dropped(scene: Scene) -> None:
    desk, script = scene.desk()
    desk.grant_layout = PRESETS["wide"].to_map()
    keeper = scene.keeper(script, layout=LAYOUT)
    scene.until(keeper, lambda: len(script.calls("lease.acquire")) >= 2, hurry=True)
    assert keeper.mint is None


def test_bytes_that_are_no_message_are_survived(scene: Scene) -> None:
    desk, script = scene.desk()
    answers = [b"\xc1", b"", b"\x91" * 1010, b"\x94\x01\x01\xc0"]
    script._answer = lambda *asked: answers.pop() if answers else desk(*asked)
    keeper = scene.keeper(script)
    for left in (3, 2, 1, 0):
        scene.until(keeper, lambda n=left: len(answers) <= n)
        scene.time_out(keeper)
    scene.held(keeper)


@pytest.mark.parametrize("lapsed", [False, True])
def test_another_cluster_is_passed_over_while_the_own_one_may_be_back(scene: Scene, *, lapsed: bool) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.store_id = "there"
    if lapsed:  # the timeline has left its windows behind
        scene.local.ahead_us += 2 * TTL * 1000
        keeper._heard_us = scene.local()
    asked = len(script.asked)
    keeper._connect_next()
    until_us = scene.local() + min(TTL * 1000, PATIENCE_US) // 2
    scene.until(keeper, lambda: scene.local() > until_us, hurry=True)
    assert {method for method, _ in script.asked[asked:]} == {"hello"}
    assert keeper.mint is not None
    assert keeper.tenant.state is (State.LAPSED if lapsed else State.HELD)


def test_a_lease_whose_cluster_is_gone_is_given_up_for_another_in_the_end(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    gone = keeper.mint
    assert gone is not None
    desk.store_id, desk._granted, desk.machine = "there", {}, 4
    asked = len(script.asked)
    keeper._connect_next()
    scene.until(keeper, lambda: keeper.mint is not gone and keeper.tenant.state is State.HELD, hurry=True)
    assert keeper.mint is not None
    assert (keeper.mint.machine, keeper.store_id) == (4, "there")
    assert gone.take(desk.tick, 1) is None
    assert {method for method, _ in script.asked[asked:]} <= {"hello", "ping", "lease.acquire"}
    assert "going over to the one at" in caplog.text


def test_a_delegator_that_comes_later_is_found(
    scene: Scene, script: Scripts, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    probe = context.socket(zmq.ROUTER)
    port = probe.bind_to_random_port("tcp://127.0.0.1")
    probe.close(linger=0)
    keeper = scene.keeper(f"tcp://127.0.0.1:{port}")
    keeper.service(scene.local())
    scene.time_out(keeper)
    until(lambda: _binds(script, Desk(scene.local), f"tcp://127.0.0.1:{port}"))
    scene.held(keeper)


def _state(keeper: LeaseKeeper) -> State:
    return keeper.tenant.state


def _binds(script: Scripts, desk: Desk, address: str) -> bool:
    try:
        script(desk, address)
    except zmq.ZMQError:  # the system has not let go of the port yet
        return False
    return True


# --- patience ---


def test_who_hears_nothing_waits_longer_each_round_and_no_longer_once_he_heard(scene: Scene) -> None:
    keeper = scene.keeper("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    waits = []
    for _ in range(10):
        keeper.service(scene.local())
        waits.append(keeper._answer_by_us - keeper._sent_us)
        scene.time_out(keeper)
    # Both endpoints once, then both with twice as much.
    assert waits == [RETRY_US << i // 2 for i in range(6)] + [PATIENCE_MOST_US] * 4
    _, script = scene.desk()
    other = scene.keeper(script)
    other._silences = 5
    scene.held(other)
    assert other._silences == 0


def test_nobody_gives_an_answer_less_time_than_the_last_one_took(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    keeper._trip_us = 1_500_000
    assert keeper._patience_us() >= 3 * keeper._trip_us
    keeper._trip_us = 60_000_000
    assert keeper._patience_us() == PATIENCE_MOST_US


# --- another store behind the same address ---


def test_a_renewal_that_another_store_answers_makes_it_ask_who_that_is(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.store_id = "there"
    desk.refuse = ("other_cluster", None)
    asked = len(script.asked)
    scene.due(keeper)
    scene.until(keeper, lambda: "hello" in [method for method, _ in script.asked[asked:]], hurry=True)
    assert keeper.mint is not None
    assert keeper.tenant.state is State.HELD


# --- release ---


def test_release_gives_the_machine_back_with_the_last_tick_minted_in(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    mint = keeper.mint
    assert mint is not None
    now = keeper.clock.tick(LAYOUT)
    assert mint.take(now, 1) is not None
    keeper.release(scene.local() + 5_000_000)
    assert script.calls("lease.release") == [[3, script.calls("lease.acquire")[0][0], None, now]]
    assert mint.take(now + 1, 1) is None


def test_release_states_no_tick_where_nothing_was_minted(scene: Scene) -> None:
    _, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    keeper.release(scene.local() + 5_000_000)
    assert script.calls("lease.release")[0][3] is None


def test_release_in_the_midst_of_a_renewal_shows_both_tokens(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.silent = True
    scene.due(keeper)
    scene.until(keeper, lambda: script.calls("lease.renew"))
    desk.silent = False
    keeper.release(scene.local() + 5_000_000)
    _, token, _, pending, *_ = script.calls("lease.renew")[0]
    assert script.calls("lease.release")[0][1:3] == [token, pending]


@pytest.mark.parametrize("refuse", [("lost", None), ("unavailable", 500)])
def test_release_ends_with_any_answer(scene: Scene, refuse: tuple[str, int | None]) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.refuse = refuse
    start = time.monotonic()
    keeper.release(scene.local() + 5_000_000)
    assert time.monotonic() - start < 2


def test_release_gives_up_by_its_deadline_where_nobody_answers(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    scene.held(keeper)
    desk.silent = True
    start = time.monotonic()
    keeper.release(scene.local() + 300_000)
    assert 0.25 < time.monotonic() - start < 1.5
    assert "was not given back" in caplog.text


def test_release_of_nothing_asks_nobody(scene: Scene) -> None:
    keeper = scene.keeper("tcp://127.0.0.1:1")
    start = time.monotonic()
    keeper.release(scene.local() + 5_000_000)
    assert time.monotonic() - start < 1


def test_a_caller_is_never_told_to_come_back_at_once_or_much_later(scene: Scene) -> None:
    desk, script = scene.desk()
    keeper = scene.keeper(script)
    assert 50 <= keeper.retry_after_ms <= 1000
    desk.refuse = ("unavailable", 60_000)
    scene.until(keeper, lambda: keeper.tenant.send_at_us > scene.local() + 5_000_000)
    assert 50 <= keeper.retry_after_ms <= 1000
