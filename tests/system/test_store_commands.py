"""`zflake trace` and `zflake store`, on stores that real delegators use."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

import zflake
from tests.system.conftest import Cluster, start_cluster
from tests.system.daemons import Daemon, Daemons, complaint, printed, status_of, tool, try_next, until
from zflake.core.lease import Mark
from zflake.stores.sqlite import SqliteStore


def url(path: Path) -> str:
    return f"sqlite:///{path}"


# --- trace ---


def test_each_id_is_traced_to_the_worker_that_minted_it(cluster: Cluster) -> None:
    for worker in cluster.workers:
        with zflake.Client(worker.address, route="direct") as ids:
            id_ = ids.next_id()
        to = ("--to", cluster.delegator.address)
        facts = json.loads(printed("trace", str(id_), "--json", *to))
        by = facts["minted_by"]
        assert (facts["id"], by["pid"], by["address"]) == (str(id_), worker.pid, worker.address)
        assert by["from"] <= facts["time"] < by["to"]
        assert f"{worker.name}, process {worker.pid} on" in printed("trace", str(id_), *to)


def test_an_id_that_nobody_was_granted_says_so_and_fails(cluster: Cluster) -> None:
    stranger = zflake.layouts["snowcloud"].compose(1, 1023, 7)
    done = tool("trace", str(stranger), "--json", "--to", cluster.delegator.address)
    assert done.returncode == 1
    assert json.loads(done.stdout)["minted_by"] is None
    done = tool("trace", hex(stranger), "--to", cluster.delegator.address)
    assert done.returncode == 1
    assert "no holder of this cluster" in done.stdout


def test_a_worker_and_nobody_trace_nothing(cluster: Cluster) -> None:
    assert "not a delegator" in complaint("trace", "5", "--to", cluster.workers[0].address)
    assert "no answer" in complaint("trace", "5", "--to", "tcp://127.0.0.1:1", "--timeout", "200ms")


def test_what_was_given_back_is_not_traced_to_who_had_it(daemons: Daemons) -> None:
    delegator = daemons.delegator(ttl="30s")
    with zflake.Client(daemons.worker(to=delegator, name="first").address, route="direct") as ids:
        id_ = until(lambda: try_next(ids), "an ID")
    machine = zflake.layouts["snowcloud"].decompose(id_).machine
    tick = zflake.layouts["snowcloud"].decompose(id_).tick
    for worker in daemons._started[1:]:
        assert isinstance(worker, Daemon)
        assert worker.terminate() == 0
    minted = tool("trace", str(id_), "--to", delegator.address)
    assert "first" in minted.stdout
    # Its window went on for half a minute; what it gave back of that, no holder has.
    later = zflake.layouts["snowcloud"].compose(tick + 20_000, machine, 0)
    assert "no holder" in tool("trace", str(later), "--to", delegator.address).stdout


# --- store info ---


def test_info_shows_a_store_in_use_and_one_at_rest(daemons: Daemons, tmp_path: Path) -> None:
    cluster = start_cluster(daemons, workers=1, ttl="2s")
    store = url(tmp_path / "store.db")
    facts = json.loads(printed("store", "info", store, "--json"))
    assert facts["store_id"] == status_of(cluster.delegator.address)["store_id"]
    assert (facts["used"], facts["held"], facts["ttl_ms"], facts["floor"]) == (1, 1, 2000, None)
    assert facts["is_as_it_was"]
    for process in reversed(cluster.all):
        assert process.terminate() == 0
    assert "1 ever used, 0 held" in printed("store", "info", store)


def test_there_is_nothing_to_show_where_there_is_no_store(tmp_path: Path) -> None:
    for command in (["info"], ["rewind"]):
        assert "unable to open" in complaint("store", *command, url(tmp_path / "none.db"))
        assert "memory: holds no cluster" in complaint("store", *command, "memory:")
    assert not list(tmp_path.iterdir())


# --- restore ---


def test_a_restored_store_rests_before_it_grants(daemons: Daemons, tmp_path: Path) -> None:
    for process in start_cluster(daemons, workers=1, ttl="1s").all:
        process.kill()
    old, new = tmp_path / "store.db", tmp_path / "restored.db"
    said = printed("store", "restore", url(old), url(new))
    assert "1 machine IDs" in said
    assert "for the first 70 s" in said
    second = daemons.delegator("--store", url(new), ttl="1s")
    assert status_of(second.address)["granting_in_ms"] > 60_000
    assert second.said("not what it was") == 1
    assert second.said("--new does nothing") == 1


def test_nothing_is_restored_over_a_store(daemons: Daemons, tmp_path: Path) -> None:
    for name in ("one", "two"):
        delegator = daemons.delegator("--store", url(tmp_path / name))
        assert delegator.address
        delegator.terminate()
    before = (tmp_path / "two").read_bytes()
    assert "is a cluster's store already" in complaint(
        "store", "restore", url(tmp_path / "one"), url(tmp_path / "two")
    )
    assert (tmp_path / "two").read_bytes() == before
    shutil.copyfile(tmp_path / "one", tmp_path / "three")
    assert "unable to open" in complaint("store", "restore", url(tmp_path / "none"), url(tmp_path / "four"))
    assert not (tmp_path / "four").exists()


# --- rewind ---


def test_rewind_brings_a_store_back_from_a_future_that_was_believed(daemons: Daemons, tmp_path: Path) -> None:
    delegator = daemons.delegator(ttl="1s")
    assert delegator.address
    until(lambda: status_of(delegator.address), "it to serve")
    store = url(tmp_path / "store.db")
    assert "in use by another delegator" in complaint("store", "rewind", store)
    delegator.terminate()
    assert "nothing to do" in printed("store", "rewind", store, "--floor")
    far_us = time.time_ns() // 1000 + 10 * 365 * 86_400_000_000
    held = SqliteStore(tmp_path / "store.db")
    (mark,) = held.marks()
    held.swap([], Mark(mark.delegator, far_us))
    held.close()
    refused = daemons.delegator(ttl="1s", new=False)
    assert refused.wait() == 2
    assert "--accept-clock" in refused.log()
    assert "set the time" in printed("store", "rewind", store)
    again = daemons.delegator(ttl="1s", new=False)
    assert again.address
    worker = daemons.worker(to=again)
    with zflake.Client(worker.address, route="direct") as ids:
        id_ = until(lambda: try_next(ids), "an ID")
    assert abs(zflake.layouts["snowcloud"].decompose(id_).time.timestamp() - time.time()) < 5


@pytest.mark.parametrize("command", ["info", "restore", "rewind"])
def test_the_commands_explain_themselves(command: str) -> None:
    assert "URL" in printed("store", command, "--help")
