"""The broker alone, in a time that only the test moves: who is given what, and whose answer counts."""

from __future__ import annotations

from collections import Counter
from itertools import count, islice
from typing import Any, Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.daemon.tools import failure
from zflake.core.lease import TOKEN_BYTES
from zflake.delegator import broker as module
from zflake.delegator.broker import (
    CREDIT,
    MAX_QUEUE,
    NO_WORKER_MS,
    OVERLOADED_MS,
    TAG_BYTES,
    Broker,
    Outgoing,
)
from zflake.wire.codec import (
    Response,
    WireError,
    decode_request,
    decode_response,
    encode_error,
    encode_result,
)
from zflake.wire.methods import Code, Method

SECOND: Final = 1_000_000
RUN: Final = (1 << 40, 1, 1)


def token_of(worker: bytes) -> bytes:
    return worker.rjust(TOKEN_BYTES)


class World:
    """A broker, its clients and its workers; `us` is the delegator's local clock."""

    def __init__(self, *workers: bytes) -> None:
        numbers = count(1)
        self.us = 7 * SECOND
        self.broker = Broker(lambda size: next(numbers).to_bytes(size, "big"))
        self.answers: dict[bytes, list[Response]] = {}
        """What each client was told, by the first frame of its envelope."""
        self.given: list[tuple[bytes, bytes, bytes]] = []
        """The requests that workers were given: (worker, what the answer goes under, body)."""
        self._numbers = count(1)
        for worker in workers:
            self.join(worker)

    def flush(self) -> None:
        outbox, self.broker.outbox = self.broker.outbox, []
        for outgoing in outbox:
            self._deliver(outgoing)

    def _deliver(self, outgoing: Outgoing) -> None:
        prefix, body, worker = outgoing
        assert prefix[-1] == b""
        if worker is None:
            self.answers.setdefault(prefix[0], []).append(decode_response(body))
        else:
            identity, tag, _ = prefix
            assert identity == worker
            assert len(tag) == TAG_BYTES
            self.given.append((identity, token_of(worker) + tag, body))

    def join(self, worker: bytes) -> None:
        self.broker.join(worker, token_of(worker), self.us)
        self.flush()

    def lose(self, worker: bytes) -> None:
        self.broker.lose(worker, self.us)
        self.flush()

    def ask(self, *, count: int = 1, budget_ms: int = 1000, msgid: int = 5) -> bytes:
        """Submit a request of a new client's; gives the client."""
        client = b"client-%d" % next(self._numbers)
        self.broker.submit([client, b"hop", b""], msgid, count, self.us + budget_ms * 1000, self.us)
        self.flush()
        return client

    def say(self, worker: bytes, frames: list[bytes], body: bytes) -> None:
        self.broker.answer(worker, frames, body, self.us)
        self.flush()

    def reply(self, given: tuple[bytes, bytes, bytes], **error: Any) -> None:
        """Let a worker answer what it was given."""
        worker, tag, body = given
        msgid = decode_request(body)[0]
        answer = encode_error(msgid, **error) if error else encode_result(msgid, RUN)
        self.say(worker, [tag, b""], answer)

    def sweep(self, later_us: int = 0) -> None:
        self.us += later_us
        self.broker.sweep(self.us)
        self.flush()

    def told(self, client: bytes) -> Response:
        """The one answer that this client was given."""
        (answer,) = self.answers[client]
        return answer

    def refusal(self, client: bytes) -> WireError:
        return failure(self.told(client))

    def code(self, client: bytes) -> str:
        return self.refusal(client).code

    def reply_all(self, first: int = 0) -> None:
        """Let the workers answer what they were given and then are, from the `first` on."""
        for job in islice(self.given, first, None):
            self.reply(job)

    def load(self) -> Counter[bytes]:
        return Counter(worker for worker, _, _ in self.given)


def good(world: World) -> bytes:
    return encode_result(decode_request(world.given[0][2])[0], RUN)


# --- the way there and back ---


