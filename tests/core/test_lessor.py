"""The lessor: windows on one machine never overlap, whoever asks, how often, and by whatever clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake.core.layout import Field, Layout
from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Holder,
    Meta,
    Record,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
    Swap,
    Token,
)
from zflake.core.lessee import Lessee
from zflake.core.lessor import OFFER, POOL, acquire, release, renew
from zflake.stores.memory import MemoryStore

T = TypeVar("T")

thorough = settings(deadline=None, max_examples=150)

TTL = 30
# Small, so that histories meet in the same machines and reach the end; a tick of 10 ms, so that ticks are
# not milliseconds.
LAYOUT = Layout("small", (Field("time", 9), Field("machine", 3), Field("sequence", 2)), tick_ms=10)
META = Meta("", LAYOUT, TTL, first_machine=2, last_machine=4)
WIDE = replace(
    META,
    layout=Layout("wide", (Field("time", 20), Field("machine", 10), Field("sequence", 2))),
    first_machine=0,
    last_machine=1023,
)

ME = Holder("me", "here", 7)


def token(n: int) -> Token:
    return n.to_bytes(16, "big")


A, B, C = token(1), token(2), token(3)


def first(_n: int) -> int:
    return 0


def swap(decision: Answer | Swap) -> Record:
    """The record that a decision would write."""
    assert isinstance(decision, Swap), decision
    return decision.new


def refusal(decision: Answer | Swap) -> Refusal:
    assert isinstance(decision, Refusal), decision
    return decision


def wait_of(decision: Answer | Swap, meta: Meta = META) -> int:
    """A refusal's hint in ticks, which is whole ticks in milliseconds."""
    ms = refusal(decision).retry_after_ms
    assert ms is not None
    assert ms % meta.layout.tick_ms == 0
    return ms // meta.layout.tick_ms


def of(kind: type[T], decision: object) -> T:
    assert isinstance(decision, kind), decision
    return decision


# --- a delegator's desk: decide, try, read again ---


class Desk:
    """A delegator's loop around the rules, with a store of its own."""

    def __init__(self, meta: Meta = META) -> None:
        self.store = MemoryStore()
        self.store.initialise(meta)

    @property
    def meta(self) -> Meta:
        meta = self.store.meta()
        assert meta is not None
        return meta

    def ask(self, request: Request, now: int, *, meanwhile: Callable[[], object] | None = None) -> Answer:
        """The answer to `request`; `meanwhile` happens between the first decision and its swap."""
        for _ in range(10):  # each round that fails lost a race, and `meanwhile` runs once
            before = self.snapshot()
            decision = self.decide(request, now)
            assert self.snapshot() == before, "a decision wrote something"
            if not isinstance(decision, Swap):
                return decision
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if self.store.swap([decision]) == [True] and isinstance(request, Release):
                return Released(decision.new.machine, decision.new.fence)
        raise AssertionError("decided again and again, and nothing settles it")

    def decide(self, request: Request, now: int) -> Answer | Swap:
        meta, store = self.meta, self.store
        if isinstance(request, Acquire):
            lowest = store.lowest(meta.first_machine, meta.last_machine, OFFER)
            repeat = store.by_token(request.next)
            return acquire(meta, now, request, repeat=repeat, lowest=lowest, pick=first)
        decide = renew if isinstance(request, Renew) else release
        return decide(meta, now, request, record=store.by_machine(request.machine))  # type: ignore[arg-type]

    def raise_floor(self, floor: int) -> None:
        meta = self.meta
        assert self.store.swap_meta(meta, replace(meta, floor=floor, version=meta.version + 1))

    def snapshot(self) -> list[Record]:
        return [self.store.by_machine(machine) for machine in range(self.meta.layout.machines)]


def held(meta: Meta = META) -> Desk:
    """A desk at which the holder with token A has taken machine 2 at tick 100."""
    desk = Desk(meta)
    assert of(Grant, desk.ask(Acquire(A, ME), 100)).machine == 2
    return desk


# --- any clock ---


