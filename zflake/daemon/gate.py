"""The gate: which keys may come in at a daemon's ROUTER, and whose request each is.

libzmq asks the gate at each handshake, by ZAP: a key that is not authorized has no connection, and is told so.  A
connection outlives the revocation of its key, so each message says again by which key it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

import zmq
from zmq.auth import Authenticator

from zflake.keys import Callers
from zflake.wire.callers import Caller
from zflake.wire.sockets import ZAP_DOMAIN

HANDSHAKES: Final = 64
"""Handshakes that one turn of the loop answers at most."""
REREAD_US: Final = 500_000
"""Microseconds between looks at who is authorized."""


class Gate:
    """Answers ZAP in a context, in the loop of the daemon whose ROUTER is there.

    Who is `authorized` may come, as their folder says it at the time; without one the owner sets `callers`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: Callers | None) -> None:
        self.callers: Mapping[str, Caller] = {} if authorized is None else authorized.by_key
        self._authorized = authorized
        self._look_at_us = 0
        self.refused = 0
        """Handshakes of keys that are not authorized."""
        self._authenticator = Authenticator(context)
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, self)
        self._authenticator.start()
        self._zap: zmq.Socket[bytes] = self._authenticator.zap_socket

    def register(self, poller: zmq.Poller) -> None:
        """Have `poller` watch for handshakes."""
        poller.register(self._zap, zmq.POLLIN)

    def take(self, events: Mapping[object, int], local_us: int) -> None:
        """Decide on the handshakes that a poll found, by who is authorized now."""
        if self._authorized is not None and local_us >= self._look_at_us:
            self._look_at_us = local_us + REREAD_US
            self._authorized.look()
            self.callers = self._authorized.by_key
        if self._zap not in events:
            return
        for _ in range(HANDSHAKES):
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A coroutine only because others look keys up over the network.
            with contextlib.suppress(StopIteration):
                self._authenticator.handle_zap_message(request).send(None)

    def caller(self, key: str) -> Caller:
        """Whose key that is."""
        return self.callers.get(key) or Caller("", None, key)

    def close(self) -> None:
        """Decide on nothing any more."""
        self._authenticator.stop()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether that key may come in; the authenticator's question."""
        known = key.decode("ascii") in self.callers
        self.refused += not known
        return known
