"""The conduct of a daemon: when to stop, how to wake its loop, whom to tell how it is.

alarm.py    signals and other threads wake the poll loop
pulse.py    the loop's heartbeat, for systemd and for probes
health.py   /livez, /readyz and /metrics
"""

from zflake.daemon.alarm import Alarm
from zflake.daemon.pulse import Pulse

__all__ = ["Alarm", "Pulse"]
