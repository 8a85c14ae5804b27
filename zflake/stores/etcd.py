"""An etcd cluster: several delegators, all active, and no single machine that must not fail.

Each commit is one transaction of etcd's, each step a transaction inside it.  The values are compared, by their
beginnings.  The delegator's own mark is compared with each commit, too: a cluster that has gone back to an earlier
state has an earlier mark.  etcd's leases are not used, since they end by a clock.

The keys are those of keyed.py, as text.py writes them, behind the prefix.
"""

from __future__ import annotations

import contextlib
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any, Final

from zflake.core.lease import Meta
from zflake.errors import ConfigError, StoreError
from zflake.stores.contract import batched
from zflake.stores.etcd_http import EtcdHttp, Op
from zflake.stores.etcd_identity import EtcdIdentity
from zflake.stores.keyed import META, Items, Key, Step
from zflake.stores.text import (
    TextStore,
    beginning,
    key_from_text,
    key_to_text,
    meta_from_text,
    value_from_text,
    value_to_text,
)
from zflake.stores.url import parse_url

READS: Final = 100
"""Keys that are read in a transaction."""
RANGE_KEYS: Final = 1000
"""Pairs in an answer."""
OPTIONS: Final = ("unchecked", "tls", "ca")
FORM: Final = "etcd://[user:password@]host1[:port],host2,host3/prefix, and ?tls=yes&ca=FILE if it has TLS"
QUOTA: Final = 2 * 1024**3
"""Bytes that a member stores at most if it does not say: etcd's default."""
FULL: Final = 0.8
"""Part of the quota from which on a warning is given."""
LOSES_COMMITS: Final = ("3.5.0", "3.5.1", "3.5.2")

_log = logging.getLogger("zflake.store")


