"""What is one engine's own: how it is seen that the data are not what they were, and what a fault must not do."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, Final

import pytest

from tests.conftest import until
from tests.servers import Servers
from zflake.core.layout import PRESETS
from zflake.core.lease import Mark, Meta, Record, Swap
from zflake.errors import StoreError
from zflake.stores import Store, open_store
from zflake.stores.etcd import EtcdStore
from zflake.stores.etcd_http import EtcdHttp
from zflake.stores.postgresql import PostgresqlStore

META: Final = Meta("store-1", PRESETS["snowcloud"], ttl=30_000, first_machine=0, last_machine=1023)


def made(store: Store) -> Store:
    store.initialise(replace(META, incarnation=store.incarnation()))
    return store


def is_as_it_was(store: Store) -> bool:
    meta = store.meta()
    return meta is not None and store.incarnation() == meta.incarnation


@pytest.fixture
def etcd(servers: Servers) -> EtcdStore:
    store = open_store(f"{servers.etcd.url}-own?unchecked=yes")
    assert isinstance(store, EtcdStore)
    store._ask("/kv/deleterange", {"key": "AA==", "range_end": "AA=="})  # all that other tests left
    return store


# --- etcd ---


def test_a_revision_that_went_back_is_another_life(etcd: EtcdStore) -> None:
    if etcd.meta() is None:
        made(etcd)
    assert is_as_it_was(etcd)
    etcd._identity.revision += 1000  # it has seen more than there is now
    assert not is_as_it_was(etcd)
    assert etcd.swap([Swap(Record(1), Record(1, fence=9, gen=1, token=b"t" * 16), 1)]) == [False]
    meta = etcd.meta()
    assert meta is not None
    assert etcd.swap_meta(meta, replace(meta, version=2, incarnation=etcd.incarnation()))
    assert is_as_it_was(etcd)
    assert etcd.swap([Swap(Record(1), Record(1, fence=9, gen=1, token=b"t" * 16), 2)]) == [True]


def test_that_is_noticed_though_the_cluster_fails_just_then(
    etcd: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(etcd)
    ask = etcd._http.ask_once

    def fail(path: str, request: Any) -> Any:
        if path == "/maintenance/status":
            raise StoreError("it is away")
        return ask(path, request)

    etcd._identity.revision += 1000
    with monkeypatch.context() as patch:
        patch.setattr(etcd._http, "ask_once", fail)
        with pytest.raises(StoreError):
            etcd.meta()
    assert not is_as_it_was(etcd)


def test_somebody_elses_change_of_meta_ends_no_alarm(etcd: EtcdStore, servers: Servers) -> None:
    made(etcd)
    etcd._identity.revision += 1000
    assert not is_as_it_was(etcd)
    other = open_store(f"{servers.etcd.url}-own?unchecked=yes")
    meta = other.meta()
    assert meta is not None
    assert other.swap_meta(meta, replace(meta, version=2, ttl=5))
    assert not is_as_it_was(etcd)
    assert other.swap_meta(replace(meta, version=2), replace(meta, version=3, incarnation=etcd.incarnation()))
    assert is_as_it_was(etcd)
    other.close()


def test_more_revisions_than_the_log_explains_are_another_life(
    etcd: EtcdStore, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(etcd)
    for now_us in range(1, 30):
        etcd.swap([], Mark("here", now_us))
    again = open_store(f"{servers.etcd.url}-own?unchecked=yes")
    assert is_as_it_was(again)
    again.close()
    ask = EtcdHttp.ask_node

    def restored(self: EtcdHttp, path: str, request: Any) -> Any:
        answer = ask(self, path, request)
        if path == "/maintenance/status":
            answer |= {"raftAppliedIndex": "7"}
        return answer

    monkeypatch.setattr(EtcdHttp, "ask_node", restored)
    again = open_store(f"{servers.etcd.url}-own?unchecked=yes")
    assert not is_as_it_was(again)
    again.close()


def test_one_who_may_not_ask_for_the_servers_state_goes_without(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask = EtcdHttp.ask_once

    def deny(self: EtcdHttp, path: str, request: Any) -> Any:
        if path.startswith("/maintenance/"):
            raise StoreError("etcdserver: permission denied")
        return ask(self, path, request)

    monkeypatch.setattr(EtcdHttp, "ask_once", deny)
    store = made(open_store(f"{servers.etcd.url}-denied"))
    assert "to root only: not checked" in caplog.text
    assert is_as_it_was(store)
    store.close()
    again = open_store(f"{servers.etcd.url}-denied")
    assert is_as_it_was(again)
    again.close()


# --- PostgreSQL ---


def test_who_dies_in_a_transaction_keeps_no_lock_for_long(servers: Servers) -> None:
    url = servers.postgres.url_of_new_database()
    dead, living = open_store(url), open_store(url)
    assert isinstance(dead, PostgresqlStore)
    meta = made(dead).meta()
    assert meta is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(dead._transaction())
        dead._run("SELECT 1 FROM meta FOR SHARE")
        later = replace(meta, version=2)

        def swapped() -> bool:
            with contextlib.suppress(StoreError):
                return living.swap_meta(meta, later)
            return False

        until(swapped, "the lock to be gone")
        with pytest.raises(StoreError):
            stack.close()
    assert dead.meta() == later
    dead.close()
    living.close()