def test_a_request_goes_under_a_tag_and_its_answer_to_the_client_as_it_came() -> None:
    world = World(b"w")
    client = world.ask(count=3, budget_ms=1000, msgid=2**32 - 1)
    ((worker, tag, body),) = world.given
    assert worker == b"w"
    assert decode_request(body) == (2**32 - 1, Method.IDS_NEXT, [3, 1000])
    assert client not in tag + body
    world.broker.answer(b"w", [tag, b""], encode_result(2**32 - 1, RUN), world.us)
    assert world.broker.outbox == [Outgoing([client, b"hop", b""], encode_result(2**32 - 1, RUN), None)]
    assert (world.broker.counts.brokered, world.broker.counts.strays) == (1, 0)
    assert not world.broker.busy


def test_an_answer_by_another_key_counts_for_nothing() -> None:
    world = World()
    world.broker.join(b"w", token_of(b"w"), world.us, "key")
    client = world.ask()
    ((worker, mark, body),) = world.given
    answer = encode_result(decode_request(body)[0], RUN)
    for key in ("another", ""):
        assert not world.broker.answer(worker, [mark, b""], answer, world.us, key)
    assert world.broker.counts.strays == 2
    assert world.broker.answer(worker, [mark, b""], answer, world.us, "key")
    world.flush()
    assert world.told(client).result == list(RUN)


def test_a_worker_that_registers_with_another_token_is_given_its_requests_again() -> None:
    world = World(b"w")
    client = world.ask()
    before = world.given[0]
    world.broker.join(b"w", b"the newer token.", world.us)
    world.flush()
    world.reply(before)
    assert (world.broker.counts.strays, world.broker.counts.requeued) == (1, 1)
    _, mark, body = world.given[1]
    world.say(
        b"w", [b"the newer token." + mark[-TAG_BYTES:], b""], encode_result(decode_request(body)[0], RUN)
    )
    assert world.told(client).result == list(RUN)


def test_every_request_has_a_tag_of_its_own() -> None:
    world = World(b"w")
    for _ in range(CREDIT):
        world.ask()
    assert len({tag for _, tag, _ in world.given}) == CREDIT


@pytest.mark.parametrize("code", sorted(set(Code) - module.ELSEWHERE))
def test_an_error_that_is_the_request_s_own_goes_to_the_client(code: Code) -> None:
    world = World(b"w", b"v")
    client = world.ask()
    world.reply(world.given[0], code=code, message="m", retry_after_ms=3)
    assert world.code(client) == code
    assert len(world.given) == 1


# --- whose answer counts ---


def test_an_answer_of_another_worker_s_never_counts_even_with_the_right_tag() -> None:
    world = World(b"w", b"v")
    client = world.ask()
    _, tag, _ = world.given[0]
    for forger in (b"v", b"stranger", client, b"", tag):
        world.say(forger, [tag, b""], good(world))
    assert world.answers == {}
    assert world.broker.counts.strays == 5
    world.reply(world.given[0])
    assert world.told(client).result == list(RUN)


