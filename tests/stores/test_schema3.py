"""Stores that zflake wrote in schema 3, on each engine that keeps what it has.

The files in schema3/ were written by the last zflake of that schema: five machines that were used, one of them
released and one pruned, a machine with a gap in its provenance, a floor that moved, two marks, and names that
are not ASCII.  contents.json says what is in all of them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import redis

from tests.places import PLACES, EtcdPlace, Place, PostgresqlPlace, RedisPlace, SqlitePlace
from tests.servers import Servers
from tests.stores.made import is_as_it_was, write
from zflake.core.lease import READER, SCHEMA, Holder, Mark, Record, Span, Swap, Traced
from zflake.delegator.moves import meta_of
from zflake.errors import StoreError
from zflake.stores import open_store, sqlite
from zflake.stores.contract import Contents
from zflake.stores.etcd_http import EtcdHttp

FOLDER: Final = Path(__file__).with_name("schema3")
WRITTEN: Final[dict[str, Any]] = json.loads((FOLDER / "contents.json").read_text("utf-8"))


def expected() -> Contents:
    """What all of these stores hold."""
    records = []
    for machine, fence, gen, token, start, tenancy_start, span_start, holder in WRITTEN["records"]:
        shown = None if token is None else bytes.fromhex(token)
        records.append(Record(machine, fence, gen, shown, start, tenancy_start, Holder(*holder), span_start))
    spans = [Span(machine, start, end, Holder(*holder)) for machine, start, end, holder in WRITTEN["spans"]]
    return Contents(records, spans, WRITTEN["since"], [Mark(*mark) for mark in WRITTEN["marks"]])


def put_sqlite(place: SqlitePlace) -> None:
    shutil.copy(FOLDER / "sqlite", place.path)
    shutil.copy(FOLDER / "sqlite.marker", f"{place.path}.marker")


def put_redis(place: RedisPlace) -> None:
    for name, (kind, value) in json.loads((FOLDER / "redis.json").read_text("utf-8")).items():
        key = place.prefix + name
        if kind == "string":
            place.client.set(key, value)
        elif kind == "hash":
            place.client.hset(key, mapping=value)
        else:
            place.client.zadd(key, dict.fromkeys(value, 0))


def put_etcd(place: EtcdPlace) -> None:
    for key, value in json.loads((FOLDER / "etcd.json").read_text("utf-8")).items():
        place.put(place.prefix + key, value)


def put_postgresql(place: PostgresqlPlace) -> None:
    place.execute((FOLDER / "postgresql.sql").read_text("utf-8"))


PUT: Final[dict[str, Callable[[Any], None]]] = {
    "sqlite": put_sqlite,
    "redis": put_redis,
    "etcd": put_etcd,
    "postgresql": put_postgresql,
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    place = PLACES[request.param](tmp_path, servers)
    PUT[request.param](place)
    return place


def test_a_store_of_schema_3_that_is_only_looked_at_says_what_to_do_and_stays_as_it_is(place: Place) -> None:
    before = place.everything()
    with pytest.raises(StoreError, match=r"has schema 3, of an older zflake: .* brings it to schema 4"):
        open_store(place.url, read_only=True)
    assert place.everything() == before


def is_converted(url: str) -> bool:
    """Whether the store holds what all of these held, in this schema."""
    with closing(open_store(url)) as store:
        meta = meta_of(store)
        facts = [meta.store_id, meta.ttl, meta.first_machine, meta.last_machine, meta.floor]
        assert [*facts, meta.version > 42, meta.moved] == [*WRITTEN["meta"][:5], True, WRITTEN["meta"][6]]
        assert (meta.schema, meta.reader) == (SCHEMA, READER)
        assert store.contents() == expected()
        assert [record.machine for record in store.held(10_000)] == [1, 2, 1023]
        assert [record.machine for record in store.lowest(0, 9, 99)] == [0, 3, 4, 6, 7, 8, 9, 5, 1, 2]
        assert [store.by_token(record.token) for record in store.held(0) if record.token] == store.held(0)
        return is_as_it_was(store)


def test_a_store_of_schema_3_is_brought_to_this_one_with_all_that_it_holds(place: Place) -> None:
    # The servers are other ones than those that the stores were written on; the file is what it was.
    assert is_converted(place.url) == isinstance(place, SqlitePlace)
    before = place.everything()
    is_converted(place.url)
    assert place.everything() == before
    store = open_store(place.url)
    meta = meta_of(store)
    version = meta.version + 1
    assert store.swap_meta(meta, replace(meta, version=version, incarnation=store.incarnation()))
    # Leases go on, spans are cut and pruned, in rows of both forms alike.
    old = store.by_machine(1)
    renewed = replace(old, gen=old.gen + 1, token=b"n" * 16, start=old.fence, fence=old.fence + 9)
    assert store.swap([Swap(old, renewed, version)], Mark("new", 1)) == [True]
    released = replace(renewed, gen=renewed.gen + 1, token=None, fence=5_500)
    assert write(store, released, version=version) == [True]
    assert store.trace(1, 5_499).span == Span(1, 5_000, 5_500, old.holder)
    assert store.trace(1, 5_500).span is None
    assert store.prune(3_000, 99, 99) == 1
    assert store.trace(1, 1_000) == Traced(None, 3_000)
    store.close()


def test_an_older_zflake_refuses_what_was_converted(place: Place) -> None:
    """The older one reads the reader number at the same place, and has no other name for what it reads."""
    open_store(place.url).close()
    assert place.readers() == (SCHEMA, READER)


class Killed(BaseException):
    """The process has died."""


def cut_after(patch: pytest.MonkeyPatch, owner: type, name: str, calls: int) -> None:
    """Have the call after so many die, once it has done its work."""
    method = getattr(owner, name)
    left = itertools.count(calls, -1)

    def cut(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if next(left) == 0:
            raise Killed
        return result

    patch.setattr(owner, name, cut)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zflake.stores.keyed.CHUNK", 3)
    monkeypatch.setattr("zflake.stores.postgresql.ROWS_AT_ONCE", 3)


def test_a_file_that_lacks_its_last_commit_is_not_taken_for_what_it_was_since_it_is_converted(
    tmp_path: Path,
) -> None:
    place = SqlitePlace(tmp_path / "store.db")
    put_sqlite(place)
    marker = Path(f"{place.path}.marker")
    incarnation, commits, checkpointed = marker.read_text().split()
    marker.write_text(f"{incarnation:<32} {int(commits) + 1:020} {checkpointed}\n")
    assert not is_converted(place.url)


CALLS: Final[dict[str, tuple[type, str]]] = {
    "redis": (redis.Redis, "execute_command"),
    "etcd": (EtcdHttp, "ask_once"),
    "postgresql": (psycopg.Connection, "execute"),
}
"""What each round trip to a server goes through."""


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("engine", CALLS)
def test_a_conversion_that_is_cut_off_after_any_round_trip_is_made_again(
    engine: str, tmp_path: Path, servers: Servers
) -> None:
    for calls in itertools.count():
        place = PLACES[engine](tmp_path, servers)
        PUT[engine](place)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, *CALLS[engine], calls)
            try:
                open_store(place.url).close()
            except Killed:
                is_converted(place.url)
                continue
            break
    assert calls > 10


def test_a_conversion_of_a_file_that_is_cut_off_anywhere_leaves_it_as_it_was(tmp_path: Path) -> None:
    place = SqlitePlace(tmp_path / "store.db")
    put_sqlite(place)
    before = place.everything()
    statements = sqlite._CONVERT.split(";")
    assert len(statements) > 20
    for count in range(len(statements)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite, "_CONVERT", ";".join([*statements[:count], "SELECT cut_off()"]))
            with pytest.raises(StoreError, match="cut_off"):
                open_store(place.url)
        assert place.everything() == before
    assert is_converted(place.url)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("place", [name for name in PLACES if name != "sqlite"], indirect=True)
def test_delegators_that_start_together_convert_a_store_once_and_lose_no_write(place: Place) -> None:
    """Each uses the store as soon as it is there, while others are in the midst of it."""
    wall_of = threading.Barrier(4)

    def start(number: int) -> None:
        wall_of.wait()
        with closing(open_store(place.url)) as store:
            meta = meta_of(store)
            if meta.incarnation != store.incarnation():
                current = replace(meta, version=meta.version + 1, incarnation=store.incarnation())
                store.swap_meta(meta, current)
            version = meta_of(store).version
            for turn in range(1, 22):
                record = Record(100 + number, 10_000 + turn, turn, bytes([100 + number, turn]) * 8)
                assert write(store, record, version=version) == [True]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    with closing(open_store(place.url)) as store:
        fences = {record.machine: record.fence for record in store.contents().records}
    assert [fences.pop(100 + number) for number in range(4)] == [10_021] * 4
    assert fences == {record.machine: record.fence for record in expected().records}
