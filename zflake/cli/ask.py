"""One request to one daemon, for the commands that look at a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

from zflake.client.conversation import PAUSE_S, Ask
from zflake.client.transport import Transport
from zflake.errors import AuthError, Overloaded, ProtocolError, Timeout
from zflake.keys import Keys
from zflake.wire.codec import printable
from zflake.wire.methods import Method, exception_of

# What Python raises where a value is of another type, form or size than it is taken for.
_UNREADABLE: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def ask(
    endpoint: str, method: Method, params: tuple[Any, ...], timeout_s: float, keys: Keys | None = None
) -> Any:
    """The result of a request.

    Raises `Timeout` if no answer comes, `ProtocolError` if it is not zflake's, `AuthError` if the connection is refused,
    and the error that the answer carries.
    """
    with closing(Transport(keys)) as transport:
        return _ask(transport, Ask(endpoint, method, params, timeout_s), time.monotonic() + timeout_s)


def ask_pages(endpoint: str, method: Method, timeout_s: float, keys: Keys | None = None) -> Iterator[Any]:
    """The results of a request for all pages, within `timeout_s` seconds; each says as `next` what gives the next one.

    Raises what `ask` raises.
    """
    deadline = time.monotonic() + timeout_s
    params: tuple[int, ...] = ()
    with closing(Transport(keys)) as transport:
        while True:
            try:
                page = _ask(transport, Ask(endpoint, method, params, timeout_s), deadline)
            except Overloaded as error:
                pause_s = error.retry_after or PAUSE_S
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
                continue
            yield page
            after = page.get("next") if isinstance(page, dict) else None
            if type(after) is not int:
                return
            params = (after,)


def _ask(transport: Transport, ask: Ask, deadline: float) -> Any:
    endpoint, outcome = ask.endpoint, None
    # The transport gives a connection up before the time is over, since a client has other endpoints.
    while outcome is None and (left_s := deadline - time.monotonic()) > 0:
        outcome = transport.ask(ask._replace(timeout_s=left_s))
    if outcome is None:
        raise Timeout(f"no answer from {endpoint} within {ask.timeout_s:g} s; check that it is running")
    if isinstance(outcome, AuthError | ProtocolError):
        raise type(outcome)(f"{endpoint}: {outcome}")
    if outcome.error is not None:
        raise exception_of(outcome.error)
    with reading(endpoint):
        return readable(outcome.result)


@contextmanager
def reading(endpoint: str) -> Iterator[None]:
    """Whatever can't be done with an answer of this endpoint's is a `ProtocolError`, and the endpoint's fault.

    The commands check of an answer no more than they show, so nothing may be printed in here.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise ProtocolError(f"{endpoint} sent an answer that can't be read: {error!r}") from error


def readable(value: Any) -> Any:
    """A value from elsewhere with printable texts only: all that the commands show of peers comes through here.

    Raises `TypeError` if it is none that JSON has as well.
    """
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return printable(value)
        case list():
            return [readable(each) for each in value]
        case dict():
            return {readable(key): readable(each) for key, each in value.items()}
    raise TypeError(f"{type(value).__name__} in it")
