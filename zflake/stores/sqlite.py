"""One SQLite file on one machine: the default store.

WAL with `synchronous=FULL`: a commit returns after fsync.  One connection, and a lock file beside the
database, held for as long as the process lives, so that a second delegator on the same file is refused
and not merely serialised.  The lock file is never removed: whoever had opened it before would lock a file
that nobody else finds.  Never on NFS, whose locks can't be relied upon.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import SCHEMA, Holder, Mark, Meta, Record, Swap, Token
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
CREATE TABLE mark (
    delegator TEXT    PRIMARY KEY,
    now_us    INTEGER NOT NULL
) STRICT;
CREATE INDEX machine_by_fence ON machine (fence, machine);
"""

_META: Final = "store_id, layout, ttl, first_machine, last_machine, floor, version"
_COLUMNS: Final = "machine, fence, gen, token, start, tenancy_start, name, host, pid, address"

# The numbers first to last that have no row yet.  The walk stops at the limit.
_UNUSED: Final = """
WITH RECURSIVE number (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM number WHERE n < :last)
SELECT n FROM number WHERE NOT EXISTS (SELECT 1 FROM machine WHERE machine = n) LIMIT :limit
"""

_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: "close the other program that has it open",
    sqlite3.SQLITE_CANTOPEN: "let this user read and write the file and its folder",
    sqlite3.SQLITE_CORRUPT: "nothing was changed; restore a copy, or name a new file",
    sqlite3.SQLITE_FULL: "make room on the disk",
    sqlite3.SQLITE_IOERR: "look at the disk",
    sqlite3.SQLITE_NOTADB: "nothing was changed; restore a copy, or name a new file",
    sqlite3.SQLITE_READONLY: "let this user write the file and its folder",
}


def path_of(url: str) -> Path:
    """The file of `sqlite:///relative/path` or `sqlite:////absolute/path`.

    Raises `ConfigError` for any other form.
    """
    prefix = "sqlite:///"
    path = url.removeprefix(prefix)
    if not url.startswith(prefix) or path in {"", ":memory:"} or path.endswith("/") or "\0" in path:
        raise ConfigError(
            f"no file in {url!r}: write sqlite:///relative/path or sqlite:////absolute/path,"
            " or memory: for a store that forgets"
        )
    return Path(path)


