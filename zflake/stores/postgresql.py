"""A PostgreSQL database, in a schema of its own: for teams that run one already.

A commit returns once it is in the log on disk (`synchronous_commit=on`, `fsync=on`), so a crash loses nothing.
A standby that was promoted, and a database restored to a point in time, may lack the last commits: they are on
another timeline of PostgreSQL's.  What was dumped and loaded again was written by another transaction of it, or
is another database.  All of these together are the incarnation.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from zflake.core.layout import Layout
from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, Store, batched, check_schema, foreign, outdated, reading, traced
from zflake.stores.text import holder_from_text, holder_to_text
from zflake.stores.url import parse_url

try:
    import psycopg
    from psycopg import errors, sql
except ImportError as error:
    raise ConfigError("postgresql:// needs the psycopg package: pip install 'zflake[postgresql]'") from error

TIMEOUT_S: Final = 2
ADVICE: Final = "name another ?schema="
CHUNK: Final = 1000
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
TAKEN: Final = {"connect_timeout", "options"}
MIN_VERSION: Final = 120_000

T = TypeVar("T")

_TABLES: Final = """
CREATE TABLE meta (
    one           int    PRIMARY KEY CHECK (one = 1),
    schema        int    NOT NULL,
    reader        int    NOT NULL,
    store_id      text   NOT NULL,
    layout        text   NOT NULL,
    ttl           bigint NOT NULL,
    first_machine bigint NOT NULL,
    last_machine  bigint NOT NULL,
    floor         bigint NOT NULL,
    version       bigint NOT NULL,
    incarnation   text   NOT NULL,
    moved         text   NOT NULL,
    since         bigint NOT NULL DEFAULT 0
);
CREATE TABLE machine (
    machine       bigint PRIMARY KEY,
    fence         bigint NOT NULL,
    gen           bigint NOT NULL,
    token         bytea  UNIQUE,
    start         bigint NOT NULL,
    tenancy_start bigint NOT NULL,
    span_start    bigint NOT NULL,
    holder        text   NOT NULL
);
CREATE TABLE span (
    machine bigint NOT NULL,
    start   bigint NOT NULL,
    stop    bigint NOT NULL,
    holder  text   NOT NULL,
    PRIMARY KEY (machine, start)
);
CREATE TABLE mark (
    delegator text   PRIMARY KEY,
    now_us    bigint NOT NULL,
    lead_us   bigint NOT NULL,
    address   text   NOT NULL
);
CREATE TABLE life (one int PRIMARY KEY);
INSERT INTO life VALUES (1);
CREATE INDEX machine_by_fence ON machine (fence, machine);
CREATE INDEX span_by_stop ON span (stop);
"""
_META: Final = (
    "store_id, layout, ttl, first_machine, last_machine, floor, version, incarnation, moved, schema, reader"
)
_COLUMNS: Final = "machine, fence, gen, token, start, tenancy_start, span_start, holder"

_SPAN: Final = "machine, start, stop, holder"
_MARK: Final = "delegator, now_us, lead_us, address"
_TABLES_OF: Final = {
    "meta": f"{_META}, since",
    "machine": _COLUMNS,
    "span": _SPAN,
    "mark": _MARK,
    "life": "one",
}
# By which transaction the row was written that is never written again.
_LIFE: Final = "(SELECT xmin::text FROM life)"
_NEEDED: Final = {(table, name) for table, names in _TABLES_OF.items() for name in names.split(", ")}

_INSERT: Final = f"""
INSERT INTO machine ({_COLUMNS})
VALUES (%(machine)s, %(fence)s, %(gen)s, %(token)s, %(start)s, %(tenancy_start)s, %(span_start)s, %(holder)s)
"""
_DONE: Final = {
    True: f"{_INSERT} ON CONFLICT DO NOTHING RETURNING machine",
    False: """
UPDATE machine SET fence = %(fence)s, gen = %(gen)s, token = %(token)s, start = %(start)s,
    tenancy_start = %(tenancy_start)s, span_start = %(span_start)s, holder = %(holder)s
