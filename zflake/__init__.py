"""zflake: unique, time-ordered 64-bit IDs from a cluster of daemons over ZeroMQ."""

__version__ = "0.1.0"
