"""The methods, their parameters and results, and the error codes: PROTOCOL.md as code.

Functions come in pairs, one for each side of the wire.  What a peer sends is checked here, in full, once;
behind this module values have their types and ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from zflake.core.layout import Layout
from zflake.core.lease import (
    TOKEN_BYTES,
    Acquire,
    Answer,
    Grant,
    Holder,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
    Trace,
    Traced,
)
from zflake.core.mint import Run
from zflake.errors import (
    AuthError,
    ConfigError,
    LayoutError,
    LeaseExpired,
    LeaseLost,
    NoFreeMachine,
    Overloaded,
    ProtocolError,
    Timeout,
    Unavailable,
    ZflakeError,
)
from zflake.wire.codec import WireError, show
from zflake.wire.endpoint import parse_endpoint

PROTOCOL_VERSION: Final = 1
MAX_COUNT: Final = 1_000_000
"""The most IDs that one `ids.next` may ask for."""
MAX_TIMEOUT_MS: Final = 3_600_000
MAX_TEXT: Final = 255
_MAX_INT: Final = 2**63 - 1


class Method(StrEnum):
    """The methods that a server may know."""

    HELLO = "hello"
    PING = "ping"
    IDS_NEXT = "ids.next"
    LEASE_ACQUIRE = "lease.acquire"
    LEASE_RENEW = "lease.renew"
    LEASE_RELEASE = "lease.release"
    WORKER_READY = "worker.ready"
    WORKER_BEAT = "worker.beat"
    WORKER_LEAVE = "worker.leave"
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


_ERRORS: Final[Mapping[str, type[ZflakeError]]] = {
    Code.BAD_REQUEST: ProtocolError,
    Code.UNKNOWN_METHOD: ProtocolError,
    Code.TIMEOUT: Timeout,
    Code.OVERLOADED: Overloaded,
    Code.UNAVAILABLE: Unavailable,
    Code.LEASE_EXPIRED: LeaseExpired,
    Code.LOST: LeaseLost,
    Code.TOO_EARLY: Unavailable,
    Code.NO_FREE_MACHINE: NoFreeMachine,
    Code.EXHAUSTED: LayoutError,
    Code.DENIED: AuthError,
    Code.NOT_READY: Unavailable,
    Code.OTHER_CLUSTER: ProtocolError,
}


def exception_of(error: WireError) -> ZflakeError:
    """The exception that an error response stands for; an unknown code is a `ProtocolError`."""
    retry_after = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    return _ERRORS.get(error.code, ProtocolError)(error.message, retry_after=retry_after)


# --- ids.next ---


def check_next(params: list[Any]) -> tuple[int, int, str | None]:
    """The `count`, `timeout_ms` and, where it is given, `store_id` of an `ids.next`.

    Raises `ProtocolError` where they are not right.
    """
    if not 2 <= len(params) <= 3:  # noqa: PLR2004
        raise ProtocolError("ids.next takes [count, timeout_ms], and store_id behind them or not")
    count, timeout_ms = params[0], params[1]
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise ProtocolError(f"count is a number from 1 to {MAX_COUNT}, not {show(count)}")
    if type(timeout_ms) is not int or not 0 <= timeout_ms <= MAX_TIMEOUT_MS:
        raise ProtocolError(f"timeout_ms is a number from 0 to {MAX_TIMEOUT_MS}, not {show(timeout_ms)}")
    store_id = params[2] if len(params) > 2 else None  # noqa: PLR2004
    if store_id is not None and type(store_id) is not str:
        raise ProtocolError(f"store_id is a string or nil, not {show(store_id)}")
    return count, timeout_ms, store_id


def check_run(result: Any, asked: int) -> Run:
    """The run in the result of an `ids.next` for `asked` IDs; raises `ProtocolError` where it is none."""
    try:
        first, step, count = result
        if (
            type(first) is type(step) is type(count) is int
            and 1 <= count <= asked
            and step >= 1
            and first >= 0
            and first + step * (count - 1) < 1 << 64
        ):
            return first, step, count
    except (TypeError, ValueError):
        pass
    raise ProtocolError(f"the answer to ids.next is [first, step, count], not {show(result)}")


def check_no_params(params: list[Any]) -> None:
    """Raise `ProtocolError` where a method that takes nothing was given something."""
    if params:
        raise ProtocolError(f"this method takes no params, not {show(params)}")


# --- hello ---


class Hello(NamedTuple):
    """What a daemon says it is."""

    service: str
    """`delegator` or `worker`."""
    layout: Layout | None
    """None for a worker without a lease."""
    store_id: str | None
    """Whose cluster it belongs to; None for a static worker, and for one without a lease."""


def check_hello(error: WireError | None, result: Any, *, service: str | None = None) -> Hello:
    """What the answer to `hello` says.

    Raises `ProtocolError` where it is no daemon that we can talk to, or not the `service` that was wanted.
    """
    wanted = service
    service = result.get("service") if error is None and type(result) is dict else None
    if service not in ("delegator", "worker"):
        raise ProtocolError("it is no delegator and no worker of zflake")
    if wanted is not None and service != wanted:
        raise ProtocolError(f"it is a {service}, not a {wanted}")
    if result.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(
            f"it speaks version {show(result.get('protocol'))} of the protocol, this zflake speaks {PROTOCOL_VERSION}"
        )
    layout = result.get("layout")
    if layout is None and service == "delegator":
        raise ProtocolError("it is a delegator without a layout")
    store_id = result.get("store_id")
    if store_id is not None and type(store_id) is not str:
        raise ProtocolError(f"its store_id is no string but {show(store_id)}")
    try:
        return Hello(service, None if layout is None else Layout.from_map(layout), store_id)
    except LayoutError as error_:
        raise ProtocolError(f"its layout can't be read: {error_}") from error_


# --- leases ---


def lease_call(request: Request) -> tuple[Method, list[Any]]:
    """The method and params of a lease request."""
    match request:
        case Acquire(next=token, holder=holder):
            return Method.LEASE_ACQUIRE, [token, holder.name, holder.host, holder.pid, holder.address]
        case Renew(machine=machine, token=shown, gen=gen, next=token, end=end, store_id=store_id):
            return Method.LEASE_RENEW, [machine, shown, gen, token, end, store_id]
        case Release(machine=machine, token=shown, next=pending, last=last):
            return Method.LEASE_RELEASE, [machine, shown, pending, last]


def check_acquire(params: list[Any]) -> Acquire:
    """The request of a `lease.acquire`; raises `ProtocolError` where it is not right."""
    token, name, host, pid, address = _take(params, "next", "name", "host", "pid", "address")
    return Acquire(
        _token("next", token),
        Holder(_text("name", name), _text("host", host), _number("pid", pid), _address(address)),
    )


def check_renew(params: list[Any]) -> Renew:
    """The request of a `lease.renew`; raises `ProtocolError` where it is not right."""
    # Who leaves the last two out renews as ever, and bears no witness.
    params = [*params, None, None] if len(params) == 4 else params  # noqa: PLR2004
    machine, token, gen, pending, end, store_id = _take(
        params, "machine", "token", "gen", "next", "end", "store_id"
    )
    return Renew(
        _number("machine", machine),
        _token("token", token),
        _number("gen", gen),
        _token("next", pending),
        None if end is None else _number("end", end),
        None if store_id is None else _text("store_id", store_id),
    )


def check_release(params: list[Any]) -> Release:
    """The request of a `lease.release`; raises `ProtocolError` where it is not right."""
    machine, token, pending, last = _take(params, "machine", "token", "next", "last")
    return Release(
        _number("machine", machine),
        _token("token", token),
        None if pending is None else _token("next", pending),
        None if last is None else _number("last", last),
    )


def check_trace(params: list[Any]) -> Trace:
    """The request of a `cluster.trace`; raises `ProtocolError` where it is not right."""
    machine, tick = _take(params, "machine", "tick")
    return Trace(_number("machine", machine), _number("tick", tick))


STORE_REQUESTS: Final[Mapping[str, Callable[[list[Any]], Request | Trace]]] = {
    Method.LEASE_ACQUIRE: check_acquire,
    Method.LEASE_RENEW: check_renew,
    Method.LEASE_RELEASE: check_release,
    Method.CLUSTER_TRACE: check_trace,
}
"""What only the store can answer."""


def store_result(answer: Grant | Released | Traced, now_us: int) -> dict[str, Any]:
    """The result of a request that the store answered; `now_us` is the timeline's now at the send."""
    if isinstance(answer, Released):
        return {"machine": answer.machine, "fence": answer.fence, "now_us": now_us}
    if isinstance(answer, Traced):
        span = answer.span
        described = (
            None
            if span is None
            else {
                "machine": span.machine,
                "start": span.start,
                "end": span.end,
                "name": span.holder.name,
                "host": span.holder.host,
                "pid": span.holder.pid,
                "address": span.holder.address,
            }
        )
        return {"span": described, "since": answer.since, "now_us": now_us}
    return {
        "machine": answer.machine,
        "gen": answer.gen,
        "start": answer.start,
        "end": answer.end,
        "token": answer.token,
        "ttl": answer.ttl,
        "store_id": answer.store_id,
        "layout": answer.layout.to_map(),
        "now_us": now_us,
    }


