"""The directory: who holds a lease, and which of them are there to serve.

A *lease* is in the directory as long as its window lasts, as the store says.  A *worker* is there from the
moment that it has shown its lease's token until it leaves, misses its beats, lapses, or loses the lease.
Only its token says that a peer is the worker that it claims to be: nobody else but the store knows that.

Times are in microseconds on the delegator's local clock; ticks are the timeline's.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from zflake.core.lease import Record, Token
from zflake.wire.messages import LOAD

MISSED_US: Final = 1_000_000
"""A worker that has not been heard of for this long is out: four beats."""


@dataclass(slots=True)
class Presence:
    """A worker that is there to serve."""

    identity: bytes
    """Its routing identity at this delegator."""
    machine: int
    tenancy_start: int
    """Which tenancy of the machine it showed the token of."""
    heard_us: int
    load: dict[str, Any]
    """What it last said of itself; all zero until then."""


class Directory:
    """The records of the machine IDs that are held, as they were last seen stored, and the workers there."""

    def __init__(self, held: Iterable[Record]) -> None:
        self._held = {record.machine: record for record in held}
        self._present: dict[bytes, Presence] = {}

    @property
    def count(self) -> int:
        """How many machine IDs are held, or were until lately."""
        return len(self._held)

    # --- leases ---

    def learn(self, record: Record) -> None:
        """Take in a record as it is stored now."""
        known = self._held.get(record.machine)
        if known is not None and known.gen > record.gen:
            return
        if record.token is None:
            self._held.pop(record.machine, None)
        else:
            self._held[record.machine] = record

    def replace(self, held: Iterable[Record]) -> None:
        """Take in all leases as they are stored now; what is not among them has been given back."""
        known = self._held
        self._held = {}
        for record in held:
            before = known.get(record.machine)
            self._held[record.machine] = before if before is not None and before.gen > record.gen else record

    def held(self, now: int) -> list[Record]:
        """The records whose window reaches beyond tick `now`, by machine; the others are forgotten."""
        self._held = {machine: record for machine, record in self._held.items() if record.fence > now}
        return sorted(self._held.values(), key=lambda record: record.machine)

    # --- workers ---

    def arrive(self, identity: bytes, machine: int, token: Token, now: int, local_us: int) -> bool:
        """Take in a worker that says it holds this machine ID; False where its token is not the lease's."""
        record = self._held.get(machine)
        if (
            record is None
            or record.token is None
            or record.fence <= now
            or not hmac.compare_digest(record.token, token)
        ):
            return False
        load = dict.fromkeys(LOAD, 0)
        self._present[identity] = Presence(identity, machine, record.tenancy_start, local_us, load)
        return True

    def hear(self, identity: bytes, load: dict[str, Any], local_us: int) -> bool:
        """Take in a worker's beat; False where nobody of that identity is known to be there."""
        presence = self._present.get(identity)
        if presence is None:
            return False
        presence.heard_us = local_us
        presence.load = load
        return True

    def see(self, identity: bytes, local_us: int) -> None:
        """Note a sign of life that is no beat: under a flood beats wait behind a worker's answers."""
        if (presence := self._present.get(identity)) is not None:
            presence.heard_us = local_us

    def leave(self, identity: bytes) -> None:
        """Take a worker out that says it goes."""
        self._present.pop(identity, None)

    def is_present(self, identity: bytes) -> bool:
        """Whether a worker of that identity is there."""
        return identity in self._present

    def sweep(self, now: int, local_us: int) -> list[bytes]:
        """Take out who missed its beats, lapsed or lost its lease; gives their identities."""
        gone = [p.identity for p in self._present.values() if not self._is_there(p, now, local_us)]
        for identity in gone:
            del self._present[identity]
        return gone

    def excuse(self, lost_us: int) -> None:
        """Do not blame the workers for the time that this process itself was stopped."""
        for presence in self._present.values():
            presence.heard_us += lost_us

    def workers(self, now: int, local_us: int) -> list[tuple[Record, Presence]]:
        """Who is there to serve, by machine, with the lease that it serves on."""
        # One that reconnected is there twice, until the beats of its former connection are missed.
        latest = sorted(self._present.values(), key=lambda p: p.heard_us)
        present = {p.machine: p for p in latest if self._is_there(p, now, local_us)}
        return [(self._held[machine], present[machine]) for machine in sorted(present)]

    def _is_there(self, presence: Presence, now: int, local_us: int) -> bool:
        record = self._held.get(presence.machine)
        return (
            record is not None
            and record.tenancy_start == presence.tenancy_start
            and record.fence > now
            and local_us - presence.heard_us < MISSED_US
        )
