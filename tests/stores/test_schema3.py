"""Stores that zflake wrote in schema 3, on each engine that keeps what it has.

The files in schema3/ were written by the last zflake of that schema: five machines that were used, one of them
released and one pruned, a machine with a gap in its provenance, a floor that moved, two marks, and names that
are not ASCII.  contents.json says what is in all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.places import PLACES, EtcdPlace, Place, PostgresqlPlace, RedisPlace, SqlitePlace
from tests.servers import Servers
from zflake.core.lease import Holder, Mark, Record, Span
from zflake.stores import open_store
from zflake.stores.contract import Contents

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


def test_a_store_of_schema_3_can_be_looked_at_and_stays_as_it_is(place: Place) -> None:
    before = place.everything()
    store = open_store(place.url, read_only=True)
    meta = store.meta()
    assert meta is not None
    facts = [meta.store_id, meta.ttl, meta.first_machine, meta.last_machine, meta.floor, meta.version]
    assert [*facts, meta.moved, meta.schema, meta.reader] == WRITTEN["meta"]
    assert store.contents() == expected()
    assert store.trace(1, 2_999).span == Span(1, 1_000, 3_000, Holder(*WRITTEN["records"][0][-1]))
    assert [record.machine for record in store.held(10_000)] == [1, 2, 1023]
    store.close()
    assert place.everything() == before
