"""An etcd cluster: several delegators, all active, and no single machine that must not fail.

Each record is a key, compared by its mod_revision; what goes with it (token, place in the order of fences,
provenance) is written in the same transaction, meta and this delegator's own mark being compared as well.
etcd's leases are not used: they end by a clock.

    PREFIX/meta                       see text.py
    PREFIX/machine/MACHINE            a record
    PREFIX/token/TOKEN                its machine
    PREFIX/fence/FENCE/MACHINE        empty: the order of fences
    PREFIX/span/MACHINE/START         "end holder"
    PREFIX/end/END/MACHINE/START      empty: the order of ends, for pruning
    PREFIX/mark/DELEGATOR             a mark
    PREFIX/since                      from where on the spans are complete

A cluster that was restored goes on with another cluster ID, or with a revision that was there before: either
is another incarnation.
"""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import Contents, Store
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

try:
    import requests
    from etcd3gw import exceptions
    from etcd3gw.client import Etcd3Client
except ImportError as error:
    raise ConfigError("etcd:// needs the etcd3gw package: pip install 'zflake[etcd]'") from error

TIMEOUT_S: Final = 2.0
PORT: Final = 2379
BATCH: Final = 60
"""Swaps in a transaction: etcd takes 128 operations, nested ones counted with their parents."""
CHUNK: Final = 100
LOSES_COMMITS: Final = ("3.5.0", "3.5.1", "3.5.2")

Op: TypeAlias = dict[str, Any]


class Pair(NamedTuple):
    """A key (without the prefix) with its value."""

    key: str
    value: str
    revision: int
    """Of its last change."""