@given(
    st.lists(
        st.lists(st.binary(max_size=20) | st.just(b"") | st.just(b"client-1"), max_size=5)
        | st.sampled_from([[b""], [b"client-1", b"hop", b""], [(2).to_bytes(TAG_BYTES, "big"), b""]]),
        min_size=1,
        max_size=8,
    )
)
def test_the_right_worker_with_any_other_envelope_never_counts(envelopes: list[list[bytes]]) -> None:
    world = World(b"w")
    world.ask()
    _, tag, _ = world.given[0]
    envelopes = [envelope for envelope in envelopes if envelope[:1] != [tag]]
    for envelope in envelopes:
        world.say(b"w", envelope, good(world))
    assert world.answers == {}
    assert world.broker.counts.strays == len(envelopes)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_right_tag_with_a_frame_too_few_or_too_many_never_counts(extra: int) -> None:
    world = World(b"w")
    world.ask()
    _, tag, _ = world.given[0]
    world.say(b"w", [[tag], [tag, b"x", b""], [tag, b"", b""]][extra], good(world))
    world.say(b"w", [b"x", tag, b""], good(world))
    assert world.answers == {}
    assert world.broker.counts.strays == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x94\x01",
        b"\xc1",
        encode_result(6, RUN),
        encode_error(None, Code.BAD_REQUEST, "m"),
        encode_result(5, RUN)[:-1],
        encode_result(5, RUN) + b"\0",
        msgpack.packb([0, 5, "ids.next", [1, 1]]),
        msgpack.packb([1, 5, ["timeout"], None]),
        msgpack.packb([1, True, None, RUN]),
        b"\x94\x01\x05" + b"\x91" * 60_000,
    ],
    ids=range(11),
)
def test_a_body_that_does_not_answer_the_request_never_counts(body: bytes) -> None:
    world = World(b"w")
    client = world.ask(msgid=5)
    world.say(b"w", [world.given[0][1], b""], body)
    assert world.answers == {}
    assert world.broker.counts.strays == 1
    world.reply(world.given[0])  # which the sound answer does, afterwards
    assert world.told(client).result == list(RUN)


def test_an_answer_counts_once() -> None:
    world = World(b"w")
    client, other = world.ask(), world.ask()
    for _ in range(3):
        world.reply(world.given[0])
    assert world.told(client).error is None
    assert other not in world.answers
    assert world.broker.counts.strays == 2


def test_an_answer_that_comes_after_the_time_ran_out_never_counts() -> None:
    world = World(b"w")
    client = world.ask(budget_ms=10)
    world.sweep(10_000)
    world.reply(world.given[0])
    assert world.code(client) == Code.TIMEOUT
    assert world.broker.counts.strays == 1


@pytest.mark.parametrize("rejoin", [False, True])
def test_an_answer_of_a_worker_that_was_given_up_never_counts(rejoin: bool) -> None:
    world = World(b"w", b"v")
    client = world.ask()
    first = world.given[0]
    world.lose(first[0])
    if rejoin:
        world.join(first[0])
    world.reply(first)
    assert world.answers == {}
    assert world.broker.counts.strays == 1
    world.reply(world.given[1])
    world.reply(first)
    assert world.told(client).error is None
    assert world.broker.counts.strays == 2


# --- credit ---


def test_a_worker_has_its_credit_and_no_more() -> None:
    world = World(b"w")
    clients = [world.ask() for _ in range(CREDIT + 10)]
    assert len(world.given) == CREDIT == world.broker.in_flight(b"w")
    assert world.broker.queued == 10
    world.reply(world.given[0])
    assert len(world.given) == CREDIT + 1
    assert (world.broker.in_flight(b"w"), world.broker.queued) == (CREDIT, 9)
    world.reply_all(1)
    assert [world.told(client).error for client in clients] == [None] * len(clients)


def test_a_forged_answer_gives_no_credit_back() -> None:
    world = World(b"w")
    for _ in range(CREDIT + 1):
        world.ask()
    for job in list(world.given):
        world.say(b"x", [job[1], b""], good(world))
        world.say(b"w", [job[1], b""], encode_result(9, RUN))
    assert len(world.given) == CREDIT


def test_what_is_asked_is_spread_evenly_over_those_that_have_credit() -> None:
    workers = [b"a", b"b", b"c", b"d"]
    world = World(*workers)
    for _ in range(4 * 25):
        world.ask()
    assert world.load() == dict.fromkeys(workers, 25)


def test_a_worker_that_joins_over_and_over_is_given_no_more_than_others() -> None:
    world = World(b"a", b"b")
    for _ in range(20):
        world.join(b"a")
        world.ask()
    assert world.load() == {b"a": 10, b"b": 10}


def test_one_that_answers_nothing_keeps_no_more_than_its_credit_from_the_others() -> None:
    world = World(b"frozen", b"w")
    clients = [world.ask() for _ in range(400)]
    answered = 0
    while answered < len(world.given):
        if world.given[answered][0] == b"w":
            world.reply(world.given[answered])
        answered += 1
    assert world.load()[b"frozen"] == CREDIT
    assert len(world.answers) == 400 - CREDIT
    world.lose(b"frozen")
    world.reply_all(answered)
    assert all(world.told(client).error is None for client in clients)
    assert world.broker.counts.requeued == CREDIT


