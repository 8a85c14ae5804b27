"""The lease executor: answers come off the store, whatever becomes of a write."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import until
from zflake.core.layout import PRESETS
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
    read        the next read is a `StoreError`
    """

    def __init__(self, *plan: str) -> None:
        super().__init__()
        self.initialise(META)
        self.plan = list(plan)
        self.swaps = 0
        self.commits: list[Record] = []
        self.strangers: list[Record] = []

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        self.swaps += 1
        word = self.plan.pop(0) if self.plan and self.plan[0] != "read" else ""
        if word == "before":
            raise StoreError("it fell over")
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

    def by_tokens(self, tokens: Sequence[bytes]) -> list[Record | None]:
        self._read(tokens)
        return super().by_tokens(tokens)

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        self._read(machines)
        return super().by_machines(machines)

    def _read(self, wanted: Sequence[object]) -> None:
        if wanted and self.plan and self.plan[0] == "read":
            self.plan.pop(0)
            raise StoreError("it can't be read")


class FixedClock(DelegatorClock):
    """A timeline at the tick that the test chooses, whatever the local clock shows."""

    def __init__(self, desk: Desk, meta: Meta) -> None:
        super().__init__(
            Timeline(0, 0), meta.layout, "here", local_us=lambda: desk.local_us, wall_us=lambda: desk.wall_us
        )
        self._desk = desk
        self._of = meta.layout

    def timeline_us(self) -> int:
        return self._of.epoch_us + self._desk.now * self._of.tick_us


class Desk:
    """An executor in a time that the test moves."""

    def __init__(self, store: MemoryStore, meta: Meta = META, seed: int = 1) -> None:
        self.store = store
        self.now = 50_000
        self.local_us = 1_000_000
        self.wall_us = 0
        self.rings = threading.Event()
        self.executor = LeaseExecutor(
            store,
            meta,
            FixedClock(self, meta),
            wake=self.rings.set,
            pick=random.Random(seed).randrange,
        )

    def settle(self, *requests: Request) -> list[Answer]:
        answers = [settled.answer for settled in self.executor.settle(requests)]
        assert not any(isinstance(answer, Traced) for answer in answers)
        return cast("list[Answer]", answers)

    def one(self, request: Request) -> Answer:
        (answer,) = self.settle(request)
        return answer

    def granted(self, request: Request) -> Grant:
        answer = self.one(request)
        assert isinstance(answer, Grant)
        return answer


def executor(*plan: str) -> Desk:
    return Desk(Faulty(*plan))


def stored_at(store: MemoryStore, machine: int) -> Record:
    """A machine's record, whatever the store fails at."""
    return MemoryStore.by_machines(store, [machine])[0]


def as_stored(store: MemoryStore, grant: Grant) -> None:
    record = stored_at(store, grant.machine)
    assert (record.start, record.fence, record.gen, record.token) == (
        grant.start,
        grant.end,
        grant.gen,
        grant.token,
    )


def unavailable(answer: object) -> None:
    assert isinstance(answer, Refusal)
    assert answer.reason is Refused.UNAVAILABLE
    assert answer.retry_after_ms


# --- one request ---


def test_an_acquire_is_answered_as_it_is_stored() -> None:
    d = executor()
    grant = d.granted(acquire(1))
    as_stored(d.store, grant)
    assert (grant.start, grant.end) == (d.now, d.now + TTL)
    assert d.store.by_machine(grant.machine).holder == Holder("h1")


def test_the_outcome_carries_the_record_as_it_is_stored() -> None:
    d = executor()
    (settled,) = d.executor.settle([acquire(1)])
    assert isinstance(settled.answer, Grant)
    assert settled.record == d.store.by_machine(settled.answer.machine)


def test_a_repeated_acquire_is_given_the_same_window_and_writes_nothing() -> None:
    d = executor()
    first = d.granted(acquire(1))
    d.now += 10
    assert d.one(acquire(1)) == first
    assert isinstance(d.store, Faulty)
    assert d.store.swaps == 1


