"""A machine ID that somebody assigned: no delegator, no lease, the machine's own wall clock.

It is up to the operator that no two processes have the same number at a time, and that a wall clock that
was set back is not restarted into ticks that it has minted in.  While the process runs it keeps to the rules
of every holder: time never goes back, a wall clock set forward is followed at once, one set back is slewed to.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from zflake.core.layout import Layout
from zflake.core.mint import Mint
from zflake.core.timeline import tick_of
from zflake.errors import ConfigError
from zflake.holder.clock import Clock, local_us

EXCHANGE_US: Final = 250_000
WARN_AHEAD_US: Final = 1_000_000

_log = logging.getLogger("zflake.static")


class StaticHold:
    """A mint whose one window reaches from the next tick to the layout's end.

    Raises `ConfigError` where the wall clock is outside the layout, `LayoutError` where the machine is.
    """

    def __init__(self, layout: Layout, machine: int) -> None:
        self.mint: Mint = Mint(layout, machine)
        self.store_id = None
        self.socket = None
        """There is nothing to poll."""
        self.clock = Clock()
        self.wake_us = 0
        """When `service` wants to be called again (local clock)."""
        self._warned = False
        self.service(local_us())
        # The next tick: what ran before with this number, and just ended, may have minted in this one.
        start = tick_of(layout, time.time_ns() // 1000) + 1
        if not 0 < start < layout.end_tick:
            raise ConfigError(
                f"the wall clock says {time.strftime('%FT%TZ', time.gmtime())}, outside layout {layout.name}, "
                f"which goes from {layout.epoch.isoformat()} to {layout.overflows.isoformat()}: set the clock"
            )
        self.mint.grant(start, layout.end_tick)

    @property
    def is_open(self) -> bool:
        """Whether the clock has reached the first tick."""
        return self.mint.covers(self.clock.tick(self.mint.layout))

    @property
    def retry_after_ms(self) -> int:
        """How long a caller should wait where there is nothing to mint: a tick."""
        return self.mint.layout.tick_ms

    def service(self, now_local_us: int) -> None:
        """Read the wall clock, every `EXCHANGE_US`."""
        if now_local_us < self.wake_us:
            return
        self.wake_us = now_local_us + EXCHANGE_US
        wall_us = time.time_ns() // 1000
        self.clock.exchange(wall_us, local_us(), step=False)
        ahead_us = (self.clock.now_us() or 0) - wall_us
        if ahead_us > WARN_AHEAD_US and not self._warned:
            _log.warning(
                "the wall clock went back by %.1f s; going on ahead of it. Do not restart this machine ID "
                "until the wall clock has caught up",
                ahead_us / 1e6,
            )
        self._warned = ahead_us > WARN_AHEAD_US

    def release(self, _deadline_us: int) -> None:
        """Stop minting for good."""
        self.mint.close()

    def close(self) -> None:
        """Nothing to let go of."""
