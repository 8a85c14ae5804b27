"""A PostgreSQL database, in a schema of its own: for teams that run one already.

A commit returns once it is in the log on disk (`synchronous_commit=on`, `fsync=on`), so a crash loses nothing.
A standby that was promoted, and a database restored to a point in time, may lack the last commits: they are on
another timeline of PostgreSQL's.  A dump that was loaded again was written by another transaction of that
timeline, or is another database.  All of these together are the incarnation.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from zflake.core.lease import READER, SCHEMA, Meta, Record, Swap
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import batched, check_schema
from zflake.stores.rows import COLUMNS, RECORD, TABLES, RowStore, Values, record_of
from zflake.stores.text import holder_from_text, holder_to_text
from zflake.stores.url import parse_url

try:
    import psycopg
    from psycopg import errors, sql
except ImportError as error:
    raise ConfigError("postgresql:// needs the psycopg package: pip install 'zflake[postgresql]'") from error

TIMEOUT_S: Final = 2
"""Seconds to wait for a connection, a statement, and the next statement of a transaction."""
ROWS_AT_ONCE: Final = 1000
"""Rows in a round trip."""
FORM: Final = "postgresql://[user[:password]@]host[:port]/database[?schema=zflake&sslmode=...]"
# A delegator that dies in a transaction must not keep its locks.  (Nor may a transaction use psycopg's pipeline:
# after that the time-out does not run.)
SETTINGS: Final = {
    "synchronous_commit": "on",
    "statement_timeout": f"{TIMEOUT_S}s",
    "idle_in_transaction_session_timeout": f"{TIMEOUT_S}s",
    "tcp_keepalives_idle": TIMEOUT_S,
    "tcp_keepalives_interval": 1,
    "tcp_keepalives_count": 3,
}
MIN_VERSION: Final = 120_000

T = TypeVar("T")

_TABLES: Final = (
    TABLES.format(number="bigint", text="text", bytes="bytea", options="", by_key="")
    + """
