"""The client's conversation, driven by hand in a time of its own: whom it asks, and when it gives up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.answers import LAYOUT, directory, error, hello, result
from zflake.client.balancer import PROBE_S, REFRESH_S, Balancer
from zflake.client.conversation import (
    ATTEMPT_S,
    REFRESH_WAIT_S,
    Ask,
    Conversation,
    Outcome,
    Pause,
    Wait,
    begin,
    fetch_layout,
    proceed,
    take,
)
from zflake.core.layout import PRESETS, Layout
from zflake.core.mint import Run
from zflake.errors import (
    AuthError,
    LayoutError,
    LeaseExpired,
    Overloaded,
    ProtocolError,
    Timeout,
    Unavailable,
    ZflakeError,
)
from zflake.wire.codec import Response
from zflake.wire.ids import MAX_COUNT

D1, D2 = "tcp://10.0.0.1:7410", "tcp://10.0.0.2:7410"
W1, W2, W3 = (f"tcp://10.0.1.{n}:7411" for n in (1, 2, 3))
TRIP_S: Final = 0.001

Answer = Callable[[Ask], Outcome]
T = TypeVar("T")


class Daemon:
    """Answers, unless it was told to fail."""

    service: str

    def __init__(self, layout: Layout | None = LAYOUT) -> None:
        self.layout = layout
        self.store_id: str | None = None
        self.fails: Response | str | None = "no"

    def __call__(self, ask: Ask) -> Response | None:
        if self.fails != "no":
            assert not isinstance(self.fails, str)
            return self.fails
        if ask.method == "hello":
            return result(hello(self.service, self.layout, self.store_id))
        return self.answer(ask)

    def answer(self, ask: Ask) -> Response:
        raise NotImplementedError


class Worker(Daemon):
    """Mints runs of at most `most` IDs."""

    service = "worker"
    most = 4096
    minted = 0

    def answer(self, ask: Ask) -> Response:
        if len(ask.params) > 2 and ask.params[2] != self.store_id:
            return error("other_cluster")
        count = min(self.most, ask.params[0])
        first = self.minted
        self.minted += count
        return result([first, 1, count])


class Delegator(Daemon):
    service = "delegator"

    def __init__(self, *workers: str) -> None:
        super().__init__()
        self.workers = list(workers)

    def answer(self, ask: Ask) -> Response:
        if ask.method == "ids.next":
            return error("other_cluster") if ask.params[2:] != (self.store_id,) else result([1, 1, 1])
        assert ask.method == "cluster.workers"
        return result(directory(*self.workers))


class World:
    """Endpoints, a clock, and the log of what was asked."""

    def __init__(self, peers: dict[str, Answer], *seeds: str, seed: int = 1, route: str = "direct") -> None:
        self.peers = peers
        self.now = 1000.0
        self.asked: list[Ask] = []
        self.balancer = Balancer(
            seeds or [next(iter(peers))],
            route,
            now=lambda: self.now,
            draw=random.Random(seed).random,
            caller=lambda: None,
        )

    def take(self, count: int = 1, timeout: float = 5.0) -> list[Run]:
        """As `Client` does it."""
        ask = begin(self.balancer, count, timeout)
        if ask is None:
            return self.drive(take(self.balancer, count, timeout))
        then = proceed(self.balancer, count, timeout, ask, self.ask(ask))
        return then if isinstance(then, list) else self.drive(then)

    def took_s(self, timeout: float = 5.0) -> float:
        """Take an ID; gives the seconds that it took."""
        start = self.now
        self.take(timeout=timeout)
        return self.now - start

    def layout(self, timeout: float) -> Layout:
        return self.drive(fetch_layout(self.balancer, timeout))

    def ask(self, ask: Ask) -> Outcome:
        assert 0 <= ask.timeout_s <= ATTEMPT_S * 1.5
        self.asked.append(ask)
        peer = self.peers.get(ask.endpoint)
        answer = None if peer is None else peer(ask)
        self.now += TRIP_S if answer is not None else ask.timeout_s
        return answer

    def drive(self, talk: Conversation[T]) -> T:
        response: Outcome = None
        for _ in range(100_000):
            try:
                step = talk.send(response)
            except StopIteration as end:
                result: T = end.value
                return result
            response = None
            assert not isinstance(step, Wait), "nobody else reads the directory"
            if isinstance(step, Pause):
                assert step.seconds >= 0
                self.now += max(step.seconds, 1e-6)
            else:
                response = self.ask(step)
        raise AssertionError("the conversation does not end")

    def endpoints(self, method: str = "ids.next") -> list[str]:
        return [ask.endpoint for ask in self.asked if ask.method == method]

    def fails(
        self, kind: type[ZflakeError], timeout: float = 5.0, count: int = 1, match: str | None = None
    ) -> ZflakeError:
        start = self.now
        with pytest.raises(kind, match=match) as caught:
            self.take(count, timeout)
        assert type(caught.value) is kind
        assert self.now - start <= timeout + 0.01, "over its budget"
        return caught.value


def cluster(workers: int = 3, route: str = "direct") -> tuple[World, Delegator, list[Worker]]:
    names = [f"tcp://10.0.1.{n}:7411" for n in range(1, workers + 1)]
    minters = [Worker() for _ in names]
    delegator = Delegator(*names)
    peers: dict[str, Answer] = {D1: delegator, **dict(zip(names, minters, strict=True))}
    return World(peers, D1, route=route), delegator, minters


# --- when all is well ---


def test_a_delegator_is_asked_for_the_directory_and_a_worker_for_ids() -> None:
    world, _, _ = cluster()
    world.take()
    assert [(ask.endpoint, ask.method) for ask in world.asked[:2]] == [(D1, "hello"), (D1, "cluster.workers")]
    assert [ask.method for ask in world.asked[2:]] == ["ids.next"]
    assert world.asked[2].endpoint in (W1, W2, W3)


def test_a_worker_is_asked_directly_where_it_is_the_endpoint() -> None:
    world = World({W1: Worker()})
    world.take()
    world.take()
    assert [ask.method for ask in world.asked] == ["hello", "ids.next", "ids.next"]


def test_a_client_stays_with_its_worker() -> None:
    world, _, _ = cluster()
    for _ in range(50):
        world.take()
    assert len(set(world.endpoints())) == 1
    assert len(world.asked) == 52


def test_clients_spread_over_the_workers() -> None:
    chosen: Counter[str] = Counter()
    for seed in range(60):
        world = World({D1: Delegator(W1, W2, W3), W1: Worker(), W2: Worker(), W3: Worker()}, D1, seed=seed)
        world.take()
        chosen[world.endpoints()[0]] += 1
    assert min(chosen[w] for w in (W1, W2, W3)) >= 8


@pytest.mark.parametrize("count", [1, 2, 4096, 4097, 10_000, MAX_COUNT + 5])
def test_exactly_as_many_as_were_asked_come_in_order(count: int) -> None:
    world, _, minters = cluster(1)
    minters[0].most = 65_536
    runs = world.take(count)
    ids = [i for first, step, length in runs for i in range(first, first + step * length, step)]
    assert ids == list(range(count))
    assert all(ask.params[0] <= MAX_COUNT for ask in world.asked if ask.method == "ids.next")


def test_each_request_says_how_long_it_will_be_waited_for() -> None:
    world, _, minters = cluster(1)
    world.take()
    minters[0].fails = None
    world.fails(Timeout, 2.0)
    for ask in world.asked:
        if ask.method == "ids.next":
            assert ask.params[1] == max(1, int(ask.timeout_s * 1000))


def test_the_directory_is_read_anew_now_and_then_while_calls_succeed() -> None:
    world, _, _ = cluster()
    for _ in range(35):
        world.take()
        world.now += 1
    assert len(world.endpoints("cluster.workers")) == 4


def test_a_worker_that_left_the_directory_is_asked_no_more() -> None:
    world, delegator, _ = cluster()
    world.take()
    (first,) = world.endpoints()
    delegator.workers.remove(first)
    world.now += REFRESH_S
    for _ in range(20):
        world.take()
    assert first not in world.endpoints()[1:]


# --- workers that fail ---


def test_a_worker_that_does_not_answer_is_left_for_another_within_the_budget() -> None:
    world, _, minters = cluster(2)
    world.take()
    favourite = world.endpoints()[0]
    dead = minters[0 if favourite == W1 else 1]
    dead.fails = None
    assert world.took_s() < 1.5
    assert world.endpoints()[-2:] == [favourite, W2 if favourite == W1 else W1]


def test_one_dead_worker_leaves_time_for_the_others_however_small_the_budget() -> None:
    for seed in range(20):
        world = World({D1: Delegator(W1, W2), W2: Worker()}, D1, seed=seed)
        world.take(timeout=0.2)


def test_a_dead_worker_is_passed_over_for_longer_with_each_failure_and_probed_by_one_call() -> None:
    world, _, minters = cluster(2)
    minters[0].fails = None
    probes = []
    for _ in range(4000):
        world.balancer._sticky = None  # choose anew each time
        start = world.now
        if world.took_s() >= PROBE_S:
            probes.append(start)
        world.now += 0.02
    gaps = [b - a for a, b in pairwise(probes)]
    assert 5 <= len(probes) <= 25
    assert max(gaps[-3:]) > 3
    assert gaps[0] < 4


def test_while_one_call_probes_others_do_not() -> None:
    world, _, minters = cluster(1)
    minters[0].fails = None
    world.fails(Timeout, 1.0)
    world.now += 30
    balancer = world.balancer
    balancer.keep()
    assert balancer.pick() == W1
    assert balancer.pick() is None
    world.now += ATTEMPT_S
    assert balancer.pick() == W1


def test_a_worker_that_came_back_is_taken_again_and_forgiven() -> None:
    world, _, minters = cluster(1)
    minters[0].fails = None
    world.fails(Timeout)
    minters[0].fails = "no"
    world.take()
    assert world.balancer._health[W1].failures == 0
    assert world.balancer.sticky(world.now) == W1


NONSENSE: Final = [
    *(error(code) for code in ("bad_request", "unknown_method", "no such code")),
    *(result(run) for run in ([1], [1, 1, 2])),
    ProtocolError("not MessagePack"),
]
REFUSALS: Final = [error(code, 5000) for code in ("lease_expired", "overloaded", "unavailable", "timeout")]


@pytest.mark.parametrize("answer", [*REFUSALS, *NONSENSE])
def test_a_worker_that_can_not_serve_now_or_talks_nonsense_is_left_for_another(answer: Outcome) -> None:
    world, _, _ = cluster(2)
    world.peers[W1] = lambda _: answer
    for _ in range(10):
        world.balancer._sticky = None
        world.take()
    assert world.endpoints().count(W1) <= 1


def giving(*runs: Run) -> Answer:
    """A worker that gives these runs, one after the other."""
    left = iter(runs)
    return lambda ask: Worker()(ask) if ask.method == "hello" else result(next(left))


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("lower", [0, 96, 100, 104])
def test_a_worker_that_gives_ids_again_within_a_call_is_left_for_another(lower: int, known: bool) -> None:
    world, _, _ = cluster(2)
    base = LAYOUT.compose(5, 1, 0)
    given, again = (base + 100, 1, 5), (base + lower, 1, 5)
    if known:
        world.take()
        world.balancer._sticky = W1
    else:
        world.balancer.refused(W2, 0.01)  # so that W1 is asked first
    world.peers[W1] = giving(given, again, (base + 999, 1, 5))
    world.asked.clear()
    first, second = world.take(10)
    assert (first, second[2]) == (given, 5)
    assert second != again
    assert world.endpoints() == [W1, W1, W2]
    assert not world.balancer._is_fit(W1, world.now)


def test_where_all_give_ids_again_the_call_fails_rather_than_to_repeat_them() -> None:
    World({W1: lambda ask: Worker()(ask) if ask.method == "hello" else result([7, 1, 1])}).fails(
        Timeout, count=2, match="1 of 2 IDs"
    )


def test_a_worker_that_was_restarted_with_a_lower_machine_id_within_a_call_is_believed() -> None:
    runs = [
        (LAYOUT.compose(*place, 0), 1, 3)  # tick, machine
        for place in ((5, 9), (6, 9), (6, 2), (5, 1), (7, 2))
    ]
    assert World({W1: giving(*runs)}).take(15) == runs


def test_two_workers_behind_a_delegator_may_give_ids_in_any_order() -> None:
    ticks = [(5, 2), (5, 1), (6, 1), (6, 2)]
    runs = [(LAYOUT.compose(*place, 0), 1, 3) for place in ticks]
    left = iter(runs)
    delegator = Delegator()
    world = World(
        {D1: lambda ask: result(next(left)) if ask.method == "ids.next" else delegator(ask)}, route="broker"
    )
    assert world.take(12) == runs


@pytest.mark.parametrize("hint_ms", [None, 0, 1, 300, 60_000])
def test_the_only_worker_is_asked_again_until_it_serves(hint_ms: int | None) -> None:
    world, _, minters = cluster(1)
    serves_at = world.now + 2
    worker = minters[0]
    world.peers[W1] = lambda ask: worker(ask) if world.now > serves_at else error("lease_expired", hint_ms)
    world.take(timeout=5.0)
    assert world.now < serves_at + 0.3


# --- routes ---


def brokering(world: World, minter: Answer) -> None:
    """Have the delegator pass requests on to that worker."""
    desk = world.peers[D1]
    world.peers[D1] = lambda ask: minter(ask) if ask.method == "ids.next" else desk(ask)


def test_by_auto_workers_are_asked_directly() -> None:
    world, _, minters = cluster(2, route="auto")
    brokering(world, minters[0])
    for _ in range(20):
        world.take()
    assert D1 not in world.endpoints()


def test_by_auto_the_broker_serves_where_no_worker_can_be_reached_and_is_left_when_one_can() -> None:
    world, _, minters = cluster(2, route="auto")
    behind = Worker()
    brokering(world, behind)
    for minter in minters:
        minter.fails = None
    for _ in range(20):
        world.take()
        world.now += 0.1
    assert world.endpoints()[-1] == D1
    for minter in minters:
        minter.fails = "no"
    world.now += 30
    for _ in range(5):
        world.take()
    assert D1 not in world.endpoints()[-3:]


def test_one_worker_out_of_reach_sends_the_call_to_the_broker_and_not_through_all_the_others() -> None:
    world, _, minters = cluster(8, route="auto")
    brokering(world, Worker())
    for minter in minters:
        minter.fails = None
    assert world.took_s() < ATTEMPT_S + 0.1


def test_by_direct_a_delegator_is_never_asked_for_ids() -> None:
    world, _, minters = cluster(1, route="direct")
    brokering(world, Worker())
    minters[0].fails = None
    world.fails(Timeout)
    assert D1 not in world.endpoints()


def test_by_broker_only_delegators_are_asked() -> None:
    world, _, minters = cluster(2, route="broker")
    brokering(world, minters[0])
    for _ in range(20):
        world.take()
        world.now += 1.0
    assert set(world.endpoints()) == {D1}
    assert "cluster.workers" not in {ask.method for ask in world.asked}


def test_by_broker_a_worker_is_no_help() -> None:
    world = World({W1: Worker()}, route="broker")
    world.fails(Unavailable, match="needs a delegator")


def test_a_delegator_that_has_just_started_and_knows_nobody_costs_nothing() -> None:
    world, delegator, _ = cluster(2)
    world.take()
    delegator.workers = []
    world.now += REFRESH_S + 1
    assert world.took_s() < 0.1


# --- delegators that fail ---


def test_a_delegator_that_is_away_does_not_stall_calls() -> None:
    world, delegator, _ = cluster()
    world.take()
    delegator.fails = None
    slow = 0.0
    for _ in range(600):
        took = world.took_s()
        assert took <= REFRESH_WAIT_S + 0.01
        slow += took > 0.05
        world.now += 0.1
    assert slow <= 60 / REFRESH_S


def test_the_next_delegator_is_asked_where_one_does_not_answer() -> None:
    world = World({D2: Delegator(W1), W1: Worker()}, D1, D2)
    for _ in range(3):
        world.take()
    assert world.endpoints("cluster.workers") == [D2]


def test_of_two_delegators_one_is_asked() -> None:
    world = World({D1: Delegator(W1), D2: Delegator(W1), W1: Worker()}, D1, D2)
    world.take()
    world.now += REFRESH_S
    world.take()
    assert len(world.endpoints("cluster.workers")) == 2


def test_workers_and_delegators_may_be_named_together() -> None:
    seen: set[str] = set()
    for seed in range(20):
        world = World({D1: Delegator(W1), W1: Worker(), W2: Worker()}, D1, W2, seed=seed)
        world.take()
        seen |= set(world.endpoints())
    assert seen == {W1, W2}


def test_a_cluster_that_comes_up_late_is_found_within_the_budget() -> None:
    world, delegator, _ = cluster()
    names, delegator.workers = delegator.workers, []
    comes_at = world.now + 2

    def late(ask: Ask) -> Response | None:
        if world.now > comes_at:
            delegator.workers = names
        return delegator(ask)

    world.peers[D1] = late
    world.take(timeout=5.0)
    assert world.now < comes_at + 0.3


# --- which error ---


def test_nobody_there_is_a_timeout_after_the_budget_that_names_who_was_asked() -> None:
    for timeout in (0.05, 0.5, 5.0):
        world = World({}, D1, D2)
        start = world.now
        raised = world.fails(Timeout, timeout)
        assert world.now - start >= timeout * 0.9
        assert D1 in str(raised)
        assert D2 in str(raised)


def test_no_worker_is_unavailable() -> None:
    world = World({D1: Delegator()})
    world.fails(Unavailable, match="start one")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("lease_expired", LeaseExpired),
        ("overloaded", Overloaded),
        ("unavailable", Unavailable),
        ("timeout", Timeout),
    ],
)
def test_what_the_workers_say_is_what_is_raised(code: str, kind: type[ZflakeError]) -> None:
    world, _, minters = cluster(2)
    for minter in minters:
        minter.fails = error(code, 750)
    assert world.fails(kind, match=f"says {code}").retry_after == 0.75


def test_an_error_that_somebody_gave_is_not_hidden_by_another_who_is_silent() -> None:
    world, _, minters = cluster(2)
    minters[0].fails = error("overloaded")
    minters[1].fails = None
    world.fails(Overloaded)


def test_half_of_the_ids_is_a_timeout_that_says_how_many_came() -> None:
    world, _, minters = cluster(1)
    minters[0].most = 10

    def dries_up(ask: Ask) -> Response | None:
        return minters[0](ask) if minters[0].minted < 30 else error("lease_expired", 1000)

    world.peers[W1] = dries_up
    world.fails(Timeout, count=100, match="30 of 100 IDs")


def test_what_no_other_try_would_mend_is_raised_at_once() -> None:
    world, _, minters = cluster(1)
    minters[0].fails = error("denied")
    world.fails(AuthError, timeout=0.1)


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_where_all_talk_nonsense_the_budget_ends_in_a_protocol_error(nonsense: Outcome) -> None:
    world, _, _ = cluster(1)
    world.peers[W1] = lambda _: nonsense
    world.fails(ProtocolError)
    assert world.endpoints().count(W1) < 200


@pytest.mark.parametrize(
    "answer",
    [
        result(None),
        result({}),
        result([1]),
        result({"service": "web", "protocol": 1}),
        result({"service": "delegator"}),
        result({"service": "delegator", "protocol": 2}),
        result({"service": "delegator", "protocol": 1, "layout": {"name": "x"}}),
        error("unknown_method"),
    ],
    ids=range(8),
)
def test_a_stranger_is_a_protocol_error_that_names_it(answer: Response) -> None:
    World({D1: lambda _: answer}).fails(ProtocolError, match=D1)


@pytest.mark.parametrize(
    "listed",
    [None, {}, {"workers": None}, {"workers": [1]}, {"workers": [{}]}, {"workers": [{"address": "x"}]}, [[]]],
    ids=range(7),
)
def test_a_directory_that_can_not_be_read_is_a_protocol_error_that_names_it(listed: Any) -> None:
    delegator = Delegator()
    world = World({D1: lambda ask: result(listed) if ask.method == "cluster.workers" else delegator(ask)})
    world.fails(ProtocolError, match=D1)


def test_endpoints_of_two_clusters_are_a_layout_error() -> None:
    world = World({W1: Worker(), W2: Worker(PRESETS["twitter"])}, W1, W2)
    world.fails(LayoutError, match="two clusters")


def of_store(store_id: str, *daemons: Daemon) -> None:
    for daemon in daemons:
        daemon.store_id = store_id


@pytest.mark.parametrize("route", ["auto", "direct", "broker"])
def test_a_cluster_that_goes_on_with_another_store_is_followed(route: str) -> None:
    worker = Worker()
    delegator = Delegator(W1)
    world = World({D1: delegator, W1: worker}, D1, route=route)
    of_store("before", delegator, worker)
    world.take()
    assert world.balancer.store_id == "before"
    of_store("after", delegator, worker)
    world.take()
    assert world.balancer.store_id == "after"


def test_every_delegator_may_go_over_one_after_the_other() -> None:
    worker = Worker()
    first, second = Delegator(W1), Delegator(W1)
    world = World({D1: first, D2: second, W1: worker}, D1, D2)
    of_store("before", first, second, worker)
    for _ in range(5):
        world.take()
        world.now += REFRESH_S
    of_store("after", first, second, worker)
    world.take(timeout=30)
    assert world.balancer.store_id == "after"


def test_a_worker_of_another_cluster_at_a_known_address_is_never_asked_twice_for_its_own_ids() -> None:
    delegator, stranger, worker = Delegator(W1), Worker(), Worker()
    world = World({D1: delegator, W1: stranger}, D1)
    of_store("ours", delegator, worker)
    of_store("theirs", stranger)
    world.fails(ProtocolError)
    assert stranger.minted == 0
    assert world.balancer.store_id == "ours"


@pytest.mark.parametrize("route", ["auto", "broker"])
def test_two_seeds_of_two_clusters_never_give_ids_of_both(route: str) -> None:
    first, second = Delegator(W1), Delegator(W2)
    workers = Worker(), Worker()
    world = World({D1: first, D2: second, W1: workers[0], W2: workers[1]}, D1, D2, route=route)
    of_store("one", first, workers[0])
    of_store("two", second, workers[1])
    for _ in range(10):
        world.fails(LayoutError, match="two clusters")
        world.now += REFRESH_S
    assert workers[0].minted == workers[1].minted == 0


# --- the layout ---


def test_the_layout_is_asked_for_once() -> None:
    world, _, _ = cluster()
    assert world.layout(5).same_ids(LAYOUT)
    asked = len(world.asked)
    world.layout(5)
    assert len(world.asked) == asked


def test_the_layout_of_a_worker_that_has_none_yet_is_waited_for() -> None:
    worker = Worker(None)
    world = World({W1: worker})
    comes_at = world.now + 1

    def late(ask: Ask) -> Response | None:
        worker.layout = LAYOUT if world.now > comes_at else None
        return worker(ask)

    world.peers[W1] = late
    assert world.layout(5).same_ids(LAYOUT)


def test_nobody_who_knows_the_layout_is_a_timeout() -> None:
    world = World({}, D1)
    start = world.now
    with pytest.raises(Timeout):
        world.layout(2)
    assert world.now - start < 2.1


# --- whatever happens ---


@given(st.integers(0, 2**32), st.sampled_from([0.05, 0.3, 1.0, 5.0]), st.sampled_from([1, 3, 5000]))
@settings(deadline=None, max_examples=60)
def test_a_call_ends_within_its_budget_with_all_its_ids_or_an_error(
    seed: int, timeout: float, count: int
) -> None:
    rng = random.Random(seed)
    world, delegator, minters = cluster()
    faults: list[Response | str | None] = [
        "no",
        "no",
        None,
        error("lease_expired", rng.choice([None, 0, 50, 5000])),
        error("overloaded", 1),
        error("unavailable", 10_000),
        error("timeout"),
    ]
    for _ in range(12):
        for peer in (delegator, *minters):
            if rng.random() < 0.4:
                peer.fails = rng.choice(faults)
        if delegator.fails not in ("no", None) and world.balancer.service_of(D1) is None:
            delegator.fails = None  # a hello is answered or not
        start = world.now
        try:
            runs = world.take(count, timeout)
        except (Timeout, LeaseExpired, Overloaded, Unavailable):
            pass
        else:
            assert sum(length for _, _, length in runs) == count
        assert world.now - start <= timeout + 0.01
        world.now += rng.choice([0, 0.1, 3, 15])
