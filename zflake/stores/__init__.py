"""Stores: where a delegator's records are durable.  They load and swap; they decide nothing.

contract.py  what every store does
memory.py    the reference implementation, which forgets
sqlite.py    one file on one machine, the default
"""

from __future__ import annotations

from zflake.errors import ConfigError
from zflake.stores.contract import Store

__all__ = ["Store", "open_store"]


def open_store(url: str) -> Store:
    """Open the store of that URL: `sqlite:///file` or `memory:`.

    Raises `ConfigError` for a URL of no known engine, `StoreError` where the store can't be used.
    """
    engine = url.partition(":")[0]
    if engine == "memory":
        from zflake.stores.memory import MemoryStore  # noqa: PLC0415  (an engine is loaded when it is used)

        return MemoryStore()
    if engine == "sqlite":
        from zflake.stores.sqlite import SqliteStore, path_of  # noqa: PLC0415

        return SqliteStore(path_of(url))
    raise ConfigError(
        f"no store engine for {url!r}: take sqlite:///relative/path, sqlite:////absolute/path or memory:"
    )
