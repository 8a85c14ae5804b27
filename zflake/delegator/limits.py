"""The limits of a key: machine IDs that it asks for in a second, and holds.

The limit of ID requests under way is the broker's, which knows them.  Times are in microseconds on the delegator's local
clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from zflake.wire.callers import Caller

BURST_S: Final = 4
"""Seconds of its acquires that a key may ask for at once, after a rest: a fleet starts all at once."""
HELD_MS: Final = 1_000
"""Milliseconds until a key that holds too many machine IDs may ask again."""


class Over(NamedTuple):
    """A limit that is reached."""

    what: str
    retry_after_ms: int


@dataclass(slots=True)
class _Bucket:
    left: float
    at_us: int


class AcquireLimits:
    """Counts of the machine IDs that each key has asked for of late."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: Caller, count_held: Callable[[], int], local_us: int) -> Over | None:
        """Count an acquire; gives the limit that its key is over, if it is.

        `count_held` says how many machine IDs the key holds, and is asked only of those that do not ask too often.
        """
        rate, most = caller.limits.acquires_per_s, caller.limits.leases
        full = float(max(1, rate * BURST_S))
        bucket = self._buckets.setdefault(caller.key, _Bucket(full, local_us))
        bucket.left = min(full, bucket.left + (local_us - bucket.at_us) * rate / 1e6)
        bucket.at_us = local_us
        if bucket.left < 1:
            wait_ms = int((1 - bucket.left) * 1000 / rate) + 1 if rate else HELD_MS
            return Over(f"it asks for more than {rate} machine IDs a second (acquires-per-s)", wait_ms)
        bucket.left -= 1
        if (held := count_held()) >= most:
            return Over(f"it holds {held} machine IDs, and may hold {most} (leases)", HELD_MS)
        return None
