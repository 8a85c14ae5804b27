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

    PREFIX/filling                    is there while the prefix is filled for the first time

A cluster that was restored from a snapshot has another cluster ID, or its revision goes back, or, since its log
begins anew, it has more revisions than before in proportion to its log: each is another incarnation.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

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
    import requests
    from etcd3gw import exceptions
    from etcd3gw.client import Etcd3Client
except ImportError as error:
    raise ConfigError("etcd:// needs the etcd3gw package: pip install 'zflake[etcd]'") from error

TIMEOUT_S: Final = 2.0
"""How long an answer is waited for; where there are other endpoints to ask, half of that."""
PORT: Final = 2379
BATCH: Final = 60
"""Swaps in a transaction: etcd takes 128 operations, nested ones counted with their parents."""
CHUNK: Final = 100
"""Reads in a transaction."""
SLACK: Final = 2
LOOKS: Final = 3
"""A node reads its revision and its place in the log one after the other: it is asked so often, and believed
to within that."""
PAGE: Final = 1000
"""Pairs in an answer."""
OPTIONS: Final = ("unchecked", "tls", "ca")
FORM: Final = "etcd://[user:password@]host1[:port],host2,host3/prefix, and ?tls=yes&ca=FILE where it has TLS"
ADVICE: Final = "name another prefix"
DENIED: Final = "permission denied"
UNTOLD: Final = "?"
QUOTA: Final = 2 * 1024**3
"""Bytes that a member stores at most, where it does not say: etcd's default."""
FULL: Final = 0.8
LOSES_COMMITS: Final = ("3.5.0", "3.5.1", "3.5.2")

Op: TypeAlias = dict[str, Any]

_log = logging.getLogger("zflake.store")


class Pair(NamedTuple):
    """A key (without the prefix) with its value."""

    key: str
    value: str
    revision: int
    """Of its last change."""


class Life(NamedTuple):
    """What a cluster is since it was found to be another one, or to have gone back, until meta says so."""

    revision: int
    """That of the cluster then."""
    incarnation: str
    before: str | None
    """What meta said then; None where it was not read yet."""


