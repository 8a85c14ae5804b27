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

import pytest

from tests.stores.made import META, is_as_it_was, made, token
from zflake.core.lease import Mark, Record, Swap
from zflake.delegator.moves import meta_of
from zflake.errors import StoreError
from zflake.stores.sqlite import SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def opened(path: Path) -> SqliteStore:
    """The store, with its incarnation in meta, as a delegator's start leaves it."""
    store = SqliteStore(path)
    if store.meta() is None:
        return made(store)
    if not is_as_it_was(store):
        meta = meta_of(store)
        store.swap_meta(meta, replace(meta, version=meta.version + 1, incarnation=store.incarnation()))
    return store


def use(path: Path, commits: int = 1) -> None:
    """Open the store, commit so often, and close it."""
    with closing(opened(path)) as store:
        commit(store, commits)


def commit(store: SqliteStore, times: int = 1) -> None:
    version = meta_of(store).version
    for _ in range(times):
        old = store.by_machine(1)
        gen = old.gen + 1
        record = Record(1, gen * 10, gen, token(gen), gen * 10 - 10)
        assert store.swap([Swap(old, record, version)], Mark("here", gen)) == [True]


def is_known(path: Path) -> bool:
    """Whether the store, opened afresh, takes itself for what it was."""
    with closing(SqliteStore(path)) as store:
        return is_as_it_was(store)


def back_up(path: Path, to: Path) -> None:
    """Copy a database by SQLite's own means."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def run_and_die(path: Path, code: str) -> None:
    """Run `code` in another process, which is to end itself by `die()`, of SIGKILL."""
    code = (
        "import os, signal; from pathlib import Path; from tests.stores import test_sqlite_file as t;"
        f"path = Path({str(path)!r}); die = lambda: os.kill(os.getpid(), signal.SIGKILL); {code}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


def use_and_die(path: Path, commits: int) -> None:
    """Commit so often in another process, which then dies."""
    run_and_die(path, f"store = t.opened(path); t.commit(store, {commits}); die()")


# --- what is what it was ---


@pytest.mark.parametrize("commits", [0, 1, 50, 1500])  # some 1,000 pages make a checkpoint
def test_a_store_that_was_closed_is_what_it_was(path: Path, commits: int) -> None:
    use(path, commits)
    assert is_known(path)
    assert is_known(path)


@pytest.mark.parametrize("commits", [0, 1, 50, 1500])
def test_so_is_one_whose_process_was_killed(path: Path, commits: int) -> None:
    use_and_die(path, commits)
    assert is_known(path)


@pytest.mark.parametrize("before", ["COMMIT", "BEGIN"])
def test_who_dies_while_he_makes_a_store_has_lost_nothing(path: Path, before: str) -> None:
    run_and_die(
        path,
        f"store = t.SqliteStore(path); store._db.set_trace_callback(lambda sql: {before!r} in sql and die());"
        "t.made(store)",
    )
    with closing(SqliteStore(path)) as store:
        assert store.meta() is None
        assert not store.had_data
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
    with closing(SqliteStore(path, read_only=True)) as looker:
        assert looker.contents() == store.contents()
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
    with closing(SqliteStore(path)) as store:
        assert store.incarnation()
        assert not store.had_data
        store.initialise(META)
        assert not is_as_it_was(store)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("move", ["copied into place", "moved into place"])
@pytest.mark.parametrize("commits", [1, 1500])
def test_an_older_copy_is_not_what_it_was(path: Path, *, killed: bool, move: str, commits: int) -> None:
    use(path, 3)
    backup = path.with_name("backup.db")
    shutil.copyfile(path, backup)
    if killed:  # the log stays behind, and would be laid over the copy
        use_and_die(path, commits)
    else:
        use(path, commits)
    if move == "copied into place":
        shutil.copyfile(backup, path)
    else:
        backup.replace(path)
    # A copy whose main file is the same as before, with the whole log over it, is what it was.
    whole = killed and commits == 1
    assert is_known(path) == whole


@pytest.mark.parametrize("text", [None, "", "overwritten\n", "x 1", "\0" * 80, "é 1 2 3"])
def test_without_a_marker_that_can_be_read_nobody_knows(path: Path, text: str | None) -> None:
    use(path)
    marker = Path(f"{path}.marker")
    marker.unlink()
    if text is not None:
        marker.write_text(text)
    assert not is_known(path)
    assert not is_known(path)  # until meta says that this was seen
    opened(path).close()
    assert is_known(path)


def test_the_original_put_back_after_a_copy_was_used_is_not_what_it_was(path: Path) -> None:
    use(path)
    original = path.with_name("original.db")
    shutil.copyfile(path, original)
    path.with_name("store.db.marker").unlink()
    use(path)
    assert is_known(path)
    with closing(SqliteStore(original)) as store:
        commit(store, 9)  # it has had more commits than the copy
    original.replace(path)
    assert not is_known(path)


def test_an_empty_file_beside_a_marker_shows_that_there_was_a_store(path: Path) -> None:
    opened(path).close()
    path.unlink()
    with closing(SqliteStore(path)) as store:
        assert store.meta() is None
        assert store.had_data


# --- while it is in use ---


def test_a_file_that_was_moved_or_replaced_in_use_takes_no_more(path: Path) -> None:
    store = opened(path)
    commit(store)
    away = path.with_name("away.db")
    path.rename(away)
    meta = meta_of(store)
    for put_there in (lambda: None, path.touch, lambda: shutil.copyfile(away, path)):
        put_there()
        with pytest.raises(StoreError, match="moved or replaced while in use; put it back"):
            commit(store)
        with pytest.raises(StoreError, match="moved or replaced"):
            store.swap_meta(meta, replace(meta, version=2))
    away.replace(path)
    assert store.by_machine(1).gen == 1
    commit(store)
    store.close()
    assert is_known(path)


def test_a_file_that_was_overwritten_in_use_takes_no_more_nor_is_it_known_afterwards(path: Path) -> None:
    use(path, 3)
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
    with closing(SqliteStore(path, read_only=True)) as looker:
        assert looker.by_machine(1) == store.by_machine(1)
        assert looker.incarnation() == store.incarnation()
        with pytest.raises(StoreError, match="readonly"):
            looker.set_marks(1)
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
    back_up(path, backup)
    commit(store, 5)
    back_up(backup, path)
    for _ in range(2):
        with pytest.raises(StoreError, match="overwritten"):
            store.swap([], Mark("here", 10**6))
    store.close()
    assert not is_known(path)


def test_another_store_copied_over_the_open_one_is_noticed_however_far_it_has_come(path: Path) -> None:
    other = path.with_name("other.db")
    use(other, 50)
    store = opened(path)
    for commits in (3, 1):
        commit(store, commits)
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