def test_the_whole_life_of_a_lease() -> None:
    d = executor()
    first = d.granted(acquire(1))
    d.now += 400
    second = d.granted(Renew(first.machine, token(1), first.gen, token(2)))
    as_stored(d.store, second)
    assert (second.start, second.end) == (first.end, d.now + TTL)
    released = d.one(Release(first.machine, token(2), None, d.now))
    assert released == Released(first.machine, d.now + 1)
    again = d.one(Release(first.machine, token(2), None, d.now))
    assert isinstance(again, Refusal)
    assert again.reason is Refused.LOST


def test_an_acquire_of_nothing_free_says_when() -> None:
    d = executor()
    for number in range(8):
        d.granted(acquire(number))
    d.now += 100
    refused = d.one(acquire(9))
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.retry_after_ms) == (Refused.NO_FREE_MACHINE, TTL - 100)


# --- what may become of a write ---


@pytest.mark.parametrize(
    "plan", [("before",), ("after",), ("lose",), ("read",), ("lose", "after"), ("lose",) * 5]
)
def test_a_grant_is_given_once_whatever_becomes_of_the_write(plan: tuple[str, ...]) -> None:
    d = executor(*plan)
    grant = d.granted(acquire(1))
    as_stored(d.store, grant)
    assert isinstance(d.store, Faulty)
    assert [r.token for r in d.store.commits] == [token(1)]


@pytest.mark.parametrize("plan", [("before",), ("after",), ("lose",), ("read",), ("lose", "read")])
def test_a_renewal_is_given_once_whatever_becomes_of_the_write(plan: tuple[str, ...]) -> None:
    d = executor()
    first = d.granted(acquire(1))
    assert isinstance(d.store, Faulty)
    d.store.plan = list(plan)
    d.now += 400
    second = d.granted(Renew(first.machine, token(1), first.gen, token(2)))
    as_stored(d.store, second)
    assert second.start >= first.end
    assert [r.token for r in d.store.commits] == [token(1), token(2)]


@pytest.mark.parametrize("plan", [("before",), ("lose",), ("read",)])
def test_a_release_is_answered_once_it_is_stored(plan: tuple[str, ...]) -> None:
    d = executor()
    first = d.granted(acquire(1))
    assert isinstance(d.store, Faulty)
    d.store.plan = list(plan)
    answer = d.one(Release(first.machine, token(1), None, None))
    assert isinstance(answer, Released)
    record = d.store.by_machine(first.machine)
    assert (record.token, record.fence) == (None, answer.fence)


def test_a_release_that_happened_though_the_store_failed_is_over_too() -> None:
    d = executor()
    first = d.granted(acquire(1))
    assert isinstance(d.store, Faulty)
    d.store.plan = ["after"]
    answer = d.one(Release(first.machine, token(1), None, None))
    assert answer == Released(first.machine, d.store.by_machine(first.machine).fence)
    assert d.store.by_machine(first.machine).token is None


@pytest.mark.parametrize("word", ["before", "after", "read"])
def test_a_store_that_goes_on_failing_is_unavailable_and_the_retry_finds_what_happened(word: str) -> None:
    d = executor(*[word] * FAILURES)
    if word == "after":
        d = executor("after", "read")
    unavailable(d.one(acquire(1)))
    d.now += 5
    as_stored(d.store, d.granted(acquire(1)))
    assert isinstance(d.store, Faulty)
    assert len(d.store.commits) == 1


def test_a_race_that_is_lost_for_ever_is_given_up() -> None:
    d = executor(*["lose"] * 99)
    unavailable(d.one(acquire(1)))
    assert isinstance(d.store, Faulty)
    assert d.store.swaps == ROUNDS
    assert not d.store.commits


def test_settings_that_changed_under_a_desk_are_read_before_anything_is_granted() -> None:
    d = executor()
    d.store.swap_meta(META, replace(META, version=META.version + 1, ttl=2 * META.ttl))
    grant = d.granted(acquire(1))
    assert grant.ttl == grant.end - grant.start == 2 * META.ttl
    assert d.executor.meta == d.store.meta()


