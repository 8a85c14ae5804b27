from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Connect, Peer
from tests.daemon.tools import delegating
from zflake.delegator.server import Delegator


@pytest.fixture
def delegator() -> Iterator[Delegator]:
    with delegating() as delegator:
        yield delegator


@pytest.fixture
def peer(connect: Connect, delegator: Delegator) -> Peer:
    return connect(delegator.address)
