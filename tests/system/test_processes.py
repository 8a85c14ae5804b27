"""The promises of daemons as processes: signals, outages, pauses, `zflake up`."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

import zflake
from tests.conftest import Connect, Peer
from tests.jobs.checker import check_runs, runs_in
from tests.servers import free_port
from tests.system.conftest import start_cluster
from tests.system.daemons import (
    Daemon,
    Daemons,
    children_of,
    counts_of,
    is_running,
    names_of,
    status_of,
    until,
)
from zflake.core.layout import DEFAULT
from zflake.daemon.waker import AGAIN_S
from zflake.wire.codec import Response

BUDGET_MS: Final = 20_000
"""More than any of these tests takes to answer."""


def _ask(peer: Peer) -> Response:
    return peer.ask("ids.next", 1, BUDGET_MS)


def _ids(response: Response) -> list[int]:
    if response.error is not None:
        return []
    first, step, count = response.result
    return list(range(first, first + step * count, step))


def _assert_sound(ids: list[int], *delegators: Daemon) -> None:
    """The IDs are distinct, and lie inside windows that were granted."""
    assert check_runs([d.log_path for d in delegators], runs_in(ids)).violations == []


def _more(peer: Peer, ids: list[int]) -> int:
    """Take one more ID, if there is one; gives how many there are now."""
    ids += _ids(_ask(peer))
    return len(ids)


def _minted(worker: Daemon) -> int:
    return int(until(lambda: status_of(worker.address), f"the status of {worker.name}")["ids"])


# --- signals ---


def test_sigterm_drains_a_worker(daemons: Daemons, connect: Connect) -> None:
    cluster = start_cluster(daemons, workers=1)
    (worker,) = cluster.workers
    peer = connect(worker.address)
    ids = _ids(_ask(peer))
    asked = {peer.request("ids.next", 10, BUDGET_MS) for _ in range(1000)}
    worker.signal(signal.SIGTERM)
    while asked:
        response = peer.receive()
        assert response is not None, f"{len(asked)} requests were not answered"
        assert response.msgid in asked
        asked.discard(response.msgid)
        ids += _ids(response)
        if response.error is not None:  # it came too late for this worker: its sender asks another
            assert response.error.code == "unavailable"
    assert worker.wait() == 0
    assert len(ids) > 1
    assert connect(cluster.delegator.address).ask("cluster.workers").result["workers"] == []
    assert names_of(cluster.delegator) == []
    ((_, machine, _, _, fence),) = cluster.delegator.leases("released")
    last = DEFAULT.decompose(max(ids))
    assert machine == last.machine
    assert fence > last.tick
    _assert_sound(ids, cluster.delegator)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_ends_a_daemon_in_order(daemons: Daemons, number: signal.Signals) -> None:
    cluster = start_cluster(daemons, workers=1)
    for daemon in reversed(cluster.all):
        daemon.signal(number)
        assert daemon.wait() == 0
        assert daemon.said("has stopped") == 1
        assert not [e for e in daemon.events() if e["level"] in ("error", "stray")]


def test_a_second_signal_ends_a_daemon_at_once(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=1)
    (worker,) = cluster.workers
    cluster.delegator.signal(signal.SIGSTOP)  # so that the worker waits for it to take the lease back
    worker.signal(signal.SIGTERM)
    time.sleep(AGAIN_S + 0.2)
    worker.signal(signal.SIGINT)
    assert worker.wait() == 128 + signal.SIGINT
    assert worker.said("has stopped") == 0


def test_a_signal_that_comes_twice_in_a_row_is_one(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=1)
    for daemon in reversed(cluster.all):
        daemon.signal(signal.SIGSTOP)
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGINT)
        daemon.signal(signal.SIGCONT)
        assert daemon.wait() == 0
        assert daemon.said("has stopped") == 1


def test_a_worker_stops_though_its_delegator_is_away(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=1)
    cluster.delegator.kill()
    (worker,) = cluster.workers
    assert worker.terminate() == 0
    assert worker.said("was not given back") == 1


# --- outages and pauses ---


def test_a_worker_outlives_its_delegator_to_the_windows_end_and_serves_again(
    daemons: Daemons, connect: Connect
) -> None:
    cluster = start_cluster(daemons, workers=1, ttl="2s")
    (worker,) = cluster.workers
    address = cluster.delegator.address
    peer = connect(worker.address)
    cluster.delegator.kill()
    ids = _ids(_ask(peer))
    assert ids, "it serves while its delegator is away"

    def lapsed() -> Response | None:
        response = _ask(peer)
        ids.extend(_ids(response))
        return response if response.error else None

    refusal: Response = until(lapsed, "the window to end")
    assert refusal.error is not None
    assert refusal.error.code == "lease_expired"
    assert refusal.error.retry_after_ms is not None
    assert 0 < refusal.error.retry_after_ms <= 2_000
    end = max(lease[4] for v in ("acquired", "renewed") for lease in cluster.delegator.leases(v))
    assert end - 100 < DEFAULT.decompose(max(ids)).tick < end, "it serves to its window's very end"
    with zflake.Client([address, worker.address], timeout=1.0) as client, pytest.raises(zflake.LeaseExpired):
        client.next_id()

    again = daemons.delegator(name="again", bind=address, new=False)
    assert again.address == address
    until(
        lambda: _more(peer, ids) and DEFAULT.decompose(ids[-1]).tick >= end, "it to serve again", within_s=2.0
    )
    with zflake.Client(address) as client:
        ids += client.next_ids(100)
    _assert_sound(ids, cluster.delegator, again)


@pytest.mark.parametrize(
    ("ttl", "codes"), [("2s", {"timeout", "lease_expired"}), ("1m", {"timeout"})], ids=["past", "inside"]
)
def test_a_worker_paused_past_or_inside_its_window_mints_nothing_for_who_gave_up(
    daemons: Daemons, connect: Connect, ttl: str, codes: set[str]
) -> None:
    cluster = start_cluster(daemons, workers=1, ttl=ttl)
    (worker,) = cluster.workers
    peer = connect(worker.address)
    ids = _ids(_ask(peer))
    before = _minted(worker)
    worker.signal(signal.SIGSTOP)
    asked = {peer.request("ids.next", 1, 200) for _ in range(100)}
    time.sleep(2.5)
    worker.signal(signal.SIGCONT)
    for _ in range(100):
        response = peer.receive()
        assert response is not None
        asked.remove(response.msgid or 0)
        assert response.error is not None, "minted for a caller whose time was over"
        assert response.error.code in codes
    assert _minted(worker) == before
    until(lambda: _more(peer, ids) > 100, "it to serve again")
    _assert_sound(ids, cluster.delegator)


def test_a_worker_without_a_free_machine_waits_says_so_once_and_takes_the_next(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, "--machines", "0-0", workers=1, ttl="2s")
    (first,) = cluster.workers
    second = daemons.worker(to=cluster.delegator)
    refused = "no_free_machine"
    until(lambda: second.said(refused), "the second worker to be refused")
    asked = counts_of(cluster.delegator.address)["errors"][refused]
    until(
        lambda: status_of(cluster.delegator.address)["errors"][refused] >= asked + 2,
        "it to ask again and again",
    )
    assert names_of(cluster.delegator) == [first.name]
    assert second.said(refused) == 1
    assert first.terminate() == 0
    until(lambda: names_of(cluster.delegator) == [second.name], "the second worker to take the machine")
    with zflake.Client(cluster.delegator.address) as client:
        ids = client.next_ids(10)
    assert {DEFAULT.decompose(id_).machine for id_ in ids} == {0}
    _assert_sound(ids, cluster.delegator)


# --- zflake up ---


def _assert_gone(pids: list[int]) -> None:
    assert len(pids) >= 2
    until(lambda: not any(map(is_running, pids)), f"the children {pids} to end")


def test_up_once_prints_ten_ids_decoded(daemons: Daemons) -> None:
    up = daemons.up("--once", "--workers", "2")
    assert up.wait() == 0, up.log()
    lines = up.out().splitlines()
    assert len(lines) == 10
    pattern = re.compile(r"(\d+)  (\S+Z)  machine (\d+)  sequence (\d+)")
    for line in lines:
        match = pattern.fullmatch(line)
        assert match, line
        fields = DEFAULT.decompose(int(match[1]))
        assert (str(fields.machine), str(fields.sequence)) == (match[3], match[4])
    assert len({line.split()[0] for line in lines}) == 10
    assert up.log() == ""


def test_up_with_data_goes_on_where_it_stopped(daemons: Daemons, tmp_path: Path) -> None:
    def records() -> dict[str, Any]:
        with closing(sqlite3.connect(tmp_path / "data/zflake.db")) as db:
            (store,) = db.execute("SELECT store_id FROM meta").fetchone()
            fences = dict(db.execute("SELECT machine, fence FROM machine"))
            (gens,) = db.execute("SELECT SUM(gen) FROM machine").fetchone()
            return {"store": store, "fences": fences, "gens": gens}

    flags = ("--once", "--workers", "1", "--data", str(tmp_path / "data"))
    first_run = daemons.up(*flags)
    assert first_run.wait() == 0, first_run.log()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    (tmp_path / "data").chmod(0o755)
    first = records()
    assert first["gens"] >= 2, "one grant, one release"
    second_run = daemons.up(*flags)
    assert second_run.wait() == 0, second_run.log()
    (line,) = second_run.log().splitlines()  # it does not say --new again
    assert line == f"other users could read {tmp_path / 'data'} (mode 0755); its mode is 0700 now"
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    second = records()
    assert second["store"] == first["store"]
    assert second["gens"] >= first["gens"] + 2
    assert all(second["fences"][machine] >= fence for machine, fence in first["fences"].items())
    ids = [run.out().split()[0] for run in (first_run, second_run)]
    assert int(ids[0]) < int(ids[1])


def test_up_killed_by_sigkill_leaves_no_process_behind(daemons: Daemons, tmp_path: Path) -> None:
    # Its temporary folder stays.
    up = daemons.up("--workers", "2", port=free_port(), env={"TMPDIR": str(tmp_path)})
    until(lambda: "Ctrl-C" in up.out(), "the cluster")
    pids = children_of(up.pid)
    assert len(pids) == 3
    up.signal(signal.SIGKILL)
    up.wait()
    _assert_gone(pids)


def test_up_shows_its_store_on_no_command_line_but_its_own(daemons: Daemons, tmp_path: Path) -> None:
    """The URL may have a password in it."""
    store = f"sqlite:///{tmp_path}/secret.db"
    up = daemons.up("--store", store, "--new", "--workers", "1", port=free_port())
    until(lambda: "Ctrl-C" in up.out(), "the cluster")
    assert store in up.out()
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children_of(up.pid)]
    assert len(commands) == 2
    assert not [command for command in commands if "secret" in command]
    up.terminate()


@pytest.mark.timeout(120)
def test_up_restarts_children_and_ends_with_ctrl_c(daemons: Daemons) -> None:
    up = daemons.up("--workers", "2", port=(port := free_port()))
    until(lambda: "Ctrl-C" in up.out(), "the cluster")
    endpoint = f"tcp://127.0.0.1:{port}"
    before = status_of(endpoint)
    assert len(before["leases"]) == 2
    with zflake.Client(endpoint) as client:
        ids = client.next_ids(10)
        os.kill(before["pid"], signal.SIGKILL)
        os.kill(before["leases"][0]["pid"], signal.SIGKILL)

        def is_restarted() -> bool:
            assert up.alive, up.log()
            now = status_of(endpoint)
            pids = {lease["pid"] for lease in now.get("leases", ()) if lease["worker"]}
            return (
                bool(now)
                and now["pid"] != before["pid"]
                and len(pids) == 2
                and before["leases"][0]["pid"] not in pids
            )

        until(is_restarted, "the delegator and the worker to be started again")
        ids += client.next_ids(10)
    assert len(set(ids)) == 20
    assert up.log().count("starting it again") == 2
    pids = children_of(up.pid)
    assert len(pids) == 3
    up.signal(signal.SIGINT)
    assert up.wait() in (0, 130)
    _assert_gone(pids)


def test_up_interrupted_while_it_starts_leaves_no_process_behind(daemons: Daemons) -> None:
    up = daemons.up("--once", "--workers", "2")
    pids = until(lambda: len(children_of(up.pid)) >= 2 and children_of(up.pid), "children")
    up.signal(signal.SIGINT)
    up.wait()
    _assert_gone(pids)
    assert "Traceback" not in up.log()


def test_up_on_a_port_in_use_says_so_in_one_line(daemons: Daemons, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        up = daemons.up("--data", str(tmp_path / "data"), port=port)
        assert up.wait() != 0
    (line,) = up.log().splitlines()
    assert f"tcp://127.0.0.1:{port}" in line
    assert "in use" in line.lower()
