"""One of many processes that take machine IDs at once, by the bare wire: one request after another, and none kept.

`python -m tests.engines.acquirer ENDPOINTS COUNT BEGIN` begins when the monotonic clock shows BEGIN seconds, and
prints a line of JSON: when it began and ended, what it was granted, and why not if it was refused.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import zmq

from zflake.core.lease import TOKEN_BYTES, Acquire, Grant, Holder, Refusal
from zflake.wire.codec import decode_response, encode_request
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.leases import lease_answer, lease_call
from zflake.wire.sockets import Dialer, no_keys

PATIENCE_S: Final = 2.0
BOTH: Final = 8
"""Every so many-th request goes to all delegators at once: they must agree on what it is granted."""


class Granted(NamedTuple):
    """A window."""

    machine: int
    gen: int
    start: int
    end: int


class Acquirer:
    """Takes leases, which no holder uses; its requests are repeated until they are granted."""

    def __init__(self, endpoints: Sequence[str], name: str = "acquirer") -> None:
        self.refusals: list[str] = []
        self._endpoints = [parse_endpoint(endpoint) for endpoint in endpoints]
        self._holder = Holder(name, "host", 1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def take(self, count: int, *, deadline_s: float = 60.0) -> list[Granted]:
        """So many leases; fewer where `deadline_s` have passed before."""
        until_s = time.monotonic() + deadline_s
        taken: list[Granted] = []
        for k in range(count):
            granted = self._take_one(k, until_s)
            if granted is None:
                break
            taken.append(granted)
        return taken

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _take_one(self, number: int, until_s: float) -> Granted | None:
        request = Acquire(secrets.token_bytes(TOKEN_BYTES), self._holder)
        turn = number
        while time.monotonic() < until_s:
            asked = len(self._endpoints) if number % BOTH == BOTH - 1 else 1
            answers = self._ask(request, [(turn + i) % len(self._endpoints) for i in range(asked)])
            windows = {
                Granted(answer.machine, answer.gen, answer.start, answer.end)
                for answer in answers
                if isinstance(answer, Grant)
            }
            assert len(windows) < 2, f"one request was granted twice: {windows}"
            if windows:
                return windows.pop()
            self.refusals += [f"{a.reason}: {a.message}" for a in answers if isinstance(a, Refusal)]
            turn += 1
            time.sleep(0.02)
        return None

    def _ask(self, request: Acquire, turns: Sequence[int]) -> list[object]:
        """The answers of those endpoints, as far as they give any."""
        method, params = lease_call(request)
        dialers = [
            Dialer(self._context, zmq.DEALER, self._endpoints[turn], no_keys(), queue=True) for turn in turns
        ]
        sockets = [dialer.socket for dialer in dialers]
        answers: list[object] = []
        try:
            for socket in sockets:
                socket.send_multipart([b"", encode_request(1, method, params)])
            patience_s = time.monotonic() + PATIENCE_S
            for socket in sockets:
                if socket.poll(max(0, int((patience_s - time.monotonic()) * 1000))):
                    response = decode_response(socket.recv_multipart()[-1])
                    answers.append(lease_answer(method, response.error, response.result))
        finally:
            for dialer in dialers:
                dialer.close()
        return answers


if __name__ == "__main__":
    acquirer = Acquirer(sys.argv[1].split(","))
    time.sleep(max(0.0, float(sys.argv[3]) - time.monotonic()))
    began_s = time.monotonic()
    granted = acquirer.take(int(sys.argv[2]))
    ended_s = time.monotonic()
    report = {"began_s": began_s, "ended_s": ended_s, "granted": granted, "refusals": acquirer.refusals[:3]}
    print(json.dumps(report))  # noqa: T201
