"""`hello`, `worker.*` and the directory: what daemons say of themselves and of each other."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from zflake.core.layout import Layout
from zflake.errors import LayoutError, ProtocolError
from zflake.wire import fields
from zflake.wire.callers import Caller, Role
from zflake.wire.codec import WireError, show
from zflake.wire.methods import PROTOCOL_VERSION


class Hello(NamedTuple):
    """A daemon's identity, as it states it."""

    service: str
    """`delegator` or `worker`."""
    layout: Layout | None
    """None for a worker without a lease."""
    store_id: str | None
    """Whose cluster it belongs to; None for a static worker, and for one without a lease."""


def check_hello(error: WireError | None, result: Any, *, service: str | None = None) -> Hello:
    """The identity in an answer to `hello`.

    Raises `ProtocolError` if it is no daemon that this zflake can talk to, or not the `service` that was wanted.
    """
    wanted = service
    service = result.get("service") if error is None and type(result) is dict else None
    if service not in ("delegator", "worker"):
        raise ProtocolError("not a zflake daemon")
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


class Ready(NamedTuple):
    """A worker says that it is there to serve, and shows its lease's token."""

    machine: int
    token: bytes


_take_ready: Final = fields.taking(machine=fields.number, token=fields.token)


def check_ready(params: list[Any]) -> Ready:
    """The params of a `worker.ready`; raises `ProtocolError` if they are not right."""
    return Ready(*_take_ready(params))


def callers_version(result: Any) -> int | None:
    """The version of the callers that a delegator knows, in its answer to a worker; None in a cluster without keys."""
    version = result.get("version") if type(result) is dict else None
    return version if type(version) is int else None


def check_callers(result: Any) -> dict[str, Caller] | None:
    """The callers in an answer to `worker.callers`, by key; None if it is the answer to something else.

    Raises `ProtocolError` if they can't be read.
    """
    callers = result.get("callers") if type(result) is dict else None
    if callers is None:
        return None
    try:
        return {key: Caller(fields.text("name", name), Role(role), key) for key, name, role in callers}
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"callers are [[key, name, role], ...]: {error}") from error


PAGE: Final = 64
"""Leases or workers in one answer at most.  A page with the longest names has a quarter of `MAX_RESPONSE_BYTES`."""


def check_status(params: list[Any]) -> int:
    """The machine ID after which the page of a `cluster.status` begins, -1 for the first page.

    Raises `ProtocolError` if the params are not right.
    """
    if not params:
        return -1
    (after,) = _take_status(params)
    return int(after)


_take_status: Final = fields.taking(after=fields.number)

LOAD: Final = ("requests", "ids", "parked", "dropped", "errors")
"""Counts that a heartbeat says of a worker, since its start but for `parked`."""


class Heartbeat(NamedTuple):
    """A worker lives, and says how it is; it shows the token that it registered with."""

    load: dict[str, int]
    token: bytes


_take_heartbeat: Final = fields.taking(load=fields.mapping, token=fields.token)


def check_heartbeat(params: list[Any]) -> Heartbeat:
    """The params of a `worker.beat`; raises `ProtocolError` if they are not right."""
    load, token = _take_heartbeat(params)
    return Heartbeat({key: fields.number(key, load.get(key)) for key in LOAD}, token)


_take_leave: Final = fields.taking(token=fields.token)


def check_leave(params: list[Any]) -> bytes:
    """The token that a `worker.leave` shows; raises `ProtocolError` if it is not right."""
    (token,) = _take_leave(params)
    return bytes(token)