# --- batches ---


def test_a_batch_is_one_commit_and_each_gets_a_machine_of_its_own() -> None:
    d = executor()
    grants = d.settle(*map(acquire, range(8)))
    assert {g.machine for g in grants if isinstance(g, Grant)} == set(range(8))
    assert isinstance(d.store, Faulty)
    assert d.store.swaps == 1


def test_each_of_a_batch_has_its_own_outcome() -> None:
    d = executor()
    held = d.granted(acquire(1))
    answers = d.settle(
        Renew(held.machine, token(1), held.gen, token(2)),
        Renew(held.machine, token(77), held.gen, token(78)),
        acquire(3),
        Release(6, token(66), None, None),
    )
    assert isinstance(answers[0], Refusal)  # in the same tick as the acquire: a whole ttl ahead already
    assert answers[0].reason is Refused.TOO_EARLY
    assert isinstance(answers[1], Refusal)
    assert answers[1].reason is Refused.LOST
    assert isinstance(answers[2], Grant)
    assert isinstance(answers[3], Refusal)
    assert answers[3].reason is Refused.LOST


def test_more_acquires_than_machines_are_served_as_far_as_they_reach() -> None:
    d = executor()
    answers = d.settle(*map(acquire, range(20)))
    assert sum(isinstance(a, Grant) for a in answers) == 8
    assert all(a.reason is Refused.NO_FREE_MACHINE for a in answers if isinstance(a, Refusal))


def test_repeats_of_one_request_in_one_batch_are_one_window() -> None:
    d = executor()
    grants = d.settle(acquire(1), acquire(1), acquire(1))
    assert isinstance(grants[0], Grant)
    assert grants[0] == grants[1] == grants[2]
    assert isinstance(d.store, Faulty)
    assert len(d.store.commits) == 1
    d.now += 400
    renewals = d.settle(*[Renew(grants[0].machine, token(1), 1, token(2))] * 3)
    assert isinstance(renewals[0], Grant)
    assert renewals[0] == renewals[1] == renewals[2]
    assert len(d.store.commits) == 2


def test_of_two_copies_of_a_holder_in_one_batch_one_is_lost() -> None:
    d = executor()
    held = d.granted(acquire(1))
    d.now += 400
    answers = d.settle(*(Renew(held.machine, token(1), held.gen, token(n)) for n in (2, 3)))
    assert sorted(type(a).__name__ for a in answers) == ["Grant", "Refusal"]
    assert [a.reason for a in answers if isinstance(a, Refusal)] == [Refused.LOST]


def test_half_a_batch_that_happened_is_found_and_the_rest_tried_again() -> None:
    d = executor("half")
    grants = d.settle(acquire(1), acquire(2), acquire(3))
    for grant in grants:
        assert isinstance(grant, Grant)
        as_stored(d.store, grant)
    assert len({g.machine for g in grants if isinstance(g, Grant)}) == 3
    assert isinstance(d.store, Faulty)
    assert sorted(r.token or b"" for r in d.store.commits) == [token(1), token(2), token(3)]


WORDS = st.sampled_from(["", "", "", "lose", "before", "after", "half", "read"])


@given(st.integers(0, 2**32), st.lists(WORDS, max_size=60))
@thorough
def test_windows_never_overlap_and_every_answer_is_as_stored_whatever_the_store_does(
    seed: int, plan: list[str]
) -> None:
    rng = random.Random(seed)
    store = Faulty(*plan)
    d = Desk(store, seed=seed)
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
            wanted[holder] = (
                acquire(drawn)
                if grant is None
                else Renew(grant.machine, grant.token, grant.gen, token(drawn))
            )
        holders = rng.sample(sorted(wanted), rng.randrange(0, len(wanted) + 1))
        for holder, settled in zip(holders, d.executor.settle([wanted[h] for h in holders]), strict=True):
            answer = settled.answer
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


