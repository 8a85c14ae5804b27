"""The promises of a server's socket."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

FIRST_PEER: Final = """
import zmq
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.sockets import address_of, bound_router

context = zmq.Context()
router = bound_router(context, parse_endpoint("tcp://127.0.0.1:*", to_bind=True))
peer = context.socket(zmq.DEALER)
peer.connect(address_of(router))
peer.send(b"")
print(router.recv().hex())
context.destroy(linger=0)
"""


def test_a_peer_can_not_tell_which_identity_comes_next() -> None:
    """One that can aborts the process: libzmq ends it if a number of its own is taken."""
    identities = [subprocess.check_output([sys.executable, "-c", FIRST_PEER]) for _ in range(2)]
    assert identities[0] != identities[1]
