"""Many callers at once: one reads the directory, and a dying endpoint is ejected once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.client.answers import LAYOUT, directory, error, hello, result
from zflake.client.balancer import EJECT_S, REFRESH_S, Balancer
from zflake.client.conversation import (
    ATTEMPT_S,
    Action,
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
from zflake.errors import AuthError, Timeout, Unavailable

D1: Final = "tcp://10.0.0.1:7410"
W1, W2 = "tcp://10.0.1.1:7411", "tcp://10.0.1.2:7411"
MANY: Final = 64
BUDGET_S: Final = 5.0
HELLO: Final = result(hello("delegator"))
RUN: Final = result([1, 1, 1])


class Site:
    """One balancer, a clock that the test sets, and callers by number."""

    def __init__(self, route: str = "direct") -> None:
        self.now = 1000.0
        self.caller: object = None
        self.balancer = Balancer(
            [D1], route, now=lambda: self.now, draw=random.Random(1).random, caller=lambda: self.caller
        )

    def call(self, caller: object, timeout: float = BUDGET_S) -> Call:
        return Call(self, caller, take(self.balancer, 1, timeout))

    def settled(self) -> Site:
        """Let one call read a directory of the worker W1."""
        call = self.call("first")
        call.hear(HELLO)
        call.hear(result(directory(W1)))
        call.hear(RUN)
        return self


class Call:
    """A conversation under way, one step at a time."""

    def __init__(self, site: Site, caller: object, talk: Conversation[Any]) -> None:
        self.site = site
        self.caller = caller
        self.talk = talk
        self.step: Action | None = None
        self.result: Any = None
        self.woken = False
        self.hear(None)

    def hear(self, outcome: Outcome) -> None:
        """Finish the present step, and go on to the next one."""
        self.site.caller = self.caller
        try:
            self.step = self.talk.send(outcome)
        except StopIteration as end:
            self.result, self.step = end.value, None
            return
        if isinstance(self.step, Wait):
            self.woken = False
            self.site.balancer.when_over(self.step.refresh, self.wake)

    def wake(self) -> None:
        self.woken = True

    def let_time_pass(self) -> None:
        """Sit out all waits and pauses, which nothing ends early."""
        for _ in range(1000):
            assert isinstance(self.step, Wait | Pause)
            self.site.now += self.step.timeout_s if isinstance(self.step, Wait) else self.step.seconds
            self.hear(None)

    def asks(self) -> str | None:
        return self.step.method if isinstance(self.step, Ask) else None


# --- one refresh at a time ---


def test_of_many_callers_that_know_nothing_one_reads_the_directory_and_all_use_it() -> None:
    site = Site()
    calls = [site.call(n) for n in range(MANY)]
    assert [call.asks() for call in calls] == ["hello"] + [None] * (MANY - 1)
    assert all(isinstance(call.step, Wait) and not call.woken for call in calls[1:])
    calls[0].hear(HELLO)
    calls[0].hear(result(directory(W1)))
    assert all(call.woken for call in calls[1:])
    for call in calls[1:]:
        call.hear(None)
    assert {call.asks() for call in calls} == {"ids.next"}
    for call in calls:
        call.hear(RUN)
    assert all(call.result == [(1, 1, 1)] for call in calls)


def test_while_one_reads_a_directory_that_is_old_the_others_use_it() -> None:
    site = Site().settled()
    site.now += REFRESH_S
    calls = [site.call(n) for n in range(MANY)]
    assert [call.asks() for call in calls] == ["cluster.workers"] + ["ids.next"] * (MANY - 1)


def test_of_many_callers_whose_worker_failed_one_reads_the_directory() -> None:
    site = Site().settled()
    calls = [site.call(n) for n in range(MANY)]
    site.now += ATTEMPT_S
    for call in calls:
        call.hear(None)
    assert [call.asks() for call in calls] == ["cluster.workers"] + [None] * (MANY - 1)
    calls[0].hear(result(directory(W2)))
    for call in calls[1:]:
        call.hear(None)
    assert {call.step.endpoint for call in calls if isinstance(call.step, Ask)} == {W2}


def test_the_layout_is_asked_for_once_however_many_want_it() -> None:
    site = Site()
    calls = [Call(site, n, fetch_layout(site.balancer, BUDGET_S)) for n in range(3)]
    assert [call.asks() for call in calls] == ["hello", None, None]
    calls[0].hear(HELLO)
    calls[0].hear(result(directory(W1)))
    for call in calls[1:]:
        call.hear(None)
    assert [call.result for call in calls] == [LAYOUT] * 3


def test_callers_that_wait_hear_what_the_reader_heard() -> None:
    site = Site()
    reader, waiter = site.call(0), site.call(1)
    reader.hear(HELLO)
    with pytest.raises(AuthError, match="says denied") as first:
        reader.hear(error("denied"))
    with pytest.raises(AuthError, match="says denied") as second:
        waiter.hear(None)
    assert first.value is not second.value, "a traceback of its own"


def test_a_caller_that_waited_in_vain_tells_what_the_reader_found() -> None:
    site = Site()
    reader, waiter = site.call(0), site.call(1)
    reader.hear(HELLO)
    reader.hear(result(directory()))
    waiter.hear(None)
    assert isinstance(waiter.step, Pause)
    site.now += BUDGET_S
    with pytest.raises(Unavailable, match="start one"):
        waiter.hear(None)


def test_a_caller_waits_within_its_budget_and_no_longer() -> None:
    site = Site()
    reader, waiter = site.call(0, timeout=60.0), site.call(1, timeout=2.0)
    start = site.now
    with pytest.raises(Timeout):
        waiter.let_time_pass()
    assert site.now - start < 2.01
    assert reader.asks() == "hello"


class Interrupted(BaseException):
    """As KeyboardInterrupt is."""


def _interrupted(call: Call) -> None:
    with pytest.raises(Interrupted):
        call.talk.throw(Interrupted())


def _stuck(call: Call) -> None:
    call.site.now += BUDGET_S


@pytest.mark.parametrize(
    "give_up",
    [lambda call: call.talk.close(), _interrupted, lambda call: call.site.balancer.after_fork(), _stuck],
    ids=["closed", "interrupted", "forked", "stuck"],
)
def test_a_reader_that_gives_up_leaves_its_place_to_the_next_caller(give_up: Callable[[Call], None]) -> None:
    site = Site()
    reader = site.call(0)
    assert isinstance(site.call(1).step, Wait)
    give_up(reader)
    assert site.call(2).asks() == "hello"


def test_a_reader_that_gives_up_wakes_the_callers_that_wait() -> None:
    site = Site()
    reader, waiter = site.call(0), site.call(1)
    reader.talk.close()
    assert waiter.woken
    site.caller = waiter.caller
    while isinstance(waiter.step, Wait | Pause):
        waiter.hear(None)
    assert waiter.asks() == "hello"


def test_a_reader_that_ends_late_does_not_end_the_refresh_of_the_one_in_its_place() -> None:
    site = Site()
    late = site.call(0)
    _stuck(late)
    reader = site.call(1)
    assert reader.asks() == "hello"
    late.talk.close()
    assert isinstance(site.call(2).step, Wait)


def test_a_caller_never_waits_for_itself() -> None:
    site = Site()
    interrupted = site.call("thread")
    assert interrupted.asks() == "hello"
    assert isinstance(site.call("another").step, Wait)
    assert site.call("thread").asks() == "hello", "as from a signal handler that interrupted the first call"


def test_a_wait_that_begins_when_the_refresh_is_over_ends_at_once() -> None:
    site = Site()
    reader, waiter = site.call(0), site.call(1)
    assert isinstance(waiter.step, Wait)
    reader.talk.close()
    woken: list[bool] = []
    site.balancer.when_over(waiter.step.refresh, lambda: woken.append(True))
    assert woken == [True]


# --- failures ---


def ejected_s(site: Site, endpoint: str) -> float:
    return site.balancer._health[endpoint].ejected_until - site.now


def test_of_many_asks_under_way_when_a_worker_dies_one_counts() -> None:
    site = Site().settled()
    calls = [site.call(n) for n in range(MANY)]
    site.now += ATTEMPT_S
    for call in calls:
        call.hear(None)
        site.now += 0.001
    assert ejected_s(site, W1) <= EJECT_S * 1.5
    assert site.balancer._health[W1].failures == 1


def test_each_ask_that_began_after_the_ejection_counts() -> None:
    site = Site().settled()
    for failures in range(1, 5):
        began = site.now
        site.now += ATTEMPT_S
        site.balancer.failed(W1, began)
        assert site.balancer._health[W1].failures == failures


@pytest.mark.parametrize(
    ("answered_after_s", "stays"),
    [(0.6, True), (0.4, False)],
    ids=["which lived on, keeps its place", "which died early on, loses it"],
)
def test_an_endpoint_that_answered_another_ask_while_one_was_lost(
    answered_after_s: float, stays: bool
) -> None:
    site = Site().settled()
    lost, answered = site.call(0), site.call(1)
    site.now += answered_after_s
    answered.hear(RUN)
    site.now += 1.0 - answered_after_s
    lost.hear(None)
    assert (site.balancer.sticky(site.now) == W1) is stays


def test_the_first_ask_of_a_call_tells_when_it_began() -> None:
    site = Site().settled()
    asks = [begin(site.balancer, 1, BUDGET_S) for _ in range(MANY)]
    site.now += ATTEMPT_S
    for ask in asks:
        assert ask is not None
        assert not isinstance(proceed(site.balancer, 1, BUDGET_S, ask, None), list)
    assert site.balancer._health[W1].failures == 1


def test_a_refusal_counts_however_old_the_ask_is() -> None:
    site = Site().settled()
    refused, answered = site.call(0), site.call(1)
    site.now += 0.1
    answered.hear(RUN)
    refused.hear(error("overloaded"))
    assert site.balancer.sticky(site.now) is None, "or it would be asked again at once"
