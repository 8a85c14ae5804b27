"""The directory: who holds a lease, and which of the holders are registered to serve.

A *lease* is in the directory as long as its window lasts, as the store says.  A *registered worker* has shown its
lease's token; it is there until it leaves, misses its heartbeats, lapses, loses the lease, or registers again over
another connection.  Only the token proves that a peer is the worker that it claims to be: the holder and the store
alone know it.  A routing identity proves nothing, since any peer may take the one of a worker that has gone.

Times are in microseconds on the delegator's local clock; ticks are the timeline's.
"""

from __future__ import annotations

import hmac
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

from zflake.core.lease import Record, Token
from zflake.wire.cluster import LOAD, PAGE, Ready

MISSED_US: Final = 1_000_000
"""Microseconds without a sign of life after which a worker is taken out: four heartbeats."""


@dataclass(slots=True)
class RegisteredWorker:
    """A worker that is there to serve."""

    identity: bytes
    """Its routing identity at this delegator."""
    machine: int
    token: Token
    """The token that it registered with.  It shows that one until it registers again, though a renewal has another."""
    key: str
    """The key that it registered by."""
    tenancy_start: int
    """The tenancy of the machine that it showed the token of."""
    heard_us: int
    load: dict[str, Any]
    """The load that it last reported; all zero until then."""


class Directory:
    """The records of the machine IDs that are held, as they were last seen stored, and the registered workers."""

    def __init__(self, held: Iterable[Record]) -> None:
        self.changes = 0
        """Number of times that a lease or a registered worker has come or gone; renewals and heartbeats do not count."""
        self._held = {record.machine: record for record in held}
        self._machines = sorted(self._held)
        self._workers: dict[bytes, RegisteredWorker] = {}
        self._identities: dict[int, bytes] = {}  # of the workers, by machine ID

    @property
    def count(self) -> int:
        """Machine IDs that are held, or were until lately."""
        return len(self._held)

    # --- leases ---

    def learn(self, record: Record) -> None:
        """Take in a record as it is stored now."""
        known = self._held.get(record.machine)
        if known is not None and known.gen > record.gen:
            return
        if record.token is None:
            if known is not None:
                del self._held[record.machine]
                del self._machines[bisect_left(self._machines, record.machine)]
                self.changes += 1
            return
        self._held[record.machine] = record
        if known is None:
            insort(self._machines, record.machine)
        if known is None or known.tenancy_start != record.tenancy_start:
            self.changes += 1

    def replace(self, held: Iterable[Record]) -> None:
        """Take in all leases as they are stored now; any other has been given back."""
        known, new = self._held, {}
        for record in held:
            before = known.get(record.machine)
            new[record.machine] = before if before is not None and before.gen > record.gen else record
        self._put(new)

    def page_at(self, after: int) -> int:
        """The index of the page that has the first machine after `after`.

        Pages begin at multiples of `PAGE`, so that there are only so many of them, whatever is asked for.
        """
        return bisect_right(self._machines, after) // PAGE * PAGE

    def held(self, now: int, at: int = 0) -> list[Record]:
        """The records of the page at `at` whose window reaches beyond tick `now`, by machine."""
        page = (self._held[machine] for machine in self._machines[at : at + PAGE])
        return [record for record in page if record.fence > now]

    def end_of(self, at: int) -> int | None:
        """The last machine of the page at `at`; None if no page follows."""
        return self._machines[at + PAGE - 1] if at + PAGE < len(self._machines) else None

    # --- workers ---

    def register(self, identity: bytes, shown: Ready, now: int, local_us: int, key: str = "") -> bool:
        """Take in a worker that says it holds this machine ID, in place of any that did so before.

        False if its token or its key is not the lease's.
        """
        machine, token = shown
        record = self._held.get(machine)
        if (
            record is None
            or record.token is None
            or record.fence <= now
            or record.holder.key != key
            or not hmac.compare_digest(record.token, token)
        ):
            return False
        self.drop(identity)
        self.drop(self._identities.get(machine, identity))
        load = dict.fromkeys(LOAD, 0)
        self._workers[identity] = RegisteredWorker(
            identity, machine, token, key, record.tenancy_start, local_us, load
        )
        self._identities[machine] = identity
        self.changes += 1
        return True

    def identity_of(self, machine: int) -> bytes | None:
        """The routing identity of the worker that holds this machine ID; None if it is not registered."""
        return self._identities.get(machine)

    def proves(self, identity: bytes, token: Token, key: str = "") -> bool:
        """Whether a worker of that identity registered with this token, by this key."""
        worker = self._workers.get(identity)
        return worker is not None and worker.key == key and hmac.compare_digest(worker.token, token)

    def hear(self, identity: bytes, load: dict[str, Any] | None, local_us: int) -> None:
        """Take in the sign of life of a worker that has proved itself.

        A heartbeat carries a load.  An answer, which has none, counts too: under a flood heartbeats wait behind those.
        """
        worker = self._workers.get(identity)
        if worker is not None:
            worker.heard_us = local_us
            worker.load = worker.load if load is None else load

    def drop(self, identity: bytes) -> None:
        """Take a worker out."""
        worker = self._workers.pop(identity, None)
        if worker is not None:
            del self._identities[worker.machine]
            self.changes += 1

    def is_registered(self, identity: bytes) -> bool:
        """Whether a worker of that identity is there."""
        return identity in self._workers

    def sweep(self, now: int, local_us: int) -> list[bytes]:
        """Forget what has ended, and take out the workers that missed their heartbeats, lapsed or lost their lease.

        Gives the identities of these workers.
        """
        gone = [w.identity for w in self._workers.values() if not self._is_there(w, now, local_us)]
        for identity in gone:
            self.drop(identity)
        self._put({machine: record for machine, record in self._held.items() if record.fence > now})
        return gone

    def excuse(self, lost_us: int) -> None:
        """Do not blame the workers for the time that this process itself was stopped."""
        for worker in self._workers.values():
            worker.heard_us += lost_us

    def worker(self, machine: int, now: int, local_us: int) -> RegisteredWorker | None:
        """The worker that is there to serve on this machine ID; None if there is none."""
        worker = self._workers.get(self._identities.get(machine, b""))
        return worker if worker is not None and self._is_there(worker, now, local_us) else None

    def workers(self, now: int, local_us: int, turn: int = 0) -> list[tuple[Record, RegisteredWorker]]:
        """The workers that are there to serve, by machine, each with the lease that it serves on.

        A page of them at most: the page number `turn`, if each goes on where the one before it ended.
        """
        first = turn * PAGE % max(1, len(self._workers))
        turned = chain(islice(self._workers.values(), first, None), islice(self._workers.values(), first))
        there = islice((w for w in turned if self._is_there(w, now, local_us)), PAGE)
        return [(self._held[w.machine], w) for w in sorted(there, key=lambda w: w.machine)]

    def _is_there(self, worker: RegisteredWorker, now: int, local_us: int) -> bool:
        record = self._held.get(worker.machine)
        return (
            record is not None
            and record.tenancy_start == worker.tenancy_start
            and record.fence > now
            and local_us - worker.heard_us < MISSED_US
        )

    def _put(self, held: dict[int, Record]) -> None:
        """Take these records in place of those that are there."""
        before, self._held = self._held, held
        if held.keys() != before.keys():
            self._machines = sorted(held)
            self.changes += 1
        elif any(before[machine].tenancy_start != record.tenancy_start for machine, record in held.items()):
            self.changes += 1
