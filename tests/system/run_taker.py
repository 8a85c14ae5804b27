"""One client of the cluster job, a process of its own: takes runs of IDs, and writes down each one and each error.

`python -m tests.system.run_taker ENDPOINT[,ENDPOINT...] ROUTE SEED RATE OUT [TIMEOUT]`.  OUT gets a record for
each run: its first ID and its length, little-endian uint64; OUT.errors a line for each call that failed, after
when that was (seconds of the monotonic clock).  RATE is how many IDs it may take each second, 0: as many as it
can get; TIMEOUT what a call has, in seconds.  It goes on until it is killed, or whoever started it is gone.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import Final

import zflake

SIZES: Final = (1, 7, 100, 1_000, *(4_096,) * 4, *(16_384,) * 4)
"""The sizes of calls, each as likely as the others."""
TIMEOUT_S: Final = 30.0
"""Longer than any outage that the faults make, and than a disk that is slow with a commit."""
BITE: Final = 100
"""Who is held to a rate takes no more at a time."""


def take(client: zflake.Client, seed: int, rate: int, out: Path) -> None:
    draw = random.Random(seed)
    sizes = [size for size in SIZES if size <= BITE] if rate else SIZES
    parent = os.getppid()
    taken, began = 0, time.monotonic()
    pack = struct.Struct("<QQ").pack
    with out.open("ab", buffering=0) as runs, out.with_suffix(".errors").open("a", buffering=1) as errors:
        while os.getppid() == parent:
            size = draw.choice(sizes)
            try:
                got = client._take(size)
            except Exception as error:  # noqa: BLE001  (whatever it is, it must not be)
                errors.write(f"{time.monotonic():.3f} after {taken} IDs, asking for {size}: {error!r}\n")
                continue
            runs.write(b"".join(pack(first, count) for first, _, count in got))
            if (sum_ := sum(count for _, _, count in got)) != size:
                errors.write(f"{time.monotonic():.3f} after {taken} IDs: asked for {size}, got {sum_}\n")
            taken += size
            if rate:
                time.sleep(max(0.0, began + taken / rate - time.monotonic()))


if __name__ == "__main__":
    endpoints, route, seed, rate, out, *rest = sys.argv[1:]
    timeout = float(rest[0]) if rest else TIMEOUT_S
    with zflake.Client(endpoints.split(","), route=route, timeout=timeout) as client:
        take(client, int(seed), int(rate), Path(out))
