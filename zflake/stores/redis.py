"""One Redis, Snowcloud's engine: as durable as `appendfsync always` makes it, and no more.

One script, redis.lua, writes everything that counts; it has the layout on top.  Redis acknowledges a write that a
replica lacks, so a failover, like a restart, may forget: the script takes records only while the server is the
one that the meta knows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Final

from zflake.core.lease import Meta, Span
from zflake.errors import ConfigError, StoreError
from zflake.stores.keyed import META, SINCE, Items, Key, Step, items_of, items_of_span
from zflake.stores.text import (
    TextStore,
    beginning,
    holder_from_text,
    key_from_text,
    key_to_text,
    mark_from_text,
    record_from_text,
    value_to_text,
)
from zflake.stores.url import parse_url

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ConfigError("redis:// needs the redis package: pip install 'zflake[redis]'") from error

TIMEOUT_S: Final = 2.0
"""Seconds to wait for a connection, and for an answer."""
PORT: Final = 6379
OPTIONS: Final = ("prefix", "unchecked", "ca")
FORM: Final = "redis://[user:password@]host[:port][/db][?prefix=zflake:], or rediss:// and ?ca=FILE for TLS"
NEEDED: Final = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
SCRIPT: Final = files("zflake.stores").joinpath("redis.lua").read_text("utf-8")
LAYOUT_3: Final = ("machines", "tokens", "fences", "ends", "marks", "since")
"""Keys of schema 3, beside the meta and one `spans:MACHINE` for each machine."""


class RedisStore(TextStore):
    """Records in a Redis, under a prefix: `redis://[user:password@]host[:port][/db][?prefix=zflake:]`.

    With TLS it is `rediss://`, and `?ca=FILE` if the server's certificate is of an authority of your own.

    A server that is a replica, does not write every change to disk before it answers, or may evict keys is
    refused, unless the URL says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` if the server can't be used.
    """

    advice = "name another ?prefix="
    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url, OPTIONS)
        super().__init__(where.name)
        self._prefix = where.options.get("prefix", "zflake:")
        self._meta_key, self._values_key, self._order_key = (
            self._prefix + name for name in ("meta", "values", "order")
        )
        unchecked, tls = where.flag("unchecked"), url.startswith("rediss:")
        db = where.path.removeprefix("/") or "0"
        if len(where.hosts) != 1 or not db.isdecimal() or ("ca" in where.options and not tls):
            raise ConfigError(f"{self.url}: write {FORM}")
        ((host, port),) = where.hosts
        self._redis: Any = redis.Redis(
            host=host,
            port=port or PORT,
            db=int(db),
            ssl=tls,
            ssl_ca_certs=where.options.get("ca"),
            username=where.user,
            password=where.password,
            decode_responses=True,
            encoding_errors="backslashreplace",
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),  # an unknown outcome is for the caller to resolve
        )
        try:
            with self._errors():
                self._script = self._redis.register_script(SCRIPT)
                if not read_only and not unchecked:
                    self._check_server()
            self._check_data(read_only=read_only)
        except BaseException:
            self.close()
            raise

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        return str(self._run())

    def close(self) -> None:
        with contextlib.suppress(redis.RedisError):
            self._redis.close()

    # --- keys ---

    def _texts(self, keys: Sequence[Key]) -> list[str | None]:
        with self._errors():
            first = [self._redis.hget(self._meta_key, "text")] if keys[0] == META else []
            names = list(map(key_to_text, keys[len(first) :]))
            return first + (self._redis.hmget(self._values_key, names) if names else [])

    def _keys(self, low: Key, high: Key, *, limit: int = 0, last: bool = False) -> list[Key]:
        begin, end = f"[{key_to_text(low)}", f"({key_to_text(high)}"
        with self._errors():
            if last:
                found = self._redis.zrevrangebylex(self._order_key, end, begin, 0, 1)
            else:
                found = self._redis.zrangebylex(self._order_key, begin, end, 0, limit or -1)
            return list(map(key_from_text, found))

    def _count(self, low: Key, high: Key) -> int:
        with self._errors():
            return int(
                self._redis.zlexcount(self._order_key, f"[{key_to_text(low)}", f"({key_to_text(high)}")
            )

    def _commit(self, first: Step, steps: Sequence[Step] = ()) -> list[bool] | None:
        request = [
            (
                [(key_to_text(key), beginning(key, wanted)) for key, wanted in step.conditions.items()],
                [(key_to_text(key), value_to_text(key, thing)) for key, thing in step.writes.items()],
            )
            for step in (first, *steps)
        ]
        held, *outcomes = self._run(json.dumps(request))
        return [outcome == 1 for outcome in outcomes] if held else None

    def _run(self, *request: str) -> Any:
        with self._errors():
            return self._script(keys=[self._meta_key, self._values_key, self._order_key], args=request)

    # --- what is there ---

    def _check_server(self) -> None:
        if (role := self._redis.info("replication")["role"]) != "master":
            raise StoreError(f"{self.url} is a {role}: name the master")
        try:
            settings = {name: self._redis.config_get(name).get(name) for name in NEEDED}
        except redis.ResponseError as error:
            raise StoreError(
                f"{self.url} does not tell its settings ({error}): see that it has appendonly yes, appendfsync always"
                " and maxmemory-policy noeviction, and say so with ?unchecked=yes in the URL"
            ) from error
        wrong = [f"{name} {value}" for name, value in NEEDED.items() if settings[name] != value]
        if wrong:
            raise StoreError(
                f"{self.url} can lose what it has promised, and with that give IDs twice: set {', '.join(wrong)};"
                " or take the risk with ?unchecked=yes in the URL"
            )

    def _has_strangers(self) -> bool:
        others = [self._meta_key, *(self._prefix + name for name in LAYOUT_3)]
        ours = bool(self._redis.zrangebylex(self._order_key, "-", "[mark/", 0, 1))
        return ours or bool(self._redis.exists(*others))

    def _old_items(self) -> Items:
        with self._errors():
            # The script of schema 3 knows the meta by these two, and writes nothing without them.
            self._redis.hdel(self._meta_key, "version", "incarnation")
            for machine, text in self._redis.hgetall(self._prefix + "machines").items():
                yield from items_of(record_from_text(int(machine), text))
                for span in self._redis.zrange(f"{self._prefix}spans:{machine}", 0, -1):
                    start, end, holder = span.split(" ", 2)
                    yield from items_of_span(
                        Span(int(machine), int(start), int(end), holder_from_text(holder))
                    )
            for delegator, text in self._redis.hgetall(self._prefix + "marks").items():
                yield ("mark", delegator), mark_from_text(delegator, text)
            since = self._redis.get(self._prefix + "since")
            if since is not None:  # else it was taken over before
                yield SINCE, int(since)

    def _drop_old(self) -> None:
        with self._errors():
            # The machines go last, since they say which spans there are.
            for machine in self._redis.hkeys(self._prefix + "machines"):
                self._redis.delete(f"{self._prefix}spans:{machine}")
            self._redis.delete(*(self._prefix + name for name in LAYOUT_3))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with self._reading():
            try:
                yield
            except redis.AuthenticationError as error:
                raise StoreError(f"{self.url} refuses the password: {error}") from error
            except redis.TimeoutError as error:
                raise StoreError(f"{self.url} does not answer within {TIMEOUT_S:g} s") from error
            except redis.ConnectionError as error:
                raise StoreError(f"can't reach {self.url}: {error}; is it running?") from error
            except (redis.RedisError, OSError) as error:
                if "WRONGTYPE" in str(error):
                    raise ValueError(str(error)) from error
                raise StoreError(f"{self.url}: {error}") from error


open_url = RedisStore