WHERE machine = %(machine)s AND gen = %(gen)s - 1 RETURNING machine
""",
}
_GRANT: Final = """
INSERT INTO span (machine, start, stop, holder)
SELECT machine, %(span_start)s, %(fence)s, %(holder)s FROM done
ON CONFLICT (machine, start) DO UPDATE SET stop = excluded.stop, holder = excluded.holder
"""
_RELEASE: Final = """
, cut AS (
    UPDATE span SET stop = %(fence)s FROM done
    WHERE span.machine = done.machine AND span.stop > %(fence)s AND span.start < %(fence)s
), gone AS (
    DELETE FROM span USING done WHERE span.machine = done.machine AND span.start >= %(fence)s
)
SELECT machine FROM done
"""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that is given up where the server does not answer in time.

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


class PostgresqlStore(Store):
    """Records in tables: `postgresql://[user[:password]@]host[:port]/database[?schema=zflake&...]`.

    Other parameters go to libpq.  A server that answers before its log is on disk is refused, unless the URL
    says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` where the server can't be used.
    """

    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url)
        self.url = where.name
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
        if taken := TAKEN.intersection(others):
            raise ConfigError(f"{self.url}: zflake sets {', '.join(sorted(taken))} by itself")
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._server = self._life = ""
        self._unused_from: dict[int, int] = {}
        try:
            with self._errors():
                has_tables = self._check_data(self._db)
                if not has_tables and not read_only:
                    self._create(self._db)
                self._has_tables = has_tables or not read_only
        except BaseException:
            self.close()
            raise

    def meta(self) -> Meta | None:
        if not self._has_tables:
            return None
        try:
            metas = self._read(self._meta_of, f"SELECT {_META}, {_LIFE} FROM meta")
        except StoreError as error:
            if isinstance(error.__cause__, errors.UndefinedTable):
                return None  # they were dropped since
            raise
        return metas[0] if metas else None

    def _meta_of(self, row: tuple[Any, ...]) -> Meta:
        store_id, layout, *rest, self._life = row
        schema, reader = rest[-2:]
        check_schema(self.url, schema, reader, "name another")
        return Meta(store_id, Layout.from_map(json.loads(layout)), *rest)

    def incarnation(self) -> str:
        if not self._life:
            (self._life,) = self._read(_first, f"SELECT {_LIFE}")
        return f"{self._server}/{self._life}"

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        with self._transaction() as db:
            done = db.execute(
                f"INSERT INTO meta (one, {_META}) VALUES (1{', %s' * 11}) ON CONFLICT DO NOTHING",
                _values(meta),
            )
            if done.rowcount == 0:
                raise StoreError(f"{self.url} is initialised already")
            cursor = db.cursor()
            for records in batched(contents.records, CHUNK):
                cursor.executemany(_INSERT, [_row(record) for record in records])
            for spans in batched(contents.spans, CHUNK):
                cursor.executemany(
                    "INSERT INTO span VALUES (%s, %s, %s, %s)",
                    [(s.machine, s.start, s.end, holder_to_text(s.holder)) for s in spans],
                )
            cursor.executemany(
                "INSERT INTO mark VALUES (%s, %s, %s, %s)",
                [(m.delegator, m.now_us, m.lead_us, m.address) for m in contents.marks],
            )
            db.execute("UPDATE meta SET since = %s", (contents.since,))

    def contents(self) -> Contents:
        with self._transaction() as db:
            records = _stream(db, _record, f"SELECT {_COLUMNS} FROM machine ORDER BY machine")
            spans = _stream(db, _span, f"SELECT {_SPAN} FROM span ORDER BY machine, start")
        return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        with self._transaction() as db:
            assignments = ", ".join(f"{column} = %s" for column in _META.split(", "))
            done = db.execute(
                f"UPDATE meta SET {assignments} WHERE version = %s AND store_id = %s",
                (*_values(new), old.version, old.store_id),
            )
            return done.rowcount == 1

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        found = {record.machine: record for record in self._find("machine", machines)}
        return [found.get(machine) or Record(machine) for machine in machines]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        found = {record.token: record for record in self._find("token", tokens)}
        return [found.get(token) for token in tokens]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        begin = self._unused_from.get(first, first)
        # The walk stops at the limit.
        unused = self._read(
            _first,
            "SELECT n FROM generate_series(%s::bigint, %s::bigint) AS n"
            " WHERE NOT EXISTS (SELECT 1 FROM machine WHERE machine = n) LIMIT %s",
            *(begin, last, limit),
        )
        if limit > 0:
            self._unused_from[first] = unused[0] if unused else max(begin, last + 1)
        used = self._read(
            _record,
            f"SELECT {_COLUMNS} FROM machine WHERE machine BETWEEN %s AND %s ORDER BY fence, machine LIMIT %s",
            *(first, last, limit - len(unused)),
        )
        return [*map(Record, unused), *used]

    def held(self, now: int) -> Sequence[Record]:
        held = f"SELECT {_COLUMNS} FROM machine WHERE fence > %s AND token IS NOT NULL ORDER BY machine"
        return self._read(_record, held, now)

    def marks(self) -> Sequence[Mark]:
        return self._read(_mark, f"SELECT {_MARK} FROM mark ORDER BY delegator")

    def forget_marks(self, before_us: int) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM mark WHERE now_us < %s", (before_us,))

    def set_marks(self, now_us: int) -> None:
        with self._transaction() as db:
            db.execute("UPDATE mark SET now_us = %s", (now_us,))

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        try:
            return self._swap(swaps, mark)
        except StoreError as error:
            if len(swaps) < 2 or not isinstance(error.__cause__, errors.UniqueViolation):  # noqa: PLR2004
                raise
        # One of them brought a token that is another machine's: nothing was written yet.
        return [outcome for swap in swaps for outcome in self._swap_alone(swap, mark)]

    def _swap_alone(self, swap: Swap, mark: Mark | None) -> list[bool]:
        try:
            return self._swap([swap], mark)
        except StoreError as error:
            if isinstance(error.__cause__, errors.UniqueViolation):
                return [False]
            raise

    def _swap(self, swaps: Sequence[Swap], mark: Mark | None) -> list[bool]:
        with self._transaction() as db:
            if mark is not None:
                db.execute(
                    "INSERT INTO mark SELECT %s, %s, %s, %s WHERE EXISTS (SELECT 1 FROM meta) ON CONFLICT (delegator) DO UPDATE SET"
                    " now_us = excluded.now_us, lead_us = excluded.lead_us, address = excluded.address"
                    " WHERE excluded.now_us > mark.now_us",
                    (mark.delegator, mark.now_us, mark.lead_us, mark.address),
                )
            if not swaps:
                return []
            row = db.execute(f"SELECT version, incarnation, {_LIFE} FROM meta FOR SHARE").fetchone()
            version, incarnation, life = row or (None, None, None)
            known = incarnation == f"{self._server}/{life}"
            valid = [s for s in swaps if known and s.version == version]
            # By machine, so that two delegators never wait for each other.
            done = set()
            for swap in sorted(valid, key=lambda s: s.new.machine):
                new = swap.new
                follows = _RELEASE if new.token is None else _GRANT
                text = f"WITH done AS ({_DONE[new.gen == 1]}) {follows}"
                if db.execute(text, _row(new)).rowcount == 1:
                    done.add(id(swap))
            return [id(swap) in done for swap in swaps]

    def trace(self, machine: int, tick: int) -> Traced:
        below = self._read(
            _span,
            f"SELECT {_SPAN} FROM span WHERE machine = %s AND start <= %s ORDER BY start DESC LIMIT 1",
            *(machine, tick),
        )
        return traced(below[0] if below else None, tick, self._since())

    def prune(self, before: int, keep: int, limit: int) -> int:
        (count,) = self._read(_first, "SELECT count(*) FROM span")
        oldest = self._read(_span, f"SELECT {_SPAN} FROM span ORDER BY stop LIMIT %s", limit)
        forgotten = oldest[: outdated([span.end for span in oldest], count, before, keep)]
        if forgotten:
            with self._transaction() as db:
                # Meta first, as in a swap, so that neither waits for the other.
                db.execute("UPDATE meta SET since = greatest(since, %s)", (forgotten[-1].end,))
                keys = [(span.machine, span.start, span.end) for span in forgotten]
                for some in batched(keys, CHUNK):
                    db.cursor().executemany(
                        "DELETE FROM span WHERE machine = %s AND start = %s AND stop = %s", some
                    )
        return len(forgotten)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    # --- inside ---

    def _find(self, column: str, values: Sequence[Any]) -> list[Record]:
        if not values:
            return []
        return self._read(_record, f"SELECT {_COLUMNS} FROM machine WHERE {column} = ANY(%s)", list(values))

    def _since(self) -> int:
        return max(self._read(_first, "SELECT since FROM meta"), default=0)

    def _read(self, make: Callable[[tuple[Any, ...]], T], text: str, *values: Any) -> list[T]:
        """What `make` makes of each row."""
        with self._errors():
            return [make(row) for row in self._db.execute(text, values)]

    @property
    def _db(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection; a new one where there is none (any more)."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        db: psycopg.Connection[tuple[Any, ...]] = Connection.connect(
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

    def _check_server(self, db: psycopg.Connection[tuple[Any, ...]]) -> None:
        if db.info.server_version < MIN_VERSION:
            raise StoreError(f"{self.url} is PostgreSQL {db.info.server_version // 10_000}; 12 is the oldest")
        (standby,) = db.execute("SELECT pg_is_in_recovery()").fetchone() or (True,)
        if standby:
            raise StoreError(f"{self.url} is a standby: name the primary")
        if self._unchecked:
            return
        wrong = []
        for name in ("fsync", "full_page_writes", "synchronous_commit"):
            (value,) = db.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone() or ("",)
            if value != "on":
                wrong.append(name)
        if wrong:
            raise StoreError(
                f"{self.url} can lose what it has promised, and with that give IDs twice: turn {', '.join(wrong)} on;"
                " or take the risk with ?unchecked=yes in the URL"
            )

    def _check_data(self, db: psycopg.Connection[tuple[Any, ...]]) -> bool:
        """Whether the tables are there; `StoreError` where something else is in their place."""
        rows = db.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = %s",
            (self._schema,),
        ).fetchall()
        if not rows:
            return False
        if not _NEEDED.issubset(rows):
            raise foreign(self.url, ADVICE)
        return True

    def _create(self, db: psycopg.Connection[tuple[Any, ...]]) -> None:
        with db.transaction():
            # Two delegators may come first at once.
            db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"zflake {self._schema}",))
            if not self._check_data(db):
                db.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
                db.execute(_TABLES)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        with self._errors():
            db = self._db
            with db.transaction():
                yield db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with reading(self.url, ADVICE):
            try:
                yield
            except psycopg.Error as error:
                if self._connection is not None and self._connection.broken:
                    self._connection = None
                reason = " ".join(str(error).split())
                if self._connection is None and isinstance(error, psycopg.OperationalError):
                    raise StoreError(f"can't reach {self.url}: {reason}") from error
                raise StoreError(f"{self.url}: {reason}") from error
            except OSError as error:
                raise StoreError(f"{self.url}: {error}") from error


def _stream(
    db: psycopg.Connection[tuple[Any, ...]], make: Callable[[tuple[Any, ...]], T], text: str
) -> list[T]:
    """What `make` makes of each of many rows, of which no wait is for more than `CHUNK`."""
    with db.cursor(name="stream") as cursor:
        cursor.itersize = CHUNK
        cursor.execute(text)
        return [make(row) for row in cursor]


def _values(meta: Meta) -> tuple[Any, ...]:
    layout = json.dumps(meta.layout.to_map())
    numbers = (meta.ttl, meta.first_machine, meta.last_machine, meta.floor, meta.version)
    return (meta.store_id, layout, *numbers, meta.incarnation, meta.moved, meta.schema, meta.reader)


def _row(record: Record) -> dict[str, Any]:
    names = ("machine", "fence", "gen", "token", "start", "tenancy_start", "span_start")
    return {name: getattr(record, name) for name in names} | {"holder": holder_to_text(record.holder)}


def _record(row: tuple[Any, ...]) -> Record:
    machine, fence, gen, token, start, tenancy_start, span_start, holder = row
    shown = None if token is None else bytes(token)
    return Record(machine, fence, gen, shown, start, tenancy_start, holder_from_text(holder), span_start)


def _mark(row: tuple[Any, ...]) -> Mark:
    return Mark(*row)


def _first(row: tuple[Any, ...]) -> Any:
    return row[0]


def _span(row: tuple[Any, ...]) -> Span:
    machine, start, stop, holder = row
    return Span(machine, start, stop, holder_from_text(holder))


open_url = PostgresqlStore
