"""Keys and values as text, for engines that keep texts, and what Redis and etcd share because of that.

A number in a key is decimal and zero-padded to 20 digits, so that its order is the text's.  A value begins with its
stamp, which the engine compares as text.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import READER, SCHEMA, Holder, Mark, Meta, Record, Span
from zflake.errors import StoreError
from zflake.stores.contract import check_schema
from zflake.stores.keyed import FILLING, META, STORE, Found, Items, Key, KeyedStore, Stamp, Step, Thing

TRIES: Final = 8
"""Attempts at a conversion that others overtake."""
_FIELDS: Final = tuple(field.name for field in fields(Holder))


def pad(number: int) -> str:
    """A number whose order as text is its own."""
    return f"{number:020d}"


# --- values ---


def meta_to_text(meta: Meta) -> str:
    """Meta as JSON; its version comes first, since that is its stamp."""
    return json.dumps(
        {
            "version": meta.version,
            "zflake": meta.schema,
            "reader": meta.reader,
            "store_id": meta.store_id,
            "layout": meta.layout.to_map(),
            "ttl": meta.ttl,
            "machines": [meta.first_machine, meta.last_machine],
            "floor": meta.floor,
            "incarnation": meta.incarnation,
            "moved": meta.moved,
        }
    )


def meta_from_text(text: str, url: str) -> Meta:
    """Meta of what `meta_to_text` gave; raises `StoreError` for a schema that can't be read."""
    values = json.loads(text)
    schema, reader = values["zflake"], values.get("reader", 0)
    check_schema(url, schema, reader, "name another")
    first, last = values["machines"]
    layout, ttl, floor = Layout.from_map(values["layout"]), values["ttl"], values["floor"]
    life = values["version"], values["incarnation"], values["moved"]
    return Meta(values["store_id"], layout, ttl, first, last, floor, *life, schema, reader)


# A holder comes back with each renewal.
@lru_cache(maxsize=1 << 14)
def holder_to_text(holder: Holder) -> str:
    """A holder as a JSON object."""
    return json.dumps({name: getattr(holder, name) for name in _FIELDS})


@lru_cache(maxsize=1 << 14)
def holder_from_text(text: str) -> Holder:
    """The holder of what `holder_to_text` gave, or of the list that schema 3 had.

    A name that a later zflake adds is passed over.
    """
    parts: list[Any] | dict[str, Any] = json.loads(text)
    if isinstance(parts, list):
        return Holder(*parts)
    return Holder(**{name: value for name, value in parts.items() if name in _FIELDS})


def record_to_text(record: Record) -> str:
    """`gen fence token span_start start tenancy_start holder`."""
    token = "-" if record.token is None else record.token.hex()
    numbers = f"{record.gen} {record.fence} {token} {record.span_start} {record.start} {record.tenancy_start}"
    return f"{numbers} {holder_to_text(record.holder)}"


def record_from_text(machine: int, text: str) -> Record:
    """The record of what `record_to_text` gave, or schema 3."""
    gen, fence, token, span_start, rest = text.split(" ", 4)
    if rest.startswith("["):
        start, tenancy_start, parts = json.loads(rest)
        holder = Holder(*parts)
    else:
        start, tenancy_start, person = rest.split(" ", 2)
        holder = holder_from_text(person)
    shown = None if token == "-" else bytes.fromhex(token)  # noqa: S105  (no password)
    numbers = int(start), int(tenancy_start)
    return Record(machine, int(fence), int(gen), shown, *numbers, holder, int(span_start))


def mark_to_text(mark: Mark) -> str:
    """`timeline_us lead_us address`."""
    return f"{pad(mark.timeline_us)} {mark.lead_us} {mark.address}"


def mark_from_text(delegator: str, text: str) -> Mark:
    """The mark of what `mark_to_text` gave."""
    timeline_us, lead_us, address = text.split(" ", 2)
    return Mark(delegator, int(timeline_us), int(lead_us), address)


# --- keys, and the values under them ---


def key_to_text(key: Key) -> str:
    """`kind/part/part`."""
    return "/".join(
        part if isinstance(part, str) else pad(part) if isinstance(part, int) else part.hex() for part in key
    )