class EtcdStore(Store):
    """Records in an etcd: `etcd://[user:password@]host1[:port],host2,.../prefix[?tls=yes&ca=FILE]`.

    One of the versions that lose commits when they are killed (3.5.0 to 3.5.2) and a cluster that raised an
    alarm are refused; the former not where the URL says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` where the cluster can't be used.
    """

    exclusive = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url, OPTIONS)
        self.url = where.shown
        self._prefix = where.path.rstrip("/") + "/"
        unchecked, tls, ca = where.flag("unchecked"), where.flag("tls"), where.options.get("ca")
        if not where.hosts or self._prefix == "/" or (ca is not None and not tls):
            raise ConfigError(f"{self.url}: write {FORM}")
        if ca is not None and not os.access(ca, os.R_OK):
            raise ConfigError(f"{self.url}: can't read the file of ?ca=")
        self._login = None if where.user is None else (where.user, where.password or "")
        timeout_s = TIMEOUT_S / min(2, len(where.hosts))
        self._clients = [
            Etcd3Client(
                host=host,
                port=port or PORT,
                protocol="https" if tls else "http",
                timeout=timeout_s,
                session=_session(ca),
                api_path="/v3/",
            )
            for host, port in where.hosts
        ]
        self._turn = 0
        self._unused_from: dict[int, int] = {}
        # As last read: by machine, the record and its key's revision; that of meta; that of the own mark.
        self._seen: dict[int, tuple[Record, int]] = {}
        self._meta_seen: tuple[Meta, int] | None = None
        self._mark_seen: tuple[Mark, int] | None = None
        self._revision = 0
        self._cluster = ""
        self._vetted = False
        self._life: Life | None = None
        try:
            if not read_only:
                self._check_server(unchecked=unchecked)
            self._check_data()
        except BaseException:
            self.close()
            raise

    def meta(self) -> Meta | None:
        pair = self._get("meta")
        if pair is None:
            self._meta_seen = None
            return None
        with self._reading():
            meta = meta_from_text(pair.value, self.url)
        self._meta_seen = meta, pair.revision
        return meta

    def incarnation(self) -> str:
        if self._meta_seen is None:
            self.meta()
        meta, revision = self._meta_seen or (None, 0)
        known = "" if meta is None else meta.incarnation
        if (life := self._life) is not None:
            # It is over where meta was written since, by somebody who knew of it.
            if revision > life.revision and (known == life.incarnation or life.before not in (None, known)):
                self._life = None
            elif revision <= life.revision:
                self._life = life._replace(before=known)
        if self._life is None and not self._is_life(known):
            self._life = self._new_life(self._revision, self._cluster, known)
        return known if self._life is None else self._life.incarnation

    def _is_life(self, known: str) -> bool:
        """Whether the cluster is still what meta's incarnation says."""
        cluster, _, excess = (known or "? ? ?").split(" ")
        if cluster != self._cluster:
            return False
        if not self._vetted:
            now = self._excess()
            self._vetted = UNTOLD in (now, excess) or int(now) <= int(excess) + SLACK
        return self._vetted

    def _new_life(self, revision: int, cluster: str, before: str | None) -> Life:
        life = Life(revision, f"{cluster} {secrets.token_hex(8)} {self._excess()}", before)
        self._vetted = True
        return life

    def _excess(self) -> str:
        """How many more revisions there are than entries in the log: that does not grow, but by a restore."""
        # A node that was sent a snapshot knows how far it is only with the next entry: one that changes nothing.
        never = self._version("meta", "LESS")
        entry = {"compare": [never], "success": [self._put("meta", "")]}
        self._post(self._clients[self._turn], "/kv/txn", entry)
        looks = [self._told("/maintenance/status", {}) for _ in range(LOOKS)]
        if not all("raftAppliedIndex" in look for look in looks):
            return UNTOLD
        return str(min(int(look["header"]["revision"]) - int(look["raftAppliedIndex"]) for look in looks))

    def _told(self, path: str, request: Op) -> Op:
        """What a node says of itself; nothing where only root may know."""
        try:
            return self._ask(path, request)
        except StoreError as error:
            if DENIED in str(error):
                return {}
            raise

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        fresh = self._version("meta", "EQUAL")
        # What a copy left that was broken off goes first.
        begin = [*map(self._delete_all, ("machine/", "token/", "fence/", "span/", "end/"))]
        begin.append(self._put("since", pad(contents.since)))
        begin += [self._put(f"mark/{mark.delegator}", mark_to_text(mark)) for mark in contents.marks]
        data: list[Op] = []
        for record in contents.records:
            data += [self._put(key, value) for key, value in _keys_of(record).items()]
        for span in contents.spans:
            data += [self._put(key, value) for key, value in _keys_of_span(span).items()]
        # Meta comes last: what is half filled is not a store yet.
        end = [self._put("meta", meta_to_text(meta)), self._delete("filling")]
        if not data:
            done, _ = self._txn([fresh], [*begin, *end])
        else:
            done, revision = self._txn([fresh], [self._put("filling", ""), *begin])
            mine = self._unchanged("filling", revision)
            for chunk in [*batched(data, CHUNK), end]:
                done = done and self._txn([fresh, mine], chunk)[0]
        if not done:
            raise StoreError(f"{self.url} is initialised already, or just now by somebody else")

    def contents(self) -> Contents:
        with self._reading():
            records = [record_from_text(_number(pair.key), pair.value) for pair in self._range("machine/")]
            spans = [_span(pair) for pair in self._range("span/")]
            return Contents(records, spans, self._since(), self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        if self.meta() is None or self._meta_seen is None:
            return False
        now, revision = self._meta_seen
        if (now.store_id, now.version) != (old.store_id, old.version):
            return False
        unchanged = self._unchanged("meta", revision)
        return self._txn([unchanged], [self._put("meta", meta_to_text(new))])[0]

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        pairs = self._get_all([f"machine/{pad(machine)}" for machine in machines])
        return [
            Record(m) if pair is None else self._take(pair) for m, pair in zip(machines, pairs, strict=True)
        ]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        pairs = self._get_all([f"token/{token.hex()}" for token in tokens])
        records = self.by_machines([int(pair.value) for pair in pairs if pair is not None])
        found = {record.token: record for record in records}
        return [found.get(token) for token in tokens]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        unused: list[Record] = []
        begin = self._unused_from.get(first, first)
        while limit > 0 and begin <= last and len(unused) < limit:
            stop = min(begin + PAGE, last + 1)
            pairs = self._range(f"machine/{pad(begin)}", f"machine/{pad(stop)}", keys_only=True)
            used = {_number(pair.key) for pair in pairs}
            unused += [Record(n) for n in range(begin, stop) if n not in used]
            begin = stop
        if limit > 0:
            self._unused_from[first] = unused[0].machine if unused else begin
        unused = unused[:limit]
        self._seen |= {record.machine: (record, 0) for record in unused}
        return [*unused, *self._lowest_used(first, last, limit - len(unused))]

    def held(self, now: int) -> Sequence[Record]:
        keys = self._range(f"fence/{pad(now + 1)}", "fence0", keys_only=True)
        records = self.by_machines(sorted(_number(pair.key) for pair in keys))
        return [record for record in records if record.token is not None and record.fence > now]

    def marks(self) -> Sequence[Mark]:
        with self._reading():
            return [
                mark_from_text(pair.key.removeprefix("mark/"), pair.value) for pair in self._range("mark/")
            ]

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
        with self._reading():
            return traced(_span(below[0]) if below else None, tick, self._since())

    def prune(self, before: int, keep: int, limit: int) -> int:
        oldest = self._range("end/", limit=limit, keys_only=True)
        ends = [int(pair.key.split("/")[1]) for pair in oldest]
        forgotten = oldest[: outdated(ends, self._count("end/"), before, keep)]
        since = self._since()
        for some in batched(forgotten, CHUNK // 2):
            ops: list[Op] = []
            for pair in some:
                _, end, machine, start = pair.key.split("/")
                ops += [self._delete(pair.key), self._delete(f"span/{machine}/{start}")]
                since = max(since, int(end))
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
            self._vetted = False  # the own mark may have gone back with everything else
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
            if meta is not None and self._life is not None and self.incarnation() != meta.incarnation:
                meta = None
            compares.append(self._unchanged("meta", revision))
        if mark is not None:
            compares.append(self._version("meta", "GREATER"))
            key = f"mark/{mark.delegator}"
            if self._mark_seen is None or self._mark_seen[0].delegator != mark.delegator:
                pair = self._get(key)
                seen = mark if pair is None else mark_from_text(mark.delegator, pair.value)
                self._mark_seen = seen, 0 if pair is None else pair.revision
            seen, revision = self._mark_seen
            self._mark_seen = max(mark, seen, key=lambda m: m.now_us), revision
            # If the cluster has gone back to an earlier state, so has this.
            compares.append(self._unchanged(key, revision))
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
        conditions = [self._unchanged(f"machine/{machine}", revision)]
        if new.token is not None and new.token != old.token:
            conditions.append(self._version(f"token/{new.token.hex()}", "EQUAL"))
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
            pairs = self._range(at, "fence0", limit=PAGE, keys_only=True)
            machines = [number for pair in pairs if first <= (number := _number(pair.key)) <= last]
            records += self.by_machines(machines[: limit - len(records)])
            if len(pairs) < PAGE:
                break
            at = pairs[-1].key + "\0"
        return sorted(records, key=lambda record: (record.fence, record.machine))

    def _take(self, pair: Pair) -> Record:
        with self._reading():
            record = record_from_text(_number(pair.key), pair.value)
        self._seen[record.machine] = record, pair.revision
        return record

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return reading(self.url, ADVICE)

    def _since(self) -> int:
        pair = self._get("since")
        return 0 if pair is None else int(pair.value)

    # --- etcd's API ---

    def _key(self, key: str) -> str:
        return self._prefix + key

    def _unchanged(self, key: str, revision: int) -> Op:
        """The condition that a key was last written at that revision; 0: that it is not there."""
        return {"key": _b64(self._key(key)), "target": "MOD", "result": "EQUAL", "mod_revision": revision}

    def _version(self, key: str, is_: str) -> Op:
        """The condition that a key is not there ("EQUAL"), that it is ("GREATER"), or one that never holds ("LESS")."""
        return {"key": _b64(self._key(key)), "target": "VERSION", "result": is_, "version": 0}

    def _put(self, key: str, value: str) -> Op:
        return {"request_put": {"key": _b64(self._key(key)), "value": _b64(value)}}

    def _delete(self, key: str) -> Op:
        return {"request_delete_range": {"key": _b64(self._key(key))}}

    def _delete_all(self, first: str) -> Op:
        key = self._key(first)
        return {"request_delete_range": {"key": _b64(key), "range_end": _b64(_behind(key))}}

    def _get(self, key: str) -> Pair | None:
        return self._get_all([key])[0]

    def _get_all(self, keys: Sequence[str]) -> list[Pair | None]:
        """The pair of each key, `CHUNK` in a round trip."""
        found: dict[str, Pair] = {}
        for some in batched(keys, CHUNK):
            ops = [{"request_range": {"key": _b64(self._key(key))}} for key in some]
            for response in self._ask("/kv/txn", {"success": ops})["responses"]:
                pairs = map(self._pair, response["response_range"].get("kvs", ()))
                found |= {pair.key: pair for pair in pairs}
        return [found.get(key) for key in keys]

    def _range(
        self,
        first: str,
        end: str | None = None,
        *,
        limit: int = 0,
        descending: bool = False,
        keys_only: bool = False,
    ) -> list[Pair]:
        """The pairs from `first` to before `end`; without an `end` all that begin with `first`.

        Of `descending` ones there are no more than `PAGE`.
        """
        request: Op = {"keys_only": keys_only}
        request["range_end"] = _b64(self._key(end) if end else _behind(self._key(first)))
        if descending:
            request |= {"sort_order": "DESCEND", "sort_target": "KEY"}
        pairs: list[Pair] = []
        more = True
        while more and (not limit or len(pairs) < limit):
            request["key"] = _b64(self._key(pairs[-1].key + "\0" if pairs else first))
            request["limit"] = min(PAGE, limit - len(pairs)) if limit else PAGE
            answer = self._ask("/kv/range", request)
            pairs += map(self._pair, answer.get("kvs", ()))
            more = answer.get("more", False)
        return pairs

    def _count(self, first: str) -> int:
        key = self._key(first)
        request = {"key": _b64(key), "range_end": _b64(_behind(key)), "count_only": True}
        return int(self._ask("/kv/range", request).get("count", 0))

    def _pair(self, kv: Op) -> Pair:
        key = _text(kv["key"])
        return Pair(key.removeprefix(self._prefix), _text(kv.get("value", "")), int(kv["mod_revision"]))

    def _txn(self, compares: list[Op], ops: list[Op]) -> tuple[bool, int]:
        done, revision, _ = self._txn_all(compares, ops)
        return done, revision

    def _txn_all(self, compares: list[Op], ops: list[Op]) -> tuple[bool, int, list[Op]]:
        answer = self._ask("/kv/txn", {"compare": compares, "success": ops, "failure": []}, write=True)
        return bool(answer.get("succeeded")), int(answer["header"]["revision"]), answer.get("responses", [])

    def _ask(self, path: str, request: Op, *, write: bool = False) -> Op:
        """What one of the endpoints answers.  A write that fails is not repeated: it may have happened."""
        for attempt in range(1, len(self._clients) + 1):
            try:
                answer = self._post(self._clients[self._turn], path, request)
            except StoreError:
                self._vetted = False  # whatever comes back may have been restored
                self._turn = (self._turn + 1) % len(self._clients)
                if write or attempt == len(self._clients):
                    raise
                continue
            # What a node says of itself may be older than what the cluster has agreed upon.
            return self._note(answer) if path.startswith("/kv/") else answer
        raise AssertionError("there is an endpoint")

    def _post(self, client: Etcd3Client, path: str, request: Op) -> Op:
        try:
            if self._login is not None and "Authorization" not in client.session.headers:
                self._authenticate(client)
            try:
                answer: Op = client.post(client.get_url(path), json=request)
            except exceptions.Etcd3Exception as error:
                if self._login is None or "auth" not in _reason(error):
                    raise
                self._authenticate(client)  # the token has run out, and nothing was done
                answer = client.post(client.get_url(path), json=request)
        except (exceptions.ConnectionFailedError, exceptions.ConnectionTimeoutError) as error:
            raise StoreError(f"can't reach {self.url}: {_where(client)}: {_plain(error)}") from error
        except exceptions.Etcd3Exception as error:
            reason = _reason(error)
            if self._login is None and "user name is empty" in reason:
                reason = "it wants a user and a password: etcd://user:password@..."
            raise StoreError(f"{self.url}: {_where(client)}: {reason}") from error
        except (requests.RequestException, ValueError, KeyError) as error:
            raise StoreError(f"{self.url}: {_where(client)} does not speak as etcd does") from error
        return answer

    def _authenticate(self, client: Etcd3Client) -> None:
        assert self._login is not None
        name, password = self._login
        client.session.headers.pop("Authorization", None)
        try:
            answer = client.post(
                client.get_url("/auth/authenticate"), json={"name": name, "password": password}
            )
        except exceptions.Etcd3Exception as error:
            if "password" not in _reason(error):
                raise
            raise StoreError(f"{self.url} refuses the password of {name}") from error
        client.session.headers["Authorization"] = answer["token"]

    def _note(self, answer: Op) -> Op:
        """See by an answer whether the cluster is what it was."""
        header = answer.get("header", {})
        revision, cluster = int(header.get("revision", self._revision)), header.get("cluster_id", "")
        if revision < self._revision or self._cluster not in ("", cluster):
            self._seen.clear()
            self._mark_seen = self._meta_seen = None
            self._life = self._new_life(revision, cluster, None)
        # Not before that is done: if it fails, the next answer shows it again.
        self._revision, self._cluster = revision, cluster
        return answer

    def _check_server(self, *, unchecked: bool) -> None:
        status = self._told("/maintenance/status", {})
        version = status.get("version")
        if version in LOSES_COMMITS and not unchecked:
            raise StoreError(
                f"{self.url} is etcd {version}, which loses commits when it is killed: take another version,"
                " or the risk with ?unchecked=yes in the URL"
            )
        if version is None:
            _log.warning("%s tells its version, its size and its alarms to root only: not checked", self.url)
        size, quota = int(status.get("dbSize", 0)), int(status.get("dbSizeQuota", 0)) or QUOTA
        if size > FULL * quota:
            _log.warning(
                "%s takes %.1f of %.1f GB: past its quota etcd writes no more. Compact and defragment it; see that it"
                " runs with --auto-compaction-retention",
                *(self.url, size / 1e9, quota / 1e9),
            )
        if alarms := self._told("/maintenance/alarm", {"action": "GET"}).get("alarms", ()):
            names = ", ".join(sorted({alarm.get("alarm", "?") for alarm in alarms}))
            raise StoreError(
                f"{self.url} has raised {names}: make room (etcdctl compact, defrag), then disarm it"
            )

    def _check_data(self) -> None:
        self.half_filled = self._get("filling") is not None
        if self.half_filled or self.meta() is not None:
            return
        if self._range("", "mark/", limit=1) or self._range("mark0", _LAST, limit=1):
            raise foreign(self.url, ADVICE)
        self.had_data = bool(self.marks())


_LAST: Final = "\U0010ffff"


def _session(ca: str | None) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy stands before a store
    if ca is not None:
        session.verify = ca
    return session


def _reason(error: exceptions.Etcd3Exception) -> str:
    """What etcd says, in one line."""
    detail = getattr(error, "detail_text", None) or str(error)
    with contextlib.suppress(ValueError, TypeError, KeyError):
        detail = json.loads(detail)["error"]
    return " ".join(str(detail).split())[:300]


def _plain(error: BaseException) -> str:
    """Why there is no connection, without the layers that the libraries wrap it in."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (error.strerror if isinstance(error, OSError) else None) or "it does not answer"


def _where(client: Etcd3Client) -> str:
    return f"[{client.host}]:{client.port}" if ":" in client.host else f"{client.host}:{client.port}"


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return b64decode(encoded).decode(errors="backslashreplace")


def _behind(prefix: str) -> str:
    """The first key behind all that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


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
