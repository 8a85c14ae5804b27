"""A store that forgets: how that shows, and how long nothing is granted then."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from zflake.core import loss
from zflake.core.layout import PRESETS
from zflake.core.lease import Holder, Meta, Record, Renew

META: Final = Meta("store", PRESETS["snowcloud"], ttl=30_000, first_machine=0, last_machine=1023)
A, B, D = (bytes([n]) * 16 for n in range(3))
REST: Final = 70_000  # 60 s and 10 s, in ticks of the layout


def as_of(gen: int, end: int | None = 5000, shown: bytes = B) -> Renew:
    return Renew(2, shown, gen, D, end, META.store_id)


KNOWN: Final = Record(2, fence=4000, gen=3, token=A, start=3000, tenancy_start=100)


def witnessed(
    request: Renew, meta: Meta = META, *, now: int = 1000, latest: int | None = None, record: Record = KNOWN
) -> int | None:
    """The floor that a renewal demands; None if it is no witness."""
    new = loss.witnessed(meta, now, now if latest is None else latest, request, record=record)
    assert new is None or new == replace(meta, floor=new.floor), "the floor changes, and nothing else"
    return None if new is None else new.floor


@pytest.mark.parametrize(
    "request_",
    [as_of(4), as_of(9), as_of(4, shown=A), as_of(3), as_of(3, shown=A)],
    ids=[
        "above",
        "far above",
        "above with the record's token",
        "the same, another token",
        "the same, another end",
    ],
)
def test_a_grant_that_is_neither_the_records_nor_an_earlier_one_is_a_witness(request_: Renew) -> None:
    assert witnessed(request_) == 5000 + 1 + REST
    assert witnessed(request_, replace(META, floor=5000 + 1 + REST)) is None, "it is known now"


@pytest.mark.parametrize(
    "request_",
    [
        as_of(2),
        as_of(1),
        as_of(3, KNOWN.fence, A),
        as_of(4, end=None),
        Renew(2, B, 9, A, 5000, META.store_id),
    ],
    ids=["older", "much older", "the holder of the record", "without an end", "a repeat"],
)
def test_what_an_honest_store_can_meet_is_no_witness(request_: Renew) -> None:
    assert witnessed(request_) is None


def test_of_a_machine_that_another_key_leased_nobody_is_a_witness() -> None:
    bound = replace(KNOWN, holder=Holder(key="key"))
    assert witnessed(replace(as_of(4), key="key"), record=bound) is not None
    assert witnessed(replace(as_of(4), key="another"), record=bound) is None
    assert witnessed(replace(as_of(4), key="another"), record=Record(2)) is not None, (
        "the store knows of no holder"
    )


def test_a_release_that_the_store_has_forgotten_of_shows_as_well() -> None:
    gone = replace(KNOWN, token=None)
    assert witnessed(as_of(3), record=gone) is not None
    assert witnessed(as_of(2), record=gone) is None


def test_the_floor_lies_above_every_clock_and_every_end_by_a_rest_and_a_margin() -> None:
    for now, latest, end in [(1000, 1000, 900), (1000, 8000, 900), (1000, 1000, 7000)]:
        assert witnessed(as_of(9, end), now=now, latest=latest) == max(latest, end) + 1 + REST
    assert witnessed(as_of(9, 900), replace(META, ttl=90_000)) == 1000 + 1 + 90_000 + 10_000


def test_while_it_rests_a_further_witness_lifts_the_floor_to_its_end_and_the_margin_only() -> None:
    resting = replace(META, floor=71_001)
    assert witnessed(as_of(9, 71_001), resting, now=2000) is None
    assert witnessed(as_of(9, 80_000), resting, now=2000, latest=20_000) == 90_000


def test_a_witness_of_a_loss_that_is_over_is_none_and_one_of_a_later_grant_is() -> None:
    rested = replace(META, floor=71_001)
    assert witnessed(as_of(9, 71_001), rested, now=80_000) is None
    assert witnessed(as_of(9, 71_002), rested, now=80_000) == 80_000 + 1 + REST


def test_nobody_makes_a_store_rest_for_longer_than_two_ttls_and_a_bit() -> None:
    end = META.layout.end_tick - 1
    assert witnessed(as_of(9, end)) == 1000 + 2 * META.ttl + 1 + REST
    resting = replace(META, floor=REST)
    assert witnessed(as_of(9, end), resting) == 1000 + 2 * META.ttl + 10_000
    assert witnessed(as_of(9, end), replace(resting, floor=1000 + 2 * META.ttl + 10_000)) is None
    assert witnessed(as_of(9, end), now=end - 5) == META.layout.end_tick


@pytest.mark.parametrize(
    ("old", "new", "rest"), [(1000, 1000, 60_000), (90_000, 1000, 90_000), (1000, 90_000, 90_000)]
)
def test_after_a_loss_the_longer_ttl_counts(old: int, new: int, rest: int) -> None:
    def floor(meta: Meta, floor: int = 0) -> int:
        return loss.after_loss(meta, "life 2", 500, ttl=new, floor=floor, version=7).floor

    low = replace(META, ttl=old)
    assert floor(low) == 500 + 1 + rest + 10_000
    assert floor(replace(low, floor=10**7)) == 10**7
    assert floor(low, 10**7) == 10**7


def test_after_a_loss_meta_names_the_new_incarnation_and_nothing_else_changes() -> None:
    new = loss.after_loss(META, "life 2", 500, ttl=META.ttl, floor=0, version=7)
    assert new == replace(META, incarnation="life 2", version=7, floor=500 + 1 + REST)


@pytest.mark.parametrize(
    ("found", "incarnation", "lost"),
    [
        (META, "", False),
        (replace(META, version=9, floor=10), "", False),
        (replace(META, floor=11), "", False),
        (META, "life 2", True),
        (replace(META, incarnation="life 1"), "", True),
        (replace(META, version=3, floor=10), "", True),
        (replace(META, version=9, floor=9), "", True),
    ],
    ids=[
        "as it was",
        "changed",
        "with a higher floor",
        "of another life",
        "a meta of another life",
        "a meta that was left behind",
        "a lower floor",
    ],
)
def test_a_loss_shows_by_the_life_the_version_and_the_floor(
    found: Meta, incarnation: str, lost: bool
) -> None:
    known = replace(META, version=8, floor=0 if found.floor == 0 else 10)
    assert loss.is_lost(known, {3, 4}, found, incarnation) is lost


def test_only_a_store_that_is_known_to_be_new_begins_without_a_floor() -> None:
    assert loss.first_floor(META.layout, 500, META.ttl, new=True) == 0
    assert loss.first_floor(META.layout, 500, META.ttl, new=False) == 500 + 1 + REST


@pytest.mark.parametrize(
    "request_",
    [Renew(2, B, 9, D, 5000, "another"), Renew(2, B, 9, D, 5000), Renew(1024, B, 9, D, 5000, META.store_id)],
    ids=["of another store", "of none", "of no machine"],
)
def test_who_was_granted_nothing_here_bears_no_witness(request_: Renew) -> None:
    assert witnessed(request_, record=Record(request_.machine)) is None
