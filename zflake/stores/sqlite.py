"""One SQLite file on one machine: the default store.

WAL with `synchronous=FULL`: a commit returns after fsync.  One connection, and a lock file beside the
database, held for as long as the process lives, so that a second delegator on the same file is refused
and not merely serialised.  Never on NFS, whose locks can't be relied upon.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import SCHEMA, Holder, Meta, Record, Swap, Token
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Store

APPLICATION_ID: Final = 0x7A666C6B  # "zflk", in the header of the file

_SCHEMA: Final = """
CREATE TABLE meta (
    one           INTEGER PRIMARY KEY CHECK (one = 1),
    store_id      TEXT    NOT NULL,
    layout        TEXT    NOT NULL,
    ttl           INTEGER NOT NULL,
    first_machine INTEGER NOT NULL,
    last_machine  INTEGER NOT NULL,
    floor         INTEGER NOT NULL,
    version       INTEGER NOT NULL
) STRICT;
CREATE TABLE machine (
    machine       INTEGER PRIMARY KEY,
    fence         INTEGER NOT NULL,
    gen           INTEGER NOT NULL,
    token         BLOB    UNIQUE,
    start         INTEGER NOT NULL,
    tenancy_start INTEGER NOT NULL,
    name          TEXT    NOT NULL,
    host          TEXT    NOT NULL,
    pid           INTEGER NOT NULL,
    address       TEXT    NOT NULL
) STRICT;
CREATE INDEX machine_by_fence ON machine (fence, machine);
"""

_COLUMNS: Final = "machine, fence, gen, token, start, tenancy_start, name, host, pid, address"

# The numbers first to last that have no row yet.  The walk stops at the limit.
_UNUSED: Final = """
WITH RECURSIVE number (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM number WHERE n < :last)
SELECT n FROM number WHERE NOT EXISTS (SELECT 1 FROM machine WHERE machine = n) LIMIT :limit
"""


def path_of(url: str) -> Path:
    """The file of `sqlite:///relative/path` or `sqlite:////absolute/path`.

    Raises `ConfigError` for any other form.
    """
    prefix = "sqlite:///"
    path = url.removeprefix(prefix)
    if not url.startswith(prefix) or not path or path.endswith("/"):
        raise ConfigError(f"no file in {url!r}: write sqlite:///relative/path or sqlite:////absolute/path")
    return Path(path)


class SqliteStore(Store):
    """Records in an SQLite file, which is made where there is none.

    Raises `StoreError` where the file can't be read or written, is corrupt, is not zflake's, is of a newer
    schema, or is in use by another process.  Such a file is left as it was.
    """

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path
        if not path.parent.is_dir():
            absolute = (
                "" if path.is_absolute() else f" (an absolute path takes four slashes: sqlite:////{path})"
            )
            raise StoreError(f"{self.url}: there is no folder {path.parent}{absolute}")
        self._lock = self._take_lock()
        # By the range's first machine: from where on to look for never-used ones.  None becomes unused again.
        self._unused_from: dict[int, int] = {}
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def meta(self) -> Meta | None:
        with self._errors():
            row = self._db.execute(
                "SELECT store_id, layout, ttl, first_machine, last_machine, floor, version FROM meta"
            ).fetchone()
            if row is None:
                return None
            store_id, layout, *numbers = row
            return Meta(store_id, Layout.from_map(json.loads(layout)), *numbers)

    def initialise(self, meta: Meta) -> None:
        with self._transaction():
            if self._db.execute("SELECT 1 FROM meta").fetchone() is not None:
                raise StoreError(f"{self.url} is initialised already")
            self._db.execute(
                "INSERT INTO meta VALUES (1, :store_id, :layout, :ttl, :first, :last, :floor, :version)",
                _values(meta),
            )

    def swap_meta(self, new: Meta) -> bool:
        with self._transaction():
            cursor = self._db.execute(
                "UPDATE meta SET layout = :layout, ttl = :ttl, first_machine = :first, last_machine = :last,"
                " floor = :floor, version = :version WHERE version = :version - 1 AND store_id = :store_id",
                _values(new),
            )
            return cursor.rowcount == 1

    def by_machine(self, machine: int) -> Record:
        return self._one("machine = ?", machine) or Record(machine)

    def by_token(self, token: Token) -> Record | None:
        return self._one("token = ?", token)

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        with self._errors():
            bounds = {"first": self._unused_from.get(first, first), "last": last, "limit": limit}
            unused = [n for (n,) in self._db.execute(_UNUSED, bounds) if n <= last]
            self._unused_from[first] = unused[0] if unused else last + 1
            used = self._db.execute(
                f"SELECT {_COLUMNS} FROM machine WHERE machine BETWEEN ? AND ? ORDER BY fence, machine LIMIT ?",
                (first, last, limit - len(unused)),
            )
            return [*map(Record, unused), *map(_record, used)]

    def held(self, now: int) -> Sequence[Record]:
        with self._errors():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM machine WHERE fence > ? AND token IS NOT NULL ORDER BY machine",
                (now,),
            )
            return [_record(row) for row in rows]

    def swap(self, swaps: Sequence[Swap]) -> list[bool]:
        with self._transaction():
            (version,) = self._db.execute("SELECT version FROM meta").fetchone() or (None,)
            return [swap.version == version and self._swap(swap.new) for swap in swaps]

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    def _swap(self, new: Record) -> bool:
        held = new.holder
        row = (new.fence, new.gen, new.token, new.start, new.tenancy_start)
        person = (held.name, held.host, held.pid, held.address)
        if new.gen == 1:
            sql = f"INSERT INTO machine ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (machine) DO NOTHING"
            return self._db.execute(sql, (new.machine, *row, *person)).rowcount == 1
        sql = (
            "UPDATE machine SET fence = ?, gen = ?, token = ?, start = ?, tenancy_start = ?,"
            " name = ?, host = ?, pid = ?, address = ? WHERE machine = ? AND gen = ?"
        )
        return self._db.execute(sql, (*row, *person, new.machine, new.gen - 1)).rowcount == 1

    def _one(self, where: str, value: object) -> Record | None:
        with self._errors():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM machine WHERE {where}", (value,)).fetchone()
        return None if row is None else _record(row)

    # --- opening ---

    def _take_lock(self) -> int:
        path = self._path.with_name(self._path.name + ".lock")
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{self.url}: can't write {path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise StoreError(f"{self.url} is in use by another delegator (pid {holder})") from error
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        return lock

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=0, check_same_thread=False)
        except sqlite3.Error as error:
            raise StoreError(f"{self.url}: {error}") from error
        try:
            if not self._recognise(db):
                _create(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA fullfsync = ON")  # macOS: fsync() alone does not reach the disk there
            db.execute("BEGIN IMMEDIATE")  # a read-only file or disk shows here, not at the first grant
            db.execute("ROLLBACK")
        except sqlite3.Error as error:
            db.close()
            raise StoreError(f"{self.url}: {error}") from error
        except BaseException:
            db.close()
            raise
        return db

    def _recognise(self, db: sqlite3.Connection) -> bool:
        """Whether the file is zflake's and sound; False where it is empty, `StoreError` otherwise."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if application == tables == 0:
            return False
        if application != APPLICATION_ID:
            raise StoreError(f"{self.url} is an SQLite file of another program; nothing was changed")
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA:
            raise StoreError(
                f"{self.url} has schema {schema}, this zflake reads schema {SCHEMA}; upgrade zflake"
            )
        (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if check != "ok":
            raise StoreError(f"{self.url} is corrupt: {check}; nothing was changed")
        return True

    # --- errors and transactions ---

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise StoreError(f"{self.url}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise


def _create(db: sqlite3.Connection) -> None:
    db.execute("BEGIN EXCLUSIVE")
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.execute("COMMIT")


def _values(meta: Meta) -> dict[str, Any]:
    return {
        "store_id": meta.store_id,
        "layout": json.dumps(meta.layout.to_map()),
        "ttl": meta.ttl,
        "first": meta.first_machine,
        "last": meta.last_machine,
        "floor": meta.floor,
        "version": meta.version,
    }


def _record(row: tuple[Any, ...]) -> Record:
    machine, fence, gen, token, start, tenancy_start, *person = row
    return Record(machine, fence, gen, token, start, tenancy_start, Holder(*person))
