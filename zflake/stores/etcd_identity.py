"""Whether an etcd cluster is what it was.

A cluster that was restored from a snapshot shows it in one of three ways, and each is another incarnation, the text
"CLUSTER RANDOM EXCESS":

1. The cluster has another ID.
2. The revision goes back.  Only a process that has seen the later revision can tell.
3. The *excess*, by which the revision is ahead of the place in the Raft log, grows: a restored cluster keeps its
   revisions, and its log begins anew.  It is looked at again whenever a connection has failed, and whenever a
   commit is refused that should not be.
"""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

from zflake.stores.etcd_http import EtcdHttp, Op

SLACK: Final = 2
"""Revisions by which the excess may seem to grow."""
LOOKS: Final = 3
"""Times that a node is asked for its excess: it reads its revision and its place in the log one after the other."""
UNTOLD: Final = "?"
"""Stands for an excess that the node tells to root only."""


class _Life(NamedTuple):
    """Another incarnation, from when it was noticed until the meta says so."""

    revision: int
    """The cluster's, then."""
    incarnation: str
    before: str | None
    """The incarnation in the meta, then; None if the meta was not read yet."""


class EtcdIdentity:
    """Follows the headers of a cluster's answers.

    `entry` is a transaction that changes nothing, for an entry in the log.
    """

    def __init__(self, http: EtcdHttp, entry: Op) -> None:
        self._http = http
        self._entry = entry
        self.revision = 0
        """The latest that an answer showed."""
        self._cluster = ""
        # How often an endpoint had failed when the cluster was vetted: what comes back may have been restored.
        self._vetted: int | None = None
        self._life: _Life | None = None

    def doubt(self) -> None:
        """Vet the cluster again before it is believed."""
        self._vetted = None

    @property
    def is_suspect(self) -> bool:
        """Whether the cluster was seen to be another one, and no meta was seen yet that says so."""
        return self._life is not None

    def observe(self, answer: Op) -> None:
        """See by an answer whether the cluster is what it was."""
        header = answer.get("header", {})
        revision, cluster = int(header.get("revision", self.revision)), header.get("cluster_id", "")
        if revision < self.revision or self._cluster not in ("", cluster):
            self._life = self._begin_life(revision, cluster, None)
        # Not before that is done: if it fails, the next answer shows it again.
        self.revision, self._cluster = revision, cluster

    def incarnation(self, known: str, written: int) -> str:
        """The incarnation of the cluster; `known` is the meta's, which was written at revision `written`."""
        if (life := self._life) is not None:
            # It is over if the meta was written since, by a delegator that knew of it.
            if written > life.revision and (known == life.incarnation or life.before not in (None, known)):
                self._life = None
            elif written <= life.revision:
                self._life = life._replace(before=known)
        if self._life is None and not self._is_life(known):
            self._life = self._begin_life(self.revision, self._cluster, known)
        return known if self._life is None else self._life.incarnation

    def _is_life(self, known: str) -> bool:
        """Whether the cluster is still what the meta's incarnation says."""
        cluster, _, excess = (known or "? ? ?").split(" ")
        if cluster != self._cluster:
            return False
        if self._vetted != self._http.failures:
            now = self._excess()
            if UNTOLD not in (now, excess) and int(now) > int(excess) + SLACK:
                return False
            self._vetted = self._http.failures
        return True

    def _begin_life(self, revision: int, cluster: str, before: str | None) -> _Life:
        life = _Life(revision, f"{cluster} {secrets.token_hex(8)} {self._excess()}", before)
        self._vetted = self._http.failures
        return life

    def _excess(self) -> str:
        """The number by which revisions exceed the entries of the log; only a restore makes it grow."""
        # A node that was sent a snapshot learns with the next entry how far it is.
        self._http.ask_once("/kv/txn", self._entry)
        looks = [self._http.ask_node("/maintenance/status", {}) for _ in range(LOOKS)]
        if not all("raftAppliedIndex" in look for look in looks):
            return UNTOLD
        return str(min(int(look["header"]["revision"]) - int(look["raftAppliedIndex"]) for look in looks))