@thorough
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, LAYOUT.end_tick + TTL)), max_size=60))
def test_no_two_windows_of_a_machine_overlap_whatever_clock_decides(asked: list[tuple[int, int]]) -> None:
    desk = Desk()
    drawn = count(1)
    lessees = [Lessee(ME, draw_token=lambda: token(next(drawn)), jitter=lambda: 0.5) for _ in range(5)]
    windows = defaultdict(list)
    for number, now in asked:
        request = lessees[number].poll(lessees[number].send_at_us)
        assert request is not None
        answer = desk.ask(request, now)
        if isinstance(answer, Grant):
            windows[answer.machine].append((answer.start, answer.end))
        lessees[number].receive(answer, lessees[number].send_at_us, now)
    for granted in windows.values():
        assert granted == sorted(granted)
        assert all(one[1] <= two[0] < two[1] for one, two in pairwise(granted))


# --- acquire ---


def test_an_acquire_takes_a_window_of_one_ttl_from_now() -> None:
    desk = Desk()
    assert desk.ask(Acquire(A, ME), 100) == Grant(2, 1, 100, 100 + TTL, A, LAYOUT, TTL)
    assert desk.store.by_machine(2) == Record(2, 100 + TTL, 1, A, 100, 100, ME, 100)


def test_a_machine_is_free_from_its_fence_on_and_no_tick_sooner() -> None:
    lowest = [Record(2, 100, 5), Record(3, 101, 5)]
    for now, expected in ((99, None), (100, 2), (150, 2)):
        decision = acquire(META, now, Acquire(A), repeat=None, lowest=lowest, pick=first)
        if expected is None:
            assert refusal(decision).reason is Refused.NO_FREE_MACHINE
            assert wait_of(decision) == 1
        else:
            record = swap(decision)
            assert (record.machine, record.start, record.gen) == (expected, now, 6)


def test_nothing_is_granted_below_the_floor() -> None:
    floored = replace(META, floor=50)
    decision = acquire(floored, 49, Acquire(A), repeat=None, lowest=[Record(2)], pick=first)
    assert refusal(decision).reason is Refused.NO_FREE_MACHINE
    assert wait_of(decision) == 1
    assert swap(acquire(floored, 50, Acquire(A), repeat=None, lowest=[Record(2)], pick=first)).start == 50
    held = Record(2, 40, 1, A, 10, 10)
    assert swap(renew(floored, 45, Renew(2, A, 1, B), record=held)).start == 50


