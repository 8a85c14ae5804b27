"""One SQLite file on one machine: the default store.

WAL with `synchronous=FULL`: a commit returns after fsync.  One connection, and one process: see
sqlite_file.py.  Never on NFS, whose locks can't be relied upon.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import READER, Holder, Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, Store, check_schema, outdated, traced
from zflake.stores.sqlite_file import DatabaseFile, Progress

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
    version       INTEGER NOT NULL,
    incarnation   TEXT    NOT NULL,
    moved         TEXT    NOT NULL,
    schema        INTEGER NOT NULL,
    reader        INTEGER NOT NULL
) STRICT;
CREATE TABLE life (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    commits INTEGER NOT NULL,  -- how many this file has had
    since   INTEGER NOT NULL   -- the tick from which on the spans are complete
) STRICT;
CREATE TABLE machine (
    machine       INTEGER PRIMARY KEY,
    fence         INTEGER NOT NULL,
    gen           INTEGER NOT NULL,
    token         BLOB    UNIQUE,
    start         INTEGER NOT NULL,
    tenancy_start INTEGER NOT NULL,
    span_start    INTEGER NOT NULL,
    name          TEXT    NOT NULL,
    host          TEXT    NOT NULL,
    pid           INTEGER NOT NULL,
    address       TEXT    NOT NULL
) STRICT;
CREATE TABLE mark (
    delegator TEXT    PRIMARY KEY,
    now_us    INTEGER NOT NULL,
    lead_us   INTEGER NOT NULL,
    address   TEXT    NOT NULL
) STRICT;
CREATE TABLE span (
    machine INTEGER NOT NULL,
    start   INTEGER NOT NULL,
    end     INTEGER NOT NULL,
    name    TEXT    NOT NULL,
    host    TEXT    NOT NULL,
    pid     INTEGER NOT NULL,
    address TEXT    NOT NULL,
    PRIMARY KEY (machine, start)
) STRICT, WITHOUT ROWID;
CREATE INDEX machine_by_fence ON machine (fence, machine);
CREATE INDEX span_by_end ON span (end);
INSERT INTO life VALUES (1, 0, 0);
"""

_META: Final = (
    "store_id, layout, ttl, first_machine, last_machine, floor, version, incarnation, moved, schema, reader"
)
_COLUMNS: Final = "machine, fence, gen, token, start, tenancy_start, span_start, name, host, pid, address"
_SPAN: Final = "machine, start, end, name, host, pid, address"

# The numbers first to last that have no row yet.  The walk stops at the limit.
_UNUSED: Final = """
WITH RECURSIVE number (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM number WHERE n < :last)
SELECT n FROM number WHERE NOT EXISTS (SELECT 1 FROM machine WHERE machine = n) LIMIT :limit
"""

_INSERT: Final = f"INSERT INTO machine ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)"
_UPDATE: Final = (
    "UPDATE OR IGNORE machine SET fence = ?, gen = ?, token = ?, start = ?, tenancy_start = ?, span_start = ?,"
    " name = ?, host = ?, pid = ?, address = ? WHERE machine = ? AND gen = ?"
)

# A write of unknown outcome may come after the next one: a mark never goes back by one.
_MARK: Final = (
    "INSERT INTO mark SELECT ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM meta) ON CONFLICT (delegator) DO UPDATE SET now_us = excluded.now_us,"
    " lead_us = excluded.lead_us, address = excluded.address WHERE excluded.now_us > now_us"
)

_COUNT: Final = "UPDATE life SET commits = commits + 1 RETURNING commits, (SELECT incarnation FROM meta)"

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
            "no file in the sqlite: URL: write sqlite:///relative/path or sqlite:////absolute/path,"
            " or memory: for a store that forgets"
        )
    return Path(path)


def open_url(url: str, *, read_only: bool = False) -> SqliteStore:
    """The store of a URL that `path_of` can read."""
    return SqliteStore(path_of(url), read_only=read_only)