def lease_answer(method: Method, error: WireError | None, result: Any) -> Answer:
    """What a response to a lease request says; raises `ProtocolError` where it says nothing sound.

    An error that is no decision of the lessor's (overloaded, denied, ...) reads as `unavailable`.
    """
    if error is not None:
        known = error.code in set(Refused)
        reason = Refused(error.code) if known else Refused.UNAVAILABLE
        return Refusal(reason, error.message, error.retry_after_ms)
    if type(result) is not dict:
        raise ProtocolError(f"the answer to {method} is a map, not {show(result)}")
    if method is Method.LEASE_RELEASE:
        return Released(*(_number(key, result.get(key)) for key in ("machine", "fence")))
    try:
        layout = Layout.from_map(result.get("layout", {}))
        layout.check_machine(result.get("machine", -1))
    except (LayoutError, RecursionError) as error_:  # the latter from the text of the former
        raise ProtocolError(f"the answer to {method} has no sound layout: {str(error_)[:200]}") from error_
    _text("a layout's name", layout.name)
    machine, gen, start, end, ttl = (
        _number(key, result.get(key)) for key in ("machine", "gen", "start", "end", "ttl")
    )
    if ttl == 0:
        raise ProtocolError(f"the answer to {method} has a ttl of 0: it could not be renewed in time")
    store_id = _text("store_id", result.get("store_id", ""))
    return Grant(machine, gen, start, end, _token("token", result.get("token")), layout, ttl, store_id)


