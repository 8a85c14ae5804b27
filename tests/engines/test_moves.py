"""A whole cluster of real processes moves from engine to engine, and `zflake up` runs one on each."""

from __future__ import annotations

import itertools
import json
import signal
import socket
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import zflake
from tests.conftest import brief
from tests.places import PLACES, SERVED, Place
from tests.servers import Servers, free_port
from tests.system.daemons import Daemon, Daemons, children_of, is_running, status_of, until
from tests.system.daemons import tool as run_tool
from zflake.core.layout import DEFAULT

TTL: Final = "24s"
"""A worker renews every third of it, and rides out two."""

tool = partial(run_tool, within_s=60)


def told(*argv: str) -> str:
    """What `zflake` prints, if it ends well and complains of nothing."""
    done = tool(*argv)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def facts_of(url: str) -> dict[str, Any]:
    (line,) = told("store", "info", url, "--json").splitlines()
    facts: dict[str, Any] = json.loads(line)
    return facts


def lease_at(delegator: Daemon, above: int = 0) -> dict[str, Any]:
    """The lease of the worker `constant`, once its generation is above that."""

    def look() -> list[dict[str, Any]]:
        leases = status_of(delegator.address).get("leases", ())
        return [
            each for each in leases if each["name"] == "constant" and each["worker"] and each["gen"] > above
        ]

    (lease,) = until(look, "the worker to renew")
    return dict(lease)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_keeps_its_machine_id_while_its_cluster_goes_round_all_engines(
    daemons: Daemons, servers: Servers, tmp_path: Path
) -> None:
    names = ("sqlite", "redis", "etcd", "postgresql", "sqlite")
    places: list[Place] = [PLACES[name](tmp_path, servers) for name in names]
    delegator = daemons.delegator("--store", places[0].url, ttl=TTL)
    address = delegator.address
    worker = daemons.worker(to=address, name="constant")
    first = lease_at(delegator)
    with zflake.Client(worker.address, route="direct", timeout=10) as client:
        ids = client.next_ids(10)
        lease = first
        for number, (source, target) in enumerate(itertools.pairwise(places)):
            assert facts_of(source.url)["held"] == 1
            refused = tool("store", "copy", source.url, target.url)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert "in use" in refused.stderr
            assert delegator.terminate() == 0
            told("store", "copy", source.url, target.url)
            ids += client.next_ids(10)  # the worker serves meanwhile
            old = daemons.delegator("--store", source.url, "--bind", "tcp://127.0.0.1:*", new=False, ttl=TTL)
            delegator = daemons.delegator(
                "--store", target.url, name=f"delegator-on-{number}", bind=address, new=False, ttl=TTL
            )
            assert delegator.address == address
            lease = lease_at(delegator, above=lease["gen"])
            assert lease["machine"] == first["machine"]
            assert status_of(address)["granting_in_ms"] == 0
            assert facts_of(target.url)["floor"] is None
            assert old.wait() == 2
            (line,) = old.log().splitlines()
            assert "was moved to" in line
            ids += client.next_ids(10)
    assert len(set(ids)) == len(ids)
    assert {DEFAULT.decompose(id_).machine for id_ in ids} == {first["machine"]}
    assert worker.said("lost") == 0
    # The last engine knows the minter of the first of them, too.
    assert "constant" in told("trace", str(ids[0]), "--to", address)


@pytest.mark.parametrize("engine", brief(PLACES, ["sqlite", "redis"]))
def test_the_store_commands_speak_of_every_engine(
    engine: str, daemons: Daemons, servers: Servers, tmp_path: Path
) -> None:
    place = PLACES[engine](tmp_path, servers)
    delegator = daemons.delegator("--store", place.url)
    worker = daemons.worker(to=delegator)
    until(lambda: worker.said("holding machine"), "a lease")
    live = facts_of(place.url)
    assert live["store_id"] == status_of(delegator.address)["store_id"]
    assert (live["used"], live["held"], live["is_as_it_was"], live["moved_to"]) == (1, 1, True, None)
    for process in (worker, delegator):
        assert process.terminate() == 0
    assert "1 ever used, 0 held" in told("store", "info", place.url)
    assert "nothing to do" in told("store", "rewind", place.url)
    restored = PLACES["sqlite"](tmp_path, servers)
    told("store", "restore", place.url, restored.url)
    assert "will rest before it grants" in told("store", "info", restored.url)


