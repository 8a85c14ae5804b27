"""A PostgreSQL database, in a schema of its own: for teams that run one already.

A commit returns once it is in the log on disk (`synchronous_commit=on`, `fsync=on`), so a crash loses nothing.
A standby that was promoted, and a database restored to a point in time, may lack the last commits: they are on
another timeline of PostgreSQL's, which is the incarnation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from zflake.core.layout import Layout
from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, Store, check_schema
from zflake.stores.text import holder_from_text, holder_to_text

try:
    import psycopg
    from psycopg import errors, sql
except ImportError as error:
    raise ConfigError("postgresql:// needs the psycopg package: pip install 'zflake[postgresql]'") from error

TIMEOUT_S: Final = 2
MIN_VERSION: Final = 120_000

_TABLES: Final = """
CREATE TABLE meta (
    one           int    PRIMARY KEY CHECK (one = 1),
    schema        int    NOT NULL,
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
CREATE INDEX machine_by_fence ON machine (fence, machine);
CREATE INDEX span_by_stop ON span (stop);
"""
_META: Final = (
    "store_id, layout, ttl, first_machine, last_machine, floor, version, incarnation, moved, schema"
)
_COLUMNS: Final = "machine, fence, gen, token, start, tenancy_start, span_start, holder"

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


class PostgresqlStore(Store):
    """Records in tables: `postgresql://[user[:password]@]host[:port]/database[?schema=zflake&...]`.

    Other parameters go to libpq.  A server that answers before its log is on disk is refused, unless the URL
    says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` where the server can't be used.
    """

    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self._schema = options.pop("schema", "zflake")
        self._unchecked = options.pop("unchecked", "no") == "yes" or read_only
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
        self._where = urlunsplit(parts._replace(query=urlencode(options)))
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._incarnation = ""
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
        row = self._one(f"SELECT {_META} FROM meta")
        if row is None:
            return None
        store_id, layout, *rest, schema = row
        check_schema(self.url, schema, "name another")
        return replace(Meta(store_id, Layout.from_map(json.loads(layout)), *rest), schema=schema)

    def incarnation(self) -> str:
        with self._errors():
            assert self._db is not None
        return self._incarnation

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        with self._transaction() as db:
            done = db.execute(
                f"INSERT INTO meta (one, {_META}) VALUES (1{', %s' * 10}) ON CONFLICT DO NOTHING",
                _values(meta),
            )
            if done.rowcount == 0:
                raise StoreError(f"{self.url} is initialised already")
            cursor = db.cursor()
            cursor.executemany(_INSERT, [_row(record) for record in contents.records])
            cursor.executemany(
                "INSERT INTO span VALUES (%s, %s, %s, %s)",
                [(s.machine, s.start, s.end, holder_to_text(s.holder)) for s in contents.spans],
            )
            cursor.executemany(
                "INSERT INTO mark VALUES (%s, %s, %s, %s)",
                [(m.delegator, m.now_us, m.lead_us, m.address) for m in contents.marks],
            )
            db.execute("UPDATE meta SET since = %s", (contents.since,))

    def contents(self) -> Contents:
        records = [_record(row) for row in self._all(f"SELECT {_COLUMNS} FROM machine ORDER BY machine")]
        spans = [_span(row) for row in self._all("SELECT * FROM span ORDER BY machine, start")]
        return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        with self._transaction() as db:
            assignments = ", ".join(f"{column} = %s" for column in _META.split(", "))
            done = db.execute(
                f"UPDATE meta SET {assignments} WHERE version = %s AND store_id = %s",
                (*_values(new), old.version, old.store_id),
            )
            return done.rowcount == 1

    def by_machine(self, machine: int) -> Record:
        row = self._one(f"SELECT {_COLUMNS} FROM machine WHERE machine = %s", machine)
        return Record(machine) if row is None else _record(row)

    def by_token(self, token: Token) -> Record | None:
        row = self._one(f"SELECT {_COLUMNS} FROM machine WHERE token = %s", token)
        return None if row is None else _record(row)

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        begin = self._unused_from.get(first, first)
        # The walk stops at the limit.
        unused = self._all(
            "SELECT n FROM generate_series(%s::bigint, %s::bigint) AS n"
            " WHERE NOT EXISTS (SELECT 1 FROM machine WHERE machine = n) LIMIT %s",
            *(begin, last, limit),
        )
        if limit > 0:
            self._unused_from[first] = unused[0][0] if unused else max(begin, last + 1)
        used = self._all(
            f"SELECT {_COLUMNS} FROM machine WHERE machine BETWEEN %s AND %s ORDER BY fence, machine LIMIT %s",
            *(first, last, limit - len(unused)),
        )
        return [*(Record(n) for (n,) in unused), *map(_record, used)]

    def held(self, now: int) -> Sequence[Record]:
        rows = self._all(
            f"SELECT {_COLUMNS} FROM machine WHERE fence > %s AND token IS NOT NULL ORDER BY machine", now
        )
        return [_record(row) for row in rows]

    def marks(self) -> Sequence[Mark]:
        return [Mark(*row) for row in self._all("SELECT * FROM mark ORDER BY delegator")]

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
                    "INSERT INTO mark VALUES (%s, %s, %s, %s) ON CONFLICT (delegator) DO UPDATE SET"
                    " now_us = excluded.now_us, lead_us = excluded.lead_us, address = excluded.address"
                    " WHERE excluded.now_us > mark.now_us",
                    (mark.delegator, mark.now_us, mark.lead_us, mark.address),
                )
            if not swaps:
                return []
            row = db.execute("SELECT version, incarnation FROM meta FOR SHARE").fetchone()
            version, incarnation = row or (None, None)
            valid = [s for s in swaps if s.version == version and incarnation == self._incarnation]
            # By machine, so that two delegators never wait for each other.
            outcomes = {}
            with db.pipeline():
                for swap in sorted(valid, key=lambda s: s.new.machine):
                    new = swap.new
                    follows = _RELEASE if new.token is None else _GRANT
                    text = f"WITH done AS ({_DONE[new.gen == 1]}) {follows}"
                    outcomes[id(swap)] = db.execute(text, _row(new))
            return [id(s) in outcomes and outcomes[id(s)].rowcount == 1 for s in swaps]

    def trace(self, machine: int, tick: int) -> Traced:
        row = self._one(
            "SELECT * FROM span WHERE machine = %s AND start <= %s ORDER BY start DESC LIMIT 1", machine, tick
        )
        span = None if row is None else _span(row)
        return Traced(span if span is not None and tick < span.end else None, self._since())

    def prune(self, before: int, keep: int, limit: int) -> int:
        ((count,),) = self._all("SELECT count(*) FROM span")
        oldest = self._all("SELECT machine, start, stop FROM span ORDER BY stop LIMIT %s", limit)
        forgotten = [row for i, row in enumerate(oldest) if i < count - keep or row[2] <= before]
        if forgotten:
            with self._transaction() as db:
                keys = [(machine, start, stop) for machine, start, stop in forgotten]
                db.cursor().executemany(
                    "DELETE FROM span WHERE machine = %s AND start = %s AND stop = %s", keys
                )
                db.execute("UPDATE meta SET since = greatest(since, %s)", (forgotten[-1][2],))
        return len(forgotten)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    # --- inside ---

    def _since(self) -> int:
        row = self._one("SELECT since FROM meta")
        return 0 if row is None else int(row[0])

    def _one(self, text: str, *values: Any) -> tuple[Any, ...] | None:
        with self._errors():
            return self._db.execute(text, values).fetchone()

    def _all(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(text, values).fetchall()

    @property
    def _db(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection; a new one where there is none (any more)."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        db: psycopg.Connection[tuple[Any, ...]] = psycopg.connect(
            self._where,
            autocommit=True,
            connect_timeout=TIMEOUT_S,
            keepalives_idle=TIMEOUT_S,
            keepalives_interval=1,
            keepalives_count=3,
            prepare_threshold=None,  # a pool in between may give each transaction another server process
            options=f"-c statement_timeout={TIMEOUT_S}s -c synchronous_commit=on",
        )
        try:
            self._check_server(db)
            row = db.execute(
                "SELECT system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM pg_control_system()"
            ).fetchone()
            assert row is not None
            self._incarnation = f"{row[0]}/{row[1]}"
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
        needed = {"meta", "machine", "span", "mark"}
        if {table for table, _ in rows} & needed != needed or ("meta", "store_id") not in rows:
            raise StoreError(
                f"{self.url} has a schema {self._schema} that is not zflake's; nothing was changed: name another ?schema="
            )
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
        try:
            yield
        except psycopg.Error as error:
            if self._connection is not None and self._connection.broken:
                self._connection = None
            reason = " ".join(str(error).split())
            if self._connection is None and isinstance(error, psycopg.OperationalError):
                raise StoreError(f"can't reach {self.url}: {reason}") from error
            raise StoreError(f"{self.url}: {reason}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.url}: {error}") from error


def _values(meta: Meta) -> tuple[Any, ...]:
    layout = json.dumps(meta.layout.to_map())
    numbers = (meta.ttl, meta.first_machine, meta.last_machine, meta.floor, meta.version)
    return (meta.store_id, layout, *numbers, meta.incarnation, meta.moved, meta.schema)


def _row(record: Record) -> dict[str, Any]:
    names = ("machine", "fence", "gen", "token", "start", "tenancy_start", "span_start")
    return {name: getattr(record, name) for name in names} | {"holder": holder_to_text(record.holder)}


def _record(row: tuple[Any, ...]) -> Record:
    machine, fence, gen, token, start, tenancy_start, span_start, holder = row
    shown = None if token is None else bytes(token)
    return Record(machine, fence, gen, shown, start, tenancy_start, holder_from_text(holder), span_start)


def _span(row: tuple[Any, ...]) -> Span:
    machine, start, stop, holder = row
    return Span(machine, start, stop, holder_from_text(holder))


open_url = PostgresqlStore
