"""The store's disk fills up or is read-only; the store's file goes, comes back older, or is written over.

What a cluster promises then: held windows go on, no ID comes twice, the delegator does not die, and a store
that may have forgotten something grants nothing until that has run out.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from tests.jobs.load import Load
from tests.system.conftest import start_cluster
from tests.system.daemons import Daemon, Daemons, status_of, until

REST_MS: Final = 70_000
"""How long a store rests that may have lost windows; the ttl is shorter here."""

# Root writes what it likes, a read-only file too, unless it gives that up for good.
WITHOUT_OVERRIDE: Final = (
    "import ctypes, os, sys; PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1;"
    "ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0);"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def _unavailable(delegator: Daemon) -> int:
    return int(status_of(delegator.address).get("errors", {}).get("unavailable", 0))


def _assert_rests(delegator: Daemon) -> None:
    """It grants nothing for about `REST_MS`, and says so, in its log and in its status."""
    rest_ms = status_of(delegator.address)["granting_in_ms"]
    warned = [e["message"] for e in delegator.events() if e["level"] == "warning"]
    assert REST_MS - 10_000 < rest_ms <= REST_MS + 1_000, rest_ms
    assert any("Nothing is granted for" in w or "nothing is granted for" in w for w in warned), warned


def _lapse(load: Load, worker: Daemon) -> None:
    """Wait until a worker has nothing to mint in any more."""
    taker = load.takers[worker.name]
    before = taker.refused["LeaseExpired"]
    until(lambda: taker.refused["LeaseExpired"] > before + 2, f"{worker.name} to lapse")


def _all_grants(*delegators: Daemon) -> list[list[Any]]:
    return [lease for d in delegators for verb in ("acquired", "renewed") for lease in d.leases(verb)]


def _grants(*delegators: Daemon) -> int:
    return len(_all_grants(*delegators))


def _fences(store: Path) -> list[int]:
    # Not for writing: the last connection to close a database moves its log into the main file.
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        return [fence for (fence,) in db.execute("SELECT fence FROM machine")]


def _store(daemons: Daemons) -> Path:
    return daemons.folder / "store.db"


def _copy(store: Path, to: Path, *, marker: bool = False) -> None:
    """Copy a store, its log included, as a backup of files does."""
    to.mkdir()
    for suffix in ("", "-wal", *([".marker"] if marker else [])):
        if (path := Path(f"{store}{suffix}")).exists():
            shutil.copy(path, to / path.name)


# --- no room, no right to write ---


def test_a_full_disk_stops_grants_and_nothing_else_until_there_is_room(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2, ttl="2s")
    delegator = cluster.delegator
    with Load(cluster.workers) as load:
        until(lambda: _grants(delegator) > 3, "some grants")
        log = Path(f"{_store(daemons)}-wal")
        _, hard = resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
        until(lambda: _unavailable(delegator), "grants to be refused")
        before = _grants(delegator)
        load.go_on("to the end of their windows")
        for worker in cluster.workers:
            _lapse(load, worker)
        assert _grants(delegator) == before
        assert delegator.alive
        assert delegator.said("disk"), "the log says what is wrong"
        resource.prlimit(delegator.pid, resource.RLIMIT_FSIZE, (hard, hard))
        load.go_on("once there is room")
    assert load.check([delegator]).violations == []
    assert load.lost() == []
    assert delegator.terminate() == 0


def test_a_store_that_may_not_be_written_is_refused_and_goes_on_once_it_may(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=1, ttl="8s")
    address = cluster.delegator.address
    store = _store(daemons)
    with Load(cluster.workers) as load:
        load.go_on()
        cluster.delegator.kill()
        store.chmod(0o444)
        argv = ["-m", "zflake.cli.delegator", "--bind", address, "--store", f"sqlite:///{store}"]
        refused = daemons.process(
            [sys.executable, "-c", WITHOUT_OVERRIDE, sys.executable, *argv, "--log-format", "json"]
        )
        assert refused.wait() == 1
        line = refused.log().splitlines()[-1]
        assert str(store) in line
        assert "let this user write the file" in line
        load.go_on("while its window lasts")
        store.chmod(0o644)
        again = daemons.delegator(bind=address, new=False, ttl="8s")
        until(lambda: again.leases("renewed"), "a renewal")
        # An open file may be written whatever becomes of the file's mode.
        store.chmod(0o444)
        before = _grants(again)
        until(lambda: _grants(again) > before + 1, "more renewals")
        load.go_on()
    assert load.check([cluster.delegator, again]).violations == []
    assert load.lost() == []


# --- the file goes, or comes back ---


def test_a_store_that_is_moved_away_and_back_grants_nothing_meanwhile(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2, ttl="1s")
    delegator, store = cluster.delegator, _store(daemons)
    with Load(cluster.workers) as load:
        load.go_on()
        store.rename(store.with_suffix(".away"))
        until(lambda: _unavailable(delegator), "grants to be refused")
        before = _grants(delegator)
        for worker in cluster.workers:
            _lapse(load, worker)
        assert _grants(delegator) == before
        store.with_suffix(".away").rename(store)
        load.go_on("once it is back")
    assert status_of(delegator.address)["granting_in_ms"] == 0
    assert delegator.said("was moved or replaced while in use")
    assert load.check([delegator]).violations == []
    assert load.lost() == []


def _replace(store: Path, backup: Path) -> None:
    fresh = store.with_suffix(".restored")
    shutil.copy(backup / store.name, fresh)
    fresh.replace(store)
    Path(f"{store}-wal").unlink()
    Path(f"{store}-shm").unlink()


def _overwrite(store: Path, backup: Path) -> None:
    inode = store.stat().st_ino
    store.write_bytes((backup / store.name).read_bytes())
    assert store.stat().st_ino == inode


@pytest.mark.parametrize(
    ("lose", "running"),
    [
        pytest.param(lambda store, _: store.unlink(), True, id="removed under its delegator"),
        pytest.param(_replace, True, id="replaced under its delegator"),
        pytest.param(_overwrite, True, id="written over under its delegator"),
        pytest.param(_overwrite, False, id="written over while its log stays"),
        pytest.param(lambda store, _: Path(f"{store}-wal").unlink(), False, id="its log removed"),
        pytest.param(lambda store, _: Path(f"{store}.marker").unlink(), False, id="its marker removed"),
    ],
)
def test_a_store_that_is_lost_is_rested_from_and_no_holder_is_hurt(
    daemons: Daemons,
    lose: Callable[[Path, Path], None],
    running: bool,
) -> None:
    cluster = start_cluster(daemons, workers=1, ttl="1s")
    store, (worker,) = _store(daemons), cluster.workers
    backup = daemons.folder / "backup"
    delegators = [cluster.delegator]

    def start(name: str) -> Daemon:
        delegators.append(daemons.delegator(name=name, bind=delegators[0].address, new=False, ttl="1s"))
        until(delegators[-1].find_address, "it to serve")
        return delegators[-1]

    def granted() -> int:
        return _grants(delegators[-1])

    with Load([worker]) as load:
        load.go_on()
        # Each shutdown puts the log's commits into the main file, and leaves no log.
        delegators[-1].terminate()
        _copy(store, backup)
        for name in ("second", "third"):
            delegator = start(name)
            until(granted, "windows that the backup does not know")
            if name == "second":
                delegator.terminate()
        if not running:
            delegator.kill()
        granted_to = max(_fences(store))
        lose(store, backup)
        if running:
            # Its last commit may still have been.
            granted_to += 2_000
            until(lambda: _unavailable(delegator), "the delegator to stop granting")
            before = _grants(*delegators)
            _lapse(load, worker)
            assert _grants(*delegators) == before
            assert delegator.alive
            delegator.kill()
        # Without the worker, whose renewal would tell: the store is to know by itself.
        worker.signal(signal.SIGSTOP)
        again = start("after")
        _assert_rests(again)
        worker.signal(signal.SIGCONT)
        guest = daemons.worker(to=again)
        until(lambda: guest.said("no_free_machine"), "a new worker to be told to wait")
        _lapse(load, worker)
        # An answer that the dead one owed is no grant.
        assert all(end <= granted_to for _, _, _, _, end in _all_grants(again))
    assert load.check(delegators).violations == []
    assert again.terminate() == 0


def test_a_store_rolled_back_with_its_marker_is_betrayed_by_the_first_renewal(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2, ttl="1s")
    store = _store(daemons)
    delegators = [cluster.delegator]
    with Load(cluster.workers) as load:
        load.go_on()
        cluster.delegator.signal(signal.SIGSTOP)  # so that the copy is of one moment
        _copy(store, daemons.folder / "backup", marker=True)
        cluster.delegator.signal(signal.SIGCONT)
        until(lambda: _grants(cluster.delegator) > 10, "windows that the backup does not know")
        cluster.delegator.kill()
        for path in daemons.folder.glob("store.db*"):
            path.unlink()
        for path in (daemons.folder / "backup").iterdir():
            shutil.copy(path, daemons.folder / path.name)
        again = daemons.delegator(name="after", bind=cluster.delegator.address, new=False, ttl="1s")
        delegators.append(again)
        until(load.lost, "a worker to be told that its lease is lost")
        until(lambda: again.said("has lost leases"), "it to say so")
        _assert_rests(again)
        time.sleep(1.5)
        assert _grants(again) == 0
        rest_ms = status_of(again.address)["granting_in_ms"]
        again.kill()
        delegators.append(daemons.delegator(name="later", bind=again.address, new=False, ttl="1s"))
        left_ms = until(lambda: status_of(again.address), "its status")["granting_in_ms"]
        assert rest_ms - 10_000 < left_ms < rest_ms, "a rest goes on over a restart, and does not begin anew"
    assert load.check(delegators).violations == []
    assert delegators[-1].alive
