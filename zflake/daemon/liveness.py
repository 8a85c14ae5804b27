"""Whether a daemon's loop goes round: systemd's watchdog is fed from that, and probes look at its age."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

ALIVE_S: Final = 5.0
"""Seconds without a turn after which a loop counts as hung."""


class Liveness:
    """How a daemon fares: it calls `turn` in every turn of its loop, with `ready` once it serves.

    Speaks to systemd (`Type=notify`, `WatchdogSec=`; see sd_notify(3)) if that started the daemon.
    """

    def __init__(self) -> None:
        self.is_ready = False
        self._turned_at = time.monotonic()
        self._told_at = self._turned_at
        watchdog_us = os.environ.get("WATCHDOG_USEC", "")
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            watchdog_us = ""  # meant for another process of this service
        self._watchdog_s = int(watchdog_us) / 2e6 if watchdog_us.isdecimal() else None

    @property
    def is_alive(self) -> bool:
        """Whether the loop goes round."""
        return time.monotonic() - self._turned_at < ALIVE_S

    def turn(self, *, ready: bool) -> None:
        """Note that the loop goes round, and whether the daemon can serve now."""
        now = self._turned_at = time.monotonic()
        if ready and not self.is_ready:
            _notify("READY=1")
        self.is_ready = ready
        if self._watchdog_s is not None and now - self._told_at >= self._watchdog_s:
            self._told_at = now
            _notify("WATCHDOG=1")

    def stop(self) -> None:
        """Note that the daemon drains."""
        self.is_ready = False
        _notify("STOPPING=1")


def _notify(state: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), address)