# --- workers ---


class Ready(NamedTuple):
    """A worker says that it is there to serve, and shows its lease's token."""

    machine: int
    token: bytes


def check_ready(params: list[Any]) -> Ready:
    """The params of a `worker.ready`; raises `ProtocolError` where they are not right."""
    machine, token = _take(params, "machine", "token")
    return Ready(_number("machine", machine), _token("token", token))


LOAD: Final = ("requests", "ids", "parked", "dropped", "errors")
"""What a beat says of a worker: counts, since its start but for `parked`."""


def check_beat(params: list[Any]) -> dict[str, int]:
    """The load that a `worker.beat` carries; raises `ProtocolError` where it is not right."""
    (load,) = _take(params, "load")
    if type(load) is not dict:
        raise ProtocolError(f"load is a map, not {show(load)}")
    return {key: _number(key, load.get(key)) for key in LOAD}


def now_of(result: Any) -> int | None:
    """The `now_us` of a delegator's result (µs since the Unix epoch), where it carries one."""
    now_us = result.get("now_us") if type(result) is dict else None
    return now_us if type(now_us) is int and 0 <= now_us <= _MAX_INT else None


def _take(params: list[Any], *names: str) -> list[Any]:
    if len(params) != len(names):
        raise ProtocolError(f"params are [{', '.join(names)}], not {len(params)} values")
    return params


def _token(name: str, value: Any) -> bytes:
    if type(value) is not bytes or len(value) != TOKEN_BYTES:
        raise ProtocolError(f"{name} is {TOKEN_BYTES} bytes (MessagePack's bin), not {show(value)}")
    return value


def _number(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise ProtocolError(f"{name} is a number from 0 to 2**63 - 1, not {show(value)}")
    return value


def _address(value: Any) -> str:
    text = _text("address", value)
    try:
        if text and parse_endpoint(text).is_wildcard:
            raise ProtocolError(f"address {text} is every interface: name a host that clients can connect to")
    except ConfigError as error:
        # One that can't be read would make the whole directory unreadable to clients.
        raise ProtocolError(f"address: {error}") from error
    return text


def check_name(name: str) -> str:
    """Give a holder's name back; raises `ConfigError` where it can't be shown to people."""
    if not isinstance(name, str) or len(name) > MAX_TEXT or not name.isprintable():
        raise ConfigError(f"a name is at most {MAX_TEXT} printable characters, not {str(name)[:60]!a}")
    return name


def _text(name: str, value: Any) -> str:
    # Names end up in logs and on terminals: nothing that a terminal would obey.
    if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():
        raise ProtocolError(f"{name} is a text of at most {MAX_TEXT} printable characters, not {show(value)}")
    return value
