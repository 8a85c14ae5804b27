"""The family of stores that keep rows: SQLite and PostgreSQL.

Each guard of these stores stands here, once, in statements that both engines take.  An engine gives a connection,
transactions, and the few words that differ.  A parameter is written `:name`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from operator import itemgetter
from typing import Any, Final, TypeVar

from zflake.core.layout import Layout
from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import StoreError
from zflake.stores.contract import Contents, Store, check_current, check_schema, outdated, surplus, traced
from zflake.stores.text import holder_from_text, holder_to_text

T = TypeVar("T")
Values = Mapping[str, Any]

TABLES: Final = """
CREATE TABLE meta (
    one           {number} PRIMARY KEY CHECK (one = 1),
    store_id      {text}   NOT NULL,
    layout        {text}   NOT NULL,
    ttl           {number} NOT NULL,
    first_machine {number} NOT NULL,
    last_machine  {number} NOT NULL,
    floor         {number} NOT NULL,
    version       {number} NOT NULL,
    incarnation   {text}   NOT NULL,
    moved         {text}   NOT NULL,
    schema        {number} NOT NULL,
    reader        {number} NOT NULL,
    since         {number} NOT NULL  -- the tick from which on the spans are complete
){options};
CREATE TABLE machine (
    machine       {number} PRIMARY KEY,
    fence         {number} NOT NULL,
    gen           {number} NOT NULL,
    token         {bytes}  UNIQUE,
    start         {number} NOT NULL,
    tenancy_start {number} NOT NULL,
    span_start    {number} NOT NULL,
    holder        {text}   NOT NULL  -- a JSON object
){options};
CREATE TABLE span (
    machine {number} NOT NULL,
    start   {number} NOT NULL,
    stop    {number} NOT NULL,
    holder  {text}   NOT NULL,
    PRIMARY KEY (machine, start)
){options}{by_key};
CREATE TABLE mark (
    delegator {text}   PRIMARY KEY,
    now_us    {number} NOT NULL,
    lead_us   {number} NOT NULL,
    address   {text}   NOT NULL
){options};
CREATE INDEX machine_by_fence ON machine (fence, machine);
CREATE INDEX span_by_stop ON span (stop);
"""
META_COLUMNS: Final = (
    "store_id, layout, ttl, first_machine, last_machine, floor, version, incarnation, moved, schema, reader"
)
RECORD: Final = "machine, fence, gen, token, start, tenancy_start, span_start, holder"
SPAN: Final = "machine, start, stop, holder"
MARK: Final = "delegator, now_us, lead_us, address"
COLUMNS: Final = {"meta": f"{META_COLUMNS}, since", "machine": RECORD, "span": SPAN, "mark": MARK}


def _parameters(columns: str) -> str:
    return ", ".join(f":{column}" for column in columns.split(", "))


def _assignments(columns: str) -> str:
    return ", ".join(f"{column} = :{column}" for column in columns.split(", "))


_FIRST_META: Final = f"INSERT INTO meta (one, {META_COLUMNS}, since) VALUES (1, {_parameters(META_COLUMNS)}, :since) ON CONFLICT DO NOTHING"
_NEXT_META: Final = (
    f"UPDATE meta SET {_assignments(META_COLUMNS)} WHERE version = :old_version AND store_id = :old_store_id"
)
_INSERT: Final = f"INSERT INTO machine ({RECORD}) VALUES ({_parameters(RECORD)})"
_FIRST_RECORD: Final = f"{_INSERT} ON CONFLICT DO NOTHING"
_NEXT_RECORD: Final = (
    f"UPDATE machine SET {_assignments(RECORD)} WHERE machine = :machine AND gen = :old_gen"
    " AND NOT EXISTS (SELECT 1 FROM machine WHERE token = :token)"
)
# The statements that follow upon a record that was written, of a grant and of a release.
_GRANT: Final = [
    f"""
