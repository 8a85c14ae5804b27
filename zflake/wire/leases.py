"""`lease.*` and `cluster.trace`: what only the store can answer, and how the answers travel.

Functions come in pairs, one for each side of the wire.  What a peer sends is checked here, in full, once.
"""

from __future__ import annotations

from typing import Any

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
from zflake.wire import fields
from zflake.wire.codec import WireError, show
from zflake.wire.methods import Method


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
    token, name, host, pid, address = fields.take(params, "next", "name", "host", "pid", "address")
    return Acquire(
        fields.token("next", token),
        Holder(
            fields.text("name", name),
            fields.text("host", host),
            fields.number("pid", pid),
            fields.address(address),
        ),
    )


def check_renew(params: list[Any]) -> Renew:
    """The request of a `lease.renew`; raises `ProtocolError` if it is not right."""
    # A renewal without the last two bears no witness.
    params = [*params, None, None] if len(params) == 4 else params  # noqa: PLR2004
    machine, token, gen, pending, end, store_id = fields.take(
        params, "machine", "token", "gen", "next", "end", "store_id"
    )
    return Renew(
        fields.number("machine", machine),
        fields.token("token", token),
        fields.number("gen", gen),
        fields.token("next", pending),
        None if end is None else fields.number("end", end),
        None if store_id is None else fields.text("store_id", store_id),
    )


def check_release(params: list[Any]) -> Release:
    """The request of a `lease.release`; raises `ProtocolError` if it is not right."""
    machine, token, pending, last = fields.take(params, "machine", "token", "next", "last")
    return Release(
        fields.number("machine", machine),
        fields.token("token", token),
        None if pending is None else fields.token("next", pending),
        None if last is None else fields.number("last", last),
    )


def check_trace(params: list[Any]) -> Trace:
    """The request of a `cluster.trace`; raises `ProtocolError` if it is not right."""
    machine, tick = fields.take(params, "machine", "tick")
    return Trace(fields.number("machine", machine), fields.number("tick", tick))


def store_result(answer: Grant | Released | Traced, timeline_us: int) -> dict[str, Any]:
    """The result of a request that the store answered; `timeline_us` is the timeline's now at the send."""
    if isinstance(answer, Released):
        return {"machine": answer.machine, "fence": answer.fence, "now_us": timeline_us}
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
    if type(result) is not dict:
        raise ProtocolError(f"the answer to {method} is a map, not {show(result)}")
    if method is Method.LEASE_RELEASE:
        return Released(*(fields.number(key, result.get(key)) for key in ("machine", "fence")))
    try:
        layout = Layout.from_map(result.get("layout", {}))
        layout.check_machine(result.get("machine", -1))
    except (LayoutError, RecursionError) as error_:  # the latter from the text of the former
        raise ProtocolError(f"the answer to {method} has no sound layout: {str(error_)[:200]}") from error_
    fields.text("a layout's name", layout.name)
    machine, gen, start, end, ttl = (
        fields.number(key, result.get(key)) for key in ("machine", "gen", "start", "end", "ttl")
    )
    if ttl == 0:
        raise ProtocolError(f"the answer to {method} has a ttl of 0: it could not be renewed in time")
    store_id = fields.text("store_id", result.get("store_id", ""))
    return Grant(machine, gen, start, end, fields.token("token", result.get("token")), layout, ttl, store_id)