CREATE TABLE life (one int PRIMARY KEY);
INSERT INTO life VALUES (1);
"""
)
# The transaction that wrote the row which is never written again.
_LIFE: Final = "(SELECT xmin::text FROM life)"
_DURABLE: Final = {"fsync", "full_page_writes", "synchronous_commit"}
_NEEDED: Final = {
    (table, name) for table, names in (COLUMNS | {"life": "one"}).items() for name in names.split(", ")
}
_PARAMETER: Final = re.compile(r"(?<!:):(\w+)")
_KEYS: Final = {"machine": ("machine",), "span": ("machine", "start")}


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that is given up if the server does not answer in time.

    The server's own time-out does not run while its process, or its machine, stands still.
    """

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """As psycopg's, for `TIMEOUT_S` at most."""
        return super().wait(self._in_time(gen), *args, **kwargs)

    def _in_time(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        until = time.monotonic() + TIMEOUT_S
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > until:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer within {TIMEOUT_S} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


class PostgresqlStore(RowStore):
    """Records in tables: `postgresql://[user[:password]@]host[:port]/database[?schema=zflake&...]`.

    Other parameters go to libpq.  A server that answers before its log is on disk is refused, unless the URL
    says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` if the server can't be used.
    """

    exclusive = False
    advice = "name another ?schema="

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url)
        super().__init__(where.name)
        self._unchecked = where.flag("unchecked") or read_only
        self._schema = where.options.get("schema", "zflake")
        others = {name: value for name, value in where.options.items() if name not in ("schema", "unchecked")}
        self._where = url.partition("?")[0] + ("?" + urlencode(others, quote_via=quote) if others else "")
        try:
            named = psycopg.conninfo.conninfo_to_dict(self._where)
        except psycopg.ProgrammingError as error:
            raise ConfigError(f"{self.url}: an option that PostgreSQL does not know; write {FORM}") from error
        if not named.get("dbname"):
            raise ConfigError(f"{self.url}: write {FORM}")
        if taken := {"connect_timeout", "options"}.intersection(others):
            raise ConfigError(f"{self.url}: zflake sets {', '.join(sorted(taken))} by itself")
        self._connection: Connection | None = None
        self._server = ""
        try:
            with self._errors():
                prepare = self._convert if self._check_data() else self._create
                if not read_only:
                    prepare()
            self.meta()
        except BaseException:
            self.close()
            raise

    def meta(self) -> Meta | None:
        try:
            return super().meta()
        except StoreError as error:
            if isinstance(error.__cause__, errors.UndefinedTable):
                return None  # it was only looked at, or the tables were dropped since
            raise

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        (life,) = self._rows(itemgetter(0), f"SELECT {_LIFE}")
        return f"{self._server}/{life}"

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    # --- rows ---

    def _run(self, text: str, values: Values | None = None) -> psycopg.Cursor[tuple[Any, ...]]:
        return self._db.execute(_translated(text), values)

    def _run_many(self, text: str, rows: Iterable[Values]) -> None:
        cursor = self._db.cursor()
        for some in batched(rows, ROWS_AT_ONCE):
            cursor.executemany(_translated(text), some)

    def _stream(self, text: str, make: Callable[[Any], T]) -> list[T]:
        # No wait is for more than `ROWS_AT_ONCE` rows.
        with self._transaction(), self._db.cursor(name="stream") as cursor:
            cursor.itersize = ROWS_AT_ONCE
            cursor.execute(text)
            return [make(row) for row in cursor]

    def _records_by(self, column: str, values: Sequence[Any]) -> list[Record]:
        text = f"SELECT {RECORD} FROM machine WHERE {column} = ANY(:wanted)"
        return self._rows(record_of, text, wanted=list(values)) if values else []

    def _current_version(self) -> int | None:
        row = self._run(f"SELECT version, incarnation, {_LIFE} FROM meta FOR SHARE").fetchone()
        version, incarnation, life = row or (None, None, None)
        return version if incarnation == f"{self._server}/{life}" else None

    def _run_in_turn(self, first: str, others: Sequence[str], values: Values) -> bool:
        # In one round trip.
        then = "".join(
            f", then{place} AS ({text.format(done='EXISTS (SELECT 1 FROM done)')})"
            for place, text in enumerate(others)
        )
        done = self._run(f"WITH done AS ({first} RETURNING machine){then} SELECT machine FROM done", values)
        return done.rowcount == 1

    def _in_order(self, swaps: Sequence[Swap]) -> Iterable[tuple[int, Swap]]:
        # The order is by machine, so that two delegators never wait for each other in a circle.
        return sorted(enumerate(swaps), key=lambda placed: placed[1].new.machine)

    # --- the connection ---

    @property
    def _db(self) -> Connection:
        """The connection; a new one if there is none (any more)."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> Connection:
        db = Connection.connect(
            self._where,
            autocommit=True,
            connect_timeout=TIMEOUT_S,
            keepalives_idle=TIMEOUT_S,
            keepalives_interval=1,
            keepalives_count=3,
            prepare_threshold=None,  # a pool in between may give each transaction another server process
            options=" ".join(f"-c {name}={value}" for name, value in SETTINGS.items()),
        )
        try:
            self._check_server(db)
            row = db.execute(
                "SELECT system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8), oid"
                " FROM pg_control_system(), pg_database WHERE datname = current_database()"
            ).fetchone()
            self._server = "/".join(map(str, row or ()))
            db.execute(sql.SQL("SET search_path TO {}").format(sql.Identifier(self._schema)))
        except BaseException:
            db.close()
            raise
        return db

    def _check_server(self, db: Connection) -> None:
        if db.info.server_version < MIN_VERSION:
            raise StoreError(f"{self.url} is PostgreSQL {db.info.server_version // 10_000}; 12 is the oldest")
        (standby,) = db.execute("SELECT pg_is_in_recovery()").fetchone() or (True,)
        if standby:
            raise StoreError(f"{self.url} is a standby: name the primary")
        if self._unchecked:
            return
        on = db.execute("SELECT name FROM pg_settings WHERE setting = 'on'").fetchall()
        if wrong := _DURABLE - {name for (name,) in on}:
            names = ", ".join(sorted(wrong))
            raise StoreError(
                f"{self.url} can lose what it has promised, and with that give IDs twice: turn {names} on;"
                " or take the risk with ?unchecked=yes in the URL"
            )

    def _check_data(self) -> bool:
        """Whether the tables are there; `StoreError` if something else is in their place."""
        rows = self._db.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = %s",
            (self._schema,),
        ).fetchall()
        if not rows:
            return False
        if not _NEEDED.issubset(rows):
            raise self._foreign()
        return True

    def _create(self) -> None:
        db = self._db
        with db.transaction():
            # Two delegators may be the first at once.
            db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"zflake {self._schema}",))
            if not self._check_data():
                db.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
                db.execute(_TABLES)

    def _convert(self) -> None:
        """Bring the tables to this schema; that can be broken off anywhere, and done by several at once.

        The meta says first that older delegators may not use the store.  From then on no delegator writes a
        record, until the meta says that all is converted.
        """
        row = self._run("SELECT schema, reader FROM meta").fetchone()
        if row is None or row[0] >= SCHEMA:
            return
        schema, reader = row
        check_schema(self.url, schema, reader, self.advice)
        raised = "UPDATE meta SET {column} = :new, version = version + 1 WHERE {column} < :new"
        self._run(raised.format(column="reader"), {"new": READER})
        for table, key in _KEYS.items():
            after = (-1,) * len(key)
            while after := self._convert_some(table, key, after):
                pass
        self._run(raised.format(column="schema"), {"new": SCHEMA})

    def _convert_some(self, table: str, key: Sequence[str], after: tuple[int, ...]) -> tuple[int, ...]:
        """Convert some rows of a table, behind the key `after`; gives the last one's key, () if there was none."""
        columns, bounds = ", ".join(key), ", ".join(map(str, after))
        text = (
            f"SELECT {columns}, holder FROM {table} WHERE ({columns}) > ({bounds}) ORDER BY {columns}"
            f" LIMIT {ROWS_AT_ONCE} FOR UPDATE"
        )
        where = " AND ".join(f"{column} = :{column}" for column in key)
        with self._transaction():
            # The order is by key, so that two delegators never wait for each other in a circle.
            rows = self._run(text).fetchall()
            values = [
                dict(zip((*key, "holder"), (*at, holder_to_text(holder_from_text(holder))), strict=True))
                for *at, holder in rows
            ]
            self._run_many(f"UPDATE {table} SET holder = :holder WHERE {where}", values)
        return tuple(rows[-1][:-1]) if rows else ()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors(), self._db.transaction():
            yield

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with self._reading():
            try:
                yield
            except (psycopg.Error, OSError) as error:
                if self._connection is not None and self._connection.broken:
                    self._connection = None
                reason = " ".join(str(error).split())
                if self._connection is None and isinstance(error, psycopg.OperationalError):
                    raise StoreError(f"can't reach {self.url}: {reason}") from error
                raise StoreError(f"{self.url}: {reason}") from error


@cache
def _translated(text: str) -> str:
    """A statement with psycopg's parameters."""
    return _PARAMETER.sub(r"%(\1)s", text)


open_url = PostgresqlStore