# --- workers that go ---


def test_who_is_lost_gives_what_it_had_to_others_in_order_before_what_waits() -> None:
    world = World(b"w")
    for number in range(CREDIT + 2):
        world.ask(msgid=number)
    world.join(b"v")
    assert [decode_request(body)[0] for w, _, body in world.given if w == b"v"] == [CREDIT, CREDIT + 1]
    world.ask(msgid=900)
    world.lose(b"w")
    given = [decode_request(body)[0] for w, _, body in world.given if w == b"v"]
    assert given == [CREDIT, CREDIT + 1, 900, *range(CREDIT - 3)]
    assert world.broker.queued == 3
    assert world.broker.in_flight(b"w") == 0


def test_who_leaves_is_given_nothing_more_and_may_answer_what_it_has() -> None:
    world = World(b"w")
    client = world.ask()
    world.broker.leave(b"w")
    late = world.ask()
    assert world.code(late) == Code.UNAVAILABLE
    world.reply(world.given[0])
    assert world.told(client).error is None
    assert world.broker.open == 0


def test_who_leaves_and_comes_again_is_given_its_credit_and_not_twice() -> None:
    world = World(b"w")
    for _ in range(CREDIT + 5):
        world.ask()
    world.broker.leave(b"w")
    world.join(b"w")
    assert len(world.given) == CREDIT == world.broker.in_flight(b"w")
    assert world.broker.open == 1


@pytest.mark.parametrize("code", sorted(module.ELSEWHERE))
def test_a_worker_that_can_t_serve_sends_the_request_elsewhere_and_rests_until_it_joins(code: Code) -> None:
    world = World(b"w", b"v")
    clients = [world.ask(), world.ask()]
    first = world.given[0]
    world.reply(first, code=code, message="m", retry_after_ms=250)
    assert world.answers == {}
    assert world.given[-1][0] != first[0]
    clients += [world.ask() for _ in range(5)]
    assert world.load()[first[0]] == 1
    world.reply_all(1)
    assert all(world.told(client).error is None for client in clients)
    world.join(first[0])
    for _ in range(2):
        world.ask()
    assert world.load()[first[0]] == 2


def test_a_request_that_no_worker_can_serve_ends_unavailable_at_the_next_sweep() -> None:
    world = World(b"w", b"v")
    client = world.ask()
    world.reply(world.given[0], code=Code.LEASE_EXPIRED, message="m")
    world.reply(world.given[1], code=Code.LEASE_EXPIRED, message="m")
    assert world.answers == {}
    world.sweep()
    refusal = world.refusal(client)
    assert (refusal.code, refusal.retry_after_ms) == (Code.UNAVAILABLE, NO_WORKER_MS)


def test_nothing_is_kept_of_workers_that_came_and_went() -> None:
    world = World()
    for number in range(50):
        worker = b"w-%d" % number
        world.join(worker)
        match number % 5:
            case 0:
                world.lose(worker)
            case 1:
                world.broker.leave(worker)
            case 2:
                world.ask(budget_ms=10)
                world.broker.leave(worker)
                world.sweep(10_000)
            case 3:
                world.ask()
                world.broker.leave(worker)
                world.reply(world.given[-1])
            case 4:
                world.ask()
                world.reply(world.given[-1], code=Code.UNAVAILABLE, message="m")
                world.sweep()
    assert (world.broker.open, world.broker.busy) == (0, False)
    assert not world.broker._peers
    assert not world.broker._line


def test_who_was_never_there_can_neither_leave_nor_be_lost() -> None:
    world = World(b"w")
    world.broker.leave(b"x")
    world.lose(b"x")
    assert world.broker.open == 1


# --- limits ---


