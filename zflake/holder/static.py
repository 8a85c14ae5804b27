"""An assigned machine ID: no delegator, no lease, the machine's own wall clock.

The operator sees to it that no two processes have the same number at a time, and that none is restarted while a
wall clock that was set back is inside ticks that it has minted in.  While the process runs it keeps to the rules of
every holder: time never goes back, a wall clock set forward is followed at once, one set back is slewed to.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from zflake import clock
from zflake.core.layout import Layout
from zflake.core.lease import Token
from zflake.core.mint import Mint
from zflake.core.timeline import tick_of
from zflake.errors import ConfigError
from zflake.holder.clock import HolderClock

EXCHANGE_US: Final = 250_000
"""Microseconds between looks at the wall clock."""
WARN_AHEAD_US: Final = 1_000_000
"""Microseconds ahead of the wall clock from which that is worth a warning."""

_log = logging.getLogger("zflake.static")


class StaticHold:
    """A mint whose one window reaches from the next tick to the layout's end: a `Hold` that keeps itself.

    Raises `ConfigError` if the wall clock is outside the layout, `LayoutError` if the machine is.
    """

    store_id = None
    token: Token = b""
    state = "STATIC"
    socket = None

    def __init__(self, layout: Layout, machine: int) -> None:
        self.mint: Mint = Mint(layout, machine)
        self.clock = HolderClock(clock.local_us)
        self.wake_us = 0
        """When `service` is due again (local clock)."""
        self._warned = False
        self.service(clock.local_us())
        # The next tick: what ran before with this number, and just ended, may have minted in this one.
        start = tick_of(layout, clock.wall_us()) + 1
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

    def retry_after_ms(self, _local_us: int) -> int:
        """Milliseconds that a caller should wait while there is nothing to mint: a tick."""
        return self.mint.layout.tick_ms

    def service(self, local_us: int) -> None:
        """Read the wall clock, every `EXCHANGE_US`."""
        if local_us < self.wake_us:
            return
        self.wake_us = local_us + EXCHANGE_US
        wall_us = clock.wall_us()
        self.clock.exchange(wall_us, clock.local_us(), step=False)
        ahead_us = (self.clock.timeline_us() or 0) - wall_us
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
        """There is nothing to let go of."""
