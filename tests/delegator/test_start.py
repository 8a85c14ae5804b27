"""A delegator's start: what the store says against what the command line says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import pytest

from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import READER, SCHEMA, Mark, Meta, Record, Swap
from zflake.core.loss import MARGIN_MS, REST_MS
from zflake.delegator.clock import LISTEN_S, LISTEN_STEPS, begin_timeline, listen
from zflake.delegator.moves import rewind
from zflake.delegator.start import DEFAULT_TTL_MS, Wishes, settle_meta
from zflake.errors import ConfigError, StoreError
from zflake.stores.memory import MemoryStore

LAYOUT: Final = PRESETS["snowcloud"]
NOW: Final = 200_000_000_000
NOW_US: Final = (LAYOUT.epoch_ms + NOW) * 1000 + 999


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def settle(store: MemoryStore, now_us: int = NOW_US, **wishes: object) -> Meta:
    return settle_meta(store, Wishes(**wishes), now_us)  # type: ignore[arg-type]


# --- others that run ---


class Shared(MemoryStore):
    """A store that others may use; `looks` says what each look at its marks finds, by delegator."""

    exclusive = False

    def __init__(self, looks: Iterable[dict[str, int]]) -> None:
        super().__init__()
        self.looks = iter(looks)
        self.found: dict[str, int] = {}

    def marks(self) -> list[Mark]:
        self.found = next(self.looks, self.found)
        return [Mark(name, at_us) for name, at_us in self.found.items()]


def listened(looks: Iterable[dict[str, int]]) -> tuple[int | None, float]:
    """What listening finds, and for how many seconds it sleeps."""
    slept: list[float] = []
    return listen(Shared(looks), "me", slept.append), sum(slept)


def test_a_store_of_its_own_is_not_listened_to() -> None:
    store = Shared([{"other": at} for at in range(9)])
    store.exclusive = True
    assert listen(store, "me", lambda _: pytest.fail("it slept")) is None


def test_listening_joins_a_delegator_whose_mark_keeps_moving() -> None:
    found, slept_s = listened([{"other": 1_000}] * 3 + [{"other": 2_000}] * 5 + [{"other": 3_000}])
    assert found == 3_000
    assert slept_s < LISTEN_S


def test_the_late_write_of_a_delegator_that_has_died_is_no_running_timeline() -> None:
    # The reader was held up between two looks: the mark is as old as that, and nobody is behind it.
    found, slept_s = listened([{"dead": 1_000}, {"dead": 2_000}])
    assert found is None
    assert LISTEN_S <= slept_s <= 2 * LISTEN_S


def test_a_delegator_on_a_store_that_is_slow_is_waited_for() -> None:
    gap = LISTEN_STEPS - 1
    looks = [{"other": 1}] * gap + [{"other": 2}] * gap + [{"other": 3}]
    assert listened(looks)[0] == 3


# --- a fresh store ---


def test_a_new_cluster_grants_at_once_with_the_defaults(store: MemoryStore) -> None:
    meta = settle(store, new=True)
    assert meta == store.meta()
    assert meta == replace(
        meta, layout=LAYOUT, ttl=DEFAULT_TTL_MS, first_machine=0, last_machine=1023, floor=0
    )


def test_two_new_stores_have_two_ids() -> None:
    assert settle(MemoryStore(), new=True).store_id != settle(MemoryStore(), new=True).store_id


@pytest.mark.parametrize("ttl_ms", [1_000, 30_000, 60_000, 61_000, 3_600_000])
def test_a_fresh_store_that_nobody_called_new_rests_for_longer_than_any_lost_window(
    store: MemoryStore, ttl_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    meta = settle(store, ttl_ms=ttl_ms)
    rest = max(REST_MS, ttl_ms) + MARGIN_MS
    assert NOW + rest < meta.floor <= NOW + rest + 1
    assert "--new" in caplog.text


def test_the_rest_is_whole_ticks_rounded_up(store: MemoryStore) -> None:
    layout = PRESETS["sonyflake"]
    now_us = (layout.epoch_ms + 10**10) * 1000 + 9_999
    meta = settle(store, now_us, layout=layout)
    assert meta.floor * 10 >= 10**10 + 9 + REST_MS + MARGIN_MS


def test_a_restart_does_not_end_the_rest(store: MemoryStore) -> None:
    floor = settle(store).floor
    assert settle(store, NOW_US + 1_000_000).floor == floor
    assert settle(store, new=True).floor == floor


def test_new_on_an_initialised_store_does_nothing_and_says_so(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    meta = settle(store)
    assert settle(store, new=True) == meta == store.meta()
    assert "--new does nothing" in caplog.text


@pytest.mark.parametrize(
    "now_us", [0, LAYOUT.epoch_ms * 1000 - 1, (LAYOUT.epoch_ms + LAYOUT.end_tick) * 1000]
)
def test_a_time_outside_the_layout_is_refused(store: MemoryStore, now_us: int) -> None:
    with pytest.raises(ConfigError, match="set the clock"):
        settle(store, now_us, new=True)
    assert store.meta() is None


def test_an_epoch_of_ones_own_is_kept(store: MemoryStore) -> None:
    assert settle(store, new=True, epoch_ms=5).layout == LAYOUT.with_epoch(5)


# --- ttl and machines ---


def refused(store: MemoryStore, match: str, *, layout: Layout = LAYOUT, **wishes: object) -> None:
    """A new store and one with a meta refuse such wishes, and stay what they were."""
    with pytest.raises(ConfigError, match=match):
        settle(store, NOW_US, layout=layout, **wishes)
    assert store.meta() is None
    meta = settle(store, layout=layout, new=True)
    with pytest.raises(ConfigError, match=match):
        settle(store, NOW_US, layout=layout, **wishes)
    assert store.meta() == meta


@pytest.mark.parametrize(
    ("layout", "ttl_ms"),
    [("snowcloud", 999), ("snowcloud", 0), ("snowcloud", -1000), ("sonyflake", 1005), ("sonyflake", 990)],
)
def test_a_ttl_is_a_second_at_least_and_whole_ticks(store: MemoryStore, layout: str, ttl_ms: int) -> None:
    refused(store, "ttl", layout=PRESETS[layout], ttl_ms=ttl_ms)


def test_a_ttl_is_kept_in_ticks(store: MemoryStore) -> None:
    assert settle(store, layout=PRESETS["sonyflake"], ttl_ms=1010, new=True).ttl == 101


@pytest.mark.parametrize("machines", [(-1, 5), (5, 4), (0, 1024), (1024, 1024)])
def test_machines_must_fit_the_layout(store: MemoryStore, machines: tuple[int, int]) -> None:
    refused(store, "machines", machines=machines)


def test_ttl_and_machines_may_be_changed_later_and_count_as_a_version(store: MemoryStore) -> None:
    first = settle(store, new=True)
    second = settle(store, ttl_ms=5_000, machines=(10, 1023))
    assert second == replace(first, ttl=5_000, first_machine=10, version=first.version + 1) == store.meta()


def test_what_is_not_wished_stays_and_writes_nothing(store: MemoryStore) -> None:
    first = settle(store, ttl_ms=5_000, machines=(10, 20), new=True)
    assert settle(store) == first
    assert settle(store, ttl_ms=5_000, machines=(10, 20)) == first


def test_a_race_for_the_settings_is_lost_with_a_word(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(store, new=True)
    monkeypatch.setattr(store, "swap_meta", lambda *_: False)
    with pytest.raises(StoreError, match="start again"):
        settle(store, ttl_ms=5_000)


def test_who_loses_that_race_takes_what_it_came_to(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settle(store, new=True)
    swap_meta = store.swap_meta

    def slower(old: Meta, new: Meta) -> bool:
        monkeypatch.undo()
        assert swap_meta(first, replace(first, version=first.version + 1, ttl=5_000))
        return swap_meta(old, new)

    monkeypatch.setattr(store, "swap_meta", slower)
    meta = settle(store, ttl_ms=5_000, machines=(10, 20))
    assert (meta.ttl, meta.first_machine, meta.last_machine) == (5_000, 10, 20)
    assert meta.version == first.version + 2
    assert meta == store.meta()


def test_a_later_schema_stays(store: MemoryStore) -> None:
    first = settle(store, new=True)
    assert (first.schema, first.reader) == (SCHEMA, READER)
    later = replace(first, schema=SCHEMA + 3, version=first.version + 1)
    assert store.swap_meta(first, later)
    assert settle(store) == later


# --- the layout stays ---


def test_without_a_wish_the_stores_layout_holds(store: MemoryStore) -> None:
    settle(store, layout=PRESETS["twitter"], new=True)
    assert settle(store).layout == PRESETS["twitter"]
    assert settle(store, layout=PRESETS["twitter"]).layout == PRESETS["twitter"]


@pytest.mark.parametrize(
    "wishes",
    [
        {"layout": PRESETS["twitter"]},
        {"layout": PRESETS["wide"]},
        {"epoch_ms": LAYOUT.epoch_ms + 1},
        {"layout": LAYOUT, "epoch_ms": 0},
        {"layout": replace(LAYOUT, tick_ms=10)},
    ],
)
def test_another_layout_is_refused_for_good(store: MemoryStore, wishes: dict[str, Any]) -> None:
    meta = settle(store, new=True)
    with pytest.raises(ConfigError, match="keeps its layout for good"):
        settle(store, **wishes)
    assert store.meta() == meta


def test_the_same_layout_and_epoch_may_be_stated_again(store: MemoryStore) -> None:
    meta = settle(store, epoch_ms=1000, layout=PRESETS["clawflake"], new=True)
    assert settle(store, epoch_ms=1000, layout=PRESETS["clawflake"]) == meta
    assert settle(store, epoch_ms=1000) == meta
    with pytest.raises(ConfigError):
        settle(store, layout=PRESETS["clawflake"])  # whose own epoch is another


# --- the timeline ---


def started(store: MemoryStore, *, accept_clock: bool = False) -> int:
    timeline = begin_timeline(
        store, "me", accept_clock=accept_clock, wall_us=lambda: NOW_US, local_us=lambda: 77
    )
    return timeline.at(77)


def test_the_timeline_of_a_first_start_is_the_wall_clocks(store: MemoryStore) -> None:
    assert started(store) == NOW_US


@pytest.mark.parametrize(("mark_us", "begins"), [(NOW_US - 5_000_000, NOW_US), (NOW_US + 5, NOW_US + 5)])
def test_the_timeline_never_begins_behind_a_mark(store: MemoryStore, mark_us: int, begins: int) -> None:
    settle(store, new=True)
    store.swap([], Mark("here", mark_us))
    assert started(store) == begins


def test_a_clock_that_is_accepted_sets_every_mark(store: MemoryStore) -> None:
    settle(store, new=True)
    store.swap([], Mark("here", NOW_US * 2))
    with pytest.raises(ConfigError, match="--accept-clock"):
        started(store)
    assert started(store, accept_clock=True) == NOW_US
    rewind(store, settle(store), NOW_US)
    assert store.marks() == [Mark("here", NOW_US)]
    assert started(store) == NOW_US


# --- a store that is not what it was ---


class Restored(MemoryStore):
    """A store that says which life it is in."""

    life = "first"

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        return self.life


@pytest.fixture
def restored() -> Restored:
    """One that was used, and is in another life now."""
    store = Restored()
    settle(store, new=True)
    store.life = "second"
    return store


REST: Final = 70_000


def test_a_store_of_another_incarnation_rests_and_says_so_once(
    restored: Restored, caplog: pytest.LogCaptureFixture
) -> None:
    before = restored.meta()
    assert before is not None
    meta = settle(restored)
    assert meta == replace(before, version=meta.version, incarnation="second", floor=NOW + 1 + REST)
    assert meta == restored.meta()
    assert meta.version not in (before.version, before.version + 1)
    assert "not what it was" in caplog.text
    caplog.clear()
    assert settle(restored) == meta
    assert not caplog.text


def test_new_does_not_make_a_lost_store_whole(restored: Restored, caplog: pytest.LogCaptureFixture) -> None:
    assert settle(restored, new=True).floor == NOW + 1 + REST
    assert "--new does nothing" in caplog.text


@pytest.mark.parametrize(("ttl_ms", "rest"), [(90_000, 100_000), (5_000, 70_000)])
def test_the_rest_covers_the_ttl_of_before_and_that_of_now(
    restored: Restored, ttl_ms: int, rest: int
) -> None:
    assert settle(restored, ttl_ms=ttl_ms).floor == NOW + 1 + rest


def test_the_rest_begins_at_the_last_mark_that_survived_but_not_in_a_far_future(restored: Restored) -> None:
    restored.swap([], Mark("there", NOW_US + 500_000_000))
    assert settle(restored).floor == NOW + 500_000 + 1 + REST
    restored.life = "third"
    restored.swap([], Mark("there", NOW_US * 2))
    assert settle(restored).floor == NOW + 3_600_000 + 1 + REST


def test_a_floor_is_never_lowered(restored: Restored) -> None:
    high = settle(restored, NOW_US + 900_000_000).floor
    restored.life = "third"
    assert settle(restored, NOW_US).floor == high


def test_new_does_not_count_where_a_store_was_before(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    store.had_data = True
    assert settle(store, new=True).floor == NOW + 1 + REST
    assert "--new does nothing" in caplog.text


# --- back from a time that was wrong ---


def held(machine: int, fence: int) -> Record:
    return Record(machine, fence, gen=1, token=b"%016d" % machine, start=fence - 9, tenancy_start=fence - 9)


def test_a_rewind_ends_what_lies_far_ahead_and_keeps_every_fence(store: MemoryStore) -> None:
    meta = settle(store, new=True)
    far, near = held(1, NOW * 2), held(2, NOW + meta.ttl)
    store.swap(
        [Swap(Record(far.machine), far, meta.version), Swap(Record(near.machine), near, meta.version)],
        Mark("here", NOW_US * 2),
    )
    assert rewind(store, meta, NOW_US) == 1
    assert store.by_machine(1) == replace(far, gen=2, token=None)
    assert store.by_machine(2) == near
    assert store.marks() == [Mark("here", NOW_US)]
    assert rewind(store, meta, NOW_US) == 0


def test_a_rewind_that_somebody_writes_into_is_said_again(store: MemoryStore) -> None:
    meta = settle(store, new=True)
    store.swap([Swap(Record(1), held(1, NOW * 2), meta.version)])
    with pytest.raises(StoreError, match="stop all delegators"):
        rewind(store, replace(meta, version=meta.version + 1), NOW_US)
