"""The directory: who holds a lease now, and the address that came with the acquire."""

from __future__ import annotations

from collections.abc import Iterable

from zflake.core.lease import Record


class Directory:
    """The records of the machine IDs that are held, as this delegator last saw them stored."""

    def __init__(self, held: Iterable[Record]) -> None:
        self._held = {record.machine: record for record in held}

    @property
    def count(self) -> int:
        """How many machine IDs are held, or were until lately."""
        return len(self._held)

    def learn(self, record: Record) -> None:
        """Take in a record as it is stored now."""
        known = self._held.get(record.machine)
        if known is not None and known.gen > record.gen:
            return
        if record.token is None:
            self._held.pop(record.machine, None)
        else:
            self._held[record.machine] = record

    def held(self, now: int) -> list[Record]:
        """The records whose window reaches beyond tick `now`, by machine; the others are forgotten."""
        self._held = {machine: record for machine, record in self._held.items() if record.fence > now}
        return sorted(self._held.values(), key=lambda record: record.machine)
