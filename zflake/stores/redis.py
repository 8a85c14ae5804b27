"""One Redis, Snowcloud's engine: as durable as `appendfsync always` makes it, and no more.

Everything that counts is written by one script, redis.lua, which has the keys on top.  Redis acknowledges a
write that a replica lacks, so a failover, like a restart, may forget: the script writes only while the server
is the one that meta knows.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Final

from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, Store, batched, foreign, outdated, reading, traced
from zflake.stores.text import (
    holder_to_text,
    mark_from_text,
    mark_to_text,
    meta_from_text,
    meta_to_text,
    pad,
    record_from_text,
    record_to_text,
    span_of,
)
from zflake.stores.url import parse_url

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ConfigError("redis:// needs the redis package: pip install 'zflake[redis]'") from error

TIMEOUT_S: Final = 2.0
PORT: Final = 6379
CHUNK: Final = 256
ADVICE: Final = "name another ?prefix="
DATA: Final = ("machines", "tokens", "fences", "ends")
OPTIONS: Final = ("prefix", "unchecked", "ca")
FORM: Final = "redis://[user:password@]host[:port][/db][?prefix=zflake:], or rediss:// and ?ca=FILE for TLS"
NEEDED: Final = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
SCRIPT: Final = files("zflake.stores").joinpath("redis.lua").read_text("utf-8")


class RedisStore(Store):
    """Records in a Redis, under a prefix: `redis://[user:password@]host[:port][/db][?prefix=zflake:]`.

    With TLS it is `rediss://`, and `?ca=FILE` where the server's certificate is of an authority of your own.

    A server that is a replica, does not write every change to disk before it answers, or may evict keys is
    refused, unless the URL says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` where the server can't be used.
    """

    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url, OPTIONS)
        self.url = where.name
        self._prefix = where.options.get("prefix", "zflake:")
        unchecked, tls = where.flag("unchecked"), url.startswith("rediss:")
        db = where.path.removeprefix("/") or "0"
        if len(where.hosts) != 1 or not db.isdecimal() or ("ca" in where.options and not tls):
            raise ConfigError(f"{self.url}: write {FORM}")
        ((host, port),) = where.hosts
        secured: dict[str, Any] = {"ssl_ca_certs": where.options.get("ca")} if tls else {}
        pool = redis.ConnectionPool(
            redis.SSLConnection if tls else redis.Connection,
            host=host,
            port=port or PORT,
            db=int(db),
            username=where.user,
            password=where.password,
            decode_responses=True,
            encoding_errors="backslashreplace",
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),  # an unknown outcome is for the caller to resolve
            **secured,
        )
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._unused_from: dict[int, int] = {}
        try:
            with self._errors():
                self._script = self._redis.register_script(SCRIPT)
                if not read_only and not unchecked:
                    self._check_server()
                self._check_data()
        except BaseException:
            self.close()
            raise

    def meta(self) -> Meta | None:
        with self._errors():
            text = self._redis.hget(self._key("meta"), "text")
            return None if text is None else meta_from_text(text, self.url)

    def incarnation(self) -> str:
        with self._errors():
            return str(self._script(keys=[self._key("meta")]))

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        me = secrets.token_hex(16)
        records, spans = list(contents.records), list(contents.spans)
        with self._errors(), self._filling() as pipe:
            # What a copy left that was broken off goes first.
            left = list(self._redis.scan_iter(f"{self._escaped()}spans:*", CHUNK))
            pipe.delete(*map(self._key, DATA), *left)
            pipe.set(self._key("since"), pad(contents.since))
            for mark in contents.marks:
                pipe.hset(self._key("marks"), mark.delegator, mark_to_text(mark))
            if records or spans:
                pipe.set(self._key("filling"), me)
            else:
                self._put_meta(pipe, meta)
        if not records and not spans:
            return
        # In small pieces: Redis does nothing else meanwhile.
        for some_records in batched(records, CHUNK):
            with self._errors(), self._filling(me) as pipe:
                for record in some_records:
                    machine = pad(record.machine)
                    pipe.hset(self._key("machines"), machine, record_to_text(record))
                    pipe.zadd(self._key("fences"), {f"{pad(record.fence)} {machine}": 0})
                    if record.token is not None:
                        pipe.hset(self._key("tokens"), record.token.hex(), machine)
        for some_spans in batched(spans, CHUNK):
            with self._errors(), self._filling(me) as pipe:
                for span in some_spans:
                    machine, start, end = pad(span.machine), pad(span.start), pad(span.end)
                    text = f"{start} {end} {holder_to_text(span.holder)}"
                    pipe.zadd(self._key(f"spans:{machine}"), {text: 0})
                    pipe.zadd(self._key("ends"), {f"{end} {machine} {start}": 0})
        # Meta comes last: what is half filled is not a store yet.
        with self._errors(), self._filling(me) as pipe:
            self._put_meta(pipe, meta)

    def contents(self) -> Contents:
        with self._errors():
            machines = sorted(self._redis.hgetall(self._key("machines")).items())
            records = [record_from_text(int(machine), text) for machine, text in machines]
            spans: list[Span] = []
            for some in batched(records, CHUNK):
                with self._redis.pipeline(transaction=False) as pipe:
                    for record in some:
                        pipe.zrange(self._key(f"spans:{pad(record.machine)}"), 0, -1)
                    for record, texts in zip(some, pipe.execute(), strict=True):
                        spans += [span_of(record.machine, *text.split(" ", 2)) for text in texts]
            return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        with self._errors(), self._redis.pipeline() as pipe:
            pipe.watch(self._key("meta"))
            text = pipe.hget(self._key("meta"), "text")
            now = None if text is None else meta_from_text(text, self.url)
            if now is None or (now.store_id, now.version) != (old.store_id, old.version):
                return False
            pipe.multi()
            self._put_meta(pipe, new)
            try:
                pipe.execute()
            except redis.WatchError:
                return False
            return True

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        if not machines:
            return []
        with self._errors():
            texts = self._redis.hmget(self._key("machines"), list(map(pad, machines)))
            pairs = zip(machines, texts, strict=True)
            return [Record(m) if text is None else record_from_text(m, text) for m, text in pairs]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        if not tokens:
            return []
        with self._errors():
            machines = self._redis.hmget(self._key("tokens"), [token.hex() for token in tokens])
        records = self.by_machines([int(machine) for machine in machines if machine is not None])
        found = {record.token: record for record in records}
        return [found.get(token) for token in tokens]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        unused: list[Record] = []
        begin = self._unused_from.get(first, first)
        if limit > 0:
            while begin <= last and len(unused) < limit:
                numbers = range(begin, min(begin + CHUNK, last + 1))
                unused += [r for r in self.by_machines(numbers) if r.gen == 0]
                if not unused:
                    self._unused_from[first] = numbers.stop
                begin = numbers.stop
        unused = unused[:limit]
        used: list[Record] = []
        at = 0
        while len(used) < limit - len(unused):
            with self._errors():
                members = self._redis.zrangebylex(self._key("fences"), "-", "+", at, CHUNK)
            machines = [int(member.split(" ")[1]) for member in members]
            used += self.by_machines([machine for machine in machines if first <= machine <= last])
            at += CHUNK
            if len(members) < CHUNK:
                break
        used.sort(key=lambda record: (record.fence, record.machine))
        return [*unused, *used[: limit - len(unused)]]

    def held(self, now: int) -> Sequence[Record]:
        with self._errors():
            members = self._redis.zrangebylex(self._key("fences"), f"[{pad(now + 1)}", "+")
        records = self.by_machines(sorted(int(member.split(" ")[1]) for member in members))
        return [record for record in records if record.token is not None and record.fence > now]

    def marks(self) -> Sequence[Mark]:
        with self._errors():
            return [mark_from_text(*item) for item in sorted(self._redis.hgetall(self._key("marks")).items())]

    def forget_marks(self, before_us: int) -> None:
        gone = [mark.delegator for mark in self.marks() if mark.now_us < before_us]
        if gone:
            with self._errors():
                self._redis.hdel(self._key("marks"), *gone)

    def set_marks(self, now_us: int) -> None:
        with self._errors(), self._redis.pipeline() as pipe:
            for mark in self.marks():
                text = mark_to_text(Mark(mark.delegator, now_us, mark.lead_us, mark.address))
                pipe.hset(self._key("marks"), mark.delegator, text)
            pipe.execute()

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        args = ["", ""] if mark is None else [mark.delegator, mark_to_text(mark)]
        for swap in swaps:
            new = swap.new
            gen, fence, token, span_start, rest = record_to_text(new).split(" ", 4)
            args += [str(swap.version), pad(new.machine), str(new.gen - 1), gen, fence, token, span_start]
            args += [rest, holder_to_text(new.holder)]
        with self._errors():
            return [outcome == 1 for outcome in self._script(keys=[self._key("meta")], args=args)]

    def trace(self, machine: int, tick: int) -> Traced:
        with self._errors():
            below = self._redis.zrevrangebylex(
                self._key(f"spans:{pad(machine)}"), f"({pad(tick)}!", "-", 0, 1
            )
            since = self._since()
            span = span_of(machine, *below[0].split(" ", 2)) if below else None
        return traced(span, tick, since)

    def prune(self, before: int, keep: int, limit: int) -> int:
        with self._errors():
            count = self._redis.zcard(self._key("ends"))
            oldest = self._redis.zrangebylex(self._key("ends"), "-", "+", 0, limit)
            ends = [int(text.split(" ")[0]) for text in oldest]
            forgotten = oldest[: outdated(ends, count, before, keep)]
            if forgotten:
                since = max(self._since(), int(forgotten[-1].split(" ")[0]))
                with self._redis.pipeline() as pipe:
                    for text in forgotten:
                        _, machine, start = text.split(" ")
                        pipe.zremrangebylex(self._key(f"spans:{machine}"), f"[{start} ", f"({start}!")
                    pipe.zrem(self._key("ends"), *forgotten)
                    pipe.set(self._key("since"), pad(since))
                    pipe.execute()
        return len(forgotten)

    def close(self) -> None:
        with contextlib.suppress(redis.RedisError):
            self._redis.connection_pool.disconnect()

    # --- inside ---

    def _key(self, name: str) -> str:
        return self._prefix + name

    @contextlib.contextmanager
    def _filling(self, me: str | None = None) -> Iterator[Any]:
        """A transaction that goes through where there is no meta, and nobody has begun to fill the store after `me`."""
        taken = StoreError(f"{self.url} is initialised already, or just now by somebody else")
        with self._redis.pipeline() as pipe:
            pipe.watch(self._key("meta"), self._key("filling"))
            if pipe.exists(self._key("meta")) or me not in (None, pipe.get(self._key("filling"))):
                raise taken
            pipe.multi()
            yield pipe
            try:
                pipe.execute()
            except redis.WatchError as error:
                raise taken from error

    def _escaped(self) -> str:
        return re.sub(r"([*?\[\]\\^])", r"\\\1", self._prefix)

    def _put_meta(self, pipe: Any, meta: Meta) -> None:
        pipe.delete(self._key("filling"))
        # The script compares two of them; the text has them all.
        fields = {"text": meta_to_text(meta), "version": meta.version, "incarnation": meta.incarnation}
        pipe.hset(self._key("meta"), mapping=fields)

    def _since(self) -> int:
        return int(self._redis.get(self._key("since")) or 0)

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

    def _check_data(self) -> None:
        if self.meta() is None:
            self.half_filled = bool(self._redis.exists(self._key("filling")))
            if not self.half_filled and self._redis.exists(*map(self._key, ("meta", *DATA))):
                raise foreign(self.url, ADVICE)
            self.had_data = bool(self.marks())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with reading(self.url, ADVICE):
            try:
                yield
            except redis.AuthenticationError as error:
                raise StoreError(f"{self.url} refuses the password: {error}") from error
            except redis.TimeoutError as error:
                raise StoreError(f"{self.url} does not answer within {TIMEOUT_S:g} s") from error
            except redis.ConnectionError as error:
                raise StoreError(f"can't reach {self.url}: {error}; is it running?") from error
            except redis.ResponseError as error:
                if str(error).startswith("WRONGTYPE"):
                    raise ValueError(str(error)) from error
                raise StoreError(f"{self.url}: {error}") from error
            except (redis.RedisError, OSError) as error:
                raise StoreError(f"{self.url}: {error}") from error


open_url = RedisStore