class SqliteStore(Store):
    """Records in an SQLite file, which is made where there is none.

    Raises `StoreError` where the file can't be read or written, is corrupt, is not zflake's, is of a newer
    schema, or is in use by another process.  Such a file is left as it was.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.url = f"sqlite:///{path}"
        self._file = DatabaseFile(path, self.url)
        # By the range's first machine: from where on to look for never-used ones.  None becomes unused again.
        self._unused_from: dict[int, int] = {}
        with ExitStack() as held, self._errors():
            self._file.check_kind()
            if read_only:
                self._db = self._look_at(held)
            else:
                self._file.lock(held)
                self._db = self._open(held)
            self._held = held.pop_all()

    def meta(self) -> Meta | None:
        with self._errors():
            row = self._db.execute(f"SELECT {_META} FROM meta").fetchone()
            if row is None:
                return None
            store_id, layout, *rest = row
            schema, reader = rest[-2:]
            check_schema(self.url, schema, reader, "name a new file")
            return Meta(store_id, Layout.from_map(json.loads(layout)), *rest)

    def incarnation(self) -> str:
        return self._incarnation

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        if self.meta() is not None:
            raise StoreError(f"{self.url} is initialised already")
        # Before the commit: whoever dies in between has promised nothing yet, and the marker says as much.
        self._follow(meta)
        with self._transaction():
            self._db.execute(
                f"INSERT INTO meta (one, {_META})"
                " VALUES (1, :store_id, :layout, :ttl, :first, :last, :floor, :version, :incarnation, :moved,"
                " :schema, :reader)",
                _values(meta),
            )
            self._db.executemany(_INSERT, map(_row, contents.records))
            spans = ((s.machine, s.start, s.end, *_person(s.holder)) for s in contents.spans)
            self._db.executemany(f"INSERT INTO span ({_SPAN}) VALUES (?,?,?,?,?,?,?)", spans)
            self._db.execute("UPDATE life SET since = ?", (contents.since,))
            self._db.executemany("INSERT INTO mark VALUES (?, ?, ?, ?)", map(astuple, contents.marks))

    def contents(self) -> Contents:
        with self._errors():
            records = self._db.execute(f"SELECT {_COLUMNS} FROM machine ORDER BY machine")
            spans = self._db.execute(f"SELECT {_SPAN} FROM span ORDER BY machine, start")
            (since,) = self._db.execute("SELECT since FROM life").fetchone()
            return Contents([*map(_record, records)], [*map(_span, spans)], since, self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        with self._transaction():
            cursor = self._db.execute(
                "UPDATE meta SET layout = :layout, ttl = :ttl, first_machine = :first, last_machine = :last,"
                " floor = :floor, version = :version, incarnation = :incarnation, moved = :moved,"
                " schema = :schema, reader = :reader"
                " WHERE version = :old_version AND store_id = :old_store_id",
                _values(new) | {"old_version": old.version, "old_store_id": old.store_id},
            )
            self._db.execute(f"PRAGMA user_version = {new.reader}")
        if cursor.rowcount == 1:
            self._follow(new)
        return cursor.rowcount == 1

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        return [self._one("machine = ?", machine) or Record(machine) for machine in machines]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        return [self._one("token = ?", token) for token in tokens]

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
            rows = self._db.execute("SELECT delegator, now_us, lead_us, address FROM mark ORDER BY delegator")
            return [Mark(*row) for row in rows]

    def forget_marks(self, before_us: int) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM mark WHERE now_us < ?", (before_us,))

    def set_marks(self, now_us: int) -> None:
        with self._transaction():
            self._db.execute("UPDATE mark SET now_us = ?", (now_us,))

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        with self._transaction():
            if mark is not None:
                self._db.execute(_MARK, astuple(mark))
            (version,) = self._db.execute("SELECT version FROM meta").fetchone() or (None,)
            return [swap.version == version and self._swap(swap.new) for swap in swaps]

    def trace(self, machine: int, tick: int) -> Traced:
        with self._errors():
            (since,) = self._db.execute("SELECT since FROM life").fetchone()
            row = self._db.execute(
                f"SELECT {_SPAN} FROM span WHERE machine = ? AND start <= ? ORDER BY start DESC LIMIT 1",
                (machine, tick),
            ).fetchone()
        return traced(None if row is None else _span(row), tick, since)

    def prune(self, before: int, keep: int, limit: int) -> int:
        with self._errors():
            (count,) = self._db.execute("SELECT COUNT(*) FROM span").fetchone()
            oldest = self._db.execute(
                "SELECT machine, start, end FROM span ORDER BY end LIMIT ?", (limit,)
            ).fetchall()
        forgotten = oldest[: outdated([end for _, _, end in oldest], count, before, keep)]
        if forgotten:
            with self._transaction():
                keys = ((machine, start) for machine, start, _ in forgotten)
                self._db.executemany("DELETE FROM span WHERE machine = ? AND start = ?", keys)
                self._db.execute("UPDATE life SET since = max(since, ?)", (forgotten[-1][2],))
        return len(forgotten)

    def close(self) -> None:
        with self._errors():
            self._held.close()

    def _check_commits(self) -> None:
        """Raise `StoreError` where there are fewer commits than there were: SQLite's own restore goes by the log."""
        row = self._db.execute("SELECT commits, (SELECT incarnation FROM meta) FROM life").fetchone()
        # More there may be: a COMMIT that failed may have happened.
        if row is None or row[0] < self._commits or row[1] != self._met:
            raise self._file.renounced()

    def _swap(self, new: Record) -> bool:
        if new.gen == 1:
            done = self._db.execute(f"{_INSERT} ON CONFLICT DO NOTHING", _row(new))
        else:
            done = self._db.execute(_UPDATE, (*_row(new)[1:], new.machine, new.gen - 1))
        if done.rowcount == 1:
            self._note(new)
        return done.rowcount == 1

    def _note(self, new: Record) -> None:
        if new.token is not None:
            self._db.execute(
                f"INSERT OR REPLACE INTO span ({_SPAN}) VALUES (?,?,?,?,?,?,?)",
                (new.machine, new.span_start, new.fence, *_person(new.holder)),
            )
            return
        self._db.execute(
            "UPDATE span SET end = :fence WHERE machine = :machine AND end > :fence AND start < :fence",
            {"machine": new.machine, "fence": new.fence},
        )
        self._db.execute("DELETE FROM span WHERE machine = ? AND start >= ?", (new.machine, new.fence))

    def _one(self, where: str, value: object) -> Record | None:
        with self._errors():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM machine WHERE {where}", (value,)).fetchone()
        return None if row is None else _record(row)

    # --- opening ---

    def _open(self, held: ExitStack) -> sqlite3.Connection:
        marker = self._file.read_marker()  # before SQLite lays an old log over a main file put here since
        db = sqlite3.connect(self._file.path, isolation_level=None, timeout=0, check_same_thread=False)
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
        db.execute(f"PRAGMA user_version = {READER}")
        db.execute("ROLLBACK")
        self._file.opened()
        self._recall(db, marker)
        if marker is not None and self._incarnation == marker.incarnation:
            self._file.begin_marker(held, self._incarnation, self._commits)
        return db

    def _look_at(self, held: ExitStack) -> sqlite3.Connection:
        marker = self._file.read_marker()
        db = sqlite3.connect(f"{self._file.uri}?mode=ro", uri=True, isolation_level=None)
        held.callback(db.close)
        if not self._recognise(db):
            raise StoreError(f"{self.url} is empty")
        self._file.opened()
        self._recall(db, marker)
        return db

    def _recall(self, db: sqlite3.Connection, marker: Progress | None) -> None:
        """Judge by the marker whether the file is what it was."""
        (self._commits,) = db.execute("SELECT commits FROM life").fetchone()
        (incarnation,) = db.execute("SELECT incarnation FROM meta").fetchone() or (None,)
        self._met: str | None = incarnation  # what meta says
        self.had_data = marker is not None and marker.commits > 0
        if marker is not None and marker.incarnation == incarnation and marker.commits <= self._commits:
            self._incarnation = marker.incarnation
        else:
            # Another life: the marker begins when meta says that it is known.
            self._incarnation = secrets.token_hex(16)

    def _follow(self, meta: Meta) -> None:
        if meta.incarnation == self._incarnation:
            self._file.begin_marker(self._held, self._incarnation, self._commits)

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
        check_schema(self.url, schema, schema, "name a new file")
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
        with self._errors():
            incarnation = self._met or self._incarnation
            self._file.check(incarnation)
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._check_commits()
                yield
                came_to = self._db.execute(_COUNT).fetchone()
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._commits, self._met = came_to
            self._file.write_marker(self._incarnation, self._commits)


def _create(db: sqlite3.Connection) -> None:
    db.execute("BEGIN EXCLUSIVE")
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {READER}")
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
        "incarnation": meta.incarnation,
        "moved": meta.moved,
        "schema": meta.schema,
        "reader": meta.reader,
    }


def _row(record: Record) -> tuple[Any, ...]:
    numbers = (record.machine, record.fence, record.gen, record.token)
    return (*numbers, record.start, record.tenancy_start, record.span_start, *_person(record.holder))


def _record(row: tuple[Any, ...]) -> Record:
    machine, fence, gen, token, start, tenancy_start, span_start, *person = row
    return Record(machine, fence, gen, token, start, tenancy_start, Holder(*person), span_start)


def _span(row: tuple[Any, ...]) -> Span:
    machine, start, end, *person = row
    return Span(machine, start, end, Holder(*person))


def _person(holder: Holder) -> tuple[str, str, int, str]:
    return holder.name, holder.host, holder.pid, holder.address
