"""A machine ID as its users see it, leased or static: nothing here says which."""

from __future__ import annotations

from typing import Protocol

from zflake.core.lease import Token
from zflake.core.mint import Mint
from zflake.holder.clock import HolderClock


class Hold(Protocol):
    """A machine ID in use."""

    @property
    def mint(self) -> Mint | None:
        """The mint; None while there is no machine ID."""

    @property
    def clock(self) -> HolderClock:
        """The clock to mint by."""

    @property
    def is_open(self) -> bool:
        """Whether a window holds the clock's now."""

    @property
    def token(self) -> Token:
        """The proof, for delegators, that this process holds the machine ID; empty if there is none to show."""

    @property
    def store_id(self) -> str | None:
        """The cluster that the machine ID belongs to; None if it belongs to none."""

    @property
    def state(self) -> str:
        """The state of the machine ID, in a word, for people."""

    def retry_after_ms(self, local_us: int) -> int:
        """Milliseconds that a caller should wait while no window is open."""
