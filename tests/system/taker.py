"""One client of the main job, a process of its own: takes IDs, and writes down each one and each error.

`main_job.py` starts it as `python taker.py ENDPOINT ROUTE QUOTA SEED OUT CEILING`.  OUT gets the IDs as raw
little-endian uint64, OUT.errors a line for each call that failed.  CEILING is a file of one little-endian
uint64: how many IDs each client may have by now.  Who is there goes on with single IDs, slowly.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from array import array
from pathlib import Path
from typing import Final

import zflake

SIZES: Final = (1, 1, 1, 1, 2, 10, 100, 1_000, 5_000, 20_000)
"""The sizes of calls, each as likely as the others; 1 is `next_id`."""
TRICKLE_S: Final = 0.004


def take(client: zflake.Client, quota: int, seed: int, out: Path, ceiling: Path) -> None:
    draw = random.Random(seed)
    taken = 0
    parent = os.getppid()
    # A small job takes small bites, or a few calls would be all of it.
    sizes = [size for size in SIZES if size <= max(1, quota // 50)]
    with (
        out.open("wb", buffering=0) as ids,
        out.with_suffix(".errors").open("w", buffering=1) as errors,
        ceiling.open("rb", buffering=0) as allowed,
    ):
        while taken < quota and os.getppid() == parent:
            (most,) = struct.unpack("<Q", os.pread(allowed.fileno(), 8, 0))
            size = min(draw.choice(sizes), quota - taken) if taken < most else 1
            try:
                got = [client.next_id()] if size == 1 else client.next_ids(size)
            except Exception as error:  # noqa: BLE001  (whatever it is, it must not be)
                errors.write(f"after {taken} IDs, asking for {size}: {error!r}\n")
                continue
            if len(got) != size:
                errors.write(f"after {taken} IDs: asked for {size}, got {len(got)}\n")
            batch = array("Q", got)
            if sys.byteorder == "big":
                batch.byteswap()
            ids.write(batch.tobytes())
            taken += len(got)
            if taken >= most:
                time.sleep(TRICKLE_S)


if __name__ == "__main__":
    endpoint, route, quota, seed, out, ceiling = sys.argv[1:]
    with zflake.Client(endpoint, route=route) as client:
        take(client, int(quota), int(seed), Path(out), Path(ceiling))
