"""Runs a daemon that kills itself, with SIGKILL, as it passes a point for the n-th time.

    python -m tests.system.failpoints POINT N MODULE [the daemon's options]

The daemon is the real one: its functions are wrapped here, from outside.  Points of a delegator's start are
live at once, all others from SIGUSR1 on, so that a cluster can come to rest before.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

from zflake.core.lease import Renew, Swap
from zflake.core.lessee import Lessee
from zflake.delegator import executor, server, service
from zflake.holder.lease import LeaseConversation
from zflake.holder.lease_client import LeaseClient
from zflake.stores.sqlite import SqliteStore
from zflake.stores.sqlite_file import DatabaseFile
from zflake.worker.handler import Handler

STATEMENTS: Final = ("before BEGIN", "after BEGIN", "before COMMIT", "after COMMIT")
TRANSACTIONS: Final = ("initialise", "meta", "mark", "acquire", "renew", "release")
DELEGATOR_POINTS: Final = (
    *(f"{kind}: {where}" for kind in TRANSACTIONS for where in STATEMENTS),
    *(f"{kind}: {where} the marker" for kind in TRANSACTIONS for where in ("before", "after")),
    # The transaction is over, and the outcome not read again yet.
    *(f"{kind}: after the swap" for kind in ("acquire", "renew", "release")),
    "answer: before the log",
    "answer: after the log",
    "answer: before the send",
    "answer: after the send",
)
WORKER_POINTS: Final = (
    "renewal: before the send",
    "renewal: after the send",
    "renewal: before the grant is taken in",
    "renewal: after the grant is taken in",
    "ids: before they are minted",
    "ids: after they are minted",
)


class Point:
    def __init__(self, name: str, times: int) -> None:
        if name not in DELEGATOR_POINTS + WORKER_POINTS:
            raise SystemExit(f"no point {name!r}")
        self.name, self.left = name, times
        self.armed = name.startswith(("initialise", "meta"))
        self.doing: Collection[str] = ()

    def arm(self, *_: object) -> None:
        self.armed = True

    def passed(self, where: str, doing: Collection[str] | None = None) -> None:
        """Die here, if this is where and it is time."""
        if not self.armed or self.name not in [f"{kind}: {where}" for kind in doing or self.doing]:
            return
        self.left -= 1
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def while_doing(self, *kinds: str) -> Iterator[None]:
        self.doing = kinds
        try:
            yield
        finally:
            self.doing = ()


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper`, which is given the old function first, in place of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def around(point: Point, what: str, doing: Collection[str] | None = None) -> Callable[..., Any]:
    """A wrapper that passes the point before and after the old function."""

    def wrapper(original: Any, *args: Any) -> Any:
        point.passed(f"before {what}", doing)
        result = original(*args)
        point.passed(f"after {what}", doing)
        return result

    return wrapper


def kinds_of(swaps: Collection[Swap]) -> set[str]:
    """The work of a transaction."""
    kinds = set() if swaps else {"mark"}
    for swap in swaps:
        new = swap.new
        if new.token is None:
            kinds.add("release")
        else:
            kinds.add("acquire" if new.start == new.tenancy_start else "renew")
    return kinds


def wrap_store(point: Point) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            word = sql.partition(" ")[0]
            if word in ("BEGIN", "COMMIT"):
                point.passed(f"before {word}")
            cursor = super().execute(sql, *args)
            if word in ("BEGIN", "COMMIT"):
                point.passed(f"after {word}")
            return cursor

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)  # type: ignore[assignment]

    def swap(original: Any, store: SqliteStore, swaps: Any, mark: Any = None) -> Any:
        kinds = kinds_of(swaps)
        with point.while_doing(*kinds):
            outcome = original(store, swaps, mark)
            point.passed("after the swap")
            return outcome

    def doing(kind: str) -> Callable[..., Any]:
        def wrapper(original: Any, store: SqliteStore, *args: Any) -> Any:
            with point.while_doing(kind):
                return original(store, *args)

        return wrapper

    wrap(SqliteStore, "swap", swap)
    wrap(SqliteStore, "initialise", doing("initialise"))
    wrap(SqliteStore, "swap_meta", doing("meta"))
    wrap(DatabaseFile, "write_marker", around(point, "the marker"))


def wrap_answers(point: Point) -> None:
    answers = False

    def store_result(original: Any, *args: Any) -> Any:
        nonlocal answers
        answers = True
        point.passed("before the send", ["answer"])
        return original(*args)

    def send(original: Any, *args: Any) -> Any:
        nonlocal answers
        sent = original(*args)
        if answers:
            point.passed("after the send", ["answer"])
        answers = False
        return sent

    wrap(executor, "_record_lease", around(point, "the log", ["answer"]))
    wrap(service, "store_result", store_result)
    wrap(server, "send", send)


def wrap_worker(point: Point) -> None:
    asked: list[str] = []

    def ask(original: Any, lease: LeaseConversation, what: Any, local_us: int) -> Any:
        asked.append("renewal" if isinstance(what, Renew) else "")
        point.passed("before the send", asked)
        return original(lease, what, local_us)

    def serve(original: Any, client: LeaseClient, local_us: int) -> None:
        original(client, local_us)
        if asked:
            point.passed("after the send", asked)
        asked.clear()

    def accept(original: Any, lessee: Lessee, *args: Any) -> None:
        kinds = [""] if lessee.mint is None else ["renewal"]
        around(point, "the grant is taken in", kinds)(original, lessee, *args)

    wrap(LeaseConversation, "_ask", ask)
    wrap(LeaseClient, "service", serve)
    wrap(Lessee, "_accept", accept)
    wrap(Handler, "_mint", around(point, "they are minted", ["ids"]))


def main() -> None:
    name, times, module, *argv = sys.argv[1:]
    point = Point(name, int(times))
    signal.signal(signal.SIGUSR1, point.arm)
    if name in WORKER_POINTS:
        wrap_worker(point)
    else:
        wrap_store(point)
        wrap_answers(point)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
