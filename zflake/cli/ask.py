"""One request to one daemon, for the commands that look at a cluster."""

from __future__ import annotations

import time
from typing import Any

from zflake.client.conversation import Ask
from zflake.client.transport import Transport
from zflake.errors import Timeout
from zflake.wire.methods import Method, exception_of


def ask(endpoint: str, method: Method, params: tuple[Any, ...], timeout_s: float) -> Any:
    """The result of a request.

    Raises `Timeout` if no daemon answers, and the exception that an error in the answer stands for.
    """
    transport = Transport()
    deadline, response = time.monotonic() + timeout_s, None
    try:
        # A connection is given up before the time is over, since a client has others to go to.
        while response is None and (left_s := deadline - time.monotonic()) > 0:
            response = transport.ask(Ask(endpoint, method, params, left_s))
    finally:
        transport.close()
    if response is None:
        raise Timeout(f"no answer from {endpoint} within {timeout_s:g} s; is it running?")
    if response.error is not None:
        raise exception_of(response.error)
    return response.result
