"""This machine's two clocks, in microseconds.  Rules take what they show as an argument, and never read them."""

from __future__ import annotations

import time
from typing import Final

# CLOCK_BOOTTIME goes on while the machine sleeps; elsewhere the monotonic clock is the best there is.
_LOCAL: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def local_us() -> int:
    """Microseconds on a clock that neither steps nor stops; its origin means nothing."""
    return time.clock_gettime_ns(_LOCAL) // 1000


def wall_us() -> int:
    """Microseconds since the Unix epoch, as this machine's wall clock says, which may step at any time."""
    return time.time_ns() // 1000
