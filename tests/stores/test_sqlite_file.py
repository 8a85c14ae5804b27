"""The file beneath an SQLite store: whether it is what it was, in use and when it is opened again."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from zflake.core.layout import PRESETS
from zflake.core.lease import Mark, Meta, Record, Swap
from zflake.errors import StoreError
from zflake.stores.sqlite import SqliteStore

META: Final = Meta("store-1", PRESETS["snowcloud"], ttl=30_000, first_machine=0, last_machine=1023)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def opened(path: Path) -> SqliteStore:
    """The store, with its incarnation in meta, as a delegator's start leaves it."""
    store = SqliteStore(path)
    meta = store.meta()
    if meta is None:
        store.initialise(replace(META, incarnation=store.incarnation()))
    elif meta.incarnation != store.incarnation():
        store.swap_meta(meta, replace(meta, version=meta.version + 1, incarnation=store.incarnation()))
    return store


def commit(store: SqliteStore, times: int = 1, *, machine: int = 1) -> None:
    version = meta.version if (meta := store.meta()) else 0
    for _ in range(times):
        old = store.by_machine(machine)
        gen = old.gen + 1
        record = Record(machine, gen * 10, gen, b"%016d" % gen, gen * 10 - 10)
        assert store.swap([Swap(old, record, version)], Mark("here", gen)) == [True]


def is_known(path: Path) -> bool:
    """Whether the store, opened afresh, takes itself for what it was."""
    store = SqliteStore(path)
    try:
        meta = store.meta()
        assert meta is not None
        return meta.incarnation == store.incarnation()
    finally:
        store.close()


def run_and_kill(path: Path, commits: int) -> None:
    """Commit so often in another process, which then dies of SIGKILL."""
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.stores import test_sqlite_file as t;"
        "store = t.opened(Path(sys.argv[1])); t.commit(store, int(sys.argv[2]));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(commits)], check=False)
    assert done.returncode == -signal.SIGKILL


# --- what is what it was ---


@pytest.mark.parametrize("commits", [0, 1, 50, 1500])  # some 1,000 pages make a checkpoint
def test_a_store_that_was_closed_is_what_it_was(path: Path, commits: int) -> None:
    store = opened(path)
    commit(store, commits)
    store.close()
    assert is_known(path)
    assert is_known(path)


@pytest.mark.parametrize("commits", [0, 1, 50, 1500])
def test_so_is_one_whose_process_was_killed(path: Path, commits: int) -> None:
    run_and_kill(path, commits)
    assert is_known(path)


@pytest.mark.parametrize("before", ["COMMIT", "BEGIN"])
def test_who_dies_while_he_makes_a_store_has_lost_nothing(path: Path, before: str) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.stores import test_sqlite_file as t;"
        "store = t.SqliteStore(Path(sys.argv[1]));"
        f"store._db.set_trace_callback(lambda sql: {before!r} in sql and os.kill(os.getpid(), signal.SIGKILL));"
        "store.initialise(t.replace(t.META, incarnation=store.incarnation()))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    store = SqliteStore(path)
    assert store.meta() is None
    assert not store.had_data
    store.close()
    opened(path).close()
    assert is_known(path)


def test_so_is_one_whose_marker_is_behind_as_after_a_power_failure(path: Path) -> None:
    store = opened(path)
    marker = Path(f"{path}.marker").read_bytes()
    commit(store, 20)
    store.close()
    Path(f"{path}.marker").write_bytes(marker)
    assert is_known(path)


def test_so_is_one_that_was_only_looked_at(path: Path) -> None:
    store = opened(path)
    commit(store)
    looker = SqliteStore(path, read_only=True)
    assert looker.contents() == store.contents()
    looker.close()
    commit(store)
    store.close()
    SqliteStore(path, read_only=True).close()
    assert is_known(path)