def key_from_text(text: str) -> Key:
    """The key of what `key_to_text` gave."""
    kind, *rest = text.split("/", 1)
    if kind == "mark":
        return kind, *rest
    if kind == "token":
        return kind, *map(bytes.fromhex, rest)
    return kind, *map(int, rest[0].split("/") if rest else ())


_WRITERS: Final[Mapping[Any, Callable[[Any], str]]] = {
    "meta": meta_to_text,
    "store": "{}\n".format,
    "machine": record_to_text,
    "token": pad,
    "span": lambda span: f"{pad(span.end)} {holder_to_text(span.holder)}",
    "mark": mark_to_text,
    "since": pad,
}


def value_to_text(key: Key, thing: Thing | None) -> str | None:
    """The text to keep under a key; None if there is to be none."""
    return None if thing is None else _WRITERS.get(key[0], str)(thing)


def value_from_text(key: Key, text: str, url: str) -> Thing:
    """The value of what `value_to_text` gave."""
    match key:
        case ("meta",):
            return meta_from_text(text, url)
        case ("machine", int(machine)):
            return record_from_text(machine, text)
        case ("span", int(machine), int(start)):
            end, _, holder = text.partition(" ")
            return Span(machine, start, int(end), holder_from_text(holder))
        case ("mark", str(delegator)):
            return mark_from_text(delegator, text)
        case ("token" | "since", *_):
            return int(text)
    return text


def beginning(key: Key, wanted: Stamp | Found) -> str | None:
    """The beginning of each text that meets a condition, and of no other; None if there must be no text."""
    if isinstance(wanted, Found):
        return None if wanted is Found.NOTHING else ""
    if isinstance(wanted, str):
        return f"{wanted}\n" if key == STORE else wanted
    if key == META:
        return f'{{"version": {wanted}, '
    return f"{wanted} " if key[0] == "machine" else pad(wanted)


# --- what Redis and etcd share ---


class TextStore(KeyedStore):
    """A store whose engine keeps texts, and can hold what an older zflake wrote."""

    @abstractmethod
    def _texts(self, keys: Sequence[Key]) -> list[str | None]:
        """The text under each key; None if there is none.  In as few round trips as can be."""

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Raises `StoreError` for each failure of the engine, and for what can't be understood."""

    @abstractmethod
    def _has_strangers(self) -> bool:
        """Whether a store without a meta has something that is no mark."""

    @abstractmethod
    def _old_items(self) -> Items:
        """The items that schema 3 keeps in a form of its own; no delegator writes them any more."""

    def _drop_old(self) -> None:
        """Remove what only schema 3 had."""

    def _get(self, keys: Sequence[Key]) -> list[Any]:
        with self._errors():
            return [
                None if text is None else value_from_text(key, text, self.url)
                for key, text in zip(keys, self._texts(keys) if keys else (), strict=True)
            ]

    def _check_data(self, *, read_only: bool) -> None:
        """See what is there, and bring a store of an older schema to this one."""
        meta, filling = self._get([META, FILLING])
        if meta is not None:
            if not read_only:
                self._convert()
            self.meta()
            return
        self.half_filled = filling is not None
        with self._errors():
            if not self.half_filled and self._has_strangers():
                raise self._foreign()
        self.had_data = bool(self.marks())

    def _convert(self) -> None:
        """Bring the store to this schema; that can be broken off anywhere, and done by several at once.

        The meta says first that older delegators may not use the store.  From then on no delegator writes a
        record, until the meta says that all is converted.
        """
        for _ in range(TRIES):
            (text,) = self._texts([META])
            with self._errors():
                meta = meta_from_text(text or "", self.url)
            if meta.schema >= SCHEMA:
                return
            new = replace(meta, reader=READER, version=meta.version + 1)
            if meta.reader >= READER:
                if not self._fill({META: meta.version}, self._old_items()):
                    continue
                self._drop_old()
                new = replace(new, schema=SCHEMA)
            # The whole text is compared: in schema 3 the stamp does not come first.
            self._commit(Step({META: text or ""}, {META: new, STORE: new.store_id}))
        raise StoreError(
            f"{self.url}: others keep changing it while it is brought to schema {SCHEMA}; start again"
        )
