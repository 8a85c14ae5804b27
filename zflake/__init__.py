"""zflake: unique, time-ordered 64-bit IDs from a cluster of daemons over ZeroMQ.

    import zflake

    with zflake.Client("tcp://127.0.0.1:7410") as ids:
        ids.next_id()

`Client` takes IDs from a cluster, `LeasedGenerator` mints them in this process with a machine ID that the
cluster leases to it, `StaticGenerator` with one of your own; `layouts` takes them apart.  The errors all
descend from `ZflakeError`.
"""

from zflake.client.sync import Client
from zflake.core.layout import PRESETS as layouts  # noqa: N811  (the name is the fixed API)
from zflake.core.layout import Decomposed, Field, Layout
from zflake.embedded.generator import LeasedGenerator, StaticGenerator
from zflake.errors import (
    AuthError,
    Closed,
    ConfigError,
    LayoutError,
    LeaseExpired,
    LeaseLost,
    NoFreeMachine,
    Overloaded,
    ProtocolError,
    StoreError,
    Timeout,
    Unavailable,
    ZflakeError,
)
from zflake.version import __version__

__all__ = [
    "AuthError",
    "Client",
    "Closed",
    "ConfigError",
    "Decomposed",
    "Field",
    "Layout",
    "LayoutError",
    "LeaseExpired",
    "LeaseLost",
    "LeasedGenerator",
    "NoFreeMachine",
    "Overloaded",
    "ProtocolError",
    "StaticGenerator",
    "StoreError",
    "Timeout",
    "Unavailable",
    "ZflakeError",
    "__version__",
    "layouts",
]