INSERT INTO span ({SPAN}) SELECT :machine, :span_start, :fence, :holder WHERE {{done}}
ON CONFLICT (machine, start) DO UPDATE SET stop = excluded.stop, holder = excluded.holder
"""
]
_RELEASE: Final = [
    "UPDATE span SET stop = :cut WHERE machine = :machine AND stop > :cut AND start < :cut AND {done}",
    "DELETE FROM span WHERE machine = :machine AND start >= :cut AND {done}",
]
# A write of unknown outcome may come after the next one: a mark never goes back by one.
_PUT_MARK: Final = (
    f"INSERT INTO mark ({MARK}) SELECT {_parameters(MARK)} WHERE EXISTS (SELECT 1 FROM meta)"
    " ON CONFLICT (delegator) DO UPDATE SET now_us = excluded.now_us, lead_us = excluded.lead_us,"
    " address = excluded.address WHERE excluded.now_us > mark.now_us"
)
# The numbers first to last that have no row yet.  The walk stops at the limit.
# A subquery for each number, since PostgreSQL 16 makes NOT EXISTS a hash join, whose order is that of the hashes.
_UNUSED: Final = (
    "WITH RECURSIVE number (n) AS (SELECT CAST(:first AS bigint) UNION ALL SELECT n + 1 FROM number WHERE n < :last)"
    " SELECT n FROM number WHERE n <= :last AND (SELECT 1 FROM machine WHERE machine = n) IS NULL LIMIT :limit"
)
# The sign keeps the engine from taking the range by machine, and sorting all of it.
_LOWEST: Final = f"SELECT {RECORD} FROM machine WHERE +machine BETWEEN :first AND :last ORDER BY fence, machine LIMIT :limit"
# A span that was renewed since ends elsewhere, and stays.
_PRUNE: Final = "DELETE FROM span WHERE machine = :machine AND start = :start AND stop = :stop"
_RAISE_SINCE: Final = "UPDATE meta SET since = :stop WHERE since < :stop"


class RowStore(Store):
    """A store whose engine takes SQL."""

    # --- what an engine gives ---

    @abstractmethod
    def _run(self, text: str, values: Values | None = None) -> Any:
        """Run a statement; gives the engine's cursor."""

    @abstractmethod
    def _run_many(self, text: str, rows: Iterable[Values]) -> None:
        """Run a statement for each of many rows."""

    def _stream(self, text: str, make: Callable[[Any], T]) -> list[T]:
        """`make` of each of many rows."""
        return self._rows(make, text)

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """Commit durably all that runs inside; commit none of it if any part fails."""

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Raises `StoreError` for each failure of the engine, and for what can't be understood."""

    @abstractmethod
    def _records_by(self, column: str, values: Sequence[Any]) -> list[Record]:
        """The records with one of these values in a column."""

    @abstractmethod
    def _current_version(self) -> int | None:
        """Meta's version, which stays until the transaction ends; None if meta is of another incarnation."""

    @abstractmethod
    def _run_in_turn(self, first: str, others: Sequence[str], values: Values) -> bool:
        """Run `first` and, if it wrote a row, `others`; gives whether it wrote one.

        Each of `others` contains `{done}`: the engine puts a condition there that holds only if `first` wrote a row.
        """

    def _in_order(self, swaps: Sequence[Swap]) -> Iterable[tuple[int, Swap]]:
        """The swaps with their places, in the order in which to try them."""
        return enumerate(swaps)

    def _meta_written(self, meta: Meta) -> None:
        """Called in the transaction that put this meta in place of another one."""

    # --- meta ---

    def meta(self) -> Meta | None:
        metas = self._rows(self._meta_of, f"SELECT {META_COLUMNS} FROM meta")
        return metas[0] if metas else None

    def _meta_of(self, row: Sequence[Any]) -> Meta:
        store_id, layout, *rest = row
        schema, reader = rest[-2:]
        check_schema(self.url, schema, reader, self.advice)
        check_current(self.url, schema)
        return Meta(store_id, Layout.from_map(json.loads(layout)), *rest)

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        with self._transaction():
            if self._run(_FIRST_META, {**_meta_values(meta), "since": contents.since}).rowcount != 1:
                raise StoreError(f"{self.url} is initialised already")
            self._run_many(_INSERT, map(_record_values, contents.records))
            spans = map(_span_values, contents.spans)
            self._run_many(f"INSERT INTO span ({SPAN}) VALUES ({_parameters(SPAN)})", spans)
            marks = [_mark_values(mark) for mark in contents.marks]
            self._run_many(f"INSERT INTO mark ({MARK}) VALUES ({_parameters(MARK)})", marks)

    def contents(self) -> Contents:
        records = self._stream(f"SELECT {RECORD} FROM machine ORDER BY machine", record_of)
        spans = self._stream(f"SELECT {SPAN} FROM span ORDER BY machine, start", _span)
        return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        values = {**_meta_values(new), "old_version": old.version, "old_store_id": old.store_id}
        with self._transaction():
            won: bool = self._run(_NEXT_META, values).rowcount == 1
            if won:
                self._meta_written(new)
        return won

    # --- records ---

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        found = {record.machine: record for record in self._records_by("machine", machines)}
        return [found.get(machine) or Record(machine) for machine in machines]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        found = {record.token: record for record in self._records_by("token", tokens)}
        return [found.get(token) for token in tokens]

    def _unused(self, first: int, last: int, limit: int) -> list[int]:
        return self._rows(itemgetter(0), _UNUSED, first=first, last=last, limit=limit)

    def _lowest_used(self, first: int, last: int, limit: int) -> Sequence[Record]:
        return self._rows(record_of, _LOWEST, first=first, last=last, limit=limit)

    def held(self, now: int) -> Sequence[Record]:
        held = f"SELECT {RECORD} FROM machine WHERE fence > :now AND token IS NOT NULL ORDER BY machine"
        return self._rows(record_of, held, now=now)

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        outcomes: dict[int, bool] = {}
        with self._transaction():
            if mark is not None:
                self._run(_PUT_MARK, _mark_values(mark))
            version = self._current_version() if swaps else None
            for place, swap in self._in_order(swaps):
                outcomes[place] = swap.version == version and self._swap(swap)
        return [outcome for _, outcome in sorted(outcomes.items())]

    def _swap(self, swap: Swap) -> bool:
        old, new = swap.old, swap.new
        return self._run_in_turn(
            _NEXT_RECORD if old.gen else _FIRST_RECORD,
            _GRANT if new.token is not None else _RELEASE,
            {
                **_record_values(new),
                "old_gen": old.gen,
                "cut": new.fence if swap.cut is None else swap.cut,
            },
        )

    # --- marks ---

    def marks(self) -> Sequence[Mark]:
        return self._rows(lambda row: Mark(*row), f"SELECT {MARK} FROM mark ORDER BY delegator")

    def forget_marks(self, before_us: int) -> None:
        with self._transaction():
            self._run("DELETE FROM mark WHERE now_us < :before_us", {"before_us": before_us})

    def set_marks(self, timeline_us: int) -> None:
        with self._transaction():
            self._run("UPDATE mark SET now_us = :timeline_us", {"timeline_us": timeline_us})

    # --- provenance ---

    def trace(self, machine: int, tick: int) -> Traced:
        begun = f"SELECT {SPAN} FROM span WHERE machine = :machine AND start <= :tick"
        latest = self._rows(_span, f"{begun} ORDER BY start DESC LIMIT 1", machine=machine, tick=tick)
        return traced(latest[0] if latest else None, tick, self._since())

    def prune(self, before: int, keep: int, limit: int) -> int:
        (count,) = self._rows(itemgetter(0), "SELECT count(*) FROM span")
        oldest = self._rows(_span, f"SELECT {SPAN} FROM span ORDER BY stop LIMIT :limit", limit=limit)
        forgotten = oldest[: outdated([span.end for span in oldest], count, before, keep)]
        self._forget(forgotten)
        return len(forgotten)

    def thin(self, machines: Iterable[int], keep: int) -> None:
        spans = f"SELECT {SPAN} FROM span WHERE machine = :machine ORDER BY start"
        self._forget(
            [
                span
                for machine in machines
                for span in surplus(self._rows(_span, spans, machine=machine), keep)
            ]
        )

    def _forget(self, spans: Sequence[Span]) -> None:
        if spans:
            with self._transaction():
                # Meta first, as in a swap, so that neither waits for the other.
                self._run(_RAISE_SINCE, {"stop": max(span.end for span in spans)})
                self._run_many(_PRUNE, map(_span_values, spans))

    # --- inside ---

    def _since(self) -> int:
        return max(self._rows(itemgetter(0), "SELECT since FROM meta"), default=0)

    def _rows(self, make: Callable[[Any], T], text: str, **values: Any) -> list[T]:
        """`make` of each row."""
        with self._errors():
            return [make(row) for row in self._run(text, values)]


