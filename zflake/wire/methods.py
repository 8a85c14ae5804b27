"""The names on the wire: methods, error codes, and the exception that each code stands for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from zflake import errors
from zflake.wire.codec import WireError

PROTOCOL_VERSION: Final = 1


class Method(StrEnum):
    """The methods that a daemon may know; `dispatch.py` has the rules of each."""

    HELLO = "hello"
    PING = "ping"
    IDS_NEXT = "ids.next"
    LEASE_ACQUIRE = "lease.acquire"
    LEASE_RENEW = "lease.renew"
    LEASE_RELEASE = "lease.release"
    WORKER_READY = "worker.ready"
    WORKER_HEARTBEAT = "worker.beat"
    WORKER_LEAVE = "worker.leave"
    WORKER_CALLERS = "worker.callers"
    CLUSTER_WORKERS = "cluster.workers"
    CLUSTER_STATUS = "cluster.status"
    CLUSTER_TRACE = "cluster.trace"


class Code(StrEnum):
    """The codes of error responses."""

    BAD_REQUEST = "bad_request"
    UNKNOWN_METHOD = "unknown_method"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    LEASE_EXPIRED = "lease_expired"
    LOST = "lost"
    TOO_EARLY = "too_early"
    NO_FREE_MACHINE = "no_free_machine"
    EXHAUSTED = "exhausted"
    DENIED = "denied"
    NOT_READY = "not_ready"
    OTHER_CLUSTER = "other_cluster"


# All others, those that this zflake does not know included, are a `ProtocolError`.
_ERRORS: Final[Mapping[str, type[errors.ZflakeError]]] = {
    Code.TIMEOUT: errors.Timeout,
    Code.OVERLOADED: errors.Overloaded,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.LEASE_EXPIRED: errors.LeaseExpired,
    Code.LOST: errors.LeaseLost,
    Code.TOO_EARLY: errors.Unavailable,
    Code.NO_FREE_MACHINE: errors.NoFreeMachine,
    Code.EXHAUSTED: errors.LayoutError,
    Code.DENIED: errors.AuthError,
    Code.NOT_READY: errors.Unavailable,
}


def exception_of(error: WireError) -> errors.ZflakeError:
    """The exception that an error response stands for; an unknown code is a `ProtocolError`."""
    retry_after = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    return _ERRORS.get(error.code, errors.ProtocolError)(error.message, retry_after=retry_after)
