"""What is one engine's own: how it is seen that the data are not what they were, and what a fault must not do."""

from __future__ import annotations

import contextlib
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import until
from tests.places import EtcdPlace
from tests.servers import Servers
from tests.stores.made import META, is_as_it_was, leased, made, write
from zflake.core.lease import Mark
from zflake.delegator.moves import meta_of
from zflake.errors import StoreError
from zflake.stores import open_store
from zflake.stores.etcd import EtcdStore
from zflake.stores.etcd_http import EtcdHttp
from zflake.stores.postgresql import PostgresqlStore


@pytest.fixture
def etcd(servers: Servers) -> EtcdStore:
    store = EtcdStore(f"{servers.etcd.url}-own?unchecked=yes")
    store._ask("/kv/deleterange", {"key": "AA==", "range_end": "AA=="})  # all that other tests left
    return store


# --- etcd ---


def test_a_key_whose_name_begins_like_metas_is_not_meta(servers: Servers) -> None:
    place = EtcdPlace(servers.etcd.url, "-beside", "?unchecked=yes")
    with closing(EtcdStore(place.url)) as etcd:
        made(etcd)
        place.put(f"{place.prefix}/meta.bak", "an operator's copy")
        assert is_as_it_was(etcd)


def test_a_revision_that_went_back_is_another_life(etcd: EtcdStore) -> None:
    if etcd.meta() is None:
        made(etcd)
    assert is_as_it_was(etcd)
    etcd._identity.revision += 1000  # it has seen more than there is now
    assert not is_as_it_was(etcd)
    assert write(etcd, leased(1)) == [False]
    assert etcd.swap_meta(META, replace(META, version=2, incarnation=etcd.incarnation()))
    assert is_as_it_was(etcd)
    assert write(etcd, leased(1), version=2) == [True]


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
    with closing(open_store(f"{servers.etcd.url}-own?unchecked=yes")) as other:
        meta = meta_of(other)
        assert other.swap_meta(meta, replace(meta, version=2, ttl=5))
        assert not is_as_it_was(etcd)
        known = replace(meta, version=3, incarnation=etcd.incarnation())
        assert other.swap_meta(replace(meta, version=2), known)
    assert is_as_it_was(etcd)


def test_more_revisions_than_the_log_explains_are_another_life(
    etcd: EtcdStore, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(etcd)
    for now_us in range(1, 30):
        etcd.swap([], Mark("here", now_us))
    with closing(open_store(f"{servers.etcd.url}-own?unchecked=yes")) as again:
        assert is_as_it_was(again)
    ask = EtcdHttp.ask_node

    def restored(self: EtcdHttp, path: str, request: Any) -> Any:
        answer = ask(self, path, request)
        if path == "/maintenance/status":
            answer |= {"raftAppliedIndex": "7"}
        return answer

    monkeypatch.setattr(EtcdHttp, "ask_node", restored)
    with closing(open_store(f"{servers.etcd.url}-own?unchecked=yes")) as again:
        assert not is_as_it_was(again)


def test_one_who_may_not_ask_for_the_servers_state_goes_without(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask = EtcdHttp.ask_once

    def deny(self: EtcdHttp, path: str, request: Any) -> Any:
        if path.startswith("/maintenance/"):
            raise StoreError("etcdserver: permission denied")
        return ask(self, path, request)

    monkeypatch.setattr(EtcdHttp, "ask_once", deny)
    url = f"{servers.etcd.url}-denied"
    with closing(made(open_store(url))) as store:
        assert "to root only: not checked" in caplog.text
        assert is_as_it_was(store)
    with closing(open_store(url)) as again:
        assert is_as_it_was(again)


# --- PostgreSQL ---


def test_who_dies_in_a_transaction_keeps_no_lock_for_long(servers: Servers) -> None:
    url = servers.postgres.url_of_new_database()
    dead, living = made(PostgresqlStore(url)), open_store(url)
    meta = meta_of(dead)
    later = replace(meta, version=2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(dead._transaction())
        dead._run("SELECT 1 FROM meta FOR SHARE")

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