def ticket(request: Request | Trace, msgid: int, arrived_us: int = 1_000_000) -> Ticket:
    return Ticket(request, arrived_us, [b"%d" % msgid, b""], msgid)


def collected(d: Desk, count: int) -> list[tuple[Ticket, Settled]]:
    got: list[tuple[Ticket, Settled]] = []

    def collect() -> bool:
        got.extend(d.executor.collect())
        return len(got) >= count

    until(collect)
    return got


def test_submitted_requests_come_back_with_their_envelopes_and_ring() -> None:
    d = executor()
    for number in range(5):
        d.executor.submit(ticket(acquire(number), number))
    assert d.executor.backlog == 5
    d.executor.start()
    got = collected(d, 5)
    assert [t.msgid for t, _ in got] == list(range(5))
    assert all(isinstance(settled.answer, Grant) for _, settled in got)
    assert d.rings.is_set()
    assert d.executor.backlog == 0
    assert d.executor.stop(5)


def test_waiting_requests_commit_together_in_bounded_batches() -> None:
    store = Faulty()
    wide = replace(META, version=2, last_machine=1023)
    store.swap_meta(META, wide)
    d = Desk(store, wide)
    for number in range(BATCH + 44):
        d.executor.submit(ticket(acquire(number), number))
    d.executor.start()
    assert d.executor.stop(5)
    assert len(d.executor.collect()) == BATCH + 44
    assert store.swaps == 2


def test_a_request_that_sat_for_too_long_is_dropped_and_changes_nothing() -> None:
    d = executor()
    d.local_us = 10_000_000
    d.executor.submit(ticket(acquire(1), 1, d.local_us - STALE_US - 1))
    d.executor.submit(ticket(acquire(2), 2, d.local_us - STALE_US))
    d.executor.start()
    assert d.executor.stop(5)
    assert [t.msgid for t, _ in d.executor.collect()] == [2]
    assert d.executor.stale == 1
    assert isinstance(d.store, Faulty)
    assert [r.token for r in d.store.commits] == [token(2)]


def test_stop_settles_what_waits() -> None:
    d = executor()
    for number in range(3):
        d.executor.submit(ticket(acquire(number), number))
    d.executor.start()
    assert d.executor.stop(5)
    assert len(d.executor.collect()) == 3


def test_stop_does_not_wait_for_ever_for_a_store_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    d = executor()
    free = threading.Event()
    swap: Callable[..., list[bool]] = d.store.swap
    monkeypatch.setattr(d.store, "swap", lambda *swaps: swap(*swaps) if free.wait(10) else [])
    d.executor.submit(ticket(acquire(1), 1))
    d.executor.start()
    assert not d.executor.stop(0.05)
    free.set()
    assert d.executor.stop(5)


