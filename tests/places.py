"""Where a store may lie, on each engine, and what is there, told and changed by the engine's own means."""

from __future__ import annotations

import itertools
import json
import sqlite3
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast

import psycopg
import redis
import requests
from psycopg import sql

from tests.servers import Servers

SERVED: Final = ("redis", "etcd", "postgresql")
"""The engines that are servers."""
_numbers: Iterator[int] = itertools.count()


class Place(ABC):
    """Room for one store."""

    url: str

    @property
    def shown(self) -> str:
        """What of the URL may be shown: neither login nor options."""
        scheme, _, rest = self.url.partition("?")[0].partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @abstractmethod
    def everything(self) -> object:
        """All that is on the server, or in the folder; two looks are equal where nothing was written between."""

    @abstractmethod
    def set_schema(self, schema: int) -> None:
        """Make the store say that it is of another schema."""

    @abstractmethod
    def readers(self) -> tuple[int, int]:
        """The schema and the reader that the store says, each where every zflake looks for them."""

    @abstractmethod
    def damage_meta(self, text: str) -> None:
        """Put a text in place of meta's, or of its layout where meta has columns."""

    @abstractmethod
    def damage_record(self, machine: int) -> None:
        """Put junk in place of who holds a machine ID."""

    @abstractmethod
    def put_foreign(self) -> None:
        """Put what another program could have put where the store is to be."""


