"""The callers of a daemon: by its key each has a role, which says what it may call, and limits."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple


class Role(StrEnum):
    """The roles of keys; `dispatch.py` says of each method which of them may call it."""

    CLIENT = "client"
    """Takes IDs."""
    GENERATOR = "generator"
    """Takes IDs, and may lease a machine ID for its own process, which is in no directory."""
    WORKER = "worker"
    """Leases a machine ID, and serves IDs by it."""
    ADMIN = "admin"
    """Takes IDs, and sees all of the cluster."""
    DELEGATOR = "delegator"
    """Passes the requests of others on to a worker."""


PARTIES: Final = (Role.WORKER, Role.GENERATOR, Role.CLIENT, Role.ADMIN)
"""The roles of those who come to a delegator, or to a static worker."""


class Limits(NamedTuple):
    """The limits of one key; the defaults are above what an honest holder reaches."""

    leases: int = 256
    """Machine IDs that it holds."""
    acquires_per_s: int = 64
    """Machine IDs that it asks for in a second, over longer times."""
    requests: int = 4096
    """ID requests that it has under way at one daemon."""


class Caller(NamedTuple):
    """Who sent a request, as far as its connection proves."""

    name: str
    """For people; empty if nobody knows."""
    role: Role | None
    """None of a key that is not authorized, or not any more."""
    key: str
    """The public key, in Z85; empty in a cluster without keys."""
    limits: Limits = Limits()


def sees_all(caller: Caller) -> bool:
    """Whether a caller may know of processes, addresses and versions."""
    return caller is ANYONE or caller.role is Role.ADMIN


ANYONE: Final = Caller("", None, "")
"""Every caller of a daemon without keys: it may call all methods."""
BROKER: Final = Caller("delegator", Role.DELEGATOR, "")
"""The delegator at the other end of a worker's link."""