def test_a_store_that_fails_is_not_asked_again_but_by_the_house_keeping(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = executor()
    broken, meta = threading.Event(), d.store.meta
    broken.set()

    def fail() -> Meta | None:
        if broken.is_set():
            raise StoreError("it can't be read")
        return meta()

    monkeypatch.setattr(d.store, "meta", fail)
    by_tokens = d.store.by_tokens
    monkeypatch.setattr(d.store, "by_tokens", lambda tokens: by_tokens(tokens) if fail() else [])
    d.executor.start()
    d.executor.submit(ticket(acquire(1), 1))
    ((_, settled),) = collected(d, 1)
    unavailable(settled.answer)
    for number in (2, 3):
        d.executor.submit(ticket(acquire(1), number))
        ((_, settled),) = collected(d, 1)
        unavailable(settled.answer)
        assert isinstance(settled.answer, Refusal)
        assert "it can't be read" in settled.answer.message
        assert d.executor.outage == settled.answer
    broken.clear()
    assert d.executor.outage is not None
    d.local_us += MARK_US
    until(lambda: d.executor.outage is None)
    assert "memory: can be used again, after 1.0 s" in caplog.text
    d.executor._complain(StoreError("it failed again"))
    assert "it failed again" in caplog.text
    d.executor.submit(ticket(acquire(1), 4))
    ((_, settled),) = collected(d, 1)
    assert isinstance(settled.answer, Grant)
    assert d.executor.stop(5)


def test_a_request_that_the_store_fails_at_is_nobody_elses_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    d = executor()
    by_tokens = d.store.by_tokens

    def fail_at_two(tokens: Sequence[bytes]) -> list[Record | None]:
        if token(2) in tokens:
            raise StoreError("this one can't be read")
        return by_tokens(tokens)

    monkeypatch.setattr(d.store, "by_tokens", fail_at_two)
    for number in (1, 2, 3):
        d.executor.submit(ticket(acquire(number), number))
    d.executor.start()
    answers = {t.msgid: settled.answer for t, settled in collected(d, 3)}
    unavailable(answers[2])
    assert isinstance(answers[1], Grant)
    assert isinstance(answers[3], Grant)
    assert d.executor.outage is None
    assert d.executor.stop(5)


def test_after_an_outage_the_leases_are_read_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    d = executor()
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


def test_a_store_that_does_not_answer_is_an_outage_before_it_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d = executor()
    free, asked = threading.Event(), threading.Event()
    swap: Callable[..., list[bool]] = d.store.swap

    def hang(*swaps: Any) -> list[bool]:
        asked.set()
        return swap(*swaps) if free.wait(10) else []

    monkeypatch.setattr(d.store, "swap", hang)
    d.executor.start()
    d.executor.submit(ticket(acquire(1), 1))
    assert asked.wait(10)
    d.local_us += OVERDUE_US
    assert d.executor.outage is None
    d.local_us += 1
    assert d.executor.outage is not None
    assert "has not answered for a while" in d.executor.outage.message
    free.set()
    ((_, settled),) = collected(d, 1)
    assert isinstance(settled.answer, Grant)
    until(lambda: d.executor.outage is None)
    assert d.executor.stop(5)


def test_failures_that_go_on_are_logged_now_and_then_whatever_they_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    d = executor()
    for number in range(7):
        d.executor._complain(StoreError(f"reason {number}"))
    d.local_us += LOG_INTERVAL_US
    d.executor._complain(StoreError("reason 7"))
    assert [record.getMessage() for record in caplog.records] == [
        "reason 0",
        "reason 7 (6 more failures since the last line)",
    ]


def test_the_mark_is_written_with_each_commit_and_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor_module, "MARK_US", 10_000)
    d = executor()

    def is_marked() -> bool:
        d.local_us += 10_000
        return d.store.marks() == [d.executor.clock.mark()]

    d.granted(acquire(1))
    assert is_marked()
    d.now += 500
    d.executor.start()
    until(is_marked)
    assert isinstance(d.store, Faulty)
    d.store.plan = ["before"] * 3  # a mark that can't be written is written later
    d.now += 500
    until(is_marked)
    assert d.executor.stop(5)


def test_every_grant_is_logged_before_it_can_be_collected(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="zflake.lease")
    d = executor()
    d.executor.submit(ticket(acquire(1), 1))
    d.executor.start()
    ((_, settled),) = collected(d, 1)
    assert isinstance(settled.answer, Grant)
    grant = settled.answer
    assert [r.__dict__["lease"] for r in caplog.records] == [
        ["acquired", grant.machine, grant.gen, grant.start, grant.end]
    ]
    assert d.executor.stop(5)


# --- a store that forgets ---


def forgetful() -> tuple[Desk, Renew]:
    """A executor on a store that was set back, and the renewal of one whose last grant it has forgotten."""
    d = executor()
    d.granted(acquire(1))
    held = d.granted(acquire(2))
    before = d.store.contents()
    d.now += TTL // 2
    later = d.granted(Renew(held.machine, held.token, held.gen, token(3), held.end))
    restored = Faulty()
    restored.close()
    restored.initialise(META, before)
    set_back = Desk(restored)
    set_back.now = d.now + 1
    return set_back, Renew(later.machine, later.token, later.gen, token(4), later.end, META.store_id)


