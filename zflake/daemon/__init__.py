"""The conduct of a daemon: when to stop, how to wake its loop, how it fares.

waker.py     signals and other threads wake the poll loop
door.py      how many peers may be connected
liveness.py  whether the loop goes round, for systemd and for probes
health.py    /livez, /readyz and /metrics
"""

from zflake.daemon.door import Door
from zflake.daemon.liveness import Liveness
from zflake.daemon.waker import Waker

__all__ = ["Door", "Liveness", "Waker"]
