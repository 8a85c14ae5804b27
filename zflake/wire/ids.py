"""`ids.next`: what a client asks, and the run that answers it."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from zflake.core.mint import Run
from zflake.errors import ProtocolError
from zflake.wire.codec import show

MAX_COUNT: Final = 1_000_000
"""IDs that one `ids.next` may ask for, at most."""
MAX_TIMEOUT_MS: Final = 3_600_000

NextIds: TypeAlias = tuple[int, int, str | None]
"""`(count, timeout_ms, store_id)` of an `ids.next`: the IDs wanted, what is left of the caller's budget, and the
cluster that it takes its IDs from, None if any will do."""


def check_next(params: list[Any]) -> NextIds:
    """The params of an `ids.next`; raises `ProtocolError` if they are not right."""
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
    """The run in the result of an `ids.next` for `asked` IDs; raises `ProtocolError` if it is none."""
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
