"""zflake: unique, time-ordered 64-bit IDs from a cluster of daemons over ZeroMQ."""