def test_a_witness_is_told_lost_and_nothing_is_granted_below_the_floor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    d, witness = forgetful()
    assert witness.end is not None
    (answer,) = d.settle(witness)
    assert isinstance(answer, Refusal)
    assert answer.reason is Refused.LOST
    meta = d.store.meta()
    assert meta is not None
    assert meta == d.executor.meta
    assert meta.floor == max(d.now, witness.end) + 1 + 70_000
    assert "has lost leases" in caplog.text
    (refused,) = d.settle(acquire(9))
    assert isinstance(refused, Refusal)
    assert refused.reason is Refused.NO_FREE_MACHINE
    d.now = meta.floor
    assert d.granted(acquire(9)).start >= meta.floor


def test_who_comes_in_one_batch_with_a_witness_is_granted_nothing_below_the_floor() -> None:
    d, witness = forgetful()
    lost, other = d.settle(witness, acquire(9))
    assert isinstance(lost, Refusal)
    assert isinstance(other, Refusal)
    d, witness = forgetful()
    other, lost = d.settle(acquire(9), witness)  # decided before the floor rose: its swap names the old meta
    assert isinstance(other, Refusal)


def test_the_latest_clock_counts_for_the_floor() -> None:
    d, witness = forgetful()
    late = d.now + 500_000
    d.wall_us = META.layout.epoch_us + late * META.layout.tick_us
    d.settle(witness)
    assert d.executor.meta.floor == late + 1 + 70_000


def test_a_store_that_goes_back_to_what_it_was_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    d = executor()
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
    (answer,) = d.settle(acquire(3))
    assert isinstance(answer, Refusal)
    # And again, to one whose floor is lower.
    d.store.close()
    d.store.initialise(replace(META, version=99), copy)
    d.executor._committer.follow_meta()
    assert d.executor.meta.floor == floor
    d.now = floor
    assert d.granted(acquire(4)).start >= max(floor, first.end)


def test_a_floor_that_another_delegator_raised_is_told(caplog: pytest.LogCaptureFixture) -> None:
    d = executor()
    d.store.swap_meta(META, replace(META, version=77, floor=d.now + 5_000))
    d.executor._committer.follow_meta()
    d.executor._committer.follow_meta()
    assert [record.getMessage() for record in caplog.records] == [
        "another delegator found that memory: may have lost leases that still run. Nothing is granted for 5 s"
    ]


def test_a_store_that_was_emptied_in_use_grants_nothing() -> None:
    d = executor()
    held = d.granted(acquire(1))
    d.store.close()
    d.now += TTL // 2
    unavailable(d.one(Renew(held.machine, held.token, held.gen, token(2), held.end, META.store_id)))


# --- provenance ---


def test_a_trace_is_answered_from_the_store() -> None:
    d = executor()
    grant = d.granted(acquire(1))
    ((answer, record),) = d.executor.settle([Trace(grant.machine, grant.start)])
    assert answer == Traced(Span(grant.machine, grant.start, grant.end, Holder("h1")), 0)
    assert record is None
    ((answer, _),) = d.executor.settle([Trace(grant.machine, grant.end)])
    assert answer == Traced(None, 0)


def test_traces_wait_behind_leases_and_there_is_no_end_of_them() -> None:
    d = executor()
    for number in range(executor_module.MAX_TRACES):
        assert d.executor.submit(ticket(Trace(1, number), number))
    assert not d.executor.submit(ticket(Trace(1, 1), 0))
    assert d.executor.submit(ticket(acquire(1), 9999))
    d.executor.start()
    assert collected(d, 1)[0][0].msgid == 9999


def test_what_is_old_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "KEPT_SPANS", 3)
    d = executor()
    for number in range(6):
        d.granted(acquire(number))
    d.executor.start()
    d.local_us += executor_module.MARK_US
    until(lambda: len(list(d.store.contents().spans)) == 3)
    d.executor.stop(5)
