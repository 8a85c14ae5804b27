"""More peers than a daemon has descriptors for: it keeps what it needs, serves who is there, and takes others again."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

import zflake
from tests.conftest import Connect
from tests.daemon.test_door import connections
from tests.daemon.tools import result
from tests.system.daemons import Daemon, Daemons, until
from zflake.daemon.door import most_peers

LIMIT: Final = 1_100


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def test_a_delegator_keeps_descriptors_for_itself_whatever_comes(daemons: Daemons, connect: Connect) -> None:
    delegator = daemons.delegator(ttl="1h")
    # Before it has come so far as to ask for it.
    resource.prlimit(delegator.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    holder = connect(delegator.address)
    granted = result(holder.ask("lease.acquire", os.urandom(16), "w", "h", 1, ""))
    own = descriptors(delegator)
    with connections(delegator.address, 2 * LIMIT):
        until(lambda: delegator.said("no more are let in"), "the door to be shut")
        assert descriptors(delegator) >= most_peers(LIMIT)
        renew = [granted["machine"], granted["token"], granted["gen"], os.urandom(16)]
        until(lambda: holder.ask("lease.renew", *renew).error is None, "a renewal")
        assert descriptors(delegator) < LIMIT - own
    with zflake.Client(delegator.address, route="broker", timeout=30) as client:
        assert client.layout().name == "snowcloud"
