"""The lease executor: answers come off the store, whatever becomes of a write."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import until
from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Holder,
    Mark,
    Meta,
    Record,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
    Span,
    Swap,
    Trace,
    Traced,
)
from zflake.core.timeline import Timeline
from zflake.delegator import executor as executor_module
from zflake.delegator.clock import DelegatorClock
from zflake.delegator.committer import FAILURES, ROUNDS, Settled
from zflake.delegator.executor import (
    BATCH,
    LOG_INTERVAL_US,
    MARK_US,
    OVERDUE_US,
    STALE_US,
    LeaseExecutor,
    Ticket,
)
from zflake.errors import StoreError
from zflake.stores.memory import MemoryStore

TTL: Final = 1000
META: Final = Meta("store", PRESETS["snowcloud"], TTL, 0, 7)
thorough = settings(deadline=None, max_examples=150)


def token(number: int) -> bytes:
    return number.to_bytes(16, "big")


def acquire(number: int) -> Acquire:
    return Acquire(token(number), Holder(f"h{number}"))


class Faulty(MemoryStore):
    """A store whose next operations go as `plan` says, one word each; then all is well.

    lose        somebody else writes the record first
    before      `StoreError`, and nothing happened
    after       `StoreError`, though it happened
    half        the first swap happened, then `StoreError`
    hang        the swap waits until `freed`
    read        the next read is a `StoreError`
    """

    def __init__(self, meta: Meta, *plan: str) -> None:
        super().__init__()
        self.initialise(meta)
        self.plan = list(plan)
        self.broken = False
        """Whether nothing can be read."""
        self.hung, self.freed = threading.Event(), threading.Event()
        self.swaps = 0
        self.commits: list[Record] = []
        self.strangers: list[Record] = []

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        self.swaps += 1
        word = self.plan.pop(0) if self.plan and self.plan[0] != "read" else ""
        if word == "before":
            raise StoreError("it fell over")
        if word == "hang":
            self.hung.set()
            assert self.freed.wait(10)
        rest, self.plan = self.plan, []  # what a swap reads on its way never fails
        if word == "lose":
            for swap in swaps:
                old = self.by_machine(swap.new.machine)
                # What other delegators might do: the machine is given back, and taken once more.
                free = replace(old, gen=old.gen + 1, token=None)
                stranger = replace(old, gen=old.gen + 2, fence=old.fence + 1)
                assert super().swap([Swap(old, free, swap.version)]) == [True]
                assert super().swap([Swap(free, stranger, swap.version)]) == [True]
                self.strangers.append(stranger)
        done = super().swap(swaps[:1] if word == "half" else swaps, mark)
        self.plan = rest
        self.commits += [swap.new for swap, ok in zip(swaps, done, strict=False) if ok]
        if word in ("after", "half"):
            raise StoreError("the answer was lost")
        return done

    def meta(self) -> Meta | None:
        self._read(())
        return super().meta()

    def by_tokens(self, tokens: Sequence[bytes]) -> list[Record | None]:
        self._read(tokens)
        return super().by_tokens(tokens)

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        self._read(machines)
        return super().by_machines(machines)

    def _read(self, wanted: Sequence[object]) -> None:
        if self.broken or (wanted and self.plan and self.plan[0] == "read"):
            self.plan = self.plan[1:]
            raise StoreError("it can't be read")


class FixedClock(DelegatorClock):
    """A timeline at the tick that the test chooses, whatever the local clock shows."""

    def __init__(self, desk: Desk, layout: Layout) -> None:
        super().__init__(
            Timeline(0, 0), layout, "here", local_us=lambda: desk.local_us, wall_us=lambda: desk.wall_us
        )
        self._desk = desk

    def timeline_us(self) -> int:
        return self._layout.epoch_us + self._desk.now * self._layout.tick_us


class Desk:
    """An executor in a time that the test moves, on a store that fails as `plan` says."""

    def __init__(self, *plan: str, meta: Meta = META, seed: int = 1) -> None:
        self.store = Faulty(meta, *plan)
        self.now = 50_000
        self.local_us = 1_000_000
        self.wall_us = 0
        self.rings = threading.Event()
        pick = random.Random(seed).randrange
        clock = FixedClock(self, meta.layout)
        self.executor = LeaseExecutor(self.store, meta, clock, wake=self.rings.set, pick=pick)

    def settle(self, *requests: Request) -> list[Answer | Traced]:
        return [settled.answer for settled in self.executor.settle(requests)]

    def one(self, request: Request) -> Answer | Traced:
        (answer,) = self.settle(request)
        return answer

    def granted(self, request: Request) -> Grant:
        return granted(self.one(request))

    # --- by the thread ---

    def submit(self, *requests: Request | Trace, age_us: int = 0) -> None:
        for number, request in enumerate(requests):
            ticket = Ticket(request, self.local_us - age_us, [b"%d" % number, b""], number)
            assert self.executor.submit(ticket)

    def collected(self) -> Answer | Traced:
        """What the thread answers to the one request that was submitted."""
        ((_, settled),) = until(self.executor.collect)
        answer: Answer | Traced = settled.answer
        return answer

    def finish(self) -> list[tuple[Ticket, Settled]]:
        """What the thread answers to all that was submitted, then it has ended."""
        self.executor.start()
        assert self.executor.stop(5)
        return self.executor.collect()


@pytest.fixture
def d() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.store.freed.set()
    if desk.executor._thread.is_alive():
        assert desk.executor.stop(5)


def granted(answer: object) -> Grant:
    assert isinstance(answer, Grant)
    return answer


def refused(answer: object, reason: Refused) -> Refusal:
    assert isinstance(answer, Refusal)
    assert answer.reason is reason
    return answer


def unavailable(answer: object) -> Refusal:
    refusal = refused(answer, Refused.UNAVAILABLE)
    assert refusal.retry_after_ms
    return refusal


def renewal(grant: Grant, number: int) -> Renew:
    return Renew(grant.machine, grant.token, grant.gen, token(number))


def as_stored(store: MemoryStore, grant: Grant) -> None:
    (record,) = MemoryStore.by_machines(store, [grant.machine])  # whatever the store fails at
    told = (grant.start, grant.end, grant.gen, grant.token)
    assert told == (record.start, record.fence, record.gen, record.token)


# --- one request ---


def test_an_acquire_is_answered_as_it_is_stored(d: Desk) -> None:
    ((answer, record),) = d.executor.settle([acquire(1)])
    grant = granted(answer)
    as_stored(d.store, grant)
    assert (grant.start, grant.end) == (d.now, d.now + TTL)
    assert record == d.store.by_machine(grant.machine)
    assert record.holder == Holder("h1")


def test_a_repeated_acquire_is_given_the_same_window_and_writes_nothing(d: Desk) -> None:
    first = d.granted(acquire(1))
    d.now += 10
    assert d.one(acquire(1)) == first
    assert d.store.swaps == 1


def test_the_whole_life_of_a_lease(d: Desk) -> None:
    first = d.granted(acquire(1))
    d.now += 400
    second = d.granted(renewal(first, 2))
    as_stored(d.store, second)
    assert (second.start, second.end) == (first.end, d.now + TTL)
    release = Release(first.machine, token(2), None, d.now)
    assert d.one(release) == Released(first.machine, d.now + 1)
    refused(d.one(release), Refused.LOST)


def test_an_acquire_of_nothing_free_says_when(d: Desk) -> None:
    for number in range(8):
        d.granted(acquire(number))
    d.now += 100
    assert refused(d.one(acquire(9)), Refused.NO_FREE_MACHINE).retry_after_ms == TTL - 100


# --- what may become of a write ---


@pytest.mark.parametrize(
    "plan", [("before",), ("after",), ("lose",), ("read",), ("lose", "after"), ("lose",) * 5]
)
def test_a_grant_is_given_once_whatever_becomes_of_the_write(plan: tuple[str, ...]) -> None:
    d = Desk(*plan)
    as_stored(d.store, d.granted(acquire(1)))
    assert [r.token for r in d.store.commits] == [token(1)]


@pytest.mark.parametrize("plan", [("before",), ("after",), ("lose",), ("read",), ("lose", "read")])
def test_a_renewal_is_given_once_whatever_becomes_of_the_write(d: Desk, plan: tuple[str, ...]) -> None:
    first = d.granted(acquire(1))
    d.store.plan = list(plan)
    d.now += 400
    second = d.granted(renewal(first, 2))
    as_stored(d.store, second)
    assert second.start >= first.end
    assert [r.token for r in d.store.commits] == [token(1), token(2)]


@pytest.mark.parametrize("word", ["before", "after", "lose", "read"])
def test_a_release_is_answered_once_it_is_stored(d: Desk, word: str) -> None:
    first = d.granted(acquire(1))
    d.store.plan = [word]
    answer = d.one(Release(first.machine, token(1), None, None))
    record = d.store.by_machine(first.machine)
    assert answer == Released(first.machine, record.fence)
    assert record.token is None


@pytest.mark.parametrize("plan", [("before",) * FAILURES, ("read",) * FAILURES, ("after", "read")])
def test_a_store_that_goes_on_failing_is_unavailable_and_the_retry_finds_what_happened(
    plan: tuple[str, ...],
) -> None:
    d = Desk(*plan)
    unavailable(d.one(acquire(1)))
    d.now += 5
    as_stored(d.store, d.granted(acquire(1)))
    assert len(d.store.commits) == 1


def test_a_race_that_is_lost_for_ever_is_given_up() -> None:
    d = Desk(*["lose"] * 99)
    unavailable(d.one(acquire(1)))
    assert d.store.swaps == ROUNDS
    assert not d.store.commits


def test_settings_that_changed_under_a_desk_are_read_before_anything_is_granted(d: Desk) -> None:
    d.store.swap_meta(META, replace(META, version=META.version + 1, ttl=2 * META.ttl))
    grant = d.granted(acquire(1))
    assert grant.ttl == grant.end - grant.start == 2 * META.ttl
    assert d.executor.meta == d.store.meta()


# --- batches ---


def test_a_batch_is_one_commit_and_each_gets_a_machine_of_its_own(d: Desk) -> None:
    grants = d.settle(*map(acquire, range(8)))
    assert {granted(grant).machine for grant in grants} == set(range(8))
    assert d.store.swaps == 1


def test_each_of_a_batch_has_its_own_outcome(d: Desk) -> None:
    held = d.granted(acquire(1))
    early, stranger, other, released = d.settle(
        renewal(held, 2),
        Renew(held.machine, token(77), held.gen, token(78)),
        acquire(3),
        Release(6, token(66), None, None),
    )
    refused(early, Refused.TOO_EARLY)  # in the same tick as the acquire: a whole ttl ahead already
    refused(stranger, Refused.LOST)
    granted(other)
    refused(released, Refused.LOST)


def test_more_acquires_than_machines_are_served_as_far_as_they_reach(d: Desk) -> None:
    answers = d.settle(*map(acquire, range(20)))
    assert len([answer for answer in answers if isinstance(answer, Grant)]) == 8
    for answer in answers[8:]:
        refused(answer, Refused.NO_FREE_MACHINE)


def test_repeats_of_one_request_in_one_batch_are_one_window(d: Desk) -> None:
    first, *repeats = d.settle(*[acquire(1)] * 3)
    held = granted(first)
    assert repeats == [held] * 2
    assert len(d.store.commits) == 1
    d.now += 400
    first, *repeats = d.settle(*[renewal(held, 2)] * 3)
    assert repeats == [granted(first)] * 2
    assert len(d.store.commits) == 2


def test_of_two_copies_of_a_holder_in_one_batch_one_is_lost(d: Desk) -> None:
    held = d.granted(acquire(1))
    d.now += 400
    first, second = d.settle(renewal(held, 2), renewal(held, 3))
    granted(first)
    refused(second, Refused.LOST)


def test_half_a_batch_that_happened_is_found_and_the_rest_tried_again() -> None:
    d = Desk("half")
    grants = [granted(answer) for answer in d.settle(acquire(1), acquire(2), acquire(3))]
    for grant in grants:
        as_stored(d.store, grant)
    assert len({grant.machine for grant in grants}) == 3
    assert sorted(r.token or b"" for r in d.store.commits) == [token(1), token(2), token(3)]


WORDS = st.sampled_from(["", "", "", "lose", "before", "after", "half", "read"])


@given(st.integers(0, 2**32), st.lists(WORDS, max_size=60))
@thorough
def test_windows_never_overlap_and_every_answer_is_as_stored_whatever_the_store_does(
    seed: int, plan: list[str]
) -> None:
    rng = random.Random(seed)
    d = Desk(*plan, seed=seed)
    store = d.store
    drawn = 0
    held: dict[int, Grant] = {}  # by number of the holder: what it was told last
    wanted: dict[int, Request] = {}
    for _ in range(25):
        d.now += rng.choice([0, 1, 50, 400, 1100])
        for holder in rng.sample(range(10), rng.randrange(1, 6)):
            if holder in wanted and rng.random() < 0.8:
                continue
            drawn += 1
            grant = held.get(holder)
            wanted[holder] = acquire(drawn) if grant is None else renewal(grant, drawn)
        holders = rng.sample(sorted(wanted), rng.randrange(0, len(wanted) + 1))
        for holder, answer in zip(holders, d.settle(*(wanted[h] for h in holders)), strict=True):
            if isinstance(answer, Grant):
                told = (answer.machine, answer.gen, answer.start, answer.end, answer.token)
                # It may have been replaced since, in the same batch.
                stored = [*store.commits, *store.strangers]
                assert told in {(r.machine, r.gen, r.start, r.fence, r.token) for r in stored}
                held[holder] = answer
                del wanted[holder]
            elif isinstance(answer, Refusal) and answer.reason is Refused.LOST:
                held.pop(holder, None)
                del wanted[holder]
    windows = sorted((r.machine, r.start, r.fence) for r in store.commits)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(windows))
    tokens: dict[bytes | None, Record] = {}
    for record in store.commits:
        # A token may be shown again after the machine that it took has gone to somebody else: not before.
        before = tokens.setdefault(record.token, record)
        assert before is record or before.fence <= record.start, "two windows for a token"


# --- the thread ---


def test_submitted_requests_come_back_with_their_envelopes_and_ring(d: Desk) -> None:
    d.submit(*map(acquire, range(5)))
    assert d.executor.backlog == 5
    done = d.finish()
    assert [(ticket.msgid, ticket.prefix) for ticket, _ in done] == [
        (number, [b"%d" % number, b""]) for number in range(5)
    ]
    for _, settled in done:
        granted(settled.answer)
    assert d.rings.is_set()
    assert d.executor.backlog == 0


def test_waiting_requests_commit_together_in_bounded_batches() -> None:
    d = Desk(meta=replace(META, last_machine=1023))
    d.submit(*map(acquire, range(BATCH + 44)))
    assert len(d.finish()) == BATCH + 44
    assert d.store.swaps == 2


def test_a_request_that_sat_for_too_long_is_dropped_and_changes_nothing(d: Desk) -> None:
    d.submit(acquire(1), age_us=STALE_US + 1)
    d.submit(acquire(2), age_us=STALE_US)
    ((ticket, _),) = d.finish()
    assert ticket.request == acquire(2)
    assert d.executor.stale == 1
    assert [r.token for r in d.store.commits] == [token(2)]


def test_stop_settles_what_waits_and_does_not_wait_for_ever_for_a_store_that_hangs(d: Desk) -> None:
    d.store.plan = ["hang"]
    d.submit(acquire(0))
    d.executor.start()
    assert d.store.hung.wait(10)
    d.submit(*map(acquire, range(BATCH + 44)))
    assert not d.executor.stop(0.05)
    d.store.freed.set()
    assert d.executor.stop(5)
    assert len(d.executor.collect()) == 1 + BATCH + 44


def test_a_store_that_fails_is_not_asked_again_but_by_the_house_keeping(
    d: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    d.store.broken = True
    d.executor.start()
    d.submit(acquire(1))
    unavailable(d.collected())
    for _ in range(2):
        d.submit(acquire(1))
        refusal = unavailable(d.collected())
        assert "it can't be read" in refusal.message
        assert d.executor.outage == refusal
    d.store.broken = False
    assert d.executor.outage is not None
    d.local_us += MARK_US
    until(lambda: d.executor.outage is None)
    assert "memory: can be used again, after 1.0 s" in caplog.text
    d.executor._complain(StoreError("it failed again"))
    assert "it failed again" in caplog.text
    d.submit(acquire(1))
    granted(d.collected())


def test_a_request_that_the_store_fails_at_is_nobody_elses_outage(
    d: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_tokens = d.store.by_tokens

    def fail_at_two(tokens: Sequence[bytes]) -> list[Record | None]:
        if token(2) in tokens:
            raise StoreError("this one can't be read")
        return by_tokens(tokens)

    monkeypatch.setattr(d.store, "by_tokens", fail_at_two)
    d.submit(acquire(1), acquire(2), acquire(3))
    first, second, third = (settled.answer for _, settled in d.finish())
    granted(first)
    unavailable(second)
    granted(third)
    assert d.executor.outage is None


def test_after_an_outage_the_leases_are_read_before_it_is_over(
    d: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d.store, "exclusive", False, raising=False)
    d.executor._fail(StoreError("it is away"))
    held = d.store.held

    def look(now: int) -> Sequence[Record]:
        assert d.executor.outage is not None
        return held(now)

    monkeypatch.setattr(d.store, "held", look)
    d.local_us += MARK_US
    d.executor._keep_house()
    assert d.executor.outage is None
    assert d.executor.collect_held() == []


def test_a_store_that_does_not_answer_is_an_outage_before_it_has_failed(d: Desk) -> None:
    d.store.plan = ["hang"]
    d.executor.start()
    d.submit(acquire(1))
    assert d.store.hung.wait(10)
    d.local_us += OVERDUE_US
    assert d.executor.outage is None
    d.local_us += 1
    assert d.executor.outage is not None
    assert "has not answered for a while" in d.executor.outage.message
    d.store.freed.set()
    granted(d.collected())
    until(lambda: d.executor.outage is None)


def test_failures_that_go_on_are_logged_now_and_then_whatever_they_say(
    d: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(7):
        d.executor._complain(StoreError(f"reason {number}"))
    d.local_us += LOG_INTERVAL_US
    d.executor._complain(StoreError("reason 7"))
    assert [record.getMessage() for record in caplog.records] == [
        "reason 0",
        "reason 7 (6 more failures since the last line)",
    ]


def test_the_mark_is_written_with_each_commit_and_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, d: Desk
) -> None:
    monkeypatch.setattr(executor_module, "MARK_US", 10_000)

    def is_marked() -> bool:
        d.local_us += 10_000
        return d.store.marks() == [d.executor.clock.mark()]

    d.granted(acquire(1))
    assert is_marked()
    d.now += 500
    d.executor.start()
    until(is_marked)
    d.store.plan = ["before"] * 3  # a mark that can't be written is written later
    d.now += 500
    until(is_marked)


def test_every_grant_is_logged_before_it_can_be_collected(d: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="zflake.lease")
    d.executor.start()
    d.submit(acquire(1))
    first = granted(d.collected())
    d.now += 400
    d.submit(renewal(first, 2))
    second = granted(d.collected())
    d.submit(Release(second.machine, second.token, None, None))
    released = d.collected()
    assert isinstance(released, Released)
    assert [r.__dict__["lease"] for r in caplog.records] == [
        ["acquired", first.machine, 1, first.start, first.end],
        ["renewed", first.machine, 2, second.start, second.end],
        ["released", first.machine, 3, second.start, released.fence],
    ]


# --- a store that forgets ---


@pytest.fixture
def witness(d: Desk) -> Renew:
    """The renewal of a holder whose last grant the store has forgotten, since it was set back."""
    d.granted(acquire(1))
    held = d.granted(acquire(2))
    before = d.store.contents()
    d.now += TTL // 2
    later = d.granted(renewal(held, 3))
    d.store.close()
    d.store.initialise(META, before)
    d.now += 1
    return replace(renewal(later, 4), end=later.end, store_id=META.store_id)


def test_a_witness_is_told_lost_and_nothing_is_granted_below_the_floor(
    d: Desk, witness: Renew, caplog: pytest.LogCaptureFixture
) -> None:
    assert witness.end is not None
    refused(d.one(witness), Refused.LOST)
    meta = d.store.meta()
    assert meta is not None
    assert meta == d.executor.meta
    assert meta.floor == max(d.now, witness.end) + 1 + 70_000
    assert "has lost leases" in caplog.text
    refused(d.one(acquire(9)), Refused.NO_FREE_MACHINE)
    d.now = meta.floor
    assert d.granted(acquire(9)).start >= meta.floor


def test_a_holder_whose_acquire_was_granted_anew_after_a_loss_is_a_witness(d: Desk) -> None:
    d.granted(acquire(1))
    before = d.store.contents()
    held = d.granted(acquire(2))
    d.store.close()
    d.store.initialise(META, before)
    d.now += 1
    late = d.granted(acquire(2))  # a late copy: the same token and the same gen again, another window
    assert (late.machine, late.token, late.gen) == (held.machine, held.token, held.gen)
    refused(d.one(replace(renewal(held, 3), end=held.end, store_id=META.store_id)), Refused.TOO_EARLY)
    assert d.executor.meta.floor > held.end


@pytest.mark.parametrize("place", [0, 1])
def test_who_comes_in_one_batch_with_a_witness_is_granted_nothing_below_the_floor(
    d: Desk, witness: Renew, place: int
) -> None:
    batch: list[Request] = [acquire(9)]
    batch.insert(place, witness)  # behind: decided before the floor rises, a swap names the old meta
    assert not any(isinstance(answer, Grant) for answer in d.settle(*batch))


def test_the_latest_clock_counts_for_the_floor(d: Desk, witness: Renew) -> None:
    late = d.now + 500_000
    d.wall_us = META.layout.epoch_us + late * META.layout.tick_us
    d.settle(witness)
    assert d.executor.meta.floor == late + 1 + 70_000


def test_a_store_that_goes_back_to_what_it_was_is_noticed(d: Desk, caplog: pytest.LogCaptureFixture) -> None:
    copy = d.store.contents()
    first = d.granted(acquire(1))
    d.store.swap_meta(META, replace(META, version=2, ttl=2 * TTL))
    d.granted(acquire(2))
    assert d.executor.meta.ttl == 2 * TTL
    d.store.close()  # in the place of the store comes a copy that was made before
    d.store.initialise(META, copy)
    d.executor._committer.follow_meta()
    floor = d.now + 1 + 70_000
    assert d.executor.meta.floor == floor
    assert d.executor.meta == d.store.meta()
    assert "is not what it was" in caplog.text
    refused(d.one(acquire(3)), Refused.NO_FREE_MACHINE)
    # And again, to one whose floor is lower.
    d.store.close()
    d.store.initialise(replace(META, version=99), copy)
    d.executor._committer.follow_meta()
    assert d.executor.meta.floor == floor
    d.now = floor
    assert d.granted(acquire(4)).start >= max(floor, first.end)


def test_a_floor_that_another_delegator_raised_is_told(d: Desk, caplog: pytest.LogCaptureFixture) -> None:
    d.store.swap_meta(META, replace(META, version=77, floor=d.now + 5_000))
    d.executor._committer.follow_meta()
    d.executor._committer.follow_meta()
    assert [record.getMessage() for record in caplog.records] == [
        "another delegator found that memory: may have lost leases that still run. Nothing is granted for 5 s"
    ]


def test_a_store_that_was_emptied_in_use_grants_nothing(d: Desk) -> None:
    held = d.granted(acquire(1))
    d.store.close()
    d.now += TTL // 2
    unavailable(d.one(replace(renewal(held, 2), end=held.end, store_id=META.store_id)))


# --- provenance ---


def test_a_trace_is_answered_from_the_store(d: Desk) -> None:
    grant = d.granted(acquire(1))
    within, behind = d.executor.settle([Trace(grant.machine, at) for at in (grant.start, grant.end)])
    assert within == (Traced(Span(grant.machine, grant.start, grant.end, Holder("h1")), 0), None)
    assert behind == (Traced(None, 0), None)


def test_traces_wait_behind_leases_and_there_is_no_end_of_them(d: Desk) -> None:
    d.submit(*[Trace(1, 1)] * executor_module.MAX_TRACES)
    with pytest.raises(AssertionError):
        d.submit(Trace(1, 1))
    d.submit(acquire(1))
    assert d.finish()[0][0].request == acquire(1)


def test_a_flood_of_tenancies_pushes_no_long_one_out_of_the_provenance(
    d: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = META.last_machine + 1
    monkeypatch.setattr(executor_module, "KEPT_SPANS", 2 * 8 * machines)  # 8 for each
    honest = [d.granted(acquire(number)) for number in range(machines)]
    d.now += TTL
    for number in range(100 * machines):
        d.submit(acquire(1000 + number))
        d.executor.turn(0)
        ((_, settled),) = d.executor.collect()
        grant = granted(settled.answer)
        d.now += 2
        d.one(Release(grant.machine, grant.token, None, d.now))
    assert len(d.store.contents().spans) <= machines * 9
    for grant in honest:
        ((answer, _),) = d.executor.settle([Trace(grant.machine, grant.start)])
        assert isinstance(answer, Traced)
        assert answer.span is not None
        assert (answer.span.start, answer.span.end) == (grant.start, grant.end)


def test_a_holder_that_renews_late_each_time_fills_no_store(d: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "KEPT_SPANS", 2 * 8 * (META.last_machine + 1))
    grant = d.granted(acquire(1))
    for number in range(100):
        d.now = grant.end + 1
        d.submit(renewal(grant, 100 + number))
        d.executor.turn(0)
        ((_, settled),) = d.executor.collect()
        grant = granted(settled.answer)
    assert len(d.store.contents().spans) == 8


def test_a_store_that_can_t_be_thinned_out_goes_on(
    d: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("it can't be thinned out")

    monkeypatch.setattr(executor_module, "KEPT_SPANS", 1)
    monkeypatch.setattr(d.store, "thin", fail)
    d.submit(acquire(1))
    d.executor.turn(0)
    ((_, settled),) = d.executor.collect()
    grant = granted(settled.answer)
    assert not caplog.text, "a machine that is new has one span at most"
    d.now = grant.end + 1
    d.submit(renewal(grant, 2))
    d.executor.turn(0)
    ((_, settled),) = d.executor.collect()
    granted(settled.answer)
    assert "it can't be thinned out" in caplog.text
    assert d.executor.outage is None


def test_pruning_that_is_behind_goes_on_at_once(d: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "KEPT_SPANS", 3)
    monkeypatch.setattr(executor_module, "PRUNE", 1)
    for number in range(6):
        d.granted(acquire(number))
    left = []
    for _ in range(4):
        d.local_us += MARK_US
        d.executor.turn(0)
        left.append(len(d.store.contents().spans))
    assert left == [5, 4, 3, 3]


def test_what_is_old_is_forgotten_in_time(d: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "KEPT_SPANS", 3)
    for number in range(6):
        d.granted(acquire(number))
    d.executor.start()
    d.local_us += executor_module.MARK_US
    until(lambda: len(list(d.store.contents().spans)) == 3)
