"""Every error that zflake raises: one root, one class for each fault that a caller can act on."""

from __future__ import annotations


class ZflakeError(Exception):
    """The root of all errors of zflake.

    `retry_after` is the number of seconds after which another try may succeed, or None if the other
    side gave no such hint.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Timeout(ZflakeError, TimeoutError):  # noqa: N818  (the name is the fixed API)
    """The whole budget of a call was spent, retries included, before all IDs had arrived."""


class Unavailable(ZflakeError):  # noqa: N818
    """No endpoint could serve: none answers, none is known, or the delegator can't reach its store."""


class Overloaded(ZflakeError):  # noqa: N818
    """A daemon has more requests waiting than it can answer in time; nothing was minted."""


class LeaseExpired(ZflakeError):  # noqa: N818
    """A holder's windows have run out and its delegator has not granted the next one yet."""


class LeaseLost(ZflakeError):  # noqa: N818
    """The record of a lease has moved on: another holder showed the token first, or took the machine ID."""


class NoFreeMachine(ZflakeError):  # noqa: N818
    """Every machine ID is inside a window; `retry_after` says when the first one may fall free."""


class AuthError(ZflakeError):
    """The daemon refuses this key for this request."""


class ProtocolError(ZflakeError):
    """A peer sent something that the protocol does not allow, or refused a request as malformed."""


class LayoutError(ZflakeError, ValueError):
    """A number does not fit the layout, or a layout does not fit 64 bits."""


class StoreError(ZflakeError):
    """The store can't be opened, is not zflake's, or failed; a failed write may have happened."""


class ConfigError(ZflakeError, ValueError):
    """An option, an endpoint or a file of options is wrong; the message says which and what would do."""


class Closed(ZflakeError):  # noqa: N818
    """The client was closed before this call."""
