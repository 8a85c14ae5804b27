"""`lease.*` and `cluster.trace`: what only the store can answer, and how the answers travel.

Functions come in pairs, one for each side of the wire.  What a peer sends is checked here, in full, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from zflake.core.layout import Layout
from zflake.core.lease import (
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
from zflake.errors import LayoutError, ProtocolError
from zflake.wire.codec import WireError
from zflake.wire.fields import address, mapping, number, optional, pick, taking, text, token
from zflake.wire.methods import Method

_take_acquire: Final = taking(next=token, name=text, host=text, pid=number, address=address)
_take_renew: Final = taking(
    machine=number, token=token, gen=number, next=token, end=optional(number), store_id=optional(text)
)
_take_release: Final = taking(machine=number, token=token, next=optional(token), last=optional(number))
_take_trace: Final = taking(machine=number, tick=number)


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
    """The request of a `lease.acquire`; raises `ProtocolError` if it is not right."""
    drawn, *holder = _take_acquire(params)
    return Acquire(drawn, Holder(*holder))


def check_renew(params: list[Any]) -> Renew:
    """The request of a `lease.renew`; raises `ProtocolError` if it is not right."""
    # A renewal without the last two bears no witness.
    params = [*params, None, None] if len(params) == 4 else params  # noqa: PLR2004
    return Renew(*_take_renew(params))


def check_release(params: list[Any]) -> Release:
    """The request of a `lease.release`; raises `ProtocolError` if it is not right."""
    return Release(*_take_release(params))


def check_trace(params: list[Any]) -> Trace:
    """The request of a `cluster.trace`; raises `ProtocolError` if it is not right."""
    return Trace(*_take_trace(params))


def store_result(
    answer: Grant | Released | Traced, timeline_us: int, name_of: Callable[[str], str] = str
) -> dict[str, Any]:
    """The result of a request that the store answered; `timeline_us` is the timeline's now at the send.

    `name_of` gives the name that people know a key by.
    """
    if isinstance(answer, Released):
        return {"machine": answer.machine, "fence": answer.fence, "now_us": timeline_us}
    if isinstance(answer, Traced):
        span = answer.span
        described = None
        if span is not None:
            described = {"machine": span.machine, "start": span.start, "end": span.end, **asdict(span.holder)}
            described["key"] = name_of(span.holder.key)
        return {"span": described, "since": answer.since, "now_us": timeline_us}
    return {
        "machine": answer.machine,
        "gen": answer.gen,
        "start": answer.start,
        "end": answer.end,
        "token": answer.token,
        "ttl": answer.ttl,
        "store_id": answer.store_id,
        "layout": answer.layout.to_map(),
        "now_us": timeline_us,
    }


def lease_answer(method: Method, error: WireError | None, result: Any) -> Answer:
    """The answer in a response to a lease request; raises `ProtocolError` if it says nothing sound.

    An error that is no decision of the lessor's (overloaded, denied, ...) reads as `unavailable`.
    """
    if error is not None:
        known = error.code in set(Refused)
        reason = Refused(error.code) if known else Refused.UNAVAILABLE
        return Refusal(reason, error.message, error.retry_after_ms)
    answer = mapping(f"the answer to {method}", result)
    if method is Method.LEASE_RELEASE:
        return Released(*pick(answer, machine=number, fence=number))
    machine, gen, start, end, shown, ttl = pick(
        answer, machine=number, gen=number, start=number, end=number, token=token, ttl=number
    )
    try:
        layout = Layout.from_map(answer.get("layout", {}))
        layout.check_machine(machine)
    except LayoutError as error_:
        raise ProtocolError(f"the answer to {method} has no sound layout: {str(error_)[:200]}") from error_
    text("a layout's name", layout.name)
    if ttl == 0:
        raise ProtocolError(f"the answer to {method} has a ttl of 0: it could not be renewed in time")
    store_id = text("store_id", answer.get("store_id", ""))
    return Grant(machine, gen, start, end, shown, layout, ttl, store_id)