class SqliteStore(Store):
    """Records in an SQLite file, which is made where there is none.

    Raises `StoreError` where the file can't be read or written, is corrupt, is not zflake's, is of a newer
    schema, or is in use by another process.  Such a file is left as it was.
    """

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:///{path}"
        # Links resolved, so that one file has one lock; absolute, so that no name means more to SQLite.
        self._path = Path(os.path.realpath(path))
        # By the range's first machine: from where on to look for never-used ones.  None becomes unused again.
        self._unused_from: dict[int, int] = {}
        with ExitStack() as held:
            self._take_lock(held)
            self._db = self._open(held)
            self._held = held.pop_all()

    def meta(self) -> Meta | None:
        with self._errors():
            row = self._db.execute(f"SELECT {_META} FROM meta").fetchone()
            if row is None:
                return None
            store_id, layout, *numbers = row
            return Meta(store_id, Layout.from_map(json.loads(layout)), *numbers)

    def initialise(self, meta: Meta) -> None:
        with self._transaction():
            if self._db.execute("SELECT 1 FROM meta").fetchone() is not None:
                raise StoreError(f"{self.url} is initialised already")
            self._db.execute(
                f"INSERT INTO meta (one, {_META})"
                " VALUES (1, :store_id, :layout, :ttl, :first, :last, :floor, :version)",
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
            begin = self._unused_from.get(first, first)
            bounds = {"first": begin, "last": last, "limit": limit}
            unused = [n for (n,) in self._db.execute(_UNUSED, bounds) if n <= last]
            if limit > 0:
                self._unused_from[first] = unused[0] if unused else max(begin, last + 1)
            # Left to itself, SQLite takes the range by machine and sorts all of it.
            used = self._db.execute(
                f"SELECT {_COLUMNS} FROM machine INDEXED BY machine_by_fence WHERE machine BETWEEN ? AND ?"
                " ORDER BY fence, machine LIMIT ?",
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

    def marks(self) -> Sequence[Mark]:
        with self._errors():
            rows = self._db.execute("SELECT delegator, now_us FROM mark ORDER BY delegator")
            return [Mark(delegator, now_us) for delegator, now_us in rows]

    def set_marks(self, now_us: int) -> None:
        with self._transaction():
            self._db.execute("UPDATE mark SET now_us = ?", (now_us,))

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        with self._transaction():
            if mark is not None:
                sql = "INSERT INTO mark VALUES (?, ?) ON CONFLICT (delegator) DO UPDATE SET now_us = excluded.now_us"
                self._db.execute(sql, (mark.delegator, mark.now_us))
            (version,) = self._db.execute("SELECT version FROM meta").fetchone() or (None,)
            return [swap.version == version and self._swap(swap.new) for swap in swaps]

    def close(self) -> None:
        with self._errors():
            self._held.close()

    def _swap(self, new: Record) -> bool:
        held = new.holder
        row = (new.fence, new.gen, new.token, new.start, new.tenancy_start)
        person = (held.name, held.host, held.pid, held.address)
        if new.gen == 1:
            sql = f"INSERT INTO machine ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO NOTHING"
            return self._db.execute(sql, (new.machine, *row, *person)).rowcount == 1
        sql = (
            "UPDATE OR IGNORE machine SET fence = ?, gen = ?, token = ?, start = ?, tenancy_start = ?,"
            " name = ?, host = ?, pid = ?, address = ? WHERE machine = ? AND gen = ?"
        )
        return self._db.execute(sql, (*row, *person, new.machine, new.gen - 1)).rowcount == 1

    def _one(self, where: str, value: object) -> Record | None:
        with self._errors():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM machine WHERE {where}", (value,)).fetchone()
        return None if row is None else _record(row)

    # --- opening ---

    def _take_lock(self, held: ExitStack) -> None:
        path = Path(f"{self._path}.lock")
        try:
            if self._path.is_dir():
                raise StoreError(f"{self.url} is a folder; name a file in it")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.url}: there is no folder {path.parent}; make it first"
                " (an absolute path takes four slashes: sqlite:////path)"
            ) from error
        except BlockingIOError as error:
            pid = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(
                f"{self.url} is in use by another delegator (pid {pid}); stop that one or name another file"
            ) from error
        except OSError as error:
            raise StoreError(f"{self.url}: can't write and lock {path}: {error.strerror}") from error

    def _open(self, held: ExitStack) -> sqlite3.Connection:
        with self._errors():
            db = sqlite3.connect(self._path, isolation_level=None, timeout=0, check_same_thread=False)
            held.callback(db.close)
            if not self._recognise(db):
                _create(db)
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(f"{self.url}: no write-ahead log on this file system; take a local disk")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA fullfsync = ON")  # macOS: fsync() alone does not reach the disk there
            # Another process may have the file open and yet hold another lock file: by a hard link, or
            # since the lock file was removed.  The read comes first: a log first read in exclusive mode
            # stays so, and then a forked child that merely exits would remove it.
            db.execute("SELECT 1 FROM meta").fetchone()
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN IMMEDIATE")
            db.execute("PRAGMA locking_mode = NORMAL")
            # A read-only file or disk shows at a write, not at BEGIN, and here, not at the first grant.
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.execute("ROLLBACK")
            self._file = self._path.stat()
        return db

    def _recognise(self, db: sqlite3.Connection) -> bool:
        """Whether the file is zflake's and sound; False where it is empty, `StoreError` otherwise."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master WHERE sql IS NOT NULL").fetchone()
        if application == tables == 0:
            return False
        if application != APPLICATION_ID:
            raise StoreError(
                f"{self.url} is an SQLite file of another program; nothing was changed; name another file"
            )
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA:
            raise StoreError(
                f"{self.url} has schema {schema}, this zflake reads schema {SCHEMA}; upgrade zflake"
            )
        (check,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if check == "ok" and tables < _SCHEMA.count("CREATE"):
            check = "tables are missing"
        if check != "ok":
            reason = " ".join(check.split())  # SQLite's has several lines
            raise StoreError(f"{self.url} is corrupt ({reason}); {_ADVICE[sqlite3.SQLITE_CORRUPT]}")
        return True

    # --- errors and transactions ---

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # The low byte is the kind of error, the rest its variety; misuse of the module has neither.
            advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise StoreError(f"{self.url}: {error}" + (f"; {advice}" if advice else "")) from error
        except (OSError, OverflowError, ValueError) as error:
            raise StoreError(f"{self.url}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self._in_place():
            raise StoreError(
                f"{self.url} was moved or replaced while in use; put it back, or stop this process first"
            )
        with self._errors():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _in_place(self) -> bool:
        """Whether the path still names the open file: whoever opens the path next must find what we write."""
        try:
            return os.path.samestat(self._path.stat(), self._file)
        except OSError:
            return False


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