@thorough
@given(st.integers(0, 400), st.integers(0, 400), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_no_free_machine_says_when_the_first_one_may_fall_free(
    now: int, floor: int, fences: list[int]
) -> None:
    meta = replace(META, floor=floor, first_machine=0, last_machine=len(fences) - 1)
    lowest = [Record(machine, fence, 1, C) for machine, fence in enumerate(sorted(fences))]

    def asked(at: int) -> Answer | Swap:
        return acquire(meta, at, Acquire(A), repeat=None, lowest=lowest, pick=first)

    decision = asked(now)
    if isinstance(decision, Refusal):
        assert decision.reason is Refused.NO_FREE_MACHINE
        wait = wait_of(decision)
        assert isinstance(asked(now + wait), Swap)
        assert refusal(asked(now + wait - 1)).reason is Refused.NO_FREE_MACHINE
    else:
        assert max(floor, min(fences)) <= now


@pytest.mark.parametrize(
    ("free", "pool"),
    [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (100, 25), (255, 63), (256, 64), (260, 64), (1024, 64)],
)
def test_the_machine_is_drawn_from_a_quarter_of_the_free_ones_and_from_64_at_most(
    free: int, pool: int
) -> None:
    # Fences ascend, so the pool is those that have rested longest; two held ones stand behind.
    lowest = [Record(m, m) for m in range(free)] + [Record(free, 10_000), Record(free + 1, 10_001)]
    asked: list[int] = []

    def last(n: int) -> int:
        asked.append(n)
        return n - 1

    record = swap(acquire(WIDE, 5_000, Acquire(A), repeat=None, lowest=lowest, pick=last))
    assert asked == [pool]
    assert record.machine == pool - 1


def test_offering_no_more_than_it_needs_narrows_no_pool() -> None:
    assert OFFER // 4 == POOL == 64


def test_a_machine_never_used_goes_before_one_that_rests() -> None:
    desk = Desk()
    grants = []
    for now, drawn in ((0, A), (TTL, B), (2 * TTL, C)):
        grants.append(of(Grant, desk.ask(Acquire(drawn), now)).machine)
    assert grants == [2, 3, 4]
    assert of(Grant, desk.ask(Acquire(token(9)), 3 * TTL)).machine == 2


def test_only_the_leased_range_is_leased() -> None:
    desk = Desk()
    grants = [desk.ask(Acquire(token(i)), 10) for i in range(1, 4)]
    assert sorted(of(Grant, grant).machine for grant in grants) == [2, 3, 4]
    fourth = desk.ask(Acquire(token(9)), 10)
    assert refusal(fourth).reason is Refused.NO_FREE_MACHINE
    assert wait_of(fourth) == TTL


@pytest.mark.parametrize("request_", [Acquire(A, ME), Renew(2, A, 1, B)], ids=["acquire", "renew"])
def test_a_request_repeated_on_any_clock_gets_the_same_window_and_writes_nothing(
    request_: Acquire | Renew,
) -> None:
    desk = held()
    grant = desk.ask(request_, 110)
    assert isinstance(grant, Grant)
    before = desk.snapshot()
    for now in (0, 100, 110, 111, 100 + TTL, 500, LAYOUT.end_tick + 5):
        assert desk.ask(request_, now) == grant
    assert desk.snapshot() == before


# --- renew ---


def test_a_renewal_grants_the_window_that_follows_and_stretches_nothing() -> None:
    desk = held()
    assert desk.ask(Renew(2, A, 1, B), 110) == Grant(2, 2, 100 + TTL, 110 + TTL, B, LAYOUT, TTL)


def test_a_renewal_after_a_gap_starts_at_now() -> None:
    desk = held()
    grant = of(Grant, desk.ask(Renew(2, A, 1, B), 200))
    assert (grant.start, grant.end) == (200, 200 + TTL)
    assert desk.store.by_machine(2).tenancy_start == 100


def test_of_two_copies_of_a_holder_only_the_first_to_renew_goes_on() -> None:
    desk = held()
    assert isinstance(desk.ask(Renew(2, A, 1, B), 110), Grant)
    before = desk.snapshot()
    assert refusal(desk.ask(Renew(2, A, 1, C), 110)).reason is Refused.LOST
    assert refusal(desk.ask(Release(2, A, C, None), 110)).reason is Refused.LOST
    assert desk.snapshot() == before


def test_a_machine_that_went_to_another_is_lost_to_the_first() -> None:
    desk = held(replace(META, last_machine=2))
    assert isinstance(desk.ask(Acquire(B), 100 + TTL), Grant)
    assert refusal(desk.ask(Renew(2, A, 1, C), 100 + TTL)).reason is Refused.LOST


def test_a_lease_that_ran_out_is_still_its_holders_until_another_takes_it() -> None:
    desk = held()
    assert isinstance(desk.ask(Renew(2, A, 1, B), 480), Grant)


@pytest.mark.parametrize("machine", [0, 1, 5, 7])
def test_a_machine_taken_out_of_the_leased_range_is_lost_at_its_next_renewal(machine: int) -> None:
    record = Record(machine, 130, 1, A, 100, 100)
    assert refusal(renew(META, 110, Renew(machine, A, 1, B), record=record)).reason is Refused.LOST
    # What was granted before stands: a repeat is answered, a release is taken.
    assert isinstance(renew(META, 110, Renew(machine, B, 0, A), record=record), Grant)
    assert swap(release(META, 110, Release(machine, A, None, 105), record=record)).fence == 110


def test_a_machine_that_was_never_leased_is_lost_whatever_is_shown() -> None:
    for shown in (A, b"", token(0)):
        assert refusal(renew(META, 10, Renew(2, shown, 0, B), record=Record(2))).reason is Refused.LOST
        assert refusal(release(META, 10, Release(2, shown, None, 5), record=Record(2))).reason is Refused.LOST


@thorough
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 200))
def test_too_early_says_how_long_to_the_tick(fence: int, now: int, floor: int) -> None:
    meta = replace(META, floor=floor)
    held = Record(2, fence, 7, A, max(0, fence - 5), 0)

    def asked(at: int) -> Answer | Swap:
        return renew(meta, at, Renew(2, A, 7, B), record=held)

    decision = asked(now)
    if isinstance(decision, Refusal):
        assert decision.reason is Refused.TOO_EARLY
        wait = wait_of(decision)
        assert wait > 0
        granted = swap(asked(now + wait))
        assert granted.fence - granted.start == 1
        assert refusal(asked(now + wait - 1)).reason is Refused.TOO_EARLY
    else:
        granted = swap(decision)
        assert granted.start == max(now, fence, floor) < granted.fence == min(now + TTL, LAYOUT.end_tick)