class EtcdStore(TextStore):
    """Records in an etcd: `etcd://[user:password@]host1[:port],host2,.../prefix[?tls=yes&ca=FILE]`.

    One of the versions that lose commits when they are killed (3.5.0 to 3.5.2) and a cluster that raised an
    alarm are refused; the former not if the URL says `unchecked=yes`.

    Raises `ConfigError` for a URL that can't be read, `StoreError` if the cluster can't be used.
    """

    advice = "name another prefix"
    exclusive = False
    batch = 60
    """etcd takes 128 operations in a transaction, nested ones counted with their parents."""
    page = RANGE_KEYS

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        where = parse_url(url, OPTIONS)
        super().__init__(where.shown)
        self._prefix = where.path.rstrip("/") + "/"
        unchecked, ca = where.flag("unchecked"), where.options.get("ca")
        if not where.hosts or self._prefix == "/" or (ca is not None and not where.flag("tls")):
            raise ConfigError(f"{self.url}: write {FORM}")
        if ca is not None and not os.access(ca, os.R_OK):
            raise ConfigError(f"{self.url}: can't read the file of ?ca=")
        self._http = EtcdHttp(where)
        never = {"key": self._b64("meta"), "target": "VERSION", "result": "LESS", "version": 0}
        self._identity = EtcdIdentity(self._http, {"compare": [never], "success": [self._write("meta", "")]})
        try:
            if not read_only:
                self._check_server(unchecked=unchecked)
            self._check_data(read_only=read_only)
        except BaseException:
            self.close()
            raise

    def incarnation(self, meta: Meta | None = None) -> str:
        written = 0
        if meta is None or self._identity.is_suspect:
            meta = None
            for pair in self._range(META, ("meta\0",)):
                written = int(pair["mod_revision"])
                with self._errors():
                    meta = meta_from_text(_text(pair["value"]), self.url)
        return self._identity.incarnation("" if meta is None else meta.incarnation, written)

    def close(self) -> None:
        self._http.close()

    # --- keys ---

    def _texts(self, keys: Sequence[Key]) -> list[str | None]:
        found: dict[str, str] = {}
        names = list(map(key_to_text, keys))
        for some in batched(names, READS):
            ops = [{"request_range": {"key": self._b64(name)}} for name in some]
            for response in self._ask("/kv/txn", {"success": ops})["responses"]:
                found.update(map(self._pair, response["response_range"].get("kvs", ())))
        return [found.get(name) for name in names]

    def _keys(self, low: Key, high: Key, *, limit: int = 0, last: bool = False) -> list[Key]:
        order = {"sort_order": "DESCEND", "sort_target": "KEY"} if last else {}
        pairs = self._range(low, high, limit=1 if last else limit, keys_only=True, **order)
        with self._errors():
            return [key_from_text(self._name(pair)) for pair in pairs]

    def _items(self, low: Key, high: Key) -> list[tuple[Key, Any]]:
        with self._errors():
            pairs = map(self._pair, self._range(low, high))
            items = [(key_from_text(name), text) for name, text in pairs]
            return [(key, value_from_text(key, text, self.url)) for key, text in items]

    def _count(self, low: Key, high: Key) -> int:
        bounds = {"key": self._b64(key_to_text(low)), "range_end": self._b64(key_to_text(high))}
        return int(self._ask("/kv/range", bounds | {"count_only": True}).get("count", 0))

    def _commit(self, first: Step, steps: Sequence[Step] = ()) -> list[bool] | None:
        if self._identity.is_suspect and steps:
            meta = self.meta()
            if meta is None or self.incarnation(meta) != meta.incarnation:
                return None if self._commit(first) is None else [False] * len(steps)
        txn = self._txn(first)
        writes = len(txn["success"])
        txn["success"] += [{"request_txn": self._txn(step)} for step in steps]
        answer = self._ask("/kv/txn", txn, write=True)
        if not answer.get("succeeded"):
            self._identity.doubt()  # the own mark may have gone back with everything else
            return None
        responses = answer.get("responses", ())[writes:]
        return [bool(response["response_txn"].get("succeeded")) for response in responses]

    def _txn(self, step: Step) -> Op:
        compares: list[Op] = []
        for key, wanted in step.conditions.items():
            compares += self._compares(key_to_text(key), beginning(key, wanted))
        writes = [
            self._write(key_to_text(key), value_to_text(key, thing)) for key, thing in step.writes.items()
        ]
        return {"compare": compares, "success": writes}

    def _compares(self, name: str, text: str | None) -> list[Op]:
        key = self._b64(name)
        if text is None:
            return [{"key": key, "target": "VERSION", "result": "EQUAL", "version": 0}]
        if text == "":  # any value begins with that
            return [{"key": key, "target": "VERSION", "result": "GREATER", "version": 0}]
        return [
            {"key": key, "target": "VALUE", "result": result, "value": bound}
            for result, bound in zip(("GREATER", "LESS"), _bounds(text), strict=True)
        ]

    def _write(self, name: str, text: str | None) -> Op:
        key = self._b64(name)
        if text is None:
            return {"request_delete_range": {"key": key}}
        return {"request_put": {"key": key, "value": _b64(text)}}

    # --- etcd's API ---

    def _b64(self, name: str) -> str:
        return _b64(self._prefix + name)

    def _name(self, pair: Op) -> str:
        return _text(pair["key"]).removeprefix(self._prefix)

    def _pair(self, pair: Op) -> tuple[str, str]:
        return self._name(pair), _text(pair.get("value", ""))

    def _range(self, low: Key, high: Key, *, limit: int = 0, **request: Any) -> list[Op]:
        """The pairs from `low` to below `high`, in as many answers as it takes."""
        pairs: list[Op] = []
        more = True
        request["range_end"] = self._b64(key_to_text(high))
        while more and (not limit or len(pairs) < limit):
            request["key"] = self._b64(f"{self._name(pairs[-1])}\0" if pairs else key_to_text(low))
            request["limit"] = min(RANGE_KEYS, limit - len(pairs)) if limit else RANGE_KEYS
            answer = self._ask("/kv/range", request)
            pairs += answer.get("kvs", ())
            more = answer.get("more", False)
        return pairs

    def _ask(self, path: str, request: Op, *, write: bool = False) -> Op:
        answer = self._http.ask(path, request, write=write)
        self._identity.observe(answer)
        return answer

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return self._reading()

    # --- what is there ---

    def _check_server(self, *, unchecked: bool) -> None:
        status = self._http.ask_node("/maintenance/status", {})
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
        if alarms := self._http.ask_node("/maintenance/alarm", {"action": "GET"}).get("alarms", ()):
            names = ", ".join(sorted({alarm.get("alarm", "?") for alarm in alarms}))
            raise StoreError(
                f"{self.url} has raised {names}: make room (etcdctl compact, defrag), then disarm it"
            )

    def _has_strangers(self) -> bool:
        return bool(
            self._range((), ("mark", ""), limit=1) or self._range(("mark0",), ("\U0010ffff",), limit=1)
        )

    def _old_items(self) -> Items:
        for kind in ("machine", "span"):
            yield from self._items((kind,), (f"{kind}~",))


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return b64decode(encoded).decode(errors="backslashreplace")


def _bounds(text: str) -> list[str]:
    """Two bounds, encoded, between which lie all texts that begin with this one, and no others."""
    *head, end = text.encode()
    return [b64encode(bytes([*head, *tail])).decode() for tail in ((end - 1, 0xFF), (end + 1,))]


open_url = EtcdStore
