"""The lessee: one token for one thing wanted, unexpected grants dropped, and no acquire until told `lost`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zflake.core.layout import PRESETS, Layout, parse
from zflake.core.lease import (
    Acquire,
    Grant,
    Holder,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Token,
)
from zflake.core.lessee import LAPSED_US, MAX_HINT_US, RETRY_US, Event, Lessee, State
from zflake.core.mint import Mint
from zflake.errors import ProtocolError

LAYOUT = PRESETS["snowcloud"]
TTL = 30_000
TTL_US = TTL * 1000
ME = Holder("me", "here", 7)
NO_ANSWERS = [
    Refusal(Refused.TOO_EARLY, "", 500),
    Refusal(Refused.NO_FREE_MACHINE, "", 500),
    Refusal(Refused.UNAVAILABLE, "", 500),
    Refusal(Refused.UNAVAILABLE, ""),
    Refusal(Refused.EXHAUSTED, ""),
]


def token(n: int) -> Token:
    return n.to_bytes(16, "big")


def new(*, jitter: float = 0.5, layout: Layout | None = None) -> Lessee:
    """A lessee that draws the tokens 1, 2, 3."""
    drawn = count(1)
    return Lessee(ME, draw_token=lambda: token(next(drawn)), jitter=lambda: jitter, layout=layout)


def acquiring(*, jitter: float = 0.5, layout: Layout | None = None) -> Lessee:
    """A lessee that has asked for a machine ID at local time 0."""
    lessee = new(jitter=jitter, layout=layout)
    assert lessee.poll(0) == Acquire(token(1), ME)
    return lessee


def grant(
    n: int,
    start: int = 1000,
    end: int = 1000 + TTL,
    *,
    machine: int = 5,
    layout: Layout = LAYOUT,
    ttl: int = TTL,
) -> Grant:
    return Grant(machine, n, start, end, token(n), layout, ttl)


def mint_of(lessee: Lessee) -> Mint:
    assert lessee.mint is not None
    return lessee.mint


def held(*, jitter: float = 0.5) -> Lessee:
    """Machine 5 with the window [1000, 1000 + TTL), granted at local time 0 and tick 1000."""
    lessee = acquiring(jitter=jitter)
    assert lessee.receive(grant(1), 0, 1000)
    assert lessee.state is State.HELD
    return lessee


def renewing() -> Lessee:
    """The same, after it has asked for the next window."""
    lessee = held()
    assert lessee.poll(lessee.send_at_us) == Renew(5, token(1), 1, token(2), 1000 + TTL)
    return lessee


def lapsed() -> Lessee:
    lessee = held()
    lessee.observe(1000 + TTL, 0)
    assert lessee.state is State.LAPSED
    return lessee


LOST = Refusal(Refused.LOST, "moved on")
NEXT = grant(2, 1000 + TTL, 2000 + TTL)
"""The window that a held lessee is granted next."""


# --- the state ---


def test_what_the_table_lacks_is_an_error() -> None:
    lessee = new()
    with pytest.raises(KeyError):
        lessee._move(Event.LAPSE)
    lessee.close()
    for event in Event:
        with pytest.raises(KeyError):
            lessee._move(event)


def test_a_lessee_starts_by_acquiring_at_once() -> None:
    lessee = new()
    assert (lessee.state, lessee.mint, lessee.send_at_us) == (State.ACQUIRING, None, 0)
    assert lessee.poll(0) == Acquire(token(1), ME)


def test_a_lessee_is_held_exactly_while_a_window_holds_now() -> None:
    lessee = held()
    for now, state in (
        (999, State.LAPSED),
        (1000, State.HELD),
        (999 + TTL, State.HELD),
        (1000 + TTL, State.LAPSED),
        (1500, State.HELD),
    ):
        lessee.observe(now, 0)
        assert lessee.state is state


def test_following_the_timeline_moves_nothing_without_a_lease() -> None:
    lessee = new()
    lessee.observe(5, 0)
    assert lessee.state is State.ACQUIRING
    lessee = held()
    lessee.close()
    lessee.observe(1500, 0)
    assert lessee.state is State.RELEASED


# --- one token for one thing wanted ---


@pytest.mark.parametrize(("begin", "granted"), [(new, grant(1)), (held, NEXT)], ids=["acquire", "renewal"])
def test_a_request_keeps_its_token_through_every_retry_until_a_grant(
    begin: Callable[[], Lessee], granted: Grant
) -> None:
    lessee = begin()
    state, request = lessee.state, lessee.poll(lessee.send_at_us)
    for answer in NO_ANSWERS:
        assert not lessee.receive(answer, lessee.send_at_us, 1500)
        assert lessee.poll(lessee.send_at_us) == request
        assert lessee.state is state
    assert lessee.receive(granted, lessee.send_at_us, 1500)


def test_a_token_is_rotated_after_every_grant() -> None:
    lessee = held()
    end = 1000 + TTL
    for n in range(2, 6):
        request = lessee.poll(lessee.send_at_us)
        assert request == Renew(5, token(n - 1), n - 1, token(n), end)
        assert lessee.receive(grant(n, end, end + 500), lessee.send_at_us, 1500)
        end += 500
    assert mint_of(lessee).end == end


def test_a_lessee_that_lapses_keeps_the_token_of_its_renewal() -> None:
    lessee = held()
    first = lessee.poll(lessee.send_at_us)
    lessee.observe(1000 + TTL, 0)
    assert lessee.poll(lessee.send_at_us) == first == Renew(5, token(1), 1, token(2), 1000 + TTL)


def test_nothing_is_due_before_its_time() -> None:
    lessee = new()
    lessee.poll(100)
    assert lessee.send_at_us == 100 + RETRY_US
    assert lessee.poll(100 + RETRY_US - 1) is None
    assert lessee.poll(100 + RETRY_US) is not None


@pytest.mark.parametrize("ttl_ms", [1_000, 3_000, 30_000])
def test_a_short_ttl_is_retried_sooner_so_that_a_lost_reply_does_not_lapse_it(ttl_ms: int) -> None:
    lessee = acquiring()
    lessee.receive(grant(1, 1000, 1000 + ttl_ms, ttl=ttl_ms), 0, 1000)
    local = lessee.send_at_us
    lessee.poll(local)
    retry = lessee.send_at_us - local
    assert retry == min(RETRY_US, ttl_ms * 1000 // 6)
    # Renewing at a third with the largest jitter, two tries are lost and the third still comes in time.
    assert ttl_ms * 1000 * 11 // 30 + 2 * retry < ttl_ms * 1000


# --- renewal times ---


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=50)
def test_it_renews_when_about_a_third_of_the_ttl_has_passed(jitter: float) -> None:
    lessee = new(jitter=jitter)
    lessee.poll(7)
    lessee.receive(grant(1), 7, 1000)
    due = lessee.send_at_us - 7
    assert TTL_US * 0.3 - 1 <= due <= TTL_US * 0.3667 + 1
    assert lessee.poll(7 + due - 1) is None
    assert isinstance(lessee.poll(7 + due), Renew)


def test_jitter_spreads_the_renewals_of_holders_that_started_together() -> None:
    due = [held(jitter=j).send_at_us for j in (0.0, 0.25, 0.5, 0.75)]
    assert due == sorted(set(due))
    assert due[2] == TTL_US // 3


def test_a_third_of_the_ttl_is_counted_in_the_layouts_ticks() -> None:
    sonyflake = PRESETS["sonyflake"]
    lessee = acquiring()
    lessee.receive(grant(1, 1000, 4000, layout=sonyflake, ttl=3000), 0, 1000)  # 3,000 ticks of 10 ms
    assert lessee.send_at_us == 10_000_000


HINTED = [Refused.TOO_EARLY, Refused.UNAVAILABLE, Refused.NO_FREE_MACHINE, Refused.EXHAUSTED]


@pytest.mark.parametrize("reason", HINTED)
@pytest.mark.parametrize("wait_ms", [0, 1, 250, 900])
def test_a_short_hint_to_wait_is_honoured_to_the_millisecond(reason: Refused, wait_ms: int) -> None:
    for lessee in (new(), held()):
        local = lessee.send_at_us
        request = lessee.poll(local)
        lessee.receive(Refusal(reason, "", wait_ms), local + 300, 1500)
        due = local + 300 + wait_ms * 1000
        assert lessee.send_at_us == due
        assert lessee.poll(due - 1) is None
        assert lessee.poll(due) == request


@pytest.mark.parametrize("reason", HINTED)
@pytest.mark.parametrize("wait_ms", [60_000, 3_600_000, 2**62])
@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.99])
def test_no_hint_keeps_a_lessee_out_that_can_not_mint(reason: Refused, wait_ms: int, jitter: float) -> None:
    left_behind = held(jitter=jitter)
    left_behind.observe(1000 + 10 * TTL, 50)
    for lessee in (new(jitter=jitter), left_behind):
        local = lessee.send_at_us
        lessee.poll(local)
        lessee.receive(Refusal(reason, "", wait_ms), local + 300, 1000 + 10 * TTL)
        assert lessee.send_at_us == local + 300 + int(MAX_HINT_US * (0.5 + jitter))


@pytest.mark.parametrize("reason", HINTED)
def test_a_lessee_that_mints_obeys_a_hint_for_half_a_ttl_at_most(reason: Refused) -> None:
    lessee = held(jitter=0.99)
    local = lessee.send_at_us
    lessee.poll(local)
    lessee.receive(Refusal(reason, "", 3_600_000), local + 300, 1500)
    assert TTL_US // 3 < lessee.send_at_us - (local + 300) < TTL_US // 2


def test_whom_the_timeline_leaves_behind_renews_at_once() -> None:
    lessee = held()
    due = lessee.send_at_us
    lessee.observe(1000 + 10 * TTL, 50)
    assert lessee.state is State.LAPSED
    assert lessee.send_at_us <= 50 + LAPSED_US < due


def test_who_lapses_with_a_request_under_way_does_not_hurry_it() -> None:
    lessee = renewing()
    due = lessee.send_at_us
    lessee.observe(1000 + 10 * TTL, 50)
    assert lessee.send_at_us == due


def test_a_refusal_without_a_hint_leaves_the_retry_as_it_was() -> None:
    lessee = acquiring()
    lessee.receive(Refusal(Refused.UNAVAILABLE, ""), 300, 0)
    assert lessee.send_at_us == RETRY_US


# --- what counts as an answer ---


def test_a_grant_with_another_token_is_dropped() -> None:
    lessee = acquiring()
    assert not lessee.receive(grant(9), 0, 1000)
    assert (lessee.state, lessee.mint) == (State.ACQUIRING, None)
    assert lessee.poll(lessee.send_at_us) == Acquire(token(1), ME), "and not released"
    assert lessee.receive(grant(1), 0, 1000)


def test_a_grant_that_was_never_asked_for_is_dropped() -> None:
    lessee = new()
    assert not lessee.receive(grant(1), 0, 1000)
    assert lessee.mint is None


def test_the_answer_to_a_repeat_of_what_was_granted_already_is_dropped() -> None:
    lessee = held()
    due = lessee.send_at_us
    assert not lessee.receive(grant(1), 500, 1000)
    assert lessee.send_at_us == due
    assert mint_of(lessee).end == 1000 + TTL


def test_an_old_grant_is_dropped_while_a_renewal_is_under_way() -> None:
    lessee = renewing()
    assert not lessee.receive(grant(1), lessee.send_at_us, 1000)
    assert lessee.receive(NEXT, lessee.send_at_us, 1500)


def test_a_grant_answers_whichever_repeat_it_is_the_answer_to() -> None:
    lessee = acquiring()
    lessee.poll(RETRY_US)
    assert lessee.receive(grant(1), RETRY_US, 1000)


def test_a_grant_that_comes_after_a_loss_is_dropped() -> None:
    lessee = renewing()
    lessee.receive(LOST, 0, 1500)
    assert lessee.poll(0) == Acquire(token(3), ME)
    assert not lessee.receive(NEXT, 0, 1500)
    assert lessee.mint is None


def test_a_release_that_was_confirmed_moves_nothing() -> None:
    lessee = held()
    assert not lessee.receive(Released(5, 1500), 0, 1500)
    assert lessee.state is State.HELD


# --- lost ---


def test_a_lost_lease_closes_the_old_mint_and_acquires_afresh_at_once() -> None:
    for lessee in (held(), lapsed()):
        old = mint_of(lessee)
        local = lessee.send_at_us
        lessee.poll(local)
        assert lessee.receive(LOST, local, 1500)
        assert (lessee.state, lessee.mint) == (State.ACQUIRING, None)
        assert old.take(1500, 1) is None
        assert old.opens(1000) is None
        assert lessee.poll(local) == Acquire(token(3), ME)
        assert lessee.receive(grant(3, 2000, 2000 + TTL, machine=9), local, 2000)
        assert mint_of(lessee) is not old
        assert mint_of(lessee).machine == 9


def test_lost_says_nothing_to_a_lessee_that_holds_nothing() -> None:
    lessee = acquiring()
    assert not lessee.receive(LOST, 0, 0)
    assert lessee.poll(lessee.send_at_us) == Acquire(token(1), ME)


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=lambda answer: answer.reason)
def test_only_lost_ends_a_tenancy(answer: Refusal) -> None:
    for lessee in (held(), lapsed()):
        old, state = mint_of(lessee), lessee.state
        lessee.poll(lessee.send_at_us)
        assert not lessee.receive(answer, 0, 1500)
        assert (lessee.mint, lessee.state) == (old, state)
        assert isinstance(lessee.poll(lessee.send_at_us), Renew)


# --- a window received after its end ---


def test_a_window_that_comes_after_its_end_is_no_reason_to_acquire() -> None:
    lessee = acquiring()
    assert lessee.receive(grant(1), 0, 1000 + TTL)
    assert lessee.state is State.LAPSED
    assert lessee.poll(lessee.send_at_us) == Renew(5, token(1), 1, token(2), 1000 + TTL)
    assert lessee.receive(grant(2, 1000 + TTL, 9000 + TTL), 0, 20_000 + TTL)
    assert lessee.state is State.LAPSED
    assert lessee.poll(lessee.send_at_us) == Renew(5, token(2), 2, token(3), 9000 + TTL)


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=50)
def test_after_a_late_window_it_backs_off_by_half_a_second_to_one_and_a_half(jitter: float) -> None:
    lessee = acquiring(jitter=jitter)
    lessee.receive(grant(1), 0, 1000 + TTL)
    assert RETRY_US // 2 <= lessee.send_at_us <= RETRY_US * 3 // 2


def test_the_last_tick_of_a_window_is_not_after_its_end() -> None:
    lessee = acquiring()
    lessee.receive(grant(1), 0, 999 + TTL)
    assert lessee.state is State.HELD
    assert lessee.send_at_us == TTL_US // 3


def test_a_window_that_has_not_begun_is_waited_for() -> None:
    lessee = acquiring()
    assert lessee.receive(grant(1), 0, 900)
    states = [lessee.state]
    assert mint_of(lessee).opens(900) == 1000
    lessee.observe(1000, 0)
    states.append(lessee.state)
    assert states == [State.LAPSED, State.HELD]


def test_a_renewal_appends_its_window_to_the_same_mint() -> None:
    lessee = held()
    mint = mint_of(lessee)
    lessee.poll(lessee.send_at_us)
    lessee.receive(NEXT, 0, 1500)
    assert mint_of(lessee) is mint
    assert mint.covers(1000)
    assert mint.covers(1999 + TTL)


# --- grants that no sound delegator gives ---


@pytest.mark.parametrize(
    "bad",
    [
        grant(2, 1500, 2000 + TTL),
        grant(2, 1000 + TTL, 1000 + TTL),
        grant(2, 1000 + TTL, LAYOUT.end_tick + 1),
        grant(2, 1000 + TTL, 2000 + TTL, machine=6),
        grant(2, 1000 + TTL, 2000 + TTL, layout=PRESETS["discord"]),
        grant(2, 1000 + TTL, 2000 + TTL, layout=LAYOUT.with_epoch(0)),
    ],
    ids=["overlapping", "empty", "beyond the layout", "other machine", "other layout", "other epoch"],
)
def test_a_renewal_that_no_sound_delegator_gives_ends_the_tenancy(bad: Grant) -> None:
    lessee = held()
    old = mint_of(lessee)
    lessee.poll(lessee.send_at_us)
    with pytest.raises(ProtocolError):
        lessee.receive(bad, 50, 1500)
    assert (lessee.state, lessee.mint) == (State.ACQUIRING, None)
    assert old.take(1500, 1) is None
    assert lessee.send_at_us == 50 + RETRY_US
    assert lessee.poll(50 + RETRY_US) == Acquire(token(3), ME)


def test_a_machine_that_the_layout_lacks_is_refused() -> None:
    lessee = acquiring()
    with pytest.raises(ProtocolError):
        lessee.receive(grant(1, machine=LAYOUT.machines), 50, 1000)
    assert (lessee.state, lessee.mint) == (State.ACQUIRING, None)


def test_a_layout_that_the_owner_insists_on_is_checked_against_the_grant() -> None:
    for insisted in (PRESETS["twitter"], LAYOUT.with_epoch(1), replace(LAYOUT, tick_ms=2)):
        lessee = acquiring(layout=insisted)
        with pytest.raises(ProtocolError):
            lessee.receive(grant(1), 0, 1000)
        assert (lessee.state, lessee.mint) == (State.ACQUIRING, None)


def test_a_layout_of_another_name_that_reads_ids_alike_is_no_mismatch() -> None:
    lessee = acquiring(layout=parse("time:42,machine:10,sequence:12").with_epoch(LAYOUT.epoch_ms))
    assert lessee.receive(grant(1), 0, 1000)


def test_without_a_layout_of_its_own_a_lessee_takes_the_grants() -> None:
    lessee = acquiring()
    lessee.receive(grant(1, layout=PRESETS["sonyflake"]), 0, 1000)
    assert mint_of(lessee).layout == PRESETS["sonyflake"]


# --- close ---


def test_closing_releases_with_the_last_tick_minted_in() -> None:
    for lessee, take in ((held(), 1234), (held(), None)):
        mint = mint_of(lessee)
        if take is not None:
            mint.take(take, 1)
            mint.take(1000, 1)  # a clock that went back states nothing
        assert lessee.close() == Release(5, token(1), None, take)
        assert lessee.state is State.RELEASED
        assert mint.take(1500, 1) is None


def test_closing_while_a_renewal_is_unsettled_names_its_token() -> None:
    lessee = renewing()
    assert lessee.close() == Release(5, token(1), token(2), None)


def test_closing_after_a_settled_renewal_shows_the_newest_token() -> None:
    lessee = renewing()
    lessee.receive(NEXT, 0, 1500)
    assert lessee.close() == Release(5, token(2), None, None)


def test_closing_while_lapsed_still_releases() -> None:
    lessee = lapsed()
    assert lessee.close() == Release(5, token(1), None, None)


def test_closing_without_a_lease_releases_nothing() -> None:
    fresh = new()
    assert fresh.close() is None
    asked = acquiring()
    assert asked.close() is None
    lost = renewing()
    lost.receive(LOST, 0, 1500)
    assert lost.close() is None
    for lessee in (fresh, asked, lost):
        assert lessee.state is State.RELEASED


def test_closing_twice_releases_once() -> None:
    lessee = held()
    assert lessee.close() is not None
    assert lessee.close() is None


def test_a_closed_lessee_sends_nothing_and_drops_what_comes() -> None:
    for lessee, late in ((acquiring(), grant(1)), (renewing(), NEXT)):
        lessee.close()
        mint = lessee.mint
        assert not lessee.receive(late, 0, 1500)
        assert not lessee.receive(LOST, 0, 1500)
        assert (lessee.state, lessee.mint) == (State.RELEASED, mint)
        assert mint is None or mint.take(1500, 1) is None
        assert lessee.poll(10**12) is None
