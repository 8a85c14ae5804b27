"""The flood on a delegator, a process of its own: many clients with far more requests than can be answered.

`flood.py` starts it as `python flooder.py ENDPOINT CLIENTS SECONDS`.  Each client is a socket of its own
that keeps `DEPTH` requests under way, whatever becomes of them.  At the end it prints one JSON object: how
many requests were sent, and how many answers came by what they say (`ids` or the error's code).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Final

import zmq

from zflake.wire.codec import decode_response, encode_request

DEPTH: Final = 100
BUDGET_MS: Final = 1_000
GIVEN_UP_S: Final = 3.0
"""A client without any answer for so long begins again: its requests were lost with a connection."""


def flood(endpoint: str, clients: int, seconds: float) -> Counter[str]:
    """Flood for so long; gives the counts."""
    counts = Counter[str]()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    under_way: dict[zmq.Socket[bytes], int] = {}
    heard_at: dict[zmq.Socket[bytes], float] = {}
    for _ in range(clients):
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint)
        poller.register(dealer, zmq.POLLIN)
        under_way[dealer], heard_at[dealer] = 0, time.monotonic()
    body = encode_request(1, "ids.next", (1, BUDGET_MS))
    until = time.monotonic() + seconds
    while (now := time.monotonic()) < until:
        for dealer, waiting in under_way.items():
            under_way[dealer] = 0 if now - heard_at[dealer] > GIVEN_UP_S else waiting
            while under_way[dealer] < DEPTH:
                try:
                    dealer.send_multipart([b"", body], zmq.NOBLOCK)
                except zmq.Again:
                    break
                under_way[dealer] += 1
                counts["sent"] += 1
        for dealer, _ in poller.poll(10):
            heard_at[dealer] = now
            while True:
                try:
                    answer = dealer.recv_multipart(zmq.NOBLOCK)[-1]
                except zmq.Again:
                    break
                under_way[dealer] -= 1
                error = decode_response(answer).error
                counts["ids" if error is None else error.code] += 1
    context.destroy(linger=0)
    return counts


if __name__ == "__main__":
    print(json.dumps(flood(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))  # noqa: T201
