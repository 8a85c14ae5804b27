"""The engine job: IDs through three delegators on one real store, while that, and all else, is killed.

Servers of the engine (three nodes of etcd, one PostgreSQL, one Redis), three delegators on one store URL, six
workers and four clients that know all delegators, each a process of its own.  Faults strike one after another
while IDs are taken, in an order that a seed draws, each once before any comes again.

What is checked afterwards: no ID twice, none outside the windows that delegators logged; leases granted again
soon after every fault; no call failed within its timeout unless no window was open at all.  That comes to
pass if the store is away for longer than windows last (two of three nodes gone), and if it has to rest
(a Redis that was restarted or failed over): then IDs must have been taken to the very end of the windows, and
again as soon as there were new ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import zflake
from tests.jobs.delegators import AGAIN_S, REST_S, TIMEOUT_S, Job, Strike
from tests.servers import Etcd, Postgres, Redis, await_true
from tests.system.daemons import WAIT_S, Daemons, status_of
from zflake.core.loss import REST_MS

RESTS: Final = "Nothing is granted for"


class EtcdJob(Job):
    """Three nodes, of which any one may go; without two of them there are no leases, and then no IDs."""

    name = "etcd"

    def start_servers(self) -> str:
        Etcd.need_durable()
        self.nodes = Etcd.new_cluster(self.daemons.folder / "etcd")
        self.servers += self.nodes
        for node in self.nodes:
            node.start()
        await_true(self._are_healthy, "the cluster of etcd")
        return self.nodes[0].url

    def faults_of_store(self) -> Mapping[str, Strike]:
        return {
            **{f"etcd node {k + 1} killed and restarted": partial(self._kill_node, k) for k in range(3)},
            "two etcd nodes killed, and back after all windows": self._kill_majority,
        }

    def _kill_node(self, k: int, what: str) -> None:
        self.do_without(what, self.nodes[k].kill)
        self.nodes[k].start()
        self.wait(self._are_healthy, "the node to be one of three again")

    def _kill_majority(self, what: str) -> None:
        gone = self.draw.sample(self.nodes, 2)
        fault = self.strike(what, stops=True)
        for node in gone:
            node.kill()
        self._probe()
        self.look()
        self.back()  # before all windows have ended: from then on there are no IDs
        end = max(lease[4] for lease in self.leases)
        self.wait(lambda: self.tick() > end + 1_000, "all windows to end")
        gone[0].start()
        fault.since_s, fault.before, fault.granted_s = time.monotonic(), len(self.leases), None
        fault.settled_s = None
        self.wait(lambda: fault.granted_s is not None, "a lease from two nodes")
        gone[1].start()
        self.wait(self._are_healthy, "all nodes to be there again")

    def _probe(self) -> None:
        """See that a caller hears in time, and in plain words, that no delegator can grant it a lease."""
        began = time.monotonic()
        refusal: zflake.ZflakeError | None = None
        with zflake.LeasedGenerator(self.endpoints, timeout=TIMEOUT_S, name="probe") as generator:
            try:
                generator.next_id()
            except zflake.ZflakeError as error:
                refusal = error
            took_s = time.monotonic() - began
        said = f"{type(refusal).__name__}: {str(refusal).partition(' (')[0]}"
        self.result.notes[f"who wanted a lease was told after {took_s:.0f} s: {said}"] += 1
        if not isinstance(refusal, zflake.Unavailable) or took_s > TIMEOUT_S + 1.0:
            self.violations.append(f"no clear error without a majority, after {took_s:.1f} s: {refusal!r}")

    def _are_healthy(self) -> bool:
        return all(node.is_healthy for node in self.nodes)


class PostgresqlJob(Job):
    """One server, which loses nothing when it is killed."""

    name = "postgresql"

    def start_servers(self) -> str:
        folder = self.daemons.folder
        folder.chmod(folder.stat().st_mode | 0o001)  # the server may have to run as another user
        self.server = Postgres(folder / "postgres")
        self.servers.append(self.server)
        self.server.start()
        return self.server.url_of_new_database()

    def faults_of_store(self) -> Mapping[str, Strike]:
        return {"PostgreSQL killed and restarted": self._kill_server}

    def _kill_server(self, what: str) -> None:
        fault = self.strike(what)
        self.server.kill()
        self.pause(self.draw.uniform(0.2, 1.5))
        self.back()
        self.server.start()
        self.wait(lambda: fault.granted_s is not None, "a lease from the restarted server")


class RedisJob(Job):
    """One server, and a replica of it; whatever happens to the server, it is rested from.

    No window outlives the rest, by design; with this ttl the time between is as short as can be.
    """

    name = "redis"
    ttl_s = REST_MS // 1000

    def start_servers(self) -> str:
        # A replica that asks for a copy is not to wait for others that might ask as well.
        self.server = Redis(self.daemons.folder / "redis-0", "--repl-diskless-sync-delay", "0")
        self.servers.append(self.server)
        self.server.start()
        self._replicate()
        return self.server.url

    def faults_of_store(self) -> Mapping[str, Strike]:
        return {
            "Redis killed and restarted": self._kill_server,
            "Redis failed over to a replica that lacks a lease": self._fail_over,
        }

    def _kill_server(self, what: str) -> None:
        rested = self.said(RESTS)
        self.strike(what, within_s=REST_S + AGAIN_S, stops=True)
        self.server.kill()
        self.pause(self.draw.uniform(0.2, 1.5))
        self.back()
        self.server.start()
        self._see_rest(rested)

    def _fail_over(self, what: str) -> None:
        rested = self.said(RESTS)
        replica = self.replica
        replica.await_copy()
        replica.cut_off()
        known = len(self.leases)
        self.join(WAIT_S + REST_S)
        self.strike(what, within_s=REST_S + AGAIN_S, stops=True)
        self.server.kill()
        self.pause(1.0)
        self.forgotten |= set(range(known, len(self.leases)))
        self.result.notes["a lease that the replica lacked"] += len(self.leases) - known
        self.eras.append((len(self.leases), self.tick()))
        self.back()
        replica.take_over(self.server)
        self.server = replica
        self._see_rest(rested)
        self._replicate()

    def _replicate(self) -> None:
        """Give the server a replica."""
        self.replica = self.server.replica(self.daemons.folder / f"redis-{len(self.servers)}")
        self.servers.append(self.replica)
        self.replica.start()
        self.replica.await_copy()

    def _see_rest(self, rested: int) -> None:
        """Wait until all delegators rest, and say so."""
        self.wait(lambda: self.said(RESTS) > rested, "a delegator to say that it rests")
        self.wait(self._all_rest, "all delegators to rest")
        self.result.notes["all delegators rested"] += 1

    def _all_rest(self) -> bool:
        return all(status_of(endpoint).get("granting_in_ms", 0) > 0 for endpoint in self.endpoints)


ENGINES: Final[Mapping[str, type[Job]]] = {job.name: job for job in (EtcdJob, PostgresqlJob, RedisJob)}


def run(
    folder: Path,
    engine: str,
    ids: int,
    *,
    seed: int = 1,
    rate: int = 0,
    faults: Sequence[str] | None = None,
    ttl_s: int | None = None,
    patient: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Job:
    """Do the job in an empty folder; what it gives is to be checked.

    `rate` is what each client may take in a second (0: all it can get); `faults` strike in this order (None:
    all of them in any order, again and again while there are IDs to take).  A job that is not
    `patient` waits for no store that rests.
    """
    with Daemons(folder) as daemons:
        job = ENGINES[engine](
            daemons, ids, draw=random.Random(f"{engine}/{seed}"), rate=rate, ttl_s=ttl_s, report=report
        )
        try:
            job.run(faults, patient=patient)
        finally:
            for server in job.servers:
                server.kill()
    return job