def test_a_renewal_on_a_clock_that_went_back_is_told_to_wait_and_never_lost() -> None:
    desk = held()
    for now in (0, 50, 99, 100):
        answer = desk.ask(Renew(2, A, 1, B), now)
        assert refusal(answer).reason is Refused.TOO_EARLY
        assert wait_of(answer) == 101 - now
    assert isinstance(desk.ask(Renew(2, A, 1, B), 101), Grant)


# --- the layout's end ---


def test_the_last_window_ends_with_the_layout_and_then_it_is_exhausted() -> None:
    end = LAYOUT.end_tick
    desk = Desk()
    grant = of(Grant, desk.ask(Acquire(A), end - 1))
    assert (grant.start, grant.end) == (end - 1, end)
    for now in (end - 1, end, end + 100):
        assert refusal(desk.ask(Renew(2, A, 1, B), now)).reason is Refused.EXHAUSTED
        assert refusal(desk.ask(Renew(2, A, 1, B), now)).retry_after_ms is None
    assert refusal(desk.ask(Acquire(C), end)).reason is Refused.EXHAUSTED
    assert refusal(desk.ask(Acquire(C), end)).retry_after_ms is None


# --- release ---


@pytest.mark.parametrize(
    ("last", "now", "fence"),
    [
        (None, 100, 100),  # nothing minted: everything from now on is given back
        (None, 90, 100),  # never below the tenancy's start
        (None, 112, 112),  # never below now
        (105, 100, 106),  # the last tick minted in stays
        (105, 112, 112),
        (129, 100, 130),
        (500, 100, 130),  # never above the fence, whatever the holder states
        (105, 400, 130),
        (3, 90, 100),
        (-5, 90, 100),
    ],
)
def test_a_release_gives_back_what_can_not_have_been_minted_in(
    last: int | None, now: int, fence: int
) -> None:
    desk = held()
    assert desk.ask(Release(2, A, None, last), now) == Released(2, fence)
    record = desk.store.by_machine(2)
    assert (record.fence, record.gen, record.token) == (fence, 2, None)


def test_a_tenancy_in_which_nothing_was_minted_leaves_no_provenance() -> None:
    desk = held()
    desk.ask(Renew(2, A, 1, B), 120)
    desk.ask(Release(2, B, None, None), 125)
    assert desk.store.contents().spans == []
    desk.ask(Acquire(A), 130)
    (span,) = desk.store.contents().spans
    desk.ask(Release(span.machine, A, None, 140), 150)
    assert [(span.start, span.end) for span in desk.store.contents().spans] == [(130, 150)]


def test_a_release_reaches_back_over_all_windows_of_the_tenancy() -> None:
    desk = held()
    desk.ask(Renew(2, A, 1, B), 120)
    assert desk.ask(Release(2, B, None, 101), 90) == Released(2, 102)


def test_a_release_stops_at_the_tenancy_before_it() -> None:
    desk = held(replace(META, last_machine=2))
    desk.ask(Acquire(B), 130)
    assert desk.ask(Release(2, B, None, None), 0) == Released(2, 130)


def test_a_released_machine_is_free_again_at_once() -> None:
    desk = held(replace(META, last_machine=2))
    desk.ask(Release(2, A, None, 104), 105)
    grant = of(Grant, desk.ask(Acquire(B), 105))
    assert (grant.machine, grant.start) == (2, 105)


def test_a_release_with_the_token_of_an_unanswered_renewal_stands() -> None:
    desk = held()
    desk.ask(Renew(2, A, 1, B), 110)  # the reply is lost
    assert desk.ask(Release(2, A, B, 111), 112) == Released(2, 112)
    assert refusal(desk.ask(Renew(2, A, 1, B), 113)).reason is Refused.LOST


def test_a_renewal_that_arrives_after_the_release_is_lost() -> None:
    desk = held()
    assert desk.ask(Release(2, A, B, 111), 112) == Released(2, 112)
    assert refusal(desk.ask(Renew(2, A, 1, B), 113)).reason is Refused.LOST


def test_a_release_repeated_is_lost_and_writes_nothing() -> None:
    desk = held()
    desk.ask(Release(2, A, None, 105), 106)
    before = desk.snapshot()
    for last in (105, None):
        assert refusal(desk.ask(Release(2, A, None, last), 300)).reason is Refused.LOST
    assert desk.snapshot() == before