class SqlitePlace(Place):
    """A file in a folder.  What lies beside it is no part of it: who looks may note there what he saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def everything(self) -> object:
        if not self.path.exists():
            return None
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as db:
            return list(db.iterdump()), *db.execute("PRAGMA user_version").fetchone()

    def set_schema(self, schema: int) -> None:
        self._execute(f"PRAGMA user_version = {schema}")

    def readers(self) -> tuple[int, int]:
        with closing(sqlite3.connect(self.path)) as db:
            (reader,) = db.execute("PRAGMA user_version").fetchone()
            (schema,) = db.execute("SELECT schema FROM meta").fetchone()
            return schema, reader

    def damage_meta(self, text: str) -> None:
        self._execute("UPDATE meta SET layout = ?", text)

    def damage_record(self, machine: int) -> None:
        self._execute("UPDATE machine SET holder = CAST(X'FFFE' AS TEXT) WHERE machine = ?", machine)

    def put_foreign(self) -> None:
        self._execute("CREATE TABLE orders (number)")

    def _execute(self, text: str, *values: object) -> None:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute(text, values)


class TextPlace(Place):
    """A prefix in an engine that keeps meta as a text."""

    @abstractmethod
    def meta_text(self) -> str | bytes:
        """The text of meta."""

    def set_schema(self, schema: int) -> None:
        meta = json.loads(self.meta_text()) | {"zflake": schema, "reader": schema}
        self.damage_meta(json.dumps(meta))

    def readers(self) -> tuple[int, int]:
        meta = json.loads(self.meta_text())
        return meta["zflake"], meta["reader"]


class RedisPlace(TextPlace):
    """A prefix in a database of a Redis."""

    def __init__(self, url: str, prefix: str) -> None:
        self.prefix = prefix
        self.url = f"{url}?prefix={prefix}"
        self.client = redis.Redis.from_url(url)

    def everything(self) -> object:
        look: dict[bytes, Callable[[bytes], Any]] = {
            b"string": self.client.get,
            b"hash": self.client.hgetall,
            b"zset": lambda key: self.client.zrange(key, 0, -1, withscores=True),
            b"list": lambda key: self.client.lrange(key, 0, -1),
        }
        keys = cast("list[bytes]", sorted(self.client.scan_iter()))
        return {key: look[cast("bytes", self.client.type(key))](key) for key in keys}

    def meta_text(self) -> bytes:
        return cast("bytes", self.client.hget(f"{self.prefix}meta", "text"))

    def damage_meta(self, text: str) -> None:
        self.client.hset(f"{self.prefix}meta", "text", text)

    def damage_record(self, machine: int) -> None:
        self.client.hset(f"{self.prefix}values", f"machine/{machine:020}", "junk")

    def put_foreign(self) -> None:
        self.client.set(f"{self.prefix}meta", "of another program")


class EtcdPlace(TextPlace):
    """A prefix of an etcd."""

    def __init__(self, url: str, prefix: str, options: str = "") -> None:
        """`url` with one host; `prefix` is added to its path, with a slash in front."""
        host, slash, path = url.removeprefix("etcd://").partition("/")
        self.prefix = slash + path + prefix
        self.url = f"etcd://{host}{self.prefix}{options}"
        self._api = f"http://{host}/v3"

    def ask(self, path: str, **request: Any) -> dict[str, Any]:
        answer = requests.post(f"{self._api}{path}", json=request, timeout=5)
        answer.raise_for_status()
        return cast("dict[str, Any]", answer.json())

    def everything(self) -> object:
        answer = self.ask("/kv/range", key=b64("\0"), range_end=b64("\0"))
        return answer["header"]["revision"], answer.get("kvs", ())

    def put(self, key: str, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        self.ask("/kv/put", key=b64(key), value=b64encode(data).decode())

    def meta_text(self) -> bytes:
        (pair,) = self.ask("/kv/range", key=b64(f"{self.prefix}/meta"))["kvs"]
        return b64decode(pair["value"])

    def damage_meta(self, text: str) -> None:
        self.put(f"{self.prefix}/meta", text)

    def damage_record(self, machine: int) -> None:
        self.put(f"{self.prefix}/machine/{machine:020}", "junk")

    def put_foreign(self) -> None:
        self.put(f"{self.prefix}/orders/17", "of another program")


class PostgresqlPlace(Place):
    """A database of a PostgreSQL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def execute(self, text: str, *values: object) -> None:
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute(cast("Any", text), values or None)

    def everything(self) -> object:
        with psycopg.connect(self.url) as db:
            schemas = db.execute("SELECT nspname FROM pg_namespace ORDER BY 1").fetchall()
            tables = db.execute(
                "SELECT table_schema, table_name FROM information_schema.tables"
                " WHERE table_schema NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2"
            ).fetchall()
            every = sql.SQL("SELECT * FROM {} t ORDER BY t::text")
            rows = {t: db.execute(every.format(sql.Identifier(*t))).fetchall() for t in tables}
            return schemas, rows

    def set_schema(self, schema: int) -> None:
        self.execute("UPDATE zflake.meta SET schema = %s, reader = %s", schema, schema)

    def readers(self) -> tuple[int, int]:
        with psycopg.connect(self.url) as db:
            return cast("tuple[int, int]", db.execute("SELECT schema, reader FROM zflake.meta").fetchone())

    def damage_meta(self, text: str) -> None:
        self.execute("UPDATE zflake.meta SET layout = %s", text)

    def damage_record(self, machine: int) -> None:
        self.execute("UPDATE zflake.machine SET holder = 'junk' WHERE machine = %s", machine)

    def put_foreign(self) -> None:
        self.execute("CREATE SCHEMA zflake")
        self.execute("CREATE TABLE zflake.orders (number int)")


def b64(text: str) -> str:
    return b64encode(text.encode(errors="surrogatepass")).decode()


def etcd_host(servers: Servers) -> str:
    """The shared etcd's URL without a prefix."""
    return f"etcd://127.0.0.1:{servers.etcd.port}"


PLACES: Final[dict[str, Callable[[Path, Servers], Place]]] = {
    "sqlite": lambda folder, _: SqlitePlace(folder / f"store{next(_numbers)}.db"),
    "redis": lambda _, servers: RedisPlace(servers.redis.url, f"place{next(_numbers)}:"),
    "etcd": lambda _, servers: EtcdPlace(etcd_host(servers), f"/place{next(_numbers)}", "?unchecked=yes"),
    "postgresql": lambda _, servers: PostgresqlPlace(servers.postgres.url_of_new_database()),
}
"""From a folder of one's own and the servers to an empty place on each engine that keeps what it has."""