def test_a_backup_program_may_read_and_checkpoint_meanwhile(path: Path) -> None:
    store = opened(path)
    commit(store, 5)
    code = (
        "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint').fetchone())"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
        commit(store, 5)
    store.close()
    assert is_known(path)


# --- what may have forgotten something ---


def test_a_new_store_is_not_yet_known(path: Path) -> None:
    store = SqliteStore(path)
    assert store.incarnation()
    assert not store.had_data
    store.initialise(META)
    assert store.incarnation() != META.incarnation
    store.close()


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("move", ["copied into place", "moved into place"])
@pytest.mark.parametrize("commits", [1, 1500])
def test_an_older_copy_is_not_what_it_was(path: Path, *, killed: bool, move: str, commits: int) -> None:
    store = opened(path)
    commit(store, 3)
    store.close()
    backup = path.with_name("backup.db")
    shutil.copyfile(path, backup)
    if killed:  # the log stays behind, and would be laid over the copy
        run_and_kill(path, commits)
    else:
        store = opened(path)
        commit(store, commits)
        store.close()
    if move == "copied into place":
        shutil.copyfile(backup, path)
    else:
        backup.replace(path)
    # A copy whose main file is the same as before, with the whole log over it, is what it was.
    whole = killed and commits == 1
    assert is_known(path) == whole


@pytest.mark.parametrize("text", [None, "", "overwritten\n", "x 1", "\0" * 80, "é 1 2 3"])
def test_without_a_marker_that_can_be_read_nobody_knows(path: Path, text: str | None) -> None:
    store = opened(path)
    commit(store)
    store.close()
    marker = Path(f"{path}.marker")
    marker.unlink()
    if text is not None:
        marker.write_text(text)
    assert not is_known(path)
    assert not is_known(path)  # until meta says that this was seen
    opened(path).close()
    assert is_known(path)


def test_the_original_put_back_after_a_copy_was_used_is_not_what_it_was(path: Path) -> None:
    store = opened(path)
    commit(store)
    store.close()
    original = path.with_name("original.db")
    shutil.copyfile(path, original)
    path.with_name("store.db.marker").unlink()
    store = opened(path)
    commit(store)
    store.close()
    assert is_known(path)
    store = SqliteStore(original)
    commit(store, 9)  # it has had more commits than the copy
    store.close()
    original.replace(path)
    assert not is_known(path)


def test_an_empty_file_beside_a_marker_shows_that_there_was_a_store(path: Path) -> None:
    opened(path).close()
    path.unlink()
    store = SqliteStore(path)
    assert store.meta() is None
    assert store.had_data
    store.close()


# --- while it is in use ---


def test_a_file_that_was_moved_or_replaced_in_use_takes_no_more(path: Path) -> None:
    store = opened(path)
    commit(store)
    away = path.with_name("away.db")
    path.rename(away)
    with pytest.raises(StoreError, match="moved or replaced"):
        commit(store)
    shutil.copyfile(away, path)
    with pytest.raises(StoreError, match="moved or replaced"):
        commit(store)
    away.replace(path)
    commit(store)
    store.close()
    assert is_known(path)


def test_a_file_that_was_overwritten_in_use_takes_no_more_nor_is_it_known_afterwards(path: Path) -> None:
    store = opened(path)
    commit(store, 3)
    store.close()
    backup = path.with_name("backup.db")
    shutil.copyfile(path, backup)
    store = opened(path)
    commit(store, 1500)  # a checkpoint, so that the main file has moved on
    shutil.copyfile(backup, path)
    for _ in range(2):
        with pytest.raises(StoreError, match="overwritten with an older one"):
            store.swap([], Mark("here", 1))
    store.close()
    assert not is_known(path)


def test_a_file_that_was_emptied_in_use_takes_no_more(path: Path) -> None:
    store = opened(path)
    commit(store, 3)
    os.truncate(path, 0)
    with pytest.raises(StoreError, match="overwritten"):
        store.swap([], Mark("here", 1))
    store.close()
    with pytest.raises(StoreError, match="not a database"):
        SqliteStore(path)


# --- reading alone ---


def test_looking_at_a_store_changes_nothing_and_needs_no_lock(path: Path) -> None:
    store = opened(path)
    commit(store, 2)
    looker = SqliteStore(path, read_only=True)
    assert looker.by_machine(1) == store.by_machine(1)
    assert looker.incarnation() == store.incarnation()
    with pytest.raises(StoreError, match="readonly"):
        looker.set_marks(1)
    looker.close()
    store.close()


def test_there_is_nothing_to_look_at_where_there_is_no_store(path: Path) -> None:
    with pytest.raises(StoreError):
        SqliteStore(path, read_only=True)
    assert not path.exists()
    path.touch()
    with pytest.raises(StoreError, match="empty"):
        SqliteStore(path, read_only=True)


def test_a_restore_through_sqlite_itself_is_noticed_before_anything_is_written(path: Path) -> None:
    store = opened(path)
    commit(store)
    backup = path.with_name("backup.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    commit(store, 5)
    with closing(sqlite3.connect(backup)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)
    for _ in range(2):
        with pytest.raises(StoreError, match="overwritten"):
            store.swap([], Mark("here", 10**6))
    store.close()
    assert not is_known(path)


def test_another_store_copied_over_the_open_one_is_noticed_however_far_it_has_come(path: Path) -> None:
    other = path.with_name("other.db")
    store = opened(other)
    commit(store, 50)
    store.close()
    store = opened(path)
    commit(store, 3)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    commit(store)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copyfile(other, path)
    with pytest.raises(StoreError, match="overwritten"):
        commit(store)
    store.close()
    assert not is_known(path)


@pytest.mark.parametrize("which", ["store.db", "store.db.marker"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_at(path: Path, which: str) -> None:
    os.mkfifo(path.with_name(which))
    for read_only in (False, True):
        with pytest.raises(StoreError, match="is no file"):
            SqliteStore(path, read_only=read_only)
