"""Stores: where a delegator's records are durable.  They load and swap; they decide nothing.

contract.py  what every store does
memory.py    the reference implementation, which forgets
sqlite.py    one file on one machine, the default; sqlite_file.py: whether it is what it was
"""

from __future__ import annotations

from typing import Final

from zflake.errors import ConfigError
from zflake.stores.contract import Store

__all__ = ["Store", "check_url", "open_store"]

MEMORY: Final = "memory:"


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Open the store of that URL: `sqlite:///file` or `memory:`.

    With `read_only` it is looked at, though a delegator may be using it; there must be one.

    Raises `ConfigError` for a URL of no known engine, `StoreError` where the store can't be used.
    """
    check_url(url)
    if url == MEMORY:
        from zflake.stores.memory import MemoryStore  # noqa: PLC0415  (an engine is loaded when it is used)

        return MemoryStore()
    from zflake.stores.sqlite import SqliteStore, path_of  # noqa: PLC0415

    return SqliteStore(path_of(url), read_only=read_only)


def check_url(url: str) -> None:
    """Raise `ConfigError` for a URL of no known engine; nothing is opened."""
    if url == MEMORY:
        return
    if not url.startswith("sqlite:"):
        raise ConfigError(
            f"no store engine for {url!r}: take sqlite:///relative/path, sqlite:////absolute/path or memory:"
        )
    from zflake.stores.sqlite import path_of  # noqa: PLC0415

    path_of(url)
