"""Tools for tests of both daemons: a delegator in a thread, and what a response says."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from tests.conftest import serving
from zflake.delegator.server import Delegator, DelegatorConfig
from zflake.delegator.start import Wishes
from zflake.wire.codec import Response, WireError
from zflake.wire.endpoint import Endpoint, parse_endpoint

ANY: Final = parse_endpoint("tcp://127.0.0.1:*", to_bind=True)
NEW: Final = Wishes(new=True)


def delegating(
    store: str = "memory:", wishes: Wishes = NEW, bind: Endpoint = ANY, **more: Any
) -> contextlib.AbstractContextManager[Delegator]:
    config = DelegatorConfig(bind, store, wishes, **more)
    return serving(lambda waker: Delegator(config, waker))


def result(response: Response | None) -> Any:
    """The result of a response that came, and is no error."""
    assert response is not None
    assert response.error is None, response.error
    return response.result


def failure(response: Response | None) -> WireError:
    """The error that a response is."""
    assert response is not None
    assert response.error is not None
    return response.error