# --- zflake up ---


def running_on(url: str) -> list[int]:
    """The processes that were told of that store."""
    pids = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if url.encode() in command.read_bytes().split(b"\0"):
                pids.append(int(command.parent.name))
    return pids


@pytest.fixture(params=brief(SERVED, ["redis"]))
def served(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Place:
    return PLACES[request.param](tmp_path, servers)


@pytest.mark.timeout(120)
def test_up_once_runs_several_delegators_on_a_store_they_share(served: Place, daemons: Daemons) -> None:
    flags = ["--store", served.url, "--delegators", "3", "--once", "--new"]
    up = daemons.up(*flags)
    pids: set[int] = set()

    def ended() -> bool:
        pids.update(children_of(up.pid))
        return not up.alive

    until(ended, "the end", within_s=60)
    assert up.wait() == 0, up.log()
    lines = up.out().splitlines()
    assert len({line.split()[0] for line in lines}) == len(lines) == 10
    assert "Traceback" not in up.log()
    assert len(pids) == 6, "three delegators and three workers"
    until(lambda: not any(map(is_running, pids)), "the children to end")
    assert running_on(served.url) == []
    # Each of them has left its mark, and every lease was given back.
    facts = facts_of(served.url)
    assert (len(facts["marks"]), facts["held"], facts["used"]) == (3, 0, 3)
    # Once more, on what is there: nothing was lost, so nothing rests.
    again = tool("up", *flags[:-1])
    assert (again.returncode, len(again.stdout.splitlines())) == (0, 10), again.stderr
    assert running_on(served.url) == []


@pytest.mark.long
@pytest.mark.timeout(120)
def test_up_shows_all_of_its_delegators(served: Place, daemons: Daemons) -> None:
    flags = ["--store", served.url, "--delegators", "3", "--workers", "2", "--new"]
    port = free_port(in_a_row=3)
    up = daemons.up(*flags, port=port)
    until(lambda: "Ctrl-C" in up.out() or not up.alive, "the cluster", within_s=60)
    assert up.alive, up.log()
    addresses = {f"tcp://127.0.0.1:{port}" for port in range(port, port + 3)}
    pids = children_of(up.pid)
    assert len(pids) == 5
    for address in addresses:

        def all_are_shown(address: str = address) -> bool:
            facts = json.loads(tool("status", "--json", "--to", address).stdout or "{}")
            return {each["address"] for each in facts.get("delegators", ())} == addresses

        until(all_are_shown, f"{address} to know the others")
        done = tool("next", "-n", "100", "--to", address)
        assert (done.returncode, len(set(done.stdout.split()))) == (0, 100)
    up.signal(signal.SIGINT)
    assert up.wait() in (0, 130)
    until(lambda: not any(map(is_running, pids)), "the children to end")
    assert running_on(served.url) == []
    assert "Traceback" not in up.log()


@pytest.mark.parametrize(
    "flags", [[], ["--data", "data"], ["--store", "sqlite:///x.db"], ["--store", "memory:"]]
)
def test_up_refuses_several_delegators_on_a_store_of_one(
    flags: list[str], daemons: Daemons, tmp_path: Path
) -> None:
    up = daemons.up("--once", "--delegators", "2", *flags)
    assert up.wait() == 2
    (line,) = up.log().splitlines()
    assert "several delegators need a store that they can share" in line
    assert up.out() == ""
    assert not list(tmp_path.glob("*.db"))
    assert not (tmp_path / "data").exists()


@pytest.mark.timeout(120)
def test_up_on_a_store_that_is_not_there_says_so_and_leaves_nothing_behind(daemons: Daemons) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    for scheme in SERVED:
        url = f"{scheme}://user:hush4711@127.0.0.1:{port}/1"
        up = daemons.up("--once", "--store", url)
        assert up.wait() == 1
        (line,) = up.log().splitlines()
        assert f"{scheme}://127.0.0.1:{port}/1" in line
        assert "hush4711" not in line
        assert running_on(url) == []