def test_no_token_matches_a_record_that_has_none() -> None:
    desk = held()
    desk.ask(Release(2, A, None, 105), 106)
    assert refusal(desk.ask(Release(2, b"", None, 1), 106)).reason is Refused.LOST
    assert refusal(desk.ask(Renew(2, b"", 2, B), 106)).reason is Refused.LOST


# --- keys ---


@pytest.mark.parametrize(
    "stolen",
    [
        Acquire(A, replace(ME, key="thief")),
        Renew(2, A, 1, B, key="thief"),
        Renew(2, B, 1, A, key="thief"),
        Release(2, A, None, None, "thief"),
        Release(2, B, A, None, "thief"),
        Renew(2, A, 1, B),
        Release(2, A, None, None),
    ],
    ids=["acquire", "renewal", "its repeat", "release", "of a renewal", "renewal by none", "release by none"],
)
def test_a_token_is_worth_nothing_to_another_key(stolen: Request) -> None:
    desk = Desk(META)
    of(Grant, desk.ask(Acquire(A, replace(ME, key="key")), 100))
    before = desk.snapshot()
    assert refusal(desk.ask(stolen, 110)).reason is Refused.LOST
    assert desk.snapshot() == before


def test_the_key_that_acquired_renews_repeats_and_releases() -> None:
    desk = Desk(META)
    acquired = Acquire(A, replace(ME, key="key"))
    assert of(Grant, desk.ask(acquired, 100)) == of(Grant, desk.ask(acquired, 110))
    of(Grant, desk.ask(Renew(2, A, 1, B, key="key"), 110))
    assert desk.store.by_machine(2).holder.key == "key"
    assert desk.ask(Release(2, B, None, 115, "key"), 116) == Released(2, 116)


# --- races ---


def test_of_two_that_race_for_a_machine_one_decides_again() -> None:
    desk = Desk()
    rival: list[Answer] = []
    mine = desk.ask(Acquire(A), 100, meanwhile=lambda: rival.append(desk.ask(Acquire(B), 100)))
    assert (of(Grant, rival[0]).machine, of(Grant, mine).machine) == (2, 3)


def test_a_renewal_that_a_copy_overtakes_is_lost_and_not_granted() -> None:
    desk = held()
    answer = desk.ask(Renew(2, A, 1, B), 110, meanwhile=lambda: desk.ask(Renew(2, A, 1, C), 110))
    assert refusal(answer).reason is Refused.LOST
    assert desk.store.by_machine(2).token == C


@pytest.mark.parametrize("request_", [Acquire(B), Renew(2, A, 1, B)], ids=["acquire", "renew"])
def test_a_request_that_races_with_its_own_repeat_is_granted_once(request_: Acquire | Renew) -> None:
    desk = held()
    other: list[Answer] = []
    mine = desk.ask(request_, 110, meanwhile=lambda: other.append(desk.ask(request_, 111)))
    assert mine == other[0]
    assert [record.token for record in desk.snapshot()].count(B) == 1


def test_a_floor_raised_while_a_grant_is_under_way_holds_for_it() -> None:
    desk = Desk()
    answer = desk.ask(Acquire(A), 100, meanwhile=lambda: desk.raise_floor(150))
    assert refusal(answer).reason is Refused.NO_FREE_MACHINE
    assert desk.snapshot() == [Record(machine) for machine in range(8)]


# --- units ---


@pytest.mark.parametrize(("ticks", "ms"), [(0, 0), (-7, 0), (1, 10), (30, 300)])
def test_ticks_are_told_in_milliseconds_and_never_below_zero(ticks: int, ms: int) -> None:
    assert META.layout.ticks_to_ms(ticks) == ms


# --- provenance ---


def test_windows_without_a_gap_are_one_span_and_a_gap_begins_another() -> None:
    desk = held()
    desk.ask(Renew(2, A, 1, B), 110)
    record = desk.store.by_machine(2)
    assert (record.start, record.span_start, record.tenancy_start) == (100 + TTL, 100, 100)
    desk.ask(Renew(2, B, 2, C), 200)
    record = desk.store.by_machine(2)
    assert (record.start, record.span_start, record.tenancy_start) == (200, 200, 100)
