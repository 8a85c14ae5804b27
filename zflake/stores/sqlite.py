"""One SQLite file on one machine: the default store.

WAL with `synchronous=FULL`: a commit returns after fsync.  One connection, and one process: see
sqlite_file.py.  Never on NFS, whose locks can't be relied upon.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from zflake.core.lease import READER, SCHEMA, Holder, Meta, Record
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, check_current, check_schema
from zflake.stores.rows import MARK, META_COLUMNS, RECORD, TABLES, RowStore, Values, record_of
from zflake.stores.sqlite_file import DatabaseFile, Progress
from zflake.stores.text import holder_to_text

APPLICATION_ID: Final = 0x7A666C6B  # "zflk", in the header of the file

_TABLES: Final = (
    TABLES.format(number="INTEGER", text="TEXT", bytes="BLOB", options=" STRICT", by_key=", WITHOUT ROWID")
    + """
CREATE TABLE life (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    commits INTEGER NOT NULL  -- how many this file has had
) STRICT;
INSERT INTO life VALUES (1, 0);
"""
)
_CREATE: Final = f"{_TABLES} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {READER};"
_TABLES_3: Final = ("meta", "machine", "span", "mark", "life")
# These bring schema 3 to this one: `holder()` makes the JSON object into what four columns are now.  The commits stay as many as they were:
# they are still to be compared with the marker.
_CONVERT: Final = f"""
{"".join(f"ALTER TABLE {table} RENAME TO old_{table};" for table in _TABLES_3)}
DROP INDEX machine_by_fence;
DROP INDEX span_by_end;
{_TABLES}
INSERT INTO meta SELECT one, {META_COLUMNS}, (SELECT since FROM old_life) FROM old_meta;
INSERT INTO machine
    SELECT machine, fence, gen, token, start, tenancy_start, span_start, holder(name, host, pid, address)
    FROM old_machine;
INSERT INTO span SELECT machine, start, end, holder(name, host, pid, address) FROM old_span;
INSERT INTO mark SELECT {MARK} FROM old_mark;
UPDATE life SET commits = (SELECT commits FROM old_life);
UPDATE meta SET schema = {SCHEMA}, reader = {READER}, version = version + 1;
{"".join(f"DROP TABLE old_{table};" for table in _TABLES_3)}
PRAGMA user_version = {READER};
"""

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


class SqliteStore(RowStore):
    """Records in an SQLite file, which is made if there is none.

    Raises `StoreError` if the file can't be read or written, is corrupt, is not zflake's, is of a newer
    schema, or is in use by another process.  Such a file is left as it was.
    """

    advice = "name a new file"

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(f"sqlite:///{path}")
        self._file = DatabaseFile(path, self.url)
        with ExitStack() as held, self._errors():
            self._file.check_kind()
            if not read_only:
                self._file.lock(held)
            marker = self._file.read_marker()  # before SQLite lays an old log over a main file put here since
            self._db = self._look_at(held) if read_only else self._open(held)
            self._file.opened()
            self._recall(marker)
            if not read_only and marker is not None and self._incarnation == marker.incarnation:
                self._file.begin_marker(held, self._incarnation, self._commits)
            self._held = held.pop_all()

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        return self._incarnation

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        if self.meta() is None:
            # Before the commit: a process that dies in between has promised nothing yet, and the marker says as
            # much.
            self._follow(meta)
        super().initialise(meta, contents)

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        swapped = super().swap_meta(old, new)
        if swapped:
            self._follow(new)
        return swapped

    def close(self) -> None:
        with self._errors():
            self._held.close()

    def _check_commits(self) -> None:
        """Raise `StoreError` if there are fewer commits than there were: SQLite's own restore goes by the log."""
        row = self._db.execute("SELECT commits, (SELECT incarnation FROM meta) FROM life").fetchone()
        # More there may be: a COMMIT that failed may have happened.
        if row is None or row[0] < self._commits or row[1] != self._met:
            raise self._file.renounced()

    # --- rows ---

    def _run(self, text: str, values: Values | None = None) -> sqlite3.Cursor:
        return self._db.execute(text, values or {})

    def _run_many(self, text: str, rows: Iterable[Values]) -> None:
        self._db.executemany(text, rows)

    def _records_by(self, column: str, values: Sequence[Any]) -> list[Record]:
        text = f"SELECT {RECORD} FROM machine WHERE {column} = :value"
        with self._errors():
            return [record_of(row) for value in values for row in self._run(text, {"value": value})]

    def _current_version(self) -> int | None:
        (version,) = self._run("SELECT version FROM meta").fetchone() or (None,)
        return version

    def _run_in_turn(self, first: str, others: Sequence[str], values: Values) -> bool:
        done = self._run(first, values).rowcount == 1
        if done:
            for text in others:
                self._run(text.format(done="true"), values)
        return done

    def _meta_written(self, meta: Meta) -> None:
        self._run(f"PRAGMA user_version = {meta.reader}")

    # --- opening ---

    def _open(self, held: ExitStack) -> sqlite3.Connection:
        self._file.create()
        db = sqlite3.connect(self._file.path, isolation_level=None, timeout=0, check_same_thread=False)
        held.callback(db.close)
        schema = self._recognise(db)
        self._file.close_to_others()
        if not schema:
            _run_all(db, _CREATE)
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
        if schema and schema < SCHEMA:
            _convert(db)
        return db

    def _look_at(self, held: ExitStack) -> sqlite3.Connection:
        db = sqlite3.connect(f"{self._file.uri}?mode=ro", uri=True, isolation_level=None)
        held.callback(db.close)
        if not (schema := self._recognise(db)):
            raise StoreError(f"{self.url} is empty")
        check_current(self.url, schema)
        return db

    def _recall(self, marker: Progress | None) -> None:
        """Judge by the marker whether the file is what it was."""
        (self._commits,) = self._db.execute("SELECT commits FROM life").fetchone()
        (incarnation,) = self._db.execute("SELECT incarnation FROM meta").fetchone() or (None,)
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

    def _recognise(self, db: sqlite3.Connection) -> int:
        """The schema of a file that is zflake's and sound; 0 if it is empty, `StoreError` otherwise."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master WHERE sql IS NOT NULL").fetchone()
        if application == tables == 0:
            return 0
        if application != APPLICATION_ID:
            raise StoreError(
                f"{self.url} is an SQLite file of another program; nothing was changed; name another file"
            )
        schema: int
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        check_schema(self.url, schema, schema, self.advice)
        (check,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if check == "ok" and tables < _TABLES.count("CREATE"):
            check = "tables are missing"
        if check != "ok":
            reason = " ".join(check.split())  # SQLite's has several lines
            raise StoreError(f"{self.url} is corrupt ({reason}); {_ADVICE[sqlite3.SQLITE_CORRUPT]}")
        return schema

    # --- errors and transactions ---

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # The low byte is the kind of error, the rest its variety; misuse of the module has neither.
            advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise StoreError(f"{self.url}: {error}" + (f"; {advice}" if advice else "")) from error
        except (OSError, OverflowError, LookupError, TypeError, ValueError) as error:
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


def _convert(db: sqlite3.Connection) -> None:
    """Bring a file of schema 3 to this one."""
    db.create_function("holder", 4, lambda *parts: holder_to_text(Holder(*parts)))
    _run_all(db, _CONVERT)


def _run_all(db: sqlite3.Connection, statements: str) -> None:
    """Run the statements in one transaction."""
    db.execute("BEGIN EXCLUSIVE")
    for statement in statements.split(";"):
        db.execute(statement)
    db.execute("COMMIT")
