"""Both daemons read requests here: one table says of each method what its params are and who may call it.

A daemon brings a handler for each method that it has.  Everything else (bytes that are no request, methods that
it lacks, params that are wrong) is answered and counted here, in one place for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from zflake.errors import ProtocolError
from zflake.wire import fields
from zflake.wire.callers import ANYONE, Caller, Role
from zflake.wire.cluster import check_heartbeat, check_leave, check_ready, check_status
from zflake.wire.codec import MAX_SHOWN, BadRequest, decode_request, encode_error, encode_result
from zflake.wire.ids import check_next
from zflake.wire.leases import check_acquire, check_release, check_renew, check_trace
from zflake.wire.methods import Code, Method

A = TypeVar("A")
"""A daemon's reply address: the dispatcher hands it to the handler unchanged."""
MethodHandler: TypeAlias = Callable[[A, int, Any, int, int, Caller], bytes | None]
"""Called with reply address, msgid, checked params, time of arrival and time now (both on the local clock, µs), caller.
Gives the answer; None if that comes later, or never."""

_EVERYBODY: Final = frozenset(Role)
_TAKERS: Final = frozenset({Role.CLIENT, Role.GENERATOR, Role.ADMIN})
_HOLDERS: Final = frozenset({Role.GENERATOR, Role.WORKER})
_WORKERS: Final = frozenset({Role.WORKER})
_ADMINS: Final = frozenset({Role.ADMIN})


class Rule(NamedTuple):
    """The rules of a method, the same in every daemon that has it."""

    check: Callable[[list[Any]], Any]
    """Turns params into what the handler takes; raises `ProtocolError` if they are wrong."""
    callers: frozenset[Role]
    """The roles of the callers that may call it."""


METHODS: Final[Mapping[Method, Rule]] = {
    Method.HELLO: Rule(fields.no_params, _EVERYBODY),
    Method.PING: Rule(fields.no_params, _EVERYBODY),
    Method.IDS_NEXT: Rule(check_next, _TAKERS | {Role.DELEGATOR}),
    Method.LEASE_ACQUIRE: Rule(check_acquire, _HOLDERS),
    Method.LEASE_RENEW: Rule(check_renew, _HOLDERS),
    Method.LEASE_RELEASE: Rule(check_release, _HOLDERS),
    Method.WORKER_READY: Rule(check_ready, _WORKERS),
    Method.WORKER_HEARTBEAT: Rule(check_heartbeat, _WORKERS),
    Method.WORKER_LEAVE: Rule(check_leave, _WORKERS),
    Method.WORKER_CALLERS: Rule(fields.no_params, _WORKERS),
    Method.CLUSTER_WORKERS: Rule(fields.no_params, _TAKERS),
    Method.CLUSTER_STATUS: Rule(check_status, _ADMINS),
    Method.CLUSTER_TRACE: Rule(check_trace, _ADMINS),
}


@dataclass
class Requests:
    """Counts of a daemon's requests since it started."""

    by_method: Counter[str] = field(default_factory=Counter)
    """Requests by method, of those that the daemon has."""
    strange: int = 0
    """Requests that could not be read, or of a method that the daemon lacks."""
    errors: Counter[str] = field(default_factory=Counter)
    """Errors answered, by code."""
    denied: Counter[str] = field(default_factory=Counter)
    """Requests that were denied, by the caller's name; those of unknown keys under an empty one."""
    dropped: int = 0
    """Messages that could not be answered, and answers that could not be delivered."""

    @property
    def taken(self) -> int:
        """All requests that came in."""
        return self.by_method.total() + self.strange


class Dispatcher(Generic[A]):
    """Reads requests and hands each to its handler; `daemon` names the daemon in errors, `requests` counts."""

    __slots__ = ("_daemon", "_table", "requests")

    def __init__(self, daemon: str, handlers: Mapping[Method, MethodHandler[A]], requests: Requests) -> None:
        self.requests = requests
        self._daemon = daemon
        # Keyed by the text of the method, and flat: this is looked up for every ID.
        self._table = {
            str(m): (METHODS[m].check, METHODS[m].callers, handler) for m, handler in handlers.items()
        }

    def dispatch(
        self, asker: A, body: bytes, arrived_us: int, local_us: int, caller: Caller = ANYONE
    ) -> bytes | None:
        """The answer to one request; None if it comes later, or must not be answered."""
        msgid = None
        try:
            msgid, method, params = decode_request(body)
            known = self._table.get(method)
            if known is None:
                self.requests.strange += 1
                what = f"a {self._daemon} has no method {method[:MAX_SHOWN]!r}"
                return self.refuse(msgid, Code.UNKNOWN_METHOD, what)
            self.requests.by_method[method] += 1
            check, callers, handler = known
            if caller is not ANYONE and caller.role not in callers:
                self.requests.denied[caller.name] += 1
                return self.refuse(msgid, Code.DENIED, _why_denied(caller, method))
            return handler(asker, msgid, check(params), arrived_us, local_us, caller)
        except BadRequest as error:
            self.requests.strange += 1
            if error.answerable:
                return self.refuse(error.msgid, Code.BAD_REQUEST, str(error))
            self.requests.dropped += 1
            return None
        except ProtocolError as error:
            return self.refuse(msgid, Code.BAD_REQUEST, str(error))

    def refuse(self, msgid: int | None, code: Code, message: str, retry_after_ms: int | None = None) -> bytes:
        """The answer that is this error, which is counted."""
        self.requests.errors[code] += 1
        return encode_error(msgid, code, message, retry_after_ms)


def told(tell: Callable[[Caller], Any]) -> MethodHandler[Any]:
    """The handler of a method that answers with what `tell` gives the caller, whatever its params."""

    def handler(
        _asker: Any, msgid: int, _params: Any, _arrived_us: int, _local_us: int, caller: Caller
    ) -> bytes:
        return encode_result(msgid, tell(caller))

    return handler


def _why_denied(caller: Caller, method: str) -> str:
    if caller.role is None:
        return f"the key {caller.key} is not authorized here (any more)"
    return f"{method} is not for a key of the role {caller.role}"