def test_a_queue_that_is_full_is_overloaded_and_says_when_to_come_again() -> None:
    world = World(b"w")
    for _ in range(CREDIT + MAX_QUEUE):
        world.ask()
    assert world.answers == {}
    assert world.broker.queued == MAX_QUEUE
    refusal = world.refusal(world.ask())
    assert (refusal.code, refusal.retry_after_ms) == (Code.OVERLOADED, OVERLOADED_MS)
    assert world.broker.counts.refused == 1
    world.reply(world.given[0])  # makes room
    assert world.ask() not in world.answers
    assert world.code(world.ask()) == Code.OVERLOADED


def test_without_a_worker_a_request_is_unavailable_at_once() -> None:
    world = World()
    refusal = world.refusal(world.ask())
    assert (refusal.code, refusal.retry_after_ms) == (Code.UNAVAILABLE, NO_WORKER_MS)


def test_what_waits_is_unavailable_once_the_last_worker_has_gone() -> None:
    world = World(b"w")
    clients = [world.ask() for _ in range(CREDIT + 3)]
    world.lose(b"w")
    world.sweep()
    assert {world.code(client) for client in clients} == {Code.UNAVAILABLE}
    assert (world.broker.queued, world.broker.busy) == (0, False)


# --- budgets ---


@given(budget_ms=st.integers(1, 3_600_000), waited_us=st.integers(0, 3_600_000_000))
def test_a_budget_is_lowered_by_what_was_waited_and_never_raised(budget_ms: int, waited_us: int) -> None:
    world = World(b"w")
    for _ in range(CREDIT):
        world.ask(budget_ms=3_700_000)
    client = world.ask(budget_ms=budget_ms)
    world.us += waited_us
    world.reply(world.given[0])
    if waited_us >= budget_ms * 1000:
        assert world.code(client) == Code.TIMEOUT
        assert len(world.given) == CREDIT
    else:
        _, _, (_, left_ms) = decode_request(world.given[-1][2])
        left_us = budget_ms * 1000 - waited_us
        assert left_ms == max(1, left_us // 1000)
        assert 1 <= left_ms <= budget_ms


def test_a_request_without_a_budget_is_never_forwarded() -> None:
    world = World(b"w")
    clients = [world.ask(budget_ms=0), world.ask(budget_ms=-5)]
    assert {world.code(client) for client in clients} == {Code.TIMEOUT}
    assert world.given == []
    assert world.broker.counts.expired == 2


def test_what_waits_or_is_under_way_ends_with_its_budget_and_others_go_on() -> None:
    world = World(b"w")
    short = [world.ask(budget_ms=100) for _ in range(10)]
    long = [world.ask(budget_ms=5000) for _ in range(CREDIT)]
    short.append(world.ask(budget_ms=100))
    world.sweep(99_999)
    assert world.answers == {}
    world.sweep(1)
    assert {world.code(client) for client in short} == {Code.TIMEOUT}
    world.reply_all()
    assert all(world.told(client).error is None for client in long)
    assert world.broker.counts.strays == 10


def test_a_request_that_is_taken_back_too_late_is_not_given_to_anybody() -> None:
    world = World(b"w", b"v")
    client = world.ask(budget_ms=100)
    world.us += 100_000
    world.lose(world.given[0][0])
    assert world.code(client) == Code.TIMEOUT
    assert len(world.given) == 1


# --- everything at once ---

WORKERS: Final = (b"a", b"b", b"c")
workers = st.sampled_from(WORKERS)
SMALL_QUEUE: Final = 5
SMALL_CREDIT: Final = 3


class Walk(RuleBasedStateMachine):
    """Clients, workers, forgers and time in any order; the numbers are small, so that limits are met."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "CREDIT", SMALL_CREDIT)
        self.patch.setattr(module, "MAX_QUEUE", SMALL_QUEUE)
        self.world = World()
        self.clients: dict[bytes, int] = {}
        self.seen = 0
        self.open: set[bytes] = set()
        self.live: dict[bytes, bytes] = {}
        """Tags that a worker holds, or held when it was last asked: tag to worker."""

    @initialize(first=workers)
    def begin(self, first: bytes) -> None:
        self.join(first)

    @rule(worker=workers)
    def join(self, worker: bytes) -> None:
        self.open.add(worker)
        self.world.join(worker)

    @rule(worker=workers)
    def leave(self, worker: bytes) -> None:
        self.open.discard(worker)
        self.world.broker.leave(worker)

    @rule(worker=workers)
    def lose(self, worker: bytes) -> None:
        self.open.discard(worker)
        self.world.lose(worker)

    @rule(budget_ms=st.integers(0, 50), msgid=st.integers(0, 3), many=st.integers(1, 6))
    def ask(self, budget_ms: int, msgid: int, many: int) -> None:
        for _ in range(many):
            self.clients[self.world.ask(budget_ms=budget_ms, msgid=msgid)] = msgid

    @rule(which=st.integers(0, 20), again=st.booleans())
    def reply(self, which: int, again: bool) -> None:
        for job in self.world.given[-1 - which :][:1]:
            self.world.reply(job)
            if again:
                strays = self.world.broker.counts.strays
                self.world.reply(job)
                assert self.world.broker.counts.strays == strays + 1

    @rule(which=st.integers(0, 6), code=st.sampled_from(sorted(Code)))
    def refuse(self, which: int, code: Code) -> None:
        for job in self.world.given[-1 - which :][:1]:
            held = job[1] in self.held()
            self.world.reply(job, code=code, message="m")
            if held and code in module.ELSEWHERE:
                self.open.discard(job[0])

    @rule(worker=workers, which=st.integers(0, 20))
    def forge(self, worker: bytes, which: int) -> None:
        for holder, tag, body in self.world.given[-1 - which :][:1]:
            before = dict(self.world.answers)
            answer = encode_result(decode_request(body)[0], RUN)
            if worker != holder:
                self.world.say(worker, [tag, b""], answer)
            self.world.say(holder, [tag, b"", b""], answer)
            self.world.say(holder, [tag, b""], encode_result(77, RUN))
            assert self.world.answers == before

    @rule(ms=st.integers(1, 30))
    def wait(self, ms: int) -> None:
        self.world.sweep(ms * 1000)

    def held(self) -> set[bytes]:
        return {tag for peer in self.world.broker._peers.values() for tag in peer.jobs}

    @invariant()
    def nobody_is_told_twice_and_everybody_by_his_own_msgid(self) -> None:
        for client, answers in self.world.answers.items():
            (answer,) = answers
            assert answer.msgid == self.clients.get(client, answer.msgid)

    @invariant()
    def no_worker_sees_an_envelope_or_gets_what_is_not_its_turn(self) -> None:
        for worker, tag, body in self.world.given[self.seen :]:
            assert worker in self.open
            assert b"client" not in worker + tag + body
            assert b"hop" not in worker + tag + body
        self.seen = len(self.world.given)

    @invariant()
    def everything_has_its_bound(self) -> None:
        broker = self.world.broker
        assert all(broker.in_flight(worker) <= SMALL_CREDIT for worker in WORKERS)
        assert broker.queued <= SMALL_QUEUE + SMALL_CREDIT * len(WORKERS)
        assert broker.open == len(self.open)
        assert len(broker._line) <= len(self.open)
        assert all(peer.open or peer.jobs for peer in broker._peers.values())
        waiting = broker.queued + sum(broker.in_flight(worker) for worker in WORKERS)
        assert waiting + len(self.world.answers) == len(self.clients)
        assert broker.busy == bool(waiting)

    @invariant()
    def nobody_waits_while_a_worker_has_credit(self) -> None:
        broker = self.world.broker
        assert not broker.queued or all(broker.in_flight(worker) == SMALL_CREDIT for worker in self.open)

    def teardown(self) -> None:
        self.world.sweep(60_000)
        assert set(self.world.answers) == set(self.clients)
        assert not self.world.broker.busy
        self.patch.undo()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
