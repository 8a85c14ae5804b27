"""Stores: where a delegator's records are durable.  They load and swap; they decide nothing.

contract.py    what every store does
keyed.py       the family of those that keep values under keys, with all their guards
memory.py        the reference implementation, which forgets
text.py          keys and values as text, and what these two share because of that:
redis.py         keys in a Redis; redis.lua: the script that writes them
etcd.py          keys in an etcd cluster; etcd_http.py: its API; etcd_identity.py: whether it is what it was
rows.py        the family of those that take SQL, with all their guards
sqlite.py        one file on one machine, the default; sqlite_file.py: whether it is what it was
postgresql.py    tables in a PostgreSQL
url.py         the URLs of those that are servers
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final

from zflake.errors import ConfigError
from zflake.stores.contract import Store
from zflake.stores.url import parse_url

__all__ = ["Store", "check_url", "name_of", "open_store"]

MEMORY: Final = "memory:"
ENGINES: Final = {
    "sqlite": "zflake.stores.sqlite",
    "redis": "zflake.stores.redis",
    "rediss": "zflake.stores.redis",
    "etcd": "zflake.stores.etcd",
    "postgresql": "zflake.stores.postgresql",
}
"""The module of each scheme; its `open_url` opens a store."""
FORMS: Final = (
    "sqlite:///relative/path, sqlite:////absolute/path, postgresql://user@host/database, "
    "etcd://host1,host2,host3/prefix, redis://host:6379/0 or memory:"
)


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Open the store of that URL: `sqlite:///file`, `postgresql://`, `etcd://`, `redis://` or `memory:`.

    With `read_only` the store is only looked at, while a delegator may be using it; there must be one, of this
    schema.  Otherwise a store of an older schema is brought to this one.

    Raises `ConfigError` for a URL of no known engine, or one whose package is not installed, `StoreError`
    if the store can't be used.
    """
    check_url(url)
    if url == MEMORY:
        from zflake.stores.memory import MemoryStore  # noqa: PLC0415  (an engine is loaded when it is used)

        return MemoryStore()
    module = importlib.import_module(ENGINES[url.partition(":")[0]])
    open_url: Callable[..., Store] = module.open_url
    return open_url(url, read_only=read_only)


def name_of(url: str) -> str:
    """The name of a URL's store: the URL without login and options, but with the place inside a database.

    Raises `ConfigError` for a URL that can't be read.
    """
    check_url(url)
    if url == MEMORY or url.startswith("sqlite:"):
        return url
    return parse_url(url).name


def check_url(url: str) -> None:
    """Raise `ConfigError` for a URL of no known engine; nothing is opened."""
    scheme = url.partition(":")[0]
    if url == MEMORY:
        return
    if scheme not in ENGINES:
        raise ConfigError(f"no store engine for {scheme[:20]!r}: take {FORMS}")
    if scheme == "sqlite":
        from zflake.stores.sqlite import path_of  # noqa: PLC0415

        path_of(url)
    elif not url.startswith(f"{scheme}://"):
        raise ConfigError(f"no server in the {scheme}: URL: take {FORMS}")
    else:
        parse_url(url)
