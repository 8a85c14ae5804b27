"""One request to one daemon, for the commands that look at a cluster."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from zflake.client.conversation import Ask
from zflake.client.transport import Transport
from zflake.errors import AuthError, ProtocolError, Timeout
from zflake.keys import Keys
from zflake.wire.codec import printable
from zflake.wire.methods import Method, exception_of


def ask(
    endpoint: str, method: Method, params: tuple[Any, ...], timeout_s: float, keys: Keys | None = None
) -> Any:
    """The result of a request.

    Raises `Timeout` if no answer comes, `ProtocolError` if it is not zflake's, `AuthError` if the connection is refused,
    and the error that the answer carries.
    """
    deadline, outcome = time.monotonic() + timeout_s, None
    with closing(Transport(keys)) as transport:
        # The transport gives a connection up before the time is over, since a client has other endpoints.
        while outcome is None and (left_s := deadline - time.monotonic()) > 0:
            outcome = transport.ask(Ask(endpoint, method, params, left_s))
    if outcome is None:
        raise Timeout(f"no answer from {endpoint} within {timeout_s:g} s; check that it is running")
    if isinstance(outcome, AuthError | ProtocolError):
        raise type(outcome)(f"{endpoint}: {outcome}")
    if outcome.error is not None:
        raise exception_of(outcome.error)
    return readable(outcome.result)


def readable(value: Any) -> Any:
    """A value from elsewhere with printable texts only: all that the commands show of peers comes through here."""
    match value:
        case str():
            return printable(value)
        case list():
            return [readable(each) for each in value]
        case dict():
            return {readable(key): readable(each) for key, each in value.items()}
    return value
