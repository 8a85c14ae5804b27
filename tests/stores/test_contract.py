"""What every store promises, on every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.places import PLACES
from tests.servers import Servers
from tests.stores.made import META, leased, made, token, write
from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import SCHEMA, Holder, Mark, Record, Span, Swap, Traced
from zflake.delegator.moves import meta_of
from zflake.errors import StoreError
from zflake.stores import Store, keyed, open_store, rows
from zflake.stores.contract import Contents, outdated
from zflake.stores.memory import MemoryStore

ENGINES: Final = ("memory", *PLACES)

HOLDER: Final = Holder("worker-1", "host-1", 4711, "tcp://10.0.0.1:7411")
FURTHEST: Final = (1 << 62) - 1  # the last tick of the longest time field


def new_url(engine: str, folder: Path, servers: Servers) -> str:
    """The URL of an empty store."""
    return "memory:" if engine == "memory" else PLACES[engine](folder, servers).url


class Opened(NamedTuple):
    """An empty store."""

    url: str
    store: Store

    def beside(self) -> Store:
        """Another connection to it; the same one if the engine allows no other."""
        if isinstance(self.store, MemoryStore):
            other = MemoryStore()
            other._things, other._order = self.store._things, self.store._order
            return other
        return self.store if self.store.exclusive else open_store(self.url)


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Iterator[Opened]:
    url = new_url(request.param, tmp_path, servers)
    with closing(open_store(url)) as store:
        yield Opened(url, store)


@pytest.fixture
def empty(opened: Opened) -> Store:
    return opened.store


@pytest.fixture
def beside(opened: Opened) -> Iterator[Store]:
    """Another connection to the same store."""
    with closing(opened.beside()) as other:
        yield other


@pytest.fixture
def store(empty: Store) -> Store:
    return made(empty)


def is_as_made(store: Store) -> bool:
    """Whether meta is still the one that `made` wrote."""
    return store.meta() == replace(META, incarnation=store.incarnation())


# --- meta ---


def test_a_store_that_was_never_initialised_has_no_meta_and_takes_no_write(empty: Store) -> None:
    assert empty.meta() is None
    assert not empty.swap_meta(META, replace(META, version=2))
    assert write(empty, leased(1, 9)) == [False]
    assert empty.by_machine(1) == Record(1)


@pytest.mark.parametrize("layout", PRESETS.values(), ids=PRESETS)
def test_meta_reads_back_whole(empty: Store, layout: Layout) -> None:
    meta = replace(META, layout=layout, ttl=7, first_machine=3, last_machine=5, floor=FURTHEST, version=4)
    empty.initialise(meta)
    assert empty.meta() == meta


def test_initialising_twice_is_refused_and_the_first_stands(store: Store) -> None:
    contents = Contents([leased(1)], [Span(1, 0, 10, HOLDER)])
    with pytest.raises(StoreError, match="initialised already"):
        store.initialise(replace(META, store_id="store-2", ttl=1), contents)
    assert is_as_made(store)
    assert store.contents() == Contents([], [], 0, [])


def test_meta_is_swapped_only_in_place_of_the_one_that_was_meant(store: Store) -> None:
    first = meta_of(store)
    second = replace(
        META, version=7, layout=PRESETS["wide"], ttl=60_000, first_machine=3, last_machine=9, floor=5
    )
    assert not store.swap_meta(replace(first, version=2), second)
    assert not store.swap_meta(second, second)
    assert store.meta() == first
    assert store.swap_meta(first, second)
    assert store.meta() == second
    assert not store.swap_meta(first, replace(second, floor=6))  # the same step again
    assert store.meta() == second


def test_meta_of_another_store_is_not_swapped_in(store: Store) -> None:
    assert not store.swap_meta(replace(META, store_id="store-2"), replace(META, version=2))
    assert is_as_made(store)


# --- records ---


def test_a_machine_that_was_never_used_reads_as_zeros(store: Store) -> None:
    assert store.by_machine(1023) == Record(1023, 0, 0, None, 0, 0, Holder("", "", 0, ""))
    assert store.by_token(token(1)) is None


def test_a_record_reads_back_whole_by_machine_and_by_token(store: Store) -> None:
    holder = Holder("wörker ☃ 'one'", "host\0name", 4_194_304, "tcp://10.0.0.1:7411")
    record = Record(FURTHEST, FURTHEST, 1, bytes(range(240, 256)), FURTHEST - 1, FURTHEST - 2, holder)
    assert write(store, record) == [True]
    assert store.by_machine(record.machine) == record
    assert store.by_token(bytes(range(240, 256))) == record
    second = replace(record, gen=2, token=None, fence=7, start=6, tenancy_start=5, holder=Holder("b"))
    assert write(store, second) == [True]
    assert store.by_machine(record.machine) == second


@pytest.mark.parametrize("gen", [0, 1, 2, 4, 5])
def test_a_swap_from_another_generation_loses_and_writes_nothing(store: Store, gen: int) -> None:
    now = Record(1, fence=20, gen=2, token=token(2))
    assert write(store, leased(1), now) == [True, True]
    assert write(store, Record(1, fence=99, gen=gen, token=token(9))) == [False]
    assert store.by_machine(1) == now
    assert store.by_token(token(9)) is None
    assert store.by_token(token(2)) == now


@pytest.mark.parametrize("gen", [-1, 0, 2])
def test_a_machine_that_was_never_used_begins_with_generation_one(store: Store, gen: int) -> None:
    assert write(store, Record(1, fence=10, gen=gen, token=token(1))) == [False]
    assert store.by_machine(1) == Record(1)
    assert store.by_token(token(1)) is None


@pytest.mark.parametrize("version", [1, 3])
def test_a_swap_under_another_version_of_meta_loses_and_writes_nothing(store: Store, version: int) -> None:
    first = leased(1)
    assert write(store, first) == [True]
    assert store.swap_meta(META, replace(META, version=2, floor=1000, incarnation=store.incarnation()))
    for record in (Record(1, fence=20, gen=2, token=token(2)), leased(2, 20)):
        assert write(store, record, version=version) == [False]
        assert store.by_machine(1) == first
        assert store.by_machine(2) == Record(2)
        assert write(store, record, version=2) == [True]
        assert write(store, replace(record, gen=record.gen + 1, token=None), version=2) == [True]
        first = store.by_machine(1)


def test_of_two_writers_from_one_generation_one_wins(store: Store) -> None:
    a, b = (Record(1, fence=10 + n, gen=1, token=token(n)) for n in (1, 2))
    assert write(store, a, b) == [True, False]
    assert write(store, b) == [False]
    assert store.by_machine(1) == a


def test_the_swaps_of_one_commit_stand_or_fall_each_for_itself_and_in_order(store: Store) -> None:
    assert store.swap([]) == []
    first = leased(1, 5)
    assert write(store, first) == [True]
    swaps = [
        Swap(Record(2), second := leased(2, 6), 1),
        Swap(Record(1), Record(1, fence=7, gen=1, token=token(3)), 1),  # stale
        Swap(Record(3), Record(3, fence=8, gen=1, token=token(4)), 7),  # under another meta
        Swap(second, Record(2, fence=9, gen=2, token=token(5)), 1),  # follows upon the first
        Swap(first, Record(1, fence=10, gen=2, token=token(6)), 1),
    ]
    assert store.swap(swaps) == [True, False, False, True, True]
    records = [store.by_machine(machine) for machine in (1, 2, 3)]
    assert records == [swaps[4].new, swaps[3].new, Record(3)]
    assert [store.by_token(token(n)) for n in range(1, 7)] == [None, None, None, None, records[1], records[0]]


# --- tokens ---


def test_a_rotated_token_finds_nothing_and_the_new_one_the_record(store: Store) -> None:
    write(store, leased(1))
    renewed = Record(1, fence=20, gen=2, token=token(2))
    assert write(store, renewed) == [True]
    assert store.by_token(token(1)) is None
    assert store.by_token(token(2)) == renewed


def test_a_released_record_is_found_by_no_token(store: Store) -> None:
    write(store, leased(1), leased(2))
    assert write(store, Record(1, fence=4, gen=2), Record(2, fence=4, gen=2)) == [True, True]
    assert store.by_token(token(1)) is None
    assert store.by_machine(1) == Record(1, fence=4, gen=2)
    assert store.by_machine(2) == Record(2, fence=4, gen=2)


def test_a_token_stands_on_one_machine_and_a_second_one_loses(store: Store) -> None:
    mine, other = leased(1), leased(2)
    assert write(store, mine, other) == [True, True]
    thief, renewal = replace(mine, machine=3), replace(other, gen=2, token=token(1))
    bystander = leased(4)
    assert write(store, thief, renewal, bystander) == [False, False, True]
    assert store.by_token(token(1)) == mine
    assert store.by_token(token(2)) == store.by_machine(2) == other
    assert store.by_machine(3) == Record(3)
    assert store.by_machine(4) == bystander


def test_one_acquire_that_came_twice_in_one_commit_gets_one_machine(store: Store) -> None:
    once, again = (Record(machine, fence=10, gen=1, token=token(1)) for machine in (5, 6))
    assert write(store, once, again) == [True, False]
    assert store.by_token(token(1)) == once
    assert store.by_machine(6) == Record(6)


def test_a_token_is_granted_once_and_after_it_was_given_up_again(store: Store) -> None:
    first = leased(1)
    write(store, first)
    assert write(store, Record(1, fence=20, gen=2, token=token(1))) == [False]
    assert store.by_token(token(1)) == store.by_machine(1) == first
    moved = Record(2, fence=10, gen=1, token=token(1))
    assert write(store, Record(1, fence=20, gen=2), moved) == [True, True]
    assert store.by_token(token(1)) == moved


# --- who is held, which are lowest ---


def test_held_are_those_with_a_token_whose_window_has_not_ended(store: Store) -> None:
    windows = ((3, 10), (7, 11), (2, 99), (4, 99))
    ended, last_tick, long, released = (leased(m, f) for m, f in windows)
    write(store, long, ended, released, last_tick)
    write(store, replace(released, gen=2, token=None))
    assert list(store.held(10)) == [long, last_tick]
    assert list(store.held(0)) == [long, ended, last_tick]
    assert list(store.held(99)) == []


def test_lowest_are_the_never_used_and_then_by_fence_and_machine(store: Store) -> None:
    fences = {1: 30, 3: 10, 4: 20, 5: 10}
    used = {m: leased(m, fence) for m, fence in fences.items()}
    write(store, *used.values())
    order = [Record(0), Record(2), Record(6), used[3], used[5], used[4], used[1]]
    assert list(store.lowest(0, 6, 100)) == order
    for limit in range(8):
        assert list(store.lowest(0, 6, limit)) == order[:limit]


def test_a_released_machine_goes_by_its_fence_even_where_that_is_zero(store: Store) -> None:
    write(store, Record(0, fence=9, gen=1, token=token(1)))
    write(store, Record(0, fence=0, gen=2))
    assert [r.machine for r in store.lowest(0, 2, 3)] in ([0, 1, 2], [1, 2, 0])
    assert store.lowest(0, 0, 1) == [Record(0, fence=0, gen=2)]


def test_lowest_stays_within_its_range_and_ranges_do_not_disturb_each_other(store: Store) -> None:
    def machines(first: int, last: int, limit: int = 100) -> list[int]:
        return [record.machine for record in store.lowest(first, last, limit)]

    write(store, *(leased(m, 100 - m) for m in range(6)))
    assert machines(0, 3) == [3, 2, 1, 0]
    assert machines(0, 3, limit=0) == []
    assert machines(0, 7) == [6, 7, 5, 4, 3, 2, 1, 0]
    assert machines(0, 7, limit=0) == []
    assert machines(0, 3) == [3, 2, 1, 0]
    assert machines(0, 9, limit=3) == [6, 7, 8]
    assert machines(2, 4) == [4, 3, 2]
    assert machines(8, 8) == [8]
    assert machines(8, 7) == []
    assert machines(8, 1) == []
    assert machines(8, 9) == [8, 9]
    write(store, leased(7, 1), leased(6, 2))
    assert machines(0, 7) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert machines(0, 9, limit=3) == [8, 9, 7]


def test_lowest_follows_every_swap_until_all_are_used(store: Store) -> None:
    fences = [0] * 24
    for step in range(100):
        machine = step * 7 % 24
        old = store.by_machine(machine)
        fences[machine] = 1 + step * 37 % 101
        assert write(store, Record(machine, fences[machine], old.gen + 1, token(step))) == [True]
        order = sorted(range(24), key=lambda m: (fences[m], m))
        assert [record.machine for record in store.lowest(0, 23, 10)] == order[:10]


def test_closing_twice_does_nothing(store: Store) -> None:
    store.close()
    store.close()


# --- provenance ---


def granted(machine: int, gen: int, start: int, end: int, since: int | None = None) -> Record:
    """A record whose newest window is `[start, end)`, in a row that began at `since`."""
    first = start if since is None else since
    return Record(machine, end, gen, token(machine * 1000 + gen), start, first, HOLDER, first)


def spans(store: Store) -> list[tuple[int, int, int]]:
    return [(span.machine, span.start, span.end) for span in store.contents().spans]


def test_windows_in_a_row_are_one_span_and_a_gap_begins_another(store: Store) -> None:
    write(store, granted(1, 1, 100, 200))
    write(store, granted(1, 2, 200, 300, since=100))
    write(store, granted(1, 3, 500, 600))
    assert spans(store) == [(1, 100, 300), (1, 500, 600)]
    assert store.trace(1, 299) == Traced(Span(1, 100, 300, HOLDER), 0)
    assert store.trace(1, 500).span == Span(1, 500, 600, HOLDER)


@pytest.mark.parametrize(("machine", "tick"), [(1, 99), (1, 300), (1, 499), (1, 600), (2, 150), (0, 150)])
def test_a_tick_that_nobody_was_granted_is_in_no_span(store: Store, machine: int, tick: int) -> None:
    write(store, granted(1, 1, 100, 300))
    write(store, granted(1, 2, 500, 600))
    assert store.trace(machine, tick) == Traced(None, 0)


def test_a_swap_that_loses_leaves_no_span(store: Store) -> None:
    write(store, granted(1, 1, 100, 200))
    assert write(store, granted(1, 1, 150, 900), granted(1, 3, 200, 900)) == [False, False]
    assert write(store, granted(2, 1, 0, 900), version=7) == [False]
    assert spans(store) == [(1, 100, 200)]


@pytest.mark.parametrize(
    ("fence", "left"),
    [
        (600, [(1, 100, 300), (1, 500, 600)]),
        (501, [(1, 100, 300), (1, 500, 501)]),
        (500, [(1, 100, 300)]),
        (250, [(1, 100, 250)]),
        (100, []),
    ],
)
def test_a_release_cuts_every_span_of_its_machine_at_the_fence(
    store: Store, fence: int, left: list[tuple[int, int, int]]
) -> None:
    write(store, granted(1, 1, 100, 300), granted(2, 1, 100, 900))
    write(store, granted(1, 2, 500, 600))
    write(store, replace(granted(1, 3, 500, 600), fence=fence, token=None))
    assert spans(store) == [*left, (2, 100, 900)]


@pytest.mark.parametrize(
    ("cut", "left"),
    [(550, [(1, 100, 300), (1, 500, 550)]), (500, [(1, 100, 300)]), (250, [(1, 100, 250)]), (100, [])],
)
def test_a_release_cuts_every_span_of_its_machine_where_it_says(
    store: Store, cut: int, left: list[tuple[int, int, int]]
) -> None:
    write(store, granted(1, 1, 100, 300), granted(2, 1, 100, 900))
    write(store, last := granted(1, 2, 500, 600))
    free = replace(last, gen=3, fence=590, token=None)
    assert store.swap([Swap(last, free, 1, cut)]) == [True]
    assert spans(store) == [*left, (2, 100, 900)]
    assert store.by_machine(1).fence == 590


def test_a_machine_with_too_many_spans_keeps_its_newest_ones_and_of_the_others_the_longest(
    store: Store,
) -> None:
    ends = {0: 50, 100: 190, 200: 205, 300: 380, 400: 401, 500: 502}
    for gen, (start, end) in enumerate(ends.items(), 1):
        write(store, granted(1, gen, start, end), granted(2, gen, start, end))
    store.thin([1, 3], keep=6)
    assert len(spans(store)) == 12
    store.thin([1, 3], keep=4)
    others = [(2, start, end) for start, end in ends.items()]
    assert spans(store) == [(1, 100, 190), (1, 300, 380), (1, 400, 401), (1, 500, 502), *others]
    assert store.trace(1, 202) == Traced(None, 205)
    assert store.trace(1, 150) == Traced(Span(1, 100, 190, HOLDER), 205)
    store.thin([1, 2], keep=1)
    assert spans(store) == [(1, 500, 502), (2, 500, 502)]
    assert store.trace(1, 150) == Traced(None, 401)
    write(store, granted(1, 7, 502, 600, since=500))
    assert spans(store) == [(1, 500, 600), (2, 500, 502)]


def test_pruning_forgets_the_oldest_and_says_so(store: Store) -> None:
    for machine in range(6):
        write(store, granted(machine, 1, 100 * machine, 100 * machine + 50))
    assert store.prune(before=150, keep=99, limit=99) == 2
    assert spans(store) == [(2, 200, 250), (3, 300, 350), (4, 400, 450), (5, 500, 550)]
    assert store.trace(0, 10) == Traced(None, 150)
    assert store.prune(before=0, keep=3, limit=99) == 1
    assert store.trace(5, 510) == Traced(Span(5, 500, 550, HOLDER), 250)
    assert store.prune(before=999, keep=0, limit=2) == 2
    assert spans(store) == [(5, 500, 550)]
    assert store.prune(before=0, keep=3, limit=99) == 0
    assert store.trace(0, 0).since == 450


def test_a_span_that_was_pruned_under_a_lease_comes_back_with_its_renewal(store: Store) -> None:
    write(store, granted(1, 1, 100, 200))
    store.prune(before=0, keep=0, limit=9)
    write(store, granted(1, 2, 200, 300, since=100))
    assert spans(store) == [(1, 100, 300)]


def test_a_renewal_takes_the_place_of_the_span_that_it_lengthens(store: Store) -> None:
    write(store, granted(1, 1, 100, 200))
    write(store, granted(1, 2, 200, 300, since=100))
    assert store.prune(before=200, keep=9, limit=9) == 0
    assert spans(store) == [(1, 100, 300)]


def prune_while(store: Store, meanwhile: Callable[[], object], before: int) -> None:
    """Prune, and have something else happen when it is decided what to forget."""

    def decide(*arguments: Any) -> int:
        count = outdated(*arguments)
        meanwhile()
        return count

    with pytest.MonkeyPatch.context() as patch:
        for family in (keyed, rows):
            patch.setattr(family, "outdated", decide)
        store.prune(before, keep=99, limit=99)


def test_a_span_that_is_renewed_while_it_is_pruned_stays(store: Store) -> None:
    write(store, granted(1, 1, 100, 200), granted(2, 1, 100, 200))
    prune_while(store, lambda: write(store, granted(1, 2, 200, 300, since=100)), before=200)
    assert spans(store) == [(1, 100, 300)]
    assert store.trace(1, 150) == Traced(Span(1, 100, 300, HOLDER), 200)


def test_what_is_known_to_be_incomplete_is_never_said_to_be_complete_again(empty: Store) -> None:
    span = Span(1, 100, 200, HOLDER)
    made(empty, META, Contents(spans=[span], since=500))
    assert empty.prune(before=200, keep=9, limit=9) == 1
    assert empty.trace(1, 150) == Traced(None, 500)


# --- lives, and what moves from store to store ---


def test_meta_is_of_the_incarnation_that_it_was_made_in_or_swapped_to(empty: Store) -> None:
    here = made(empty).incarnation()
    assert empty.swap_meta(META, replace(META, version=2, incarnation=here, floor=9))
    assert empty.incarnation() == meta_of(empty).incarnation == here


def test_what_a_store_holds_fills_another_one(store: Store, tmp_path: Path, servers: Servers) -> None:
    write(store, granted(1, 1, 100, 200), granted(7, 1, 300, 400))
    write(store, replace(granted(7, 2, 300, 350), token=None))
    store.swap([], Mark("here", 12345))
    store.prune(before=200, keep=9, limit=9)
    contents = store.contents()
    for engine in ENGINES:
        with closing(made(open_store(new_url(engine, tmp_path, servers)), META, contents)) as other:
            assert other.contents() == contents == store.contents()
            assert other.by_token(token(1001)) == granted(1, 1, 100, 200)
            assert write(other, granted(7, 3, 400, 500)) == [True]
            assert other.trace(1, 150).since == 200


# --- marks ---


def marked(store: Store) -> list[tuple[str, int]]:
    return [(mark.delegator, mark.timeline_us) for mark in store.marks()]


def test_marks_read_back_whole_by_name(store: Store) -> None:
    marks = [Mark("a", 5, -3, "tcp://10.0.0.1:7410"), Mark("b-1 2/3", 1_767_225_600_000_000, 0, "")]
    for mark in marks:
        store.swap([], mark)
    assert store.marks() == marks


def test_a_mark_goes_forward_only_whatever_order_writes_come_in(store: Store) -> None:
    for now_us in (500, 900, 700, 899):
        store.swap([], Mark("here", now_us))
    store.swap([], Mark("there", 100))
    assert marked(store) == [("here", 900), ("there", 100)]


def test_a_mark_is_not_set_back_by_a_connection_that_knows_an_earlier_one(
    store: Store, beside: Store
) -> None:
    store.swap([], Mark("here", 500))
    beside.swap([], Mark("here", 900))
    for now_us in (600, 700):
        store.swap([], Mark("here", now_us))
        assert marked(store) == [("here", 900)]


@pytest.mark.parametrize("opened", ["memory", "redis", "etcd"], indirect=True)
def test_a_commit_into_data_that_have_gone_back_is_refused(store: Store, beside: Store) -> None:
    store.swap([], Mark("here", 500))
    beside.set_marks(300)
    swap = Swap(Record(1), granted(1, 1, 100, 200), 1)
    assert store.swap([swap], Mark("here", 501)) == [False]
    assert store.by_machine(1) == Record(1)
    assert store.swap([swap], Mark("here", 502)) == [True]


def test_marks_are_set_back_all_at_once_and_go_on_from_there(store: Store) -> None:
    for name in ("here", "there"):
        store.swap([], Mark(name, 900, 4, "tcp://10.0.0.1:7410"))
    store.set_marks(300)
    assert store.marks() == [Mark(name, 300, 4, "tcp://10.0.0.1:7410") for name in ("here", "there")]
    store.swap([], Mark("here", 301))
    assert marked(store) == [("here", 301), ("there", 300)]


def test_old_marks_are_forgotten(store: Store) -> None:
    for name, now_us in (("a", 100), ("b", 200), ("c", 300)):
        store.swap([], Mark(name, now_us))
    store.forget_marks(200)
    assert marked(store) == [("b", 200), ("c", 300)]


# --- schemas ---


def test_a_later_schema_that_this_one_can_read_is_used_and_kept(empty: Store) -> None:
    """Old and new delegators run side by side for as long as an upgrade takes."""
    later = meta_of(made(empty, replace(META, schema=SCHEMA + 5)))
    assert later.schema == SCHEMA + 5
    assert write(empty, leased(1)) == [True]
    assert empty.swap_meta(later, replace(later, version=2, ttl=7))
    assert empty.meta() == replace(later, version=2, ttl=7)


@pytest.mark.parametrize("opened", PLACES, indirect=True)
def test_a_schema_that_asks_for_a_later_zflake_is_refused(empty: Store) -> None:
    made(empty, replace(META, schema=SCHEMA + 5, reader=SCHEMA + 1))
    with pytest.raises(
        StoreError, match=f"knows schema {SCHEMA + 1}; this one knows {SCHEMA}: upgrade zflake"
    ):
        empty.meta()


def test_no_mark_is_written_where_there_is_no_meta(empty: Store) -> None:
    empty.swap([], Mark("here", 5))
    assert list(empty.marks()) == []


# --- what others do meanwhile ---


@pytest.mark.parametrize("opened", ["redis", "postgresql"], indirect=True)
def test_a_swap_under_a_meta_of_another_incarnation_loses(store: Store) -> None:
    assert store.swap_meta(META, replace(META, version=2, incarnation="another"))
    swap = Swap(Record(1), granted(1, 1, 100, 200), 2)
    assert store.swap([swap], Mark("here", 5)) == [False]
    assert store.by_machine(1) == Record(1)
    assert marked(store) == [("here", 5)]


@pytest.mark.parametrize("opened", ["memory", "redis", "etcd"], indirect=True)
def test_of_two_who_fill_a_store_the_first_gives_up(empty: Store, beside: Store) -> None:
    assert isinstance(empty, keyed.KeyedStore)
    assert isinstance(beside, keyed.KeyedStore)
    fill = empty._fill

    def fill_too_late(*arguments: Any) -> bool:
        beside._commit(keyed.Step({}, {keyed.FILLING: "of another process"}))
        return fill(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(empty, "_fill", fill_too_late)
        with pytest.raises(StoreError, match="another process has just begun to"):
            empty.initialise(META, Contents([granted(1, 1, 100, 200)]))
    assert empty.meta() is None


@pytest.mark.parametrize("opened", ["memory", "redis", "etcd"], indirect=True)
def test_of_two_who_prune_none_takes_back_what_the_other_says(store: Store, beside: Store) -> None:
    assert isinstance(store, keyed.KeyedStore)
    write(store, granted(1, 1, 100, 200), granted(2, 1, 100, 900))
    commit = store._commit

    def commit_too_late(*steps: Any) -> list[bool] | None:
        patch.undo()
        assert beside.prune(before=900, keep=9, limit=9) == 2
        return commit(*steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_commit", commit_too_late)
        store.prune(before=200, keep=9, limit=9)
    assert store.trace(2, 500) == Traced(None, 900)


@pytest.mark.parametrize("opened", ["postgresql"], indirect=True)
def test_meta_is_not_swapped_while_a_commit_relies_on_it(store: Store, beside: Store) -> None:
    assert isinstance(store, rows.RowStore)
    assert isinstance(beside, rows.RowStore)
    beside._run("SET lock_timeout = '100ms'")
    with store._transaction():
        assert store._current_version() == META.version
        with pytest.raises(StoreError, match="lock"):
            beside.swap_meta(META, replace(META, version=2))
    assert beside.swap_meta(META, replace(META, version=2))


@pytest.mark.parametrize("opened", ["sqlite"], indirect=True)
def test_a_swap_of_meta_that_loses_does_not_shut_the_file_to_this_zflake(
    store: Store, opened: Opened
) -> None:
    lost = replace(META, version=9)
    assert not store.swap_meta(lost, replace(lost, version=10, reader=SCHEMA + 1))
    store.close()
    open_store(opened.url).close()