def _meta_values(meta: Meta) -> dict[str, Any]:
    columns = {column: getattr(meta, column) for column in META_COLUMNS.split(", ")}
    return columns | {"layout": json.dumps(meta.layout.to_map())}


def _mark_values(mark: Mark) -> dict[str, Any]:
    return dict(zip(MARK.split(", "), astuple(mark), strict=True))


def _record_values(record: Record) -> dict[str, Any]:
    return {
        "machine": record.machine,
        "fence": record.fence,
        "gen": record.gen,
        "token": record.token,
        "start": record.start,
        "tenancy_start": record.tenancy_start,
        "span_start": record.span_start,
        "holder": holder_to_text(record.holder),
    }


def _span_values(span: Span) -> dict[str, Any]:
    holder = holder_to_text(span.holder)
    return {"machine": span.machine, "start": span.start, "stop": span.end, "holder": holder}


def record_of(row: Sequence[Any]) -> Record:
    """The record of a row of `RECORD`."""
    machine, fence, gen, token, start, tenancy_start, span_start, holder = row
    shown = None if token is None else bytes(token)
    return Record(machine, fence, gen, shown, start, tenancy_start, holder_from_text(holder), span_start)


def _span(row: Sequence[Any]) -> Span:
    machine, start, stop, holder = row
    return Span(machine, start, stop, holder_from_text(holder))