class EtcdStore(Store):
    """Records in an etcd: `etcd://[user:password@]host1[:port],host2,.../prefix[?tls=yes&ca=FILE]`.

    One of the versions that lose commits when they are killed (3.5.0 to 3.5.2) and a cluster that raised an
    alarm are refused; the former not where the URL says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` where the cluster can't be used.
    """

    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        login, _, hosts = parts.netloc.rpartition("@")
        self._prefix = parts.path.rstrip("/") + "/"
        self.url = f"etcd://{hosts}{parts.path}"
        unchecked = options.pop("unchecked", "no") == "yes" or read_only
        tls, ca = options.pop("tls", "no") == "yes", options.pop("ca", None)
        if options or not hosts or self._prefix == "/":
            raise ConfigError(
                f"{self.url}: write etcd://host1,host2,host3/prefix, and ?tls=yes&ca=FILE where it has TLS"
            )
        self._login = [unquote(part) for part in login.partition(":")[::2]] if login else None
        self._clients = [self._client(host, tls=tls, ca=ca) for host in hosts.split(",")]
        self._turn = 0
        self._unused_from: dict[int, int] = {}
        # As last read: by machine, the record and its key's revision; that of meta; that of the own mark.
        self._seen: dict[int, tuple[Record, int]] = {}
        self._meta_seen: tuple[Meta, int] | None = None
        self._mark_seen: tuple[Mark, int] | None = None
        self._revision = 0
        self._cluster = ""
        self._lives: tuple[str, str] | None = (
            None  # meta's incarnation when it was found outdated, and the new one
        )
        try:
            if not unchecked:
                self._check_server()
            self._check_data()
        except BaseException:
            self.close()
            raise

    def meta(self) -> Meta | None:
        pair = self._get("meta")
        if pair is None:
            self._meta_seen = None
            return None
        meta = meta_from_text(pair.value, self.url)
        self._meta_seen = meta, pair.revision
        return meta

    def incarnation(self) -> str:
        meta = self.meta()
        known = "" if meta is None else meta.incarnation
        if self._lives is not None and self._lives[0] == known:
            return self._lives[1]
        self._lives = None
        if known.partition(" ")[0] != self._cluster:
            self._begin_life(known)
        return self._lives[1] if self._lives else known

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        fresh = [_created("version", self._key("meta"), 0)]
        ops = [self._put("meta", meta_to_text(meta)), self._put("since", pad(contents.since))]
        for record in contents.records:
            ops += [self._put(key, value) for key, value in _keys_of(record).items()]
        for span in contents.spans:
            ops += [self._put(key, value) for key, value in _keys_of_span(span).items()]
        for mark in contents.marks:
            ops.append(self._put(f"mark/{mark.delegator}", mark_to_text(mark)))
        # Meta comes last: what a copy left half done is not a store yet.
        first, rest = ops[:1], iter(ops[1:])
        while chunk := list(islice(rest, CHUNK)):
            if not self._txn(fresh, chunk)[0]:
                raise StoreError(f"{self.url} is initialised already")
        if not self._txn(fresh, first)[0]:
            raise StoreError(f"{self.url} is initialised already")

    def contents(self) -> Contents:
        records = [record_from_text(_number(pair.key), pair.value) for pair in self._range("machine/")]
        spans = [_span(pair) for pair in self._range("span/")]
        return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        if self.meta() is None or self._meta_seen is None:
            return False
        now, revision = self._meta_seen
        if (now.store_id, now.version) != (old.store_id, old.version):
            return False
        unchanged = _compare("mod_revision", self._key("meta"), revision)
        return self._txn([unchanged], [self._put("meta", meta_to_text(new))])[0]

    def by_machine(self, machine: int) -> Record:
        pair = self._get(f"machine/{pad(machine)}")
        return Record(machine) if pair is None else self._take(pair)

    def by_token(self, token: Token) -> Record | None:
        pair = self._get(f"token/{token.hex()}")
        record = None if pair is None else self.by_machine(int(pair.value))
        return record if record is not None and record.token == token else None

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        unused: list[Record] = []
        begin = self._unused_from.get(first, first)
        while limit > 0 and begin <= last and len(unused) < limit:
            stop = min(begin + CHUNK, last + 1)
            pairs = self._range(f"machine/{pad(begin)}", f"machine/{pad(stop)}")
            used = {self._take(pair).machine for pair in pairs}
            unused += [Record(n) for n in range(begin, stop) if n not in used]
            if not unused:
                self._unused_from[first] = stop
            begin = stop
        unused = unused[:limit]
        return [*unused, *self._lowest_used(first, last, limit - len(unused))]

    def held(self, now: int) -> Sequence[Record]:
        keys = self._range(f"fence/{pad(now + 1)}", "fence0", keys_only=True)
        if len(keys) > CHUNK:
            records = [self._take(pair) for pair in self._range("machine/")]
        else:
            records = [self.by_machine(_number(pair.key)) for pair in keys]
        held = [record for record in records if record.token is not None and record.fence > now]
        return sorted(held, key=lambda record: record.machine)

    def marks(self) -> Sequence[Mark]:
        return [mark_from_text(pair.key.removeprefix("mark/"), pair.value) for pair in self._range("mark/")]

    def forget_marks(self, before_us: int) -> None:
        gone = [mark for mark in self.marks() if mark.now_us < before_us]
        self._mark_seen = None
        if gone:
            self._txn([], [self._delete(f"mark/{mark.delegator}") for mark in gone])

    def set_marks(self, now_us: int) -> None:
        marks = [Mark(mark.delegator, now_us, mark.lead_us, mark.address) for mark in self.marks()]
        self._mark_seen = None
        if marks:
            self._txn([], [self._put(f"mark/{mark.delegator}", mark_to_text(mark)) for mark in marks])

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        outcomes = self._swap(swaps, mark)
        while len(outcomes) < len(swaps):
            outcomes += self._swap(swaps[len(outcomes) :], mark)
        return outcomes

    def trace(self, machine: int, tick: int) -> Traced:
        below = self._range(
            f"span/{pad(machine)}/", f"span/{pad(machine)}/{pad(tick + 1)}", limit=1, descending=True
        )
        span = _span(below[0]) if below else None
        return Traced(span if span is not None and tick < span.end else None, self._since())

    def prune(self, before: int, keep: int, limit: int) -> int:
        count = self._count("end/")
        limit = min(limit, 40)
        oldest = self._range("end/", limit=limit, keys_only=True)
        forgotten = []
        for i, pair in enumerate(oldest):
            _, end, machine, start = pair.key.split("/")
            if i < count - keep or int(end) <= before:
                forgotten.append((int(end), pair.key, f"span/{machine}/{start}"))
        if forgotten:
            ops = [self._delete(key) for _, *keys in forgotten for key in keys]
            since = max(self._since(), forgotten[-1][0])
            self._txn([], [*ops, self._put("since", pad(since))])
        return len(forgotten)

    def close(self) -> None:
        for client in self._clients:
            client.session.close()

    # --- swaps ---

    def _swap(self, swaps: Sequence[Swap], mark: Mark | None) -> list[bool]:
        """Try as many of the swaps, from the first on, as go into one transaction."""
        meta, compares, ops = self._frame(swaps, mark)
        tried: list[Swap | None] = []
        written: set[str] = set()
        for swap in swaps[:BATCH]:
            if f"machine/{pad(swap.new.machine)}" in written:
                break  # it follows from one that is in this transaction
            valid = meta is not None and swap.version == meta.version
            if not valid or not self._recall(swap.new.machine, swap.new.gen - 1):
                tried.append(None)
                continue
            conditions, writes, keys = self._writes(swap.new)
            if written & keys:
                break  # in one transaction no key may be written twice
            written |= keys
            tried.append(swap)
            ops.append({"request_txn": {"compare": conditions, "success": writes, "failure": []}})
        try:
            done, revision, responses = self._txn_all(compares, ops)
        except StoreError:
            self._mark_seen = self._meta_seen = None
            raise
        if not done:
            self._mark_seen = self._meta_seen = None
            return [False] * len(tried)
        if mark is not None:
            assert self._mark_seen is not None
            self._mark_seen = self._mark_seen[0], revision
            responses = responses[1:]
        results = iter(responses)
        return [swap is not None and self._learn(swap.new, next(results), revision) for swap in tried]

    def _frame(self, swaps: Sequence[Swap], mark: Mark | None) -> tuple[Meta | None, list[Op], list[Op]]:
        """Meta, what must hold for the whole transaction, and what it writes in any case."""
        compares, ops = [], []
        meta: Meta | None = None
        if swaps:
            if self._meta_seen is None or any(s.version != self._meta_seen[0].version for s in swaps):
                self.meta()
            meta, revision = self._meta_seen or (None, 0)
            if meta is not None and self._lives is not None and self.incarnation() != meta.incarnation:
                meta = None
            compares.append(_compare("mod_revision", self._key("meta"), revision))
        if mark is not None:
            key = f"mark/{mark.delegator}"
            if self._mark_seen is None or self._mark_seen[0].delegator != mark.delegator:
                pair = self._get(key)
                seen = mark if pair is None else mark_from_text(mark.delegator, pair.value)
                self._mark_seen = seen, 0 if pair is None else pair.revision
            seen, revision = self._mark_seen
            self._mark_seen = max(mark, seen, key=lambda m: m.now_us), revision
            # If the cluster has gone back to an earlier state, so has this.
            compares.append(_compare("mod_revision", self._key(key), revision))
            ops.append(self._put(key, mark_to_text(self._mark_seen[0])))
        return meta, compares, ops

    def _learn(self, new: Record, response: Op, revision: int) -> bool:
        stands = bool(response["response_txn"].get("succeeded"))
        if stands:
            self._seen[new.machine] = new, revision
        else:
            self._seen.pop(new.machine, None)
        return stands

    def _recall(self, machine: int, gen: int) -> bool:
        """Whether the record is at that gen, as far as is known; then `_seen` has it."""
        seen = self._seen.get(machine)
        if seen is None or seen[0].gen != gen:
            record = self.by_machine(machine)
            if record.gen == 0:
                self._seen[machine] = record, 0
            return record.gen == gen
        return True

    def _writes(self, new: Record) -> tuple[list[Op], list[Op], set[str]]:
        """What must hold for a record to be written, all that is written with it, and the keys of that."""
        old, revision = self._seen[new.machine]
        machine = pad(new.machine)
        conditions = [_compare("mod_revision", self._key(f"machine/{machine}"), revision)]
        if new.token is not None and new.token != old.token:
            conditions.append(_created("version", self._key(f"token/{new.token.hex()}"), 0))
        before = {} if old.gen == 0 else _keys_of(old)
        after = _keys_of(new)
        if new.token is not None:
            if old.gen and old.span_start == new.span_start:
                before[f"end/{pad(old.fence)}/{machine}/{pad(old.span_start)}"] = ""
            after |= _keys_of_span(Span(new.machine, new.span_start, new.fence, new.holder))
        else:
            for pair in self._range(f"span/{machine}/"):
                span = _span(pair)
                if span.end > new.fence:
                    before |= _keys_of_span(span)
                    if span.start < new.fence:
                        after |= _keys_of_span(Span(span.machine, span.start, new.fence, span.holder))
        deletes = [self._delete(key) for key in before if key not in after]
        puts = [self._put(key, value) for key, value in after.items() if before.get(key) != value]
        return conditions, [*deletes, *puts], {*before, *after}

    def _lowest_used(self, first: int, last: int, limit: int) -> list[Record]:
        records: list[Record] = []
        at = "fence/"
        while len(records) < limit:
            pairs = self._range(at, "fence0", limit=CHUNK, keys_only=True)
            machines = [number for pair in pairs if first <= (number := _number(pair.key)) <= last]
            records += self._by_machines(machines[: limit - len(records)])
            if len(pairs) < CHUNK:
                break
            at = pairs[-1].key + "\0"
        return sorted(records, key=lambda record: (record.fence, record.machine))

    def _by_machines(self, machines: Sequence[int]) -> list[Record]:
        records = []
        for i in range(0, len(machines), CHUNK):
            ops = [
                {"request_range": {"key": _b64(self._key(f"machine/{pad(m)}"))}}
                for m in machines[i : i + CHUNK]
            ]
            for response in self._txn_all([], ops)[2]:
                records += [self._take(self._pair(kv)) for kv in response["response_range"].get("kvs", ())]
        return records

    def _take(self, pair: Pair) -> Record:
        record = record_from_text(_number(pair.key), pair.value)
        self._seen[record.machine] = record, pair.revision
        return record

    def _since(self) -> int:
        pair = self._get("since")
        return 0 if pair is None else int(pair.value)

    # --- etcd's API ---

    def _key(self, key: str) -> str:
        return self._prefix + key

    def _put(self, key: str, value: str) -> Op:
        return {"request_put": {"key": _b64(self._key(key)), "value": _b64(value)}}

    def _delete(self, key: str) -> Op:
        return {"request_delete_range": {"key": _b64(self._key(key))}}

    def _get(self, key: str) -> Pair | None:
        pairs = self._range(key, "")
        return pairs[0] if pairs else None

    def _range(
        self,
        first: str,
        end: str | None = None,
        *,
        limit: int = 0,
        descending: bool = False,
        keys_only: bool = False,
    ) -> list[Pair]:
        """The pairs from `first` to before `end`; all that begin with `first` without an `end`, one with an empty."""
        request: Op = {"key": _b64(self._key(first)), "limit": limit, "keys_only": keys_only}
        if end != "":
            request["range_end"] = _b64(self._key(end) if end else _behind(self._key(first)))
        if descending:
            request |= {"sort_order": "DESCEND", "sort_target": "KEY"}
        answer = self._ask("/kv/range", request)
        return [self._pair(kv) for kv in answer.get("kvs", ())]

    def _count(self, first: str) -> int:
        key = self._key(first)
        request = {"key": _b64(key), "range_end": _b64(_behind(key)), "count_only": True}
        return int(self._ask("/kv/range", request).get("count", 0))

    def _pair(self, kv: Op) -> Pair:
        key = b64decode(kv["key"]).decode()
        return Pair(
            key.removeprefix(self._prefix), b64decode(kv.get("value", "")).decode(), int(kv["mod_revision"])
        )

    def _txn(self, compares: list[Op], ops: list[Op]) -> tuple[bool, int]:
        done, revision, _ = self._txn_all(compares, ops)
        return done, revision

    def _txn_all(self, compares: list[Op], ops: list[Op]) -> tuple[bool, int, list[Op]]:
        answer = self._ask("/kv/txn", {"compare": compares, "success": ops, "failure": []}, write=True)
        return bool(answer.get("succeeded")), int(answer["header"]["revision"]), answer.get("responses", [])

    def _ask(self, path: str, request: Op, *, write: bool = False) -> Op:
        """What one of the endpoints answers.  A write that fails is not repeated: it may have happened."""
        for attempt in range(len(self._clients)):
            client = self._clients[self._turn]
            try:
                return self._note(client.post(client.get_url(path), json=request))
            except exceptions.Etcd3Exception as error:
                reason = " ".join((getattr(error, "detail_text", None) or str(error)).split())
                if self._login and "auth" in reason and attempt == 0:
                    self._authenticate(client)
                    continue
                self._turn = (self._turn + 1) % len(self._clients)
                if write or attempt == len(self._clients) - 1:
                    raise StoreError(f"{self.url}: {client.host}:{client.port}: {reason[:300]}") from error
            except (requests.RequestException, ValueError, KeyError) as error:
                self._turn = (self._turn + 1) % len(self._clients)
                if write or attempt == len(self._clients) - 1:
                    raise StoreError(
                        f"can't reach {self.url}: {client.host}:{client.port}: {error}"
                    ) from error
        raise StoreError(f"{self.url} refuses the password")

    def _note(self, answer: Op) -> Op:
        header = answer.get("header", {})
        revision = int(header.get("revision", self._revision))
        self._cluster = header.get("cluster_id", self._cluster)
        if revision < self._revision:
            self._seen.clear()
            self._mark_seen = None
            self._begin_life(self._meta_seen[0].incarnation if self._meta_seen else "")
            self._meta_seen = None
        self._revision = revision
        return answer

    def _begin_life(self, known: str) -> None:
        self._lives = known, f"{self._cluster} {secrets.token_hex(8)}"

    def _client(self, host: str, *, tls: bool, ca: str | None) -> Etcd3Client:
        parts = urlsplit(f"//{host}")
        session = requests.Session()
        session.trust_env = False  # no proxy stands before a store
        if ca is not None:
            session.verify = ca
        return Etcd3Client(
            host=parts.hostname or "",
            port=parts.port or PORT,
            protocol="https" if tls else "http",
            timeout=TIMEOUT_S,
            session=session,
            api_path="/v3/",
        )

    def _authenticate(self, client: Etcd3Client) -> None:
        assert self._login is not None
        name, password = self._login
        try:
            answer = client.post(
                client.get_url("/auth/authenticate"), json={"name": name, "password": password}
            )
        except exceptions.Etcd3Exception as error:
            raise StoreError(f"{self.url} refuses the password of {name}") from error
        client.session.headers["Authorization"] = answer["token"]

    def _check_server(self) -> None:
        status = self._ask("/maintenance/status", {})
        if status["version"] in LOSES_COMMITS:
            raise StoreError(
                f"{self.url} is etcd {status['version']}, which loses commits when it is killed: take another version,"
                " or the risk with ?unchecked=yes in the URL"
            )
        alarms = self._ask("/maintenance/alarm", {"action": "GET"}).get("alarms", ())
        if alarms:
            names = ", ".join(sorted({alarm.get("alarm", "?") for alarm in alarms}))
            raise StoreError(
                f"{self.url} has raised {names}: make room (etcdctl compact, defrag), then disarm it"
            )

    def _check_data(self) -> None:
        pairs = self._range("", limit=1, keys_only=True)
        if pairs and self.meta() is None:
            raise StoreError(
                f"{self.url} holds something that is not zflake's under {self._prefix}; nothing was changed:"
                " name another prefix"
            )


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _behind(prefix: str) -> str:
    """The first key behind all that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _compare(target: str, key: str, value: int) -> Op:
    return {"key": _b64(key), "target": "MOD", "result": "EQUAL", target: value}


def _created(target: str, key: str, value: int) -> Op:
    return {"key": _b64(key), "target": "VERSION", "result": "EQUAL", target: value}


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])


def _span(pair: Pair) -> Span:
    _, machine, start = pair.key.split("/")
    end, _, holder = pair.value.partition(" ")
    return span_of(int(machine), start, end, holder)


def _keys_of(record: Record) -> dict[str, str]:
    """All keys of a record's own, with their values."""
    machine = pad(record.machine)
    keys = {f"machine/{machine}": record_to_text(record), f"fence/{pad(record.fence)}/{machine}": ""}
    if record.token is not None:
        keys[f"token/{record.token.hex()}"] = machine
    return keys


def _keys_of_span(span: Span) -> dict[str, str]:
    machine, start, end = pad(span.machine), pad(span.start), pad(span.end)
    return {
        f"span/{machine}/{start}": f"{end} {holder_to_text(span.holder)}",
        f"end/{end}/{machine}/{start}": "",
    }


open_url = EtcdStore
